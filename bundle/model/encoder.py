"""Encoders: slice → feature vector. Any module that maps (M, C, H, W) to (M, F) will do; here are norms and weights."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..errors import InputError
from .group_norm import GroupNorm

__all__ = ["FrozenBatchNorm2d", "WeightReport", "laid_out", "load_encoder_weights", "with_norm"]

logger = logging.getLogger(__name__)

NORMS = ("batch", "frozen_batch", "group", "instance")


class FrozenBatchNorm2d(nn.BatchNorm2d):
    """Batch norm that always uses, and never updates, its stored statistics; scale and shift still learn.

    It stays frozen through `network.train()`, which trainers call before every step.
    """

    def train(self, mode: bool = True) -> FrozenBatchNorm2d:
        """Stay in evaluation mode, whatever the mode asked for."""
        return super().train(False)


def with_norm(encoder: nn.Module, norm: str, num_groups: int = 8) -> nn.Module:
    """Replace every 2D and 3D batch norm of an encoder by the norm asked for.

    MONAI 1.6.1's ResNet hands its `norm` argument to the stem alone and leaves batch norm in all blocks, so the norm is
    set here, on the finished module, for any encoder. Parameter names do not change; scale and shift, and for a frozen
    norm the statistics, are taken over.

    Args:
        encoder: built with `torch.nn.BatchNorm2d` or, for volumes, `BatchNorm3d`.
        norm: "batch" (as it is), "frozen_batch" (see FrozenBatchNorm2d; only sensible with pre-trained weights, and in
            2D), "group" (statistics of one slice over groups of channels) or "instance" (of one slice and one channel).
        num_groups: channels are split into this many groups for "group"; it must divide every channel count.

    Returns:
        The same module.

    Raises:
        ValueError: on another norm, on a norm change where nothing could be replaced, or on groups that do not divide.
    """
    if norm not in NORMS:
        raise InputError(f"norm must be one of {', '.join(NORMS)}, not {norm!r}")
    if norm == "batch":
        return encoder
    replaced = 0
    for parent in list(encoder.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.BatchNorm2d or type(child) is nn.BatchNorm3d:
                setattr(parent, name, _replacement(child, norm, num_groups))
                replaced += 1
    if not replaced:
        raise InputError(f"norm '{norm}' was asked for, but the encoder has no batch norm that it could replace")
    return encoder


def _replacement(old: nn.BatchNorm2d | nn.BatchNorm3d, norm: str, num_groups: int) -> nn.Module:
    channels, flat = old.num_features, isinstance(old, nn.BatchNorm2d)
    new: nn.Module
    if norm == "frozen_batch" and not flat:
        raise InputError("norm 'frozen_batch' is for encoders of slices, and this one has a BatchNorm3d: use another")
    if norm == "frozen_batch":
        new = FrozenBatchNorm2d(channels, old.eps, old.momentum, old.affine, old.track_running_stats).eval()
    elif norm == "instance":
        new = (nn.InstanceNorm2d if flat else nn.InstanceNorm3d)(channels, eps=old.eps, affine=True)
    elif num_groups < 1 or channels % num_groups:
        raise InputError(f"group norm with {num_groups} groups needs channel counts that they divide, not {channels}")
    else:
        new = GroupNorm(num_groups, channels, eps=old.eps)
    # An encoder that came with trained weights keeps what the new norm has a place for.
    new.load_state_dict({**new.state_dict(), **{n: t for n, t in old.state_dict().items() if n in new.state_dict()}})
    return new if old.weight is None else new.to(old.weight)


def laid_out(encoder: nn.Module) -> nn.Module:
    """The same encoder, with the weights of its 2D convolutions channels-last in memory, which computes faster."""
    # Module.to(memory_format=...) refuses an encoder with 3D convolutions, which gain nothing by it on a CPU.
    for parameter in encoder.parameters():
        if parameter.dim() == 4:
            parameter.data = parameter.data.to(memory_format=torch.channels_last)
    return encoder


class WeightReport(NamedTuple):
    """Which keys of a weights file an encoder took.

    Attributes:
        used: loaded as they are.
        adapted: loaded after a change of the number of input channels.
        missing: of the encoder, not in the file; they keep their values.
        unused: of the file, not in the encoder.
    """

    used: tuple[str, ...]
    adapted: tuple[str, ...]
    missing: tuple[str, ...]
    unused: tuple[str, ...]

    def __str__(self) -> str:
        return (
            f"{len(self.used)} tensors used, {len(self.adapted)} adapted ({_some(self.adapted)}), "
            f"{len(self.missing)} missing ({_some(self.missing)}), {len(self.unused)} unused ({_some(self.unused)})"
        )


def _some(names: tuple[str, ...], most: int = 4) -> str:
    return ", ".join(names[:most]) + (", …" if len(names) > most else "") if names else "none"


def load_encoder_weights(encoder: nn.Module, path: str | Path) -> WeightReport:
    """Load a state dict into an encoder by name, such as a torchvision or MONAI ResNet's, and say what was used.

    A first convolution for another number of input channels is adapted: the mean over the file's input channels, on
    each of ours, scaled so that an equal grey input gives the same response. Statistics of a norm that the encoder does
    not have, and a classifier, are left unused; convolutions that it does not have are of another architecture.

    Args:
        encoder: any module.
        path: a file of `torch.save`: a state dict, or a dict that holds one under "state_dict", "model" or "encoder",
            as that of a pre-training does. Its names may have a prefix, such as "module." or, in the file of a
            training, "encoder.".

    Returns:
        The report, which is logged too. Batch norms that find scale and shift but no statistics are warned of.

    Raises:
        InputError: when the file is absent, is no weights file, has a tensor of another shape, lacks a weight, or has
            convolutions that the encoder lacks.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"encoder_weights: there is no file {path}")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise InputError(f"encoder_weights: {path.name} is no file of tensors that torch.load reads safely") from error
    if isinstance(content, dict) and any(str(name).startswith("members.") for name in content.get("model") or ()):
        raise InputError(f"encoder_weights: {path.name} is an ensemble: give the file of one of its members")
    own = encoder.state_dict()
    given, others = _plain_names(content, own)
    if not given:
        raise InputError(f"encoder_weights: {path.name} holds no state dict")
    taken: dict[str, Tensor] = {}
    adapted: list[str] = []
    first = next((name for name, tensor in own.items() if tensor.dim() == 4), None)
    for name, tensor in given.items():
        if name not in own:
            continue
        target = own[name]
        if tensor.shape != target.shape:
            # All but the input channels, the second axis, must agree.
            same = tensor.dim() == 4 == target.dim() and tensor[:, 0].shape == target[:, 0].shape
            if name != first or not same:
                raise InputError(
                    f"encoder_weights: '{name}' of {path.name} has shape {tuple(tensor.shape)}, the encoder's "
                    f"{tuple(target.shape)}: another architecture"
                )
            scale = tensor.shape[1] / target.shape[1]
            tensor = tensor.mean(dim=1, keepdim=True).expand(target.shape) * scale
            adapted.append(name)
        taken[name] = tensor
    missing = tuple(name for name in own if name not in taken)
    needed = [name for name in missing if own[name].dim() > 1]
    if needed:
        raise InputError(
            f"encoder_weights: {path.name} has no weights for {_some(tuple(needed))}: another architecture"
        )
    left = [name for name, tensor in given.items() if name not in own and tensor.dim() > 3]
    if left:
        raise InputError(
            f"encoder_weights: {path.name} has weights of {_some(tuple(left))}, which the encoder lacks: another "
            "architecture"
        )
    encoder.load_state_dict({**own, **taken})
    report = WeightReport(
        used=tuple(name for name in taken if name not in adapted),
        adapted=tuple(adapted),
        missing=missing,
        unused=(*(name for name in given if name not in own), *others),
    )
    logger.info("encoder weights from %s: %s", path.name, report)
    kept = ".running_mean"
    if any(name.removesuffix(kept) + ".weight" in taken for name in missing if name.endswith(kept)):
        logger.warning(
            "encoder_weights: %s holds no running statistics for batch norms, so it was trained with another norm: "
            "set norm as it was, or they start anew (and stay so in frozen stages)", path.name
        )  # fmt: skip
    return report


def _plain_names(content: object, own: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """The state dict in a loaded file, without the prefix that wrappers put before the encoder's own names.

    And the names of the tensors without that prefix, which are no part of an encoder.
    """
    for key in ("state_dict", "model", "encoder"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not isinstance(content, dict):
        return {}, []
    tensors = {str(name): value for name, value in content.items() if isinstance(value, Tensor)}
    anchor = next(iter(own), "")
    prefixes = sorted({name.removesuffix(anchor) for name in tensors if name.endswith(anchor)}, key=len)
    # "layer1.0.conv1.weight" ends in "conv1.weight" too: the prefix under which most of the names are found is meant.
    prefix = max(prefixes, key=lambda start: sum(start + name in tensors for name in own), default="")
    within = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
    return within, [name for name in tensors if not name.startswith(prefix)]
