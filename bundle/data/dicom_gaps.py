"""What is missing from a stack of slices, as far as anything in it tells."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ..errors import Refusal
from .dicom_header import Part, SliceHeader
from .policy import ReaderPolicy

__all__ = ["check_extent", "check_whole", "truncated", "uneven"]

ROUNDING_MM = 1e-6
# Distances as scanners write them in SpacingBetweenSlices and SliceThickness: two decimals of mm, sometimes one.
WRITTEN_MM = 0.05


def uneven(gaps: NDArray[np.float64], policy: ReaderPolicy) -> Refusal:
    """Why gaps are not even: slices missing between the others, or no even stack at all.

    Args:
        gaps: (N − 1,) distances between neighbouring planes, mm.
        policy: the tolerances.
    """
    usual = float(np.median(gaps)) if len(gaps) > 2 else float(gaps.min())
    steps = np.round(gaps / usual)
    facts = {"smallest_gap_mm": float(gaps.min()), "largest_gap_mm": float(gaps.max()), "usual_gap_mm": usual}
    tolerance = np.minimum(policy.spacing_tolerance_mm, policy.spacing_tolerance_relative * usual) + ROUNDING_MM
    if steps.min() >= 1 and steps.max() > 1 and np.all(np.abs(gaps - steps * usual) <= tolerance * steps):
        missing = int(steps.sum() - len(steps))
        return Refusal(
            "missing_slices",
            f"{missing} slice{' is' if missing == 1 else 's are'} missing between the others (usual distance "
            f"{usual:.2f} mm); copy the whole series.",
            missing=missing,
            **facts,
        )
    return Refusal(
        "uneven_spacing",
        f"The distance between neighbouring slices varies from {gaps.min():.2f} to {gaps.max():.2f} mm; one "
        "volume needs even spacing.",
        **facts,
    )


def check_whole(headers: Sequence[SliceHeader], gap: float, policy: ReaderPolicy) -> None:
    """Refuse an even stack of which something says that it is not all.

    Args:
        headers: the images.
        gap: distance between neighbouring planes, mm.
        policy: what is expected.

    Raises:
        Refusal: `missing_slices`, `truncated_series`, `coverage_short`.
    """
    check_extent(len(headers), gap, policy)
    if policy.trust_image_counts:
        _check_counts(headers)
    if len(headers) > 1:
        _check_declared_spacing(headers, gap)


def check_extent(count: int, gap: float, policy: ReaderPolicy) -> None:
    """Refuse a stack of another number of slices, or of less extent, than the policy expects.

    Args:
        count: of slices.
        gap: distance between neighbouring planes, mm.
        policy: what is expected.

    Raises:
        Refusal: `truncated_series`, `coverage_short`.
    """
    if policy.expected_slices is not None and count != policy.expected_slices:
        raise truncated(count, policy.expected_slices, "the policy expects")
    if policy.min_coverage_mm is not None and count * gap < policy.min_coverage_mm - ROUNDING_MM:
        raise Refusal(
            "coverage_short",
            f"The slices cover {count * gap:.1f} mm; this task needs {policy.min_coverage_mm:g} mm, so part of the "
            "anatomy is missing.",
            coverage_mm=count * gap,
            needed_mm=policy.min_coverage_mm,
        )


def truncated(found: int, expected: int, who: str) -> Refusal:
    """The refusal of a series of which something says that it has more images."""
    return Refusal(
        "truncated_series",
        f"The series has {found} images where {who} {expected}; copy the whole series.",
        found=found,
        expected=expected,
    )


def _check_counts(headers: Sequence[SliceHeader]) -> None:
    parts: dict[str, dict[str, tuple[Part, int]]] = {}
    for h in headers:
        if h.concatenation is not None:
            parts.setdefault(h.concatenation.uid, {})[h.sop_uid] = h.concatenation, h.frames
    for objects in parts.values():
        _check_concatenation(list(objects.values()))
    # An acquisition that was reconstructed in parts has its parts counted one by one.
    declared = {h.images_in_acquisition for h in headers}
    expected = declared.pop() if len(declared) == 1 else None
    if expected is not None and len({h.acquisition for h in headers}) == 1 and len(headers) < expected < 1e6:
        raise truncated(len(headers), int(expected), "ImagesInAcquisition says")


def _check_concatenation(parts: Sequence[tuple[Part, int]]) -> None:
    totals = {part.total for part, _ in parts} - {None}
    for total in totals:
        if total is not None and len(parts) != total:
            raise truncated(len(parts), total, "its concatenation has")
    place = 0
    for offset, frames in sorted((part.offset, frames) for part, frames in parts if part.offset is not None):
        if offset != place:
            raise truncated(place, offset, "the next part of its concatenation counts")
        place += frames


def _check_declared_spacing(headers: Sequence[SliceHeader], gap: float) -> None:
    """Every second slice missing leaves an even stack, at twice the distance that the scanner declared."""
    declared = {h.facts.slice_spacing for h in headers}
    thicknesses = {h.facts.slice_thickness for h in headers} - {None}
    spacing = declared.pop() if len(declared) == 1 else None
    if not spacing or not spacing > WRITTEN_MM:
        return
    steps = round(gap / spacing)
    if steps < 2 or abs(gap - steps * spacing) > WRITTEN_MM:
        return
    # Some scanners write the gap between slices instead of their distance. A gap as wide as a slice is rare, and looks
    # like a contiguous stack that lost every second slice: there the standard's meaning holds.
    if any(abs(gap - t - spacing) <= WRITTEN_MM < abs(t - spacing) for t in thicknesses if t is not None):
        return
    raise Refusal(
        "missing_slices",
        f"The slices lie {gap:.2f} mm apart, {steps} times the {spacing:.2f} mm that SpacingBetweenSlices declares: "
        f"only one in {steps} is here; copy the whole series.",
        gap_mm=gap,
        declared_mm=spacing,
    )
