"""Norms that replace batch norm, and weights files of other encoders: used, adapted, refused."""

import logging
import pickle
from collections import OrderedDict

import pytest
import torch
from torch import nn

from bundle.errors import InputError
from bundle.model.encoder import FrozenBatchNorm2d, WeightReport, laid_out, load_encoder_weights, with_norm
from bundle.model.group_norm import GroupNorm
from bundle.model.network import DualStreamMIL
from bundle.model.selection import SoftSelection
from bundle.training.run import start_network
from tests.model.encoders import Torchvision, resnet

NORMS = {
    "batch": nn.BatchNorm2d,
    "frozen_batch": FrozenBatchNorm2d,
    "group": GroupNorm,
    "instance": nn.InstanceNorm2d,
}


def saved(content, path):
    torch.save(content, path)
    return path


def batch_norms(module):
    return [m for m in module.modules() if isinstance(m, nn.BatchNorm2d)]


# --- norms ---


@pytest.mark.parametrize("make", [resnet, Torchvision], ids=["monai", "torchvision"])
@pytest.mark.parametrize("norm", NORMS)
def test_every_norm_is_replaced(make, norm):
    encoder = make()
    places = [name for name, m in encoder.named_modules() if type(m) is nn.BatchNorm2d]
    assert len(places) == 12  # MONAI's own norm argument reaches the first alone
    parameters = [name for name, _ in encoder.named_parameters()]
    made = with_norm(encoder, norm)
    assert made is encoder
    modules = dict(made.named_modules())
    assert {type(modules[name]) for name in places} == {NORMS[norm]}
    assert [name for name, _ in made.named_parameters()] == parameters


@pytest.mark.parametrize("norm", ["frozen_batch", "group", "instance"])
def test_slices_do_not_see_each_other(norm):
    encoder = with_norm(resnet(), norm).train()
    slices = torch.rand(5, 1, 64, 64)
    together = encoder(slices)
    one_by_one = torch.cat([encoder(slices[i : i + 1]) for i in range(5)])
    torch.testing.assert_close(together, one_by_one, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(encoder.eval()(slices), together, rtol=1e-4, atol=1e-6)
    batch = resnet().train()
    assert not torch.allclose(batch(slices)[0], batch(slices[:1])[0], atol=1e-4)


@pytest.mark.parametrize("norm", NORMS)
def test_scale_and_shift_of_a_trained_encoder_are_kept(norm):
    encoder = Torchvision()
    for number, module in enumerate(batch_norms(encoder)):
        nn.init.constant_(module.weight, 1.0 + number)
        nn.init.constant_(module.bias, -1.0 * number)
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    slices = torch.rand(3, 3, 64, 64)
    features = encoder.eval().features(slices)
    after = with_norm(encoder, norm).state_dict()
    for name, value in after.items():
        assert torch.equal(value, before[name]), name
    if norm == "frozen_batch":
        torch.testing.assert_close(encoder.train().features(slices), features)


def test_a_frozen_norm_ignores_train_and_learns_scale_and_shift():
    network = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten())
    frozen = with_norm(network, "frozen_batch").train()[1]
    assert not frozen.training
    for _ in range(2):
        network.train()
        network(3 + torch.rand(2, 1, 8, 8)).sum().backward()
    assert torch.equal(frozen.running_mean, torch.zeros(4))
    assert torch.equal(frozen.running_var, torch.ones(4))
    assert int(frozen.num_batches_tracked) == 0
    assert frozen.weight.grad.abs().sum() > 0


def test_group_norm_is_that_of_torch():
    encoder = with_norm(nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8)), "group", num_groups=2)
    image = torch.rand(3, 1, 9, 9)
    torch.testing.assert_close(encoder(image), nn.functional.group_norm(encoder[0](image), 2))


@pytest.mark.parametrize(("norm", "kind"), [("group", GroupNorm), ("instance", nn.InstanceNorm3d)])
def test_norms_of_volumes_are_replaced_too(norm, kind):
    encoder = nn.Sequential(nn.Conv3d(1, 8, 3), nn.BatchNorm3d(8)).train()
    nn.init.uniform_(encoder[1].weight)
    scale = encoder[1].weight.detach().clone()
    with_norm(encoder, norm)
    assert type(encoder[1]) is kind
    assert torch.equal(encoder[1].weight, scale)
    volumes = torch.rand(3, 1, 5, 5, 5)
    one_by_one = torch.cat([encoder(volumes[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(encoder(volumes), one_by_one)
    with pytest.raises(InputError, match="'frozen_batch' is for encoders of slices"):
        with_norm(nn.Sequential(nn.BatchNorm3d(8)), "frozen_batch")


def test_planes_are_laid_out_and_volumes_left():
    encoder = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv3d(3, 8, 3))
    before = [module.weight.clone() for module in encoder]
    assert laid_out(encoder) is encoder
    assert encoder[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert encoder[1].weight.is_contiguous()
    assert all(torch.equal(module.weight, old) for module, old in zip(encoder, before, strict=True))


@pytest.mark.parametrize("num_channels", [1, 3])
def test_every_plane_of_an_encoder_is_channels_last(num_channels):
    network = start_network(DualStreamMIL(resnet(num_channels), SoftSelection(), num_channels, 16)).eval()
    seen = []

    def note(module, inputs, output):
        # By strides, as kernels choose: a tensor of one channel or one pixel is contiguous in either layout.
        seen.extend(plane.stride(1) for plane in (*inputs, output) if plane.shape[2:].numel() > 1)

    for module in network.encoder.modules():
        if isinstance(module, nn.Conv2d | nn.MaxPool2d):
            module.register_forward_hook(note)
    with torch.inference_mode():
        network(torch.rand(1, 2, num_channels, 64, 64))
    assert len(seen) > 20
    assert set(seen) == {1}


def test_eps_and_affine_are_kept():
    encoder = nn.Sequential(nn.BatchNorm2d(8, eps=1e-3, affine=False))
    assert with_norm(encoder, "frozen_batch")[0].eps == 1e-3
    assert encoder[0].weight is None


@pytest.mark.parametrize(
    ("encoder", "norm", "groups", "sentence"),
    [
        (
            nn.Sequential(nn.BatchNorm2d(4)),
            "layer",
            8,
            "norm must be one of batch, frozen_batch, group, instance, not 'layer'",
        ),
        (nn.Sequential(nn.BatchNorm2d(12)), "group", 8, "8 groups needs channel counts that they divide, not 12"),
        (nn.Sequential(nn.BatchNorm2d(12)), "group", 0, "0 groups needs"),
        (nn.Sequential(nn.Conv2d(1, 4, 3)), "group", 4, "has no batch norm"),
    ],
)
def test_impossible_norms_are_refused(encoder, norm, groups, sentence):
    with pytest.raises(InputError, match=sentence):
        with_norm(encoder, norm, groups)


def test_a_frozen_norm_without_statistics_warns(tmp_path, caplog):
    def network():
        return DualStreamMIL(with_norm(resnet(3), "frozen_batch"), SoftSelection(), 3, 16)

    start_network(network())
    assert "frozen_batch has no trained statistics" in caplog.text
    caplog.clear()
    started = start_network(network(), saved(Torchvision().state_dict(), tmp_path / "w.pt"))
    assert caplog.text == ""
    assert started.encoder.conv1.weight.is_contiguous(memory_format=torch.channels_last)


# --- weights ---


@pytest.mark.parametrize(
    ("trained", "now", "warned"),
    [("group", "batch", True), ("batch", "batch", False), ("group", "group", False), ("batch", "group", False)],
)
def test_batch_norms_that_find_no_statistics_are_told(trained, now, warned, tmp_path, caplog):
    path = saved(with_norm(resnet(1), trained).state_dict(), tmp_path / "w.pt")
    load_encoder_weights(with_norm(resnet(1), now), path)
    assert ("it was trained with another norm" in caplog.text) == warned


def test_weights_of_torchvision_load_by_name_and_give_the_same_features(tmp_path, caplog):
    source, encoder = Torchvision().eval(), resnet(3).eval()
    path = saved(source.state_dict(), tmp_path / "resnet18.pth")
    with caplog.at_level(logging.INFO):
        report = load_encoder_weights(encoder, path)
    slices = torch.rand(2, 3, 64, 64)
    torch.testing.assert_close(encoder(slices), source.features(slices))
    assert encoder(slices)[0].std() > 0.01
    assert (encoder(slices)[0] - encoder(slices)[1]).abs().max() > 1e-3
    assert report.unused == ("fc.weight", "fc.bias")
    assert report.missing == report.adapted == ()
    assert set(report.used) == set(encoder.state_dict())
    assert str(report) in caplog.text
    expected = f"{len(report.used)} tensors used, 0 adapted (none), 0 missing (none), 2 unused (fc.weight, fc.bias)"
    assert str(report) == expected


def test_weights_of_a_real_resnet18_fit_the_encoder_of_the_config(tmp_path):
    source = Torchvision(planes=[64, 128, 256, 512], blocks=2)
    assert sum(p.numel() for p in source.parameters()) - sum(p.numel() for p in source.fc.parameters()) == 11_176_512
    encoder = resnet(1, [64, 128, 256, 512], layers=(2, 2, 2, 2))
    report = load_encoder_weights(encoder, saved(source.state_dict(), tmp_path / "w.pt"))
    assert report.adapted == ("conv1.weight",)
    assert len(report.used) == 119  # 122 of torchvision, less the classifier's two and the adapted one
    assert report.missing == ()


@pytest.mark.parametrize("channels", [1, 2, 4, 9])
def test_adapted_channels_answer_to_grey_as_before(tmp_path, channels):
    source, encoder = Torchvision().eval(), resnet(channels).eval()
    report = load_encoder_weights(encoder, saved(source.state_dict(), tmp_path / "w.pt"))
    assert report.adapted == ("conv1.weight",)
    grey = torch.rand(2, 1, 64, 64)
    ours, theirs = grey.expand(-1, channels, -1, -1), grey.expand(-1, 3, -1, -1)
    torch.testing.assert_close(encoder.conv1(ours), source.conv1(theirs), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(encoder(ours), source.features(theirs), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda s: {"state_dict": s},
        lambda s: {"model": s, "epoch": 3},
        lambda s: {"encoder": s, "optimizer": {}},
        lambda s: {"state_dict": {f"module.{name}": value for name, value in s.items()}},
        lambda s: {f"module.encoder.{name}": value for name, value in s.items()},
        lambda s: {f"encoder.{name}": v for name, v in s.items()} | {"scorer.weight": torch.zeros(1, 16)},
        lambda s: OrderedDict({"backbone." + name: value for name, value in s.items()}),
        lambda s: {name: value.half() for name, value in s.items()},
    ],
)
def test_wrapped_and_prefixed_weights_are_found(tmp_path, wrap):
    source, encoder = Torchvision(), resnet(3)
    report = load_encoder_weights(encoder, saved(wrap(source.state_dict()), tmp_path / "w.pt"))
    assert report.missing == ()
    for name, value in encoder.state_dict().items():
        torch.testing.assert_close(value, source.state_dict()[name], rtol=1e-3, atol=1e-3)


def test_weights_of_this_bundles_own_training_load(tmp_path):
    torch.manual_seed(3)
    whole = DualStreamMIL(resnet(seed=4), SoftSelection(), 1, 16)
    encoder = resnet(seed=5)
    report = load_encoder_weights(encoder, saved({"model": whole.state_dict(), "recipe": "{}"}, tmp_path / "model.pt"))
    assert torch.equal(encoder.conv1.weight, whole.encoder.conv1.weight)
    assert "bag_classifier.weight" in report.unused


def test_statistics_without_a_place_are_left_and_said(tmp_path):
    encoder = with_norm(resnet(3), "group")
    report = load_encoder_weights(encoder, saved(Torchvision().state_dict(), tmp_path / "w.pt"))
    assert "bn1.running_mean" in report.unused
    assert "unused (" in str(report)
    assert "…" in str(report)
    assert report.missing == ()
    grouped = with_norm(resnet(3, seed=1), "group").state_dict()
    report = load_encoder_weights(resnet(3), saved(grouped, tmp_path / "g.pt"))
    assert "bn1.running_mean" in report.missing


def test_nothing_changes_when_a_file_is_refused(tmp_path):
    encoder = resnet()
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    state = Torchvision().state_dict()
    state["layer4.0.conv2.weight"] = torch.zeros(16, 16, 1, 1)
    with pytest.raises(InputError, match=r"'layer4.0.conv2.weight' of w.pt has shape \(16, 16, 1, 1\), the encoder's"):
        load_encoder_weights(encoder, saved(state, tmp_path / "w.pt"))
    assert all(torch.equal(before[name], value) for name, value in encoder.state_dict().items())


class Evil:
    def __reduce__(self):
        return exec, ("raise SystemExit('this must not run')",)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (lambda: Torchvision(planes=[16, 16, 32, 32]).state_dict(), "another architecture"),
        (lambda: {"something.weight": torch.zeros(3)}, "has no weights for conv1.weight.*another architecture"),
        (
            lambda: {k: v for k, v in Torchvision().state_dict().items() if "layer4" not in k},
            "no weights for layer4.0.conv1",
        ),
        (
            lambda: Torchvision(blocks=1, channels=3).state_dict() | {"layer1.0.conv1.weight": torch.zeros(8, 3, 3, 3)},
            "shape",
        ),
        (lambda: {"state_dict": {}}, "holds no state dict"),
        (lambda: torch.zeros(3), "holds no state dict"),
        (lambda: [1, 2], "holds no state dict"),
    ],
)
def test_files_of_another_kind_are_one_sentence(tmp_path, content, sentence):
    with pytest.raises(InputError, match=sentence) as error:
        load_encoder_weights(resnet(), saved(content(), tmp_path / "w.pt"))
    assert str(error.value).startswith("encoder_weights: ")
    assert "\n" not in str(error.value)


def test_files_that_are_no_weights_are_one_sentence_and_run_nothing(tmp_path):
    with pytest.raises(InputError, match="there is no file"):
        load_encoder_weights(resnet(), tmp_path / "absent.pt")
    with pytest.raises(InputError, match="there is no file"):
        load_encoder_weights(resnet(), tmp_path)
    files = {"text.pt": b"no weights", "empty.pt": b"", "evil.pt": pickle.dumps({"conv1.weight": Evil()})}
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    torch.save({"state_dict": Evil()}, tmp_path / "evil_zip.pt")
    torch.save(resnet(), tmp_path / "whole_module.pt")
    for name in (*files, "evil_zip.pt", "whole_module.pt"):
        with pytest.raises(InputError, match=f"{name} is no file of tensors"):
            load_encoder_weights(resnet(), tmp_path / name)


def test_report_names_a_few_keys():
    report = WeightReport(("a",), (), tuple("bcdef"), ())
    assert str(report) == "1 tensors used, 0 adapted (none), 5 missing (b, c, d, e, …), 0 unused (none)"


def test_an_ensemble_is_no_start_for_one_encoder(tmp_path):
    path = tmp_path / "model.pt"
    torch.save({"model": {"encoder.0.conv1.weight": torch.zeros(1), "members.0.temperature": torch.tensor(1.0)}}, path)
    with pytest.raises(InputError, match="model.pt is an ensemble: give the file of one of its members"):
        load_encoder_weights(resnet(3), path)
