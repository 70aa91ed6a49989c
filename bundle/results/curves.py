"""A picture of how a training went (curves.png), from its log."""

from __future__ import annotations

import csv
import math
import os
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from ..errors import InputError
from ..files import replacing

__all__ = ["BLUE", "GREEN", "ORANGE", "PINK", "draw_curves", "save_figure"]

Columns = dict[str, NDArray[np.float64]]

# Okabe and Ito's colours, told apart with every common colour vision; the line style differs as well.
BLUE, ORANGE, GREEN, PINK = "#0072B2", "#D55E00", "#009E73", "#CC79A7"
DRAWN = frozenset(
    (
        *("epoch", "train_loss", "train_nll_mean", "train_nll_var", "train_nll_min", "train_nll_max", "val_nll"),
        *("train_accuracy", "train_eval_accuracy", "val_accuracy", "val_auc"),
        *("temperature", "clipped_share", "flip_rate"),
    )
)


def draw_curves(epochs_csv: str | os.PathLike[str], png: str | os.PathLike[str]) -> None:
    """Draw the training log: loss, accuracy, AUC, temperature, batch-loss spread, clipped steps and flips.

    A column or cell that is missing is left out of its panel.

    Args:
        epochs_csv: the training log, one row an epoch.
        png: the picture to write.

    Raises:
        InputError: no such file, no column ``epoch``, no row, or a cell that is no number.
    """
    columns = _read_epochs(Path(epochs_csv))
    figure = Figure(figsize=(15, 8), layout="constrained")
    panels = figure.subplots(2, 3).ravel()
    _lines(
        panels[0],
        columns,
        "Loss",
        "loss (nats)",
        [
            ("train_loss", "training loss, with every term", BLUE, "-"),
            ("train_nll_mean", "training NLL", GREEN, "--"),
            ("val_nll", "validation NLL", ORANGE, "-."),
        ],
    )
    _lines(
        panels[1],
        columns,
        "Accuracy",
        "share of cases right",
        [
            ("train_accuracy", "training, train mode", BLUE, "-"),
            ("train_eval_accuracy", "training, eval mode", GREEN, "--"),
            ("val_accuracy", "validation", ORANGE, "-."),
        ],
        share=True,
    )
    _lines(panels[2], columns, "Validation AUC", "area under the ROC curve", [("val_auc", "", ORANGE, "-")], share=True)
    _lines(
        panels[3],
        columns,
        "Selection temperature",
        "temperature (score units)",
        [("temperature", "", PINK, "-")],
        zero=True,
    )
    _spread(panels[4], columns)
    _lines(
        panels[5],
        columns,
        "Clipped steps and flips",
        "share",
        [
            ("clipped_share", "steps with a clipped gradient", BLUE, "-"),
            ("flip_rate", "cases whose critical slice changed", ORANGE, "--"),
        ],
        share=True,
    )
    save_figure(figure, png)


def save_figure(figure: Figure, png: str | os.PathLike[str]) -> None:
    """Write a figure as PNG in one step, without pyplot: nothing is kept and no display is needed.

    Args:
        figure: the figure.
        png: the picture to write.
    """
    FigureCanvasAgg(figure)
    with replacing(png) as temporary, warnings.catch_warnings():
        # A case may be named in letters the font lacks; they become boxes, and the picture is still worth having.
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        figure.savefig(temporary, format="png", dpi=110, metadata={"Software": None})


def _read_epochs(path: Path) -> Columns:
    try:
        with path.open(encoding="utf-8", newline="") as file:
            reader = csv.DictReader(file)
            names = list(reader.fieldnames or [])
            rows = list(reader)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path.name} cannot be read; give the epochs.csv of a training run") from error
    if "epoch" not in names or not rows:
        raise InputError(f"{path.name} is no training log: it needs a column 'epoch' and at least one row")
    columns: Columns = {}
    for name in names:
        cells = [row[name] for row in rows]
        try:
            columns[name] = np.array([float(cell) if cell else math.nan for cell in cells])
        except (TypeError, ValueError) as error:
            if name in DRAWN:
                raise InputError(f"{path.name}: column {name!r} holds a cell that is no number") from error
    if not np.isfinite(columns["epoch"]).all():
        raise InputError(f"{path.name}: an epoch number is missing")
    return columns


def _lines(
    panel: Axes,
    columns: Columns,
    title: str,
    unit: str,
    lines: Sequence[tuple[str, str, str, str]],
    share: bool = False,
    zero: bool = False,
) -> None:
    """One panel of (column, label, colour, line style)."""
    drawn = 0
    for name, label, colour, style in lines:
        if _measured(columns, name):
            _line(panel, columns, name, label, colour, style)
            drawn += bool(label)
    if share:
        panel.set_ylim(-0.03, 1.03)
    elif zero and panel.lines:
        panel.set_ylim(bottom=0)
    _finish(panel, columns, title, unit, legend=drawn > 0)


def _line(panel: Axes, columns: Columns, name: str, label: str, colour: str, style: str) -> None:
    # Epochs that were not measured are bridged: validation may run every few epochs only.
    measured = np.isfinite(columns[name])
    epochs = columns["epoch"][measured]
    marker = "o" if len(epochs) <= 40 else ""
    panel.plot(epochs, columns[name][measured], style, color=colour, label=label, marker=marker, markersize=3)


def _spread(panel: Axes, columns: Columns) -> None:
    """Unsmoothed NLL of the training batches: range, mean and standard deviation."""
    epochs = columns["epoch"]
    if _measured(columns, "train_nll_min") and _measured(columns, "train_nll_max"):
        low, high = columns["train_nll_min"], columns["train_nll_max"]
        panel.fill_between(epochs, low, high, color=BLUE, alpha=0.15, linewidth=0, label="smallest to largest")
    if _measured(columns, "train_nll_mean"):
        mean = columns["train_nll_mean"]
        if _measured(columns, "train_nll_var"):
            sd = np.sqrt(np.maximum(columns["train_nll_var"], 0))
            low = np.maximum(mean - sd, 0)
            panel.fill_between(epochs, low, mean + sd, color=BLUE, alpha=0.35, linewidth=0, label="mean ± sd")
        _line(panel, columns, "train_nll_mean", "mean", BLUE, "-")
    drawn = bool(panel.lines or panel.collections)
    if drawn:
        panel.set_ylim(bottom=0)
    _finish(panel, columns, "Spread of the training-batch NLL", "NLL of a batch (nats)", legend=drawn)


def _finish(panel: Axes, columns: Columns, title: str, unit: str, legend: bool) -> None:
    first, last = columns["epoch"].min(), columns["epoch"].max()
    margin = max(0.5, 0.02 * (last - first))
    panel.set_xlim(first - margin, last + margin)
    panel.set_title(title)
    panel.set_xlabel("epoch")
    panel.set_ylabel(unit)
    panel.xaxis.set_major_locator(MaxNLocator(integer=True))
    panel.grid(alpha=0.25)
    if not panel.lines and not panel.collections:
        panel.text(0.5, 0.5, "not measured", transform=panel.transAxes, ha="center", va="center", color="0.35")
    elif legend:
        panel.legend(fontsize=9, loc="best")


def _measured(columns: Columns, name: str) -> bool:
    return name in columns and bool(np.isfinite(columns[name]).any())
