"""Arms side by side: pooled scores with intervals over patients, and paired differences."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..errors import InputError
from ..evaluation.bootstrap import patient_weights, percentile_interval, weighted_scores
from ..evaluation.key_slices import RANKINGS
from .out_of_fold import OutOfFold

__all__ = ["COMPARED", "Compared", "Figure", "compared", "difference", "figure", "seed_agreement"]

Floats = NDArray[np.float64]

COMPARED: dict[str, str] = {
    "auc": "AUC",
    "accuracy": "accuracy, the more probable class",
    "f1_macro": "macro F1, the more probable class",
    "nll": "NLL",
    "brier": "Brier score",
    "ece": "expected calibration error",
    "calibrated_nll": "NLL after the temperature of the inner validation",
    "calibrated_brier": "Brier score after it",
    "calibrated_ece": "expected calibration error after it",
    "point_accuracy": "accuracy at the operating point of the inner validation",
    "point_f1_macro": "macro F1 there",
    "point_sensitivity": "sensitivity there",
    "point_specificity": "specificity there",
    **{f"hit_1_{by}": f"share of positive cases whose first slice by {by} is a true one" for by in RANKINGS},
    **{f"slice_auc_{by}": f"ROC area of slice truth within a positive case by {by}, mean" for by in RANKINGS},
}
PLAIN = ("auc", "accuracy", "f1_macro", "nll", "brier", "ece")


class Figure(NamedTuple):
    """A value with its 95% interval."""

    value: float
    low: float
    high: float


class Compared(NamedTuple):
    """Scores of an arm, each the mean over its seeds: on the cases themselves, and on each resample of patients.

    Attributes:
        values: score → value. `ensemble_<score>` is of the probabilities averaged over the seeds, with more than one.
        samples: score → (R,) of the resamples.
        cases: names, and with them the resamples, that differences are paired by.
    """

    values: dict[str, float]
    samples: dict[str, Floats]
    cases: list[str]


def compared(by_seed: Sequence[OutOfFold], resamples: int = 1000, seed: int = 0) -> Compared:
    """Scores of an arm over its seeds, pooled over folds.

    Args:
        by_seed: one a seed, all of the same cases.
        resamples: of patients, with replacement, all their cases with them.
        seed: of the draw. Equal for arms whose differences are asked for.

    Raises:
        InputError: seeds of different cases.
    """
    first = by_seed[0].raw
    if any(one.raw.cases != first.cases for one in by_seed):
        raise InputError("the seeds of an arm have different test cases: see which were refused")
    drawn = patient_weights(first.patients, resamples, seed)
    weights = np.concatenate([np.ones((1, len(first.cases))), drawn])
    rows = [_scores(one, weights) for one in by_seed]
    scores = {name: _mean([row[name] for row in rows]) for name in rows[0]}
    if len(by_seed) > 1:
        together = np.mean([one.raw.probabilities for one in by_seed], axis=0)
        found = weighted_scores(first.labels, together, together.argmax(axis=1), weights)
        scores |= {f"ensemble_{name}": found[name] for name in PLAIN}
    return Compared(
        {name: float(values[0]) for name, values in scores.items()},
        {name: values[1:] for name, values in scores.items()},
        first.cases,
    )


def _mean(rows: Sequence[Floats]) -> Floats:
    return np.asarray(np.mean(rows, axis=0), dtype=np.float64)


def _scores(one: OutOfFold, weights: Floats) -> dict[str, Floats]:
    labels, raw = one.raw.labels, one.raw.probabilities
    plain = weighted_scores(labels, raw, raw.argmax(axis=1), weights)
    after = weighted_scores(labels, one.calibrated, one.at_point, weights)
    result = {name: plain[name] for name in PLAIN}
    result |= {f"calibrated_{name}": after[name] for name in ("nll", "brier", "ece")}
    result |= {f"point_{name}": after[name] for name in ("accuracy", "f1_macro", "sensitivity", "specificity")}
    for by in RANKINGS:
        result[f"hit_1_{by}"] = _weighted_mean(one.hit[by], weights)
        result[f"slice_auc_{by}"] = _weighted_mean(one.instance_auc[by], weights)
    return result


def _weighted_mean(values: Floats, weights: Floats) -> Floats:
    known = np.isfinite(values)
    total = weights[:, known].sum(axis=1)
    safe = np.where(total > 0, total, 1.0)
    return np.where(total > 0, weights[:, known] @ values[known] / safe, math.nan)


def figure(one: Compared, name: str) -> Figure:
    """A score with its interval over patients."""
    interval = percentile_interval(one.samples[name])
    return Figure(one.values[name], interval.low, interval.high)


def difference(one: Compared, other: Compared, name: str) -> Figure:
    """How much larger a score is than that of another arm on the same cases, paired by resample.

    Raises:
        InputError: the arms have different test cases.
    """
    if one.cases != other.cases:
        alone = sorted(set(one.cases) ^ set(other.cases))
        raise InputError(
            f"arms can be compared on the same test cases only, and {alone[0]} is in one alone: was it refused there?"
        )
    interval = percentile_interval(one.samples[name] - other.samples[name])
    return Figure(one.values[name] - other.values[name], interval.low, interval.high)


def seed_agreement(by_seed: Sequence[OutOfFold]) -> Mapping[str, float]:
    """Ranking → share of positive cases with slice truth whose first slice is the same with two seeds, over all pairs.

    NaN with one seed, or without such cases.
    """
    found = {}
    for by in RANKINGS:
        counted = np.isfinite(by_seed[0].hit[by])
        pairs = [one.top_slice[by][counted] == other.top_slice[by][counted] for one, other in combinations(by_seed, 2)]
        found[by] = float(np.mean(pairs)) if pairs and counted.any() else math.nan
    return found
