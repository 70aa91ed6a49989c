from __future__ import annotations

import concurrent.futures
import json
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pydicom
import pytest
from pydicom.dataset import Dataset
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ImplicitVRLittleEndian,
    JPEGLSLossless,
    RLELossless,
)

from bundle.data.policy import ReaderPolicy
from bundle.data.series import read_volume
from bundle.data.stored_bits import stored_values
from bundle.errors import InputError, Refusal
from tests.data import dicom_factory as factory
from tests.data.dicom_factory import CANARY, largest_error, make_series, make_slices, save, set_pixels, write_series

TOLERANCE = 0.006  # half a step of the rescale slope, and float32


def refused(path: Path, policy: ReaderPolicy | None = None, channels: int = 1) -> Refusal:
    with pytest.raises(Refusal) as caught:
        read_volume(path, policy, channels)
    refusal = caught.value
    # What every refusal promises: one plain sentence, facts a JSON file can hold, nothing of the patient, no path.
    text = refusal.sentence + json.dumps(refusal.facts)
    assert "CANARY" not in text
    assert str(path) not in text
    assert "\n" not in refusal.sentence
    assert refusal.sentence.endswith(".")
    assert pickle.loads(pickle.dumps(refusal)).code == refusal.code
    return refusal


# --- must load, right to the voxel ---


@pytest.mark.parametrize("modality", ["CT", "MR"])
@pytest.mark.parametrize(
    "orientation", [factory.AXIAL, factory.CORONAL, factory.SAGITTAL, factory.FLIPPED, factory.oblique()]
)
def test_every_voxel_agrees_with_the_affine(tmp_path: Path, modality: str, orientation: tuple[float, ...]) -> None:
    slices = make_slices(modality, orientation=orientation)
    volume = read_volume(write_series(tmp_path / "s", slices))
    assert volume.array.shape == (12, 10, 8)
    assert volume.array.dtype == np.float32
    assert volume.affine.dtype == np.float64
    assert largest_error(volume) < TOLERANCE
    assert volume.slice_uids == tuple(str(ds.SOPInstanceUID) for ds in slices)  # made in order of row × column
    assert (volume.modality, volume.source, volume.series_uid) == (modality, "dicom", f"{factory.ROOT}.1")
    np.testing.assert_allclose(np.linalg.norm(volume.affine[:3, :3], axis=0), [0.7, 0.9, 2.5], rtol=1e-6)


def renumber(ds: Dataset, k: int) -> None:
    ds.InstanceNumber = 100 - k


def no_number(ds: Dataset, k: int) -> None:
    del ds.InstanceNumber


def mixed_thickness(ds: Dataset, k: int) -> None:
    ds.SliceThickness = 2.5 if k < 4 else 5
    ds.SeriesDate = "20200101" if k < 4 else "20200102"


def no_thickness(ds: Dataset, k: int) -> None:
    ds.SliceThickness = None


def slope_per_slice(ds: Dataset, k: int) -> None:
    values = factory.stored_pixels(ds) * 0.01 - 300
    ds.RescaleSlope, ds.RescaleIntercept = 0.01 + 0.0005 * k, -290.0 - k
    set_pixels(ds, np.rint((values - ds.RescaleIntercept) / ds.RescaleSlope))


def signed(ds: Dataset, k: int) -> None:
    values = factory.stored_pixels(ds).astype(int) - 30000
    ds.PixelRepresentation, ds.RescaleIntercept = 1, 0.0
    set_pixels(ds, values)


def mixed_sign(ds: Dataset, k: int) -> None:
    if k % 2:
        signed(ds, k)


def monochrome1(ds: Dataset, k: int) -> None:
    ds.PhotometricInterpretation = "MONOCHROME1"


def jitter(ds: Dataset, k: int) -> None:
    ds.ImagePositionPatient[2] = round(float(ds.ImagePositionPatient[2]) + 0.03 * (-1) ** k, 3)


def no_frame_of_reference(ds: Dataset, k: int) -> None:
    del ds.FrameOfReferenceUID


@pytest.mark.parametrize(
    "edit",
    [renumber, no_number, mixed_thickness, no_thickness, slope_per_slice, signed, mixed_sign, monochrome1,
     no_frame_of_reference],
)  # fmt: skip
@pytest.mark.parametrize("modality", ["CT", "MR"])
def test_harmless_variety_loads(tmp_path: Path, edit: factory.Edit, modality: str) -> None:
    volume = read_volume(make_series(tmp_path / "s", edit, modality=modality))
    assert largest_error(volume) < TOLERANCE + 0.003


def test_jitter_of_a_real_scanner_loads(tmp_path: Path) -> None:
    volume = read_volume(make_series(tmp_path / "s", jitter))
    # 0.03 mm up and down, at 1.7 units a mm
    assert 0.01 < largest_error(volume) < 0.03 * 1.7 + TOLERANCE


def test_mr_without_rescale_keeps_stored_values(tmp_path: Path) -> None:
    def strip(ds: Dataset, k: int) -> None:
        del ds.RescaleSlope, ds.RescaleIntercept
        expected.append(factory.stored_pixels(ds).T)

    expected: list[np.ndarray] = []
    volume = read_volume(make_series(tmp_path / "s", strip, modality="MR"))
    np.testing.assert_array_equal(volume.array, np.stack(expected, axis=-1).astype(np.float32))


def test_junk_and_pixelless_dicom_beside_are_passed_over(tmp_path: Path) -> None:
    folder = make_series(tmp_path / "s")
    (folder / "README.txt").write_text("notes")
    (folder / "Thumbs.db").write_bytes(b"\0" * 300)
    (folder / "._001.dcm").write_bytes(b"\x00\x05\x16\x07" + b"\0" * 500)
    (folder / "empty.log").touch()
    (folder / "sub").mkdir()
    for number, class_uid in enumerate(["1.2.840.10008.5.1.4.1.1.88.22", "1.2.840.10008.5.1.4.1.1.11.1"]):
        other = Dataset()
        other.SOPClassUID, other.SOPInstanceUID = class_uid, f"{factory.ROOT}.9.{number}"
        other.SeriesInstanceUID, other.PatientID, other.Modality = f"{factory.ROOT}.9", CANARY, "SR"
        save(other, folder / f"other{number}.dcm")
    assert largest_error(read_volume(folder)) < TOLERANCE


def test_names_without_extension_load(tmp_path: Path) -> None:
    folder = write_series(tmp_path / "s", make_slices(), name="IM{:04d}")
    (folder / "DICOMDIR.bak").write_text("x")
    assert read_volume(folder).array.shape == (12, 10, 8)


def test_identical_copies_count_once(tmp_path: Path) -> None:
    folder = make_series(tmp_path / "s")
    for path in sorted(folder.iterdir())[:3]:
        (folder / f"copy of {path.name}").write_bytes(path.read_bytes())
    volume = read_volume(folder)
    assert volume.array.shape[2] == 8
    assert largest_error(volume) < TOLERANCE


@pytest.mark.parametrize(
    "syntax", [ImplicitVRLittleEndian, DeflatedExplicitVRLittleEndian, RLELossless, JPEGLSLossless]
)
def test_encodings_give_the_same_voxels(tmp_path: Path, syntax: str) -> None:
    slices = make_slices("MR")
    for ds in slices:
        if syntax in (RLELossless, JPEGLSLossless):
            ds.file_meta = pydicom.dataset.FileMetaDataset()
            ds.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
            ds.compress(syntax, generate_instance_uid=False)
        else:
            ds.file_meta = pydicom.dataset.FileMetaDataset()
            ds.file_meta.TransferSyntaxUID = syntax
    assert largest_error(read_volume(write_series(tmp_path / "s", slices))) < TOLERANCE


def test_big_endian_loads(tmp_path: Path) -> None:
    slices = make_slices()
    for ds in slices:
        ds.file_meta = pydicom.dataset.FileMetaDataset()
        ds.file_meta.TransferSyntaxUID = ExplicitVRBigEndian
        ds.PixelData = factory.stored_pixels(ds).astype(">u2").tobytes()
    assert largest_error(read_volume(write_series(tmp_path / "s", slices))) < TOLERANCE


@pytest.mark.parametrize("signed_values", [False, True])
@pytest.mark.parametrize("high_bit", [11, 13, 15])
def test_overlay_bits_outside_the_stored_bits_are_dropped(signed_values: bool, high_bit: int) -> None:
    rng = np.random.default_rng(0)
    values = rng.integers(-2048, 2048, 200) if signed_values else rng.integers(0, 4096, 200)
    low = high_bit - 11
    mask = 0xFFF << low
    noise = rng.integers(0, 1 << 16, 200)
    raw = (((values << low) & mask) | (noise & ~mask & 0xFFFF)).astype(np.uint16)
    raw = raw.view(np.int16) if signed_values else raw
    np.testing.assert_array_equal(stored_values(raw, 16, 12, high_bit, signed_values), values)


def test_twelve_bits_with_overlay_load(tmp_path: Path) -> None:
    def overlay(ds: Dataset, k: int) -> None:
        values = factory.stored_pixels(ds) * 0.01 - 300
        ds.RescaleSlope, ds.RescaleIntercept = 0.1, 0.0
        ds.BitsStored, ds.HighBit, ds.PixelRepresentation = 12, 11, 1
        stored = np.rint(values / 0.1).astype(int)
        assert np.abs(stored).max() < 2048
        overlay_bits = (np.arange(stored.size).reshape(stored.shape) % 16) << 12
        ds.PixelData = ((stored & 0xFFF) | overlay_bits).astype("<u2").tobytes()

    assert largest_error(read_volume(make_series(tmp_path / "s", overlay))) < 0.051


@pytest.mark.parametrize("limit", [False, True])
def test_padding_takes_the_least_real_value(tmp_path: Path, limit: bool) -> None:
    def pad(ds: Dataset, k: int) -> None:
        signed(ds, k)
        stored = factory.stored_pixels(ds).copy()
        stored[0, :3] = -32000
        stored[1, 0] = -31990 if limit else -32000
        set_pixels(ds, stored)
        ds.add_new("PixelPaddingValue", "SS", -32000)
        if limit:
            ds.add_new("PixelPaddingRangeLimit", "SS", -31980)

    plain = read_volume(make_series(tmp_path / "plain"))
    volume = read_volume(make_series(tmp_path / "padded", pad))
    padding = np.zeros(volume.array.shape, dtype=bool)
    padding[:3, 0] = padding[0, 1] = True
    np.testing.assert_allclose(volume.array[~padding], plain.array[~padding], atol=1e-3)
    assert np.unique(volume.array[padding]).tolist() == [volume.array[~padding].min()]


def test_single_file_needs_a_policy_that_allows_it(tmp_path: Path) -> None:
    path = next((make_series(tmp_path / "s")).iterdir())
    refusal = refused(path)
    assert refusal.code == "too_few_slices"
    assert "folder" in refusal.sentence
    volume = read_volume(path, ReaderPolicy(min_slices=1))
    assert volume.array.shape == (12, 10, 1)
    assert largest_error(volume) < TOLERANCE
    assert volume.affine[2, 2] == pytest.approx(2.5)


def test_reading_is_silent_and_works_in_threads(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def odd(ds: Dataset, k: int) -> None:
        ds.SpecificCharacterSet = "ISO_IR 999"  # pydicom warns of it, quoting the value
        ds.StationName = CANARY * 3

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        folder = make_series(tmp_path / "s", odd)
    caplog.clear()
    with warnings.catch_warnings(record=True) as seen, concurrent.futures.ThreadPoolExecutor(4) as pool:
        warnings.simplefilter("always")
        volumes = list(pool.map(read_volume, [folder] * 6))
    assert all(np.array_equal(v.array, volumes[0].array) for v in volumes)
    assert not seen
    assert not caplog.records


# --- must refuse, each with its own code ---


def at(position: int, change: factory.Edit) -> factory.Edit:
    def edit(ds: Dataset, k: int) -> None:
        if k == position:
            change(ds, k)

    return edit


def put(**tags: object) -> factory.Edit:
    def edit(ds: Dataset, k: int) -> None:
        for keyword, value in tags.items():
            if value is None:
                delattr(ds, keyword)
            else:
                setattr(ds, keyword, value)

    return edit


def raw(keyword: str, text: str) -> factory.Edit:
    """Write the bytes as they are, past pydicom's checks."""

    def edit(ds: Dataset, k: int) -> None:
        value = text.encode() + b" " * (len(text) % 2)
        tag = pydicom.tag.Tag(keyword)
        ds[keyword] = pydicom.dataelem.RawDataElement(tag, "DS", len(value), value, 0, False, True)

    return edit


def sheared(ds: Dataset, k: int) -> None:
    ds.ImagePositionPatient[1] = float(ds.ImagePositionPatient[1]) + 0.4 * k


def test_missing_slices_are_counted(tmp_path: Path) -> None:
    slices = make_slices(count=12)
    refusal = refused(write_series(tmp_path / "s", slices[:4] + slices[5:8] + slices[9:]))
    assert (refusal.code, refusal.facts["missing"]) == ("missing_slices", 2)


def test_one_missing_of_four_is_seen(tmp_path: Path) -> None:
    slices = make_slices(count=4)
    assert refused(write_series(tmp_path / "s", [slices[0], slices[1], slices[3]])).code == "missing_slices"


def test_tolerances_are_the_policy(tmp_path: Path) -> None:
    folder = make_series(tmp_path / "s", jitter)
    assert refused(folder, ReaderPolicy(spacing_tolerance_mm=0.05)).code == "uneven_spacing"
    assert refused(folder, ReaderPolicy(spacing_tolerance_relative=0.02)).code == "uneven_spacing"
    assert refused(folder, ReaderPolicy(position_tolerance_mm=0.02)).code == "uneven_spacing"
    assert refused(folder, ReaderPolicy(modalities=("MR",))).code == "modality"
    assert refused(folder, ReaderPolicy(max_slices=7)).code == "too_many_slices"
    assert refused(folder, ReaderPolicy(max_voxels=500)).code == "too_large"


def test_a_drift_within_every_gap_is_still_seen(tmp_path: Path) -> None:
    # Each gap is off by 0.06 mm only, but the middle slice ends 0.6 mm from where an even grid has it.
    depth = np.cumsum([0.0] + [2.44] * 20 + [2.56] * 20)
    positions = np.c_[np.zeros((41, 2)), depth]
    assert refused(make_series(tmp_path / "s", count=41, positions=positions)).code == "uneven_spacing"


def test_conflicting_copies(tmp_path: Path) -> None:
    slices = make_slices()
    folder = write_series(tmp_path / "s", slices)
    slices[2].PixelData = bytes(len(slices[2].PixelData))
    save(slices[2], folder / "again.dcm")
    assert refused(folder).code == "conflicting_copies"


def test_ct_without_hounsfield_units(tmp_path: Path) -> None:
    assert refused(make_series(tmp_path / "a", put(RescaleSlope=None, RescaleIntercept=None))).code == "rescale_absent"
    assert refused(make_series(tmp_path / "b", put(RescaleType="CANARY"))).code == "not_hounsfield"
    assert largest_error(read_volume(make_series(tmp_path / "c", put(RescaleType="HU")))) < TOLERANCE


def test_an_end_slice_cut_anywhere_is_never_passed_over(tmp_path: Path) -> None:
    folder = write_series(tmp_path / "s", make_slices())
    slices = {path: pydicom.dcmread(path).ImagePositionPatient[2] for path in folder.iterdir()}
    last = max(slices, key=lambda p: slices[p])
    content = last.read_bytes()
    for size in [*range(0, len(content), 29), len(content) - 1]:
        last.write_bytes(content[:size])
        refused(folder)


def test_damaged_header_bytes_never_give_a_wrong_volume(tmp_path: Path) -> None:
    folder = write_series(tmp_path / "s", make_slices(matrix=(6, 7)))
    clean = read_volume(folder)
    target = sorted(folder.iterdir())[3]
    content = target.read_bytes()
    place_of_target = int(pydicom.dcmread(target).InstanceNumber) - 1
    others = [k for k in range(8) if k != place_of_target]
    header = len(content) - 2 * 6 * 7
    rng = np.random.default_rng(0)
    codes, loaded = set(), 0
    for _ in range(400):
        mutant = bytearray(content)
        for place in rng.integers(132, header, rng.integers(1, 4)):
            mutant[place] = rng.integers(0, 256)
        target.write_bytes(bytes(mutant))
        try:
            volume = read_volume(folder)
        except Refusal as refusal:
            codes.add(refusal.code)
            continue
        # Within the one slice, a digit of the rescale or a sign bit may stay plausible: nothing can tell. The grid, the
        # order and every other slice must be untouched.
        loaded += 1
        assert volume.array.shape == clean.array.shape
        np.testing.assert_array_equal(volume.array[:, :, others], clean.array[:, :, others])
        np.testing.assert_allclose(volume.affine, clean.affine, atol=0.1)
    assert loaded > 20
    assert len(codes) > 5


def test_unreadable_compression_is_named(tmp_path: Path) -> None:
    slices = make_slices()
    for ds in slices:
        ds.file_meta = pydicom.dataset.FileMetaDataset()
        ds.file_meta.TransferSyntaxUID = "1.2.840.10008.1.2.4.100"  # MPEG2, never decoded here
        ds.PixelData = pydicom.encaps.encapsulate([b"\0" * 64])
        ds["PixelData"].is_undefined_length = True
    refusal = refused(write_series(tmp_path / "s", slices))
    assert refusal.code == "transfer_syntax"
    assert "MPEG2" in refusal.sentence


def test_truncated_compressed_pixels(tmp_path: Path) -> None:
    slices = make_slices("MR")
    ds = slices[3]
    for one in slices:
        one.file_meta = pydicom.dataset.FileMetaDataset()
        one.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
        one.compress(RLELossless, generate_instance_uid=False)
    frame = pydicom.encaps.get_frame(ds.PixelData, 0)
    ds.PixelData = pydicom.encaps.encapsulate([frame[: len(frame) // 2]])
    assert refused(write_series(tmp_path / "s", slices)).code == "pixel_data_corrupt"


def test_deflate_bomb_is_stopped(tmp_path: Path) -> None:
    ds = make_slices(count=1)[0]
    ds.file_meta = pydicom.dataset.FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = DeflatedExplicitVRLittleEndian
    ds.add_new(0x00091001, "OB", bytes(300 << 20))
    path = save(ds, tmp_path / "bomb.dcm")
    del ds
    assert path.stat().st_size < 1 << 20
    assert refused(path).code == "too_large"


def test_what_is_no_image(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("hello")
    assert refused(tmp_path / "notes.txt").code == "not_an_image"
    assert refused(tmp_path).code == "no_images"
    (tmp_path / "zero.dcm").touch()
    assert refused(tmp_path / "zero.dcm").code == "empty_file"
    assert refused(tmp_path).code == "empty_file"
    with pytest.raises(InputError, match="does not exist"):
        read_volume(tmp_path / "nowhere")
    with pytest.raises(InputError, match="channels"):
        read_volume(tmp_path, channels=0)


def test_dicom_is_one_channel(tmp_path: Path) -> None:
    refusal = refused(make_series(tmp_path / "s"), channels=2)
    assert (refusal.code, refusal.facts) == ("channel_count", {"found": 1, "expected": 2})


@pytest.mark.parametrize(
    "setting",
    [{"min_slices": 0}, {"max_voxels": 1.5}, {"position_tolerance_mm": -1}, {"affine_tolerance_mm": "0.1"},
     {"spacing_range_mm": (2, 1)}, {"modalities": "CT"}, {"spacing_tolerance_relative": float("nan")}],
)  # fmt: skip
def test_senseless_policy(setting: dict[str, object]) -> None:
    with pytest.raises(InputError, match=next(iter(setting))):
        ReaderPolicy(**setting)  # type: ignore[arg-type]


# --- oracles ---


def read_with_itk(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    import itk

    names = itk.GDCMSeriesFileNames.New()
    names.SetDirectory(str(folder))
    files = names.GetFileNames(names.GetSeriesUIDs()[0])
    image = itk.imread(files, itk.F)
    affine = np.eye(4)
    affine[:3, :3] = itk.array_from_matrix(image.GetDirection()) * np.array(image.GetSpacing())
    affine[:3, 3] = np.array(image.GetOrigin())
    return itk.array_from_image(image).transpose(), np.diag([-1, -1, 1, 1]) @ affine


def read_with_simple_itk(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    import SimpleITK

    image = SimpleITK.ReadImage(SimpleITK.ImageSeriesReader.GetGDCMSeriesFileNames(str(folder)))
    affine = np.eye(4)
    affine[:3, :3] = np.reshape(image.GetDirection(), (3, 3)) * np.array(image.GetSpacing())
    affine[:3, 3] = image.GetOrigin()
    return SimpleITK.GetArrayFromImage(image).transpose(), np.diag([-1, -1, 1, 1]) @ affine


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("oracle", [read_with_itk, read_with_simple_itk])
@pytest.mark.parametrize("orientation", [factory.AXIAL, factory.SAGITTAL, factory.oblique()])
def test_agrees_with_itk(
    tmp_path: Path, orientation: tuple[float, ...], oracle: Callable[[Path], tuple[np.ndarray, np.ndarray]]
) -> None:
    folder = make_series(tmp_path / "s", orientation=orientation)
    volume = read_volume(folder)
    values, affine = oracle(folder)
    np.testing.assert_allclose(volume.array, values, atol=1e-3)
    np.testing.assert_allclose(volume.affine, affine, atol=1e-5)


def test_dicom_and_nifti_of_one_case_are_one_volume(tmp_path: Path) -> None:
    volume = read_volume(make_series(tmp_path / "s", orientation=factory.oblique()))
    nib.save(nib.Nifti1Image(volume.array, volume.affine), tmp_path / "s.nii.gz")
    again = read_volume(tmp_path / "s.nii.gz")
    np.testing.assert_array_equal(volume.array, again.array)
    np.testing.assert_allclose(volume.affine, again.affine, atol=1e-5)
