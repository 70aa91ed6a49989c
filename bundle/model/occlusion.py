"""Occlusion: how much each slice counts, by leaving it out."""

from __future__ import annotations

import torch
from torch import Tensor

from .bag_network import BagNetwork

__all__ = ["leave_one_out"]

# Bags without one of their slices that the head sees at once hold at most so many slices in all.
SLICES_AT_ONCE = 2**14


@torch.no_grad()
def leave_one_out(
    network: BagNetwork, image: Tensor, mask: Tensor | None = None, classes: Tensor | None = None
) -> Tensor:
    """How much the logit margin of a class falls when a slice is left out of its bag.

    The margin of class k is its logit less the highest of the others. Slices are encoded once and the head runs once
    for each of them; where features are not of single slices (`VolumeNet`) the encoder runs as often.

    Args:
        network: in evaluation mode.
        image: (B, N, C, H, W).
        mask: (B, N) bool, True = real slice; None: all are.
        classes: (B,) class numbers; None takes the predicted ones, those of the highest logit of the whole bag.

    Returns:
        (B, N) float32. Positive where the slice speaks for the class; 0 on padding and in a bag of one slice.

    Raises:
        ValueError: when the network is in training mode.
    """
    if network.training:
        raise ValueError("leave_one_out needs a network in evaluation mode: call eval()")
    if mask is None:
        mask = torch.ones(image.shape[:2], dtype=torch.bool, device=image.device)
    falls = torch.zeros(mask.shape, device=image.device)
    for row, (bag, real) in enumerate(zip(image, mask, strict=True)):
        slices = bag[real][None]  # (1, n, C, H, W)
        whole, parts = (_from_features if network.slicewise else _from_image)(network, slices)
        chosen = whole.argmax(dim=-1) if classes is None else classes[row : row + 1]
        if slices.shape[1] > 1:
            falls[row, real] = _margin(whole, chosen) - _margin(parts, chosen.expand(len(parts)))
    return falls


def _from_features(network: BagNetwork, slices: Tensor) -> tuple[Tensor, Tensor]:
    """Logits of the bag (1, K), and without each slice (n, K)."""
    features = network.encode(slices, None)  # (1, n, F)
    n = features.shape[1]
    all_real = torch.ones(1, n, dtype=torch.bool, device=features.device)
    left = ~torch.eye(n, dtype=torch.bool, device=features.device)
    with torch.autocast(features.device.type, enabled=False):
        whole = network.head(features, all_real).logits
        # A bag of one slice has nothing left, which no head can look at.
        chunks = left.split(max(1, SLICES_AT_ONCE // n)) if n > 1 else ()
        parts = [network.head(features.expand(len(chunk), -1, -1), chunk).logits for chunk in chunks]
    return whole, torch.cat(parts) if parts else whole


def _from_image(network: BagNetwork, slices: Tensor) -> tuple[Tensor, Tensor]:
    n = slices.shape[1]
    whole = network(slices)
    parts = [network(torch.cat([slices[:, :i], slices[:, i + 1 :]], dim=1)) for i in range(n if n > 1 else 0)]
    return whole, torch.cat(parts) if parts else whole


def _margin(logits: Tensor, classes: Tensor) -> Tensor:
    """(M,) of logits (M, K); with one class its logit."""
    own = logits.gather(1, classes[:, None])
    if logits.shape[1] == 1:
        return own[:, 0]
    return own[:, 0] - logits.scatter(1, classes[:, None], float("-inf")).amax(dim=1)
