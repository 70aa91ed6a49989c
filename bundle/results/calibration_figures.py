"""Pictures of calibration: what is said against what is so, and what error remains at which coverage."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from ..evaluation.abstention import RiskCoverage
from .curves import BLUE, GREEN, ORANGE, save_figure

__all__ = ["draw_reliability", "draw_risk_coverage"]

Bins = Sequence[Mapping[str, Any]]


def draw_reliability(png: str | os.PathLike[str], panels: Mapping[str, Bins], class_names: Sequence[str]) -> None:
    """Draw reliability diagrams beside each other, the number of cases of every bin below.

    Args:
        png: the picture to write.
        panels: title → bins of `reliability_bins`.
        class_names: K names; with two, the axes are about the second.
    """
    binary = len(class_names) == 2
    figure = Figure(figsize=(5.2 * len(panels), 6), layout="constrained")
    axes: Any = figure.subplots(2, len(panels), height_ratios=[3.5, 1], sharex=True, sharey="row", squeeze=False)
    for (title, bins), (upper, lower) in zip(panels.items(), axes.T, strict=True):
        said, so, low, high, cases, start, end = (
            np.array([one[key] for one in bins], dtype=float)
            for key in ("probability", "share", "low", "high", "cases", "from", "to")
        )
        upper.plot([0, 1], [0, 1], color="0.6", linestyle="--", linewidth=1, label="as said")
        upper.errorbar(said, so, [so - low, high - so], color=BLUE, fmt="o", capsize=3, label="cases, 95% interval")
        upper.set(xlim=(0, 1), ylim=(-0.02, 1.02), title=title)
        upper.grid(alpha=0.25)
        lower.bar(start, cases, end - start, align="edge", color=BLUE, alpha=0.5, edgecolor="white")
        lower.set_xlabel(f"probability of {class_names[1]!r}" if binary else "highest probability", parse_math=False)
    axes[0, 0].set_ylabel(f"share of {class_names[1]!r}" if binary else "share that is right", parse_math=False)
    axes[1, 0].set_ylabel("cases")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, fontsize=9, frameon=False)
    save_figure(figure, png)


def draw_risk_coverage(png: str | os.PathLike[str], curve: RiskCoverage, chosen: float) -> None:
    """Draw the mean loss of the cases that are answered over the share of them.

    Args:
        png: the picture to write.
        curve: of `risk_coverage`.
        chosen: the coverage that was chosen; 1 without abstention.
    """
    figure = Figure(figsize=(6, 4.5), layout="constrained")
    panel = figure.subplots()
    panel.plot(curve.coverage, curve.risk, color=BLUE, marker=".", label="most confident cases first")
    panel.axhline(curve.risk[-1], color="0.6", linestyle="--", linewidth=1, label="all cases")
    panel.axvline(chosen, color=ORANGE if chosen < 1 else GREEN, linewidth=1.2, label=f"answered: {chosen:.0%}")
    panel.set(xlim=(0, 1.02), ylim=(0, None))
    panel.set(xlabel="share of the cases that is answered", ylabel="risk of these (mean loss)")
    panel.grid(alpha=0.25)
    panel.legend(fontsize=9)
    save_figure(figure, png)
