"""An average of the weights over the steps: what is judged and saved then jumps less than what is trained."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from ignite.engine import Engine, Events
from torch import Tensor, nn

from ..errors import InputError

__all__ = ["AverageWeights", "ReturnWeights"]

# The temperature is set by the epoch and means something there and then.
NEVER_AVERAGED = ("temperature",)


class AverageWeights:
    """Keeps an exponential moving average of the weights, and puts it into the network while an epoch is judged.

    After every batch: average ← d · average + (1 - d) · weights, with d = min(decay, (1 + t) / (10 + t)) in batch t, so
    that the beginning is forgotten soon. Attach it before whatever validates, watches or saves the best weights at the
    end of an epoch, and `ReturnWeights` after that and before the checkpoint: training goes on from the weights
    themselves. Floating-point buffers, such as the statistics of a batch norm, are averaged as well.

    Args:
        network: whose weights are averaged.
        decay: d in [0, 1); 0 does nothing. About 1 / (1 - d) batches count.

    Raises:
        InputError: on another decay.

    Source: Polyak and Juditsky, SIAM J. Control Optim. 30 (1992), for averaging; the start as in TensorFlow's
    ExponentialMovingAverage.
    """

    def __init__(self, network: nn.Module, decay: float = 0.0) -> None:
        if not 0 <= decay < 1:
            raise InputError(f"weight_average must be 0 (none) or more and below 1, not {decay}")
        self.network, self.decay = network, decay
        self.batches = 0
        self.average: dict[str, Tensor] = {}
        self._own: dict[str, Tensor] = {}

    def attach(self, engine: Engine) -> None:
        if self.decay:
            engine.add_event_handler(Events.ITERATION_COMPLETED, self.update)
            engine.add_event_handler(Events.EPOCH_COMPLETED, self.lend)

    def _weights(self) -> dict[str, Tensor]:
        given = self.network.state_dict()
        return {
            name: tensor
            for name, tensor in given.items()
            if tensor.is_floating_point() and name.rpartition(".")[2] not in NEVER_AVERAGED
        }

    @torch.no_grad()
    def update(self) -> None:
        decay = min(self.decay, (1 + self.batches) / (10 + self.batches))
        for name, tensor in self._weights().items():
            if name in self.average:
                self.average[name].lerp_(tensor, 1 - decay)
            else:
                self.average[name] = tensor.clone()
        self.batches += 1

    @torch.no_grad()
    def lend(self) -> None:
        """Put the average into the network."""
        for name, tensor in self._weights().items() if self.average else ():
            self._own[name] = tensor.clone()
            tensor.copy_(self.average[name])

    @torch.no_grad()
    def take_back(self) -> None:
        """Put the trained weights back."""
        for name, tensor in self._weights().items() if self._own else ():
            tensor.copy_(self._own[name])
        self._own = {}

    def state_dict(self) -> dict[str, Any]:
        """The average and over how many batches it is."""
        return {"batches": self.batches, "average": dict(self.average)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what `state_dict` gave."""
        own = self._weights()
        self.batches = int(state["batches"])
        self.average = {name: tensor.to(own[name], copy=True) for name, tensor in state["average"].items()}


class ReturnWeights:
    """Puts the trained weights back at the end of an epoch, see `AverageWeights`.

    Args:
        average: attached before.
    """

    def __init__(self, average: AverageWeights) -> None:
        self.average = average

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.EPOCH_COMPLETED, self.average.take_back)
