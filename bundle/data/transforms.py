"""Prepared volume → slice bag: dictionary transforms without chance.

What is done to the volume first is in `volume_transforms`; draws and augmentation are in `sampling` and `augment`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import Transform
from torch import Tensor
from torch.nn import functional

from ..errors import InputError, Refusal
from .orientation import (
    SLICING_DIMENSION,
    plane_of,
    slice_axes,
)
from .volume_transforms import KeysTransform, SlicingTransform

__all__ = ["AddNeighboursd", "DropBlankSlicesd", "ResizeAndPadd", "VolumeToBagd", "slices_along", "take_slices"]

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


def slices_along(axis: int, volume: Tensor) -> Tensor:
    """The slices (N, C, H, W) of a volume (C, X, Y, Z) along one of its axes X, Y and Z, without copying it."""
    columns, rows = (a for a in range(3) if a != axis)
    return volume.permute(1 + axis, 0, 1 + rows, 1 + columns)


class VolumeToBagd(SlicingTransform):
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

    acts_on = "cut"

    def __call__(self, data: Mapping[str, Any]) -> dict[str, Any]:
        out = dict(data)
        for key in self.keys:
            out.update(self._cut(out.pop(key), out.pop("slice_label", None), key))
        return out

    def axis_of(self, volume: MetaTensor) -> int:
        """Along which of the axes X, Y and Z of a volume the slices lie."""
        return SLICING_DIMENSION[plane_of(self.slicing_axis, slice_axes(np.asarray(volume.meta["original_affine"])))]

    def _cut(self, volume: MetaTensor, truth: Sequence[int] | None, key: str) -> dict[str, Any]:
        affine = np.asarray(volume.affine, dtype=np.float64)
        stored_affine = np.asarray(volume.meta["original_affine"], dtype=np.float64)
        stored_shape = [int(n) for n in volume.meta["spatial_shape"]][:3]
        axis = self.axis_of(volume)
        columns, rows = (a for a in range(3) if a != axis)
        slices = slices_along(axis, volume.as_tensor()).contiguous()

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


class ResizeAndPadd(KeysTransform):
    """Resize slices to the largest size that fits `size`, keeping their aspect in mm, and pad with 0, centred.

    The aspect in mm is kept also where pixels are not square. Shrinking is anti-aliased.

    Args:
        keys: of tensors (N, C, H, W) in bags with `pixel_spacing`.
        size: height and width in pixels.
    """

    acts_on = "slices"

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


class AddNeighboursd(KeysTransform):
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
        self.acts_on = "slices" if neighbours == 0 else "volume"

    def __call__(self, data: Mapping[str, Any]) -> dict[str, Any]:
        out = dict(data)
        for key in self.keys:
            slices = out[key]
            out["own_channels"] = (self.neighbours * slices.shape[1], (self.neighbours + 1) * slices.shape[1])
            if not self.neighbours:
                continue
            last = len(slices) - 1
            shifts = range(-self.neighbours, self.neighbours + 1)
            around = [slices[(torch.arange(last + 1) + shift).clamp(0, last)] for shift in shifts]
            out[key] = torch.cat(around, dim=1)
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
        self.acts_on = "slices" if min_foreground == 0 else "volume"

    def __call__(self, data: Mapping[str, Any]) -> dict[str, Any]:
        own = slice(*data.get("own_channels", (0, data["image"].shape[1])))
        slices = data["image"][:, own].numpy()
        # The brightest channel exceeds a threshold where any does. In float32, as PyTorch takes a mean.
        counts = np.array([np.count_nonzero((one > self.threshold).any(axis=0)) for one in slices], dtype=np.float32)
        share = counts / np.float32(slices[0, 0].size)  # (N,)
        kept = np.flatnonzero(share >= np.float32(self.min_foreground))
        if not len(kept):
            raise Refusal(
                "all_slices_blank",
                f"all {len(share)} slices are blank after normalisation: less than {self.min_foreground:.0%} of each "
                f"exceeds {self.threshold}; check the intensity window",
                slices=len(share),
            )
        return dict(data) if len(kept) == len(share) else take_slices(data, kept)
