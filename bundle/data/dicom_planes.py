"""The directions of DICOM images → the plane that they share, or the reason why they share none."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ..errors import Refusal
from .policy import ReaderPolicy

__all__ = ["is_scout", "plane_axes", "planes_of"]

Vector = NDArray[np.float64]

# Cosines written with three decimals give a length off by up to 0.0009.
UNIT_LENGTH_TOLERANCE = 1e-3


def planes_of(orientations: Vector, limit: float) -> int:
    """How many planes some images lie in; 0 where the directions say nothing.

    Args:
        orientations: (N, 6) ImageOrientationPatient.
        limit: radians within which two planes are one.
    """
    kept: list[Vector] = []
    normals = _normals(orientations)
    for normal in normals if normals is not None else ():
        if not any(np.linalg.norm(np.cross(normal, one)) <= np.sin(limit) for one in kept):
            kept.append(normal)
    return len(kept)


def _normals(orientations: Vector) -> Vector | None:
    """(N, 3) unit normals of the planes; None where the directions say nothing."""
    normals = np.cross(orientations[:, :3], orientations[:, 3:])
    lengths = np.linalg.norm(normals, axis=1)
    if not np.isfinite(lengths).all() or (lengths < 0.5).any():
        return None
    unit: Vector = normals / lengths[:, None]
    return unit


def is_scout(orientations: Vector, limit: float) -> bool:
    """Whether images are spread over two or three planes at wide angles, as those of a localizer are.

    One image in another plane is a stray one; the images of a scout are all single, or several in each plane.

    Args:
        orientations: (N, 6) ImageOrientationPatient.
        limit: radians within which two planes are one.
    """
    normals = _normals(orientations)
    if normals is None:
        return False
    sines = np.linalg.norm(np.cross(normals[:, None], normals[None]), axis=2)  # (N, N)
    alike = sines <= np.sin(limit)
    wide = sines > np.sin(np.radians(60))
    sizes = alike.sum(axis=1)
    planes = len(np.unique(alike, axis=0))
    return planes in (2, 3) and bool((alike | wide).all()) and (planes == len(normals) or bool((sizes > 1).all()))


def plane_axes(orientations: Vector, policy: ReaderPolicy) -> tuple[Vector, Vector]:
    """The row and column direction that all images share, as unit vectors at right angles, LPS+.

    Args:
        orientations: (N, 6) ImageOrientationPatient.
        policy: the tolerances.

    Raises:
        Refusal: `bad_orientation`, `mixed_orientation`, `localizer`.
    """
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
        raise _several_planes(orientations, turns, limit)
    row = cosines[0, 0]
    column = cosines[0, 1] - row * (row @ cosines[0, 1])
    return row, column / np.linalg.norm(column)


def _several_planes(orientations: Vector, turns: Vector, limit: float) -> Refusal:
    degrees = float(np.degrees(turns.max()))
    count = len(orientations)
    planes, kinds = planes_of(orientations, limit), int((turns.max(axis=1) > limit).sum())
    if is_scout(orientations, limit):
        return Refusal(
            "localizer",
            f"The {count} images lie in {planes} planes at right angles, as a scout (localizer) does, which is no "
            "volume; give the series that it planned.",
            planes=planes,
            images=count,
        )
    return Refusal(
        "mixed_orientation",
        f"{kinds} of {count} images are turned by up to {degrees:.2f}° against the first; one volume needs parallel "
        "slices.",
        degrees=degrees,
        affected=kinds,
        images=count,
    )
