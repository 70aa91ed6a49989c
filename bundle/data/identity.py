"""A case → whether its scan is still the one that a result was made from, without reading the whole of it."""

from __future__ import annotations

import hashlib
import json
import os
import stat
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from .dicom_files import DicomFiles

__all__ = ["scan_folders", "scan_identity"]

# Read at both ends of a file. In DICOM it holds the SOP Instance UID, in a compressed file its checksum.
END_BYTES = 2**12


def scan_folders(image: Any) -> Iterator[Path]:
    """What of an image may be a folder, in which every file may count: itself, or those that hold a study's files.

    Args:
        image: a path, a list of paths, or `DicomFiles`.
    """
    if isinstance(image, (list, tuple)):
        for path in image:
            yield from scan_folders(path)
    elif isinstance(image, DicomFiles):
        yield from sorted({path.parent for path in image.paths})
    else:
        yield Path(image)


def scan_identity(case: Mapping[str, Any]) -> str:
    """SHA-256 of what changes when a case's scan does: names below it, sizes, times and both ends of its files.

    The ends are the first and the last 4 KiB: tools that copy a scan over another may keep its time, and sizes of
    uncompressed scans are often the same. What the list of cases says of it (name, label, patient, rules for its
    series) counts too. No name can be read from it.

    Args:
        case: with `image` (a path, a list of paths, or `DicomFiles`), or with the `refusal` that it already ends with.
    """
    refusal = case.get("refusal")
    said = {key: value for key, value in case.items() if key not in ("image", "refusal")}
    content = [
        None if case.get("image") is None else sorted(_stamps(case["image"])),
        None if refusal is None else [type(refusal).__name__, str(refusal), getattr(refusal, "facts", {})],
        said,
    ]
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=repr).encode()).hexdigest()


def _stamps(image: Any) -> Iterator[tuple[str, int, int, int]]:
    """(name, bytes, nanoseconds, CRC of both ends) of every file of an image; -1 where there is none."""
    if isinstance(image, (list, tuple)):
        for number, path in enumerate(image):
            yield from ((f"{number}/{name}", size, when, ends) for name, size, when, ends in _stamps(path))
    elif isinstance(image, DicomFiles):
        root = os.path.commonpath([path.parent for path in image.paths])
        for path in image.paths:
            yield (os.path.relpath(path, root), *_stamp(path))
    elif os.path.isdir(image):  # False, and no error, where the folder above is closed
        seen: set[str] = set()
        for directory, below, names in os.walk(image, followlinks=True):
            real = os.path.realpath(directory)
            if real in seen:  # a link to a folder above
                below.clear()
                continue
            seen.add(real)
            for path in (Path(directory, name) for name in names):
                yield (os.path.relpath(path, image), *_stamp(path))
    else:
        yield (Path(image).name, *_stamp(Path(image)))


def _stamp(path: Path) -> tuple[int, int, int]:
    try:
        status = path.stat()
    except OSError:
        return -1, -1, -1
    # Whoever opens a pipe waits for its other end.
    ends = _crc_of_ends(path, status.st_size) if stat.S_ISREG(status.st_mode) else -1
    return status.st_size, status.st_mtime_ns, ends


def _crc_of_ends(path: Path, size: int) -> int:
    try:
        with path.open("rb", buffering=0) as file:
            crc = zlib.crc32(file.read(END_BYTES))
            if size > END_BYTES:
                file.seek(max(END_BYTES, size - END_BYTES))
                crc = zlib.crc32(file.read(END_BYTES), crc)
            return crc
    except OSError:
        return -1
