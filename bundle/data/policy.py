"""Under which conditions a scan is accepted, what may be corrected, and which series of a study is meant."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from ..errors import InputError

__all__ = ["PLANES", "TILT_CHOICES", "ReaderPolicy", "SeriesRules"]

PLANES = ("axial", "coronal", "sagittal")
TILT_CHOICES = ("keep", "resample", "refuse")


@dataclass(frozen=True, kw_only=True)
class SeriesRules:
    """Which series of a study is meant. Every rule that is given must hold; None does not ask.

    Images that can be no volume (localizers, screenshots and other secondary captures, presentation states, reports)
    are never candidates where another series is. After the rules exactly one series must be left, or the case is
    refused with a list of what was found. Rules look at what a series declares and never at whether it can be read: a
    damaged thin series is refused, not replaced by the thick one.

    Args:
        modality: DICOM modalities, such as [MR].
        description: patterns of SeriesDescription with * and ?, any of which fits; capitals do not matter.
        exclude_description: patterns of SeriesDescription none of which may fit.
        plane: axial, coronal or sagittal: the plane nearest to that of the slices.
        slices: fewest and most slices.
        spacing_mm: least and greatest distance between neighbouring slices, mm.
        contrast: true: a contrast agent is recorded (ContrastBolusAgent); false: none is.
        image_type: words that ImageType must hold, such as [ORIGINAL].
        exclude_image_type: words that ImageType may not hold, such as [MPR].
        thinnest: of the series that fit all else, the one of least slice distance; those within 1% stay alike.
    """

    modality: tuple[str, ...] | None = None
    description: tuple[str, ...] | None = None
    exclude_description: tuple[str, ...] | None = None
    plane: str | None = None
    slices: tuple[int, int] | None = None
    spacing_mm: tuple[float, float] | None = None
    contrast: bool | None = None
    image_type: tuple[str, ...] | None = None
    exclude_image_type: tuple[str, ...] | None = None
    thinnest: bool = False

    def __post_init__(self) -> None:
        for name in ("modality", "description", "exclude_description", "image_type", "exclude_image_type"):
            _words(self, name, "series rules")
        for name in ("slices", "spacing_mm"):
            value = getattr(self, name)
            if value is not None:
                _range(self, name, "series rules")
        if self.plane is not None and self.plane not in PLANES:
            raise InputError(f"series rules: plane must be one of {', '.join(PLANES)}, or null, not {self.plane!r}")
        for name in ("contrast", "thinnest"):
            if getattr(self, name) not in (True, False, *([None] if name == "contrast" else [])):
                raise InputError(f"series rules: {name} must be true or false, not {getattr(self, name)!r}")


@dataclass(frozen=True, kw_only=True)
class ReaderPolicy:
    """The limits inside which a scan is accepted, and what may be corrected; outside them it is refused.

    Args:
        modalities: DICOM modalities the task accepts. NIfTI, MetaImage and NRRD carry none.
        position_tolerance_mm: absolute, mm. The farthest any slice's own position may lie from where the volume's
            affine puts it. 0.1 covers positions written with one decimal (0.087 mm in three dimensions) and the
            largest jitter seen on a real scanner (0.055 mm, 7 mm oblique MR); it is a fifth of a common CT pixel.
        spacing_tolerance_mm: absolute, mm. How far one gap between neighbouring slices may differ from the mean gap.
            0.1 is two positions rounded to one decimal; the same real scanner shows 0.064.
        spacing_tolerance_relative: the same as a share of the mean gap. Both limits hold: 0.1 mm would say nothing
            about 0.3 mm slices, and 10% of 7 mm slices would hide 0.7 mm. A missing slice is 33% even among three.
        orientation_tolerance_degrees: absolute, degrees; between slices, and from a right angle between axes. 0.05°
            moves the far edge of a 250 mm field by 0.2 mm; cosines written with three decimals differ by up to 0.04°.
        spacing_range_mm: absolute, mm. Plausible distance between voxel centres. Two slices nearer than the lower end
            are at one position; 50 mm and more is no anatomical scan (and often micrometres read as millimetres).
        min_slices: 3, the fewest with which uneven spacing can be seen at all: two gaps. 1 admits a single image.
        max_slices: 4096, above any CT or MR series we know; it bounds the time a folder can take.
        max_voxels: 2**29 (512 × 512 × 2048), 2 GiB as float32; it bounds memory whatever a header declares.
        expected_slices: a number, where the protocol fixes it; null does not ask. Slices missing at an end leave an
            even series, which nothing else can tell from a whole one. Of an image file, along the third stored axis.
        min_coverage_mm: absolute, mm. The least extent along the slices (distance of the outermost slices plus one
            spacing), where the anatomy fixes it, such as 120 for a head; null does not ask.
        trust_image_counts: true: a series that holds fewer images than its own ImagesInAcquisition or a DICOMDIR beside
            it says, or fewer parts than its concatenation, is refused as truncated. False where a scanner counts other
            series in, or where a DICOMDIR was left over.
        gantry_tilt: slices stacked askew to their plane. keep: the affine has the shear, voxels are as acquired;
            resample: each slice is shifted in its plane (linear, itk) to an upright stack; refuse.
        max_tilt_degrees: absolute, degrees. Gantries tilt to 30°; beyond 35° the positions are wrong, not tilted.
        accept_lossy: true: lossy compressed DICOM is read, and provenance says so; false: it is refused.
        n4_bias_correction: MR only (of image files, which say no modality, where `modalities` is [MR] alone): correct
            the slow change of brightness of surface coils by N4 (Tustison et al. 2010, itk). 2 to 5 s for 256 × 256 ×
            24 voxels on one core, and some seconds once to load itk.
        affine_tolerance_mm: absolute, mm, at the farthest corner. How far a NIfTI file's sform and qform, or the
            affines of two modalities stacked as channels, may disagree. Their float32 rounding is below 0.001 mm.
        voxel_size_tolerance_relative: how far the voxel size in a NIfTI header may differ from the length of the
            affine's columns. 0.01: headers round to two or three digits.
        series: which series is meant where a folder holds several.
    """

    modalities: tuple[str, ...] = ("CT", "MR")
    position_tolerance_mm: float = 0.1
    spacing_tolerance_mm: float = 0.1
    spacing_tolerance_relative: float = 0.1
    orientation_tolerance_degrees: float = 0.05
    spacing_range_mm: tuple[float, float] = (0.05, 50.0)
    min_slices: int = 3
    max_slices: int = 4096
    max_voxels: int = 2**29
    expected_slices: int | None = None
    min_coverage_mm: float | None = None
    trust_image_counts: bool = True
    gantry_tilt: str = "keep"
    max_tilt_degrees: float = 35.0
    accept_lossy: bool = True
    n4_bias_correction: bool = False
    affine_tolerance_mm: float = 0.1
    voxel_size_tolerance_relative: float = 0.01
    series: SeriesRules = field(default_factory=SeriesRules)

    def __post_init__(self) -> None:
        where = "reader policy"
        if self.modalities is None:
            raise InputError(f"{where}: modalities must be a list such as [CT, MR]")
        _words(self, "modalities", where)
        object.__setattr__(self, "modalities", tuple(modality.upper() for modality in self.modalities))
        _range(self, "spacing_range_mm", where)
        if not self.spacing_range_mm[0] > 0:
            raise InputError(f"{where}: spacing_range_mm must be (low, high) in mm, got {self.spacing_range_mm}")
        for name in (*(f.name for f in fields(self) if "tolerance" in f.name), "max_tilt_degrees", "min_coverage_mm"):
            value = getattr(self, name)
            if name == "min_coverage_mm" and value is None:
                continue
            if not _is_number(value) or not 0 <= value < math.inf:
                raise InputError(f"{where}: {name} must be a number of at least 0, got {value!r}")
        if not self.max_tilt_degrees < 90:
            raise InputError(f"{where}: max_tilt_degrees must be below 90, got {self.max_tilt_degrees}")
        for name in ("min_slices", "max_slices", "max_voxels", "expected_slices"):
            value = getattr(self, name)
            if name == "expected_slices" and value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise InputError(f"{where}: {name} must be a whole number of at least 1, got {value!r}")
        for name in ("trust_image_counts", "accept_lossy", "n4_bias_correction"):
            if not isinstance(getattr(self, name), bool):
                raise InputError(f"{where}: {name} must be true or false, got {getattr(self, name)!r}")
        if self.min_slices > self.max_slices:
            raise InputError(f"{where}: min_slices ({self.min_slices}) is above max_slices ({self.max_slices})")
        if self.gantry_tilt not in TILT_CHOICES:
            raise InputError(f"{where}: gantry_tilt must be {', '.join(TILT_CHOICES)}, got {self.gantry_tilt!r}")
        if not isinstance(self.series, SeriesRules):
            raise InputError(f"{where}: series must be a bundle.SeriesRules, got {type(self.series).__name__}")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _words(owner: Any, name: str, where: str) -> None:
    """Turn a list of words, which YAML gives, into a tuple: policies are hashed and compared."""
    value = getattr(owner, name)
    if value is None:
        return
    if not isinstance(value, Sequence) or isinstance(value, str) or not value:
        raise InputError(f"{where}: {name} must be a list of words, such as [CT, MR], got {value!r}")
    if not all(isinstance(word, str) and word for word in value):
        raise InputError(f"{where}: {name} must hold words, got {value!r}")
    object.__setattr__(owner, name, tuple(value))


def _range(owner: Any, name: str, where: str) -> None:
    value = getattr(owner, name)
    if (
        not isinstance(value, Sequence)
        or len(value) != 2
        or not all(map(_is_number, value))
        or not value[0] <= value[1]
    ):
        raise InputError(f"{where}: {name} must be two numbers, low and high, got {value!r}")
    object.__setattr__(owner, name, tuple(value))
