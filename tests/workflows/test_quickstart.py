"""The embedded cohort through the whole path: it is learned, and only from what it should be."""

import csv
import json
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from monai.bundle import ConfigParser
from monai.transforms import Compose

from bundle.data.phantom import make_case
from bundle.data.phantom_files import make_cohort, write_dicom, write_nifti

from .conftest import ROOT, environment


@pytest.mark.parametrize(("number", "modality"), [(1, "mr"), (2, "mr"), (3, "ct"), (4, "mr")])
def test_one_case_written_both_ways_gives_one_bag(number, modality, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    parser = ConfigParser()
    parser.read_config(["configs/train.yaml", "configs/quickstart.yaml"])
    preparation = Compose(parser.get_parsed_content("preparation"))
    case = make_case(11, number, modality)
    truth = {"series": write_dicom(case, tmp_path / "series")}
    truth["volume.nii.gz"] = write_nifti(case, tmp_path / "volume.nii.gz")
    first, second = (
        preparation({"case": "a", "image": str(tmp_path / name), "slice_label": list(truth[name])})
        for name in ("series", "volume.nii.gz")
    )
    assert first["image"].shape == second["image"].shape
    torch.testing.assert_close(first["image"], second["image"], atol=1e-4, rtol=0)
    torch.testing.assert_close(first["slice_position"], second["slice_position"], atol=1e-2, rtol=0)
    assert first["slice_label"].tolist() == second["slice_label"].tolist()
    assert len(first["slice_uid"]) == len(first["image"])
    assert second["slice_uid"] is None


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_one_command_makes_a_model_that_finds_lesions(seed, tmp_path):
    out = tmp_path / "quick start"
    command = ["bash", str(ROOT / "scripts" / "run"), "--seed", str(seed), "--output", "quick start"]
    done = subprocess.run(command, cwd=tmp_path, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    for name in ("metrics.json", "predictions.csv", "curves.png", "key_slices.png"):
        assert (out / name).stat().st_size > 0
        assert f"{out}/{name}" in done.stdout
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["scores"]["auc"]["value"] >= 0.90
    assert metrics["key_slices"]["score"]["hit_1"] >= 0.80
    with (out / "predictions.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert rows
    assert all(row["status"] == "accepted" and row["key_slice_sop_instance_uid"] for row in rows)
    before = (out / "model.pt").stat().st_mtime_ns
    again = subprocess.run(command, cwd=tmp_path, env=environment(), capture_output=True, text=True)
    assert again.returncode == 0
    kept = [Path(line.partition(": ")[2]).name for line in again.stdout.splitlines() if line.startswith("done before")]
    assert kept == ["cohort", "metrics.json", "predictions.csv"]
    assert (out / "model.pt").stat().st_mtime_ns == before


@pytest.mark.slow
def test_shuffled_labels_teach_nothing(tmp_path, monai):
    """Trained on shuffled labels, the held-out (shuffled) labels are guessed: AUC 0.5 within 0.1.

    240 held-out cases make the standard error of a guess 0.037.
    """
    make_cohort(tmp_path / "cohort", cases=360, seed=5, unseen=0, progress=False)
    with (tmp_path / "cohort" / "volumes.csv").open() as file:
        rows = list(csv.DictReader(file))
    labels = np.random.default_rng(5).permutation([int(row["label"]) for row in rows])
    cases = [
        {"case": row["case"], "image": row["image"], "label": int(label), "patient": row["patient"]}
        for row, label in zip(rows, labels, strict=True)
    ]
    names = [case["case"] for case in cases]
    fold = {"training": names[:96], "validation": names[96:120], "test": names[120:]}
    datalist = {"format": 1, "class_names": ["distractors only", "lesion"], "seed": 5, "num_folds": 1, "cases": cases,
                "folds": [fold]}  # fmt: skip
    (tmp_path / "datalist.json").write_text(json.dumps(datalist))
    arguments = ["--dataset_dir", str(tmp_path / "cohort"), "--datalist", str(tmp_path / "datalist.json"),
                 "--output_dir", str(tmp_path / "out"), "--stability_interval", "0", "--progress", "false",
                 "--cache_dir", str(tmp_path / "cache")]  # fmt: skip
    files = ["configs/train.yaml", "configs/quickstart.yaml"]
    monai("run", "--config_file", str(files), *arguments, timeout=1800)
    monai("run", "--config_file", str([*files, "configs/evaluate.yaml"]), *arguments, timeout=900)
    auc = json.loads((tmp_path / "out" / "test" / "metrics.json").read_text())["scores"]["auc"]["value"]
    assert abs(auc - 0.5) <= 0.1
