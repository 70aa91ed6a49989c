"""Group norm: torch's own numbers in every layout, type and mode, and the way round where its kernel is slow."""

import pytest
import torch
from torch import nn

from bundle.model.group_norm import GroupNorm

LAYOUTS = (torch.channels_last, torch.contiguous_format)


def norms(groups, channels):
    generator = torch.Generator().manual_seed(0)
    theirs, ours = nn.GroupNorm(groups, channels), GroupNorm(groups, channels)
    with torch.no_grad():
        theirs.weight.copy_(torch.rand(channels, generator=generator) + 0.5)
        theirs.bias.copy_(torch.randn(channels, generator=generator))
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def pass_through(norm, image, layout, gradient):
    given = image.clone().contiguous(memory_format=layout).requires_grad_()
    result = norm(given)
    result.backward(gradient)
    return result, given.grad, norm.weight.grad, norm.bias.grad


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("groups", "channels", "side"), [(8, 16, 8), (8, 64, 8), (8, 64, 40), (8, 128, 4), (1, 3, 1)])
def test_it_is_torchs_group_norm(layout, dtype, groups, channels, side):
    theirs, ours = norms(groups, channels)
    generator = torch.Generator().manual_seed(1)
    image, gradient = torch.randn(2, 3, channels, side, side + 1, generator=generator).to(dtype)
    exact = pass_through(theirs, image.float(), layout, gradient.float())
    found = pass_through(ours, image, layout, gradient)
    bound = 2e-2 if dtype is torch.bfloat16 else 1e-5
    for one, other in zip(found, exact, strict=True):
        assert (one.float() - other).abs().max() <= bound * other.abs().max()
    assert found[0].dtype == dtype
    assert found[0].is_contiguous(memory_format=layout)


@pytest.mark.parametrize("grad", [False, True])
def test_where_it_goes_round(grad):
    def stalls(channels, side, dtype=torch.bfloat16, layout=torch.channels_last):
        image = torch.zeros(2, 8 * channels, side, side, dtype=dtype).contiguous(memory_format=layout)
        with torch.set_grad_enabled(grad):
            return GroupNorm(8, 8 * channels).stalls(image)

    assert stalls(8, 31)
    assert stalls(4, 31)
    assert stalls(4, 32) == grad
    assert not stalls(8, 32)
    assert not stalls(16, 8)
    assert not stalls(4, 16, torch.float32)
    assert not stalls(4, 16, layout=torch.contiguous_format)
    assert not GroupNorm(2, 4).stalls(torch.zeros(1, 4, 2, 2, 2, dtype=torch.bfloat16))


def test_volumes_and_vectors_pass():
    theirs, ours = norms(2, 4)
    for shape in ((2, 4, 3, 5, 6), (2, 4)):
        image = torch.randn(shape, generator=torch.Generator().manual_seed(2))
        torch.testing.assert_close(ours(image), theirs(image))


def test_it_scripts():
    _, ours = norms(2, 16)
    image = torch.randn(2, 16, 4, 4).bfloat16().contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(torch.jit.script(ours)(image), ours(image))
