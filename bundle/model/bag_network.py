"""What every network of bags shares: slices → features, a head to be filled in, and what it says of a bag.

No `from __future__ import annotations` here: TorchScript reads the annotations.
"""

from typing import NamedTuple, NoReturn, Optional

import torch
from torch import Tensor, nn

from ..errors import InputError, plain_errors
from .encoding import SliceEncoding
from .safe_conv import with_safe_convolutions

__all__ = [
    "BagNetwork",
    "BagOutput",
    "ClassEvidence",
    "Evidence",
    "class_scores",
    "evidence_of_class",
    "random_halves",
    "refuse_scripting",
]


class BagOutput(NamedTuple):
    """What the network says of a batch of bags. B bags, N slices (padded), K classes, S = 1 or K.

    Attributes:
        logits: (B, K), half the instance stream plus half the bag stream.
        instance_stream_logits: (B, K), the instance classifier on the critical embedding.
        bag_stream_logits: (B, K), the bag classifier on the bag embedding. A network without streams gives its logits
            as both.
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


def class_scores(instance_logits: Tensor) -> Tensor:
    """Scores (B, N, S) of slices: of their logits (B, N, K) positive minus negative for K = 2, else one a class."""
    if instance_logits.shape[-1] == 2:
        return instance_logits[..., 1:] - instance_logits[..., :1]
    return instance_logits


def refuse_scripting(network: nn.Module) -> NoReturn:
    """Say in a sentence what would be a page of compiler output; for `__prepare_scriptable__`, which is asked first.

    Raises:
        InputError: always.
    """
    plain_errors()  # MONAI's ckpt_export has no `initialize` in which a config could ask for it
    raise InputError(f"a {type(network).__name__} cannot be scripted: package its weights with scripts/package instead")


class BagNetwork(nn.Module):
    """An encoder for every slice, and a head on the features of a bag. Subclasses write `head`.

    Args:
        encoder: maps slices (M, C, H, W) to features (M, F).
        selection: a module of `bundle.model.selection`.
        num_channels: C, channels of a slice (modalities × context slices).
        num_features: F, features of the encoder.
        num_classes: K; 2 for a binary task.

    Raises:
        InputError: on sizes below 1.
        ValueError: in `forward`, on an image that is not (B, N, num_channels, H, W).
    """

    temperature: Tensor
    # Whether a slice's features come from that slice alone.
    slicewise = True

    def __init__(
        self, encoder: nn.Module, selection: nn.Module, num_channels: int, num_features: int, num_classes: int
    ) -> None:
        super().__init__()
        sizes = {"num_channels": num_channels, "num_features": num_features, "num_classes": num_classes}
        for name, size in sizes.items():
            if size < 1:
                raise InputError(f"{name} must be at least 1, not {size}")
        self.encoder = with_safe_convolutions(encoder)
        # How a workflow sends slices through the encoder; it belongs to the run, not to the network: saved nowhere.
        self.encoding = SliceEncoding(chunk_slices=0)
        # Stages of the encoder that are not trained, see `freeze_stages`; a tuple does not register them a second time,
        # and TorchScript passes over a type that stands in a comment.
        self.frozen = ()  # type: tuple[nn.Module, ...]
        self.selection = selection
        self.num_channels = num_channels
        self.num_features = num_features
        self.num_classes = num_classes
        # A buffer, so that weights carry the temperature they were trained with and evaluation uses the same.
        self.register_buffer("temperature", torch.tensor(1.0))

    def train(self, mode: bool = True) -> "BagNetwork":
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
            mask = torch.ones(image.shape[0], image.shape[1], dtype=torch.bool, device=features.device)
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
        if mask is None or self._all_real(mask):
            features = self.encode_slices(slices)
        else:
            real = mask.flatten()
            encoded = self.encode_slices(slices[real])
            features = torch.zeros(slices.shape[0], self.num_features, dtype=encoded.dtype, device=encoded.device)
            features = features.index_put([real], encoded)
        return features.reshape(num_bags, num_slices, self.num_features)

    def _all_real(self, mask: Tensor) -> bool:
        """Whether no slice is padding, so that none has to be picked out, which makes a second bag in memory."""
        if torch.jit.is_scripting():
            return bool(mask.all())
        else:
            # What is traced or exported is for other masks, too.
            return not (torch.jit.is_tracing() or torch.compiler.is_compiling()) and bool(mask.all())

    def encode_slices(self, slices: Tensor) -> Tensor:
        """Features (M, F) in float32 of slices (M, C, H, W), or of stacks of slices (M, C, N, H, W)."""
        if torch.jit.is_scripting():
            self.check_channels(slices)
            if slices.dim() == 4:  # see channels_last, which SliceEncoding goes by
                slices = slices.to(slices.dtype, memory_format=torch.channels_last)
            features = self.encoder(slices).to(torch.float32)
        else:
            if not self.encoding.first_stage:
                self.check_channels(slices)
            features = self.encoding(self.encoder, slices).to(torch.float32)
        if features.dim() != 2 or features.shape[1] != self.num_features:
            raise ValueError(f"the encoder must give (M, {self.num_features}) features, it gave {features.shape}")
        return features

    def check_channels(self, slices: Tensor) -> None:
        """Refuse slices (M, C, ...) with another number of channels than the encoder's."""
        if slices.shape[1] != self.num_channels:
            raise ValueError(f"this network is for {self.num_channels} channels, the slices have {slices.shape[1]}")

    def head(self, features: Tensor, mask: Tensor) -> BagOutput:
        """Logits and evidence from features (B, N, F) with mask (B, N)."""
        raise NotImplementedError(f"{type(self).__name__} has no head")


class Evidence(nn.Module):
    """The network with `explain` as its `forward`, for engines that need logits and evidence of one pass.

    DistributedDataParallel hooks into `forward` alone, so it is this module that is wrapped; checkpoints save
    `network`.

    Args:
        network: a BagNetwork.
    """

    def __init__(self, network: BagNetwork) -> None:
        super().__init__()
        self.network = network

    def forward(self, image: Tensor, mask: Optional[Tensor] = None, halves: bool = False) -> BagOutput:
        """See `BagNetwork.explain`.

        Args:
            image: (B, N, C, H, W).
            mask: (B, N) bool, True = real slice; None: all real.
            halves: whether the output has 3 B rows: the bags, then one random half of the slices of each, then the
                other half. The slices are encoded once. A bag of one slice is both of its halves.
        """
        if not halves:
            return self.network.explain(image, mask)
        if not self.network.slicewise:
            raise InputError(
                "lambda_consistency needs a network of single slices: set it to 0 for one of whole volumes"
            )
        features = self.network.encode(image, mask)
        if mask is None:
            mask = torch.ones(image.shape[:2], dtype=torch.bool, device=features.device)
        first, second = random_halves(mask)
        with torch.autocast(device_type=features.device.type, enabled=False):
            return self.network.head(features.repeat(3, 1, 1), torch.cat((mask, first, second)))


def random_halves(mask: Tensor) -> tuple[Tensor, Tensor]:
    """The real slices of each bag (B, N) in two random halves; of an odd number the first half has one more."""
    order = torch.rand(mask.shape).to(mask.device).masked_fill(~mask, float("inf")).argsort(dim=1)
    rank = order.argsort(dim=1)  # of each slice among the real ones of its bag
    count = mask.sum(dim=1, keepdim=True)
    first = mask & (rank < (count + 1) // 2)
    return first, torch.where(count > 1, mask & ~first, first)
