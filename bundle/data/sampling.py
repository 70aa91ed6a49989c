"""Bag → the slices one training step sees. Draws depend on (seed, epoch, case) alone, so that they can be replayed."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np
from monai.transforms import RandomizableTrait, Transform

from ..errors import InputError
from .transforms import take_slices

__all__ = [
    "AllSlicesd",
    "DrawTransform",
    "RandomSlicesd",
    "StratifiedSlicesd",
    "UniformSlicesd",
    "draws_by_number",
]


class DrawTransform(Transform, RandomizableTrait):
    """A transform by chance, whose generator comes from the bag's `draw` = (seed, epoch) and `case`.

    Neither the number of workers, nor a resumed run, nor another order of cases changes a draw. Subclasses draw
    parameters and apply them in two separate methods.
    """

    def generator(self, data: Mapping[str, Any]) -> np.random.Generator:
        """The generator of this transform for this case in this epoch."""
        seed, epoch = data["draw"]
        # With the class name two transforms draw different numbers. Python's own hash differs between processes.
        name = f"{type(self).__name__}\0{data['case']}".encode()
        return np.random.default_rng([seed, epoch, int.from_bytes(hashlib.sha256(name).digest()[:8], "little")])


class _Slices(DrawTransform):
    """Keeps `size` slices of a bag in their order; a bag with no more than that is kept whole and never filled up."""

    def __init__(self, size: int) -> None:
        if size < 1:
            raise InputError(f"bag_size must be at least 1, not {size}")
        self.size = size

    def choose(self, num_slices: int, generator: np.random.Generator) -> np.ndarray:
        """Sorted positions (size,) out of `num_slices` > size."""
        raise TypeError(f"{type(self).__name__} draws no slices itself")

    def __call__(self, data: Mapping[str, Any]) -> dict[str, Any]:
        num_slices = len(data["image"])
        if num_slices <= self.size:
            return dict(data)
        return take_slices(data, self.choose(num_slices, self.generator(data)))


class RandomSlicesd(_Slices):
    """`size` slices drawn at random without replacement."""

    def choose(self, num_slices: int, generator: np.random.Generator) -> np.ndarray:
        return np.sort(generator.choice(num_slices, self.size, replace=False))


class StratifiedSlicesd(_Slices):
    """One random slice from each of `size` equal parts of the bag: no region of the body is left out."""

    def choose(self, num_slices: int, generator: np.random.Generator) -> np.ndarray:
        edges = np.arange(self.size + 1) * num_slices // self.size
        return generator.integers(edges[:-1], edges[1:])


class UniformSlicesd(_Slices):
    """`size` slices at equal distances, the same ones every time."""

    def choose(self, num_slices: int, generator: np.random.Generator) -> np.ndarray:
        return ((np.arange(self.size) + 0.5) * num_slices / self.size).astype(np.int64)


class AllSlicesd(_Slices):
    """Every slice."""

    def __init__(self) -> None:
        super().__init__(size=1)

    def __call__(self, data: Mapping[str, Any]) -> dict[str, Any]:
        return dict(data)


def draws_by_number(step: Any) -> bool:
    """Whether a step draws slices and looks at their number alone: it may be given anything that has as many items."""
    return type(step).__call__ in (_Slices.__call__, AllSlicesd.__call__)
