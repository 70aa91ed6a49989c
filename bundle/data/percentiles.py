"""Percentiles of a volume, bit by bit those of NumPy, without sorting or copying the volume."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

__all__ = ["blocks_of", "percentiles"]

Values = NDArray[np.float32]

# What a processor core keeps near: a block is compared several times for one trip to memory.
BLOCK = 1 << 16
SAMPLE = 1 << 13
# Ranks of the sample between which the wanted one is looked for: six standard deviations of a random sample's rank.
SLACK = 6.0


def blocks_of(values: Values) -> Iterator[Values]:
    """Flat parts of an array that together hold each value once, in the order of memory."""
    ordered = values.transpose(sorted(range(values.ndim), key=lambda axis: -abs(values.strides[axis])))
    parts = [ordered] if ordered.flags.c_contiguous else ordered
    for flat in (np.ascontiguousarray(part).reshape(-1) for part in parts):
        yield from (flat[start : start + BLOCK] for start in range(0, flat.size, BLOCK))


def percentiles(values: Values, wanted: Sequence[float], above: float | None = None) -> list[float]:
    """Percentiles with linear interpolation: those of `numpy.percentile`, to the last bit.

    A sample brackets each wanted place; counting what lies below a bracket and sorting the few values inside tells the
    value itself. Where the sample misled, NumPy selects from all values.

    Args:
        values: finite float32, of any shape.
        wanted: percent, each from 0 to 100.
        above: look at values greater than this one alone, of which there must be some.

    Returns:
        A percentile for each that is wanted.
    """
    passed_over = 0 if above is None else sum(int(np.count_nonzero(block <= above)) for block in blocks_of(values))
    last = values.size - passed_over - 1
    # The arithmetic of NumPy's linear method, with its types.
    places = np.true_divide(np.asarray(wanted, dtype=np.float64), np.float32(100)) * last
    lower = np.floor(places).astype(int)
    upper = np.minimum(lower + 1, last)
    ranks = np.stack([lower, upper], axis=1) + passed_over
    found = []
    for place, first, (low, high) in zip(places, lower, _neighbours(values, ranks), strict=True):
        share, step = place - first, np.float64(high - low)
        found.append(float(high - step * (1 - share) if share >= 0.5 else low + step * share))
    return found


def _neighbours(values: Values, ranks: NDArray[np.int64]) -> list[tuple[np.float32, np.float32]]:
    """The values at pairs (Q, 2) of neighbouring ranks, from 0, of all values in rising order."""
    # Not at equal distances, which would be one column of each slice.
    chance = np.random.default_rng(0)
    count = -(-SAMPLE * min(BLOCK, values.size) // values.size)
    sample = np.sort(np.concatenate([block[chance.integers(0, block.size, count)] for block in blocks_of(values)]))
    brackets = [_bracket(sample, rank / values.size) for rank in ranks[:, 0]]
    counts = np.zeros((len(brackets), 4), dtype=np.int64)  # below low, up to low, below high, up to high
    inside: list[list[Values]] = [[] for _ in brackets]
    for block in blocks_of(values):
        for k, (low, high) in enumerate(brackets):
            under, up_to = block < high, block <= low
            counts[k] += [np.count_nonzero(part) for part in (block < low, up_to, under, block <= high)]
            # Scans hold some values a million times, air above all: what equals an end is counted, not copied.
            if (between := under & ~up_to).any():
                inside[k].append(block[between])
    found = []
    for k, (low, high) in enumerate(brackets):
        below, to_low, to_high, to_end = counts[k]
        if not below <= ranks[k, 0] <= ranks[k, 1] < to_end:
            ordered = np.partition(values, sorted(set(ranks[k])), axis=None)
            found.append((ordered[ranks[k, 0]], ordered[ranks[k, 1]]))
            continue
        selected = np.sort(np.concatenate(inside[k])) if inside[k] else values[:0]
        one, other = (
            low if rank < to_low else selected[rank - to_low] if rank < to_high else high for rank in ranks[k]
        )
        found.append((one, other))
    return found


def _bracket(sample: Values, share: float) -> tuple[np.float32, np.float32]:
    place, last = share * len(sample), len(sample) - 1
    slack = SLACK * math.sqrt(len(sample) * share * (1 - share)) + SLACK
    return sample[max(0, int(place - slack))], sample[min(last, int(place + slack) + 1)]
