"""Pixels as written → the values in their stored bits."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

__all__ = ["Stored", "holds_more", "stored_values"]

Stored = NDArray[np.integer]


def stored_values(raw: Stored, allocated: int, stored: int, high_bit: int, signed: bool) -> Stored:
    """Cut the stored bits out of each pixel, dropping overlay bits above and below, and extend the sign.

    Args:
        raw: pixels as written, `allocated` bits wide.
        allocated: 8, 16 or 32 bits.
        stored: number of bits of the value.
        high_bit: place of its highest bit.
        signed: two's complement or not.

    Returns:
        The values, of the same width.
    """
    width = allocated // 8
    top = np.left_shift(raw.view(f"u{width}"), np.array(allocated - 1 - high_bit, dtype=f"u{width}"))
    kind = "i" if signed else "u"
    shifted: Stored = np.right_shift(top.view(f"{kind}{width}"), np.array(allocated - stored, dtype=f"{kind}{width}"))
    return shifted


def holds_more(raw: Stored, values: Stored, stored: int, high_bit: int) -> NDArray[np.bool_]:
    """Where something lies beside the stored bits.

    A pixel as written is its value (the sign perhaps extended over all bits), or its stored bits alone, or holds more.

    Args:
        raw: pixels as written.
        values: `stored_values` of them.
        stored: number of bits of the value.
        high_bit: place of its highest bit.
    """
    unsigned = raw.view(f"u{raw.dtype.itemsize}")
    mask = np.array(((1 << stored) - 1) << (high_bit - stored + 1), dtype=unsigned.dtype)
    found: NDArray[np.bool_] = (unsigned != values.view(unsigned.dtype)) & ((unsigned & ~mask) != 0)
    return found
