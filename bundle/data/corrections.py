"""What a policy may ask itk to correct: a stack that leans (gantry tilt), and the bias field of MR."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import Refusal
from .itk_loader import load_itk
from .volume import Volume

__all__ = ["correct_bias", "make_upright"]

Vector = NDArray[np.float64]
Channel = NDArray[np.float32]

# Rounding of affines, mm per slice: below it a stack does not lean.
ROUNDING_MM = 1e-6
# Cosine; the reader admits 0.05° between the axes of an image file.
RIGHT_ANGLE = 1e-3
# N4 as in ITK's and SimpleITK's examples: every 4th voxel in the plane, but not below 32 of them; an Otsu mask of 200
# bins; four levels, at whose last the field is a cubic spline of 8 spans an axis; 50 iterations each.
SHRINK, FEWEST_VOXELS = 4, 32
OTSU_BINS, LEVELS, ITERATIONS, CONVERGENCE = 200, 4, 50, 0.001
# A cubic spline has 4 coefficients at the first level; a mask of fewer voxels than the last level has (11³) fits any.
FEWEST_ALONG_AXIS, FEWEST_IN_MASK = 4, 1331


def _noted(volume: Volume, array: NDArray[np.float32], affine: Vector, note: str) -> Volume:
    facts = {**volume.facts, "corrections": [*volume.facts.get("corrections", []), note]}
    return replace(volume, array=array, affine=affine, facts=facts)


def make_upright(volume: Volume, max_voxels: int = 2**29) -> Volume:
    """Shift each slice in its own plane so that the stack stands at right angles to its slices.

    Every slice stays in the plane in which it was acquired, so slices, their UIDs and positions stay one to one. Values
    between pixels are interpolated linearly (itk). The field in the plane grows until it holds every acquired voxel;
    what was not acquired takes the least value of its channel, as padding does elsewhere.

    Args:
        volume: (X, Y, Z) or (X, Y, Z, C), whose first two axes are at right angles.
        max_voxels: the most that the upright grid may have.

    Returns:
        The volume on the upright grid, or the same one where nothing leans. `facts["corrections"]` tells the angle and
        the largest shift.

    Raises:
        Refusal: `too_large`.
        ValueError: the first two axes are not at right angles, or the third lies in their plane.
    """
    spacing = np.linalg.norm(volume.affine[:3, :2], axis=0)
    axes = volume.affine[:3, :2] / spacing  # (3, 2) unit vectors in the plane
    normal = np.cross(axes[:, 0], axes[:, 1])
    step = volume.affine[:3, 2]
    if abs(axes[:, 0] @ axes[:, 1]) > RIGHT_ANGLE or abs(normal @ step) < ROUNDING_MM:
        raise ValueError("the first two axes must be at right angles, and the third outside of their plane")
    normal = normal / np.linalg.norm(normal)
    lean = np.linalg.lstsq(axes, step)[0]  # (2,) mm a slice, along axes that may be off a right angle by rounding
    if np.linalg.norm(lean) < ROUNDING_MM:
        return volume
    shifts = np.arange(volume.array.shape[2])[:, None] * lean / spacing  # (Z, 2) voxels
    # A shift by whole voxels must not grow the field by a voxel of rounding.
    first = np.floor(np.round(shifts.min(axis=0), 6)).astype(int)
    last = np.ceil(np.round(shifts.max(axis=0), 6)).astype(int) + volume.array.shape[:2] - 1
    size = [int(n) for n in last - first + 1]
    if (voxels := int(np.prod(size)) * int(np.prod(volume.array.shape[2:]))) > max_voxels:
        raise Refusal(
            "too_large",
            f"Made upright, the volume would have {voxels} voxels; at most {max_voxels} are read.",
            voxels=voxels,
            largest=max_voxels,
        )
    array = np.empty((*size, *volume.array.shape[2:]), dtype=np.float32, order="F")
    for channel in _channels(volume.array):
        least = float(volume.array[channel].min())
        for k, shift in enumerate(shifts):
            array[channel][:, :, k] = _shifted(volume.array[channel][:, :, k], shift - first, size, least)
    affine = volume.affine.copy()
    affine[:3, 2] = normal * (normal @ step)
    affine[:3, 3] += volume.affine[:3, :2] @ first
    degrees = float(np.degrees(np.arctan2(np.linalg.norm(lean), abs(normal @ step))))
    largest = float(np.linalg.norm(lean)) * (len(shifts) - 1)
    return _noted(
        volume,
        array,
        affine,
        f"upright: gantry tilt of {degrees:.1f}° taken out, slices shifted in their plane by up to {largest:.1f} mm "
        "(linear)",
    )


def _channels(array: NDArray[np.float32]) -> list[tuple[Any, ...]]:
    return [(...,)] if array.ndim == 3 else [(..., c) for c in range(array.shape[3])]


def _shifted(pixels: Channel, place: Vector, size: Sequence[int], outside: float) -> Channel:
    """(X, Y) pixels, the first of which lies at `place` (in voxels) of a grid of that size, at the grid's voxels."""
    itk = load_itk()

    image = _as_image(pixels)
    image.SetOrigin([float(p) for p in place])
    resample = itk.ResampleImageFilter.New(
        Input=image, Size=[int(n) for n in size], DefaultPixelValue=outside, NumberOfWorkUnits=1
    )
    resample.SetInterpolator(itk.LinearInterpolateImageFunction.New(image))
    resample.Update()
    found: Channel = itk.array_from_image(resample.GetOutput()).T
    return found


def _as_image(array: NDArray[Any], spacing: Sequence[float] | None = None) -> Any:
    itk = load_itk()

    image = itk.image_from_array(np.ascontiguousarray(array.T))
    if spacing is not None:
        image.SetSpacing([float(s) for s in spacing])
    return image


def correct_bias(volume: Volume) -> Volume:
    """Divide MR by its bias field, the slow change of brightness that surface coils leave.

    value = stored / exp(b), b a smooth function of position that sharpens the histogram of log intensity (N4). It is
    fitted to every 4th voxel in the plane, inside an Otsu mask, and evaluated at every voxel from the coefficients of
    its spline, not interpolated. Signs and zeros stay. The result is the same, bit by bit, in every run.

    Args:
        volume: (X, Y, Z) or (X, Y, Z, C); each channel has its own field.

    Returns:
        The corrected volume. Channels in which no field can be told (constant, or too few voxels of tissue) stay as
        they are; `facts["corrections"]` says so.

    Source:
        Tustison et al., N4ITK: improved N3 bias correction, IEEE Trans. Med. Imaging 29(6), 2010.
    """
    spacing = np.linalg.norm(volume.affine[:3, :3], axis=0)
    array = np.array(volume.array, order="F")
    left = []
    for number, channel in enumerate(_channels(array), 1):
        if not _divide_by_field(array[channel], spacing):
            left.append(str(number))
    channels = len(_channels(array))
    note = "n4 bias correction"
    if len(left) == channels:
        note += " left out: too few voxels of tissue, or one value only"
    elif left:
        note += f", left out in channel {', '.join(left)} of {channels}: too few voxels of tissue, or one value only"
    return _noted(volume, array, volume.affine, note)


def _divide_by_field(values: Channel, spacing: Vector) -> bool:
    """Correct (X, Y, Z) values in place; False where there is nothing to fit."""
    itk = load_itk()

    steps = [min(SHRINK, max(1, n // FEWEST_VOXELS)) for n in values.shape[:2]] + [1]
    starts = [(n - 1) % step // 2 for n, step in zip(values.shape, steps, strict=True)]
    small = values[tuple(slice(start, None, step) for start, step in zip(starts, steps, strict=True))]
    if min(small.shape) < FEWEST_ALONG_AXIS or not small.max() > small.min():
        return False
    image = _as_image(small, spacing * steps)
    otsu = itk.OtsuThresholdImageFilter.New(image, NumberOfHistogramBins=OTSU_BINS, NumberOfWorkUnits=1)
    otsu.Update()
    tissue = (small > otsu.GetThreshold()) & (small > 0)  # logarithms are taken
    if tissue.sum() < FEWEST_IN_MASK:
        return False
    mask = _as_image(tissue.astype(np.uint8), spacing * steps)
    n4 = itk.N4BiasFieldCorrectionImageFilter[type(image), type(mask), type(image)].New()
    n4.SetInput(image)
    n4.SetMaskImage(mask)
    n4.SetNumberOfFittingLevels(LEVELS)
    n4.SetMaximumNumberOfIterations([ITERATIONS] * LEVELS)
    n4.SetConvergenceThreshold(CONVERGENCE)
    n4.SetNumberOfWorkUnits(1)
    # The spline fit inside takes the global number, and its sums depend on how the threads share the voxels.
    threads = itk.MultiThreaderBase.GetGlobalDefaultNumberOfThreads()
    itk.MultiThreaderBase.SetGlobalDefaultNumberOfThreads(1)
    try:
        n4.Update()
    finally:
        itk.MultiThreaderBase.SetGlobalDefaultNumberOfThreads(threads)
    lattice = _coefficients(n4.GetLogBiasFieldControlPointLattice())
    weights = [
        _spline(count, length, (np.arange(n) - start) / step)
        for count, length, n, start, step in zip(lattice.shape, small.shape, values.shape, starts, steps, strict=True)
    ]
    for k, along in enumerate(weights[2]):
        values[:, :, k] /= np.exp(weights[0] @ (lattice @ along) @ weights[1].T)
    return True


def _coefficients(lattice: Any) -> Vector:
    # An image of vectors of length 1, a type that itk's Python cannot turn into an array.
    size = tuple(lattice.GetLargestPossibleRegion().GetSize())
    return np.array([lattice.GetPixel([int(i) for i in place])[0] for place in np.ndindex(size)]).reshape(size)


def _spline(count: int, length: int, places: Vector) -> Vector:
    """Uniform cubic B-splines over a row of voxels, as itk's BSplineControlPointImageFilter has them.

    Args:
        count: coefficients; the row has count − 3 spans.
        length: voxels of the fitted image, whose first and last lie at the ends of the spans.
        places: (n,) in voxels of the fitted image; beyond its ends the end's value holds.

    Returns:
        (n, count) weights of the coefficients.
    """
    spans = count - 3
    t = np.clip(places / (length - 1), 0, 1) * spans
    k = np.minimum(t.astype(int), spans - 1)
    w = t - k
    weights = np.zeros((len(places), count))
    for j, part in enumerate(((1 - w) ** 3, 3 * w**3 - 6 * w**2 + 4, -3 * w**3 + 3 * w**2 + 3 * w + 1, w**3)):
        weights[np.arange(len(places)), k + j] = part / 6
    return weights
