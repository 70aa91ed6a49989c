"""Training that one process does whole and several share: `python -m tests.training.processes RANK WORLD OUT`.

Everything in one pair of processes, because starting them takes longer than all scenarios.
"""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from ignite.engine import Events
from torch import Tensor, nn
from torch.utils.data import DataLoader

from bundle.data.collate import collate_bags
from bundle.data.dataset import BagSampler
from bundle.errors import InputError
from bundle.model import bag_network
from bundle.model.bag_network import Evidence
from bundle.model.encoder import FrozenBatchNorm2d
from bundle.model.encoding import SliceEncoding
from bundle.model.network import DualStreamMIL
from bundle.model.selection import (
    EntmaxSelection,
    GumbelSelection,
    HardSelection,
    MeanSelection,
    SoftSelection,
    StraightThroughSelection,
    TopKSelection,
    TwoPhaseSelection,
)
from bundle.model.sync_norm import with_synced_norms
from bundle.training.distributed import (
    BagBatches,
    add_up,
    data_parallel,
    end_group,
    gathered,
    group_rank,
    group_size,
    is_first,
    own_share,
)
from bundle.training.engine import BagEvaluator, BagEvents, BagTrainer
from bundle.training.handlers import GradientClip, named_scores
from bundle.training.losses import BagCrossEntropy, DualStreamLoss, MILFocalLoss
from bundle.training.stability import StabilityRecorder

from .conftest import FEATURES, make_bag

SELECTIONS = {
    "soft": SoftSelection, "hard": HardSelection, "straight_through": StraightThroughSelection,
    "gumbel": GumbelSelection, "top_k": lambda: TopKSelection(2), "entmax": lambda: EntmaxSelection(1.5),
    "sparsemax": lambda: EntmaxSelection(2.0), "mean": MeanSelection, "two_phase": TwoPhaseSelection,
}  # fmt: skip
NORMS = {
    "none": nn.Identity, "group": lambda: nn.GroupNorm(2, 4), "instance": lambda: nn.InstanceNorm2d(4, affine=True),
    "batch": lambda: nn.BatchNorm2d(4), "frozen_batch": lambda: FrozenBatchNorm2d(4).eval(),
    "plain_batch": lambda: nn.BatchNorm2d(4, affine=False, track_running_stats=False),
}  # fmt: skip
NO_TERMS = {"instance_weight": 0.0, "lambda_entropy": 0.0, "lambda_confidence": 0.0}

SCENARIOS: dict[str, dict[str, Any]] = {
    f"{selection}, {scorer}, {name}": {"selection": selection, "scorer": scorer, "terms": terms}
    for selection in SELECTIONS
    for scorer in ("tied", "separate")
    for name, terms in (("all terms", {"lambda_entropy": 0.3, "lambda_confidence": 0.2}), ("bag loss alone", NO_TERMS))
}
SCENARIOS |= {f"norm {norm}": {"norm": norm} for norm in NORMS}
SCENARIOS |= {
    # 7 bags in batches of 3: groups of (3, 3) and (1).
    "accumulation": {"accumulation_steps": 2, "cases": 7, "batch_size": 3},
    # 8 bags in batches of 3: a group of (3, 3, 2).
    "accumulation, smaller last batch": {"accumulation_steps": 3, "cases": 8, "batch_size": 3},
    "accumulation, batch norm": {"accumulation_steps": 2, "cases": 7, "batch_size": 3, "norm": "batch"},
    "more batches than one, odd": {"cases": 9, "batch_size": 4, "max_epochs": 2, "norm": "batch"},
    "class weights": {"bag_loss": lambda: BagCrossEntropy(0.1, [1.0, 5.0])},
    "focal": {"bag_loss": lambda: MILFocalLoss(2.0, [1.0, 5.0])},
    "three classes": {"num_classes": 3},
    "clipped": {"max_norm": 0.1},
    "frozen encoder": {"frozen": True},
    "frozen encoder, batch norm": {"frozen": True, "norm": "batch"},
    "batch norms of one dimension and without momentum": {"wide_norm": True, "norm": "batch"},
    "consistency": {"terms": {"lambda_consistency": 1e3}, "cases": 7, "batch_size": 3, "accumulation_steps": 2},
    "consistency, batch norm": {"terms": {"lambda_consistency": 1e3}, "norm": "batch"},
    "recomputed": {"recompute": True},
    "recomputed, batch norm": {"recompute": True, "norm": "batch", "wide_norm": True},
    "float32": {"dtype": torch.float32},
    "float32, batch norm": {"dtype": torch.float32, "norm": "batch"},
}


class Bags:
    """Bags of different length, by the key of a BagSampler."""

    def __init__(self, num: int, num_classes: int, dtype: torch.dtype) -> None:
        self.num, self.num_classes, self.dtype = num, num_classes, dtype

    def __len__(self) -> int:
        return self.num

    def __getitem__(self, key: int | tuple[int, int]) -> dict[str, Any]:
        case = key[1] if isinstance(key, tuple) else key
        bag = make_bag(case, 3 + case % 4, case % self.num_classes)
        return {**bag, "image": bag["image"].to(self.dtype)}


class Encoder(nn.Sequential):
    def __init__(self, norm: str, wide_norm: bool) -> None:
        layers = [nn.Conv2d(1, 4, 3), NORMS[norm](), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
        last = nn.BatchNorm1d(FEATURES, momentum=None) if wide_norm else nn.Identity()
        super().__init__(*layers, nn.Linear(4, FEATURES), last)


class Network(DualStreamMIL):
    """Keeps float64, which shows differences that rounding to float32 would hide."""

    def encode_slices(self, slices: Tensor) -> Tensor:
        return self.encoding(self.encoder, slices)


class Run:
    """A trainer with the handlers whose figures are compared, and what they saw."""

    def __init__(
        self, *, selection: str = "soft", scorer: str = "tied", terms: dict[str, float] | None = None,
        norm: str = "none", wide_norm: bool = False, recompute: bool = False, cases: int = 5, batch_size: int = 2,
        accumulation_steps: int = 1,
        max_epochs: int = 1, bag_loss: Any = lambda: BagCrossEntropy(0.1), num_classes: int = 2,
        max_norm: float = 100.0, frozen: bool = False, dtype: torch.dtype = torch.float64,
    ) -> None:  # fmt: skip
        torch.manual_seed(0)
        encoder = Encoder(norm, wide_norm)
        network = Network(encoder, SELECTIONS[selection](), 1, FEATURES, num_classes, scorer).to(dtype)
        network.encoding = SliceEncoding(chunk_slices=2, recompute=recompute)
        network.encoder.requires_grad_(not frozen)
        if group_size() > 1:
            with_synced_norms(network)
        loss = DualStreamLoss(bag_loss(), **(terms or {}))
        data = Bags(cases, num_classes, dtype)
        # Weight decay tells a gradient of 0 from none at all.
        optimizer = torch.optim.SGD(network.parameters(), lr=0.2, weight_decay=0.1)
        loader = DataLoader(
            data, batch_sampler=BagBatches(BagSampler(cases, seed=4), batch_size), collate_fn=collate_bags
        )  # type: ignore[arg-type, var-annotated]
        evidence, cpu = Evidence(network), torch.device("cpu")
        self.network, self.steps, self.losses, self.metrics, self.outputs = network, [], [], [], []
        self.trainer = BagTrainer(
            cpu, max_epochs, loader, data_parallel(evidence), optimizer, loss,
            accumulation_steps=accumulation_steps, key_train_metric=named_scores(["nll"], "train_score_"),
        )  # fmt: skip
        self.trainer.logger.disabled = True

        def evaluator(**scores: Any) -> BagEvaluator:
            part = DataLoader(data, 1, sampler=own_share(range(cases), "cases"), collate_fn=collate_bags)  # type: ignore
            return BagEvaluator(cpu, part, evidence, **scores)

        clip = GradientClip(network, max_norm)
        self.validation = evaluator(key_val_metric=named_scores(["auc", "nll", "accuracy"], "val_"))
        # Before the clip, which changes what is noted.
        self.trainer.add_event_handler(BagEvents.GRADIENTS_READY, self._note_step)
        clip.attach(self.trainer)
        self.trainer.add_event_handler(Events.ITERATION_COMPLETED, self._note_loss)
        self.recorder = StabilityRecorder(loss, clip, evaluator())
        self.recorder.attach(self.trainer)
        self.trainer.add_event_handler(Events.EPOCH_COMPLETED, self._note_epoch)

    def _note_step(self) -> None:
        gradients = {name: parameter.grad for name, parameter in self.network.named_parameters()}
        self.steps.append({name: None if grad is None else grad.clone() for name, grad in gradients.items()})

    def _note_loss(self) -> None:
        self.losses.append(float(self.trainer.state.output["loss"]))
        self.outputs.append(len(self.trainer.state.output["pred"]))

    def _note_epoch(self) -> None:
        self.validation.run(self.trainer.state.epoch)
        self.metrics.append({**self.trainer.state.metrics, **self.validation.state.metrics})

    def __call__(self) -> dict[str, Any]:
        self.trainer.run()
        return {
            "losses": self.losses, "steps": self.steps, "metrics": self.metrics, "own": self.outputs,
            "weights": self.network.state_dict(), "seen": self.recorder.state_dict(),
        }  # fmt: skip


def same_noise(noise: Tensor) -> Tensor:
    """In place of random Gumbel noise: it depends on the place in the bag alone, not on the place in the batch."""
    place = torch.arange(noise.shape[1], dtype=noise.dtype)[None, :, None]
    return noise.copy_((0.2 + (place * 0.7).sin() ** 2).expand_as(noise))


def same_halves(mask: Tensor) -> tuple[Tensor, Tensor]:
    """In place of random halves: every other slice."""
    even = torch.arange(mask.shape[1]) % 2 == 0
    return mask & even, mask & ~even


def run(name: str) -> dict[str, Any]:
    with (
        mock.patch.object(torch.Tensor, "exponential_", same_noise),
        mock.patch.object(bag_network, "random_halves", same_halves),
    ):
        return Run(**SCENARIOS[name])()


def overflow_in_one_process() -> dict[str, Any]:
    """A float16 gradient that overflows in the last process alone: all skip the step."""
    trial = Run(cases=2)
    trial.trainer.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    before = {name: value.clone() for name, value in trial.network.state_dict().items()}
    if group_rank() == group_size() - 1:
        trial.network.bag_classifier.bias.register_hook(lambda gradient: torch.full_like(gradient, math.inf))
    trial.trainer.run()
    after = trial.network.state_dict()
    return {"scale": trial.trainer.scaler.get_scale(), "same": all(torch.equal(before[n], after[n]) for n in before)}


def loss_that_is_not_finite() -> str:
    """Of the second case of the batch alone, which the second process has."""
    trial = Run(cases=2)
    data = trial.trainer.data_loader.dataset
    get = data.__class__.__getitem__
    spoilt = max(gathered(own_share([0, 1], "cases"))[-1])

    def spoil(self: Any, key: Any) -> dict[str, Any]:
        bag = get(self, key)
        return {**bag, "image": bag["image"] * (math.nan if key[1] == spoilt else 1)}

    with mock.patch.object(data.__class__, "__getitem__", spoil):
        try:
            trial.trainer.run()
        except InputError as error:
            return str(error)
    return "no error"


def noise_of_epochs() -> list[float]:
    """A number that each epoch draws from the generator that dropout and Gumbel noise use."""
    trial, drawn = Run(max_epochs=2), []
    trial.trainer.add_event_handler(Events.ITERATION_STARTED(every=3), lambda: drawn.append(float(torch.rand(1))))
    trial.trainer.run()
    return drawn


def refusals() -> list[str]:
    found = []
    for make in (
        lambda: BagBatches(BagSampler(9), 1),
        lambda: BagBatches(BagSampler(1), 4),
        lambda: own_share([0], "watched cases"),
    ):
        try:
            make()
        except InputError as error:
            found.append(str(error))
    return found


def everything() -> dict[str, Any]:
    found: dict[str, Any] = {name: run(name) for name in SCENARIOS}
    return found | {
        "overflow": overflow_in_one_process(), "not finite": loss_that_is_not_finite(), "noise": noise_of_epochs(),
        "refusals": refusals(), "first": is_first(), "sum": add_up([1.0, 0.5]), "gathered": gathered({"a": 1}),
        "share": own_share(range(5), "cases"),
    }  # fmt: skip


def main(rank: int, world: int, out: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{out / 'meeting'}", rank=rank, world_size=world)
    torch.save(everything(), out / f"{rank}.pt")
    end_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
