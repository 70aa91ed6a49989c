"""Where torch's channels-last group norm is slow on a CPU: its time over that of the contiguous kernel and both copies.

python -m tests.performance.group_norm, from the repository root; one thread. Prints evaluation / training of each size.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

GROUPS, SIDES, CHANNELS = 8, (8, 16, 28, 32, 64, 112), (2, 4, 8, 16, 32)
VALUES, REPEATS = 2_000_000, 6


class GoesRound(nn.GroupNorm):
    """Group norm on a contiguous copy, whatever the size."""

    def forward(self, input: Tensor) -> Tensor:
        """(M, C, H, W), channels-last."""
        return super().forward(input.contiguous()).contiguous(memory_format=torch.channels_last)


def least_time(function: Callable[[], object]) -> float:
    """Seconds, the least of some repeats after one that does not count."""
    function()
    times = []
    for _ in range(REPEATS):
        begun = time.perf_counter()
        function()
        times.append(time.perf_counter() - begun)
    return min(times)


def times(kind: type[nn.GroupNorm], channels: int, side: int, dtype: torch.dtype) -> tuple[float, float]:
    """Seconds of evaluation and of training, forward and backward."""
    norm, width = kind(GROUPS, GROUPS * channels), GROUPS * channels
    planes = max(1, min(256, VALUES // (width * side * side)))
    image = torch.randn(planes, width, side, side, dtype=dtype).contiguous(memory_format=torch.channels_last)
    given, gradient = image.clone().requires_grad_(), torch.randn_like(image)

    def evaluate() -> None:
        with torch.no_grad():
            norm(image)

    return least_time(evaluate), least_time(lambda: norm(given).backward(gradient))


def main() -> None:
    """Print a table for each type."""
    torch.set_num_threads(1)
    for dtype in (torch.bfloat16, torch.float32):
        print(f"\n| channels a group, {dtype} | " + " | ".join(f"{side}²" for side in SIDES) + " |")
        print("|---" * (1 + len(SIDES)) + "|")
        for channels in CHANNELS:
            cells = []
            for side in SIDES:
                native, other = (times(kind, channels, side, dtype) for kind in (nn.GroupNorm, GoesRound))
                cells.append(" / ".join(f"{a / b:.1f}" for a, b in zip(native, other, strict=True)))
            print(f"| {channels} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
