"""A folder of results that several processes fill at once, and that a stopped run is resumed in."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from ..data.identity import scan_folders, scan_identity
from ..errors import InputError
from ..files import FULL, replacing
from ..processes import num_processes, rank
from .predictions import write_predictions
from .records import read_record, record_file_name, remove_foreign_records, write_record

try:
    import fcntl

    HAS_LOCKS = True
except ImportError:  # Windows: there one run at a time is the user's affair
    HAS_LOCKS = False

__all__ = ["RunFolder"]

logger = logging.getLogger(__name__)
# One byte each of the lock file. Such locks end with their process, however it ends, and hold between machines.
ENTRY, INSIDE, STREAM, TABLE, FIRST_CASE = range(5)
POLL_SECONDS = 0.2
TELL_SECONDS = 5.0
LEAVE_SECONDS = 60.0
TRIED_AGAIN = "unreadable"  # reason code of what a disk, the memory or a permission did, and not the scan


class RunFolder:
    """Shares the cases of a list out over all processes that work on one folder, now and later.

    A case is done when its record is whole and made from the same weights, settings, software and scan. It is claimed
    by a lock before it is read. Iterating gives passes of indices (see `CaseLoader`); a pass holds the cases that are
    neither done nor claimed by others. The last pass ends when all cases of the list are done, by whomever.

    Args:
        output_dir: the folder. Nothing is written before `open`.
        cases: dictionaries with `case` and what tells their scan.
        made_from: see `bundle.made_from`; with the scan's identity it is written into each record.
        resume: keep what is done; false: remove the records of earlier runs, unless another process is at work here.

    Raises:
        InputError: on two cases of one name, or an `output_dir` in the folder of a scan.
    """

    def __init__(
        self,
        output_dir: str | Path,
        cases: Sequence[Mapping[str, Any]],
        made_from: Mapping[str, str],
        resume: bool = True,
    ) -> None:
        self._lock_file: BinaryIO | None = None
        self.output_dir, self.cases, self.made_from, self.resume = Path(output_dir), cases, dict(made_from), resume
        self.index = {case["case"]: i for i, case in enumerate(cases)}
        if len(self.index) < len(cases):
            raise InputError("two cases have the same name: classify them in separate runs, or name them by case_names")
        if self._is_in_a_scan():
            # Its files would be part of the scan: no case is done that changes with each result, and the reader, which
            # opens all of them, would end the locks of this process when it closes `.lock`.
            raise InputError(
                "output_dir is, or lies in, a folder of DICOM images that is to be classified: choose a folder outside "
                "the folders of the cases"
            )
        # A run may be given its cases in another order, and a claim has to mean the same case to all.
        self._place = {self.index[name]: place for place, name in enumerate(sorted(self.index))}
        self.done: set[int] = set()
        self._claimed: dict[int, dict[str, str]] = {}

    def __del__(self) -> None:
        self.close()

    # --- the run as a whole ---

    def open(self) -> None:
        """Enter the folder, find out what is done, and begin `cases.jsonl` if no other process is at work.

        Raises:
            InputError: when one is with other weights, settings or cases, or the folder cannot be used.
        """
        if self._lock_file is not None:
            return
        run = json.dumps([self.made_from, sorted(self.index)], sort_keys=True)
        identity = hashlib.sha256(run.encode()).hexdigest().encode()
        self._lock_file = self._opened()
        try:
            first = self._enter(identity)
        except InputError:
            self.close()
            raise
        if not first:
            self.done = {i for i in range(len(self.cases)) if self._is_done(i)}
        logger.info("%d of %d cases are done already", len(self.done), len(self.cases))

    def _enter(self, identity: bytes) -> bool:
        """Be inside from now on; whether nobody else is."""
        file = self._lock_file
        assert file is not None
        with self._locked(ENTRY):
            with self._telling():
                same = file.read(2 * len(identity)) == identity
            first = self._lock(INSIDE)
            if not first and not same:
                raise InputError(
                    f"another run is at work in {self.output_dir} with other weights, settings or cases: wait until it "
                    "has ended, or choose another output_dir"
                )
            if first:
                with self._telling():
                    file.seek(0)
                    file.write(identity)
                    file.truncate(len(identity))
                self._begin()
            # Of those that leave, one may look just now whether it is the last.
            self._lock(INSIDE, shared=True, wait=True)
        return first

    def close(self) -> None:
        """Leave the folder; claims end."""
        if self._lock_file is not None:
            self._lock_file.close()
        self._lock_file = None

    def wait_for_others(self) -> None:
        """After leaving, wait until no process is inside, or a minute; for the one that ends with an exit status.

        `torchrun` then ends the others, in the middle of whatever they do.
        """
        if num_processes() == 1:
            return
        self._lock_file = self._opened()
        end = time.monotonic() + LEAVE_SECONDS
        while not self._is_empty() and time.monotonic() < end:
            time.sleep(POLL_SECONDS)
        self.close()

    def _is_empty(self) -> bool:
        """Whether no process is inside or about to enter, which would take this look for another run."""
        if not self._lock(ENTRY):
            return False
        empty = self._lock(INSIDE)
        self._unlock(INSIDE)
        self._unlock(ENTRY)
        return empty

    def _is_in_a_scan(self) -> bool:
        """Whether a folder that is written to lies in one of the scans; by inode, whatever links lead there."""
        records = Path(os.path.realpath(self.output_dir / "cases"))
        written = {found for path in (records, *records.parents) if (found := _inode(path)) is not None}
        images = (case["image"] for case in self.cases if case.get("image") is not None)
        return any(_inode(folder) in written for image in images for folder in scan_folders(image))

    @contextmanager
    def _telling(self) -> Iterator[None]:
        """Say in a sentence that the folder cannot be written in."""
        try:
            yield
        except OSError as error:
            advice = (
                "free space there, or choose another folder"
                if error.errno in FULL
                else "choose a folder that is writable"
            )
            raise InputError(f"output_dir: cannot write in {self.output_dir} ({error.strerror}); {advice}") from error

    def _opened(self) -> BinaryIO:
        with self._telling():
            self.output_dir.mkdir(parents=True, exist_ok=True)
            handle = os.open(self.output_dir / ".lock", os.O_RDWR | os.O_CREAT, 0o666)
        return os.fdopen(handle, "r+b", buffering=0)

    def _begin(self) -> None:
        """Remove what killed processes left and what is to be done again; tell of the rest in a new `cases.jsonl`."""
        with self._telling():
            for folder in (self.output_dir, self.output_dir / "cases"):
                for path in folder.glob(".part-*"):
                    path.unlink(missing_ok=True)
        self.done = set()
        with replacing(self.output_dir / "cases.jsonl") as temporary, temporary.open("w", encoding="utf-8") as file:
            for i, case in enumerate(self.cases):
                path = self._path(case["case"])
                record = read_record(path)
                if record is None:
                    continue
                if not self.resume or record["reason_code"] == TRIED_AGAIN:
                    with self._telling():
                        path.unlink()
                elif self._fits(record, i):
                    self.done.add(i)
                    file.write(_line(record))

    # --- cases ---

    def __iter__(self) -> Iterator[Iterator[int]]:
        self.open()
        # Each process begins with a share of its own, and helps with the rest.
        mine = [i for i in range(len(self.cases)) if i % num_processes() == rank()]
        order = mine + [i for i in range(len(self.cases)) if i % num_processes() != rank()]
        while True:
            yield self._claim_each(order)
            left = [i for i in order if i not in self.done and i not in self._claimed]
            if not left:
                return
            told_at = time.monotonic() + TELL_SECONDS
            while not any(self._is_free(i) for i in left):
                time.sleep(POLL_SECONDS)
                if time.monotonic() > told_at:
                    logger.info("waiting for %d cases that other processes are at", len(left))
                    told_at = math.inf

    def _claim_each(self, order: Sequence[int]) -> Iterator[int]:
        for i in order:
            if i in self.done or i in self._claimed or not self._lock(self._claim_byte(i)):
                continue
            if self._is_done(i):
                self.done.add(i)
                self._unlock(self._claim_byte(i))
            else:
                # Before the scan is read: what changes meanwhile is noticed next time.
                self._claimed[i] = self._made_from(i)
                yield i

    def finish(self, record: Mapping[str, Any]) -> None:
        """Write the record of a case that this process claimed, tell of it in `cases.jsonl`, and end the claim."""
        i = self.index[record["case"]]
        record = {**record, "made_from": self._claimed.pop(i, None) or self._made_from(i)}
        write_record(self.output_dir / "cases", record)
        with self._locked(STREAM):
            try:
                with (self.output_dir / "cases.jsonl").open("a", encoding="utf-8") as file:
                    file.write(_line(record))
            except OSError as error:
                raise InputError(f"cannot write cases.jsonl ({error.strerror}); look at output_dir") from error
        self.done.add(i)
        self._unlock(self._claim_byte(i))

    def records(self) -> Iterator[dict[str, Any]]:
        """The records of the list that there are, in its order."""
        for case in self.cases:
            record = read_record(self._path(case["case"]))
            if record is not None:
                yield record

    def write_table(self, class_names: Sequence[str]) -> list[dict[str, Any]]:
        """Write `predictions.csv` from all records of the list; if none is missing, remove those of other cases.

        Returns:
            The records in the table, without their slices.
        """
        with self._locked(TABLE):
            records = [{**record, "slices": []} for record in self.records()]
            write_predictions(self.output_dir / "predictions.csv", records, class_names)
            if len(records) == len(self.cases):
                with self._telling():
                    remove_foreign_records(self.output_dir / "cases", self.index)
        logger.info("%d of %d cases are in predictions.csv", len(records), len(self.cases))
        return records

    def _path(self, case: str) -> Path:
        return self.output_dir / "cases" / record_file_name(case)

    def _made_from(self, i: int) -> dict[str, str]:
        return {**self.made_from, "scan": scan_identity(self.cases[i])}

    def _is_done(self, i: int) -> bool:
        record = read_record(self._path(self.cases[i]["case"]))
        return record is not None and self._fits(record, i)

    def _fits(self, record: Mapping[str, Any], i: int) -> bool:
        made_from = record.get("made_from")
        if record["case"] != self.cases[i]["case"] or not isinstance(made_from, dict):
            return False
        # The scan last: its files are opened for it.
        own = {key: value for key, value in made_from.items() if key != "scan"}
        return own == self.made_from and made_from == self._made_from(i)

    # --- locks ---

    def _lock(self, byte: int, shared: bool = False, wait: bool = False) -> bool:
        """Take a byte of the lock file, or turn an exclusive lock into a shared one; False where others have it."""
        if not HAS_LOCKS:
            return True
        assert self._lock_file is not None
        kind = (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB)
        try:
            fcntl.lockf(self._lock_file, kind, 1, byte)
        except (BlockingIOError, PermissionError):
            return False
        except OSError as error:
            raise InputError(
                f"output_dir: the file system of {self.output_dir} has no locks ({error.strerror}); choose a folder on "
                "another"
            ) from error
        return True

    def _unlock(self, byte: int) -> None:
        if HAS_LOCKS and self._lock_file is not None:
            fcntl.lockf(self._lock_file, fcntl.LOCK_UN, 1, byte)

    def _claim_byte(self, i: int) -> int:
        return FIRST_CASE + self._place[i]

    def _is_free(self, i: int) -> bool:
        if not self._lock(self._claim_byte(i)):
            return False
        self._unlock(self._claim_byte(i))
        return True

    @contextmanager
    def _locked(self, byte: int) -> Iterator[None]:
        self._lock(byte, wait=True)
        try:
            yield
        finally:
            self._unlock(byte)


def _inode(path: Path) -> tuple[int, int] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino


def _line(record: Mapping[str, Any]) -> str:
    prediction = record["prediction"]
    told = {key: record[key] for key in ("case", "status", "prediction", "probabilities", "reason_code")}
    told["class_name"] = None if prediction is None else record["class_names"][prediction]
    told["file"] = f"cases/{record_file_name(record['case'])}"
    return json.dumps(told, ensure_ascii=False) + "\n"
