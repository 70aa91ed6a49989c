"""What was measured → a table for the screen, the verdict on every target, and a picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bundle.files import replacing

from .measuring import Record, paired, spread
from .training_part import LIMIT, OURS, PLAIN, STOCK, TYPED

__all__ = [
    "Verdict",
    "draw",
    "limit_of",
    "table_of_agreement",
    "table_of_cell",
    "table_of_growth",
    "verdicts",
    "verdicts_of_agreement",
    "verdicts_of_growth",
]

OF_LIMIT = 1.15  # times the limit, training and inference
FASTER = {"train": {128: 3.0, 224: 2.0}, "infer": {128: 5.0, 224: 2.5}}  # than stock MONAI
APART = 1e-5  # largest difference of a probability in float32
OF_MEMORY = 1.1  # times the memory above the decoded input, from 128 to 512 slices
# Colour and marker, which colour-blind readers tell apart too (Okabe and Ito).
STYLES = {
    OURS: ("#0072B2", "o"),
    PLAIN: ("#56B4E9", "o"),
    STOCK: ("#D55E00", "s"),
    f"{STOCK}, no augmentation": ("#E69F00", "s"),
    TYPED: ("#009E73", "D"),
    "torchmil DSMIL": ("#CC79A7", "^"),
    "MONAI MILModel (att)": ("#000000", "v"),
}


@dataclass(frozen=True)
class Verdict:
    """One target and what was measured."""

    text: str
    found: str
    passed: bool

    def __str__(self) -> str:
        return f"  {'pass' if self.passed else 'MISS'}  {self.text}: {self.found}"


def limit_of(records: Sequence[Record]) -> str:
    """The contender that is the limit."""
    return next(name for name in records[0] if name.startswith(LIMIT))


def verdicts(cell: dict[str, Any]) -> list[Verdict]:
    """The targets of a training or inference cell; sizes without a target of their own are held to the limit alone."""
    records, kind, size = cell["records"], cell["part"], cell["size"]
    ratio = paired(records, OURS, limit_of(records))
    found = [Verdict(f"at most {OF_LIMIT} × the limit", str(ratio), ratio.median <= OF_LIMIT)]
    least = FASTER[kind].get(size)
    for rival in () if least is None else ((STOCK,) if kind == "train" else (STOCK, TYPED)):
        ratio = paired(records, rival, OURS)
        # Where the limit itself is not that much faster, no program could be.
        told = f"{ratio} (the limit: {paired(records, rival, limit_of(records)).median:.2f})"
        found.append(Verdict(f"at least {least:g} × as fast as {rival}", told, ratio.median >= least))
    return found


def table_of_cell(cell: dict[str, Any]) -> str:
    """Milliseconds and ratios of every contender."""
    records = cell["records"]
    unit = "bag" if cell["part"] == "train" else "scan"
    place = "" if cell["scans"] is None else f", {cell['scans']}"
    title = f"{cell['part']}, {cell['size']} × {cell['size']}, {cell['norm']} norm{place}; {len(records)} repeats"
    rows = [[title, f"ms a {unit}", "× limit", "× this project", "waiting for data"]]
    for name in records[0]:
        waiting = [record[name]["loading"] for record in records if "loading" in record[name]]
        rows.append([
            f"{name} ({cell['limit']['form']})" if name == limit_of(records) else name,
            f"{1000 * spread([record[name]['seconds'] for record in records]).median:.1f}",
            str(paired(records, name, limit_of(records))),
            str(paired(records, name, OURS)),
            f"{spread(waiting).median:.1%}" if waiting else "",
        ])  # fmt: skip
    return _aligned(rows)


def table_of_agreement(found: Sequence[dict[str, Any]]) -> str:
    """Largest differences of probabilities from the plain path, and bags whose critical slice is another one."""
    paths = ("float32", "mixed precision")
    rows = [["from the plain float32 path: largest difference of a probability", *paths]]
    changed = [["bags whose critical slice changes", "", ""]]
    for entry in found:
        name = f"{entry['size']} × {entry['size']}, {entry['norm']} norm"
        rows.append([name, *(f"{entry[path]:.1e}" for path in paths)])
        changed.append([name, *(f"{entry['critical slices'][path]} of {entry['bags']}" for path in paths)])
    return _aligned([*rows, *changed])


def table_of_growth(growth: dict[str, Any]) -> str:
    """Times by size, in one run's own first size, and memory."""
    tables = []
    for entry in growth["timed"]:
        records = entry["records"]
        names = list(records[0])
        others = [what for what in records[0][names[0]] if what not in ("seconds", "loading")]
        rows = [[entry["what"], "ms", f"× {names[0]}", *(f"{what}, ms" for what in others)]]
        for name in names:
            values = [spread([record[name][what] for record in records]).median for what in ("seconds", *others)]
            ratio = str(paired(records, name, names[0]))
            rows.append([name, f"{1000 * values[0]:.1f}", ratio, *(f"{1000 * value:.1f}" for value in values[1:])])
        tables.append(_aligned(rows))
    rows = [["memory", "slices", "MiB above start and input", "MiB of the process"]]
    for row in growth["memory"]:
        name = f"{row['what']}, {row['who']}"
        rows.append([name, str(row["slices"]), f"{row['bytes'] / 2**20:.0f}", f"{row['peak'] / 2**20:.0f}"])
    return "\n\n".join([*tables, _aligned(rows)])


def verdicts_of_growth(growth: dict[str, Any], slices: Sequence[int]) -> list[Verdict]:
    """The target on memory.

    Args:
        growth: see `growth_part.growth`.
        slices: of the series that were to be measured; the last two are compared.
    """
    if len(slices) < 2:
        return []
    rows = [row for row in growth["memory"] if row["what"] == "classifying a series" and row["who"] == OURS]
    above = {row["slices"]: row["bytes"] for row in rows}
    first, last = slices[-2:]
    text = f"at most {OF_MEMORY} × the memory from {first} to {last} slices"
    for size in (first, last):
        if size not in above:
            return [Verdict(text, f"no measurement at {size} slices, the process was killed", False)]
        # As much as nothing above the scan cannot be told from a measurement that went wrong, and has no ratio.
        if above[size] <= 0:
            return [Verdict(text, f"{above[size] / 2**20:.1f} MiB at {size} slices, which gives no ratio", False)]
    ratio = above[last] / above[first]
    return [Verdict(text, f"{ratio:.2f}", ratio <= OF_MEMORY)]


def verdicts_of_agreement(found: Sequence[dict[str, Any]]) -> list[Verdict]:
    """The target on the float32 path."""
    worst = max(entry["float32"] for entry in found)
    text = f"probabilities at most {APART:g} from the plain path in float32"
    return [Verdict(text, f"{worst:.1e}", worst <= APART)]


def _aligned(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))])
             for row in rows]  # fmt: skip
    return "\n".join([lines[0], "-" * len(lines[0]), *(line.rstrip() for line in lines[1:])])


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
    for what, who in dict.fromkeys((row["what"], row["who"]) for row in memory):
        rows = [row for row in memory if (row["what"], row["who"]) == (what, who)]
        values = [row["bytes"] / 2**20 for row in rows]
        colour, marker = STYLES[who]
        line = marker + ("-" if what == "training a bag" else "--")
        axes.plot([row["slices"] for row in rows], values, line, color=colour, label=f"{what}, {who}")
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
