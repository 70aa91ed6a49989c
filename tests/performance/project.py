"""This project as its users run it: objects that configs/train.yaml and configs/inference.yaml build."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from ignite.engine import Engine, Events
from monai.bundle import ConfigParser
from torch import Tensor, nn

from bundle.errors import InputError
from bundle.weights import save_atomically

from .measuring import ROOT, seconds

__all__ = ["Inference", "Training", "network_of", "prepared_cohort", "save_weights"]

# Handlers that validate, watch, choose, save or show are no part of a step.
NOT_A_STEP = ("validate", "stability", "best_model", "@log", "checkpoint", "progress")


def _parser(name: str, changes: dict[str, Any]) -> ConfigParser:
    parser = ConfigParser()
    parser.read_config(str(ROOT / "configs" / f"{name}.yaml"))
    for key, value in {"bundle_root": str(ROOT), "progress": False, **changes}.items():
        parser[key] = value
    parser.get_parsed_content("imports")
    return parser


class _Waiting:
    """Seconds that an engine waited for its batches."""

    def __init__(self, engine: Engine) -> None:
        self.seconds, self._since = 0.0, 0.0
        engine.add_event_handler(Events.GET_BATCH_STARTED, self._asked)
        engine.add_event_handler(Events.GET_BATCH_COMPLETED, self._got)

    def _asked(self, engine: Engine) -> None:
        self._since = time.perf_counter()

    def _got(self, engine: Engine) -> None:
        self.seconds += time.perf_counter() - self._since


def network_of(device: str, changes: dict[str, Any]) -> nn.Module:
    """A new network of configs/train.yaml with some changes."""
    return _parser("train", {**changes, "device": f"$torch.device('{device}')"}).get_parsed_content("network")


def _training_parser(datalist: Path, cache_dir: Path, device: str, changes: dict[str, Any]) -> ConfigParser:
    places = {"dataset_dir": str(datalist.parent), "datalist": str(datalist), "cache_dir": str(cache_dir)}
    never = {"max_epochs": 100_000, "output_dir": str(cache_dir.parent / "unused")}
    return _parser("train", {**places, **never, "device": f"$torch.device('{device}')", **changes})


def prepared_cohort(datalist: Path, cache_dir: Path, device: str, **changes: Any) -> tuple[Callable[[], None], float]:
    """Dataset and loader of configs/train.yaml alone; arguments as for `Training`.

    Returns:
        A function that goes once through the loader, and the seconds that the dataset took to prepare all cases. What
        they need besides (the config, the steps of the preparation, the cache's folder) is built before.
    """
    parser = _training_parser(datalist, cache_dir, device, changes)
    for name in ("cache", "train::preprocessing"):
        parser.get_parsed_content(name)
    taken = seconds(lambda: parser.get_parsed_content("train::dataset"), torch.device(device))
    loader = parser.get_parsed_content("train::dataloader")

    def once() -> None:
        for _ in loader:
            pass

    return once, taken


class Training:
    """The trainer of configs/train.yaml, with a slice cache on disk, less validation, logs and checkpoints.

    Args:
        datalist: beside the folder of its images; all its cases are one epoch.
        cache_dir: of prepared slices.
        device: "cpu" or "cuda".
        changes: of the config, such as image_size.
    """

    def __init__(self, datalist: Path, cache_dir: Path, device: str, **changes: Any) -> None:
        self.parser = _training_parser(datalist, cache_dir, device, changes)
        handlers = self.parser["train::handlers"]
        self.parser["train::handlers"] = [h for h in handlers if not any(n in json.dumps(h) for n in NOT_A_STEP)]
        self.device = torch.device(device)
        self.network = self.parser.get_parsed_content("network")
        self.trainer = self.parser.get_parsed_content("train::trainer")
        self.trainer.logger.disabled = True
        self.trainer.state.max_epochs = 0
        self.num_bags = len(self.parser.get_parsed_content("train::dataset"))
        self._waiting = _Waiting(self.trainer)

    def epoch(self) -> None:
        """Every case once; the epochs go on counting."""
        before = self.trainer.state.epoch
        self.trainer.state.max_epochs = before + 1
        self.trainer.run()
        if self.trainer.state.epoch != before + 1:
            raise RuntimeError("the trainer did not train for an epoch")

    def measure(self) -> dict[str, float]:
        """Seconds a bag of one epoch, and what share of them the trainer waited for data."""
        self._waiting.seconds = 0.0
        taken = seconds(self.epoch, self.device)
        return {"seconds": taken / self.num_bags, "loading": self._waiting.seconds / taken}


def save_weights(path: Path, device: str, changes: dict[str, Any]) -> Path:
    """A model.pt as training writes it, whose weights differ enough from the start for errors to show.

    A norm that scales by 1 and shifts by 0, and probabilities next to 0.5, would hide what the encoder gets wrong.
    """
    parser = _parser("train", {**changes, "device": f"$torch.device('{device}')"})
    network, recipe = parser.get_parsed_content("network"), parser.get_parsed_content("recipe")
    generator = torch.Generator().manual_seed(0)
    content = network.state_dict()
    for name, tensor in content.items():
        if tensor.dim() == 1 and tensor.is_floating_point() and name.startswith("encoder"):
            low = 0.5 if name.endswith(("weight", "running_var")) else -0.2
            tensor.copy_(low + torch.rand(tensor.shape, generator=generator) * (1.0 if low > 0 else 0.4))
        elif name == "instance_classifier.weight":
            tensor.mul_(4)
    save_atomically({"model": content, "recipe": recipe.text, "recipe_hash": recipe.hash}, path)
    return path


class Inference:
    """The evaluator of configs/inference.yaml on all scans below a folder, without writing results.

    Args:
        weights: see `save_weights`.
        scans: the folder.
        device: "cpu" or "cuda".
        changes: of the config, such as amp.
    """

    def __init__(self, weights: Path, scans: Path, device: str, **changes: Any) -> None:
        places = {"dataset_dir": str(scans), "weights": str(weights), "output_dir": str(weights.parent / "unused")}
        changes = {**places, "device": f"$torch.device('{device}')", "handlers": [], **changes}
        self.parser = _parser("inference", changes)
        if "passes" in self.parser["dataloader"]:
            # They leave out what was done, and a measurement does it again.
            self.parser["dataloader::passes"] = None
        self.device = torch.device(device)
        self.network = self.parser.get_parsed_content("network")
        self.evaluator = self.parser.get_parsed_content("evaluator")
        self.evaluator.logger.disabled = True
        self.num_cases = len(self.parser.get_parsed_content("dataset"))
        self.probabilities: list[Tensor] = []
        self.critical: list[Tensor] = []
        self._waiting = _Waiting(self.evaluator)
        self.evaluator.add_event_handler(Events.ITERATION_COMPLETED, self._note)

    def _note(self, engine: Any) -> None:
        if "pred" in engine.state.output:
            self.probabilities += list(engine.state.output["pred"].float().softmax(dim=-1).cpu())
            self.critical += list(engine.state.output["evidence"].selection_weights.argmax(dim=1).cpu())

    @property
    def network_that_runs(self) -> Any:
        """The network inside the evaluator: a copy made for inference, not the one that holds the weights."""
        return self.evaluator.network.network

    def bags(self) -> list[Tensor]:
        """The image (N, C, H, W) of every case."""
        batches = self.parser.get_parsed_content("dataloader")
        return [image[mask] for batch in batches for image, mask in zip(batch["image"], batch["mask"], strict=True)]

    def run(self) -> list[Tensor]:
        """Probabilities (K,) of every case; `critical` then has its slices (S,) of the largest selection weight.

        Raises:
            InputError: when one was refused; its time would count as that of a case.
        """
        self.probabilities, self.critical = [], []
        self.evaluator.run()
        if len(self.probabilities) != self.num_cases:
            raise InputError(f"{self.num_cases - len(self.probabilities)} of {self.num_cases} scans were refused")
        return self.probabilities

    def measure(self) -> dict[str, float]:
        """Seconds a case, and what share of them the network waited for the case."""
        self._waiting.seconds = 0.0
        taken = seconds(self.run, self.device)
        return {"seconds": taken / self.num_cases, "loading": self._waiting.seconds / taken}
