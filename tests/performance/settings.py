"""What is measured: sizes of bags, scans and cohorts. The smoke test has small ones."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml

from bundle.training.engine import autocast_dtype

from .measuring import ROOT, Store

__all__ = ["Run", "Settings"]

LARGE = 160  # pixels: slices from here on take several times as long, so fewer are measured


@dataclass(frozen=True)
class Settings:
    """Numbers on which a result depends.

    Args:
        device: "cpu" or "cuda".
        bag_size: slices of a training bag.
        batch_size: bags of a training step.
        bags: of one measured epoch, at least one batch; half of them for large slices.
        cohort: side in pixels and slices of a volume of the training cohort.
        study_slices: of a series for inference.
        series_sides: pixels along rows and columns of these series.
        studies: of a throughput measurement; half of them for large slices.
        encoder: changes to the encoder of configs/train.yaml.
        memory_slices: slices of the series whose peak memory is compared.
        grow_bags: slices a training bag.
        grow_cases: cases a cohort.
        grow_workers: data-loading processes.
        grow_side: pixels of a slice of all growth measurements.
        memory_sides: further pixels of a slice at which this project's memory is compared.
        compiled: try torch.compile for the limit, which takes some time.
    """

    device: str = "cpu"
    bag_size: int = 64
    batch_size: int = 1
    bags: int = 1
    cohort: tuple[int, int] = (256, 96)
    study_slices: int = 64
    series_sides: tuple[int, ...] = (256, 512)
    studies: int = 10
    encoder: dict[str, Any] = field(default_factory=dict)
    memory_slices: tuple[int, ...] = (32, 128, 512)
    grow_bags: tuple[int, ...] = (16, 64, 256, 512)
    grow_cases: tuple[int, ...] = (4, 8, 16)
    grow_workers: tuple[int, ...] = (0, 1, 2)
    grow_side: int = 128
    memory_sides: tuple[int, ...] = (224,)
    compiled: bool = True

    def bags_at(self, size: int) -> int:
        """Bags of a measured epoch, in whole batches."""
        return math.ceil(self.fewer(self.bags, size) / self.batch_size) * self.batch_size

    def fewer(self, count: int, size: int) -> int:
        """A count, halved for large slices."""
        return count if size < LARGE else max(1, count // 2)

    @property
    def shape(self) -> dict[str, Any]:
        """Arguments of the encoder, as configs/train.yaml with the changes, for one channel."""
        config = yaml.safe_load((ROOT / "configs" / "train.yaml").read_text(encoding="utf-8"))
        arguments = {key: value for key, value in config["encoder"].items() if key != "_target_"}
        return {**arguments, "n_input_channels": 1, **self.encoder}

    @property
    def num_features(self) -> int:
        """Features of the encoder."""
        return int(self.shape["block_inplanes"][-1])

    def changes(self, size: int, norm: str) -> dict[str, Any]:
        """Of configs/train.yaml."""
        encoder = {f"encoder::{key}": value for key, value in self.encoder.items()}
        return {
            "image_size": [size, size], "norm": norm, "bag_size": self.bag_size, "batch_size": self.batch_size,
            "num_features": self.num_features, **encoder,
        }  # fmt: skip


@dataclass(frozen=True)
class Run:
    """One call of the benchmark.

    Args:
        settings: what is measured.
        repeats: of each measurement; None takes four, and three for large slices and where many scans are read.
        work: folder for scans, caches and weights.
        store: of finished measurements.
        tell: shows what goes on.
    """

    settings: Settings
    repeats: int | None
    work: Path
    store: Store
    tell: Callable[[str], None]

    @property
    def device(self) -> torch.device:
        """Of networks."""
        return torch.device(self.settings.device)

    @property
    def low(self) -> torch.dtype | None:
        """The 16-bit type that the project's own autocast would take here."""
        return autocast_dtype(self.device, True)

    def tell_of(self, name: str, text: str) -> None:
        """Show what goes on in a measurement of that name."""
        self.tell(f"{name}: {text}")

    def repeats_at(self, size: int) -> int:
        """Of a measurement at a size of slices in pixels."""
        return self.repeats or (4 if size < LARGE else 3)
