"""The stability recorder against NumPy, and that looking changes nothing."""

import math

import numpy as np
import pytest
import torch
from ignite.engine import Events

from bundle.errors import InputError
from bundle.training.handlers import GradientClip
from bundle.training.stability import StabilityRecorder

from .conftest import (
    make_bag,
    make_batch,
    make_evaluator,
    make_loss,
    make_network,
    make_trainer,
    weights_of,
)


def recorded(network, watched=(0, 1, 2), interval=1, max_norm=0.5, recorder=None, **arguments):
    """Metrics of each epoch of a run, the trainer and the recorder."""
    loss = make_loss()
    trainer = make_trainer(network, loss=loss, **arguments)
    clip = GradientClip(network, max_norm)
    evaluator = make_evaluator(network, [make_bag(i, num_slices=7) for i in watched])
    recorder = StabilityRecorder(loss, clip, evaluator, interval)
    history = []
    clip.attach(trainer)
    recorder.attach(trainer)
    trainer.add_event_handler(Events.EPOCH_COMPLETED, lambda e: history.append(dict(e.state.metrics)))
    trainer.run()
    return history, trainer, recorder


def batches_by_hand(network, batches, max_norm):
    """(NLL before the step, total, right ones, gradient norm) of each batch, with the steps of the run."""
    optimizer, loss, rows = torch.optim.SGD(network.parameters(), lr=0.1), make_loss(), []
    network.train()
    for cases in batches:
        batch = make_batch(*cases)
        output = network.explain(batch["image"], batch["mask"])
        total = loss(output, batch["label"], batch["mask"])
        p = output.logits.detach().softmax(-1).numpy()
        label = batch["label"].numpy()
        nll = -np.log(p[np.arange(len(label)), label]).mean()
        optimizer.zero_grad()
        total.backward()
        norm = torch.nn.utils.clip_grad_norm_(network.parameters(), max_norm)
        optimizer.step()
        rows.append((nll, float(total.detach()), int((p.argmax(1) == label).sum()), float(norm)))
    return rows


@pytest.mark.parametrize("max_norm", [0.3, 1.2])
def test_values_by_hand(max_norm):
    history, _, _ = recorded(make_network(), cases=6, batch_size=2, max_norm=max_norm)
    rows = batches_by_hand(make_network(), [(0, 1), (2, 3), (4, 5)], max_norm)
    nll, total, right, norms = map(np.array, zip(*rows, strict=True))
    expected = {
        "train_nll_mean": nll.mean(), "train_nll_var": nll.var(ddof=1), "train_nll_min": nll.min(),
        "train_nll_max": nll.max(), "train_loss": total.mean(), "train_accuracy": right.sum() / 6,
        "clipped_share": (norms > max_norm).mean(),
    }  # fmt: skip
    assert {name: history[0][name] for name in expected} == pytest.approx(expected, rel=1e-3)


def test_components_add_up_to_the_total():
    history, _, recorder = recorded(make_network(), cases=5, batch_size=2)
    row, loss = history[0], recorder.loss
    total = row["loss_bag"] + loss.instance_weight * row["loss_instance"]
    total += loss.lambda_entropy * row["loss_entropy"] + loss.lambda_confidence * row["loss_confidence"]
    assert row["train_loss"] == pytest.approx(total, rel=1e-5)


def test_an_incomplete_last_batch_is_left_out_of_the_nll_alone():
    history, _, recorder = recorded(make_network(), cases=5, batch_size=2)
    rows = batches_by_hand(make_network(), [(0, 1), (2, 3), (4,)], 0.5)
    full = np.array([row[0] for row in rows[:2]])
    assert history[0]["train_nll_mean"] == pytest.approx(full.mean(), rel=1e-5)
    assert history[0]["train_nll_max"] == pytest.approx(full.max(), rel=1e-5)
    assert recorder.batch_nll == pytest.approx(full.tolist(), rel=1e-5)
    by_bags = np.average([row[1] for row in rows], weights=[2, 2, 1])
    assert history[0]["train_loss"] == pytest.approx(by_bags, rel=1e-5)
    assert history[0]["train_accuracy"] == pytest.approx(sum(row[2] for row in rows) / 5)


def test_a_single_batch_has_no_variance():
    history, _, _ = recorded(make_network(), cases=1, batch_size=2)
    assert math.isnan(history[0]["train_nll_var"])
    assert history[0]["train_nll_min"] == history[0]["train_nll_max"] == history[0]["train_nll_mean"]


def test_epochs_are_measured_apart():
    history, _, _ = recorded(make_network(), cases=4, batch_size=2, max_epochs=2)
    rows = batches_by_hand(make_network(), [(0, 1), (2, 3)] * 2, 0.5)
    assert history[1]["train_nll_mean"] == pytest.approx(np.mean([row[0] for row in rows[2:]]), rel=1e-5)


def looked_at(network, watched):
    """Critical slice and attention of each case, by a plain look at it alone."""
    network.eval()
    found = {}
    for case in watched:
        bag = make_bag(case, num_slices=7)
        output = network.explain(bag["image"][None])
        critical = int(bag["slice_index"][int(output.scores[0, :, 0].argmax())])
        found[f"c{case}"] = critical, output.attention[0, :, 0].detach().numpy()
    return found


def critical_of(recorder):
    return {case: look.critical for case, look in recorder.seen.items()}


@pytest.mark.parametrize(
    ("constant", "nans"),
    [("instance_classifier.weight", ["flip_rate"]), ("query.0.weight", ["attention_drift"]), (None, [])],
)
def test_what_tells_no_slices_apart_does_not_count_as_steady(constant, nans):
    network = make_network()
    if constant is not None:
        with torch.no_grad():
            network.get_parameter(constant).zero_()
    _, trainer, recorder = recorded(network, watched=(0, 1, 2))
    trainer.state.metrics.clear()
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if name in (constant, "query.0.bias"):
                parameter.zero_()
    recorder(trainer)
    recorder(trainer)
    figures = trainer.state.metrics
    assert [name for name in ("flip_rate", "attention_drift") if math.isnan(figures[name])] == nans


def test_flip_rate_and_attention_drift():
    network, before = make_network(), {}
    loss = make_loss()
    trainer = make_trainer(network, loss=loss, max_epochs=4)
    clip = GradientClip(network, 0.5)
    watched = tuple(range(8))
    recorder = StabilityRecorder(loss, clip, make_evaluator(network, [make_bag(i, num_slices=7) for i in watched]))
    recorder.attach(trainer)
    expected, seen, drifts, expected_drifts = [], [], [], []

    def turn(engine):  # another scorer in some epochs
        if engine.state.epoch in (2, 4):
            with torch.no_grad():
                network.instance_classifier.weight.neg_()
                network.query[0].weight.mul_(3)

    def note(engine):
        seen.append(engine.state.metrics["flip_rate"])
        drifts.append(engine.state.metrics["attention_drift"])
        now = looked_at(network, watched)
        assert critical_of(recorder) == {case: critical for case, (critical, _) in now.items()}
        expected.append(np.mean([now[c][0] != before[c][0] for c in now]) if before else math.nan)
        moved = [0.5 * np.abs(now[c][1] - before[c][1]).sum() for c in before]
        expected_drifts.append(np.mean(moved) if moved else math.nan)
        before.update(now)

    trainer.add_event_handler(Events.EPOCH_STARTED, turn)
    trainer.add_event_handler(Events.EPOCH_COMPLETED, note)
    trainer.run()
    assert seen == pytest.approx(expected, nan_ok=True)
    assert math.isnan(seen[0])
    assert seen[1] > 0.5
    assert drifts == pytest.approx(expected_drifts, nan_ok=True, rel=1e-4)
    assert 0 < drifts[2] < drifts[1] < 1


def test_accuracy_of_the_watched_cases_is_in_evaluation_mode():
    network = make_network()
    history, _, _ = recorded(network, watched=range(6))
    network.eval()
    bags = [make_bag(i, num_slices=7) for i in range(6)]
    right = [int(network(bag["image"][None]).argmax()) == bag["label"] for bag in bags]
    assert history[-1]["train_eval_accuracy"] == pytest.approx(np.mean(right))


def test_interval():
    history, _, recorder = recorded(make_network(), interval=2, max_epochs=5)
    assert [math.isnan(row["train_eval_accuracy"]) for row in history] == [True, False, True, False, True]
    assert [math.isnan(row["flip_rate"]) for row in history] == [True, True, True, False, True]
    history, _, recorder = recorded(make_network(), interval=0)
    assert math.isnan(history[0]["train_eval_accuracy"])
    assert recorder.seen == {}
    with pytest.raises(InputError, match="stability_interval"):
        recorded(make_network(), interval=-1)


def test_looking_changes_neither_random_numbers_nor_weights():
    results = []
    for interval in (0, 1):
        network = make_network()
        network.value[0].p = 0.5  # dropout draws from the global generator
        torch.manual_seed(3)
        recorded(network, interval=interval, max_epochs=3)
        results.append((weights_of(network), torch.get_rng_state()))
    (first, first_state), (second, second_state) = results
    assert torch.equal(first_state, second_state)
    for name in first:
        assert torch.equal(first[name], second[name]), name


def test_state_round_trip(tmp_path):
    _, _, recorder = recorded(make_network())
    _, _, other = recorded(make_network(), interval=0)
    assert recorder.seen
    torch.save(recorder.state_dict(), tmp_path / "state.pt")
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert critical_of(other) == critical_of(recorder)
    for case, look in recorder.seen.items():
        assert torch.equal(other.seen[case].attention, look.attention)


def test_a_case_with_another_number_of_slices_than_before_is_left_out():
    _, trainer, recorder = recorded(make_network(), watched=(0, 1, 2))
    recorder.seen["c1"] = recorder.seen["c1"]._replace(attention=torch.ones(3) / 3, critical=-1)
    recorder(trainer)
    assert trainer.state.metrics["flip_rate"] == 0
    assert trainer.state.metrics["attention_drift"] == pytest.approx(0, abs=1e-6)


def test_no_step_has_no_clipped_share():
    network = make_network()
    loss, clip = make_loss(), GradientClip(network, 1.0)
    trainer = make_trainer(network, loss=loss)
    recorder = StabilityRecorder(loss, clip, make_evaluator(network, []), 0)
    recorder.attach(trainer)  # the clip is not attached, so it counts nothing
    trainer.run()
    assert math.isnan(trainer.state.metrics["clipped_share"])
