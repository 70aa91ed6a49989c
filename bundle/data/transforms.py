"""Volume → slice bag: dictionary transforms without chance. Draws and augmentation are in `sampling` and `augment`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import nibabel as nib
import numpy as np
import torch
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import CropForeground, MapTransform, Spacing, Transform
from torch import Tensor
from torch.nn import functional

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
    "AddNeighboursd",
    "CheckVolumed",
    "CropToForegroundd",
    "DropBlankSlicesd",
    "OrientForSlicingd",
    "ResampleVolumed",
    "ResizeAndPadd",
    "ScaleForegroundPercentilesd",
    "VolumeToBagd",
    "take_slices",
]

# What a bag holds once a slice; every draw and drop takes the same slices from each.
SLICE_FIELDS = ("image", "slice_index", "slice_position", "slice_label", "slice_uid", "slice_frame")


def take_slices(bag: Mapping[str, Any], indices: Sequence[int] | np.ndarray) -> dict[str, Any]:
    """The bag with these slices only, in this order.

    Args:
        bag: a bag dictionary.
        indices: positions in the bag, from 0.
    """
    chosen = torch.as_tensor(np.asarray(indices, dtype=np.int64))
    taken = dict(bag)
    for field in SLICE_FIELDS:
        value = bag.get(field)
        if isinstance(value, Tensor):
            taken[field] = value[chosen]
        elif value is not None:
            taken[field] = tuple(value[int(i)] for i in chosen)
    return taken


class _KeysTransform(MapTransform):
    """A transform of the volumes or bags under some keys."""

    keys: tuple[str, ...]


class _SlicingTransform(_KeysTransform):
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


class OrientForSlicingd(_SlicingTransform):
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


class CheckVolumed(_KeysTransform):
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


class ResampleVolumed(_KeysTransform):
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


class CropToForegroundd(_KeysTransform):
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


class ScaleForegroundPercentilesd(_KeysTransform):
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


class VolumeToBagd(_SlicingTransform):
    """Cut a volume into its slices along the slicing axis and note where each one lies.

    Turns `image`, a MetaTensor (C, X, Y, Z) oriented by OrientForSlicingd and perhaps cropped or respaced, into a
    tensor (N, C, H, W) and adds `slice_index` (N,) in the stored volume along the stored axis nearest to the slicing
    axis, `slice_position` (N,) in mm, `slice_label` (N,) 1 / 0 / -1 unknown, `slice_uid` (SOP Instance UIDs, DICOM
    only), `slice_frame` (multi-frame DICOM only), `reading` (see `VolumeReader`) and `pixel_spacing` (row, column) in
    mm.

    Args:
        keys: the image's key.
        slicing_axis: as for OrientForSlicingd.

    Raises:
        InputError: when the slice truth lists more slices than the volume has.
    """

    def __call__(self, data: Mapping[str, Any]) -> dict[str, Any]:
        out = dict(data)
        for key in self.keys:
            out.update(self._cut(out.pop(key), out.pop("slice_label", None), key))
        return out

    def _cut(self, volume: MetaTensor, truth: Sequence[int] | None, key: str) -> dict[str, Any]:
        affine = np.asarray(volume.affine, dtype=np.float64)
        stored_affine = np.asarray(volume.meta["original_affine"], dtype=np.float64)
        stored_shape = [int(n) for n in volume.meta["spatial_shape"]][:3]
        axis = SLICING_DIMENSION[plane_of(self.slicing_axis, slice_axes(stored_affine))]
        columns, rows = (a for a in range(3) if a != axis)
        slices = volume.as_tensor().permute(1 + axis, 0, 1 + rows, 1 + columns).contiguous()  # (N, C, H, W)

        centres = np.empty((len(slices), 4))
        centres[:, :3] = (np.array(volume.shape[1:]) - 1) / 2
        centres[:, axis] = np.arange(len(slices))
        centres[:, 3] = 1
        world = centres @ affine.T  # (N, 4), mm
        normal = np.cross(affine[:3, columns], affine[:3, rows])
        normal /= np.linalg.norm(normal)
        # In the direction of RAS+, as the slices run; its largest component would not tell in a volume tilted by 45°.
        normal *= np.sign(normal @ affine[:3, axis])

        directions = stored_affine[:3, :3] / np.linalg.norm(stored_affine[:3, :3], axis=0)
        along = directions.T @ affine[:3, axis]
        stored_axis = int(np.abs(along).argmax())
        # Half-way between two stored slices the one further along RAS+ counts, whichever way they are stored.
        way = np.sign(along[stored_axis])
        place = np.round(way * (world @ np.linalg.inv(stored_affine).T)[:, stored_axis], 6)
        index = (way * np.floor(place + 0.5)).astype(np.int64).clip(0, stored_shape[stored_axis] - 1)
        if truth is not None and len(truth) > stored_shape[stored_axis]:
            raise InputError(
                f"the slice truth lists {len(truth)} slices, the volume has {stored_shape[stored_axis]} along the "
                "slicing axis: correct the table of slices or slicing_axis"
            )
        known = np.full(stored_shape[stored_axis], -1, dtype=np.int64)
        if truth is not None:
            known[: len(truth)] = truth
        uids, frames = (volume.meta.get(key) if stored_axis == 2 else None for key in ("slice_uids", "frame_numbers"))
        return {
            key: slices,
            "slice_index": torch.from_numpy(index),
            "slice_position": torch.from_numpy(world[:, :3] @ normal),
            "slice_label": torch.from_numpy(known[index]),
            "slice_uid": tuple(str(uids[i]) for i in index) if uids else None,
            "slice_frame": tuple(int(frames[i]) for i in index) if frames else None,
            "reading": volume.meta.get("reading"),
            "pixel_spacing": tuple(float(np.linalg.norm(affine[:3, a])) for a in (rows, columns)),
        }


class ResizeAndPadd(_KeysTransform):
    """Resize slices to the largest size that fits `size`, keeping their aspect in mm, and pad with 0, centred.

    The aspect in mm is kept also where pixels are not square. Shrinking is anti-aliased.

    Args:
        keys: of tensors (N, C, H, W) in bags with `pixel_spacing`.
        size: height and width in pixels.
    """

    def __init__(self, keys: KeysCollection, size: Sequence[int]) -> None:
        super().__init__(keys)
        if len(size) != 2 or any(not isinstance(side, int) or side < 8 for side in size):
            raise InputError(f"image_size is height and width, two whole numbers of at least 8 pixels, not {size}")
        self.size = (int(size[0]), int(size[1]))

    def __call__(self, data: Mapping[str, Any]) -> dict[str, Any]:
        out = dict(data)
        for key in self.keys:
            slices = out[key]
            # Rounded at a micrometre: stored decimals of one geometry differ in their last digits between formats.
            extent = np.round(np.array(slices.shape[-2:]) * np.array(data["pixel_spacing"]), 3)  # mm
            pixel = float((extent / self.size).max())  # mm
            height, width = (max(1, int(side)) for side in np.floor(extent / pixel + 0.5))
            resized = functional.interpolate(
                slices, (height, width), mode="bilinear", align_corners=False, antialias=True
            )
            top, left = (self.size[0] - height) // 2, (self.size[1] - width) // 2
            out[key] = functional.pad(resized, (left, self.size[1] - width - left, top, self.size[0] - height - top))
            out["pixel_spacing"] = (pixel, pixel)
        return out


class AddNeighboursd(_KeysTransform):
    """2.5D: give each slice its k neighbours on both sides as further channels; the outermost are repeated at the ends.

    (N, C, H, W) becomes (N, C · (2k + 1), H, W), all channels of the slice k below first. `own_channels` notes the
    first and the end of the channels that are the slice itself.

    Args:
        keys: of tensors (N, C, H, W), before any slice was dropped or drawn.
        neighbours: k, 0 for none.
    """

    def __init__(self, keys: KeysCollection, neighbours: int = 0) -> None:
        super().__init__(keys)
        if neighbours < 0:
            raise InputError(f"neighbours must be 0 or more, not {neighbours}")
        self.neighbours = neighbours

    def __call__(self, data: Mapping[str, Any]) -> dict[str, Any]:
        out = dict(data)
        for key in self.keys:
            slices = out[key]
            last, channels = len(slices) - 1, slices.shape[1]
            shifts = range(-self.neighbours, self.neighbours + 1)
            around = [slices[(torch.arange(last + 1) + shift).clamp(0, last)] for shift in shifts]
            out[key] = torch.cat(around, dim=1)
            out["own_channels"] = (self.neighbours * channels, (self.neighbours + 1) * channels)
        return out


class DropBlankSlicesd(Transform):
    """Drop slices that show next to nothing, by a rule that sees no label.

    A slice is blank when fewer than `min_foreground` of its pixels exceed `threshold` in the brightest of its own
    channels; neighbours do not count, so that 2.5D bags hold the same slices.

    Args:
        threshold: after normalisation to [0, 1].
        min_foreground: share of the pixels, in [0, 1); 0 keeps every slice.

    Raises:
        Refusal: `all_slices_blank`.
    """

    def __init__(self, threshold: float = 0.05, min_foreground: float = 0.02) -> None:
        if not 0 <= min_foreground < 1:
            raise InputError(f"min_foreground must be in [0, 1), not {min_foreground}")
        self.threshold, self.min_foreground = threshold, min_foreground

    def __call__(self, data: Mapping[str, Any]) -> dict[str, Any]:
        own = slice(*data.get("own_channels", (0, data["image"].shape[1])))
        share = (data["image"][:, own].amax(dim=1) > self.threshold).float().mean(dim=(1, 2))  # (N,)
        kept = torch.nonzero(share >= self.min_foreground).flatten().numpy()
        if not len(kept):
            raise Refusal(
                "all_slices_blank",
                f"all {len(share)} slices are blank after normalisation: less than {self.min_foreground:.0%} of each "
                f"exceeds {self.threshold}; check the intensity window",
                slices=len(share),
            )
        return take_slices(data, kept)
