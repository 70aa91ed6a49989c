"""The rivals go through the same commands as the dual-stream network, by an overlay that replaces the network."""

import csv
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from monai.bundle import ConfigParser

from bundle.recipe import Recipe

from .conftest import ROOT, TINY, environment, train_arguments

CONFIGS = ROOT / "configs"
RIVALS = {path.stem.removeprefix("rival_"): path for path in sorted(CONFIGS.glob("rival_*.yaml"))}
CLASSES = {
    "mean_pool": "MeanPoolMIL", "gated_attention": "GatedAttentionMIL", "monai_mil": "MonaiMIL",
    "volume_net": "VolumeNet",
}  # fmt: skip
TINY_VOLUME = {
    "network_def::encoder::encoder::layers": [1, 1, 1, 1],
    "network_def::encoder::encoder::block_inplanes": [8, 8, 16, 32],
    "network_def::num_features": 32,
}


def cohort_for(rival, cohort, folder):
    """The tiny cohort with a thin 3D encoder where one is needed; at 32 pixels its last plane would be one value."""
    own = dict(TINY) if rival != "volume_net" else {**TINY, "image_size": [40, 40]}
    (folder / "tiny.yaml").write_text(yaml.safe_dump({**own, "max_epochs": 2, "cache_dir": str(folder / "cache")}))
    # A part of the network is changed before evaluate.yaml takes the whole of it from the weights.
    (folder / "thin.yaml").write_text(yaml.safe_dump(TINY_VOLUME if rival == "volume_net" else {}))
    for name in ("images", "datalist.json"):
        (folder / name).symlink_to(cohort / name)
    return folder


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))


def test_there_is_an_overlay_for_each():
    assert RIVALS.keys() == CLASSES.keys()


@pytest.mark.parametrize("rival", CLASSES)
def test_an_overlay_changes_the_network_and_what_its_loss_needs(rival):
    overlay = yaml.safe_load(RIVALS[rival].read_text())
    needed = {"network_def", "instance_weight", "lambda_entropy", "lambda_confidence", "best_after_annealing"}
    assert overlay.keys() - needed == ({"sampling_strategy", "norm"} if rival == "volume_net" else set())
    parser = ConfigParser()
    parser.read_config([str(CONFIGS / "train.yaml"), str(RIVALS[rival])])
    parser.update({"bundle_root": str(ROOT), "checked": "$bundle.check_config('train')"})
    parser.get_parsed_content("imports")
    with pytest.raises(RuntimeError) as error:
        parser.get_parsed_content("checked")
    # This test's own key, and nothing else.
    assert str(error.value.__cause__) == "there is no setting 'checked'"
    network = Recipe.of_parser(parser, keys=("network_def",)).build("network_def")
    assert type(network).__name__ == CLASSES[rival]


def check(rival, cohort, folder, monai) -> Path:
    """Train, evaluate and infer; the trained weights."""
    own, output = cohort_for(rival, cohort, folder), folder / "run"
    overlays = [f"configs/rival_{rival}.yaml", str(own / "thin.yaml")]
    monai(*train_arguments(own, output, *overlays))
    epochs = rows_of(output / "epochs.csv")
    assert len(epochs) == 2
    assert all(row["val_auc"] and row["train_nll_var"] for row in epochs)
    assert (epochs[1]["flip_rate"] == "") == (rival == "volume_net")  # which tells no slices apart
    exact = ["--amp", "false"]  # evaluation reads the cache, whose rounding bfloat16 would make larger
    monai(*train_arguments(own, output, *overlays, "configs/evaluate.yaml"), *exact)
    tested = {row["case"]: row for row in rows_of(output / "test" / "predictions.csv")}
    assert len(tested) == 8
    scores = json.loads((output / "test" / "metrics.json").read_text())["scores"]
    assert scores.keys() >= {"auc", "accuracy"}
    weights = str(output / "model.pt")
    given = ["--dataset_dir", str(own), "--datalist", str(own / "datalist.json"), "--weights", weights]
    given += ["--output_dir", str(folder / "inference"), "--device", "cpu", "--progress", "false"]
    monai("run", "--config_file", "configs/inference.yaml", *given, *exact)
    inferred = {row["case"]: row for row in rows_of(folder / "inference" / "predictions.csv")}
    assert inferred.keys() == tested.keys()
    assert all(bool(row["key_slice_index"]) == (rival != "volume_net") for row in inferred.values())
    columns = [name for name in next(iter(tested.values())) if name.startswith("probability_")]
    assert columns
    for case, row in inferred.items():
        expected = [float(tested[case][name]) for name in columns]
        assert [float(row[name]) for name in columns] == pytest.approx(expected, abs=1e-4)
    return output / "model.pt"


def test_gated_attention_trains_evaluates_and_infers(cohort, tmp_path, monai):
    weights = check("gated_attention", cohort, tmp_path, monai)
    assert "content.0.weight" in torch.load(weights, weights_only=True)["model"]


@pytest.mark.slow
@pytest.mark.parametrize("rival", CLASSES)
def test_each_goes_all_the_way_to_a_package(rival, cohort, tmp_path, monai):
    weights = check(rival, cohort, tmp_path, monai)
    command = [sys.executable, "-m", "bundle.package", str(weights), str(tmp_path / "package")]
    subprocess.run(command, check=True, cwd=ROOT, env=environment(), capture_output=True)
    (package,) = (path for path in (tmp_path / "package").iterdir() if path.is_dir())
    own = tmp_path / "alone"
    shutil.copytree(package, own)
    given = ["--dataset_dir", str(tmp_path), "--datalist", str(tmp_path / "datalist.json"), "--progress", "false"]
    done = subprocess.run(
        [sys.executable, "-m", "monai.bundle", "run", "--config_file", "configs/inference.json", *given,
         "--device", "cpu", "--amp", "false", "--output_dir", str(tmp_path / "from_package")],
        cwd=own, env={**environment(), "PYTHONPATH": str(own)}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "from_package" / "predictions.csv").read_text() == (
        tmp_path / "inference" / "predictions.csv"
    ).read_text()
