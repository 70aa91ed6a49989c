"""Several processes that train one network: their group, their shares of the bags, and what they add up.

Without a group every function does what one process needs, so that nobody has to ask how many there are.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Iterator, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import Sampler

from ..data.dataset import BagSampler
from ..errors import InputError
from ..processes import num_processes

__all__ = [
    "BagBatches",
    "add_up",
    "data_parallel",
    "end_group",
    "gathered",
    "group_rank",
    "group_size",
    "is_first",
    "local_device",
    "own_share",
    "seed_noise",
    "start_group",
]

T = TypeVar("T")

# How long a process waits for another one. Preparing a cohort may take one of them minutes longer than the others.
TIMEOUT = timedelta(minutes=30)


# What a process needs to know to find the others.
BY_TORCHRUN = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def group_size() -> int:
    """How many processes train together; 1 without a group."""
    return dist.get_world_size() if dist.is_initialized() else 1


def group_rank() -> int:
    """The number of this process in the group, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def is_first() -> bool:
    """Whether this is the process that writes and tells; the only one without a group."""
    return group_rank() == 0


def local_device() -> torch.device:
    """The GPU of this process, by its number on this machine, or the CPU where there is no GPU.

    Raises:
        InputError: when torchrun did not start this process, or started more than the machine has GPUs.
    """
    number = _local_rank()
    if not torch.cuda.is_available():
        return torch.device("cpu")
    if number >= torch.cuda.device_count():
        raise InputError(
            f"more processes were started than there are GPUs: give torchrun "
            f"--nproc_per_node={torch.cuda.device_count()}, or set device to cpu"
        )
    return torch.device("cuda", number)


def _local_rank() -> int:
    number = os.environ.get("LOCAL_RANK", "")
    if not number.isdecimal() or any(name not in os.environ for name in BY_TORCHRUN):
        raise InputError(
            "multi_gpu_train.yaml is for several processes: start them with torchrun --nproc_per_node=N -m "
            "monai.bundle run ..., or leave the file out"
        )
    return int(number)


def start_group(device: torch.device | str) -> None:
    """Join the group of the processes that torchrun started; those but the first log errors alone.

    Args:
        device: of this process; NCCL connects GPUs and Gloo CPUs.

    Raises:
        InputError: when torchrun did not start this process, or it would share a GPU with another.
    """
    device = torch.device(device)
    if device.type == "cuda":
        if device != (own := local_device()):
            raise InputError(f"every process has a GPU of its own, {own} here: leave device out, or set it to cpu")
        torch.cuda.set_device(device)
        dist.init_process_group("nccl", timeout=TIMEOUT, device_id=device)
    else:
        _local_rank()
        dist.init_process_group("gloo", timeout=TIMEOUT)
    if not is_first():
        logging.disable(logging.WARNING)


def end_group() -> None:
    """Leave the group when all processes have come to their end."""
    dist.barrier()
    dist.destroy_process_group()


def add_up(values: Sequence[float]) -> list[float]:
    """Each number summed over the processes, in float64; the same on all of them."""
    if group_size() == 1:
        return list(values)
    total = torch.tensor(list(values), dtype=torch.float64, device="cuda" if dist.get_backend() == "nccl" else "cpu")
    dist.all_reduce(total)
    found: list[float] = total.tolist()
    return found


def gathered(value: T) -> list[T]:
    """The value of every process, in their order; plain values and CPU tensors."""
    if group_size() == 1:
        return [value]
    found: list[Any] = [None] * group_size()
    dist.all_gather_object(found, value)
    return found


def own_share(cases: Sequence[T], what: str) -> list[T]:
    """This process's part of a list: every case has one process.

    Args:
        cases: the same on all processes.
        what: they are, for the message.

    Raises:
        InputError: when there are fewer cases than processes.
    """
    if len(cases) < group_size():
        raise InputError(f"{len(cases)} {what} are too few for {group_size()} processes: start fewer")
    return list(cases[group_rank() :: group_size()])


def seed_noise(seed: int, epoch: int) -> None:
    """Give every process but the first noise of its own (dropout, Gumbel) for an epoch.

    The first keeps PyTorch's global generator, whose state checkpoints carry. A state that follows from (seed, epoch,
    process) needs no place in them, so a run may go on with another number of processes.
    """
    if not is_first():
        state = np.random.SeedSequence([seed, epoch, group_rank()]).generate_state(1, np.uint64)
        torch.manual_seed(int(state[0] >> 1))


def data_parallel(module: nn.Module) -> nn.Module:
    """The module, wrapped for several processes if there are several.

    Selections and loss weights of 0 leave parameters without a gradient, and which ones may change with the epoch: so
    unused ones are looked for in every step. They keep no gradient at all, as in one process, rather than one of 0, to
    which weight decay would apply.

    Raises:
        InputError: when several processes were started but form no group: each would train alone, in one folder.
    """
    if not dist.is_initialized() and num_processes() > 1:
        raise InputError(
            f"{num_processes()} processes were started, which train together with configs/multi_gpu_train.yaml after "
            "train.yaml and the data overlay: add it, or start one process"
        )
    if group_size() == 1:
        return module
    return DistributedDataParallel(module, find_unused_parameters=True)


class BagBatches(Sampler[list[tuple[int, int]]]):
    """Batches of (epoch, index), shared out over the processes.

    `batch_size` bags make a batch however many processes there are, and the r-th of W takes every W-th of them from
    the r-th on. Only the last batch of an epoch may have fewer bags than processes: those without one get the first
    bag to take part with, and `num_own` says that it does not count.

    Args:
        sampler: order of all cases.
        batch_size: bags of a batch, over all processes.

    Raises:
        InputError: when there are fewer bags in a batch, or cases, than processes.
    """

    def __init__(self, sampler: BagSampler, batch_size: int) -> None:
        self.sampler, self.batch_size = sampler, batch_size
        self.rank, self.num_processes = group_rank(), group_size()
        if batch_size < 1:
            raise InputError(f"batch_size must be 1 or more, not {batch_size}")
        for name, number in (("batch_size", batch_size), ("the number of training cases", len(sampler))):
            if number < self.num_processes:
                raise InputError(
                    f"{name} is {number} for {self.num_processes} processes, and each needs a bag: start fewer"
                )

    def num_own(self, batch: int) -> int:
        """How many bags of a batch of the epoch, counted from 0, are this process's."""
        bags = min(self.batch_size, len(self.sampler) - batch * self.batch_size)
        return len(range(self.rank, bags, self.num_processes))

    def __len__(self) -> int:
        return math.ceil(len(self.sampler) / self.batch_size)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        cases = list(self.sampler)
        for start in range(0, len(cases), self.batch_size):
            batch = cases[start : start + self.batch_size]
            yield batch[self.rank :: self.num_processes] or batch[:1]
