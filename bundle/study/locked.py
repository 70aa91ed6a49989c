"""The locked patients of a datalist, judged by the trainings of a study once it is over."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence

from tqdm import tqdm

from ..data.datalist import LOCKED
from ..errors import InputError
from .arm_results import ArmResult
from .comparison import compared
from .out_of_fold import out_of_fold
from .piece import Piece, evaluated
from .pieces import PACKAGE, done_pieces

__all__ = ["collect_locked", "judge_locked"]


def judge_locked(pieces: Sequence[Piece], progress: bool = True) -> None:
    """Evaluate the weights of finished pieces on the locked cases; what is there is not done again.

    Args:
        pieces: those that are not done are passed over.
        progress: show a bar.

    Raises:
        InputError: an evaluation failed, as on a datalist without locked cases.
    """
    done = done_pieces(pieces)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(PACKAGE.parent), os.environ.get("PYTHONPATH", "")])}
    for piece in tqdm([p for p in pieces if p.folder in done], desc="locked", unit="piece", disable=not progress):
        if evaluated(piece, LOCKED):
            continue
        piece.save()  # another command may have changed what the process reads
        with (piece.folder / "log.txt").open("ab") as log:
            command = [sys.executable, "-m", f"{PACKAGE.name}.study.piece", str(piece.folder), LOCKED]
            status = subprocess.call(command, env=environment, stdout=log, stderr=subprocess.STDOUT)
        if status or not evaluated(piece, LOCKED):
            lines = (piece.folder / "log.txt").read_text(encoding="utf-8", errors="replace").splitlines()
            told = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")] or ["it ended early"]
            raise InputError(f"the locked cases were not judged: {told[-1]} (more in {piece.folder / 'log.txt'})")


def collect_locked(name: str, pieces: Sequence[Piece], resamples: int = 1000, seed: int = 0) -> ArmResult | None:
    """What the finished pieces of an arm say of the locked cases, each piece for itself; None where none is done.

    Args:
        name: of the arm.
        pieces: all of the arm's, judged by `judge_locked`.
        resamples: of patients.
        seed: of the resampling.
    """
    done = done_pieces(pieces)
    if not done:
        return None
    by_piece = {number: out_of_fold([folder], section=LOCKED) for number, folder in enumerate(done)}
    return ArmResult(name, done, by_piece, compared(list(by_piece.values()), resamples, seed))
