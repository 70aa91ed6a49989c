from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

from bundle.data.cases import inference_cases, labelled_cases
from bundle.data.policy import SeriesRules
from bundle.errors import InputError, Refusal
from tests.data.dicom_factory import CANARY, make_series, make_slices, write_series


def nifti(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(np.zeros((3, 3, 3), np.uint8), np.eye(4)), path)
    return path


def write_datalist(folder: Path, names: list[str]) -> Path:
    cases: list[dict[str, Any]] = []
    for i in range(6):
        nifti(folder / "images" / f"{i}.nii")
        cases.append({"case": f"c{i}", "image": f"images/{i}.nii", "label": i % len(names), "patient": f"p{i}"})
    cases[4]["slice_label"] = [0, 1, 0]
    fold = {"training": ["c0", "c1"], "validation": ["c2", "c3"], "test": ["c4", "c5"]}
    other = {"training": ["c4", "c5"], "validation": ["c0", "c1"], "test": ["c2", "c3"]}
    content = {"format": 1, "class_names": names, "seed": 0, "num_folds": 2, "cases": cases, "folds": [fold, other]}
    path = folder / "datalist.json"
    path.write_text(json.dumps(content))
    return path


def test_every_scan_of_a_folder_is_a_case_under_a_pseudonym(tmp_path: Path) -> None:
    folder = tmp_path / CANARY
    nifti(folder / "DOE^JANE" / "t1.nii.gz")
    nifti(folder / "plain.nii")
    make_series(folder / "DOE^JOHN" / "series")
    found = inference_cases(folder)
    assert len(found) == 3
    for case in found:
        assert case["case"].startswith("case-")
        assert len(case["case"]) == 17
        rest = {key: value for key, value in case.items() if key != "image"}
        for secret in ("CANARY", "DOE", "JOHN", "series", "t1", "plain", str(tmp_path)):
            assert secret not in repr(rest)
        assert (case["label"], case["patient"], case["slice_label"]) == (None, None, None)
    assert [Path(case["image"]).name for case in found] == ["t1.nii.gz", "series", "plain.nii"]
    assert len({case["case"] for case in found}) == 3


def test_a_pseudonym_stays_when_the_folder_is_moved_or_grows(tmp_path: Path) -> None:
    nifti(tmp_path / "here" / "a" / "x.nii")
    nifti(tmp_path / "here" / "b.nii")
    before = {Path(case["image"]).name: case["case"] for case in inference_cases(tmp_path / "here")}
    nifti(tmp_path / "here" / "a" / "new.nii")
    (tmp_path / "here").rename(tmp_path / "there")
    after = {Path(case["image"]).name: case["case"] for case in inference_cases(str(tmp_path / "there"))}
    assert after.items() >= before.items()
    assert len(after) == 3


def test_the_path_names_the_case_where_asked(tmp_path: Path) -> None:
    nifti(tmp_path / "a" / "x.nii")
    series = make_series(tmp_path / "b")
    assert [case["case"] for case in inference_cases(tmp_path, case_names="path")] == ["a/x.nii", "b"]
    assert [case["case"] for case in inference_cases(series, case_names="path")] == ["b"]
    for bad in ("paths", "", "Pseudonym"):
        with pytest.raises(InputError, match="case_names must be pseudonym or path"):
            inference_cases(tmp_path, case_names=bad)


def test_the_home_folder_may_be_written_short(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    nifti(tmp_path / "scans" / "a.nii")
    found = inference_cases("~/scans")
    assert found == inference_cases(tmp_path / "scans")
    assert os.path.exists(found[0]["image"])


def test_modalities_of_a_folder_and_their_absence(tmp_path: Path) -> None:
    for case in ("p1", "p2"):
        for modality in ("t1", "flair"):
            nifti(tmp_path / case / f"{case}_{modality}.nii")
    (tmp_path / "p2" / "p2_t1.nii").unlink()
    whole, part = inference_cases(tmp_path, channel_files=["*_flair.nii", "*_t1.nii"])
    assert [path.name for path in whole["image"]] == ["p1_flair.nii", "p1_t1.nii"]
    assert "refusal" not in whole
    assert isinstance(part["refusal"], Refusal)
    assert part["refusal"].code == "modalities_incomplete"
    assert "image" not in part


def test_a_link_to_nothing_is_refused_without_its_path(tmp_path: Path) -> None:
    nifti(tmp_path / "a.nii")
    (tmp_path / f"{CANARY}.nii").symlink_to(tmp_path / "gone.nii")
    found = {"refusal" in case: case for case in inference_cases(tmp_path)}
    refusal = found[True]["refusal"]
    assert refusal.code == "missing_file"
    assert "CANARY" not in refusal.sentence
    assert str(tmp_path) not in refusal.sentence
    assert found[False]["image"] == tmp_path / "a.nii"


def test_passed_over_files_are_counted_on_the_log(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    nifti(tmp_path / "a.nii")
    (tmp_path / f"{CANARY}.txt").touch()
    with caplog.at_level(logging.INFO):
        inference_cases(tmp_path)
    assert "1 files" in caplog.text
    assert "CANARY" not in caplog.text


def test_bad_folders(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not exist"):
        inference_cases(tmp_path / "nothing")
    with pytest.raises(InputError, match="holds no NIfTI file"):
        inference_cases(tmp_path)


def test_a_datalist_in_place_of_a_folder(tmp_path: Path) -> None:
    path = write_datalist(tmp_path, ["no", "yes"])
    nifti(tmp_path / "images" / "not_listed.nii")
    found = inference_cases(tmp_path, path)
    assert [(case["case"], case["label"], case["patient"]) for case in found] == [("c4", 0, "p4"), ("c5", 1, "p5")]
    assert [case["slice_label"] for case in found] == [[0, 1, 0], None]
    assert [case["case"] for case in inference_cases(tmp_path, path, "validation", 1)] == ["c0", "c1"]
    with pytest.raises(InputError, match="has no section 'tests'"):
        inference_cases(tmp_path, path, "tests")


def test_labelled_cases_are_of_the_networks_classes(tmp_path: Path) -> None:
    path = write_datalist(tmp_path, ["no", "yes"])
    found = labelled_cases(path, "training", 0, tmp_path, ["no", "yes"])
    assert [(case["case"], case["label"]) for case in found] == [("c0", 0), ("c1", 1)]
    numbered = write_datalist(tmp_path, ["0", "1"])
    assert found == labelled_cases(numbered, "training", 0, tmp_path, ["absent", "present"])
    with pytest.raises(InputError, match="has 3 class names .* has 2"):
        labelled_cases(path, "training", 0, tmp_path, ["no", "perhaps", "yes"])


@pytest.mark.parametrize("names", [["yes", "no"], ["yes", "other"], ["other", "no"], ["absent", "present"]])
def test_other_classes_or_another_order_are_refused(tmp_path: Path, names: list[str]) -> None:
    path = write_datalist(tmp_path, ["no", "yes"])
    with pytest.raises(InputError, match="are not those of datalist.json") as caught:
        labelled_cases(path, "training", 0, tmp_path, names)
    assert "\n" not in str(caught.value)


def test_studies_are_called_by_their_uid_and_bring_the_rules(tmp_path: Path) -> None:
    for number in (1, 2):
        slices = make_slices(series=number)
        for ds in slices:
            ds.StudyInstanceUID = f"1.2.{number}"
        write_series(tmp_path / "pacs", slices, name=f"{number}_" + "{:03d}.dcm")
    rules = SeriesRules(thinnest=True)
    found = inference_cases(tmp_path, dicom_cases="study", series_rules=rules)
    assert len({case["case"] for case in found}) == 2
    assert all(case["series_rules"] is rules for case in found)
    moved = tmp_path / "elsewhere"
    (tmp_path / "pacs").rename(moved)
    again = inference_cases(moved, dicom_cases="study")
    assert [case["case"] for case in again] == [case["case"] for case in found]
    assert "series_rules" not in again[0]
    named = inference_cases(tmp_path, dicom_cases="study", case_names="path")
    assert [case["case"] for case in named] == ["elsewhere study 1.2.1", "elsewhere study 1.2.2"]
    with pytest.raises(InputError, match="series_rules must be a bundle.SeriesRules"):
        inference_cases(tmp_path, series_rules={"thinnest": True})  # type: ignore[arg-type]
