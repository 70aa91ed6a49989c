"""The preparation of the slices that a draw takes, and of no others: headers first, then only their pixels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from monai.data import MetaTensor
from torch import Tensor

from ..errors import Refusal
from .parts import SLICES, assembled, kind_of, same_keys
from .reader import VolumeReader
from .sampling import AllSlicesd, draws_by_number
from .series import PlannedSeries, plan_volume, read_planned
from .transforms import take_slices
from .volume import Volume

__all__ = ["can_select", "prepare_drawn"]


def can_select(steps: Sequence[Any], draw: Any) -> bool:
    """Whether a preparation treats slices one by one, so that others than those drawn need not be decoded.

    It does where it loads one image, moves voxels without looking at their values, cuts the volume into slices, and
    changes slices each by itself: a fixed window instead of percentiles, no crop to the foreground, no resampling, no
    neighbours, no blank slices left out.

    Args:
        steps: of the preparation.
        draw: the transform that follows.
    """
    kinds = [kind_of(step) for step in steps]
    if not draws_by_number(draw):
        return False
    if kinds.count("load") != 1 or kinds[0] != "load" or kinds.count("cut") != 1:
        return False
    cut = kinds.index("cut")
    # A check says something of the values as they were read, so it comes before they are changed.
    order = [kind for kind in kinds[1:cut] if kind != "geometry"]
    return (
        same_keys(steps)
        and set(order) <= {"check", "pointwise"}
        and order == sorted(order)
        and set(kinds[cut + 1 :]) <= {"slices", "pointwise"}
    )


def prepare_drawn(case: Mapping[str, Any], steps: Sequence[Any], draw: Any) -> dict[str, Any] | None:
    """What `draw` takes of a prepared case, to the last bit as if all of it had been prepared.

    Headers and geometry of all slices are read and checked as ever; the pixels of slices that are not drawn stay
    unread. Where all are drawn, all are read, and slices are still prepared a few at a time, in less memory.

    Args:
        case: with `case`, `draw` = (seed, epoch) and `image`, as a BagDataset gives it to its transforms.
        steps: of the preparation.
        draw: a slice draw, such as UniformSlicesd.

    Returns:
        The drawn bag, whose `reading` says how many slices were decoded of how many (`decoded_slices`, `slices`); None
        where preparation, scan or format need every voxel, and the case has to be prepared whole.

    Raises:
        Refusal: as the whole preparation, but for faults of pixels that were not decoded.
    """
    if not can_select(steps, draw):
        return None
    load, key = steps[0], steps[0].keys[0]
    data = dict(case)
    reader = load.reader_of(data.pop("series_rules", None))
    paths = data[key] if isinstance(data[key], (list, tuple)) else [data[key]]
    planned = plan_volume(paths[0], reader.policy) if reader.channels == len(paths) == 1 else None
    if planned is None:
        return None
    bag = _drawn_places(planned, reader, data, key, steps, draw)
    # Across stored slices, every slice of the bag is made of all of them.
    if bag.get("slice_uid") is None:
        return None
    stored = bag["slice_index"].numpy()
    read = _decoded(planned, reader, np.unique(stored))
    if read is None:
        return None
    volume, partial = read
    slices = _cut(volume, reader, key, steps, partial, stored)
    if slices is None:
        return None
    bag["reading"] = reader.get_data([volume])[1]["reading"]
    changes = [step for step in steps if kind_of(step) in ("pointwise", "slices")]
    return assembled(bag, key, slices.split(SLICES), changes)


def _drawn_places(
    planned: PlannedSeries, reader: VolumeReader, data: dict[str, Any], key: str, steps: Sequence[Any], draw: Any
) -> dict[str, Any]:
    """The drawn bag without its image: a volume of no content takes the steps that only move voxels."""
    nothing = planned.volume(np.broadcast_to(np.float32(0), planned.shape), {})
    bag = {**data, key: _tensor(nothing, reader, torch.empty((1, *planned.shape), device="meta"))}
    for step in steps:
        if kind_of(step) in ("geometry", "cut"):
            bag = step(bag)
    count = len(bag.pop(key))
    if isinstance(draw, AllSlicesd) or count <= draw.size:
        return bag
    return take_slices(bag, draw.choose(count, draw.generator(data)))


def _tensor(volume: Volume, reader: VolumeReader, content: Tensor) -> Any:
    return MetaTensor.ensure_torch_and_prune_meta(content, reader.get_data([volume])[1])


def _decoded(planned: PlannedSeries, reader: VolumeReader, places: np.ndarray) -> tuple[Volume, bool] | None:
    """The volume of some slices, and whether others are missing from it; None where all are needed to say its values.

    Padding takes the least value of the volume. Compression with loss that no header declares, and a wrong bit layout
    among several, show in the pixels of any slice.
    """
    headers = planned.headers
    if len(places) == len(headers):
        return read_planned(planned, reader.policy), False
    layouts = {(h.bits_allocated, h.bits_stored, h.high_bit) for h in headers}
    hidden = not reader.policy.accept_lossy and any(h.is_encapsulated for h in headers)
    if len(layouts) > 1 or hidden:
        return None
    try:
        volume = read_planned(planned, reader.policy, places.tolist())
    except Refusal as refusal:
        if refusal.code == "only_padding":  # of these slices; what was measured may be in the others
            return None
        raise
    return None if volume.facts["padding_voxels"] else (volume, True)


def _cut(
    volume: Volume, reader: VolumeReader, key: str, steps: Sequence[Any], partial: bool, stored: np.ndarray
) -> Tensor | None:
    """(N, 1, H, W) slices of those stored numbers; None where a check fails that the whole volume may pass."""
    array = torch.from_numpy(volume.array.transpose(2, 1, 0)[None]).permute(0, 3, 2, 1)
    data: dict[str, Any] = {key: _tensor(volume, reader, array)}
    for step in steps:
        if kind_of(step) == "check":
            try:
                step(data)
            except Refusal:
                if partial:
                    return None
                raise
        elif kind_of(step) in ("geometry", "cut"):
            data = step(data)
    # Its slices are numbered within the part, in whichever direction the bag runs.
    numbers = np.unique(stored)[data["slice_index"].numpy()]
    if np.array_equal(numbers, stored):
        return data[key]
    places = {int(number): place for place, number in enumerate(numbers)}
    return data[key][[places[int(number)] for number in stored]]
