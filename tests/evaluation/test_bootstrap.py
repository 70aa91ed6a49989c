from __future__ import annotations

import math
import time

import numpy as np
import pytest

from bundle.errors import InputError
from bundle.evaluation.bootstrap import (
    bootstrap_intervals,
    mean_interval,
    patient_weights,
    percentile_interval,
    weighted_scores,
)
from bundle.evaluation.scores import SCORES, all_scores, checked_predictions, score


def predictions(seed: int, cases: int, num_classes: int, decimals: int) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    labels = generator.integers(0, num_classes, cases)
    raw = generator.gamma(1.0, size=(cases, num_classes)) + np.eye(num_classes)[labels] * 0.5
    probabilities = np.round(raw / raw.sum(1, keepdims=True), decimals)
    probabilities[:, 0] = 1 - probabilities[:, 1:].sum(1)
    return labels, np.clip(probabilities, 0, 1)


@pytest.mark.parametrize(("num_classes", "cases", "decimals"), [(2, 40, 1), (2, 9, 6), (3, 30, 2), (4, 7, 1)])
def test_weighted_scores_equal_scores_of_the_repeated_cases(num_classes: int, cases: int, decimals: int) -> None:
    labels, probabilities = predictions(num_classes, cases, num_classes, decimals)
    y, p, predicted = checked_predictions(labels, probabilities, np.roll(probabilities.argmax(1), 1))
    names = [f"c{k}" for k in range(num_classes)]
    weights = patient_weights([f"p{i}" for i in range(cases)], 25, seed=7)
    weights[0] = 1.0  # the cases as they are
    weights[1] = y == y[0]  # one class only
    quick = weighted_scores(y, p, predicted, weights)
    for r, row in enumerate(weights.astype(int)):
        drawn = np.repeat(np.arange(cases), row)
        slow = all_scores(y[drawn], p[drawn], names, predicted[drawn])
        for name in SCORES:
            # Absolute; ece through float32.
            tolerance = 1e-6 if name == "ece" else 1e-10
            assert quick[name][r] == pytest.approx(slow[name], abs=tolerance, nan_ok=True), (name, r)
        for k, name in enumerate(names):
            assert quick[f"f1_of_class_{k}"][r] == pytest.approx(slow[f"f1_{name}"], abs=1e-12, nan_ok=True)


def test_intervals_equal_a_slow_loop_over_patients() -> None:
    labels, p = predictions(5, 24, 2, 2)
    patients = [f"p{i // 2}" for i in range(24)]
    resamples, seed, level = 60, 3, 0.9
    quick = bootstrap_intervals(
        labels, p, patients, class_names=["a", "b"], resamples=resamples, level=level, seed=seed
    )
    unique = sorted(set(patients))
    counts = np.random.default_rng(seed).multinomial(len(unique), [1 / len(unique)] * len(unique), size=resamples)
    values: dict[str, list[float]] = {name: [] for name in quick}
    for row in counts:
        drawn = [
            i for q, times in zip(unique, row, strict=True) for _ in range(times) for i in range(24) if patients[i] == q
        ]
        slow = all_scores(labels[drawn], p[drawn], ["a", "b"])
        for name in values:
            values[name].append(slow[name])
    assert set(quick) == {*SCORES, "f1_a", "f1_b"}
    for name, (low, high, undefined) in quick.items():
        assert undefined == sum(map(math.isnan, values[name]))
        expected = np.nanpercentile(values[name], [5, 95])
        assert [low, high] == pytest.approx(list(expected), abs=1e-6), name


def test_all_cases_of_a_patient_are_drawn_together() -> None:
    patients = ["a", "b", "a", "c", "b", "a"]
    weights = patient_weights(patients, 50, seed=0)
    assert weights.shape == (50, 6)
    for name in "abc":
        columns = weights[:, [i for i, p in enumerate(patients) if p == name]]
        assert (columns == columns[:, :1]).all()
    assert (weights[:, [0, 1, 3]].sum(1) == 3).all()  # as many patients as there are
    assert len(np.unique(weights, axis=0)) > 5


def test_patients_widen_the_interval_of_dependent_cases() -> None:
    labels, p = predictions(0, 30, 2, 3)
    many, probabilities = np.tile(labels, 8), np.tile(p, (8, 1))
    by_patient = bootstrap_intervals(many, probabilities, [f"p{i % 30}" for i in range(240)], resamples=300)
    by_case = bootstrap_intervals(many, probabilities, [f"p{i}" for i in range(240)], resamples=300)
    width = [i["accuracy"].high - i["accuracy"].low for i in (by_patient, by_case)]
    assert width[0] > 2 * width[1]


def test_interval_holds_the_value_and_is_the_same_whatever_the_order() -> None:
    labels, p = predictions(1, 60, 2, 4)
    patients = [f"p{i}" for i in range(60)]
    intervals = bootstrap_intervals(labels, p, patients, resamples=200, seed=4)
    for name in ("auc", "accuracy", "nll", "brier"):
        assert intervals[name].low < score(name, labels, p) < intervals[name].high
    order = np.random.default_rng(0).permutation(60)
    shuffled = bootstrap_intervals(labels[order], p[order], [patients[i] for i in order], resamples=200, seed=4)
    for name, interval in intervals.items():
        assert list(shuffled[name]) == pytest.approx(list(interval), abs=1e-9)
    assert bootstrap_intervals(labels, p, patients, resamples=200, seed=5)["auc"] != intervals["auc"]


def test_undefined_resamples_are_left_out_and_counted() -> None:
    # One positive patient of four: it is missing from (3/4)^4 = 32% of the resamples.
    p = np.array([[0.9, 0.1], [0.8, 0.2], [0.7, 0.3], [0.2, 0.8]])
    intervals = bootstrap_intervals([0, 0, 0, 1], p, list("abcd"), resamples=1000)
    assert 250 < intervals["auc"].undefined < 390
    assert intervals["auc"][:2] == (1.0, 1.0)
    assert intervals["accuracy"].undefined == 0


def test_one_class_gives_nan_ends() -> None:
    intervals = bootstrap_intervals([1, 1], [[0.5, 0.5]] * 2, ["a", "b"], resamples=20)
    assert math.isnan(intervals["auc"].low)
    assert intervals["auc"].undefined == 20
    assert bootstrap_intervals([], np.zeros((0, 2)), [], resamples=5)["nll"].undefined == 5


def test_chunks_do_not_change_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    labels, p = predictions(2, 20, 3, 2)
    patients = [str(i) for i in range(20)]
    whole = bootstrap_intervals(labels, p, patients, resamples=37)
    monkeypatch.setattr("bundle.evaluation.bootstrap.ELEMENTS_AT_ONCE", 100)
    for name, interval in bootstrap_intervals(labels, p, patients, resamples=37).items():
        assert list(interval) == pytest.approx(list(whole[name]), abs=1e-12, nan_ok=True)


def test_a_thousand_resamples_take_seconds() -> None:
    labels, p = predictions(0, 200, 2, 6)
    start = time.process_time()
    bootstrap_intervals(labels, p, [f"p{i}" for i in range(200)], resamples=1000)
    assert time.process_time() - start < 5


def test_mean_interval_against_a_loop() -> None:
    values, patients = np.array([1.0, 0.0, 1.0, 1.0, 0.0]), ["a", "a", "b", "c", "d"]
    draws = patient_weights(patients, 80, seed=2).astype(int)
    means = [np.mean(np.repeat(values, row)) for row in draws]
    interval = mean_interval(values, patients, resamples=80, seed=2)
    assert interval[:2] == pytest.approx(tuple(np.percentile(means, [2.5, 97.5])))


@pytest.mark.parametrize("change", [{"level": 0.0}, {"level": 1.0}, {"resamples": 0}, {"class_names": ["a"]}])
def test_bad_settings_are_told(change: dict) -> None:
    with pytest.raises(InputError):
        bootstrap_intervals([0, 1], [[0.5, 0.5]] * 2, ["a", "b"], **{"resamples": 5, **change})


def test_patients_must_fit() -> None:
    with pytest.raises(InputError, match="3 patient identifiers"):
        bootstrap_intervals([0, 1], [[0.5, 0.5]] * 2, ["a", "b", "c"])
    with pytest.raises(InputError, match="patient identifiers"):
        mean_interval([1.0], ["a", "b"])


def test_percentiles_ignore_nan() -> None:
    assert percentile_interval([np.nan, *range(101)], 0.9) == pytest.approx((5.0, 95.0, 1))
