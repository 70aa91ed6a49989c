"""Read volume → oriented, respaced, cropped and scaled volume: dictionary transforms without chance."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import nibabel as nib
import numpy as np
import torch
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import MapTransform, Spacing, SpatialCrop
from monai.utils import MetaKeys
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
from .percentiles import Ranked
from .threads import shared_out

__all__ = [
    "CheckVolumed",
    "CropToForegroundd",
    "KeysTransform",
    "OrientForSlicingd",
    "ResampleVolumed",
    "ScaleForegroundPercentilesd",
    "ScaleWindowd",
    "SlicingTransform",
    "plain",
]


class KeysTransform(MapTransform):
    """A transform of the volumes or bags under some keys.

    `acts_on` says what a result depends on, with the parameters given: "geometry": where voxels lie and no value of
    theirs; "check": nothing is changed, and a part that passes shows that the whole does; "slices": each slice by
    itself; "pointwise": each voxel by itself; "fitted": the same once some numbers are known of the whole volume, for
    which `fitted` gives a pointwise step; "cut": the volume becomes its slices; "volume": anything. `selective` and
    `parts` rely on it.
    """

    keys: tuple[str, ...]
    acts_on = "volume"


class SlicingTransform(KeysTransform):
    """A transform that depends on the slicing axis."""

    def __init__(self, keys: KeysCollection, slicing_axis: str) -> None:
        super().__init__(keys)
        if slicing_axis not in SLICING_AXES:
            raise InputError(f"slicing_axis must be one of {', '.join(SLICING_AXES)}, not {slicing_axis!r}")
        self.slicing_axis = slicing_axis


def plain(volume: Tensor) -> Tensor:
    """The same values without meta data, which every operation on a MetaTensor copies."""
    return volume.as_tensor() if isinstance(volume, MetaTensor) else volume


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

    acts_on = "geometry"

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
            array = plain(volume)
            array = array.flip(flips) if flips else array
            array = array.permute(0, *(1 + int(axis) for axis in np.argsort(change[:, 0])))
            moved = affine @ nib.orientations.inv_ornt_aff(change, volume.shape[1:])
            out[key] = MetaTensor(array, meta={**volume.meta, MetaKeys.AFFINE: torch.from_numpy(moved)})
        return out


class CheckVolumed(KeysTransform):
    """Refuse a volume whose every channel holds one value only: nothing could be normalised or seen in it.

    Raises:
        Refusal: `constant_volume`.
    """

    acts_on = "check"

    def __call__(self, data: Mapping[str, Any]) -> dict[str, Any]:
        for key in self.keys:
            channels = plain(data[key])
            if not any(_varies(channel) for channel in channels):
                values = ", ".join(f"{float(channel.flatten()[0]):g}" for channel in channels)
                raise Refusal(
                    "constant_volume", f"every voxel of the volume is {values}: there is nothing to see in it"
                )
        return dict(data)


def _varies(channel: Tensor) -> bool:
    """Whether (X, Y, Z) voxels hold more than one value; the first slice tells, nearly always."""
    first = channel[0, 0, 0]
    return any(bool((part < first).any() or (part > first).any()) for part in channel.unbind(-1))


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
        self.acts_on = "geometry" if spacing is None else "volume"

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


def foreground_threshold(values: Ranked) -> float:
    """What lies above is foreground: a tenth of the range between the 0.5 and 99.5 percentiles, from below.

    Percentiles, so that single hot voxels do not hide the body.
    """
    floor, ceiling = values.percentiles([0.5, 99.5])
    return floor + 0.1 * (ceiling - floor)


def _foreground_box(volume: np.ndarray) -> list[tuple[int, int]]:
    """First and end of the foreground in any channel along the axes of (C, X, Y, Z); empty where there is none."""
    plane = np.zeros(volume.shape[1:3], dtype=bool)
    along = np.zeros(volume.shape[3], dtype=bool)
    for channel in volume:
        threshold = foreground_threshold(Ranked(channel))
        # The largest value exceeds it where any does.
        found = shared_out(_largest, [channel[:, :, k] for k in range(channel.shape[2])])
        plane |= np.max([across for across, _ in found], axis=0) > threshold
        along |= np.concatenate([one for _, one in found]) > threshold
    seen = [np.flatnonzero(line) for line in (plane.any(axis=1), plane.any(axis=0), along)]
    return [(int(places[0]), int(places[-1]) + 1) for places in seen if len(places)]


def _largest(slices: Sequence[np.ndarray]) -> tuple[np.ndarray, list[np.float32]]:
    """The largest value of some slices (X, Y) at each place (X, Y), and of each slice."""
    across = slices[0].copy(order="K")
    for one in slices[1:]:
        np.maximum(across, one, out=across)
    return across, [one.max() for one in slices]


class CropToForegroundd(KeysTransform):
    """Crop a volume to the box around its foreground, so that the field of view does not set the size of the anatomy.

    Args:
        keys: of MetaTensors (C, X, Y, Z).
        margin: voxels left around the box; None crops nothing.
    """

    def __init__(self, keys: KeysCollection, margin: int | None = 2) -> None:
        super().__init__(keys)
        if margin is not None and (isinstance(margin, bool) or not isinstance(margin, int) or margin < 0):
            raise InputError(f"crop_margin must be a whole number of voxels of 0 or more, or null, not {margin!r}")
        self.margin = margin
        self.acts_on = "geometry" if margin is None else "volume"

    def __call__(self, data: Mapping[str, Any]) -> dict[str, Any]:
        out = dict(data)
        for key in self.keys if self.margin is not None else ():
            box = _foreground_box(plain(out[key]).numpy())
            # An absent foreground (few voxels differ from the rest) leaves nothing to crop to.
            if box:
                first, end = np.array(box).T
                first, end = np.maximum(first - self.margin, 0), np.minimum(end + self.margin, out[key].shape[1:])
                out[key] = SpatialCrop(roi_start=first, roi_end=end)(out[key])
        return out


def _scaled(given: Tensor, ranges: Sequence[tuple[float, float]]) -> Tensor:
    """(C, X, Y, Z) values, of each channel less its first number and divided by its second, clipped to [0, 1].

    A channel of infinite extent becomes 0.
    """
    scaled = torch.empty_like(given)  # axes in the same order in memory
    for part, values, (low, extent) in zip(scaled, given, ranges, strict=True):
        if extent == math.inf:
            part.zero_()
        else:
            torch.sub(values, low, out=part).div_(extent).clamp_(0.0, 1.0)
    return scaled


class ScaleWindowd(KeysTransform):
    """Map a fixed window of values to [0, 1] and clip, for CT, whose units are Hounsfield units.

    The values are those of MONAI's ScaleIntensityRanged with b_min 0, b_max 1 and clip, in less memory and time.

    Args:
        keys: of tensors (C, X, Y, Z).
        low: what becomes 0.
        high: what becomes 1.
    """

    acts_on = "pointwise"

    def __init__(self, keys: KeysCollection, low: float, high: float) -> None:
        super().__init__(keys)
        if not low < high:
            raise InputError(f"a window needs low < high, not {low} and {high}")
        self.low, self.high = float(low), float(high)

    def __call__(self, data: Mapping[str, Any]) -> dict[str, Any]:
        ranges = {key: [(self.low, self.high - self.low)] * len(data[key]) for key in self.keys}
        return _with_scaled(data, ranges)


class ScaleForegroundPercentilesd(KeysTransform):
    """Map two percentiles of each channel's foreground to 0 and 1 and clip, for MR, whose units are arbitrary.

    With all voxels the share of air around the head, which the field of view decides, would set the contrast.

    Args:
        keys: of tensors (C, X, Y, Z).
        lower: percentile of the foreground that becomes 0, in percent. Background goes below and is clipped to 0.
        upper: percentile of the foreground that becomes 1, in percent.
    """

    acts_on = "fitted"

    def __init__(self, keys: KeysCollection, lower: float = 1.0, upper: float = 99.0) -> None:
        super().__init__(keys)
        if not 0 <= lower < upper <= 100:
            raise InputError(f"percentiles must satisfy 0 <= lower < upper <= 100, not {lower} and {upper}")
        self.lower, self.upper = lower, upper

    def __call__(self, data: Mapping[str, Any]) -> dict[str, Any]:
        return self.fitted(data)(data)

    def fitted(self, data: Mapping[str, Any]) -> Callable[[Mapping[str, Any]], dict[str, Any]]:
        """The same for any part of the volumes that are given, whose percentiles hold for all of it."""
        ranges = {key: [self._range(Ranked(channel.numpy())) for channel in plain(data[key])] for key in self.keys}
        return partial(_with_scaled, ranges=ranges)

    def _range(self, values: Ranked) -> tuple[float, float]:
        """What is subtracted from a channel, and what the rest is divided by; infinity for a constant one."""
        threshold = foreground_threshold(values)
        least, most = values.ends()
        # Else fewer than 0.5% of the voxels differ from the rest.
        apart = most > threshold
        low, high = values.percentiles([self.lower, self.upper], above=threshold) if apart else (least, most)
        if not high > low:  # as in binary shapes: the foreground becomes 1
            low = least
        # A channel may be constant (an absent sequence) where the volume is not: it becomes 0, also where
        # resampling left rounding errors. The limit is relative: quantitative maps may hold values of 1e-9.
        constant = high - low <= 1e-6 * max(abs(low), abs(high))
        return low, math.inf if constant else high - low


def _with_scaled(data: Mapping[str, Any], ranges: Mapping[str, Sequence[tuple[float, float]]]) -> dict[str, Any]:
    out = dict(data)
    for key, own in ranges.items():
        scaled = _scaled(plain(out[key]), own)
        out[key] = MetaTensor(scaled, meta=out[key].meta) if isinstance(out[key], MetaTensor) else scaled
    return out
