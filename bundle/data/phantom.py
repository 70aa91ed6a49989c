"""The embedded cohort: head-like volumes with striped blobs, one of which may be a lesion.

A lesion's stripes run from left to right, a distractor's from back to front. Slice by slice both hold the same set of
intensities, and resizing blurs them alike: an intensity statistic has nothing to go by, a network that sees shape has.
(Bright core with dark rim against the reverse was tried: blurring makes their histograms differ, and a small network
needs slice labels to learn them.)
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt

from ..errors import InputError
from .phantom_anatomy import TISSUES, Grid, Matrix, Tissue, Volume, add_clutter, draw_head, patch, scan

__all__ = ["CLASS_NAMES", "COHORT", "UNSEEN", "Blob", "PhantomCase", "case_label", "case_rng", "make_case"]

CLASS_NAMES = ("distractors only", "lesion")
COHORT, UNSEEN = 0, 1  # streams of cases that share a seed and nothing else
STRIPE_PERIOD = 16.0  # mm: about five pixels of a head seen at 64 × 64; at 12 some seeds did not train in 20 epochs


@dataclass(frozen=True)
class Blob:
    """A round, striped mark, half bright and half dark.

    Args:
        lesion: stripes run from left to right; in a distractor from back to front.
        centre: (x, y) voxel index in the slice.
        first: first slice that shows it.
        last: last slice that shows it.
        radius: in mm, in the slice.
    """

    lesion: bool
    centre: tuple[float, float]
    first: int
    last: int
    radius: float


@dataclass(frozen=True)
class PhantomCase:
    """One volume with its truth, in acquisition layout (columns, rows, slices along row × column).

    Args:
        array: (X, Y, Z) int16; CT in HU.
        affine: (4, 4) voxel → RAS+ mm; its third axis is within about 10° of the inferior–superior axis.
        slice_label: (Z,) 1 where the slice shows the lesion.
        permute: how a NIfTI file stores the axes: stored axis i is acquisition axis `abs(permute[i]) - 1`, reversed
            where negative.
        blobs: all blobs of the volume, the lesion among them.
    """

    seed: int
    number: int
    stream: int
    modality: str
    label: int
    array: npt.NDArray[np.int16] = field(repr=False)
    affine: Matrix = field(repr=False)
    slice_label: npt.NDArray[np.int64] = field(repr=False)
    permute: tuple[int, int, int]
    blobs: tuple[Blob, ...]


def case_rng(seed: int, stream: int, number: int, purpose: int = 0) -> np.random.Generator:
    """The generator of one case for one purpose; independent of every other case."""
    return np.random.default_rng(np.random.SeedSequence(entropy=seed, spawn_key=(stream, purpose, number)))


def case_label(seed: int, number: int, stream: int = COHORT) -> int:
    """Label of a case: balanced over cases 1–2, 3–4, …, and over every two odd and every two even numbers of four.

    Odd and even numbers go to different file formats, so the format tells nothing about the label.
    """
    block, place = divmod(number - 1, 4)
    return int(case_rng(seed, stream, block, purpose=1).integers(2)) ^ (0, 1, 1, 0)[place]


def make_case(seed: int, number: int, modality: str = "mr", stream: int = COHORT, contrast: float = 1.0) -> PhantomCase:
    """Draw one case.

    Args:
        seed: of the cohort, 0 or more.
        number: of the case, from 1.
        modality: "mr" (Rician noise, bias field) or "ct" (Gaussian noise, HU).
        stream: `COHORT` or `UNSEEN`.
        contrast: of the stripes, as a share of the usual one, in (0, 1]; it moves nothing else.

    Returns:
        The case; the same arguments give the same voxels.

    Raises:
        InputError: an argument is out of range.
    """
    if seed < 0 or number < 1:
        raise InputError(f"phantom: the seed must be 0 or more and cases count from 1, not {seed} and {number}")
    if modality not in TISSUES:
        raise InputError(f"phantom: the modality must be one of {', '.join(TISSUES)}, not {modality!r}")
    if not 0 < contrast <= 1:
        raise InputError(f"phantom: the contrast must be above 0 and at most 1, not {contrast}")
    rng = case_rng(seed, stream, number)
    tissue = TISSUES[modality]
    grid = _draw_grid(rng)
    blobs = _draw_blobs(rng, grid)
    axes, flips = rng.permutation(3) + 1, rng.choice([-1, 1], size=3)
    # The label chooses the direction of one blob's stripes after all places are drawn, and moves nothing else.
    label, chosen = case_label(seed, number, stream), int(rng.integers(len(blobs)))
    if label:
        blobs[chosen] = replace(blobs[chosen], lesion=True)

    volume = draw_head(rng, tissue, grid)
    add_clutter(rng, volume, tissue, grid)
    slice_label = np.zeros(grid.shape[2], dtype=np.int64)
    for blob in blobs:
        _paint_blob(rng, volume, replace(tissue, contrast=contrast * tissue.contrast), blob, grid)
        if blob.lesion:
            slice_label[blob.first : blob.last + 1] = 1
    array = scan(rng, volume, tissue, grid, modality)
    permute = (int(axes[0] * flips[0]), int(axes[1] * flips[1]), int(axes[2] * flips[2]))
    return PhantomCase(seed, number, stream, modality, label, array, grid.affine, slice_label, permute, tuple(blobs))


def _rotation(rng: np.random.Generator, axis: Matrix, max_degrees: float) -> Matrix:
    """A rotation of up to `max_degrees` about `axis` (Rodrigues)."""
    angle = np.deg2rad(rng.uniform(-max_degrees, max_degrees))
    x, y, z = axis / np.linalg.norm(axis)
    cross = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
    matrix: Matrix = np.eye(3) + np.sin(angle) * cross + (1 - np.cos(angle)) * cross @ cross
    return matrix


def _draw_grid(rng: np.random.Generator) -> Grid:
    """Slices, spacing, any of eight in-plane directions, half of them tilted by up to 10°; and the head in it."""
    num_slices = 24 + round(72 * rng.beta(0.8, 3.6))
    between_slices = float(np.clip(rng.uniform(118, 140) / num_slices, 2.0, 6.0))
    in_plane = rng.uniform(1.45, 2.0)
    ratio = rng.uniform(1.05, 1.2) if rng.random() < 0.2 else 1.0
    spacing = np.round([in_plane, min(in_plane * ratio, 2.1), between_slices], 4)

    column_axis = int(rng.integers(2))
    directions = np.zeros((3, 3))
    directions[column_axis, 0], directions[1 - column_axis, 1] = rng.choice([-1, 1], size=2)
    directions[:, 2] = np.cross(directions[:, 0], directions[:, 1])
    tilt = _rotation(rng, np.append(rng.normal(size=2), 0.3 * rng.normal()), 10.0)
    if rng.random() < 0.5:
        directions = tilt @ directions

    field_of_view = rng.uniform(205, 222)  # mm: holds the longest head in any in-plane direction
    columns, rows = np.ceil(field_of_view / spacing[:2]).astype(int).tolist()
    middle = np.array([columns - 1, rows - 1, num_slices - 1]) / 2
    affine = np.eye(4)
    affine[:3, :3] = directions * spacing
    affine[:3, 3] = np.round(rng.uniform(-40, 40, 3) - affine[:3, :3] @ middle, 4)

    pose = _rotation(rng, rng.normal(size=3), 8.0)
    centre = affine[:3, :3] @ middle + affine[:3, 3] + rng.uniform(-5, 5, 3)
    to_head = np.column_stack([pose @ affine[:3, :3], pose @ (affine[:3, 3] - centre)])
    return Grid((columns, rows, num_slices), affine, to_head, rng.uniform((70, 86, 76), (79, 97, 87)))


def _draw_blobs(rng: np.random.Generator, grid: Grid) -> list[Blob]:
    """One or two blobs inside the brain that do not touch."""
    wanted = 2 if rng.random() < 0.3 else 1
    num_slices = grid.shape[2]
    circle = np.linspace(0, 2 * np.pi, 12, endpoint=False)
    blobs: list[Blob] = []
    for attempt in range(2000):
        radius = rng.uniform(19.0, 23.0)
        # Where slices are many a blob spans more of them, so that a bag of 16 spread over the volume meets it.
        count = int(np.clip(round(rng.uniform(28, 34) / grid.spacing[2]), 3, max(7, num_slices // 7)))
        first = int(rng.integers(1, num_slices - count))
        x, y = rng.uniform(0.2, 0.8, 2) * grid.shape[:2]
        rim = 1.1 * radius * np.column_stack([np.cos(circle), np.sin(circle)]) / grid.spacing[:2] + (x, y)
        ends = np.vstack([np.column_stack([rim, np.full(len(rim), k)]) for k in (first, first + count - 1)])
        new = Blob(False, (float(x), float(y)), first, first + count - 1, radius)
        if grid.depth(ends).max() < 0.78 and not any(_touch(new, other, grid) for other in blobs):
            blobs.append(new)
        # A first blob in the very middle can leave no room for a second.
        if len(blobs) == wanted or (blobs and attempt > 400):
            return blobs
    raise RuntimeError("no place for a blob in this head")


def _touch(a: Blob, b: Blob, grid: Grid) -> bool:
    apart = max(a.first - b.last, b.first - a.last) > 0
    distance = np.linalg.norm((np.array(a.centre) - b.centre) * grid.spacing[:2])
    return not apart and bool(distance < 1.15 * (a.radius + b.radius))


def _paint_blob(rng: np.random.Generator, volume: Volume, tissue: Tissue, blob: Blob, grid: Grid) -> None:
    """Replace what is there by stripes, in place.

    A voxel's value depends only on the rank of its phase among the voxels of the blob in the slice: stripes in either
    direction hold the same set of values, whatever the outline and the shift.
    """
    wobble, phase = rng.uniform(0, 0.06, 2), rng.uniform(0, 2 * np.pi, 3)
    contrast = tissue.contrast * rng.uniform(0.9, 1.1)
    window, right, front = patch(blob.centre, 1.2 * blob.radius, grid)
    angle = np.arctan2(front, right)
    outline = 1 + wobble[0] * np.cos(2 * angle + phase[0]) + wobble[1] * np.cos(3 * angle + phase[1])
    from_centre = np.hypot(right, front) / (blob.radius * outline)
    stripes = np.sin(2 * np.pi * (front if blob.lesion else right) / STRIPE_PERIOD + phase[2])
    middle, half = (blob.first + blob.last) / 2, (blob.last - blob.first + 1) / 2
    for k in range(blob.first, blob.last + 1):
        inside = from_centre < 1 - 0.15 * ((k - middle) / half) ** 2
        rank = np.argsort(np.argsort(stripes[inside], kind="stable"), kind="stable")
        volume[:, :, k][window][inside] = tissue.blob + contrast * np.tanh(6 * (rank / (inside.sum() - 1) - 0.5))
