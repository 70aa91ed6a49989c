"""A table of slice truth, checked row by row and put into the cases of a datalist."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .case_table import CaseColumns, CaseTable
from .table import Problems, as_integer, read_table, require_columns

__all__ = ["SliceColumns", "add_slice_truth"]

MAX_SLICE_INDEX = 65535  # far above any scan; a larger number is another column read by mistake


@dataclass(frozen=True)
class SliceColumns:
    """The columns of a slice table; `case` says by what a row names its case: case, image or patient."""

    label: str
    index: str = "k"
    case: str | None = None


def add_slice_truth(
    path: Path, columns: SliceColumns, cases: CaseColumns, table: CaseTable, dataset_dir: Path
) -> Problems:
    """Put the slice truth of a second table into the cases, as `slice_label`: 1, 0, or -1 where no row says it.

    Args:
        path: the CSV table, a row a slice.
        columns: its columns; without `case` the first of case, image and patient that it has.
        cases: the columns of the table of cases; a key column has the same name in both.
        table: the cases, changed in place. A list ends at the last slice that has a row: only the image itself knows
            how many slices it has.
        dataset_dir: the folder that image paths are relative to.

    Returns:
        The problems found (possibly none).

    Raises:
        InputError: the table as a whole cannot be used.
    """
    problems = Problems(path)
    names, rows = read_table(path, problems)
    key_columns = {"case": cases.case or "case", "image": cases.image[0], "patient": cases.patient}
    kind = columns.case or next((kind for kind, name in key_columns.items() if name in names), "case")
    require_columns(
        path, names, {"slice_case": key_columns[kind], "slice_index": columns.index, "slice_label": columns.label}
    )

    def key_of(case: dict[str, Any]) -> str:
        value = case[kind] if kind != "image" or isinstance(case["image"], str) else case["image"][0]
        return os.path.normpath(dataset_dir / value) if kind == "image" else str(value)

    owners: dict[str, list[dict[str, Any]]] = {}
    for case in table.cases:
        owners.setdefault(key_of(case), []).append(case)
    skipped = {key_of(case) for case in table.skipped}
    seen: dict[tuple[str, int], int] = {}
    truth: dict[str, dict[int, int]] = {}
    for row in rows:
        text = row.cells[key_columns[kind]]
        key = os.path.normpath(dataset_dir / text) if kind == "image" else text
        if key not in owners:
            if key not in skipped:
                problems.add(
                    row, key_columns[kind], "no case of the table of cases has this value: correct or remove it"
                )
            continue
        if len(owners[key]) > 1:
            problems.add(
                row,
                key_columns[kind],
                f"{len(owners[key])} cases have this {kind}: tell them apart by --slice_case image",
            )
            continue
        index = as_integer(row.cells[columns.index])
        if index is None or not 0 <= index <= MAX_SLICE_INDEX:
            problems.add(row, columns.index, f"a slice index is a whole number from 0 to {MAX_SLICE_INDEX}: correct it")
            continue
        number = seen.setdefault((key, index), row.number)
        if number != row.number:
            problems.add(row, columns.index, f"this slice of this case is in row {number} already: remove one of them")
            continue
        value = as_integer(row.cells[columns.label] or "-1")
        if value not in (-1, 0, 1):
            problems.add(row, columns.label, "slice truth is 1, 0, or empty where unknown: make a column of these")
            continue
        truth.setdefault(key, {})[index] = value
    for key, known in truth.items():
        owners[key][0]["slice_label"] = [known.get(k, -1) for k in range(max(known) + 1)]
    return problems
