"""Two trainings as one network through the command line: made, calibrated, evaluated, packaged, run alone."""

import copy
import csv
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bundle.ensemble import make_ensemble
from bundle.recipe import Recipe
from bundle.weights import read_checkpoint, save_atomically
from tests.command import run_module

from .conftest import environment, train_arguments
from .test_calibrate import arguments, inference, table


def ensemble(*given: str | Path, status: int = 0) -> str:
    done = run_module("bundle.ensemble", *given, environment=environment())
    assert done.returncode == status, done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def models(cohort, trained, tmp_path_factory) -> list[Path]:
    """Weights of two trainings of fold 0: another seed, and another recipe of training."""
    output = tmp_path_factory.mktemp("second") / "run"
    own = ["--seed", "1", "--norm", "group", "--max_epochs", "2", "--lambda_entropy", "0.0"]
    run_module("monai.bundle", *train_arguments(cohort, output), *own, environment=environment()).check_returncode()
    return [trained / "model.pt", output / "model.pt"]


@pytest.fixture(scope="module")
def together(models, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("ensemble") / "deep" / "model.pt"
    assert "2 networks as one" in ensemble(*models, "--out", out)
    return out


def probabilities(folder: Path) -> dict[str, float]:
    return {case: float(row["probability_positive"]) for case, row in table(folder / "predictions.csv").items()}


def test_everything_takes_it_as_any_other_weights(cohort, models, together, tmp_path, monai):
    said = []
    for index, weights in enumerate([*models, together]):
        done = monai(*inference(cohort, weights, tmp_path / str(index)))
        assert "Traceback" not in done.stderr
        said.append(probabilities(tmp_path / str(index)))
    assert len(said[0]) > 3
    for case, value in said[2].items():
        assert value == pytest.approx((said[0][case] + said[1][case]) / 2, abs=0.01)  # bf16
    calibrated = Path(shutil.copy(together, tmp_path / "model.pt"))
    given = ["--weights", str(calibrated), "--output_dir", str(tmp_path)]
    for workflow in ("calibrate", "evaluate"):
        monai(*arguments(cohort, tmp_path, workflow), *given)
    assert Recipe.load(calibrated)["calibration_temperature"] != 1.0
    metrics = json.loads((tmp_path / "test" / "metrics.json").read_text())
    assert metrics["scores"]["auc"]["value"] is not None
    assert metrics["key_slices"]["score"]


def test_its_package_runs_alone(cohort, together, tmp_path):
    run_module("bundle.package", together, tmp_path, environment=environment()).check_returncode()
    folder = tmp_path / "dual_stream_mil"
    command = [sys.executable, "-m", "monai.bundle", "run", "--config_file", "configs/inference.json", "--dataset_dir"]
    command += [str(cohort / "images"), "--device", "cpu", "--progress", "false", "--case_names", "path"]
    own = {**environment(), "PYTHONPATH": str(folder)}
    assert "the mean of 2 networks (DualStreamMIL)" in (folder / "docs" / "README.md").read_text()
    done = subprocess.run(command, cwd=folder, env=own, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    with (folder / "output" / "inference" / "predictions.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 24
    assert {row["status"] for row in rows} == {"accepted"}


def changed(weights: Path, out: Path, **changes) -> Path:
    """A copy of weights with another entry, or another setting of the recipe."""
    content, recipe = read_checkpoint(weights), Recipe.load(weights)
    setting = {key: changes.pop(key) for key in list(changes) if key in recipe.config}
    other = Recipe({**recipe.config, **setting})
    save_atomically({**content, "recipe": other.text, "recipe_hash": other.hash, **changes}, out)
    return out


def untrained(weights: Path, out: Path, num_classes: int = 2, scorer: str = "tied", first_width: int = 8) -> Path:
    """Weights of another network, with the rest of a recipe."""
    content, recipe = read_checkpoint(weights), Recipe.load(weights)
    definition = copy.deepcopy(recipe["network_def"])
    definition |= {"scorer": scorer, "num_classes": num_classes}
    definition["encoder"]["encoder"]["block_inplanes"][0] = first_width
    other = Recipe(
        {**recipe.config, "network_def": definition, "class_names": [f"class {k}" for k in range(num_classes)]}
    )
    state = other.build("network_def").state_dict()
    save_atomically({**content, "model": state, "recipe": other.text, "recipe_hash": other.hash}, out)
    return out


def test_members_may_be_of_other_widths(models, tmp_path):
    wide = untrained(models[0], tmp_path / "wide.pt", first_width=24)
    narrow = untrained(models[0], tmp_path / "narrow.pt")
    ensemble(narrow, wide, "--out", tmp_path / "a.pt")
    ensemble(wide, narrow, "--out", tmp_path / "b.pt")
    assert len(Recipe.load(tmp_path / "b.pt")["network_def"]["members"]) == 2


def test_cases_that_a_member_has_seen_are_not_evaluated(cohort, models, tmp_path, monai):
    seen = read_checkpoint(models[1])["trained_on"]
    other = changed(models[1], tmp_path / "other.pt", trained_on={**seen, "fold": 2})
    make_ensemble([models[0], other], tmp_path / "model.pt")
    assert read_checkpoint(tmp_path / "model.pt")["trained_on"] == {**seen, "fold": [0, 2]}
    done = monai(*arguments(cohort, tmp_path, "evaluate"), "--weights", str(tmp_path / "model.pt"), status=1)
    assert "of an ensemble over folds 0, 2 of this datalist" in done.stderr
    assert "Traceback" not in done.stderr


def test_members_that_do_not_fit_together_are_refused(models, together, tmp_path):
    first, second = models
    for given, said in (
        ([first], "at least two networks, not 1"),
        ([first, first], "holds the same weights as"),
        ([first, together], "is an ensemble: give its members"),
        ([first, tmp_path / "none.pt"], "there is no weights file"),
        ([first, changed(second, tmp_path / "a.pt", image_size=[64, 64])], "differ in image_size"),
        ([first, changed(second, tmp_path / "b.pt", class_names=["a", "b"])], "differ in class_names"),
        ([first, changed(second, tmp_path / "c.pt", trained_on={"datalist": "x", "fold": 0})], "different datalists"),
        ([first, changed(second, tmp_path / "d.pt", trained_on={})], "d.pt does not tell what it was trained on"),
        (
            [untrained(first, tmp_path / f"{scorer}.pt", 3, scorer) for scorer in ("tied", "separate")],
            "differ in their score columns",
        ),
    ):
        assert said in ensemble(*given, "--out", tmp_path / "out.pt", status=2), given
        assert not (tmp_path / "out.pt").exists()
    assert "is one of the members" in ensemble(first, second, "--out", first, status=2)
    assert "cannot write" in ensemble(first, second, "--out", first / "below" / "out.pt", status=2)


def test_what_differs_in_training_leaves_the_recipe_and_calibration_starts_anew(models, tmp_path):
    tuned = changed(models[0], tmp_path / "tuned.pt", threshold=0.3, calibration_temperature=2.0)
    make_ensemble([tuned, models[1]], tmp_path / "model.pt")
    recipe = Recipe.load(tmp_path / "model.pt")
    assert "norm" not in recipe.config
    assert recipe["selection"] == "soft"
    assert (recipe["threshold"], recipe["calibration_temperature"]) == (0.5, 1.0)
    names = read_checkpoint(tmp_path / "model.pt")["model"]
    members = [read_checkpoint(path)["model"] for path in models]
    count = sum(tensor.numel() for member in members for tensor in member.values())
    assert sum(tensor.numel() for tensor in names.values()) == count + 1  # a temperature that nothing uses
    assert torch.equal(names["members.1.bag_classifier.weight"], members[1]["bag_classifier.weight"])
