"""Convolutions under bfloat16 on a CPU against float64, where PyTorch's own may be wrong."""

import copy
import random

import monai.networks.nets
import pytest
import torch
from torch import nn

from bundle.model.encoder import with_norm
from bundle.model.encoding import SliceEncoding
from bundle.model.inference import for_inference
from bundle.model.network import DualStreamMIL
from bundle.model.safe_conv import SafeConv2d, with_safe_convolutions
from bundle.model.selection import SoftSelection


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
    weights = torch.linspace(-1, 1, output.numel(), dtype=torch.float64).reshape(output.shape)
    (output.double() * weights).sum().backward()
    return [output.detach(), image.grad, convolution.weight.grad.clone()]


def distance(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one.double() - other.double()).norm() / other.double().norm())


def right(convolution: nn.Conv2d, image: torch.Tensor) -> bool:
    """Whether output and gradients are the true ones but for rounding, of the image's and the weight's size."""
    exact = copy.deepcopy(convolution).double()
    found, true = passed(convolution, image, True), passed(exact, image.double(), False)
    # Without signs nothing cancels: what rounding may make of it.
    with torch.no_grad():
        exact.weight.abs_()
        if exact.bias is not None:
            exact.bias.abs_()
    sizes = passed(exact, image.double().abs(), False)
    bounds = [sizes[0].norm(), true[1].norm() + 1e-3 * sizes[1].norm(), true[2].norm() + 1e-3 * sizes[2].norm()]
    return all(float((f.double() - t).norm() / b) < 0.05 for f, t, b in zip(found, true, bounds, strict=True))


def drawn(rng: random.Random) -> tuple[nn.Conv2d, torch.Tensor]:
    """A convolution of any kernel, stride, padding, channels and groups, and an image of any size and layout for it."""
    while True:
        square, stride = rng.random() < 0.7, rng.choice([1, 2, 2, 2, 3, 4, 8, 16])
        kernel = [rng.choice([1, 2, 3, 3, 4, 5, 6, 7, 8, 11, 14, 16]) for _ in "hw"]
        kernel = (kernel[0],) * 2 if square else tuple(kernel)
        padding = tuple(rng.choice([0, side // 2]) for side in kernel)
        channels, features = rng.choice([1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 64]), rng.choice([8, 16, 32, 64])
        size = [rng.choice([1, 2, 3, 4, 5, 7, 8, 13, 16, 28, 32]) for _ in "hw"]
        if any(s + 2 * p < k for s, p, k in zip(size, padding, kernel, strict=True)):
            continue
        convolution = nn.Conv2d(channels, features, kernel, stride, padding, bias=rng.random() < 0.5)
        layout = rng.choice([torch.contiguous_format, torch.channels_last])
        return convolution, torch.randn(rng.choice([1, 4, 9]), channels, *size).to(memory_format=layout)


@pytest.mark.parametrize("seed", range(8))
def test_any_convolution_is_right(seed):
    rng = random.Random(seed)
    torch.manual_seed(seed)
    for _ in range(150):
        convolution, image = drawn(rng)
        assert right(with_safe_convolutions(convolution), image), f"{convolution} on {tuple(image.shape)}"


@pytest.mark.parametrize(("channels", "side"), [(4, 16), (8, 8), (24, 4)])
def test_a_patch_encoder_is_right(channels, side):
    torch.manual_seed(0)
    convolution = with_safe_convolutions(nn.Conv2d(channels, 64, side, side))
    assert right(convolution, torch.randn(2, channels, 8 * side, 8 * side))


@pytest.mark.parametrize("size", [(4, 2), (8, 2), (4, 1), (1, 1), (2, 1)])
def test_narrow_planes_are_right(size):
    torch.manual_seed(0)
    assert right(with_safe_convolutions(nn.Conv2d(32, 64, 3, 2, 1)), torch.randn(5, 32, *size))


def test_wide_planes_keep_their_speed():
    for kernel, stride, size in ((7, 2, 64), (3, 2, 8), (3, 1, 2), (1, 2, 8)):
        convolution = with_safe_convolutions(nn.Conv2d(8, 16, kernel, stride, kernel // 2))
        with torch.autocast("cpu", torch.bfloat16):
            assert convolution(torch.rand(2, 8, size, size)).dtype == torch.bfloat16


def test_a_network_of_bfloat16_stays_one():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(32, 64, 3, 2, 1), nn.ReLU(), nn.Conv2d(64, 8, 3, 1, 1))
    image = torch.randn(4, 32, 8, 2)
    plain = network(image).detach()
    given = with_safe_convolutions(copy.deepcopy(network)).bfloat16()(image.bfloat16()).detach()
    assert given.dtype == torch.bfloat16
    assert distance(given, plain) < 0.02


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_other_types_stay_what_they_are(dtype):
    convolution = with_safe_convolutions(nn.Conv2d(3, 4, 3, 2, 1)).to(dtype)
    image = torch.rand(2, 3, 4, 2, dtype=dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype is torch.float64):  # which casts no doubles
        output = convolution(image)
    assert output.dtype == dtype
    plain = torch.nn.functional.conv2d(image, convolution.weight, convolution.bias, stride=2, padding=1)
    assert torch.equal(output, plain)


def test_what_has_no_stride_stays_as_it_is():
    encoder = with_safe_convolutions(resnet())
    kinds = {(module.kernel_size[0], module.stride[0]): type(module) for module in encoder.modules()
             if isinstance(module, nn.Conv2d)}  # fmt: skip
    assert kinds == {(7, 2): SafeConv2d, (3, 1): nn.Conv2d, (3, 2): SafeConv2d, (1, 2): nn.Conv2d}
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
    encoder = with_safe_convolutions(with_norm(resnet(), "group")).train()
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
    assert any(isinstance(module, SafeConv2d) for module in fast.modules())
    assert torch.equal(mixed[1], copied)
    for logits in mixed:
        torch.testing.assert_close(logits, plain, atol=0.02, rtol=0)


def test_it_can_be_scripted():
    torch.manual_seed(0)
    encoder = with_safe_convolutions(resnet()).eval()
    image = torch.rand(2, 1, 64, 32)
    torch.testing.assert_close(torch.jit.script(encoder)(image), encoder(image))
