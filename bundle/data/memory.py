"""Memory of a volume that is being used up, given back to the system before all of it can be freed."""

from __future__ import annotations

import ctypes
import mmap

from torch import Tensor

__all__ = ["give_back"]

DONT_NEED = getattr(mmap, "MADV_DONTNEED", None)  # not on Windows


def give_back(volume: Tensor, axis: int, start: int, end: int) -> None:
    """Let the system have the memory of some slices of a volume, whose values are lost.

    Only whole pages between the first of these slices and the slice at `end` are given back, and none where slices
    along that axis do not lie one after the other, or where the system knows no such call.

    Args:
        volume: (C, X, Y, Z) on the CPU, perhaps a part of a larger one, of which nobody else has a use.
        axis: 1, 2 or 3.
        start: first slice.
        end: first slice that is kept; there must be one.
    """
    step = volume.stride(axis)
    if DONT_NEED is None or step < max(volume.stride()[1:]):
        return
    madvise = ctypes.CDLL(None).madvise
    madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    for channel in volume:
        first = channel.data_ptr() + start * step * volume.itemsize
        page = -(-first // mmap.PAGESIZE) * mmap.PAGESIZE
        length = first + (end - start) * step * volume.itemsize - page
        if length >= mmap.PAGESIZE:
            madvise(page, length // mmap.PAGESIZE * mmap.PAGESIZE, DONT_NEED)
