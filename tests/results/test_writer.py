"""Handlers that turn an evaluator's batches into records, tables, metrics and pictures."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from ignite.engine import Engine

import bundle.results.writer as writer
from bundle.data.collate import collate_bags
from bundle.data.transforms import AddNeighboursd
from bundle.errors import InputError, Refusal
from bundle.model.bag_network import BagOutput
from bundle.results.records import read_records
from bundle.results.run_folder import RunFolder
from bundle.results.writer import DrawKeySlices, WriteMetrics, WriteRecords, exit_status

NAMES = ["no", "yes"]


def bag(case, num_slices=6, label=1, uids=False, first=3, **more):
    generator = torch.Generator().manual_seed(len(case) * 100 + num_slices)
    return {
        "case": case,
        "patient": f"patient {case}",
        "label": label,
        "image": torch.rand(num_slices, 1, 8, 8, generator=generator),
        "slice_index": first + torch.arange(num_slices),
        "slice_position": 4.0 - 2.5 * torch.arange(num_slices),  # falling: the stored order is the other way round
        "slice_label": (torch.arange(num_slices) == 1).long(),
        "slice_uid": [f"1.2.{i}" for i in range(num_slices)] if uids else None,
        "slice_frame": None,
        "reading": [{"source": "dicom" if uids else "nifti"}],
        **more,
    }


def refused(case="r", label=None, patient=None):
    return {
        "case": case,
        "label": label,
        "patient": patient,
        "refusal": Refusal("missing_slices", "slices are missing"),
    }


def output_of(batch, logits=None, num_classes=2, seed=0):
    """What an evaluator gives for a batch; weights are a softmax of the scores over the real slices."""
    if "image" not in batch:
        return {"refusal": [case["refusal"] for case in batch["refused"]]}
    generator = torch.Generator().manual_seed(seed)
    num_bags, num_slices = batch["mask"].shape
    columns = num_classes if num_classes > 2 else 1
    if logits is None:
        logits = torch.randn(num_bags, num_classes, generator=generator)
    scores = torch.randn(num_bags, num_slices, columns, generator=generator)
    masked = scores.masked_fill(~batch["mask"][..., None], -math.inf)
    evidence = BagOutput(
        logits,
        logits,
        logits,
        torch.zeros(num_bags, num_slices, num_classes),
        scores,
        masked.softmax(1),
        (2 * masked).softmax(1),
    )
    return {"pred": logits, "label": batch["label"], "mask": batch["mask"], "evidence": evidence}


def run(folder, batches, outputs=None, handlers=(), **arguments):
    """The records handler after a run over the batches."""
    results = WriteRecords(folder, arguments.pop("class_names", NAMES), **arguments)
    collated = [collate_bags(bags) for bags in batches]
    given = iter(outputs or [output_of(batch, seed=i) for i, batch in enumerate(collated)])
    engine = Engine(lambda engine, batch: next(given))
    results.attach(engine)
    for make in handlers:
        make(results).attach(engine)
    engine.logger.disabled = True
    engine.run(collated)
    return results


def record_in(folder, case):
    (record,) = [record for record in read_records(folder / "cases") if record["case"] == case]
    return record


def test_records_equal_the_evidence(tmp_path):
    bags = [bag("long", 6, uids=True), bag("short", 3, label=0, uids=True)]
    batch = collate_bags(bags)
    output = output_of(batch)
    run(tmp_path, [bags], [output])
    probabilities = output["pred"].double().softmax(-1)
    for i, given in enumerate(bags):
        record, n = record_in(tmp_path, given["case"]), len(given["image"])
        assert record["status"] == "accepted"
        assert (record["label"], record["patient"]) == (given["label"], given["patient"])
        assert record["probabilities"] == pytest.approx(probabilities[i].tolist(), rel=1e-6)
        assert record["prediction"] == int(probabilities[i].argmax())
        assert record["class_names"] == NAMES
        assert len(record["slices"]) == n  # no padding
        by_index = {one["index"]: one for one in record["slices"]}
        for k in range(n):
            found = by_index[int(given["slice_index"][k])]
            assert found["position_mm"] == float(given["slice_position"][k])
            assert found["score"] == pytest.approx(float(output["evidence"].scores[i, k, 0]))
            assert found["weight"] == pytest.approx(float(output["evidence"].selection_weights[i, k, 0]))
            assert found["attention"] == pytest.approx(float(output["evidence"].attention[i, k, 0]))
            assert found["label"] == int(given["slice_label"][k])
            assert found["sop_instance_uid"] == f"1.2.{k}"
        positions = [one["position_mm"] for one in record["slices"]]
        assert positions == sorted(positions)
        weights = [one["weight"] for one in record["key_slices"]]
        assert weights == sorted(weights, reverse=True)
        assert weights[0] == max(one["weight"] for one in record["slices"])
        assert len(record["key_slices"]) == min(5, n)
        assert sum(one["weight"] for one in record["slices"]) == pytest.approx(1)


def test_occlusion_is_in_the_records_where_the_output_has_it(tmp_path):
    bags = [bag("long", 6), bag("short", 3)]
    batch = collate_bags(bags)
    falls = torch.randn(batch["mask"].shape)
    run(tmp_path, [bags], [output_of(batch) | {"occlusion": falls}])
    for i, given in enumerate(bags):
        by_index = {one["index"]: one["occlusion"] for one in record_in(tmp_path, given["case"])["slices"]}
        assert by_index == {int(given["slice_index"][k]): float(falls[i, k]) for k in range(len(given["image"]))}
    run(tmp_path, [bags], [output_of(batch)])
    assert "occlusion" not in record_in(tmp_path, "long")["slices"][0]


def test_with_several_classes_the_evidence_is_that_of_the_predicted_one(tmp_path):
    bags = [bag("a", 5, label=2), bag("b", 4, label=0)]
    batch = collate_bags(bags)
    output = output_of(batch, torch.tensor([[0.0, 3.0, 1.0], [2.0, 0.0, 1.0]]), num_classes=3)
    run(tmp_path, [bags], [output], class_names=["x", "y", "z"])
    for i, (case, predicted) in enumerate((("a", 1), ("b", 0))):
        record = record_in(tmp_path, case)
        assert record["prediction"] == predicted
        found = {one["index"] - 3: one["score"] for one in record["slices"]}
        expected = output["evidence"].scores[i, :, predicted]
        assert found == pytest.approx({k: float(expected[k]) for k in found})


def test_an_unknown_label_stays_unknown(tmp_path):
    run(tmp_path, [[bag("a", label=None)]])
    record = record_in(tmp_path, "a")
    assert record["label"] is None
    assert all(one["sop_instance_uid"] is None for one in record["slices"])


@pytest.mark.parametrize(("threshold", "prediction"), [(0.5, 0), (0.2, 1), (0.2499, 1), (0.2501, 0)])
def test_threshold(tmp_path, threshold, prediction):
    logits = torch.tensor([[math.log(3.0), 0.0]])  # the second class has probability 0.25
    bags = [bag("a")]
    output = output_of(collate_bags(bags), logits)
    run(tmp_path, [bags], [output], threshold=threshold)
    assert record_in(tmp_path, "a")["prediction"] == prediction


@pytest.mark.parametrize("temperature", [0.25, 1.0, 3.0])
@pytest.mark.parametrize("num_classes", [2, 3])
def test_logits_are_divided_by_the_temperature(tmp_path, temperature, num_classes):
    bags = [bag("a", label=0), bag("b", 3, label=0)]
    output = output_of(collate_bags(bags), num_classes=num_classes)
    raw = output["pred"].clone()
    names = ["x", "y", "z"][:num_classes]
    run(tmp_path, [bags], [output], temperature=temperature, class_names=names)
    for i, case in enumerate("ab"):
        expected = (raw[i].double() / temperature).softmax(0)
        assert record_in(tmp_path, case)["probabilities"] == pytest.approx(expected.tolist(), rel=1e-5)
        assert record_in(tmp_path, case)["prediction"] == int(raw[i].argmax())
    assert torch.equal(output["pred"], raw)


@pytest.mark.parametrize(("abstain_below", "status"), [(0.0, "accepted"), (0.85, "accepted"), (0.86, "abstained")])
def test_a_case_too_close_to_the_operating_point_has_no_prediction(tmp_path, caplog, abstain_below, status):
    logits = torch.tensor([[0.0, math.log(1.5)]])  # odds of 3/2; 1/4 at the operating point: confidence 6/7
    bags = [bag("a")]
    output = output_of(collate_bags(bags), logits)
    results = run(tmp_path, [bags, [refused()]], [output, {}], threshold=0.2, abstain_below=abstain_below)
    record = record_in(tmp_path, "a")
    assert record["status"] == status
    assert record["probabilities"] == pytest.approx([0.4, 0.6])
    assert len(record["slices"]) == 6
    assert record["key_slices"]
    row = (tmp_path / "predictions.csv").read_text().splitlines()[1]
    with caplog.at_level("INFO"):
        results.report()
    if status == "abstained":
        assert (record["prediction"], record["reason_code"]) == (None, "low_confidence")
        assert record["reason_facts"] == {"confidence": pytest.approx(6 / 7), "abstain_below": 0.86}
        assert row.startswith("a,abstained,patient a,1,,,0.4,0.6,")
        assert row.endswith(",low_confidence,No prediction: its confidence would be below the limit of these weights.")
        assert "1 cases classified (1 of them abstained: no prediction), 1 refused" in caplog.text
    else:
        assert (record["prediction"], record["reason_code"], record["reason_facts"]) == (1, None, {})
        assert "1 cases classified, 1 refused" in caplog.text


def test_threshold_is_for_two_classes_alone(tmp_path):
    bags = [bag("a", label=1)]
    output = output_of(collate_bags(bags), torch.tensor([[0.0, 0.5, 0.2]]), num_classes=3)
    run(tmp_path, [bags], [output], threshold=0.9, class_names=["x", "y", "z"])
    assert record_in(tmp_path, "a")["prediction"] == 1


def test_refused_cases_are_in_the_same_table_and_the_rest_go_on(tmp_path, caplog):
    results = run(tmp_path, [[bag("a")], [refused("r", 1, "p9")], [bag("b", 4)], [refused("s")]])
    record = record_in(tmp_path, "r")
    assert (record["status"], record["reason_code"], record["reason"]) == (
        "refused",
        "missing_slices",
        "slices are missing",
    )
    assert (record["label"], record["patient"], record["prediction"], record["slices"]) == (1, "p9", None, [])
    rows = (tmp_path / "predictions.csv").read_text().splitlines()
    assert [row.split(",")[:2] for row in rows[1:]] == [
        ["a", "accepted"], ["r", "refused"], ["b", "accepted"], ["s", "refused"]
    ]  # fmt: skip
    with caplog.at_level("INFO"):
        results.report()
    assert "2 cases classified, 2 refused" in caplog.text
    assert "refused r: slices are missing (missing_slices)" in caplog.text


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_batches_of_any_size_and_mixture_give_the_same_records_in_the_same_order(tmp_path, monkeypatch, size):
    pictures = []
    monkeypatch.setattr(writer, "draw_key_slices", lambda png, shown, images, **_: pictures.append((shown, images)))
    cases = [refused("r1"), bag("a"), bag("b", 3), refused("r2", 1, "p9"), refused("r3"), bag("c", 5), refused("r4")]
    alone = {case["case"]: output_of(collate_bags([case]), seed=i) for i, case in enumerate(cases)}
    batches = [cases[i : i + size] for i in range(0, len(cases), size)]
    outputs = []
    for batch in batches:
        read = [case for case in batch if "image" in case]
        most = max((len(case["image"]) for case in read), default=0)
        outputs.append(joined([alone[case["case"]] for case in read], most) if read else {"refusal": batch})
    results = run(tmp_path, batches, outputs, [DrawKeySlices])
    reference = run(tmp_path / "one", [[case] for case in cases], list(alone.values()), [DrawKeySlices])
    assert results.records == reference.records
    assert [record["case"] for record in results.records] == ["r1", "a", "b", "r2", "r3", "c", "r4"]
    assert (tmp_path / "predictions.csv").read_text() == (tmp_path / "one" / "predictions.csv").read_text()
    (shown, images), (shown_alone, images_alone) = pictures
    assert shown == shown_alone
    for case, image in images_alone.items():
        np.testing.assert_array_equal(images[case], image)


def joined(outputs, num_slices):
    """Outputs of batches of one bag as that of one batch, padded to a number of slices."""

    def padded(tensor, dim=1):
        missing = num_slices - tensor.shape[dim]
        return torch.cat([tensor, tensor.new_zeros(*tensor.shape[:dim], missing, *tensor.shape[dim + 1 :])], dim)

    evidence = [output["evidence"] for output in outputs]
    both = [torch.cat([getattr(one, field) for one in evidence]) for field in BagOutput._fields[:3]]
    both += [torch.cat([padded(getattr(one, field)) for one in evidence]) for field in BagOutput._fields[3:]]
    return {
        "pred": torch.cat([output["pred"] for output in outputs]),
        "label": torch.cat([output["label"] for output in outputs]),
        "mask": torch.cat([padded(output["mask"]) for output in outputs]),
        "evidence": BagOutput(*both),
    }


def test_exit_status(tmp_path):
    exit_status(run(tmp_path / "good", [[bag("a")]]))
    exit_status(run(tmp_path / "unsure", [[bag("a")]], abstain_below=1.0))
    with pytest.raises(SystemExit) as ended:
        exit_status(run(tmp_path / "bad", [[bag("a")], [refused()]]))
    assert ended.value.code == 3


def test_records_are_there_as_soon_as_a_case_has_ended(tmp_path):
    batches = [[bag("a")], [bag("b")]]
    results, seen = WriteRecords(tmp_path, NAMES), []
    collated = [collate_bags(bags) for bags in batches]

    def step(engine, batch):
        seen.append(sorted(path.name for path in (tmp_path / "cases").glob("*.json")))
        return output_of(batch)

    engine = Engine(step)
    results.attach(engine)
    engine.run(collated)
    assert seen == [[], ["a.json"]]


def test_records_of_an_earlier_run_go_and_other_files_stay(tmp_path):
    run(tmp_path, [[bag("old")], [bag("a")]])
    cases = tmp_path / "cases"
    (cases / "notes.json").write_text('{"mine": 1}')
    (cases / "list.json").write_text("[1]")
    (cases / "text.json").write_text("not JSON")
    (cases / "readme.txt").write_text("x")
    run(tmp_path, [[bag("a", 4)], [bag("new")]])
    assert sorted(path.name for path in cases.iterdir()) == [
        "a.json", "list.json", "new.json", "notes.json", "readme.txt", "text.json"
    ]  # fmt: skip
    assert len(record_in_file(cases / "a.json")["slices"]) == 4


def record_in_file(path: Path):
    return json.loads(path.read_text())


def test_the_folder_is_left_after_the_last_handler_has_written(tmp_path, monkeypatch):
    # Who enters a folder in which nobody is removes the unfinished files, this picture among them.
    folder = RunFolder(tmp_path, [{"case": "a"}], {"version": "1"})
    inside = []
    monkeypatch.setattr(writer, "draw_key_slices", lambda *_, **__: inside.append(folder._lock_file is not None))
    results = WriteRecords(tmp_path, NAMES, run_folder=folder)
    engine = Engine(lambda engine, batch: output_of(batch))
    results.attach(engine)
    DrawKeySlices(results).attach(engine)
    for _ in range(2):
        engine.run([collate_bags([bag("a")])], max_epochs=1)
        assert folder._lock_file is None
    assert inside == [True, True]


def test_an_engine_that_runs_twice_counts_once(tmp_path):
    results = WriteRecords(tmp_path, NAMES)
    engine = Engine(lambda engine, batch: output_of(batch))
    results.attach(engine)
    for _ in range(2):
        engine.run([collate_bags([bag("a")])], max_epochs=1)
    assert len(results.records) == 1
    assert len((tmp_path / "predictions.csv").read_text().splitlines()) == 2


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"threshold": 0.0}, "threshold is a probability between 0 and 1, not 0.0"),
        ({"threshold": 1.0}, "threshold is a probability"),
        ({"threshold": math.nan}, "threshold is a probability"),
        ({"temperature": 0.0}, "calibration_temperature must be above 0, not 0.0"),
        ({"temperature": math.nan}, "calibration_temperature must be above 0"),
        ({"temperature": math.inf}, "calibration_temperature must be above 0"),
        ({"abstain_below": -0.1}, "abstain_below is a confidence from 0 to 1, not -0.1"),
        ({"abstain_below": 1.5}, "abstain_below is a confidence"),
        ({"abstain_below": math.nan}, "abstain_below is a confidence"),
        ({"num_key_slices": 0}, "num_key_slices must be at least 1, not 0"),
    ],
)
def test_impossible_settings_are_refused(tmp_path, arguments, sentence):
    with pytest.raises(InputError, match=sentence):
        WriteRecords(tmp_path, NAMES, **arguments)


def test_numbers_that_are_not_finite_refuse_their_case_alone(tmp_path):
    bags = [[bag("a")], [bag("b")]]
    logits = (torch.tensor([[math.nan, 0.0]]), torch.tensor([[1.0, 0.0]]))
    run(tmp_path, bags, [output_of(collate_bags(one), value) for one, value in zip(bags, logits, strict=True)])
    text = (tmp_path / "predictions.csv").read_text()
    assert "non_finite_output" in text
    assert [line.split(",")[1] for line in text.splitlines()[1:]] == ["refused", "accepted"]


# --- metrics ---


def test_metrics_of_the_records(tmp_path, caplog):
    bags = [bag(f"c{i}", 3 + i, label=i % 2) for i in range(6)]
    batches = [*([one] for one in bags), [refused()]]
    outputs = []
    for i, batch in enumerate(map(collate_bags, batches)):
        right = torch.tensor([[0.0, 2.0 * (i % 2) - 1]])  # positive for the second class where the label is
        outputs.append(output_of(batch, right, seed=i))
    with caplog.at_level("INFO"):
        run(tmp_path, batches, outputs, [lambda results: WriteMetrics(results, resamples=50)])
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["scores"]["auc"]["value"] == 1.0
    assert metrics["scores"]["accuracy"]["value"] == 1.0
    assert "auc 1.000 (" in caplog.text
    assert (tmp_path / "reliability.png").stat().st_size > 5_000


def test_a_picture_of_earlier_cases_does_not_stay(tmp_path):
    handlers = [lambda results: WriteMetrics(results, resamples=5)]
    run(tmp_path, [[bag("a")]], handlers=handlers)
    assert (tmp_path / "reliability.png").is_file()
    run(tmp_path, [[refused()]], handlers=handlers)
    assert not (tmp_path / "reliability.png").exists()


def test_metrics_take_the_operating_point_of_the_records(tmp_path):
    bags = [[bag("a", label=1)], [bag("b", label=0)]]
    logits = (torch.tensor([[math.log(3.0), 0.0]]), torch.tensor([[math.log(9.0), 0.0]]))  # 0.25 and 0.1
    outputs = [output_of(collate_bags(one), value) for one, value in zip(bags, logits, strict=True)]
    run(tmp_path, bags, outputs, [lambda results: WriteMetrics(results, 5)], threshold=0.2, abstain_below=1.0)
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["scores"]["accuracy"]["value"] is None
    assert metrics["scores_all"]["accuracy"]["value"] == 1.0
    assert metrics["calibration"]["threshold"] == 0.2
    assert metrics["coverage"]["value"] == 0.0


# --- pictures ---


def drawn(tmp_path, monkeypatch, batches, outputs=None, **arguments):
    """The arguments of draw_key_slices, or None when nothing was drawn."""
    calls = []
    monkeypatch.setattr(writer, "draw_key_slices", lambda *given, **named: calls.append((*given, named)))
    results = run(tmp_path, batches, outputs, [lambda results: DrawKeySlices(results, **arguments)])
    return results, (calls[0] if calls else None)


def test_pictures_are_the_key_slices_in_their_order(tmp_path, monkeypatch):
    batches = [[bag("a", 7), bag("b", 2)], [refused()], [bag("c", 1)]]
    results, (path, shown, images, _) = drawn(tmp_path, monkeypatch, batches)
    assert path == tmp_path / "key_slices.png"
    assert [record["case"] for record in shown] == ["a", "b", "c"]
    bags = {one["case"]: one for batch in batches for one in batch}
    for record in results.records:
        if record["status"] == "accepted":
            given = bags[record["case"]]
            expected = [given["image"][key["index"] - 3, 0].numpy() for key in record["key_slices"]]
            np.testing.assert_array_equal(images[record["case"]], np.stack(expected))


def test_of_2_5d_bags_the_slice_itself_is_shown(tmp_path, monkeypatch):
    plain = bag("a", 5)
    wide = AddNeighboursd("image", 2)(plain)
    assert wide["image"].shape[1] == 5
    results, (_, _, images, _) = drawn(tmp_path, monkeypatch, [[wide]])
    (record,) = results.records
    expected = [plain["image"][key["index"] - 3, 0].numpy() for key in record["key_slices"]]
    np.testing.assert_array_equal(images["a"], np.stack(expected))


def test_another_channel_can_be_shown(tmp_path, monkeypatch):
    two = bag("a", 3, image=torch.rand(3, 2, 8, 8))
    results, (_, _, images, _) = drawn(tmp_path, monkeypatch, [[two]], channel=1)
    first = results.records[0]["key_slices"][0]["index"] - 3
    np.testing.assert_array_equal(images["a"][0], two["image"][first, 1].numpy())


def test_no_more_cases_than_asked_for(tmp_path, monkeypatch):
    batches = [[bag("a"), bag("b")], [bag("c")]]
    _, (_, shown, images, named) = drawn(tmp_path, monkeypatch, batches, max_cases=2)
    assert [record["case"] for record in shown] == sorted(images) == ["a", "b"]
    assert named == {"max_cases": 2}
    assert drawn(tmp_path, monkeypatch, batches, max_cases=0)[1] is None
    assert drawn(tmp_path, monkeypatch, [[refused()]])[1] is None
    with pytest.raises(InputError, match="figure_cases and channel must be 0 or more"):
        DrawKeySlices(None, max_cases=-1)  # type: ignore[arg-type]


def test_a_picture_of_bags_shorter_than_the_key_slices(tmp_path):
    batches = [[bag("one slice", 1)], [bag("two slices", 2)], [bag("many", 9)]]
    run(tmp_path, batches, None, [DrawKeySlices], num_key_slices=5)
    assert (tmp_path / "key_slices.png").stat().st_size > 10_000
