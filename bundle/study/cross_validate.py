"""Command line of scripts/cross_validate: one config over all folds and several seeds."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from ..data.datalist import LOCKED
from ..errors import InputError, command_line
from .arm_results import collect
from .locked import collect_locked, judge_locked
from .plan import Plan, add_options, carry_out, numbers
from .report import report

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """One config over all folds and several seeds.

    Raises:
        InputError: on a wrong option or file, or when pieces failed.
    """
    parser = argparse.ArgumentParser(
        prog="cross_validate",
        allow_abbrev=False,  # --fold and --seed are settings, not these options cut short
        description="Train and evaluate one config on every fold of a datalist with several seeds. Settings of the "
        "config follow as --key value. The same command again goes on where it was, on this machine or on another "
        "one that sees the folder.",
    )
    add_options(parser)
    parser.add_argument("--seeds", default="0", help="of the trainings, by commas (%(default)s)")
    given, rest = parser.parse_known_args(arguments)
    plan = Plan(given, rest)
    pieces = plan.pieces(numbers(given.seeds, "--seeds"), plan.output_dir)
    if carry_out(pieces, plan):
        folder, look = plan.output_dir, collect
        if given.locked:
            if not given.report:  # which evaluates nothing
                judge_locked(pieces)
            folder, look = folder / LOCKED, collect_locked
        result = look(plan.output_dir.name, pieces)
        if result is None and given.report:
            raise InputError("no seed has all its folds done yet: run the same command without --report")
        if result is None:  # other processes are at the rest, as was said
            return 0
        report([result], result.name, folder, locked=given.locked)
    return 0


if __name__ == "__main__":
    command_line(main)
