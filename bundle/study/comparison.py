"""Arms side by side: pooled scores with intervals over patients, and paired differences."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Mapping, Sequence
from itertools import combinations
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..errors import InputError
from ..evaluation.abstention import aurc, confidence, risk_at
from ..evaluation.bootstrap import patient_weights, percentile_interval, weighted_scores
from ..evaluation.key_slices import RANKINGS
from .out_of_fold import OutOfFold

__all__ = ["COMPARED", "Compared", "Figure", "compared", "difference", "figure"]

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
    "aurc": "share of errors of the surest cases, mean over all shares of them, after the temperature",
    "risk_80": "share of errors of the surest 80% of the cases, after it",
    **{f"hit_1_{by}": f"share of positive cases whose first slice by {by} is a true one" for by in RANKINGS},
    **{f"hit_3_{by}": f"share of positive cases with a true one among the first three by {by}" for by in RANKINGS},
    **{f"distance_mm_{by}": f"mm from the first slice by {by} to the nearest true one, mean" for by in RANKINGS},
    **{f"slice_auc_{by}": f"ROC area of slice truth within a positive case by {by}, mean" for by in RANKINGS},
}
ENSEMBLE, AGREE = "ensemble_", "agree_"
PLAIN = ("auc", "accuracy", "f1_macro", "nll", "brier", "ece")
# How a figure of evidence, one of `CASE_SCORES`, is called here.
EVIDENCE = {"hit_1": "hit_1", "hit_3": "hit_3", "distance_mm": "distance_mm", "instance_auc": "slice_auc"}


class Figure(NamedTuple):
    """A value with its 95% interval."""

    value: float
    low: float
    high: float


class Compared(NamedTuple):
    """Scores of an arm: a row a run, first on the cases themselves and then on each of R resamples of patients.

    Attributes:
        by_run: run (its seed, or fold and seed) → score → (1 + R,).
        together: score → (1 + R,) of all runs at once, empty with one run: `ensemble_<score>` of the probabilities
            averaged over them; `agree_<ranking>`, the share of positive cases with slice truth whose first slice is the
            same in two runs, over all pairs of them.
        cases: names, and with them the resamples, that differences are paired by.
    """

    by_run: dict[Hashable, dict[str, Floats]]
    together: dict[str, Floats]
    cases: list[str]

    def rows(self, name: str, runs: Iterable[Hashable] | None = None) -> Floats:
        """(1 + R,) of a score, the mean over these runs (None: all), or of all runs at once."""
        if name in self.together:
            return self.together[name]
        chosen = self.by_run if runs is None else runs
        return np.asarray(np.mean([self.by_run[run][name] for run in chosen], axis=0), dtype=np.float64)

    @property
    def values(self) -> dict[str, float]:
        """Score → value on the cases themselves, the mean over the runs, and of all runs at once."""
        names = [*next(iter(self.by_run.values())), *self.together]
        return {name: float(self.rows(name)[0]) for name in names}


def compared(by_run: Mapping[Hashable, OutOfFold], resamples: int = 1000, seed: int = 0) -> Compared:
    """Scores of an arm over its runs, each pooled over folds.

    Args:
        by_run: run → what it says, all of the same cases. Differences between arms are over the runs of both.
        resamples: of patients, with replacement, all their cases with them.
        seed: of the draw. Equal for arms whose differences are asked for.

    Raises:
        InputError: runs of different cases.
    """
    every = list(by_run.values())
    first = every[0].raw
    if any(one.raw.cases != first.cases for one in every):
        raise InputError("the seeds of an arm have different test cases: see which were refused")
    drawn = patient_weights(first.patients, resamples, seed)
    weights = np.concatenate([np.ones((1, len(first.cases))), drawn])
    together = _together(every, weights) if len(every) > 1 else {}
    return Compared({run: _scores(one, weights) for run, one in by_run.items()}, together, first.cases)


def _together(every: Sequence[OutOfFold], weights: Floats) -> dict[str, Floats]:
    mean = np.mean([one.raw.probabilities for one in every], axis=0)
    found = weighted_scores(every[0].raw.labels, mean, mean.argmax(axis=1), weights)
    result = {ENSEMBLE + name: found[name] for name in PLAIN}
    for by in RANKINGS:
        # A run whose ranking tells nothing has no first slice, and no pair.
        tops = [np.where(np.isfinite(one.evidence["hit_1"][by]), one.top_slice[by], math.nan) for one in every]
        pairs = [(a == b, np.isfinite(a) & np.isfinite(b)) for a, b in combinations(tops, 2)]
        same, known = np.sum(pairs, axis=0)
        agreed = np.where(known > 0, same / np.maximum(known, 1), math.nan)
        result[AGREE + by] = _weighted_mean(agreed, weights)
    return result


def _scores(one: OutOfFold, weights: Floats) -> dict[str, Floats]:
    labels, raw = one.raw.labels, one.raw.probabilities
    plain = weighted_scores(labels, raw, raw.argmax(axis=1), weights)
    after = weighted_scores(labels, one.calibrated, one.at_point, weights)
    result = {name: plain[name] for name in PLAIN}
    result |= {f"calibrated_{name}": after[name] for name in ("nll", "brier", "ece")}
    result |= {f"point_{name}": after[name] for name in ("accuracy", "f1_macro", "sensitivity", "specificity")}
    wrong, surest = one.calibrated.argmax(axis=1) != labels, confidence(one.calibrated)
    result |= {"aurc": aurc(wrong, surest, weights), "risk_80": risk_at(wrong, surest, 0.8, weights)}
    for name, called in EVIDENCE.items():
        result |= {f"{called}_{by}": _weighted_mean(one.evidence[name][by], weights) for by in RANKINGS}
    return result


def _weighted_mean(values: Floats, weights: Floats) -> Floats:
    known = np.isfinite(values)
    total = weights[:, known].sum(axis=1)
    safe = np.where(total > 0, total, 1.0)
    return np.where(total > 0, weights[:, known] @ values[known] / safe, math.nan)


def figure(one: Compared, name: str) -> Figure:
    """A score with its interval over patients; NaN for one of several runs at once where there is one run."""
    if name.startswith((ENSEMBLE, AGREE)) and name not in one.together:
        return Figure(math.nan, math.nan, math.nan)
    return _figure(one.rows(name))


def difference(one: Compared, other: Compared, name: str) -> Figure:
    """How much larger a score is than that of another arm, paired: same cases, same resamples, same runs.

    Runs that one of the two does not have are left out; NaN where none is left, and for other runs at once.

    Raises:
        InputError: the arms have different test cases.
    """
    if one.cases != other.cases:
        alone = sorted(set(one.cases) ^ set(other.cases))
        raise InputError(
            f"arms can be compared on the same test cases only, and {alone[0]} is in one alone: was it refused there?"
        )
    both = [run for run in one.by_run if run in other.by_run]
    same = len(both) == len(one.by_run) == len(other.by_run)
    at_once = name.startswith((ENSEMBLE, AGREE))
    if not both or (at_once and not (same and name in one.together)):
        return Figure(math.nan, math.nan, math.nan)
    return _figure(one.rows(name, both) - other.rows(name, both))


def _figure(rows: Floats) -> Figure:
    interval = percentile_interval(rows[1:])
    return Figure(float(rows[0]), interval.low, interval.high)
