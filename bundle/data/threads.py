"""Work on many slices, shared out to as many threads as PyTorch may use."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import TypeVar

import torch

__all__ = ["shared_out"]

Item = TypeVar("Item")
Result = TypeVar("Result")


def shared_out(function: Callable[[Sequence[Item]], Result], items: Sequence[Item]) -> list[Result]:
    """Call a function on shares of some items, one share a thread.

    NumPy, zlib and reading files let other threads run while they work. A data-loading process has one thread, for
    PyTorch as for this.

    Args:
        function: of a share, items that follow one another; it must be safe to run in several threads.
        items: at least one.

    Returns:
        The results, in the order of the items.

    Raises:
        Exception: what the function raised, of the first share in which it did.
    """
    count = min(torch.get_num_threads(), len(items))
    edges = [len(items) * k // count for k in range(count + 1)]
    shares = [items[start:end] for start, end in pairwise(edges)]
    if count == 1:
        return [function(shares[0])]
    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(function, shares))
