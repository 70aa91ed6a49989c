"""The fused optimiser of configs/train.yaml takes the steps of the plain one.

On a CPU it goes by the order in memory alone: where a weight, its gradient and its moments were laid out differently,
PyTorch 2.13 was seen to mix up their elements without a word.
"""

import copy
import io
from pathlib import Path

import pytest
import torch
from monai.bundle import ConfigParser

from bundle.model.network import DualStreamMIL
from bundle.model.selection import SoftSelection
from bundle.training.run import start_network
from bundle.training.schedules import parameter_groups
from tests.model.encoders import resnet

TRAIN = Path(__file__).parents[2] / "configs" / "train.yaml"


def step(network, optimizer, images):
    for image in images:
        optimizer.zero_grad()
        network.encoder(image).square().sum().backward()  # the network itself gives float32
        optimizer.step()


@pytest.mark.parametrize("channels", [1, 3])
def test_fused_steps_are_plain_steps_also_after_a_checkpoint(channels):
    assert ConfigParser.load_config_file(str(TRAIN))["optimizer"]["fused"]
    torch.manual_seed(0)
    plain = DualStreamMIL(resnet(channels), SoftSelection(), channels, 16).double()
    images = torch.rand(4, 3, channels, 32, 32, dtype=torch.float64)
    fused = start_network(copy.deepcopy(plain))
    rates = {"lr": 1e-3, "classifier_lr": 2e-3}
    one = torch.optim.AdamW(parameter_groups(plain, **rates), weight_decay=0.1)
    other = torch.optim.AdamW(parameter_groups(fused, **rates), weight_decay=0.1, fused=True)
    step(plain, one, images)
    step(fused, other, images[:2])
    saved = io.BytesIO()
    torch.save({"network": fused.state_dict(), "optimizer": other.state_dict()}, saved)
    saved.seek(0)
    content = torch.load(saved)
    resumed = start_network(DualStreamMIL(resnet(channels), SoftSelection(), channels, 16).double())
    resumed.load_state_dict(content["network"])
    last = torch.optim.AdamW(parameter_groups(resumed, **rates), weight_decay=0.1, fused=True)
    last.load_state_dict(content["optimizer"])
    step(resumed, last, images[2:])
    torch.testing.assert_close(resumed.state_dict(), plain.state_dict(), rtol=0, atol=1e-9)
    for group in last.param_groups:
        for weight in (weight for weight in group["params"] if weight.grad is not None):
            assert weight.stride() == weight.grad.stride() == last.state[weight]["exp_avg"].stride()
