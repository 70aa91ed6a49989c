from __future__ import annotations

import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from pydicom.dataset import Dataset

from bundle.data.dicom_files import DicomFiles
from bundle.data.scans import find_scans
from bundle.errors import InputError, Refusal
from tests.data.dicom_factory import ROOT, make_series, make_slices, save, write_series


def nifti(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(np.zeros((3, 3, 3), np.uint8), np.eye(4)), path)
    return path


def pixelless(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    ds = Dataset()
    ds.SOPClassUID, ds.SOPInstanceUID = "1.2.840.10008.5.1.4.1.1.88.22", f"{ROOT}.9"
    return save(ds, path)


def test_every_scan_is_found_in_order(tmp_path: Path) -> None:
    expected = [
        nifti(tmp_path / "a.nii.gz"),
        make_series(tmp_path / "b" / "deep" / "series"),
        nifti(tmp_path / "b" / "x.nii"),
        write_series(tmp_path / "c", make_slices(), name="IM{:04d}"),
        nifti(tmp_path / "d.NII.gz"),
    ]
    (tmp_path / "table.csv").write_text("x")
    (tmp_path / "b" / "picture.png").write_bytes(b"\x89PNG")
    found = find_scans(tmp_path)
    assert [scan.path for scan in found.scans] == expected
    assert [scan.image for scan in found.scans] == expected
    assert found.ignored == 2
    assert find_scans(str(tmp_path)) == found


def test_damaged_scans_are_cases_too(tmp_path: Path) -> None:
    (tmp_path / "bad.nii.gz").write_text("no image")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "bad.DCM").touch()
    (tmp_path / "dangling.nii").symlink_to(tmp_path / "gone.nii")
    cut = make_series(tmp_path / "cut")
    for path in cut.iterdir():
        path.rename(path.with_suffix(""))
    for path in cut.iterdir():
        path.write_bytes(path.read_bytes()[:400])
    found = find_scans(tmp_path)
    names = [scan.path.name for scan in found.scans]
    assert names == ["bad.nii.gz", "cut", "dangling.nii", "folder"]
    assert found.ignored == 0


def test_what_is_no_scan_is_counted(tmp_path: Path) -> None:
    nifti(tmp_path / "a.nii")
    pixelless(tmp_path / "report" / "SR.dcm")
    (tmp_path / "._a.nii").write_bytes(b"\x00\x05\x16\x07" + bytes(100))
    found = find_scans(tmp_path)
    assert [scan.path.name for scan in found.scans] == ["a.nii"]
    assert found.ignored == 2


def test_a_folder_of_modalities_is_one_case(tmp_path: Path) -> None:
    for case in ("p1", "p2", "p3"):
        for modality in ("t1", "t1ce", "T2", "flair", "seg"):
            nifti(tmp_path / case / f"{case}_{modality}.nii.gz")
    (tmp_path / "p2" / "p2_T2.nii.gz").unlink()
    shutil.copy(tmp_path / "p3" / "p3_t1.nii.gz", tmp_path / "p3" / "again_t1.nii.gz")
    alone = nifti(tmp_path / "four_channels.nii.gz")
    found = find_scans(tmp_path, ["*_flair.nii.gz", "*_t1.nii.gz", "*_t2.nii.gz"])
    single, first, second, third = found.scans
    assert (single.path, single.image) == (alone, alone)
    assert first.path == tmp_path / "p1"
    assert first.image == [tmp_path / "p1" / f"p1_{m}.nii.gz" for m in ("flair", "t1", "T2")]
    for scan, counts in ((second, [1, 1, 0]), (third, [1, 2, 1])):
        assert isinstance(scan.image, Refusal)
        assert scan.image.code == "modalities_incomplete"
        assert scan.image.facts["found"] == counts
    assert found.ignored == 6  # two of each folder: t1ce and seg


def test_one_file_cannot_be_two_modalities(tmp_path: Path) -> None:
    nifti(tmp_path / "p" / "t1.nii")
    (scan,) = find_scans(tmp_path, ["t1*", "*.nii"]).scans
    assert isinstance(scan.image, Refusal)


def test_modalities_and_dicom_in_one_folder_are_refused(tmp_path: Path) -> None:
    make_series(tmp_path / "p")
    nifti(tmp_path / "p" / "t1.nii")
    assert len(find_scans(tmp_path).scans) == 2
    (scan,) = find_scans(tmp_path, ["t1*"]).scans
    assert isinstance(scan.image, Refusal)
    assert scan.image.code == "mixed_folder"


def test_the_folder_itself_may_be_the_series(tmp_path: Path) -> None:
    folder = make_series(tmp_path / "s")
    assert [scan.path for scan in find_scans(folder).scans] == [folder]


def test_bad_folders_get_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not exist"):
        find_scans(tmp_path / "nothing")
    with pytest.raises(InputError, match="holds no NIfTI file and no DICOM image$"):
        find_scans(tmp_path)
    (tmp_path / "x.txt").touch()
    with pytest.raises(InputError, match=r"\(1 other file\)"):
        find_scans(tmp_path)
    with pytest.raises(InputError, match="is a file"):
        find_scans(tmp_path / "x.txt")
    with pytest.raises(InputError, match="list of file patterns"):
        find_scans(tmp_path, "*.nii")


def test_what_lies_below_a_folder_of_dicom_belongs_to_it(tmp_path: Path) -> None:
    make_series(tmp_path / "s")
    write_series(tmp_path / "s" / "more", make_slices(series=2))
    write_series(tmp_path / "t" / "a", make_slices(series=3))
    write_series(tmp_path / "t" / "b", make_slices(series=4))
    found = find_scans(tmp_path)
    assert [scan.path for scan in found.scans] == [tmp_path / "s", tmp_path / "t" / "a", tmp_path / "t" / "b"]


def test_cases_may_be_studies_wherever_their_files_lie(tmp_path: Path) -> None:
    def of_study(study: str, series: int) -> list[Dataset]:
        slices = make_slices(series=series)
        for ds in slices:
            ds.StudyInstanceUID = study
        return slices

    write_series(tmp_path / "a" / "thick", of_study("1.2.1", 1))
    write_series(tmp_path / "a" / "thin", of_study("1.2.1", 2))
    write_series(tmp_path / "flat", of_study("1.2.2", 3))
    write_series(tmp_path / "flat", of_study("1.2.3", 4), name="x{:03d}.dcm")
    (tmp_path / "a" / "thin" / "damaged.dcm").touch()
    (tmp_path / "flat" / "damaged.dcm").touch()
    pixelless(tmp_path / "a" / "report.dcm")
    alone = nifti(tmp_path / "n.nii")
    found = find_scans(tmp_path, dicom_cases="study")
    assert [(scan.path, scan.study) for scan in found.scans] == [
        (tmp_path / "a", "1.2.1"),
        (tmp_path / "flat", "1.2.2"),
        (tmp_path / "flat", "1.2.3"),
        (alone, None),
    ]
    counts = [len(scan.image.paths) for scan in found.scans if isinstance(scan.image, DicomFiles)]
    assert counts == [17, 9, 9]  # the damaged file may belong to either study
    assert found.ignored == 1
    with pytest.raises(InputError, match="dicom_cases must be folder or study"):
        find_scans(tmp_path, dicom_cases="series")


@pytest.mark.parametrize("name", ["a.mha", "A.MHD", "a.nrrd", "a.NHDR"])
def test_metaimage_and_nrrd_files_are_cases(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("x")
    assert [scan.path.name for scan in find_scans(tmp_path).scans] == [name]
