from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bundle.errors import InputError, Refusal
from bundle.evaluation.abstention import aurc, confidence, losses
from bundle.evaluation.bootstrap import bootstrap_intervals
from bundle.evaluation.calibration import reliability_bins
from bundle.evaluation.metrics import SCORES, evaluate_records, score, write_metrics
from bundle.results.records import Abstention, case_record, refused_record

CLASSES = ["low", "high"]


def accepted(case: str, label: int | None, positive: float, patient: str | None = None, **changes: Any) -> dict:
    arguments: dict[str, Any] = {
        "probabilities": [1 - positive, positive],
        "class_names": CLASSES,
        "slice_index": [0, 1, 2],
        "slice_position": [0.0, 5.0, 10.0],
        "weights": [0.1, 0.7, 0.2],
        "attention": [0.3, 0.4, 0.3],
        "scores": [-1.0, 2.0, 0.0],
        "label": label,
        "patient": patient,
        **changes,
    }
    return case_record(case, **arguments)


def cohort() -> list[dict]:
    generator = np.random.default_rng(0)
    labels = generator.integers(0, 2, 30)
    positive = np.clip(0.5 * labels + generator.random(30) * 0.6, 0.01, 0.99)
    records = [
        accepted(f"c{i}", int(label), float(p), f"p{i // 2}", slice_label=[0, int(label), 0])
        for i, (label, p) in enumerate(zip(labels, positive, strict=True))
    ]
    return [
        *records,
        accepted("no label", None, 0.4, "p0"),
        refused_record("bad 1", Refusal("missing_slices", "A slice is missing."), label=1, patient="p40"),
        refused_record("bad 2", Refusal("missing_slices", "A slice is missing.")),
        refused_record("bad 3", Refusal("not_an_image", "This is no image."), label=0),
    ]


def test_every_case_is_accounted_for() -> None:
    metrics = evaluate_records(cohort(), CLASSES, resamples=20)
    assert metrics["counts"] == {
        "cases": 34,
        "accepted": 31,
        "abstained": 0,
        "refused": 3,
        "scored": 30,
        "accepted_without_label": 1,
        "abstained_with_label": 0,
        "refused_with_label": 2,
        "patients": 15 + 3,
        "patients_scored": 15,
        "scored_without_patient": 0,
    }
    assert metrics["refused"] == {
        "missing_slices": {"cases": ["bad 1", "bad 2"], "labelled_cases": ["bad 1"]},
        "not_an_image": {"cases": ["bad 3"], "labelled_cases": ["bad 3"]},
    }
    assert sum(map(sum, metrics["confusion_matrix"])) == 30


def test_scores_and_intervals_are_those_of_the_scored_cases() -> None:
    records = cohort()
    metrics = evaluate_records(records, CLASSES, resamples=100, seed=3)
    labels = [r["label"] for r in records[:30]]
    probabilities = [r["probabilities"] for r in records[:30]]
    patients = [r["patient"] for r in records[:30]]
    intervals = bootstrap_intervals(labels, probabilities, patients, resamples=100, seed=3)
    assert tuple(metrics["scores"]) == SCORES
    for name, entry in metrics["scores"].items():
        assert entry["value"] == score(name, labels, probabilities)
        assert (entry["low"], entry["high"]) == intervals[name][:2]
    table = np.array(metrics["confusion_matrix"])
    assert table[1, 1] / table[1].sum() == pytest.approx(metrics["scores"]["sensitivity"]["value"])
    assert table[0, 0] / table[0].sum() == pytest.approx(metrics["scores"]["specificity"]["value"])
    assert metrics["per_class"]["high"]["support"] == table[1].sum() == sum(labels)
    f1 = metrics["per_class"]["high"]["f1"]
    assert f1["value"] == pytest.approx(2 * table[1, 1] / (table[1].sum() + table[:, 1].sum()))
    assert f1["low"] <= f1["value"] <= f1["high"]
    assert set(metrics["scores"]) <= set(metrics["definitions"])


def test_key_slices_are_reported_with_intervals() -> None:
    metrics = evaluate_records(cohort(), CLASSES, resamples=50)
    assert metrics["key_slices"]["score"]["hit_1"] == 1.0
    assert metrics["key_slices"]["chance_hit_1"] == pytest.approx(1 / 3)
    assert metrics["key_slices"]["intervals"]["score"]["hit_1"] == [1.0, 1.0]
    plain = [accepted("a", 0, 0.1), accepted("b", 1, 0.9)]
    assert evaluate_records(plain, CLASSES, resamples=5)["key_slices"] == {}


def test_the_prediction_of_the_record_decides() -> None:
    records = [accepted("a", 1, 0.3, prediction=1), accepted("b", 0, 0.1)]
    metrics = evaluate_records(records, CLASSES, resamples=5)
    assert metrics["scores"]["accuracy"]["value"] == 1.0
    assert metrics["confusion_matrix"] == [[1, 0], [0, 1]]


def with_abstentions(threshold: float) -> list[dict]:
    """The cohort, in which each third labelled case abstains, and one of unknown label."""
    changed = []
    for i, record in enumerate(cohort()):
        if record["status"] == "accepted":
            prediction = int(record["probabilities"][1] >= threshold)
            abstains = i % 3 == 0 and record["label"] is not None
            changed.append({**record, "prediction": None, "status": "abstained"} if abstains else
                           {**record, "prediction": prediction})  # fmt: skip
        else:
            changed.append(record)
    return [*changed, accepted("unsure", None, 0.5, "p1", abstention=Abstention("low_confidence", "No.", {}))]


def test_abstained_cases_are_left_out_of_one_set_of_scores_and_in_the_other() -> None:
    records = with_abstentions(0.3)
    metrics = evaluate_records(records, CLASSES, resamples=40, seed=1, threshold=0.3)
    counts = metrics["counts"]
    assert (counts["accepted"], counts["abstained"], counts["refused"], counts["cases"]) == (21, 11, 3, 35)
    assert (counts["scored"], counts["abstained_with_label"], counts["accepted_without_label"]) == (20, 10, 1)
    kept = evaluate_records([r for r in records if r["status"] == "accepted"], CLASSES, resamples=40, seed=1)
    assert metrics["scores"] == kept["scores"] == kept["scores_all"]
    assert metrics["confusion_matrix"] == kept["confusion_matrix"]
    answered = [
        {**r, "status": "accepted", "prediction": int(r["probabilities"][1] >= 0.3)}
        for r in records
        if r["status"] != "refused"
    ]
    everything = evaluate_records(answered, CLASSES, resamples=40, seed=1, threshold=0.3)
    assert metrics["scores_all"] == everything["scores"] != metrics["scores"]
    assert metrics["calibration"] == everything["calibration"]
    assert metrics["coverage"]["value"] == pytest.approx(20 / 30)
    assert metrics["coverage"]["low"] < 20 / 30 < metrics["coverage"]["high"]
    assert everything["coverage"] == {"value": 1.0, "low": 1.0, "high": 1.0}


def test_calibration_figures_follow_the_operating_point() -> None:
    records = with_abstentions(0.3)
    found = evaluate_records(records, CLASSES, resamples=40, threshold=0.3)["calibration"]
    labelled = [r for r in records if r["status"] != "refused" and r["label"] is not None]
    labels = np.array([r["label"] for r in labelled])
    p = np.array([r["probabilities"] for r in labelled])
    assert found["bins"] == reliability_bins(labels, p)
    loss, sure = losses(labels, p[:, 1] >= 0.3, 2, 0.3), confidence(p, 0.3)
    assert found["aurc"]["value"] == pytest.approx(float(aurc(loss, sure)[0]))
    assert found["aurc"]["low"] <= found["aurc"]["value"] <= found["aurc"]["high"]
    curve = found["risk_coverage"]
    assert (curve["coverage"][-1], curve["risk"][-1]) == (1.0, pytest.approx(loss.mean()))
    assert found["threshold"] == 0.3


def test_a_case_without_patient_is_a_patient_of_its_own() -> None:
    records = [accepted("a", 1, 0.9, "b"), accepted("b", 0, 0.1), accepted("c", 0, 0.2)]
    counts = evaluate_records(records, CLASSES, resamples=5)["counts"]
    assert counts["patients"] == 3
    assert counts["scored_without_patient"] == 2


def test_nothing_but_refusals_still_gives_metrics(tmp_path: Path) -> None:
    metrics = evaluate_records([refused_record("x", Refusal("empty", "Empty."), label=1)], CLASSES, resamples=5)
    assert metrics["counts"]["refused_with_label"] == 1
    assert math.isnan(metrics["scores"]["accuracy"]["value"])
    write_metrics(tmp_path / "metrics.json", metrics)
    assert json.loads((tmp_path / "metrics.json").read_text())["scores"]["auc"] == {
        "value": None,
        "low": None,
        "high": None,
    }


def test_three_classes(tmp_path: Path) -> None:
    names = ["a", "b", "c"]
    records = [
        accepted(str(i), i % 3, 0.5, class_names=names, probabilities=np.roll([0.6, 0.3, 0.1], i % 4))
        for i in range(12)
    ]
    metrics = evaluate_records(records, names, resamples=50)
    assert np.array(metrics["confusion_matrix"]).shape == (3, 3)
    assert 0 < metrics["scores"]["auc"]["value"] < 1
    write_metrics(tmp_path / "m.json", metrics)


def test_written_file_is_strict_json_and_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "new" / "metrics.json"
    write_metrics(path, {"a": float("nan"), "b": [np.float64(0.5), np.int64(3), float("inf")], "c": "é"})
    assert json.loads(path.read_text(encoding="utf-8"), parse_constant=pytest.fail) == {
        "a": None,
        "b": [0.5, 3, None],
        "c": "é",
    }

    def fail(*_: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(OSError, match="disk full"):
        write_metrics(path, {"a": 1})
    assert json.loads(path.read_text(encoding="utf-8"))["c"] == "é"
    assert [p.name for p in path.parent.iterdir()] == ["metrics.json"]


def test_bad_records_are_told(tmp_path: Path) -> None:
    record = accepted("a", 1, 0.9)
    with pytest.raises(InputError, match="'a' appears more than once"):
        evaluate_records([record, record], CLASSES)
    with pytest.raises(InputError, match="other class names"):
        evaluate_records([record], ["high", "low"])
    with pytest.raises(InputError, match="class names"):
        evaluate_records([record], ["low"])
    with pytest.raises(InputError, match="status 'maybe'"):
        evaluate_records([{**record, "status": "maybe"}], CLASSES)
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot write"):
        write_metrics(tmp_path / "file" / "metrics.json", {})
    (tmp_path / "metrics.json").mkdir()
    with pytest.raises(InputError, match="a folder has that name"):
        write_metrics(tmp_path / "metrics.json", {})
