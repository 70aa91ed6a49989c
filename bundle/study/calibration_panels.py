"""The calibration of a study as pictures: what is said against what is so, and the errors that abstaining leaves."""

from __future__ import annotations

import os
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ..evaluation.abstention import confidence, risk_coverage
from ..evaluation.bootstrap import patient_weights, percentile_interval
from ..evaluation.calibration import reliability_bins
from ..results.curves import BLUE, ORANGE, save_figure
from .arm_results import ArmResult
from .panels import finish, grid, legend

__all__ = ["draw_reliability", "draw_risk_coverage", "errors_kept"]

LEAST_CASES = 5  # of a bin that is drawn: a share of fewer says nothing
RESAMPLES = 1000


def draw_reliability(arms: Sequence[ArmResult], png: str | os.PathLike[str]) -> None:
    """Draw reliability diagrams of the test cases, a panel an arm, as trained and after the temperature of each piece.

    A bin holds what all runs said, with a 95% bootstrap interval over patients; bins of fewer than five cases a run are
    left out.
    """
    drawn, panels = grid(len(arms), 3.2)
    for panel, arm in zip(panels, arms, strict=False):
        runs = list(arm.by_seed.values())
        raw = np.concatenate([one.raw.probabilities for one in runs])
        after = np.concatenate([one.calibrated for one in runs])
        labels = np.tile(runs[0].raw.labels, len(runs))
        weights = np.tile(patient_weights(runs[0].raw.patients, RESAMPLES, 0), len(runs))
        panel.plot([0, 1], [0, 1], color="0.6", linestyle="--", linewidth=1)
        for probabilities, colour, label in ((raw, ORANGE, "as trained"), (after, BLUE, "after the temperature")):
            points = _points(labels, probabilities, weights, LEAST_CASES * len(runs))
            said, so, low, high = points.T
            panel.errorbar(said, so, [so - low, high - so], color=colour, fmt="o", markersize=4, capsize=2, label=label)
        panel.set_title(arm.name, fontsize=10)
    legend(drawn)
    binary = next(iter(arms[0].by_seed.values())).raw.probabilities.shape[1] == 2
    finish(
        drawn,
        panels,
        len(arms),
        "probability of the second class" if binary else "highest probability",
        "share of it" if binary else "share that is right",
    )
    panels[0].set(xlim=(0, 1), ylim=(-0.02, 1.02))
    save_figure(drawn, png)


def _points(
    labels: NDArray[np.int64], probabilities: NDArray[np.float64], weights: NDArray[np.float64], least: int
) -> NDArray[np.float64]:
    """(B, 4) mean probability, share and its interval of the bins with at least so many cases."""
    binary = probabilities.shape[1] == 2
    said = probabilities[:, 1] if binary else probabilities.max(axis=1)
    so = labels == 1 if binary else probabilities.argmax(axis=1) == labels
    found = []
    for one in reliability_bins(labels, probabilities):
        if one["cases"] < least:
            continue
        inside = (said >= one["from"]) & ((said < one["to"]) | (one["to"] == 1))
        total = weights[:, inside].sum(axis=1)
        known = total > 0
        interval = percentile_interval(weights[known][:, inside] @ so[inside] / total[known])
        share = float(one["share"])
        found.append((one["probability"], share, min(interval.low, share), max(interval.high, share)))
    return np.array(found, dtype=np.float64).reshape(-1, 4)


def draw_risk_coverage(arms: Sequence[ArmResult], png: str | os.PathLike[str]) -> None:
    """Draw the share of errors of the surest test cases over how many these are, a panel an arm; lower is better.

    Of the probabilities after the temperature of each piece: the mean over the runs, and their range.
    """
    drawn, panels = grid(len(arms))
    for panel, arm in zip(panels, arms, strict=False):
        curves = [errors_kept(one.raw.labels, one.calibrated) for one in arm.by_seed.values()]
        cases = len(curves[0])
        share, mean = np.arange(1, cases + 1) / cases, np.mean(curves, axis=0)
        panel.fill_between(share, np.min(curves, axis=0), np.max(curves, axis=0), color=BLUE, alpha=0.2, linewidth=0)
        panel.plot(share, mean, color=BLUE, linewidth=1.2, label="mean of the runs, and their range")
        panel.axhline(mean[-1], color="0.6", linestyle="--", linewidth=1, label="all cases")
        panel.set_title(arm.name, fontsize=10)
    legend(drawn)
    finish(drawn, panels, len(arms), "share of the cases that is answered, the surest first", "errors among them")
    panels[0].set(xlim=(0, 1), ylim=(0, None))
    save_figure(drawn, png)


def errors_kept(labels: NDArray[np.int64], probabilities: NDArray[np.float64]) -> NDArray[np.float64]:
    """(M,) share of errors among the surest 1, 2, … M cases, or as many more as are equally sure."""
    curve = risk_coverage(probabilities.argmax(axis=1) != labels, confidence(probabilities))
    share = np.arange(1, len(labels) + 1) / len(labels)
    return curve.risk[np.searchsorted(curve.coverage, share - 1e-9)]
