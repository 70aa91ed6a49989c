"""A study as pictures: what each arm wins and costs, and how its trainings went."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator

from ..results.curves import BLUE, GREEN, ORANGE, PINK, save_figure
from .arm_results import ArmResult, variance_ratio
from .comparison import difference, figure
from .panels import finish, grid, legend
from .steadiness import read_log

__all__ = ["draw_arms", "draw_selection", "draw_traces", "draw_validation"]


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
    _plain_numbers(panels[2].xaxis)
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


def _plain_numbers(axis: Any) -> None:
    """1, 2, 5, 10, … on a logarithmic axis; more numbers would lie over each other."""
    axis.set_minor_locator(LogLocator(subs=(2, 5)))
    for set_formatter in (axis.set_major_formatter, axis.set_minor_formatter):
        set_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def _bars(panel: Any, places: Any, found: Sequence[Any], colour: str, label: str | None = None) -> None:
    value, low, high = (np.array([one[i] for one in found], dtype=float) for i in range(3))
    panel.hlines(places, low, high, color=colour, alpha=0.5, linewidth=3)
    panel.plot(value, places, "o", color=colour, markersize=4, label=label)


def draw_traces(arms: Sequence[ArmResult], png: str | os.PathLike[str]) -> None:
    """Draw the NLL of every training batch of each arm's first piece, a panel an arm, all on one scale."""
    drawn, panels = grid(len(arms))
    for panel, arm in zip(panels, arms, strict=False):
        folder = next(iter(arm.pieces))
        batches = read_log(folder / "batches.csv")
        per_epoch = (batches["epoch"] == batches["epoch"].max()).sum()
        panel.plot(np.arange(len(batches["nll"])) / per_epoch, batches["nll"], color=BLUE, linewidth=0.5)
        panel.set_title(arm.name, fontsize=10)
    finish(drawn, panels, len(arms), "epoch", "NLL of a batch (nats)")
    panels[0].set_ylim(bottom=0)
    save_figure(drawn, png)


def draw_validation(arms: Sequence[ArmResult], png: str | os.PathLike[str]) -> None:
    """Draw validation accuracy and AUC by epoch, a panel an arm: the mean over its pieces and their range."""
    drawn, panels = grid(len(arms))
    for panel, arm in zip(panels, arms, strict=False):
        logs = _logs(arm)
        for name, colour in (("val_accuracy", BLUE), ("val_auc", ORANGE)):
            _mean_and_range(panel, logs, name, colour, name.removeprefix("val_"))
        panel.set_title(arm.name, fontsize=10)
    legend(drawn)
    finish(drawn, panels, len(arms), "epoch", "validation")
    panels[0].set_ylim(0, 1.02)
    save_figure(drawn, png)


def draw_selection(arms: Sequence[ArmResult], png: str | os.PathLike[str]) -> None:
    """Draw how much the selected slice and the attention moved at each epoch, and the temperature where it changes.

    A panel an arm, as in `draw_validation`; the temperature has an axis of its own, a logarithmic one. A hard selection
    does not use it, nor does a model that selects nothing.
    """
    drawn, panels = grid(len(arms))
    for panel, arm in zip(panels, arms, strict=False):
        logs = _logs(arm)
        _mean_and_range(panel, logs, "flip_rate", BLUE, "flips of the first slice")
        _mean_and_range(panel, logs, "attention_drift", ORANGE, "drift of attention")
        panel.set_title(arm.name, fontsize=10)
        temperature = logs[0].get("temperature", np.zeros(0))
        if len(np.unique(temperature)) > 1:
            right = panel.twinx()
            right.plot(logs[0]["epoch"], temperature, color="0.4", linestyle="--", linewidth=1, label="temperature")
            right.set_yscale("log")
            right.set_ylabel("temperature", fontsize=8)
            right.tick_params(labelsize=7, which="both")
            _plain_numbers(right.yaxis)
    legend(drawn)
    finish(drawn, panels, len(arms), "epoch", "share of watched cases, of attention")
    panels[0].set_ylim(0, 1.02)
    save_figure(drawn, png)


def _logs(arm: ArmResult) -> list[Mapping[str, Any]]:
    """epochs.csv of each piece, as far as the shortest goes."""
    logs = [read_log(folder / "epochs.csv") for folder in arm.pieces]
    length = min(len(log["epoch"]) for log in logs)
    return [{name: values[:length] for name, values in log.items()} for log in logs]


def _mean_and_range(panel: Any, logs: Sequence[Mapping[str, Any]], name: str, colour: str, label: str) -> None:
    values = np.array([log[name] for log in logs if name in log])
    known = np.isfinite(values).all(axis=0) if len(values) else np.zeros(0, dtype=bool)  # not every epoch is validated
    if known.any():
        epochs, values = logs[0]["epoch"][known], values[:, known]
        panel.fill_between(epochs, values.min(axis=0), values.max(axis=0), color=colour, alpha=0.2, linewidth=0)
        panel.plot(epochs, values.mean(axis=0), color=colour, linewidth=1.2, label=label)
