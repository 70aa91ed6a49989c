"""What a review once got past the reader: each is refused, or read right, for its reason."""

from __future__ import annotations

import gzip
import os
import struct
import time
import zlib
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pydicom
import pytest
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import JPEG2000, DeflatedExplicitVRLittleEndian, ExplicitVRLittleEndian, JPEG2000Lossless

from bundle.data.policy import ReaderPolicy, SeriesRules
from bundle.data.scans import find_scans
from bundle.data.series import read_volume
from bundle.data.series_list import list_series, main
from bundle.errors import InputError, Refusal
from tests.data import dicom_factory as factory
from tests.data.dicom_factory import CLASS_UID, largest_error, make_series, make_slices, save, write_series
from tests.data.dicom_multiframe import concatenation, make_multiframe
from tests.data.test_series import raw
from tests.data.test_series_choice import add


def code_of(folder: Path, **policy: object) -> str:
    with pytest.raises(Refusal) as caught:
        read_volume(folder, ReaderPolicy(**policy))  # type: ignore[arg-type]
    assert str(folder) not in caught.value.sentence
    return caught.value.code


def named(folder: Path, slices: list[Dataset], name: str = "IM{:04d}.dcm") -> Path:
    folder.mkdir(parents=True)
    for k, ds in enumerate(slices):
        save(ds, folder / name.format(k))
    return folder


# --- rules never fall back to another series ---


@pytest.mark.parametrize("rules", [{"thinnest": True}, {"plane": "axial"}, {"spacing_mm": (1, 3)}])
@pytest.mark.parametrize("orientation", [[1, 0, 0, 0, 0.98, 0.199], [0, 0, 0, 0, 0, 0]])
def test_a_series_whose_plane_damage_hides_is_not_replaced(
    tmp_path: Path, rules: dict[str, object], orientation: list[float]
) -> None:
    add(tmp_path, 1, gap=5.0)
    thin = add(tmp_path, 2, gap=2.5, count=10)
    path = sorted(thin.iterdir())[4]
    ds = pydicom.dcmread(path)
    ds.ImageOrientationPatient = orientation
    ds.save_as(path)
    code = code_of(tmp_path, series=SeriesRules(**rules))  # type: ignore[arg-type]
    own = ("mixed_orientation", "bad_orientation")
    assert code in (own if "spacing_mm" in rules else ("several_series", *own))


@pytest.mark.parametrize("keyword", ["Modality", "SeriesDescription", "ImageType"])
def test_one_damaged_word_does_not_hide_a_series(tmp_path: Path, keyword: str) -> None:
    add(tmp_path, 1, gap=5.0, tags={"SeriesDescription": "HEAD"})
    thin = add(tmp_path, 2, gap=2.5, count=10, tags={"SeriesDescription": "HEAD"})
    for path in thin.iterdir():
        ds = pydicom.dcmread(path)
        if ds.InstanceNumber == 1:
            setattr(ds, keyword, ["DERIVED", "MPR"] if keyword == "ImageType" else "XX")
            ds.save_as(path)
            path.rename(thin / "0.dcm")  # the first that is read
    rules = SeriesRules(thinnest=True, description=("HEAD",), exclude_image_type=("MPR",))
    try:
        volume = read_volume(tmp_path, ReaderPolicy(series=rules))
    except Refusal:
        return
    assert str(volume.series_uid).endswith(".2")


def test_a_capture_that_cannot_be_read_is_no_candidate(tmp_path: Path) -> None:
    add(tmp_path, 1)
    capture = add(tmp_path, 2, count=1, tags={"SOPClassUID": "1.2.840.10008.5.1.4.1.1.7"})
    (path,) = capture.iterdir()
    path.write_bytes(path.read_bytes().replace(b"0.9\\0.7 ", b"zz9\\0.7 "))
    assert largest_error(read_volume(tmp_path)) < 0.006


def test_brackets_in_a_description_mean_themselves(tmp_path: Path) -> None:
    add(tmp_path, 1, tags={"SeriesDescription": "AX T1 C"})
    add(tmp_path, 2, tags={"SeriesDescription": "AX T1 [CE]"})
    volume = read_volume(tmp_path, ReaderPolicy(series=SeriesRules(description=("AX T1 [CE]",))))
    assert str(volume.series_uid).endswith(".2")


# --- loss that nobody declared ---


def lossy_slices(syntax: str) -> list[Dataset]:
    slices = make_slices("MR", matrix=(64, 64), count=4)
    for ds in slices:
        ds.file_meta = FileMetaDataset()
        ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        ds.compress(JPEG2000, j2k_cr=[10], encoding_plugin="pylibjpeg", generate_instance_uid=False)
        for keyword in ("LossyImageCompression", "LossyImageCompressionRatio", "LossyImageCompressionMethod"):
            if keyword in ds:
                delattr(ds, keyword)
        ds.file_meta.TransferSyntaxUID = syntax
    return slices


def test_loss_is_seen_in_the_codestream(tmp_path: Path) -> None:
    folder = write_series(tmp_path / "s", lossy_slices(JPEG2000))
    assert read_volume(folder).facts["lossy"] is True
    assert code_of(folder, accept_lossy=False) == "lossy"


def test_loss_under_a_lossless_syntax_is_refused(tmp_path: Path) -> None:
    assert code_of(write_series(tmp_path / "s", lossy_slices(JPEG2000Lossless))) == "pixel_data_corrupt"


# --- elements ---


def with_element_twice(path: Path, tag: tuple[int, int], vr: bytes, value: bytes) -> None:
    """Append an element behind the last one, where pydicom takes it for the right one."""
    path.write_bytes(path.read_bytes() + struct.pack("<HH2sH", *tag, vr, len(value)) + value)


@pytest.mark.parametrize(
    ("tag", "vr", "value"), [((0x0028, 0x0030), b"DS", b"9.9\\9.9 "), ((0x0028, 0x1052), b"DS", b"300 ")]
)
def test_an_element_that_stands_twice(tmp_path: Path, tag: tuple[int, int], vr: bytes, value: bytes) -> None:
    folder = make_series(tmp_path / "s")
    with_element_twice(sorted(folder.iterdir())[3], tag, vr, value)
    assert code_of(folder) == "bad_tag"


@pytest.mark.parametrize(("old", "new"), [(b"0.9\\0.7 ", b"0_9\\0.7 "), (b"-300.0", b"-3_00 ")])
def test_numbers_that_only_python_reads(tmp_path: Path, old: bytes, new: bytes) -> None:
    folder = make_series(tmp_path / "s")
    for path in folder.iterdir():
        assert old in path.read_bytes()
        path.write_bytes(path.read_bytes().replace(old, new))
    assert code_of(folder) == "bad_tag"


def test_positions_beyond_any_scanner(tmp_path: Path) -> None:
    for number, far in enumerate(("1e12", "-1e300")):
        slices = make_slices()
        for ds in slices:
            ds.ImagePositionPatient[0] = float(far)
        assert code_of(write_series(tmp_path / str(number), slices)) == "bad_position"


def test_an_echo_time_in_words_and_elements_behind_the_pixels_are_no_fault(tmp_path: Path) -> None:
    folder = make_series(tmp_path / "s", raw("EchoTime", "MIN"), modality="MR")
    for path in folder.iterdir():
        with_element_twice(path, (0x7FE1, 0x1001), b"LO", b"x ")
    assert largest_error(read_volume(folder)) < 0.006


# --- files that are not there, or not what they are called ---


def test_a_link_that_leads_nowhere(tmp_path: Path) -> None:
    folder = named(tmp_path / "s", make_slices())
    (folder / "IM0007.dcm").unlink()
    (folder / "IM0007.dcm").symlink_to(tmp_path / "annex" / "gone")
    assert code_of(folder) == "missing_file"


def test_a_linked_folder_of_slices_is_read_once(tmp_path: Path) -> None:
    folder = named(tmp_path / "s", make_slices())
    (tmp_path / "elsewhere").mkdir()
    for name in ("IM0006.dcm", "IM0007.dcm"):
        (folder / name).rename(tmp_path / "elsewhere" / name)
    (folder / "more").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    (tmp_path / "elsewhere" / "back").symlink_to(folder, target_is_directory=True)
    assert read_volume(folder).array.shape[2] == 8


@pytest.mark.parametrize("suffix", [".gz", ".bz2", ".zip", ".txt", ".lock"])
def test_a_slice_that_was_packed_or_renamed(tmp_path: Path, suffix: str) -> None:
    folder = named(tmp_path / "s", make_slices())
    last = folder / "IM0007.dcm"
    content = gzip.compress(last.read_bytes()) if suffix == ".gz" else last.read_bytes()[200:]
    last.unlink()
    (folder / f"IM0007.dcm{suffix}").write_bytes(content)
    assert code_of(folder) == "unreadable_file"


def test_notes_on_slices_and_other_images_are_no_slices(tmp_path: Path) -> None:
    folder = named(tmp_path / "s", make_slices())
    (folder / "IM0003.dcm.md5").touch()
    (folder / "IM0003.dcm.json").write_text('{"SOPClassUID": "1.2.840.10008.5.1.4.1.1.2"}')
    (folder / "converted.nrrd").write_text("NRRD0004\n0008|0016:=1.2.840.10008.5.1.4.1.1.2\n")
    (folder / "empty.nii.gz").touch()
    (folder / "done.flag").touch()
    assert largest_error(read_volume(folder)) < 0.006


def test_parts_of_a_concatenation_that_does_not_count_them(tmp_path: Path) -> None:
    for gone in (0, 1):
        parts = concatenation(make_multiframe(make_slices("MR")), [3, 3, 2])
        for ds in parts:
            del ds.InConcatenationTotalNumber
        del parts[gone]
        assert code_of(write_series(tmp_path / str(gone), parts)) in ("truncated_series", "missing_slices")


# --- bounded time and memory ---


def enhanced(groups: bytes, syntax: str = ExplicitVRLittleEndian) -> bytes:
    """An enhanced MR file whose per-frame groups are the bytes given."""
    meta = (
        b"\x02\x00\x10\x00UI"
        + struct.pack("<H", len(syntax) + len(syntax) % 2)
        + syntax.encode().ljust(len(syntax) + len(syntax) % 2, b"\0")
    )
    meta = b"\x02\x00\x00\x00UL\x04\x00" + struct.pack("<I", len(meta)) + meta
    ds = make_slices("MR", count=1)[0]
    ds.SOPClassUID = CLASS_UID["MR"] + ".1"
    from pydicom.filebase import DicomBytesIO
    from pydicom.filewriter import write_dataset

    buffer = DicomBytesIO()
    buffer.is_little_endian, buffer.is_implicit_VR = True, False
    write_dataset(buffer, ds)
    body = buffer.getvalue()
    pixels = body.index(b"\xe0\x7f\x10\x00")
    body = body[:pixels] + struct.pack("<HH2sHI", 0x5200, 0x9230, b"SQ", 0, len(groups)) + groups + body[pixels:]
    if syntax == DeflatedExplicitVRLittleEndian:
        packer = zlib.compressobj(wbits=-15)
        body = packer.compress(body) + packer.flush()
    return bytes(128) + b"DICM" + meta + body


@pytest.mark.parametrize("syntax", [ExplicitVRLittleEndian, DeflatedExplicitVRLittleEndian])
@pytest.mark.parametrize("items", [60_000, 2_000_000])
def test_frames_without_end(tmp_path: Path, syntax: str, items: int) -> None:
    (tmp_path / "a.dcm").write_bytes(enhanced(b"\xfe\xff\x00\xe0\x00\x00\x00\x00" * items, syntax))
    start = time.monotonic()
    assert code_of(tmp_path) == "too_large"
    assert time.monotonic() - start < 60  # it took minutes, or for ever


def test_a_deflated_file_that_lies_about_its_file_meta(tmp_path: Path) -> None:
    packer = zlib.compressobj(wbits=-15)
    body = packer.compress(bytes(600 << 20)) + packer.flush()
    meta = b"\x02\x00\x10\x00UI\x16\x001.2.840.10008.1.2.1.99"
    head = b"\x02\x00\x00\x00UL\x04\x00" + struct.pack("<I", 2**31)
    (tmp_path / "a.dcm").write_bytes(bytes(128) + b"DICM" + head + meta + body)
    assert code_of(tmp_path) in ("too_large", "unreadable_file")


def test_an_upright_grid_beyond_the_limit(tmp_path: Path) -> None:
    positions = factory.stack(lean=(0.0, 1.7))
    folder = make_series(tmp_path / "s", positions=positions, pixel_spacing=(0.06, 0.06))
    assert read_volume(folder).facts["tilt_degrees"] > 30
    assert code_of(folder, gantry_tilt="resample", max_tilt_degrees=60.0, max_voxels=2000) == "too_large"


# --- words ---


def test_a_scan_that_is_gone_is_told_without_its_path(tmp_path: Path) -> None:
    assert code_of(tmp_path / "MUELLER^HANS") == "missing_file"


def closed(path: Path) -> None:
    raise PermissionError(13, "Permission denied", str(path))


@pytest.mark.parametrize("method", ["is_file", "open"])
def test_a_scan_that_may_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str) -> None:
    folder = make_series(tmp_path / "s")
    monkeypatch.setattr(Path, method, lambda self, *a, **k: closed(self))
    assert code_of(folder) == "unreadable"


def test_a_damaged_stray_file_does_not_end_the_list(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make_series(tmp_path / "s")
    (folder / "stray.dcm").touch()
    (folder / "a\x1b[31m\nb.nii").touch()
    found = list_series(folder)
    assert [row["verdict"] for row in found["series"]] == ["readable", "refused"]
    assert [row["file"] for row in found["damaged_files"]] == ["stray.dcm"]
    assert main([str(folder)]) == 3
    printed = capsys.readouterr().out
    assert "damaged: stray.dcm (empty_file)" in printed
    assert "\x1b" not in printed


@pytest.mark.parametrize(
    "content", ["a: [", "text", "", "reader_policy: 5\n", "reader_policy: {_target_: bundle.Nothing}\n",
                "reader_policy: {_target_: bundle.ReaderPolicy, min_slices: -1}\n", "reader_policy: '@nothing'\n"],
)  # fmt: skip
def test_a_config_that_is_none_gets_one_sentence(tmp_path: Path, content: str) -> None:
    make_series(tmp_path / "s")
    (tmp_path / "c.yaml").write_text(content)
    with pytest.raises(InputError, match="reader_policy"):
        main([str(tmp_path / "s"), "--config_file", str(tmp_path / "c.yaml")])


def test_a_pipe_is_no_scan(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InputError, match="neither a folder nor a file"):
        main([str(tmp_path / "pipe")])


# --- what the policy asks ---


def test_n4_is_for_mr(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from bundle.data import corrections

    asked: list[str] = []
    monkeypatch.setattr(corrections, "correct_bias", lambda volume: asked.append(volume.source) or volume)
    ct, mr = make_series(tmp_path / "ct", modality="CT"), make_series(tmp_path / "mr", modality="MR")
    nib.save(nib.Nifti1Image(np.ones((4, 4, 4), np.int16), np.eye(4)), tmp_path / "a.nii")
    read: Callable[[Path, tuple[str, ...]], object] = lambda path, kinds: read_volume(  # noqa: E731
        path, ReaderPolicy(n4_bias_correction=True, modalities=kinds)
    )
    for kinds in (("CT", "MR"), ("CT",)):
        read(ct, kinds)
        read(tmp_path / "a.nii", kinds)
    assert asked == []
    read(mr, ("CT", "MR"))
    read(tmp_path / "a.nii", ("MR",))
    assert asked == ["dicom", "nifti"]


def test_united_imaging_grids_are_mosaics(tmp_path: Path) -> None:
    slices = make_slices("MR")
    for ds in slices:
        ds.ImageType = ["ORIGINAL", "PRIMARY", "VFRAME"]
    assert code_of(write_series(tmp_path / "s", slices)) == "mosaic"


def test_halves_made_in_two_ways(tmp_path: Path) -> None:
    for number, (keyword, values) in enumerate(
        {"ConvolutionKernel": ("B30f", "B70f"), "ImageType": (["ORIGINAL", "PRIMARY"], ["DERIVED", "MIP"])}.items()
    ):
        slices = make_slices()
        for k, ds in enumerate(slices):
            setattr(ds, keyword, values[k >= 4])
        assert code_of(write_series(tmp_path / str(number), slices)) == "several_image_types"


def test_modalities_in_small_letters(tmp_path: Path) -> None:
    assert read_volume(make_series(tmp_path / "s"), ReaderPolicy(modalities=("ct",))).modality == "CT"
    with pytest.raises(InputError, match="min_slices"):
        ReaderPolicy(min_slices=9, max_slices=3)


def test_study_cases_take_no_report_for_a_damaged_slice(tmp_path: Path) -> None:
    for number in (1, 2):
        slices = make_slices(series=number)
        for ds in slices:
            ds.StudyInstanceUID = f"1.2.{number}"
        named(tmp_path / "x" / str(number), slices)
        for path in (tmp_path / "x" / str(number)).iterdir():
            path.rename(tmp_path / "x" / f"{number}_{path.name}")
    report = Dataset()
    report.SOPClassUID, report.SOPInstanceUID = "1.2.840.10008.5.1.4.1.1.88.22", "1.2.9"
    save(report, tmp_path / "x" / "SR0001")
    assert len(find_scans(tmp_path, dicom_cases="study").scans) == 2
