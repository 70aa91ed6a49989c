"""A scan on disk → one checked, ordered volume, or a refusal with its reason.

`python -m bundle.data.series FOLDER` lists the series below a folder and says of each whether it can be read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from ..errors import InputError, Refusal, command_line
from .dicom_checks import check_images, check_one_series
from .dicom_copies import drop_copies
from .dicom_files import DicomFiles, files_below, has_dicom_content, looks_like_dicom
from .dicom_gaps import check_extent, truncated
from .dicom_geometry import arrange
from .dicom_header import SliceHeader
from .dicom_pixels import read_pixels
from .grid import tilt_of
from .metaimage import is_metaimage_name, read_metaimage
from .nifti import has_nifti_content, is_nifti_name, read_nifti
from .nrrd import is_nrrd_name, read_nrrd
from .policy import ReaderPolicy
from .series_choice import FoundSeries, choose_series, find_series
from .volume import Volume

__all__ = ["read_series", "read_volume"]


def read_volume(path: str | Path | DicomFiles, policy: ReaderPolicy | None = None, channels: int = 1) -> Volume:
    """Read one scan, or refuse it.

    What cannot be known from the files is not judged; docs/reader.md lists it.

    Args:
        path: a NIfTI, MetaImage or NRRD file; a folder with the DICOM images of one series, or of a study of which the
            policy's series rules leave one, directly or in folders below, whatever the files are called (files that
            are no DICOM, and DICOM without images, are passed over); the same as a list of files; or one DICOM file.
        policy: limits of what is accepted; the defaults of `ReaderPolicy` if None.
        channels: number of channels expected.

    Returns:
        The volume.

    Raises:
        InputError: `channels` is no number.
        Refusal: everything else that is not one uniform volume; docs/reader.md explains the codes. Sentences and facts
            hold no tag value that could identify anyone, and no path.
    """
    policy = policy or ReaderPolicy()
    if isinstance(channels, bool) or not isinstance(channels, int) or channels < 1:
        raise InputError(f"channels must be a whole number of at least 1, got {channels!r}")
    try:
        return _corrected(_read(path, policy, channels), policy)
    except OSError as error:  # whose own words name the path, which may name the patient
        raise Refusal(
            "unreadable",
            f"The scan cannot be read ({type(error).__name__}); look at its permissions and at the disk.",
        ) from error


def _read(path: str | Path | DicomFiles, policy: ReaderPolicy, channels: int) -> Volume:
    if isinstance(path, DicomFiles):
        return _read_dicom(path.paths, policy, channels)
    path = Path(path).expanduser()
    if not path.exists():
        raise Refusal("missing_file", "The scan does not exist: its file or folder was moved or never copied.")
    if path.is_dir():
        volume = _read_dicom(files_below(path), policy, channels)
    elif not path.is_file():
        raise _not_an_image()
    elif is_nifti_name(path) or has_nifti_content(path):
        volume = _described(read_nifti(path, policy, channels), policy)
    elif is_metaimage_name(path):
        volume = _described(read_metaimage(path, policy, channels), policy)
    elif is_nrrd_name(path):
        volume = _described(read_nrrd(path, policy, channels), policy)
    elif has_dicom_content(path) or looks_like_dicom(path):
        volume = _read_dicom([path], policy, channels)
    else:
        raise _not_an_image()
    return volume


def _not_an_image() -> Refusal:
    return Refusal(
        "not_an_image",
        "This is neither DICOM nor NIfTI, MetaImage or NRRD; give a folder of DICOM images, or a .nii, .nii.gz, .mha "
        "or .nrrd file.",
    )


def _described(volume: Volume, policy: ReaderPolicy) -> Volume:
    """An image file with the facts that DICOM series have, held against what the policy expects of a series."""
    tilt = tilt_of(volume.affine)
    axes = volume.affine[:3, :3]
    spacing = abs(float(np.linalg.det(axes))) / float(np.linalg.norm(np.cross(axes[:, 0], axes[:, 1])))
    check_extent(volume.array.shape[2], spacing, policy)
    upright = tilt <= policy.orientation_tolerance_degrees
    facts = {"tilt_degrees": 0.0 if upright else round(tilt, 3), "spacing_mm": round(spacing, 4), "corrections": []}
    return replace(volume, facts={**facts, **volume.facts})


def _read_dicom(files: Sequence[Path], policy: ReaderPolicy, channels: int) -> Volume:
    study = find_series(files)
    volume = read_series(choose_series(study, policy), policy)
    if channels != 1:
        raise Refusal(
            "channel_count", f"A DICOM series is 1 channel; {channels} are expected.", found=1, expected=channels
        )
    passed_over = {
        "other_series": len(study.series) - 1,
        "other_objects": study.other_objects,
        "other_files": study.other_files,
    }
    return replace(volume, facts={**volume.facts, **passed_over})


def read_series(series: FoundSeries, policy: ReaderPolicy) -> Volume:
    """Read one series whose files were found.

    Args:
        series: its images.
        policy: limits of what is accepted.

    Returns:
        The volume, slices in order of position along row × column direction, without the corrections of the policy.

    Raises:
        Refusal: they are not one uniform volume.
    """
    if series.damage is not None:
        raise series.damage
    headers, copies = drop_copies(series.headers)
    check_one_series(headers)
    if series.lost and policy.trust_image_counts:
        raise truncated(len(headers), len(headers) + series.lost, "a DICOMDIR among them lists")
    check_images(headers, policy)
    _check_size(headers, policy)
    grid = arrange(headers, policy)
    ordered = [headers[i] for i in grid.order]
    array, padding, lossy = read_pixels(ordered, policy.accept_lossy)
    first = ordered[0]
    return Volume(
        array=array,
        affine=grid.affine,
        modality=first.modality,
        source="dicom",
        slice_uids=tuple(h.sop_uid for h in ordered),
        series_uid=first.series_uid,
        slice_positions=grid.positions,
        frame_numbers=tuple((h.frame or 0) + 1 for h in ordered) if first.frame is not None else None,
        facts={
            "tilt_degrees": round(grid.tilt, 3),
            "spacing_mm": round(grid.spacing, 4),
            "deviation_mm": round(grid.deviation, 4),
            "padding_voxels": padding,
            "lossy": lossy,
            "transfer_syntaxes": sorted({h.transfer_syntax for h in ordered}),
            "copies": copies,
            "corrections": [],
        },
    )


def _check_size(headers: Sequence[SliceHeader], policy: ReaderPolicy) -> None:
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


def _corrected(volume: Volume, policy: ReaderPolicy) -> Volume:
    from .corrections import correct_bias, make_upright

    if policy.gantry_tilt == "resample" and volume.facts.get("tilt_degrees", 0.0) > 0:
        volume = make_upright(volume, policy.max_voxels)
    # Image files say no modality: there the task does, if it accepts nothing but MR.
    modality = volume.modality or (policy.modalities[0] if len(policy.modalities) == 1 else None)
    if policy.n4_bias_correction and modality == "MR":
        volume = correct_bias(volume)
    return volume


if __name__ == "__main__":
    from .series_list import main

    command_line(main)
