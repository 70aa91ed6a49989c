"""Does the model look where the lesion is? Ranked slices of case records against slice truth."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from sklearn.metrics import roc_auc_score

from .bootstrap import mean_interval

__all__ = [
    "CASE_SCORES",
    "KEY_SLICE_DEFINITIONS",
    "RANKINGS",
    "case_key_slices",
    "key_slice_intervals",
    "key_slice_scores",
    "rank_slices",
    "rankings_that_tell",
    "tells_apart",
]

RANKINGS = ("score", "weight", "attention", "occlusion")
CASE_SCORES = ("hit_1", "hit_3", "distance_mm", "instance_auc")

KEY_SLICE_DEFINITIONS: dict[str, str] = {
    "positive_cases": "accepted cases of a known class other than class 0 with at least one slice known to be true; "
    "every figure below but instance_auc_pooled is over these",
    "score, weight, attention, occlusion": "what slices are ranked by; more than two classes: that of the predicted "
    "class; equal ones are ranked by score, equal scores by position, first slice first",
    "occlusion": "how much the logit of the class, less the highest of the others, falls when the slice is left out; "
    "for the second of two classes; there only where the evaluation was asked for it",
    "hit_1, hit_3": "share of positive cases in which the top slice, one of the top three slices, is a true one",
    "distance_mm": "distance in mm from the top slice to the nearest true slice, 0 for a hit",
    "instance_auc_pooled": "ROC area of slice truth over all slices of all accepted cases, positive or not, pooled",
    "instance_auc": "mean over positive cases of the ROC area within the case; cases of true slices only left out",
    "chance_hit_1, chance_hit_3": "expected hit_1, hit_3 of slices drawn at random without replacement",
    "slices": "only slices of known truth are ranked and counted",
    "left out": "rankings that tell no slices of any case apart, as those of a 3D network, which sees no single slice",
}


def rank_slices(slices: Sequence[Mapping[str, Any]], by: str = "weight") -> list[int]:
    """Places of the slices from the most to the least critical.

    What is equal is ranked by score (a hard selection leaves all but one weight at 0), equal scores by place: the slice
    that comes first in the sequence, so in position, wins.

    Args:
        slices: the ``slices`` of a case record, in order of position.
        by: one of `RANKINGS` that the slices hold.
    """
    return sorted(range(len(slices)), key=lambda i: (-slices[i][by], -slices[i]["score"]))


def key_slice_scores(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """How well the ranked slices agree with slice truth; `KEY_SLICE_DEFINITIONS` says what each figure means.

    Args:
        records: case records; those refused, and slices of unknown truth (label -1), are passed over.

    Returns:
        ``cases_with_truth``, ``positive_cases``, ``positive_cases_without_true_slice`` (counts), ``chance_hit_1``,
        ``chance_hit_3``, and for each of the `RANKINGS` that tell something a dict with ``hit_1``, ``hit_3``,
        ``distance_mm_mean``, ``distance_mm_median``, ``instance_auc``, ``instance_auc_pooled``; NaN where undefined.
        Empty if no record holds slice truth.
    """
    known = _with_truth(records)
    if not known:
        return {}
    positive = [(record, slices) for record, slices in known if record["label"]]
    found = [(record, slices) for record, slices in positive if any(s["label"] == 1 for s in slices)]
    result: dict[str, Any] = {
        "cases_with_truth": len(known),
        "positive_cases": len(found),
        "positive_cases_without_true_slice": len(positive) - len(found),
        "chance_hit_1": _mean([_chance_hit(slices, 1) for _, slices in found]),
        "chance_hit_3": _mean([_chance_hit(slices, 3) for _, slices in found]),
    }
    pooled = [s for _, slices in known for s in slices]
    for by in _telling([slices for _, slices in known]):
        table = [_case_scores(slices, by) for _, slices in found]
        distances = [row["distance_mm"] for row in table]
        result[by] = {
            "hit_1": _mean([row["hit_1"] for row in table]),
            "hit_3": _mean([row["hit_3"] for row in table]),
            "distance_mm_mean": _mean(distances),
            "distance_mm_median": float(np.median(distances)) if distances else float("nan"),
            "instance_auc": _mean([row["instance_auc"] for row in table]),
            "instance_auc_pooled": _auc(pooled, by),
        }
    return result


def tells_apart(slices: Sequence[Mapping[str, Any]], by: str = "weight") -> bool:
    """Whether a ranking of a case is one: where all slices are equal, it would be the order of their positions.

    Args:
        slices: the ``slices`` of a case record.
        by: one of `RANKINGS` that they hold; equal ones are ranked by score.
    """
    return len({(one[by], one["score"]) for one in slices}) > 1


def rankings_that_tell(records: Sequence[Mapping[str, Any]]) -> list[str]:
    """The `RANKINGS` that all records of cases that were read hold, and that tell slices apart in one at least."""
    return _telling([record["slices"] for record in records if record["status"] != "refused"])


def case_key_slices(record: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """What the first slice of one case is, by each of `RANKINGS`, and whether it is a true one.

    Args:
        record: of a case that was not refused.

    Returns:
        Each of the `RANKINGS` that the record holds → ``index`` (stored number of the first slice), and ``hit_1``,
        ``hit_3``, ``distance_mm``, ``instance_auc`` as `KEY_SLICE_DEFINITIONS` has them, NaN for a case of class 0 or
        without a known true slice.
    """
    known = [s for s in record["slices"] if s["label"] in (0, 1)]
    counts = bool(record["label"]) and any(s["label"] == 1 for s in known)
    nothing = dict.fromkeys(CASE_SCORES, math.nan)
    return {
        by: {
            "index": record["slices"][rank_slices(record["slices"], by)[0]]["index"],
            **(_case_scores(known, by) if counts else nothing),
        }
        for by in _held([record["slices"]])
    }


def key_slice_intervals(
    records: Sequence[Mapping[str, Any]], patients: Sequence[str], *, resamples: int = 1000, seed: int = 0
) -> dict[str, dict[str, list[float]]]:
    """95% bootstrap intervals over patients of the figures that are means over positive cases.

    Args:
        records: case records.
        patients: the patient of each record.
        resamples: number of resamples.
        seed: of the draw.

    Returns:
        For each of the `RANKINGS` that tell something: ``hit_1``, ``hit_3``, ``distance_mm_mean``, ``instance_auc``
        → [low, high]. Empty if no record holds slice truth.
    """
    patient_of = {record["case"]: patient for record, patient in zip(records, patients, strict=True)}
    known = _with_truth(records)
    found = [(r, s) for r, s in known if r["label"] and any(one["label"] == 1 for one in s)]
    result: dict[str, dict[str, list[float]]] = {}
    for by in _telling([slices for _, slices in known]):
        table = [(_case_scores(slices, by), patient_of[record["case"]]) for record, slices in found]
        result[by] = {}
        for name in CASE_SCORES:
            rows = [(row[name], patient) for row, patient in table if math.isfinite(row[name])]
            interval = mean_interval([v for v, _ in rows], [p for _, p in rows], resamples=resamples, seed=seed)
            result[by]["distance_mm_mean" if name == "distance_mm" else name] = [interval.low, interval.high]
    return result


def _with_truth(records: Sequence[Mapping[str, Any]]) -> list[tuple[Mapping[str, Any], list[Mapping[str, Any]]]]:
    """Accepted records that hold slice truth, each with its slices of known truth."""
    pairs = [(r, [s for s in r["slices"] if s["label"] in (0, 1)]) for r in records if r["status"] == "accepted"]
    return [(record, slices) for record, slices in pairs if slices]


def _telling(cases: Sequence[Sequence[Mapping[str, Any]]]) -> list[str]:
    return [by for by in _held(cases) if any(tells_apart(slices, by) for slices in cases)]


def _held(cases: Iterable[Sequence[Mapping[str, Any]]]) -> list[str]:
    """The rankings for which every slice of every case has a number; none without a case."""
    keys = [set(one) for slices in cases for one in slices]
    return [by for by in RANKINGS if keys and all(by in one for one in keys)]


def _case_scores(slices: Sequence[Mapping[str, Any]], by: str) -> dict[str, float]:
    order = rank_slices(slices, by)
    true_positions = [s["position_mm"] for s in slices if s["label"] == 1]
    return {
        "hit_1": float(slices[order[0]]["label"] == 1),
        "hit_3": float(any(slices[i]["label"] == 1 for i in order[:3])),
        "distance_mm": min(abs(slices[order[0]]["position_mm"] - position) for position in true_positions),
        "instance_auc": _auc(slices, by),
    }


def _chance_hit(slices: Sequence[Mapping[str, Any]], top: int) -> float:
    false = sum(s["label"] == 0 for s in slices)
    drawn = min(top, len(slices))
    return 1 - math.comb(false, drawn) / math.comb(len(slices), drawn)


def _auc(slices: Sequence[Mapping[str, Any]], by: str) -> float:
    truth = [s["label"] for s in slices]
    return float(roc_auc_score(truth, [s[by] for s in slices])) if len(set(truth)) == 2 else float("nan")


def _mean(values: Sequence[float]) -> float:
    defined = [value for value in values if math.isfinite(value)]
    return float(np.mean(defined)) if defined else float("nan")
