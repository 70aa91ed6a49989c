"""Confidence, risk over coverage and the limit of abstention against loops."""

import numpy as np
import pytest

from bundle.errors import InputError
from bundle.evaluation.abstention import (
    abstention_limit,
    aurc,
    aurc_interval,
    confidence,
    losses,
    predicted_classes,
    risk_at,
    risk_coverage,
)
from bundle.evaluation.bootstrap import patient_weights


def answers(seed, num_cases=40, decimals=8):
    """Whether each answer is wrong, and its confidence; the less sure are wrong more often."""
    rng = np.random.default_rng(seed)
    sure = np.round(0.5 + 0.5 * rng.random(num_cases), decimals)
    return rng.random(num_cases) > sure, sure


def two(positive):
    positive = np.asarray(positive, dtype=float)
    return np.stack([1 - positive, positive], 1)


# --- confidence ---


@pytest.mark.parametrize("threshold", [0.03, 0.3, 0.5, 0.8])
def test_confidence_is_least_at_the_operating_point_and_rises_with_the_distance_in_log_odds(threshold):
    positive = np.linspace(0.001, 0.999, 199)
    found = confidence(two(positive), threshold)
    gap = np.log(positive / (1 - positive)) - np.log(threshold / (1 - threshold))
    np.testing.assert_allclose(found, 1 / (1 + np.exp(-np.abs(gap))))
    np.testing.assert_array_equal(predicted_classes(two(positive), threshold) == 1, gap >= -1e-12)
    assert confidence(two([threshold]), threshold)[0] == pytest.approx(0.5)
    np.testing.assert_allclose(confidence(two([0.0, 1.0]), threshold), 1.0)


def test_without_an_operating_point_confidence_is_the_highest_probability():
    p = np.random.default_rng(0).dirichlet([1, 1, 1], 20)
    np.testing.assert_array_equal(confidence(p, 0.9), p.max(1))
    np.testing.assert_array_equal(predicted_classes(p, 0.9), p.argmax(1))
    np.testing.assert_allclose(confidence(p[:, :2] / p[:, :2].sum(1, keepdims=True)),
                               (p[:, :2] / p[:, :2].sum(1, keepdims=True)).max(1))  # fmt: skip


def test_confidence_is_what_the_other_answer_would_lose_as_a_share():
    """On calibrated cases: the expected loss of the answer is 1 - c of that of both answers."""
    threshold, positive = 0.2, np.linspace(0.01, 0.99, 50)
    answer = predicted_classes(two(positive), threshold)

    def expected(answers):
        right, wrong = (losses(np.full(50, label), answers, 2, threshold) for label in (1, 0))
        return positive * right + (1 - positive) * wrong

    both = expected(answer) + expected(1 - answer)
    np.testing.assert_allclose(1 - confidence(two(positive), threshold), expected(answer) / both)


def test_losses_weigh_errors_as_the_operating_point_does():
    labels, predictions = [0, 0, 1, 1], [0, 1, 0, 1]
    np.testing.assert_allclose(losses(labels, predictions, 2, 0.1), [0, 0.2, 1.8, 0])
    np.testing.assert_array_equal(losses(labels, predictions, 2), [0, 1, 1, 0])
    np.testing.assert_array_equal(losses([0, 1, 2], [2, 1, 1], 3, 0.1), [1, 0, 1])


def test_abstention_does_not_undo_the_sensitivity_of_a_low_operating_point():
    """Calibrated cases, few of them positive: by the higher probability the positive answers would go first."""
    rng = np.random.default_rng(0)
    positive = rng.beta(0.6, 2.4, 20_000)
    labels, threshold = rng.random(20_000) < positive, 0.1
    answer = predicted_classes(two(positive), threshold)

    def sensitivity(sure):
        kept = sure >= abstention_limit(sure, 0.8)
        return np.mean(answer[kept & labels])

    overall = np.mean(answer[labels])
    assert sensitivity(confidence(two(positive), threshold)) > overall > sensitivity(confidence(two(positive)))


# --- risk over coverage ---


@pytest.mark.parametrize("decimals", [1, 2, 8])
@pytest.mark.parametrize("seed", range(4))
def test_curve_and_area_are_loops(seed, decimals):
    wrong, sure = answers(seed, decimals=decimals)
    curve, area = risk_coverage(wrong, sure), 0.0
    assert list(curve.limit) == sorted(set(sure), reverse=True)
    before = 0.0
    for limit, coverage, risk in zip(*curve, strict=True):
        kept = [w for w, c in zip(wrong, sure, strict=True) if c >= limit]
        assert coverage == pytest.approx(len(kept) / len(wrong))
        assert risk == pytest.approx(np.mean(kept))
        area += risk * (coverage - before)
        before = coverage
    assert curve.coverage[-1] == 1.0
    assert aurc(wrong, sure)[0] == pytest.approx(area)


@pytest.mark.parametrize("coverage", [0.1, 0.5, 0.8, 1.0])
def test_risk_at_a_coverage_is_that_of_the_curve_and_of_repeated_cases(coverage):
    rng = np.random.default_rng(5)
    confidences, loss = np.round(rng.random(30), 1), rng.random(30)
    weights = rng.integers(0, 4, (20, 30))
    weights[0] = 1
    weights[1] = 0
    found = risk_at(loss, confidences, coverage, weights)
    assert found[0] == risk_at(loss, confidences, coverage)
    assert np.isnan(found[1])
    for times, one in zip(weights[2:], found[2:], strict=True):
        rows = np.repeat(np.arange(30), times)
        curve = risk_coverage(loss[rows], confidences[rows])
        assert one == pytest.approx(curve.risk[curve.coverage >= coverage - 1e-9][0])
    assert (found[0] == pytest.approx(loss.mean())) == (coverage == 1)
    assert np.isnan(risk_at([], [], coverage)).all()


def test_area_of_good_bad_and_no_order():
    wrong = np.array([False] * 8 + [True] * 2)
    sure = np.linspace(1, 0.5, 10)
    assert aurc(wrong, np.full(10, 0.7))[0] == pytest.approx(0.2)
    assert aurc(wrong, sure)[0] < 0.2 < aurc(wrong, -sure)[0]
    assert aurc(np.zeros(3, bool), [0.5, 0.6, 0.7])[0] == 0
    assert np.isnan(aurc([], [])[0])
    assert all(len(part) == 0 for part in risk_coverage([], []))


def test_interval_of_the_area_is_that_of_repeated_cases():
    wrong, sure = answers(9, 15, decimals=1)
    patients = [f"p{i // 2}" for i in range(15)]
    areas = []
    for weights in patient_weights(patients, 30, 4).astype(int):
        rows = np.repeat(np.arange(15), weights)
        areas.append(aurc(wrong[rows], sure[rows])[0])
    found = aurc_interval(wrong, sure, patients, resamples=30, seed=4)
    assert (found.low, found.high) == pytest.approx(tuple(np.quantile(areas, [0.025, 0.975])))


# --- the limit ---


@pytest.mark.parametrize("coverage", [0.01, 0.3, 0.8, 1.0])
@pytest.mark.parametrize("decimals", [1, 8])
def test_limit_keeps_the_most_confident_share_and_no_more_than_needed(decimals, coverage):
    _, sure = answers(3, decimals=decimals)
    limit = abstention_limit(sure, coverage)
    kept = sure >= limit
    assert kept.mean() >= coverage
    least = sure[kept].min()
    assert (sure > least).mean() < coverage  # without the least confident ones that are kept it is too few
    assert not kept[sure < least].any()
    assert limit not in sure  # so that rounding elsewhere changes nothing


def test_no_rule_no_abstention():
    assert abstention_limit([0.5, 0.9], None) == 0.0
    assert abstention_limit([0.7, 0.7, 0.7], 0.4) == 0.0  # of equal ones none is left out alone
    for sure, coverage in (([0.5], 0.0), ([0.5], 1.2), ([], 0.5)):
        with pytest.raises(InputError, match="coverage is the share of"):
            abstention_limit(sure, coverage)
