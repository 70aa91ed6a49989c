"""Training through the command line: learns, resumes exactly, refuses what it should."""

import ast
import csv
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import monai.bundle
import pytest
import torch

from bundle.errors import input_error_behind

from .conftest import ROOT, environment, train_arguments


def weights(path: Path) -> dict[str, torch.Tensor]:
    return torch.load(path, weights_only=True)["model"]


def assert_same(a: Path, b: Path) -> None:
    first, second = weights(a), weights(b)
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


def log(output: Path) -> list[dict[str, str]]:
    with (output / "epochs.csv").open() as file:
        return list(csv.DictReader(file))


def test_a_run_leaves_weights_log_and_curves(trained):
    assert {"model.pt", "checkpoint.pt", "checkpoint.previous.pt", "epochs.csv", "curves.png", "events"} <= {
        path.name for path in trained.iterdir()
    }
    rows = log(trained)
    assert [row["epoch"] for row in rows] == ["1", "2", "3"]
    expected = {"train_loss", "train_nll_mean", "train_nll_var", "train_nll_min", "train_nll_max", "clipped_share",
                "train_accuracy", "train_eval_accuracy", "flip_rate", "temperature", "lambda_entropy",
                "lambda_confidence", "lr", "classifier_lr", "val_nll", "val_accuracy", "val_auc"}  # fmt: skip
    assert expected <= rows[0].keys()
    assert rows[0]["flip_rate"] == ""  # nothing to compare with yet
    assert 0 <= float(rows[1]["flip_rate"]) <= 1
    assert float(rows[0]["temperature"]) == 5.0
    assert float(rows[-1]["temperature"]) == 0.5
    assert float(torch.load(trained / "model.pt", weights_only=True)["model"]["temperature"]) == 0.5
    assert not list(trained.glob(".part-*"))


@pytest.mark.parametrize("moment", ["after_first_checkpoint", "in_third_epoch"])
def test_a_killed_run_goes_on_to_the_same_weights(cohort, trained, tmp_path, monai, moment):
    output = tmp_path / "run"
    arguments = train_arguments(cohort, output)
    process = subprocess.Popen(
        [sys.executable, "-m", "monai.bundle", *arguments],
        cwd=ROOT, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip
    awaited = output / ("checkpoint.pt" if moment == "after_first_checkpoint" else "checkpoint.previous.pt")
    deadline = time.monotonic() + 120
    while not awaited.exists() and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.005)
    os.killpg(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "the run ended before it could be killed"
    epochs_before = len(log(output)) if (output / "epochs.csv").exists() else 0
    assert epochs_before < 3
    done = monai(*arguments)
    assert "going on after epoch" in done.stdout
    assert "slices are drawn (random) of" in done.stdout
    assert_same(output / "checkpoint.pt", trained / "checkpoint.pt")
    assert_same(output / "model.pt", trained / "model.pt")
    assert log(output) == log(trained)


def test_workers_change_no_weight(cohort, trained, tmp_path, monai):
    monai(*train_arguments(cohort, tmp_path / "run"), "--num_workers", "2")
    assert_same(tmp_path / "run" / "model.pt", trained / "model.pt")


def test_mixed_bags_and_consistency_train_and_resume(cohort, trained, tmp_path, monai):
    own = ["--bag_mixing", "1.0", "--lambda_consistency", "1.0"]
    monai(*train_arguments(cohort, tmp_path / "run"), *own)
    rows = log(tmp_path / "run")
    assert all(float(row["loss_consistency"]) > 0 for row in rows)
    assert all(float(row["loss_consistency"]) == 0 for row in log(trained))
    assert rows[0]["loss_bag"] != log(trained)[0]["loss_bag"]
    monai(*train_arguments(cohort, tmp_path / "parts"), *own, "--max_epochs", "2")
    monai(*train_arguments(cohort, tmp_path / "parts"), *own, "--resume_changed", "true")
    assert [row["epoch"] for row in log(tmp_path / "parts")] == ["1", "2", "3"]


def test_a_finished_run_is_left_alone(cohort, trained, monai):
    before = (trained / "model.pt").stat().st_mtime_ns
    done = monai(*train_arguments(cohort, trained))
    assert "had already reached epoch 3" in done.stdout
    assert (trained / "model.pt").stat().st_mtime_ns == before


def test_other_settings_are_not_mixed_into_a_run(cohort, trained, monai):
    done = monai(*train_arguments(cohort, trained), "--lr", "0.5", status=1)
    assert "holds a run with other settings (lr 0.001 → 0.5)" in done.stderr
    assert "Traceback" not in done.stderr


BAD = [
    ("temperatur_start", 5.0, "there is no setting 'temperatur_start'; did you mean 'temperature_start'?"),
    ("network_def::dropot", 0.1, "takes no such argument; did you mean 'dropout'?"),
    ("train::trainr", 0.1, "there is no setting 'train::trainr'; did you mean 'trainer'?"),
    ("amp", "no", "amp must be true or false, not 'no'"),
    ("lr", "1e-4", "lr must be a number, not '1e-4'; in YAML write 1.0e-4"),
    ("bag_size", "many", "bag_size must be a whole number, not 'many'"),
    ("bag_size", 0, "bag_size must be at least 1, not 0"),
    ("selection", "softest", "selection must be one of soft, hard"),
    ("sampling_strategy", "randm", "sampling_strategy must be one of random"),
    ("norm", "layer", "norm must be one of batch"),
    ("scorer", "both", "scorer must be 'tied' or 'separate', not 'both'"),
    ("best_metric", "auroc", "there is no metric 'auroc'"),
    ("fold", 7, "has folds 0 to 2, not 7"),
    ("dataset_dir", "nowhere", "nowhere"),
    ("class_names", ["a", "b", "c"], "3 class names"),
    ("warmup_epochs", 3, "warmup_epochs must be 0 or more and below max_epochs (3), not 3"),
    ("temperature_end", 9.0, "temperature_end <= temperature_start"),
    ("channels", ["a", "b"], "2 are expected"),
    ("encoder_weights", "nothing.pt", "there is no file nothing.pt"),
    ("precision", "fp16", "precision fp16 needs a GPU"),
    ("bag_mixing", 1.5, "bag_mixing must be a probability from 0 (never) to 1, not 1.5"),
    ("bag_mixing_label", "both", "bag_mixing_label must be one of share, highest, not 'both'"),
    ("lambda_consistency", -1.0, "lambda_consistency must be 0 or more, not -1.0"),
    ("grad_clip", 0.0, "grad_clip must be above 0"),
    ("lambda_entropy", -1.0, "must be 0 or more, not -1.0"),
    ("image_size", [4, 4], "at least 8 pixels"),
    ("slicing_axis", "diagonal", "slicing_axis must be one of axial"),
    (
        "encoder::_target_",
        "monai.networks.nets.ResNat",
        "there is nothing called 'monai.networks.nets.ResNat' to import",
    ),
]


@pytest.mark.parametrize(("key", "value", "sentence"), BAD, ids=[f"{key}={value}" for key, value, _ in BAD])
def test_bad_settings_end_in_a_sentence_before_anything_is_written(cohort, tmp_path, monkeypatch, key, value, sentence):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)  # put back what plain_errors sets
    output = tmp_path / "run"
    _, _, files, *_ = train_arguments(cohort, output)
    given = {"dataset_dir": str(cohort), "output_dir": str(output), key: value}
    with pytest.raises(Exception) as error:  # noqa: PT011 - MONAI wraps it; the sentence is checked
        monai.bundle.run(config_file=ast.literal_eval(files), logging_file=False, **given)
    found = input_error_behind(error.value)
    assert found is not None, error.value
    assert sentence in str(found)
    assert not output.exists()


def test_the_command_line_prints_the_sentence_alone(cohort, tmp_path, monai):
    done = monai(*train_arguments(cohort, tmp_path / "run"), "--temperatur_start", "5.0", "--amp", "no", status=1)
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ") or "must be" in line]
    assert lines == [
        "error: there is no setting 'temperatur_start'; did you mean 'temperature_start'?",
        "amp must be true or false, not 'no'",
    ]
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()


def test_true_and_false_of_the_command_line_are_booleans(cohort, tmp_path, monai):
    monai(*train_arguments(cohort, tmp_path / "run"), "--amp", "false", "--augment", "False", "--max_epochs", "2")
    recorded = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["settings"]
    assert recorded["amp"] == recorded["augment"] == "false"
