"""Group norm that does not stall on a CPU.

No `from __future__ import annotations` here: TorchScript reads the annotations.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

__all__ = ["GroupNorm"]


class GroupNorm(nn.GroupNorm):
    """`torch.nn.GroupNorm`, which leaves the channels-last layout where a CPU's kernels for it are slow.

    Same parameters, same layout of the output, and the same numbers up to rounding.
    """

    def forward(self, input: Tensor) -> Tensor:
        """(M, C, ...) → the same shape."""
        stalls = self.stalls(input)
        given = input.contiguous() if stalls else input
        normed = functional.group_norm(given, self.num_groups, self.weight, self.bias, self.eps)
        return normed.contiguous(memory_format=torch.channels_last) if stalls else normed

    def stalls(self, input: Tensor) -> bool:
        """Whether two copies and the contiguous kernel are faster than the channels-last kernel.

        Measured with torch 2.13 on one core with bfloat16 instructions, 2 to 64 channels a group, planes of 4² to 112²:
        the channels-last kernel in bfloat16 is 2 to 11 times slower in evaluation where a group has up to 8 channels
        and a plane fewer than 1024 pixels, 1.3 to 5 times in training there and, with fewer than 8 channels, on planes
        of any size. Everywhere else, and in float32, it is faster or as fast.
        """
        if input.dim() != 4 or input.dtype != torch.bfloat16 or input.device.type != "cpu":
            return False
        channels = self.num_channels // self.num_groups
        small = input.shape[2] * input.shape[3] < 1024
        slow = channels <= 8 and (small or (channels < 8 and torch.is_grad_enabled()))
        return slow and input.is_contiguous(memory_format=torch.channels_last)
