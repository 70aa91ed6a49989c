"""The network of the pre-training: an encoder, and a projector on its features that is thrown away afterwards."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..errors import InputError
from .bag_network import BagNetwork

__all__ = ["ProjectedViews", "Projections"]


class Projections(NamedTuple):
    """Projections of the M real slices of a batch in two views, both (M, P), in the same order."""

    first: Tensor
    second: Tensor


class ProjectedViews(nn.Module):
    """The encoder of a network of bags and a projector: two views of the slices → their projections.

    The projector is Linear–LayerNorm–ReLU twice, then Linear. The published one has batch norms, which know no batch of
    one slice.

    Args:
        network: whose encoder learns; its head takes no part.
        num_projected: P, numbers a slice is projected to.

    Raises:
        InputError: on fewer than 2 of them, or a network that encodes no single slices.
    """

    def __init__(self, network: BagNetwork, num_projected: int = 256) -> None:
        super().__init__()
        if num_projected < 2:
            raise InputError(f"projected_features must be 2 or more, not {num_projected}")
        if not network.slicewise:
            raise InputError(
                "pretrain.yaml is for encoders of single slices, and this network looks at whole stacks: leave it out"
            )
        self.network = network
        layers: list[nn.Module] = []
        for size in (network.num_features, num_projected):
            layers += [nn.Linear(size, num_projected), nn.LayerNorm(num_projected), nn.ReLU()]
        self.projector = nn.Sequential(*layers, nn.Linear(num_projected, num_projected))

    @property
    def encoder(self) -> nn.Module:
        """That of the network."""
        return self.network.encoder

    def forward(self, image: Tensor, mask: Tensor) -> Projections:
        """Projections in float32: image (B, N, 2 C, H, W), mask (B, N) bool with True = real slice.

        Padding is not encoded. Both views go through the encoder together, so that a batch norm sees them alike.
        """
        slices = image[mask]  # (M, 2 C, H, W)
        views = torch.cat(slices.chunk(2, dim=1))  # (2 M, C, H, W)
        features = self.network.encode_slices(views)
        # The loss asks for differences of small numbers, and the projector costs next to nothing.
        with torch.autocast(device_type=features.device.type, enabled=False):
            first, second = self.projector(features).chunk(2)
        return Projections(first, second)
