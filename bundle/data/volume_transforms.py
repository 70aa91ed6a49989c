"""Read volume → oriented, respaced, cropped and scaled volume: dictionary transforms without chance."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import nibabel as nib
import numpy as np
import torch
from monai.config import KeysCollection
from monai.transforms import CropForeground, MapTransform, Spacing
from torch import Tensor

from ..errors import InputError, Refusal
from .orientation import (
    AXIS_CODES,
    LEAN_DEGREES,
    SLICING_AXES,
    SLICING_DIMENSION,
    lean,
    nearest_axes,
    plane_of,
    slice_axes,
)

__all__ = [
    "CheckVolumed",
    "CropToForegroundd",
    "KeysTransform",
    "OrientForSlicingd",
    "ResampleVolumed",
    "ScaleForegroundPercentilesd",
    "SlicingTransform",
]


class KeysTransform(MapTransform):
    """A transform of the volumes or bags under some keys."""

    keys: tuple[str, ...]


class SlicingTransform(KeysTransform):
    """A transform that depends on the slicing axis."""

    def __init__(self, keys: KeysCollection, slicing_axis: str) -> None:
        super().__init__(keys)
        if slicing_axis not in SLICING_AXES:
            raise InputError(f"slicing_axis must be one of {', '.join(SLICING_AXES)}, not {slicing_axis!r}")
        self.slicing_axis = slicing_axis


def _sheared(affine: np.ndarray, what: str) -> Refusal:
    return Refusal(
        "sheared_slices",
        f"The slices are stacked {lean(affine):.1f}° askew (gantry tilt), so {what}; set the reader's gantry_tilt to "
        "resample.",
        degrees=round(lean(affine), 3),
    )


class OrientForSlicingd(SlicingTransform):
    """Permute and flip a volume so that its slices along the slicing axis are upright and run in the direction of RAS+.

    Args:
        keys: of MetaTensors (C, X, Y, Z).
        slicing_axis: "axial", "coronal", "sagittal", or "acquired" (the stored third axis, whatever its direction).

    Raises:
        Refusal: `sheared_slices` where slices are stacked askew (gantry tilt) and others than those were asked for:
            pictures across the stack would be distorted.
    """

    def __call__(self, data: Mapping[str, Any]) -> dict[str, Any]:
        out = dict(data)
        for key in self.keys:
            volume = out[key]
            affine = np.asarray(volume.affine, dtype=np.float64)
            plane = plane_of(self.slicing_axis, slice_axes(np.asarray(volume.meta["original_affine"])))
            wanted = nib.orientations.axcodes2ornt(AXIS_CODES[plane])
            change = nib.orientations.ornt_transform(nearest_axes(slice_axes(affine)), wanted)
            if lean(affine) > LEAN_DEGREES and change[2, 0] != SLICING_DIMENSION[plane]:
                raise _sheared(affine, f"{plane} pictures across them would be distorted")
            flips = [1 + axis for axis in range(3) if change[axis, 1] < 0]
            oriented = volume.flip(flips).permute(0, *(1 + int(axis) for axis in np.argsort(change[:, 0])))
            oriented.affine = affine @ nib.orientations.inv_ornt_aff(change, volume.shape[1:])
            out[key] = oriented
        return out


class CheckVolumed(KeysTransform):
    """Refuse a volume whose every channel holds one value only: nothing could be normalised or seen in it.

    Raises:
        Refusal: `constant_volume`.
    """

    def __call__(self, data: Mapping[str, Any]) -> dict[str, Any]:
        for key in self.keys:
            channels = data[key].flatten(start_dim=1)
            low, high = channels.amin(dim=1), channels.amax(dim=1)
            if not bool((high > low).any()):
                values = ", ".join(f"{float(value):g}" for value in low)
                raise Refusal(
                    "constant_volume", f"every voxel of the volume is {values}: there is nothing to see in it"
                )
        return dict(data)


class ResampleVolumed(KeysTransform):
    """Resample a volume to a spacing, or leave it alone.

    Along the slicing axis the nearest stored slice of each new one is what `slice_index` records.

    Args:
        keys: of MetaTensors (C, X, Y, Z).
        spacing: mm along the three axes as oriented; a negative one keeps that axis; None keeps the volume.

    Raises:
        Refusal: `sheared_slices` where slices are stacked askew (gantry tilt): MONAI's Spacing lays an upright grid
            whose step is the leaning one (3.16 mm for planes 3 mm apart), so slices would leave the planes in which
            they were acquired.
    """

    def __init__(self, keys: KeysCollection, spacing: Sequence[float] | None = None) -> None:
        super().__init__(keys)
        if spacing is not None and (len(spacing) != 3 or any(s == 0 for s in spacing)):
            raise InputError(f"spacing is three numbers in mm that are not 0, or null, not {spacing}")
        self.spacing = spacing

    def __call__(self, data: Mapping[str, Any]) -> dict[str, Any]:
        out = dict(data)
        if self.spacing is not None:
            for key in self.keys:
                affine = np.asarray(out[key].affine, dtype=np.float64)
                if lean(affine) > LEAN_DEGREES:
                    raise _sheared(affine, "they cannot be resampled to another spacing as they are")
                present = np.linalg.norm(affine[:3, :3], axis=0)
                target = [float(have if want < 0 else want) for want, have in zip(self.spacing, present, strict=True)]
                out[key] = Spacing(pixdim=target, mode="bilinear", padding_mode="border")(out[key])
        return out


def foreground_threshold(values: np.ndarray) -> float:
    """What lies above is foreground: a tenth of the range between the 0.5 and 99.5 percentiles, from below.

    Percentiles, so that single hot voxels do not hide the body.
    """
    floor, ceiling = np.percentile(values, [0.5, 99.5])
    return float(floor + 0.1 * (ceiling - floor))


def _foreground(volume: Tensor) -> Tensor:
    """(1, X, Y, Z) bool: foreground in any channel."""
    return torch.stack([channel > foreground_threshold(channel.numpy()) for channel in volume]).any(dim=0, keepdim=True)


class CropToForegroundd(KeysTransform):
    """Crop a volume to the box around its foreground, so that the field of view does not set the size of the anatomy.

    Args:
        keys: of MetaTensors (C, X, Y, Z).
        margin: voxels left around the box.
    """

    def __init__(self, keys: KeysCollection, margin: int = 2) -> None:
        super().__init__(keys)
        if margin < 0:
            raise InputError(f"margin must be 0 or more voxels, not {margin}")
        self.margin = margin

    def __call__(self, data: Mapping[str, Any]) -> dict[str, Any]:
        out = dict(data)
        for key in self.keys:
            foreground = _foreground(out[key].as_tensor())
            # An absent foreground (few voxels differ from the rest) leaves nothing to crop to.
            if bool(foreground.any()):
                box = CropForeground(
                    select_fn=lambda _, found=foreground: found, margin=self.margin, allow_smaller=True
                )
                out[key] = box(out[key])
        return out


class ScaleForegroundPercentilesd(KeysTransform):
    """Map two percentiles of each channel's foreground to 0 and 1 and clip, for MR, whose units are arbitrary.

    With all voxels the share of air around the head, which the field of view decides, would set the contrast.

    Args:
        keys: of tensors (C, X, Y, Z).
        lower: percentile of the foreground that becomes 0, in percent. Background goes below and is clipped to 0.
        upper: percentile of the foreground that becomes 1, in percent.
    """

    def __init__(self, keys: KeysCollection, lower: float = 1.0, upper: float = 99.0) -> None:
        super().__init__(keys)
        if not 0 <= lower < upper <= 100:
            raise InputError(f"percentiles must satisfy 0 <= lower < upper <= 100, not {lower} and {upper}")
        self.lower, self.upper = lower, upper

    def __call__(self, data: Mapping[str, Any]) -> dict[str, Any]:
        out = dict(data)
        for key in self.keys:
            volume = out[key].clone()
            for channel in volume:
                values = np.asarray(channel)
                foreground = values[values > foreground_threshold(values)]
                if foreground.size:
                    low, high = np.percentile(foreground, [self.lower, self.upper])
                else:  # fewer than 0.5% of the voxels differ from the rest
                    low, high = values.min(), values.max()
                if not high > low:  # as in binary shapes: the foreground becomes 1
                    low = values.min()
                # A channel may be constant (an absent sequence) where the volume is not: it becomes 0, also where
                # resampling left rounding errors. The limit is relative: quantitative maps may hold values of 1e-9.
                constant = float(high) - float(low) <= 1e-6 * max(abs(float(low)), abs(float(high)))
                channel.sub_(float(low)).div_(1.0 if constant else float(high) - float(low)).clamp_(0.0, 1.0)
                if constant:
                    channel.zero_()
            out[key] = volume
        return out
