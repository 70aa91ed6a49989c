"""From a table of cases to a datalist with patient-grouped, label-stratified folds."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import warnings
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.model_selection import StratifiedGroupKFold

from ..errors import InputError, command_line
from ..files import replacing
from .case_table import CaseColumns, CaseTable, read_cases
from .datalist import FORMAT, SECTIONS, content_hash
from .slice_table import SliceColumns, add_slice_truth

__all__ = ["locked_patients", "make_datalist", "make_folds", "write_datalist"]


def make_folds(cases: Sequence[dict[str, Any]], num_folds: int, seed: int) -> list[dict[str, list[str]]]:
    """Split cases into folds that keep patients together and classes in proportion.

    Every case is in the test section of one fold. What is left is split again into inner validation, about
    1 / num_folds of all cases (a quarter for two folds), and training. The order of `cases` changes nothing.

    Args:
        cases: records with `case`, `label` and `patient`.
        num_folds: number of folds, at least 2.
        seed: seed of the shuffling.

    Returns:
        A dict of case ids by section, for each fold.

    Raises:
        InputError: there are too few patients of a class for every section of every fold to hold one.
    """
    if num_folds < 2:
        raise InputError(
            f"--folds {num_folds} is too few: give at least 2, or a column of official splits with --split"
        )
    ordered = sorted(cases, key=lambda case: case["case"])
    labels = np.array([case["label"] for case in ordered])
    patients = np.array([case["patient"] for case in ordered])
    too_few = "use fewer --folds, or add cases"
    for label in np.unique(labels):
        count = len(set(patients[labels == label]))
        if count < max(num_folds, 3):
            raise InputError(
                f"class {label} has {count} patients, too few for {num_folds} folds of three sections, which take at "
                f"least {max(num_folds, 3)}: {too_few}"
            )

    def split(members: np.ndarray, parts: int, draw: str) -> list[np.ndarray]:
        # Shuffled here, by a hash: scikit-learn's own shuffling gives other folds in other versions, and before 1.8
        # folds that are hardly stratified.
        keys = [hashlib.sha256(f"{draw}/{patient}".encode()).hexdigest() for patient in patients[members]]
        splitter = StratifiedGroupKFold(parts)
        with warnings.catch_warnings():
            # scikit-learn warns of what is counted above and checked below.
            warnings.simplefilter("ignore", UserWarning)
            pairs = list(splitter.split(members, labels[members], keys))
        return [members[chosen] for _, chosen in pairs]

    everyone = np.arange(len(ordered))
    folds = []
    for number, test in enumerate(split(everyone, num_folds, f"{seed}")):
        rest = np.setdiff1d(everyone, test)
        validation = split(rest, max(num_folds - 1, 2), f"{seed}/{number}")[0]
        training = np.setdiff1d(rest, validation)
        fold = dict(zip(SECTIONS, (training, validation, test), strict=True))
        for section, members in fold.items():
            missing = sorted(set(labels.tolist()) - set(labels[members].tolist()))
            if missing:
                raise InputError(
                    f"the {section} part of fold {number} has no case of class {missing[0]}: there are too few "
                    f"patients of it; {too_few}"
                )
        folds.append({section: [ordered[i]["case"] for i in members] for section, members in fold.items()})
    return folds


def locked_patients(patients: Iterable[str], share: float) -> set[str]:
    """Patients set aside for one last evaluation, chosen by a hash of their identifiers.

    About `share` of them: who is locked depends on the patient alone, so that a cohort that grows, another task on the
    same patients, or another seed of the folds locks the same ones.

    Args:
        patients: identifiers.
        share: from 0 (nobody) to below 1.

    Raises:
        InputError: on another share.
    """
    if not 0 <= share < 1:
        raise InputError(f"--lock is a share of the patients, from 0 to below 1, not {share}")

    def place(patient: str) -> float:
        return int.from_bytes(hashlib.sha256(f"lock/{patient}".encode()).digest()[:8], "big") / 2**64

    return {patient for patient in patients if place(patient) < share}


def _official_fold(table: CaseTable) -> list[dict[str, list[str]]]:
    """One fold from a column of splits; test may be empty, as in published sets whose test part is kept back."""
    fold: dict[str, list[str]] = {section: [] for section in SECTIONS}
    for case, split in zip(table.cases, table.splits, strict=True):
        fold[split].append(case["case"])
    for section in ("training", "validation"):
        if not fold[section]:
            raise InputError(f"the split column has no case for {section}: training and validation are both needed")
    trained = {case["label"] for case, split in zip(table.cases, table.splits, strict=True) if split == "training"}
    for label, name in enumerate(table.class_names):
        if label not in trained:
            raise InputError(f"no training case has class {label} ({name}): it could never be learned")
    return [fold]


def _judged_on_validation(
    official: dict[str, list[str]], cases: Sequence[dict[str, Any]], num_folds: int, seed: int
) -> dict[str, list[str]]:
    """A fold for published sets whose test part is kept back: the official validation part is the test part here.

    About 1 / num_folds of the official training cases become the inner validation, so that nothing is chosen on the
    cases that judge.
    """
    if official["test"]:
        raise InputError("--validation_as_test is for a split without test cases, and this one has some: leave it out")
    trained = set(official["training"])
    inner = make_folds([case for case in cases if case["case"] in trained], num_folds, seed)[0]
    validation = set(inner["test"])
    return {
        "training": [case for case in official["training"] if case not in validation],
        "validation": [case for case in official["training"] if case in validation],
        "test": official["validation"],
    }


def make_datalist(
    path: str | os.PathLike[str],
    columns: CaseColumns | None = None,
    *,
    dataset_dir: str | os.PathLike[str] | None = None,
    classes: list[str] | None = None,
    num_folds: int = 5,
    seed: int = 0,
    slices: str | os.PathLike[str] | None = None,
    slice_columns: SliceColumns | None = None,
    skip_unlabelled: bool = False,
    mixed_labels: bool = False,
    lock: float = 0.0,
    validation_as_test: bool = False,
) -> dict[str, Any]:
    """Make a datalist from a table of cases.

    Args:
        path: the CSV table, a row a case.
        columns: its column names.
        dataset_dir: the folder that its image paths are relative to; by default the table's own.
        classes: class names in order of their index; by default the sorted distinct labels.
        num_folds: number of folds; where `columns` names a split column, used with `validation_as_test` alone.
        seed: seed of the folds.
        slices: a CSV table of slice truth, a row a slice.
        slice_columns: the column names of `slices`.
        skip_unlabelled: leave rows without a label out instead of refusing them.
        mixed_labels: allow a patient's cases to have different labels.
        lock: share of the patients whose cases are in no fold but in the section "locked", see `locked_patients`.
        validation_as_test: with a split column that names no test case, make the official validation part the test
            part, and 1 / num_folds of the training part the validation part.

    Returns:
        The datalist, with its hash.

    Raises:
        InputError: with one sentence for every bad row of the tables.
    """
    path = Path(path)
    columns = columns or CaseColumns()
    folder = Path(dataset_dir) if dataset_dir is not None else path.parent
    table, problems = read_cases(
        path, columns, dataset_dir=folder, classes=classes, skip_unlabelled=skip_unlabelled, mixed_labels=mixed_labels
    )
    if slices is not None:
        slice_columns = slice_columns or SliceColumns(label="label")
        found = add_slice_truth(Path(slices), slice_columns, columns, table, folder)
        problems.sentences += [f"{slices}: {sentence}" for sentence in found.sentences]
    if lock and columns.split:
        raise InputError("--lock and --split exclude each other: an official split says itself what is kept back")
    if validation_as_test and not columns.split:
        raise InputError("--validation_as_test needs the column of official splits: give --split too")
    locked = locked_patients({case["patient"] for case in table.cases}, lock)
    open_cases = [case for case in table.cases if case["patient"] not in locked]
    folds: list[dict[str, list[str]]] = []
    # Folds of a table with bad rows would say wrong things about it: an unknown label looks like a rare class.
    if not problems.sentences:
        try:
            for label, name in enumerate(table.class_names):
                if not any(case["label"] == label for case in table.cases):
                    raise InputError(f"no case has class {label} ({name}): remove it from --classes, or add cases")
            folds = _official_fold(table) if columns.split else make_folds(open_cases, num_folds, seed)
            if validation_as_test:
                folds = [_judged_on_validation(folds[0], table.cases, num_folds, seed)]
        except InputError as error:
            problems.add(None, None, str(error))
    problems.raise_if_any()
    datalist = {
        "format": FORMAT,
        "class_names": table.class_names,
        "seed": seed,
        "num_folds": len(folds),
        "cases": table.cases,
        "folds": folds,
    }
    if lock:
        datalist["locked"] = sorted(case["case"] for case in table.cases if case["patient"] in locked)
    return {**datalist, "hash": content_hash(datalist)}


def write_datalist(datalist: dict[str, Any], path: str | os.PathLike[str]) -> None:
    """Write a datalist as JSON, one case a line, all of it or nothing.

    Args:
        datalist: what `make_datalist` returns.
        path: the file to write.
    """
    parts = []
    for key, value in datalist.items():
        if key in ("cases", "folds"):
            text = "[\n  " + ",\n  ".join(json.dumps(item, ensure_ascii=False) for item in value) + "\n ]"
        else:
            text = json.dumps(value, ensure_ascii=False)
        parts.append(f" {json.dumps(key)}: {text}")
    with replacing(Path(path)) as temporary:
        temporary.write_text("{\n" + ",\n".join(parts) + "\n}\n", encoding="utf-8")


def _summary(datalist: dict[str, Any]) -> str:
    """Counts of cases, patients and classes by fold and section, for people."""
    names = datalist["class_names"]
    by_id = {case["case"]: case for case in datalist["cases"]}

    def counts(cases: list[dict[str, Any]]) -> list[str]:
        labels = Counter(case["label"] for case in cases)
        return [
            str(len(cases)),
            str(len({case["patient"] for case in cases})),
            *(str(labels[k]) for k in range(len(names))),
        ]

    rows = [["fold", "section", "cases", "patients", *names], ["", "all", *counts(datalist["cases"])]]
    for number, fold in enumerate(datalist["folds"]):
        rows += [[str(number), section, *counts([by_id[name] for name in fold[section]])] for section in SECTIONS]
    if "locked" in datalist:
        rows.append(["", "locked", *counts([by_id[name] for name in datalist["locked"]])])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    with_truth = sum("slice_label" in case for case in datalist["cases"])
    return "\n".join([*lines, f"slice truth: {with_truth} of {len(datalist['cases'])} cases"])


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line: a table of cases to a datalist.

    Args:
        arguments: the command line; by default that of the process.

    Returns:
        0.

    Raises:
        InputError: with one sentence for every bad row of the tables.
    """
    parser = argparse.ArgumentParser(
        prog="make_datalist",
        description="Make a datalist with patient-grouped, label-stratified folds from a table of cases (CSV). Each "
        "fold has a training, an inner validation and a test part. Every bad row is named; then nothing is written.",
    )
    parser.add_argument("table", type=Path, metavar="TABLE", help="CSV table, a row a case")
    parser.add_argument("--out", type=Path, required=True, help="the datalist to write (JSON)")
    parser.add_argument(
        "--image", default="image", help="column of the image paths; several, by commas, are modalities"
    )
    parser.add_argument("--label", default="label", help="column of the labels: 0, 1, ... or class names")
    parser.add_argument("--patient", default="patient", help="column that tells which cases are of one patient")
    parser.add_argument("--case", help="column of case ids (default: case; where there is none, from the file names)")
    parser.add_argument("--dataset_dir", type=Path, help="folder of the image paths (default: that of the table)")
    parser.add_argument("--classes", help="class names by commas, in the order of the class index (default: sorted)")
    parser.add_argument("--folds", type=int, default=5, help="number of folds (default: 5)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the folds (default: 0)")
    parser.add_argument("--split", help="column of official splits (training, validation, test), kept as the only fold")
    parser.add_argument(
        "--validation_as_test",
        action="store_true",
        help="with --split and without test cases: judge on the validation part, and take 1 / --folds of the training "
        "part for the inner validation",
    )
    parser.add_argument("--slices", type=Path, help="CSV table of slice truth, a row a slice")
    parser.add_argument(
        "--slice_case",
        choices=["case", "image", "patient"],
        help="by what that table names a case (default: what it has)",
    )
    parser.add_argument("--slice_index", default="k", help="its column of slice indices from 0 (default: k)")
    parser.add_argument("--slice_label", default="label", help="its column of 1, 0 or empty = unknown (default: label)")
    parser.add_argument("--skip_unlabelled", action="store_true", help="leave rows without a label out")
    parser.add_argument("--mixed_labels", action="store_true", help="allow a patient's cases to have different labels")
    parser.add_argument(
        "--lock",
        type=float,
        default=0.0,
        help="share of the patients to set aside in no fold, chosen by a hash of their identifiers (default: 0)",
    )
    given = parser.parse_args(arguments)
    columns = CaseColumns(
        image=tuple(name.strip() for name in given.image.split(",")),
        label=given.label,
        patient=given.patient,
        case=given.case,
        split=given.split,
    )
    datalist = make_datalist(
        given.table,
        columns,
        dataset_dir=given.dataset_dir,
        classes=[name.strip() for name in given.classes.split(",")] if given.classes else None,
        num_folds=given.folds,
        seed=given.seed,
        slices=given.slices,
        slice_columns=SliceColumns(label=given.slice_label, index=given.slice_index, case=given.slice_case),
        skip_unlabelled=given.skip_unlabelled,
        mixed_labels=given.mixed_labels,
        lock=given.lock,
        validation_as_test=given.validation_as_test,
    )
    write_datalist(datalist, given.out)
    print(_summary(datalist))
    print(f"wrote {given.out}")
    return 0


if __name__ == "__main__":
    command_line(main)
