"""A study as pictures: what each arm wins and costs, the traces of the loss, and the validation curves."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator

from ..results.curves import BLUE, GREEN, ORANGE, PINK, save_figure
from .arm_results import ArmResult, variance_ratio
from .comparison import difference, figure
from .steadiness import read_log

__all__ = ["draw_arms", "draw_traces", "draw_validation"]

COLUMNS = 4


def draw_arms(arms: Sequence[ArmResult], reference: str, png: str | os.PathLike[str]) -> None:
    """Draw a line an arm: difference of AUC and of NLL, how many times steadier, and whether it finds the slice.

    Args:
        arms: from the top to the bottom.
        reference: what differences and ratios are against.
        png: the picture to write.
    """
    against = next(one for one in arms if one.name == reference)
    drawn = Figure(figsize=(15, 2 + 0.35 * len(arms)), layout="constrained")
    panels: Any = drawn.subplots(1, 4, sharey=True)
    places = np.arange(len(arms))
    for panel, name, colour in ((panels[0], "auc", BLUE), (panels[1], "nll", ORANGE)):
        found = [difference(arm.compared, against.compared, name) for arm in arms]
        _bars(panel, places, found, colour)
        panel.axvline(0, color="0.5", linewidth=1)
    panels[0].set_xlabel(f"AUC less that of {reference}")
    panels[1].set_xlabel(f"test NLL less that of {reference}")
    _bars(panels[2], places, [variance_ratio(against, arm) for arm in arms], GREEN)
    panels[2].set(xscale="log", xlabel="times steadier (bar: pieces)")
    panels[2].xaxis.set_minor_locator(LogLocator(subs=(2, 5)))  # more numbers would lie over each other
    for formatter in (panels[2].xaxis.set_major_formatter, panels[2].xaxis.set_minor_formatter):
        formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    panels[2].axvline(1, color="0.5", linewidth=1)
    for by, colour, shift in (("score", BLUE, -0.15), ("attention", PINK, 0.15)):
        found = [figure(arm.compared, f"hit_1_{by}") for arm in arms]
        if any(math.isfinite(one.value) for one in found):
            _bars(panels[3], places + shift, found, colour, label=f"by {by}")
    panels[3].set(xlabel="first slice is a true one", xlim=(-0.03, 1.03))
    if panels[3].lines:
        panels[3].legend(fontsize=9, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2)
    panels[0].set_yticks(places, [arm.name for arm in arms])
    panels[0].set_ylim(len(arms) - 0.5, -0.5)
    for panel in panels:
        panel.grid(alpha=0.25, axis="x")
    save_figure(drawn, png)


def _bars(panel: Any, places: Any, found: Sequence[Any], colour: str, label: str | None = None) -> None:
    value, low, high = (np.array([one[i] for one in found], dtype=float) for i in range(3))
    panel.hlines(places, low, high, color=colour, alpha=0.5, linewidth=3)
    panel.plot(value, places, "o", color=colour, markersize=4, label=label)


def draw_traces(arms: Sequence[ArmResult], png: str | os.PathLike[str]) -> None:
    """Draw the NLL of every training batch of each arm's first piece, a panel an arm, all on one scale."""
    drawn, panels = _grid(len(arms))
    for panel, arm in zip(panels, arms, strict=False):
        folder = next(iter(arm.pieces))
        batches = read_log(folder / "batches.csv")
        per_epoch = (batches["epoch"] == batches["epoch"].max()).sum()
        panel.plot(np.arange(len(batches["nll"])) / per_epoch, batches["nll"], color=BLUE, linewidth=0.5)
        panel.set_title(arm.name, fontsize=10)
    _finish(drawn, panels, len(arms), "epoch", "NLL of a batch (nats)")
    panels[0].set_ylim(bottom=0)
    save_figure(drawn, png)


def draw_validation(arms: Sequence[ArmResult], png: str | os.PathLike[str]) -> None:
    """Draw validation accuracy and AUC by epoch, a panel an arm: the mean over its pieces and their range."""
    drawn, panels = _grid(len(arms))
    for panel, arm in zip(panels, arms, strict=False):
        logs = [read_log(folder / "epochs.csv") for folder in arm.pieces]
        length = min(len(log["epoch"]) for log in logs)
        for name, colour in (("val_accuracy", BLUE), ("val_auc", ORANGE)):
            values = np.array([log[name][:length] for log in logs if name in log]).reshape(-1, length)
            if not len(values):
                continue
            known = np.isfinite(values).all(axis=0)  # not every epoch is validated
            epochs, values = logs[0]["epoch"][:length][known], values[:, known]
            panel.fill_between(epochs, values.min(axis=0), values.max(axis=0), color=colour, alpha=0.2, linewidth=0)
            panel.plot(epochs, values.mean(axis=0), color=colour, linewidth=1.2, label=name.removeprefix("val_"))
        panel.set_title(arm.name, fontsize=10)
    panels[0].legend(fontsize=8, loc="lower right")
    _finish(drawn, panels, len(arms), "epoch", "validation")
    panels[0].set_ylim(0, 1.02)
    save_figure(drawn, png)


def _grid(count: int) -> tuple[Figure, Any]:
    columns = min(COLUMNS, count)
    rows = math.ceil(count / columns)
    drawn = Figure(figsize=(4 * columns, 2.2 * rows + 0.4), layout="constrained")
    panels: Any = drawn.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    return drawn, panels.ravel()


def _finish(drawn: Figure, panels: Any, count: int, below: str, beside: str) -> None:
    for panel in panels[:count]:
        panel.grid(alpha=0.25)
    for panel in panels[count:]:
        panel.axis("off")
    drawn.supxlabel(below, fontsize=10)
    drawn.supylabel(beside, fontsize=10)
