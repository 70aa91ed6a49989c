"""Command line of scripts/stability_study: many arms on the same folds, and what makes them steady."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..data.datalist import LOCKED
from ..errors import InputError, command_line
from .arm_results import collect
from .arms import OVERLAYS, Arm, Stage, read_study, write_overlay
from .locked import collect_locked, judge_locked
from .piece import Piece
from .plan import Plan, add_options, carry_out
from .report import report

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Many arms on the same folds.

    Raises:
        InputError: on a wrong option or file, or when pieces failed.
    """
    parser = argparse.ArgumentParser(
        prog="stability_study",
        allow_abbrev=False,
        description="Train and evaluate the arms of a study on the same folds and compare them: scores, steadiness, "
        "evidence, calibration. Settings of the config, for all arms, follow as --key value. The same command again "
        "goes on where it was.",
    )
    add_options(parser)
    parser.add_argument("--study", type=Path, required=True, help="stages and arms, such as configs/study.yaml")
    parser.add_argument("--stage", required=True, help="of the study, such as screen")
    parser.add_argument("--arms", help="names by commas (all)")
    parser.add_argument("--reference", default="before", help="arm that differences are against (%(default)s)")
    given, rest = parser.parse_known_args(arguments)
    plan = Plan(given, rest)
    stages, arms = read_study(given.study)
    if given.stage not in stages:
        raise InputError(f"--stage must be one of {', '.join(stages)}, not {given.stage!r}")
    chosen = [name.strip() for name in given.arms.split(",")] if given.arms else list(arms)
    unknown = [name for name in chosen if name not in arms]
    if unknown:
        raise InputError(f"--arms: there is no arm {unknown[0]!r} in {given.study}; there are {', '.join(arms)}")
    _check_apart({name: arms[name] for name in chosen}, plan.settings)
    pieces = {name: _pieces(plan, given.stage, stages[given.stage], name, arms[name]) for name in chosen}
    if carry_out([piece for group in pieces.values() for piece in group], plan):
        folder, look = plan.output_dir, collect
        if given.locked:
            if not given.report:  # which evaluates nothing
                judge_locked([piece for group in pieces.values() for piece in group])
            folder, look = folder / LOCKED, collect_locked
        found = {name: look(name, group) for name, group in pieces.items()}
        whole = [result for result in found.values() if result is not None]
        if not whole and given.report:
            raise InputError("no arm has all folds of a seed done yet: run the same command without --report")
        if not whole:  # other processes are at the rest, as was said
            return 0
        left_out = [name for name, result in found.items() if result is None]
        report(whole, given.reference, folder, left_out, given.locked)
    return 0


def _check_apart(arms: Mapping[str, Arm], given: Mapping[str, Any]) -> None:
    """Say which settings of an arm the command line replaces; refuse two arms that it makes the same."""
    seen: dict[str, str] = {}
    for name, arm in arms.items():
        replaced = sorted(arm.settings.keys() & given.keys())
        left = {key: value for key, value in arm.settings.items() if key not in given}
        twin = seen.setdefault(repr((arm.files, sorted(left.items()), arm.pretrain)), name)
        said = ", ".join(f"--{key}" for key in replaced)
        both = said or ", ".join(f"--{key}" for key in sorted(arms[twin].settings.keys() & given.keys()))
        # Two arms that the study itself has alike are its author's business.
        if twin != name and both:
            raise InputError(
                f"arms {twin} and {name} are the same with {both} of the command line, which stands above what an arm "
                "sets: leave that out, or one of the arms"
            )
        if replaced:
            print(f"{name}: {said} of the command line stands above what the arm sets", file=sys.stderr)


def _pieces(plan: Plan, stage_name: str, stage: Stage, name: str, arm: Arm) -> list[Piece]:
    overlays = plan.output_dir / OVERLAYS
    common, own = overlays / "stages" / f"{stage_name}.yaml", overlays / "arms" / f"{name}.yaml"
    write_overlay(stage.settings, common, f"what all arms of the stage {stage_name} have in common")
    write_overlay(arm.settings, own, f"the arm {name}")
    files = [*stage.files, str(common), *arm.files, str(own)]
    return plan.pieces(stage.seeds, plan.output_dir / name, files, arm.pretrain)


if __name__ == "__main__":
    command_line(main)
