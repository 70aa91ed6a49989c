"""Bags of different length → one padded batch and its mask."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError

__all__ = ["collate_bags"]

PADDING = {"slice_index": -1, "slice_label": -1, "slice_position": float("nan")}


def collate_bags(bags: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Pad bags to the longest one of the batch.

    Args:
        bags: bag dictionaries with equal C, H, W and any number of slices above 0. A bag with a `refusal` in place of
            an image is a case that could not be read; such cases may stand anywhere.

    Returns:
        image (B, N, C, H, W) with 0 as padding (of a single bag its own tensor, not a copy), mask (B, N) with True =
        real slice, slice_index, slice_label (-1 as padding) and slice_position (NaN as padding) (B, N), label (B,) with
        -1 for unknown, and lists of the rest. Where cases were refused, `refused` lists them as they came, with their
        `position` among the given; B counts the others. A batch of refused cases alone holds nothing else.

    Raises:
        InputError: on an empty bag or bags with slices of different shape.
    """
    refused = [{**bag, "position": i} for i, bag in enumerate(bags) if "refusal" in bag]
    read = [bag for bag in bags if "refusal" not in bag]
    return (_padded_batch(read) if read else {}) | ({"refused": refused} if refused else {})


def _padded_batch(bags: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    shapes = {tuple(bag["image"].shape[1:]) for bag in bags}
    if len(shapes) > 1:
        raise InputError(f"slices of one batch must have one shape (channels, height, width), not {sorted(shapes)}")
    lengths = torch.tensor([len(bag["image"]) for bag in bags])
    if not bool((lengths > 0).all()):
        raise InputError("a bag needs at least one slice")
    most = int(lengths.max())
    batch: dict[str, Any] = {
        "image": _padded_images([bag["image"] for bag in bags], most),
        "mask": torch.arange(most) < lengths[:, None],
        "label": torch.tensor([-1 if bag.get("label") is None else int(bag["label"]) for bag in bags]),
    }
    for field, padding in PADDING.items():
        batch[field] = torch.stack([_padded(bag[field], most, padding) for bag in bags])
    for key in bags[0]:
        if key not in batch:
            batch[key] = [bag[key] for bag in bags]
    return batch


def _padded_images(images: Sequence[Tensor], length: int) -> Tensor:
    if len(images) == 1:
        return images[0][None]  # the bag itself: a copy of a long one would be the largest thing in memory
    padded = images[0].new_zeros(len(images), length, *images[0].shape[1:])
    for row, image in zip(padded, images, strict=True):
        row[: len(image)] = image
    return padded


def _padded(values: Tensor, length: int, padding: float) -> Tensor:
    out = torch.full((length,), padding, dtype=values.dtype)
    out[: len(values)] = values
    return out
