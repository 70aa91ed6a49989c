"""A sound voxel grid: its size, a real matrix, plausible spacing, right angles or a gantry's tilt; grids compared."""

from __future__ import annotations

import itertools
import math

import numpy as np
from numpy.typing import NDArray

from ..errors import Refusal
from .policy import ReaderPolicy

__all__ = [
    "check_axes",
    "check_matrix",
    "check_shape",
    "check_sizes",
    "check_stated_sizes",
    "corner_distance",
    "not_3d",
    "other_units",
    "tilt_of",
]

# No scan lies 100 m from its scanner's centre. The bound also keeps squares of what a header says finite.
LARGEST_MM = 1e5
SMALLEST_MM = 1e-6
# Volume of the box of unit axes: 1 at right angles, 0 in one plane.
SMALLEST_BOX = 1e-3


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


def tilt_of(affine: NDArray[np.float64]) -> float:
    """How far the third axis leans from the normal of the first two; the sign of either does not matter.

    Args:
        affine: (4, 4) voxel → mm, not singular.

    Returns:
        Degrees from 0, upright (to rounding, about 1e-5 for a float32 matrix), to 90.
    """
    first, second, third = affine[:3, :3].T
    normal = np.cross(first, second)
    return math.degrees(math.atan2(float(np.linalg.norm(np.cross(third, normal))), abs(float(third @ normal))))


def not_3d(dimensions: int) -> Refusal:
    """A refusal of an image of other than 3 dimensions and channels."""
    return Refusal(
        "not_3d", f"The image has {dimensions} dimensions; a volume has 3, or 4 with channels.", dimensions=dimensions
    )


def other_units() -> Refusal:
    """A refusal of sizes that are not in mm."""
    return Refusal(
        "units", "The header gives voxel sizes in another unit than millimetres; convert the image to millimetres."
    )


def check_shape(sizes: list[int], policy: ReaderPolicy, channels: int) -> tuple[int, ...]:
    """Refuse what is no volume of the expected number of channels within the policy.

    Args:
        sizes: voxels along each axis, channels last.
        policy: limits of what is accepted.
        channels: the expected number of channels.

    Returns:
        (X, Y, Z), or (X, Y, Z, C) where `channels` > 1: sizes of 1 at the end are dropped.

    Raises:
        Refusal: `not_3d`, `channel_count`, `too_few_slices`, `too_large`.
    """
    shape = list(sizes)
    while len(shape) > 3 and shape[-1] == 1:
        shape.pop()
    if len(shape) < 3 or len(shape) > 4:
        raise not_3d(len(shape))
    found = shape[3] if len(shape) == 4 else 1
    if found != channels:
        raise Refusal(
            "channel_count",
            f"The image has {found} channel{'' if found == 1 else 's'} (or time points); {channels} "
            f"{'is' if channels == 1 else 'are'} expected.",
            found=found,
            expected=channels,
        )
    if min(shape[:3]) < policy.min_slices:
        raise Refusal(
            "too_few_slices",
            f"The image is {' × '.join(map(str, shape[:3]))} voxels, a single picture rather "
            f"than a volume; at least {policy.min_slices} are needed along each axis.",
            shape=shape[:3],
            smallest=policy.min_slices,
        )
    if math.prod(shape) > policy.max_voxels:
        raise Refusal(
            "too_large",
            f"The header declares {math.prod(shape)} voxels; at most {policy.max_voxels} are read.",
            voxels=math.prod(shape),
            largest=policy.max_voxels,
        )
    return tuple(shape)


def check_matrix(affine: NDArray[np.float64], name: str = "affine") -> None:
    """Refuse a matrix that is no orientation. Left-handed (mirrored) ones are as good as others.

    Args:
        affine: (4, 4) voxel → mm.
        name: what the format calls it; the code is `bad_<name>`.

    Raises:
        Refusal: `bad_<name>`: no number, out of this world, zero or singular.
    """
    sound = bool((np.abs(affine) <= LARGEST_MM).all())  # False for NaN
    if sound:
        lengths = np.linalg.norm(affine[:3, :3], axis=0)
        sound = bool((lengths >= SMALLEST_MM).all())
    if not sound or abs(np.linalg.det(affine[:3, :3] / lengths)) < SMALLEST_BOX:
        raise Refusal(
            f"bad_{name}",
            f"The orientation ({name}) of the file is zero, singular, beyond {LARGEST_MM / 1000:g} m or no number; "
            "export the image again.",
        )


def check_sizes(sizes: NDArray[np.float64], policy: ReaderPolicy) -> None:
    """Refuse voxel sizes outside the policy's `spacing_range_mm`.

    Args:
        sizes: (3,) mm, as the header says them.
        policy: limits of what is accepted.

    Raises:
        Refusal: `bad_spacing`.
    """
    low, high = policy.spacing_range_mm
    if not ((sizes >= low) & (sizes <= high)).all():
        raise Refusal(
            "bad_spacing",
            f"The voxel size in the header lies outside {low} to {high} mm (or is zero, negative or no number); export "
            "the image again with its sizes in mm.",
        )


def check_stated_sizes(affine: NDArray[np.float64], sizes: NDArray[np.float64], policy: ReaderPolicy) -> None:
    """Refuse a header whose voxel sizes are not those of its matrix.

    Where the third axis leans, its size may be the length of its column or the distance between the planes: files of
    both kinds exist.

    Args:
        affine: (4, 4) voxel → mm, checked by `check_matrix`.
        sizes: (3,) mm, as the header says them.
        policy: its `voxel_size_tolerance_relative`.

    Raises:
        Refusal: `spacing_disagrees`.
    """
    lengths = np.linalg.norm(affine[:3, :3], axis=0)
    wrong = np.abs(lengths - sizes) > policy.voxel_size_tolerance_relative * sizes
    plane_distance = lengths[2] * math.cos(math.radians(tilt_of(affine)))
    wrong[2] &= abs(plane_distance - sizes[2]) > policy.voxel_size_tolerance_relative * sizes[2]
    if wrong.any():
        raise Refusal(
            "spacing_disagrees",
            "The voxel size in the header and the one in its orientation matrix differ; export the image again.",
            header_mm=sizes.tolist(),
            matrix_mm=lengths.tolist(),
        )


def check_axes(affine: NDArray[np.float64], policy: ReaderPolicy) -> None:
    """Refuse axes that are not at right angles, but for a third one that leans as a gantry's and a policy that lets it.

    Args:
        affine: (4, 4) voxel → mm, checked by `check_matrix`.
        policy: `orientation_tolerance_degrees`, `gantry_tilt` and `max_tilt_degrees`.

    Raises:
        Refusal: `sheared`, `gantry_tilt`.
    """
    first, second = affine[:3, :2].T / np.linalg.norm(affine[:3, :2], axis=0)[:, None]
    degrees = math.degrees(math.asin(min(1.0, abs(float(first @ second)))))
    if degrees > policy.orientation_tolerance_degrees:
        raise Refusal(
            "sheared",
            f"The first two axes of the image are {degrees:.2f}° off a right angle (an affine registration?); resample "
            "it to an upright grid.",
            degrees=degrees,
        )
    tilt = tilt_of(affine)
    if tilt <= policy.orientation_tolerance_degrees:
        return
    if tilt > policy.max_tilt_degrees:
        raise Refusal(
            "gantry_tilt",
            f"The slices are stacked {tilt:.1f}° off the normal of their plane, beyond the "
            f"{policy.max_tilt_degrees:g}° to which gantries tilt; check the orientation, or resample the image.",
            degrees=tilt,
            largest=policy.max_tilt_degrees,
        )
    if policy.gantry_tilt == "refuse":
        raise Refusal(
            "gantry_tilt",
            f"The slices are stacked {tilt:.2f}° off the normal of their plane (gantry tilt), which the policy "
            "refuses; resample the image to an upright grid.",
            degrees=tilt,
        )
