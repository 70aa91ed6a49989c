"""VICReg: two views of the same slices shall look alike to the encoder, without all slices looking the same."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..errors import InputError
from ..model.projection import Projections

__all__ = ["VICRegLoss", "vicreg_terms"]

# Of the variance, below which the gradient of its root would grow without bound; and the least standard deviation
# that is asked for. Both as published.
EPSILON, LEAST_SD = 1e-4, 1.0


def vicreg_terms(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The three terms of VICReg, before their weights.

    With Z, Z' the projections of M slices in two views, P numbers each, and C the covariance of Z over the slices::

        invariance  1 / (M P) · sum_ij (Z_ij - Z'_ij)²
        variance    ½ (v(Z) + v(Z')),   v(Z) = 1 / P · sum_j max(0, 1 - sqrt(C_jj + 1e-4))
        covariance  c(Z) + c(Z'),       c(Z) = 1 / P · sum_{i ≠ j} C_ij²

    One slice has neither variance nor covariance: both terms are 0 then.

    Args:
        first: (M, P), of one view.
        second: (M, P), of the other view, in the same order.

    Returns:
        Three scalars.

    Source: Bardes, Ponce, LeCun, ICLR 2022, arXiv:2105.04906, equations 1–6; the means over P of the invariance and
    over the two views of the variance are those of the authors' program, for which their weights were chosen.
    """
    invariance = functional.mse_loss(first, second)
    if len(first) < 2:
        return invariance, first.new_zeros(()), first.new_zeros(())
    (variance, covariance), (other_variance, other_covariance) = _spread(first), _spread(second)
    return invariance, (variance + other_variance) / 2, covariance + other_covariance


def _spread(projections: Tensor) -> tuple[Tensor, Tensor]:
    """The terms v and c of one view."""
    size = projections.shape[1]
    variance = functional.relu(LEAST_SD - (projections.var(dim=0) + EPSILON).sqrt()).mean()
    centred = projections - projections.mean(dim=0)
    covariances = centred.T @ centred / (len(projections) - 1)  # (P, P)
    off_diagonal = covariances.square().sum() - covariances.diagonal().square().sum()
    return variance, off_diagonal / size


class VICRegLoss(nn.Module):
    """`vicreg_terms`, weighted and added. It has no negatives, which neighbouring slices would make false ones.

    After a call `components` holds the detached terms before their weights.

    Args:
        invariance: weight λ ≥ 0.
        variance: weight μ ≥ 0; with 0 all slices may become one point.
        covariance: weight ν ≥ 0; it keeps features from repeating each other.
    """

    def __init__(self, invariance: float = 25.0, variance: float = 25.0, covariance: float = 1.0) -> None:
        super().__init__()
        self.weights = {"invariance": invariance, "variance": variance, "covariance": covariance}
        for name, weight in self.weights.items():
            if not 0 <= weight < float("inf"):
                raise InputError(f"vicreg_{name} must be 0 or more, not {weight}")
        self.components: dict[str, Tensor] = {}

    def forward(self, projections: Projections, *_: Any) -> Tensor:
        """The loss, a scalar, of a batch's slices; label and mask, which the engine hands over, are not looked at."""
        terms = dict(zip(self.weights, vicreg_terms(*projections), strict=True))
        self.components = {name: term.detach() for name, term in terms.items()}
        return torch.stack([self.weights[name] * term for name, term in terms.items()]).sum()
