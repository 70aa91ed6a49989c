from __future__ import annotations

import gc
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from bundle.data.memory import give_back

SIDE, SLICES = 256, 64


def held() -> int:
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS"))


def volume_of(channels: int, order: tuple[int, int, int]) -> torch.Tensor:
    """(C, X, Y, Z) of ones, axes in that order in memory, within one voxel more on both sides of X and Y."""
    sides = {1: SIDE + 2, 2: SIDE + 2, 3: SLICES}
    laid_out = torch.from_numpy(np.ones((channels, *(sides[axis] for axis in order)), dtype=np.float32))
    return laid_out.permute(0, *(1 + order.index(axis) for axis in (1, 2, 3)))[:, 1:-1, 1:-1]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="memory in use is read from /proc")
@pytest.mark.parametrize("channels", [1, 3])
def test_memory_of_used_slices_goes_and_the_rest_stays(channels: int) -> None:
    volume = volume_of(channels, (3, 2, 1))
    gc.collect()
    before = held()
    for start in range(0, 48, 16):
        give_back(volume, 3, start, start + 16)
    after = held()  # a comparison leaves memory of its own behind, so none comes before
    assert bool((volume[..., 48:] == 1).all())
    assert before - after > 0.9 * channels * 48 * (SIDE + 2) ** 2 * 4


@pytest.mark.parametrize("order", [(1, 2, 3), (2, 1, 3), (3, 2, 1)])
@pytest.mark.parametrize("axis", [1, 2, 3])
def test_no_slice_that_is_kept_is_touched(order: tuple[int, int, int], axis: int) -> None:
    volume = volume_of(2, order)
    for start in (0, 1, 7):
        give_back(volume, axis, start, start + 5)
        assert bool((volume.narrow(axis, start + 5, volume.shape[axis] - start - 5) == 1).all())


def test_slices_of_less_than_a_page() -> None:
    volume = torch.ones(2, 5, 4, 9)
    give_back(volume.permute(0, 3, 2, 1), 1, 0, 3)
    assert bool((volume == 1).all())
