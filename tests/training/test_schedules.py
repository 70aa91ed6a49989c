"""Schedules: histories written out by hand, ends where they say, and groups of an optimiser."""

import math

import pytest
import torch

from bundle.errors import InputError
from bundle.training.schedules import (
    CosineTemperature,
    ExponentialTemperature,
    LinearWeight,
    PrescribedTemperature,
    TemperatureSchedule,
    parameter_groups,
    warmup_cosine,
)

from .conftest import make_network

ALL = [PrescribedTemperature, ExponentialTemperature, CosineTemperature]


def history(schedule, max_epochs):
    return [schedule(epoch, max_epochs) for epoch in range(max_epochs)]


@pytest.mark.parametrize(
    ("max_epochs", "expected"),
    [
        (10, [10, 9, 8, 7, 6, 5, 4, 3, 2, 1]),
        (5, [10, 8, 6, 4, 1]),  # the formula gives 2 in the last epoch, which has the end instead
        (20, [10, 9.5, 9, 8.5, 8, 7.5, 7, 6.5, 6, 5.5, 5, 4.5, 4, 3.5, 3, 2.5, 2, 1.5, 1, 1]),
        (1, [1]),
    ],
)
def test_prescribed_history(max_epochs, expected):
    assert history(PrescribedTemperature(10.0, 1.0), max_epochs) == pytest.approx(expected)


def test_prescribed_reaches_its_end_where_the_formula_does():
    schedule = PrescribedTemperature(10.0, 1.0)
    temperatures = history(schedule, 60)
    assert schedule.last_step(60) == 54
    assert temperatures[53] == pytest.approx(10 * (1 - 53 / 60))
    assert temperatures[54:] == [1.0] * 6
    assert temperatures[:54] == pytest.approx([max(1, 10 * (1 - e / 60)) for e in range(54)])


def test_rounding_does_not_put_the_end_off_by_an_epoch():
    assert 8 * (1 - 0.3 / 0.4) > 2  # in floating point
    assert PrescribedTemperature(0.4, 0.3).last_step(8) == 2


def test_exponential_and_cosine_history():
    assert history(ExponentialTemperature(8.0, 1.0, 0.6), 5) == pytest.approx([8, 4, 2, 1, 1])
    assert history(CosineTemperature(5.0, 1.0, 0.8), 5) == pytest.approx([5, 3 + math.sqrt(2), 3, 3 - math.sqrt(2), 1])


@pytest.mark.parametrize("kind", ALL)
@pytest.mark.parametrize("max_epochs", [2, 3, 7, 18, 60, 61])
@pytest.mark.parametrize(("start", "end"), [(10.0, 1.0), (5.0, 0.5), (2.0, 2.0), (3.0, 0.7)])
def test_a_schedule_starts_falls_and_ends_exactly(kind, max_epochs, start, end):
    schedule = kind(start, end)
    temperatures = history(schedule, max_epochs)
    assert temperatures[0] == start or schedule.last_step(max_epochs) == 0
    assert temperatures == sorted(temperatures, reverse=True)
    last = schedule.last_step(max_epochs)
    assert 0 <= last < max_epochs
    assert all(value == end for value in temperatures[last:])
    assert all(value > end for value in temperatures[:last])


@pytest.mark.parametrize("kind", [ExponentialTemperature, CosineTemperature])
@pytest.mark.parametrize(("fraction", "last"), [(0.6, 12), (0.5, 10), (1.0, 19), (0.01, 0)])
def test_the_end_is_reached_at_the_fraction(kind, fraction, last):
    schedule = kind(5.0, 0.5, fraction)
    temperatures = history(schedule, 20)
    assert temperatures.index(0.5) == schedule.last_step(20) == last


@pytest.mark.parametrize("kind", ALL)
def test_a_run_of_one_epoch_has_the_end(kind):
    assert history(kind(5.0, 0.5), 1) == [0.5]


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: PrescribedTemperature(1.0, 2.0), "temperature_end <= temperature_start, not 2.0 and 1.0"),
        (lambda: PrescribedTemperature(1.0, 0.0), "0 < temperature_end"),
        (lambda: ExponentialTemperature(math.nan, 1.0), "temperature_end <= temperature_start"),
        (lambda: ExponentialTemperature(math.inf, 1.0), "temperature_end <= temperature_start"),
        (lambda: ExponentialTemperature(5.0, 1.0, 0.0), r"temperature_fraction must be in \(0, 1\], not 0.0"),
        (lambda: CosineTemperature(5.0, 1.0, 1.2), "temperature_fraction"),
        (lambda: LinearWeight(-0.1), "regularisation weight"),
        (lambda: LinearWeight(0.1, -0.1), "regularisation weight"),
        (lambda: LinearWeight(0.1, "1e-3"), "must be a number, 0 or more, not '1e-3'"),  # as PyYAML reads it
        (lambda: LinearWeight(math.nan), "regularisation weight"),
    ],
)
def test_impossible_schedules_are_refused(make, sentence):
    with pytest.raises(InputError, match=sentence):
        make()


def test_the_base_class_is_no_schedule():
    with pytest.raises(TypeError, match="use a subclass"):
        TemperatureSchedule(2.0, 1.0)(0, 3)


def test_linear_weight():
    assert history(LinearWeight(0.0, 1.0), 5) == pytest.approx([0, 0.25, 0.5, 0.75, 1])
    assert history(LinearWeight(0.02, 0.0), 3) == pytest.approx([0.02, 0.01, 0])
    assert history(LinearWeight(0.01), 4) == [0.01] * 4
    assert history(LinearWeight(0.01, 0.5), 1) == [0.01]


def test_parameter_groups_hold_every_parameter_once():
    network = make_network()
    network.encoder[0].bias.requires_grad_(False)
    groups = parameter_groups(network, 1e-4, 2e-4)
    ids = [id(p) for group in groups for p in group["params"]]
    assert len(ids) == len(set(ids))
    assert set(ids) == {id(p) for p in network.parameters() if p.requires_grad}
    assert {id(p) for p in groups[0]["params"]} <= {id(p) for p in network.encoder.parameters()}
    assert [group["lr"] for group in groups] == [1e-4, 2e-4]


def rates(warmup_epochs, max_epochs, steps):
    parameters = [torch.nn.Parameter(torch.zeros(1)) for _ in range(2)]
    optimizer = torch.optim.SGD([{"params": parameters[:1], "lr": 1.0}, {"params": parameters[1:], "lr": 2.0}])
    schedule = warmup_cosine(optimizer, warmup_epochs, max_epochs, steps)
    history = []
    for _ in range(max_epochs * steps):
        history.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        schedule.step()
    return history, [group["lr"] for group in optimizer.param_groups]


def test_warmup_cosine_by_hand():
    history, after = rates(1, 3, 4)
    first = [0.01, 0.01 + 0.99 / 4, 0.01 + 0.99 / 2, 0.01 + 0.99 * 3 / 4]
    cosine = [0.5 * (1 + math.cos(math.pi * step / 8)) for step in range(8)]
    assert [rate for rate, _ in history] == pytest.approx(first + cosine)
    assert [rate for _, rate in history] == pytest.approx([2 * rate for rate in first + cosine])
    assert after == pytest.approx([0, 0], abs=1e-12)


def test_no_warmup_starts_at_the_peak():
    history, _ = rates(0, 2, 3)
    assert history[0] == [1.0, 2.0]


@pytest.mark.parametrize("warmup", [-1, 3, 4])
def test_a_warmup_as_long_as_the_run_is_refused(warmup):
    with pytest.raises(InputError, match=rf"warmup_epochs must be 0 or more and below max_epochs \(3\), not {warmup}"):
        rates(warmup, 3, 1)
