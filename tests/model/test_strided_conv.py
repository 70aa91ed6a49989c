"""Strided convolutions on narrow planes: in bfloat16 on a CPU as in float32, where PyTorch's own are not."""

import copy

import monai.networks.nets
import pytest
import torch
from torch import nn

from bundle.model.encoder import with_norm
from bundle.model.encoding import SliceEncoding
from bundle.model.inference import for_inference
from bundle.model.network import DualStreamMIL
from bundle.model.selection import SoftSelection
from bundle.model.strided_conv import StridedConv2d, exact_where_narrow


def resnet() -> nn.Module:
    return monai.networks.nets.ResNet(
        "basic", [1, 1, 1, 1], [16, 32, 64, 128], spatial_dims=2, n_input_channels=1, conv1_t_stride=2,
        feed_forward=False, bias_downsample=False,
    )  # fmt: skip


def passed(convolution: nn.Module, image: torch.Tensor, bf16: bool) -> list[torch.Tensor]:
    """Output, and gradients of image and weight."""
    image = image.clone().requires_grad_(True)
    convolution.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        output = convolution(image)
    (output.float() * torch.linspace(-1, 1, output.numel()).reshape(output.shape)).sum().backward()
    return [output.detach(), image.grad, convolution.weight.grad.clone()]


def distance(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one.float() - other.float()).norm() / other.float().norm())


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("kernel", "stride", "padding"), [(3, 2, 1), (2, 2, 0), (3, 2, 0), (5, 2, 2), (3, 3, 1)])
@pytest.mark.parametrize("size", [(4, 2), (8, 2), (4, 1), (1, 1), (2, 1), (1, 2), (2, 2), (5, 3), (4, 4), (8, 8)])
def test_narrow_planes_are_as_in_float32(size, kernel, stride, padding, bias):
    torch.manual_seed(0)
    if min(size) + 2 * padding < kernel:
        size = (kernel, kernel)
    convolution = exact_where_narrow(nn.Conv2d(32, 64, kernel, stride, padding, bias=bias))
    image = torch.randn(5, 32, *size).to(memory_format=torch.channels_last)
    mixed, plain = passed(convolution, image, True), passed(convolution, image, False)
    height, width = plain[0].shape[-2:]
    narrow = width == 1 and (height > 1 or size[1] == 1 or stride > 2)
    assert mixed[0].dtype == (torch.float32 if narrow else torch.bfloat16)
    for one, other in zip(mixed, plain, strict=True):
        assert torch.equal(one, other) if narrow else distance(one, other) < 0.02


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_other_types_stay_what_they_are(dtype):
    convolution = exact_where_narrow(nn.Conv2d(3, 4, 3, 2, 1)).to(dtype)
    image = torch.rand(2, 3, 4, 2, dtype=dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype is torch.float64):  # which casts no doubles
        output = convolution(image)
    assert output.dtype == dtype
    plain = torch.nn.functional.conv2d(image, convolution.weight, convolution.bias, stride=2, padding=1)
    assert torch.equal(output, plain)


def test_what_has_no_stride_stays_as_it_is():
    encoder = exact_where_narrow(resnet())
    kinds = {(module.kernel_size[0], module.stride[0]): type(module) for module in encoder.modules()
             if isinstance(module, nn.Conv2d)}  # fmt: skip
    assert kinds == {(7, 2): StridedConv2d, (3, 1): nn.Conv2d, (3, 2): StridedConv2d, (1, 2): nn.Conv2d}
    assert encoder.state_dict().keys() == resnet().state_dict().keys()


def learned(encoder: nn.Module, image: torch.Tensor, bf16: bool) -> list[torch.Tensor]:
    """Gradients of the weights of all convolutions."""
    encoder.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        features = SliceEncoding()(encoder, image)
    features.float().square().sum().backward()
    return [p.grad.clone() for p in encoder.parameters() if p.dim() == 4]


@pytest.mark.parametrize("size", [(8, 8), (16, 16), (32, 16), (64, 32)])
def test_small_slices_learn_as_well_as_16_bit_lets_them(size, monkeypatch):
    """Rounding makes some gradients 0.1 to 0.2 wrong: at 128 × 128 pixels too, and by PyTorch's own kernels too."""
    torch.manual_seed(0)
    encoder = exact_where_narrow(with_norm(resnet(), "group")).train()
    image = torch.rand(6, 1, *size)
    plain, mixed = learned(encoder, image, bf16=False), learned(encoder, image, bf16=True)
    monkeypatch.setattr(torch.backends.mkldnn, "enabled", False)
    own = learned(encoder, image, bf16=True)
    assert max(map(distance, mixed, plain)) < 2 * max(map(distance, own, plain))


@pytest.mark.parametrize("size", [(64, 32), (64, 16), (32, 32)])
def test_a_network_classifies_small_slices_as_in_float32(size):
    torch.manual_seed(0)
    network = DualStreamMIL(resnet(), SoftSelection(), num_channels=1, num_features=128, num_classes=2).eval()
    image = torch.rand(1, 9, 1, *size)
    with torch.no_grad():
        plain = network(image)
        fast = for_inference(network, SliceEncoding(), torch.bfloat16)
        with torch.autocast("cpu", torch.bfloat16):
            mixed = [network(image), fast(image)]
            copied = copy.deepcopy(fast)(image)
    assert any(isinstance(module, StridedConv2d) for module in fast.modules())
    assert torch.equal(mixed[1], copied)
    for logits in mixed:
        torch.testing.assert_close(logits, plain, atol=0.02, rtol=0)


def test_it_can_be_scripted():
    torch.manual_seed(0)
    encoder = exact_where_narrow(resnet()).eval()
    image = torch.rand(2, 1, 64, 32)
    torch.testing.assert_close(torch.jit.script(encoder)(image), encoder(image))
