"""What a read scan is, and the tolerances under which one is accepted."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import InputError

__all__ = ["ReaderPolicy", "Volume", "corner_distance"]


@dataclass(frozen=True, kw_only=True)
class ReaderPolicy:
    """The limits inside which a scan is accepted; outside them it is refused, never repaired.

    Args:
        modalities: DICOM modalities the task accepts. NIfTI carries none.
        position_tolerance_mm: absolute, mm. The farthest any slice's own position may lie from where the volume's
            affine puts it. 0.1 covers positions written with one decimal (0.087 mm in three dimensions) and the
            largest jitter seen on a real scanner (0.055 mm, 7 mm oblique MR); it is a fifth of a common CT pixel.
        spacing_tolerance_mm: absolute, mm. How far one gap between neighbouring slices may differ from the mean gap.
            0.1 is two positions rounded to one decimal; the same real scanner shows 0.064.
        spacing_tolerance_relative: the same as a share of the mean gap. Both limits hold: 0.1 mm would say nothing
            about 0.3 mm slices, and 10% of 7 mm slices would hide 0.7 mm. A missing slice is 33% even among three.
        orientation_tolerance_degrees: absolute, degrees; between slices, and from a right angle between axes. 0.05°
            moves the far edge of a 250 mm field by 0.2 mm; cosines written with three decimals differ by up to 0.04°.
        spacing_range_mm: absolute, mm. Plausible distance between voxel centres. Two slices nearer than the lower end
            are at one position; 50 mm and more is no anatomical scan (and often micrometres read as millimetres).
        min_slices: 3, the fewest with which uneven spacing can be seen at all: two gaps. 1 admits a single image.
        max_slices: 4096, above any CT or MR series we know; it bounds the time a folder can take.
        max_voxels: 2**29 (512 × 512 × 2048), 2 GiB as float32; it bounds memory whatever a header declares.
        affine_tolerance_mm: absolute, mm, at the farthest corner. How far a NIfTI file's sform and qform, or the
            affines of two modalities stacked as channels, may disagree. Their float32 rounding is below 0.001 mm.
        voxel_size_tolerance_relative: how far the voxel size in a NIfTI header may differ from the length of the
            affine's columns. 0.01: headers round to two or three digits.
    """

    modalities: tuple[str, ...] = ("CT", "MR")
    position_tolerance_mm: float = 0.1
    spacing_tolerance_mm: float = 0.1
    spacing_tolerance_relative: float = 0.1
    orientation_tolerance_degrees: float = 0.05
    spacing_range_mm: tuple[float, float] = (0.05, 50.0)
    min_slices: int = 3
    max_slices: int = 4096
    max_voxels: int = 2**29
    affine_tolerance_mm: float = 0.1
    voxel_size_tolerance_relative: float = 0.01

    def __post_init__(self) -> None:
        modalities: Any = self.modalities
        if isinstance(modalities, str) or not modalities:
            raise InputError("reader policy: modalities must be a list such as [CT, MR]")
        # YAML gives lists; the policy is hashed and compared, so it holds tuples.
        object.__setattr__(self, "modalities", tuple(self.modalities))
        object.__setattr__(self, "spacing_range_mm", tuple(self.spacing_range_mm))
        for name in (f.name for f in fields(self) if "tolerance" in f.name):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < float("inf"):
                raise InputError(f"reader policy: {name} must be a number of at least 0, got {value!r}")
        for name in ("min_slices", "max_slices", "max_voxels"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise InputError(f"reader policy: {name} must be a whole number of at least 1, got {value!r}")
        if len(self.spacing_range_mm) != 2 or not 0 < self.spacing_range_mm[0] < self.spacing_range_mm[1]:
            raise InputError(f"reader policy: spacing_range_mm must be (low, high) in mm, got {self.spacing_range_mm}")


@dataclass(frozen=True)
class Volume:
    """One scan whose every voxel lies where its affine says, within the policy it was read under.

    Args:
        array: (X, Y, Z), or (X, Y, Z, C) with several channels, float32. From DICOM: X columns, Y rows, Z slices in
            order of position along row × column direction.
        affine: (4, 4) float64, voxel index → RAS+ mm.
        modality: DICOM modality, or None where the format has none.
        source: "dicom" or "nifti".
        slice_uids: SOP Instance UIDs along Z, or None.
        series_uid: Series Instance UID, or None.
    """

    array: NDArray[np.float32]
    affine: NDArray[np.float64]
    modality: str | None
    source: str
    slice_uids: tuple[str, ...] | None
    series_uid: str | None


def corner_distance(first: NDArray[np.float64], second: NDArray[np.float64], shape: tuple[int, ...]) -> float:
    """The farthest two affines put one voxel apart, in mm.

    The difference of two affine maps is affine, so over a box of voxels its length is greatest at a corner.

    Args:
        first: (4, 4) voxel → mm.
        second: (4, 4) voxel → mm.
        shape: voxels along the three axes.

    Returns:
        The largest distance over the eight corners, mm.
    """
    corners = np.array(list(itertools.product(*((0, n - 1) for n in shape[:3]))), dtype=np.float64)
    corners = np.c_[corners, np.ones(len(corners))]  # (8, 4)
    return float(np.linalg.norm(corners @ (first - second).T, axis=1).max())
