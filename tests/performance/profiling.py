"""Where a step's time goes: shares of its stages (cProfile) and the costliest operators (torch.profiler)."""

from __future__ import annotations

import cProfile
import pstats
from collections.abc import Callable
from typing import Any

from torch.profiler import ProfilerActivity, profile, supported_activities

__all__ = ["REST", "profiled", "shares"]

REST = "the rest"

# Stage → functions (end of the file's path, name) whose time, with what they call, is its time. None calls one of
# another stage; where one calls another of its own stage, that is not counted twice.
STAGES: dict[str, tuple[tuple[str, str], ...]] = {
    "reading the scan": (("bundle/data/reader.py", "__call__"),),
    "preparing": (
        ("bundle/data/volume_transforms.py", "__call__"), ("bundle/data/transforms.py", "__call__"),
        ("bundle/data/parts.py", "_in_parts"), ("bundle/data/parts.py", "assembled"), ("bundle/data/parts.py", "parts"),
        ("tests/performance/plain.py", "_step_by_step"),
    ),
    "drawing slices": (("bundle/data/sampling.py", "__call__"),),
    "reading the cache": (("bundle/data/cache.py", "open"), ("bundle/data/cache_entry.py", "slices")),
    "augmenting": (("bundle/data/augment.py", "__call__"),),
    "collating": (("bundle/data/collate.py", "collate_bags"),),
    "encoding": (("bundle/model/bag_network.py", "encode"),),
    "head": (("bundle/model/network.py", "head"),),
    "loss": (("bundle/training/losses.py", "forward"),),
    "backward": (("torch/_tensor.py", "backward"),),
    "optimiser": (("torch/optim/adamw.py", "step"), ("torch/optim/adam.py", "step")),
}  # fmt: skip


def shares(action: Callable[[], Any]) -> dict[str, float]:
    """Seconds of every stage in one call, and of the rest; only this thread is seen."""
    profiler = cProfile.Profile()
    profiler.runcall(action)
    stats: Any = pstats.Stats(profiler)
    taken = dict.fromkeys(STAGES, 0.0)
    for function, (_, _, _, cumulative, callers) in stats.stats.items():
        for stage, places in STAGES.items():
            if _is_one_of(function, places):
                taken[stage] += cumulative - sum(c[3] for caller, c in callers.items() if _is_one_of(caller, places))
    rest = stats.total_tt - sum(taken.values())
    return {**{stage: value for stage, value in taken.items() if value > 0}, REST: max(0.0, rest)}


def _is_one_of(function: tuple[str, int, str], places: tuple[tuple[str, str], ...]) -> bool:
    file, _, name = function
    return any(file.endswith(end) and name == wanted for end, wanted in places)


def profiled(action: Callable[[], Any], rows: int = 12) -> str:
    """Shares of the stages of one call, and the operators of another, as text."""
    stages = shares(action)
    total = sum(stages.values())
    lines = [f"  {stage:<18} {value:8.3f} s {value / total:6.1%}" for stage, value in stages.items()]
    with profile(activities=[a for a in supported_activities() if a is not ProfilerActivity.XPU]) as operators:
        action()
    table = operators.key_averages().table(sort_by="self_cpu_time_total", row_limit=rows, max_name_column_width=40)
    return "\n".join([*lines, table])
