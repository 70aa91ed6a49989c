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
from .abstention import aurc, aurc_interval, confidence, losses, predicted_classes, risk_coverage
from .bootstrap import bootstrap_intervals, mean_interval
from .calibration import reliability_bins
from .key_slices import KEY_SLICE_DEFINITIONS, key_slice_intervals, key_slice_scores
from .scores import DEFINITIONS, SCORES, all_scores, higher_is_better, score

__all__ = ["SCORES", "all_scores", "evaluate_records", "higher_is_better", "score", "write_metrics"]

LEVEL = 0.95
STATUSES = ("accepted", "abstained", "refused")
CALIBRATION = (
    "over accepted and abstained cases of known label. bins: mean probability and share of cases of class 1 (more than "
    "two classes: highest probability and accuracy), with a 95% Wilson interval. risk_coverage: mean loss (risk) of "
    "the share (coverage) of the cases whose confidence is at least limit. loss: 0 for a right prediction, 1 for a "
    "wrong one, or with two classes and threshold t, 2 t for a false positive and 2 (1 - t) for a false negative. "
    "confidence: probability of the prediction after division of the odds by those of the threshold. aurc: mean of the "
    "risk over the coverages, equal confidences together; the risk of all cases for an order by chance"
)


def evaluate_records(
    records: Sequence[Mapping[str, Any]],
    class_names: Sequence[str],
    resamples: int = 1000,
    seed: int = 0,
    threshold: float = 0.5,
) -> dict[str, Any]:
    """Everything metrics.json holds.

    Scores are over the accepted cases with a known label; the prediction of the record decides, so that an operating
    point other than the highest probability is honoured. Abstained cases have probabilities but no prediction: a second
    set of scores takes them in with the one that they would have had. Refused cases are listed by reason code, and
    those with a label are counted: they are what no score covers.

    Args:
        records: case records.
        class_names: the K class names of the model.
        resamples: bootstrap resamples.
        seed: of the resampling.
        threshold: the operating point of the weights, with two classes; for abstained cases and for confidence.

    Returns:
        A dict with ``class_names``, ``counts``, ``refused``, ``coverage``, ``scores`` (name → value, low, high),
        ``scores_all`` (likewise, with abstained cases), ``per_class`` (class name → support, f1), ``confusion_matrix``
        (rows true, columns predicted), ``majority_class``, ``calibration``, ``key_slices``, ``bootstrap`` and
        ``definitions``. Figures that are undefined are NaN (null in the file).

    Raises:
        InputError: a case twice, classes other than `class_names`, or probabilities that are none.
    """
    _check(records, class_names)
    names = list(class_names)
    accepted, abstained, refused = ([r for r in records if r["status"] == status] for status in STATUSES)
    classified = [r for r in records if r["status"] != "refused" and r["label"] is not None]
    kept = np.array([r["status"] == "accepted" for r in classified], dtype=bool)
    labels = np.array([r["label"] for r in classified], dtype=np.int64)
    probabilities = np.array([r["probabilities"] for r in classified], dtype=np.float64).reshape(-1, len(names))
    would_be = predicted_classes(probabilities, threshold)
    given = [p if r["prediction"] is None else r["prediction"] for r, p in zip(classified, would_be, strict=True)]
    predictions = np.array(given, dtype=np.int64)
    patients = [_patient(r) for r in classified]
    scored = [patient for patient, one in zip(patients, kept, strict=True) if one]
    draws = {"resamples": resamples, "seed": seed}

    entries, values, intervals = _scored(
        labels[kept], probabilities[kept], predictions[kept], scored, class_names=names, **draws
    )
    entries_all = entries
    if not kept.all():
        entries_all, _, _ = _scored(labels, probabilities, predictions, patients, class_names=names, **draws)
    share = mean_interval(kept, patients, **draws)
    table = np.zeros((len(names),) * 2)
    if kept.any():
        table = confusion_matrix(labels[kept], predictions[kept], labels=range(len(names)))
    key_slices = key_slice_scores(accepted)
    if key_slices:
        key_slices["intervals"] = key_slice_intervals(accepted, [_patient(r) for r in accepted], **draws)
    return {
        "class_names": names,
        "counts": {
            "cases": len(records),
            "accepted": len(accepted),
            "abstained": len(abstained),
            "refused": len(refused),
            "scored": len(scored),
            "accepted_without_label": len(accepted) - len(scored),
            "abstained_with_label": len(classified) - len(scored),
            "refused_with_label": sum(r["label"] is not None for r in refused),
            "patients": len({_patient(r) for r in records}),
            "patients_scored": len(set(patients)),
            "scored_without_patient": sum(r["patient"] is None for r in classified if r["status"] == "accepted"),
        },
        "refused": _by_reason(refused),
        "coverage": {"value": float(kept.mean()) if len(kept) else np.nan, "low": share.low, "high": share.high},
        "scores": {name: entries[name] for name in SCORES},
        "scores_all": {name: entries_all[name] for name in SCORES},
        "per_class": {name: {"support": values["support"][name], "f1": entries[f"f1_{name}"]} for name in names},
        "confusion_matrix": table.astype(int).tolist(),
        "majority_class": values["majority_class"],
        "calibration": _calibration(labels, probabilities, predictions, patients, threshold, **draws),
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
            "scores_all": "with the abstained cases and the predictions that they would have had",
            "coverage": "accepted cases over accepted and abstained ones, of known label",
            "calibration": CALIBRATION,
            "low, high": "percentile bootstrap over patients, all cases of a patient together; a case of unknown "
            "patient counts as a patient of its own; resamples without a value are left out and counted",
            "majority_class": "always answering the most frequent class of the scored cases",
            "confusion_matrix": "rows true class, columns predicted class, in the order of class_names",
            "key_slices": dict(KEY_SLICE_DEFINITIONS) if key_slices else "no slice truth was given",
        },
    }


def _scored(
    labels: Any, probabilities: Any, predictions: Any, patients: Sequence[str], **options: Any
) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """Score name → value and interval; all that `all_scores` gives; the intervals."""
    values = all_scores(labels, probabilities, options["class_names"], predictions)
    intervals = bootstrap_intervals(labels, probabilities, patients, predictions=predictions, level=LEVEL, **options)
    return {n: {"value": values[n], "low": i.low, "high": i.high} for n, i in intervals.items()}, values, intervals


def _calibration(
    labels: Any, probabilities: Any, predictions: Any, patients: list[str], threshold: float, **draws: int
) -> dict[str, Any]:
    num_classes = probabilities.shape[1]
    loss, confidences = losses(labels, predictions, num_classes, threshold), confidence(probabilities, threshold)
    interval = aurc_interval(loss, confidences, patients, **draws)
    curve = risk_coverage(loss, confidences)
    return {
        "threshold": threshold if num_classes == 2 else None,
        "bins": reliability_bins(labels, probabilities),
        "risk_coverage": {name: values.tolist() for name, values in curve._asdict().items()},
        "aurc": {"value": float(aurc(loss, confidences)[0]), "low": interval.low, "high": interval.high},
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
        if record["status"] not in STATUSES:
            raise InputError(
                f"case {record['case']!r} has the status {record['status']!r}: accepted, abstained or refused expected"
            )
        if record["status"] != "refused" and list(record["class_names"]) != list(class_names):
            raise InputError(f"case {record['case']!r} was predicted with other class names than those evaluated")
