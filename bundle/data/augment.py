"""Augmentation of bags: one geometry for all slices of a bag, an intensity change of its own for each slice."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from ..errors import InputError
from .sampling import DrawTransform

__all__ = ["RandBagAffined", "RandSliceIntensityd", "sampling_grid"]


class RandBagAffined(DrawTransform):
    """Rotate, scale, shift and mirror all slices of a bag alike, in their plane.

    Args:
        prob: of rotation, scale and shift (together).
        rotate: largest angle in degrees, either way.
        scale: largest relative change of size, either way.
        shift: largest shift as a share of the side, either way.
        mirror: probability of a left–right mirror image; 0 where the side matters.
    """

    def __init__(
        self, prob: float = 0.8, rotate: float = 10.0, scale: float = 0.1, shift: float = 0.05, mirror: float = 0.5
    ) -> None:
        for name, value in {"prob": prob, "mirror": mirror}.items():
            if not 0 <= value <= 1:
                raise InputError(f"{name} is a probability, not {value}")
        if rotate < 0 or shift < 0 or not 0 <= scale < 1:
            raise InputError(
                f"rotate and shift must be 0 or more and scale in [0, 1), not {rotate}, {shift} and {scale}"
            )
        self.prob, self.rotate, self.scale, self.shift, self.mirror = prob, rotate, scale, shift, mirror

    def draw(self, generator: np.random.Generator) -> np.ndarray:
        """A (2, 3) matrix from output to input places: x to the right and y down from the centre.

        The first two columns hold for any one unit of length; the shift is in halves of the side.
        """
        moved = generator.random() < self.prob
        angle, size, right, down = generator.uniform(-1, 1, 4) * moved
        angle = np.deg2rad(self.rotate * angle)
        factor = 1 / (1 + self.scale * size)
        sign = -1.0 if generator.random() < self.mirror else 1.0
        cos, sin = factor * np.cos(angle), factor * np.sin(angle)
        return np.array([[sign * cos, -sin, 2 * self.shift * right], [sign * sin, cos, 2 * self.shift * down]])

    def apply(self, slices: Tensor, matrix: np.ndarray) -> Tensor:
        """Slices (N, C, H, W) seen through the matrix; what comes from outside is 0."""
        grid = sampling_grid(matrix[None], slices)
        # Slices as channels: places and weights are then found once for all of them, and not once for each.
        pictures = slices.flatten(0, 1)  # (N · C, H, W)
        parts = pictures.tensor_split(min(torch.get_num_threads(), len(pictures)))
        moved = [
            functional.grid_sample(part[None], grid, mode="bilinear", padding_mode="zeros", align_corners=False)[0]
            for part in parts
        ]
        return torch.cat(moved).view_as(slices)

    def __call__(self, data: Mapping[str, Any]) -> dict[str, Any]:
        return {**data, "image": self.apply(data["image"], self.draw(self.generator(data)))}


def sampling_grid(matrices: np.ndarray, slices: Tensor) -> Tensor:
    """The places (M, H, W, 2) that `grid_sample` looks at, for matrices (M, 2, 3) of `RandBagAffined.draw`."""
    height, width = slices.shape[-2:]
    # grid_sample counts each side from -1 to 1; in those units a rotation would shear an oblong slice.
    oblong = np.array([[1, height / width, 1], [width / height, 1, 1]])
    theta = torch.from_numpy(matrices * oblong).to(slices.dtype)
    return functional.affine_grid(theta, [len(matrices), 1, height, width], align_corners=False)


class RandSliceIntensityd(DrawTransform):
    """Change contrast, brightness and noise of every slice by its own draw; values stay in [0, 1].

    Args:
        prob: probability for each slice.
        contrast: largest relative change of the slice's values, either way.
        brightness: largest shift of non-background values, either way.
        noise: largest standard deviation of added Gaussian noise.
    """

    def __init__(self, prob: float = 0.5, contrast: float = 0.1, brightness: float = 0.1, noise: float = 0.02) -> None:
        if not 0 <= prob <= 1:
            raise InputError(f"prob is a probability, not {prob}")
        if min(contrast, brightness, noise) < 0:
            raise InputError(
                f"contrast, brightness and noise must be 0 or more, not {contrast}, {brightness} and {noise}"
            )
        self.prob, self.contrast, self.brightness, self.noise = prob, contrast, brightness, noise

    def __call__(self, data: Mapping[str, Any]) -> dict[str, Any]:
        generator = self.generator(data)
        slices: Tensor = data["image"]
        changed = generator.random(len(slices)) < self.prob
        gain, offset, spread = generator.uniform([-1, -1, 0], 1, (len(slices), 3)).T * changed
        noise = generator.standard_normal(slices.shape, dtype=np.float32)
        out = slices.clamp(0, 1)
        for n in np.flatnonzero(changed):
            # Background stays 0: a brighter padding would tell resized shapes apart.
            visible = (slices[n] > 0).to(slices.dtype)
            one = torch.mul(slices[n], float(1 + self.contrast * gain[n]), out=out[n])
            one.add_(visible * float(self.brightness * offset[n]))
            one.add_(visible.mul_(float(self.noise * spread[n])).mul_(torch.from_numpy(noise[n])))
            one.clamp_(0, 1)
        return {**data, "image": out}
