"""A rival that knows no bags: a 3D network on the whole stack of slices.

No `from __future__ import annotations` here, as in the other networks.
"""

import contextlib
from typing import Any, Optional

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from .bag_network import BagNetwork, BagOutput, refuse_scripting
from .selection import MeanSelection

__all__ = ["VolumeNet"]


class VolumeNet(BagNetwork):
    """A linear classifier on the features that a 3D encoder gives for the stack of a bag's slices.

    The slices must be all of a volume, in their order: draw them with `sampling_strategy: all`. It says nothing about
    single slices: instance logits and scores are 0, weights and attention uniform.

    Each stack goes through the encoder by itself, without padding, so that no bag depends on its company. In training a
    batch norm is meant to look at the whole batch: with one, the stacks go through together, filled up with zeros.
    It cannot be scripted.

    Args:
        encoder: maps volumes (B, C, N, H, W) to features (B, F), such as MONAI's ResNet with `spatial_dims` 3.
        num_channels: C, channels of a slice (modalities × context slices).
        num_features: F, features of the encoder.
        num_classes: K; 2 for a binary task.

    Raises:
        InputError: on sizes below 1.
    """

    slicewise = False

    def __init__(
        self, encoder: nn.Module, num_channels: int = 1, num_features: int = 512, num_classes: int = 2
    ) -> None:
        super().__init__(encoder, MeanSelection(), num_channels, num_features, num_classes)
        self.classifier = nn.Linear(num_features, num_classes)

    def __prepare_scriptable__(self) -> Any:
        refuse_scripting(self)

    def encode(self, image: Tensor, mask: Optional[Tensor]) -> Tensor:
        """Features (B, 1, F) in float32 of bags (B, N, C, H, W), of the real slices alone."""
        if image.dim() != 5:
            raise ValueError(f"a batch of bags is (B, N, C, H, W): 5 dimensions, not {image.dim()}")
        if mask is None:
            features = self.encode_slices(image.transpose(1, 2))
        elif any(module.training for module in self.encoder.modules() if isinstance(module, _BatchNorm)):
            features = self.encode_slices((image * mask[:, :, None, None, None]).transpose(1, 2))
        else:
            stacks = [bag[real].transpose(0, 1)[None] for bag, real in zip(image, mask, strict=True)]
            features = torch.cat([self.encode_slices(stack) for stack in stacks])
        return features.unsqueeze(1)

    def encode_slices(self, slices: Tensor) -> Tensor:
        """Features (M, F) in float32 of stacks (M, C, N, H, W)."""
        # On a CPU 3D convolutions in bfloat16 are not to be trusted. On shallow stacks PyTorch 2.13 was seen to give
        # outputs and gradients of the weights without any relation to the true ones, NaN among them, and to crash.
        on_cpu = slices.device.type == "cpu"
        with torch.autocast("cpu", enabled=False) if on_cpu else contextlib.nullcontext():
            return super().encode_slices(slices.contiguous())

    def head(self, features: Tensor, mask: Tensor) -> BagOutput:
        """Logits from features (B, 1, F); there is no evidence of slices."""
        logits = self.classifier(features[:, 0])
        none = features.new_zeros(mask.shape[0], mask.shape[1], self.num_classes)
        weights = self.selection(none[..., :1], mask, self.temperature)
        return BagOutput(logits, logits, logits, none, none[..., :1], weights, weights)
