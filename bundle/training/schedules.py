"""Epoch → temperature, regularisation weight, learning rate. Functions of the epoch alone: a resumed run cannot drift.

A schedule is called with (epoch, max_epochs), epoch from 0 to max_epochs - 1.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from monai.optimizers import WarmupCosineSchedule
from torch import nn
from torch.optim import Optimizer

from ..errors import InputError
from ..model.bag_network import BagNetwork

__all__ = [
    "CosineTemperature",
    "ExponentialTemperature",
    "LinearWeight",
    "PrescribedTemperature",
    "TemperatureSchedule",
    "parameter_groups",
    "warmup_cosine",
]


class TemperatureSchedule:
    """From `start` to `end`; subclasses say on which path and by when.

    Args:
        start: temperature of the first epoch, above 0.
        end: temperature that is reached and kept, above 0 and at most `start`.
        fraction: share of the epochs after which the end is reached, in (0, 1]; at the latest the last epoch has it.
    """

    def __init__(self, start: float, end: float, fraction: float = 1.0) -> None:
        if not 0 < end <= start < math.inf:
            raise InputError(
                f"temperatures must satisfy 0 < temperature_end <= temperature_start, not {end} and {start}"
            )
        if not 0 < fraction <= 1:
            raise InputError(f"temperature_fraction must be in (0, 1], not {fraction}")
        self.start, self.end, self.fraction = start, end, fraction

    def last_step(self, max_epochs: int) -> int:
        """The first epoch (from 0) at the end temperature."""
        return 0 if self.start == self.end else min(max_epochs - 1, round(self.fraction * max_epochs))

    def __call__(self, epoch: int, max_epochs: int) -> float:
        """The temperature of an epoch."""
        last = self.last_step(max_epochs)
        return self.end if epoch >= last else self._between(epoch / last)

    def _between(self, progress: float) -> float:
        raise TypeError("use a subclass: PrescribedTemperature, ExponentialTemperature or CosineTemperature")


class PrescribedTemperature(TemperatureSchedule):
    """T(e) = max(end, start · (1 - e/E)), the founding study's; the end is reached at e = E · (1 - end/start).

    The last epoch has the end temperature also where E is too small for the formula to get there.
    """

    def __init__(self, start: float = 10.0, end: float = 1.0) -> None:
        super().__init__(start, end)

    def last_step(self, max_epochs: int) -> int:
        # The small number takes back what floating point adds to products that are whole, such as 8 · (1 - 0.3/0.4).
        return min(max_epochs - 1, math.ceil(max_epochs * (1 - self.end / self.start) - 1e-9))

    def __call__(self, epoch: int, max_epochs: int) -> float:
        if epoch >= self.last_step(max_epochs):
            return self.end
        return max(self.end, self.start * (1 - epoch / max_epochs))


class ExponentialTemperature(TemperatureSchedule):
    """T falls by the same factor every epoch."""

    def _between(self, progress: float) -> float:
        return self.start * (self.end / self.start) ** progress


class CosineTemperature(TemperatureSchedule):
    """T falls along half a cosine: slowly, then fast, then slowly."""

    def _between(self, progress: float) -> float:
        return self.end + (self.start - self.end) * 0.5 * (1 + math.cos(math.pi * progress))


class LinearWeight:
    """A weight that goes linearly from `start` in the first epoch to `end` in the last; without `end` it is constant.

    Args:
        start: of the first epoch (and of all, without `end` or in a run of one epoch), 0 or more.
        end: of the last epoch, 0 or more.
    """

    def __init__(self, start: float, end: float | None = None) -> None:
        for value in (start, end):
            if value is not None and not (isinstance(value, (int, float)) and 0 <= value < math.inf):
                raise InputError(f"a regularisation weight must be a number, 0 or more, not {value!r}")
        self.start, self.end = start, start if end is None else end

    def __call__(self, epoch: int, max_epochs: int) -> float:
        """The weight of an epoch."""
        return self.start + (self.end - self.start) * epoch / max(1, max_epochs - 1)


def parameter_groups(network: BagNetwork, lr: float, classifier_lr: float) -> list[dict[str, object]]:
    """Two groups for an optimiser: the encoder at `lr`, and all else (scorer, both streams) at `classifier_lr`."""

    def named(inside: bool) -> Iterator[nn.Parameter]:
        encoder = {id(parameter) for parameter in network.encoder.parameters()}
        return (p for p in network.parameters() if p.requires_grad and (id(p) in encoder) == inside)

    return [{"params": list(named(True)), "lr": lr}, {"params": list(named(False)), "lr": classifier_lr}]


def warmup_cosine(
    optimizer: Optimizer, warmup_epochs: int, max_epochs: int, steps_per_epoch: int
) -> WarmupCosineSchedule:
    """MONAI's linear warm-up and cosine decay to 0, stepped once an iteration.

    Args:
        optimizer: its groups' rates are the peaks.
        warmup_epochs: epochs of warm-up, from 1% of the peak; 0 for none.
        max_epochs: epochs until the rate is 0.
        steps_per_epoch: iterations an epoch.

    Raises:
        InputError: when the warm-up takes all epochs or more.
    """
    if not 0 <= warmup_epochs < max_epochs:
        raise InputError(f"warmup_epochs must be 0 or more and below max_epochs ({max_epochs}), not {warmup_epochs}")
    return WarmupCosineSchedule(
        optimizer, warmup_epochs * steps_per_epoch, max_epochs * steps_per_epoch, warmup_multiplier=0.01
    )
