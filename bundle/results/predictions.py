"""The table of all cases, predictions.csv."""

from __future__ import annotations

import csv
import os
from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import InputError
from ..files import replacing

__all__ = ["spreadsheet_safe", "write_predictions"]

# What a spreadsheet takes for the start of a formula, in full width too, and the white space it may skip before one.
FORMULA_STARTS = tuple("=+-@\t\r\n \uff1d\uff0b\uff0d\uff20")


def spreadsheet_safe(text: str) -> str:
    """The text with an apostrophe before it if a spreadsheet would run it as a formula."""
    return f"'{text}" if text.startswith(FORMULA_STARTS) else text


def write_predictions(
    path: str | os.PathLike[str], records: Sequence[Mapping[str, Any]], class_names: Sequence[str] | None = None
) -> None:
    """Write predictions.csv in one step: a row a record, refused ones too, in the order given.

    Columns: case, status, patient, label, prediction, class_name, probability_<class name> for each class,
    key_slice_index, key_slice_position_mm, key_slice_weight, key_slice_sop_instance_uid, reason_code, reason. The key
    slice is the most critical one. A cell is empty where nothing is known, as the prediction of an abstained case. Text
    that a spreadsheet would run as a formula starts with an apostrophe.

    Args:
        path: the file.
        records: case records.
        class_names: K names; None takes those of the first record that was classified (none: no probability columns).

    Raises:
        InputError: records of different classes, or a file that cannot be written.
    """
    names = list(class_names or next((r["class_names"] for r in records if r["status"] != "refused"), []))
    header = ["case", "status", "patient", "label", "prediction", "class_name"]
    header += [f"probability_{name}" for name in names]
    header += ["key_slice_index", "key_slice_position_mm", "key_slice_weight", "key_slice_sop_instance_uid"]
    header += ["reason_code", "reason"]
    rows = []
    for record in records:
        if record["status"] != "refused" and list(record["class_names"]) != names:
            raise InputError(f"case {record['case']!r} has other class names than the rest of the table")
        key = record["key_slices"][0] if record["key_slices"] else {}
        prediction = record["prediction"]
        rows.append(
            [
                *(record[key_] for key_ in ("case", "status", "patient", "label", "prediction")),
                None if prediction is None else names[prediction],
                *(record["probabilities"] or [None] * len(names)),
                *(key.get(k) for k in ("index", "position_mm", "weight", "sop_instance_uid")),
                record["reason_code"],
                record["reason"],
            ]
        )
    with replacing(path) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(header)
        writer.writerows([[_cell(value) for value in row] for row in rows])


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.6g}"
    return spreadsheet_safe(value) if isinstance(value, str) else str(value)
