"""The locked patients of a datalist, judged by the trainings of a study once it is over."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

from tqdm import tqdm

from ..data.datalist import LOCKED
from ..errors import InputError
from .arm_results import ArmResult
from .comparison import compared
from .out_of_fold import OutOfFold, out_of_fold
from .piece import BUSY, Piece, evaluated
from .pieces import done_pieces, ended_with_us, last_words, piece_command, start

__all__ = ["collect_locked", "judge_locked"]


def judge_locked(pieces: Sequence[Piece], progress: bool = True) -> None:
    """Evaluate the weights of finished pieces on the locked cases; what is there is not done again.

    Args:
        pieces: those that are not done are passed over.
        progress: show a bar.

    Raises:
        InputError: an evaluation failed, or another process is at it.
    """
    done = done_pieces(pieces)
    for piece in tqdm([p for p in pieces if p.folder in done], desc="locked", unit="piece", disable=not progress):
        if not (piece.folder / "model.pt").exists():
            raise InputError(f"{piece.folder} has no weights (model.pt) any more: delete the folder and train it again")
        if evaluated(piece, LOCKED):
            continue
        piece.save()  # another command may have changed what the process reads
        process = start(piece, 1, lambda one: [*piece_command(one), LOCKED])
        with ended_with_us({piece.folder: process}):
            status = process.wait()
        if status == BUSY:
            raise InputError(f"another process is at {piece.folder}: run the same command again when it has ended")
        if status:
            told = last_words(piece.folder, status)
            raise InputError(f"the locked cases were not judged: {told} (more in {piece.folder / 'log.txt'})")


def collect_locked(name: str, pieces: Sequence[Piece], resamples: int = 1000, seed: int = 0) -> ArmResult | None:
    """What the pieces of an arm that judged the locked cases say, each for itself; None where none has.

    Args:
        name: of the arm.
        pieces: all of the arm's, judged by `judge_locked`.
        resamples: of patients.
        seed: of the resampling.
    """
    judged = [piece for piece in pieces if (piece.folder / "model.pt").exists() and evaluated(piece, LOCKED)]
    done = done_pieces(judged)
    if not done:
        return None
    by_piece: dict[Hashable, OutOfFold] = {
        (result["fold"], result["seed"]): out_of_fold([folder], section=LOCKED) for folder, result in done.items()
    }
    return ArmResult(name, done, by_piece, compared(by_piece, resamples, seed))
