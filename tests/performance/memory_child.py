"""One measurement of peak memory, in a process of its own: prints one line of JSON.

A process that measured before keeps what it once allocated, and a child of it starts with its peak in `getrusage`.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from .measuring import ROOT

__all__ = ["held_bytes", "measured", "peak_bytes", "peak_of"]

COMMAND = ("-m", __name__)
UNIT = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss, in bytes


def peak_bytes() -> int:
    """The most memory that this process held (resident set) since `_forget_peak`, or ever where that does nothing."""
    # Unlike ru_maxrss, this begins anew with the program.
    return _status("VmHWM")


def held_bytes() -> int:
    """The memory that this process holds now (resident set); its peak on a system that does not tell."""
    return _status("VmRSS")


def _status(key: str) -> int:
    try:
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * UNIT
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


def _forget_peak() -> None:
    # What was held while a network was built is no peak of what comes after. Some systems and containers forbid it.
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def _give_back() -> None:
    # What an allocator keeps of freed memory counts as held, and serves what comes after without a trace in the peak.
    # Elsewhere than in glibc nothing tells it to let go.
    with contextlib.suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


def peak_of(task: dict[str, Any]) -> dict[str, float]:
    """Run a task in a child process.

    Args:
        task: arguments of `inference` or `training` below under their names, and `task`, which of them.

    Returns:
        `seconds` of a second run, bytes held `before` the first and at the `peak` of both, and at the peak of the
        largest data-loading process (`worker`); nothing where the process was killed, for want of memory above all.

    Raises:
        RuntimeError: with what the child said, when it failed by itself.
    """
    done = subprocess.run(
        [sys.executable, *COMMAND, json.dumps(task)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if done.returncode < 0:
        return {}
    if done.returncode:
        raise RuntimeError(f"the child process failed: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def inference(
    weights: str, datalist: str, first: str, device: str, side: int, norm: str, shape: dict[str, Any], stock: bool
) -> Callable[[], Any]:
    """A function that classifies the cases of a datalist; a small one was read before, so that libraries are loaded."""
    from .project import Inference
    from .rivals import PlainNetwork, StockInference, stock_encoder

    def ours(cases: str) -> Inference:
        return Inference(Path(weights), Path(cases).parent, device, datalist=cases, section="training")

    if not stock:
        ours(first).bags()
        return ours(datalist).run
    network = PlainNetwork(stock_encoder(norm, shape), ours(datalist).network)
    rival = StockInference(network, side, torch.device(device))
    rival.transforms({"image": _images(first)[0]})
    return lambda: [rival(image) for image in _images(datalist)]


def _images(datalist: str) -> list[str]:
    return [case["image"] for case in json.loads(Path(datalist).read_text(encoding="utf-8"))["cases"]]


def training(datalist: str, cache_dir: str, device: str, changes: dict[str, Any]) -> Callable[[], Any]:
    """A function that trains for an epoch."""
    from .project import Training

    return Training(Path(datalist), Path(cache_dir), device, **changes).epoch


def measured(task: dict[str, Any]) -> dict[str, float]:
    """Do a task twice in this process; see `peak_of`."""
    arguments = dict(task)
    action = {"inference": inference, "training": training}[arguments.pop("task")](**arguments)
    gc.collect()  # of what contenders built only to take something out of it
    _give_back()
    _forget_peak()
    before = held_bytes()
    action()
    start = time.perf_counter()
    action()
    taken = time.perf_counter() - start
    worker = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * UNIT
    return {"seconds": taken, "before": before, "peak": peak_bytes(), "worker": worker}


if __name__ == "__main__":
    print(json.dumps(measured(json.loads(sys.argv[1]))))
