"""The files of a folder → those that are DICOM, those that may be a damaged slice, and the rest."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import InputError, Refusal
from .dicom_tags import unreadable

__all__ = [
    "DicomFiles",
    "dicom_below",
    "has_dicom_content",
    "is_damaged_dicom",
    "is_litter",
    "looks_like_dicom",
    "name_pattern",
    "walk",
]

DICOM_SUFFIXES = (".dcm", ".dicom", ".ima")
# What lies beside scans and is none. A damaged slice cannot pass for one of these unless the slices are so called.
OTHER_SUFFIXES = (
    ".txt", ".md", ".rst", ".csv", ".tsv", ".json", ".xml", ".html", ".htm", ".css", ".js", ".pdf", ".doc", ".docx",
    ".xls", ".xlsx", ".log", ".ini", ".inf", ".cfg", ".yaml", ".yml", ".png", ".jpg", ".jpeg", ".gif", ".bmp", ".tif",
    ".tiff", ".ico", ".db", ".exe", ".dll", ".bat", ".sh", ".py", ".zip", ".bval", ".bvec", ".lnk", ".url", ".lock",
)  # fmt: skip
# AppleDouble, the `._name` shadow that macOS writes beside every file on foreign disks and into zip files.
APPLE_DOUBLE = b"\x00\x05\x16\x07"
# The root of all of DICOM's own UIDs; the SOP class near the start of every object begins with it.
DICOM_ROOT = b"1.2.840.10008."
FIRST_TAGS = (b"\x08\x00\x05\x00", b"\x08\x00\x08\x00", b"\x02\x00\x00\x00", b"\x02\x00\x01\x00")
LOOKED_AT = 4096


@dataclass(frozen=True)
class DicomFiles:
    """The files of one study, wherever they lie, as one case's image."""

    paths: tuple[Path, ...]


def _head(path: Path, size: int = 132) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(size)
    except OSError as error:
        raise unreadable() from error


def has_dicom_content(path: Path) -> bool:
    """Whether a file begins as DICOM files do: 128 bytes, then DICM."""
    return _head(path)[128:] == b"DICM"


def is_litter(path: Path) -> bool:
    """Whether a file is the shadow that macOS leaves beside a real one; it carries the name and none of the image."""
    head = _head(path)
    return head.startswith(APPLE_DOUBLE) and head[128:] != b"DICM"


def looks_like_dicom(path: Path) -> bool:
    """Whether a file claims to be DICOM by name, or begins with a DICOM tag without the preamble."""
    return path.suffix.lower() in DICOM_SUFFIXES or _head(path)[:4] in FIRST_TAGS


def name_pattern(path: Path) -> str:
    """What the names of one series have in common: each run of digits, or of hexadecimal digits, is one sign."""
    return re.sub(r"\d+", "#", re.sub(r"(?=[0-9a-f]*\d)[0-9a-f]{6,}", "#", path.name.lower()))


def is_damaged_dicom(path: Path, patterns: Iterable[str] = ()) -> bool:
    """Whether a file that does not begin as DICOM may be a damaged slice. Such a file is never passed over.

    A damaged first or last slice, if passed over as junk, would leave a volume that looks whole.

    Args:
        path: the file.
        patterns: `name_pattern` of the DICOM files beside it.
    """
    if is_litter(path):
        return False
    if name_pattern(path) in patterns or looks_like_dicom(path):
        return True
    if path.suffix.lower() in OTHER_SUFFIXES or path.name.startswith("."):
        return False
    head = _head(path, LOOKED_AT)
    # Nothing but zeros: an empty file, a preamble cut short, or blocks that a full disk never wrote.
    return not head.strip(b"\0") or DICOM_ROOT in head


def walk(folder: Path) -> list[tuple[Path, list[Path]]]:
    """Every folder below one and the files directly in it, both in order of name; links to folders are not followed.

    Raises:
        InputError: a folder cannot be read.
    """

    def stop(error: OSError) -> None:
        raise InputError(f"the folder {error.filename} cannot be read") from error

    found = sorted(os.walk(folder, onerror=stop))
    return [(Path(directory), [Path(directory, name) for name in sorted(names)]) for directory, _, names in found]


def dicom_below(files: Sequence[Path]) -> tuple[list[Path], int]:
    """The DICOM files among some, and how many others were passed over.

    Raises:
        Refusal: `empty_file`, `unreadable_file` where one of the others may be a damaged slice.
    """
    dicom: list[Path] = []
    others: list[Path] = []
    for path in files:
        (dicom if has_dicom_content(path) else others).append(path)
    patterns = {name_pattern(path) for path in dicom}
    for path in others:
        if not is_damaged_dicom(path, patterns):
            continue
        if not path.stat().st_size:
            raise Refusal(
                "empty_file",
                "A file that may belong to the series is empty (0 bytes): it was not copied; copy the series again, or "
                "remove the file if it is none of its images.",
            )
        raise Refusal(
            "unreadable_file",
            "A file that by its name or first bytes belongs to the series is not readable as DICOM; copy the series "
            "again, or remove the file if it is none of its images.",
        )
    return dicom, len(others)
