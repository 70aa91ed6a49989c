"""What the command lines of cross-validation and study share: where, on which folds and how pieces are done."""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fire.parser import DefaultParseValue

from ..data.datalist import LOCKED, fold_sizes
from ..errors import InputError
from .arms import Pretraining
from .piece import Piece
from .pieces import do_pieces, done_pieces, duration, probe_seconds, projected_seconds

__all__ = ["Plan", "add_options", "carry_out", "numbers"]


class Plan:
    """What the command line says of where, on which folds and how pieces are done.

    Args:
        given: of `add_options`.
        overrides: further arguments, `--key value` each, as for `python -m monai.bundle run`.

    Raises:
        InputError: on an argument that is none, an output_dir that cannot be written to, or folds that the datalist
            does not have or that have no test cases.
    """

    def __init__(self, given: argparse.Namespace, overrides: Sequence[str]) -> None:
        self.given, self.output_dir = given, given.output_dir.expanduser().absolute()
        there = next(folder for folder in (self.output_dir, *self.output_dir.parents) if folder.exists())
        if not there.is_dir() or not os.access(there, os.W_OK):
            raise InputError(f"--output_dir: {there} is no folder that can be written to")
        files = DefaultParseValue(given.config_file)
        files = [files] if isinstance(files, str) else files
        if not isinstance(files, (list, tuple)) or not files:
            raise InputError(
                f"--config_file is a file or a list of files, such as \"['a.yaml','b.yaml']\", not {files!r}"
            )
        self.config_files = tuple(str(Path(str(file)).expanduser().absolute()) for file in files)
        absent = [file for file in self.config_files if not Path(file).is_file()]
        if absent:
            raise InputError(f"--config_file: there is no file {absent[0]}")
        dataset_dir = given.dataset_dir.expanduser().absolute()
        datalist = (given.datalist or dataset_dir / "datalist.json").expanduser().absolute()
        sizes = fold_sizes(datalist)
        self.folds = numbers(given.folds, "--folds") if given.folds is not None else list(range(len(sizes)))
        if max(self.folds) >= len(sizes):
            raise InputError(f"--folds: {datalist} has folds 0 to {len(sizes) - 1}, not {given.folds}")
        untested = [fold for fold in self.folds if not sizes[fold]["test"]]
        if untested:
            raise InputError(
                f"fold {untested[0]} of {datalist} has no test cases: to judge on the official validation part, make "
                "the datalist with --validation_as_test"
            )
        if given.locked and not sizes[0][LOCKED]:
            raise InputError(
                f"--locked: {datalist} has no locked cases: make it with scripts/make_datalist --lock SHARE"
            )
        self.settings: dict[str, Any] = {
            "dataset_dir": str(dataset_dir),
            "datalist": str(datalist),
            "bundle_root": str(Path(self.config_files[0]).parents[1]),
            "progress": False,
            **_overrides(overrides),
        }

    def pieces(
        self, seeds: Sequence[int], folder: Path, files: Sequence[str] = (), pretrain: Pretraining | None = None
    ) -> list[Piece]:
        """A piece for each seed and fold, with more overlays.

        Args:
            seeds: of the trainings.
            folder: of their folders.
            files: overlays after those of the command line.
            pretrain: see Piece.
        """
        return [
            Piece(
                folder / f"seed{seed}_fold{fold}",
                (*self.config_files, *files),
                {**self.settings, "fold": fold, "seed": seed},
                pretrain,
            )
            for seed in seeds
            for fold in self.folds
        ]


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options that cross-validation and study share."""
    parser.add_argument("--config_file", required=True, help="config or list of configs, as for monai.bundle run")
    parser.add_argument("--dataset_dir", type=Path, required=True, help="folder of the image paths")
    parser.add_argument("--datalist", type=Path, help="made by scripts/make_datalist (dataset_dir/datalist.json)")
    parser.add_argument("--output_dir", type=Path, required=True, help="gets a folder a piece, tables and figures")
    parser.add_argument("--folds", help="such as 0,1 (all)")
    parser.add_argument("--processes", type=int, default=1, help="pieces at once on this machine (%(default)s)")
    parser.add_argument("--piece", type=int, help="do this one alone, by its number: for job arrays")
    parser.add_argument("--list", action="store_true", help="print the numbers of the pieces and end")
    parser.add_argument("--locked", action="store_true", help="judge the trainings on the locked patients: at the end")
    parser.add_argument("--report", action="store_true", help="tables and figures of what is done, and end")


def carry_out(pieces: Sequence[Piece], plan: Plan) -> bool:
    """Do what the command line asks for; whether a report is to follow.

    Raises:
        InputError: a piece failed, or there is no piece of that number.
    """
    given = plan.given
    done = done_pieces(pieces)
    if given.list:
        for number, piece in enumerate(pieces):
            print(
                f"{number}\t{'done' if piece.folder in done else 'open'}\t{piece.folder.relative_to(plan.output_dir)}"
            )
        return False
    if given.report:
        return True
    if given.processes < 1:
        raise InputError(f"--processes must be at least 1, not {given.processes}")
    if given.piece is not None:
        if not 0 <= given.piece < len(pieces):
            raise InputError(f"--piece must be 0 to {len(pieces) - 1}, not {given.piece}")
        do_pieces([pieces[given.piece]], progress=False)
        return False
    left = [piece for piece in pieces if piece.folder not in done]
    if left:
        print(f"{len(pieces)} pieces, {len(done)} done; {_projection(pieces, left, done, given.processes)}", flush=True)
    do_pieces(pieces, given.processes)
    return True


def _projection(
    pieces: Sequence[Piece], left: Sequence[Piece], done: Mapping[Path, Mapping[str, Any]], processes: int
) -> str:
    seconds, source = projected_seconds(pieces, done, processes), "the pieces that are done"
    if math.isnan(seconds):
        print("timing two epochs of the first piece …", flush=True)
        seconds, source = probe_seconds(left, processes), "two epochs of the first piece"
    return f"about {duration(seconds)} to go, by {source}"


def numbers(text: str, option: str) -> list[int]:
    """Different whole numbers from text such as "0,1,2"."""
    try:
        found = [int(part) for part in str(text).split(",")]
    except ValueError:
        found = []
    if not found or min(found) < 0 or len(set(found)) < len(found):
        raise InputError(f"{option} takes different whole numbers by commas, such as 0,1,2, not {text!r}")
    return found


def _overrides(arguments: Sequence[str]) -> dict[str, Any]:
    """`--key value` or `--key=value`, the values read as `python -m monai.bundle run` reads them."""
    found: dict[str, Any] = {}
    rest = list(arguments)
    while rest:
        key, given, text = rest.pop(0).partition("=")
        if not key.startswith("--") or not (given or rest):
            raise InputError(f"{key!r} is no option, and settings of the config are given as --key value")
        value = DefaultParseValue(text if given else rest.pop(0))
        found[key.removeprefix("--")] = "null" if value is None else value  # MONAI leaves out what is None
    for own, option in (("fold", "--folds"), ("seed", "--seeds, or the stage of the study")):
        if own in found:
            raise InputError(f"--{own} is set for each piece: use {option}")
    return found
