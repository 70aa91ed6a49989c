"""This project's reader and those of others, each as one function: a folder → the volumes it gives.

Each is used as its own documentation shows it, with its defaults. A volume is an array (X, Y, Z) or (X, Y, Z, T) and
its voxel → RAS mm affine.
"""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["OURS", "READERS", "packages_of"]

Found = list[tuple[NDArray[Any], NDArray[np.float64]]]
LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])
OURS = "this reader"


def this_reader() -> Callable[[Path, Any], Found]:
    from bundle.data.series import read_volume

    def read(folder: Path, policy: Any) -> Found:
        volume = read_volume(folder, policy)
        return [(volume.array, volume.affine)]

    return read


def _monai(name: str) -> Callable[[Path, Any], Found]:
    import itk
    import monai.data

    for part in ("GDCMImageIO", "GDCMSeriesFileNames", "Image", "ImageFileReader", "ImageSeriesReader"):
        getattr(itk, part)  # itk loads a module when it is first asked for

    def read(folder: Path, policy: Any) -> Found:
        reader = getattr(monai.data, name)()
        array, meta = reader.get_data(reader.read(folder))
        return [(np.asarray(array), np.asarray(meta["affine"], dtype=float))]

    return read


def simple_itk() -> Callable[[Path, Any], Found]:
    import SimpleITK

    def read(folder: Path, policy: Any) -> Found:
        names = SimpleITK.ImageSeriesReader.GetGDCMSeriesFileNames(str(folder))
        image = SimpleITK.ReadImage(names if len(names) != 1 else names[0])
        array = SimpleITK.GetArrayFromImage(image)
        if image.GetNumberOfComponentsPerPixel() > 1:
            array = array.mean(axis=-1)
        affine, axes = np.eye(4), image.GetDimension()
        affine[:axes, :axes] = np.reshape(image.GetDirection(), (axes, axes)) * image.GetSpacing()
        affine[:axes, 3] = image.GetOrigin()
        array = array.transpose()
        return [(array, LPS_TO_RAS @ affine)]

    return read


def highdicom() -> Callable[[Path, Any], Found]:
    import highdicom
    import pydicom
    from pydicom.misc import is_dicom

    def read(folder: Path, policy: Any) -> Found:
        paths = [p for p in sorted(folder.rglob("*")) if p.is_file() and p.name != "DICOMDIR" and is_dicom(p)]
        series = [pydicom.dcmread(p) for p in paths]
        if len(series) == 1 and "PerFrameFunctionalGroupsSequence" in series[0]:
            volume = highdicom.imread(paths[0]).get_volume(apply_presentation_lut=False)
        else:
            volume = highdicom.get_volume_from_series(series, apply_presentation_lut=False)
        affine = volume.affine[:, [2, 1, 0, 3]]  # its axes are slice, row, column
        return [(np.asarray(volume.array).transpose(2, 1, 0, *range(3, volume.array.ndim)), LPS_TO_RAS @ affine)]

    return read


def _nifti(path: Path) -> tuple[NDArray[Any], NDArray[np.float64]]:
    import nibabel

    image = nibabel.load(path)
    array = np.asanyarray(image.dataobj)  # type: ignore[attr-defined]
    if array.dtype.names:  # red, green, blue
        array = np.mean([array[name].astype(float) for name in array.dtype.names], axis=0)
    return array, image.affine  # type: ignore[attr-defined]


def dicom2nifti() -> Callable[[Path, Any], Found]:
    import dicom2nifti as peer

    def read(folder: Path, policy: Any) -> Found:
        with tempfile.TemporaryDirectory() as out:
            target = Path(out, "volume.nii")
            peer.dicom_series_to_nifti(str(folder), str(target), reorient_nifti=False)
            array, affine = _nifti(target)
            return [(np.array(array), affine)]

    return read


def dcm2niix() -> Callable[[Path, Any], Found]:
    import dcm2niix as peer

    def read(folder: Path, policy: Any) -> Found:
        with tempfile.TemporaryDirectory() as out:
            command = [peer.bin, "-b", "n", "-z", "n", "-f", "%s", "-o", out, str(folder)]
            done = subprocess.run(command, capture_output=True, text=True, errors="replace")
            print(done.stdout)
            print(done.stderr, file=sys.stderr)
            if done.returncode:
                print(f"exit status {done.returncode}", file=sys.stderr)
            # Series 1 is the one in question; a converter of whole folders may write its neighbours too.
            paths = sorted(Path(out).glob("*.nii"))
            own = [p for p in paths if p.name[0] == "1" and "_ROI" not in p.name] or paths  # _ROI: an overlay
            if not own:
                raise RuntimeError("nothing written")
            return [(np.array(array), affine) for array, affine in map(_nifti, own)]

    return read


# Name → what makes the function, importing the peer, and the packages whose versions count.
READERS: dict[str, tuple[Callable[[], Callable[[Path, Any], Found]], tuple[str, ...]]] = {
    OURS: (this_reader, ()),
    "MONAI ITKReader": (lambda: _monai("ITKReader"), ("monai", "itk")),
    "MONAI PydicomReader": (lambda: _monai("PydicomReader"), ("monai", "pydicom")),
    "SimpleITK": (simple_itk, ("SimpleITK",)),
    "highdicom": (highdicom, ("highdicom", "pydicom")),
    "dicom2nifti": (dicom2nifti, ("dicom2nifti", "pydicom")),
    "dcm2niix": (dcm2niix, ("dcm2niix",)),
}


def packages_of(name: str) -> tuple[str, ...]:
    """The packages behind a reader with their versions; none for this project's own."""
    return tuple(f"{package} {importlib.metadata.version(package)}" for package in READERS[name][1])
