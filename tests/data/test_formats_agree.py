"""One case through DICOM, NIfTI, MetaImage and NRRD is one bag, and left stays left."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import dcm2niix
import nibabel as nib
import numpy as np
import pytest
import torch
from monai.transforms import Compose

from bundle.data.reader import LoadImageStrictd
from bundle.data.series import read_volume
from bundle.data.transforms import (
    ResizeAndPadd,
    VolumeToBagd,
)
from bundle.data.volume_transforms import (
    OrientForSlicingd,
)
from tests.data import dicom_factory as factory
from tests.data.dicom_factory import GRADIENT, make_slices, true_value, write_series

ORIENTATIONS = {
    "axial": factory.AXIAL,
    "coronal": factory.CORONAL,
    "sagittal": factory.SAGITTAL,
    "rows to the right": factory.FLIPPED,
    "oblique": factory.oblique(),
}
LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])


def bag_of(path: Path, axis: str) -> dict[str, Any]:
    steps = [
        LoadImageStrictd("image"),
        OrientForSlicingd("image", axis),
        VolumeToBagd("image", axis),
        ResizeAndPadd("image", (16, 16)),
    ]
    return dict(Compose(steps)({"image": path}))


def same_bag(one: dict[str, Any], other: dict[str, Any], atol: float = 0.011) -> None:
    torch.testing.assert_close(one["image"], other["image"], atol=atol, rtol=0)
    torch.testing.assert_close(one["slice_position"], other["slice_position"], atol=1e-3, rtol=0)
    np.testing.assert_allclose(one["pixel_spacing"], other["pixel_spacing"], atol=1e-4)


def reoriented(folder: Path, to: Path, codes: str) -> Path:
    """The volume as NIfTI, stored along other axes."""
    volume = read_volume(folder)
    image = nib.Nifti1Image(volume.array, volume.affine)
    wanted = nib.orientations.axcodes2ornt(codes)
    change = nib.orientations.ornt_transform(nib.orientations.io_orientation(volume.affine), wanted)
    nib.save(image.as_reoriented(change), to)
    return to


def with_itk(folder: Path, to: Path) -> Path:
    import itk

    volume = read_volume(folder)
    image = itk.image_from_array(np.ascontiguousarray(volume.array.transpose()))
    lps = LPS_TO_RAS @ volume.affine
    sizes = np.linalg.norm(lps[:3, :3], axis=0)
    image.SetSpacing([float(v) for v in sizes])
    image.SetOrigin([float(v) for v in lps[:3, 3]])
    image.SetDirection(itk.matrix_from_array(np.ascontiguousarray(lps[:3, :3] / sizes)))
    itk.imwrite(image, str(to), compression=True)
    return to


def with_dcm2niix(folder: Path, to: Path) -> Path:
    """The volume as dcm2niix, which reads and orders DICOM by itself, converts it."""
    to.mkdir()
    subprocess.run([dcm2niix.bin, "-z", "y", "-b", "n", "-f", "x", "-o", to, folder], check=True, capture_output=True)
    (image,) = to.glob("*.nii.gz")
    return image


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("axis", ["axial", "coronal", "sagittal", "acquired"])
@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_every_format_gives_the_same_bag(tmp_path: Path, orientation: str, axis: str) -> None:
    folder = write_series(tmp_path / "s", make_slices("MR", orientation=ORIENTATIONS[orientation]))
    dicom = bag_of(folder, axis)
    files = [with_itk(folder, tmp_path / f"a.{suffix}") for suffix in ("mha", "nrrd", "nii.gz")]
    if axis != "acquired":  # which names the third stored axis
        files += [reoriented(folder, tmp_path / f"{codes}.nii", codes) for codes in ("RAS", "PIR", "LSA")]
    for path in files:
        same_bag(bag_of(path, axis), dicom)
    assert dicom["image"].std() > 1


@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_a_converter_of_its_own_mind_gives_the_same_bag(tmp_path: Path, orientation: str) -> None:
    folder = write_series(tmp_path / "s", make_slices("CT", orientation=ORIENTATIONS[orientation]))
    image = with_dcm2niix(folder, tmp_path / "converted")
    for axis in ("axial", "coronal", "sagittal"):
        same_bag(bag_of(image, axis), bag_of(folder, axis), atol=0.02)  # float32 of its own slope and intercept


@pytest.mark.parametrize("kind", ["dicom", "nifti", "mha"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_left_stays_left(tmp_path: Path, kind: str) -> None:
    folder = write_series(tmp_path / "s", make_slices("MR"))
    path = {"dicom": lambda: folder, "nifti": lambda: reoriented(folder, tmp_path / "a.nii", "RAS"),
            "mha": lambda: with_itk(folder, tmp_path / "a.mha")}[kind]()  # fmt: skip
    image = Compose([LoadImageStrictd("image"), OrientForSlicingd("image", "axial"), VolumeToBagd("image", "axial")])(
        {"image": path}
    )["image"]
    # Columns run to the patient's left, rows to the back, slices to the head; intensity rises along all three.
    corner = image[0, 0, 0, 0]
    steps = [float(neighbour - corner) for neighbour in (image[0, 0, 0, 1], image[0, 0, 1, 0], image[1, 0, 0, 0])]
    np.testing.assert_allclose(steps, GRADIENT * [0.7, 0.9, 2.5], atol=0.011)
    assert float(corner) == pytest.approx(float(true_value(np.array([-20.0, 15.0, -30.0]))), abs=0.011)
