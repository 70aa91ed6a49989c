"""Strided convolutions that bfloat16 on a CPU does not spoil."""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["StridedConv2d", "exact_where_narrow"]


class StridedConv2d(nn.Conv2d):
    """A `torch.nn.Conv2d` that computes in float32 on a CPU where its output is one pixel wide.

    But for a plane that becomes one pixel by a stride of 2, which was seen to be right. Elsewhere PyTorch 2.13, on
    processors with matrix units for bfloat16 (AMX), was seen to give outputs, and gradients of the weights, that have
    nothing to do with the true ones, up to infinity and without a warning: for kernels of 2 to 7 pixels and strides of
    2 and 3. A ResNet-18 makes such planes of slices of 64 × 32 and of 16 × 16. Compare
    github.com/pytorch/pytorch/issues/169688.
    """

    def forward(self, input: Tensor) -> Tensor:
        if torch.jit.is_scripting():
            return self._conv_forward(input, self.weight, self.bias)
        else:  # TorchScript compiles neither branch it can prove dead, and needs the `else` to prove it
            if not self._in_16_bit(input) or not self._narrow(input):
                return self._conv_forward(input, self.weight, self.bias)
            with torch.autocast("cpu", enabled=False):
                bias = None if self.bias is None else self.bias.float()
                return self._conv_forward(input.float(), self.weight.float(), bias)

    @torch.jit.unused
    def _in_16_bit(self, input: Tensor) -> bool:
        """Whether it would compute in bfloat16 on a CPU: so it is cast, or its weights are of that type."""
        cast = self.weight.dtype is torch.float32 and torch.is_autocast_enabled("cpu")
        return input.device.type == "cpu" and (cast or self.weight.dtype is torch.bfloat16)

    @torch.jit.unused
    def _narrow(self, input: Tensor) -> bool:
        height, width = (self._output_side(input.shape[axis - 2], axis) for axis in (0, 1))
        return width == 1 and (height > 1 or input.shape[-1] == 1 or self.stride[1] > 2)

    @torch.jit.unused
    def _output_side(self, side: int, axis: int) -> int:
        padding = (
            0 if isinstance(self.padding, str) else self.padding[axis]
        )  # "valid": with a stride there is no "same"
        return (side + 2 * padding - self.dilation[axis] * (self.kernel_size[axis] - 1) - 1) // self.stride[axis] + 1


def exact_where_narrow(encoder: nn.Module) -> nn.Module:
    """The same encoder, in which every strided 2D convolution is a `StridedConv2d` with the weights that it had."""
    for module in encoder.modules():
        if type(module) is nn.Conv2d and module.stride[1] > 1 and module.kernel_size[1] > 1:
            module.__class__ = StridedConv2d
    return encoder
