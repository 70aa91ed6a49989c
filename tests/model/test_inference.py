"""A network made ready for inference gives what it gave, within bounds that are stated here."""

import pytest
import torch
from torch import nn

from bundle.model.encoder import NORMS, with_norm
from bundle.model.encoding import SliceEncoding
from bundle.model.inference import fold_batch_norms, for_inference
from bundle.model.network import DualStreamMIL
from bundle.model.selection import SoftSelection
from tests.model.encoders import Torchvision, resnet


def trained(norm: str, seed: int = 0) -> DualStreamMIL:
    """With statistics and scales as after training."""
    encoder = with_norm(resnet(seed=seed), norm, num_groups=4)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in encoder.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.copy_(torch.rand(module.num_features, generator=generator) - 0.5)
                module.running_var.copy_(0.5 + torch.rand(module.num_features, generator=generator))
                module.weight.copy_(0.5 + torch.rand(module.num_features, generator=generator))
                module.bias.copy_(torch.rand(module.num_features, generator=generator) - 0.5)
    return DualStreamMIL(encoder, SoftSelection(), num_features=16).eval()


def bags(seed: int = 0):
    image = torch.rand(3, 20, 1, 64, 64, generator=torch.Generator().manual_seed(seed))
    return image, torch.arange(20) < torch.tensor([20, 7, 1])[:, None]


@pytest.mark.parametrize("norm", NORMS)
def test_float32_agrees_to_1e_5(norm):
    network = trained(norm)
    image, mask = bags()
    expected = network.explain(image, mask)
    ready = for_inference(network, SliceEncoding(4))
    norms = sum(isinstance(module, nn.BatchNorm2d) for module in ready.modules())
    assert norms == 0  # folded where they were batch norms, never there otherwise
    given = ready.explain(image, mask)
    for name, before, now in zip(expected._fields, expected, given, strict=True):
        torch.testing.assert_close(now, before, rtol=1e-5, atol=1e-5, msg=name)
    assert not any(p.requires_grad for p in ready.parameters())
    before = trained(norm).state_dict()
    assert before.keys() == network.state_dict().keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())


@pytest.mark.parametrize("norm", NORMS)
def test_bfloat16_moves_probabilities_by_less_than_one_percent_point(norm):
    moved = []
    for seed in range(5):
        network = trained(norm, seed)
        image, mask = bags(seed)
        expected = network(image, mask).softmax(-1)
        ready = for_inference(network, SliceEncoding(), torch.bfloat16)
        heavy = [m for m in ready.encoder.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
        assert {m.weight.dtype for m in heavy} == {torch.bfloat16}
        norms = [m for m in ready.encoder.modules() if isinstance(m, nn.GroupNorm)]
        assert {m.weight.dtype for m in norms} <= {torch.float32}
        assert ready.instance_classifier.weight.dtype == torch.float32
        with torch.autocast("cpu", torch.bfloat16):
            given = ready(image, mask)
        assert given.dtype == torch.float32
        moved.append((given.softmax(-1) - expected).abs().max())
    assert max(moved) < 0.01


@pytest.mark.parametrize("make", [resnet, lambda: Torchvision(channels=1)], ids=["monai", "torchvision-like"])
def test_every_norm_of_a_resnet_is_folded(make):
    encoder = make().eval()
    slices = torch.rand(2, 1, 64, 64)
    expected = encoder(slices)
    assert fold_batch_norms(encoder) == 12
    torch.testing.assert_close(encoder(slices), expected, rtol=1e-5, atol=1e-5)


class Twice(nn.Module):
    """One convolution whose output goes two ways, and one norm that serves two convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.norm, self.shared = nn.BatchNorm2d(4), nn.BatchNorm2d(4)
        for norm in (self.norm, self.shared):
            norm.running_mean.fill_(0.3)
            norm.running_var.fill_(2.0)

    def forward(self, x):
        y = self.first(x)
        y = y + self.norm(y)
        return (self.shared(self.second(y)) + self.shared(y)).mean((2, 3))


class Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4))

    def forward(self, x):
        return self.body(x).mean((2, 3)) if x.sum() > 0 else x


@pytest.mark.parametrize("encoder", [Twice(), Branching()], ids=["used twice", "branching"])
def test_what_cannot_be_folded_stays(encoder, caplog):
    encoder.eval()
    slices = torch.rand(2, 1, 8, 8)
    expected = encoder(slices)
    with caplog.at_level("INFO"):
        assert fold_batch_norms(encoder) == 0
    assert torch.equal(encoder(slices), expected)
    assert ("cannot be traced" in caplog.text) == isinstance(encoder, Branching)


@pytest.mark.parametrize("first", [nn.BatchNorm2d(1), nn.GroupNorm(1, 1), nn.InstanceNorm2d(1, affine=True)])
def test_an_encoder_that_begins_with_a_norm_infers_as_it_was_trained(first):
    encoder = nn.Sequential(first, nn.Conv2d(1, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    network = DualStreamMIL(encoder, SoftSelection(), num_features=8).eval()
    image, mask = bags()
    with torch.autocast("cpu", torch.bfloat16):
        expected = network(image, mask).softmax(-1)
        given = for_inference(network, SliceEncoding(), torch.bfloat16)(image, mask).softmax(-1)
    torch.testing.assert_close(given, expected, rtol=0, atol=0.01)


def test_a_norm_in_training_is_not_folded():
    assert fold_batch_norms(resnet().train()) == 0
