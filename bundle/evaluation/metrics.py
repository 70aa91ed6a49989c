"""Case records → the content of metrics.json: every score with its interval, and every case accounted for."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from sklearn.metrics import confusion_matrix

from ..errors import InputError
from ..files import write_json
from .bootstrap import bootstrap_intervals
from .key_slices import KEY_SLICE_DEFINITIONS, key_slice_intervals, key_slice_scores
from .scores import DEFINITIONS, SCORES, all_scores, higher_is_better, score

__all__ = ["SCORES", "all_scores", "evaluate_records", "higher_is_better", "score", "write_metrics"]

LEVEL = 0.95


def evaluate_records(
    records: Sequence[Mapping[str, Any]], class_names: Sequence[str], resamples: int = 1000, seed: int = 0
) -> dict[str, Any]:
    """Everything metrics.json holds.

    Scores are over the accepted cases with a known label; the prediction of the record decides, so that an operating
    point other than the highest probability is honoured. Refused cases are listed by reason code, and those with a
    label are counted: they are what the scores do not cover.

    Args:
        records: case records.
        class_names: the K class names of the model.
        resamples: bootstrap resamples.
        seed: of the resampling.

    Returns:
        A dict with ``class_names``, ``counts``, ``refused``, ``scores`` (name → value, low, high), ``per_class`` (class
        name → support, f1), ``confusion_matrix`` (rows true, columns predicted), ``majority_class``, ``key_slices``,
        ``bootstrap`` and ``definitions``. Figures that are undefined are NaN (null in the file).

    Raises:
        InputError: a case twice, classes other than `class_names`, or probabilities that are none.
    """
    _check(records, class_names)
    names = list(class_names)
    accepted = [r for r in records if r["status"] == "accepted"]
    refused = [r for r in records if r["status"] == "refused"]
    scored = [r for r in accepted if r["label"] is not None]
    labels = np.array([r["label"] for r in scored], dtype=np.int64)
    probabilities = np.array([r["probabilities"] for r in scored], dtype=np.float64).reshape(len(scored), len(names))
    predictions = np.array([r["prediction"] for r in scored], dtype=np.int64)
    patients = [_patient(r) for r in scored]

    values = all_scores(labels, probabilities, names, predictions)
    intervals = bootstrap_intervals(
        labels,
        probabilities,
        patients,
        predictions=predictions,
        class_names=names,
        resamples=resamples,
        level=LEVEL,
        seed=seed,
    )
    entries = {n: {"value": values[n], "low": i.low, "high": i.high} for n, i in intervals.items()}
    table = confusion_matrix(labels, predictions, labels=range(len(names))) if scored else np.zeros((len(names),) * 2)
    key_slices = key_slice_scores(accepted)
    if key_slices:
        key_slices["intervals"] = key_slice_intervals(
            accepted, [_patient(r) for r in accepted], resamples=resamples, seed=seed
        )
    return {
        "class_names": names,
        "counts": {
            "cases": len(records),
            "accepted": len(accepted),
            "refused": len(refused),
            "scored": len(scored),
            "accepted_without_label": len(accepted) - len(scored),
            "refused_with_label": sum(r["label"] is not None for r in refused),
            "patients": len({_patient(r) for r in records}),
            "patients_scored": len(set(patients)),
            "scored_without_patient": sum(r["patient"] is None for r in scored),
        },
        "refused": _by_reason(refused),
        "scores": {name: entries[name] for name in SCORES},
        "per_class": {name: {"support": values["support"][name], "f1": entries[f"f1_{name}"]} for name in names},
        "confusion_matrix": table.astype(int).tolist(),
        "majority_class": values["majority_class"],
        "key_slices": key_slices,
        "bootstrap": {
            "unit": "patient",
            "resamples": resamples,
            "level": LEVEL,
            "seed": seed,
            "undefined_resamples": {name: i.undefined for name, i in intervals.items() if i.undefined},
        },
        "definitions": {
            **DEFINITIONS,
            "scores": "over accepted cases of known label; refused cases are in none of them: see refused",
            "low, high": "percentile bootstrap over patients, all cases of a patient together; a case of unknown "
            "patient counts as a patient of its own; resamples without a value are left out and counted",
            "majority_class": "always answering the most frequent class of the scored cases",
            "confusion_matrix": "rows true class, columns predicted class, in the order of class_names",
            "key_slices": dict(KEY_SLICE_DEFINITIONS) if key_slices else "no slice truth was given",
        },
    }


def write_metrics(path: str | os.PathLike[str], metrics: Mapping[str, Any]) -> None:
    """Write metrics.json in one step; undefined figures (NaN) become null."""
    write_json(path, dict(metrics))


def _patient(record: Mapping[str, Any]) -> str:
    # A NUL keeps a case of unknown patient apart from every patient who happens to have its name.
    return str(record["patient"]) if record["patient"] is not None else f"\0{record['case']}"


def _by_reason(refused: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    codes = sorted({str(r["reason_code"]) for r in refused})
    groups = {code: [r for r in refused if str(r["reason_code"]) == code] for code in codes}
    return {
        code: {
            "cases": sorted(r["case"] for r in group),
            "labelled_cases": sorted(r["case"] for r in group if r["label"] is not None),
        }
        for code, group in groups.items()
    }


def _check(records: Sequence[Mapping[str, Any]], class_names: Sequence[str]) -> None:
    if len(class_names) < 2 or len(set(class_names)) != len(class_names):
        raise InputError("class names must be two or more different names")
    twice = [case for case, count in Counter(r["case"] for r in records).items() if count > 1]
    if twice:
        raise InputError(f"case {twice[0]!r} appears more than once: each case may have one record only")
    for record in records:
        if record["status"] not in ("accepted", "refused"):
            raise InputError(
                f"case {record['case']!r} has the status {record['status']!r}: accepted or refused expected"
            )
        if record["status"] == "accepted" and list(record["class_names"]) != list(class_names):
            raise InputError(f"case {record['case']!r} was predicted with other class names than those evaluated")
