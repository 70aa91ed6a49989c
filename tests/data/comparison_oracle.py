"""What a reader's outcome on a fault or on a clean variant is worth."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from .dicom_factory import GRADIENT
from .fault_kinds import OTHER, Fault
from .volume_oracle import Expected, compared, covered, differences

__all__ = ["OUTCOMES", "judge_clean", "judge_fault"]

# "told" is added to wrong and partial where a program could have caught it.
OUTCOMES = ("right", "wrong", "partial", "accepted", "refused", "crashed", "timed out")

Volumes = Sequence[tuple[NDArray[np.generic], NDArray[np.floating]]]
# Voxels agree where they lie within 0.1 mm of where the affine puts them along the axis of the least change a mm, less
# along the others; and half a step of a slope of 0.01, and float32.
AGREEMENT = 0.1 * float(GRADIENT.min()) + 0.01
SLICE_VOXELS = 120


def _in_three_dimensions(volumes: Volumes) -> list[tuple[NDArray[np.float64], NDArray[np.floating]]]:
    """Each volume of a time series by itself; axes of length 1 at the end dropped, or added up to three."""
    found = []
    for array, affine in volumes:
        values = np.asarray(array, dtype=np.float64)
        while values.ndim < 3:
            values = values[..., None]
        flat = values.reshape(*values.shape[:3], -1)
        found += [(flat[..., k], affine) for k in range(flat.shape[3])]
    return found


def _tolerance(array: NDArray[np.float64], extra: float = 0.0) -> float:
    # Some readers round to whole numbers; real CT and MR values mostly are.
    whole = bool(np.all(array == np.rint(array)))
    return AGREEMENT + extra + (0.5 if whole else 0.0)


def _offset(off: NDArray[np.float64], tolerance: float) -> float | None:
    """0 or OTHER, where all voxels are those of one of the two contrasts of the factory; None where they are not."""
    for offset in (0.0, OTHER):
        if off.size and np.isfinite(off).all() and np.abs(off - offset).max() <= tolerance:
            return offset
    return None


def judge_fault(fault: Fault, volumes: Volumes) -> str:
    """Of a reader that returned volumes: wrong, partial or accepted.

    Wrong: a voxel has not the value that belongs where the affine puts it. Partial: all voxels are right, but fewer
    slices are there than the files hold or a whole series had. Accepted: all is there and right, and only what the
    fault is about went unnoticed.
    """
    singles = _in_three_dimensions(volumes)
    size = sum(array.size for array, _ in singles)
    whole = fault.slices is None or size >= fault.slices * SLICE_VOXELS
    if not fault.tells:
        return "accepted" if whole else "partial"
    for array, affine in singles:
        if np.shape(affine) != (4, 4) or not np.isfinite(affine).all():
            return "wrong"
        if _offset(differences(array, affine), _tolerance(array)) is None:
            return "wrong"
    return "accepted" if whole else "partial"


def judge_clean(expected: Expected, tolerance: float, volumes: Volumes) -> str:
    """Of a reader that returned volumes of a clean variant: right, wrong or partial."""
    verdicts = {_judge_one(expected, tolerance, array, affine) for array, affine in _in_three_dimensions(volumes)}
    if len(verdicts) == 1:
        return verdicts.pop()
    return "wrong" if "wrong" in verdicts else "partial"


def _judge_one(expected: Expected, tolerance: float, array: NDArray[np.float64], affine: NDArray[np.floating]) -> str:
    if np.shape(affine) != (4, 4) or not np.isfinite(affine).all() or abs(np.linalg.det(affine)) < 1e-9:
        return "wrong"
    off = differences(array, affine, expected.scale)[compared(array.shape, affine, expected)]
    offset = _offset(off, _tolerance(array, tolerance) * max(1.0, expected.scale[0]))
    if offset is None:
        return "wrong"
    if offset != 0:
        return "partial"
    return "right" if covered(array.shape, affine, expected) else "partial"
