"""A small network, made-up bags and engines without a run behind them."""

from types import SimpleNamespace
from typing import Any

import torch
from ignite.engine import Engine
from torch import Tensor, nn
from torch.utils.data import DataLoader

from bundle.data.collate import collate_bags
from bundle.model.bag_network import BagOutput, Evidence
from bundle.model.network import DualStreamMIL
from bundle.model.selection import SoftSelection, masked_softmax
from bundle.training.engine import BagEvaluator, BagTrainer
from bundle.training.losses import BagCrossEntropy, DualStreamLoss

FEATURES = 6


class Encoder(nn.Sequential):
    """Without a batch norm unless asked: a batch then equals its bags one by one."""

    def __init__(self, norm: nn.Module | None = None) -> None:
        layers = [nn.Conv2d(1, 4, 3), norm or nn.Identity(), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
        super().__init__(*layers, nn.Linear(4, FEATURES))


def make_network(
    seed: int = 0, num_classes: int = 2, selection: nn.Module | None = None, encoder: nn.Module | None = None
) -> DualStreamMIL:
    torch.manual_seed(seed)
    return DualStreamMIL(encoder or Encoder(), selection or SoftSelection(), 1, FEATURES, num_classes)


def make_bag(case: int, num_slices: int = 4, label: int | None = None) -> dict[str, Any]:
    """A bag of noise that is the same for the same case."""
    generator = torch.Generator().manual_seed(case)
    return {
        "case": f"c{case}",
        "patient": f"p{case}",
        "image": torch.rand(num_slices, 1, 8, 8, generator=generator),
        "label": case % 2 if label is None else label,
        "slice_index": 10 + torch.arange(num_slices),
        "slice_position": 5.0 * torch.arange(num_slices),
        "slice_label": torch.full((num_slices,), -1),
    }


def make_batch(*cases: int, num_slices: int = 4) -> dict[str, Any]:
    return collate_bags([make_bag(case, num_slices) for case in cases])


def make_loss(**arguments: Any) -> DualStreamLoss:
    return DualStreamLoss(BagCrossEntropy(0.1), **arguments)


def make_trainer(
    network: nn.Module,
    cases: int = 4,
    batch_size: int = 2,
    max_epochs: int = 1,
    optimizer: Any = None,
    **arguments: Any,
) -> BagTrainer:
    """Over bags of four slices, in order, with SGD at 0.1."""
    loader = DataLoader([make_bag(i) for i in range(cases)], batch_size, collate_fn=collate_bags)  # type: ignore[arg-type]
    return BagTrainer(
        torch.device("cpu"), max_epochs, arguments.pop("loader", loader), Evidence(network),
        optimizer or torch.optim.SGD(network.parameters(), lr=0.1),
        arguments.pop("loss", None) or make_loss(), **arguments,
    )  # fmt: skip


def make_evaluator(network: nn.Module, bags: list[dict[str, Any]], **arguments: Any) -> BagEvaluator:
    loader = DataLoader(bags, 1, collate_fn=collate_bags)  # type: ignore[arg-type]
    return BagEvaluator(torch.device("cpu"), loader, Evidence(network), **arguments)


def weights_of(network: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in network.state_dict().items()}


def make_output(scores: Tensor, mask: Tensor, num_classes: int = 2, seed: int = 0) -> BagOutput:
    """What a network might give for scores (B, N, S); the logits are noise."""
    generator = torch.Generator().manual_seed(seed)
    logits, instance, bag = torch.randn(3, len(scores), num_classes, generator=generator, dtype=scores.dtype)
    attention = masked_softmax(torch.randn(scores.shape, generator=generator, dtype=scores.dtype), mask)
    return BagOutput(logits, instance, bag, scores, scores, masked_softmax(scores, mask), attention)


def fake_engine(epoch: int = 1, max_epochs: int = 10, **state: Any) -> Any:
    """What a handler needs of an engine: an epoch, metrics, and whatever else is named."""
    made = SimpleNamespace(epoch=epoch, max_epochs=max_epochs, iteration=epoch, metrics={}, **state)
    return SimpleNamespace(state=made, should_terminate=False, terminate=lambda: None)


def counting_engine(metrics: Any = None) -> Engine:
    """An engine whose step does nothing; `metrics(epoch)` become its metrics in every epoch."""
    engine = Engine(lambda engine, batch: None)
    if metrics is not None:
        from ignite.engine import Events

        engine.add_event_handler(Events.EPOCH_COMPLETED, lambda e: e.state.metrics.update(metrics(e.state.epoch)))
    return engine
