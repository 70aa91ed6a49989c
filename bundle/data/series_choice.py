"""The images of a study → its series, what each declares of itself, and the one that is meant."""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import Refusal
from .dicom_checks import has_volume_class, is_colour, is_localizer, known_modality
from .dicom_directory import listed_images
from .dicom_files import dicom_below
from .dicom_header import SliceHeader, read_headers, uid_of
from .dicom_planes import (
    is_scout,
    planes_of,
)
from .policy import PLANES, ReaderPolicy, SeriesRules

__all__ = ["FoundSeries", "Study", "choose_series", "find_series"]

ONE_POSITION_MM = 0.05
ONE_PLANE = np.radians(1.0)
ALIKE = 1.01
LISTED = 12


@dataclass(frozen=True)
class FoundSeries:
    """One series and what it declares; nothing of it was checked yet.

    Args:
        uid: SeriesInstanceUID.
        headers: its images, without those of damaged files.
        damage: why one of its files cannot be read, or None.
        damaged: how many of its files cannot be read.
        kind: image; localizer; capture (secondary captures, colour pictures and objects that are no CT or MR image).
        plane: nearest of axial, coronal and sagittal; None where the images say none, or several.
        spacing: usual distance between neighbouring positions, mm; None below two positions.
        lost: how many images a DICOMDIR among the files lists of it that are not there.
    """

    uid: str
    headers: tuple[SliceHeader, ...]
    damage: Refusal | None
    damaged: int
    kind: str
    plane: str | None
    spacing: float | None
    lost: int

    @property
    def modality(self) -> str:
        """Its modality, where that may be quoted."""
        return known_modality(self.headers[0]) if self.headers else "another or none"

    @property
    def images(self) -> int:
        """How many different images it has, damaged files counted as one each."""
        return len({(h.sop_uid, h.frame) for h in self.headers}) + self.damaged

    @property
    def contrast(self) -> bool:
        """Whether a contrast agent is recorded in any image."""
        return any(h.contrast_agent for h in self.headers)

    def words(self) -> str:
        """The series in a few words that name nobody."""
        parts = [self.modality, f"{self.images} image{'' if self.images == 1 else 's'}"]
        parts += [self.plane] if self.plane else []
        parts += [f"{self.spacing:.2f} mm"] if self.spacing else []
        parts += ["contrast"] if self.contrast else []
        parts += [] if self.kind == "image" else [self.kind]
        parts += ["damaged"] if self.damage else []
        return ", ".join(parts)

    def facts(self) -> dict[str, Any]:
        """The same for programs."""
        return {
            "series_uid": self.uid,
            "modality": self.modality,
            "images": self.images,
            "plane": self.plane,
            "spacing_mm": self.spacing,
            "contrast": self.contrast,
            "kind": self.kind,
        }


@dataclass(frozen=True)
class Study:
    """The series among some files, and how many other files there are: DICOM objects without images, and no DICOM.

    `damaged` are files that may be slices of any of the series, with what is wrong with them.
    """

    series: list[FoundSeries]
    other_objects: int
    other_files: int
    damaged: tuple[tuple[Path, Refusal], ...] = ()


def find_series(files: Sequence[Path], keep_damaged: bool = False) -> Study:
    """Group the DICOM images among some files by series.

    Args:
        files: in any order; junk may be among them.
        keep_damaged: go on where a file may be a damaged slice of any of the series, and list it, as only someone who
            looks may do.

    Raises:
        Refusal: `no_images`; `empty_file` or `unreadable_file` where a file may be a damaged slice
            of any of the series; what `read_headers` refuses where a file does not even tell its series.
    """
    dicom, other_files, damaged = dicom_below(files)
    if damaged and not keep_damaged:
        raise damaged[0][1]
    images: dict[str, list[SliceHeader]] = {}
    damages: dict[str, list[tuple[Refusal, str | None]]] = {}
    objects: list[Path] = []
    for path in dicom:
        try:
            headers = read_headers(path)
        except Refusal as refusal:
            series = uid_of(path, "SeriesInstanceUID")
            if series is None and not keep_damaged:
                raise
            if series is None:
                damaged.append((path, refusal))
                continue
            damages.setdefault(series, []).append((refusal, uid_of(path, "SOPClassUID")))
            images.setdefault(series, [])
            continue
        if not headers:
            objects.append(path)
        for header in headers:
            images.setdefault(header.series_uid, []).append(header)
    if not images and not damaged:
        raise Refusal(
            "no_images",
            "There is no DICOM image here; give the folder that holds the images of a series or study.",
            files=len(files),
        )
    there = {header.sop_uid for headers in images.values() for header in headers}
    listed = listed_images(objects)
    found = [
        _described(uid, tuple(headers), damages.get(uid, []), len(listed.get(uid, set()) - there))
        for uid, headers in images.items()
    ]
    return Study(sorted(found, key=lambda s: s.uid), len(objects), other_files, tuple(damaged))


def _described(
    uid: str, headers: tuple[SliceHeader, ...], damages: list[tuple[Refusal, str | None]], lost: int
) -> FoundSeries:
    plane, spacing, scout = _geometry(headers)
    kind = "image"
    # What cannot be read still tells its class.
    others = all(not has_volume_class(h.sop_class) or is_colour(h) for h in headers)
    if others and all(name is not None and not has_volume_class(name) for _, name in damages):
        kind = "capture"
    elif headers and (all(map(is_localizer, headers)) or scout):
        kind = "localizer"
    return FoundSeries(uid, headers, damages[0][0] if damages else None, len(damages), kind, plane, spacing, lost)


def _geometry(headers: Sequence[SliceHeader]) -> tuple[str | None, float | None, bool]:
    """Nearest plane, usual spacing in mm, and whether the images lie as those of a scout do."""
    placed = [h.facts for h in headers if h.facts.position is not None and h.facts.orientation is not None]
    if not placed:
        return None, None, False
    orientations = np.array([f.orientation for f in placed], dtype=np.float64)
    if planes_of(orientations, ONE_PLANE) != 1:
        return None, None, is_scout(orientations, ONE_PLANE)
    normal = np.cross(orientations[0, :3], orientations[0, 3:])
    depth = np.sort(np.array([f.position for f in placed], dtype=np.float64) @ normal)
    gaps = np.diff(depth)
    gaps = gaps[gaps > ONE_POSITION_MM]
    # In PLANES' order the normals are along z, y and x.
    plane = PLANES[2 - int(np.abs(normal).argmax())]
    return plane, float(np.median(gaps)) if len(gaps) else None, False


def choose_series(study: Study, policy: ReaderPolicy) -> FoundSeries:
    """The one series that is meant.

    Raises:
        Refusal: `several_patients`; `several_series` or `no_series_fits`, with a list of what was found.
    """
    found = study.series
    patients = {h.patient_id for series in found for h in series.headers} - {None}
    if len(patients) > 1 and len(found) > 1:
        raise Refusal(
            "several_patients",
            f"The images belong to {len(patients)} patients; a case is one patient: give a folder each.",
            count=len(patients),
        )
    candidates = found
    if len(found) > 1:
        # A series of which nothing can be read may be the one that is meant.
        wanted = [s for s in found if not s.headers or any(h.modality in policy.modalities for h in s.headers)]
        candidates = [s for s in wanted if s.kind == "image"]
    fitting = [s for s in candidates if fits(s, policy.series)]
    if policy.series.thinnest and len(fitting) > 1 and (known := [s.spacing for s in fitting if s.spacing]):
        # Several images without a distance are damaged; one alone is no stack.
        fitting = [s for s in fitting if (s.spacing <= min(known) * ALIKE if s.spacing else s.images > 1 or s.damage)]
    if len(fitting) == 1:
        return fitting[0]
    listed = "; ".join(s.words() for s in found[:LISTED]) + ("; …" if len(found) > LISTED else "")
    facts = {"series": [s.facts() | {"fits": s in fitting} for s in found], "fitting": len(fitting)}
    if not fitting:
        raise Refusal(
            "no_series_fits",
            f"None of the {len(found)} series here is the one that is meant ({listed}); correct the series rules, or "
            "give the folder of the right one.",
            **facts,
        )
    raise Refusal(
        "several_series",
        f"{len(fitting)} of the {len(found)} series here may be meant ({listed}); add a series rule that leaves one, "
        "or give the folder of one.",
        **facts,
    )


def fits(series: FoundSeries, rules: SeriesRules) -> bool:
    """Whether a series fits every rule but `thinnest`, which compares series.

    Where damage hides what a rule asks for (one slice without orientation, and the plane is not known), it may fit, and
    so does one of which any image fits: it is then refused for its damage, and not replaced by another series.
    """
    spacing = series.spacing
    if not series.headers:
        return True
    return (
        (rules.plane is None or series.plane in (None, rules.plane))
        and (rules.slices is None or rules.slices[0] <= series.images <= rules.slices[1])
        and (rules.spacing_mm is None or spacing is None or rules.spacing_mm[0] <= spacing <= rules.spacing_mm[1])
        and any(_image_fits(header, rules) for header in series.headers)
    )


def _image_fits(header: SliceHeader, rules: SeriesRules) -> bool:
    types = set(header.image_type)
    conditions = (
        rules.modality is None or header.modality in {m.upper() for m in rules.modality},
        rules.description is None or _like(header.description, rules.description),
        rules.exclude_description is None or not _like(header.description, rules.exclude_description),
        rules.contrast is None or header.contrast_agent == rules.contrast,
        rules.image_type is None or {w.upper() for w in rules.image_type} <= types,
        rules.exclude_image_type is None or not {w.upper() for w in rules.exclude_image_type} & types,
    )
    return all(conditions)


def _like(text: str, patterns: Sequence[str]) -> bool:
    # Square brackets mean themselves: descriptions hold them.
    plain = [pattern.upper().replace("[", "[[]") for pattern in patterns]
    return any(fnmatch.fnmatchcase(text.upper(), pattern) for pattern in plain)
