"""Best model, early stop, random state and checkpoints; what is damaged, changed or of another kind."""

import logging
import math
import os
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from ignite.engine import Events
from torch import nn

import bundle.weights
from bundle.errors import InputError
from bundle.model.encoder import with_norm
from bundle.recipe import Recipe
from bundle.training.averaging import AverageWeights, ReturnWeights
from bundle.training.checkpoint import BestModel, Checkpoint, EarlyStop, RandomState
from bundle.training.handlers import AnnealTemperature
from bundle.training.log import EpochLog
from bundle.training.schedules import ExponentialTemperature, warmup_cosine
from bundle.weights import load_network, previous_of, read_checkpoint, save_atomically

from .conftest import Encoder, counting_engine, fake_engine, make_network, make_trainer, weights_of

RECIPE = Recipe({"class_names": ["a", "b"], "threshold": 0.5})


def best_of(history, folder, metric="val_auc", anneal=None, patience=0, max_epochs=None):
    """(best model, epochs run) of a run whose validation metric has this history; None = not validated."""
    network = make_network()
    trainer, evaluator = counting_engine(), counting_engine()

    def validate(engine):
        with torch.no_grad():
            network.bag_classifier.bias.fill_(engine.state.epoch)  # so that the weights tell their epoch
        value = history[engine.state.epoch - 1]
        if value is not None:
            evaluator.state.epoch = engine.state.epoch
            evaluator.state.metrics = {metric: value}

    trainer.add_event_handler(Events.EPOCH_COMPLETED, validate)
    best = BestModel(network, RECIPE, folder / "model.pt", evaluator, metric, anneal)
    best.attach(trainer)
    EarlyStop(best, patience).attach(trainer)
    trainer.run([0], max_epochs=max_epochs or len(history))
    return best, trainer.state.epoch


def saved_epoch(folder):
    content = read_checkpoint(folder / "model.pt")
    assert float(content["model"]["bag_classifier.bias"][0]) == content["epoch"]
    return content["epoch"]


NAN = math.nan


@pytest.mark.parametrize(
    ("history", "expected"),
    [
        ([0.5, 0.9, 0.7], 2),
        ([0.5, 0.5, 0.5], 1),  # the first of equals
        ([NAN, 0.4, NAN], 2),
        ([0.3, NAN, 0.2], 1),
        ([None, 0.2, None], 2),
        ([NAN, NAN, NAN], 3),  # the last one, for want of a better
        ([0.0, -1.0, None], 1),
    ],
)
def test_best_epoch(tmp_path, history, expected):
    best, _ = best_of(history, tmp_path)
    assert saved_epoch(tmp_path) == best.epoch == expected


@pytest.mark.parametrize("metric", ["val_nll", "val_brier", "val_ece"])
def test_lower_is_better_where_it_is(tmp_path, metric):
    best, _ = best_of([0.5, 0.2, 0.4, NAN], tmp_path, metric)
    assert (best.epoch, best.value) == (2, 0.2)
    assert saved_epoch(tmp_path) == 2


def test_epochs_count_once_the_temperature_is_at_its_end(tmp_path):
    anneal = AnnealTemperature(make_network(), ExponentialTemperature(5.0, 0.5, 0.6))  # at the end from epoch 4
    best, _ = best_of([0.9, 0.9, 0.9, 0.5, 0.6], tmp_path, anneal=anneal)
    assert saved_epoch(tmp_path) == best.epoch == 5
    best, _ = best_of([0.9, 0.9, 0.9, 0.5, 0.6], tmp_path / "any")
    assert saved_epoch(tmp_path / "any") == 1


def test_no_defined_metric_warns(tmp_path, caplog):
    best_of([NAN, NAN], tmp_path)
    assert "no epoch had a defined val_auc to choose by" in caplog.text


def test_a_stop_keeps_the_average_that_was_judged(tmp_path):
    """With no defined metric, early stopping saves what validation saw: averaged weights, lent for the epoch's end."""
    network, average_of = make_network(), {}
    trainer, evaluator = counting_engine(), counting_engine()
    average = AverageWeights(network, 0.5)

    @trainer.on(Events.ITERATION_COMPLETED)
    def step(engine):
        with torch.no_grad():
            network.bag_classifier.bias.fill_(engine.state.epoch)

    average.attach(trainer)

    @trainer.on(Events.EPOCH_COMPLETED)
    def validate(engine):
        average_of[engine.state.epoch] = network.bag_classifier.bias[0].item()
        evaluator.state.epoch, evaluator.state.metrics = engine.state.epoch, {"val_auc": NAN}

    best = BestModel(network, RECIPE, tmp_path / "model.pt", evaluator, "val_auc")
    best.attach(trainer)
    EarlyStop(best, 3).attach(trainer)
    ReturnWeights(average).attach(trainer)
    trainer.run([0], max_epochs=9)
    saved = read_checkpoint(tmp_path / "model.pt")
    assert saved["epoch"] == 3
    assert saved["model"]["bag_classifier.bias"][0].item() == average_of[3] != 3


def test_a_metric_that_validation_does_not_give_is_named(tmp_path):
    evaluator = counting_engine()
    evaluator.state.epoch, evaluator.state.metrics = 1, {"val_accuracy": 0.5}
    best = BestModel(make_network(), RECIPE, tmp_path / "model.pt", evaluator, "val_auc")
    with pytest.raises(InputError, match="best_metric: validation gives no 'val_auc', only val_accuracy"):
        best(fake_engine(1))


def test_weights_carry_their_meaning(tmp_path):
    best, _ = best_of([0.25], tmp_path)
    content = read_checkpoint(tmp_path / "model.pt")
    assert (content["metric"], content["value"], content["recipe_hash"]) == ("val_auc", 0.25, RECIPE.hash)
    assert Recipe.load(tmp_path / "model.pt").config == RECIPE.config
    network = load_network(make_network(seed=5), tmp_path / "model.pt")
    for name, value in best.network.state_dict().items():
        assert torch.equal(network.state_dict()[name], value)


@pytest.mark.parametrize(
    ("history", "patience", "last"),
    [
        ([0.5, 0.4, 0.3, 0.9], 2, 3),
        ([0.5, 0.4, 0.6, 0.5, 0.5, 0.9], 2, 5),
        ([0.5, None, 0.4, None, 0.3, 0.9], 2, 5),  # epochs without validation do not count
        ([0.5, NAN, NAN, 0.9], 2, 3),
        ([0.5, 0.4, 0.3, 0.2], 0, 4),  # never
    ],
)
def test_early_stop(tmp_path, history, patience, last):
    assert best_of(history, tmp_path, patience=patience)[1] == last


def test_early_stop_waits_for_the_temperature(tmp_path):
    anneal = AnnealTemperature(make_network(), ExponentialTemperature(5.0, 0.5, 0.6))  # at the end from epoch 7
    _, last = best_of([0.9 - 0.01 * e for e in range(10)], tmp_path, anneal=anneal, patience=2)
    assert last == 9  # 7 is the best, 8 and 9 are not
    with pytest.raises(InputError, match="early_stop_patience"):
        EarlyStop(None, -1)  # type: ignore[arg-type]


def test_best_models_state(tmp_path):
    best, _ = best_of([0.5, 0.9, 0.8, 0.7], tmp_path)
    other, _ = best_of([0.1], tmp_path / "other")
    other.load_state_dict(best.state_dict())
    assert (other.value, other.epoch, other.stale) == (0.9, 2, 2)
    losses, _ = best_of([0.3], tmp_path / "losses", "val_nll")
    losses.load_state_dict(best.state_dict())  # an AUC says nothing of an NLL
    assert (losses.value, losses.epoch) == (0.3, 1)


def draws():
    return torch.rand(3).tolist(), np.random.rand(3).tolist(), np.random.randn(), [random.random() for _ in range(3)]


def test_random_state_round_trip(tmp_path):
    torch.manual_seed(1)
    np.random.seed(2)
    random.seed(3)
    np.random.randn()  # leaves a cached second number
    torch.save(RandomState().state_dict(), tmp_path / "state.pt")
    expected = draws()
    draws()
    RandomState().load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert draws() == expected


# --- whole runs ---


class Stop(Exception):
    """A kill."""


class Run:
    """A trainer with everything that a checkpoint holds."""

    def __init__(self, folder, settings=None, max_epochs=4, lr=0.1, kill_at=None, network=None, warmup=1, **arguments):
        self.network = network or make_network()
        self.network.value[0].p = 0.3  # dropout draws from the global generator
        self.optimizer = torch.optim.AdamW(self.network.parameters(), lr=lr)
        self.trainer = make_trainer(self.network, cases=6, max_epochs=max_epochs, optimizer=self.optimizer)
        self.trainer.logger.disabled = True
        self.schedule = warmup_cosine(self.optimizer, warmup, max_epochs, 3)
        self.trainer.add_event_handler(Events.ITERATION_COMPLETED, lambda: self.schedule.step())
        self.log = EpochLog(folder, self.optimizer, [], tensorboard=False)
        self.log.attach(self.trainer)
        objects = {"model": self.network, "optimizer": self.optimizer, "lr_scheduler": self.schedule, "nothing": None}
        settings = {"lr": str(lr), "max_epochs": str(max_epochs), **(settings or {})}
        self.checkpoint = Checkpoint(objects, folder / "checkpoint.pt", settings, self.log, **arguments)
        self.checkpoint.attach(self.trainer)
        if kill_at is not None:
            self.trainer.add_event_handler(Events.ITERATION_COMPLETED(once=kill_at), self.kill)

    def kill(self):
        raise Stop

    def __call__(self):
        self.checkpoint.restore(self.trainer)
        try:
            self.trainer.run()
        except Stop:
            return self
        return self


def assert_same(first, second):
    for name, value in first.network.state_dict().items():
        assert torch.equal(value, second.network.state_dict()[name]), name


@pytest.fixture
def whole(tmp_path):
    """A run that nobody disturbed."""
    torch.manual_seed(7)
    return Run(tmp_path / "whole")()


def started(folder, kill_at=None, **arguments):
    run = Run(folder, kill_at=kill_at, **arguments)
    torch.manual_seed(7)
    return run()


@pytest.mark.parametrize("kill_at", [1, 4, 6, 11])
def test_a_killed_run_ends_like_one_that_was_not(tmp_path, kill_at):
    undisturbed = started(tmp_path / "whole")
    started(tmp_path / "run", kill_at=kill_at)
    resumed = started(tmp_path / "run")
    assert_same(resumed, undisturbed)
    assert resumed.schedule.state_dict() == undisturbed.schedule.state_dict()
    assert (tmp_path / "run" / "epochs.csv").read_text() == (tmp_path / "whole" / "epochs.csv").read_text()


def test_a_checkpoint_holds_tensors_and_plain_values_alone(tmp_path):
    started(tmp_path)
    content = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert set(content) == {"model", "optimizer", "lr_scheduler", "random", "trainer", "settings"}
    assert content["trainer"] == {"epoch": 4, "iteration": 12, "finished": True}
    assert torch.load(tmp_path / "checkpoint.previous.pt", weights_only=True)["trainer"]["finished"] is False


def test_the_loss_scaler_is_saved_and_restored(tmp_path):
    first, second = (Run(tmp_path, max_epochs=1, warmup=0) for _ in range(2))
    first.trainer.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**7)
    first()
    second.trainer.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    second.checkpoint.restore(second.trainer)
    assert second.trainer.scaler.get_scale() == 2.0**7


def test_a_finished_run_is_left_alone(tmp_path):
    started(tmp_path)
    before = (tmp_path / "checkpoint.pt").read_bytes()
    again = started(tmp_path)
    assert again.trainer.state.epoch == 4
    assert (tmp_path / "checkpoint.pt").read_bytes() == before


@pytest.mark.parametrize("killed", [False, True])
def test_a_run_that_stopped_early_is_over_also_when_killed_on_its_way_out(tmp_path, killed):
    run = Run(tmp_path)

    def stop(engine):
        if engine.state.epoch == 2:
            engine.terminate()

    # Before the checkpoint, as in the config.
    run.trainer._event_handlers[Events.EPOCH_COMPLETED].insert(0, (stop, (run.trainer,), {}))
    if killed:
        run.trainer._event_handlers[Events.COMPLETED].insert(0, (run.kill, (), {}))
    run()
    again = Run(tmp_path)()
    assert again.trainer.state.epoch == again.trainer.state.max_epochs == 2
    assert_same(again, run)


def test_changed_settings_are_refused_by_name(tmp_path):
    started(tmp_path, kill_at=6, settings={"seed": "0"})
    with pytest.raises(InputError, match="holds a run with other settings") as error:
        Run(tmp_path, {"amp": "true"}, lr=0.2)()
    told = str(error.value)
    assert "lr 0.1 → 0.2" in told
    assert "amp absent → true" in told
    assert "seed 0 → absent" in told
    assert "max_epochs" not in told
    assert "resume_changed" in told


def test_a_change_takes_effect_when_it_is_allowed(tmp_path):
    started(tmp_path, kill_at=10)  # after three of four epochs
    run = Run(tmp_path, lr=0.05, max_epochs=8, warmup=2, resume_changed=True)
    run.checkpoint.restore(run.trainer)
    assert (run.trainer.state.epoch, run.trainer.state.max_epochs) == (3, 8)
    fresh = Run(tmp_path / "fresh", lr=0.05, max_epochs=8, warmup=2)
    for _ in range(9):
        fresh.optimizer.step()
        fresh.schedule.step()
    assert run.optimizer.param_groups[0]["lr"] == fresh.optimizer.param_groups[0]["lr"]
    assert run.schedule.t_total == 24
    moments = run.optimizer.state_dict()["state"]
    assert int(moments[0]["step"]) == 9  # what was learnt is kept
    run.trainer.run()
    assert run.trainer.state.epoch == 8
    assert run.optimizer.param_groups[0]["lr"] == pytest.approx(0, abs=1e-12)


def test_a_finished_run_can_be_made_longer(tmp_path):
    started(tmp_path)
    longer = started(tmp_path, max_epochs=6, resume_changed=True)
    assert longer.trainer.state.epoch == 6


def test_a_folder_with_a_run_is_not_overwritten(tmp_path):
    started(tmp_path, kill_at=6)
    before = (tmp_path / "checkpoint.pt").read_bytes()
    with pytest.raises(InputError, match="already holds a run: choose another output_dir, delete it, or set resume"):
        Run(tmp_path, resume=False)()
    assert (tmp_path / "checkpoint.pt").read_bytes() == before
    Run(tmp_path / "other", resume=False)()  # an empty folder is fine


def test_another_network_or_kind_of_run_is_one_sentence(tmp_path):
    started(tmp_path, kill_at=6)
    other = make_network(encoder=with_norm(Encoder(nn.BatchNorm2d(4)), "group", 2))
    with pytest.raises(InputError, match=r"'model' in .* fits another network: choose another output_dir"):
        Run(tmp_path, network=other, resume_changed=True)()
    run = Run(tmp_path)
    run.checkpoint.objects["stability"] = RandomState()
    with pytest.raises(InputError, match="has no 'stability'"):
        run()


@pytest.mark.parametrize("damage", ["torn", "empty", "text"])
def test_a_damaged_checkpoint_falls_back_to_the_one_before(tmp_path, caplog, damage):
    undisturbed = started(tmp_path / "whole")
    started(tmp_path / "run", kill_at=10)
    path = tmp_path / "run" / "checkpoint.pt"
    whole = path.read_bytes()
    path.write_bytes({"torn": whole[: len(whole) // 2], "empty": b"", "text": b"not a checkpoint"}[damage])
    with caplog.at_level(logging.INFO):
        resumed = started(tmp_path / "run")
    assert "is damaged; going on from the checkpoint before it" in caplog.text
    assert "going on after epoch 2" in caplog.text
    assert_same(resumed, undisturbed)


def test_two_damaged_checkpoints_are_one_sentence(tmp_path):
    started(tmp_path, kill_at=10)
    for name in ("checkpoint.pt", "checkpoint.previous.pt"):
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(InputError, match="is no weights file, is damaged"):
        Run(tmp_path)()


# --- saving ---


def content(number: int) -> dict[str, object]:
    return {"model": {"w": torch.tensor(float(number))}}


def number_in(path: Path) -> float:
    return float(read_checkpoint(path)["model"]["w"])


@pytest.mark.parametrize("moment", ["torch.save", "os.fsync", "os.replace", "os.link"])
def test_a_save_that_fails_leaves_the_old_files(tmp_path, monkeypatch, moment):
    path = tmp_path / "model.pt"
    save_atomically(content(1), path, keep_previous=True)
    save_atomically(content(2), path, keep_previous=True)

    def fail(*_, **__):
        raise Stop

    module, _, name = moment.partition(".")
    monkeypatch.setattr({"torch": torch, "os": os}[module], name, fail)
    with pytest.raises(Stop):
        save_atomically(content(3), path, keep_previous=True)
    monkeypatch.undo()
    assert number_in(path) == 2
    assert number_in(previous_of(path)) == 1
    assert not list(tmp_path.glob(".part-*"))


def test_a_kill_in_the_middle_of_writing_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "model.pt"
    save_atomically(content(1), path)

    def torn(what, file):
        file.write(b"half of it")
        raise Stop

    monkeypatch.setattr(torch, "save", torn)
    with pytest.raises(Stop):
        save_atomically(content(2), path)
    assert number_in(path) == 1
    assert [p.name for p in tmp_path.iterdir()] == ["model.pt"]


def test_previous_is_the_file_before(tmp_path):
    path = tmp_path / "checkpoint.pt"
    assert previous_of(path).name == "checkpoint.previous.pt"
    for number in (1, 2, 3):
        save_atomically(content(number), path, keep_previous=True)
    assert (number_in(path), number_in(previous_of(path))) == (3, 2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint.previous.pt", "checkpoint.pt"]


def test_previous_is_kept_without_hard_links_too(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError("this file system has no hard links")

    monkeypatch.setattr(bundle.weights.os, "link", refuse)
    for number in (1, 2):
        save_atomically(content(number), tmp_path / "c.pt", keep_previous=True)
    assert (number_in(tmp_path / "c.pt"), number_in(tmp_path / "c.previous.pt")) == (2, 1)


def test_weights_of_a_run_are_not_touched_by_looking(tmp_path, whole):
    before = weights_of(whole.network)
    again = Run(tmp_path / "whole")
    again.checkpoint.restore(again.trainer)
    assert all(torch.equal(before[name], value) for name, value in again.network.state_dict().items())
