"""Training by several processes through the command line: as one process would, also after one of them was killed."""

import ast
import csv
import os
import shutil
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

# Hard selection, a scorer that no term teaches and batch norm: what several processes get wrong most easily. The last
# batch of an epoch is one bag for two processes.
OVERLAYS = ("configs/founding_before.yaml", "configs/multi_gpu_train.yaml")
# Adam makes a whole step of a gradient that is 0 but for rounding, which differs with the number of processes: rates
# are a tenth of the overlay's, so that what comes of it over the epochs stays far below what is compared to.
SETTINGS = {"amp": False, "dropout": 0.0, "batch_size": 7, "max_epochs": 4, "lr": 1e-4, "classifier_lr": 1e-4}


def words(settings):
    return [word for key, value in settings.items() for word in (f"--{key}", str(value))]


def log(output: Path) -> list[dict[str, float]]:
    with (output / "epochs.csv").open() as file:
        return [{key: float(value or "nan") for key, value in row.items()} for row in csv.DictReader(file)]


@pytest.fixture
def in_this_process(monkeypatch):
    """Runs a workflow without the seconds that a new Python takes."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)  # put back what plain_errors sets

    def run(arguments, **settings):
        _, _, files, *rest = arguments
        given = {key.removeprefix("--"): value for key, value in zip(rest[::2], rest[1::2], strict=True)}
        monai.bundle.run(config_file=ast.literal_eval(files), logging_file=False, **given, **settings)

    return run


def torchrun(arguments):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "-m", "monai.bundle", *arguments]
    return subprocess.Popen(
        command, cwd=ROOT, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True,
    )  # fmt: skip


def children(process) -> list[int]:
    found = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    return [int(pid) for pid in found.read_text().split()]


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds the processes of torchrun in /proc")
def test_two_processes_train_as_one_does_and_go_on_after_a_kill(cohort, tmp_path, in_this_process):
    settings = {**SETTINGS, "cache_dir": str(tmp_path / "cache")}
    alone, output, goes_on_alone = (tmp_path / name for name in ("alone", "two", "goes_on_alone"))
    in_this_process(train_arguments(cohort, alone, OVERLAYS[0]), **settings)
    arguments = [*train_arguments(cohort, output, *OVERLAYS), *words(settings)]

    killed = torchrun(arguments)
    try:
        deadline = time.monotonic() + 120
        while not (output / "checkpoint.pt").exists() and time.monotonic() < deadline and killed.poll() is None:
            time.sleep(0.005)
        second = children(killed)[-1]
        os.kill(second, signal.SIGKILL)
        _, said = killed.communicate(timeout=60)  # the other one must not wait for it for ever
    finally:
        if killed.poll() is None:
            os.killpg(killed.pid, signal.SIGKILL)
    assert killed.returncode != 0, said[-3000:]
    assert 1 <= len(log(output)) < 4, "the run ended before it could be killed"
    shutil.copytree(output, goes_on_alone)

    done = torchrun(arguments)
    told, said = done.communicate(timeout=240)
    assert done.returncode == 0, said[-5000:]
    in_this_process(train_arguments(cohort, goes_on_alone, OVERLAYS[0]), **settings)
    for line in ("going on after epoch", "INFO epoch 4/4", "INFO best epoch"):
        assert told.count(line) == 1, told  # the first process alone tells

    expected = log(alone)
    assert [row["epoch"] for row in expected] == [1, 2, 3, 4]
    for other in (output, goes_on_alone):
        rows = log(other)
        assert len(rows) == 4
        for row, wanted in zip(rows, expected, strict=True):
            assert row == pytest.approx(wanted, abs=1e-4, rel=1e-4, nan_ok=True)
    assert sorted(path.name for path in output.iterdir()) == sorted(path.name for path in alone.iterdir())
    assert len(list(output.glob("**/model.pt"))) == 1
    assert len(list((output / "events").iterdir())) <= 2  # a file a run, not one a process
    first, second = (torch.load(path / "model.pt", weights_only=True) for path in (alone, output))
    assert (first["recipe_hash"], first["epoch"]) == (second["recipe_hash"], second["epoch"])
    assert first["model"].keys() == second["model"].keys()
    for name, value in first["model"].items():
        torch.testing.assert_close(second["model"][name], value, atol=1e-3, rtol=1e-3)
    assert int(first["model"]["encoder.bn1.num_batches_tracked"]) == 2 * first["epoch"]

    in_this_process(train_arguments(cohort, output, OVERLAYS[0], "configs/evaluate.yaml"), figure_cases=0, resamples=10)
    assert (output / "test" / "metrics.json").is_file()


@pytest.mark.parametrize(
    ("variables", "settings", "sentence"),
    [
        ({}, {}, "start them with torchrun --nproc_per_node=N -m monai.bundle run"),
        ({"RANK": "0", "LOCAL_RANK": "0"}, {"lrr": 1.0}, "there is no setting 'lrr'; did you mean 'lr'?"),
        ({"RANK": "0", "LOCAL_RANK": "0"}, {"progress": "no"}, "progress must be true or false, not 'no'"),
        ({}, {"device": "cpu"}, "start them with torchrun"),
    ],
)
def test_what_is_wrong_is_one_sentence(cohort, tmp_path, monkeypatch, in_this_process, variables, settings, sentence):
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(Exception) as error:  # noqa: PT011 - MONAI wraps it; the sentence is checked
        in_this_process(train_arguments(cohort, tmp_path / "run", "configs/multi_gpu_train.yaml"), **settings)
    found = input_error_behind(error.value)
    assert found is not None, error.value
    assert sentence in str(found)
    assert not (tmp_path / "run").exists()
