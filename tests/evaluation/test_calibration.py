"""Temperature, operating point and reliability against slow references."""

import numpy as np
import pytest
import torch
from scipy.optimize import minimize_scalar
from scipy.stats import binomtest
from sklearn.metrics import roc_auc_score

from bundle.errors import InputError
from bundle.evaluation.calibration import (
    HIGHEST,
    LOWEST,
    calibrated,
    fit_temperature,
    left_out,
    operating_point,
    reliability_bins,
    share_of,
)


def cases(seed, num_cases=60, num_classes=2, scale=3.0):
    """Logits that are `scale` times too large for the labels that are drawn from them."""
    rng = np.random.default_rng(seed)
    true_logits = 1.5 * rng.standard_normal((num_cases, num_classes))
    p = calibrated(true_logits, 1.0)
    labels = np.array([rng.choice(num_classes, p=row) for row in p])
    return scale * true_logits, labels


def smoothed_nll(log_temperature, logits, labels, added=0.5):
    """The definition, case by case."""
    num_classes = logits.shape[1]
    total = 0.0
    for row, label in zip(logits, labels, strict=True):
        log_p = torch.log_softmax(torch.from_numpy(row / np.exp(log_temperature)), 0).numpy()
        size = int((labels == label).sum())
        for k in range(num_classes):
            total -= log_p[k] * (size + added if k == label else added) / (size + added * num_classes)
    return total / len(labels)


# --- temperature ---


@pytest.mark.parametrize("num_classes", [2, 3, 5])
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("added", [None, 1.0, 0.0])
def test_temperature_is_that_of_a_minimiser(seed, num_classes, added):
    logits, labels = cases(seed, num_classes=num_classes)
    bounds = (np.log(LOWEST), np.log(HIGHEST))
    more = () if added is None else (added,)
    oracle = minimize_scalar(smoothed_nll, bounds, args=(logits, labels, *more), bounds=bounds, method="bounded",
                             options={"xatol": 1e-9})  # fmt: skip
    found = fit_temperature(logits, labels, *more)
    assert found.note is None
    assert found.value == pytest.approx(np.exp(oracle.x), rel=1e-5)


def test_many_cases_give_back_the_scale_they_were_made_with_and_the_plain_fit():
    logits, labels = cases(0, 20_000)
    found = fit_temperature(logits, labels).value
    assert found == pytest.approx(3.0, rel=0.05)
    log_temperature = torch.zeros((), dtype=torch.float64, requires_grad=True)
    optimiser = torch.optim.LBFGS([log_temperature], max_iter=100, line_search_fn="strong_wolfe")

    def plain_nll():
        optimiser.zero_grad()
        scaled = torch.from_numpy(logits) / log_temperature.exp()
        loss = torch.nn.functional.cross_entropy(scaled, torch.from_numpy(labels))
        loss.backward()
        return loss

    optimiser.step(plain_nll)
    assert found == pytest.approx(float(log_temperature.detach().exp()), rel=2e-3)


def test_scaling_logits_scales_the_temperature_and_shifting_them_changes_nothing():
    logits, labels = cases(1)
    found = fit_temperature(logits, labels).value
    assert fit_temperature(2 * logits, labels).value == pytest.approx(2 * found)
    shift = np.random.default_rng(0).normal(size=(len(logits), 1))
    assert fit_temperature(logits + shift, labels).value == pytest.approx(found)
    assert fit_temperature(np.log(calibrated(logits, 1.0)), labels).value == pytest.approx(found)
    assert fit_temperature(logits / found, labels).value == pytest.approx(1.0)
    order = np.random.default_rng(1).permutation(len(labels))
    assert fit_temperature(logits[order], labels[order]).value == pytest.approx(found)


@pytest.mark.parametrize("num_classes", [2, 4])
def test_no_temperature_changes_a_ranking(num_classes):
    logits, labels = cases(2, num_classes=num_classes)
    before, after = calibrated(logits, 1.0), calibrated(logits, fit_temperature(logits, labels).value)
    np.testing.assert_array_equal(before.argmax(1), after.argmax(1))
    np.testing.assert_allclose(after.sum(1), 1)
    if num_classes == 2:
        np.testing.assert_array_equal(np.argsort(before[:, 1]), np.argsort(after[:, 1]))
        assert roc_auc_score(labels, before[:, 1]) == roc_auc_score(labels, after[:, 1])


def test_cases_without_an_error_do_not_drive_the_temperature_to_its_end():
    """The plain NLL of these falls for ever; the smoothed one is least where p is the target, (n + 1/2) / (n + 1)."""
    logits = np.array([[2.0, 0.0]] * 5 + [[0.0, 2.0]] * 5)
    labels = np.repeat([0, 1], 5)
    found = fit_temperature(logits, labels)
    assert found.note is None
    assert calibrated(logits, found.value)[0, 0] == pytest.approx(5.5 / 6)
    many = fit_temperature(np.repeat(logits, 10_000, axis=0), np.repeat(labels, 10_000))
    assert calibrated(logits, many.value)[0, 0] == pytest.approx(50_000.5 / 50_001)
    small = fit_temperature(0.01 * logits, labels)
    assert small.value == LOWEST
    assert "falls down to the lowest one allowed, 0.1" in small.note


def test_logits_that_mislead_or_say_nothing():
    logits, labels = cases(3)
    worst = fit_temperature(-logits, labels)
    assert (worst.value, worst.note) == (HIGHEST, "the NLL falls up to the highest one allowed, 10.0")
    same = fit_temperature(np.ones((4, 2)), [0, 1, 0, 1])
    assert same.value == 1.0
    assert "no temperature changes anything" in same.note
    one_class = fit_temperature(np.array([[1.0, 0.0], [3.0, 0.0]]), [0, 0])
    assert LOWEST < one_class.value < HIGHEST


def test_few_cases_are_followed_less_than_by_the_plain_fit():
    """NLL of the population over many small draws: what the targets are for."""
    population, population_labels = cases(10, 4000, scale=1.5)

    def nll(temperature):
        p = calibrated(population, temperature)
        return -np.log(np.maximum(p[np.arange(len(p)), population_labels], 1e-300)).mean()

    def plain_nll(log_temperature, logits, labels):
        p = calibrated(logits, np.exp(log_temperature))
        return -np.log(np.maximum(p[np.arange(len(p)), labels], 1e-300)).mean()

    ours, plain = [], []
    bounds = (np.log(LOWEST), np.log(HIGHEST))
    for seed in range(100):
        chosen = np.random.default_rng(seed).choice(len(population), 16, replace=False)
        logits, labels = population[chosen], population_labels[chosen]
        ours.append(nll(fit_temperature(logits, labels).value))
        fit = minimize_scalar(plain_nll, args=(logits, labels), bounds=bounds, method="bounded")
        plain.append(nll(np.exp(fit.x)))
    assert np.mean(ours) < np.mean(plain)
    assert np.max(ours) < np.max(plain)


@pytest.mark.parametrize(
    ("logits", "labels", "sentence"),
    [
        ([[0.0, np.nan]], [0], "finite logits"),
        ([[0.0, np.inf]], [0], "finite logits"),
        (np.zeros((0, 2)), [], "cases >= 1"),
        ([0.0, 1.0], [0, 1], "of shape"),
        ([[0.0, 1.0]], [2], "labels must be whole numbers from 0 to 1"),
        ([[0.0, 1.0]], [0, 1], "labels must have shape"),
    ],
)
def test_impossible_logits_are_refused(logits, labels, sentence):
    with pytest.raises(InputError, match=sentence):
        fit_temperature(np.array(logits), labels)


def test_left_out_is_a_loop_over_patients():
    logits, labels = cases(4, 30)
    patients = [f"p{i // 2}" for i in range(30)]
    losses = []
    for patient in sorted(set(patients)):
        out = np.array([one == patient for one in patients])
        p = calibrated(logits[out], fit_temperature(logits[~out], labels[~out]).value)
        losses += list(-np.log(p[np.arange(out.sum()), labels[out]]))
    assert left_out(logits, labels, patients) == pytest.approx(np.mean(losses))
    assert np.isnan(left_out(logits, labels, ["p"] * 30))
    assert left_out(logits, labels, patients, groups=3) != left_out(logits, labels, patients)


# --- operating point ---


def best_answers(labels, positive, sensitivity):
    """Every probability tried as the threshold: what the best one that finds enough answers."""
    best = None
    for threshold in sorted(set(positive)):
        above = positive >= threshold
        found, spared = above[labels == 1].mean(), (~above)[labels == 0].mean()
        if found >= sensitivity and (best is None or (spared, found) > best[0]):
            best = (spared, found), above
    return best[1]


@pytest.mark.parametrize("sensitivity", [0.01, 0.5, 0.7, 0.9, 1.0])
@pytest.mark.parametrize("decimals", [1, 2, 8])  # 1: many ties, between the classes too
@pytest.mark.parametrize("seed", range(5))
def test_operating_point_answers_as_the_best_threshold_does(seed, decimals, sensitivity):
    rng = np.random.default_rng(seed)
    labels = np.append(rng.integers(0, 2, 38), [0, 1])
    positive = np.clip(np.round(0.3 * labels + 0.7 * rng.random(40), decimals), 0.01, 0.99)
    found = operating_point(labels, np.stack([1 - positive, positive], 1), sensitivity)
    above = best_answers(labels, positive, sensitivity)
    np.testing.assert_array_equal(positive >= found.threshold, above)
    assert found.sensitivity.value == above[labels == 1].mean() >= sensitivity
    assert found.specificity.value == (~above)[labels == 0].mean()
    assert (found.sensitivity.cases, found.specificity.cases) == (labels.sum(), (1 - labels).sum())


def test_the_threshold_keeps_off_the_cases():
    labels, positive = np.array([0, 0, 1, 1]), np.array([0.1, 0.2, 0.4, 0.8])
    found = operating_point(labels, np.stack([1 - positive, positive], 1), 0.9)
    assert found.threshold == pytest.approx(0.3)
    assert operating_point(labels, np.stack([1 - positive, positive], 1), 0.5).threshold == pytest.approx(0.3)
    assert operating_point(1 - labels, np.stack([1 - positive, positive], 1)).threshold == pytest.approx(0.05)
    positive[:3] = [0.0, 0.0005, 0.0008]  # a positive below all thresholds is not needed for a half
    assert operating_point(labels, np.stack([1 - positive, positive], 1), 0.5).threshold == 0.001


def test_operating_points_at_the_ends():
    p = np.array([[0.0, 1.0], [1e-9, 1 - 1e-9]])
    assert operating_point([1, 0], p).threshold == 0.999
    with pytest.raises(InputError, match="needs a threshold below 0.001: a positive case has the probability 0.0002"):
        operating_point([0, 1], [[0.5, 0.5], [0.9998, 0.0002]])
    for labels, sensitivity, sentence in (
        ([1, 1], 0.9, "cases of both"), ([0, 0], 0.9, "cases of both"), ([0, 1], 0.0, "above 0 and at most 1, not 0.0"),
        ([0, 1], 1.1, "above 0 and at most 1"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=sentence):
            operating_point(labels, p, sensitivity)
    with pytest.raises(InputError, match="needs two classes"):
        operating_point([0, 1], [[0.2, 0.3, 0.5]] * 2)


# --- shares and bins ---


@pytest.mark.parametrize(("hits", "total"), [(0, 1), (1, 1), (3, 7), (0, 30), (30, 30), (199, 400)])
def test_wilson_interval(hits, total):
    found = share_of([True] * hits + [False] * (total - hits))
    expected = binomtest(hits, total).proportion_ci(0.95, method="wilson")
    assert (found.value, found.cases) == (hits / total, total)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), abs=1e-12)
    assert found.low <= found.value <= found.high


def test_the_share_of_nothing():
    assert np.isnan(share_of([])[:3]).all()


@pytest.mark.parametrize("num_classes", [2, 3])
def test_bins_are_a_loop_over_the_cases(num_classes):
    logits, labels = cases(5, 80, num_classes)
    p = calibrated(logits, 1.0)
    p[:3, :2] = [[0.5, 0.5], [0.0, 1.0], [1.0, 0.0]]
    p[:3, 2:] = 0.0
    found = reliability_bins(labels, p, bins=5)
    for entry in found:
        said, so = [], []
        for row, label in zip(p, labels, strict=True):
            value = row[1] if num_classes == 2 else row.max()
            if entry["from"] <= value < entry["to"] or (entry["to"] == 1 and value == 1):
                said.append(value)
                so.append(label == 1 if num_classes == 2 else label == row.argmax())
        assert entry["cases"] == len(said)
        assert entry["probability"] == pytest.approx(np.mean(said))
        assert (entry["share"], entry["low"], entry["high"]) == share_of(so)[:3]
    assert sum(entry["cases"] for entry in found) == 80


def test_bins_of_nothing():
    assert reliability_bins([], np.zeros((0, 2))) == []
