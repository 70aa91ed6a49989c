"""Features of frozen stages as a step of the preparation, so that the slice cache keeps them and a head trains fast."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from monai.transforms import Transform
from torch import Tensor, nn
from torch.utils.data import get_worker_info

from ..data.cache_key import code_digest, described, digest, sources_of
from ..errors import InputError
from ..model import encoding
from ..model.bag_network import BagNetwork
from ..model.encoding import SliceEncoding
from ..model.stages import stages_of

__all__ = ["EncodeStagesd", "check_features", "frozen_features"]

MODEL_SOURCES = sources_of(sorted(Path(encoding.__file__).parent.glob("*.py")))


class EncodeStagesd(Transform):
    """Replaces the slices of a bag, (N, C, H, W), by what stages of an encoder give for them.

    That is (N, C', H', W'), or (N, F, 1, 1) after the last stage. `digest` stands for the stages' weights: the cache
    keeps features of other weights, another type or another number of stages apart.

    Args:
        stages: copied, in evaluation mode.
        device: that computes. Data-loading workers compute on the CPU: a forked process cannot use a GPU.
        dtype: that convolutions compute in, see `autocast_dtype`; None for float32.
        chunk_slices: see `SliceEncoding`.
    """

    def __init__(
        self,
        stages: nn.Sequential,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
        chunk_slices: int | None = None,
    ) -> None:
        self.digest = _digest(stages)
        self.dtype = str(dtype)
        self._dtype, self._device, self._encoding = dtype, torch.device(device), SliceEncoding(chunk_slices)
        self._stages = copy.deepcopy(stages).cpu().requires_grad_(False).eval()

    def __call__(self, data: Mapping[str, Any]) -> dict[str, Any]:
        device = torch.device("cpu") if get_worker_info() is not None else self._device
        return {**data, "image": self._encoded(data["image"], device).cpu()}

    def _encoded(self, slices: Tensor, device: torch.device) -> Tensor:
        cast = torch.autocast(device.type, dtype=self._dtype) if self._dtype else contextlib.nullcontext()
        with torch.no_grad(), cast:
            features = self._encoding(self._stages.to(device), slices.to(device)).float()
        return features.reshape(*features.shape, 1, 1) if features.dim() == 2 else features.contiguous()


def _digest(stages: nn.Module) -> str:
    """Of weights, of other attributes of the modules, of the code of their classes and of this project's networks."""
    parts = [[name, type(module).__qualname__, _own_values(module)] for name, module in stages.named_modules()]
    modules = {type(module).__module__ for module in stages.modules()}
    return digest([parts, described(stages.state_dict()), code_digest(modules, sources=MODEL_SOURCES)])


def _own_values(module: nn.Module) -> Any:
    return described({k: v for k, v in vars(module).items() if k != "training" and not k.startswith("_")})


def check_features(network: BagNetwork, features: Sequence[EncodeStagesd]) -> None:
    """Refuse to go on with features of an encoder that is not the network's, as a resumed checkpoint may hold another.

    Args:
        network: with the weights that training starts from.
        features: from `frozen_features`.

    Raises:
        InputError: they are of other weights.
    """
    for step in features:
        stages = stages_of(network.encoder)[: network.encoding.first_stage]
        if _digest(nn.Sequential(*stages)) != step.digest:
            raise InputError(
                "the checkpoint in output_dir holds another encoder than encoder_weights (or seed) gives now, and "
                "cache_features keeps features of the latter: put the former back, or choose another output_dir"
            )


def frozen_features(
    network: BagNetwork,
    frozen_stages: int,
    cache_features: bool,
    *,
    augment: bool,
    cache: Any,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    chunk_slices: int | None = None,
) -> list[EncodeStagesd]:
    """The step that ends a preparation whose features are kept, as a list of one, or of none without `cache_features`.

    With it the network is told to start after the frozen stages.

    Args:
        network: with frozen stages, see `start_network`.
        frozen_stages: how many.
        cache_features: whether to keep their features.
        augment: must be off then.
        cache: must be there then.
        device: see EncodeStagesd.
        dtype: likewise.
        chunk_slices: likewise.

    Raises:
        InputError: features are to be kept, but the network has none of single slices, no stage is frozen, slices are
            augmented, or there is no cache.
    """
    if not cache_features:
        return []
    if not network.slicewise:
        raise InputError(
            "cache_features keeps features of single slices, and this network looks at whole stacks: set it to false"
        )
    if frozen_stages < 1:
        raise InputError("cache_features needs frozen_stages of 1 or more: features of stages that learn change")
    if augment:
        raise InputError("cache_features needs augment to be false: what is kept is computed once, from plain slices")
    if cache is None:
        raise InputError("cache_features needs a cache_dir to keep them in")
    stages = stages_of(network.encoder)[:frozen_stages]
    network.encoding.first_stage = len(stages)
    return [EncodeStagesd(nn.Sequential(*stages), device, dtype, chunk_slices)]
