"""How well the encoder of an arm ranks volumes when every slice teaches it by its own label: a ceiling.

python -m tests.study.slice_ceiling OUTPUT_DIR/ARM …, from the repository root, where OUTPUT_DIR is that of a study
whose datalist has slice truth. For every finished training of the arm the same encoder with a linear layer is trained
anew on the slices of the same cases, draws, augmentation, epochs and rates; the epoch is that of the lowest validation
NLL of slices, and the score of a volume that of its most suspicious slices. Prints AUC pooled over folds, mean over
seeds, with a bootstrap interval over patients, and hit@1.
"""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.bundle import ConfigParser
from monai.transforms import Compose
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits
from tqdm import tqdm

from bundle.data.cases import labelled_cases
from bundle.data.dataset import BagDataset
from bundle.evaluation.bootstrap import patient_weights, percentile_interval, weighted_scores
from bundle.study.piece import Piece
from bundle.training.averaging import AverageWeights
from bundle.training.engine import autocast_dtype
from bundle.training.schedules import warmup_cosine

POOLINGS = {"first slice": 1, "mean of the first 3": 3}  # slices, the most suspicious first, whose mean is the score
RESAMPLES = 1000
Judged = dict[str, tuple[str, int, np.ndarray, np.ndarray]]  # case → patient, label, logits and truth of its slices


class SliceNet(nn.Module):
    """Slices (M, C, H, W) → logits (M,)."""

    def __init__(self, encoder: nn.Module, num_features: int) -> None:
        super().__init__()
        self.encoder, self.head = encoder, nn.Linear(num_features, 1)

    def forward(self, slices: Tensor) -> Tensor:
        features = self.encoder(slices).float()
        with torch.autocast("cpu", enabled=False):  # equal scores would be no order
            return self.head(features)[:, 0]


def slice_logits(network: SliceNet, bags: BagDataset, dtype: torch.dtype | None) -> list[tuple[Tensor, Tensor]]:
    """Logits and truth of the slices of each bag, in evaluation mode."""
    network.eval()
    with torch.no_grad(), torch.autocast("cpu", dtype=dtype, enabled=dtype is not None):
        return [(network(bag["image"]), bag["slice_label"]) for bag in map(bags.__getitem__, range(len(bags)))]


def known_loss(logits: Tensor, truth: Tensor) -> Tensor:
    """Mean NLL over the slices whose truth is known."""
    return binary_cross_entropy_with_logits(logits[truth >= 0], truth[truth >= 0].float())


def taught(config: ConfigParser) -> Judged:
    """Slices of the test cases of a fold, by an encoder that was taught slices of its training cases."""
    get: Any = config.get_parsed_content
    torch.manual_seed(get("seed"))
    dtype = autocast_dtype("cpu", get("amp"), get("precision"))
    network = SliceNet(get("network_def").encoder, get("num_features"))
    loader, validation = get("train::dataloader"), get("validate::dataset")
    groups = [
        {"params": network.encoder.parameters(), "lr": get("lr")},
        {"params": network.head.parameters(), "lr": get("classifier_lr")},
    ]
    optimizer = torch.optim.AdamW(groups, weight_decay=get("weight_decay"))
    schedule = warmup_cosine(optimizer, get("warmup_epochs"), get("max_epochs"), len(loader))
    average, best, kept = (
        AverageWeights(network, get("weight_average")),
        float("inf"),
        copy.deepcopy(network.state_dict()),
    )
    for epoch in tqdm(range(1, get("max_epochs") + 1), desc=f"fold {get('fold')}", leave=False):
        network.train()
        loader.batch_sampler.sampler.set_epoch(epoch)
        for batch in loader:
            real = batch["mask"] & (batch["slice_label"] >= 0)
            with torch.autocast("cpu", dtype=dtype, enabled=dtype is not None):
                logits = network(batch["image"][real])
            optimizer.zero_grad()
            known_loss(logits, batch["slice_label"][real]).backward()
            nn.utils.clip_grad_norm_(network.parameters(), get("grad_clip"))
            optimizer.step()
            schedule.step()
            average.update()
        average.lend()
        seen = [torch.cat(one) for one in zip(*slice_logits(network, validation, dtype), strict=True)]
        if (nll := float(known_loss(*seen))) < best:
            best, kept = nll, copy.deepcopy(network.state_dict())
        average.take_back()
    network.load_state_dict(kept)
    cases = labelled_cases(get("datalist"), "test", get("fold"), get("dataset_dir"), get("class_names"))
    steps = Compose([*get("preparation"), get("eval_sampling")])
    bags = BagDataset(cases, steps, cache=get("cache"), progress=False)
    return {
        case["case"]: (case["patient"], case["label"], logits.numpy(), truth.numpy())
        for case, (logits, truth) in zip(cases, slice_logits(network, bags, dtype), strict=True)
    }


def binary(logits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities (M, 2) and predictions (M,) of logits (M,) of the second class."""
    second = 1 / (1 + np.exp(-logits.astype(np.float64)))
    return np.stack([1 - second, second], axis=1), (logits > 0).astype(np.int64)


def shown(seeds: list[Judged], slices: int) -> str:
    """AUC with its interval, and hit@1, of the mean score of so many first slices."""
    cases = list(seeds[0])
    patients, labels = [seeds[0][case][0] for case in cases], np.array([seeds[0][case][1] for case in cases])
    said = [np.array([np.sort(one[case][2])[-slices:].mean() for case in cases]) for one in seeds]
    weights = np.concatenate([np.ones((1, len(cases))), patient_weights(patients, RESAMPLES, 0)])  # the first: as it is
    aucs = np.mean([weighted_scores(labels, *binary(logits), weights)["auc"] for logits in said], axis=0)
    interval = percentile_interval(aucs[1:])
    hits = [
        truth[np.where(truth < 0, -np.inf, logits).argmax()] == 1  # of the slices whose truth is known
        for one in seeds
        for _, label, logits, truth in one.values()
        if label == 1 and (truth == 1).any()
    ]
    return f"{aucs[0]:.3f} ({interval.low:.3f} to {interval.high:.3f}), hit@1 {np.mean(hits):.3f}"


def main(arms: list[str]) -> None:
    """Print a row an arm and way of pooling."""
    for arm in map(Path, arms):
        pieces = sorted(path.parent for path in arm.glob("*/piece.json"))
        if not pieces:
            raise SystemExit(f"{arm} holds no finished training: give the folder of an arm")
        seeds: dict[int, Judged] = {}
        for folder in pieces:
            piece = Piece.load(folder)
            if piece.pretrain or piece.config.get("encoder_weights") or piece.config.get("frozen_stages"):
                raise SystemExit(f"{arm} starts from trained weights, and a ceiling from random ones: give another arm")
            seeds.setdefault(piece.settings["seed"], {}).update(taught(piece.config))
        if any(cases.keys() != next(iter(seeds.values())).keys() for cases in seeds.values()):
            raise SystemExit(f"{arm} has seeds with other folds than seed {min(seeds)}: finish them first")
        for name, slices in POOLINGS.items():
            print(f"{arm.name}, slices taught, {name}: AUC {shown(list(seeds.values()), slices)}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
