"""Case records: what the model said of one case and which slices decided, as a dict and as JSON."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..errors import InputError, Refusal
from ..evaluation.key_slices import rank_slices, tells_apart
from ..files import write_json

__all__ = [
    "Abstention",
    "case_record",
    "read_record",
    "read_records",
    "record_file_name",
    "refused_record",
    "remove_foreign_records",
    "write_record",
]

RECORD_KEYS = (
    "case",
    "status",
    "reason_code",
    "reason",
    "patient",
    "label",
    "class_names",
    "probabilities",
    "prediction",
    "slices",
    "key_slices",
)
STATUSES = ("accepted", "abstained", "refused")
LONGEST_FILE_NAME = 180


class Abstention(NamedTuple):
    """Why a case that was classified gets no prediction; as with a refusal, a code, a sentence and the facts."""

    code: str
    sentence: str
    facts: dict[str, Any]


def case_record(
    case: str,
    *,
    probabilities: ArrayLike,
    class_names: Sequence[str],
    slice_index: ArrayLike,
    slice_position: ArrayLike,
    weights: ArrayLike,
    attention: ArrayLike,
    scores: ArrayLike,
    occlusion: ArrayLike | None = None,
    slice_label: ArrayLike | None = None,
    sop_instance_uids: Sequence[str | None] | None = None,
    frame_numbers: Sequence[int] | None = None,
    reading: Sequence[Mapping[str, Any]] | None = None,
    label: int | None = None,
    patient: str | None = None,
    prediction: int | None = None,
    num_key_slices: int = 5,
    abstention: Abstention | None = None,
) -> dict[str, Any]:
    """The record of a case that was classified: accepted with a prediction, or abstained with probabilities alone.

    Args:
        case: name of the case.
        probabilities: (K,) class probabilities.
        class_names: K names.
        slice_index: (N,) index in the stored source volume; real slices only, no padding.
        slice_position: (N,) position along the slice normal in mm.
        weights: (N,), (N, 1) or (N, K) selection weights; of K columns that of the predicted class is kept.
        attention: likewise, attention.
        scores: likewise, scores (logits).
        occlusion: (N,) how much each slice counts, by leaving it out (`leave_one_out`); None: not looked at, and no
            such key in the record's slices.
        slice_label: (N,) 1, 0 or -1 (unknown); None: unknown.
        sop_instance_uids: N DICOM SOP Instance UIDs; None: not from DICOM.
        frame_numbers: N numbers of the frame in its multi-frame DICOM object, from 1; None: single-frame, or no DICOM.
        reading: how each image of the case was read (format, series, tilt, corrections); None: not known.
        label: true class, if known.
        patient: patient identifier of the datalist, if known.
        prediction: predicted class; None takes the most probable.
        num_key_slices: how many of the slices of highest selection weight are key slices. Equal weights are ranked by
            score, equal scores by position.
        abstention: why no prediction is given; None gives it.

    Returns:
        A JSON-serialisable dict; ``slices`` in order of position, ``key_slices`` most critical first; none where all
        slices are equal, as for a 3D network, which sees no single slice. ``made_from`` is
        None; a `RunFolder` fills it in.

    Raises:
        InputError: arrays that do not fit each other, or a value that is not finite.
    """
    _check_case(case)
    p = _finite("probabilities", probabilities, case)
    if p.shape != (len(class_names),) or len(p) < 2:
        raise InputError(f"case {case!r}: probabilities of shape {p.shape} do not fit {len(class_names)} class names")
    chosen = int(p.argmax()) if prediction is None else int(prediction)
    if not 0 <= chosen < len(p) or (label is not None and not 0 <= int(label) < len(p)):
        raise InputError(f"case {case!r}: label and prediction must lie between 0 and {len(p) - 1}")
    positions = _finite("slice_position", slice_position, case)
    n = len(positions)
    if n == 0 or num_key_slices < 1:
        raise InputError(f"case {case!r}: a record needs at least one slice and one key slice")
    columns = {
        "index": _column("slice_index", slice_index, case, n, 0),
        "position_mm": _column("slice_position", positions, case, n, 0),
        "weight": _column("weights", weights, case, n, chosen, len(p)),
        "attention": _column("attention", attention, case, n, chosen, len(p)),
        "score": _column("scores", scores, case, n, chosen, len(p)),
        **({} if occlusion is None else {"occlusion": _column("occlusion", occlusion, case, n, 0)}),
        "label": _column("slice_label", np.full(n, -1) if slice_label is None else slice_label, case, n, 0),
    }
    if not np.isin(columns["label"], (-1, 0, 1)).all():
        raise InputError(f"case {case!r}: slice labels must be 1, 0 or -1 (unknown)")
    uids = [None] * n if sop_instance_uids is None else list(sop_instance_uids)
    frames = [None] * n if frame_numbers is None else list(frame_numbers)
    for what, given in (("SOP Instance UIDs", uids), ("frame numbers", frames)):
        if len(given) != n:
            raise InputError(f"case {case!r}: {len(given)} {what} were given for {n} slices")
    slices: list[dict[str, Any]] = [
        {
            "index": int(columns["index"][i]),
            **{key: float(columns[key][i]) for key in columns if key not in ("index", "label")},
            "sop_instance_uid": None if uids[i] is None else str(uids[i]),
            "frame_number": None if frames[i] is None else int(frames[i]),
            "label": int(columns["label"][i]),
        }
        for i in np.argsort(positions, kind="stable")
    ]
    return {
        "case": case,
        "status": "accepted" if abstention is None else "abstained",
        "reason_code": None if abstention is None else abstention.code,
        "reason": None if abstention is None else abstention.sentence,
        "reason_facts": {} if abstention is None else abstention.facts,
        "patient": None if patient is None else str(patient),
        "label": None if label is None else int(label),
        "class_names": list(class_names),
        "probabilities": [float(value) for value in p],
        "prediction": chosen if abstention is None else None,
        "reading": None if reading is None else [dict(image) for image in reading],
        "slices": slices,
        "key_slices": [dict(slices[i]) for i in rank_slices(slices)[:num_key_slices]] if _has_key(slices) else [],
        "made_from": None,
    }


def _has_key(slices: Sequence[Mapping[str, Any]]) -> bool:
    return len(slices) == 1 or tells_apart(slices)


def refused_record(
    case: str, refusal: InputError, label: int | None = None, patient: str | None = None
) -> dict[str, Any]:
    """The record of a case that could not be read: the same keys, a reason, and no prediction.

    Args:
        case: name of the case.
        refusal: why; an `InputError` that is no `Refusal` gets the reason code ``unreadable``.
        label: true class, if known.
        patient: patient identifier of the datalist, if known.
    """
    _check_case(case)
    return {
        "case": case,
        "status": "refused",
        "reason_code": refusal.code if isinstance(refusal, Refusal) else "unreadable",
        "reason": refusal.sentence if isinstance(refusal, Refusal) else str(refusal),
        "reason_facts": refusal.facts if isinstance(refusal, Refusal) else {},
        "patient": None if patient is None else str(patient),
        "label": None if label is None else int(label),
        "class_names": [],
        "probabilities": [],
        "prediction": None,
        "reading": None,
        "slices": [],
        "key_slices": [],
        "made_from": None,
    }


def record_file_name(case: str) -> str:
    """A file name for a case that is safe on every file system and different for different cases.

    Whatever is not a letter, digit or one of ``_.-`` is percent-encoded, and so is a leading dot; a name that gets too
    long ends in the SHA-256 of the case behind ``~``, which no other name can hold.
    """
    _check_case(case)
    name = quote(case, safe="").replace("~", "%7E")
    if name.startswith("."):
        name = "%2E" + name[1:]
    if len(name) > LONGEST_FILE_NAME:
        name = f"{name[:100]}~{hashlib.sha256(case.encode()).hexdigest()}"
    return f"{name}.json"


def write_record(folder: str | os.PathLike[str], record: Mapping[str, Any]) -> Path:
    """Write one record as JSON in one step, under `record_file_name`; an earlier one of the case is replaced."""
    path = Path(folder) / record_file_name(record["case"])
    write_json(path, dict(record))
    return path


def remove_foreign_records(folder: str | os.PathLike[str], cases: Iterable[str]) -> None:
    """Remove the records of other cases, which would contradict a table of these; what is no record stays."""
    ours = {record_file_name(case) for case in cases}
    for path in Path(folder).glob("[!.]*.json"):
        if path.name not in ours and _has_record_keys(_json_in(path)):
            path.unlink(missing_ok=True)


def read_record(path: str | os.PathLike[str]) -> dict[str, Any] | None:
    """The record in a file; None where it is absent or is not such that a table can be made from it."""
    record = _json_in(Path(path))
    if not _has_record_keys(record) or record["status"] not in STATUSES:
        return None
    lists = [record[key] for key in ("class_names", "probabilities", "slices", "key_slices")]
    if not all(isinstance(value, list) for value in lists):
        return None
    names, probabilities, slices, key_slices = lists
    if not all(isinstance(one, dict) and {"weight", "score"} <= one.keys() for one in (*slices, *key_slices)):
        return None
    if record["status"] == "refused":
        whole = record["prediction"] is None and isinstance(record["reason_code"], str)
    else:
        answered = record["status"] == "accepted"
        answer = record["prediction"] in range(len(names)) if answered else record["prediction"] is None
        whole = answer and len(names) == len(probabilities) and bool(key_slices) == _has_key(slices)
    return record if whole else None


def read_records(folder: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The records of a folder, sorted by case.

    Raises:
        InputError: no such folder, no record in it, a file that is no record, or a case that appears twice.
    """
    paths = sorted(path for path in Path(folder).glob("*.json") if not path.name.startswith("."))
    if not paths:
        raise InputError(f"{Path(folder).name}: no such folder, or no case record (.json) in it; run inference first")
    records: dict[str, dict[str, Any]] = {}
    for path in paths:
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise InputError(f"{path.name} cannot be read as a case record; remove it or write it again") from error
        missing = [key for key in RECORD_KEYS if not isinstance(record, dict) or key not in record]
        if missing:
            raise InputError(f"{path.name} is no case record: {missing[0]!r} is missing; remove it from the folder")
        if record["case"] in records:
            raise InputError(f"{path.name} is a second record of case {record['case']!r}; remove one of them")
        records[record["case"]] = record
    return [records[case] for case in sorted(records)]


def _json_in(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None


def _has_record_keys(content: Any) -> bool:
    return isinstance(content, dict) and all(key in content for key in RECORD_KEYS)


def _check_case(case: str) -> None:
    if not isinstance(case, str) or not case:
        raise InputError("a case needs a name that is not empty")


def _finite(what: str, values: ArrayLike, case: str) -> NDArray[np.float64]:
    array = np.asarray(values, dtype=np.float64)
    if not np.isfinite(array).all():
        raise InputError(
            f"case {case!r}: {what} holds a value that is not finite; check the weights and the input scan"
        )
    return array


def _column(what: str, values: ArrayLike, case: str, n: int, column: int, num_classes: int = 1) -> NDArray[np.float64]:
    """Values (N,), (N, 1) or (N, num_classes) as (N,)."""
    array = _finite(what, values, case)
    if array.ndim == 2 and array.shape[1] in (1, num_classes):
        array = array[:, 0 if array.shape[1] == 1 else column]
    if array.shape != (n,):
        raise InputError(f"case {case!r}: {what} has shape {array.shape}, but there are {n} slices")
    return array
