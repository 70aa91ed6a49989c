"""Several files of one DICOM object → one of them, if they say the same."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..errors import Refusal
from .dicom_header import SliceHeader
from .dicom_parse import (
    quiet_pydicom,
    read_dataset,
)
from .dicom_pixels import PIXEL_TAGS

__all__ = ["drop_copies"]


def drop_copies(headers: Sequence[SliceHeader]) -> tuple[list[SliceHeader], int]:
    """Keep one of several files that hold the same object.

    They do where they are the same to the byte, or where everything that the reader looks at is the same, pixels
    included: archives rewrite the file meta group and retrieval tags of what they send.

    Args:
        headers: all images found, those of one file behind each other.

    Returns:
        The images of one file an object, and how many files were left out.

    Raises:
        Refusal: `conflicting_copies` where two files carry one SOP Instance UID and differ.
    """
    files: dict[str, dict[Path, list[SliceHeader]]] = {}
    for header in headers:
        files.setdefault(header.sop_uid, {}).setdefault(header.path, []).append(header)
    kept: list[SliceHeader] = []
    dropped = 0
    for uid, copies in files.items():
        (first, images), *others = copies.items()
        kept += images
        for path, again in others:
            if _digest(first) != _digest(path) and not _same(images, again):
                raise Refusal(
                    "conflicting_copies",
                    "Two files claim to be the same image (one SOP Instance UID) and differ; keep the right one.",
                    sop_instance_uid=uid,
                )
            dropped += 1
    return kept, dropped


def _digest(path: Path) -> bytes:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.digest()


def _same(one: Sequence[SliceHeader], other: Sequence[SliceHeader]) -> bool:
    place = one[0].path
    if list(one) != [replace(header, path=place) for header in other]:
        return False
    return _pixel_elements(place) == _pixel_elements(other[0].path)


def _pixel_elements(path: Path) -> list[tuple[Any, Any]]:
    with quiet_pydicom():
        dataset = read_dataset(path, PIXEL_TAGS, None)
        return [(tag, dataset.get_item(tag).value) for tag in dataset.keys()]  # noqa: SIM118 - a Dataset yields elements
