"""DualStreamMIL: a bag of slices → logits of the volume and the evidence of every slice.

No `from __future__ import annotations` here: TorchScript reads the annotations.
"""

from typing import NamedTuple, Optional

import torch
from torch import Tensor, nn

from ..errors import InputError
from .encoding import SliceEncoding
from .selection import masked_softmax

__all__ = ["BagOutput", "ClassEvidence", "DualStreamMIL", "Evidence", "evidence_of_class"]


class BagOutput(NamedTuple):
    """What the network says of a batch of bags. B bags, N slices (padded), K classes, S = 1 or K.

    Attributes:
        logits: (B, K), half the instance stream plus half the bag stream.
        instance_stream_logits: (B, K), the instance classifier on the critical embedding.
        bag_stream_logits: (B, K), the bag classifier on the bag embedding.
        instance_logits: (B, N, K), the instance classifier on every slice; meaningless on padding.
        scores: (B, N, S), what the selection chooses by, as logits; meaningless on padding.
        selection_weights: (B, N, S), sum to 1 over the real slices, 0 on padding.
        attention: (B, N, S), sums to 1 over the real slices, 0 on padding.
    """

    logits: Tensor
    instance_stream_logits: Tensor
    bag_stream_logits: Tensor
    instance_logits: Tensor
    scores: Tensor
    selection_weights: Tensor
    attention: Tensor


class ClassEvidence(NamedTuple):
    """The evidence for one class of each bag, all (B, N)."""

    scores: Tensor
    selection_weights: Tensor
    attention: Tensor


def evidence_of_class(output: BagOutput, classes: Tensor) -> ClassEvidence:
    """Scores, weights and attention for one class a bag.

    Args:
        output: of the network.
        classes: (B,) class numbers, used where there is one score a class; with one score there is no choice.
    """
    column = classes if output.scores.shape[-1] > 1 else torch.zeros_like(classes)
    index = column[:, None, None].expand(-1, output.scores.shape[1], 1)  # (B, N, 1)
    return ClassEvidence(
        *(values.gather(2, index)[..., 0] for values in (output.scores, output.selection_weights, output.attention))
    )


class DualStreamMIL(nn.Module):
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

    Raises:
        InputError: on another scorer or sizes below 1.
        ValueError: in `forward`, on an image that is not (B, N, num_channels, H, W).

    Source: Li, Li, Eliceiri, CVPR 2021, arXiv:2011.08939, equations 2–6; the hard selection with `tied` is theirs.
    """

    temperature: Tensor

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
    ) -> None:
        super().__init__()
        if scorer not in ("tied", "separate"):
            raise InputError(f"scorer must be 'tied' or 'separate', not {scorer!r}")
        sizes = {"num_channels": num_channels, "num_features": num_features, "num_classes": num_classes}
        for name, size in sizes.items():
            if size < 1:
                raise InputError(f"{name} must be at least 1, not {size}")
        self.encoder = encoder
        # How a workflow sends slices through the encoder; it belongs to the run, not to the network: saved nowhere.
        self.encoding = SliceEncoding(chunk_slices=0)
        # Stages of the encoder that are not trained, see `freeze_stages`; a tuple does not register them a second time,
        # and TorchScript passes over a type that stands in a comment.
        self.frozen = ()  # type: tuple[nn.Module, ...]
        self.selection = selection
        self.num_channels = num_channels
        self.num_features = num_features
        self.num_classes = num_classes
        self.instance_classifier = nn.Linear(num_features, num_classes)
        self.num_scores = num_classes if scorer == "tied" and num_classes > 2 else 1  # S
        self.scorer: nn.Module = nn.Linear(num_features, 1) if scorer == "separate" else nn.Identity()
        self.tied = scorer == "tied"
        self.query = nn.Sequential(
            nn.Linear(num_features, query_features), nn.ReLU(), nn.Linear(query_features, query_features), nn.Tanh()
        )
        self.value = nn.Sequential(nn.Dropout(dropout), nn.Linear(num_features, num_features), nn.ReLU())
        self.bag_classifier = nn.Linear(self.num_scores * num_features, num_classes)
        # A buffer, so that weights carry the temperature they were trained with and evaluation uses the same.
        self.register_buffer("temperature", torch.tensor(1.0))

    def train(self, mode: bool = True) -> "DualStreamMIL":
        """As every module, but frozen stages of the encoder stay in evaluation mode: their norms and dropout."""
        super().train(mode)
        for stage in self.frozen:
            stage.eval()
        return self

    def forward(self, image: Tensor, mask: Optional[Tensor] = None) -> Tensor:
        """Logits (B, K) of bags: image (B, N, C, H, W), mask (B, N) bool with True = real slice (None: all real)."""
        return self.explain(image, mask).logits

    @torch.jit.export
    def explain(self, image: Tensor, mask: Optional[Tensor] = None) -> BagOutput:
        """Logits and evidence of bags; arguments as for `forward`."""
        features = self.encode(image, mask)
        if mask is None:
            mask = torch.ones(features.shape[0], features.shape[1], dtype=torch.bool, device=features.device)
        if torch.jit.is_scripting():
            return self.head(features, mask)
        else:  # TorchScript compiles neither branch it can prove dead, and needs the `else` to prove it
            # Small sums of exponentials lose too much in bfloat16, and the head costs next to nothing.
            with torch.autocast(device_type=features.device.type, enabled=False):
                return self.head(features, mask)

    def encode(self, image: Tensor, mask: Optional[Tensor]) -> Tensor:
        """Features (B, N, F) in float32; padded slices are not encoded (a batch norm would see them) and stay 0."""
        if image.dim() != 5:
            raise ValueError(f"a batch of bags is (B, N, C, H, W): 5 dimensions, not {image.dim()}")
        num_bags, num_slices = image.shape[0], image.shape[1]
        slices = image.flatten(0, 1)  # (B * N, C, H, W)
        if mask is None:
            features = self.encode_slices(slices)
        else:
            real = mask.flatten()
            encoded = self.encode_slices(slices[real])
            features = torch.zeros(slices.shape[0], self.num_features, dtype=encoded.dtype, device=encoded.device)
            features = features.index_put([real], encoded)
        return features.reshape(num_bags, num_slices, self.num_features)

    def encode_slices(self, slices: Tensor) -> Tensor:
        """Features (M, F) in float32 of slices (M, C, H, W)."""
        slices = slices.contiguous(memory_format=torch.channels_last)
        if torch.jit.is_scripting():
            self.check_channels(slices)
            features = self.encoder(slices).to(torch.float32)
        else:
            if not self.encoding.first_stage:
                self.check_channels(slices)
            features = self.encoding(self.encoder, slices).to(torch.float32)
        if features.dim() != 2 or features.shape[1] != self.num_features:
            raise ValueError(f"the encoder must give (M, {self.num_features}) features, it gave {features.shape}")
        return features

    def check_channels(self, slices: Tensor) -> None:
        """Refuse slices (M, C, H, W) with another number of channels than the encoder's."""
        if slices.shape[1] != self.num_channels:
            raise ValueError(f"this network is for {self.num_channels} channels, the slices have {slices.shape[1]}")

    def head(self, features: Tensor, mask: Tensor) -> BagOutput:
        """Both streams on features (B, N, F) with mask (B, N)."""
        instance_logits = self.instance_classifier(features)  # (B, N, K)
        if not self.tied:
            scores = self.scorer(features)  # (B, N, 1)
        elif self.num_classes == 2:
            scores = instance_logits[..., 1:] - instance_logits[..., :1]  # (B, N, 1)
        else:
            scores = instance_logits  # (B, N, K)
        weights = self.selection(scores, mask, self.temperature)  # (B, N, S)
        critical = weights.transpose(1, 2) @ features  # (B, S, F)
        instance_stream = self.instance_classifier(critical)  # (B, S, K)
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


class Evidence(nn.Module):
    """The network with `explain` as its `forward`, for engines that need logits and evidence of one pass.

    DistributedDataParallel hooks into `forward` alone, so it is this module that is wrapped; checkpoints save
    `network`.

    Args:
        network: a DualStreamMIL.
    """

    def __init__(self, network: DualStreamMIL) -> None:
        super().__init__()
        self.network = network

    def forward(self, image: Tensor, mask: Optional[Tensor] = None) -> BagOutput:
        """See `DualStreamMIL.explain`."""
        return self.network.explain(image, mask)
