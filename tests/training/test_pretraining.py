"""The engine step of the pre-training: padding and one slice, what learns and what does not, the encoder's file."""

import pytest
import torch
from ignite.engine import Events
from torch import nn
from torch.utils.data import DataLoader

from bundle.data.collate import collate_bags
from bundle.errors import InputError
from bundle.model.conv_encoder import ConvEncoder
from bundle.model.encoder import load_encoder_weights, with_norm
from bundle.model.projection import ProjectedViews
from bundle.training.pretraining import LogTerms, ViewTrainer, save_encoder
from bundle.training.schedules import parameter_groups
from bundle.training.vicreg import VICRegLoss

from .conftest import FEATURES, Encoder, make_bag, make_network, weights_of


def make_views(case, num_slices=4):
    bag, noise = make_bag(case, num_slices), make_bag(case + 100, num_slices)["image"]
    return {**bag, "image": torch.cat([bag["image"], 0.9 * bag["image"] + 0.1 * noise], dim=1), "label": None}


def make_projected(encoder=None):
    torch.manual_seed(1)
    return ProjectedViews(make_network(encoder=encoder), 5)


def make_trainer(projected, sizes=(4, 2, 1, 3), max_epochs=1, kind=torch.optim.SGD, **arguments):
    bags = [make_views(case, size) for case, size in enumerate(sizes)]
    loss = VICRegLoss()
    return ViewTrainer(
        torch.device("cpu"), max_epochs, DataLoader(bags, 2, collate_fn=collate_bags), projected,
        kind(parameter_groups(projected, 0.01, 0.02)), loss, train_handlers=[LogTerms(loss)],
        **arguments,
    )  # fmt: skip


def test_padding_is_not_encoded_and_both_views_go_in_order():
    projected = make_projected(Encoder(nn.BatchNorm2d(4))).eval()
    bags = [make_views(0, 4), make_views(1, 1)]
    batch = collate_bags(bags)
    batch["image"][1, 1:] = 1e6
    first, second = projected(batch["image"], batch["mask"])
    slices = torch.cat([bag["image"] for bag in bags])
    assert first.shape == second.shape == (5, 5)
    for view, channels in ((first, slices[:, :1]), (second, slices[:, 1:])):
        torch.testing.assert_close(view, projected.projector(projected.encoder(channels)))


def test_a_step_is_that_of_a_plain_loop():
    projected, by_hand = make_projected(), make_projected()
    trainer = make_trainer(projected)
    trainer.run()
    optimizer = torch.optim.SGD(parameter_groups(by_hand, 0.01, 0.02))
    losses = []
    for cases in ([make_views(0, 4), make_views(1, 2)], [make_views(2, 1), make_views(3, 3)]):
        slices = torch.cat([bag["image"] for bag in cases])
        # In the layout of the network: another one rounds otherwise, and the loss divides by small deviations.
        planes = [slices[:, view : view + 1].to(memory_format=torch.channels_last) for view in (0, 1)]
        views = [by_hand.projector(by_hand.encoder(plane)) for plane in planes]
        loss = VICRegLoss()(tuple(views))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    for name, value in by_hand.state_dict().items():
        torch.testing.assert_close(projected.state_dict()[name], value, msg=name)
    assert trainer.state.metrics["train_loss"] == pytest.approx(sum(losses) / 2, rel=1e-5)
    assert trainer.state.metrics.keys() >= {"loss_invariance", "loss_variance", "loss_covariance"}
    assert "label" in trainer.state.output
    assert not trainer.state.output["pred"].requires_grad


def test_encoder_and_projector_learn_and_the_head_does_not():
    projected = make_projected()
    before = weights_of(projected)
    make_trainer(projected).run()
    changed = {name for name, value in projected.state_dict().items() if not torch.equal(before[name], value)}
    learn = {name for name in before if name.startswith(("projector.", "network.encoder."))}
    assert changed == learn


@pytest.mark.parametrize("norm", ["batch", "group", "instance"])
def test_one_slice_is_enough(norm):
    torch.manual_seed(0)
    encoder = with_norm(nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), *list(Encoder())[2:-1],
                                      nn.Linear(8, FEATURES)), norm)  # fmt: skip
    projected = make_projected(encoder)
    trainer = make_trainer(projected, sizes=(1,), amp=True, precision="bf16")
    trainer.run()
    assert all(torch.isfinite(value).all() for value in projected.state_dict().values())
    assert trainer.state.metrics["loss_variance"] == 0


def test_it_learns_to_tell_slices_apart():
    def slowly(groups):
        return torch.optim.Adam([{**group, "lr": 1e-3} for group in groups])

    projected = make_projected()
    losses = []
    trainer = make_trainer(projected, sizes=(8, 8), max_epochs=60, kind=slowly)
    trainer.add_event_handler(Events.EPOCH_COMPLETED, lambda e: losses.append(e.state.metrics["train_loss"]))
    trainer.run()
    assert losses[-1] < 0.7 * losses[0]


@pytest.mark.parametrize(("lr", "told"), [(0.0, True), (1e-3, False)])
def test_a_collapse_is_told(lr, told, caplog):
    projected = make_projected()
    if told:
        nn.init.zeros_(projected.projector[-1].weight)
    trainer = make_trainer(
        projected, (8, 8), 60, lambda groups: torch.optim.Adam([{**group, "lr": lr} for group in groups])
    )
    trainer.run()
    assert ("all slices look alike to the encoder: lower lr" in caplog.text) == told


@pytest.mark.parametrize("norm", ["batch", "group"])
def test_the_file_starts_an_encoder_of_that_norm_and_no_other_architecture(tmp_path, norm):
    torch.manual_seed(3)
    encoder = with_norm(ConvEncoder(2, [8, 16]), norm)
    for path in (tmp_path / "encoder.pt", tmp_path / "again.pt"):
        save_encoder(encoder, path, {"datalist": "a", "fold": 1})
    assert (tmp_path / "encoder.pt").read_bytes() == (tmp_path / "again.pt").read_bytes()
    torch.manual_seed(4)
    other = with_norm(ConvEncoder(2, [8, 16]), norm)
    report = load_encoder_weights(other, tmp_path / "encoder.pt")
    assert report.missing == report.unused == report.adapted == ()
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in encoder.state_dict().items())
    for widths in ([8, 8], [8, 16, 16]):
        with pytest.raises(InputError, match="encoder_weights: .*another architecture"):
            load_encoder_weights(ConvEncoder(2, widths), tmp_path / "encoder.pt")
    # A larger encoder's first stages would fit, but its features are not what was trained.
    save_encoder(with_norm(ConvEncoder(2, [8, 16, 32]), norm), tmp_path / "deeper.pt", {})
    with pytest.raises(InputError, match="encoder_weights: deeper.pt has weights .* another architecture"):
        load_encoder_weights(other, tmp_path / "deeper.pt")


def test_what_cannot_be_pre_trained_is_refused():
    with pytest.raises(InputError, match="projected_features must be 2 or more, not 1"):
        ProjectedViews(make_network(), 1)
    network = make_network()
    network.slicewise = False
    with pytest.raises(InputError, match="for encoders of single slices"):
        ProjectedViews(network)
