"""Verdicts → tables in Markdown."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

__all__ = ["SUMMARY_COLUMNS", "details", "summary"]

# From the best to the worst for a patient; the order in which a cell lists several.
SUMMARY_COLUMNS = (
    "right", "refused", "accepted", "crashed", "timed out", "partial, told", "partial", "wrong, told", "wrong"
)  # fmt: skip
HEADS = {"partial": "partial, silent", "wrong": "wrong, silent"}
VARIANT = re.compile(r"^(CT|MR): |: (first|middle|last) slice$|: all slice$")


def summary(title: str, readers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """How often each reader came to each verdict."""
    counts = [Counter(row[k] for row in rows) for k in range(len(readers))]
    used = [c for c in SUMMARY_COLUMNS if c not in ("right",) or any(count[c] for count in counts)]
    lines = [
        f"| {title} | " + " | ".join(HEADS.get(c, c) for c in used) + " |",
        "|---" * (len(used) + 1) + "|",
    ]
    lines += [f"| {name} | " + " | ".join(str(count[c]) for c in used) + " |" for name, count in zip(readers, counts)]  # noqa: B905
    return "\n".join(lines)


def details(
    title: str, readers: Sequence[str], rows: Sequence[tuple[str, Sequence[str]]], leave_out: str | None = None
) -> str:
    """One line for a fault in all modalities and places; a cell lists the verdicts that differ."""
    merged: dict[str, list[set[str]]] = {}
    for name, row in rows:
        cells = merged.setdefault(VARIANT.sub("", VARIANT.sub("", name)), [set() for _ in readers])
        for cell, word in zip(cells, row, strict=True):
            cell.add(word)
    lines = [f"| {title} | " + " | ".join(readers) + " |", "|---" * (len(readers) + 1) + "|"]
    for name, cells in merged.items():
        if leave_out is None or any(cell != {leave_out} for cell in cells):
            lines.append(f"| {name} | " + " | ".join(_cell(cell) for cell in cells) + " |")
    return "\n".join(lines)


def _cell(words: set[str]) -> str:
    return "; ".join(word for word in SUMMARY_COLUMNS if word in words)
