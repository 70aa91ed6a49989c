"""Two views of every slice of a bag, for pre-training without labels: the same slices, augmented twice."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from monai.transforms import RandomizableTrait, Transform
from torch import Tensor
from torch.nn import functional

from ..errors import InputError
from .augment import RandBagAffined, sampling_grid
from .sampling import DrawTransform

__all__ = ["RandSliceAffined", "RandSliceCutoutd", "TwoViewsd"]


class RandSliceAffined(RandBagAffined):
    """Rotate, scale, shift and mirror every slice by a draw of its own; arguments as for `RandBagAffined`."""

    def __call__(self, data: Mapping[str, Any]) -> dict[str, Any]:
        generator, slices = self.generator(data), data["image"]
        matrices = np.stack([self.draw(generator) for _ in range(len(slices))])  # (N, 2, 3)
        grid = sampling_grid(matrices, slices)
        moved = functional.grid_sample(slices, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
        return {**data, "image": moved}


class RandSliceCutoutd(DrawTransform):
    """Set a rectangle of every slice to 0, in all its channels.

    Args:
        prob: probability for each slice.
        size: longest side of a rectangle as a share of the slice's.
    """

    def __init__(self, prob: float = 0.5, size: float = 0.4) -> None:
        if not 0 <= prob <= 1 or not 0 < size <= 1:
            raise InputError(f"prob is a probability and size a share of the side above 0, not {prob} and {size}")
        self.prob, self.size = prob, size

    def __call__(self, data: Mapping[str, Any]) -> dict[str, Any]:
        generator, slices = self.generator(data), data["image"]
        cut = generator.random(len(slices)) < self.prob
        sides = generator.uniform(0, self.size, (len(slices), 2))
        starts = generator.random((len(slices), 2)) * (1 - sides)
        inside = [_between(starts[:, axis], sides[:, axis], slices.shape[2 + axis]) for axis in (0, 1)]
        hidden = inside[0][:, None, :, None] & inside[1][:, None, None, :]  # (N, 1, H, W)
        hidden &= torch.from_numpy(cut)[:, None, None, None]
        return {**data, "image": slices.masked_fill(hidden, 0.0)}


def _between(starts: np.ndarray, sides: np.ndarray, pixels: int) -> Tensor:
    """Which pixels (N, pixels) have their centre in [start, start + side), both as shares of the whole."""
    centres = (np.arange(pixels) + 0.5) / pixels
    return torch.from_numpy((centres >= starts[:, None]) & (centres < (starts + sides)[:, None]))


class TwoViewsd(Transform, RandomizableTrait):
    """Gives the slices of a bag twice, augmented by two draws: image (N, C, H, W) becomes (N, 2 C, H, W).

    The first C channels are the first view. Draws come from (seed, epoch, case, view). The bag's `label` becomes None
    and its `slice_label` unknown (-1): nothing after this step can learn from them.

    Args:
        steps: draw transforms of bags, such as RandSliceAffined.
    """

    def __init__(self, steps: Sequence[DrawTransform]) -> None:
        self.steps = tuple(steps)

    def __call__(self, data: Mapping[str, Any]) -> dict[str, Any]:
        views: list[Tensor] = []
        for number in (1, 2):
            # Of another name the same case has other draws.
            bag = {**data, "case": f"{data['case']}\0view {number}"}
            for step in self.steps:
                bag = step(bag)
            views.append(bag["image"])
        unknown = torch.full_like(data["slice_label"], -1)
        return {**data, "image": torch.cat(views, dim=1), "label": None, "slice_label": unknown}
