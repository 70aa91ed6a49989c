import math
from pathlib import Path

import numpy as np
import pytest

from bundle.errors import InputError
from bundle.evaluation.abstention import confidence, risk_coverage
from bundle.evaluation.key_slices import CASE_SCORES, RANKINGS
from bundle.evaluation.scores import score
from bundle.study import comparison
from bundle.study.comparison import COMPARED, difference, figure
from bundle.study.out_of_fold import OutOfFold, Predictions

CASES = 30
PATIENTS = [f"p{i // 2}" for i in range(CASES)]
LABELS = np.array([0, 1] * (CASES // 2))


def compared(seeds, *arguments, **more):
    return comparison.compared(dict(enumerate(seeds)), *arguments, **more)


def made(seed, classes=2, cases=CASES):
    """Random predictions of the same cases."""
    rng = np.random.default_rng(seed)
    labels = np.arange(cases) % classes
    p, after = (rng.dirichlet(np.ones(classes), cases) for _ in range(2))
    hit = np.where(rng.random(cases) < 0.3, math.nan, rng.integers(0, 2, cases))
    evidence = {name: dict.fromkeys(RANKINGS, hit / part) for part, name in enumerate(CASE_SCORES, 1)}
    top = {by: rng.integers(0, 3, cases) for by in RANKINGS}
    raw = Predictions([f"c{i:02d}" for i in range(cases)], PATIENTS[:cases], labels, p, [])
    return OutOfFold(raw, after, rng.integers(0, classes, cases), top, evidence, [1.0], [Path("piece")] * cases)


def with_hits(one, hit):
    return one._replace(evidence={name: dict.fromkeys(RANKINGS, hit) for name in CASE_SCORES})


def scores_of(one, rows):
    """All figures of the cases `rows`, one by one with the plain functions."""
    y, p, after, at_point = one.raw.labels[rows], one.raw.probabilities[rows], one.calibrated[rows], one.at_point[rows]
    hit = one.evidence["hit_1"]["score"][rows]
    known = np.isfinite(hit)
    found = {name: score(name, y, p) for name in ("auc", "accuracy", "f1_macro", "nll", "brier", "ece")}
    found |= {f"calibrated_{name}": score(name, y, after) for name in ("nll", "brier", "ece")}
    for name in ("accuracy", "f1_macro", "sensitivity", "specificity"):
        found[f"point_{name}"] = score(name, y, after, at_point)
    curve = risk_coverage(after.argmax(axis=1) != y, confidence(after))
    found["risk_80"] = curve.risk[np.argmax(curve.coverage > 0.8 - 1e-9)]
    found["aurc"] = (curve.risk * np.diff(curve.coverage, prepend=0)).sum()
    for by in RANKINGS:
        for part, name in enumerate(("hit_1", "hit_3", "distance_mm", "slice_auc"), 1):
            found[f"{name}_{by}"] = hit[known].mean() / part if known.any() else math.nan
    return found


def resampled(seed, count):
    """Rows of each resample, drawn as patients."""
    names = sorted(set(PATIENTS))
    draws = np.random.default_rng(seed).multinomial(len(names), np.full(len(names), 1 / len(names)), size=count)
    for draw in draws:
        times = dict(zip(names, draw, strict=True))
        yield np.array([i for i in range(CASES) for _ in range(times[PATIENTS[i]])])


@pytest.mark.parametrize("classes", [2, 3])
def test_paired_differences_against_a_loop(classes):
    first, second = made(1, classes), made(2, classes)
    one, other = compared([first], resamples=40, seed=3), compared([second], resamples=40, seed=3)
    assert one.values.keys() == COMPARED.keys()
    assert one.values == pytest.approx(scores_of(first, np.arange(CASES)), rel=1e-6)
    loop = [(scores_of(first, rows), scores_of(second, rows)) for rows in resampled(3, 40)]
    for name in COMPARED:
        for found, values in (
            (figure(one, name), [a[name] for a, _ in loop]),
            (difference(one, other, name), [a[name] - b[name] for a, b in loop]),
        ):
            expected = np.nanquantile(values, [0.025, 0.975])
            np.testing.assert_allclose((found.low, found.high), expected, rtol=1e-5, atol=1e-9, err_msg=name)
        assert difference(one, other, name).value == one.values[name] - other.values[name]


def test_an_arm_differs_from_itself_by_exactly_nothing():
    one, again = compared([made(1), made(2)], 50), compared([made(1), made(2)], 50)
    for name in COMPARED:
        assert tuple(difference(one, again, name)) == (0, 0, 0)


def test_seeds_are_averaged_on_the_cases_and_on_each_resample():
    parts = [compared([made(seed)], 30) for seed in (1, 2, 3)]
    together = compared([made(seed) for seed in (1, 2, 3)], 30)
    for name in COMPARED:
        assert together.values[name] == pytest.approx(np.mean([one.values[name] for one in parts]))
        np.testing.assert_allclose(together.rows(name), np.mean([one.rows(name) for one in parts], axis=0))


def test_the_ensemble_is_of_averaged_probabilities():
    seeds = [made(1), made(2)]
    together = compared(seeds, 30)
    mean = np.mean([one.raw.probabilities for one in seeds], axis=0)
    for name in ("auc", "accuracy", "f1_macro", "nll", "brier", "ece"):
        assert together.values[f"ensemble_{name}"] == pytest.approx(score(name, LABELS, mean), rel=1e-6)
    assert not any(name.startswith("ensemble") for name in compared([made(1)], 30).values)


def test_cases_without_truth_do_not_count():
    one = made(1)
    hit = np.full(CASES, math.nan)
    none = compared([with_hits(one, hit)], 10)
    assert math.isnan(figure(none, "hit_1_score").value)
    assert math.isnan(figure(none, "hit_1_score").low)
    hit[4:8] = [1, 0, 1, 1]
    some = compared([with_hits(one, hit)], 200)
    assert some.values["hit_1_score"] == 0.75
    # Two patients of two cases: a resample has cases of one, of both or of none.
    samples = some.rows("hit_1_score")[1:]
    assert set(np.round(samples[np.isfinite(samples)], 3)) >= {0.5, 1.0, 0.75}
    assert np.isnan(samples).any()


def test_differences_are_over_the_runs_of_both():
    same, better = made(1), made(2)
    more = comparison.compared({0: same, 1: better}, 50)
    fewer, others = comparison.compared({0: same}, 50), comparison.compared({2: better}, 50)
    for name in COMPARED:
        assert tuple(difference(more, fewer, name)) == tuple(difference(fewer, more, name)) == (0, 0, 0)
        assert math.isnan(difference(fewer, others, name).value)
    two = comparison.compared({0: better, 1: same}, 50)
    assert difference(more, two, "ensemble_auc").value == 0
    three = comparison.compared({0: same, 1: better, 2: made(3)}, 50)
    assert math.isnan(difference(more, three, "ensemble_auc").value)


def test_other_cases_cannot_be_compared():
    one, fewer = made(1), made(1, cases=CASES - 2)
    with pytest.raises(InputError, match="and c28 is in one alone: was it refused there?"):
        difference(compared([one], 10), compared([fewer], 10), "auc")
    with pytest.raises(InputError, match="the seeds of an arm have different test cases"):
        compared([one, fewer], 10)


def test_agreement_of_seeds_over_all_pairs():
    seeds = [made(1) for _ in range(3)]
    hit = np.full(CASES, math.nan)
    hit[:4] = 1
    tops = ([0, 1, 2, 0], [0, 1, 2, 1], [0, 2, 2, 2])
    for i, top in enumerate(tops):
        chosen = np.concatenate([top, np.full(CASES - 4, i)])
        seeds[i] = with_hits(seeds[i], hit)._replace(top_slice=dict.fromkeys(RANKINGS, chosen))
    found = compared(seeds, 200)
    assert [found.values[f"agree_{by}"] for by in RANKINGS] == pytest.approx([(3 + 1 + 3 + 0) / 12] * len(RANKINGS))
    samples = found.rows("agree_score")[1:]  # of the first two patients, either or both
    assert (np.nanmin(samples), np.nanmax(samples)) == pytest.approx(((3 + 0) / 6, (3 + 1) / 6))
    silent = with_hits(seeds[1], np.full(CASES, math.nan))  # its ranking tells nothing
    for order in ([seeds[0], silent, seeds[2]], [silent, seeds[0], seeds[2]]):
        assert compared(order, 10).values["agree_score"] == pytest.approx((1 + 0 + 1 + 0) / 4)
    with pytest.raises(KeyError):
        figure(found, "aucc")
    alone = compared(seeds[:1], 10)
    assert "agree_score" not in alone.values
    assert math.isnan(figure(alone, "agree_score").value)
    assert math.isnan(difference(found, alone, "agree_score").value)
