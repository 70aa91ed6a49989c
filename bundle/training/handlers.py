"""Handlers of the training engine: small objects that are attached to it and act on its events."""

from __future__ import annotations

import logging
import math
import sys
from collections.abc import Callable, Mapping
from typing import Any

import torch
from ignite.engine import Engine, Events
from ignite.metrics import Metric
from monai.utils import CommonKeys as Keys
from torch import Tensor, nn
from tqdm import tqdm

from ..errors import InputError
from ..evaluation.scores import SCORES, score
from ..model.bag_network import BagNetwork
from ..model.selection import TwoPhaseSelection
from .distributed import gathered, is_first
from .engine import BagEvents
from .losses import DualStreamLoss
from .schedules import TemperatureSchedule

__all__ = [
    "AnnealTemperature",
    "BagProgressBar",
    "EpochScore",
    "GradientClip",
    "ScheduleRegularisation",
    "TwoPhaseSwitch",
    "named_scores",
]

logger = logging.getLogger(__name__)


class AnnealTemperature:
    """Sets the network's temperature at the start of every epoch, from the epoch's number alone.

    Args:
        network: whose `temperature` buffer is set.
        schedule: (epoch from 0, max_epochs) → temperature.
    """

    def __init__(self, network: BagNetwork, schedule: TemperatureSchedule) -> None:
        self.network, self.schedule = network, schedule

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.EPOCH_STARTED, self)

    def __call__(self, engine: Engine) -> None:
        value = self.schedule(engine.state.epoch - 1, engine.state.max_epochs or 1)
        self.network.temperature.fill_(value)
        engine.state.metrics["temperature"] = value

    def at_end(self, engine: Engine) -> bool:
        """Whether the present epoch's selection is the final one: at the end temperature and, with two phases, hard."""
        selection = self.network.selection
        if isinstance(selection, TwoPhaseSelection) and not bool(selection.hard_phase):
            return False
        return engine.state.epoch - 1 >= self.schedule.last_step(engine.state.max_epochs or 1)


class TwoPhaseSwitch:
    """Turns a TwoPhaseSelection from soft to hard at an epoch, and does nothing with any other selection.

    Args:
        network: with the selection.
        fraction: share of the epochs that are soft, in (0, 1).
    """

    def __init__(self, network: BagNetwork, fraction: float = 0.5) -> None:
        if not 0 < fraction < 1:
            raise InputError(f"two_phase_fraction must be in (0, 1), not {fraction}")
        self.network, self.fraction = network, fraction

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.EPOCH_STARTED, self)

    def __call__(self, engine: Engine) -> None:
        if isinstance(self.network.selection, TwoPhaseSelection):
            hard = engine.state.epoch - 1 >= round(self.fraction * (engine.state.max_epochs or 1))
            self.network.selection.hard_phase.fill_(hard)


class ScheduleRegularisation:
    """Sets the loss's λ₁ and λ₂ at the start of every epoch.

    Args:
        loss: whose `lambda_entropy` and `lambda_confidence` are set.
        entropy: (epoch from 0, max_epochs) → λ₁.
        confidence: the same for λ₂.
    """

    def __init__(
        self, loss: DualStreamLoss, entropy: Callable[[int, int], float], confidence: Callable[[int, int], float]
    ) -> None:
        self.loss, self.entropy, self.confidence = loss, entropy, confidence

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.EPOCH_STARTED, self)

    def __call__(self, engine: Engine) -> None:
        when = engine.state.epoch - 1, engine.state.max_epochs or 1
        self.loss.lambda_entropy, self.loss.lambda_confidence = self.entropy(*when), self.confidence(*when)
        engine.state.metrics["lambda_entropy"] = self.loss.lambda_entropy
        engine.state.metrics["lambda_confidence"] = self.loss.lambda_confidence


class GradientClip:
    """Scales the gradients down to an L2 norm of at most `max_norm`, once before every optimiser step.

    It acts on BagEvents.GRADIENTS_READY, when gradients are accumulated and, with a loss scaler, unscaled. The counts
    `steps` and `clipped` are of the present epoch. Gradients that float16 made infinite are left to the scaler, which
    skips that step, and are not counted; without a scaler they would ruin the weights and end the run.

    Args:
        network: whose gradients are clipped.
        max_norm: above 0.

    Raises:
        InputError: when called, on a gradient that is not finite and no scaler to skip the step.
    """

    def __init__(self, network: nn.Module, max_norm: float) -> None:
        if not max_norm > 0:
            raise InputError(f"grad_clip must be above 0, not {max_norm}")
        self.network, self.max_norm = network, max_norm
        self.steps = self.clipped = 0

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.EPOCH_STARTED, self._reset)
        engine.add_event_handler(BagEvents.GRADIENTS_READY, self)

    def _reset(self) -> None:
        self.steps = self.clipped = 0

    def __call__(self, engine: Engine) -> None:
        norm = float(nn.utils.clip_grad_norm_(self.network.parameters(), self.max_norm))
        if math.isfinite(norm):
            self.steps += 1
            self.clipped += norm > self.max_norm
        elif getattr(engine, "scaler", None) is None:
            raise InputError(
                f"the gradient became {norm} in epoch {engine.state.epoch}: lower lr or lambda_confidence, or set amp "
                "to false"
            )


class EpochScore(Metric):
    """A score of `bundle.evaluation.metrics` over all cases of an epoch, as an ignite metric.

    It is the same on all processes, over the cases of all of them.

    Args:
        name: of `SCORES`.
    """

    def __init__(self, name: str) -> None:
        if name not in SCORES:
            raise InputError(f"there is no metric {name!r}; choose one of {', '.join(SCORES)}")
        self.name = name
        super().__init__(output_transform=_prediction_and_label)

    def reset(self) -> None:
        """Forget the epoch before."""
        self._probabilities: list[Tensor] = []
        self._labels: list[Tensor] = []

    def iteration_completed(self, engine: Engine) -> None:
        """Take the engine's output; refused cases have no prediction to count."""
        output: Any = engine.state.output
        if not (isinstance(output, Mapping) and "refusal" in output):
            super().iteration_completed(engine)

    def update(self, output: tuple[Tensor, Tensor]) -> None:
        """Take the logits (B, K) and labels (B,) of a batch."""
        logits, label = output
        self._probabilities.append(logits.detach().float().softmax(dim=-1).cpu())
        self._labels.append(label.detach().cpu())

    def compute(self) -> float:
        """The score over the cases with a known label, NaN where it is not defined."""
        shares = gathered((self._labels, self._probabilities))
        if not any(labels for labels, _ in shares):
            return math.nan
        labels = torch.cat([batch for labels, _ in shares for batch in labels])
        probabilities = torch.cat([batch for _, probabilities in shares for batch in probabilities])
        known = labels >= 0
        return float(score(self.name, labels[known].numpy(), probabilities[known].numpy()))


def _prediction_and_label(output: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    return output[Keys.PRED], output[Keys.LABEL]


def named_scores(names: list[str], prefix: str = "") -> dict[str, EpochScore]:
    """Metrics for a MONAI engine, such as {"val_auc": EpochScore("auc")} for `["auc"]` and "val_"."""
    return {f"{prefix}{name}": EpochScore(name) for name in names}


class BagProgressBar:
    """One bar over all epochs of a run, with the epoch and the last loss; of several processes the first shows it.

    Args:
        description: what is going on, such as "training".
        enabled: false for none.
    """

    def __init__(self, description: str, enabled: bool = True) -> None:
        self.description, self.enabled = description, enabled
        self.bar: tqdm | None = None

    def attach(self, engine: Engine) -> None:
        if self.enabled and is_first():
            engine.add_event_handler(Events.ITERATION_COMPLETED, self)
            engine.add_event_handler(Events.COMPLETED, self.close)

    def __call__(self, engine: Engine) -> None:
        state: Any = engine.state
        if self.bar is None:
            total = (state.epoch_length or 0) * (state.max_epochs or 1)
            # A log file is not a terminal: there, a line every half minute is enough.
            interval = 0.5 if sys.stderr.isatty() else 30
            self.bar = tqdm(total=total, initial=state.iteration - 1, desc=self.description, mininterval=interval)
        loss = state.output.get(Keys.LOSS) if isinstance(state.output, dict) else None
        if loss is not None:
            self.bar.set_postfix_str(f"epoch {state.epoch}/{state.max_epochs}, loss {float(loss):.3f}", refresh=False)
        self.bar.update(1)

    def close(self) -> None:
        """End the bar's line."""
        if self.bar is not None:
            self.bar.close()
            self.bar = None
