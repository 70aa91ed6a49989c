"""The slice cache through the command line: shared by training and evaluation, of no influence on what is learned."""

import ast
import csv
import json
import shutil
import sys
from pathlib import Path

import monai.bundle
import pytest

import bundle
from bundle.errors import input_error_behind

from .conftest import ROOT, train_arguments


def epochs(output: Path) -> list[dict[str, str]]:
    with (output / "epochs.csv").open() as file:
        return list(csv.DictReader(file))


def entries(cache: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in (cache / "entries").iterdir()}


def test_training_and_evaluation_share_entries_and_learn_as_without(cohort, tmp_path, monai):
    cache, output, settings = tmp_path / "cache", tmp_path / "run", ("--max_epochs", "2", "--num_workers", "1")
    arguments = train_arguments(cohort, output)
    monai(*arguments, *settings, "--cache_dir", str(cache))
    fold = json.loads((cohort / "datalist.json").read_text())["folds"][0]
    made = entries(cache)
    assert len(made) == len(fold["training"]) + len(fold["validation"])

    evaluation = list(arguments)
    evaluation[2] = str(["configs/train.yaml", "configs/evaluate.yaml", str(cohort / "tiny.yaml")])
    monai(*evaluation, "--cache_dir", str(cache), "--section", "validation")
    assert entries(cache) == made, "evaluation finds what training prepared"

    moved, elsewhere = tmp_path / "moved", tmp_path / "other"
    shutil.copytree(cohort, moved, ignore=shutil.ignore_patterns("cache"))
    monai(*train_arguments(moved, elsewhere), *settings, "--cache_dir", "null")
    assert entries(cache) == made
    for with_cache, without in zip(epochs(output), epochs(elsewhere), strict=True):
        for name in ("train_loss", "val_nll"):
            assert float(with_cache[name]) == pytest.approx(float(without[name]), abs=0.02)  # bf16 where there is any


@pytest.mark.parametrize(
    ("setting", "value", "sentence"),
    [
        ("cache_dir", " ", "cache_dir is a folder, or null to keep nothing"),
        ("cache_type", "int8", "cache_type must be uint16 or float32, not 'int8'"),
        ("cache_limit_gb", 1e-6, "cases are prepared"),
        ("cache_limit_gb", 0, "cache_limit_gb must be above 0"),
    ],
)
def test_a_cache_that_cannot_be_used_ends_in_a_sentence(setting, value, sentence, cohort, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)  # put back what plain_errors sets
    output = tmp_path / "run"
    files = ast.literal_eval(train_arguments(cohort, output)[2])
    given = {"dataset_dir": str(cohort), "output_dir": str(output), "cache_dir": str(tmp_path / "cache")}
    with pytest.raises(Exception) as error:  # noqa: PT011 - MONAI wraps it; the sentence is checked
        monai.bundle.run(config_file=files, logging_file=False, **{**given, setting: value})
    found = str(input_error_behind(error.value))
    assert sentence in found
    assert "\n" not in found
    assert not output.exists()


def test_null_on_the_command_line_is_kept_to(cohort, tmp_path, monai):
    """MONAI leaves out arguments whose value is None, so the word has to do."""
    output = tmp_path / "run"
    window = "{'_target_': 'bundle.ScaleWindowd', 'keys': 'image', 'low': 0.0, 'high': 300.0}"
    settings = ("--cache_dir", "null", "--crop_margin", "null", "--intensity", window, "--max_epochs", "2")
    before = entries(cohort / "cache") if (cohort / "cache" / "entries").exists() else {}
    default = (ROOT / "output" / "cache").exists()
    monai(*train_arguments(cohort, output), *settings)
    assert ROOT.joinpath("output", "cache").exists() == default
    assert (entries(cohort / "cache") if before else {}) == before
    recipe = bundle.Recipe.load(output / "model.pt")
    assert recipe["crop_margin"] is None
    crop = next(step for step in recipe["preparation"] if step["_target_"] == "bundle.CropToForegroundd")
    assert crop["margin"] is None
