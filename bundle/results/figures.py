"""Pictures: which slices decided (key_slices.png), and by command line how a training went (curves.png)."""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.patheffects import withStroke
from numpy.typing import NDArray

from ..errors import InputError, command_line
from .curves import BLUE, GREEN, ORANGE, draw_curves, save_figure

__all__ = ["draw_curves", "draw_key_slices", "main"]

PICTURES_A_CASE = 4
LONGEST_TITLE = 60
FOOTER = "Research use only; not for diagnosis"


def draw_key_slices(
    png: str | os.PathLike[str],
    records: Sequence[Mapping[str, Any]],
    images: Mapping[str, Any],
    max_cases: int = 8,
) -> None:
    """Draw, one row a case, its most critical slices and the selection weight of every slice over position.

    True lesion slices are shaded where slice truth is known; the numbered dots are the slices shown.

    Args:
        png: the picture to write.
        records: case records; those that were classified and have pictures are drawn, in this order.
        images: case → (num_key, H, W), in the order of the record's ``key_slices``; rows run downwards.
        max_cases: most cases drawn.

    Raises:
        InputError: no case to draw, pictures of an unknown case, or pictures of another shape or number.
    """
    unknown = sorted(set(images) - {r["case"] for r in records})
    if unknown:
        raise InputError(f"pictures were given for case {unknown[0]!r}, which has no record")
    drawable = [r for r in records if r["status"] != "refused" and r["case"] in images]
    if not drawable or max_cases < 1:
        raise InputError("there is no case to draw: at least one classified case with pictures is needed")
    shown = drawable[:max_cases]
    pictures = [_checked_pictures(record, images[record["case"]]) for record in shown]
    height = 2.7 * len(shown) + 0.8
    figure = Figure(figsize=(13, height), layout="constrained")
    parts: Any = figure.subfigures(3, 1, height_ratios=[0.5, height - 0.8, 0.3])
    header, body, footer = parts
    header.text(0.01, 0.45, "Most critical slices of each case", va="center", fontsize=14, weight="bold")
    header.legend(handles=_legend(), loc="center right", ncols=4, fontsize=9, frameon=False)
    footer.text(0.5, 0.5, FOOTER, ha="center", va="center", fontsize=9, color="0.35")
    rows = body.subfigures(len(shown), 1, squeeze=False)[:, 0]
    for row, record, stack in zip(rows, shown, pictures, strict=True):
        _draw_case(row, record, stack)
    save_figure(figure, png)


def _draw_case(row: Any, record: Mapping[str, Any], stack: NDArray[np.float64]) -> None:
    panels = row.subplots(1, PICTURES_A_CASE + 1, width_ratios=[1] * PICTURES_A_CASE + [2.8])
    row.suptitle(_case_title(record), fontsize=11, x=0.01, ha="left", parse_math=False)
    finite = stack[np.isfinite(stack)]
    low, high = np.percentile(finite, [0.5, 99.5]) if finite.size else (0.0, 1.0)
    for place, panel in enumerate(panels[:-1]):
        panel.set_xticks([])
        panel.set_yticks([])
        if place >= len(stack):
            panel.set_axis_off()
            continue
        key = record["key_slices"][place]
        # One grey scale a case, so that its slices can be compared; a constant one must still have a range.
        panel.imshow(stack[place], cmap="gray", vmin=low, vmax=high if high > low else low + 1)
        truth = {1: ", lesion", 0: ", no lesion"}.get(key["label"], "")
        panel.set_title(f"{place + 1}: weight {key['weight']:.3f}\n{key['position_mm']:.1f} mm{truth}", fontsize=9)
        for side in panel.spines.values():
            side.set(color=ORANGE if key["label"] == 1 else "0.6", linewidth=2.5 if key["label"] == 1 else 0.8)
    _draw_weights(panels[-1], record, len(stack))


def _draw_weights(panel: Axes, record: Mapping[str, Any], num_shown: int) -> None:
    position, weight, attention = (
        np.array([s[key] for s in record["slices"]], dtype=float) for key in ("position_mm", "weight", "attention")
    )
    truth = np.array([s["label"] for s in record["slices"]])
    middle = (position[1:] + position[:-1]) / 2
    # The outermost slices reach as far out as in; a lone slice gets 1 mm.
    first, last = (middle[0], middle[-1]) if len(middle) else (position[0] + 0.5, position[0] - 0.5)
    edges = np.concatenate([[2 * position[0] - first], middle, [2 * position[-1] - last]])
    changes = np.flatnonzero(np.diff((truth == 1).astype(int), prepend=0, append=0))
    for start, stop in zip(changes[::2], changes[1::2], strict=True):
        panel.axvspan(edges[start], edges[stop], color=ORANGE, alpha=0.22, linewidth=0)
    panel.plot(position, attention, color=GREEN, linewidth=0.9, linestyle="--")
    panel.plot(position, weight, color=BLUE, linewidth=1.8, marker=".", markersize=3)
    for place, key in enumerate(record["key_slices"][:num_shown]):
        at = (key["position_mm"], key["weight"])
        panel.plot(*at, "o", color=BLUE, markersize=7)
        text = panel.annotate(str(place + 1), at, xytext=(0, 6), textcoords="offset points", ha="center", fontsize=9)
        text.set_path_effects([withStroke(linewidth=2, foreground="white")])
    top = max(weight.max(), attention.max(), 1e-6)
    panel.set_ylim(-0.06 * top, 1.25 * top)
    panel.set_xlim(edges[0], edges[-1])
    panel.set_xlabel("slice position (mm)", fontsize=9)
    panel.set_ylabel("share per slice", fontsize=9)
    panel.tick_params(labelsize=8)
    panel.grid(alpha=0.25)


def _legend() -> list[Line2D | Patch]:
    return [
        Line2D([], [], color=BLUE, linewidth=1.8, label="selection weight"),
        Line2D([], [], color=GREEN, linewidth=0.9, linestyle="--", label="attention"),
        Line2D([], [], color=BLUE, marker="o", linestyle="", label="slice shown (1: most critical)"),
        Patch(color=ORANGE, alpha=0.22, linewidth=0, label="true lesion, where known"),
    ]


def _case_title(record: Mapping[str, Any]) -> str:
    names, chosen = record["class_names"], record["prediction"]
    case = record["case"] if len(record["case"]) <= LONGEST_TITLE else record["case"][: LONGEST_TITLE - 1] + "…"
    truth = "" if record["label"] is None else f"truth: {names[record['label']]}, "
    if chosen is None:
        highest = max(record["probabilities"])
        name = names[record["probabilities"].index(highest)]
        return f"{case}    {truth}no prediction (probability of {name} {highest:.3f})"
    return f"{case}    {truth}predicted: {names[chosen]} (probability {record['probabilities'][chosen]:.3f})"


def _checked_pictures(record: Mapping[str, Any], pictures: Any) -> NDArray[np.float64]:
    stack = np.asarray(pictures, dtype=np.float64)
    if stack.ndim != 3 or 0 in stack.shape:
        raise InputError(
            f"case {record['case']!r}: pictures must have shape (slices, rows, columns), not {stack.shape}"
        )
    expected = min(PICTURES_A_CASE, len(record["key_slices"]))
    if not expected <= len(stack) <= max(len(record["key_slices"]), expected):
        raise InputError(
            f"case {record['case']!r}: {len(stack)} pictures were given for {len(record['key_slices'])} key slices"
        )
    return stack[:PICTURES_A_CASE]


def main(arguments: Sequence[str] | None = None) -> None:
    """Draw curves.png of a training run beside its epochs.csv."""
    parser = argparse.ArgumentParser(prog="python -m bundle.results.figures", description=main.__doc__)
    parser.add_argument("run_dir", type=Path, metavar="RUN_DIR", help="folder of a training run; it holds epochs.csv")
    run_dir = parser.parse_args(arguments).run_dir
    draw_curves(run_dir / "epochs.csv", run_dir / "curves.png")
    print(run_dir / "curves.png")


if __name__ == "__main__":
    command_line(main)
