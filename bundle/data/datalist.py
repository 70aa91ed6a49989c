"""Datalists: which cases there are, and which of them train, choose and test in every fold.

A datalist is a JSON file made from a table of cases by `scripts/make_datalist` and read by `load_datalist`:

    {"format": 1, "class_names": [...], "seed": 0, "num_folds": 5, "hash": "sha256:...",
     "cases": [{"case": "c1", "image": "images/x.nii.gz", "label": 0, "patient": "p1", "slice_label": [0, 1]}, ...],
     "folds": [{"training": [case ids], "validation": [...], "test": [...]}, ...], "locked": [case ids]}

`image` is relative to the data folder (or absolute) and a list where the modalities of a case are separate files;
`slice_label` (1, 0, -1 unknown) is indexed like the stored slices and optional. `locked`, optional too, are cases in no
fold, set aside for one last evaluation; they are read as a section of every fold.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

import jsonschema

from ..errors import InputError

__all__ = ["FORMAT", "LOCKED", "SECTIONS", "class_names", "content_hash", "fold_sizes", "load_datalist"]

SECTIONS = ("training", "validation", "test")
LOCKED = "locked"
FORMAT = 1

_TEXT = {"type": "string", "minLength": 1}
_SCHEMA = {
    "type": "object",
    "required": ["format", "class_names", "cases", "folds"],
    "properties": {
        "class_names": {"type": "array", "minItems": 2, "items": _TEXT, "uniqueItems": True},
        "hash": {"type": "string"},
        "cases": {
            "type": "array",
            "minItems": 1,
            "items": {
                "type": "object",
                "required": ["case", "image", "label", "patient"],
                "properties": {
                    "case": _TEXT,
                    "image": {"anyOf": [_TEXT, {"type": "array", "minItems": 1, "items": _TEXT}]},
                    "label": {"type": "integer"},
                    "patient": _TEXT,
                    "slice_label": {"type": ["array", "null"]},
                },
            },
        },
        "folds": {
            "type": "array",
            "minItems": 1,
            "items": {
                "type": "object",
                "required": list(SECTIONS),
                "additionalProperties": False,
                "properties": {section: {"type": "array", "items": _TEXT} for section in SECTIONS},
            },
        },
        LOCKED: {"type": "array", "items": _TEXT},
    },
}


def content_hash(datalist: dict[str, Any]) -> str:
    """SHA-256 over everything but the hash itself, in a form that white space and order of keys do not change."""
    rest = {key: value for key, value in datalist.items() if key != "hash"}
    canonical = json.dumps(rest, sort_keys=True, separators=(",", ":"))
    return "sha256:" + hashlib.sha256(canonical.encode()).hexdigest()


def hash_of(path: str | os.PathLike[str]) -> str:
    """The content hash of a datalist file, whether it carries one or not."""
    return content_hash(_read(Path(path)))


def _read(path: Path) -> dict[str, Any]:
    """Read a datalist and check all that can be checked without the images."""
    try:
        datalist = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
        raise InputError(
            f"there is no datalist {path}: make it with scripts/make_datalist, or check the path"
        ) from None
    except (OSError, ValueError) as error:
        raise InputError(f"{path} is no readable JSON file ({type(error).__name__}): make the datalist again") from None
    if not isinstance(datalist, dict) or datalist.get("format") != FORMAT:
        raise InputError(f"{path} is no datalist of format {FORMAT}: make it with scripts/make_datalist")
    fault = next(jsonschema.Draft202012Validator(_SCHEMA).iter_errors(datalist), None)
    if fault is not None:
        raise InputError(
            f"{path} is no valid datalist at {fault.json_path} ({fault.validator} must be {fault.validator_value}): "
            "make it again with scripts/make_datalist"
        )
    if "hash" in datalist and datalist["hash"] != content_hash(datalist):
        raise InputError(f"{path} was edited after it was made: make it again, or remove its 'hash' to accept the edit")
    _check_cases(path, datalist)
    for number, fold in enumerate(datalist["folds"]):
        patients = {case["case"]: case["patient"] for case in datalist["cases"]}
        _check_fold(path, number, {**fold, LOCKED: datalist.get(LOCKED, [])}, patients)
    return datalist


def _check_cases(path: Path, datalist: dict[str, Any]) -> None:
    doubled = [case for case, count in Counter(case["case"] for case in datalist["cases"]).items() if count > 1]
    if doubled:
        raise InputError(f"{path} has the case {doubled[0]} twice: every case needs its own id")
    for case in datalist["cases"]:
        if not 0 <= case["label"] < len(datalist["class_names"]):
            raise InputError(
                f"{path}: case {case['case']} has label {case['label']}, but there are {len(datalist['class_names'])} "
                f"classes, counted from 0: correct it, or class_names"
            )
        if not all(type(value) is int and -1 <= value <= 1 for value in case.get("slice_label") or []):
            raise InputError(
                f"{path}: slice_label of case {case['case']} may hold 1, 0 and -1 (unknown) only: correct it"
            )


def _check_fold(path: Path, number: int, fold: dict[str, list[str]], patients: dict[str, str]) -> None:
    section_of_case: dict[str, str] = {}
    section_of_patient: dict[str, tuple[str, str]] = {}
    for section in (*SECTIONS, LOCKED):
        for case in fold[section]:
            if case not in patients:
                raise InputError(f"{path}: fold {number} names a case {case} that is not in the list: remove it")
            if case in section_of_case:
                raise InputError(
                    f"{path}: case {case} of fold {number} is in {section_of_case[case]} and in {section}: "
                    "leave it in one, once"
                )
            section_of_case[case] = section
            other, example = section_of_patient.setdefault(patients[case], (section, case))
            if other != section:
                raise InputError(
                    f"{path}: one patient of fold {number} is in {other} (case {example}) and in {section} "
                    f"(case {case}): put all of a patient's cases in one section"
                )


def load_datalist(
    path: str | os.PathLike[str],
    section: str,
    fold: int = 0,
    dataset_dir: str | os.PathLike[str] | None = None,
) -> list[dict[str, Any]]:
    """Read the cases of one section of one fold.

    Args:
        path: a datalist made by `scripts/make_datalist`.
        section: "training", "validation", "test", or "locked", which is the same in every fold.
        fold: number of the fold, from 0.
        dataset_dir: the folder that image paths are relative to, in which case every image must exist; by default the
            folder of the datalist, unchecked.

    Returns:
        A list of dicts with `case` (str), `image` (absolute path, or a list of them), `label` (int), `patient` (str)
        and `slice_label` (list of 1, 0, -1 by stored slice, or None).

    Raises:
        InputError: the file is missing, corrupt, edited or inconsistent (also in parts not asked for), there is no such
            section or fold, it is empty, images are missing, or the classes are others than expected.
    """
    path = Path(path)
    datalist = _read(path)
    if section not in (*SECTIONS, LOCKED):
        raise InputError(f"a datalist has no section {section!r}: choose one of {', '.join((*SECTIONS, LOCKED))}")
    folds = datalist["folds"]
    if type(fold) is not int or not 0 <= fold < len(folds):
        raise InputError(f"{path} has folds 0 to {len(folds) - 1}, not {fold!r}: choose one of these")
    chosen = {LOCKED: datalist.get(LOCKED), **folds[fold]}[section]
    if not chosen and section == LOCKED:
        raise InputError(f"{path} has no locked cases: make it with scripts/make_datalist --lock SHARE")
    if not chosen:
        raise InputError(f"{path} has no cases in section {section} of fold {fold}: choose another section or fold")
    folder = Path(dataset_dir if dataset_dir is not None else path.parent).absolute()
    by_id = {case["case"]: case for case in datalist["cases"]}
    records = []
    missing = []
    for name in chosen:
        case = by_id[name]
        images = [case["image"]] if isinstance(case["image"], str) else case["image"]
        paths = [str(folder / image) for image in images]
        if dataset_dir is not None:
            missing += [image for image, full in zip(images, paths, strict=True) if not os.path.exists(full)]
        records.append(
            {
                "case": name,
                "image": paths[0] if isinstance(case["image"], str) else paths,
                "label": case["label"],
                "patient": case["patient"],
                "slice_label": case.get("slice_label"),
            }
        )
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise InputError(
            f"{len(missing)} images of {path} are not in {folder}: {', '.join(missing[:3])}{more}; check dataset_dir"
        )
    return records


def class_names(path: str | os.PathLike[str]) -> list[str]:
    """The class names of a datalist, in order of the class index.

    Args:
        path: a datalist made by `scripts/make_datalist`.

    Returns:
        The names, K of them.

    Raises:
        InputError: the file is missing, corrupt, edited or inconsistent.
    """
    names: list[str] = _read(Path(path))["class_names"]
    return names


def fold_sizes(path: str | os.PathLike[str]) -> list[dict[str, int]]:
    """How many cases each section of each fold has: section → number, a dict a fold; the locked ones are in each.

    Args:
        path: a datalist made by `scripts/make_datalist`.

    Raises:
        InputError: the file is missing, corrupt, edited or inconsistent.
    """
    datalist = _read(Path(path))
    locked = len(datalist.get(LOCKED, []))
    return [{**{section: len(fold[section]) for section in SECTIONS}, LOCKED: locked} for fold in datalist["folds"]]
