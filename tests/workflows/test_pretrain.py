"""Pre-training without labels through the command line: reproducible, blind to labels, and a start for a training."""

import csv
import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml

from bundle.data.cases import split_of
from bundle.recipe import Recipe
from tests.command import run_module

from .conftest import ROOT, TINY, environment, train_arguments

CONV = {
    **{key: value for key, value in TINY.items() if not key.startswith("encoder")},
    "encoder": {"_target_": "bundle.ConvEncoder", "num_channels": "@num_channels", "widths": [8, 16, 32]},
    "max_epochs": 2,
    "bag_size": 4,
    "projected_features": 16,
    "num_workers": 0,
}


@pytest.fixture(scope="module")
def small(cohort, tmp_path_factory):
    """The tiny cohort with the encoder of a study's screen."""
    folder = tmp_path_factory.mktemp("small")
    for name in ("images", "datalist.json"):
        (folder / name).symlink_to(cohort / name)
    own = {**CONV, "cache_dir": str(folder / "cache")}
    (folder / "pre.yaml").write_text(yaml.safe_dump(own))
    own.pop("projected_features")
    (folder / "tiny.yaml").write_text(yaml.safe_dump(own))
    return folder


def pretrain(small, output, monai, *settings, overlays=(), **options):
    files = ["configs/train.yaml", *overlays, "configs/pretrain.yaml", str(small / "pre.yaml")]
    given = ["--dataset_dir", str(small), "--output_dir", str(output), *settings]
    return monai("run", "--config_file", str(files), *given, **options)


def weights(path: Path) -> dict[str, torch.Tensor]:
    return torch.load(path, weights_only=True)["encoder"]


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def pretrained(small, tmp_path_factory):
    return small, tmp_path_factory.mktemp("pretrained") / "run"


def test_the_whole_way(pretrained, monai, tmp_path):
    """Pre-train, train from it; a run with workers, one that was stopped and one with other labels give its bytes."""
    small, output = pretrained
    pretrain(small, output, monai)
    rows = rows_of(output / "epochs.csv")
    assert [row["epoch"] for row in rows] == ["1", "2"]
    names = {"train_loss", "loss_invariance", "loss_variance", "loss_covariance", "lr", "classifier_lr"}
    assert {name for name, value in rows[1].items() if value} >= names
    assert not (output / "model.pt").exists()
    encoder = output / "encoder.pt"
    state = weights(encoder)
    assert {name.partition(".")[0] for name in state} == {"0", "1", "2"}

    trained = monai(*train_arguments(small, tmp_path / "train"), "--encoder_weights", str(encoder), "--max_epochs", "2")
    assert "0 adapted (none), 0 missing (none), 0 unused (none)" in trained.stdout + trained.stderr
    assert (tmp_path / "train" / "model.pt").exists()

    # Other labels, and validation and test cases that are not there.
    blind = tmp_path / "blind"
    blind.mkdir()
    content = json.loads((small / "datalist.json").read_text())
    del content["hash"]
    used = set(content["folds"][0]["training"])
    (blind / "images").mkdir()
    for case in content["cases"]:
        case["label"] = 1 - case["label"]
        case.pop("slice_label", None)
        if case["case"] in used:
            shutil.copy(small / case["image"], blind / case["image"])
    (blind / "datalist.json").write_text(json.dumps(content))
    (blind / "pre.yaml").write_text(yaml.safe_dump({**CONV, "num_workers": 2, "cache_dir": str(blind / "cache")}))
    pretrain(blind, tmp_path / "other", monai)
    other = weights(tmp_path / "other" / "encoder.pt")
    assert all(torch.equal(other[name], value) for name, value in state.items())

    # Stopped after its first epoch, as a kill would leave it.
    stopped = tmp_path / "stopped"
    pretrain(small, stopped, monai, "--max_epochs", "3")
    kept = (stopped / "encoder.pt").read_bytes()
    shutil.move(stopped / "checkpoint.previous.pt", stopped / "checkpoint.pt")
    again = pretrain(small, stopped, monai, "--max_epochs", "3")
    assert "going on after epoch" in again.stdout + again.stderr
    assert (stopped / "encoder.pt").read_bytes() == kept


def test_it_refuses_in_a_sentence(small, tmp_path, monai):
    done = pretrain(small, tmp_path / "a", monai, "--vicreg_variance", "-1", status=1)
    assert "error: vicreg_variance must be 0 or more, not -1" in done.stderr
    done = pretrain(small, tmp_path / "b", monai, "--projektor", "1", status=1)
    assert "error: there is no setting 'projektor'" in done.stderr
    torch.save({"encoder": torch.nn.Conv2d(1, 3, 3).state_dict()}, tmp_path / "other.pt")
    arguments = train_arguments(small, tmp_path / "c")
    done = monai(*arguments, "--encoder_weights", str(tmp_path / "other.pt"), "--max_epochs", "2", status=1)
    assert "error: encoder_weights: other.pt has no weights for 0.0.weight" in done.stderr


def test_an_encoder_of_another_fold_is_refused(small, tmp_path, monai):
    path = tmp_path / "encoder.pt"
    torch.save({"encoder": {}, "trained_on": split_of(small / "datalist.json", 1)}, path)
    done = monai(*train_arguments(small, tmp_path / "run"), "--encoder_weights", str(path), status=1)
    assert "error: encoder_weights were trained on fold 1 of this datalist" in done.stderr


def test_an_arm_of_a_study_pre_trains_before_its_training(small, tmp_path):
    shutil.copy(ROOT / "configs" / "pretrain.yaml", tmp_path / "pretrain.yaml")
    study = {
        "stages": {"quick": {"seeds": [0], "settings": {}}},
        "arms": {"pretrained": {"pretrain": {"files": ["pretrain.yaml"], "max_epochs": 3, "projected_features": 16}}},
    }
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(study))
    output = tmp_path / "out"
    command = ["bundle.study.stability_study", "--study", str(tmp_path / "study.yaml")]
    command += ["--stage", "quick", "--config_file", str(["configs/train.yaml", str(small / "tiny.yaml")])]
    command += ["--dataset_dir", str(small), "--output_dir", str(output), "--folds", "1", "--piece", "0"]
    run_module(*command, environment=environment()).check_returncode()
    (piece,) = output.glob("pretrained/seed0_fold1")
    result = json.loads((piece / "piece.json").read_text())
    assert result["max_epochs"] == 2
    assert result["made_from"]["pretrain::max_epochs"] == "3"
    assert len(rows_of(piece / "pretrained" / "epochs.csv")) == 3
    content = torch.load(piece / "pretrained" / "encoder.pt", weights_only=True)
    assert content["trained_on"]["fold"] == 1
    assert f"encoder weights from encoder.pt: {len(content['encoder'])} tensors used" in (piece / "log.txt").read_text()
    assert not list(piece.rglob("checkpoint*.pt"))


def test_the_default_recipe_starts_from_a_pre_trained_encoder(small, monai, tmp_path):
    pretrain(small, tmp_path / "pre", monai, "--max_epochs", "1", "--warmup_epochs", "0")
    encoder = tmp_path / "pre" / "encoder.pt"
    assert any(name.endswith("running_mean") for name in weights(encoder))  # of batch norms
    done = monai(*train_arguments(small, tmp_path / "run"), "--encoder_weights", str(encoder))
    assert "0 missing (none), 0 unused (none)" in done.stdout + done.stderr
    assert torch.load(tmp_path / "run" / "model.pt", weights_only=True)["metric"] == "val_nll"
    assert Recipe.load(tmp_path / "run" / "model.pt").build("network_def").instance_gradient == 0.1
