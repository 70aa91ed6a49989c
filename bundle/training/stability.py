"""The stability recorder: what shows whether training is steady, measured in every epoch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from ignite.engine import Engine, Events
from monai.utils import CommonKeys as Keys

from ..errors import InputError
from ..model.bag_network import evidence_of_class
from .distributed import add_up, gathered
from .engine import BagEvaluator
from .handlers import GradientClip
from .losses import DualStreamLoss

__all__ = ["StabilityRecorder"]

SUMS = ("bags", "correct", "total", "nll", "bag", "instance", "entropy", "confidence", "consistency")


class Look(NamedTuple):
    """What a watched case looked like.

    Attributes:
        critical: stored number of its critical slice.
        attention: (N,).
        scored: whether the scores of its slices differ; else the critical slice is the first, and means nothing.
    """

    critical: int
    attention: torch.Tensor
    scored: bool = True


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
    - `attention_drift`: of the watched cases, mean total variation ½ Σ|A - A'| between the attention over all slices
      and that when last looked: 0 where nothing moved, 1 where all of it went to other slices. Both are NaN for a
      network that tells no slices apart, such as a mean or one of whole stacks.
    - `loss_<component>`: mean over the bags of each component of the loss, before its weight.

    A batch is the one that all processes share; the figures are the same on each of them. `batch_nll` has the NLL of
    every complete batch of the last epoch, in order.

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
        self.seen: dict[str, Look] = {}
        self.batch_nll: list[float] = []
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
        self._now: dict[str, tuple[Look, bool]] = {}  # and whether the prediction is right

    def _watch(self, engine: Engine) -> None:
        output: dict[str, Any] = engine.state.output  # type: ignore[assignment]
        batch: dict[str, Any] = engine.state.batch  # type: ignore[assignment]
        predicted = output[Keys.PRED].argmax(dim=-1)
        right = (predicted == output[Keys.LABEL]).tolist()
        evidence = evidence_of_class(output["evidence"], predicted)
        critical = evidence.scores.masked_fill(~output["mask"], float("-inf")).argmax(dim=1).cpu()  # (B,)
        index = batch["slice_index"].gather(1, critical[:, None])[:, 0].tolist()
        for i, case in enumerate(batch["case"]):
            real = output["mask"][i]
            scores, attention = evidence.scores[i][real], evidence.attention[i][real].cpu()  # (N,)
            self._now[case] = Look(index[i], attention, bool(scores.min() < scores.max())), right[i]

    def __call__(self, engine: Engine) -> None:
        """Measure the epoch that has just ended."""
        metrics = engine.state.metrics
        rows = np.array(add_up([value for row in self._rows for value in row])).reshape(-1, len(SUMS))
        sums = dict(zip(SUMS, rows.T, strict=True))
        bags = sums["bags"]
        nll = (sums["nll"] / bags)[bags == bags.max()]
        metrics["train_loss"] = float(sums["total"].sum() / bags.sum())
        self.batch_nll = nll.tolist()
        metrics["train_nll_mean"] = float(nll.mean())
        metrics["train_nll_var"] = float(nll.var(ddof=1)) if len(nll) > 1 else math.nan
        metrics["train_nll_min"], metrics["train_nll_max"] = float(nll.min()), float(nll.max())
        metrics["clipped_share"] = self.clip.clipped / self.clip.steps if self.clip.steps else math.nan
        metrics["train_accuracy"] = float(sums["correct"].sum() / bags.sum())
        for name in SUMS[4:]:
            metrics[f"loss_{name}"] = float(sums[name].sum() / bags.sum())
        metrics["train_eval_accuracy"] = metrics["flip_rate"] = metrics["attention_drift"] = math.nan
        if self.interval and engine.state.epoch % self.interval == 0:
            device = self.evaluator.state.device
            # Looking must not change the run that is looked at: even an iteration over a DataLoader draws a number.
            with torch.random.fork_rng([device] if device.type == "cuda" else []):
                self.evaluator.run(engine.state.epoch)
            watched = {case: seen for share in gathered(self._now) for case, seen in share.items()}
            metrics["train_eval_accuracy"] = sum(right for _, right in watched.values()) / max(1, len(watched))
            now = {case: look for case, (look, _) in watched.items()}
            pairs = [(look, self.seen[case]) for case, look in now.items() if case in self.seen]
            # A run may go on with another preparation, in which a case has another number of slices.
            pairs = [pair for pair in pairs if pair[0].attention.shape == pair[1].attention.shape]
            # What tells no slices apart never moves, and would look like the steadiest of all.
            scored = [pair for pair in pairs if any(look.scored for look in pair)]
            attended = [pair for pair in pairs if any(look.attention.min() < look.attention.max() for look in pair)]
            if scored:
                metrics["flip_rate"] = float(np.mean([one.critical != other.critical for one, other in scored]))
            if attended:
                metrics["attention_drift"] = float(np.mean([_distance(one, other) for one, other in attended]))
            self.seen = now

    def state_dict(self) -> dict[str, Any]:
        """Critical slice and attention of every watched case when last looked."""
        return {"seen": {case: tuple(look) for case, look in self.seen.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what `state_dict` gave."""
        self.seen = {case: Look(*look) for case, look in state["seen"].items()}


def _distance(one: Look, other: Look) -> float:
    return 0.5 * float((one.attention - other.attention).abs().sum())
