"""Train, calibrate, evaluate and classify through the command line: what calibration finds, everything applies."""

import csv
import json
import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch

from bundle.package import DEFAULT_NAME, make_package
from bundle.recipe import Recipe
from bundle.weights import load_network, save_atomically
from tests.test_docs import config, documented, shown

from .conftest import ROOT, train_arguments

SET = ("calibration_temperature", "threshold", "abstain_below")


def arguments(cohort: Path, output: Path, workflow: str) -> list[str]:
    given = train_arguments(cohort, output)
    files = ["configs/train.yaml", str(cohort / "tiny.yaml"), f"configs/{workflow}.yaml"]
    given[given.index("--config_file") + 1] = str(files)
    # The cache rounds intensities (uint16), and inference has none.
    return [*given, "--cache_dir", "null"]


def inference(cohort: Path, weights: Path, output: Path) -> list[str]:
    return ["run", "--config_file", "configs/inference.yaml", "--dataset_dir", str(cohort), "--datalist",
            str(cohort / "datalist.json"), "--section", "validation", "--weights", str(weights), "--output_dir",
            str(output), "--device", "cpu", "--progress", "false"]  # fmt: skip


def table(path: Path) -> dict[str, dict[str, str]]:
    with path.open() as file:
        return {row["case"]: row for row in csv.DictReader(file)}


def records(folder: Path) -> dict[str, dict]:
    found = [json.loads(path.read_text()) for path in (folder / "cases").glob("*.json")]
    return {record["case"]: record for record in found}


def copy_of(trained: Path, folder: Path) -> Path:
    return Path(shutil.copytree(trained, folder, ignore=shutil.ignore_patterns("events", "test")))


@pytest.fixture(scope="module")
def run(trained, tmp_path_factory) -> Path:
    """A finished training of this module's own."""
    return copy_of(trained, tmp_path_factory.mktemp("calibrated") / "run")


def test_all_from_training_to_inference(cohort, run, monai, tmp_path):
    before = Recipe.load(run / "model.pt")
    done = monai(*arguments(cohort, run, "calibrate"), "--coverage", "0.6")
    found = json.loads((run / "calibration" / "calibration.json").read_text())
    recipe = Recipe.load(run / "model.pt")
    assert {key: recipe[key] for key in SET} == found["recipe"]
    assert recipe.hash == found["recipe_hash"] != before.hash
    assert {k: v for k, v in recipe.config.items() if k not in SET} == {
        k: v for k, v in before.config.items() if k not in SET
    }
    assert f"temperature {recipe['calibration_temperature']:.3f}" in done.stdout
    assert found["all"]["sensitivity"]["value"] >= 0.9
    uncalibrated = records(run / "calibration")
    assert set(table(run / "calibration" / "predictions.csv")) == set(uncalibrated)
    for name in ("reliability.png", "risk_coverage.png"):
        assert (run / "calibration" / name).stat().st_size > 5_000

    # Once more gives the same file, and so do other rules and back again.
    weights = (run / "model.pt").read_bytes()
    monai(*arguments(cohort, run, "calibrate"), "--sensitivity", "null")
    other = Recipe.load(run / "model.pt")
    assert (other["threshold"], other["abstain_below"]) == (recipe["threshold"], 0.0)
    monai(*arguments(cohort, run, "calibrate"), "--coverage", "0.6")
    assert (run / "model.pt").read_bytes() == weights
    assert json.loads((run / "calibration" / "calibration.json").read_text()) == found

    # Probabilities are softmax(logits / T), predictions those of the operating point; the least sure abstain.
    done = monai(*inference(cohort, run / "model.pt", tmp_path / "out"))
    rows, calibrated = table(tmp_path / "out" / "predictions.csv"), records(tmp_path / "out")
    datalist = json.loads((cohort / "datalist.json").read_text())
    assert set(rows) == set(calibrated) == set(uncalibrated) == set(datalist["folds"][0]["validation"])
    confidences = {}
    for case, record in calibrated.items():
        odds = np.log(uncalibrated[case]["probabilities"][1] / uncalibrated[case]["probabilities"][0])
        p = 1 / (1 + np.exp(-odds / recipe["calibration_temperature"]))
        assert record["probabilities"] == pytest.approx([1 - p, p], abs=1e-6)
        gap = np.log(p / (1 - p)) - np.log(recipe["threshold"] / (1 - recipe["threshold"]))
        confidences[case] = 1 / (1 + np.exp(-abs(gap)))
        if record["status"] == "accepted":
            assert record["prediction"] == int(gap >= 0)
            assert confidences[case] >= recipe["abstain_below"]
        else:
            assert (record["status"], record["prediction"], rows[case]["class_name"]) == ("abstained", None, "")
            assert confidences[case] < recipe["abstain_below"]
            assert (rows[case]["reason_code"], float(rows[case]["probability_positive"])) == (
                "low_confidence", pytest.approx(p, abs=1e-5)
            )  # fmt: skip
            assert record["slices"]
    abstained = [case for case, record in calibrated.items() if record["status"] == "abstained"]
    assert len(abstained) == len(calibrated) - int(np.ceil(0.6 * len(calibrated)))
    assert f"({len(abstained)} of them abstained: no prediction)" in done.stdout

    # Evaluation says the same of them.
    monai(*arguments(cohort, run, "evaluate"), "--section", "validation")
    metrics = json.loads((run / "validation" / "metrics.json").read_text())
    assert records(run / "validation")[abstained[0]]["status"] == "abstained"
    assert metrics["counts"]["abstained"] == metrics["counts"]["abstained_with_label"] == len(abstained)
    assert metrics["scores_all"]["sensitivity"]["value"] == pytest.approx(found["all"]["sensitivity"]["value"])
    assert metrics["scores_all"]["nll"]["value"] == pytest.approx(found["after"]["nll"]["value"], abs=1e-5)
    assert metrics["coverage"]["value"] == pytest.approx(found["answered"]["coverage"]["value"])
    assert (run / "validation" / "reliability.png").stat().st_size > 5_000

    # A setting that is not the weights' is refused, and a package says what it carries.
    done = monai(*inference(cohort, run / "model.pt", tmp_path / "no"), "--threshold", "0.123", status=1)
    assert f"threshold is 0.123 in the config, but the weights hold {recipe['threshold']!r}" in done.stderr
    folder, _ = make_package(run / "model.pt", tmp_path / "package")
    assert (
        f"temperature {recipe['calibration_temperature']:.4g}; abstains below"
        in (folder / "docs/README.md").read_text()
    )
    assert Recipe.load(folder / "models" / "model.pt").hash == recipe.hash
    assert json.loads((folder / "configs" / "train.json").read_text())["abstain_below"] == recipe["abstain_below"]
    assert folder.name == DEFAULT_NAME


def test_weights_of_before_calibration_are_used_as_they_were(cohort, trained, monai, tmp_path):
    content = torch.load(trained / "model.pt", weights_only=True)
    old = {
        k: v for k, v in json.loads(content["recipe"]).items() if k not in ("calibration_temperature", "abstain_below")
    }
    recipe = Recipe(old)
    save_atomically({**content, "recipe": recipe.text, "recipe_hash": recipe.hash}, tmp_path / "old.pt")
    for name, weights in (("old", tmp_path / "old.pt"), ("new", trained / "model.pt")):
        monai(*inference(cohort, weights, tmp_path / name))
    assert (tmp_path / "old" / "predictions.csv").read_text() == (tmp_path / "new" / "predictions.csv").read_text()
    network = load_network(recipe.build("network_def"), tmp_path / "old.pt")
    assert network.state_dict().keys() == content["model"].keys()


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        (["--section", "test"], "there is no setting 'section'"),
        (["--fold", "1"], "the weights were trained on fold 0 of this datalist, and the validation cases of fold 1"),
        (["--coverage", "'half'"], "coverage must be above 0 and at most 1, or null, not 'half'"),
        (["--threshold", "0.4"], "threshold is 0.4 in the config, but the weights hold 0.5"),
    ],
)
def test_what_would_mislead_is_refused_and_nothing_is_written(cohort, trained, monai, tmp_path, settings, sentence):
    copy = copy_of(trained, tmp_path / "run")
    before = (copy / "model.pt").read_bytes()
    done = monai(*arguments(cohort, copy, "calibrate"), *settings, status=1)
    assert f"error: {sentence}" in done.stderr
    assert "Traceback" not in done.stderr
    assert (copy / "model.pt").read_bytes() == before
    assert not (copy / "calibration").exists()


def test_validation_cases_of_one_class_are_refused_in_a_sentence(cohort, trained, monai, tmp_path):
    copy, data = copy_of(trained, tmp_path / "run"), tmp_path / "data"
    shutil.copytree(cohort, data, ignore=shutil.ignore_patterns("cache"))
    datalist = json.loads((data / "datalist.json").read_text())
    labels = {case["case"]: case["label"] for case in datalist["cases"]}
    for case in datalist["folds"][0]["validation"]:
        if labels[case] == 1:  # still there, but no scan any more
            (data / "images" / f"{case}.nii.gz").write_text("no scan")
    before = (copy / "model.pt").read_bytes()
    done = monai(*arguments(data, copy, "calibrate"), status=1)
    assert "error: calibration needs validation cases of two classes, and all" in done.stderr
    assert "are 'negative': make folds with more validation cases" in done.stderr
    assert (copy / "model.pt").read_bytes() == before
    assert isinstance(nib.load(data / "images" / "c00.nii.gz"), nib.Nifti1Image)


def test_every_setting_is_documented_with_its_default():
    settings, rows = config("calibrate"), documented("calibrate")
    assert rows.keys() == settings.keys()
    for key, cell in rows.items():
        assert cell == str(shown(settings[key])).replace("None", "null").replace("True", "true"), key
    assert ROOT.joinpath("configs", "calibrate.yaml").is_file()
