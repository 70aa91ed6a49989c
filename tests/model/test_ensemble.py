"""The ensemble network: the mean of its members, whatever way it is run."""

import pytest
import torch

from bundle.errors import InputError
from bundle.model.baselines import GatedAttentionMIL
from bundle.model.encoding import SliceEncoding
from bundle.model.ensemble import EnsembleNetwork
from bundle.model.inference import for_inference
from bundle.model.occlusion import leave_one_out
from bundle.model.volume_net import VolumeNet

from .test_network import Flat, Small, batch, network


def members(num_classes=2):
    made = [network(num_classes, seed=0), network(num_classes, seed=1, features=8)]
    torch.manual_seed(2)
    made.append(GatedAttentionMIL(Small(1, 5), 1, 5, num_classes).eval())
    made[0].temperature.fill_(0.3)
    return made if num_classes == 2 else made[:2]


@pytest.mark.parametrize("num_classes", [2, 3])
def test_it_says_the_mean_of_its_members(num_classes):
    image, mask = batch()
    with torch.no_grad():
        said = [member.explain(image, mask) for member in members(num_classes)]
        found = EnsembleNetwork(members(num_classes)).eval().explain(image, mask)
    expected = torch.stack([one.logits.softmax(-1) for one in said]).mean(0)
    torch.testing.assert_close(found.logits.exp(), expected)
    torch.testing.assert_close(found.logits.softmax(-1), expected)
    for name in ("scores", "selection_weights", "attention"):
        torch.testing.assert_close(getattr(found, name), torch.stack([getattr(one, name) for one in said]).mean(0))
    for name in ("instance_stream_logits", "bag_stream_logits", "instance_logits"):
        expected = torch.stack([getattr(one, name).softmax(-1) for one in said]).mean(0)
        torch.testing.assert_close(getattr(found, name).exp(), expected)
    assert (found.attention[~mask] == 0).all()
    torch.testing.assert_close(found.attention.sum(1), torch.ones_like(found.attention.sum(1)))


def test_members_of_one_kind_change_nothing():
    image, mask = batch()
    one, same = network(), EnsembleNetwork([network(), network()]).eval()
    torch.testing.assert_close(same(image, mask).softmax(-1), one(image, mask).softmax(-1))


def test_sure_members_that_disagree_leave_it_finite():
    made = [network(encoder=Flat(), features=256, seed=seed) for seed in (0, 1)]
    for member, sign in zip(made, (1, -1), strict=True):
        member.bag_classifier.bias.data = torch.tensor([sign * 500.0, -sign * 500.0])
    found = EnsembleNetwork(made).eval()(*batch())
    assert torch.isfinite(found).all()
    torch.testing.assert_close(found.softmax(-1), torch.full((3, 2), 0.5), atol=1e-5, rtol=0)


def test_chunks_folded_norms_and_occlusion_know_it():
    image, mask = batch()
    plain = EnsembleNetwork(members()).eval()
    fast = for_inference(EnsembleNetwork(members()), SliceEncoding(chunk_slices=2))
    torch.testing.assert_close(fast(image, mask), plain(image, mask), atol=1e-5, rtol=1e-5)
    assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in fast.encoder.modules())
    falls = leave_one_out(plain, image, mask)
    without = torch.cat([image[:1, :2], image[:1, 3:]], dim=1)
    margin = [(logits := plain(bags))[0].max() - logits[0].min() for bags in (image[:1], without)]
    whole = plain(image[:1])[0].argmax()
    sign = 1 if plain(without)[0].argmax() == whole else -1
    torch.testing.assert_close(falls[0, 2], margin[0] - sign * margin[1], atol=1e-5, rtol=1e-4)


def test_weights_hold_every_encoder_once():
    made = members()
    count = sum(parameter.numel() for member in made for parameter in member.parameters())
    assert sum(parameter.numel() for parameter in EnsembleNetwork(made).parameters()) == count


@pytest.mark.parametrize(
    ("made", "said"),
    [
        (lambda: [network()], "at least two networks, not 1"),
        (lambda: [network(), VolumeNet(Flat(), 1, 12, 2)], "networks of single slices"),
        (lambda: [network(), network(3)], "differ in num_classes: 2 and 3"),
        (lambda: [network(), network(channels=2)], "differ in num_channels: 1 and 2"),
        (lambda: [network(1), network(1, seed=1)], "two classes or more"),
    ],
)
def test_what_does_not_fit_together_is_refused(made, said):
    with pytest.raises(InputError, match=said):
        EnsembleNetwork(made())


def test_score_columns_must_be_alike_too():
    mixed = EnsembleNetwork([network(3), network(3, scorer="separate")]).eval()
    with pytest.raises(InputError, match="differ in their score columns"):
        mixed(*batch())


def test_scripting_is_refused_in_a_sentence():
    with pytest.raises(InputError, match="EnsembleNetwork cannot be scripted"):
        torch.jit.script(EnsembleNetwork(members()))
