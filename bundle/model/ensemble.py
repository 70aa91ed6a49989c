"""Several networks as one: every slice through every encoder, and the mean of what the networks say.

No `from __future__ import annotations` here: TorchScript reads the annotations.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import InputError
from .bag_network import BagNetwork, BagOutput, refuse_scripting
from .selection import MeanSelection

__all__ = ["EnsembleNetwork"]


class _Encoders(nn.ModuleList):
    """Slices (M, C, H, W) → the features of all encoders, side by side (M, F of all)."""

    def forward(self, slices: Tensor) -> Tensor:
        return torch.cat([encoder(slices) for encoder in self], dim=1)


class EnsembleNetwork(BagNetwork):
    """The mean of trained networks, for inference: made by `scripts/ensemble`, with weights of its own.

    With p_r the probabilities of member r of R::

        logits = log( (1/R) sum_r p_r )

    and likewise for both streams and the slices; scores, selection weights and attention are means. Each member keeps
    its temperature. It cannot be scripted.

    Args:
        members: BagNetworks of one number of channels, classes and score columns, whose features are of single slices.

    Raises:
        InputError: with fewer than two members, or members that do not fit together.

    Source: averaged probabilities of networks of several seeds: Lakshminarayanan, Pritzel, Blundell, NeurIPS 2017,
    arXiv:1612.01474, section 2.4.
    """

    def __init__(self, members: Sequence[BagNetwork]) -> None:
        if len(members) < 2:
            raise InputError(f"an ensemble needs at least two networks, not {len(members)}")
        if not all(isinstance(member, BagNetwork) and member.slicewise for member in members):
            raise InputError("an ensemble needs networks of single slices, see bundle.model")
        for name in ("num_channels", "num_classes"):
            if len(found := sorted({getattr(member, name) for member in members})) > 1:
                raise InputError(f"the networks of an ensemble differ in {name}: {' and '.join(map(str, found))}")
        first = members[0]
        if first.num_classes < 2:
            raise InputError("an ensemble needs networks of two classes or more")
        width = sum(member.num_features for member in members)
        super().__init__(nn.Identity(), MeanSelection(), first.num_channels, width, first.num_classes)
        self.widths = [member.num_features for member in members]
        self.encoder = _Encoders(member.encoder for member in members)
        self.members = nn.ModuleList(members)
        for member in members:
            member.encoder = nn.Identity()  # it stands among the encoders

    def __prepare_scriptable__(self) -> Any:
        refuse_scripting(self)

    def head(self, features: Tensor, mask: Tensor) -> BagOutput:
        """See `BagNetwork.head`."""
        parts = features.split(self.widths, dim=-1)
        said: list[BagOutput] = [
            member.head(part, mask)  # type: ignore[operator]
            for member, part in zip(self.members, parts, strict=True)
        ]
        columns = sorted({output.scores.shape[-1] for output in said})
        if len(columns) > 1:
            raise InputError(f"the networks of an ensemble differ in their score columns: {columns}")
        logits, instance_stream, bag_stream, instances = (
            _log_mean([output[place] for output in said]) for place in range(4)
        )
        scores, weights, attention = (torch.stack([o[place] for o in said]).mean(dim=0) for place in range(4, 7))
        return BagOutput(logits, instance_stream, bag_stream, instances, scores, weights, attention)


def _log_mean(logits: list[Tensor]) -> Tensor:
    """Logarithm of the mean of the probabilities over the last axis."""
    return torch.stack(logits).log_softmax(dim=-1).logsumexp(dim=0) - math.log(len(logits))
