from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bundle.errors import InputError, Refusal
from bundle.results.predictions import spreadsheet_safe, write_predictions
from bundle.results.records import (
    Abstention,
    case_record,
    read_record,
    read_records,
    record_file_name,
    refused_record,
    write_record,
)

# Given out of order on purpose: positions 10, 0, 5, 15 mm.
ARGUMENTS: dict[str, Any] = {
    "probabilities": np.array([0.2, 0.8], dtype=np.float32),
    "class_names": ["low", "high"],
    "slice_index": np.array([6, 4, 5, 7]),
    "slice_position": np.array([10.0, 0.0, 5.0, 15.0]),
    "weights": np.array([0.5, 0.1, 0.3, 0.1]),
    "attention": np.array([[0.4], [0.2], [0.3], [0.1]]),
    "scores": np.array([2.0, -1.0, 1.0, -0.5], dtype=np.float32),
    "slice_label": np.array([1, 0, -1, 0]),
    "sop_instance_uids": ["1.2.6", "1.2.4", "1.2.5", "1.2.7"],
    "label": np.int64(1),
    "patient": "p1",
}


def make(case: str = "c1", **changes: Any) -> dict[str, Any]:
    return case_record(case, **{**ARGUMENTS, **changes})


def test_slices_are_in_order_of_position_and_key_slices_by_weight() -> None:
    record = make(num_key_slices=3)
    assert record["slices"][0] == {
        "index": 4,
        "position_mm": 0.0,
        "weight": 0.1,
        "attention": 0.2,
        "score": -1.0,
        "sop_instance_uid": "1.2.4",
        "frame_number": None,
        "label": 0,
    }
    assert [s["index"] for s in record["slices"]] == [4, 5, 6, 7]
    # 7 before 4: equal weights, the higher score first.
    assert [s["index"] for s in record["key_slices"]] == [6, 5, 7]
    assert record["key_slices"][0] == record["slices"][2]
    assert record["prediction"] == 1
    assert (record["status"], record["reason_code"], record["label"], record["patient"]) == ("accepted", None, 1, "p1")
    assert json.loads(json.dumps(record)) == record


def test_equal_slices_have_no_key_slice(tmp_path: Path) -> None:
    flat = {"weights": np.full(4, 0.25), "attention": np.full(4, 0.25), "scores": np.zeros(4)}
    record = make(**flat)
    assert record["key_slices"] == []
    assert read_record(write_record(tmp_path, record)) == record
    write_predictions(tmp_path / "p.csv", [record])
    (row,) = rows_of(tmp_path / "p.csv")
    assert (row["status"], row["prediction"], row["key_slice_index"]) == ("accepted", "1", "")
    assert len(make(**{**flat, "scores": np.array([0.0, 0.0, 0.1, 0.0])})["key_slices"]) == 4
    lone = {
        key: value[:1] for key, value in ARGUMENTS.items() if key.startswith("slice") or key in ("attention", "scores")
    }
    assert len(make(**lone, weights=np.ones(1), sop_instance_uids=["1.2.6"])["key_slices"]) == 1


def test_defaults() -> None:
    record = make(slice_label=None, sop_instance_uids=None, label=None, patient=None)
    assert {s["label"] for s in record["slices"]} == {-1}
    assert {s["sop_instance_uid"] for s in record["slices"]} == {None}
    assert len(record["key_slices"]) == 4  # fewer slices than the five asked for
    assert record["label"] is None


def test_more_classes_take_the_column_of_the_predicted_class() -> None:
    columns = np.arange(12.0).reshape(4, 3)
    three = {"class_names": ["a", "b", "c"], "weights": columns, "attention": columns, "scores": columns}
    record = make(probabilities=[0.2, 0.7, 0.1], **three)
    assert [s["weight"] for s in record["slices"]] == [4.0, 7.0, 1.0, 10.0]
    chosen = make(probabilities=[0.2, 0.7, 0.1], prediction=2, **three)
    assert [s["score"] for s in chosen["slices"]] == [5.0, 8.0, 2.0, 11.0]
    assert chosen["prediction"] == 2


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"probabilities": [0.2, 0.3, 0.5]}, "2 class names"),
        ({"probabilities": [np.nan, 0.3]}, "probabilities holds a value that is not finite"),
        ({"weights": np.ones(3)}, r"weights has shape \(3,\)"),
        ({"attention": np.ones((4, 3))}, "attention has shape"),
        ({"scores": [np.inf, 0, 0, 0]}, "scores holds a value"),
        ({"slice_label": [0, 1, 2, 0]}, "1, 0 or -1"),
        ({"sop_instance_uids": ["1.2"]}, "1 SOP Instance UIDs"),
        ({"label": 2}, "between 0 and 1"),
        ({"prediction": -1}, "between 0 and 1"),
        ({"slice_position": []}, "at least one slice"),
        ({"num_key_slices": 0}, "one key slice"),
    ],
)
def test_what_does_not_fit_is_told(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        make(**changes)


def test_a_record_says_how_its_images_were_read_and_which_frames_they_are() -> None:
    reading = [{"source": "dicom", "tilt_degrees": 18.5}]
    record = make(frame_numbers=[3, 1, 2, 4], reading=reading)
    assert [s["frame_number"] for s in record["slices"]] == [1, 2, 3, 4]
    assert record["reading"] == reading
    assert json.loads(json.dumps(record)) == record
    with pytest.raises(InputError, match="2 frame numbers were given for 4 slices"):
        make(frame_numbers=[1, 2])


def test_refused_record_has_the_same_keys() -> None:
    refusal = Refusal("missing_slices", "A slice is missing after slice 7.", count=1)
    record = refused_record("c2", refusal, label=1)
    assert set(record) == set(make())
    assert record["status"] == "refused"
    assert (record["reason_code"], record["reason"]) == ("missing_slices", "A slice is missing after slice 7.")
    assert record["label"] == 1
    assert (record["prediction"], record["reason_facts"]) == (None, {"count": 1})
    assert refused_record("c3", InputError("No such file."))["reason_code"] == "unreadable"
    with pytest.raises(InputError, match="name"):
        refused_record("", refusal)


def test_records_survive_the_disk(tmp_path: Path) -> None:
    records = [make("b"), refused_record("a/../x", Refusal("empty", "Nothing in it.")), make("ä ö")]
    paths = [write_record(tmp_path / "cases", record) for record in records]
    assert {path.parent for path in paths} == {tmp_path / "cases"}
    assert read_records(tmp_path / "cases") == sorted(records, key=lambda record: record["case"])
    write_record(tmp_path / "cases", make("b", label=0))
    assert [r["label"] for r in read_records(tmp_path / "cases") if r["case"] == "b"] == [0]


def test_file_names_are_safe_and_different() -> None:
    hostile = ["a", "a ", "a/b", "a_b", "a%2Fb", "..", ".", ".a", "%2Ea", "a~b", "a\0b", "a\\b", "é", "e\u0301", "=1+1"]
    hostile += ["x" * 179, "x" * 180, "x" * 181, "x" * 300, "x" * 301, "é" * 100, "x" * 100 + "~"]
    hostile += [record_file_name(case).removesuffix(".json") for case in hostile]
    names = {case: record_file_name(case) for case in hostile}
    assert len({name.lower() for name in names.values()}) == len(set(hostile))
    for name in names.values():
        assert len(name) <= 200
        assert name.isascii()
        assert not set(name) & set('/\\:*?"<>| \0')
        assert not name.startswith(".")
    assert record_file_name("TCGA_CS_4941.left-1") == "TCGA_CS_4941.left-1.json"


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_record(tmp_path, make())

    def fail(*_: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(OSError, match="disk full"):
        write_record(tmp_path, make(label=0))
    assert read_records(tmp_path) == [make()]
    assert len(list(tmp_path.iterdir())) == 1


def test_bad_folders_are_told(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no case record"):
        read_records(tmp_path / "missing")
    (tmp_path / "x.json").write_text("{")
    with pytest.raises(InputError, match=r"x\.json cannot be read"):
        read_records(tmp_path)
    (tmp_path / "x.json").write_text('{"case": "a"}')
    with pytest.raises(InputError, match="'status' is missing"):
        read_records(tmp_path)
    (tmp_path / "x.json").write_text(json.dumps(make("b")))
    write_record(tmp_path, make("b"))
    with pytest.raises(InputError, match="second record of case 'b'"):
        read_records(tmp_path)


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_predictions_table(tmp_path: Path) -> None:
    path = tmp_path / "out" / "predictions.csv"
    refused = refused_record("c2", Refusal("missing_slices", 'A slice, the "7th", is missing.'), patient="p2")
    write_predictions(path, [make(), refused, make("c3", sop_instance_uids=None, label=None)])
    accepted, bad, third = rows_of(path)
    assert accepted == {
        "case": "c1",
        "status": "accepted",
        "patient": "p1",
        "label": "1",
        "prediction": "1",
        "class_name": "high",
        "probability_low": "0.2",
        "probability_high": "0.8",
        "key_slice_index": "6",
        "key_slice_position_mm": "10",
        "key_slice_weight": "0.5",
        "key_slice_sop_instance_uid": "1.2.6",
        "reason_code": "",
        "reason": "",
    }
    assert bad == {
        **dict.fromkeys(accepted, ""),
        "case": "c2",
        "status": "refused",
        "patient": "p2",
        "reason_code": "missing_slices",
        "reason": 'A slice, the "7th", is missing.',
    }
    assert third["key_slice_sop_instance_uid"] == ""
    assert third["label"] == ""
    assert [p.name for p in path.parent.iterdir()] == ["predictions.csv"]


def test_an_abstained_case_has_probabilities_and_no_prediction(tmp_path: Path) -> None:
    record = make("c4", abstention=Abstention("low_confidence", "Not sure.", {"confidence": 0.6}))
    assert {**record, **dict.fromkeys(("status", "prediction", "reason_code", "reason", "reason_facts"))} == {
        **make("c4"),
        **dict.fromkeys(("status", "prediction", "reason_code", "reason", "reason_facts")),
    }
    assert (record["status"], record["prediction"], record["reason_facts"]) == ("abstained", None, {"confidence": 0.6})
    assert read_record(write_record(tmp_path, record)) == record
    for damaged in ({"prediction": 1}, {"probabilities": []}, {"key_slices": []}, {"status": "accepted"}):
        assert read_record(write_record(tmp_path, {**record, **damaged})) is None
    write_predictions(tmp_path / "p.csv", [record])
    (row,) = rows_of(tmp_path / "p.csv")
    assert (row["status"], row["prediction"], row["class_name"]) == ("abstained", "", "")
    assert (row["probability_high"], row["reason_code"], row["reason"]) == ("0.8", "low_confidence", "Not sure.")
    with pytest.raises(InputError, match="'c4' has other class names"):
        write_predictions(tmp_path / "q.csv", [record], ["a", "b"])


def test_only_refused_cases(tmp_path: Path) -> None:
    refused = [refused_record("c2", Refusal("empty", "Nothing in it."))]
    write_predictions(tmp_path / "a.csv", refused)
    assert "probability" not in (tmp_path / "a.csv").read_text()
    write_predictions(tmp_path / "b.csv", refused, class_names=["low", "high"])
    assert rows_of(tmp_path / "b.csv")[0]["probability_high"] == ""


def test_no_cell_is_a_formula(tmp_path: Path) -> None:
    dangerous = ["=1+1", "+1", "-1", "@x", "\t=1", "\uff1d1", " =1", "\n=1"]
    names = ["=cmd()", "high"]
    records = [make(case, class_names=names, patient=case, prediction=0) for case in dangerous]
    write_predictions(tmp_path / "p.csv", records)
    for row, case in zip(rows_of(tmp_path / "p.csv"), dangerous, strict=True):
        assert row["case"] == row["patient"] == f"'{case}"
        assert row["class_name"] == "'=cmd()"
    assert spreadsheet_safe("a=b") == "a=b"
    # Numbers stay numbers, negative ones too.
    write_predictions(tmp_path / "n.csv", [make(slice_position=[-10.5, -20, -15, -5])])
    assert rows_of(tmp_path / "n.csv")[0]["key_slice_position_mm"] == "-10.5"


def test_mixed_classes_are_told(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="'c2' has other class names"):
        write_predictions(tmp_path / "p.csv", [make("c1"), make("c2", class_names=["a", "b"])])
    assert not (tmp_path / "p.csv").exists()
