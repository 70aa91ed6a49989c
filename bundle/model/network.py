"""DualStreamMIL: a bag of slices → logits of the volume and the evidence of every slice.

No `from __future__ import annotations` here: TorchScript reads the annotations.
"""

from torch import Tensor, nn

from ..errors import InputError
from .bag_network import BagNetwork, BagOutput, class_scores
from .selection import masked_softmax

__all__ = ["DualStreamMIL"]


class DualStreamMIL(BagNetwork):
    """Dual-stream multiple-instance network with a soft (or any other) selection of the critical slice.

    With slice features h::

        l = W h + b                              instance logits
        s = l (tied) or a linear scorer's (separate)
        w = selection(s, mask, T)                selection weights over the slices
        c = sum_n w h                            critical embedding
        A = softmax(q(h) · q(c) / sqrt(d))       attention by likeness to the critical embedding
        B = sum_n A v(h)                         bag embedding
        logits = ((W c + b) + (W_bag B + b_bag)) / 2

    Args:
        encoder: maps slices (M, C, H, W) to features (M, F).
        selection: a module of `bundle.model.selection`.
        num_channels: C, channels of a slice (modalities × context slices).
        num_features: F, features of the encoder.
        num_classes: K; 2 for a binary task.
        scorer: "tied" (the instance logit itself: positive minus negative for K = 2, one a class for K > 2) or
            "separate" (a linear layer of its own, S = 1).
        query_features: d, length of the query vectors.
        dropout: on the features before the value layer, in [0, 1).
        instance_gradient: share, in [0, 1], of the gradient of scores and instance stream that reaches the features. At
            0 the bag stream alone teaches the encoder, and the scores read what it has learned.

    Raises:
        InputError: on another scorer, sizes below 1 or a share outside [0, 1].
        ValueError: in `forward`, on an image that is not (B, N, num_channels, H, W).

    Source: Li, Li, Eliceiri, CVPR 2021, arXiv:2011.08939, equations 2–6; the hard selection with `tied` is theirs.
    """

    def __init__(
        self,
        encoder: nn.Module,
        selection: nn.Module,
        num_channels: int = 1,
        num_features: int = 512,
        num_classes: int = 2,
        scorer: str = "tied",
        query_features: int = 128,
        dropout: float = 0.0,
        instance_gradient: float = 1.0,
    ) -> None:
        super().__init__(encoder, selection, num_channels, num_features, num_classes)
        if scorer not in ("tied", "separate"):
            raise InputError(f"scorer must be 'tied' or 'separate', not {scorer!r}")
        if not 0 <= instance_gradient <= 1:
            raise InputError(f"instance_gradient must be in [0, 1], not {instance_gradient}")
        self.instance_gradient = float(instance_gradient)
        self.instance_classifier = nn.Linear(num_features, num_classes)
        self.num_scores = num_classes if scorer == "tied" and num_classes > 2 else 1  # S
        self.scorer: nn.Module = nn.Linear(num_features, 1) if scorer == "separate" else nn.Identity()
        self.tied = scorer == "tied"
        self.query = nn.Sequential(
            nn.Linear(num_features, query_features), nn.ReLU(), nn.Linear(query_features, query_features), nn.Tanh()
        )
        self.value = nn.Sequential(nn.Dropout(dropout), nn.Linear(num_features, num_features), nn.ReLU())
        self.bag_classifier = nn.Linear(self.num_scores * num_features, num_classes)

    def head(self, features: Tensor, mask: Tensor) -> BagOutput:
        """Both streams on features (B, N, F) with mask (B, N)."""
        # The same values; of their gradient `instance_gradient` goes on.
        scored = features
        if self.instance_gradient < 1.0:
            scored = features.detach() + self.instance_gradient * (features - features.detach())
        instance_logits = self.instance_classifier(scored)  # (B, N, K)
        if self.tied:
            scores = class_scores(instance_logits)  # (B, N, S)
        else:
            scores = self.scorer(scored)  # (B, N, 1)
        weights = self.selection(scores, mask, self.temperature)  # (B, N, S)
        critical = weights.transpose(1, 2) @ features  # (B, S, F)
        # The bag stream asks by the critical embedding itself, so its gradient reaches the features as ever.
        classified = critical if self.instance_gradient == 1.0 else weights.transpose(1, 2) @ scored
        instance_stream = self.instance_classifier(classified)  # (B, S, K)
        if self.num_scores > 1:
            instance_stream_logits = instance_stream.diagonal(0, 1, 2)  # class k from its own critical embedding
        else:
            instance_stream_logits = instance_stream[:, 0]
        queries = self.query(features)  # (B, N, d)
        likeness = queries @ self.query(critical).transpose(1, 2) / queries.shape[-1] ** 0.5  # (B, N, S)
        attention = masked_softmax(likeness, mask)
        bag = attention.transpose(1, 2) @ self.value(features)  # (B, S, F)
        bag_stream_logits = self.bag_classifier(bag.flatten(1))
        return BagOutput(
            logits=0.5 * (instance_stream_logits + bag_stream_logits),
            instance_stream_logits=instance_stream_logits,
            bag_stream_logits=bag_stream_logits,
            instance_logits=instance_logits,
            scores=scores,
            selection_weights=weights,
            attention=attention,
        )
