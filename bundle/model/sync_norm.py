"""Batch norm with the statistics of all processes.

torch.nn.SyncBatchNorm runs on GPUs alone, and counts whatever it is given. This one runs on both, so that what tests
on a CPU show holds on GPUs, and leaves out a process that takes part with a bag that does not count.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from .encoder import FrozenBatchNorm2d

__all__ = ["SyncedBatchNorm", "count_in_norms", "with_synced_norms"]


class _Normalise(torch.autograd.Function):
    """(x - mean) / sqrt(var + eps) by channel, with mean and biased variance over the values of all processes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, eps: float, counts: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Normalised values as x (N, C, ...), then mean (C,), variance (C,) and number of values (1,)."""
        axes, shape = [0, *range(2, x.dim())], [1, -1] + [1] * (x.dim() - 2)
        number = x.new_tensor([x.numel() / x.shape[1]])
        sums = torch.cat([x.sum(axes), number]) * counts
        dist.all_reduce(sums)
        number, mean = sums[-1:], sums[:-1] / sums[-1:]
        # Squares of centred values: the difference of two large sums would lose digits.
        centred = x - mean.view(shape)
        squares = centred.square().sum(axes) * counts
        dist.all_reduce(squares)
        variance = squares / number
        scale = (variance + eps).rsqrt().view(shape)
        normalised = centred * scale
        ctx.save_for_backward(normalised, scale, number)
        ctx.counts = counts
        ctx.mark_non_differentiable(mean, variance, number)
        return normalised, mean, variance, number

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, *_: Any) -> tuple[Tensor, None, None]:
        normalised, scale, number = ctx.saved_tensors
        axes = [0, *range(2, gradient.dim())]
        sums = torch.stack([gradient.sum(axes), (gradient * normalised).sum(axes)])  # (2, C)
        dist.all_reduce(sums)
        through_mean, through_variance = (sums / number).view(2, *scale.shape)
        if not ctx.counts:  # its values moved no statistic
            return scale * gradient, None, None
        return scale * (gradient - through_mean - normalised * through_variance), None, None


class SyncedBatchNorm(_BatchNorm):
    """A batch norm of any number of dimensions that computes over all processes in training.

    Weights, statistics and their names are those of torch's batch norms. `counts` says whether the values of this
    process enter the statistics; with False it still takes part, because the others wait for it.
    """

    counts = True

    def _check_input_dim(self, input: Tensor) -> None:
        return

    def forward(self, input: Tensor) -> Tensor:
        if not self.training:
            return super().forward(input)
        wide = input if input.dtype == torch.float64 else input.float()
        normalised, mean, variance, number = _Normalise.apply(wide, self.eps, self.counts)
        if self.track_running_stats:
            self._update(mean, variance * number / (number - 1).clamp_min(1))
        if self.weight is not None:
            shape = [1, -1] + [1] * (input.dim() - 2)
            normalised = normalised * self.weight.view(shape) + self.bias.view(shape)
        return normalised.to(input.dtype)

    @torch.no_grad()
    def _update(self, mean: Tensor, variance: Tensor) -> None:
        assert self.num_batches_tracked is not None
        self.num_batches_tracked += 1
        share = 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        for kept, new in ((self.running_mean, mean), (self.running_var, variance)):
            assert kept is not None
            kept.lerp_(new.to(kept.dtype), share)


def with_synced_norms(network: nn.Module, frozen: Sequence[nn.Module] = ()) -> nn.Module:
    """Replace every batch norm that is not frozen by one over all processes, in place; parameters are kept, not copied.

    Args:
        network: whose norms are replaced.
        frozen: parts of it whose norms stay, because they look at no statistic of a batch.

    Returns:
        The same module.
    """
    left = {module for part in frozen for module in part.modules()}
    for parent in [module for module in network.modules() if module not in left]:
        for name, child in list(parent.named_children()):
            if child in left or isinstance(child, (FrozenBatchNorm2d, SyncedBatchNorm)):
                continue
            if isinstance(child, _BatchNorm):
                new = SyncedBatchNorm(
                    child.num_features, child.eps, child.momentum, child.affine, child.track_running_stats
                )
                new._parameters, new._buffers = child._parameters, child._buffers
                new.training = child.training
                setattr(parent, name, new)
    return network


def count_in_norms(network: nn.Module, counts: bool) -> None:
    """Say whether this process's bags enter the statistics of its synced norms."""
    for module in network.modules():
        if isinstance(module, SyncedBatchNorm):
            module.counts = counts
