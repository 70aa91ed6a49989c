"""A folder of anything → the scans below it, none lost."""

from __future__ import annotations

import fnmatch
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from ..errors import InputError, Refusal
from .dicom_header import has_dicom_content, is_image, is_litter
from .nifti import is_nifti_name

__all__ = ["FoundScans", "Scan", "find_scans"]


class Scan(NamedTuple):
    """One case.

    Args:
        path: where it lies: a NIfTI file, or the folder of a DICOM series or of several modalities.
        image: what the reader is to be given: one path, a list of paths (one a modality), or the refusal that this
            case already ends with.
    """

    path: Path
    image: Path | list[Path] | Refusal


class FoundScans(NamedTuple):
    """The cases below a folder, sorted by path, and the number of files that are part of none."""

    scans: list[Scan]
    ignored: int


def find_scans(folder: str | Path, channel_files: Sequence[str] | None = None) -> FoundScans:
    """List every case below a folder.

    A case is each .nii or .nii.gz file, and each folder that directly holds DICOM images (by content, or called .dcm).
    Files called like images that cannot be read are cases too: the reader will refuse them, and the result says so.

    Args:
        folder: searched with all its subfolders; links to folders are not followed.
        channel_files: one file pattern a modality (such as ``*_t1ce.nii.gz``). Then a folder that directly holds a
            NIfTI file fitting any of them is one case, whose image is the list of files in the order of the patterns;
            where one pattern fits no file or several, the case is a refusal. Case is ignored.

    Returns:
        The cases, sorted by path, and the count of ignored files.

    Raises:
        InputError: the folder is missing, no folder, cannot be read, or holds no scan.
    """
    folder = Path(folder).expanduser()
    if not folder.exists():
        raise InputError(f"the folder {folder} does not exist")
    if not folder.is_dir():
        raise InputError(f"{folder} is a file; give the folder that holds the scans")
    if isinstance(channel_files, str) or (channel_files is not None and not channel_files):
        raise InputError("channel_files must be a list of file patterns, one a modality")

    scans: list[Scan] = []
    ignored = 0
    for directory, names in _walk(folder):
        found, passed_over = _cases_of(directory, names, channel_files)
        scans += found
        ignored += passed_over
    if not scans:
        others = f" ({ignored} other file{'' if ignored == 1 else 's'})" if ignored else ""
        raise InputError(f"the folder {folder} holds no NIfTI file and no DICOM image{others}")
    return FoundScans(sorted(scans, key=lambda scan: scan.path.parts), ignored)


def _walk(folder: Path) -> list[tuple[Path, list[str]]]:
    def stop(error: OSError) -> None:
        raise InputError(f"the folder {error.filename} cannot be read") from error

    return [(Path(directory), sorted(names)) for directory, _, names in os.walk(folder, onerror=stop)]


def _cases_of(directory: Path, names: list[str], channel_files: Sequence[str] | None) -> tuple[list[Scan], int]:
    nifti: list[Path] = []
    dicom = ignored = 0
    for path in (directory / name for name in names):
        kind = _kind(path)
        if kind == "nifti":
            nifti.append(path)
        elif kind == "dicom":
            dicom += 1
        else:
            ignored += 1

    matches = [
        [p for p in nifti if fnmatch.fnmatch(p.name.lower(), pattern.lower())] for pattern in channel_files or ()
    ]
    if not any(matches):
        scans = [Scan(path, path) for path in nifti]
        return scans + ([Scan(directory, directory)] if dicom else []), ignored
    if dicom:
        image: list[Path] | Refusal = Refusal(
            "mixed_folder", "The folder holds NIfTI files of several modalities and DICOM images; keep one of them."
        )
    elif all(len(m) == 1 for m in matches) and len({m[0] for m in matches}) == len(matches):
        image = [m[0] for m in matches]
    else:
        counts = [len(m) for m in matches]
        image = Refusal(
            "modalities_incomplete",
            f"The folder should hold one file for each of {len(matches)} modalities; the file patterns fit "
            f"{', '.join(map(str, counts))} files.",
            found=counts,
        )
    # A file of the folder that no pattern names, such as a segmentation, is not a case of its own.
    return [Scan(directory, image)], ignored + len(nifti) - len({p for m in matches for p in m})


def _kind(path: Path) -> str:
    if not path.is_file():
        # A dangling link still stands for a scan that someone expects to be there.
        return "nifti" if is_nifti_name(path) else "dicom" if path.suffix.lower() == ".dcm" else "other"
    try:
        if is_litter(path):
            return "other"
        if is_nifti_name(path):
            return "nifti"
        content = has_dicom_content(path)
    except Refusal:  # not readable at all; its name decides
        content = False
        if is_nifti_name(path):
            return "nifti"
    if content:
        return "dicom" if is_image(path) else "other"
    return "dicom" if path.suffix.lower() == ".dcm" else "other"
