"""A DICOM file → the tags asked for, in bounded memory and time, without pydicom's warnings."""

from __future__ import annotations

import functools
import io
import logging
import os
import threading
import warnings
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import pydicom
import pydicom.config
from pydicom.dataset import FileDataset
from pydicom.tag import BaseTag
from pydicom.uid import DeflatedExplicitVRLittleEndian

from ..errors import Refusal

__all__ = ["endless", "quiet_pydicom", "read_dataset", "stamp", "unreadable"]

# A deflated file can unpack to a thousand times its size; one single-frame image of 4096² voxels needs 64 MiB.
MAX_INFLATED_BYTES = 2**28
# A file of nothing but empty elements takes minutes a gigabyte. 4000 frames of a scanner need a third of this.
MAX_READS = 2_000_000
PIXEL_DATA = 0x7FE00010
# Enough for any file meta group but one that holds private information.
META_BYTES = 4096
# Value representations of which a file meta group consists, and whose length is written in two or in four bytes.
SHORT_LENGTHS, LONG_LENGTHS = (b"UI", b"UL", b"SH", b"AE"), (b"OB",)
_pydicom_lock = threading.RLock()
_is_quiet = False


def _renew_lock() -> None:
    global _pydicom_lock, _is_quiet
    _pydicom_lock = threading.RLock()
    _is_quiet = False


if hasattr(os, "register_at_fork"):
    # A data-loading worker forked while another thread reads would inherit the lock as taken, for ever.
    os.register_at_fork(after_in_child=_renew_lock)


@contextmanager
def quiet_pydicom() -> Iterator[None]:
    """Run pydicom without its warnings and log lines, which quote tag values, and so patients.

    Everything it warns about is either checked here or refused. One thread at a time: the switches are global.
    """
    global _is_quiet
    logger = logging.getLogger("pydicom")

    def silence(record: logging.LogRecord) -> bool:
        return False

    with _pydicom_lock:
        if _is_quiet:  # by this thread, which holds the lock already
            yield
            return
        with warnings.catch_warnings(), pydicom.config.disable_value_validation():
            warnings.simplefilter("ignore")
            logger.addFilter(silence)
            _is_quiet = True
            try:
                yield
            finally:
                _is_quiet = False
                logger.removeFilter(silence)


def stamp(path: Path) -> list[int]:
    """What changes when a file is written: size in bytes, and time in nanoseconds."""
    status = path.stat()
    return [status.st_size, status.st_mtime_ns]


def unreadable(**facts: Any) -> Refusal:
    """The refusal of a file that should be DICOM and is not."""
    return Refusal(
        "unreadable_file",
        "A file that should hold a DICOM image cannot be read as DICOM: it may be damaged or cut short; copy the "
        "series again from its source.",
        **facts,
    )


class _CountedFile:
    """A file, or bytes unpacked from one, that ends the parsing of a header that never ends."""

    def __init__(self, file: BinaryIO, name: str) -> None:
        self.file, self.name, self.reads = file, name, 0
        self.seek, self.tell = file.seek, file.tell

    def read(self, size: int = -1) -> bytes:
        self.reads += 1
        if self.reads > MAX_READS:
            raise endless()
        return self.file.read(size)


def endless() -> Refusal:
    """The refusal of a file that holds more tags or items than any image."""
    return Refusal(
        "too_large",
        "A DICOM file holds far more tags than any image: it is damaged or not what it says.",
        limit_reads=MAX_READS,
    )


class _Elements:
    """Looks at each element at the top of a dataset before pydicom reads it.

    pydicom keeps the last of two elements of one tag, and other programs the first.
    """

    def __init__(self, wanted: Sequence[BaseTag], stop_before_pixels: bool) -> None:
        self.wanted = set(map(int, wanted))
        self.stop_before_pixels = stop_before_pixels
        self.seen: set[int] = set()

    def __call__(self, tag: BaseTag, vr: str | None, length: int) -> bool:
        number = int(tag)
        if number in self.wanted and number in self.seen:
            raise Refusal(
                "bad_tag",
                f"The DICOM tag {pydicom.datadict.keyword_for_tag(number) or tag} stands twice in at least one image.",
                tag=str(tag),
            )
        self.seen.add(number)
        return self.stop_before_pixels and number == PIXEL_DATA


def read_dataset(
    path: Path, tags: Sequence[str | int], defer_size: int | None, *, stop_before_pixels: bool = False
) -> FileDataset:
    """Parse some tags of one DICOM file, in bounded memory and time. Call inside `quiet_pydicom`.

    Args:
        path: the file.
        tags: keywords, and numbers of private tags.
        defer_size: bytes; longer values are left in the file and cannot be read later. None reads all.
        stop_before_pixels: end where the pixel data begin.

    Raises:
        Refusal: `unreadable_file`; `too_large` for a deflated file that unpacks beyond 256 MiB, or for a header of
            millions of tags; `bad_tag` where one of the tags stands twice.
    """
    look = _Elements(_tags(tuple(tags)), stop_before_pixels)
    numbers: list[BaseTag | int] = list(_tags(tuple(tags)))
    try:
        with path.open("rb") as file:
            meta = pydicom.filereader.read_file_meta_info(path) if _may_be_deflated(file) else None
            if meta is not None and meta.get("TransferSyntaxUID") == DeflatedExplicitVRLittleEndian:
                counted: Any = _CountedFile(io.BytesIO(_inflated(file)), str(path))
                dataset = pydicom.filereader.read_dataset(
                    counted, False, True, stop_when=look, defer_size=defer_size, specific_tags=numbers
                )
                # Nothing that was deferred can be read later: places in the file are not those in what it unpacks to.
                nowhere = io.BytesIO()
                return FileDataset(nowhere, dataset, file_meta=meta, is_implicit_VR=False, is_little_endian=True)
            counted = _CountedFile(file, str(path))
            return pydicom.filereader.read_partial(
                counted, stop_when=look, defer_size=defer_size, force=False, specific_tags=numbers
            )
    except (Refusal, MemoryError):
        raise
    except OSError as error:
        raise Refusal("unreadable", "A file of the scan cannot be opened; look at its permissions.") from error
    except Exception as error:  # pydicom raises a dozen types on damaged files; none may pass for anything else
        raise unreadable() from error


@functools.cache
def _tags(tags: tuple[str | int, ...]) -> tuple[BaseTag, ...]:
    return tuple(pydicom.tag.Tag(tag) for tag in tags)


def _may_be_deflated(file: BinaryIO) -> bool:
    """Whether the file meta group names the deflated transfer syntax, or is not plain enough to tell at a glance."""
    head = file.read(META_BYTES)
    file.seek(0)
    place = 132
    while head[place : place + 2] == b"\x02\x00":
        kind = head[place + 4 : place + 6]
        if kind in SHORT_LENGTHS:
            place += 8 + int.from_bytes(head[place + 6 : place + 8], "little")
        elif kind in LONG_LENGTHS:
            place += 12 + int.from_bytes(head[place + 8 : place + 12], "little")
        else:
            return True
    return place + 2 > len(head) or DeflatedExplicitVRLittleEndian.encode() in head[:place]


def _inflated(file: BinaryIO) -> bytes:
    """What follows the file meta group of a deflated file, unpacked within bounds."""
    file.seek(132)
    while True:  # the group's own length may lie, so its elements are walked through
        place = file.tell()
        head = file.read(8)
        if len(head) < 8 or head[:2] != b"\x02\x00":
            break
        if head[4:6] in (b"OB", b"OW", b"SQ", b"UN", b"UT"):
            length = int.from_bytes(file.read(4), "little")
        else:
            length = int.from_bytes(head[6:8], "little")
        file.seek(length, os.SEEK_CUR)
    file.seek(place)
    inflater, unpacked = zlib.decompressobj(-zlib.MAX_WBITS), bytearray()
    while not inflater.eof and (chunk := inflater.unconsumed_tail or file.read(1 << 16)):
        unpacked += inflater.decompress(chunk, 1 << 20)
        if len(unpacked) > MAX_INFLATED_BYTES:
            raise Refusal(
                "too_large",
                f"A deflated DICOM file unpacks to more than {MAX_INFLATED_BYTES >> 20} MiB, far beyond one "
                "image: it is damaged or not what it says.",
                limit_bytes=MAX_INFLATED_BYTES,
            )
    return bytes(unpacked)
