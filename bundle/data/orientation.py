"""Which stored axis lies along which direction of the body."""

from __future__ import annotations

import itertools

import numpy as np

__all__ = [
    "AXIS_CODES", "LEAN_DEGREES", "SLICING_AXES", "SLICING_DIMENSION", "lean", "nearest_axes", "plane_of", "slice_axes",
]  # fmt: skip

# Stored so that slices run in the direction of RAS+ and a slice is shown as radiologists see it: rows from anterior to
# posterior (axial) or superior to inferior, columns from the patient's right to left (axial, coronal) or front to back.
AXIS_CODES = {"axial": "LPS", "coronal": "LAI", "sagittal": "RPI"}
SLICING_DIMENSION = {"axial": 2, "coronal": 1, "sagittal": 0}
SLICING_AXES = (*AXIS_CODES, "acquired")
# Degrees, absolute: below it axes count as at right angles, as in the reader's policy; 0.2 mm over a field of 250 mm.
LEAN_DEGREES = 0.05


def nearest_axes(affine: np.ndarray) -> np.ndarray:
    """(3, 2) as in nibabel: the world axis that each stored axis lies along, and 1 or -1 for its direction.

    nibabel's own answer depends on the order in which the axes are stored where two fit equally well, as in a volume
    tilted by 45°, and the bag would then depend on the file format.

    Args:
        affine: (4, 4) voxel → RAS+ mm.
    """
    directions = affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0)

    def fit(order: tuple[int, ...]) -> tuple[float, ...]:
        along = directions[:, order]  # one column a world axis
        along = along * np.where(np.diag(along) < 0, -1, 1)
        return (round(float(np.trace(along)), 6), *np.round(along, 6).ravel().tolist())

    order = max(itertools.permutations(range(3)), key=fit)
    found = np.empty((3, 2))
    for world_axis, stored_axis in enumerate(order):
        found[stored_axis] = world_axis, -1 if directions[world_axis, stored_axis] < 0 else 1
    return found


def plane_of(slicing_axis: str, stored_affine: np.ndarray) -> str:
    """The anatomical plane of the slices; "acquired" is the plane nearest to the stored volume's third axis."""
    if slicing_axis != "acquired":
        return slicing_axis
    return ("sagittal", "coronal", "axial")[int(nearest_axes(stored_affine)[2, 0])]


def lean(affine: np.ndarray) -> float:
    """How far the axes are from right angles to each other, in degrees."""
    directions = affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0)
    cosines = np.abs(directions.T @ directions)[np.triu_indices(3, 1)]
    return float(np.degrees(np.arcsin(min(1.0, cosines.max()))))


def slice_axes(affine: np.ndarray) -> np.ndarray:
    """The affine with the normal of the slices as its third axis: what tells their plane where the stack leans."""
    if lean(affine) <= LEAN_DEGREES:
        return affine
    upright = affine.copy()
    normal = np.cross(affine[:3, 0], affine[:3, 1])
    upright[:3, 2] = normal * np.sign(normal @ affine[:3, 2])
    return upright
