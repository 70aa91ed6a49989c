"""Handlers: expected histories, clipping that is right with accumulation and scaling, scores, bounded output."""

import math

import numpy as np
import pytest
import torch
from ignite.engine import Engine, Events
from torch import nn

from bundle.errors import InputError, Refusal
from bundle.evaluation.scores import score
from bundle.model.selection import SoftSelection, TwoPhaseSelection
from bundle.training.engine import BagEvents
from bundle.training.handlers import (
    AnnealTemperature,
    BagProgressBar,
    EpochScore,
    GradientClip,
    ScheduleRegularisation,
    TwoPhaseSwitch,
    named_scores,
)
from bundle.training.schedules import ExponentialTemperature, LinearWeight, PrescribedTemperature

from .conftest import counting_engine, fake_engine, make_bag, make_evaluator, make_loss, make_network, make_trainer


def test_temperature_history_of_a_run_and_where_it_is_seen():
    network, engine, seen = make_network(), counting_engine(), []
    AnnealTemperature(network, PrescribedTemperature(10.0, 1.0)).attach(engine)
    engine.add_event_handler(
        Events.ITERATION_COMPLETED, lambda e: seen.append((float(network.temperature), e.state.metrics["temperature"]))
    )
    engine.run([0], max_epochs=10)
    assert seen == [pytest.approx((t, t)) for t in (10, 9, 8, 7, 6, 5, 4, 3, 2, 1)]


def test_temperature_depends_on_the_epoch_alone():
    network = make_network()
    anneal = AnnealTemperature(network, ExponentialTemperature(5.0, 0.5, 0.6))
    found = {}
    for epoch in (7, 1, 10, 4, 7):
        network.temperature.fill_(123.0)  # whatever was there before
        anneal(fake_engine(epoch))
        found.setdefault(epoch, set()).add(float(network.temperature))
    assert all(len(values) == 1 for values in found.values())
    assert found[1] == {5.0}
    assert found[7] == found[10] == {0.5}
    assert [epoch for epoch in range(1, 11) if anneal.at_end(fake_engine(epoch))] == [7, 8, 9, 10]


def test_temperature_is_saved_with_the_weights_and_learns_nothing():
    network = make_network()
    AnnealTemperature(network, PrescribedTemperature(10.0, 1.0))(fake_engine(3))
    assert float(network.state_dict()["temperature"]) == 8.0
    assert not network.temperature.requires_grad


def test_a_constant_temperature_is_at_its_end_from_the_start():
    anneal = AnnealTemperature(make_network(), ExponentialTemperature(2.0, 2.0, 0.6))
    assert anneal.at_end(fake_engine(1))


def test_two_phases():
    network = make_network(selection=TwoPhaseSelection())
    switch, history = TwoPhaseSwitch(network, 0.4), []
    for epoch in (1, 2, 3, 4, 5, 2):
        switch(fake_engine(epoch, max_epochs=5))
        history.append(bool(network.selection.hard_phase))
    assert history == [False, False, True, True, True, False]
    assert "selection.hard_phase" in network.state_dict()
    soft = make_network(selection=SoftSelection())
    TwoPhaseSwitch(soft)(fake_engine(9))
    assert isinstance(soft.selection, SoftSelection)
    for fraction in (0.0, 1.0, math.nan):
        with pytest.raises(InputError, match="two_phase_fraction"):
            TwoPhaseSwitch(network, fraction)


def test_regularisation_weights_are_set_and_noted_every_epoch():
    loss, engine, seen = make_loss(), counting_engine(), []
    ScheduleRegularisation(loss, LinearWeight(0.0, 0.2), LinearWeight(0.01)).attach(engine)
    engine.add_event_handler(
        Events.ITERATION_COMPLETED, lambda e: seen.append((loss.lambda_entropy, loss.lambda_confidence))
    )
    engine.add_event_handler(
        Events.EPOCH_COMPLETED,
        lambda e: seen.append((e.state.metrics["lambda_entropy"], e.state.metrics["lambda_confidence"])),
    )
    engine.run([0], max_epochs=3)
    assert seen == [pytest.approx(x) for x in [(0.0, 0.01)] * 2 + [(0.1, 0.01)] * 2 + [(0.2, 0.01)] * 2]


def gradients(network: nn.Module) -> torch.Tensor:
    return torch.cat([p.grad.flatten() for p in network.parameters() if p.grad is not None])


def gradients_at_step(network, clip=None, scaler=None, **arguments):
    """The gradients that the optimiser of a trainer sees in its first step."""
    trainer, seen = make_trainer(network, **arguments), []
    if scaler is not None:
        trainer.scaler = scaler
    if clip is not None:
        clip.attach(trainer)
    trainer.add_event_handler(BagEvents.GRADIENTS_READY, lambda: seen.append(gradients(network)))
    trainer.run()
    return seen[0]


@pytest.mark.parametrize("batch_size", [1, 2, 4])
@pytest.mark.parametrize("scale", [None, 1.0, 2.0**14])
def test_the_clipped_gradient_is_that_of_one_big_batch(batch_size, scale):
    plain = gradients_at_step(make_network(), cases=4, batch_size=4)
    max_norm = 0.4 * float(plain.norm())
    network = make_network()
    clip = GradientClip(network, max_norm)
    scaler = None if scale is None else torch.amp.GradScaler("cpu", init_scale=scale)
    found = gradients_at_step(network, clip, scaler, cases=4, batch_size=batch_size, accumulation_steps=4 // batch_size)
    assert (clip.steps, clip.clipped) == (1, 1)
    assert float(found.norm()) == pytest.approx(max_norm, rel=1e-4)
    torch.testing.assert_close(found, plain * max_norm / plain.norm(), rtol=1e-3, atol=1e-6)


def test_small_gradients_are_left_alone():
    network = make_network()
    clip = GradientClip(network, 1e6)
    torch.testing.assert_close(gradients_at_step(network, clip), gradients_at_step(make_network()), rtol=0, atol=0)
    assert (clip.steps, clip.clipped) == (2, 0)


def test_counts_are_of_steps_and_of_the_epoch():
    network = make_network()
    trainer, seen = make_trainer(network, cases=5, batch_size=1, max_epochs=2, accumulation_steps=2), []
    clip = GradientClip(network, 1e-9)
    clip.attach(trainer)
    trainer.add_event_handler(Events.EPOCH_COMPLETED, lambda: seen.append((clip.steps, clip.clipped)))
    trainer.run()
    assert seen == [(3, 3), (3, 3)]


def overflow(network: nn.Module) -> None:
    for p in network.parameters():
        p.grad = torch.full_like(p, math.inf)


def test_infinite_gradients_are_left_to_the_scaler_and_end_a_run_without_one():
    network = make_network()
    clip, engine = GradientClip(network, 1.0), fake_engine(epoch=3)
    overflow(network)
    engine.scaler = torch.amp.GradScaler("cpu")
    clip(engine)
    assert (clip.steps, clip.clipped) == (0, 0)
    overflow(network)
    engine.scaler = None
    with pytest.raises(InputError, match="the gradient became inf in epoch 3"):
        clip(engine)


@pytest.mark.parametrize("max_norm", [0.0, -1.0, math.nan])
def test_a_norm_that_leaves_nothing_is_refused(max_norm):
    with pytest.raises(InputError, match="grad_clip must be above 0"):
        GradientClip(make_network(), max_norm)


@pytest.mark.parametrize("name", ["auc", "accuracy", "nll", "f1_macro"])
def test_epoch_score_equals_the_score_of_all_cases(name):
    rng = np.random.default_rng(0)
    logits, labels = (
        torch.from_numpy(rng.normal(size=(11, 2)).astype(np.float32)),
        torch.from_numpy(rng.integers(0, 2, 11)),
    )
    labels[4] = -1  # unknown
    engine = Engine(lambda _, batch: {"pred": logits[batch], "label": labels[batch]})
    metric = EpochScore(name)
    metric.attach(engine, name)
    state = engine.run([slice(0, 4), slice(4, 8), slice(8, 11)], max_epochs=2)
    known = labels >= 0
    assert state.metrics[name] == pytest.approx(score(name, labels[known].numpy(), logits.softmax(-1)[known].numpy()))


def test_epoch_score_of_one_class_or_no_case_is_nan():
    engine = Engine(lambda _, batch: {"pred": torch.randn(2, 2), "label": torch.tensor([1, 1])})
    EpochScore("auc").attach(engine, "auc")
    assert math.isnan(engine.run([0, 1]).metrics["auc"])
    engine = Engine(lambda _, batch: {"refusal": [Refusal("x", "y")]})
    EpochScore("auc").attach(engine, "auc")
    assert math.isnan(engine.run([0, 1]).metrics["auc"])


def test_epoch_score_passes_over_refused_cases():
    refused = {"case": "r", "patient": None, "label": 1, "refusal": Refusal("unreadable", "it cannot be read")}
    bags = [make_bag(0), refused, make_bag(1), make_bag(2)]
    network = make_network()
    both = [
        make_evaluator(network, part, key_val_metric=named_scores(["accuracy"], "val_"))
        for part in (bags, [bags[0], bags[2], bags[3]])
    ]
    for evaluator in both:
        evaluator.run()
    assert both[0].state.metrics["val_accuracy"] == both[1].state.metrics["val_accuracy"]


def test_named_scores_and_unknown_ones():
    made = named_scores(["auc", "nll"], "val_")
    assert list(made) == ["val_auc", "val_nll"]
    assert made["val_nll"].name == "nll"
    with pytest.raises(InputError, match="there is no metric 'auroc'; choose one of auc, auprc"):
        EpochScore("auroc")


def test_the_progress_bar_leaves_few_lines(capfd):
    engine = Engine(lambda engine, batch: {"loss": torch.tensor(0.25)})
    BagProgressBar("training").attach(engine)
    engine.run(range(500), max_epochs=4)
    captured = capfd.readouterr().err
    assert "training" in captured
    assert "epoch 4/4, loss 0.250" in captured
    assert "2000/2000" in captured
    assert captured.count("\r") + captured.count("\n") <= 5


def test_the_progress_bar_can_be_off_and_goes_on_where_a_run_resumes(capfd):
    engine = Engine(lambda engine, batch: None)
    BagProgressBar("evaluating", enabled=False).attach(engine)
    engine.run(range(3))
    assert capfd.readouterr().err == ""
    engine = Engine(lambda engine, batch: None)
    BagProgressBar("evaluating").attach(engine)
    engine.run(range(3), max_epochs=1)
    engine.run(range(3), max_epochs=2)
    assert capfd.readouterr().err.rstrip().endswith("]")
