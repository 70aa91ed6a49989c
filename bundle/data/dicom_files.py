"""The files of a folder → those that are DICOM, those that may be a damaged slice, and the rest."""

from __future__ import annotations

import os
import re
from collections.abc import Container, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import InputError, Refusal

__all__ = [
    "DicomFiles",
    "dicom_below",
    "files_below",
    "has_dicom_content",
    "is_damaged_dicom",
    "is_litter",
    "looks_like_dicom",
    "name_pattern",
    "walk",
]

DICOM_SUFFIXES = (".dcm", ".dicom", ".ima")
# What lies beside scans and is none. A damaged slice cannot pass for one of these unless it is called like the others.
OTHER_SUFFIXES = (
    ".txt", ".md", ".rst", ".csv", ".tsv", ".json", ".xml", ".html", ".htm", ".css", ".js", ".pdf", ".doc", ".docx",
    ".xls", ".xlsx", ".log", ".ini", ".inf", ".cfg", ".yaml", ".yml", ".properties", ".png", ".jpg", ".jpeg", ".gif",
    ".bmp", ".tif", ".tiff", ".ico", ".db", ".sqlite", ".exe", ".dll", ".bat", ".sh", ".py", ".bval", ".bvec", ".lnk",
    ".url", ".lock", ".flag", ".dat", ".md5", ".sha1", ".sha256", ".zip", ".gz", ".bz2", ".xz", ".7z", ".tar",
    ".nii", ".mha", ".mhd", ".nrrd", ".nhdr", ".hdr", ".img", ".mgz",
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
        raise Refusal("unreadable", "A file of the scan cannot be opened; look at its permissions.") from error


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


def is_damaged_dicom(path: Path, patterns: Iterable[str] = (), beside: Container[str] = ()) -> bool:
    """Whether a file that does not begin as DICOM may be a damaged slice. Such a file is never passed over.

    A damaged first or last slice, if passed over as junk, would leave a volume that looks whole.

    Args:
        path: the file.
        patterns: `name_pattern` of the DICOM files beside it.
        beside: names of all files beside it.
    """
    if is_litter(path):
        return False
    if name_pattern(path) in patterns or looks_like_dicom(path):
        return True
    if path.suffix.lower() in OTHER_SUFFIXES:
        # A slice that was packed or renamed; beside the slice itself it is a note on it, such as a checksum.
        inner = Path(path.stem)
        called = inner.suffix.lower() in DICOM_SUFFIXES or name_pattern(inner) in patterns
        return called and inner.name not in beside
    if path.name.startswith("."):
        return False
    head = _head(path, LOOKED_AT)
    if not head:
        return not path.suffix or path.suffix[1:].isdigit()
    # Nothing but zeros: a preamble cut short, or blocks that a full disk never wrote.
    return not head.strip(b"\0") or DICOM_ROOT in head


def files_below(folder: Path) -> list[Path]:
    """The files of a scan: all in a folder and in those below, links to folders included, each folder once.

    Raises:
        Refusal: `missing_file` where a link leads nowhere, `unreadable` where a folder cannot be read.
    """
    found: list[Path] = []
    seen: set[str] = set()

    def stop(error: OSError) -> None:
        raise Refusal("unreadable", "A folder of the scan cannot be read; look at its permissions.") from error

    for directory, below, names in os.walk(folder, onerror=stop, followlinks=True):
        below.sort()
        real = os.path.realpath(directory)
        if real in seen:
            below.clear()
            continue
        seen.add(real)
        for path in (Path(directory, name) for name in sorted(names)):
            if path.is_file():
                found.append(path)
            elif path.is_symlink() and not path.exists() and path.suffix.lower() not in OTHER_SUFFIXES:
                raise Refusal(
                    "missing_file",
                    "A file of the scan is a link that leads nowhere: fetch the file, or remove the link.",
                )
    return found


def walk(folder: Path) -> list[tuple[Path, list[Path]]]:
    """Every folder below one and the files directly in it, both in order of name; links to folders are not followed.

    Raises:
        InputError: a folder cannot be read.
    """

    def stop(error: OSError) -> None:
        raise InputError(f"the folder {error.filename} cannot be read") from error

    found = sorted(os.walk(folder, onerror=stop))
    return [(Path(directory), [Path(directory, name) for name in sorted(names)]) for directory, _, names in found]


def dicom_below(files: Sequence[Path]) -> tuple[list[Path], int, list[tuple[Path, Refusal]]]:
    """The DICOM files among some, how many others were passed over, and those that may be damaged slices.

    A damaged file may belong to any series here, so whoever reads one must look at the last of the three.
    """
    dicom: list[Path] = []
    others: list[Path] = []
    for path in files:
        (dicom if has_dicom_content(path) else others).append(path)
    patterns = {name_pattern(path) for path in dicom}
    names: dict[Path, set[str]] = {}
    for path in files:
        names.setdefault(path.parent, set()).add(path.name)
    damaged = [path for path in others if is_damaged_dicom(path, patterns, names[path.parent])]
    return dicom, len(others) - len(damaged), [(path, _damage(path, len(damaged))) for path in damaged]


def _damage(path: Path, count: int) -> Refusal:
    hint = "`python -m bundle.data.series FOLDER` names it"
    if not path.stat().st_size:
        return Refusal(
            "empty_file",
            "A file that may belong to the series is empty (0 bytes): it was not copied; copy the series again, or "
            f"remove the file if it is none of its images ({hint}).",
            damaged_files=count,
        )
    return Refusal(
        "unreadable_file",
        "A file that by its name or first bytes belongs to the series is not readable as DICOM; copy the series "
        f"again, or remove the file if it is none of its images ({hint}).",
        damaged_files=count,
    )
