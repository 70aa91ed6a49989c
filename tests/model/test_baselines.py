"""The rivals keep the contract of a network of bags, and compute what their papers and MONAI say."""

import math
import re

import numpy as np
import pytest
import torch
from monai.networks.nets import MILModel, ResNet
from torch import nn

from bundle.errors import InputError
from bundle.model.bag_network import BagNetwork, BagOutput, Evidence, evidence_of_class
from bundle.model.baselines import GatedAttentionMIL, MeanPoolMIL, MonaiMIL
from bundle.model.conv_encoder import ConvEncoder
from bundle.model.encoder import laid_out, with_norm
from bundle.model.encoding import SliceEncoding
from bundle.model.inference import for_inference
from bundle.model.network import DualStreamMIL
from bundle.model.selection import SoftSelection
from bundle.model.stages import freeze_stages
from bundle.model.volume_net import VolumeNet
from bundle.recipe import Recipe
from bundle.training.schedules import parameter_groups
from bundle.weights import load_network

FEATURES = 16
WIDTHS = [8, FEATURES]
SIDE = 40  # of a slice; the 3D network divides it by 32, and a norm needs more than one value


def slices_encoder(channels, norm):
    return with_norm(ConvEncoder(channels, WIDTHS), norm)


def volume_encoder(channels, norm):
    planes = [8, 8, 8, FEATURES]
    encoder = ResNet(
        "basic", [1, 1, 1, 1], planes, spatial_dims=3, n_input_channels=channels, conv1_t_stride=[1, 2, 2],
        bias_downsample=False, feed_forward=False,
    )  # fmt: skip
    return with_norm(encoder, norm)


def dual(encoder, *sizes):
    return DualStreamMIL(encoder, SoftSelection(), *sizes)


def monai_mil(mode):
    return lambda encoder, *sizes: MonaiMIL(encoder, *sizes, mil_mode=mode)


ON_SLICES = {
    "dual": dual,
    "mean_pool": MeanPoolMIL,
    "gated": GatedAttentionMIL,
    **{f"monai_{mode}": monai_mil(mode) for mode in ("mean", "max", "att", "att_trans")},
}
ALL = {**ON_SLICES, "volume": VolumeNet}


def network(kind, num_classes=2, channels=1, norm="group", seed=0) -> BagNetwork:
    torch.manual_seed(seed)
    make = volume_encoder if kind == "volume" else slices_encoder
    made = ALL[kind](make(channels, norm), channels, FEATURES, num_classes)
    for module in made.modules():  # as if trained
        if isinstance(module, (nn.BatchNorm2d, nn.BatchNorm3d)):
            module.running_mean.uniform_(-0.2, 0.2)
            module.running_var.uniform_(0.5, 1.5)
    return made.eval()


def batch(channels=1, seed=0):
    """Three bags of 7, 4 and 1 slices; what lies in the padding is no matter."""
    generator = torch.Generator().manual_seed(seed)
    image = torch.rand(3, 7, channels, SIDE, SIDE, generator=generator)
    image = image ** (5 * torch.rand(3, 7, 1, 1, 1, generator=generator))  # no two slices alike
    return image, torch.arange(7) < torch.tensor([7, 4, 1])[:, None]


def real_parts(output, mask):
    """What a BagOutput says of real slices and of bags; the rest is meaningless."""
    slices = {name: getattr(output, name)[mask] for name in ("instance_logits", "scores")}
    return {**output._asdict(), **slices}


@pytest.mark.parametrize("kind", ALL)
@pytest.mark.parametrize("num_classes", [1, 2, 3])
def test_shapes_and_weights(kind, num_classes):
    image, mask = batch()
    net = network(kind, num_classes)
    out = net.explain(image, mask)
    assert isinstance(out, BagOutput)
    assert out.logits.shape == out.instance_stream_logits.shape == out.bag_stream_logits.shape == (3, num_classes)
    torch.testing.assert_close(out.logits, 0.5 * (out.instance_stream_logits + out.bag_stream_logits))
    assert out.instance_logits.shape == (3, 7, num_classes)
    assert out.scores.shape == out.selection_weights.shape == out.attention.shape
    assert out.scores.shape[:2] == (3, 7)
    assert out.scores.shape[2] in (1, num_classes)
    for weights in (out.selection_weights, out.attention):
        torch.testing.assert_close(weights.sum(1), torch.ones(3, weights.shape[2]))
        assert (weights[~mask] == 0).all()
        assert (weights >= 0).all()
    assert all(torch.isfinite(values).all() and values.dtype == torch.float32 for values in out)
    torch.testing.assert_close(Evidence(net)(image, mask).logits, net(image, mask))
    evidence_of_class(out, out.logits.argmax(-1))


@pytest.mark.parametrize("norm", ["group", "batch"])
@pytest.mark.parametrize("kind", ALL)
def test_padding_and_company_change_nothing(kind, norm):
    image, mask = batch()
    net = network(kind, 3, norm=norm)
    together = real_parts(net.explain(image, mask), mask)
    longer = torch.cat([image, torch.rand(3, 2, 1, SIDE, SIDE)], 1)
    longer_mask = torch.cat([mask, torch.zeros(3, 2, dtype=torch.bool)], 1)
    padded = real_parts(net.explain(longer, longer_mask), longer_mask)
    for name in ("logits", "instance_logits", "scores"):
        torch.testing.assert_close(padded[name], together[name])
    torch.testing.assert_close(padded["attention"][:, :7], together["attention"])
    for i, n in enumerate(mask.sum(1)):
        alone = net.explain(image[i : i + 1, :n])
        torch.testing.assert_close(alone.logits, together["logits"][i : i + 1])
        torch.testing.assert_close(alone.attention, together["attention"][i : i + 1, :n])
    # Real slices may lie anywhere in a batch.
    torch.testing.assert_close(net(longer.flip(1), longer_mask.flip(1)), net(image.flip(1), mask.flip(1)))


@pytest.mark.parametrize("kind", ON_SLICES)
def test_order_of_slices_changes_no_logit(kind):
    image, _ = batch()
    order = torch.randperm(7, generator=torch.Generator().manual_seed(1))
    net = network(kind, 3)
    plain, moved = net.explain(image), net.explain(image[:, order])
    torch.testing.assert_close(moved.logits, plain.logits)
    for name in ("instance_logits", "scores", "selection_weights", "attention"):
        torch.testing.assert_close(getattr(moved, name), getattr(plain, name)[:, order])


def test_a_volume_network_looks_at_the_order():
    image, _ = batch()
    net = network("volume")
    assert not torch.allclose(net(image.flip(1))[:1], net(image)[:1], atol=1e-4)


@pytest.mark.parametrize("norm", ["group", "batch"])
@pytest.mark.parametrize("kind", ALL)
def test_the_loss_reaches_every_parameter(kind, norm):
    """DistributedDataParallel waits for the gradient of each."""
    image, mask = batch()
    net = network(kind, 3, norm=norm).train()
    out = net.explain(image, mask)
    nn.functional.cross_entropy(out.logits, torch.tensor([0, 1, 2])).backward()
    missing = [name for name, p in net.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert missing == []
    given = [id(p) for group in parameter_groups(net, 1e-3, 1e-3) for p in group["params"]]
    assert sorted(given) == sorted(id(p) for p in net.parameters())


@pytest.mark.parametrize("norm", ["group", "batch", "instance"])
@pytest.mark.parametrize("kind", ALL)
def test_made_ready_for_inference_it_gives_the_same(kind, norm):
    image, mask = batch()
    net = network(kind, norm=norm)
    expected = real_parts(net.explain(image, mask), mask)
    ready = for_inference(net, SliceEncoding(3))
    assert not any(isinstance(m, (nn.BatchNorm2d, nn.BatchNorm3d)) for m in ready.modules())
    given = real_parts(ready.explain(image, mask), mask)
    for name, values in expected.items():
        torch.testing.assert_close(given[name], values, rtol=1e-5, atol=1e-5, msg=name)
    low = for_inference(net, SliceEncoding(), torch.bfloat16)
    heavy = [m for m in low.encoder.modules() if isinstance(m, (nn.Conv2d, nn.Conv3d))]
    # In bfloat16 stacks of one slice came out as NaN.
    assert {m.weight.dtype for m in heavy} == {torch.bfloat16 if net.slicewise else torch.float32}
    with torch.autocast("cpu", torch.bfloat16):
        assert (low(image, mask).softmax(-1) - expected["logits"].softmax(-1)).abs().max() < 0.01


def test_any_encoder_of_stacks_is_made_ready():
    """With linear layers too, which no autocast would fit to slices in float32."""
    encoder = nn.Sequential(nn.Conv3d(1, 4, 3, padding=1), nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(4, 6))
    net = VolumeNet(encoder, 1, 6, 2).eval()
    image, mask = batch()
    ready = for_inference(net, SliceEncoding(), torch.bfloat16)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(ready(image, mask), net(image, mask))


@pytest.mark.parametrize("norm", ["group", "batch"])
@pytest.mark.parametrize("kind", ALL)
def test_recomputed_activations_give_the_same_gradients(kind, norm):
    image, mask = batch()
    gradients = []
    for recompute in (False, True):
        net = network(kind, norm=norm).train()
        for module in net.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        net.encoding = SliceEncoding(2, recompute=recompute)
        net(image, mask).square().sum().backward()
        gradients.append([p.grad.clone() for p in net.encoder.parameters()])
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(recomputed, plain, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("norm", ["group", "batch"])
@pytest.mark.parametrize("kind", ALL)
def test_frozen_stages_learn_nothing(kind, norm):
    net = network(kind, norm=norm)
    laid_out(net.encoder)
    net.frozen = tuple(freeze_stages(net.encoder, 1))
    before = {name: value.clone() for name, value in net.encoder.state_dict().items()}
    net.train()(*batch()).square().sum().backward()
    torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=0.1).step()
    same = [name for name, value in net.encoder.state_dict().items() if torch.equal(value, before[name])]
    frozen = ("0.",) if kind != "volume" else ("conv1.", "bn1.")
    assert same == [name for name in before if name.startswith(frozen)]


DEFINITIONS = {
    "mean_pool": {"_target_": "bundle.MeanPoolMIL"},
    "gated": {"_target_": "bundle.GatedAttentionMIL", "attention_features": 7},
    "monai_att_trans": {"_target_": "bundle.MonaiMIL", "mil_mode": "att_trans"},
    "volume": {"_target_": "bundle.VolumeNet"},
}


@pytest.mark.parametrize("kind", DEFINITIONS)
def test_a_recipe_brings_them_back(kind, tmp_path):
    encoder = {"_target_": "bundle.ConvEncoder", "num_channels": 2, "widths": WIDTHS}
    if kind == "volume":
        encoder = {
            "_target_": "monai.networks.nets.ResNet", "block": "basic", "layers": [1, 1, 1, 1],
            "block_inplanes": [8, 8, 8, FEATURES], "spatial_dims": 3, "n_input_channels": 2, "feed_forward": False,
        }  # fmt: skip
    sizes = {"num_channels": 2, "num_features": FEATURES, "num_classes": 3}
    normed = {"_target_": "bundle.with_norm", "encoder": encoder, "norm": "group"}
    recipe = Recipe({"network_def": {**DEFINITIONS[kind], "encoder": normed, **sizes}})
    net, other = recipe.build("network_def").eval(), recipe.build("network_def").eval()
    net.temperature.fill_(0.5)
    path = tmp_path / "model.pt"
    torch.save({"model": net.state_dict(), "recipe": recipe.text, "recipe_hash": recipe.hash}, path)
    image, mask = batch(channels=2)
    assert not torch.allclose(other(image, mask), net(image, mask))
    again = load_network(Recipe.load(path).build("network_def"), path).eval()
    assert torch.equal(again(image, mask), net(image, mask))
    with pytest.raises(ValueError, match="for 2 channels, the slices have 1"):
        net(image[:, :, :1], mask)


# --- oracles ---


def plain_linear(layer: nn.Linear, x: np.ndarray) -> np.ndarray:
    result = layer.weight.detach().double().numpy() @ x
    return result if layer.bias is None else result + layer.bias.detach().double().numpy()


def features_of(net, image):
    return net.encode(image[None], None)[0].detach().double().numpy()


def test_mean_pooling_is_the_classifier_on_the_mean():
    image, mask = batch()
    net = network("mean_pool")
    with torch.no_grad():
        out = net.explain(image, mask)
    for i, n in enumerate(mask.sum(1).tolist()):
        h = features_of(net, image[i, :n])
        np.testing.assert_allclose(out.logits[i], plain_linear(net.classifier, h.mean(0)), atol=1e-5)
        for k in range(n):
            instance = plain_linear(net.classifier, h[k])
            assert float(out.scores[i, k, 0]) == pytest.approx(instance[1] - instance[0], abs=1e-5)
            assert float(out.attention[i, k, 0]) == pytest.approx(1 / n)


def test_gated_attention_is_equation_9():
    image, mask = batch()
    net = network("gated", 3)
    with torch.no_grad():
        out = net.explain(image, mask)
    for i, n in enumerate(mask.sum(1).tolist()):
        h = features_of(net, image[i, :n])
        raised = []
        for k in range(n):
            content, gate = np.tanh(plain_linear(net.content[0], h[k])), plain_linear(net.gate[0], h[k])
            score = float(plain_linear(net.scorer, content / (1 + np.exp(-gate)))[0])
            assert float(out.scores[i, k, 0]) == pytest.approx(score, abs=1e-5)
            raised.append(math.exp(score))
        attention = np.array(raised) / sum(raised)
        np.testing.assert_allclose(out.attention[i, :n, 0], attention, atol=1e-5)
        np.testing.assert_allclose(out.logits[i], plain_linear(net.classifier, attention @ h), atol=1e-5)


@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True:UserWarning")
@pytest.mark.parametrize("mode", ["mean", "max", "att", "att_trans"])
def test_monai_with_the_encoder_as_its_backbone_is_the_oracle(mode):
    image, mask = batch()
    net = network(f"monai_{mode}", 3)
    oracle = MILModel(3, mode, pretrained=False, backbone=net.encoder, backbone_num_features=FEATURES).eval()
    oracle.load_state_dict(net.model.state_dict(), strict=False)
    with torch.no_grad():
        out = net.explain(image, mask)
    for i, n in enumerate(mask.sum(1).tolist()):
        bag = image[i : i + 1, :n]
        torch.testing.assert_close(out.logits[i : i + 1], oracle(bag))
        h = oracle(bag, no_head=True)
        if mode.startswith("att"):
            seen = oracle.transformer(h.permute(1, 0, 2)).permute(1, 0, 2) if mode == "att_trans" else h
            torch.testing.assert_close(out.scores[i : i + 1, :n], oracle.attention(seen))
            torch.testing.assert_close(oracle.myfc((out.attention[i : i + 1, :n] * seen).sum(1)), oracle(bag))
        else:
            torch.testing.assert_close(out.instance_logits[i : i + 1, :n], oracle.myfc(h))
            decided = (out.selection_weights[i, :n] * out.instance_logits[i, :n]).sum(0)
            torch.testing.assert_close(decided[None], oracle(bag))  # the weights are what the mode does


def test_a_volume_network_is_its_encoder_and_a_linear_layer():
    image, mask = batch()
    net = network("volume", 3)
    out = net.explain(image, mask)
    for i, n in enumerate(mask.sum(1)):
        stack = image[i : i + 1, :n].permute(0, 2, 1, 3, 4)
        torch.testing.assert_close(out.logits[i : i + 1], net.classifier(net.encoder(stack)))
    assert not out.scores.any()
    assert not out.instance_logits.any()


def test_a_batch_norm_in_training_sees_all_stacks_at_once_with_zeros_as_padding():
    image, mask = batch()
    seen = []
    net = network("volume", norm="batch").train()
    net.encoder.register_forward_hook(lambda module, args, out: seen.append(args[0]))
    net(image, mask)
    assert [tuple(x.shape) for x in seen] == [(3, 1, 7, SIDE, SIDE)]
    assert not seen[0].transpose(1, 2)[~mask].any()
    torch.testing.assert_close(seen[0].transpose(1, 2)[mask], image[mask])
    seen.clear()
    net.eval()(image, mask)
    assert [x.shape[2] for x in seen] == [7, 4, 1]


def test_gradients_of_a_volume_network_are_those_of_float32_on_a_cpu():
    """PyTorch's own in bfloat16 are garbage for stacks whose depth ends at 1 or 2."""
    gradients = []
    for amp in (False, True):
        net = network("volume").train()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=amp):
            out = net(*batch())
        out.square().sum().backward()
        gradients.append([p.grad for p in net.parameters()])
    for plain, mixed in zip(*gradients, strict=True):
        torch.testing.assert_close(mixed, plain)


# --- what else workflows do with a network ---


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
@pytest.mark.parametrize("kind", ["mean_pool", "gated"])
def test_scripted_network_equals_eager(kind):
    net = network(kind, 3)
    scripted = torch.jit.script(net)
    image, mask = batch()
    torch.testing.assert_close(scripted(image, mask), net(image, mask))
    torch.testing.assert_close(scripted.explain(image, mask).attention, net.explain(image, mask).attention)


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
@pytest.mark.parametrize("kind", ["monai_att", "volume"])
def test_what_cannot_be_scripted_says_so(kind, monkeypatch):
    monkeypatch.setattr("sys.excepthook", lambda *_: None)  # put back what plain_errors sets
    with pytest.raises(InputError, match="cannot be scripted: package its weights with scripts/package"):
        torch.jit.script(network(kind))


@pytest.mark.parametrize("kind", ["mean_pool", "gated", "monai_mean", "monai_att"])
def test_it_exports_with_any_number_of_slices(kind):
    net = network(kind)
    image = torch.rand(1, 7, 1, SIDE, SIDE)
    exported = torch.export.export(net, (image,), dynamic_shapes=({1: torch.export.Dim("slices", min=2)},)).module()
    torch.testing.assert_close(exported(image), net(image))
    torch.testing.assert_close(exported(image[:, :4]), net(image[:, :4]))


@pytest.mark.parametrize("kind", ALL)
def test_head_stays_in_float32_under_autocast(kind):
    image, mask = batch()
    net = network(kind)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = net.explain(image, mask)
    assert all(values.dtype == torch.float32 for values in out)
    torch.testing.assert_close(out.logits, net(image, mask), atol=0.02, rtol=0)


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: MonaiMIL(nn.Flatten(), mil_mode="att_trans_pyramid"), "mil_mode must be one of mean, max, att, att_t"),
        (lambda: MonaiMIL(nn.Flatten(), num_features=12, mil_mode="att_trans"), "a multiple of 8, not 12"),
        (lambda: MeanPoolMIL(nn.Flatten(), num_features=0), "num_features must be at least 1, not 0"),
        (lambda: VolumeNet(nn.Flatten(), num_classes=0), "num_classes must be at least 1, not 0"),
        (lambda: volume_encoder(1, "frozen_batch"), "'frozen_batch' is for encoders of slices"),
    ],
)
def test_impossible_settings_are_refused(make, sentence):
    with pytest.raises(InputError, match=re.escape(sentence)):
        make()


def test_a_network_without_a_head_says_so():
    with pytest.raises(NotImplementedError, match="BagNetwork has no head"):
        BagNetwork(ConvEncoder(1, WIDTHS), SoftSelection(), 1, FEATURES, 2)(torch.rand(1, 2, 1, 16, 16))
