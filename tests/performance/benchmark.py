"""Training, inference and growth of this project, of stock MONAI and of the limit of this machine, as ratios; and
whether this project's fast paths give the same results as its plain one.

Every figure is a ratio within one run: contenders take turns, and the ratio is taken within each turn. What is finished
is kept in the output folder, so that an interrupted run goes on.
"""

from __future__ import annotations

import argparse
import logging
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from bundle.data.datalist import SECTIONS
from bundle.errors import InputError, command_line
from bundle.files import write_json

from .agreement_part import Trained, agreement_of_trained
from .before_part import before_and_after
from .growth_part import growth
from .inference_part import agreement, inference_cell, profile_inference, readable, scans_of, sources
from .made_scans import digest_of_makers
from .measuring import Store, surroundings
from .picture import draw
from .report import (
    Verdict,
    table_of_agreement,
    table_of_before,
    table_of_cell,
    table_of_growth,
    table_of_trained,
    verdicts,
    verdicts_of_agreement,
    verdicts_of_growth,
    verdicts_of_trained,
)
from .settings import Run, Settings
from .training_part import profile_training, training_cell

__all__ = ["main"]

PARTS, NORMS = ("train", "infer", "before", "growth", "agreement"), ("batch", "group")


def main(arguments: Sequence[str] | None = None, settings: Settings | None = None) -> int:
    parser = argparse.ArgumentParser(prog="scripts/benchmark", description=__doc__)
    words: dict[str, Any] = {"type": lambda text: text.split(",")}
    parser.add_argument(
        "--parts", default=list(PARTS[:-1]), metavar="A,B",
        help="train, infer, before, growth (these four) and agreement, which needs --weights and --datalist", **words,
    )  # fmt: skip
    parser.add_argument("--sizes", default=["128", "224"], metavar="A,B", help="pixels of a slice (128,224)", **words)
    parser.add_argument("--norms", default=list(NORMS), metavar="A,B", help="batch, group (both)", **words)
    parser.add_argument("--repeats", type=int, help="of each measurement (4; 3 for large slices)")
    parser.add_argument("--batch-size", type=int, help="bags of a training step (1)")
    parser.add_argument("--scans", type=Path, help="measure inference on the scans directly in this folder too")
    parser.add_argument("--weights", type=Path, help="agreement: model.pt of a training run")
    parser.add_argument("--datalist", type=Path, help="agreement: labelled cases")
    parser.add_argument("--dataset-dir", type=Path, help="agreement: folder of their images (that of the datalist)")
    parser.add_argument(
        "--sections", default=["validation", "test"], metavar="A,B", help="agreement: cases (validation,test)", **words
    )
    parser.add_argument("--fold", type=int, default=0, help="agreement: of the datalist (%(default)s)")
    parser.add_argument("--output", type=Path, default=Path("output/benchmark"), help="folder (%(default)s)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="(%(default)s)")
    parser.add_argument("--fresh", action="store_true", help="measure again what is there already")
    given = parser.parse_args(arguments)
    _check(given)
    settings = replace(settings or Settings(), device=given.device)
    if given.batch_size is not None:
        settings = replace(settings, batch_size=given.batch_size, bags=max(settings.bags, given.batch_size))
    logging.getLogger("ignite").setLevel(logging.WARNING)
    started = time.monotonic()
    around = surroundings(asdict(settings))
    bar = tqdm(desc="benchmark", bar_format="{desc} [{elapsed}]", disable=None)

    def tell(text: str) -> None:
        bar.set_description_str(text)

    trained = _trained(given) if "agreement" in given.parts else None
    work = given.output / f"scans-{digest_of_makers()}"
    work.mkdir(parents=True, exist_ok=True)
    run = Run(settings, given.repeats, work, Store(given.output, around, given.fresh), tell)
    results: dict[str, Any] = {"surroundings": around, "cells": [], "agreement": [], "before": [], "growth": None}
    results |= {"trained": None, "verdicts": []}
    steps = {"train": _train, "infer": _infer, "before": _before, "growth": _grow}
    print(_heading(around, given.parts), flush=True)
    for part in given.parts:
        if trained is not None and part == "agreement":
            _agree(run, trained, results)
        else:
            steps[part](run, given, results)
        write_json(given.output / "benchmark.json", results)
        if results["cells"] or results["growth"]:
            draw(results, given.output / "benchmark.png")
    bar.close()
    print(f"\n{given.output / 'benchmark.json'}, after {(time.monotonic() - started) / 60:.1f} minutes")
    return 0


def _check(given: argparse.Namespace) -> None:
    for name, known in {"parts": PARTS, "norms": NORMS, "sections": SECTIONS}.items():
        unknown = [word for word in getattr(given, name) if word not in known]
        if unknown:
            raise InputError(f"--{name} takes {', '.join(known)}, with commas between them, not {unknown[0]!r}")
    if not all(size.isdecimal() and int(size) >= 32 for size in given.sizes):
        raise InputError(f"--sizes takes whole numbers of at least 32 pixels, such as 128,224, not {given.sizes}")
    given.sizes = [int(size) for size in given.sizes]
    for name in ("repeats", "batch_size"):
        if getattr(given, name) is not None and getattr(given, name) < 1:
            raise InputError(f"--{name.replace('_', '-')} must be 1 or more, not {getattr(given, name)}")
    if given.scans is not None and not given.scans.is_dir():
        raise InputError(f"--scans: there is no folder {given.scans}")
    if given.output.exists() and not given.output.is_dir():
        raise InputError(f"--output: {given.output} is a file; give a folder")
    if given.device == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: this machine has no CUDA device; use cpu")


def _trained(given: argparse.Namespace) -> Trained:
    if given.weights is None or given.datalist is None:
        raise InputError("--parts agreement needs --weights, a model.pt of a training run, and --datalist, its cases")
    weights, datalist = given.weights.absolute(), given.datalist.absolute()
    folder = datalist.parent if given.dataset_dir is None else given.dataset_dir.absolute()
    trained = Trained(weights, datalist, folder, tuple(dict.fromkeys(given.sections)), given.fold)
    trained.cases()
    return trained


def _heading(around: dict[str, Any], parts: Sequence[str]) -> str:
    machine, settings = around["machine"], around["settings"]
    versions = ", ".join(f"{name} {version}" for name, version in around["software"].items())
    lines = [
        f"{machine['gpu'] if settings['device'] == 'cuda' else machine['processor'] or machine['architecture']}, "
        f"{machine['threads']} threads; {versions}"
    ]
    if set(parts) != {"agreement"}:  # which has a network and bags of its own, and no times
        lines.append(
            f"the encoder of configs/train.yaml, {settings['bag_size']} slices a bag of 1 channel, "
            f"{settings['batch_size']} bags a batch; "
            f"median [quartiles] of paired repeats; starting a process and building the network are not counted"
        )
    return "\n".join(lines)


def _train(run: Run, given: argparse.Namespace, results: dict[str, Any]) -> None:
    for size in given.sizes:
        for norm in given.norms:
            cell = training_cell(run, size, norm)
            _show(run, results, cell, lambda size=size, norm=norm: profile_training(run, size, norm))


def _infer(run: Run, given: argparse.Namespace, results: dict[str, Any]) -> None:
    real = None if given.scans is None else readable(given.scans, run)
    for size in given.sizes:
        for norm in given.norms:
            many = norm == given.norms[0]
            made = {source: scans_of(run, source, size) for source in sources(run, many)}
            for source, scans in {**made, **({} if real is None else {"real scans": real})}.items():
                cell = inference_cell(run, size, norm, source, scans)
                _show(run, results, cell, lambda s=scans, size=size, norm=norm: profile_inference(run, size, norm, s))
            # The same bags for every norm, also where fewer kinds are timed.
            bags = [path for source in sources(run, True) for path in scans_of(run, source, size)]
            results["agreement"].append(agreement(run, size, norm, bags))
    tqdm.write("\n" + table_of_agreement(results["agreement"]))
    _judge(results, "agreement", verdicts_of_agreement(results["agreement"]))


def _before(run: Run, given: argparse.Namespace, results: dict[str, Any]) -> None:
    for size in given.sizes:
        for cell in before_and_after(run, size, given.norms[0]):
            results["before"].append(cell)
            tqdm.write("\n" + table_of_before(cell))


def _agree(run: Run, trained: Trained, results: dict[str, Any]) -> None:
    results["trained"] = agreement_of_trained(run, trained)
    tqdm.write("\n" + table_of_trained(results["trained"]))
    _judge(results, "trained weights", verdicts_of_trained(results["trained"]))


def _grow(run: Run, given: argparse.Namespace, results: dict[str, Any]) -> None:
    norm, settings = given.norms[0], run.settings
    sides = (settings.grow_side, *settings.memory_sides)
    results["growth"] = growth(run, norm)
    tqdm.write(f"\ngrowth, {settings.grow_side} pixels, {norm} norm\n\n{table_of_growth(results['growth'])}")
    _judge(results, "growth", verdicts_of_growth(results["growth"], settings.memory_slices, sides))


def _show(run: Run, results: dict[str, Any], cell: dict[str, Any], profile: Callable[[], str]) -> None:
    """Print a cell and its verdicts; where one is missed, also where the time went."""
    results["cells"].append(cell)
    tqdm.write("\n" + table_of_cell(cell))
    where = " ".join(str(cell[key]) for key in ("part", "size", "norm", "scans") if cell[key])
    if not _judge(results, where, verdicts(cell)):
        run.tell(f"{where}: profile")
        tqdm.write(f"\nwhere the time of this project goes ({where}):\n{profile()}")


def _judge(results: dict[str, Any], where: str, found: Sequence[Verdict]) -> bool:
    for verdict in found:
        tqdm.write(str(verdict))
    results["verdicts"] += [{"where": where, **asdict(verdict)} for verdict in found]
    return all(verdict.passed for verdict in found)


if __name__ == "__main__":
    command_line(lambda: main(sys.argv[1:]))
