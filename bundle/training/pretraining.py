"""Pre-training of the slice encoder without labels: its engine step, its log, and the file for `encoder_weights`."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ignite.engine import Engine, Events
from monai.utils import CommonKeys as Keys
from torch import nn

from ..weights import save_atomically
from .engine import BagTrainer
from .vicreg import VICRegLoss

__all__ = ["LogTerms", "ViewTrainer", "save_encoder"]

logger = logging.getLogger(__name__)

# The variance term goes from 0.99, all slices at one point, to 0.
COLLAPSED = 0.95


class ViewTrainer(BagTrainer):
    """BagTrainer on two views of every slice: `network` is a ProjectedViews, `loss_function` a VICRegLoss.

    The loss of a batch is over all its real slices together, whatever bags they come from. `pred` and `evidence` of its
    output are the projections; a label is there for MONAI's sake, and is -1.
    """

    def _forward(self, engine: Any, batch: dict[str, Any], halves: bool = False) -> dict[str, Any]:
        image, label, (mask,), _ = engine.prepare_batch(
            batch, engine.state.device, engine.non_blocking, **engine.to_kwargs
        )
        with self._autocast():
            projections = engine.inferer(image, engine.network, mask)
        return {Keys.LABEL: label, "mask": mask, Keys.PRED: projections.first, "evidence": projections}


class LogTerms:
    """Means of an epoch over its batches: `train_loss`, and `loss_<term>` for each term before its weight.

    Attach it before the log. It warns at the end where the encoder has collapsed, as the variance term shows.

    Args:
        loss: whose `components` are noted.
    """

    def __init__(self, loss: VICRegLoss) -> None:
        self.loss = loss
        self._sums: dict[str, float] = {}
        self._batches = 0

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.EPOCH_STARTED, self._reset)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._add)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self)
        engine.add_event_handler(Events.COMPLETED, self._warn)

    def _reset(self) -> None:
        self._sums, self._batches = {}, 0

    def _add(self, engine: Engine) -> None:
        output: Any = engine.state.output
        terms = {f"loss_{name}": term for name, term in self.loss.components.items()}
        for name, value in {"train_loss": output[Keys.LOSS], **terms}.items():
            self._sums[name] = self._sums.get(name, 0.0) + float(value)
        self._batches += 1

    def __call__(self, engine: Engine) -> None:
        for name, total in self._sums.items():
            engine.state.metrics[name] = total / self._batches

    def _warn(self, engine: Engine) -> None:
        if engine.state.metrics.get("loss_variance", 0.0) > COLLAPSED:
            logger.warning("all slices look alike to the encoder: lower lr, or train for more epochs")


def save_encoder(encoder: nn.Module, path: str | Path, trained_on: Mapping[str, Any]) -> None:
    """Write an encoder's state dict as a file for `encoder_weights`; the same weights give the same bytes.

    Args:
        encoder: pre-trained.
        path: of the file.
        trained_on: datalist and fold, noted beside it.
    """
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in encoder.state_dict().items()}
    save_atomically({"encoder": state, "trained_on": dict(trained_on)}, path)
    logger.info("pre-trained encoder in %s: a training takes it as encoder_weights", path)
