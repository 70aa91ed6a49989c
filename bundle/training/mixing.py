"""Bags of a batch → bags that hold some slices of another one, with a label to match."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ..errors import InputError
from .engine import prepare_bags

__all__ = ["MixBags"]

LABELS = ("share", "highest")


class MixBags:
    """`prepare_bags`, and then some slices of some bags make room for slices of another bag of the batch.

    A bag that is mixed keeps more than half of its n slices: how many are replaced is uniform over 0 to (n - 1) // 2,
    which ones is random, and as many random slices of another bag take their places (all, where it has fewer). The
    other bag is one of the same batch and process; where there is none, nothing is mixed.

    Args:
        probability: of a bag to be mixed, in [0, 1]; with 0 it is `prepare_bags`.
        num_classes: K.
        label: of a mixed bag: "share" (each bag's class by its share of the slices) or "highest" (the higher of both
            classes, where a single slice decides, such as one with a lesion, and the classes are in that order).
        slicewise: whether the network looks at single slices; one of whole stacks is refused with a probability.

    Raises:
        InputError: on another probability or label, or with a network of whole stacks.

    Source: for bags of slices after mixup, Zhang et al. 2018, arXiv:1710.09412; the shares as labels after CutMix, Yun
    et al. 2019, arXiv:1905.04899.
    """

    def __init__(self, probability: float, num_classes: int, label: str = "share", slicewise: bool = True) -> None:
        if not 0 <= probability <= 1:
            raise InputError(f"bag_mixing must be a probability from 0 (never) to 1, not {probability}")
        if label not in LABELS:
            raise InputError(f"bag_mixing_label must be one of {', '.join(LABELS)}, not {label!r}")
        if probability and not slicewise:
            raise InputError("bag_mixing needs a network of single slices: leave it at 0 for one of whole volumes")
        self.probability, self.num_classes, self.label = probability, num_classes, label

    def __call__(
        self, batch: dict[str, Any], device: torch.device, non_blocking: bool = False, **_: Any
    ) -> tuple[Tensor, Tensor, tuple[Tensor, ...], dict[str, Any]]:
        """Image (B, N, C, H, W), label (B,) or shares of the classes (B, K), (mask,) and nothing, on the device."""
        image, label, (mask,), extra = prepare_bags(batch, device, non_blocking)
        if not self.probability:
            return image, label, (mask,), extra
        mixed, shares = image.clone(), functional.one_hot(label, self.num_classes).to(torch.float32)
        classes = shares.clone()
        for bag in range(len(label) if len(label) > 1 else 0):
            if torch.rand(()).item() >= self.probability:
                continue
            partner = (bag + 1 + int(torch.randint(len(label) - 1, ()))) % len(label)
            own, other = mask[bag].nonzero()[:, 0], mask[partner].nonzero()[:, 0]
            taken = min(int(torch.randint((len(own) + 1) // 2, ())), len(other))
            places, sources = own[_order(own)[:taken]], other[_order(other)[:taken]]
            mixed[bag, places] = image[partner, sources]
            if self.label == "share":
                share = taken / len(own)
                shares[bag] = (1 - share) * classes[bag] + share * classes[partner]
            elif taken:
                shares[bag] = classes[max(bag, partner, key=lambda one: int(label[one]))]
        return mixed, shares, (mask,), extra


def _order(values: Tensor) -> Tensor:
    # By the CPU's generator, whatever the device, so that a seed gives the same bags on all.
    return torch.randperm(len(values)).to(values.device)
