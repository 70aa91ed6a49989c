"""Cases in their order, in batches, the next ones read while the network looks at the present ones."""

from __future__ import annotations

import math
import queue
import signal
import sys
import threading
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any, TypeVar

from torch.utils.data import DataLoader, Dataset

from ..errors import InputError
from .collate import collate_bags

__all__ = ["CaseLoader", "read_ahead"]

T = TypeVar("T")
JOIN_SECONDS = 10.0  # a read that hangs on a lost network disk must not keep the program from ending


class CaseLoader:
    """Batches of cases for evaluation and inference; the results are the same with any of its settings.

    While one batch is computed the next is read: by one thread, or by worker processes. In memory are the batch and
    at most as many cases again, or one a worker where those are more.

    Args:
        dataset: item i is a bag or a refused case, see `collate_bags`.
        batch_size: cases a batch.
        num_workers: processes that read; with 0 a thread does.
        passes: of indices to go through, one after the other; None goes through all cases once. An index is taken when
            its case is about to be read, and a pass after the last batch of the pass before was computed.

    Raises:
        InputError: on a batch size below 1 or a negative number of workers.
    """

    def __init__(
        self,
        dataset: Dataset[Any],
        batch_size: int = 1,
        num_workers: int = 0,
        passes: Iterable[Iterable[int]] | None = None,
    ) -> None:
        if batch_size < 1 or num_workers < 0:
            raise InputError(
                f"batch_size must be at least 1 and num_workers at least 0, not {batch_size} and {num_workers}"
            )
        self.dataset, self.batch_size, self.num_workers, self.passes = dataset, batch_size, num_workers, passes

    def __len__(self) -> int:
        if self.passes is not None:
            raise TypeError("how many cases will be left to this process is not known beforehand")
        return math.ceil(len(self.dataset) / self.batch_size)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[dict[str, Any]]:
        every = [range(len(self.dataset))]  # type: ignore[arg-type]
        for indices in every if self.passes is None else self.passes:
            bags = self._by_processes(indices) if self.num_workers else self._by_a_thread(indices)
            while batch := list(islice(bags, self.batch_size)):
                held = [collate_bags(batch)]
                del batch
                yield held.pop()  # neither the bags nor the batch may stay here while the next ones are read

    def _by_a_thread(self, indices: Iterable[int]) -> Iterator[Any]:
        return read_ahead((self.dataset[index] for index in indices), self.batch_size)

    def _by_processes(self, indices: Iterable[int]) -> Iterator[Any]:
        loader: Any = DataLoader(
            self.dataset,
            batch_size=None,
            sampler=indices,
            num_workers=self.num_workers,
            collate_fn=_as_it_is,
            worker_init_fn=_hand_over_quietly,
            prefetch_factor=math.ceil(self.batch_size / self.num_workers),
        )
        bags = iter(loader)
        try:
            yield from bags
        finally:
            # An exception from a worker keeps this iterator in a circle; once collected, it waits 5 s for each worker.
            bags._shutdown_workers()


def _as_it_is(bag: Any) -> Any:
    return bag


def _hand_over_quietly(_: int) -> None:
    """In a worker: an interrupt is the program's to act on, and a bag that is no longer wanted is no fault.

    A worker that an interrupt reaches first waits for the program to take what it has read, and the program, which does
    not, waits for it. And where an interrupt stops the program while it fetches a bag, the thread of the worker that
    hands bags over finds the line cut, and Python would print a stack trace after that of the interrupt. Faults of
    cases do not come this way.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group
    plain = sys.excepthook

    def hook(kind: type[BaseException], error: BaseException, trace: Any) -> None:
        if not issubclass(kind, (ConnectionError, EOFError)):
            plain(kind, error, trace)

    sys.excepthook = hook


def read_ahead(items: Iterable[T], depth: int = 1) -> Iterator[T]:
    """Give items in their order while a thread makes up to `depth` of the next ones.

    The first is made by the thread that asks for it. What goes wrong while an item is made is raised in its place. The
    other thread ends with the generator, after the item it is at.

    Args:
        items: iterated over in these threads, never in both at once.
        depth: items that exist at most besides those given out.
    """
    source = iter(items)
    # There is nothing yet that the first could be read beside, and where it is the only one no thread comes to work.
    # With one, a single scan was seen to take a quarter longer on two cores: perhaps because PyTorch then has a team of
    # workers for each of two threads.
    first = list(islice(source, 1))
    if not first:
        return
    made: queue.Queue[tuple[list[T], BaseException | None]] = queue.Queue()
    places = threading.Semaphore(depth)
    over = threading.Event()

    def make() -> None:
        try:
            while places.acquire() and not over.is_set():
                made.put((list(islice(source, 1)), None))
        except BaseException as error:
            made.put(([], error))

    thread = threading.Thread(target=make, name="read-ahead", daemon=True)
    thread.start()
    try:
        yield first.pop()
        while True:
            one, error = made.get()
            if error is not None:
                raise error
            if not one:
                return
            places.release()
            yield one.pop()
    finally:
        over.set()
        places.release()
        thread.join(JOIN_SECONDS)
