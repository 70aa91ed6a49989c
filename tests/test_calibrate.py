"""The handler that fits calibration and saves it with the weights, on records made by hand."""

import json
import math

import numpy as np
import pytest
import torch
from ignite.engine import Engine, Events

from bundle.calibrate import CalibrateWeights
from bundle.errors import InputError, Refusal
from bundle.evaluation.abstention import abstention_limit, confidence, losses, predicted_classes
from bundle.evaluation.calibration import calibrated, fit_temperature, operating_point
from bundle.recipe import Recipe
from bundle.results.records import case_record, refused_record
from bundle.results.writer import WriteRecords
from bundle.weights import save_atomically

NAMES = ["no", "yes", "perhaps"]
EVIDENCE = {"slice_index": [0], "slice_position": [0.0], "weights": [1.0], "attention": [1.0], "scores": [0.0]}


def cohort(num_cases=40, num_classes=2, seed=0):
    """Logits that are three times too large, and labels."""
    rng = np.random.default_rng(seed)
    true_logits = 1.5 * rng.standard_normal((num_cases, num_classes))
    labels = np.array([rng.choice(num_classes, p=row) for row in calibrated(true_logits, 1.0)])
    return (3 * true_logits).astype(np.float32), labels


def calibrate(folder, logits, labels, before=None, **rules):
    """The recipe in the weights, and calibration.json, after a run."""
    folder.mkdir(exist_ok=True)
    names = NAMES[: np.asarray(logits).shape[1]]
    if not (folder / "model.pt").exists():
        recipe = Recipe({"norm": "group", "threshold": 0.45, **(before or {})})
        content = {"model": {"w": torch.ones(2)}, "recipe": recipe.text, "recipe_hash": recipe.hash, "epoch": 7}
        save_atomically(content, folder / "model.pt")
    results = WriteRecords(folder, names)
    p = torch.from_numpy(np.asarray(logits, np.float32)).softmax(1).double().numpy()
    results.records = [
        case_record(f"c{i}", probabilities=p[i], class_names=names, label=label, patient=f"p{i // 2}", **EVIDENCE)
        for i, label in enumerate(labels)
    ]
    results.records.append(refused_record("r", Refusal("empty", "Empty."), label=1, patient="p0"))
    handler = CalibrateWeights(results, folder / "model.pt", Recipe.load(folder / "model.pt"), resamples=20, **rules)
    engine = Engine(lambda engine, batch: None)
    handler.attach(engine)
    engine.fire_event(Events.COMPLETED)
    return Recipe.load(folder / "model.pt"), json.loads((folder / "calibration.json").read_text())


def test_what_was_fitted_is_in_the_recipe_and_all_else_stays(tmp_path):
    logits, labels = cohort()
    recipe, found = calibrate(tmp_path, logits, labels, coverage=0.75)
    temperature = fit_temperature(logits, labels).value
    p = calibrated(logits, temperature)
    threshold = operating_point(labels, p, 0.9).threshold
    sure = confidence(p, threshold)
    limit = abstention_limit(sure, 0.75)
    assert recipe["calibration_temperature"] == pytest.approx(temperature, rel=1e-4)
    assert recipe["threshold"] == pytest.approx(threshold, rel=1e-4)
    assert recipe["abstain_below"] == pytest.approx(limit, rel=1e-4)
    assert recipe["norm"] == "group"
    content = torch.load(tmp_path / "model.pt", weights_only=True)
    assert (content["epoch"], content["model"]["w"].tolist()) == (7, [1.0, 1.0])
    assert found["recipe_hash"] == content["recipe_hash"] == recipe.hash
    assert found["cases"] == {"no": int((labels == 0).sum()), "yes": int((labels == 1).sum())}
    assert found["refused"] == 1
    assert found["all"]["sensitivity"]["value"] >= 0.9
    assert (found["all"]["coverage"]["value"], found["answered"]["coverage"]["value"]) == (1.0, 0.75)
    assert found["after"]["nll"]["value"] < found["before"]["nll"]["value"]
    assert found["before"]["auc"] == found["after"]["auc"]
    assert found["before"]["ece"]["low"] <= found["before"]["ece"]["high"]
    assert sum(one["cases"] for one in found["after"]["bins"]) == 40
    kept = sure >= limit
    predictions = predicted_classes(p, threshold)
    assert found["answered"]["error"]["cases"] == 30
    assert found["answered"]["error"]["value"] == pytest.approx(np.mean(predictions[kept] != labels[kept]))
    assert found["answered"]["specificity"]["value"] == pytest.approx(np.mean(predictions[kept & (labels == 0)] == 0))
    loss = losses(labels, predictions, 2, threshold)
    assert found["answered"]["risk"] == pytest.approx(loss[kept].mean(), rel=1e-4)
    assert found["all"]["risk"] == pytest.approx(loss.mean(), rel=1e-4)
    assert {path.name for path in tmp_path.iterdir()} == {
        "model.pt", "calibration.json", "reliability.png", "risk_coverage.png"
    }  # fmt: skip


def test_it_starts_from_the_networks_logits_each_time(tmp_path):
    logits, labels = cohort()
    first = calibrate(tmp_path, logits, labels, coverage=0.8)
    content = (tmp_path / "model.pt").read_bytes()
    assert calibrate(tmp_path, logits, labels, coverage=0.8)[1] == first[1]
    assert (tmp_path / "model.pt").read_bytes() == content
    kept, found = calibrate(tmp_path, logits, labels, sensitivity=None)
    assert (kept["threshold"], kept["abstain_below"]) == (first[0]["threshold"], 0.0)
    assert found["rules"]["sensitivity"] is None
    other = calibrate(tmp_path / "other", logits, labels, {"calibration_temperature": 2.5}, coverage=0.8)
    assert other[1] == first[1]


def test_several_classes_have_a_temperature_and_no_operating_point(tmp_path, caplog):
    logits, labels = cohort(60, 3)
    with caplog.at_level("INFO"):
        recipe, found = calibrate(tmp_path, logits, labels, coverage=0.5)
    assert recipe["calibration_temperature"] == pytest.approx(fit_temperature(logits, labels).value, rel=1e-4)
    assert recipe["threshold"] == 0.45
    assert found["rules"] == {"sensitivity": None, "coverage": 0.5}
    assert "threshold 0.450, kept: error 0." in caplog.text
    assert 0.5 <= found["answered"]["coverage"]["value"] < 0.55
    assert "sensitivity" not in found["all"]


def test_it_says_what_it_found(tmp_path, caplog):
    logits, labels = cohort()
    with caplog.at_level("INFO"):
        recipe, found = calibrate(tmp_path, logits, labels, coverage=0.75)
    lines = caplog.messages
    assert lines[0] == f"calibrated on {found['cases']['no']} cases 'no', {found['cases']['yes']} cases 'yes'"
    assert lines[1].startswith(f"temperature {recipe['calibration_temperature']:.3f}: nll ")
    assert lines[2].startswith(f"threshold {recipe['threshold']:.3f}: sensitivity 0.9")
    assert lines[3].startswith("abstains below confidence ")
    assert lines[4] == f"saved in {tmp_path / 'model.pt'}"
    assert len(lines) == 5


def test_it_says_when_the_cases_do_not_determine_it(tmp_path, caplog):
    logits, labels = cohort(12, seed=1)
    with caplog.at_level("INFO"):
        calibrate(tmp_path, np.ones((12, 2)), [0, 1] * 6)
        calibrate(tmp_path / "wrong", -logits, labels)
    assert "the temperature is not determined: the logits of each case are all the same" in caplog.text
    assert "the NLL falls up to the highest one allowed" in caplog.text


def test_a_temperature_that_only_helps_its_own_cases_is_named(tmp_path, caplog):
    outcomes = set()
    for seed in range(20):  # well calibrated to begin with: what is fitted to 8 cases is chance
        logits, labels = cohort(8, seed=100 + seed)
        if len(set(labels)) == 2:
            caplog.clear()
            with caplog.at_level("INFO"):
                _, found = calibrate(tmp_path / str(seed), logits / 3, labels)
            helped = found["nll_left_out"] <= found["before"]["nll"]["value"]
            outcomes.add(helped)
            assert ("the temperature did not help" in caplog.text) == (not helped)
    assert outcomes == {True, False}


@pytest.mark.parametrize(
    ("labels", "sentence"),
    [([0, 0, 0], "two classes, and all 3 that could be read are 'no'"), ([], "two classes, and none could be read")],
)
def test_too_few_classes_are_refused(tmp_path, labels, sentence):
    with pytest.raises(InputError, match=sentence):
        calibrate(tmp_path, np.zeros((len(labels), 2)), labels)
    assert Recipe.load(tmp_path / "model.pt")["threshold"] == 0.45
    assert [path.name for path in tmp_path.iterdir()] == ["model.pt"]


@pytest.mark.parametrize("rule", [0.0, 1.01, -1, math.nan, "high", True])
@pytest.mark.parametrize("name", ["sensitivity", "coverage"])
def test_impossible_rules_are_refused_before_anything_is_evaluated(tmp_path, name, rule):
    with pytest.raises(InputError, match=f"{name} must be above 0 and at most 1, or null, not {rule!r}"):
        CalibrateWeights(WriteRecords(tmp_path, NAMES), tmp_path / "model.pt", Recipe({}), **{name: rule})


def test_weights_stay_when_a_picture_cannot_be_drawn(tmp_path, monkeypatch):
    logits, labels = cohort()
    monkeypatch.setattr("bundle.calibrate.draw_risk_coverage", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        calibrate(tmp_path, logits, labels)
    assert Recipe.load(tmp_path / "model.pt")["threshold"] == 0.45
