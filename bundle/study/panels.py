"""A panel an arm, all on the same axes."""

from __future__ import annotations

import math
from typing import Any

from matplotlib.figure import Figure

__all__ = ["finish", "grid", "legend"]

COLUMNS = 4
LEAST = (8.0, 3.2)  # inches, for the legend above a single panel and the name of its axis


def grid(count: int, height: float = 2.2) -> tuple[Figure, Any]:
    """A figure of at least `count` panels in rows of four, `height` inches each, and the panels, row by row."""
    columns = min(COLUMNS, count)
    rows = math.ceil(count / columns)
    size = (max(LEAST[0], 4 * columns), max(LEAST[1], height * rows + 0.4))
    drawn = Figure(figsize=size, layout="constrained")
    panels: Any = drawn.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    return drawn, panels.ravel()


def finish(drawn: Figure, panels: Any, count: int, below: str, beside: str) -> None:
    """Name the axes of all panels, and hide those after the first `count`."""
    for place, panel in enumerate(panels[:count]):
        panel.grid(alpha=0.25)
        if place + COLUMNS >= count:  # none below it
            panel.tick_params(labelbottom=True)
    for panel in panels[count:]:
        panel.axis("off")
    drawn.supxlabel(below, fontsize=10)
    drawn.supylabel(beside, fontsize=10)


def legend(drawn: Figure) -> None:
    """What is drawn in any of the panels, each once, above them."""
    named = [pair for axis in drawn.axes for pair in zip(*axis.get_legend_handles_labels(), strict=True)]
    handles = {label: handle for handle, label in reversed(named)}
    if handles:
        labels = list(dict.fromkeys(label for _, label in named))
        shown = [handles[label] for label in labels]
        drawn.legend(shown, labels, loc="outside upper left", ncols=len(labels), fontsize=9, frameon=False)
