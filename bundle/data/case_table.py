"""A table of cases, checked row by row and turned into the cases of a datalist."""

from __future__ import annotations

import os
import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from ..errors import InputError
from .table import Problems, Row, as_integer, read_table, require_columns

__all__ = ["CaseColumns", "CaseTable", "read_cases"]

SPLIT_SPELLINGS = {
    "training": "training",
    "train": "training",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "test": "test",
    "testing": "test",
}
IMAGE_SUFFIXES = (".nii.gz", ".nii", ".mha", ".mhd", ".nrrd", ".dcm")
CASE_ID = re.compile(r"\w[\w .+-]{0,118}\w|\w")  # case ids become file names


@dataclass(frozen=True)
class CaseColumns:
    """The columns of a table of cases; several image columns are modalities, in that order."""

    image: tuple[str, ...] = ("image",)
    label: str = "label"
    patient: str = "patient"
    case: str | None = None
    split: str | None = None


@dataclass
class CaseTable:
    """The cases of a table in its order, their split where a column says it, and the keys of rows left out."""

    cases: list[dict[str, Any]]
    class_names: list[str]
    splits: list[str] = field(default_factory=list)
    skipped: list[dict[str, Any]] = field(default_factory=list)


class _Labels:
    """Turns the label cells of a table into class indices."""

    def __init__(self, path: Path, column: str, texts: list[str], classes: list[str] | None) -> None:
        present = {text for text in texts if text}
        integers = {text: value for text in present if (value := as_integer(text)) is not None}
        self.index: dict[str, int]
        if classes is not None:
            if len(set(classes)) != len(classes) or not all(classes):
                raise InputError(f"--classes {','.join(classes)} has an empty or doubled name: name each class once")
            self.names = classes
            by_name = {name: index for index, name in enumerate(classes)}
            # Names win: with --classes 1,0 the text 1 is class 0. Otherwise 0, 1, ... may stand for the names.
            self.index = dict(by_name)
            if not present & set(by_name):
                self.index.update({text: value for text, value in integers.items() if 0 <= value < len(classes)})
        elif integers:
            values = sorted(set(integers.values()))
            if values != list(range(len(values))):
                raise InputError(
                    f"{path}, column {column}: the labels are {', '.join(map(str, values))}, but integers must count "
                    "from 0 without a gap: renumber them, or give the order with --classes"
                )
            self.names = [str(value) for value in values]
            self.index = integers
        else:
            self.names = sorted(present)
            self.index = {name: index for index, name in enumerate(self.names)}
            folded: dict[str, str] = {}
            for name in self.names:
                other = folded.setdefault(name.casefold(), name)
                if other != name:
                    raise InputError(
                        f"{path}, column {column}: the labels {other} and {name} differ in capitals only: "
                        "write one form"
                    )
        if len(self.names) < 2:
            raise InputError(
                f"{path}, column {column}: there are fewer than two classes, nothing can be learned from it"
            )


def _case_id_from(image: str) -> str:
    """A case id from an image's file (or folder) name: without its suffix, other characters than word ones as _."""
    name = PurePosixPath(image.replace("\\", "/")).name
    for suffix in IMAGE_SUFFIXES:
        if name.lower().endswith(suffix):
            name = name[: -len(suffix)]
            break
    return re.sub(r"[^\w.+-]+", "_", name).strip("._+-") or "case"


def _numbered(names: list[str]) -> list[str]:
    """The names; those that occur more than once get a number, in order, that makes them unique."""
    folded = [name.casefold() for name in names]
    counts = Counter(folded)
    taken = {name for name in folded if counts[name] == 1}
    result = []
    for name, low in zip(names, folded, strict=True):
        unique, number = name, 0
        while counts[low] > 1 and (number == 0 or unique.casefold() in taken):
            number += 1
            unique = f"{name}_{number}"
        taken.add(unique.casefold())
        result.append(unique)
    return result


def read_cases(
    path: Path,
    columns: CaseColumns,
    *,
    dataset_dir: Path,
    classes: list[str] | None = None,
    skip_unlabelled: bool = False,
    mixed_labels: bool = False,
) -> tuple[CaseTable, Problems]:
    """Read a table of cases and check every row.

    Args:
        path: the CSV table.
        columns: its column names.
        dataset_dir: the folder that image paths are relative to.
        classes: class names in order of their index; otherwise the sorted distinct labels.
        skip_unlabelled: leave rows without a label out instead of refusing them.
        mixed_labels: allow a patient's cases to have different labels.

    Returns:
        The cases as a datalist holds them, and the problems found in single rows (possibly none).

    Raises:
        InputError: the table as a whole cannot be used: unreadable, without a needed column, without two classes.
    """
    problems = Problems(path)
    names, rows = read_table(path, problems)
    wanted = {"label": columns.label, "patient": columns.patient}
    wanted |= {"case": columns.case} if columns.case else {}
    wanted |= {"split": columns.split} if columns.split else {}
    require_columns(path, names, wanted)
    for image in columns.image:
        require_columns(path, names, {"image": image})
    if not dataset_dir.is_dir():
        raise InputError(f"there is no folder {dataset_dir}: give the folder of the images with --dataset_dir")
    labels = _Labels(path, columns.label, [row.cells[columns.label] for row in rows], classes)
    case_column = columns.case or ("case" if "case" in names else None)
    if case_column:
        case_ids = [row.cells[case_column] for row in rows]
    else:
        case_ids = _numbered([_case_id_from(row.cells[columns.image[0]]) for row in rows])
    used = {*columns.image, columns.label, columns.patient, case_column, columns.split, ""}
    table = CaseTable(cases=[], class_names=labels.names)
    first_row_of_case: dict[str, int] = {}
    first_cell_of_image: dict[str, tuple[int, str]] = {}
    label_of_patient: dict[str, tuple[int, int]] = {}
    split_of_patient: dict[str, tuple[str, int]] = {}
    for row, case_id in zip(rows, case_ids, strict=True):
        images = [_check_image(row, column, dataset_dir, first_cell_of_image, problems) for column in columns.image]
        patient = row.cells[columns.patient]
        case: dict[str, Any] = {
            "case": case_id,
            "image": images[0] if len(images) == 1 else images,
            "label": -1,
            "patient": patient,
        }
        text = row.cells[columns.label]
        if not text and skip_unlabelled:
            table.skipped.append(case)
            continue
        if case_column:
            _check_case_id(row, case_column, case_id, first_row_of_case, problems)
        if not text:
            problems.add(
                row, columns.label, "it is empty: give the label, or leave such rows out with --skip_unlabelled"
            )
        elif text not in labels.index:
            problems.add(
                row, columns.label, f"unknown label {text[:40]}: the labels here are {', '.join(labels.names[:20])}"
            )
        else:
            case["label"] = labels.index[text]
        split = _check_split(row, columns.split, problems)
        if not patient:
            problems.add(
                row, columns.patient, "it is empty: name the patient, so that folds can keep patients together"
            )
        else:
            if case["label"] >= 0 and not mixed_labels:
                label, number = label_of_patient.setdefault(patient, (case["label"], row.number))
                if label != case["label"]:
                    problems.add(
                        row,
                        columns.label,
                        f"this patient has another label in row {number}: correct one, or allow both with "
                        "--mixed_labels",
                    )
            if split:
                other, number = split_of_patient.setdefault(patient, (split, row.number))
                if other != split:
                    problems.add(
                        row,
                        columns.split,
                        f"this patient is in {other} in row {number}: put all of a patient's cases in one split",
                    )
        extra = {name: text for name, text in row.cells.items() if name not in used}
        table.cases.append({**case, "extra": extra} if extra else case)
        table.splits.append(split)
    return table, problems


def _check_image(
    row: Row, column: str, dataset_dir: Path, first: dict[str, tuple[int, str]], problems: Problems
) -> str:
    """The image path as a datalist holds it: relative to the data folder where it lies in it."""
    text = row.cells[column]
    if not text:
        problems.add(row, column, "it is empty: name the image file or DICOM folder")
        return text
    path = dataset_dir / text  # an absolute text stays absolute
    if not path.exists():
        problems.add(row, column, f"there is no such file in {dataset_dir}: correct the path or give --dataset_dir")
        return text
    before = first.setdefault(os.path.realpath(path), (row.number, column))
    if before != (row.number, column):
        problems.add(row, column, f"the same image is in row {before[0]}, column {before[1]}: correct one of them")
    inside = os.path.relpath(os.path.abspath(path), os.path.abspath(dataset_dir))
    return Path(text).as_posix() if inside.startswith("..") else Path(inside).as_posix()


def _check_case_id(row: Row, column: str, case_id: str, first: dict[str, int], problems: Problems) -> None:
    if not case_id:
        problems.add(row, column, "it is empty: give the case an id")
    elif not CASE_ID.fullmatch(case_id):
        problems.add(
            row,
            column,
            "a case id becomes a file name: use at most 120 letters, digits, spaces and . _ + -, with a letter or "
            "digit at both ends",
        )
    else:
        # Two ids that differ in capitals only are one file on many disks.
        number = first.setdefault(case_id.casefold(), row.number)
        if number != row.number:
            problems.add(row, column, f"the same case id is in row {number}: every case needs its own")


def _check_split(row: Row, column: str | None, problems: Problems) -> str:
    if column is None:
        return ""
    split = SPLIT_SPELLINGS.get(row.cells[column].casefold(), "")
    if not split:
        problems.add(
            row, column, f"{row.cells[column][:20] or 'empty'} is no split: write training, validation or test"
        )
    return split
