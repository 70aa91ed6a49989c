"""A folder of anything → the scans below it, none lost."""

from __future__ import annotations

import fnmatch
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from ..errors import InputError, Refusal
from .dicom_files import DicomFiles, has_dicom_content, is_damaged_dicom, is_litter, name_pattern, walk
from .dicom_header import is_image, uid_of
from .metaimage import is_metaimage_name
from .nifti import is_nifti_name
from .nrrd import is_nrrd_name

__all__ = ["DICOM_CASES", "FoundScans", "Scan", "find_scans", "is_image_name"]

DICOM_CASES = ("folder", "study")


class Scan(NamedTuple):
    """One case.

    Args:
        path: where it lies: an image file, the folder of DICOM images or of several modalities, or the folder that all
            files of a study have in common.
        image: what the reader is to be given: one path, a list of paths (one a modality), the files of a study, or the
            refusal that this case already ends with.
        study: StudyInstanceUID where cases are studies.
    """

    path: Path
    image: Path | list[Path] | DicomFiles | Refusal
    study: str | None = None


class FoundScans(NamedTuple):
    """The cases below a folder, sorted by path, and the number of files that are part of none."""

    scans: list[Scan]
    ignored: int


class _Folder(NamedTuple):
    path: Path
    images: list[Path]  # NIfTI, MetaImage, NRRD
    dicom: list[Path]
    ignored: list[Path]


def is_image_name(path: Path) -> bool:
    """Whether a file is called like a NIfTI, MetaImage or NRRD image."""
    return is_nifti_name(path) or is_metaimage_name(path) or is_nrrd_name(path)


def find_scans(
    folder: str | Path, channel_files: Sequence[str] | None = None, dicom_cases: str = "folder"
) -> FoundScans:
    """List every case below a folder.

    A case is each NIfTI, MetaImage and NRRD file, and each folder that directly holds DICOM images (by content, or
    called .dcm) together with all folders below it; or, on request, each DICOM study, wherever its files lie. Files
    called like images that cannot be read are cases too: the reader will refuse them, and the result says so.

    Args:
        folder: searched with all its subfolders; links to folders are not followed.
        channel_files: one file pattern a modality (such as ``*_t1ce.nii.gz``). Then a folder that directly holds an
            image file fitting any of them is one case, whose image is the list of files in the order of the patterns;
            where one pattern fits no file or several, the case is a refusal. Capitals do not matter.
        dicom_cases: "folder" or "study".

    Returns:
        The cases, sorted by path, and the count of ignored files.

    Raises:
        InputError: the folder is missing, no folder, cannot be read, or holds no scan; an argument is wrong.
    """
    folder = Path(folder).expanduser()
    if not folder.exists():
        raise InputError(f"the folder {folder} does not exist")
    if not folder.is_dir():
        raise InputError(f"{folder} is a file; give the folder that holds the scans")
    if isinstance(channel_files, str) or (channel_files is not None and not channel_files):
        raise InputError("channel_files must be a list of file patterns, one a modality")
    if dicom_cases not in DICOM_CASES:
        raise InputError(f"dicom_cases must be {' or '.join(DICOM_CASES)}, not {dicom_cases!r}")

    scans: list[Scan] = []
    ignored = 0
    try:
        found = [_sorted_out(directory, files) for directory, files in walk(folder)]
    except OSError as error:
        raise InputError(f"a folder below {folder} cannot be read ({type(error).__name__})") from error
    for one in found:
        cases, passed_over = _image_cases(one, channel_files)
        scans += cases
        ignored += passed_over + len(one.ignored)
    scans += _folder_cases(found, channel_files) if dicom_cases == "folder" else _study_cases(found)
    if not scans:
        others = f" ({ignored} other file{'' if ignored == 1 else 's'})" if ignored else ""
        raise InputError(f"the folder {folder} holds no NIfTI file and no DICOM image{others}")
    return FoundScans(sorted(scans, key=lambda scan: (scan.path.parts, scan.study or "")), ignored)


def _sorted_out(directory: Path, files: Sequence[Path]) -> _Folder:
    one = _Folder(directory, [], [], [])
    lists = {"image": one.images, "dicom": one.dicom, "other": one.ignored}
    for path in files:
        lists[_kind(path)].append(path)
    return one


def _kind(path: Path) -> str:
    if not path.is_file():
        # A dangling link still stands for a scan that someone expects to be there.
        return "image" if is_image_name(path) else "dicom" if path.suffix.lower() == ".dcm" else "other"
    try:
        if is_litter(path):
            return "other"
        if is_image_name(path):
            return "image"
        content = has_dicom_content(path)
    except Refusal:  # not readable at all; its name decides
        content = False
        if is_image_name(path):
            return "image"
    if content:
        return "dicom" if is_image(path) else "other"
    return "dicom" if path.suffix.lower() == ".dcm" else "other"


def _matches(one: _Folder, channel_files: Sequence[str] | None) -> list[list[Path]]:
    return [
        [p for p in one.images if fnmatch.fnmatch(p.name.lower(), pattern.lower())] for pattern in channel_files or ()
    ]


def _image_cases(one: _Folder, channel_files: Sequence[str] | None) -> tuple[list[Scan], int]:
    matches = _matches(one, channel_files)
    if not any(matches):
        return [Scan(path, path) for path in one.images], 0
    if one.dicom:
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
    return [Scan(one.path, image)], len(one.images) - len({p for m in matches for p in m})


def _folder_cases(found: Sequence[_Folder], channel_files: Sequence[str] | None) -> list[Scan]:
    scans: list[Scan] = []
    for one in found:  # parents before what is below them
        inside = any(scan.path in one.path.parents for scan in scans)
        if one.dicom and not inside and not any(_matches(one, channel_files)):
            scans.append(Scan(one.path, one.path))
    return scans


def _study_cases(found: Sequence[_Folder]) -> list[Scan]:
    studies: dict[str, list[Path]] = {}
    scans: list[Scan] = []
    for one in found:
        here = {path: uid_of(path, "StudyInstanceUID") for path in one.dicom if path.is_file()}
        known = {uid for uid in here.values() if uid is not None}
        patterns = {name_pattern(path) for path in here}
        names = {path.name for path in (*one.images, *one.dicom, *one.ignored)}
        lost = [path for path in one.dicom if here.get(path) is None]
        junk = [path for path in one.ignored if one.dicom and path.is_file() and not has_dicom_content(path)]
        lost += [path for path in junk if is_damaged_dicom(path, patterns, names)]
        for path, uid in here.items():
            if uid is not None:
                studies.setdefault(uid, []).append(path)
        # A file that does not tell its study may belong to any of those around it, which are then all refused.
        for uid in known:
            studies[uid] += lost
        if not known:
            scans += [Scan(path, DicomFiles((path,))) for path in lost]
    for uid, paths in studies.items():
        scans.append(Scan(Path(os.path.commonpath([path.parent for path in paths])), DicomFiles(tuple(paths)), uid))
    return scans
