"""Interleaved repeats, paired ratios with their spread, and a folder that keeps what was measured."""

from __future__ import annotations

import hashlib
import json
import logging
import platform
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bundle.files import write_json

__all__ = ["Record", "Spread", "Store", "digest_of_files", "interleaved", "paired", "seconds", "spread", "surroundings"]

logger = logging.getLogger(__name__)
ROOT = Path(__file__).resolve().parents[2]
PACKAGES = (
    "torch", "monai", "numpy", "pydicom", "nibabel", "itk", "pytorch-ignite", "torchmil", "scipy", "python-gdcm"
)  # fmt: skip
Record = dict[str, dict[str, float]]


@dataclass(frozen=True)
class Spread:
    """A median with the quartiles around it, of `count` values."""

    median: float
    low: float
    high: float
    count: int

    def __str__(self) -> str:
        return f"{self.median:.2f} [{self.low:.2f}–{self.high:.2f}]"


def spread(values: Sequence[float]) -> Spread:
    """Median and quartiles (interpolated linearly between order statistics)."""
    low, median, high = np.percentile(np.asarray(values, dtype=np.float64), [25, 50, 75])
    return Spread(float(median), float(low), float(high), len(values))


def paired(records: Sequence[Record], over: str, under: str, what: str = "seconds") -> Spread:
    """How many times `under`'s value goes into `over`'s, within each repeat.

    A machine that slows down for a while slows both of a pair, so the ratio stays; the ratio of two medians would not.
    """
    return spread([record[over][what] / record[under][what] for record in records])


def seconds(action: Callable[[], Any], device: torch.device) -> float:
    """Wall-clock seconds of a call, with everything that it started on the device."""
    _wait(device)
    start = time.perf_counter()
    action()
    _wait(device)
    return time.perf_counter() - start


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def surroundings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Machine, versions, settings and sources: what makes two measurements comparable."""
    patterns = ("bundle/**/*.py", "configs/*.yaml", "tests/performance/*.py", "tests/data/dicom_factory.py")
    sources = [path for pattern in patterns for path in ROOT.glob(pattern)]
    digest = hashlib.sha256()
    for path in sorted(sources):
        digest.update(path.relative_to(ROOT).as_posix().encode() + b"\0" + path.read_bytes())
    return {
        "machine": {
            "system": platform.system(), "architecture": platform.machine(), "processor": _processor(),
            "threads": torch.get_num_threads(), "cpu_capability": torch.backends.cpu.get_cpu_capability(),
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        },
        "software": {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}},
        "settings": dict(settings),
        "sources": digest.hexdigest(),
    }  # fmt: skip


def digest_of_files(paths: Iterable[Path]) -> str:
    """Changes with the names, sizes and times of change of files and of all files below folders.

    What is measured on some scans must not be taken for what is measured on others; to read them all for it would take
    longer than it is worth. Only names from a given path on count, so that a folder can be moved.
    """
    digest = hashlib.sha256()
    for path in paths:
        for file in sorted(f for f in path.rglob("*") if f.is_file()) if path.is_dir() else [path]:
            name, state = file.relative_to(path.parent).as_posix(), file.stat()
            digest.update(f"{name}\0{state.st_size}\0{state.st_mtime_ns}\0".encode())
    return digest.hexdigest()[:12]


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")


class Store:
    """One JSON file for every finished measurement, in a folder of its own for every machine, version and setting.

    Args:
        folder: above these folders; made.
        around: see `surroundings`.
        fresh: leave what was measured before aside.
    """

    def __init__(self, folder: Path, around: Mapping[str, Any], fresh: bool = False) -> None:
        text = json.dumps(around, sort_keys=True)
        self.folder = folder / hashlib.sha256(text.encode()).hexdigest()[:12]
        self.fresh = fresh
        self._written: set[str] = set()

    def get(self, name: str) -> Any:
        """What was kept under a name, or None; a damaged file counts as not there."""
        if self.fresh and name not in self._written:
            return None
        path = self._path(name)
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            logger.warning("%s cannot be read (%s) and is measured again", path.name, type(error).__name__)
            return None

    def put(self, name: str, content: Any) -> None:
        """Keep something under a name, whole or not at all."""
        write_json(self._path(name), content)
        self._written.add(name)

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.json"


def interleaved(
    contenders: Mapping[str, Callable[[], Callable[[], dict[str, float]]]],
    repeats: int,
    store: Store,
    name: str,
    tell: Callable[[str], None],
) -> list[Record]:
    """Measure contenders in turn, A B C A B C …, so that what the machine does besides falls on all of them.

    Args:
        contenders: name → a function that makes it ready (and runs it once) and gives one that measures it once, as
            numbers among which is `seconds`. Nothing is made ready when all repeats are there.
        repeats: how many times each is measured.
        store: keeps every finished repeat; those that are there are not measured again.
        name: of the repeats in the store.
        tell: is told what goes on.

    Returns:
        One record a repeat: {contender: {what: number}}.
    """
    records: list[Record | None] = [_complete(store.get(f"{name}-{repeat}"), contenders) for repeat in range(repeats)]
    if None in records:
        ready = {}
        for contender, prepare in contenders.items():
            tell(f"{name}: preparing {contender}")
            ready[contender] = prepare()
        for repeat, known in enumerate(records):
            if known is None:
                record: Record = {}
                for contender, measure in ready.items():
                    tell(f"{name}: repeat {repeat + 1} of {repeats}, {contender}")
                    record[contender] = measure()
                store.put(f"{name}-{repeat}", record)
                records[repeat] = record
    return [record for record in records if record is not None]


def _complete(record: Any, contenders: Mapping[str, Any]) -> Record | None:
    whole = isinstance(record, dict) and record.keys() == contenders.keys()
    return record if whole and all(isinstance(r, dict) and r.get("seconds") for r in record.values()) else None
