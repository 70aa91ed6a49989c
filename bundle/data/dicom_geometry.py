"""The positions of DICOM slices → their order and one affine, or the reason why they are no regular grid."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from highdicom.spatial import get_volume_positions
from numpy.typing import NDArray

from ..errors import Refusal
from .dicom_header import SliceHeader
from .policy import ReaderPolicy

__all__ = ["arrange"]

Vector = NDArray[np.float64]

# Cosines written with three decimals give a length off by up to 0.0009.
UNIT_LENGTH_TOLERANCE = 1e-3
# Comparisons in mm carry float64 rounding of coordinates up to 10⁴ mm.
ROUNDING_MM = 1e-6


def arrange(headers: Sequence[SliceHeader], policy: ReaderPolicy) -> tuple[list[int], Vector]:
    """Order the slices along row × column direction and fit the one affine that holds for all of them.

    The affine is the rigid grid whose slice axis is the plane normal and whose offset and spacing fit all positions
    best (least squares); a series is accepted when no slice lies farther from it than `position_tolerance_mm`.

    Args:
        headers: the images of one series, any order.
        policy: the tolerances.

    Returns:
        Indices into `headers` in order, and the (4, 4) affine, voxel (column, row, slice) → RAS+ mm.

    Raises:
        Refusal: `position_absent`, `orientation_absent`, `spacing_absent`, `bad_position`, `bad_orientation`,
            `bad_spacing`, `mixed_orientation`, `mixed_pixel_spacing`, `repeated_position`, `gantry_tilt`,
            `misaligned_slices`, `missing_slices`, `uneven_spacing`.
    """
    positions = _stack(headers, "position", "ImagePositionPatient")  # (N, 3)
    orientations = _stack(headers, "orientation", "ImageOrientationPatient")  # (N, 6)
    spacings = _stack(headers, "spacing", "PixelSpacing")  # (N, 2)
    row, column = _plane(orientations, policy)
    _check_pixel_spacing(spacings, headers[0], policy)
    normal = np.cross(row, column)
    if len(headers) == 1:
        order, origin, gap = [0], positions[0], _single_gap(headers[0], policy)
    else:
        order, origin, gap = _stack_of_slices(positions, row, column, normal, policy)
    affine = np.eye(4)
    affine[:3] = np.c_[row * spacings[0, 1], column * spacings[0, 0], normal * gap, origin]
    return order, np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine  # DICOM's LPS+ → RAS+


def _stack(headers: Sequence[SliceHeader], name: str, tag: str) -> Vector:
    values = [h.pixel_spacing if name == "spacing" else getattr(h, name) for h in headers]
    absent = sum(v is None for v in values)
    if absent:
        raise Refusal(
            f"{name}_absent",
            f"{absent} of {len(values)} images carry no {tag}, so their place in space is unknown.",
            tag=tag,
            affected=absent,
            images=len(values),
        )
    array = np.array(values, dtype=np.float64)
    if not np.isfinite(array).all():
        raise Refusal(f"bad_{name}", f"{tag} is not a number in at least one image.", tag=tag)
    return array


def _plane(orientations: Vector, policy: ReaderPolicy) -> tuple[Vector, Vector]:
    cosines = orientations.reshape(-1, 2, 3)
    lengths = np.linalg.norm(cosines, axis=2)  # (N, 2)
    limit = np.radians(policy.orientation_tolerance_degrees)
    if (np.abs(lengths - 1) > UNIT_LENGTH_TOLERANCE).any():
        raise Refusal(
            "bad_orientation",
            "ImageOrientationPatient holds directions that are not of length 1.",
            lengths=[float(lengths.min()), float(lengths.max())],
        )
    cosines = cosines / lengths[..., None]
    skew = np.abs(np.einsum("ni,ni->n", cosines[:, 0], cosines[:, 1])).max()
    if skew > np.sin(limit):
        degrees = float(np.degrees(np.arcsin(min(1.0, skew))))
        raise Refusal(
            "bad_orientation", f"The row and column directions are {degrees:.2f}° off a right angle.", degrees=degrees
        )
    # Half-angle form: arccos of a cosine near 1 cannot resolve angles below 10⁻⁶ degrees.
    turns = 2 * np.arcsin(np.clip(np.linalg.norm(cosines - cosines[0], axis=2) / 2, 0, 1))
    if turns.max() > limit:
        degrees = float(np.degrees(turns.max()))
        kinds = int((turns.max(axis=1) > limit).sum())
        raise Refusal(
            "mixed_orientation",
            f"{kinds} of {len(cosines)} images are turned by up to {degrees:.2f}° against the first; one volume needs "
            "parallel slices.",
            degrees=degrees,
            affected=kinds,
            images=len(cosines),
        )
    row = cosines[0, 0]
    column = cosines[0, 1] - row * (row @ cosines[0, 1])
    return row, column / np.linalg.norm(column)


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
    for value in (header.slice_thickness, header.slice_spacing):
        if value is not None and low <= value <= high:
            return value
    raise Refusal(
        "spacing_absent",
        "A single image carries neither SpacingBetweenSlices nor SliceThickness.",
        tag="SliceThickness",
    )


def _stack_of_slices(
    positions: Vector, row: Vector, column: Vector, normal: Vector, policy: ReaderPolicy
) -> tuple[list[int], Vector, float]:
    count = len(positions)
    depth = positions @ normal  # (N,) mm
    order = np.argsort(depth, kind="stable")
    gaps = np.diff(depth[order])
    repeated = int((gaps < policy.spacing_range_mm[0]).sum())
    if repeated:
        raise Refusal(
            "repeated_position",
            f"{count} images lie at only {count - repeated} positions: several time points, echoes or directions, or "
            "copies that differ; give one of them.",
            images=count,
            positions=count - repeated,
        )
    _check_straight(positions[order], depth[order], np.c_[row, column], policy)
    mean = float((depth.max() - depth.min()) / (count - 1))
    # highdicom judges one gap at a time, by one tolerance, which is given here as the tighter of our two. Its test of
    # the slice direction is switched off (2.5 admits every direction): 1 − cosine < 0.001 lets 2.5° of tilt pass, and
    # between close slices refuses mere jitter; `_check_straight` measures the same in mm.
    tolerance = min(policy.spacing_tolerance_mm, policy.spacing_tolerance_relative * mean) + ROUNDING_MM
    iop = [*row, *column]
    spacing, places = get_volume_positions(
        positions.tolist(), iop, atol=tolerance, perpendicular_tol=2.5, index_convention=("R", "D")
    )
    if spacing is None or places is None or mean > policy.spacing_range_mm[1]:
        raise _uneven(gaps, policy)
    # Gaps that are each within tolerance can still drift apart from a straight line together; the fit sees that.
    index = np.arange(count, dtype=np.float64)
    step, start = np.polyfit(index, depth[order], 1)
    plane_offset = positions @ np.c_[row, column]  # (N, 2)
    origin = np.c_[row, column] @ plane_offset.mean(axis=0) + normal * start
    fitted = origin + index[:, None] * step * normal
    residual = float(np.linalg.norm(positions[order] - fitted, axis=1).max())
    if residual > policy.position_tolerance_mm + ROUNDING_MM:
        raise Refusal(
            "uneven_spacing",
            f"A slice lies {residual:.2f} mm from an even grid (allowed: {policy.position_tolerance_mm} mm).",
            residual_mm=residual,
            smallest_gap_mm=float(gaps.min()),
            largest_gap_mm=float(gaps.max()),
        )
    return np.argsort(places).tolist(), origin, float(step)


def _check_straight(positions: Vector, depth: Vector, axes: Vector, policy: ReaderPolicy) -> None:
    sideways = (positions - positions[0]) @ axes  # (N, 2) mm in the plane
    sideways = sideways - sideways.mean(axis=0)
    limit = policy.position_tolerance_mm + ROUNDING_MM
    largest = float(np.linalg.norm(sideways, axis=1).max())
    if largest <= limit:
        return
    centred = depth - depth.mean()
    slope = centred @ sideways / (centred @ centred)  # (2,) mm sideways per mm of depth
    if np.linalg.norm(sideways - centred[:, None] * slope, axis=1).max() <= limit:
        degrees = float(np.degrees(np.arctan(np.linalg.norm(slope))))
        raise Refusal(
            "gantry_tilt",
            f"The slices are stacked {degrees:.1f}° off the normal of their plane (gantry tilt), which this "
            "version does not read; resample the series to an upright grid.",
            degrees=degrees,
        )
    raise Refusal(
        "misaligned_slices",
        f"The slices are shifted sideways against each other by up to {largest:.2f} mm, so they are no upright stack.",
        shift_mm=largest,
    )


def _uneven(gaps: Vector, policy: ReaderPolicy) -> Refusal:
    usual = float(np.median(gaps)) if len(gaps) > 2 else float(gaps.min())
    steps = np.round(gaps / usual)
    facts = {"smallest_gap_mm": float(gaps.min()), "largest_gap_mm": float(gaps.max()), "usual_gap_mm": usual}
    tolerance = np.minimum(policy.spacing_tolerance_mm, policy.spacing_tolerance_relative * usual) + ROUNDING_MM
    if steps.min() >= 1 and steps.max() > 1 and np.all(np.abs(gaps - steps * usual) <= tolerance * steps):
        missing = int(steps.sum() - len(steps))
        return Refusal(
            "missing_slices",
            f"{missing} slices are missing between the others (usual distance {usual:.2f} mm); copy the whole series.",
            missing=missing,
            **facts,
        )
    return Refusal(
        "uneven_spacing",
        f"The distance between neighbouring slices varies from {gaps.min():.2f} to {gaps.max():.2f} mm; one "
        "volume needs even spacing.",
        **facts,
    )
