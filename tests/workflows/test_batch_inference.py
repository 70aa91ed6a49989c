"""An archive in one run, in several processes, in runs at the same time, and after a kill."""

import csv
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time

import nibabel as nib
import numpy as np
import pytest
import torch

from bundle.data.identity import END_BYTES
from bundle.data.phantom import make_case
from bundle.data.phantom_files import write_dicom

from .conftest import ROOT, environment
from .test_evaluate_and_infer import evaluate_arguments, infer_arguments, table


@pytest.fixture
def archive(cohort, tmp_path):
    """24 good scans, and two among them that are none."""
    folder = tmp_path / "archive"
    shutil.copytree(cohort / "images", folder)
    for name in ("c03x.nii.gz", "c17x.nii.gz"):
        (folder / name).write_text("this is no image")
    return folder


def started(arguments, log, *launcher):
    """The command in the background; what it says goes to a file."""
    with log.open("w") as file:
        command = [*(launcher or (sys.executable,)), "-m", "monai.bundle", *arguments, "--case_names", "path"]
        return subprocess.Popen(command, cwd=ROOT, env=environment(), stdout=file, stderr=subprocess.STDOUT)


def records(output):
    return {path.name: json.loads(path.read_text()) for path in (output / "cases").glob("*.json")}


def told(output):
    return [json.loads(line)["case"] for line in (output / "cases.jsonl").read_text().splitlines()]


def assert_same_results(output, reference, tolerance):
    """Same cases in the same order, and the same numbers."""
    rows, expected = table(output / "predictions.csv"), table(reference / "predictions.csv")
    assert [(row["case"], row["status"]) for row in rows] == [(row["case"], row["status"]) for row in expected]
    found = records(output)
    assert found.keys() == records(reference).keys()
    for name, record in records(reference).items():
        assert found[name]["probabilities"] == pytest.approx(record["probabilities"], abs=tolerance)
        for one, other in zip(found[name]["slices"], record["slices"], strict=True):
            assert one["index"] == other["index"]
            for key in ("weight", "attention", "score"):
                assert one[key] == pytest.approx(other[key], abs=tolerance)


def spoil(scan):
    """Other bytes in the middle, and no sign of it: whoever reads the whole scan will refuse it."""
    status, content = scan.stat(), bytearray(scan.read_bytes())
    assert len(content) > 3 * END_BYTES
    content[END_BYTES:-END_BYTES] = b"x" * (len(content) - 2 * END_BYTES)
    scan.write_bytes(content)
    os.utime(scan, ns=(status.st_atime_ns, status.st_mtime_ns))


def test_processes_and_batches_give_the_same_results_and_a_second_run_reads_nothing(archive, trained, tmp_path, monai):
    for number, scan in enumerate(sorted(archive.glob("c0?.nii.gz"))):
        noise = np.random.default_rng(number).integers(0, 2**15, (96, 96, 12), np.int16)
        nib.save(nib.Nifti1Image(noise, np.diag([2.0, 2.0, 5.0, 1.0])), scan)
    outputs = {name: tmp_path / name for name in ("one", "processes")}
    arguments = {
        name: [*infer_arguments(archive, trained / "model.pt", output), "--amp", "false"]
        for name, output in outputs.items()
    }
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    several = started([*arguments["processes"], "--batch_size", "3"], tmp_path / "log", *torchrun)
    monai(*arguments["one"], "--case_names", "path", status=3)
    log = (several.wait(240), (tmp_path / "log").read_text())[1]
    assert several.returncode == 1, log  # torchrun's own, for the 3 of the first process
    assert log.count("26 of 26 cases are in predictions.csv") == 2
    assert log.count("24 cases classified, 2 refused") == 1
    assert_same_results(outputs["processes"], outputs["one"], 1e-5)
    assert sorted(told(outputs["processes"])) == sorted(told(outputs["one"]))

    before = {path: path.stat().st_mtime_ns for path in (outputs["one"] / "cases").iterdir()}
    for scan in archive.glob("c0?.nii.gz"):
        spoil(scan)
    (archive / "c17x.nii.gz").write_text("this is no image either")
    done = monai(*arguments["one"], "--case_names", "path", status=3)
    after = {path: path.stat().st_mtime_ns for path in (outputs["one"] / "cases").iterdir()}
    assert {path.name for path in after if after[path] != before.get(path)} == {"c17x.nii.gz.json"}
    assert "25 of 26 cases are done already" in done.stdout
    assert "24 cases classified, 2 refused" in done.stdout


@pytest.mark.slow
def test_other_weights_do_all_anew(archive, trained, tmp_path, monai):
    for scan in archive.glob("c[12]*"):
        scan.unlink()
    content = torch.load(trained / "model.pt", weights_only=True)
    content["model"]["bag_classifier.bias"] += 1.0
    torch.save(content, tmp_path / "other.pt")
    found = []
    for weights in (trained / "model.pt", tmp_path / "other.pt"):
        monai(*infer_arguments(archive, weights, tmp_path / "out"), status=3)
        found.append(records(tmp_path / "out"))
    assert found[0].keys() == found[1].keys()
    for name, record in found[0].items():
        assert record["made_from"]["weights"] != found[1][name]["made_from"]["weights"]
        assert record["made_from"]["scan"] == found[1][name]["made_from"]["scan"]


def test_a_killed_run_goes_on_and_two_at_a_time_share_what_is_left(archive, trained, tmp_path):
    for number in range(4):
        for scan in sorted(archive.glob("c??.nii.gz")):
            shutil.copy(scan, archive / f"more_{number}_{scan.name}")
    total, output = len(list(archive.iterdir())), tmp_path / "out"
    arguments = infer_arguments(archive, trained / "model.pt", output)
    run, stream = started(arguments, tmp_path / "log"), output / "cases.jsonl"
    while run.poll() is None and (not stream.exists() or len(stream.read_bytes().splitlines()) < 3):
        time.sleep(0.001)
    run.send_signal(signal.SIGKILL)
    assert run.wait() == -signal.SIGKILL, (tmp_path / "log").read_text()
    early = {path: path.read_bytes() for path in (output / "cases").glob("[!.]*.json")}
    assert 0 < len(early) < total
    assert not (output / "predictions.csv").exists()

    both = [started(arguments, tmp_path / f"log{i}") for i in range(2)]
    assert [one.wait(240) for one in both] == [3, 3], [(tmp_path / f"log{i}").read_text() for i in range(2)]
    assert len(told(output)) == len(set(told(output))) == total  # nobody did what another had done
    assert len(records(output)) == len(table(output / "predictions.csv")) == total
    assert all(path.read_bytes() == content for path, content in early.items())
    assert sorted(path.name for path in output.iterdir()) == [
        ".lock", "cases", "cases.jsonl", "key_slices.png", "predictions.csv"
    ]  # fmt: skip
    assert not list((output / "cases").glob(".*"))


def test_a_full_disk_ends_a_run_with_a_sentence_and_the_next_goes_on(archive, trained, tmp_path, monai):
    for scan in archive.glob("c[12]*"):
        scan.unlink()
    arguments = infer_arguments(archive, trained / "model.pt", tmp_path / "out")
    done = subprocess.run(
        [sys.executable, "-m", "monai.bundle", *arguments],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000)),
    )
    assert done.returncode == 1
    (sentence,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert re.fullmatch(r"error: cannot write case-\w+\.json: File too large; free space in .*/out/cases", sentence)
    assert "Traceback" not in done.stderr
    assert list((tmp_path / "out" / "cases").iterdir()) == []
    monai(*arguments, status=3)
    assert len(table(tmp_path / "out" / "predictions.csv")) == 11


def test_results_lie_beside_dicom_cases_and_never_in_one(trained, tmp_path, monai):
    scans = tmp_path / "scans"
    for number in (1, 2):
        write_dicom(make_case(3, number), scans / f"series_{number}")
    before = sorted(scans.rglob("*"))
    for output in (scans / "series_1", scans / "series_2" / "out"):
        done = monai(*infer_arguments(scans, trained / "model.pt", output), status=1)
        assert "error: output_dir is, or lies in, a folder of DICOM images that is to be classified" in done.stderr
        assert "Traceback" not in done.stderr
        assert sorted(scans.rglob("*")) == before
    for done_before in (0, 2):
        done = monai(*infer_arguments(scans, trained / "model.pt", scans))
        assert f"{done_before} of 2 cases are done already" in done.stdout + done.stderr


@pytest.mark.parametrize("workers", [pytest.param("0", marks=pytest.mark.slow), "2"])
def test_an_interrupted_run_ends_at_once_and_leaves_nothing_behind(archive, trained, tmp_path, workers):
    scans = sorted(archive.glob("c??.nii.gz"))
    for number in range(40):  # so many that a busy machine cannot end them before the signal comes
        for scan in scans:
            shutil.copy(scan, archive / f"more_{number}_{scan.name}")
    output = tmp_path / "out"
    arguments = [*infer_arguments(archive, trained / "model.pt", output), "--num_workers", workers]
    log = tmp_path / "log"
    with log.open("w") as file:
        command = [sys.executable, "-m", "monai.bundle", *arguments]
        run = subprocess.Popen(
            command, cwd=ROOT, env=environment(), stdout=file, stderr=subprocess.STDOUT, start_new_session=True,
            # A shell's background jobs ignore it, and so would what they start.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )  # fmt: skip
    stream = output / "cases.jsonl"
    while run.poll() is None and (not stream.exists() or not stream.read_bytes()):
        time.sleep(0.001)
    os.killpg(run.pid, signal.SIGINT)  # as a terminal does
    begun = time.monotonic()
    assert run.wait(30) != 0
    assert time.monotonic() - begun < 15
    text = log.read_text()
    assert text.rstrip().endswith("KeyboardInterrupt")
    assert text.count("Traceback") == 1
    with pytest.raises(ProcessLookupError):
        os.killpg(run.pid, 0)  # no worker is left
    with (output / "cases.jsonl").open() as file:
        assert 0 < len(file.readlines()) < 40 * len(scans)
    assert not list((output / "cases").glob(".part-*"))


@pytest.mark.slow
def test_evaluation_in_batches_equals_evaluation_one_by_one(cohort, trained, tmp_path, monai):
    found = {}
    for size in ("1", "3"):
        shutil.copytree(trained, tmp_path / size, ignore=shutil.ignore_patterns("test"))
        monai(
            *evaluate_arguments(cohort, tmp_path / size), "--eval_batch_size", size, "--resamples", "20",
            "--amp", "false", "--cache_dir", str(tmp_path / "cache"),
        )  # fmt: skip
        with (tmp_path / size / "test" / "predictions.csv").open() as file:
            found[size] = list(csv.DictReader(file))
    assert [row["case"] for row in found["1"]] == [row["case"] for row in found["3"]]
    for one, other in zip(found["1"], found["3"], strict=True):
        assert float(one["probability_positive"]) == pytest.approx(float(other["probability_positive"]), abs=1e-5)
    metrics = [json.loads((tmp_path / size / "test" / "metrics.json").read_text()) for size in found]
    assert metrics[0]["scores"]["auc"] == metrics[1]["scores"]["auc"]
    assert metrics[0]["key_slices"]["score"]["hit_1"] == metrics[1]["key_slices"]["score"]["hit_1"]
