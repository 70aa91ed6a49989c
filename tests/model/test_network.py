"""DualStreamMIL: shapes, invariances, limits, oracles (a loop-written DSMIL and torchmil) and exports."""

import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torchmil.models import DSMIL

from bundle.model.bag_network import BagOutput, Evidence, evidence_of_class, random_halves
from bundle.model.encoding import SliceEncoding
from bundle.model.network import DualStreamMIL
from bundle.model.selection import (
    EntmaxSelection,
    HardSelection,
    MeanSelection,
    SoftSelection,
    StraightThroughSelection,
    TopKSelection,
)


class Flat(nn.Module):
    """Encoder whose features are the pixels: the head alone is tested."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.flatten(1)


class Small(nn.Sequential):
    def __init__(self, channels: int = 1, features: int = 12) -> None:
        layers = [nn.Conv2d(channels, 8, 3, 2), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
        super().__init__(*layers, nn.Linear(8, features))


def network(
    num_classes=2, selection=None, scorer="tied", encoder=None, features=12, channels=1, seed=0
) -> DualStreamMIL:
    torch.manual_seed(seed)
    made = DualStreamMIL(
        encoder or Small(channels, features), selection or SoftSelection(), channels, features, num_classes, scorer
    )
    return made.eval()


def batch(num_bags=3, num_slices=7, channels=1, seed=0):
    generator = torch.Generator().manual_seed(seed)
    image = torch.rand(num_bags, num_slices, channels, 16, 16, generator=generator)
    mask = torch.arange(num_slices) < torch.tensor([num_slices, 4, 1])[:num_bags, None]
    return image * mask[:, :, None, None, None], mask


@pytest.mark.parametrize("scorer", ["tied", "separate"])
@pytest.mark.parametrize(("num_classes", "scores"), [(1, 1), (2, 1), (4, 4)])
def test_shapes(num_classes, scores, scorer):
    scores = 1 if scorer == "separate" else scores
    image, mask = batch()
    out = network(num_classes, scorer=scorer).explain(image, mask)
    assert isinstance(out, BagOutput)
    assert out.logits.shape == out.instance_stream_logits.shape == out.bag_stream_logits.shape == (3, num_classes)
    assert out.instance_logits.shape == (3, 7, num_classes)
    assert out.scores.shape == out.selection_weights.shape == out.attention.shape == (3, 7, scores)
    torch.testing.assert_close(out.logits, 0.5 * (out.instance_stream_logits + out.bag_stream_logits))
    for weights in (out.selection_weights, out.attention):
        torch.testing.assert_close(weights.sum(1), torch.ones(3, scores))
        assert (weights[~mask] == 0).all()


def test_tied_scores_are_the_instance_logits():
    image, mask = batch()
    out = network(2).explain(image, mask)
    torch.testing.assert_close(out.scores[..., 0], out.instance_logits[..., 1] - out.instance_logits[..., 0])
    out = network(3).explain(image, mask)
    torch.testing.assert_close(out.scores, out.instance_logits)


@pytest.mark.parametrize("num_classes", [2, 3])
@pytest.mark.parametrize(
    "selection", [SoftSelection(), HardSelection(), TopKSelection(2), EntmaxSelection(), MeanSelection()]
)
def test_padding_and_company_change_nothing(num_classes, selection):
    image, mask = batch()
    net = network(num_classes, selection)
    together = net(image, mask)
    longer = torch.cat([image, torch.rand(3, 2, 1, 16, 16)], 1)
    longer_mask = torch.cat([mask, torch.zeros(3, 2, dtype=torch.bool)], 1)
    torch.testing.assert_close(net(longer, longer_mask), together)
    for i, n in enumerate(mask.sum(1)):
        torch.testing.assert_close(net(image[i : i + 1, :n]), together[i : i + 1])


def test_order_of_slices_changes_no_logit():
    image, _ = batch()
    order = torch.randperm(7, generator=torch.Generator().manual_seed(1))
    net = network(3)
    torch.testing.assert_close(net(image[:, order]), net(image))
    torch.testing.assert_close(net.explain(image[:, order]).attention, net.explain(image).attention[:, order])


def test_padded_slices_never_reach_the_encoder():
    seen = []
    net = network()
    net.encoder.register_forward_hook(lambda module, args, out: seen.append(len(args[0])))
    image, mask = batch()
    net(image, mask)
    assert seen == [int(mask.sum())]


class Largest(TorchDispatchMode):
    """Notes the most elements of any tensor with memory of its own that an operation makes."""

    def __init__(self, *known: torch.Tensor) -> None:
        super().__init__()
        self.known = {tensor.untyped_storage().data_ptr() for tensor in known}
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and out.untyped_storage().data_ptr() not in self.known:
            self.elements = max(self.elements, out.numel())
        return out


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("masked", [False, True])
def test_inference_makes_no_second_bag(channels, masked):
    net = network(encoder=nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten()), features=channels, channels=channels)
    net.encoding = SliceEncoding(4)
    image = torch.rand(1, 40, channels, 32, 32)
    mask = torch.ones(1, 40, dtype=torch.bool) if masked else None
    with torch.inference_mode(), Largest(image) as made:
        net.eval().explain(image, mask)
    assert image.numel() // 10 <= made.elements <= image.numel() // 5  # slices are laid out 4 at a time


def test_soft_goes_to_hard_and_to_the_mean_with_temperature():
    image, mask = batch()
    soft = network()
    hard = network(selection=HardSelection())
    mean = network(selection=MeanSelection())
    soft.temperature.fill_(1e-6)
    torch.testing.assert_close(soft(image, mask), hard(image, mask))
    soft.temperature.fill_(1e6)
    torch.testing.assert_close(soft(image, mask), mean(image, mask), atol=1e-5, rtol=0)
    assert "temperature" in soft.state_dict()


def test_gradients_of_the_head_are_right():
    torch.manual_seed(0)
    net = DualStreamMIL(Flat(), SoftSelection(), 1, 4, 3, query_features=5).double().eval()
    features = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([[True, True, True], [True, True, False]])
    assert torch.autograd.gradcheck(lambda h: net.head(h, mask).logits, features)


def head_with_share(share, scorer, selection=None):
    """A head on fixed features, all of it made from one seed: (network, features that want a gradient, output)."""
    torch.manual_seed(0)
    net = DualStreamMIL(Flat(), selection or SoftSelection(), 1, 6, 2, scorer, instance_gradient=share).double()
    features = torch.randn(2, 5, 6, dtype=torch.float64, requires_grad=True)
    mask = torch.arange(5) < torch.tensor([[5], [3]])
    return net, features, net.head(features, mask)


def gradient(of, wrt):
    """Of the sum of squares of a tensor; zeros where none arrives."""
    (found,) = torch.autograd.grad(of.square().sum(), [wrt], retain_graph=True, allow_unused=True)
    return torch.zeros_like(wrt) if found is None else found


@pytest.mark.parametrize("selection", [SoftSelection(), HardSelection(), StraightThroughSelection()])
@pytest.mark.parametrize("scorer", ["tied", "separate"])
@pytest.mark.parametrize("share", [0.0, 0.3])
def test_a_share_of_the_instance_streams_gradient_reaches_the_features(share, scorer, selection):
    whole_net, whole_features, whole = head_with_share(1.0, scorer, selection)
    net, features, out = head_with_share(share, scorer, selection)
    for ours, theirs in zip(out, whole, strict=True):  # no value changes, to the last bit
        assert torch.equal(ours, theirs)
    for name in ("instance_stream_logits", "instance_logits", "scores"):
        expected = share * gradient(getattr(whole, name), whole_features)
        torch.testing.assert_close(gradient(getattr(out, name), features), expected)
    # The classifier learns as ever, and the bag stream still teaches the features.
    for name in ("instance_stream_logits", "instance_logits"):
        expected = gradient(getattr(whole, name), whole_net.instance_classifier.weight)
        torch.testing.assert_close(gradient(getattr(out, name), net.instance_classifier.weight), expected)
    assert (gradient(out.bag_stream_logits, features)[out.attention[..., 0] > 0].abs().sum(dim=1) > 0).all()


def loop_dsmil(net: DualStreamMIL, h: np.ndarray, num_classes: int) -> np.ndarray:
    """DSMIL with arg-max, one bag, plain loops: Li, Li, Eliceiri 2021, equations 2 to 6 (averaged streams)."""
    state = {k: v.double().numpy() for k, v in net.state_dict().items()}

    def query(x):
        hidden = np.maximum(state["query.0.weight"] @ x + state["query.0.bias"], 0)
        return np.tanh(state["query.2.weight"] @ hidden + state["query.2.bias"])

    def value(x):
        return np.maximum(state["value.1.weight"] @ x + state["value.1.bias"], 0)

    instance = np.array([state["instance_classifier.weight"] @ x + state["instance_classifier.bias"] for x in h])
    if num_classes == 2:
        columns = [instance[:, 1] - instance[:, 0]]
    else:
        columns = [instance[:, k] for k in range(num_classes)]
    bag, first = [], []
    for column in columns:
        critical = int(np.argmax(column))
        first.append(instance[critical])
        raised = [math.exp(query(x) @ query(h[critical]) / math.sqrt(len(query(x)))) for x in h]
        bag.append(sum(r / sum(raised) * value(x) for r, x in zip(raised, h, strict=True)))
    stream1 = first[0] if len(columns) == 1 else np.array([first[k][k] for k in range(num_classes)])
    stream2 = state["bag_classifier.weight"] @ np.concatenate(bag) + state["bag_classifier.bias"]
    return 0.5 * (stream1 + stream2)


@pytest.mark.parametrize("num_classes", [1, 2, 3])
def test_hard_selection_equals_a_loop_written_dsmil(num_classes):
    torch.manual_seed(0)
    net = DualStreamMIL(Flat(), HardSelection(), 1, 16, num_classes).double().eval()
    image = torch.randn(5, 9, 1, 4, 4, dtype=torch.float64)
    net.encode_slices = lambda x: x.flatten(1)  # keeps float64, which the network itself would not
    expected = [loop_dsmil(net, bag.flatten(1).numpy(), num_classes) for bag in image]
    np.testing.assert_allclose(net(image).detach().numpy(), expected, atol=1e-6)


def test_hard_selection_equals_torchmil():
    torch.manual_seed(0)
    peer = DSMIL(in_shape=(16,), att_dim=32, nonlinear_q=True, nonlinear_v=True).eval()
    ours = DualStreamMIL(Flat(), HardSelection(), 1, 16, 1, query_features=32).eval()
    ours.query.load_state_dict(peer.q_nn.state_dict())
    ours.value.load_state_dict(peer.v_nn.state_dict())
    ours.instance_classifier.load_state_dict(peer.inst_classifier.state_dict())
    ours.bag_classifier.load_state_dict(peer.bag_classifier.state_dict())
    image = torch.randn(6, 9, 1, 4, 4)
    out = ours.explain(image)
    bag, instance = peer(image.flatten(2), return_inst_pred=True)
    torch.testing.assert_close(out.bag_stream_logits[:, 0], bag, atol=1e-6, rtol=0)
    torch.testing.assert_close(out.instance_logits[..., 0], instance.reshape(6, 9), atol=1e-6, rtol=0)
    torch.testing.assert_close(out.instance_stream_logits[:, 0], instance.reshape(6, 9).amax(1), atol=1e-6, rtol=0)


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
@pytest.mark.parametrize("num_classes", [2, 3])
@pytest.mark.parametrize("selection", [SoftSelection(), HardSelection(), TopKSelection(2), MeanSelection()])
def test_scripted_network_equals_eager(num_classes, selection):
    net = network(num_classes, selection)
    scripted = torch.jit.script(net)
    image, mask = batch()
    torch.testing.assert_close(scripted(image, mask), net(image, mask))
    torch.testing.assert_close(scripted(image), net(image))
    torch.testing.assert_close(scripted.explain(image, mask).attention, net.explain(image, mask).attention)


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_a_cut_gradient_scripts_and_exports():
    image, mask = batch()
    net = DualStreamMIL(Small(), SoftSelection(), num_features=12, instance_gradient=0.0).eval()
    torch.testing.assert_close(torch.jit.script(net)(image, mask), net(image, mask))
    torch.testing.assert_close(torch.export.export(net, (image,)).module()(image), net(image))


def test_entmax_network_exports():
    net = network(selection=EntmaxSelection())
    image, _ = batch()
    exported = torch.export.export(net, (image,), dynamic_shapes=({1: torch.export.Dim("slices", min=2)},)).module()
    torch.testing.assert_close(exported(image), net(image))
    torch.testing.assert_close(exported(image[:, :4]), net(image[:, :4]))


def test_head_stays_in_float32_under_autocast():
    net = network()
    image, mask = batch()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = net.explain(image, mask)
    assert all(value.dtype == torch.float32 for value in out)
    torch.testing.assert_close(out.logits, net(image, mask), atol=0.02, rtol=0)


def test_halves_share_out_the_real_slices_at_random():
    mask = torch.arange(9) < torch.tensor([9, 4, 1, 2])[:, None]
    torch.manual_seed(0)
    drawn = [random_halves(mask) for _ in range(300)]
    for first, second in drawn:
        assert torch.equal(first | second, mask)
        assert (first.sum(1).tolist(), second.sum(1).tolist()) == ([5, 2, 1, 1], [4, 2, 1, 1])
        assert not (first & second)[[0, 1, 3]].any()  # the bag of one slice is both of its halves
    share = torch.stack([first[0].double() for first, _ in drawn]).mean(0)
    torch.testing.assert_close(share, torch.full((9,), 5 / 9, dtype=torch.float64), atol=0.1, rtol=0)


def test_halves_of_the_evidence_are_bags_of_those_slices():
    net = network()
    image, mask = batch()
    torch.manual_seed(5)
    out = Evidence(net)(image, mask, halves=True)
    torch.manual_seed(5)
    halves = random_halves(mask)
    expected = [net(image, part) for part in (mask, *halves)]
    torch.testing.assert_close(out.logits, torch.cat(expected))


def test_evidence_module_gives_the_same_in_one_pass():
    net = network(3)
    image, mask = batch()
    torch.testing.assert_close(Evidence(net)(image, mask).logits, net(image, mask))
    out = net.explain(image, mask)
    one = evidence_of_class(out, torch.tensor([2, 0, 1]))
    torch.testing.assert_close(one.scores[0], out.scores[0, :, 2])
    torch.testing.assert_close(one.attention[2], out.attention[2, :, 1])


def test_bad_input_is_named():
    net = network(channels=2)
    with pytest.raises(ValueError, match="for 2 channels, the slices have 1"):
        net(torch.rand(1, 3, 1, 16, 16))
    with pytest.raises(ValueError, match="5 dimensions, not 4"):
        net(torch.rand(3, 2, 16, 16))
    with pytest.raises(ValueError, match="'tied' or 'separate'"):
        network(scorer="both")
    with pytest.raises(ValueError, match=r"instance_gradient must be in \[0, 1\], not 1.5"):
        DualStreamMIL(Small(), SoftSelection(), num_features=12, instance_gradient=1.5)
    with pytest.raises(ValueError, match="must give"):
        network(features=5, encoder=Small(1, 12))(torch.rand(1, 3, 1, 16, 16))
