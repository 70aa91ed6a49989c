from __future__ import annotations

import numpy as np
import pytest
import torch

from bundle.data import percentiles as module
from bundle.data.percentiles import LARGE, Ranked, blocks_of, percentiles

KINDS = ("noise", "air and noise", "few values", "two atoms", "constant")


def drawn(kind: str, size: int, rng: np.random.Generator) -> np.ndarray:
    values = (rng.normal(size=size) * 10 ** rng.uniform(-9, 6)).astype(np.float32)
    if kind == "air and noise":
        values[rng.random(size) < 0.7] = -1024
    elif kind == "few values":
        values = rng.integers(-3, rng.integers(1, 300), size).astype(np.float32)
    elif kind == "two atoms":
        values = np.where(rng.random(size) < 0.005, 7, -2).astype(np.float32)
    elif kind == "constant":
        values[:] = -0.3
    return values


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("block", [64, 1 << 16])
def test_they_are_those_of_numpy_to_the_last_bit(kind: str, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BLOCK", block)
    monkeypatch.setattr(module, "SAMPLE", 128)
    rng = np.random.default_rng(5)
    for size in (1, 2, 3, 7, 200, 1001, 5000):
        for wanted in ([0.5, 99.5], [0.0, 100.0], [50.0], np.sort(rng.uniform(0, 100, 3)).tolist()):
            values = drawn(kind, size, rng)
            assert percentiles(values, wanted) == np.percentile(values, wanted).tolist()
            limit = float(np.median(values))
            if (above := values[values > limit]).size:
                assert percentiles(values, wanted, above=limit) == np.percentile(above, wanted).tolist()


def test_a_sample_that_misleads_costs_time_and_no_truth(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SLACK", -3.0)
    values = np.random.default_rng(0).normal(size=3000).astype(np.float32)
    assert percentiles(values, [0.5, 40.0, 99.5]) == np.percentile(values, [0.5, 40.0, 99.5]).tolist()


@pytest.mark.parametrize("order", ["C", "F"])
def test_layout_does_not_matter_and_every_value_counts_once(order: str) -> None:
    whole = np.array(np.random.default_rng(1).normal(size=(9, 11, 13)), dtype=np.float32, order=order)  # type: ignore[call-overload]
    for values in (whole, whole[1:-2, 3:, ::2], whole.transpose(2, 0, 1)[::-1], whole[4], whole[2, 3]):
        np.testing.assert_array_equal(np.sort(np.concatenate(list(blocks_of(values)))), np.sort(values, axis=None))
        assert percentiles(values, [1.0, 99.0]) == np.percentile(values, [1.0, 99.0]).tolist()


# Lowest and highest whole number, and one value that is put among them.
WHOLE = {
    "12 bits": (-1024, 3071, None),
    "16 bits, signed": (-32768, 32767, None),
    "16 bits, unsigned": (0, 65535, None),
    "more than 15 bits around 0": (-20000, 20000, None),
    "the most that is counted": (-LARGE, LARGE - 1, None),
    "too large": (-7, 7, float(LARGE)),
    "too small": (-7, 7, -float(LARGE) - 1),
    "a half": (-7, 7, 2.5),
    "beyond any integer": (-7, 7, 3e38),
    "a tiny number": (-7, 7, -1e-30),
}


@pytest.mark.parametrize("kind", WHOLE)
@pytest.mark.parametrize("threads", [1, 3])
def test_whole_numbers_are_counted(kind: str, threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    monkeypatch.setattr(module, "BLOCK", 1 << 10)
    low, high, other = WHOLE[kind]
    rng = np.random.default_rng(3)
    for shape in ((30, 20, 17), (5,), (1, 1)):
        values = rng.integers(low, high + 1, shape).astype(np.float32)
        values.flat[[0, -1]] = low, high
        values[rng.random(shape) < 0.3] = low
        if other is not None:
            values.flat[values.size // 2] = other
        seen = [Ranked(values)] if values.ndim < 3 else [Ranked(values), Ranked(values.transpose(2, 0, 1)[::-1])]
        for ranked in seen:
            assert (ranked._up_to is None) == (other is not None)
            assert ranked.ends() == (values.min(), values.max())
            for wanted in ([0.5, 99.5], [0.0, 50.0, 100.0], rng.uniform(0, 100, 3).tolist()):
                assert ranked.percentiles(wanted) == np.percentile(values, wanted).tolist()
            for limit in (low - 1.0, low, 0.3, -0.3, float(np.median(values)), high - 0.5, high, 1e9, -1e9):
                assert ranked.up_to(limit) == np.count_nonzero(values <= limit)
                if (above := values[values > limit]).size:
                    assert ranked.percentiles([1.0, 99.0], above=limit) == np.percentile(above, [1.0, 99.0]).tolist()
