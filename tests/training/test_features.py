"""Features of frozen stages: those of the slices, kept once, apart for other weights, refused where they would lie."""

import numpy as np
import pytest
import torch
from monai.transforms import Compose
from torch import nn

from bundle.data.cache import SliceCache
from bundle.data.dataset import BagDataset
from bundle.data.sampling import AllSlicesd, RandomSlicesd
from bundle.errors import InputError
from bundle.model.encoding import SliceEncoding
from bundle.model.network import DualStreamMIL
from bundle.model.selection import SoftSelection
from bundle.model.stages import stages_of
from bundle.training import features
from bundle.training.features import EncodeStagesd, check_features, frozen_features
from bundle.training.run import start_network
from tests.model.encoders import resnet


class Slices:
    """A preparation without files."""

    def __call__(self, case):
        generator = torch.Generator().manual_seed(case["image"])
        image = torch.rand(9, 1, 64, 64, generator=generator)
        index = torch.arange(9)
        return {**case, "image": image, "slice_index": index, "slice_position": index.double(), "slice_label": index}


def network(seed: int = 0, frozen: int = 3) -> DualStreamMIL:
    made = DualStreamMIL(resnet(seed=seed), SoftSelection(), num_features=16)
    return start_network(made, frozen_stages=frozen, encoding=SliceEncoding())


def cases():
    return [{"case": f"c{i}", "image": i, "label": i % 2} for i in range(3)]


def dataset(folder, net, frozen=3, draw=None):
    cache = SliceCache(folder, "test", cache_type="float32")
    steps = frozen_features(net, frozen, True, augment=False, cache=cache)
    return BagDataset(cases(), Compose([Slices(), *steps, draw or AllSlicesd()]), cache=cache, progress=False)


@pytest.mark.parametrize("frozen", [1, 3, 5])
def test_logits_and_gradients_are_those_from_slices(tmp_path, frozen):
    plain, fast = network(frozen=frozen), network(frozen=frozen)
    kept = dataset(tmp_path / "cache", fast, frozen)
    slices = BagDataset(cases(), Compose([Slices(), AllSlicesd()]), progress=False)
    mask = torch.ones(3, 9, dtype=torch.bool)
    seen = []
    for net, data in ((plain, slices), (fast, kept)):
        torch.manual_seed(3)
        logits = net.train()(torch.stack([data[i]["image"] for i in range(3)]), mask)
        logits.square().sum().backward()
        seen.append((logits.detach(), {n: p.grad for n, p in net.named_parameters() if p.grad is not None}))
    torch.testing.assert_close(seen[1][0], seen[0][0], rtol=1e-5, atol=1e-6)
    assert seen[0][1].keys() == seen[1][1].keys()
    for name, gradient in seen[0][1].items():
        torch.testing.assert_close(seen[1][1][name], gradient, rtol=1e-4, atol=1e-5, msg=name)


def test_a_draw_takes_the_features_of_the_drawn_slices(tmp_path):
    net = network(frozen=5)
    bag = dataset(tmp_path / "cache", net, 5, RandomSlicesd(4))[7, 1]
    assert bag["image"].shape == (4, 16, 1, 1)
    whole = dataset(tmp_path / "cache", net, 5)[1]["image"]
    torch.testing.assert_close(bag["image"], whole[bag["slice_index"]])


def test_they_are_computed_once_and_anew_for_other_weights(tmp_path, monkeypatch):
    computed = []
    plain = EncodeStagesd._encoded
    monkeypatch.setattr(EncodeStagesd, "_encoded", lambda *a: computed.append(1) or plain(*a))
    first = dataset(tmp_path / "cache", network())[0]["image"]
    assert len(computed) == 3
    again = dataset(tmp_path / "cache", network())[0]["image"]
    assert len(computed) == 3
    assert torch.equal(first, again)
    other = dataset(tmp_path / "cache", network(seed=1))[0]["image"]
    assert len(computed) == 6
    assert not torch.equal(first, other)
    dataset(tmp_path / "cache", network(frozen=2), 2)
    assert len(computed) == 9


def test_the_digest_is_of_weights_statistics_and_architecture():
    def digest(change=None, count=2):
        encoder = resnet()
        if change:
            change(encoder)
        return EncodeStagesd(nn.Sequential(*stages_of(encoder)[:count])).digest

    assert digest() == digest()
    with torch.no_grad():
        others = {
            digest(count=3),
            digest(lambda e: e.conv1.weight[0, 0, 0, 0].add_(1e-6)),
            digest(lambda e: e.bn1.running_mean.add_(1)),
            digest(lambda e: setattr(e.bn1, "eps", 1e-3)),
        }
    assert len(others | {digest()}) == 5


def test_the_digest_is_of_plain_attributes_too():
    class Scale(nn.Module):
        def __init__(self, factor):
            super().__init__()
            self.factor = factor

        def forward(self, x):
            return self.factor * x

    assert EncodeStagesd(nn.Sequential(Scale(1.0))).digest != EncodeStagesd(nn.Sequential(Scale(2.0))).digest


def test_the_digest_is_of_the_code_of_networks(monkeypatch):
    before = EncodeStagesd(nn.Sequential(nn.ReLU())).digest
    monkeypatch.setattr(features, "MODEL_SOURCES", [["encoding.py", "another"]])
    assert EncodeStagesd(nn.Sequential(nn.ReLU())).digest != before


def test_features_of_another_encoder_than_the_checkpoint_holds_are_refused(tmp_path):
    net = network()
    steps = frozen_features(net, 3, True, augment=False, cache=SliceCache(tmp_path / "cache"))
    check_features(net, steps)
    check_features(net, [])
    net.encoder.load_state_dict(resnet(seed=1).state_dict())
    with pytest.raises(InputError, match="holds another encoder than encoder_weights"):
        check_features(net, steps)


def test_bfloat16_is_kept_apart_and_near():
    stages = nn.Sequential(*stages_of(resnet()))
    bag = Slices()({"image": 0})
    exact, coarse = (EncodeStagesd(stages, dtype=dtype)(bag)["image"] for dtype in (None, torch.bfloat16))
    assert EncodeStagesd(stages, dtype=torch.bfloat16).dtype != EncodeStagesd(stages).dtype
    np.testing.assert_allclose(coarse, exact, rtol=0, atol=0.02 * float(exact.max()))
    assert coarse.dtype == torch.float32


def test_the_stages_are_a_copy_in_evaluation_mode():
    encoder = resnet().train()
    step = EncodeStagesd(nn.Sequential(*stages_of(encoder)))
    before = encoder.bn1.running_mean.clone()
    step(Slices()({"image": 0}))
    assert torch.equal(encoder.bn1.running_mean, before)
    assert encoder.training


def test_settings_that_would_lie_are_refused(tmp_path):
    cache = SliceCache(tmp_path / "cache")
    with pytest.raises(InputError, match="frozen_stages of 1 or more"):
        frozen_features(network(frozen=0), 0, True, augment=False, cache=cache)
    with pytest.raises(InputError, match="augment to be false"):
        frozen_features(network(), 3, True, augment=True, cache=cache)
    with pytest.raises(InputError, match="cache_dir"):
        frozen_features(network(), 3, True, augment=False, cache=None)
    net = network()
    assert frozen_features(net, 3, False, augment=True, cache=None) == []
    assert net.encoding.first_stage == 0
