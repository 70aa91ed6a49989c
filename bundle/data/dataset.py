"""Cases → bags: each case is prepared once and drawn anew in every epoch."""

from __future__ import annotations

import contextlib
import pickle
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import monai.data
import numpy as np
import torch
from monai.data import MetaTensor
from monai.transforms import Compose, RandomizableTrait, Transform
from torch.utils.data import DataLoader, Dataset, Sampler
from tqdm import tqdm

from ..errors import InputError, Refusal, input_error_behind
from .cache import GB, CacheFull, SliceCache
from .cache_entry import DamagedEntry
from .parts import prepare_in_parts
from .sampling import draws_by_number
from .selective import prepare_drawn

__all__ = ["BagDataset", "BagSampler", "watched"]


class BagDataset(monai.data.Dataset):
    """Bags of a list of cases.

    The transform's steps up to its first random one are the preparation: done once a case and kept, with a `cache`.
    `dataset[i]` is case i in epoch 0 and `dataset[epoch, i]` in another; draws come from (seed, epoch, case). With a
    cache only the slices are read that the first random step draws.

    Args:
        data: case dictionaries with `case`, `image`, and perhaps `label`, `patient`, `slice_label`.
        transform: preparation followed by draws. Draws must give new tensors, not change those they are given.
        seed: of all draws, 0 or more.
        cache: in which all cases are prepared now, unless they are there; None prepares a case each time it is asked
            for. Images come back with the precision of the cache.
        keep_refused: give a case that is refused as {"case", "label", "refusal"} instead of raising.
        progress: show a bar while preparing.
        num_workers: processes that prepare; what they prepare is the same for any number.

    Raises:
        InputError: on a negative seed; where the cache is full or cannot be used; (unless keep_refused) one line for
            every case that cannot be read.
    """

    def __init__(
        self,
        data: Sequence[Mapping[str, Any]],
        transform: Compose,
        *,
        seed: int = 0,
        cache: SliceCache | None = None,
        keep_refused: bool = False,
        progress: bool = True,
        num_workers: int = 0,
    ) -> None:
        super().__init__(list(data), transform)
        if seed < 0:
            raise InputError(f"seed must be 0 or more, not {seed}")
        self.seed, self.keep_refused = seed, keep_refused
        first_random = transform.get_index_of_first(lambda step: isinstance(step, RandomizableTrait))
        self._preparation_end = len(transform.transforms) if first_random is None else first_random
        self._cache = cache
        # Of each case the key of its entry, or the case with its refusal.
        self._made: list[str | dict[str, Any]] = []
        if cache is not None:
            self._steps = cache.steps_digest(transform.transforms[: self._preparation_end])
            self._made = self._make_all(cache, progress, num_workers)

    def _whole(self, case: dict[str, Any]) -> dict[str, Any]:
        """The prepared case."""
        bag = prepare_in_parts(case, self.transform, self._preparation_end)
        # MONAI's transforms make their own tensors of plain ones; a bag has no affine that these could carry.
        return {key: value.as_tensor() if isinstance(value, MetaTensor) else value for key, value in bag.items()}

    def _prepare(self, index: int, by: Callable[[dict[str, Any]], dict[str, Any]] | None = None) -> dict[str, Any]:
        """The prepared case, or the case with its `refusal`."""
        case = dict(self.data[index])
        try:
            if isinstance(case.get("refusal"), Refusal):
                raise case["refusal"]
            return (by or self._whole)(case)
        except Exception as error:
            refusal = input_error_behind(error)
            if refusal is None and self.keep_refused and (cause := _machine_error_behind(error)) is not None:
                # One scan too large or one disk error must not take the other cases' results away.
                refusal = Refusal(
                    "unreadable", f"the scan could not be loaded ({type(cause).__name__}): try it by itself"
                )
            if refusal is None:
                raise
            # A traceback holds the frames that it went through, and with them the whole volume.
            refusal = pickle.loads(pickle.dumps(refusal))
            return {key: case.get(key) for key in ("case", "label", "patient")} | {"refusal": refusal}

    def _make(
        self, cache: SliceCache, index: int, wait: bool = True, thorough: bool = False
    ) -> str | dict[str, Any] | None:
        """The key of a case's entry, made unless it is there; the case with its `refusal`; None: another makes it."""
        case = self.data[index]
        try:
            stamp = cache.stamp(case)
            key = cache.key(case, self._steps)
        except (OSError, InputError):
            # What hinders this hinders the reader too, whose refusal says it better.
            refused = self._prepare(index)
            if "refusal" in refused:
                return refused
            raise
        if cache.holds(key, thorough):
            return key
        with cache.claim(key, wait) as claimed:
            if not claimed:
                return None
            if not cache.clear_damaged(key, thorough):
                bag = self._prepare(index)
                if "refusal" in bag:
                    return bag
                if cache.stamp(case) != stamp:
                    raise InputError(
                        f"case {case['case']} was changed while it was read: run again when its files are complete"
                    )
                cache.store(key, bag, case)
        return key

    def _make_all(self, cache: SliceCache, progress: bool, num_workers: int) -> list[str | dict[str, Any]]:
        cache.sweep()
        made: dict[int, str | dict[str, Any]] = {}
        count = len(self.data)
        with tqdm(total=count, desc="preparing cases", disable=not progress, mininterval=1, unit="case") as bar:
            # Several processes with one list share it out: each first passes over what another one is at.
            for wait in (False, True):
                for index, one in self._each_made(cache, made, num_workers, wait):
                    if isinstance(one, CacheFull):
                        raise self._full(cache, made, one)
                    if isinstance(one, InputError):
                        raise one
                    if one is not None:
                        made[index] = one
                        bar.update()
        self._raise_refused([one for _, one in sorted(made.items()) if not isinstance(one, str)])
        return [made[index] for index in range(count)]

    def _each_made(
        self, cache: SliceCache, made: Mapping[int, Any], num_workers: int, wait: bool
    ) -> Iterator[tuple[int, str | dict[str, Any] | InputError | None]]:
        waiting = [index for index in range(len(self.data)) if index not in made]
        loader = DataLoader(
            _Making(self, cache, wait),
            sampler=waiting,
            batch_size=None,
            collate_fn=_unchanged,
            num_workers=min(num_workers, len(waiting)),
            # Of its own: drawing from the global one would change what is drawn after.
            generator=torch.Generator(),
            in_order=False,
        )
        return iter(loader) if waiting else iter(())

    def _full(self, cache: SliceCache, made: Mapping[int, Any], error: CacheFull) -> InputError:
        keys, count = [one for one in made.values() if isinstance(one, str)], len(self.data)
        told = f"{len(keys)} of {count} cases are prepared"
        if keys:
            told += f", and all of them need about {cache.size(keys) / len(keys) * count / GB:.3g} GB"
        return InputError(f"{error} ({told})")

    def _raise_refused(self, bags: Sequence[Mapping[str, Any]]) -> None:
        refused = [f"case {bag['case']}: {bag['refusal']}" for bag in bags if "refusal" in bag]
        if refused and not self.keep_refused:
            raise InputError("\n".join(refused))

    def __getitem__(self, key: int | tuple[int, int]) -> dict[str, Any]:  # type: ignore[override]
        epoch, index = key if isinstance(key, tuple) else (0, key)
        if self._cache is None:
            prepared = self._read_drawn(index, epoch)
            if "refusal" not in prepared:
                return prepared
        else:
            if isinstance(made := self._made[index], str):
                try:
                    return self._read(self._cache, made, index, epoch)
                except DamagedEntry:
                    made = self._made[index] = self._make(self._cache, index, thorough=True) or made
            if isinstance(made, str):
                return self._read(self._cache, made, index, epoch)
            prepared = made
        self._raise_refused([prepared])
        return dict(prepared)

    def lengths(self) -> list[int]:
        """Slices of each case after the preparation, as far as they lie in a cache; without one nothing is known."""
        known = []
        for key in self._made:
            if self._cache is not None and isinstance(key, str):
                with contextlib.suppress(DamagedEntry):  # made anew when it is asked for
                    known.append(len(self._cache.open(key)))
        return known

    def _read_drawn(self, index: int, epoch: int) -> dict[str, Any]:
        """A bag straight from the scan, of which only the drawn slices are decoded where that is enough."""
        steps, start = self.transform.transforms, self._preparation_end

        def by_slices(case: dict[str, Any]) -> dict[str, Any]:
            nonlocal start
            bag = prepare_drawn({**case, "draw": (self.seed, epoch)}, steps[:start], steps[start]) if draws else None
            if bag is None:
                return self._whole(case)
            start += 1
            return bag

        draws = start < len(steps)
        prepared = self._prepare(index, by_slices)
        return prepared if "refusal" in prepared else self._drawn(prepared, epoch, start)

    def _read(self, cache: SliceCache, key: str, index: int, epoch: int) -> dict[str, Any]:
        entry = cache.open(key)
        bag, start = entry.bag(self.data[index]), self._preparation_end
        draws = self.transform.transforms[start:]
        if draws and draws_by_number(draws[0]):
            bag = dict(self.transform({**bag, "draw": (self.seed, epoch)}, start=start, end=start + 1))
            start += 1
        bag["image"] = entry.slices(bag["image"])
        return self._drawn(bag, epoch, start)

    def _drawn(self, bag: Mapping[str, Any], epoch: int, start: int) -> dict[str, Any]:
        drawn = dict(self.transform({**bag, "draw": (self.seed, epoch)}, start=start))
        del drawn["draw"]
        return drawn


class _Making(Dataset[tuple[int, Any]]):
    """Makes the entry of a case when it is asked for. Wrong input is given, not raised: it keeps its type so."""

    def __init__(self, dataset: BagDataset, cache: SliceCache, wait: bool) -> None:
        self.dataset, self.cache, self.wait = dataset, cache, wait

    def __getitem__(self, index: int) -> tuple[int, str | dict[str, Any] | InputError | None]:
        try:
            return index, self.dataset._make(self.cache, index, self.wait)
        except InputError as error:
            return index, error


def _unchanged(item: Any) -> Any:
    return item


def watched(dataset: BagDataset, draw: Transform, count: int) -> BagDataset:
    """Some cases of a dataset, spread evenly over it, with another draw and the same preparation.

    Args:
        dataset: whose prepared cases are shared, not copied.
        draw: in place of its draws, such as AllSlicesd.
        count: of cases; all when there are fewer.
    """
    chosen = sorted({int(i) for i in np.linspace(0, len(dataset) - 1, min(max(1, count), len(dataset)))})
    steps = [*dataset.transform.transforms[: dataset._preparation_end], draw]
    part = BagDataset([dataset.data[i] for i in chosen], Compose(steps), seed=dataset.seed)
    part._preparation_end, part._cache = dataset._preparation_end, dataset._cache
    if dataset._cache is not None:
        part._steps, part._made = dataset._steps, [dataset._made[i] for i in chosen]
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
