"""A cohort that trains in seconds, and the real command line."""

import csv
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import yaml

from tests.command import ROOT, run_module

TINY = {
    "image_size": [32, 32],
    "bag_size": 6,
    "max_epochs": 3,
    "warmup_epochs": 1,
    "batch_size": 4,
    "lr": 1.0e-3,
    "classifier_lr": 1.0e-3,
    "stability_cases": 4,
    "num_features": 32,
    "encoder::layers": [1, 1, 1, 1],
    "encoder::block_inplanes": [8, 8, 16, 32],
    "device": "cpu",
    "progress": False,
}


def make_volume(seed: int, label: int, slices: int = 10) -> tuple[np.ndarray, list[int]]:
    """Noise in a disc; a positive volume has a bright square in three slices."""
    rng = np.random.default_rng(seed)
    x, y = np.mgrid[-1:1:40j, -1:1:36j]
    volume = 100 + 20 * rng.standard_normal((40, 36, slices))
    truth = [0] * slices
    if label:
        start = int(rng.integers(1, slices - 4))
        volume[14:24, 12:22, start : start + 3] += 150
        truth[start : start + 3] = [1, 1, 1]
    volume[x**2 + y**2 > 0.9] = 0
    return volume.astype(np.int16), truth


@pytest.fixture(scope="session")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with images/, volumes.csv, slices.csv, datalist.json and tiny.yaml."""
    folder = tmp_path_factory.mktemp("cohort")
    (folder / "images").mkdir()
    cases, slices = [["case", "patient", "image", "label"]], [["case", "k", "lesion"]]
    for number in range(24):
        volume, truth = make_volume(number, number % 2, 8 + number % 5)
        name = f"images/c{number:02d}.nii.gz"
        nib.save(nib.Nifti1Image(volume, np.diag([2.0, 2.0, 5.0, 1.0])), folder / name)
        cases.append([f"c{number:02d}", f"p{number:02d}", name, str(number % 2)])
        slices += [[f"c{number:02d}", str(k), str(t)] for k, t in enumerate(truth)]
    for name, rows in (("volumes.csv", cases), ("slices.csv", slices)):
        with (folder / name).open("w", newline="") as file:
            csv.writer(file).writerows(rows)
    command = [sys.executable, "-m", "bundle.data.make_datalist", str(folder / "volumes.csv")]
    command += ["--out", str(folder / "datalist.json"), "--folds", "3", "--slices", str(folder / "slices.csv")]
    command += ["--slice_case", "case", "--slice_index", "k", "--slice_label", "lesion"]
    subprocess.run(command, check=True, cwd=ROOT, env=environment(), capture_output=True)
    (folder / "tiny.yaml").write_text(yaml.safe_dump({**TINY, "cache_dir": str(folder / "cache")}))
    return folder


def environment() -> dict[str, str]:
    """Of a user's shell: no package installed, one thread so that parallel tests do not fight for cores."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "MONAI_FAIL_ON_DUPLICATE_CONFIG": "1"}


Command = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def monai() -> Command:
    """Runs `python -m monai.bundle …` in the repository root and gives what it printed; checks the exit status."""

    def run(*arguments: str, status: int = 0, timeout: float = 240) -> subprocess.CompletedProcess[str]:
        done = run_module("monai.bundle", *arguments, environment=environment(), timeout=timeout)
        assert done.returncode == status, f"exit status {done.returncode}\n{done.stdout[-3000:]}\n{done.stderr[-5000:]}"
        return done

    return run


def train_arguments(cohort: Path, output: Path, *overlays: str) -> list[str]:
    """Of a training run on the tiny cohort."""
    files = ["configs/train.yaml", *overlays, str(cohort / "tiny.yaml")]
    return ["run", "--config_file", str(files), "--dataset_dir", str(cohort), "--output_dir", str(output)]


@pytest.fixture(scope="session")
def trained(cohort: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output folder of a finished training run."""
    output = tmp_path_factory.mktemp("trained") / "run"
    command = [sys.executable, "-m", "monai.bundle", *train_arguments(cohort, output)]
    subprocess.run(command, check=True, cwd=ROOT, env=environment(), capture_output=True, timeout=240)
    return output
