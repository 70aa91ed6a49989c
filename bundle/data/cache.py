"""Prepared slices on disk: each case is prepared once, and an epoch reads the slices that it draws.

A cache is a folder of its own:

    entries/KEY/   a prepared bag, see `cache_entry`; the key is a digest of all that it depends on, see `cache_key`
    memo/          content digests of files that were hashed before
    locks/         held while an entry is made, by the first two digits of its key
    tmp/           entries being written

A folder gets its name in entries/ by one rename when it is whole, so any number of processes may share a cache.
"""

from __future__ import annotations

import errno
import logging
import os
import shutil
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from monai.transforms import Transform

from ..errors import InputError
from .cache_entry import CACHE_TYPES, FORMAT, DamagedEntry, Entry, write_entry
from .cache_key import case_digest, case_stamp, code_digest, described, digest

try:
    import fcntl

    HAS_LOCKS = True
except ImportError:  # Windows: there an entry may be made twice, and the first one stays
    HAS_LOCKS = False

__all__ = ["CacheFull", "SliceCache", "open_cache"]

logger = logging.getLogger(__name__)
FOLDERS = ("entries", "memo", "locks", "tmp")
GB = 1e9
FULL = (errno.ENOSPC, errno.EDQUOT)
# Adding up the sizes of all entries takes time; it is done again when it has cost less than this share of it.
SCAN_SHARE = 0.05


class CacheFull(InputError):
    """The next entry would exceed the limit of the cache."""


class SliceCache:
    """A folder of prepared bags.

    Args:
        folder: of the cache alone; made when something is stored.
        preparation: config of the steps, plain values; another one has other entries.
        limit_gb: GB (10⁹ bytes) that all entries in the folder may take, of this preparation and of others. Nothing is
            deleted to make room. Processes that write at the same moment may exceed it by an entry each.
        cache_type: "uint16" (half the space; off by at most 1/131,070 of the range of a case's values) or "float32".

    Raises:
        InputError: the folder holds other files, or an argument is wrong.
    """

    def __init__(
        self, folder: str | Path, preparation: Any = None, limit_gb: float = 100.0, cache_type: str = "uint16"
    ) -> None:
        if cache_type not in CACHE_TYPES:
            raise InputError(f"cache_type must be {' or '.join(CACHE_TYPES)}, not {cache_type!r}")
        if not limit_gb > 0:
            raise InputError(f"cache_limit_gb must be above 0, not {limit_gb}; to keep nothing set cache_dir to null")
        self.folder = Path(folder).expanduser().absolute()
        self.preparation, self.limit_gb, self.cache_type = preparation, limit_gb, cache_type
        self._held, self._scan_again = 0, 0.0
        self._refuse_other_files()

    def _refuse_other_files(self) -> None:
        try:
            names = set(os.listdir(self.folder))
        except FileNotFoundError:
            return
        except OSError as error:
            raise InputError(f"cache_dir {self.folder} cannot be read ({error.strerror}): choose a folder") from error
        # The way to empty a cache is to delete its folder.
        if any(not name.startswith(".") and name != "lost+found" for name in names.difference(FOLDERS)):
            raise InputError(f"cache_dir {self.folder} holds other files: choose a folder for the cache alone")

    def steps_digest(self, steps: Sequence[Transform]) -> str:
        """What the keys of all cases have in common: how the steps are built, their code, and how entries are written.

        Args:
            steps: of the preparation, before they are used.
        """
        code = code_digest([type(step).__module__ for step in steps], self.preparation)
        return digest([FORMAT, self.cache_type, described(self.preparation), described(list(steps)), code])

    def key(self, case: Mapping[str, Any], steps: str) -> str:
        """The name of a case's entry.

        Args:
            case: dictionary with `image`; every value counts, files by their content.
            steps: from `steps_digest`.

        Raises:
            OSError: a file of the case cannot be read.
            Refusal: likewise a folder.
        """
        return digest([steps, case_digest(case, self.folder / "memo")])

    def stamp(self, case: Mapping[str, Any]) -> str:
        """What tells whether a file of a case was written to; raises as `key`."""
        return case_stamp(case)

    def open(self, key: str) -> Entry:
        """An entry, to be read at once: it holds its file open.

        Raises:
            DamagedEntry: it is damaged, or not there.
        """
        return Entry(self._place(key))

    def holds(self, key: str, thorough: bool = False) -> bool:
        """Whether an entry is there and whole; only `thorough` reads all slices to know."""
        return self._damage(key, thorough) is None

    def size(self, keys: Iterable[str]) -> int:
        """Bytes of some entries."""
        return sum(_size(self._place(key)) for key in keys)

    @contextmanager
    def claim(self, key: str, wait: bool = True) -> Iterator[bool]:
        """The right to make an entry, held for the block; it ends with the process, however that ends.

        Where there are no locks (a folder that cannot be written to, some network disks) the right is given freely: an
        entry may be made twice, and the first one stays.

        Args:
            key: of the entry.
            wait: for a process that has it; otherwise False is given where one has.
        """
        handle = None
        try:
            with suppress(OSError):
                (self.folder / "locks").mkdir(parents=True, exist_ok=True)
                handle = os.open(self.folder / "locks" / key[:2], os.O_RDWR | os.O_CREAT, 0o666)
            yield handle is None or not HAS_LOCKS or self._locked(handle, key, wait)
        finally:
            if handle is not None:
                os.close(handle)

    def _locked(self, handle: int, key: str, wait: bool) -> bool:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError:
            return True
        # Whoever left these had the lock, and is dead.
        for left in (self.folder / "tmp").glob(f"{key[:2]}*"):
            shutil.rmtree(left, ignore_errors=True)
        return True

    def sweep(self) -> None:
        """Remove what killed processes left."""
        with suppress(OSError):
            for start in {name[:2] for name in os.listdir(self.folder / "tmp")}:
                with self.claim(start, wait=False):
                    pass

    def clear_damaged(self, key: str, thorough: bool = False) -> bool:
        """As `holds`, and a damaged entry is removed. Call it with the claim on the entry.

        Raises:
            InputError: it cannot be removed.
        """
        damage = self._damage(key, thorough)
        if damage is not None and os.path.lexists(self._place(key)):
            logger.warning("an entry of the slice cache was damaged (%s) and is made again", damage.reason)
            with self._writing():
                self._remove(key)
        return damage is None

    def store(self, key: str, bag: Mapping[str, Any], case: Mapping[str, Any]) -> None:
        """Keep a prepared bag. Call it with the claim on the entry; an entry that is there stays.

        Args:
            key: of the case.
            bag: what was prepared.
            case: from what.

        Raises:
            CacheFull: the limit is reached.
            InputError: the folder cannot be written to, the disk is full, or the bag holds what cannot be kept.
        """
        temporary = self._temporary(key)
        try:
            with self._writing():
                temporary.mkdir(parents=True)
                self._place(key).parent.mkdir(exist_ok=True)
                size = write_entry(temporary, bag, case, self.cache_type)
                _sync(temporary)
            self._check_limit(size)
            with self._writing():
                self._rename(temporary, self._place(key))
            self._held += size
        finally:
            shutil.rmtree(temporary, ignore_errors=True)

    def _place(self, key: str) -> Path:
        return self.folder / "entries" / key

    def _temporary(self, key: str) -> Path:
        return self.folder / "tmp" / f"{key}-{uuid.uuid4().hex[:8]}"

    def _damage(self, key: str, thorough: bool) -> DamagedEntry | None:
        try:
            entry = self.open(key)
            if thorough:
                entry.slices()
        except DamagedEntry as error:
            return error
        return None

    def _remove(self, key: str) -> None:
        away = self._temporary(key)
        with suppress(FileNotFoundError):
            os.rename(self._place(key), away)
        if away.is_dir() and not away.is_symlink():
            shutil.rmtree(away, ignore_errors=True)
        else:
            away.unlink(missing_ok=True)

    def _rename(self, temporary: Path, place: Path) -> None:
        try:
            os.rename(temporary, place)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
        _sync(place.parent)

    def _check_limit(self, size: int) -> None:
        if time.monotonic() >= self._scan_again:
            start = time.monotonic()
            with os.scandir(self.folder / "entries") as entries:
                self._held = sum(_size(Path(entry.path)) for entry in entries)
            end = time.monotonic()
            self._scan_again = end + (end - start) / SCAN_SHARE
        if self._held + size > self.limit_gb * GB:
            raise CacheFull(
                f"the slice cache {self.folder} holds {self._held / GB:.3g} GB, and the next case takes "
                f"{size / GB:.3g} GB: more than cache_limit_gb, {self.limit_gb:g}; raise it, delete the folder, choose "
                "a smaller image_size, or set cache_dir to null"
            )

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            remedy = "choose another cache_dir, or set it to null to keep nothing"
            if error.errno in FULL:
                raise InputError(f"the disk of the slice cache {self.folder} is full: free space, {remedy}") from error
            raise InputError(
                f"the slice cache {self.folder} cannot be written to ({error.strerror}): {remedy}"
            ) from error


def open_cache(
    cache_dir: str | None, preparation: Any, limit_gb: float = 100.0, cache_type: str = "uint16"
) -> SliceCache | None:
    """The cache of a config, or None where it wants none; see `SliceCache`.

    Raises:
        InputError: see `SliceCache`.
    """
    if cache_dir is not None and not str(cache_dir).strip():
        raise InputError("cache_dir is a folder, or null to keep nothing")
    return None if cache_dir is None else SliceCache(cache_dir, preparation, limit_gb, cache_type)


def _size(folder: Path) -> int:
    with suppress(OSError), os.scandir(folder) as files:
        return sum(file.stat().st_size for file in files)
    return 0


def _sync(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
