"""Selections: scores of a bag's slices → weights that say how much each slice is the critical one.

Every selection is a module with one interface, `(scores, mask, temperature) -> weights`: scores (B, N, S), mask (B, N)
with True for a real slice, temperature a positive scalar tensor, weights (B, N, S) that are non-negative, sum to 1 over
the real slices and are 0 on padding. A bag has at least one real slice. No `from __future__ import annotations` here:
TorchScript reads the annotations.
"""

from typing import Any

import torch
from torch import Tensor, nn

from ..errors import InputError, plain_errors

__all__ = [
    "EntmaxSelection",
    "GumbelSelection",
    "HardSelection",
    "MeanSelection",
    "SoftSelection",
    "StraightThroughSelection",
    "TopKSelection",
    "TwoPhaseSelection",
    "masked_softmax",
]


def masked_softmax(logits: Tensor, mask: Tensor) -> Tensor:
    """Softmax over the real slices.

    Args:
        logits: (B, N, S).
        mask: (B, N) bool, True = real slice, at least one a bag.

    Returns:
        (B, N, S), exactly 0 where the mask is False.
    """
    return torch.softmax(logits.masked_fill(~mask.unsqueeze(-1), float("-inf")), dim=1)


def masked_one_hot_argmax(scores: Tensor, mask: Tensor) -> Tensor:
    """One-hot (B, N, S) of the highest real score of each column; of equal scores the first slice wins."""
    best = scores.masked_fill(~mask.unsqueeze(-1), float("-inf")).argmax(dim=1, keepdim=True)  # (B, 1, S)
    return torch.zeros_like(scores).scatter(1, best, 1.0)


class SoftSelection(nn.Module):
    """w = softmax(s / T): every slice gets a gradient; T → 0 is the arg-max and T → ∞ the mean."""

    def forward(self, scores: Tensor, mask: Tensor, temperature: Tensor) -> Tensor:
        return masked_softmax(scores / temperature, mask)


class HardSelection(nn.Module):
    """w = one-hot(argmax s): DSMIL's critical instance; no gradient reaches the scores through it.

    Source: Li, Li, Eliceiri, CVPR 2021, arXiv:2011.08939, section 3.2.
    """

    def forward(self, scores: Tensor, mask: Tensor, temperature: Tensor) -> Tensor:
        return masked_one_hot_argmax(scores, mask)


class StraightThroughSelection(nn.Module):
    """w = one-hot(argmax s) in the forward pass, with the gradient of softmax(s / T) in the backward pass.

    Source: Bengio, Léonard, Courville, 2013, arXiv:1308.3432.
    """

    def forward(self, scores: Tensor, mask: Tensor, temperature: Tensor) -> Tensor:
        soft = masked_softmax(scores / temperature, mask)
        hard = masked_one_hot_argmax(scores, mask)
        # hard first: adding the difference the other way round would leave rounding errors in the one-hot.
        return hard + (soft - soft.detach())


class GumbelSelection(nn.Module):
    """w = softmax((s + g) / T) with standard Gumbel noise g in training, and softmax(s / T) in evaluation.

    Source: Jang, Gu, Poole, ICLR 2017, arXiv:1611.01144, equation 2.
    """

    def forward(self, scores: Tensor, mask: Tensor, temperature: Tensor) -> Tensor:
        if self.training:
            # Standard Gumbel noise is -log of an exponential draw; the floor keeps log(0) away.
            scores = scores - torch.empty_like(scores).exponential_().clamp_min(1e-30).log()
        return masked_softmax(scores / temperature, mask)


class TopKSelection(nn.Module):
    """w = softmax(s / T) over the k highest scores of a bag, 0 elsewhere; a bag with fewer slices uses them all.

    Args:
        k: how many slices share the weight.

    Raises:
        InputError: when k is below 1.
    """

    def __init__(self, k: int = 4) -> None:
        super().__init__()
        if k < 1:
            raise InputError(f"k of a top-k selection must be at least 1, not {k}")
        self.k = k

    def forward(self, scores: Tensor, mask: Tensor, temperature: Tensor) -> Tensor:
        masked = scores.masked_fill(~mask.unsqueeze(-1), float("-inf"))
        # Indices, not a threshold: equal scores at the border must not let in more than k slices.
        top = masked.topk(min(self.k, scores.shape[1]), dim=1).indices
        chosen = torch.zeros_like(scores).scatter(1, top, 1.0) > 0
        return torch.softmax((scores / temperature).masked_fill(~(chosen & mask.unsqueeze(-1)), float("-inf")), dim=1)


class EntmaxSelection(nn.Module):
    """w = α-entmax(s / T): sparse weights with gradients; α = 1 is softmax, 1.5 entmax, 2 sparsemax.

    It can be exported with `torch.export` but not scripted.

    Args:
        alpha: sparsity, 1 < α; 1.5 and 2 have exact algorithms, others are found by bisection.

    Raises:
        InputError: when alpha is not above 1.

    Source: Peters, Niculae, Martins, ACL 2019, arXiv:1905.05702; Martins, Astudillo, ICML 2016, arXiv:1602.02068.
    """

    def __init__(self, alpha: float = 1.5) -> None:
        super().__init__()
        if not alpha > 1:
            raise InputError(f"alpha of an entmax selection must be above 1, not {alpha}; 1 is the soft selection")
        self.alpha = alpha

    def __prepare_scriptable__(self) -> Any:
        # torch.jit.script asks for this first; without it the refusal would be a page of compiler output.
        plain_errors()  # MONAI's ckpt_export has no `initialize` in which a config could ask for it
        raise InputError(
            "an entmax or sparsemax selection cannot be scripted: export it with torch.export, or train with the soft "
            "selection"
        )

    def forward(self, scores: Tensor, mask: Tensor, temperature: Tensor) -> Tensor:
        import entmax

        # A finite floor: -inf - -inf inside the threshold search would be NaN. Differences above 1/(α-1) get weight 0.
        z = scores / temperature
        floor = z.detach().masked_fill(~mask.unsqueeze(-1), float("inf")).amin(dim=1, keepdim=True) - 1e4
        z = torch.where(mask.unsqueeze(-1), z, floor)
        if self.alpha == 1.5:
            return entmax.entmax15(z, dim=1)
        if self.alpha == 2:
            return entmax.sparsemax(z, dim=1)
        return entmax.entmax_bisect(z, alpha=self.alpha, dim=1)


class MeanSelection(nn.Module):
    """w = 1 / n on the n real slices, whatever the scores: mean pooling."""

    def forward(self, scores: Tensor, mask: Tensor, temperature: Tensor) -> Tensor:
        real = mask.unsqueeze(-1).to(scores.dtype)
        return (real / real.sum(dim=1, keepdim=True)).expand_as(scores)


class TwoPhaseSelection(nn.Module):
    """Soft selection until the saved flag `hard_phase` is set (by `TwoPhaseSwitch`), hard selection afterwards."""

    hard_phase: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("hard_phase", torch.tensor(False))

    def forward(self, scores: Tensor, mask: Tensor, temperature: Tensor) -> Tensor:
        # torch.where keeps the module exportable; the gradient through the branch not taken is exactly zero.
        soft = masked_softmax(scores / temperature, mask)
        return torch.where(self.hard_phase, masked_one_hot_argmax(scores, mask), soft)
