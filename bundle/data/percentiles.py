"""Percentiles of a volume, bit by bit those of NumPy, without sorting or copying the volume."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from .threads import shared_out

__all__ = ["Ranked", "blocks_of", "percentiles"]

Values = NDArray[np.float32]

# What a processor core keeps near: a block is compared several times for one trip to memory.
BLOCK = 1 << 16
SAMPLE = 1 << 13
# Ranks of the sample between which the wanted one is looked for: six standard deviations of a random sample's rank.
SLACK = 6.0
# Whole numbers from -LARGE up to LARGE - 1 are counted one by one: 16-bit pixels, signed or not, and CT.
LARGE = 1 << 16


def blocks_of(values: Values) -> Iterator[Values]:
    """Flat parts of an array that together hold each value once, in the order of memory."""
    return _blocks(_parts(values))


def _parts(values: Values) -> Sequence[Values]:
    ordered = values.transpose(sorted(range(values.ndim), key=lambda axis: -abs(values.strides[axis])))
    if not ordered.flags.c_contiguous:
        return list(ordered)
    flat = ordered.reshape(-1)
    return [flat[start : start + BLOCK] for start in range(0, flat.size, BLOCK)]


def _blocks(parts: Iterable[Values]) -> Iterator[Values]:
    for flat in (np.ascontiguousarray(part).reshape(-1) for part in parts):
        yield from (flat[start : start + BLOCK] for start in range(0, flat.size, BLOCK))


def percentiles(values: Values, wanted: Sequence[float], above: float | None = None) -> list[float]:
    """Percentiles of some values, see `Ranked`; whoever asks again about the same values keeps one of these."""
    return Ranked(values).percentiles(wanted, above)


class Ranked:
    """Values in rising order, asked for by their place in it.

    Scanners store whole numbers, which rescaling mostly keeps whole: one pass then counts how often each occurs, and
    tells everything. Of other values a sample brackets each wanted place; counting what lies below a bracket and
    sorting the few values inside tells the value itself. Where the sample misled, NumPy selects from all values.

    Args:
        values: finite float32, of any shape.
    """

    def __init__(self, values: Values) -> None:
        self._values = values
        counts = shared_out(_counts, _parts(values))
        whole = [one for one in counts if one is not None]
        # How many values are no greater than -LARGE, -LARGE + 1, ...; None where any is no such whole number.
        self._up_to = np.sum(whole, axis=0).cumsum() if len(whole) == len(counts) else None

    def up_to(self, limit: float) -> int:
        """How many values are no greater than a limit."""
        if self._up_to is None:
            return sum(int(np.count_nonzero(block <= limit)) for block in blocks_of(self._values))
        place = math.floor(min(limit, LARGE - 1)) + LARGE
        return int(self._up_to[place]) if place >= 0 else 0

    def ends(self) -> tuple[float, float]:
        """The least and the greatest value."""
        if self._up_to is None:
            return float(self._values.min()), float(self._values.max())
        least, most = np.searchsorted(self._up_to, [0, self._values.size - 1], side="right") - LARGE
        return float(least), float(most)

    def percentiles(self, wanted: Sequence[float], above: float | None = None) -> list[float]:
        """Percentiles with linear interpolation: those of `numpy.percentile`, to the last bit.

        Args:
            wanted: percent, each from 0 to 100.
            above: look at values greater than this one alone, of which there must be some.

        Returns:
            A percentile for each that is wanted.
        """
        passed_over = 0 if above is None else self.up_to(above)
        last = self._values.size - passed_over - 1
        # The arithmetic of NumPy's linear method, with its types.
        places = np.true_divide(np.asarray(wanted, dtype=np.float64), np.float32(100)) * last
        lower = np.floor(places).astype(int)
        upper = np.minimum(lower + 1, last)
        ranks = np.stack([lower, upper], axis=1) + passed_over
        found = []
        for place, first, (low, high) in zip(places, lower, self._at(ranks), strict=True):
            share, step = place - first, np.float64(high - low)
            found.append(float(high - step * (1 - share) if share >= 0.5 else low + step * share))
        return found

    def _at(self, ranks: NDArray[np.int64]) -> Iterable[Sequence[np.float32]]:
        """The values at pairs (Q, 2) of neighbouring ranks, from 0, of all values in rising order."""
        if self._up_to is None:
            return _neighbours(self._values, ranks)
        return (np.searchsorted(self._up_to, ranks, side="right") - LARGE).astype(np.float32)


def _counts(parts: Sequence[Values]) -> NDArray[np.int64] | None:
    """How often each of -LARGE to LARGE - 1 occurs; None where something else does."""
    counts = np.zeros(2 * LARGE, dtype=np.int64)
    for block in _blocks(parts):
        whole = _whole(block)
        if whole is None:
            return None
        low, high = int(whole.min()), int(whole.max())
        if low < -LARGE or high >= LARGE:
            return None
        # Room for what lies between the two.
        whole = whole.astype(np.int32) if high - low >= 1 << 15 else whole
        whole -= whole.dtype.type(low)
        # PyTorch counts 16-bit numbers as they are; NumPy would make 64-bit ones of them first.
        counts[low + LARGE : high + LARGE + 1] += torch.bincount(torch.from_numpy(whole)).numpy()
    return counts


def _whole(block: Values) -> NDArray[np.signedinteger[Any]] | None:
    """The same values as 16-bit numbers if they all are such, else as 32-bit ones; None where they are neither."""
    with np.errstate(invalid="ignore"):  # a cast that does not fit shows in the comparison
        for kind in (np.int16, np.int32):
            whole = block.astype(kind)
            if (whole == block).all():
                return whole
    return None


def _neighbours(values: Values, ranks: NDArray[np.int64]) -> list[tuple[np.float32, np.float32]]:
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
