"""A case → whether its scan is still the one that a result was made from, without reading it."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from .dicom_files import DicomFiles

__all__ = ["scan_identity"]


def scan_identity(case: Mapping[str, Any]) -> str:
    """SHA-256 of what changes when a case's scan does: names below it, sizes and modification times of its files.

    What the list of cases says of it (label, patient, rules for its series) counts too. No name can be read from it.

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


def _stamps(image: Any) -> Iterator[tuple[str, int, int]]:
    """(name, bytes, nanoseconds) of every file of an image; -1 where there is none."""
    if isinstance(image, (list, tuple)):
        for number, path in enumerate(image):
            yield from ((f"{number}/{name}", size, when) for name, size, when in _stamps(path))
    elif isinstance(image, DicomFiles):
        root = os.path.commonpath([path.parent for path in image.paths])
        for path in image.paths:
            yield (os.path.relpath(path, root), *_stamp(path))
    elif Path(image).is_dir():
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


def _stamp(path: Path) -> tuple[int, int]:
    try:
        status = path.stat()
    except OSError:
        return -1, -1
    return status.st_size, status.st_mtime_ns
