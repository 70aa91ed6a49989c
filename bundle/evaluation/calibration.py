"""How far probabilities can be trusted: temperature scaling, an operating point by rule, and reliability."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import NormalDist
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..errors import InputError
from .scores import checked_predictions, score

__all__ = [
    "OperatingPoint",
    "Share",
    "Temperature",
    "calibrated",
    "fit_temperature",
    "left_out",
    "operating_point",
    "reliability_bins",
    "share_of",
]

Floats = NDArray[np.float64]
# Ends of the fit. Beyond them a temperature says more of the few cases that it was fitted on than of the network.
LOWEST, HIGHEST = 0.1, 10.0
# Ends of an operating point; beyond them one class would be predicted always.
LEAST, MOST = 0.001, 0.999
HALVINGS = 60  # of log T; the width left, 4.6 / 2**60, is below the spacing of floats


class Temperature(NamedTuple):
    """What logits are divided by before the softmax, and a sentence where the cases did not determine it."""

    value: float
    note: str | None


class Share(NamedTuple):
    """A share of a number of cases, with its 95% Wilson interval; all NaN for no case."""

    value: float
    low: float
    high: float
    cases: int


class OperatingPoint(NamedTuple):
    """Probability from which the second of two classes is predicted, and what it gives on the cases of the choice."""

    threshold: float
    sensitivity: Share
    specificity: Share


def calibrated(logits: ArrayLike, temperature: float) -> Floats:
    """softmax(logits / temperature) of logits (M, K)."""
    scaled = np.asarray(logits, dtype=np.float64) / temperature
    exponential = np.exp(scaled - scaled.max(axis=1, keepdims=True))
    return np.asarray(exponential / exponential.sum(axis=1, keepdims=True), dtype=np.float64)


def fit_temperature(logits: ArrayLike, labels: ArrayLike, added: float = 0.5) -> Temperature:
    """The temperature between 0.1 and 10 of the least NLL against smoothed labels.

    A case of class k, of which there are n_k, counts as (n_k + a) / (n_k + a K) of its class and a / (n_k + a K) of
    each other, a = `added`. With many cases that is the plain NLL. Of few, that may be told apart without an error, the
    plain NLL falls without end; this one does not, and keeps the temperature from following them. Platt's targets are
    those of a = 1 (a uniform prior); a half (Jeffreys' prior) gave test cases the lower NLL.

    The NLL is convex in 1 / T, so its slope changes its sign once, and halving finds where. One positive number for all
    cases changes no ranking: AUC and the most probable class stay.

    Args:
        logits: (M, K) of M cases; log-probabilities do as well.
        labels: (M,) true classes.
        added: cases of each class that are thought added to those of every class, 0 or more; 0 is the plain NLL.

    Returns:
        The temperature. Where the NLL falls up to an end it is that end, and the note says so; where every logit of a
        case is the same it is 1.

    Raises:
        InputError: no cases, arrays that do not fit each other, or logits that are not finite.

    Source: Guo, Pleiss, Sun, Weinberger, On Calibration of Modern Neural Networks (ICML 2017), section 4.2; Platt,
    Probabilistic Outputs for Support Vector Machines (1999), section 2.2, for the targets; docs/results.md for a half.
    """
    z = np.asarray(logits, dtype=np.float64)
    if z.ndim != 2 or len(z) == 0 or not np.isfinite(z).all():
        raise InputError(f"a temperature needs finite logits of shape (cases >= 1, classes), not {z.shape}")
    y, _, _ = checked_predictions(labels, calibrated(z, 1.0))
    num_classes = z.shape[1]
    size = np.bincount(y, minlength=num_classes)[y][:, None]  # of the case's own class
    target = (added + size * np.eye(num_classes)[y]) / (size + added * num_classes)  # (M, K)
    if not np.ptp(z, axis=1).any():
        return Temperature(1.0, "the logits of each case are all the same, so no temperature changes anything")

    def slope(log_temperature: float) -> float:
        """Of the NLL in 1 / T."""
        return float(((calibrated(z, float(np.exp(log_temperature))) - target) * z).sum(axis=1).mean())

    low, high = float(np.log(LOWEST)), float(np.log(HIGHEST))
    if slope(low) <= 0:
        return Temperature(LOWEST, f"the NLL falls down to the lowest one allowed, {LOWEST}")
    if slope(high) >= 0:
        return Temperature(HIGHEST, f"the NLL falls up to the highest one allowed, {HIGHEST}")
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if slope(middle) > 0 else (low, middle)
    return Temperature(float(np.exp((low + high) / 2)), None)


def left_out(logits: ArrayLike, labels: ArrayLike, patients: Sequence[str], groups: int = 20) -> float:
    """NLL of cases whose patients were left out of the fit of the temperature, a group of patients at a time.

    Args:
        logits: (M, K).
        labels: (M,) true classes.
        patients: M identifiers; cases of one patient are left out together.
        groups: most groups; fewer patients are left out one by one.

    Returns:
        The mean over all cases; NaN for one patient.
    """
    z, y = np.asarray(logits, dtype=np.float64), np.asarray(labels)
    names, index = np.unique(np.asarray(patients, dtype=str), return_inverse=True)
    if len(names) < 2:
        return float("nan")
    group, p = index % groups, np.empty_like(z)
    for number in np.unique(group):
        out = group == number
        p[out] = calibrated(z[out], fit_temperature(z[~out], y[~out]).value)
    return score("nll", y, p)


def share_of(hits: ArrayLike) -> Share:
    """The share of true values among (M,), with its 95% interval.

    Source: Wilson, Probable inference, the law of succession, and statistical inference (JASA 1927).
    """
    array = np.asarray(hits, dtype=bool)
    n = len(array)
    if n == 0:
        return Share(float("nan"), float("nan"), float("nan"), 0)
    p, z = float(array.mean()), NormalDist().inv_cdf(0.975)
    centre = (p + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * float(np.sqrt(p * (1 - p) / n + z**2 / (4 * n**2)))
    return Share(p, max(0.0, min(p, centre - half)), min(1.0, max(p, centre + half)), n)


def operating_point(labels: ArrayLike, probabilities: ArrayLike, sensitivity: float = 0.9) -> OperatingPoint:
    """The threshold of the highest specificity among those that find at least the share `sensitivity` of positives.

    Of several it is the one that finds most: where classes are told apart, no positive is given away for nothing. Cases
    of equal probability fall on one side together. Every threshold between the last positive that is found and the next
    lower case predicts the same; it is put half way, so that the rounding of another machine changes nothing.

    Args:
        labels: (M,) 0 or 1.
        probabilities: (M, 2) class probabilities.
        sensitivity: in (0, 1].

    Raises:
        InputError: a class without a case, a sensitivity outside (0, 1], or one that only a threshold below 0.001
            gives.
    """
    y, p, _ = checked_predictions(labels, probabilities)
    if not 0 < sensitivity <= 1:
        raise InputError(f"sensitivity must be above 0 and at most 1, not {sensitivity}")
    if p.shape[1] != 2 or len(np.unique(y)) < 2:
        raise InputError("an operating point needs two classes and cases of both")
    positive = p[:, 1]
    found = np.sort(positive[y == 1])[::-1]
    enough = np.arange(1, len(found) + 1) / len(found) >= sensitivity
    needed = float(found[int(np.argmax(enough))])
    negative = positive[y == 0]
    lower = float(negative[negative < needed].max(initial=0.0))
    last = float(found[found > lower].min(initial=needed))  # without a further negative
    threshold = min(MOST, max(LEAST, (last + lower) / 2))
    if threshold > needed:
        raise InputError(
            f"a sensitivity of {sensitivity} needs a threshold below {LEAST}: a positive case has the probability "
            f"{needed:.2g}; set a lower sensitivity, or null to keep the threshold"
        )
    above = positive >= threshold
    return OperatingPoint(threshold, share_of(above[y == 1]), share_of(~above[y == 0]))


def reliability_bins(labels: ArrayLike, probabilities: ArrayLike, bins: int = 10) -> list[dict[str, Any]]:
    """What is said against what is so, in equal bins of the probability; bins without a case are left out.

    With two classes it is the probability of the second against the share of cases of that class; with more, the
    highest probability against the share of cases of that class.

    Args:
        labels: (M,) true classes.
        probabilities: (M, K) class probabilities.
        bins: number of bins from 0 to 1; the lower edge belongs to a bin.

    Returns:
        A dict a bin: ``from``, ``to``, ``cases``, ``probability`` (mean), ``share``, and the Wilson interval of the
        share, ``low`` and ``high``.
    """
    y, p, predicted = checked_predictions(labels, probabilities)
    said, so = (p[:, 1], y == 1) if p.shape[1] == 2 else (p.max(axis=1, initial=0.0), predicted == y)
    edges = np.linspace(0, 1, bins + 1)
    number = np.digitize(said, edges[1:-1])
    result = []
    for k in np.unique(number):
        share = share_of(so[number == k])
        entry = {"from": float(edges[k]), "to": float(edges[k + 1]), "cases": share.cases}
        entry |= {"probability": float(said[number == k].mean()), "share": share.value}
        result.append({**entry, "low": share.low, "high": share.high})
    return result
