"""The tags of one DICOM file as checked Python values, without pydicom's warnings."""

from __future__ import annotations

import logging
import os
import re
import threading
import warnings
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import pydicom
import pydicom.config
from pydicom.dataset import Dataset, FileDataset
from pydicom.multival import MultiValue
from pydicom.uid import UID, DeflatedExplicitVRLittleEndian

from ..errors import Refusal

__all__ = [
    "hint",
    "integer",
    "items",
    "known",
    "number",
    "numbers",
    "private_number",
    "quiet_pydicom",
    "read_dataset",
    "required_uid",
    "uid",
    "unreadable",
    "word",
    "words",
]

# A deflated file can unpack to a thousand times its size; one single-frame image of 4096² voxels needs 64 MiB.
MAX_INFLATED_BYTES = 2**28
# A file of nothing but empty elements takes minutes a gigabyte. 4000 frames of a scanner need a tenth of this.
MAX_READS = 6_000_000
UID_PATTERN = re.compile(r"[0-9.]{1,64}")
_pydicom_lock = threading.RLock()


def _renew_lock() -> None:
    global _pydicom_lock
    _pydicom_lock = threading.RLock()


if hasattr(os, "register_at_fork"):
    # A data-loading worker forked while another thread reads would inherit the lock as taken, for ever.
    os.register_at_fork(after_in_child=_renew_lock)


@contextmanager
def quiet_pydicom() -> Iterator[None]:
    """Run pydicom without its warnings and log lines, which quote tag values, and so patients.

    Everything it warns about is either checked here or refused. One thread at a time: the switches are global.
    """
    logger = logging.getLogger("pydicom")

    def silence(record: logging.LogRecord) -> bool:
        return False

    with _pydicom_lock, warnings.catch_warnings(), pydicom.config.disable_value_validation():
        warnings.simplefilter("ignore")
        logger.addFilter(silence)
        try:
            yield
        finally:
            logger.removeFilter(silence)


def unreadable(**facts: Any) -> Refusal:
    """The refusal of a file that should be DICOM and is not."""
    return Refusal(
        "unreadable_file",
        "A file that should hold a DICOM image cannot be read as DICOM: it may be damaged or cut short; copy the "
        "series again from its source.",
        **facts,
    )


class _CountedFile:
    """A file that ends the parsing of a header that never ends."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.reads = file, 0
        self.seek, self.tell, self.name = file.seek, file.tell, file.name

    def read(self, size: int = -1) -> bytes:
        self.reads += 1
        if self.reads > MAX_READS:
            raise Refusal(
                "too_large",
                "A DICOM file holds millions of tags, far beyond one image: it is damaged or not what it says.",
                limit_reads=MAX_READS,
            )
        return self.file.read(size)


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
        Refusal: `unreadable_file`, or `too_large` for a deflated file that unpacks beyond 256 MiB, or for a header of
            millions of tags.
    """
    try:
        meta = pydicom.filereader.read_file_meta_info(path)
        if meta.get("TransferSyntaxUID") == DeflatedExplicitVRLittleEndian:
            _check_inflated_size(path, 144 + int(meta.FileMetaInformationGroupLength))
        with path.open("rb") as file:
            counted: Any = _CountedFile(file)
            return pydicom.dcmread(
                counted,
                specific_tags=list(tags),  # type: ignore[arg-type] # keywords and numbers may be mixed
                defer_size=defer_size,
                stop_before_pixels=stop_before_pixels,
                force=False,
            )
    except (Refusal, MemoryError):
        raise
    except Exception as error:  # pydicom raises a dozen types on damaged files; none may pass for anything else
        raise unreadable() from error


def _check_inflated_size(path: Path, start: int) -> None:
    inflater, total = zlib.decompressobj(-zlib.MAX_WBITS), 0
    with path.open("rb") as file:
        file.seek(start)
        while chunk := file.read(1 << 16):
            while chunk:
                total += len(inflater.decompress(chunk, 1 << 20))
                chunk = inflater.unconsumed_tail
                if total > MAX_INFLATED_BYTES:
                    raise Refusal(
                        "too_large",
                        f"A deflated DICOM file unpacks to more than {MAX_INFLATED_BYTES >> 20} MiB, far beyond one "
                        "image: it is damaged or not what it says.",
                        limit_bytes=MAX_INFLATED_BYTES,
                    )


def _value(dataset: Dataset, keyword: str) -> Any:
    try:
        return dataset[keyword].value if keyword in dataset else None
    except Exception as error:  # pydicom converts on access, and raises what the conversion raises
        raise _bad_tag(keyword) from error


def _bad_tag(keyword: str) -> Refusal:
    return Refusal("bad_tag", f"The DICOM tag {keyword} holds no valid value in at least one image.", tag=keyword)


def numbers(dataset: Dataset, keyword: str, count: int) -> tuple[float, ...] | None:
    """The numbers a tag holds, which may be NaN; None where the tag is absent or empty.

    Raises:
        Refusal: `bad_tag` where it holds something else, or not `count` numbers.
    """
    value = _value(dataset, keyword)
    if value is None or (isinstance(value, (str, bytes)) and not value):
        return None
    try:
        found = tuple(float(v) for v in (value if isinstance(value, MultiValue) else [value]))
    except (TypeError, ValueError) as error:
        raise _bad_tag(keyword) from error
    if found and len(found) != count:
        raise _bad_tag(keyword)
    return found or None


def number(dataset: Dataset, keyword: str) -> float | None:
    """The one number a tag holds; None where absent. Raises as `numbers` does."""
    found = numbers(dataset, keyword, 1)
    return None if found is None else found[0]


def hint(dataset: Dataset, keyword: str) -> float | None:
    """As `number`, but None for a bad value too: for tags whose faults must not refuse a good series."""
    try:
        return number(dataset, keyword)
    except Refusal:
        return None


def items(dataset: Dataset, keyword: str) -> list[Dataset] | None:
    """The items of a sequence; None where it is absent.

    Raises:
        Refusal: `bad_tag` where it cannot be parsed.
    """
    value = _value(dataset, keyword)
    if value is None:
        return None
    try:
        found = list(value)
    except Exception as error:  # pydicom parses sequences on access, and raises what the parsing raises
        raise _bad_tag(keyword) from error
    if not all(isinstance(item, Dataset) for item in found):
        raise _bad_tag(keyword)
    return found


def private_number(dataset: Dataset, tag: int, creator: str) -> float | None:
    """The first number of a private tag of a known owner; None where absent, of another owner, or no number.

    Args:
        dataset: a dataset whose block of that owner is (gggg,0010), as these scanners write it.
        tag: the private tag, as a number.
        creator: what (gggg,0010) must hold. An anonymiser may have removed it: then the tag counts as that owner's.
    """
    try:
        owner = dataset[(tag >> 16, 0x10)].value if (tag >> 16, 0x10) in dataset else creator
        if tag not in dataset or str(owner).strip("\0 ") != creator:
            return None
        value: Any = dataset[tag].value
        if isinstance(value, bytes):
            value = value.decode("ascii").strip("\0 ").split("\\")
        first = value[0] if isinstance(value, (MultiValue, list)) else value
        return float(first)
    except Exception:  # whatever it is, it is no number; it only helps to name a reason
        return None


def integer(dataset: Dataset, keyword: str) -> int | None:
    """The one whole number a tag holds; None where absent. Raises as `numbers` does."""
    found = number(dataset, keyword)
    if found is None:
        return None
    if not found.is_integer():
        raise _bad_tag(keyword)
    return int(found)


def words(dataset: Dataset, keyword: str) -> tuple[str, ...]:
    """The code words of a tag in capitals, without spaces around them; none where absent."""
    value = _value(dataset, keyword)
    values = [] if value is None else list(value) if isinstance(value, MultiValue) else [value]
    return tuple(str(v).strip("\0 ").upper() for v in values)


def word(dataset: Dataset, keyword: str) -> str:
    """The words of a tag in one string; empty where absent."""
    return "\\".join(words(dataset, keyword))


def uid(dataset: Dataset, keyword: str) -> str | None:
    """The UID a tag holds; None where absent.

    Raises:
        Refusal: `bad_tag` where it is no UID; the UIDs go into results, so nothing else may pass for one.
    """
    value = str(_value(dataset, keyword) or "").strip("\0 ")
    if value and not UID_PATTERN.fullmatch(value):
        raise _bad_tag(keyword)
    return value or None


def known(text: str) -> UID:
    """The UID with pydicom's knowledge of it, without its warnings, which quote it."""
    return UID(text, pydicom.config.IGNORE)


def required_uid(dataset: Dataset, keyword: str) -> str:
    """As `uid`; raises the Refusal `uid_absent` where there is none."""
    value = uid(dataset, keyword)
    if value is None:
        raise Refusal(
            "uid_absent",
            f"At least one image carries no {keyword}, so it belongs to no series for certain.",
            tag=keyword,
        )
    return value
