from __future__ import annotations

import gc
import multiprocessing
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import Dataset

from bundle.data.loader import CaseLoader, read_ahead
from bundle.errors import InputError, Refusal

# Python 3.12 warns of every fork beside threads; workers are forked by PyTorch.
forks = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")


class Cases(Dataset[Any]):
    """Bags of 1 to 4 slices of the number of their case; every third case is refused."""

    def __init__(self, count: int = 8, fault: BaseException | None = None) -> None:
        self.count, self.fault = count, fault

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Any]:
        if index == 5 and self.fault is not None:
            raise self.fault
        case = {"case": f"c{index}", "label": None, "patient": None}
        if index % 3 == 2:
            return {**case, "refusal": Refusal("empty", "there is nothing in it")}
        number = torch.arange(index % 4 + 1)
        return {
            **case,
            "image": torch.full((len(number), 1, 2, 2), float(index)),
            "slice_index": number,
            "slice_position": number * 1.5,
            "slice_label": -torch.ones_like(number),
        }


def names(batches: Iterator[dict[str, Any]] | CaseLoader) -> list[str]:
    """Cases in the order in which they stood."""
    found = []
    for batch in batches:
        here = list(batch.get("case", []))
        for case in batch.get("refused", []):
            here.insert(case["position"], case["case"])
        found += here
    return found


@pytest.mark.parametrize("num_workers", [0, pytest.param(2, marks=forks)])
@pytest.mark.parametrize("batch_size", [1, 3, 20])
def test_every_case_comes_once_and_in_order(batch_size: int, num_workers: int) -> None:
    loader = CaseLoader(Cases(), batch_size, num_workers)
    batches = list(loader)
    assert names(iter(batches)) == [f"c{i}" for i in range(8)]
    assert len(batches) == len(loader) == -(-8 // batch_size)
    for batch in batches:
        for i, case in enumerate(batch.get("case", [])):
            real = batch["image"][i][batch["mask"][i]]
            assert real.shape[0] == int(case[1:]) % 4 + 1
            assert (real == float(case[1:])).all()
    assert names(loader) == names(iter(batches))  # a second time


def test_passes_are_gone_through_one_after_the_other_and_taken_late() -> None:
    taken: list[int] = []
    given: list[str] = []

    def one_pass(indices: list[int]) -> Iterator[int]:
        for index in indices:
            taken.append(index)
            yield index

    def passes() -> Iterator[Iterator[int]]:
        for indices in ([0, 4], [], [1]):
            assert len(given) == len(taken)  # all of the passes before were given out
            yield one_pass(indices)

    loader = CaseLoader(Cases(), 1, passes=passes())
    with pytest.raises(TypeError, match="not known beforehand"):
        len(loader)
    for batch in loader:
        given += batch["case"]
    assert given == ["c0", "c4", "c1"]


@pytest.mark.parametrize("num_workers", [0, pytest.param(2, marks=forks)])
def test_a_fault_arrives_where_its_case_stood(num_workers: int) -> None:
    batches, seen, begun = iter(CaseLoader(Cases(fault=InputError("the sixth")), 1, num_workers)), [], time.monotonic()
    for _ in range(5):
        seen += names(iter([next(batches)]))
    assert seen == ["c0", "c1", "c2", "c3", "c4"]
    with pytest.raises(InputError, match="the sixth"):
        next(batches)
    gc.collect()
    assert time.monotonic() - begun < 5  # PyTorch's own iterator would wait this long for each worker
    assert not multiprocessing.active_children()


@pytest.mark.parametrize(("batch_size", "num_workers"), [(0, 0), (1, -1)])
def test_impossible_settings_are_refused(batch_size: int, num_workers: int) -> None:
    with pytest.raises(InputError, match="batch_size must be at least 1 and num_workers at least 0"):
        CaseLoader(Cases(), batch_size, num_workers)


@pytest.mark.parametrize("depth", [1, 3])
def test_reading_goes_on_meanwhile_and_never_further_than_the_depth(depth: int) -> None:
    made: list[int] = []

    def items() -> Iterator[int]:
        for i in range(9):
            made.append(i)
            yield i

    for given, item in enumerate(read_ahead(items(), depth), 1):
        assert item == given - 1
        goal, limit = min(9, given + depth), time.monotonic() + 5
        while len(made) < goal and time.monotonic() < limit:
            time.sleep(0.001)
        time.sleep(0.01)  # time to go too far
        assert len(made) == goal


def test_the_first_item_is_made_by_who_asks_for_it() -> None:
    threads = list(read_ahead(threading.current_thread().name for _ in range(3)))
    assert threads == [threading.current_thread().name, "read-ahead", "read-ahead"]
    assert list(read_ahead([])) == []
    with pytest.raises(ZeroDivisionError):
        list(read_ahead(1 // number for number in range(3)))


def test_nothing_is_kept_of_what_was_given_out() -> None:
    class Item:
        alive = 0

        def __init__(self) -> None:
            Item.alive += 1

        def __del__(self) -> None:
            Item.alive -= 1

    most = 0
    for item in read_ahead((Item() for _ in range(20)), 1):
        time.sleep(0.002)
        most = max(most, Item.alive)
        del item
    assert most == 2  # the one here and the one ahead


def test_the_thread_ends_with_its_reader() -> None:
    def endless() -> Iterator[int]:
        while True:
            yield 0

    ahead = read_ahead(endless(), 2)
    next(ahead)
    (thread,) = [one for one in threading.enumerate() if one.name == "read-ahead"]
    ahead.close()  # type: ignore[attr-defined]
    assert not thread.is_alive()
    list(read_ahead(iter([1])))
    assert not [one for one in threading.enumerate() if one.name == "read-ahead"]


INTERRUPTED_WHILE_FETCHING = """
import multiprocessing.connection as connection, time
import torch
from torch.utils.data import Dataset
from bundle.data.loader import CaseLoader

class Bags(Dataset):
    def __len__(self):
        return 5
    def __getitem__(self, index):
        return {"case": str(index), "image": torch.zeros(3, 1, 2, 2)}

plain = connection.SocketClient

def cut(address):
    plain(address).close()
    time.sleep(0.5)  # the worker notices
    raise KeyboardInterrupt

connection.SocketClient = cut
for batch in CaseLoader(Bags(), num_workers=2):
    pass
"""


def test_an_interrupt_while_a_bag_is_handed_over_prints_one_trace() -> None:
    command = [sys.executable, "-c", INTERRUPTED_WHILE_FETCHING]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert done.stderr.count("Traceback") == 1
    assert done.stderr.rstrip().endswith("KeyboardInterrupt")
