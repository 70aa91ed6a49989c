"""A scan on disk → one checked, ordered volume, or a refusal with its reason.

`python -m bundle.data.series FOLDER` lists the series below a folder and says of each whether it can be read.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import InputError, Refusal, command_line
from .dicom_checks import check_images, check_one_series
from .dicom_copies import drop_copies
from .dicom_files import DicomFiles, files_below, has_dicom_content, looks_like_dicom
from .dicom_gaps import check_extent, truncated
from .dicom_geometry import Arrangement, arrange
from .dicom_header import SliceHeader
from .dicom_pixels import read_pixels
from .grid import tilt_of
from .metaimage import is_metaimage_name, read_metaimage
from .nifti import has_nifti_content, is_nifti_name, read_nifti
from .nrrd import is_nrrd_name, read_nrrd
from .policy import ReaderPolicy
from .series_choice import FoundSeries, choose_series, find_series
from .volume import Volume

__all__ = ["PlannedSeries", "plan_volume", "read_planned", "read_series", "read_volume"]


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
    with _names_no_path():
        return _corrected(_read(path, policy, channels), policy)


@contextmanager
def _names_no_path() -> Iterator[None]:
    try:
        yield
    except OSError as error:  # whose own words name the path, which may name the patient
        raise Refusal(
            "unreadable",
            f"The scan cannot be read ({type(error).__name__}); look at its permissions and at the disk.",
        ) from error


def _read(path: str | Path | DicomFiles, policy: ReaderPolicy, channels: int) -> Volume:
    if (files := _dicom_files(path)) is not None:
        return _read_dicom(files, policy, channels)
    assert not isinstance(path, DicomFiles)
    path = Path(path).expanduser()
    if not path.is_file():
        raise _not_an_image()
    if is_nifti_name(path) or has_nifti_content(path):
        return _described(read_nifti(path, policy, channels), policy)
    if is_metaimage_name(path):
        return _described(read_metaimage(path, policy, channels), policy)
    if is_nrrd_name(path):
        return _described(read_nrrd(path, policy, channels), policy)
    raise _not_an_image()


def _dicom_files(path: str | Path | DicomFiles) -> Sequence[Path] | None:
    """The files of a scan in DICOM, junk among them; None where it is something else."""
    if isinstance(path, DicomFiles):
        return path.paths
    path = Path(path).expanduser()
    if not path.exists():
        raise Refusal("missing_file", "The scan does not exist: its file or folder was moved or never copied.")
    if path.is_dir():
        return files_below(path)
    if not path.is_file() or is_nifti_name(path) or has_nifti_content(path):
        return None
    if is_metaimage_name(path) or is_nrrd_name(path):
        return None
    return [path] if has_dicom_content(path) or looks_like_dicom(path) else None


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
    volume = read_planned(_plan(files, policy), policy)
    if channels != 1:
        raise Refusal(
            "channel_count", f"A DICOM series is 1 channel; {channels} are expected.", found=1, expected=channels
        )
    return volume


def _plan(files: Sequence[Path], policy: ReaderPolicy) -> PlannedSeries:
    study = find_series(files)
    passed_over = {
        "other_series": len(study.series) - 1,
        "other_objects": study.other_objects,
        "other_files": study.other_files,
    }
    return replace(plan_series(choose_series(study, policy), policy), passed_over=passed_over)


def plan_volume(path: str | Path | DicomFiles, policy: ReaderPolicy) -> PlannedSeries | None:
    """Read everything of a DICOM scan but its pixels.

    Args:
        path: as for `read_volume`.
        policy: limits of what is accepted.

    Returns:
        The series; None where the scan is no DICOM, or where the policy corrects something for which all pixels are
        needed.

    Raises:
        Refusal: as `read_volume`, for everything that does not show in the pixels.
    """
    with _names_no_path():
        files = _dicom_files(path)
        planned = None if files is None else _plan(files, policy)
    if planned is None:
        return None
    upright = round(planned.grid.tilt, 3) <= 0
    kept = upright or policy.gantry_tilt != "resample"
    return planned if kept and not (policy.n4_bias_correction and planned.headers[0].modality == "MR") else None


@dataclass(frozen=True)
class PlannedSeries:
    """A series whose headers and geometry passed every check, and whose pixels are still in its files.

    Args:
        headers: its images, in order of position along row × column direction.
        grid: how they make one volume.
        copies: files left out as copies of others.
        passed_over: how many other series, objects and files were with it.
    """

    headers: tuple[SliceHeader, ...]
    grid: Arrangement
    copies: int
    passed_over: Mapping[str, int]

    @property
    def shape(self) -> tuple[int, int, int]:
        """Voxels along X (columns), Y (rows) and Z (slices)."""
        first = self.headers[0]
        return first.columns or 0, first.rows or 0, len(self.headers)

    def volume(self, array: NDArray[np.float32], facts: Mapping[str, Any]) -> Volume:
        """The volume of these values and what was seen in the pixels."""
        first = self.headers[0]
        return Volume(
            array=array,
            affine=self.grid.affine,
            modality=first.modality,
            source="dicom",
            slice_uids=tuple(h.sop_uid for h in self.headers),
            series_uid=first.series_uid,
            slice_positions=self.grid.positions,
            frame_numbers=tuple((h.frame or 0) + 1 for h in self.headers) if first.frame is not None else None,
            facts={
                "tilt_degrees": round(self.grid.tilt, 3),
                "spacing_mm": round(self.grid.spacing, 4),
                "deviation_mm": round(self.grid.deviation, 4),
                **facts,
                "transfer_syntaxes": sorted({h.transfer_syntax for h in self.headers}),
                "copies": self.copies,
                "corrections": [],
                **self.passed_over,
            },
        )


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
    return read_planned(plan_series(series, policy), policy)


def plan_series(series: FoundSeries, policy: ReaderPolicy) -> PlannedSeries:
    """Check and order one series whose files were found, without its pixels; as `read_series`."""
    if series.damage is not None:
        raise series.damage
    headers, copies = drop_copies(series.headers)
    check_one_series(headers)
    if series.lost and policy.trust_image_counts:
        raise truncated(len(headers), len(headers) + series.lost, "a DICOMDIR among them lists")
    check_images(headers, policy)
    _check_size(headers, policy)
    grid = arrange(headers, policy)
    return PlannedSeries(tuple(headers[i] for i in grid.order), grid, copies, {})


def read_planned(planned: PlannedSeries, policy: ReaderPolicy, places: Sequence[int] | None = None) -> Volume:
    """Decode a planned series.

    Args:
        planned: the series.
        policy: limits of what is accepted.
        places: the slices to decode, in their order; None decodes all.

    Returns:
        The volume. With `places` its array holds those slices only, and everything else describes the whole series;
        `facts` then say how many were decoded of how many.

    Raises:
        Refusal: pixels cannot be decoded.
    """
    headers = planned.headers if places is None else [planned.headers[place] for place in places]
    with _names_no_path():
        array, padding, lossy = read_pixels(headers, policy.accept_lossy)
    facts: dict[str, Any] = {"padding_voxels": padding, "lossy": lossy}
    if places is not None:
        facts |= {"decoded_slices": len(headers), "slices": len(planned.headers)}
    return planned.volume(array, facts)


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
