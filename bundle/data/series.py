"""A scan on disk → one checked, ordered volume, or a refusal with its reason."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from ..errors import InputError, Refusal
from .dicom_checks import check_images, check_one_series, drop_identical_files
from .dicom_geometry import arrange
from .dicom_header import SliceHeader, has_dicom_content, is_litter, looks_like_dicom, read_header
from .dicom_pixels import read_values
from .nifti import has_nifti_content, is_nifti_name, read_nifti
from .policy import ReaderPolicy
from .volume import Volume

__all__ = ["ReaderPolicy", "Volume", "read_dicom_series", "read_volume"]


def read_volume(path: str | Path, policy: ReaderPolicy | None = None, channels: int = 1) -> Volume:
    """Read one scan, or refuse it.

    What cannot be known from the files is not judged: slices missing at either end of a series, every second slice
    missing, a changed digit that is itself plausible.

    Args:
        path: a NIfTI file; a folder that directly holds one DICOM series, whatever its files are called (files that
            are no DICOM, and DICOM without pixels, are passed over); or one DICOM file, which is a series of one slice
            and needs a policy with `min_slices` 1.
        policy: limits of what is accepted; the defaults of `ReaderPolicy` if None.
        channels: number of channels expected.

    Returns:
        The volume.

    Raises:
        InputError: the path does not exist.
        Refusal: everything else that is not one uniform volume; see the modules it calls for the codes. Sentences and
            facts hold no tag value that could identify anyone, and no path.
    """
    policy = policy or ReaderPolicy()
    if isinstance(channels, bool) or not isinstance(channels, int) or channels < 1:
        raise InputError(f"channels must be a whole number of at least 1, got {channels!r}")
    path = Path(path).expanduser()
    if not path.exists():
        raise InputError(f"{path} does not exist")
    if path.is_dir():
        try:
            files = sorted(p for p in path.iterdir() if p.is_file())
        except OSError as error:
            raise InputError(f"the folder {path} cannot be read") from error
        volume = read_dicom_series(files, policy)
    elif not path.is_file():
        raise _not_an_image()
    elif is_nifti_name(path) or has_nifti_content(path):
        return read_nifti(path, policy, channels)
    elif has_dicom_content(path) or looks_like_dicom(path):
        volume = read_dicom_series([path], policy)
    else:
        raise _not_an_image()
    if channels != 1:
        raise Refusal(
            "channel_count", f"A DICOM series is 1 channel; {channels} are expected.", found=1, expected=channels
        )
    return volume


def _not_an_image() -> Refusal:
    return Refusal(
        "not_an_image",
        "This is neither a NIfTI file nor DICOM; give a .nii or .nii.gz file or a folder of DICOM images.",
    )


def read_dicom_series(paths: Sequence[Path], policy: ReaderPolicy) -> Volume:
    """Read the one uniform single-frame series among some files.

    Args:
        paths: files in any order; junk may be among them.
        policy: limits of what is accepted.

    Returns:
        The volume, slices in order of position along row × column direction.

    Raises:
        Refusal: they are not one uniform series.
    """
    headers = _headers(paths)
    if not headers:
        raise Refusal(
            "no_images",
            "There is no DICOM image here; give the folder that directly holds the images of one series.",
            files=len(paths),
        )
    headers = drop_identical_files(headers)
    check_one_series(headers)
    check_images(headers, policy)
    count = len(headers)
    if not policy.min_slices <= count <= policy.max_slices:
        few = count < policy.min_slices
        raise Refusal(
            "too_few_slices" if few else "too_many_slices",
            f"The series has {count} slice{'' if count == 1 else 's'}; "
            + (
                f"at least {policy.min_slices} are needed (give the folder of the whole series, not one of its files)."
                if few
                else f"at most {policy.max_slices} are read."
            ),
            slices=count,
            smallest=policy.min_slices,
            largest=policy.max_slices,
        )
    voxels = count * (headers[0].rows or 0) * (headers[0].columns or 0)
    if voxels > policy.max_voxels:
        raise Refusal(
            "too_large",
            f"The series has {voxels} voxels; at most {policy.max_voxels} are read.",
            voxels=voxels,
            largest=policy.max_voxels,
        )
    order, affine = arrange(headers, policy)
    ordered = [headers[i] for i in order]
    return Volume(
        array=read_values(ordered),
        affine=affine,
        modality=ordered[0].modality,
        source="dicom",
        slice_uids=tuple(h.sop_uid for h in ordered),
        series_uid=ordered[0].series_uid,
    )


def _headers(paths: Sequence[Path]) -> list[SliceHeader]:
    headers, others = [], []
    for path in paths:
        if not has_dicom_content(path):
            others.append(path)
        elif (header := read_header(path)) is not None:
            headers.append(header)
    # A damaged first or last slice, if passed over as junk, would leave a volume that looks whole.
    patterns = {_name_pattern(h.path) for h in headers}
    for path in others:
        if not is_litter(path) and (looks_like_dicom(path) or _name_pattern(path) in patterns):
            raise Refusal(
                "unreadable_file",
                "A file that by its name or first bytes belongs to the series is not readable as DICOM; copy the "
                "series again, or remove the file if it is none of its images.",
            )
    return headers


def _name_pattern(path: Path) -> str:
    return re.sub(r"\d+", "#", path.name)
