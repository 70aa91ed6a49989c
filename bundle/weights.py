"""Weights files: written so that no kill can damage them, read without running anything in them."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .errors import InputError
from .files import replacing

__all__ = ["load_network", "previous_of", "read_checkpoint", "save_atomically", "trained_on"]


def save_atomically(content: Mapping[str, Any], path: str | Path, keep_previous: bool = False) -> None:
    """`torch.save` that leaves the old file or the new one, whenever the process is killed.

    Args:
        content: tensors and plain values, so that `torch.load(weights_only=True)` reads it.
        path: of the file.
        keep_previous: keep the file it replaces, with `.previous` before its suffix.
    """
    path = Path(path)
    with replacing(path) as temporary:
        with temporary.open("wb") as file:
            torch.save(dict(content), file)
            file.flush()
            os.fsync(file.fileno())
        if keep_previous and path.exists():
            with replacing(previous_of(path)) as spare:
                spare.unlink()
                try:
                    os.link(path, spare)  # a second name, so that there is a file under `path` at every moment
                except OSError:  # file systems without hard links
                    shutil.copyfile(path, spare)


def previous_of(path: Path) -> Path:
    """Where `save_atomically` keeps the file before."""
    return path.with_name(f"{path.stem}.previous{path.suffix}")


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """The content of a file saved by this bundle, without running anything in it.

    Raises:
        InputError: when it is absent or is no such file.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"there is no weights file {path}; train first, or give the path of one")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise InputError(
            f"{path} is no weights file, is damaged, or holds more than tensors and plain values"
        ) from error
    if not isinstance(content, dict) or not isinstance(content.get("model"), Mapping):
        raise InputError(f"{path} holds no 'model': it was not saved by this bundle's training")
    return content


def trained_on(path: str | Path) -> dict[str, Any]:
    """Datalist and fold that the weights in a file were trained on; empty where it does not say or is no such file."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception:  # whoever loads the weights says what is wrong
        return {}
    found = content.get("trained_on") if isinstance(content, Mapping) else None
    return dict(found) if isinstance(found, Mapping) else {}


def load_network(network: nn.Module, weights: str | Path) -> nn.Module:
    """Load the weights of a file saved by this bundle into a network.

    Args:
        network: usually built by `Recipe.build("network_def")`.
        weights: the file.

    Returns:
        The same network.

    Raises:
        InputError: when the file is unreadable or holds weights of another architecture.
    """
    given: Mapping[str, Any] = read_checkpoint(weights)["model"]
    own = network.state_dict()
    differing = [n for n in {**own, **given} if n not in own or n not in given or own[n].shape != given[n].shape]
    if differing:
        raise InputError(
            f"{Path(weights).name} holds weights of another architecture: {len(differing)} of {len(own)} tensors are "
            f"absent or have another shape, first '{differing[0]}'"
        )
    network.load_state_dict(given)
    return network
