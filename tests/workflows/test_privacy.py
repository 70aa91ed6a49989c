"""A patient's name, ID or any free text of a scan turns up in nothing that the software writes or says."""

import csv
from pathlib import Path

import pytest
from pydicom.dataset import Dataset

from tests.data.dicom_factory import CANARY, make_slices, write_series

from .conftest import train_arguments

FREE_TEXT = (
    "StudyDescription", "SeriesDescription", "ProtocolName", "ImageComments", "PatientComments",
    "AdditionalPatientHistory", "ReferringPhysicianName", "PerformingPhysicianName", "OperatorsName", "InstitutionName",
    "InstitutionAddress", "StationName", "AccessionNumber", "StudyID", "RequestedProcedureDescription",
    "DerivationDescription", "ContrastBolusAgent", "OtherPatientIDs", "PatientBirthName", "PatientAddress",
    "DeviceSerialNumber", "AcquisitionComments",
)  # fmt: skip


def marked(ds: Dataset) -> Dataset:
    """The slice with the canary in every tag that people fill in."""
    ds.PatientName = ds.PatientID = CANARY
    for keyword in FREE_TEXT:
        setattr(ds, keyword, CANARY[:16] if keyword in ("AccessionNumber", "StudyID", "StationName") else CANARY)
    ds.private_block(0x0011, "CANARY PACS", create=True).add_new(0x01, "LO", CANARY)
    return ds


def scan(folder: Path, number: int, label: int = 0, drop: int | None = None) -> Path:
    """A series of noise-free slices; a positive one runs the other way in intensity."""
    slices = [marked(ds) for ds in make_slices("MR", matrix=(24, 20), count=9, series=number)]
    for ds in slices:
        ds.StudyInstanceUID = f"1.2.{number}"
        if label:
            ds.PixelData = ds.PixelData[::-1]
    if drop is not None:
        del slices[drop]
    return write_series(folder, slices)


@pytest.fixture
def dicom_cohort(tmp_path: Path) -> Path:
    folder = tmp_path / "cohort"
    rows = [["case", "patient", "image", "label"]]
    for number in range(12):
        scan(folder / f"{CANARY}-{number}" / "series", number, number % 2)
        rows.append([f"c{number:02d}", f"p{number:02d}", f"{CANARY}-{number}/series", str(number % 2)])
    with (folder / "volumes.csv").open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    return folder


def findings(folder: Path) -> list[str]:
    """Where the canary is found below a folder: in a name or in the bytes of a file."""
    found = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if "CANARY" in path.name]
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert files
    return found + [path.relative_to(folder).as_posix() for path in files if b"CANARY" in path.read_bytes()]


def test_training_evaluation_and_inference_name_nobody(dicom_cohort, cohort, tmp_path, monai):
    from bundle.data.make_datalist import main

    # The table's own image paths are the user's; what is made from pixels and tags is looked at.
    datalist = tmp_path / "datalist.json"
    main([str(dicom_cohort / "volumes.csv"), "--out", str(datalist), "--folds", "3"])
    output = tmp_path / "output"
    arguments = train_arguments(cohort, output / "train")
    arguments[arguments.index("--dataset_dir") + 1] = str(dicom_cohort)
    arguments += ["--datalist", str(datalist), "--max_epochs", "2"]
    printed = [monai(*arguments)]
    files = f"['configs/train.yaml','{cohort / 'tiny.yaml'}','configs/evaluate.yaml']"
    printed.append(monai(*[files if "tiny.yaml" in word else word for word in arguments]))

    scans = tmp_path / "scans"
    for kind, number, drop in (("good", 50, None), ("gap", 51, 4)):
        scan(scans / f"{CANARY}-{kind}", number, drop=drop)
    scan(scans / f"{CANARY}-two", 52)
    scan(scans / f"{CANARY}-two" / "second", 53)
    damaged = next(scan(scans / f"{CANARY}-damaged", 54).iterdir())
    damaged.write_bytes(damaged.read_bytes()[:700])
    (scans / f"{CANARY}.nii.gz").write_bytes(CANARY.encode() * 99)
    (scans / f"{CANARY}.mha").write_text(f"ObjectType = Image\nComment = {CANARY}\nNDims = 3\n")
    (scans / f"{CANARY}.nrrd").write_text(f"NRRD0005\n# {CANARY}\npatient:={CANARY}\ndimension: 3\n")
    for mode in ("folder", "study"):
        arguments = ["run", "--config_file", "configs/inference.yaml", "--dataset_dir", str(scans)]
        arguments += ["--weights", str(output / "train" / "model.pt"), "--output_dir", str(output / mode)]
        printed.append(monai(*arguments, "--device", "cpu", "--dicom_cases", mode, status=3))
    assert findings(output) == []
    for done in printed:
        assert "CANARY" not in done.stdout + done.stderr

    with (output / "folder" / "predictions.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert sorted(row["reason_code"] for row in rows) == [
        "", "file_damaged", "file_damaged", "file_damaged", "missing_slices", "several_series", "unreadable_file",
    ]  # fmt: skip
