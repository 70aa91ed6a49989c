"""Arms of a study as their finished pieces show them: ready to be compared, tabulated and drawn."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from .comparison import Compared, Figure, compared
from .out_of_fold import OutOfFold, out_of_fold
from .piece import Piece
from .pieces import done_pieces

__all__ = ["ArmResult", "collect", "mean_of", "mean_steadiness", "of_pieces", "variance_ratio"]


class ArmResult(NamedTuple):
    """An arm of which every fold of at least one seed is done.

    Attributes:
        name: of the arm.
        pieces: folder → result, of the seeds that are whole.
        by_seed: seed → what it says of all cases; on locked cases a piece's fold and seed → what it says.
        compared: scores over these seeds.
    """

    name: str
    pieces: dict[Path, dict[str, Any]]
    by_seed: dict[Hashable, OutOfFold]
    compared: Compared


def collect(name: str, pieces: Sequence[Piece], resamples: int = 1000, seed: int = 0) -> ArmResult | None:
    """The arm as far as its seeds are whole; None where none is.

    Args:
        name: of the arm.
        pieces: all of the arm's.
        resamples: of patients.
        seed: of the resampling.
    """
    done = done_pieces(pieces)
    seeds: dict[int, list[Path]] = {}
    for piece in pieces:
        seeds.setdefault(piece.settings["seed"], []).append(piece.folder)
    whole = {number: folders for number, folders in seeds.items() if all(folder in done for folder in folders)}
    if not whole:
        return None
    by_seed: dict[Hashable, OutOfFold] = {number: out_of_fold(folders) for number, folders in whole.items()}
    kept = {folder: done[folder] for folders in whole.values() for folder in folders}
    return ArmResult(name, kept, by_seed, compared(by_seed, resamples, seed))


def of_pieces(arm: ArmResult, *keys: str) -> list[float]:
    """A number of the arm's pieces, those that have none left out."""
    found: list[Any] = list(arm.pieces.values())
    for key in keys:
        found = [one.get(key) for one in found if one is not None]
    return [float(value) for value in found if value is not None]


def mean_of(values: Sequence[float]) -> float:
    """Their mean; NaN of none."""
    return float(np.mean(values)) if values else math.nan


def mean_steadiness(arm: ArmResult, name: str) -> float:
    """Mean over the pieces of a figure of `STEADINESS`, those that have none left out."""
    return mean_of(of_pieces(arm, "steadiness", name))


def variance_ratio(reference: ArmResult, other: ArmResult) -> Figure:
    """How many times less the training loss of `other` varies: the ratio of the mean variances of the pieces.

    The ends are the smallest and the largest ratio of two pieces of the same fold and seed, no confidence interval.
    """
    before, after = _variances(reference), _variances(other)
    pairs = [(before[place], after[place]) for place in before if place in after]
    if not pairs:
        return Figure(math.nan, math.nan, math.nan)
    ratios = [a / b for a, b in pairs]
    means = np.mean(pairs, axis=0)
    return Figure(float(means[0] / means[1]), min(ratios), max(ratios))


def _variances(arm: ArmResult) -> dict[tuple[int, int], float]:
    """(fold, seed) → variance of the batch NLL; a piece too short for one has none."""
    found = {(one["fold"], one["seed"]): one["steadiness"]["nll_variance"] for one in arm.pieces.values()}
    return {place: float(value) for place, value in found.items() if value}
