"""The training log: a row an epoch and a row a batch as CSV, and the epochs for TensorBoard."""

from __future__ import annotations

import csv
import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ignite.engine import Engine, Events
from torch.optim import Optimizer
from torch.utils.tensorboard import SummaryWriter

from ..files import replacing
from .distributed import is_first
from .stability import StabilityRecorder

__all__ = ["EpochLog"]

logger = logging.getLogger(__name__)

COUNTS = ("epoch", "batch")
# What a person who watches wants to know; the table has the rest.
TOLD = (
    "train_loss", "train_nll_var", "train_accuracy", "val_nll", "val_accuracy", "val_auc", "flip_rate", "temperature"
)  # fmt: skip


class EpochLog:
    """Collects the metrics of trainer and evaluator after every epoch and writes them; attach it after both.

    Of several processes only the first does so.

    Args:
        output_dir: gets `epochs.csv`, `batches.csv` (epoch, batch from 1, NLL of each complete training batch in nats)
            and the TensorBoard folder `events`.
        optimizer: whose learning rates are noted as `lr` (encoder) and `classifier_lr`.
        evaluators: engines whose metrics are noted in the epochs in which they ran.
        stability: whose batches are noted; None for none.
        tensorboard: whether to write for TensorBoard.
    """

    def __init__(
        self,
        output_dir: str | Path,
        optimizer: Optimizer,
        evaluators: list[Engine],
        stability: StabilityRecorder | None = None,
        tensorboard: bool = True,
    ):
        self.epochs = _Table(Path(output_dir) / "epochs.csv")
        self.batches = _Table(Path(output_dir) / "batches.csv")
        self.events_dir = Path(output_dir) / "events"
        self.optimizer, self.evaluators, self.tensorboard = optimizer, evaluators, tensorboard
        self.stability = stability
        self._writer: SummaryWriter | None = None

    def attach(self, engine: Engine) -> None:
        if not is_first():
            return
        engine.add_event_handler(Events.EPOCH_COMPLETED, self)
        engine.add_event_handler(Events.COMPLETED, self.close)
        engine.add_event_handler(Events.EXCEPTION_RAISED, self._close_and_raise)

    def __call__(self, engine: Engine) -> None:
        epoch = engine.state.epoch
        row: dict[str, Any] = {"epoch": epoch, **_numbers(engine.state.metrics)}
        for evaluator in self.evaluators:
            if evaluator.state.epoch == epoch:
                row.update(_numbers(evaluator.state.metrics))
        for name, group in zip(("lr", "classifier_lr"), self.optimizer.param_groups, strict=False):
            row[name] = group["lr"]
        self.epochs.add([row])
        if self.stability is not None:
            nll = self.stability.batch_nll
            self.batches.add([{"epoch": epoch, "batch": i, "nll": value} for i, value in enumerate(nll, start=1)])
        if self.tensorboard:
            if self._writer is None:
                # purge_step hides what a killed run wrote after its last checkpoint.
                self._writer = SummaryWriter(str(self.events_dir), purge_step=epoch)
            for name, value in row.items():
                if name != "epoch" and not math.isnan(value):
                    self._writer.add_scalar(name, value, epoch)
            self._writer.flush()
        told = [f"{name} {row[name]:.3f}" for name in TOLD if not math.isnan(row.get(name, math.nan))]
        logger.info("epoch %d/%d: %s", epoch, engine.state.max_epochs, ", ".join(told))

    def cut(self, epoch: int) -> None:
        """Take the log of an earlier process up to and with this epoch; later rows and a torn last row are dropped."""
        if is_first():
            self.epochs.cut(epoch)
            self.batches.cut(epoch)

    def close(self) -> None:
        """Close the TensorBoard file."""
        if self._writer is not None:
            self._writer.close()

    def _close_and_raise(self, _: Engine, error: BaseException) -> None:
        self.close()
        raise error  # ignite takes an exception as dealt with once a handler has seen it


class _Table:
    """A CSV file with a column `epoch`, written anew with each addition, so that a kill leaves no torn row."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: list[dict[str, Any]] = []

    def add(self, rows: list[dict[str, Any]]) -> None:
        self.rows += rows
        self._write()

    def cut(self, epoch: int) -> None:
        self.rows = []
        if not self.path.exists():
            return
        with self.path.open(newline="", encoding="utf-8") as file:
            for row in csv.DictReader(file):
                if (row.get("epoch") or "").isdigit() and int(row["epoch"]) <= epoch:
                    # Empty cells are kept, so that the columns keep their order.
                    numbers = {key: float(value) if value else math.nan for key, value in row.items() if key}
                    self.rows.append({**numbers, **{key: int(row[key]) for key in COUNTS if key in row}})
        self._write()

    def _write(self) -> None:
        columns = list(dict.fromkeys(key for row in self.rows for key in row))
        with replacing(self.path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, columns, restval="", lineterminator="\n")
            writer.writeheader()
            for row in self.rows:
                empty = {key: "" for key, value in row.items() if math.isnan(value)}
                writer.writerow({**row, **empty})


def _numbers(metrics: Mapping[str, Any]) -> dict[str, float]:
    return {name: float(value) for name, value in metrics.items() if isinstance(value, (int, float))}
