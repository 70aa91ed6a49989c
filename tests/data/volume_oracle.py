"""The truth about a volume made by dicom_factory: what each of its voxels must be where its affine puts it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .dicom_factory import true_value

__all__ = ["Expected", "compared", "covered", "differences", "image_index"]


@dataclass(frozen=True)
class Expected:
    """What a reader must return of a clean variant.

    Args:
        uids: SOP Instance UIDs in order along row × column direction.
        shape: (X, Y, Z) of the images: columns, rows, slices.
        affine: (4, 4) image index → RAS mm, with its shear where they are tilted.
        frames: frame numbers in the order of the UIDs, or None for single-frame images.
        padding: (X, Y, Z), true where the scanner measured nothing, or None.
        scale: voxels are truth · scale[0] + scale[1].
        regridded: the volume may have another grid than the images (resampled tilt).
    """

    uids: tuple[str, ...]
    shape: tuple[int, int, int]
    affine: NDArray[np.float64]
    frames: tuple[int, ...] | None = None
    padding: NDArray[np.bool_] | None = None
    scale: tuple[float, float] = (1.0, 0.0)
    regridded: bool = False


def _places(shape: tuple[int, ...], affine: NDArray[Any]) -> NDArray[np.float64]:
    index = np.stack(np.meshgrid(*(np.arange(n) for n in shape), indexing="ij"), axis=-1)
    places: NDArray[np.float64] = index @ np.asarray(affine)[:3, :3].T + np.asarray(affine)[:3, 3]
    return places


def differences(
    array: NDArray[Any], affine: NDArray[Any], scale: tuple[float, float] = (1.0, 0.0)
) -> NDArray[np.float64]:
    """Voxels minus the truth at the place where a voxel → RAS mm affine puts them, (X, Y, Z)."""
    truth = true_value(_places(array.shape, affine) * [-1, -1, 1])
    found: NDArray[np.float64] = array - (truth * scale[0] + scale[1])
    return found


def image_index(expected: Expected, shape: tuple[int, ...], affine: NDArray[Any]) -> NDArray[np.float64]:
    """Column, row and slice of the images, as fractions, at each voxel of a volume, (X, Y, Z, 3)."""
    offset = _places(shape, affine) - expected.affine[:3, 3]
    found: NDArray[np.float64] = offset @ np.linalg.inv(expected.affine[:3, :3]).T
    return found


def compared(shape: tuple[int, ...], affine: NDArray[Any], expected: Expected) -> NDArray[np.bool_]:
    """The voxels whose values are known: between the outermost pixels of the images, and no padding there."""
    place, size = image_index(expected, shape, affine), np.array(expected.shape)
    known: NDArray[np.bool_] = np.all((place > -1e-3) & (place < size - 1 + 1e-3), axis=-1)
    if expected.padding is not None:
        nearest = np.clip(np.rint(place).astype(int), 0, size - 1)
        known &= ~expected.padding[tuple(np.moveaxis(nearest, -1, 0))]
    return known


def covered(shape: tuple[int, ...], affine: NDArray[Any], expected: Expected) -> bool:
    """Whether every pixel of the images lies in a volume, which has no fewer voxels than they."""
    offset = _places(expected.shape, expected.affine) - np.asarray(affine)[:3, 3]
    place = offset @ np.linalg.inv(np.asarray(affine)[:3, :3]).T
    inside = np.all((place > -0.5) & (place < np.array(shape) - 0.5), axis=-1)
    return bool(inside.all()) and int(np.prod(shape)) >= int(np.prod(expected.shape))
