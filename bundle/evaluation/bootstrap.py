"""Confidence intervals by resampling patients.

A resample is a whole-number weight for each case: how often its patient was drawn. Every score is then a weighted
one, so all resamples are computed together and none copies a case.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from ..errors import InputError
from .scores import ECE_BINS, NEEDS_TWO_CLASSES, NLL_FLOOR, SCORES, checked_predictions

__all__ = [
    "Interval",
    "bootstrap_intervals",
    "mean_interval",
    "patient_weights",
    "percentile_interval",
    "weighted_scores",
]

Floats = NDArray[np.float64]
# Bounds the working memory to some tens of megabytes, whatever the number of cases.
ELEMENTS_AT_ONCE = 1_000_000


class Interval(NamedTuple):
    """A percentile interval: low and high end, and in how many resamples the score had no value."""

    low: float
    high: float
    undefined: int


def bootstrap_intervals(
    labels: ArrayLike,
    probabilities: ArrayLike,
    patients: Sequence[str],
    *,
    predictions: ArrayLike | None = None,
    class_names: Sequence[str] = (),
    resamples: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> dict[str, Interval]:
    """Percentile bootstrap interval of every score, patients drawn with replacement and all their cases with them.

    Resamples in which a score is undefined (one class only, say) are left out for that score and counted. The order of
    the cases has no influence.

    Args:
        labels: (M,) true classes.
        probabilities: (M, K) class probabilities.
        patients: M patient identifiers; cases of one patient stay together.
        predictions: (M,) predicted classes; None takes the most probable.
        class_names: K names, to have ``f1_<class name>`` too.
        resamples: number of resamples.
        level: coverage of the interval, in (0, 1).
        seed: of the draw.

    Returns:
        Score name → `Interval`; NaN ends where no resample had a value.

    Raises:
        InputError: arrays that do not fit each other, a level outside (0, 1), or fewer than one resample.

    Source: Efron and Tibshirani, An Introduction to the Bootstrap (1993), chapter 13.
    """
    y, p, predicted = checked_predictions(labels, probabilities, predictions)
    if class_names and len(class_names) != p.shape[1]:
        raise InputError(f"{len(class_names)} class names were given for {p.shape[1]} class probabilities")
    weights = patient_weights(patients, resamples, seed)
    if weights.shape[1] != len(y):
        raise InputError(f"{weights.shape[1]} patient identifiers were given for {len(y)} cases")
    step = max(1, ELEMENTS_AT_ONCE // max(1, len(y)))
    parts = [weighted_scores(y, p, predicted, weights[i : i + step]) for i in range(0, resamples, step)]
    values = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    for k, class_name in enumerate(class_names):
        values[f"f1_{class_name}"] = values[f"f1_of_class_{k}"]
    names = [*SCORES, *(f"f1_{class_name}" for class_name in class_names)]
    return {name: percentile_interval(values[name], level) for name in names}


def patient_weights(patients: Sequence[str], resamples: int, seed: int) -> Floats:
    """How often each case is drawn in each resample: (resamples, M), whole numbers as floats.

    Args:
        patients: M patient identifiers. As many patients are drawn, with replacement, as there are different ones.
        resamples: number of resamples, at least 1.
        seed: of the draw.
    """
    if resamples < 1:
        raise InputError(f"resamples must be at least 1, not {resamples}")
    unique, index = np.unique(np.asarray(patients, dtype=str), return_inverse=True)
    if len(unique) == 0:
        return np.zeros((resamples, 0))
    share = np.full(len(unique), 1 / len(unique))
    draws = np.random.default_rng(seed).multinomial(len(unique), share, size=resamples)
    return draws[:, index].astype(np.float64)


def percentile_interval(values: ArrayLike, level: float = 0.95) -> Interval:
    """The middle `level` of the values (R,), linear between order statistics, those that are NaN left out."""
    if not 0 < level < 1:
        raise InputError(f"level must lie between 0 and 1, not {level}")
    array = np.asarray(values, dtype=np.float64)
    defined = array[np.isfinite(array)]
    undefined = len(array) - len(defined)
    if len(defined) == 0:
        return Interval(float("nan"), float("nan"), undefined)
    low, high = np.quantile(defined, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(low), float(high), undefined)


def mean_interval(
    values: ArrayLike, patients: Sequence[str], *, resamples: int = 1000, level: float = 0.95, seed: int = 0
) -> Interval:
    """Interval of the mean of one value a case, such as the share of hits; patients are drawn.

    Args:
        values: (M,) finite values.
        patients: M patient identifiers.
        resamples: number of resamples.
        level: coverage of the interval.
        seed: of the draw.
    """
    array = np.asarray(values, dtype=np.float64)
    if array.shape != (len(patients),):
        raise InputError(f"{len(patients)} patient identifiers were given for values of shape {array.shape}")
    weights = patient_weights(patients, resamples, seed)
    return percentile_interval(_ratio(weights @ array, weights.sum(1)), level)


def weighted_scores(
    labels: NDArray[np.int64], probabilities: Floats, predictions: NDArray[np.int64], weights: Floats
) -> dict[str, Floats]:
    """Every score under each row of case weights; a weight of 2 counts as the case twice.

    Args:
        labels: (M,) true classes.
        probabilities: (M, K) class probabilities.
        predictions: (M,) predicted classes.
        weights: (R, M) non-negative case weights.

    Returns:
        Each of `SCORES`, and ``f1_of_class_<k>``, as (R,); NaN where undefined.
    """
    cases, num_classes = probabilities.shape
    one_hot = np.eye(num_classes)
    pair = np.eye(num_classes**2)[labels * num_classes + predictions]  # (M, K * K)
    table = (weights @ pair).reshape(-1, num_classes, num_classes)  # (R, true, predicted)
    total = weights.sum(1)
    support, chosen, correct = table.sum(2), table.sum(1), np.einsum("rkk->rk", table)  # (R, K)
    present = support > 0
    true_negative = total[:, None] - support - chosen + correct
    recall = _ratio(correct, support)
    f1 = _ratio(2 * correct, support + chosen)
    specificity = _ratio(true_negative, total[:, None] - support)
    covariance = correct.sum(1) * total - (support * chosen).sum(1)
    spread = (total**2 - (support**2).sum(1)) * (total**2 - (chosen**2).sum(1))
    squared = (probabilities - one_hot[labels]) ** 2
    log_loss = -np.log(np.maximum(probabilities[np.arange(cases), labels], NLL_FLOOR))
    areas = [_areas(probabilities[:, k], labels == k, weights) for k in range(num_classes)]
    auc, auprc = (np.stack([area[i] for area in areas], 1) for i in (0, 1))  # (R, K)

    binary = num_classes == 2
    result: dict[str, Floats] = {
        "auc": auc[:, 1] if binary else _mean_over(auc, present),
        "auprc": auprc[:, 1] if binary else _mean_over(auprc, present),
        "accuracy": _ratio(correct.sum(1), total),
        "balanced_accuracy": _mean_over(recall, present),
        "f1_macro": _mean_over(f1, support + chosen > 0),
        "sensitivity": recall[:, 1] if binary else _mean_over(recall, present),
        "specificity": specificity[:, 1] if binary else _mean_over(specificity, present),
        "mcc": np.where(spread > 0, covariance / np.sqrt(np.where(spread > 0, spread, 1.0)), 0.0),
        "brier": _ratio(weights @ (squared[:, 1] if binary else squared.sum(1)), total),
        "nll": _ratio(weights @ log_loss, total),
        "ece": _calibration_error(labels, probabilities, weights),
    }
    two = present.sum(1) >= 2
    for name in NEEDS_TWO_CLASSES:
        result[name] = np.where(two, result[name], np.nan)
    return {**result, **{f"f1_of_class_{k}": f1[:, k] for k in range(num_classes)}}


def _areas(probability: Floats, positive: NDArray[np.bool_], weights: Floats) -> tuple[Floats, Floats]:
    """ROC area and average precision (R,) of one class against the rest, cases of equal probability as one step."""
    order = np.argsort(-probability, kind="stable")
    starts = np.flatnonzero(np.diff(probability[order], prepend=np.inf))  # first case of each distinct value
    if len(starts) == 0:
        nothing = np.full(len(weights), np.nan)
        return nothing, nothing
    gain = np.add.reduceat((weights * positive)[:, order], starts, axis=1)  # (R, U), highest probability first
    loss = np.add.reduceat((weights * ~positive)[:, order], starts, axis=1)
    true_positive, false_positive = gain.cumsum(1), loss.cumsum(1)
    positives, negatives = true_positive[:, -1], false_positive[:, -1]
    below = negatives[:, None] - false_positive + 0.5 * loss
    auc = _ratio((gain * below).sum(1), positives * negatives)
    seen = true_positive + false_positive
    precision = true_positive / np.where(seen > 0, seen, 1.0)
    return auc, _ratio((gain * precision).sum(1), positives)


def _calibration_error(labels: NDArray[np.int64], probabilities: Floats, weights: Floats) -> Floats:
    """Top-label expected calibration error (R,), L1; float32 bin edges, lower edge included, as torchmetrics has it."""
    confidence = probabilities.max(1, initial=0.0).astype(np.float32)
    edges = torch.linspace(0, 1, ECE_BINS + 1).numpy()
    bins = np.searchsorted(edges, confidence, side="right") - 1
    gap = (probabilities.argmax(1) == labels) - confidence.astype(np.float64)
    per_bin = weights @ (np.eye(ECE_BINS + 1)[bins] * gap[:, None])  # (R, bins); weight · (accuracy - confidence)
    return _ratio(np.abs(per_bin).sum(1), weights.sum(1))


def _ratio(numerator: Any, denominator: Any) -> Floats:
    """Numerator / denominator, NaN where the denominator is 0, and no warning."""
    safe = np.where(denominator > 0, denominator, 1.0)
    return np.asarray(np.where(denominator > 0, numerator / safe, np.nan), dtype=np.float64)


def _mean_over(values: Floats, chosen: NDArray[np.bool_]) -> Floats:
    """Mean over classes (R, K) → (R,) of those chosen."""
    return _ratio(np.where(chosen, values, 0.0).sum(1), chosen.sum(1))
