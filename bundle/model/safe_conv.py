"""Convolutions that compute in bfloat16 on a CPU only where PyTorch gets that right."""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["SafeConv2d", "with_safe_convolutions"]

# Of these PyTorch 2.13 was seen to be right; see SafeConv2d.
LARGEST_KERNEL, LARGEST_STRIDE, LARGEST_DILATION = 7, 2, 1


class SafeConv2d(nn.Conv2d):
    """A `torch.nn.Conv2d` that computes in float32 on a CPU where bfloat16 is not known to be right.

    On a processor with matrix units for bfloat16 (Intel AMX) PyTorch 2.13 was seen to give outputs, and gradients of
    the weights, that have nothing to do with the true ones, up to infinity and without a warning: with strides above 2,
    with kernels of 8 pixels and more, and with any stride where the output is one pixel wide. A ResNet-18 makes such
    planes of slices of 64 × 32 and of 16 × 16; a patch encoder begins with such a kernel. Right, in the convolutions
    that tests/model/test_safe_conv.py draws, against float64, were kernels up to 7 and strides up to 2 without
    dilation, on all wider planes and where a stride of 2 makes one pixel of a wider plane. Compare
    github.com/pytorch/pytorch/issues/169688.

    Under autocast the output is then float32. What is scripted, traced or exported without autocast is a plain
    convolution, as it is on a GPU.
    """

    def forward(self, input: Tensor) -> Tensor:
        if torch.jit.is_scripting():
            return self._conv_forward(input, self.weight, self.bias)
        else:  # TorchScript compiles neither branch it can prove dead, and needs the `else` to prove it
            cast = torch.is_autocast_enabled("cpu") and self.weight.dtype is not torch.float64
            in_16_bit = input.device.type == "cpu" and (cast or self.weight.dtype is torch.bfloat16)
            if not in_16_bit or self._right_in_16_bit(input):
                return self._conv_forward(input, self.weight, self.bias)
            with torch.autocast("cpu", enabled=False):
                bias = None if self.bias is None else self.bias.float()
                output = self._conv_forward(input.float(), self.weight.float(), bias)
            return output if cast else output.to(input.dtype)

    @torch.jit.unused
    def _right_in_16_bit(self, input: Tensor) -> bool:
        if not _may_be_right(self):
            return False
        if self.stride[1] == 1 or self.kernel_size[1] == 1:
            return True
        height, width = (self._output_side(input.shape[axis - 2], axis) for axis in (0, 1))
        return width > 1 or (height == 1 and input.shape[-1] > 1)

    @torch.jit.unused
    def _output_side(self, side: int, axis: int) -> int:
        padding = 0 if isinstance(self.padding, str) else self.padding[axis]  # of the words, strides allow "valid"
        return (side + 2 * padding - self.kernel_size[axis]) // self.stride[axis] + 1


def _may_be_right(convolution: nn.Conv2d) -> bool:
    """Whether it is right in bfloat16 on some planes; dilation is 1 then."""
    return (
        max(convolution.kernel_size) <= LARGEST_KERNEL
        and max(convolution.stride) <= LARGEST_STRIDE
        and max(convolution.dilation) <= LARGEST_DILATION
    )


def with_safe_convolutions(encoder: nn.Module) -> nn.Module:
    """The same encoder, in which every `torch.nn.Conv2d` that may be wrong has become a `SafeConv2d`, in place.

    Names and weights stay. Subclasses of Conv2d, which may compute otherwise, stay as they are, and so do those with
    a weight norm and the like: for an encoder of such, set `amp` to false on a CPU.
    """
    for module in encoder.modules():
        if type(module) is nn.Conv2d:
            always = _may_be_right(module) and 1 in (max(module.stride), max(module.kernel_size))
            if not always:
                module.__class__ = SafeConv2d
    return encoder
