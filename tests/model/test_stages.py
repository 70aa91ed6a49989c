"""Stages: one after the other they are the encoder; frozen ones learn nothing and stay in evaluation mode."""

import pytest
import torch
from torch import nn

from bundle.errors import InputError
from bundle.model.encoder import with_norm
from bundle.model.network import DualStreamMIL
from bundle.model.selection import SoftSelection
from bundle.model.stages import freeze_stages, stages_of
from bundle.training.run import start_network
from tests.model.encoders import Torchvision, resnet


def sequential():
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return nn.Sequential(*layers)


def no_pool():
    encoder = resnet()
    encoder.no_max_pool = True
    return encoder


@pytest.mark.parametrize("make", [resnet, no_pool, sequential])
@pytest.mark.parametrize("training", [True, False])
def test_the_stages_are_the_encoder(make, training):
    encoder = make().train(training)
    slices = torch.rand(3, 1, 64, 64)
    expected = encoder(slices)
    through = slices
    for stage in stages_of(encoder):
        through = stage(through)
    torch.testing.assert_close(through, expected, rtol=0, atol=0)
    ours = {id(p) for stage in stages_of(encoder) for p in stage.parameters()}
    assert ours == {id(p) for p in encoder.parameters()}


def test_the_stages_of_a_torchvision_resnet():
    encoder = Torchvision(channels=1).eval()
    slices = torch.rand(3, 1, 64, 64)
    expected = encoder(slices)
    assert len(stages_of(encoder)) == 5
    torch.testing.assert_close(nn.Sequential(*stages_of(encoder))(slices), expected)


class Own(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = sequential()

    def forward(self, x):
        return self.body(x)


def test_a_subclass_with_a_forward_of_its_own_has_no_known_stages():
    class Scaled(type(resnet())):
        def forward(self, x):
            return super().forward(2 * x)

    encoder = resnet()
    encoder.__class__ = Scaled
    with pytest.raises(InputError, match="the stages of a Scaled are not known"):
        stages_of(encoder)


def test_frozen_modules_without_weights_stay_in_evaluation_too():
    layers = [nn.Conv2d(1, 16, 3), nn.Dropout(0.5), nn.BatchNorm2d(16, affine=False), nn.AdaptiveAvgPool2d(1)]
    network = DualStreamMIL(nn.Sequential(*layers, nn.Flatten()), SoftSelection(), num_features=16)
    start_network(network, frozen_stages=3).train()
    assert [module.training for module in layers[:3]] == [False, False, False]
    assert network.value.training


def test_unknown_stages_are_said_so_only_when_they_are_needed():
    freeze_stages(Own(), 0)
    with pytest.raises(InputError, match="the stages of a Own are not known"):
        freeze_stages(Own(), 1)
    with pytest.raises(InputError, match="frozen_stages must be 0 or more"):
        freeze_stages(resnet(), -1)


@pytest.mark.parametrize("norm", ["batch", "group"])
@pytest.mark.parametrize("count", [0, 1, 3, 5, 9])
def test_frozen_stages_learn_nothing_and_the_others_do(norm, count, caplog):
    encoder = with_norm(resnet(), norm)
    network = DualStreamMIL(encoder, SoftSelection(), num_features=16)
    start_network(network, frozen_stages=count)
    assert ("frozen_stages keeps random weights" in caplog.text) == (count > 0)
    network.train()
    before = {name: tensor.clone() for name, tensor in encoder.state_dict().items()}
    optimiser = torch.optim.SGD([p for p in network.parameters() if p.requires_grad], lr=1.0)
    network(torch.rand(2, 3, 1, 64, 64)).square().sum().backward()
    optimiser.step()
    for number, stage in enumerate(stages_of(encoder)):
        frozen = number < count
        parameters = list(stage.parameters())
        assert all(p.requires_grad != frozen for p in parameters)
        norms = [m for m in stage.modules() if isinstance(m, (nn.BatchNorm2d, nn.GroupNorm))]
        assert all(m.training != frozen for m in norms)
    prefixes = ("conv1", "bn1", "layer1", "layer2", "layer3", "layer4")
    frozen_prefixes = prefixes[: count + 1] if count else ()
    for name, tensor in encoder.state_dict().items():
        if name.startswith(frozen_prefixes) and frozen_prefixes:
            assert torch.equal(tensor, before[name]), name
        elif name.endswith("conv1.weight"):
            assert not torch.equal(tensor, before[name]), name
