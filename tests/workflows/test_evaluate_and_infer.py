"""Evaluation and inference through the command line, on good and on bad input."""

import csv
import json
import shutil
import subprocess
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from pydicom import dcmread

from bundle.data.phantom import make_case
from bundle.data.phantom_files import write_dicom

from .conftest import ROOT, environment, make_volume, train_arguments


def table(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))


def evaluate_arguments(cohort: Path, output: Path) -> list[str]:
    arguments = train_arguments(cohort, output)
    files = ["configs/train.yaml", "configs/evaluate.yaml", str(cohort / "tiny.yaml")]
    arguments[arguments.index("--config_file") + 1] = str(files)
    return arguments


def infer_arguments(scans: Path, weights: Path, output: Path) -> list[str]:
    return ["run", "--config_file", "configs/inference.yaml", "--dataset_dir", str(scans), "--weights", str(weights),
            "--output_dir", str(output), "--device", "cpu", "--progress", "false"]  # fmt: skip


@pytest.fixture
def scans(tmp_path: Path) -> Path:
    """A folder with two good volumes and one of each kind of bad file."""
    folder = tmp_path / "scans"
    folder.mkdir()
    affine = np.diag([2.0, 2.0, 5.0, 1.0])
    for name, label in (("good_a", 0), ("good_b", 1)):
        nib.save(nib.Nifti1Image(make_volume(100 + label, label)[0], affine), folder / f"{name}.nii.gz")
    (folder / "no_image.nii.gz").write_text("this is no image")
    whole = (folder / "good_a.nii.gz").read_bytes()
    (folder / "truncated.nii.gz").write_bytes(whole[: len(whole) // 2])
    nib.save(nib.Nifti1Image(np.ones((40, 36), np.int16), affine), folder / "flat_2d.nii.gz")
    volume = make_volume(5, 0)[0].astype(np.float32)
    volume[20, 20, 3] = np.nan
    nib.save(nib.Nifti1Image(volume, affine), folder / "nan.nii.gz")
    nib.save(nib.Nifti1Image(np.full((40, 36, 9), 7, np.int16), affine), folder / "constant.nii.gz")
    two = np.stack([make_volume(6, 0)[0]] * 2, -1)
    nib.save(nib.Nifti1Image(two, affine), folder / "two_channels.nii.gz")
    (folder / "notes.txt").write_text("not a scan")
    return folder


def test_evaluation_writes_every_case_and_every_figure(cohort, trained, monai):
    done = monai(*evaluate_arguments(cohort, trained))
    results = trained / "test"
    metrics = json.loads((results / "metrics.json").read_text())
    rows = table(results / "predictions.csv")
    datalist = json.loads((cohort / "datalist.json").read_text())
    assert {row["case"] for row in rows} == set(datalist["folds"][0]["test"])
    assert len(list((results / "cases").glob("*.json"))) == len(rows) == metrics["counts"]["cases"]
    names = {"auc", "auprc", "accuracy", "balanced_accuracy", "f1_macro", "sensitivity", "specificity", "mcc", "brier",
             "nll", "ece"}  # fmt: skip
    assert names <= metrics["scores"].keys()
    for name in names:
        entry = metrics["scores"][name]
        assert entry["low"] <= entry["high"], name
    truth = {case["case"]: case["label"] for case in datalist["cases"]}
    accuracy = np.mean([int(row["prediction"]) == truth[row["case"]] for row in rows])
    assert metrics["scores"]["accuracy"]["value"] == pytest.approx(accuracy)
    assert {"hit_1", "hit_3", "instance_auc", "distance_mm_mean"} <= metrics["key_slices"]["score"].keys()
    assert (results / "key_slices.png").stat().st_size > 10_000
    assert "auc" in done.stdout


def test_evaluation_takes_the_network_from_the_weights_and_refuses_other_settings(cohort, trained, monai, tmp_path):
    shutil.copytree(trained, tmp_path / "run", ignore=shutil.ignore_patterns("test"))
    done = monai(*evaluate_arguments(cohort, tmp_path / "run"), "--scorer", "separate", status=1)
    assert "scorer is 'separate' in the config, but the weights were trained with 'tied'" in done.stderr
    assert not (tmp_path / "run" / "test").exists()


def test_inference_says_what_became_of_every_file(scans, trained, tmp_path, monai):
    output = tmp_path / "out"
    done = monai(*infer_arguments(scans, trained / "model.pt", output), "--case_names", "path", status=3)
    rows = {row["case"]: row for row in table(output / "predictions.csv")}
    reasons = {case: row["reason_code"] for case, row in rows.items() if row["status"] == "refused"}
    assert set(rows) - set(reasons) == {"good_a.nii.gz", "good_b.nii.gz"}
    assert set(reasons) == {"no_image.nii.gz", "truncated.nii.gz", "flat_2d.nii.gz", "nan.nii.gz", "constant.nii.gz",
                            "two_channels.nii.gz"}  # fmt: skip
    assert reasons["constant.nii.gz"] == "constant_volume"
    assert all(row["reason"] for row in rows.values() if row["status"] == "refused")
    assert all(row["probability_positive"] == "" for row in rows.values() if row["status"] == "refused")
    assert "6 refused" in done.stdout
    assert "1 files that are no scans were passed over" in done.stdout
    record = json.loads((output / "cases" / "good_b.nii.gz.json").read_text())
    assert sum(entry["weight"] for entry in record["slices"]) == pytest.approx(1, abs=1e-5)
    assert record["key_slices"][0] == max(record["slices"], key=lambda entry: entry["weight"])
    assert [entry["position_mm"] for entry in record["slices"]] == [5.0 * entry["index"] for entry in record["slices"]]


def test_inference_repeats_exactly_and_names_nobody(scans, trained, tmp_path, monai):
    for name in ("no_image", "truncated", "flat_2d", "nan", "constant", "two_channels"):
        (scans / f"{name}.nii.gz").unlink()
    outputs = [tmp_path / "a", tmp_path / "b"]
    for workers, output in zip(("0", "2"), outputs, strict=True):
        done = monai(*infer_arguments(scans, trained / "model.pt", output), "--num_workers", workers)
        assert "good_a" not in (output / "predictions.csv").read_text() + done.stdout + done.stderr
    first, second = ((output / "predictions.csv").read_text() for output in outputs)
    assert first == second


def test_dicom_series_are_classified_down_to_the_instance(trained, tmp_path, monai):
    """A good series, one that lacks a slice, and a canary in the patient's name that must turn up nowhere."""
    scans = tmp_path / "scans"
    for number in (1, 2):
        write_dicom(make_case(3, number), scans / f"series_{number}")
    for path in (scans / "series_1").iterdir():
        dataset = dcmread(path)
        dataset.PatientName = dataset.PatientID = dataset.StudyDescription = "CANARY"
        dataset.save_as(path)
    in_order = sorted((scans / "series_2").iterdir(), key=lambda path: dcmread(path).ImagePositionPatient[2])
    in_order[len(in_order) // 2].unlink()
    done = monai(*infer_arguments(scans, trained / "model.pt", tmp_path / "out"), "--case_names", "path", status=3)
    good, bad = table(tmp_path / "out" / "predictions.csv")
    assert (good["case"], good["status"], bad["case"], bad["status"]) == ("series_1", "accepted", "series_2", "refused")
    positions = {}
    for path in (scans / "series_1").iterdir():
        dataset = dcmread(path)
        row, column = np.array(dataset.ImageOrientationPatient, float).reshape(2, 3)
        positions[dataset.SOPInstanceUID] = np.cross(row, column) @ np.array(dataset.ImagePositionPatient, float)
    record = json.loads((tmp_path / "out" / "cases" / "series_1.json").read_text())
    ranked = sorted(positions, key=lambda uid: positions[uid])
    assert all(ranked[entry["index"]] == entry["sop_instance_uid"] for entry in record["slices"])
    written = [path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert not any(b"CANARY" in content for content in [*written, done.stdout.encode(), done.stderr.encode()])


def test_scripts_predict_is_one_line_from_anywhere(scans, trained, tmp_path):
    command = ["bash", str(ROOT / "scripts" / "predict"), "scans", "--model", str(trained / "model.pt")]
    done = subprocess.run(command, cwd=tmp_path, env=environment(), capture_output=True, text=True)
    assert done.returncode == 3, done.stderr
    rows = [line.split()[1] for line in done.stdout.splitlines() if line.startswith("case-")]
    assert (rows.count("accepted"), rows.count("refused")) == (2, 6)
    assert len(table(tmp_path / "predictions" / "predictions.csv")) == 8
    done = subprocess.run(
        [*command[:2], "nowhere", *command[3:]], cwd=tmp_path, env=environment(), capture_output=True, text=True
    )
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == "error: the folder nowhere does not exist"


def test_bags_of_one_slice_are_classified(trained, tmp_path, monai):
    """A volume of which all slices but one are blank."""
    scans = tmp_path / "scans"
    scans.mkdir()
    volume = make_volume(1, 1)[0]
    volume[..., :4] = 0
    volume[..., 5:] = 0
    nib.save(nib.Nifti1Image(volume, np.diag([2.0, 2.0, 5.0, 1.0])), scans / "one.nii.gz")
    monai(*infer_arguments(scans, trained / "model.pt", tmp_path / "out"))
    (record,) = [json.loads(path.read_text()) for path in (tmp_path / "out" / "cases").glob("*.json")]
    (entry,) = record["slices"]
    assert (entry["index"], entry["weight"], entry["attention"]) == (4, 1.0, 1.0)


def test_other_channels_or_classes_than_the_weights_are_refused(scans, trained, tmp_path, monai):
    arguments = infer_arguments(scans, trained / "model.pt", tmp_path / "out")
    done = monai(*arguments, "--channels", "['T1','T2']", status=1)
    assert "channels is ['T1', 'T2'] in the config, but the weights were trained with ['image']" in done.stderr
    assert not (tmp_path / "out").exists()


def bad_weights(kind: str, trained: Path, path: Path) -> str:
    """Write the file and give the sentence it must end in."""
    content = torch.load(trained / "model.pt", weights_only=True)
    if kind == "architecture":
        content["model"] = {name: value for name, value in content["model"].items() if "layer4" not in name}
        torch.save(content, path)
        return "holds weights of another architecture"
    if kind == "recipe":
        content["recipe"] = content["recipe"].replace("bundle.DualStreamMIL", "os.system")
        torch.save(content, path)
        return "does not match its hash"
    if kind == "state_dict":
        torch.save(content["model"], path)
        return "holds no 'model'"
    if kind == "text":
        path.write_text("no weights")
        return "is no weights file"
    return "there is no weights file"


@pytest.mark.parametrize("kind", ["architecture", "recipe", "state_dict", "text", "absent"])
def test_bad_weights_end_in_a_sentence(kind, scans, trained, tmp_path, monai):
    sentence = bad_weights(kind, trained, tmp_path / "bad.pt")
    done = monai(*infer_arguments(scans, tmp_path / "bad.pt", tmp_path / "out"), status=1)
    assert sentence in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("folder", "sentence"), [("empty", "holds no NIfTI file"), ("missing", "does not exist")])
def test_a_folder_without_scans_ends_in_a_sentence(folder, sentence, trained, tmp_path, monai):
    (tmp_path / "empty").mkdir()
    done = monai(*infer_arguments(tmp_path / folder, trained / "model.pt", tmp_path / "out"), status=1)
    assert sentence in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("fault", ["duplicate", "two_splits", "label"])
def test_a_bad_datalist_ends_in_a_sentence(fault, cohort, trained, tmp_path, monai):
    datalist = json.loads((cohort / "datalist.json").read_text())
    del datalist["hash"]
    if fault == "duplicate":
        datalist["cases"].append(datalist["cases"][0])
        sentence = "twice"
    elif fault == "two_splits":
        datalist["folds"][0]["test"].append(datalist["folds"][0]["training"][0])
        sentence = "is in training and in test"
    else:
        datalist["cases"][0]["label"] = 2
        sentence = "label"
    path = tmp_path / "datalist.json"
    path.write_text(json.dumps(datalist))
    done = monai(*train_arguments(cohort, tmp_path / "run"), "--datalist", str(path), status=1)
    assert sentence in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()


def test_series_rules_of_a_hospital_choose_at_inference(trained, tmp_path, monai):
    """A study of two series: without rules it is refused with a list; an overlay says which one is meant."""
    from tests.data.dicom_factory import make_slices, write_series

    scans = tmp_path / "scans"
    for number, gap in ((1, 5.0), (2, 2.5)):
        slices = make_slices("MR", matrix=(24, 20), count=9, gap=gap, series=number)
        for ds in slices:
            ds.SeriesDescription = f"T{number} CANARY"
        write_series(scans / "study" / str(number), slices)
    overlay = tmp_path / "hospital.yaml"
    overlay.write_text("dicom_cases: study\nseries_rules: {_target_: bundle.SeriesRules, description: ['t2 *']}\n")
    arguments = ["--dataset_dir", str(scans), "--weights", str(trained / "model.pt"), "--device", "cpu"]
    monai(
        "run", "--config_file", "configs/inference.yaml", *arguments, "--output_dir", str(tmp_path / "a"),
        "--dicom_cases", "study", status=3,
    )  # fmt: skip
    monai(
        "run", "--config_file", f"['configs/inference.yaml','{overlay}']", *arguments,
        "--output_dir", str(tmp_path / "b"),
    )  # fmt: skip
    (refused,), (accepted,) = (
        [json.loads(path.read_text()) for path in (tmp_path / name / "cases").glob("*.json")] for name in "ab"
    )
    assert refused["reason_code"] == "several_series"
    assert len(refused["reason_facts"]["series"]) == 2
    assert accepted["status"] == "accepted"
    assert accepted["reading"][0]["series_uid"].endswith(".2")
    assert accepted["reading"][0]["other_series"] == 1
    assert "CANARY" not in json.dumps([refused, accepted])
