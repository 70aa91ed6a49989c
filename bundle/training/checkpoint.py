"""Best weights, and checkpoints from which a run goes on as if it had never stopped."""

from __future__ import annotations

import logging
import math
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ignite.engine import Engine, Events
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from ..errors import InputError
from ..evaluation.scores import higher_is_better
from ..model.bag_network import BagNetwork
from ..recipe import Recipe
from ..weights import previous_of, read_checkpoint, save_atomically
from .distributed import gathered, is_first
from .handlers import AnnealTemperature
from .log import EpochLog

__all__ = ["BestModel", "Checkpoint", "EarlyStop", "RandomState"]

logger = logging.getLogger(__name__)


class BestModel:
    """Keeps the weights of the best epoch, with their recipe; of several processes the first writes them.

    Args:
        network: whose weights are saved.
        recipe: saved with them.
        path: of the weights file.
        evaluator: of the validation cases; its metrics of the epoch decide.
        metric: name of the deciding metric with its prefix, such as "val_auc".
        anneal: with it, epochs count only once the temperature has reached its end: before that the network is
            another one than inference would use.
        trained_on: datalist and fold, saved too, so that evaluation can refuse cases that the weights have seen.

    An epoch whose metric is not defined (NaN) is never the best. When no epoch qualifies, the last one is saved.
    """

    def __init__(
        self,
        network: BagNetwork,
        recipe: Recipe,
        path: str | Path,
        evaluator: Engine,
        metric: str,
        anneal: AnnealTemperature | None = None,
        trained_on: Mapping[str, Any] | None = None,
    ) -> None:
        self.network, self.recipe, self.path = network, recipe, Path(path)
        self.trained_on = dict(trained_on or {})
        self.evaluator, self.metric, self.anneal = evaluator, metric, anneal
        self.value, self.epoch, self.stale = math.nan, 0, 0

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.EPOCH_COMPLETED, self)
        engine.add_event_handler(Events.COMPLETED, self.fall_back)

    def __call__(self, engine: Engine) -> None:
        self._consider(engine)
        if engine.state.epoch >= (engine.state.max_epochs or 0):
            self.fall_back(engine)  # before the last checkpoint, after which a killed run has nothing left to do

    def _consider(self, engine: Engine) -> None:
        if self.evaluator.state.epoch != engine.state.epoch:
            return  # not validated in this epoch
        if self.anneal is not None and not self.anneal.at_end(engine):
            return
        if self.metric not in self.evaluator.state.metrics:
            known = ", ".join(self.evaluator.state.metrics)
            raise InputError(f"best_metric: validation gives no '{self.metric}', only {known}")
        value = float(self.evaluator.state.metrics[self.metric])
        self.stale += 1
        if math.isnan(value):
            return
        sign = 1 if higher_is_better(self.metric.removeprefix("val_")) else -1
        if not self.epoch or sign * value > sign * self.value:
            self.value, self.epoch, self.stale = value, engine.state.epoch, 0
            self._save(engine)
            logger.info("epoch %d is the best so far: %s %.4f", self.epoch, self.metric, self.value)

    def fall_back(self, engine: Engine) -> None:
        """Save the weights as they are where no epoch has been the best; for the end of a run."""
        if not self.epoch:
            logger.warning("no epoch had a defined %s to choose by: the last epoch's weights are kept", self.metric)
            self.epoch = engine.state.epoch
            self._save(engine)

    def _save(self, engine: Engine) -> None:
        if not is_first():
            return
        # NaN stands for "not defined" only here; weights_only loading accepts it.
        content = {
            "model": self.network.state_dict(),
            "recipe": self.recipe.text,
            "recipe_hash": self.recipe.hash,
            "epoch": engine.state.epoch,
            "metric": self.metric,
            "value": self.value,
            "trained_on": self.trained_on,
        }
        save_atomically(content, self.path)

    def state_dict(self) -> dict[str, Any]:
        """Best value and epoch, and how many validated epochs were not better since."""
        return {"metric": self.metric, "value": self.value, "epoch": self.epoch, "stale": self.stale}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what `state_dict` gave; values of another metric say nothing, and the choice starts anew."""
        if state["metric"] == self.metric:
            self.value, self.epoch, self.stale = state["value"], state["epoch"], state["stale"]


class EarlyStop:
    """Ends training after `patience` validated epochs without a better one; its count is BestModel's.

    Args:
        best: attached before.
        patience: epochs; 0 never stops.
    """

    def __init__(self, best: BestModel, patience: int) -> None:
        if patience < 0:
            raise InputError(f"early_stop_patience must be 0 (never) or more, not {patience}")
        self.best, self.patience = best, patience

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.EPOCH_COMPLETED, self)

    def __call__(self, engine: Engine) -> None:
        if self.patience and self.best.stale >= self.patience:
            logger.info("no better %s for %d epochs: training stops", self.best.metric, self.best.stale)
            self.best.fall_back(engine)  # now, while an average of the weights that was judged is in the network
            engine.terminate()


class RandomState:
    """The state of the global generators of PyTorch (CPU and GPU), NumPy and Python."""

    def state_dict(self) -> dict[str, Any]:
        """All states, as tensors and plain values."""
        state: Any = np.random.get_state()
        name, keys, position, has_gauss, cached = state
        return {
            "torch": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
            "numpy": [name, torch.from_numpy(keys.astype(np.int64)), position, has_gauss, cached],
            "python": random.getstate(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Put the generators back; a GPU's only where the number of GPUs is the same."""
        torch.set_rng_state(state["torch"])
        if torch.cuda.is_available() and len(state["cuda"]) == torch.cuda.device_count():
            torch.cuda.set_rng_state_all(state["cuda"])
        name, keys, position, has_gauss, cached = state["numpy"]
        np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, cached))
        random.setstate(state["python"])


class Checkpoint:
    """Saves everything that resuming needs after each epoch; attach it last.

    The loss scaler is taken from the engine. Of several processes the first saves and all restore; their number may be
    another one then.

    Args:
        objects: name → what has `state_dict` and `load_state_dict` (network under "model", optimiser, learning-rate
            schedule, best model, stability recorder); None values are left out.
        path: of the checkpoint; the one before is kept beside it.
        settings: of the run, see `bundle.run_settings`.
        log: is cut back to the resumed epoch.
        resume: whether `restore` looks for a checkpoint.
        resume_changed: go on although settings differ, with the new ones.
    """

    def __init__(
        self,
        objects: Mapping[str, Any],
        path: str | Path,
        settings: Mapping[str, str],
        log: EpochLog,
        resume: bool = True,
        resume_changed: bool = False,
    ) -> None:
        self.objects = {name: item for name, item in objects.items() if item is not None} | {"random": RandomState()}
        self.path, self.settings, self.log = Path(path), dict(settings), log
        self.resume, self.resume_changed = resume, resume_changed

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.EPOCH_COMPLETED, self)
        engine.add_event_handler(Events.COMPLETED, self._finish)

    def __call__(self, engine: Engine) -> None:
        # A run that is killed after it was told to stop must not train on.
        self._save(engine, finished=bool(engine.should_terminate))

    def _finish(self, engine: Engine) -> None:
        self._save(engine, finished=True)

    def _save(self, engine: Engine, finished: bool) -> None:
        if not is_first():
            return
        content = {name: item.state_dict() for name, item in self.objects.items()}
        content["trainer"] = {"epoch": engine.state.epoch, "iteration": engine.state.iteration, "finished": finished}
        content["settings"] = self.settings
        if (scaler := getattr(engine, "scaler", None)) is not None:
            content["scaler"] = scaler.state_dict()
        save_atomically(content, self.path, keep_previous=True)

    def restore(self, engine: Engine) -> None:
        """Bring all objects, the engine and the logs back to the last saved epoch; without a checkpoint do nothing.

        Raises:
            InputError: when there is one but `resume` is off, settings differ, it does not fit this network or
                optimiser, both files are damaged, or not all processes see the same one.
        """
        if self.path.exists():
            self._restore(engine)
        if len(set(gathered(engine.state.epoch))) > 1:
            raise InputError(f"{self.path} is not the same for all processes: set output_dir to a folder they share")

    def _restore(self, engine: Engine) -> None:
        if not self.resume:
            raise InputError(
                f"{self.path.parent} already holds a run: choose another output_dir, delete it, or set resume to true"
            )
        content = self._read()
        changed = self._compare(content["settings"])
        for name, item in self.objects.items():
            if name not in content:
                raise InputError(f"{self.path} has no '{name}' (from another kind of run): choose another output_dir")
            try:
                (_load_as_set_now if changed else _load)(item, content[name])
            except (KeyError, RuntimeError, ValueError) as error:
                raise InputError(f"'{name}' in {self.path} fits another network: choose another output_dir") from error
        if getattr(engine, "scaler", None) is not None and content.get("scaler"):
            engine.scaler.load_state_dict(content["scaler"])  # type: ignore[attr-defined]
        state = content["trainer"]
        engine.state.epoch, engine.state.iteration = state["epoch"], state["iteration"]
        if state["finished"] and not changed:
            engine.state.max_epochs = state["epoch"]  # an early stop: the run is over
        self.log.cut(state["epoch"])
        logger.info("going on after epoch %d of %s", state["epoch"], engine.state.max_epochs)

    def _read(self) -> dict[str, Any]:
        try:
            return read_checkpoint(self.path)
        except InputError:
            if not previous_of(self.path).exists():
                raise
            logger.warning("%s is damaged; going on from the checkpoint before it", self.path)
            return read_checkpoint(previous_of(self.path))

    def _compare(self, saved: Mapping[str, str]) -> bool:
        """Whether settings changed."""
        keys = [*self.settings, *(key for key in saved if key not in self.settings)]
        changed = [key for key in keys if saved.get(key) != self.settings.get(key)]
        if changed and not self.resume_changed:
            pairs = [(key, saved.get(key, "absent"), self.settings.get(key, "absent")) for key in changed[:5]]
            told = "; ".join(f"{key} {before} → {now}" for key, before, now in pairs)
            raise InputError(
                f"{self.path.parent} holds a run with other settings ({told}): choose another output_dir, or set "
                "resume_changed to true to go on with the new ones"
            )
        return bool(changed)


def _load(item: Any, state: Mapping[str, Any]) -> None:
    item.load_state_dict(state)


def _load_as_set_now(item: Any, state: Mapping[str, Any]) -> None:
    """Load what was learnt, but keep hyper-parameters that `state_dict` holds as well (rates, length of a schedule)."""
    if isinstance(item, Optimizer):
        groups = [{key: value for key, value in group.items() if key != "params"} for group in item.param_groups]
        item.load_state_dict(dict(state))
        for group, values in zip(item.param_groups, groups, strict=True):
            group.update(values)
    elif isinstance(item, LRScheduler):
        ours = {key: value for key, value in item.state_dict().items() if key != "_step_count"}
        item.load_state_dict({**state, **ours, "last_epoch": state["last_epoch"] - 1})
        item.step()  # to the place where the other was, which sets the rates
    else:
        item.load_state_dict(state)
