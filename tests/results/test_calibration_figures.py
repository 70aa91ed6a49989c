"""Reliability diagrams and the curve of risk over coverage show the numbers that they are given."""

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.image import imread

from bundle.evaluation.abstention import risk_coverage
from bundle.evaluation.calibration import reliability_bins
from bundle.results.calibration_figures import draw_reliability, draw_risk_coverage


def predictions(num_classes=2):
    rng = np.random.default_rng(0)
    p = rng.dirichlet([1.0] * num_classes, 60)
    return np.array([rng.choice(num_classes, p=row) for row in p]), p


@pytest.mark.parametrize("num_classes", [2, 3])
def test_reliability_shows_shares_intervals_and_counts(tmp_path, monkeypatch, num_classes):
    points, bars = [], []
    draw = Axes.errorbar
    monkeypatch.setattr(
        Axes, "errorbar", lambda self, *given, **named: points.append(given) or draw(self, *given, **named)
    )
    draw_bar = Axes.bar
    monkeypatch.setattr(
        Axes, "bar", lambda self, *given, **named: bars.append(given) or draw_bar(self, *given, **named)
    )
    labels, p = predictions(num_classes)
    bins = reliability_bins(labels, p)
    draw_reliability(tmp_path / "r.png", {"before": bins, "after": bins[:2]}, ["a", "b", "$c_"][:num_classes])
    for (x, y, spread), shown in zip(points, (bins, bins[:2]), strict=True):
        np.testing.assert_array_equal(x, [one["probability"] for one in shown])
        np.testing.assert_array_equal(y, [one["share"] for one in shown])
        np.testing.assert_allclose(y - spread[0], [one["low"] for one in shown])
        np.testing.assert_allclose(y + spread[1], [one["high"] for one in shown])
    assert [counts.sum() for _, counts, _ in bars] == [60, sum(one["cases"] for one in bins[:2])]
    assert imread(tmp_path / "r.png").shape[1] > 1000  # two panels beside each other


def test_names_that_look_like_formulas_are_text(tmp_path):
    labels, p = predictions()
    draw_reliability(tmp_path / "r.png", {"": reliability_bins(labels, p)}, ["a", "$x^$ \\frac"])
    assert (tmp_path / "r.png").stat().st_size > 5_000


@pytest.mark.parametrize("chosen", [1.0, 0.7])
def test_risk_coverage_shows_the_curve_and_the_choice(tmp_path, monkeypatch, chosen):
    drawn, lines = [], []
    draw = Axes.plot
    monkeypatch.setattr(Axes, "plot", lambda self, *given, **named: drawn.append(given) or draw(self, *given, **named))
    draw_line = Axes.axvline
    monkeypatch.setattr(Axes, "axvline", lambda self, x, **named: lines.append(x) or draw_line(self, x, **named))
    labels, p = predictions()
    curve = risk_coverage(p.argmax(1) != labels, p.max(1))
    draw_risk_coverage(tmp_path / "c.png", curve, chosen)
    np.testing.assert_array_equal(drawn[0], [curve.coverage, curve.risk])
    assert lines == [chosen]
    assert (tmp_path / "c.png").stat().st_size > 5_000
