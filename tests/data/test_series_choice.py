from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from pydicom.dataset import Dataset

from bundle.data.policy import ReaderPolicy, SeriesRules
from bundle.data.series import read_volume
from bundle.data.series_list import list_series, main
from bundle.errors import InputError, Refusal
from tests.data import dicom_factory as factory
from tests.data.dicom_factory import CANARY, largest_error, make_slices, save, write_series

TOLERANCE = 0.006


def add(folder: Path, number: int, name: str = "", **kwargs: Any) -> Path:
    """A series of a study, in a folder of its own below."""
    tags = kwargs.pop("tags", {})
    slices = make_slices(series=number, **kwargs)
    for ds in slices:
        for keyword, value in tags.items():
            setattr(ds, keyword, value)
    return write_series(folder / (name or f"series{number}"), slices, name=f"{number}_" + "{:03d}.dcm")


@pytest.fixture
def study(tmp_path: Path) -> Path:
    """Thick and thin axial CT, a coronal one with contrast, a localizer, a dose screen and a report."""
    folder = tmp_path / "study"
    add(folder, 1, gap=5.0, tags={"SeriesDescription": "HEAD 5mm"})
    add(folder, 2, gap=1.25, count=20, tags={"SeriesDescription": "HEAD thin CANARY"})
    add(
        folder,
        3,
        orientation=factory.CORONAL,
        tags={"SeriesDescription": "COR", "ContrastBolusAgent": "ISOVUE", "ImageType": ["DERIVED", "SECONDARY", "MPR"]},
    )
    add(folder, 4, count=1, tags={"ImageType": ["ORIGINAL", "PRIMARY", "LOCALIZER"]})
    add(folder, 5, count=1, tags={"SOPClassUID": "1.2.840.10008.5.1.4.1.1.7"})
    report = Dataset()
    report.SOPClassUID, report.SOPInstanceUID = "1.2.840.10008.5.1.4.1.1.88.22", f"{factory.ROOT}.9.1"
    report.SeriesInstanceUID, report.Modality = f"{factory.ROOT}.9", "SR"
    save(report, folder / "report.dcm")
    (folder / "README.txt").write_text("notes")
    return folder


def chosen(folder: Path, **rules: Any) -> str:
    volume = read_volume(folder, ReaderPolicy(series=SeriesRules(**rules)))
    assert largest_error(volume) < TOLERANCE
    assert volume.facts["other_series"] == 4
    assert (volume.facts["other_objects"], volume.facts["other_files"]) == (1, 1)
    return str(volume.series_uid).rsplit(".", 1)[1]


def refusal_of(folder: Path, **rules: Any) -> Refusal:
    with pytest.raises(Refusal) as caught:
        read_volume(folder, ReaderPolicy(series=SeriesRules(**rules)))
    assert "CANARY" not in caught.value.sentence + json.dumps(caught.value.facts)
    return caught.value


@pytest.mark.parametrize(
    ("rules", "series"),
    [
        ({"plane": "coronal"}, "3"),
        ({"contrast": True}, "3"),
        ({"image_type": ["mpr"]}, "3"),
        ({"exclude_image_type": ["MPR"], "slices": (1, 10)}, "1"),
        ({"description": ["*5MM*"]}, "1"),
        ({"description": ["head*"], "exclude_description": ["*5mm"]}, "2"),
        ({"slices": [12, 400]}, "2"),
        ({"spacing_mm": [3, 6]}, "1"),
        ({"thinnest": True}, "2"),
        ({"thinnest": True, "plane": "axial", "spacing_mm": (2, 9)}, "1"),
        ({"modality": ["CT"], "description": ["COR"]}, "3"),
    ],
)
def test_rules_choose(study: Path, rules: dict[str, Any], series: str) -> None:
    assert chosen(study, **rules) == series


def test_what_can_be_no_volume_is_no_candidate(study: Path) -> None:
    assert refusal_of(study).facts["fitting"] == 3
    for name in ("series2", "series3"):
        for path in (study / name).iterdir():
            path.unlink()
    volume = read_volume(study)
    assert largest_error(volume) < TOLERANCE
    assert volume.facts["other_series"] == 2


def test_several_or_none_are_refused_with_a_list(study: Path) -> None:
    several = refusal_of(study, plane="axial")
    assert several.code == "several_series"
    assert "2 of the 5 series" in several.sentence
    assert "CT, 8 images, axial, 5.00 mm" in several.sentence
    assert [s["fits"] for s in several.facts["series"]] == [True, True, False, False, False]
    none = refusal_of(study, plane="sagittal")
    assert none.code == "no_series_fits"
    assert [s["kind"] for s in none.facts["series"]] == ["image", "image", "image", "localizer", "capture"]
    assert refusal_of(study, modality=["MR"]).code == "no_series_fits"


def test_equally_thin_series_stay_alike(tmp_path: Path) -> None:
    add(tmp_path, 1)
    add(tmp_path, 2)
    assert refusal_of(tmp_path, thinnest=True).code == "several_series"


def test_rules_hold_for_a_single_series_too(tmp_path: Path) -> None:
    add(tmp_path, 1)
    assert refusal_of(tmp_path, contrast=True).code == "no_series_fits"


def test_a_damaged_series_is_not_replaced_by_a_sound_one(study: Path) -> None:
    victim = sorted((study / "series2").iterdir())[7]
    victim.unlink()
    assert refusal_of(study, thinnest=True).code == "missing_slices"
    assert chosen(study, description=["*5mm*"]) == "1"


def test_a_bad_tag_elsewhere_does_not_hinder_and_here_it_does(study: Path) -> None:
    path = sorted((study / "series2").iterdir())[0]
    content = path.read_bytes()
    assert b"0.9\\0.7 " in content
    path.write_bytes(content.replace(b"0.9\\0.7 ", b"zz9\\0.7 "))
    assert chosen(study, description=["*5mm*"]) == "1"
    assert refusal_of(study, slices=(12, 400)).code == "bad_tag"


def test_several_patients_are_no_case(tmp_path: Path) -> None:
    add(tmp_path, 1)
    add(tmp_path, 2, orientation=factory.CORONAL, tags={"PatientID": "CANARY2"})
    assert refusal_of(tmp_path, plane="axial").code == "several_patients"


def test_a_single_localizer_is_refused_as_one(tmp_path: Path) -> None:
    add(tmp_path, 1, tags={"ImageType": ["ORIGINAL", "PRIMARY", "LOCALIZER"]})
    assert refusal_of(tmp_path).code == "localizer"


@pytest.mark.parametrize(
    ("rules", "word"),
    [
        ({"plane": "oblique"}, "plane"),
        ({"modality": "CT"}, "modality"),
        ({"description": [3]}, "description"),
        ({"slices": [9, 2]}, "slices"),
        ({"spacing_mm": 3}, "spacing_mm"),
        ({"contrast": "yes"}, "contrast"),
        ({"thinnest": None}, "thinnest"),
    ],
)
def test_senseless_rules(rules: dict[str, Any], word: str) -> None:
    with pytest.raises(InputError, match=word):
        SeriesRules(**rules)


# --- the list ---


def test_the_list_names_every_series_and_its_verdict(study: Path) -> None:
    nib.save(nib.Nifti1Image(np.zeros((4, 4, 4), np.int16), np.eye(4)), study / "a.nii.gz")
    (study / "bad.mha").write_text("nothing")
    (study / "series1" / "1_003.dcm").unlink()
    found = list_series(study, ReaderPolicy(series=SeriesRules(thinnest=True)))
    verdicts = [(row["verdict"], row["reason_code"]) for row in found["series"]]
    assert verdicts == [
        ("refused", "missing_slices"),
        ("chosen", None),
        ("readable", None),
        ("refused", "localizer"),
        ("refused", "not_ct_or_mr_image"),
        ("readable", None),
        ("refused", "file_damaged"),
    ]
    assert found["choice"] is None
    assert found["series"][1]["shape"] == [12, 10, 20]
    assert found["series"][1]["voxel_mm"] == [0.7, 0.9, 1.25]
    assert "CANARY" not in json.dumps(found)
    assert list_series(study, descriptions=True)["series"][1]["description"] == "HEAD THIN CANARY"
    assert list_series(study)["choice"]["reason_code"] == "several_series"


def test_the_list_on_the_command_line(study: Path, tmp_path: Path) -> None:
    rules = tmp_path / "rules.yaml"
    rules.write_text("reader_policy::series::thinnest: true\nreader_policy::gantry_tilt: refuse\n")
    run = subprocess.run(
        [
            sys.executable,
            "-m",
            "bundle.data.series",
            study,
            "--config_file",
            "configs/train.yaml",
            "--config_file",
            rules,
        ],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
        check=False,
    )
    assert run.returncode == 3, run.stderr  # the localizer and the dose screen
    assert run.stderr == ""
    lines = run.stdout.splitlines()
    assert lines[0].split() == ["#", "series", "images", "size", "spacing", "mm", "plane", "verdict", "reason"]
    assert [line.split()[0] for line in lines[1:6]] == ["1", "2", "3", "4", "5"]
    assert "chosen" in lines[2]
    assert lines[6] == "beside them: 1 DICOM objects without images, 1 other files"
    assert "CANARY" not in run.stdout
    assert str(tmp_path) not in run.stdout


def test_the_list_of_what_is_sound_ends_with_0(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = add(tmp_path, 1, tags={"SeriesDescription": CANARY})
    assert main([str(folder), "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["series"][0]["verdict"] == "chosen"
    assert main([str(folder), "--descriptions"]) == 0
    assert CANARY in capsys.readouterr().out


def test_the_list_of_nothing(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not exist"):
        main([str(tmp_path / "nowhere")])
    with pytest.raises(Refusal, match="no DICOM image"):
        main([str(tmp_path)])
    with pytest.raises(InputError, match="no config file"):
        main([str(tmp_path), "--config_file", str(tmp_path / "none.yaml")])
