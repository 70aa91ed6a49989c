"""Which of several processes this is, as `torchrun` tells it in the environment."""

from __future__ import annotations

import os

import torch

from .errors import InputError

__all__ = ["num_processes", "rank", "refuse_several", "use_own_gpu"]


def rank() -> int:
    """The number of this process, from 0; 0 outside `torchrun`."""
    return _number("RANK", 0)


def num_processes() -> int:
    """How many processes were started together; 1 outside `torchrun`."""
    return _number("WORLD_SIZE", 1)


def refuse_several(config: str) -> None:
    """Refuse a workflow that every process would do as a whole, all into one folder.

    Args:
        config: its name.

    Raises:
        InputError: when several processes were started.
    """
    if num_processes() > 1:
        raise InputError(f"{config} is for one process, and {num_processes()} were started: start it without torchrun")


def use_own_gpu() -> None:
    """Make the GPU of this process the one that the device `cuda` means; with fewer GPUs than processes they share."""
    if torch.cuda.is_available():
        torch.cuda.set_device(_number("LOCAL_RANK", 0) % torch.cuda.device_count())


def _number(variable: str, default: int) -> int:
    text = os.environ.get(variable, str(default))
    if not text.isdecimal():
        raise InputError(f"the environment variable {variable} must be a whole number, not {text!r}; unset it")
    return int(text)
