"""Rivals on the features of slices: networks that others would take for the same bags, trained by the same configs.

No `from __future__ import annotations` here: TorchScript reads the annotations.
"""

import warnings
from typing import Any

import torch
from monai.networks.nets import MILModel
from torch import Tensor, nn

from ..errors import InputError
from .bag_network import BagNetwork, BagOutput, class_scores, refuse_scripting
from .selection import HardSelection, MeanSelection, masked_softmax

__all__ = ["GatedAttentionMIL", "MeanPoolMIL", "MonaiMIL"]

MODES = ("mean", "max", "att", "att_trans")
HEADS = 8  # of attention, fixed in MONAI's transformer


class MeanPoolMIL(BagNetwork):
    """Mean pooling: a linear classifier on the mean of the features of a bag's slices.

    As the mean of linear functions is the function of the mean, a slice's share in the decision is its own logits:
    these are the scores. Weights and attention are uniform over the real slices.

    Args:
        encoder: maps slices (M, C, H, W) to features (M, F).
        num_channels: C, channels of a slice (modalities × context slices).
        num_features: F, features of the encoder.
        num_classes: K; 2 for a binary task.

    Raises:
        InputError: on sizes below 1.
    """

    def __init__(
        self, encoder: nn.Module, num_channels: int = 1, num_features: int = 512, num_classes: int = 2
    ) -> None:
        super().__init__(encoder, MeanSelection(), num_channels, num_features, num_classes)
        self.classifier = nn.Linear(num_features, num_classes)

    def head(self, features: Tensor, mask: Tensor) -> BagOutput:
        """See `BagNetwork.head`."""
        instance_logits = self.classifier(features)  # (B, N, K)
        scores = class_scores(instance_logits)  # (B, N, S)
        weights = self.selection(scores, mask, self.temperature)
        logits = self.classifier((weights[..., :1] * features).sum(dim=1))
        return BagOutput(logits, logits, logits, instance_logits, scores, weights, weights)


class GatedAttentionMIL(BagNetwork):
    """Gated attention pooling: a linear classifier on a weighted mean of the features h of a bag's slices.

    ::

        e_n = wᵀ (tanh(V h_n) ⊙ sigmoid(U h_n))    scores
        a = softmax(e)                              attention, and selection weights too
        logits = W (sum_n a_n h_n) + b

    Instance logits are the same classifier on every slice; no loss teaches them.

    Args:
        encoder: maps slices (M, C, H, W) to features (M, F).
        num_channels: C, channels of a slice (modalities × context slices).
        num_features: F, features of the encoder.
        num_classes: K; 2 for a binary task.
        attention_features: length of V h.

    Raises:
        InputError: on sizes below 1.

    Source: Ilse, Tomczak, Welling, ICML 2018, arXiv:1802.04712, equation 9.
    """

    def __init__(
        self,
        encoder: nn.Module,
        num_channels: int = 1,
        num_features: int = 512,
        num_classes: int = 2,
        attention_features: int = 128,
    ) -> None:
        # Attention takes the place of a selection; handlers that look for one find one that they leave alone.
        super().__init__(encoder, MeanSelection(), num_channels, num_features, num_classes)
        self.classifier = nn.Linear(num_features, num_classes)
        self.content = nn.Sequential(nn.Linear(num_features, attention_features), nn.Tanh())
        self.gate = nn.Sequential(nn.Linear(num_features, attention_features), nn.Sigmoid())
        # Without a bias, which would shift all scores of a bag alike and change no weight.
        self.scorer = nn.Linear(attention_features, 1, bias=False)

    def head(self, features: Tensor, mask: Tensor) -> BagOutput:
        """See `BagNetwork.head`."""
        scores = self.scorer(self.content(features) * self.gate(features))  # (B, N, 1)
        attention = masked_softmax(scores, mask)
        logits = self.classifier((attention * features).sum(dim=1))
        return BagOutput(logits, logits, logits, self.classifier(features), scores, attention, attention)


class MonaiMIL(BagNetwork):
    """MONAI's `MILModel` with this project's encoder as its backbone.

    MONAI's head has no mask, so the bags of a batch go through it one by one, without their padding. Scores are its
    attention logits in the modes that have attention, which is then selection weight and attention alike; else those of
    its classifier on the slice, with uniform weights for "mean" and the highest score chosen for "max". It cannot be
    scripted.

    Args:
        encoder: maps slices (M, C, H, W) to features (M, F).
        num_channels: C, channels of a slice (modalities × context slices).
        num_features: F, features of the encoder; for "att_trans" a multiple of 8.
        num_classes: K; 2 for a binary task.
        mil_mode: "mean" or "max" of the slices' logits, "att" (attention) or "att_trans" (transformer, then attention).

    Raises:
        InputError: on another mode, sizes below 1, or features that do not fit the transformer.
    """

    def __init__(
        self,
        encoder: nn.Module,
        num_channels: int = 1,
        num_features: int = 512,
        num_classes: int = 2,
        mil_mode: str = "att",
    ) -> None:
        if mil_mode not in MODES:
            raise InputError(f"mil_mode must be one of {', '.join(MODES)}, not {mil_mode!r}")
        if mil_mode == "att_trans" and num_features % HEADS:
            raise InputError(f"mil_mode att_trans needs num_features to be a multiple of {HEADS}, not {num_features}")
        selection = HardSelection() if mil_mode == "max" else MeanSelection()
        super().__init__(encoder, selection, num_channels, num_features, num_classes)
        with warnings.catch_warnings():
            # Of a fast path that MONAI's layout of the bags leaves aside.
            warnings.filterwarnings("ignore", "enable_nested_tensor is True", UserWarning)
            # Features come from `encode`, which knows padding, chunks and frozen stages.
            self.model = MILModel(
                num_classes, mil_mode, pretrained=False, backbone=nn.Identity(), backbone_num_features=num_features
            )

    def __prepare_scriptable__(self) -> Any:
        refuse_scripting(self)

    def head(self, features: Tensor, mask: Tensor) -> BagOutput:
        """See `BagNetwork.head`."""
        bags = [bag[real][None] for bag, real in zip(features, mask, strict=True)]  # B × (1, n, F)
        logits = torch.cat([self.model.calc_head(bag) for bag in bags])
        seen = torch.cat([self._seen(bag)[0] for bag in bags])  # what the classifier sees of all real slices
        instance_logits = _spread(self.model.myfc(seen), mask)
        if len(self.model.attention):
            scores = _spread(self.model.attention(seen), mask)
            weights = masked_softmax(scores, mask)
        else:
            scores = class_scores(instance_logits)
            weights = self.selection(scores, mask, self.temperature)
        return BagOutput(logits, logits, logits, instance_logits, scores, weights, weights)

    def _seen(self, bag: Tensor) -> Tensor:
        if self.model.transformer is None:
            return bag
        return self.model.transformer(bag.transpose(0, 1)).transpose(0, 1)


def _spread(values: Tensor, mask: Tensor) -> Tensor:
    """Values (M, S) of the real slices, in their places (B, N, S); 0 on padding."""
    return values.new_zeros(*mask.shape, values.shape[-1]).index_put([mask], values)
