"""Series of real scanners: each loads right, or is refused for the right reason."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import dcm2niix
import highdicom
import nibabel as nib
import numpy as np
import pydicom
import pytest
from scipy.ndimage import map_coordinates

from bundle.data.policy import ReaderPolicy
from bundle.data.series import read_volume
from bundle.data.volume import Volume
from bundle.errors import Refusal

from .test_series import read_with_itk

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
RAS_OF_LPS = np.diag([-1.0, -1.0, 1.0, 1.0])


@pytest.fixture
def dicom_dir(data_dir: Path) -> Path:
    return data_dir / "dicom"


def some_of(folder: Path, to: Path, names: Sequence[str]) -> Path:
    to.mkdir()
    for name in names:
        shutil.copy(folder / name, to)
    return to


@pytest.mark.parametrize(
    ("folder", "code"),
    [
        ("ge_ct_gantry_tilt", "uneven_spacing"),  # 14 slices 4.0 mm apart, then 14 slices 7.0 mm apart
        ("ge_dti_001", "several_b_values"),
        ("ge_mr_fmri_10_timepoints", "repeated_position"),  # no standard tag tells its time points apart
        ("siemens_fmri_classic_001", "several_time_points"),
        ("single_files", "several_patients"),
    ],
)
def test_what_is_no_single_volume_is_refused_for_its_reason(dicom_dir: Path, folder: str, code: str) -> None:
    with pytest.raises(Refusal) as caught:
        read_volume(dicom_dir / folder)
    assert caught.value.code == code


def test_a_plain_ct_is_what_itk_reads(dicom_dir: Path) -> None:
    volume = read_volume(dicom_dir / "philips_ct_5mm")
    values, affine = read_with_itk(dicom_dir / "philips_ct_5mm")
    np.testing.assert_array_equal(volume.array, values)
    np.testing.assert_allclose(volume.affine, affine, atol=1e-6)
    assert volume.array.min() == -1024
    assert -1010 < np.median(volume.array[volume.array < -900]) < -990  # air, HU


@pytest.mark.slow  # ITK takes 10 s over the zeros behind the pixel data of these files
def test_an_oblique_mr_with_jitter_is_what_itk_reads(dicom_dir: Path) -> None:
    volume = read_volume(dicom_dir / "ge_mr_oblique")
    values, affine = read_with_itk(dicom_dir / "ge_mr_oblique")
    real = values > 0  # 0 is this series' PixelPaddingValue
    np.testing.assert_array_equal(volume.array[real], values[real])
    assert np.unique(volume.array[~real]).tolist() == [values[real].min()]
    np.testing.assert_allclose(volume.affine, affine, atol=0.1)
    assert 0.05 < volume.facts["deviation_mm"] < 0.06


@pytest.mark.parametrize(
    "folder", ["hyperfine_anatomical_001", "philips_enhanced_anatomical_001", "siemens_multiframe_anatomical_001"]
)
def test_an_enhanced_mr_is_what_highdicom_and_dcm2niix_read(dicom_dir: Path, tmp_path: Path, folder: str) -> None:
    (path,) = (dicom_dir / folder).iterdir()
    volume = read_volume(dicom_dir / folder)
    assert volume.frame_numbers is not None
    assert sorted(volume.frame_numbers) == list(range(1, 9))
    dataset = pydicom.dcmread(path)
    if "SharedFunctionalGroupsSequence" in dataset:  # highdicom wants it, Siemens leaves it out
        dataset.FrameOfReferenceUID = "1.2.3"  # highdicom wants it, and the anonymiser took it
        theirs = highdicom.Image.from_dataset(dataset).get_volume(
            apply_presentation_lut=False, apply_real_world_transform=False, atol=0.01
        )
        # highdicom: (slice, row, column), LPS
        ours_of_theirs = theirs.affine[:, [2, 1, 0, 3]]
        array = theirs.array.transpose(2, 1, 0)
        if not np.allclose(ours_of_theirs[:3, 2], (RAS_OF_LPS @ volume.affine)[:3, 2], atol=0.01):
            array = array[:, :, ::-1]
        np.testing.assert_allclose(volume.array, array, rtol=1e-6, atol=1e-3)
    subprocess.run(
        [dcm2niix.bin, "-b", "n", "-f", "x", "-o", tmp_path, dicom_dir / folder], check=True, capture_output=True
    )
    (converted,) = tmp_path.glob("*.nii")
    same_as_nifti(volume, nib.load(converted), _scale_of_philips(dataset))  # type: ignore[arg-type]


def _scale_of_philips(dataset: pydicom.Dataset) -> float:
    """What dcm2niix multiplies rescaled values by: "precise" values, from a private tag, are stored / scale slope."""
    frame = dataset.PerFrameFunctionalGroupsSequence[0]
    if (0x2005, 0x140F) not in frame:
        return 1.0
    slope = frame.PixelValueTransformationSequence[0].RescaleSlope
    return 1 / (float(slope) * frame[0x2005, 0x140F][0][0x2005, 0x100E].value)


def same_as_nifti(volume: Volume, image: nib.Nifti1Image, scale: float) -> None:
    """Compare voxel by voxel, along whichever axes each stores them."""
    ours = nib.as_closest_canonical(nib.Nifti1Image(volume.array, volume.affine))
    theirs = nib.as_closest_canonical(image)
    np.testing.assert_allclose(ours.affine, theirs.affine, atol=0.02)
    np.testing.assert_allclose(ours.get_fdata() * scale, theirs.get_fdata(), rtol=1e-5, atol=1e-2)


@pytest.mark.parametrize(
    ("folder", "names", "shape"),
    [
        ("siemens_fmri_classic_001", [f"00{k}.dcm" for k in (1, 2, 3, 4)], (192, 192, 4)),
        ("ge_dti_001", [f"IM-0001-000{k}-0001.dcm" for k in (1, 2, 3, 4)], (128, 128, 4)),
    ],
)
def test_one_volume_of_several_is_what_itk_reads(
    dicom_dir: Path, tmp_path: Path, folder: str, names: list[str], shape: tuple[int, ...]
) -> None:
    part = some_of(dicom_dir / folder, tmp_path / "one", names)
    volume = read_volume(part)
    assert volume.array.shape == shape
    values, affine = read_with_itk(part)
    np.testing.assert_array_equal(volume.array, values)
    np.testing.assert_allclose(volume.affine, affine, atol=1e-3)


def test_a_tilted_ct_keeps_its_tilt_or_is_made_upright(dicom_dir: Path, tmp_path: Path) -> None:
    part = some_of(dicom_dir / "ge_ct_gantry_tilt", tmp_path / "even", [f"{k:02d}.dcm" for k in range(1, 15)])
    kept = read_volume(part)
    tilt = float(pydicom.dcmread(part / "01.dcm").GantryDetectorTilt)
    assert kept.facts["tilt_degrees"] == pytest.approx(abs(tilt), abs=0.01)
    # The table moves along the patient's z axis, whatever the gantry does.
    np.testing.assert_allclose(kept.affine[:3, 2], [0, 0, 4.22], atol=1e-3)
    upright = read_volume(part, ReaderPolicy(gantry_tilt="resample"))
    axes = upright.affine[:3, :3] / np.linalg.norm(upright.affine[:3, :3], axis=0)
    np.testing.assert_allclose(axes.T @ axes, np.eye(3), atol=1e-6)
    assert upright.slice_uids == kept.slice_uids
    assert "18.5°" in upright.facts["corrections"][0]
    # What lies at a place in the upright stack is what lay there before, interpolated within the acquired slice.
    index = np.stack(np.meshgrid(*(np.arange(0, n, 7) for n in upright.array.shape[:2]), [7], indexing="ij"), axis=-1)
    places = np.linalg.inv(kept.affine) @ upright.affine @ np.c_[index.reshape(-1, 3), np.ones(index.size // 3)].T
    np.testing.assert_allclose(places[2], 7, atol=1e-4)
    inside = ((places[:2] > 0.01) & (places[:2] < 510.99)).all(axis=0)
    expected = map_coordinates(kept.array[:, :, 7], places[:2, inside], order=1)
    np.testing.assert_allclose(upright.array[tuple(index.reshape(-1, 3).T)][inside], expected, atol=0.05)
    assert inside.sum() > 4000


@pytest.mark.parametrize("name", ["jpeg_2000", "jpeg_ls", "rle", "explicit_big", "implicit_little"])
def test_single_files_are_what_pydicom_decodes(dicom_dir: Path, name: str) -> None:
    path = dicom_dir / "single_files" / f"{name}.dcm"
    volume = read_volume(path, ReaderPolicy(min_slices=1))
    dataset = pydicom.dcmread(path)
    expected = pydicom.pixels.apply_rescale(dataset.pixel_array, dataset).T
    padding = np.isin(dataset.pixel_array.T, [dataset.get("PixelPaddingValue", 99999)])
    if name == "jpeg_2000":  # lossy: what was padding is blurred below −1024 HU
        padding |= expected < -1024
    np.testing.assert_allclose(volume.array[..., 0][~padding], expected[~padding], rtol=1e-6)
    assert volume.facts["lossy"] is (name in ("jpeg_2000", "jpeg_ls"))
    assert volume.facts["padding_voxels"] == padding.sum()


def test_a_real_localizer_is_told(dicom_dir: Path) -> None:
    with pytest.raises(Refusal) as caught:
        read_volume(dicom_dir / "single_files" / "jpeg_lossless_sel1.dcm", ReaderPolicy(min_slices=1))
    assert caught.value.code == "localizer"


def test_lossy_compression_can_be_refused(dicom_dir: Path) -> None:
    with pytest.raises(Refusal) as caught:
        read_volume(dicom_dir / "single_files" / "jpeg_2000.dcm", ReaderPolicy(min_slices=1, accept_lossy=False))
    assert caught.value.code == "lossy"
