"""What was measured → a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bundle.files import replacing

from .measuring import paired, spread
from .report import OF_LIMIT, limit_of
from .training_part import COMPILED, LIMIT, MILMODEL, OURS, PLAIN, STOCK, TYPED

__all__ = ["draw"]

# Colour and marker, which colour-blind readers tell apart too (Okabe and Ito).
STYLES = {
    OURS: ("#0072B2", "o"),
    PLAIN: ("#56B4E9", "o"),
    COMPILED: ("#56B4E9", "P"),
    STOCK: ("#D55E00", "s"),
    f"{STOCK}, no augmentation": ("#E69F00", "s"),
    TYPED: ("#009E73", "D"),
    "torchmil DSMIL": ("#CC79A7", "^"),
    MILMODEL: ("#000000", "v"),
}


def draw(results: dict[str, Any], path: Path) -> None:
    """Every contender's ratio to the limit with its quartiles, a line a cell, and growth by slices, as one PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    parts = [[cell for cell in results["cells"] if cell["part"] == part] for part in ("train", "infer")]
    parts = [cells for cells in parts if cells]
    growth = results["growth"]
    heights = [1.2 + 0.42 * len(cells) for cells in parts] + ([3.4] if growth else [])
    figure = Figure(figsize=(10, sum(heights) + 0.5), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(len(heights), 2, height_ratios=heights)
    for row, cells in enumerate(parts):
        _dots(figure.add_subplot(grid[row, :]), cells)
    if growth:
        _lines_of_time(figure.add_subplot(grid[-1, 0]), growth["timed"][:2])
        _lines_of_memory(figure.add_subplot(grid[-1, 1]), growth["memory"])
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=120, format="png")


def _dots(axes: Any, cells: Sequence[dict[str, Any]]) -> None:
    names = [name for name in cells[0]["records"][0] if not name.startswith(LIMIT)]
    for number, name in enumerate(names):
        ratios = [paired(cell["records"], name, limit_of(cell["records"])) for cell in cells]
        # Side by side, so that dots of nearly the same ratio can be told apart.
        places = [row + 0.6 * (number / max(1, len(names) - 1) - 0.5) for row in range(len(cells))]
        errors = [[r.median - r.low for r in ratios], [r.high - r.median for r in ratios]]
        colour, marker = STYLES[name]
        axes.errorbar(
            [r.median for r in ratios], places, xerr=errors, fmt=marker, markersize=5, linewidth=1,
            color=colour, label=name,
        )  # fmt: skip
    axes.axvline(1.0, color="#444444", linewidth=1)
    axes.axvline(OF_LIMIT, color="#444444", linewidth=1, linestyle=":")
    titles = [" ".join(str(cell[key]) for key in ("size", "norm", "scans") if cell[key]) for cell in cells]
    axes.set_yticks(range(len(cells)), titles, fontsize=8)
    axes.set_ylim(len(cells) - 0.5, -0.5)
    axes.set_xscale("log")
    ticks = [t for t in (0.5, 1, 1.5, 2, 3, 5, 7, 10, 15, 20, 30, 50) if axes.get_xlim()[0] <= t <= axes.get_xlim()[1]]
    axes.set_xticks(ticks, [f"{t:g}" for t in ticks])
    axes.minorticks_off()
    axes.grid(axis="x", color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.set_title(f"{cells[0]['part']}: time over the limit (line; the target {OF_LIMIT} is dotted)", fontsize=9)
    axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)


def _lines_of_time(axes: Any, timed: Sequence[dict[str, Any]]) -> None:
    every: set[int] = set()
    for entry, line in zip(timed, ("o-", "o--"), strict=True):
        records = entry["records"]
        sizes = [int(name.split()[0]) for name in records[0]]
        medians = [spread([record[name]["seconds"] for record in records]).median for name in records[0]]
        axes.plot(sizes, medians, line, color=STYLES[OURS][0], label=entry["what"])
        every |= set(sizes)
    _by_slices(axes, every, "seconds, this project")


def _lines_of_memory(axes: Any, memory: Sequence[dict[str, Any]]) -> None:
    usual = memory[0]["side"]
    for line in dict.fromkeys((row["what"], row["who"], row["side"]) for row in memory):
        rows = [row for row in memory if (row["what"], row["who"], row["side"]) == line]
        what, who, side = line
        values = [row["bytes"] / 2**20 for row in rows]
        colour, marker = STYLES[who]
        dashes = "-" if what == "training a bag" else "--" if side == usual else ":"
        label = f"{what}, {who}" + ("" if side == usual else f", {side} pixels")
        axes.plot([row["slices"] for row in rows], values, marker + dashes, color=colour, label=label)
    _by_slices(axes, {row["slices"] for row in memory}, "MiB above start and input")


def _by_slices(axes: Any, sizes: set[int], values: str) -> None:
    axes.set_xscale("log")
    axes.set_xticks(sorted(sizes), [str(size) for size in sorted(sizes)])
    axes.minorticks_off()
    axes.set_ylim(bottom=0)
    axes.set_xlabel("slices", fontsize=8)
    axes.set_title(values, fontsize=9)
    axes.grid(color="#dddddd", linewidth=0.6)
    axes.legend(fontsize=7)
