"""This project with its fast paths switched off, by the plainest code that computes the same.

Float32 in PyTorch's own layout, all slices at once, no norm folded, scans prepared whole by one step after the other,
by MONAI's transforms and NumPy's functions where they do the same, no thread that reads ahead and no slice cache. What
differs from the fast paths is the time alone; tests hold the preparation to the same bits.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.bundle import ConfigParser
from monai.data import MetaTensor
from monai.transforms import Compose, CropForegroundd, MapTransform, RandomizableTrait, ScaleIntensityRanged
from torch import Tensor, nn
from torch.utils.data import Dataset

from bundle.data.volume_transforms import CropToForegroundd, ScaleForegroundPercentilesd, ScaleWindowd
from bundle.model.network import DualStreamMIL
from bundle.recipe import Recipe
from bundle.weights import load_network

__all__ = ["INFERENCE", "READ_IN_MAIN_THREAD", "TRAINING", "PlainDualStream", "WholeBags", "plain_of", "trained"]

# Changes of configs/train.yaml and configs/inference.yaml.
READ_IN_MAIN_THREAD = {
    "_target_": "torch.utils.data.DataLoader", "dataset": "@dataset", "batch_size": 1,
    "collate_fn": "$bundle.collate_bags",
}  # fmt: skip
INFERENCE: dict[str, Any] = {
    "amp": False,
    "fast_network": {"_target_": f"{__name__}.trained", "weights": "@weights", "device": "@device"},
    "dataset::_target_": f"{__name__}.WholeBags",
    "dataloader": READ_IN_MAIN_THREAD,
}
TRAINING: dict[str, Any] = {
    "amp": False,
    "network_def::_target_": f"{__name__}.PlainDualStream",
    "network": "$@network_def.to(@device)",
    "trusted_modules": [__name__],
    "train::dataset::_target_": f"{__name__}.WholeBags",
    "train::dataset::in_memory": True,
}


class PlainDualStream(DualStreamMIL):
    """The network, whose encoder is called on all slices (M, C, H, W) at once, as they lie in memory."""

    def encode_slices(self, slices: Tensor) -> Tensor:
        return self.encoder(slices).to(torch.float32)


def trained(weights: str | Path, device: torch.device) -> nn.Module:
    """The network of a weights file as a PlainDualStream, in evaluation mode."""
    definition = {**Recipe.load(weights)["network_def"], "_target_": f"{__name__}.PlainDualStream"}
    network = ConfigParser({"network": definition}).get_parsed_content("network")
    return load_network(network, weights).to(device).eval()


class WholeBags(Dataset[dict[str, Any]]):
    """Bags as a BagDataset gives them, of cases that are prepared whole.

    Args:
        data: cases, none of which is refused.
        transform: preparation followed by draws.
        seed: of all draws.
        in_memory: prepare every case now and keep it; else each time it is asked for.
        **_: further arguments of a BagDataset, which change no bag.
    """

    def __init__(
        self, data: Sequence[Mapping[str, Any]], transform: Compose, seed: int = 0, in_memory: bool = False, **_: Any
    ) -> None:
        steps = transform.transforms
        first = next(number for number, step in enumerate(steps) if isinstance(step, RandomizableTrait))
        self._preparation, self._draws = [plain_of(step) for step in steps[:first]], steps[first:]
        self._data, self._seed = data, seed
        self._kept = [self._prepared(case) for case in data] if in_memory else None

    def __len__(self) -> int:
        return len(self._data)

    def __getitem__(self, key: int | tuple[int, int]) -> dict[str, Any]:
        epoch, index = key if isinstance(key, tuple) else (0, key)
        bag = self._prepared(self._data[index]) if self._kept is None else self._kept[index]
        bag = {**bag, "draw": (self._seed, epoch)}
        for step in self._draws:
            bag = step(bag)
        del bag["draw"]
        return bag

    def _prepared(self, case: Mapping[str, Any]) -> dict[str, Any]:
        load, *others = self._preparation
        return _step_by_step(load(dict(case)), others)


def _step_by_step(bag: dict[str, Any], steps: Sequence[Any]) -> dict[str, Any]:
    # A function of its own, which a profile shows: what comes after the reading of a scan.
    for step in steps:
        bag = step(bag)
    return bag


def plain_of(step: Any) -> Any:
    """A step of the preparation, or the plain one that does the same."""
    if isinstance(step, CropToForegroundd) and step.margin is not None:
        return CropForegroundd(
            step.keys, step.keys[0], select_fn=_foreground, margin=step.margin, allow_smaller=True,
            start_coord_key=None, end_coord_key=None,
        )  # fmt: skip
    if isinstance(step, ScaleForegroundPercentilesd):
        return _Percentilesd(step.keys, step.lower, step.upper)
    if isinstance(step, ScaleWindowd):
        return ScaleIntensityRanged(step.keys, step.low, step.high, 0.0, 1.0, clip=True)
    return step


def _threshold(values: np.ndarray) -> float:
    low, high = np.percentile(values, [0.5, 99.5]).tolist()
    return low + 0.1 * (high - low)


def _foreground(volume: Tensor) -> Tensor:
    """Where each channel of (C, X, Y, Z) is foreground; everywhere, if nowhere."""
    channels = torch.as_tensor(volume).numpy()
    found = torch.from_numpy(np.stack([channel > _threshold(channel) for channel in channels]))
    return found if found.any() else torch.ones_like(found)


class _Percentilesd(MapTransform):
    """Percentiles of each channel's foreground to 0 and 1."""

    def __init__(self, keys: Sequence[str], lower: float, upper: float) -> None:
        super().__init__(keys)
        self.lower, self.upper = lower, upper

    def __call__(self, data: Mapping[str, Any]) -> dict[str, Any]:
        out = dict(data)
        for key in self.keys:
            given = out[key]
            out[key] = MetaTensor(
                torch.stack([self._scaled(channel) for channel in given.as_tensor()]), meta=given.meta
            )
        return out

    def _scaled(self, channel: Tensor) -> Tensor:
        values = channel.numpy()
        foreground = values[values > _threshold(values)]
        if len(foreground):
            low, high = np.percentile(foreground, [self.lower, self.upper]).tolist()
        else:
            low, high = float(values.min()), float(values.max())
        if not high > low:
            low = float(values.min())
        if high - low <= 1e-6 * max(abs(low), abs(high)):
            return torch.zeros_like(channel)
        return ((channel - low) / (high - low)).clamp(0.0, 1.0)
