"""The stability recorder: what shows whether training is steady, measured in every epoch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from ignite.engine import Engine, Events
from monai.utils import CommonKeys as Keys

from ..errors import InputError
from ..model.network import evidence_of_class
from .distributed import add_up, gathered
from .engine import BagEvaluator
from .handlers import GradientClip
from .losses import DualStreamLoss

__all__ = ["StabilityRecorder"]

SUMS = ("bags", "correct", "total", "nll", "bag", "instance", "entropy", "confidence")


class StabilityRecorder:
    """Puts these into the trainer's metrics at the end of every epoch.

    - `train_loss`: mean total loss of the bags.
    - `train_nll_mean`, `_var`, `_min`, `_max`: of the unsmoothed negative log-likelihood of each training batch, in
      nats, before the optimiser step on it. The variance is over batches, with n - 1. An incomplete last batch is left
      out (fewer bags have a larger variance by chance) unless it is the only one.
    - `clipped_share`: of the optimiser steps.
    - `train_accuracy`: of the training passes themselves (train mode, drawn and augmented bags), and
      `train_eval_accuracy`: of the watched cases in evaluation mode, with all slices. Far apart, they show a norm or
      dropout whose two modes disagree.
    - `flip_rate`: share of the watched cases whose critical slice (highest score) is another one than when last looked.
    - `loss_<component>`: mean over the bags of each component of the loss, before its weight.

    A batch is the one that all processes share; the figures are the same on each of them.

    Args:
        loss: of the trainer.
        clip: of the trainer.
        evaluator: over the watched cases (training cases, all slices), run by this handler.
        interval: epochs between two looks at the watched cases; 0 never looks.
    """

    def __init__(self, loss: DualStreamLoss, clip: GradientClip, evaluator: BagEvaluator, interval: int = 1) -> None:
        if interval < 0:
            raise InputError(f"stability_interval must be 0 (never) or more, not {interval}")
        self.loss, self.clip, self.evaluator, self.interval = loss, clip, evaluator, interval
        self.critical: dict[str, int] = {}
        self._reset()

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.EPOCH_STARTED, self._reset)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._batch)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self)
        self.evaluator.add_event_handler(Events.EPOCH_STARTED, self._reset_watch)
        self.evaluator.add_event_handler(Events.ITERATION_COMPLETED, self._watch)

    def _reset(self) -> None:
        self._rows: list[list[float]] = []  # of each batch, sums over this process's bags, named by SUMS

    def _batch(self, engine: Engine) -> None:
        output: dict[str, Any] = engine.state.output  # type: ignore[assignment]
        label = output[Keys.LABEL]
        correct = int((output[Keys.PRED].argmax(dim=-1) == label).sum())
        means = {**self.loss.components, "total": output[Keys.LOSS]}
        self._rows.append([len(label), correct, *(len(label) * float(means[name]) for name in SUMS[2:])])

    def _reset_watch(self) -> None:
        self._now: dict[str, tuple[int, bool]] = {}  # critical slice, and whether the prediction is right

    def _watch(self, engine: Engine) -> None:
        output: dict[str, Any] = engine.state.output  # type: ignore[assignment]
        batch: dict[str, Any] = engine.state.batch  # type: ignore[assignment]
        predicted = output[Keys.PRED].argmax(dim=-1)
        right = (predicted == output[Keys.LABEL]).tolist()
        scores = evidence_of_class(output["evidence"], predicted).scores
        critical = scores.masked_fill(~output["mask"], float("-inf")).argmax(dim=1).cpu()  # (B,)
        index = batch["slice_index"].gather(1, critical[:, None])[:, 0]
        self._now.update(zip(batch["case"], zip(index.tolist(), right, strict=True), strict=True))

    def __call__(self, engine: Engine) -> None:
        """Measure the epoch that has just ended."""
        metrics = engine.state.metrics
        rows = np.array(add_up([value for row in self._rows for value in row])).reshape(-1, len(SUMS))
        sums = dict(zip(SUMS, rows.T, strict=True))
        bags = sums["bags"]
        nll = (sums["nll"] / bags)[bags == bags.max()]
        metrics["train_loss"] = float(sums["total"].sum() / bags.sum())
        metrics["train_nll_mean"] = float(nll.mean())
        metrics["train_nll_var"] = float(nll.var(ddof=1)) if len(nll) > 1 else math.nan
        metrics["train_nll_min"], metrics["train_nll_max"] = float(nll.min()), float(nll.max())
        metrics["clipped_share"] = self.clip.clipped / self.clip.steps if self.clip.steps else math.nan
        metrics["train_accuracy"] = float(sums["correct"].sum() / bags.sum())
        for name in ("bag", "instance", "entropy", "confidence"):
            metrics[f"loss_{name}"] = float(sums[name].sum() / bags.sum())
        metrics["train_eval_accuracy"] = metrics["flip_rate"] = math.nan
        if self.interval and engine.state.epoch % self.interval == 0:
            device = self.evaluator.state.device
            # Looking must not change the run that is looked at: even an iteration over a DataLoader draws a number.
            with torch.random.fork_rng([device] if device.type == "cuda" else []):
                self.evaluator.run(engine.state.epoch)
            watched = {case: seen for share in gathered(self._now) for case, seen in share.items()}
            metrics["train_eval_accuracy"] = sum(right for _, right in watched.values()) / max(1, len(watched))
            before = [case for case in watched if case in self.critical]
            if before:
                flips = sum(watched[case][0] != self.critical[case] for case in before)
                metrics["flip_rate"] = flips / len(before)
            self.critical = {case: index for case, (index, _) in watched.items()}

    def state_dict(self) -> dict[str, Any]:
        """The critical slice of every watched case when last looked."""
        return {"critical": dict(self.critical)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what `state_dict` gave."""
        self.critical = dict(state["critical"])
