"""Cases → bags: each case is prepared once and drawn anew in every epoch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import monai.data
import numpy as np
import torch
from monai.transforms import Compose, RandomizableTrait, Transform
from torch.utils.data import Sampler
from tqdm import tqdm

from ..errors import InputError, Refusal, input_error_behind

__all__ = ["BagDataset", "BagSampler", "watched"]


class BagDataset(monai.data.Dataset):
    """Bags of a list of cases.

    The transform's steps up to its first random one are the preparation: done once a case and, with `cache`, kept in
    memory. `dataset[i]` is case i in epoch 0 and `dataset[epoch, i]` in another; draws come from (seed, epoch, case).

    Args:
        data: case dictionaries with `case`, `image`, and perhaps `label`, `patient`, `slice_label`.
        transform: preparation followed by draws. Draws must give new tensors, not change those they are given.
        seed: of all draws, 0 or more.
        cache: prepare all cases now and keep them (float32: N · C · H · W · 4 bytes each).
        keep_refused: give a case that is refused as {"case", "label", "refusal"} instead of raising.
        progress: show a bar while preparing.

    Raises:
        InputError: on a negative seed; (unless keep_refused) one line for every case that cannot be read.
    """

    def __init__(
        self,
        data: Sequence[Mapping[str, Any]],
        transform: Compose,
        *,
        seed: int = 0,
        cache: bool = True,
        keep_refused: bool = False,
        progress: bool = True,
    ) -> None:
        super().__init__(list(data), transform)
        if seed < 0:
            raise InputError(f"seed must be 0 or more, not {seed}")
        self.seed, self.keep_refused = seed, keep_refused
        first_random = transform.get_index_of_first(lambda step: isinstance(step, RandomizableTrait))
        self._preparation_end = len(transform.transforms) if first_random is None else first_random
        self._prepared: list[dict[str, Any]] | None = None
        if cache:
            self._prepared = self._prepare_all(progress)

    def _prepare(self, index: int) -> dict[str, Any]:
        """The prepared case, or the case with its `refusal`."""
        case = dict(self.data[index])
        try:
            if isinstance(case.get("refusal"), Refusal):
                raise case["refusal"]
            return dict(self.transform(case, end=self._preparation_end))
        except Exception as error:
            refusal = input_error_behind(error)
            if refusal is None and self.keep_refused and (cause := _machine_error_behind(error)) is not None:
                # One scan too large or one disk error must not take the other cases' results away.
                refusal = Refusal(
                    "unreadable", f"the scan could not be loaded ({type(cause).__name__}): try it by itself"
                )
            if refusal is None:
                raise
            return {key: case.get(key) for key in ("case", "label", "patient")} | {"refusal": refusal}

    def _prepare_all(self, progress: bool) -> list[dict[str, Any]]:
        indices = tqdm(range(len(self.data)), "preparing cases", disable=not progress, mininterval=1, unit="case")
        prepared = [self._prepare(index) for index in indices]
        self._raise_refused(prepared)
        return prepared

    def _raise_refused(self, bags: Sequence[Mapping[str, Any]]) -> None:
        refused = [f"case {bag['case']}: {bag['refusal']}" for bag in bags if "refusal" in bag]
        if refused and not self.keep_refused:
            raise InputError("\n".join(refused))

    def __getitem__(self, key: int | tuple[int, int]) -> dict[str, Any]:  # type: ignore[override]
        epoch, index = key if isinstance(key, tuple) else (0, key)
        prepared = self._prepared[index] if self._prepared is not None else self._prepare(index)
        if "refusal" in prepared:
            self._raise_refused([prepared])
            return dict(prepared)
        bag = dict(self.transform({**prepared, "draw": (self.seed, epoch)}, start=self._preparation_end))
        del bag["draw"]
        if self._prepared is not None:
            # What no draw replaced is the kept tensor itself, and whoever gets the bag may change it.
            kept = {
                name for name, value in bag.items() if isinstance(value, torch.Tensor) and value is prepared.get(name)
            }
            bag.update({name: bag[name].clone() for name in kept})
        return bag


def watched(dataset: BagDataset, draw: Transform, count: int) -> BagDataset:
    """Some cases of a dataset, spread evenly over it, with another draw and the same preparation.

    Args:
        dataset: whose prepared cases are shared, not copied.
        draw: in place of its draws, such as AllSlicesd.
        count: of cases; all when there are fewer.
    """
    chosen = sorted({int(i) for i in np.linspace(0, len(dataset) - 1, min(max(1, count), len(dataset)))})
    steps = [*dataset.transform.transforms[: dataset._preparation_end], draw]
    part = BagDataset([dataset.data[i] for i in chosen], Compose(steps), seed=dataset.seed, cache=False)
    part._preparation_end = dataset._preparation_end
    if dataset._prepared is not None:
        part._prepared = [dataset._prepared[i] for i in chosen]
    return part


def _machine_error_behind(error: BaseException | None) -> OSError | MemoryError | None:
    while error is not None and not isinstance(error, (OSError, MemoryError)):
        error = error.__cause__ or error.__context__
    return error


class BagSampler(Sampler[tuple[int, int]]):
    """Yields (epoch, index), so that workers learn the epoch with each item; shuffles by (seed, epoch).

    Args:
        num_cases: of the dataset.
        seed: of the order.
        shuffle: whether cases come in another order every epoch.
    """

    def __init__(self, num_cases: int, seed: int = 0, shuffle: bool = True) -> None:
        if num_cases < 1:
            raise InputError("this part of the datalist holds no cases")
        self.num_cases, self.seed, self.shuffle = num_cases, seed, shuffle
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch of the next pass."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.num_cases

    def __iter__(self) -> Iterator[tuple[int, int]]:
        order = torch.arange(self.num_cases)
        if self.shuffle:
            # One number for both: a generator seeded with seed + epoch would repeat orders between seeds.
            generator = torch.Generator().manual_seed((self.seed * 1_000_003 + self.epoch) % 2**63)
            order = torch.randperm(self.num_cases, generator=generator)
        return iter([(self.epoch, int(index)) for index in order])
