"""What makes the training passes of an arm differ from evaluation: the draw, augmentation, batch norm, or dropout.

python -m tests.study.training_passes OUTPUT_DIR/ARM …, from the repository root, where OUTPUT_DIR is that of a study or
a cross-validation. Judges the training cases with the saved weights: as in evaluation, with one of these at a time as
in training, and with all of them; prints accuracy and NLL (nats), mean over trainings and draws.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd
from tqdm import tqdm

from bundle.recipe import Recipe
from bundle.study.piece import Piece
from bundle.training.engine import prepare_bags
from bundle.weights import load_network

DRAWS = 2  # epochs of draws, augmentation and batches that the figures are means over


class Pass(NamedTuple):
    """What is as in training; all else is as in evaluation."""

    drawn: bool = False
    augmented: bool = False
    batch_statistics: bool = False
    dropout: bool = False


PASSES = {
    "evaluation": Pass(),
    "slices drawn": Pass(drawn=True),
    "augmented": Pass(augmented=True),
    "batch statistics": Pass(batch_statistics=True),
    "dropout": Pass(dropout=True),
    "all four": Pass(True, True, True, True),
}


def set_modes(network: nn.Module, how: Pass) -> None:
    """Evaluation mode but for what the pass takes from training; running statistics stay as they are."""
    network.eval()
    for module in network.modules():
        if isinstance(module, _BatchNorm):
            module.train(how.batch_statistics)
            module.momentum = 0.0
        elif isinstance(module, _DropoutNd):
            module.train(how.dropout)


def batches(piece: Piece, how: Pass) -> Iterator[dict[str, Any]]:
    """Batches of the training cases, composed as in training."""
    config = piece.config
    config.update({"progress": False})
    if not how.drawn:
        config.update({"sampling_strategy": "all"})
    config.update({"augment": how.augmented and config["augment"]})
    loader: Any = config.get_parsed_content("train::dataloader")
    for epoch in range(1, DRAWS + 1):
        loader.batch_sampler.sampler.set_epoch(epoch)
        yield from loader


@torch.no_grad()
def judged(folder: Path, how: Pass) -> tuple[float, float]:
    """Accuracy and NLL of the training cases of a piece, by the weights that it saved."""
    piece, weights = Piece.load(folder), folder / "model.pt"
    if piece.config.get("frozen_stages"):
        raise SystemExit(f"{folder.parent} has frozen stages, whose norm stays as it is in training: give another arm")
    network = load_network(Recipe.load(weights).build("network_def"), weights)
    set_modes(network, how)
    torch.manual_seed(0)  # of dropout
    right, nll = [], []
    for batch in batches(piece, how):
        image, label, (mask,), _ = prepare_bags(batch, torch.device("cpu"))
        logits = network(image, mask).float()
        right += (logits.argmax(dim=-1) == label).tolist()
        nll += cross_entropy(logits, label, reduction="none").tolist()
    return float(np.mean(right)), float(np.mean(nll))


def main(arms: list[str]) -> None:
    """Print a row an arm and way of passing."""
    print(f"{'arm':32}{'as in training':20}{'accuracy':>10}{'NLL':>10}")
    for arm in map(Path, arms):
        pieces = sorted(path.parent for path in arm.glob("*/piece.json"))
        if not pieces:
            raise SystemExit(f"{arm} holds no finished training: give the folder of an arm")
        for name, how in PASSES.items():
            shown = tqdm(pieces, desc=name, unit="piece", leave=False)
            accuracy, nll = np.mean([judged(folder, how) for folder in shown], axis=0)
            print(f"{arm.name:32}{name:20}{accuracy:10.3f}{nll:10.3f}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
