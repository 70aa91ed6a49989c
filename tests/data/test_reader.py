from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from monai.transforms import LoadImaged
from pydicom.dataset import Dataset

from bundle.data.policy import ReaderPolicy
from bundle.data.reader import LoadImageStrictd, VolumeReader
from bundle.errors import InputError, Refusal
from tests.data.dicom_factory import CANARY, OFFSET, make_series, oblique, true_value

AFFINE = np.diag([-0.8, -0.9, 2.5, 1.0])


def write(path: Path, shape: tuple[int, ...] = (7, 6, 5), affine: np.ndarray = AFFINE, start: int = 0) -> Path:
    nib.save(nib.Nifti1Image((np.arange(np.prod(shape)).reshape(shape) + start).astype(np.int16), affine), path)
    return path


def test_dicom_becomes_a_meta_tensor(tmp_path: Path) -> None:
    folder = make_series(tmp_path / CANARY, orientation=oblique())
    image = LoadImageStrictd("image")({"image": folder, "label": 1})["image"]
    assert isinstance(image, MetaTensor)
    assert image.shape == (1, 12, 10, 8)
    assert image.dtype == torch.float32
    assert image.affine.dtype == torch.float64
    place = np.asarray(image.affine) @ [3, 4, 5, 1]
    assert float(image[0, 3, 4, 5]) == pytest.approx(true_value(place[:3] * [-1, -1, 1]), abs=0.01)
    assert float(image[0, 0, 0, 0]) != OFFSET
    meta = image.meta
    assert len(meta["slice_uids"]) == 8
    assert meta["series_uid"].startswith("1.2.")
    assert (meta["modality"], meta["source"], meta["space"]) == ("CT", "dicom", "RAS")
    np.testing.assert_array_equal(meta["original_affine"], image.affine)
    assert list(meta["spatial_shape"]) == [12, 10, 8]


def test_no_path_and_no_patient_in_meta(tmp_path: Path) -> None:
    folder = make_series(tmp_path / CANARY)
    image = LoadImageStrictd("image")({"image": str(folder)})["image"]
    assert "CANARY" not in repr(image.meta)
    assert str(tmp_path) not in repr(image.meta)
    assert "filename_or_obj" not in image.meta


def test_nifti_with_channels_is_channel_first(tmp_path: Path) -> None:
    path = write(tmp_path / "a.nii.gz", (7, 6, 5, 2))
    image = LoadImageStrictd("image", channels=2)({"image": path})["image"]
    assert image.shape == (2, 7, 6, 5)
    np.testing.assert_array_equal(image[1], np.arange(420).reshape(7, 6, 5, 2)[..., 1])
    assert image.meta["slice_uids"] is None
    assert image.meta["source"] == "nifti"


def test_modalities_become_channels_in_order(tmp_path: Path) -> None:
    paths = [write(tmp_path / f"{n}.nii.gz", start=1000 * n) for n in range(3)]
    image = LoadImageStrictd("image", channels=3)({"image": paths[::-1]})["image"]
    assert image.shape == (3, 7, 6, 5)
    assert image[:, 0, 0, 0].tolist() == [2000, 1000, 0]


def test_modalities_on_different_grids_are_refused(tmp_path: Path) -> None:
    first = write(tmp_path / "a.nii.gz")
    moved = AFFINE.copy()
    moved[2, 3] = 0.5
    others = {
        "shape": write(tmp_path / "b.nii.gz", (7, 6, 4)),
        "place": write(tmp_path / "c.nii.gz", affine=moved),
    }
    load = LoadImageStrictd("image", channels=2)
    for other in others.values():
        with pytest.raises(Refusal) as caught:
            load({"image": [first, other]})
        assert caught.value.code == "modalities_disagree"
    lenient = LoadImageStrictd("image", channels=2, policy=ReaderPolicy(affine_tolerance_mm=0.6))
    assert lenient({"image": [first, others["place"]]})["image"].shape == (2, 7, 6, 5)


def test_channel_count_names_both_numbers(tmp_path: Path) -> None:
    path = write(tmp_path / "a.nii.gz", (7, 6, 5, 2))
    single = write(tmp_path / "b.nii.gz")
    for image, channels, found in ((path, 1, 2), (single, 4, 1), ([single, single], 3, 2), ([single, single], 1, 2)):
        with pytest.raises(Refusal) as caught:
            LoadImageStrictd("image", channels=channels)({"image": image})
        assert (caught.value.code, caught.value.facts) == ("channel_count", {"found": found, "expected": channels})


def tilt(ds: Dataset, k: int) -> None:
    ds.ImagePositionPatient[1] = float(ds.ImagePositionPatient[1]) + 0.4 * k


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:NvImgCodec")
def test_there_is_no_fall_back(tmp_path: Path) -> None:
    folder = make_series(tmp_path / "s", tilt)
    # What MONAI does with a reader given in the constructor: it reads by other means, and says nothing.
    strict = VolumeReader(policy=ReaderPolicy(gantry_tilt="refuse"))
    assert LoadImaged("image", reader=strict)({"image": folder})["image"].numel() > 0
    with pytest.raises(Refusal, match="gantry tilt"):
        LoadImageStrictd("image", policy=ReaderPolicy(gantry_tilt="refuse"))({"image": folder})


def test_keys(tmp_path: Path) -> None:
    path = write(tmp_path / "a.nii.gz")
    assert LoadImageStrictd(["image", "other"], allow_missing_keys=True)({"image": path, "x": 1})["x"] == 1
    with pytest.raises(KeyError):
        LoadImageStrictd(["image", "other"])({"image": path})
    with pytest.raises(InputError, match="does not exist"):
        LoadImageStrictd("image")({"image": tmp_path / "nothing.nii"})


def test_senseless_settings() -> None:
    with pytest.raises(InputError, match="channels"):
        VolumeReader(channels=True)
    with pytest.raises(InputError, match="ReaderPolicy"):
        LoadImageStrictd("image", policy={"min_slices": 1})  # type: ignore[arg-type]


def test_name_tells_monai_deploy_that_it_loads() -> None:
    assert "LoadImage" in LoadImageStrictd.__name__
