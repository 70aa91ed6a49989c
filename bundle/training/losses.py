"""Evidence and label → loss."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..errors import InputError
from ..model.bag_network import BagOutput

__all__ = [
    "BagCrossEntropy",
    "DualStreamLoss",
    "MILFocalLoss",
    "attention_entropy",
    "half_divergence",
    "selection_confidence",
]


def attention_entropy(attention: Tensor, mask: Tensor, normalise: bool = False) -> Tensor:
    """H(A) = -sum_n A log A over the real slices of each bag, in nats, with 0 · log 0 = 0.

    Args:
        attention: (B, N, S), sums to 1 over the real slices.
        mask: (B, N) bool, True = real slice.
        normalise: divide by log n, so that a uniform attention gives 1 at every bag size (a bag of one slice gives 0).

    Returns:
        (B,), the mean over S.
    """
    # Padding is replaced and tiny weights are floored before the logarithm: its gradient at 0 is infinite.
    weights = torch.where(mask.unsqueeze(-1), attention, torch.ones_like(attention)).clamp_min(1e-30)
    entropy = torch.special.entr(weights).sum(dim=1).mean(dim=-1)  # (B,)
    if normalise:
        entropy = entropy / mask.sum(dim=1).clamp_min(2).to(entropy.dtype).log()
    return entropy


def selection_confidence(scores: Tensor, mask: Tensor) -> Tensor:
    """Range, max - min, of the scores over the real slices of each bag; 0 for a bag of one slice.

    Args:
        scores: (B, N, S).
        mask: (B, N) bool, True = real slice.

    Returns:
        (B,), the mean over S.
    """
    padding = ~mask.unsqueeze(-1)
    highest = scores.masked_fill(padding, float("-inf")).amax(dim=1)
    lowest = scores.masked_fill(padding, float("inf")).amin(dim=1)
    return (highest - lowest).mean(dim=-1)


def half_divergence(halves: Tensor) -> Tensor:
    """Jensen-Shannon divergence, in nats (0 to ln 2), of what two halves of each bag say.

    Args:
        halves: logits (2 B, K) of first halves, then of second halves.

    Returns:
        (B,).
    """
    logs = functional.log_softmax(halves, dim=-1)
    first, second = logs.chunk(2)
    # The logarithm of the mean, without a logarithm of 0 for probabilities that are too small for float32.
    middle = torch.logaddexp(first, second) - math.log(2)
    return 0.5 * (first.exp() * (first - middle) + second.exp() * (second - middle)).sum(dim=-1)


class _ClassWeighted(nn.Module):
    """Shared by bag losses: class weights as a buffer that follows the device."""

    class_weights: Tensor | None

    def __init__(self, class_weights: Sequence[float] | None) -> None:
        super().__init__()
        weights = None
        if class_weights is not None:
            if not all(isinstance(weight, (int, float)) and 0 < weight < float("inf") for weight in class_weights):
                raise InputError(f"class_weights must be positive numbers, not {list(class_weights)}")
            weights = torch.tensor([float(weight) for weight in class_weights])
        self.register_buffer("class_weights", weights, persistent=False)

    def _weights_for(self, logits: Tensor) -> Tensor | None:
        if self.class_weights is None:
            return None
        if len(self.class_weights) != logits.shape[-1]:
            raise InputError(f"class_weights has {len(self.class_weights)} numbers for {logits.shape[-1]} classes")
        return self.class_weights.to(logits)  # engines move networks to a device, not losses


class BagCrossEntropy(_ClassWeighted):
    """Cross-entropy of bag logits (B, K) and labels, with label smoothing; the mean over the bags.

    Labels are classes (B,), or shares of the classes (B, K) that sum to 1.

    torch.nn.CrossEntropyLoss divides by the sum of the labels' weights instead. A batch of one bag would then cancel
    its own weight, and a rare class would weigh less the more often it is in the batch. Divided by the number of bags,
    batches, accumulated batches and the shares of several processes add up.

    Args:
        label_smoothing: ε in [0, 1): the target is 1 - ε + ε/K for the true class and ε/K for the others.
        class_weights: K positive numbers; the target of class k counts by weight k. Weights that are 1 in the mean over
            the cases keep the size of the loss.
    """

    def __init__(self, label_smoothing: float = 0.0, class_weights: Sequence[float] | None = None) -> None:
        super().__init__(class_weights)
        if not 0 <= label_smoothing < 1:
            raise InputError(f"label_smoothing must be in [0, 1), not {label_smoothing}")
        self.label_smoothing = label_smoothing

    def forward(self, logits: Tensor, label: Tensor) -> Tensor:
        weights = self._weights_for(logits)
        total = functional.cross_entropy(logits, label, weights, reduction="sum", label_smoothing=self.label_smoothing)
        return total / len(label)


class MILFocalLoss(_ClassWeighted):
    """Focal loss of bags: mean of -α_y (1 - p_y)^γ log p_y, which turns away from bags that are already right.

    For shares of the classes (B, K) instead of labels (B,) the mean over the classes, by their shares.

    Args:
        gamma: γ ≥ 0; 0 gives the cross-entropy.
        class_weights: α, K positive numbers, for the bags of each class; see `BagCrossEntropy`.

    Source: Lin, Goyal, Girshick, He, Dollár, ICCV 2017, arXiv:1708.02002, equation 5.
    """

    def __init__(self, gamma: float = 2.0, class_weights: Sequence[float] | None = None) -> None:
        super().__init__(class_weights)
        if not 0 <= gamma < float("inf"):
            raise InputError(f"gamma of the focal loss must be 0 or more, not {gamma}")
        self.gamma = gamma

    def forward(self, logits: Tensor, label: Tensor) -> Tensor:
        log_p = functional.log_softmax(logits, dim=-1)  # (B, K)
        if label.dim() == 1:
            label = functional.one_hot(label, logits.shape[-1]).to(log_p)
        # -expm1 keeps 1 - p exact near p = 1; the floor keeps the power's gradient finite there.
        focus = (-torch.expm1(log_p)).clamp_min(1e-12) ** self.gamma
        weights = self._weights_for(logits)
        weighted = label if weights is None else label * weights
        return -(weighted * focus * log_p).sum(dim=-1).mean()


class DualStreamLoss(nn.Module):
    """Bag loss + instance-stream loss + λ₁ · (-H(A)) + λ₂ · (-(max s - min s)) + λ₃ · JS, each a mean over the bags.

    After a call, `components` holds the detached terms (before their weights) and `nll`, the unsmoothed, unweighted
    negative log-likelihood of the bags in nats.

    Args:
        bag_loss: on `logits` (and on the instance stream).
        instance_weight: of the same bag loss on `instance_stream_logits`; it is what teaches tied scores. 0 for none.
        lambda_entropy: λ₁ ≥ 0; larger spreads the attention.
        lambda_confidence: λ₂ ≥ 0; larger spreads the scores.
        lambda_consistency: λ₃ ≥ 0, of the divergence between two halves of each bag, see `half_divergence`.
        normalise_entropy: divide the entropy by log n.
        raw_confidence: take the range of the raw scores instead of sigmoid(scores). It has no bound, was seen to
            diverge, and warns.
    """

    def __init__(
        self,
        bag_loss: nn.Module,
        instance_weight: float = 1.0,
        lambda_entropy: float = 0.01,
        lambda_confidence: float = 0.01,
        normalise_entropy: bool = True,
        raw_confidence: bool = False,
        lambda_consistency: float = 0.0,
    ) -> None:
        super().__init__()
        weights = {
            "instance_weight": instance_weight, "lambda_entropy": lambda_entropy,
            "lambda_confidence": lambda_confidence, "lambda_consistency": lambda_consistency,
        }  # fmt: skip
        for name, value in weights.items():
            if not 0 <= value < float("inf"):
                raise InputError(f"{name} must be 0 or more, not {value}")
        if raw_confidence and lambda_confidence > 0:
            warnings.warn("raw_confidence rewards a score range without bound and was seen to diverge", stacklevel=2)
        self.bag_loss = bag_loss
        self.instance_weight = instance_weight
        self.lambda_entropy = lambda_entropy
        self.lambda_confidence = lambda_confidence
        self.lambda_consistency = lambda_consistency
        self.normalise_entropy = normalise_entropy
        self.raw_confidence = raw_confidence
        self.components: dict[str, Tensor] = {}

    def forward(self, output: BagOutput, label: Tensor, mask: Tensor, halves: Tensor | None = None) -> Tensor:
        """The total loss, a scalar, of a batch.

        Args:
            output: of the network.
            label: (B,) in 0..K-1, or (B, K), shares of the classes.
            mask: (B, N).
            halves: logits (2 B, K) of two halves of each bag, needed where `lambda_consistency` is not 0.
        """
        num_classes = output.logits.shape[-1]
        if label.dim() == 1 and bool((label < 0).any() | (label >= num_classes).any()):
            raise InputError(f"labels must be 0 to {num_classes - 1} for this network, a batch holds {label.tolist()}")
        if label.dim() == 2 and label.shape[1] != num_classes:
            raise InputError(f"labels are shares of {label.shape[1]} classes for a network of {num_classes}")
        if self.lambda_consistency and halves is None:
            raise InputError("lambda_consistency needs what the network says of two halves of each bag")
        bag = self.bag_loss(output.logits, label)
        instance = self.bag_loss(output.instance_stream_logits, label)
        entropy = -attention_entropy(output.attention, mask, self.normalise_entropy).mean()
        scores = output.scores if self.raw_confidence else output.scores.sigmoid()
        confidence = -selection_confidence(scores, mask).mean()
        consistency = bag.new_zeros(()) if halves is None else half_divergence(halves).mean()
        total = bag
        # A weight of 0 takes its term out of the graph instead of multiplying it by 0, which would keep a NaN.
        for weight, term in (
            (self.instance_weight, instance), (self.lambda_entropy, entropy), (self.lambda_confidence, confidence),
            (self.lambda_consistency, consistency),
        ):  # fmt: skip
            if weight:
                total = total + weight * term
        nll = functional.cross_entropy(output.logits.detach().float(), label)
        terms = {
            "bag": bag, "instance": instance, "entropy": entropy, "confidence": confidence, "consistency": consistency,
            "nll": nll,
        }  # fmt: skip
        self.components = {name: term.detach() for name, term in terms.items()}
        return total
