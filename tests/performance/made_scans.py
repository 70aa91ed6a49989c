"""Scans for the benchmark: a noisy body in air, as NIfTI files with a datalist and as uncompressed CT series."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Sequence
from pathlib import Path

import nibabel as nib
import numpy as np

from bundle.data.datalist import FORMAT
from bundle.files import replacing, write_json
from tests.data import dicom_factory
from tests.data.dicom_factory import make_slices, save, set_pixels

__all__ = ["body", "digest_of_makers", "write_datalist", "write_nifti", "write_series"]

AIR, INTERCEPT = -1000, -1024
FIELD = 256.0  # mm along rows and columns


def digest_of_makers() -> str:
    """Changes with the code that makes the scans, so that old ones are not taken for new."""
    content = b"".join(Path(file).read_bytes() for file in (__file__, dicom_factory.__file__))
    return hashlib.sha256(content).hexdigest()[:8]


def body(side: int, slices: int, seed: int) -> np.ndarray:
    """(side, side, slices) int16 in HU: a noisy ellipse that every slice shows, with a brighter organ in it."""
    rng = np.random.default_rng(seed)
    x, y, z = np.ogrid[-1 : 1 : side * 1j, -1 : 1 : side * 1j, -1 : 1 : slices * 1j]
    volume = np.full((side, side, slices), float(AIR), dtype=np.float32)
    inside = np.broadcast_to((x / 0.85) ** 2 + (y / 0.7) ** 2 < 1, volume.shape)
    volume[inside] = 40
    place = rng.uniform(-0.3, 0.3, 2)
    volume[(x - place[0]) ** 2 + (y - place[1]) ** 2 + 0.1 * z**2 < 0.05] = 120
    noise = rng.normal(0, 20, (side, side, 1)).astype(np.float32) + rng.normal(0, 10, slices).astype(np.float32)
    return (volume + inside * noise).astype(np.int16)


def write_nifti(path: Path, side: int, slices: int, seed: int) -> None:
    """One volume as .nii.gz, whole or not at all; what is there is left."""
    if not path.exists():
        affine = np.diag([-FIELD / side, -FIELD / side, 3.0, 1.0])
        with replacing(path) as temporary:
            nib.save(nib.Nifti1Image(body(side, slices, seed), affine), temporary)


def write_datalist(folder: Path, images: Sequence[str]) -> Path:
    """A datalist all of whose cases are for training, in turn negative and positive."""
    names = [f"c{number:03d}" for number in range(len(images))]
    cases = [
        {"case": name, "patient": name, "image": image, "label": number % 2}
        for number, (name, image) in enumerate(zip(names, images, strict=True))
    ]
    path = folder / f"datalist_{len(images)}.json"
    fold = {"training": names, "validation": [], "test": []}
    write_json(path, {"format": FORMAT, "class_names": ["negative", "positive"], "cases": cases, "folds": [fold]})
    return path


def write_series(folder: Path, side: int, slices: int, seed: int) -> Path:
    """One axial CT series, a file a slice, whole or not at all; what is there is left."""
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    volume = body(side, slices, seed)
    pixel = FIELD / side
    headers = make_slices(
        matrix=(2, 2),
        count=slices,
        pixel_spacing=(pixel, pixel),
        gap=3.0,
        slope=1.0,
        intercept=INTERCEPT,
        series=seed + 1,
    )
    with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
        made = Path(temporary) / "series"
        made.mkdir()
        for k, header in enumerate(headers):
            header.Rows, header.Columns = side, side
            set_pixels(header, volume[:, :, k].T - INTERCEPT)
            save(header, made / f"{k:04d}.dcm")
        made.rename(folder)
    return folder
