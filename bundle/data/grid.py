"""An affine → a sound voxel grid: lengths, handedness of axes, shear, and how far two grids lie apart."""

from __future__ import annotations

import itertools

import numpy as np
from numpy.typing import NDArray

__all__ = ["corner_distance"]


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
