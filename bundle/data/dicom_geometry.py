"""The positions of DICOM slices → their order and one affine, or the reason why they are no regular grid."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from highdicom.spatial import get_volume_positions
from numpy.typing import NDArray

from ..errors import Refusal
from .dicom_contrast import repeated_position
from .dicom_gaps import check_whole, uneven
from .dicom_header import SliceHeader
from .dicom_planes import plane_axes
from .grid import LARGEST_MM
from .policy import ReaderPolicy

__all__ = ["Arrangement", "arrange"]

Vector = NDArray[np.float64]

# Comparisons in mm carry float64 rounding of coordinates up to 10⁴ mm.
ROUNDING_MM = 1e-6
LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])


@dataclass(frozen=True)
class Arrangement:
    """How the images of a series make one grid.

    Args:
        order: (N,) indices into the headers, along row × column direction.
        affine: (4, 4) voxel (column, row, slice) → RAS+ mm.
        positions: (N,) mm, ImagePositionPatient · plane normal as written, in that order.
        spacing: distance between neighbouring planes, mm.
        deviation: the farthest that a slice's own position lies from the grid, mm.
        tilt: degrees between the stacking direction and the plane normal.
    """

    order: list[int]
    affine: Vector
    positions: tuple[float, ...]
    spacing: float
    deviation: float
    tilt: float


def arrange(headers: Sequence[SliceHeader], policy: ReaderPolicy) -> Arrangement:
    """Order the slices along row × column direction and fit the one affine that holds for all of them.

    The affine is the grid whose offset and slice step fit all positions best (least squares): upright, with the step
    along the plane normal, where that holds within `position_tolerance_mm` for every slice, else leaning by one angle.

    Args:
        headers: the images of one series, any order.
        policy: the tolerances.

    Raises:
        Refusal: `position_absent`, `orientation_absent`, `spacing_absent`, `bad_position`, `bad_orientation`,
            `bad_spacing`, `localizer`, `mixed_orientation`, `mixed_pixel_spacing`, `repeated_position` or its cause,
            `gantry_tilt`, `misaligned_slices`, `missing_slices`, `uneven_spacing`, `truncated_series`,
            `coverage_short`.
    """
    positions = _stack(headers, "position", "ImagePositionPatient")  # (N, 3)
    orientations = _stack(headers, "orientation", "ImageOrientationPatient")  # (N, 6)
    spacings = _stack(headers, "pixel_spacing", "PixelSpacing")  # (N, 2)
    row, column = plane_axes(orientations, policy)
    _check_pixel_spacing(spacings, headers[0], policy)
    axes = np.c_[row, column, np.cross(row, column)]  # (3, 3)
    if len(headers) == 1:
        gap = _single_gap(headers[0], policy)
        order, origin, step, deviation = [0], positions[0], axes[:, 2] * gap, 0.0
    else:
        order, origin, step, deviation = _stack_of_slices(headers, positions, axes, policy)
        gap = float(step @ axes[:, 2])
    check_whole(headers, gap, policy)
    affine = np.eye(4)
    affine[:3] = np.c_[row * spacings[0, 1], column * spacings[0, 0], step, origin]
    return Arrangement(
        order=order,
        affine=LPS_TO_RAS @ affine,
        positions=tuple((positions[order] @ axes[:, 2]).tolist()),
        spacing=gap,
        deviation=deviation,
        tilt=float(np.degrees(np.arctan2(np.linalg.norm(axes[:, :2].T @ step), gap))),
    )


def _stack(headers: Sequence[SliceHeader], name: str, tag: str) -> Vector:
    code = name.removeprefix("pixel_")
    values = [getattr(h.facts, name) for h in headers]
    absent = sum(v is None for v in values)
    if absent:
        raise Refusal(
            f"{code}_absent",
            f"{absent} of {len(values)} images carry no {tag}, so their place in space is unknown.",
            tag=tag,
            affected=absent,
            images=len(values),
        )
    array = np.array(values, dtype=np.float64)
    if not (np.abs(array) <= LARGEST_MM).all():
        raise Refusal(
            f"bad_{code}", f"{tag} is not a number, or beyond {LARGEST_MM / 1000:g} m, in at least one image.", tag=tag
        )
    return array


def _check_pixel_spacing(spacings: Vector, first: SliceHeader, policy: ReaderPolicy) -> None:
    low, high = policy.spacing_range_mm
    if (spacings < low).any() or (spacings > high).any():
        raise Refusal(
            "bad_spacing",
            f"PixelSpacing lies outside {low} to {high} mm in at least one image.",
            smallest_mm=float(spacings.min()),
            largest_mm=float(spacings.max()),
        )
    matrix = np.array([first.rows, first.columns], dtype=np.float64)
    drift = float((np.ptp(spacings, axis=0) * matrix).max())
    if drift > policy.position_tolerance_mm:
        raise Refusal(
            "mixed_pixel_spacing",
            "The images of the series differ in PixelSpacing, so one voxel size does not "
            f"fit all ({drift:.2f} mm at the far edge).",
            drift_mm=drift,
        )


def _single_gap(header: SliceHeader, policy: ReaderPolicy) -> float:
    low, high = policy.spacing_range_mm
    # Thickness first: some scanners write the gap between slices, not the distance, into SpacingBetweenSlices.
    for value in (header.facts.slice_thickness, header.facts.slice_spacing):
        if value is not None and low <= value <= high:
            return value
    raise Refusal(
        "spacing_absent",
        "A single image carries neither SpacingBetweenSlices nor SliceThickness.",
        tag="SliceThickness",
    )


def _stack_of_slices(
    headers: Sequence[SliceHeader], positions: Vector, axes: Vector, policy: ReaderPolicy
) -> tuple[list[int], Vector, Vector, float]:
    """The order, the origin and the step in mm (LPS+), and the largest deviation from them in mm."""
    count = len(positions)
    normal = axes[:, 2]
    depth = positions @ normal  # (N,) mm
    order = np.argsort(depth, kind="stable")
    gaps = np.diff(depth[order])
    near = gaps < policy.spacing_range_mm[0]
    if near.any():
        numbers = np.empty(count, dtype=int)
        numbers[order] = np.cumsum(np.r_[0, ~near])
        raise repeated_position(headers, numbers.tolist())
    limit = policy.position_tolerance_mm + ROUNDING_MM
    leaning = _leaning(positions[order], depth[order], axes[:, :2], limit)
    mean = float((depth.max() - depth.min()) / (count - 1))
    # highdicom judges one gap at a time, by one tolerance, which is given here as the tighter of our two. Its test of
    # the slice direction is switched off (2.5 admits every direction): 1 − cosine < 0.001 lets 2.5° of tilt pass, and
    # between close slices refuses mere jitter; `_leaning` measures the same in mm.
    tolerance = min(policy.spacing_tolerance_mm, policy.spacing_tolerance_relative * mean) + ROUNDING_MM
    spacing, places = get_volume_positions(
        positions.tolist(),
        axes[:, :2].T.ravel().tolist(),
        atol=tolerance,
        perpendicular_tol=2.5,
        index_convention=("R", "D"),
    )
    if spacing is None or places is None or mean > policy.spacing_range_mm[1]:
        raise uneven(gaps, policy)
    # Gaps that are each within tolerance can still drift apart from a straight line together; the fit sees that.
    index = np.arange(count, dtype=np.float64)
    step, origin = np.polyfit(index, positions[order], 1)  # (3,), (3,) mm
    if not leaning:
        sideways = axes[:, :2] @ (axes[:, :2].T @ positions.mean(axis=0))
        step, origin = normal * (step @ normal), sideways + normal * (origin @ normal)
    deviation = float(np.linalg.norm(positions[order] - origin - index[:, None] * step, axis=1).max())
    if deviation > limit:
        raise Refusal(
            "uneven_spacing",
            f"A slice lies {deviation:.2f} mm from an even grid (allowed: {policy.position_tolerance_mm} mm).",
            deviation_mm=deviation,
            smallest_gap_mm=float(gaps.min()),
            largest_gap_mm=float(gaps.max()),
        )
    if leaning:
        _check_tilt(step, normal, policy)
    return np.argsort(places).tolist(), origin, step, deviation


def _leaning(positions: Vector, depth: Vector, axes: Vector, limit: float) -> bool:
    """Whether the stack leans by one angle.

    Raises:
        Refusal: `misaligned_slices` where slices lie sideways of each other otherwise.
    """
    sideways = positions @ axes  # (N, 2) mm in the plane
    sideways = sideways - sideways.mean(axis=0)
    largest = float(np.linalg.norm(sideways, axis=1).max())
    if largest <= limit:
        return False
    centred = depth - depth.mean()
    slope = centred @ sideways / (centred @ centred)  # (2,) mm sideways per mm of depth
    if np.linalg.norm(sideways - centred[:, None] * slope, axis=1).max() <= limit:
        return True
    raise Refusal(
        "misaligned_slices",
        f"The slices are shifted sideways against each other by up to {largest:.2f} mm, so they are no stack.",
        shift_mm=largest,
    )


def _check_tilt(step: Vector, normal: Vector, policy: ReaderPolicy) -> None:
    gap = float(step @ normal)
    degrees = float(np.degrees(np.arctan2(np.linalg.norm(step - normal * gap), gap)))
    if policy.gantry_tilt != "refuse" and degrees <= policy.max_tilt_degrees:
        return
    reason = (
        "which this task does not accept; resample the series to an upright grid, or set gantry_tilt to resample"
        if policy.gantry_tilt == "refuse"
        else f"more than the {policy.max_tilt_degrees:g}° that gantries tilt to, so its positions are not to be trusted"
    )
    raise Refusal(
        "gantry_tilt",
        f"The slices are stacked {degrees:.1f}° off the normal of their plane (gantry tilt), {reason}.",
        degrees=degrees,
    )
