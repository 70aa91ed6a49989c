"""When to give no answer: one measure of confidence, what abstaining would gain, and a limit by rule.

A case is abstained when its confidence is below the limit. With two classes the operating point t says how the two
kinds of error are weighed, t to 1 - t, and confidence follows it: c = max(a, b) / (a + b) with a = p (1 - t) and
b = (1 - p) t. That is the probability of the answer once odds are divided by those of the operating point: 1/2 at the
operating point, rising on both sides, and with t = 1/2 the higher probability. With more classes it is the highest
probability. What an answer costs follows the operating point in the same way, see `losses`: at t = 0.1 most positive
answers are wrong by intent, and counting errors alone would have abstention undo the sensitivity that t was chosen for.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..errors import InputError
from .bootstrap import ELEMENTS_AT_ONCE, Interval, patient_weights, percentile_interval

__all__ = [
    "RiskCoverage",
    "abstention_limit",
    "aurc",
    "aurc_interval",
    "confidence",
    "losses",
    "predicted_classes",
    "risk_at",
    "risk_coverage",
]

Floats = NDArray[np.float64]


class RiskCoverage(NamedTuple):
    """One point for each distinct confidence, highest first, all (U,).

    limit: the least confidence that is kept; coverage: share of the cases that are kept; risk: mean loss of these.
    """

    limit: Floats
    coverage: Floats
    risk: Floats


def predicted_classes(probabilities: ArrayLike, threshold: float = 0.5) -> NDArray[np.int64]:
    """Predicted classes (M,) of probabilities (M, K): with two, the second from `threshold` on; else the highest."""
    p = np.asarray(probabilities, dtype=np.float64)
    return (p[:, 1] >= threshold).astype(np.int64) if p.shape[1] == 2 else p.argmax(axis=1)


def confidence(probabilities: ArrayLike, threshold: float = 0.5) -> Floats:
    """Confidence (M,) of the predicted classes, see the module; between 1/2 (1/K) and 1.

    Args:
        probabilities: (M, K) class probabilities.
        threshold: the operating point, with two classes.
    """
    p = np.asarray(probabilities, dtype=np.float64)
    if p.shape[1] != 2:
        return np.asarray(p.max(axis=1, initial=0.0))
    yes, no = p[:, 1] * (1 - threshold), (1 - p[:, 1]) * threshold
    return np.asarray(np.maximum(yes, no) / (yes + no), dtype=np.float64)


def losses(labels: ArrayLike, predictions: ArrayLike, num_classes: int, threshold: float = 0.5) -> Floats:
    """Loss (M,) of each answer: 0 if it is right, else 1, or with two classes as the operating point t weighs it.

    Then a false positive loses 2 t and a false negative 2 (1 - t). With t = 1/2 the mean is the share of wrong answers.

    Args:
        labels: (M,) true classes.
        predictions: (M,) predicted classes.
        num_classes: K.
        threshold: t, the operating point.
    """
    y, predicted = np.asarray(labels), np.asarray(predictions)
    weight = np.where(predicted == 1, 2 * threshold, 2 * (1 - threshold)) if num_classes == 2 else 1.0
    return np.asarray((predicted != y) * weight, dtype=np.float64)


def risk_coverage(loss: ArrayLike, confidences: ArrayLike) -> RiskCoverage:
    """The curve of risk over coverage: what loss remains when only the most confident cases are answered.

    Cases of equal confidence are kept or left together.

    Args:
        loss: (M,) of each answer.
        confidences: (M,).

    Source: El-Yaniv and Wiener, On the Foundations of Noise-free Selective Classification (JMLR 2010).
    """
    c, order, ends = _blocks(confidences)
    lost = np.asarray(loss, dtype=np.float64)[order].cumsum()
    kept = ends + 1.0
    return RiskCoverage(c[ends], kept / max(1, len(c)), lost[ends] / kept)


def aurc(loss: ArrayLike, confidences: ArrayLike, weights: ArrayLike | None = None) -> Floats:
    """Area under the curve of `risk_coverage`: the risk averaged over the cases, each at the coverage that takes it in.

    An order by chance gives the risk of all cases on average; lower is better.

    Args:
        loss: (M,) of each answer.
        confidences: (M,).
        weights: (R, M) case weights of R resamples; None: each case once.

    Returns:
        (R,), NaN for a resample of no case.
    """
    kept, risk, total = _resampled(loss, confidences, weights)
    area = (risk * np.diff(kept, axis=1, prepend=0.0)).sum(axis=1)
    return np.asarray(np.where(total > 0, area / np.where(total > 0, total, 1.0), np.nan), dtype=np.float64)


def risk_at(loss: ArrayLike, confidences: ArrayLike, coverage: float, weights: ArrayLike | None = None) -> Floats:
    """Mean loss of the most confident cases: as few of them as are the share `coverage` or more, equal ones together.

    Args:
        loss: (M,) of each answer.
        confidences: (M,).
        coverage: in (0, 1].
        weights: (R, M) case weights of R resamples; None: each case once.

    Returns:
        (R,), NaN for a resample of no case.
    """
    kept, risk, total = _resampled(loss, confidences, weights)
    if not kept.size:
        return np.full(len(total), np.nan)
    # A share such as 0.8 of 5 cases is no exact number of them.
    place = (kept >= coverage * total[:, None] * (1 - 1e-12)).argmax(axis=1)
    return np.asarray(np.where(total > 0, risk[np.arange(len(risk)), place], np.nan), dtype=np.float64)


def _resampled(loss: ArrayLike, confidences: ArrayLike, weights: ArrayLike | None) -> tuple[Floats, Floats, Floats]:
    """For R resamples: cases kept (R, U) by each distinct confidence, highest first, their risk, and all cases (R,)."""
    c, order, ends = _blocks(confidences)
    w = np.ones((1, len(c))) if weights is None else np.asarray(weights, dtype=np.float64)
    kept = w[:, order].cumsum(axis=1)[:, ends]
    lost = (w * np.asarray(loss, dtype=np.float64))[:, order].cumsum(axis=1)[:, ends]
    return kept, lost / np.where(kept > 0, kept, 1.0), kept[:, -1:].sum(axis=1)


def aurc_interval(
    loss: ArrayLike, confidences: ArrayLike, patients: list[str], *, resamples: int = 1000, seed: int = 0
) -> Interval:
    """95% bootstrap interval of the AURC over patients, see `bootstrap_intervals`."""
    weights = patient_weights(patients, resamples, seed)
    step = max(1, ELEMENTS_AT_ONCE // max(1, len(patients)))
    parts = [aurc(loss, confidences, weights[i : i + step]) for i in range(0, resamples, step)]
    return percentile_interval(np.concatenate(parts))


def abstention_limit(confidences: ArrayLike, coverage: float | None) -> float:
    """The highest limit of confidence that keeps at least the share `coverage` of the cases; None: 0, no abstention.

    As with an operating point, it lies half way to the next lower confidence.

    Raises:
        InputError: no cases, or a coverage outside (0, 1].
    """
    if coverage is None:
        return 0.0
    c, _, ends = _blocks(confidences)
    if not 0 < coverage <= 1 or len(c) == 0:
        raise InputError(f"coverage is the share of {len(c)} cases to answer, above 0 and at most 1, not {coverage}")
    block = int(np.argmax((ends + 1) / len(c) >= coverage))
    if block + 1 == len(ends):
        return 0.0
    return float((c[ends[block]] + c[ends[block + 1]]) / 2)


def _blocks(confidences: ArrayLike) -> tuple[Floats, NDArray[np.int64], NDArray[np.int64]]:
    """Confidences from the highest down, the order that sorts them, and where each block of equal ones ends."""
    c = np.asarray(confidences, dtype=np.float64)
    order = np.argsort(-c, kind="stable")
    c = c[order]
    return c, order, np.flatnonzero(np.append(c[:-1] != c[1:], True)) if len(c) else np.zeros(0, dtype=np.int64)
