"""What the embedded cohort is made of: heads, small distractors in them, and what a scanner adds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

__all__ = ["TISSUES", "Grid", "Tissue", "add_clutter", "draw_head", "patch", "scan", "smooth_field"]

Volume = npt.NDArray[np.float32]
Matrix = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Tissue:
    """Signal levels of one modality; MR in arbitrary units, CT in HU.

    Args:
        blob: middle level of a blob.
        contrast: amplitude around it.
        noise: standard deviation.
        spread: largest relative change of grey and white matter from case to case.
    """

    air: float
    scalp: float
    skull: float
    csf: float
    grey: float
    white: float
    blob: float
    contrast: float
    noise: float
    spread: float


TISSUES = {
    "mr": Tissue(0, scalp=820, skull=140, csf=270, grey=400, white=470, blob=470, contrast=380, noise=20, spread=0.06),
    "ct": Tissue(-1000, scalp=15, skull=900, csf=8, grey=38, white=30, blob=36, contrast=32, noise=4, spread=0.0),
}


@dataclass(frozen=True)
class Grid:
    """A voxel grid and the head in it.

    Args:
        shape: (X, Y, Z).
        affine: (4, 4) voxel → RAS+ mm.
        to_head: (3, 4) voxel → mm in the head's own frame (right, anterior, superior; origin mid-brain).
        semi_axes: half the width, length and height of the head, in mm.
    """

    shape: tuple[int, int, int]
    affine: Matrix
    to_head: Matrix
    semi_axes: Matrix

    @property
    def spacing(self) -> Matrix:
        """(3,) in mm."""
        lengths: Matrix = np.linalg.norm(self.affine[:3, :3], axis=0)
        return lengths

    def depth(self, voxels: Matrix) -> Matrix:
        """Of voxel positions (M, 3): 0 mid-brain, 1 at the skin."""
        places = voxels @ self.to_head[:, :3].T + self.to_head[:, 3]
        found: Matrix = np.linalg.norm(places / self.semi_axes, axis=1)
        return found


def smooth_field(rng: np.random.Generator, grid: Grid, scale: float) -> Volume:
    """A random field (X, Y, Z) of mean about 0 and standard deviation about 1 that varies over `scale` mm."""
    weights = []
    for size, step in zip(grid.shape, grid.spacing, strict=True):
        position = np.arange(size) * step
        knots = np.arange(-scale, position[-1] + 1.5 * scale, scale)
        weight = np.exp(-0.5 * ((position[:, None] - knots) / (0.6 * scale)) ** 2)
        weights.append((weight / np.linalg.norm(weight, axis=1, keepdims=True)).astype(np.float32))
    coarse = rng.standard_normal([weight.shape[1] for weight in weights], dtype=np.float32)
    plane = np.einsum("xa,yb,abc->xyc", weights[0], weights[1], coarse, optimize=True)
    field: Volume = plane @ weights[2].T
    return field


def draw_head(rng: np.random.Generator, tissue: Tissue, grid: Grid) -> Volume:
    """Scalp, skull, CSF, grey and white matter as shells with uneven borders, and two ventricles: (X, Y, Z)."""
    i, j, k = np.ogrid[: grid.shape[0], : grid.shape[1], : grid.shape[2]]
    right, anterior, superior = (
        (x * i + y * j).astype(np.float32) + (z * k + origin).astype(np.float32) for x, y, z, origin in grid.to_head
    )
    width, length, height = grid.semi_axes.astype(np.float32)
    depth = np.sqrt((right / width) ** 2 + (anterior / length) ** 2 + (superior / height) ** 2)
    # Folds end below the skull, so that they shape the brain alone.
    folds = np.float32(rng.uniform(0.025, 0.05)) * np.clip((0.83 - depth) * 8, 0, 1)
    depth += np.float32(0.012) * smooth_field(rng, grid, 45.0) + folds * smooth_field(rng, grid, 9.0)

    grey, white = np.array([tissue.grey, tissue.white]) * rng.uniform(1 - tissue.spread, 1 + tissue.spread, 2)
    shells = {0.64: white, 0.69: grey, 0.80: grey, 0.82: tissue.csf, 0.855: tissue.csf, 0.865: tissue.skull}
    shells |= {0.915: tissue.skull, 0.93: tissue.scalp, 0.99: tissue.scalp, 1.005: tissue.air}
    # A look-up at steps of 0.001 stands in for np.interp over all voxels, which takes a third of the whole time.
    table = np.interp(np.linspace(0, 2, 2001), list(shells), list(shells.values())).astype(np.float32)
    volume = table[np.clip(depth * 1000, 0, 2000).astype(np.int16)]

    # Both ventricles at once, mirrored at the mid-sagittal plane.
    gap, width, length, height = rng.uniform((9, 6, 24, 9), (13, 10, 34, 14)).astype(np.float32)
    lateral = (np.abs(right) - gap - np.float32(0.1) * np.abs(anterior)) / width
    outside = np.sqrt(lateral**2 + ((anterior + 4) / length) ** 2 + ((superior - 8) / height) ** 2)
    share = np.clip((1 + np.float32(0.1) * smooth_field(rng, grid, 20.0) - outside) * 5, 0, 1)
    head: Volume = volume + share * (np.float32(tissue.csf) - volume)
    return head


def patch(centre: Sequence[float], reach: float, grid: Grid) -> tuple[tuple[slice, slice], Matrix, Matrix]:
    """The window of a slice within `reach` mm of `centre`, and its mm to the right and to the front of it."""
    window, steps = [], []
    for middle, size, spacing in zip(centre[:2], grid.shape[:2], grid.spacing[:2], strict=True):
        low, high = max(int(middle - reach / spacing), 0), max(min(int(middle + reach / spacing) + 2, size), 0)
        window.append(slice(low, high))
        steps.append(np.arange(low, high) - middle)
    x, y = np.meshgrid(*steps, indexing="ij")
    right, front = (row[0] * x + row[1] * y for row in grid.to_head[:2])
    return (window[0], window[1]), right, front


def add_clutter(rng: np.random.Generator, volume: Volume, tissue: Tissue, grid: Grid) -> None:
    """Add small vessel-like spots and thin streaks to the brain, in place; drawn alike in both classes."""
    num_spots, num_streaks = int(rng.integers(6, 25)), int(rng.integers(1, 4))
    for index in range(num_spots + num_streaks):
        place = rng.normal(size=3)
        place *= 0.7 * rng.random() ** (1 / 3) / np.linalg.norm(place) * grid.semi_axes
        *centre, k = np.linalg.solve(grid.to_head[:, :3], place - grid.to_head[:, 3])
        first = max(round(k), 0)
        last = first + int(rng.integers(1, 4))
        length, width, turn = rng.uniform((10, 1.2, 0), (20, 2.0, np.pi))
        if index < num_spots:
            length = width = rng.uniform(2.0, 4.0)
        contrast = tissue.contrast * rng.choice([-1, 1]) * rng.uniform(0.4, 0.8)
        window, right, front = patch(centre, length + 3, grid)
        along, across = right * np.cos(turn) + front * np.sin(turn), front * np.cos(turn) - right * np.sin(turn)
        share = np.clip(1.5 - np.hypot(along / length, across / width), 0, 1)
        volume[:, :, first:last][window] += (contrast * share).astype(np.float32)[..., None]


def scan(rng: np.random.Generator, volume: Volume, tissue: Tissue, grid: Grid, modality: str) -> npt.NDArray[np.int16]:
    """What the scanner makes of it: bias field, Rician noise and gain for MR, Gaussian noise for CT."""
    noise = np.float32(tissue.noise * rng.uniform(0.7, 1.3))
    first = rng.standard_normal(grid.shape, dtype=np.float32)
    if modality == "ct":
        return np.rint(np.clip(volume + noise * first, -1024, 3071)).astype(np.int16)
    bias = np.exp(np.float32(rng.uniform(0.05, 0.12)) * smooth_field(rng, grid, 90.0))
    second = rng.standard_normal(grid.shape, dtype=np.float32)
    signal = np.hypot(volume * bias + noise * first, noise * second)
    return np.rint(signal * np.float32(rng.uniform(0.6, 1.8))).astype(np.int16)
