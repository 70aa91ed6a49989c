"""ConvEncoder: shapes, and all that workflows do with an encoder."""

import pytest
import torch
from torch import nn

from bundle.errors import InputError
from bundle.model.conv_encoder import ConvEncoder
from bundle.model.encoder import NORMS, load_encoder_weights, with_norm
from bundle.model.encoding import SliceEncoding
from bundle.model.inference import for_inference
from bundle.model.network import DualStreamMIL
from bundle.model.selection import SoftSelection
from bundle.model.stages import stages_of
from bundle.recipe import Recipe
from bundle.training.run import start_network

WIDTHS = (8, 8, 16)


def encoder(channels=1, seed=0) -> ConvEncoder:
    torch.manual_seed(seed)
    return ConvEncoder(channels, WIDTHS)


def loop(made: ConvEncoder, slices: torch.Tensor) -> torch.Tensor:
    """The same function written out, in evaluation mode."""
    x = slices
    for number, (convolution, norm, *_) in enumerate(made):
        x = nn.functional.conv2d(x, convolution.weight, padding=1)
        scale = norm.weight / (norm.running_var + norm.eps).sqrt()
        x = (x - norm.running_mean[:, None, None]) * scale[:, None, None] + norm.bias[:, None, None]
        x = x.clamp(min=0)
        if number < len(made) - 1:
            height, width = x.shape[2] // 2, x.shape[3] // 2
            x = x[:, :, : 2 * height, : 2 * width].reshape(*x.shape[:2], height, 2, width, 2).amax((3, 5))
    return x.mean((2, 3))


def as_if_trained(made: nn.Module) -> nn.Module:
    for module in made.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor, low in ((module.running_mean, -0.2), (module.running_var, 0.5), (module.weight.data, 0.5)):
                tensor.uniform_(low, low + 1)
    return made


@pytest.mark.parametrize(("channels", "height", "width"), [(1, 4, 4), (2, 13, 22), (5, 64, 32)])
def test_it_is_the_function_that_it_says(channels, height, width):
    made = as_if_trained(encoder(channels)).eval()
    slices = torch.rand(3, channels, height, width)
    assert made(slices).shape == (3, WIDTHS[-1])
    torch.testing.assert_close(made(slices), loop(made, slices))


def test_a_single_stage_has_no_maximum():
    made = ConvEncoder(1, [4]).eval()
    slices = torch.rand(2, 1, 1, 1)
    torch.testing.assert_close(made(slices), loop(made, slices))


@pytest.mark.parametrize("widths", [[], [8, 0], [-1]])
def test_impossible_widths_are_refused(widths):
    with pytest.raises(InputError, match="widths of a ConvEncoder are numbers of channels, one a stage, not"):
        ConvEncoder(1, widths)


def test_its_stages_are_the_widths():
    made = encoder().eval()
    stages = stages_of(made)
    assert len(stages) == len(WIDTHS)
    slices = torch.rand(3, 1, 20, 20)
    assert torch.equal(nn.Sequential(*stages)(slices), made(slices))


@pytest.mark.parametrize("norm", NORMS)
def test_every_norm_can_be_replaced(norm):
    made = encoder()
    names = [name for name, _ in made.named_parameters()]
    with_norm(made, norm)
    left = sum(type(module) is nn.BatchNorm2d for module in made.modules())
    assert left == (len(WIDTHS) if norm == "batch" else 0)
    assert [name for name, _ in made.named_parameters()] == names
    assert made(torch.rand(3, 1, 20, 20)).shape == (3, WIDTHS[-1])


def network(norm="batch") -> DualStreamMIL:
    return DualStreamMIL(with_norm(as_if_trained(encoder()), norm), SoftSelection(), 1, WIDTHS[-1])


@pytest.mark.parametrize("norm", ["batch", "group"])
@pytest.mark.parametrize("frozen", [1, 3])
def test_frozen_stages_learn_nothing(norm, frozen):
    net = start_network(network(norm), frozen_stages=frozen).train()
    before = [{k: v.clone() for k, v in stage.state_dict().items()} for stage in net.encoder]
    net(torch.rand(2, 5, 1, 20, 20)).square().sum().backward()
    torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=0.1).step()
    changed = [any(not torch.equal(v, was[k]) for k, v in stage.state_dict().items())
               for stage, was in zip(net.encoder, before, strict=True)]  # fmt: skip
    assert changed == [number >= frozen for number in range(len(WIDTHS))]


@pytest.mark.parametrize("norm", NORMS)
def test_folded_for_inference_it_gives_the_same(norm):
    net = network(norm).eval()
    image, mask = torch.rand(2, 9, 1, 20, 20), torch.arange(9) < torch.tensor([9, 4])[:, None]
    ready = for_inference(net, SliceEncoding(4))
    assert not any(isinstance(module, nn.BatchNorm2d) for module in ready.modules())
    torch.testing.assert_close(ready(image, mask), net(image, mask), rtol=1e-5, atol=1e-5)


def test_weights_load_by_name_with_other_channels(tmp_path):
    torch.save(encoder(1, seed=1).state_dict(), tmp_path / "weights.pt")
    report = load_encoder_weights(made := encoder(2), tmp_path / "weights.pt")
    assert report.adapted == ("0.0.weight",)
    assert (report.missing, report.unused) == ((), ())
    grey = torch.rand(3, 1, 20, 20)
    torch.testing.assert_close(made.eval()(grey.expand(-1, 2, -1, -1)), encoder(1, seed=1).eval()(grey))


def test_a_recipe_may_name_it():
    definition = {"_target_": "bundle.ConvEncoder", "num_channels": 2, "widths": [4, 8]}
    made = Recipe({"network_def": definition}).build("network_def")
    assert isinstance(made, ConvEncoder)
    assert made(torch.rand(2, 2, 8, 8)).shape == (2, 8)
