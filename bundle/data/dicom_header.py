"""A file on disk → the facts of one DICOM image that decide whether it belongs in a volume."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydicom.dataelem import RawDataElement
from pydicom.dataset import FileDataset
from pydicom.uid import UID, DeflatedExplicitVRLittleEndian

from ..errors import Refusal
from .dicom_tags import (
    hint,
    integer,
    number,
    numbers,
    quiet_pydicom,
    read_dataset,
    required_uid,
    uid,
    unreadable,
    word,
    words,
)

__all__ = ["SliceHeader", "has_dicom_content", "is_image", "is_litter", "looks_like_dicom", "read_header"]

PIXEL_KEYWORDS = ("PixelData", "FloatPixelData", "DoubleFloatPixelData")

# What tells apart the images of a series that holds one slice several times.
CONTRAST_KEYWORDS = ("EchoNumbers", "TemporalPositionIdentifier", "DiffusionBValue")

# Nothing else of a file is parsed: what is not read cannot leak. Of the patient only a digest is kept.
HEADER_KEYWORDS = (
    "SOPClassUID", "SOPInstanceUID", "SeriesInstanceUID", "StudyInstanceUID", "FrameOfReferenceUID",
    "PatientID", "PatientName", "Modality", "ImageType", "BurnedInAnnotation", "NumberOfFrames",
    "Rows", "Columns", "SamplesPerPixel", "PhotometricInterpretation",
    "BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation",
    "ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "SliceThickness", "SpacingBetweenSlices",
    "RescaleSlope", "RescaleIntercept", "RescaleType", "ModalityLUTSequence",
    "EchoTime", *CONTRAST_KEYWORDS,
)  # fmt: skip

DICOM_SUFFIXES = (".dcm", ".dicom", ".ima")
# AppleDouble: the `._name` shadow that macOS writes beside every file on foreign disks and into zip files.
APPLE_DOUBLE = b"\x00\x05\x16\x07"


@dataclass(frozen=True)
class SliceHeader:
    """The facts of one DICOM image; None where the file does not say.

    `patient` is a digest of name and ID, good for telling two patients apart and nothing else. `pixel_bytes` is what
    the file really holds of the pixel data, −1 where encapsulated, None where there is none. Lengths are in mm.
    `echo_time` is in ms; `contrast` is echo number, time point and b-value as written.
    """

    path: Path
    sop_uid: str
    series_uid: str
    study_uid: str | None
    frame_uid: str | None
    patient: bytes
    sop_class: str
    transfer_syntax: str
    modality: str
    image_type: tuple[str, ...]
    burned_in: bool
    frames: int
    rows: int | None
    columns: int | None
    samples: int
    photometric: str
    bits_allocated: int | None
    bits_stored: int | None
    high_bit: int | None
    pixel_representation: int | None
    position: tuple[float, ...] | None
    orientation: tuple[float, ...] | None
    pixel_spacing: tuple[float, ...] | None
    slice_thickness: float | None
    slice_spacing: float | None
    rescale_slope: float | None
    rescale_intercept: float | None
    rescale_type: str
    has_modality_lut: bool
    echo_time: float | None
    contrast: tuple[str, ...]
    pixel_bytes: int | None


def _head(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(132)
    except OSError as error:
        raise unreadable() from error


def has_dicom_content(path: Path) -> bool:
    """Whether a file begins as DICOM files do: 128 bytes, then DICM."""
    return _head(path)[128:] == b"DICM"


def is_litter(path: Path) -> bool:
    """Whether a file is the shadow that macOS leaves beside a real one; it carries the name and none of the image."""
    return path.name.startswith("._") and _head(path).startswith(APPLE_DOUBLE)


def looks_like_dicom(path: Path) -> bool:
    """Whether a file claims to be DICOM by name, or begins with a DICOM tag without the preamble.

    Such a file is never skipped as junk: it may be a damaged slice of the series.
    """
    return path.suffix.lower() in DICOM_SUFFIXES or _head(path)[:4] in (b"\x08\x00\x05\x00", b"\x08\x00\x08\x00")


def _patient_digest(dataset: FileDataset) -> bytes:
    parts = []
    for keyword in ("PatientID", "PatientName"):
        element: Any = dataset.get_item(keyword) if keyword in dataset else None
        value = element.value if element is not None else None
        # The raw bytes are compared; decoding text would bring character sets, and their warnings, into it.
        raw = value if isinstance(element, RawDataElement) and isinstance(value, bytes) else str(value or "").encode()
        parts.append(raw.strip(b"\0 "))
    return hashlib.sha256(b"\0".join(parts)).digest()


def is_image(path: Path) -> bool:
    """Whether a DICOM file is an image, or damaged so that it may be one; False for SR, PR, DICOMDIR and their like."""
    with quiet_pydicom():
        try:
            dataset = read_dataset(path, ("SOPClassUID", *PIXEL_KEYWORDS), 4096)
            return _is_image(dataset)
        except Refusal:
            return True


def _is_image(dataset: FileDataset) -> bool:
    declared = (uid(dataset, "SOPClassUID"), str(dataset.file_meta.get("MediaStorageSOPClassUID", "")))
    names = [(one, UID(one).name) for one in declared if one]
    # Only what is known to be something else is no image: an image cut short before its pixels must not vanish.
    other = bool(names) and all(name != one and "Image" not in name for one, name in names)
    return not other or any(keyword in dataset for keyword in PIXEL_KEYWORDS)


def read_header(path: Path) -> SliceHeader | None:
    """Read the facts of one DICOM file without its pixels.

    Returns:
        The header, or None where the file is DICOM but holds no image (SR, PR, DICOMDIR, plans, waveforms).

    Raises:
        Refusal: `unreadable_file`, `bad_tag`, `uid_absent`, `too_large`.
    """
    with quiet_pydicom():
        dataset = read_dataset(path, HEADER_KEYWORDS + PIXEL_KEYWORDS, 4096)
        if not _is_image(dataset):
            return None
        return SliceHeader(
            path=path,
            sop_uid=required_uid(dataset, "SOPInstanceUID"),
            series_uid=required_uid(dataset, "SeriesInstanceUID"),
            study_uid=uid(dataset, "StudyInstanceUID"),
            frame_uid=uid(dataset, "FrameOfReferenceUID"),
            patient=_patient_digest(dataset),
            sop_class=uid(dataset, "SOPClassUID") or "",
            transfer_syntax=uid(dataset.file_meta, "TransferSyntaxUID") or "",
            modality=word(dataset, "Modality"),
            image_type=words(dataset, "ImageType"),
            burned_in=word(dataset, "BurnedInAnnotation") == "YES",
            frames=integer(dataset, "NumberOfFrames") or 1,
            rows=integer(dataset, "Rows"),
            columns=integer(dataset, "Columns"),
            samples=integer(dataset, "SamplesPerPixel") or 1,
            photometric=word(dataset, "PhotometricInterpretation"),
            bits_allocated=integer(dataset, "BitsAllocated"),
            bits_stored=integer(dataset, "BitsStored"),
            high_bit=integer(dataset, "HighBit"),
            pixel_representation=integer(dataset, "PixelRepresentation"),
            position=numbers(dataset, "ImagePositionPatient", 3),
            orientation=numbers(dataset, "ImageOrientationPatient", 6),
            pixel_spacing=numbers(dataset, "PixelSpacing", 2),
            slice_thickness=hint(dataset, "SliceThickness"),
            slice_spacing=hint(dataset, "SpacingBetweenSlices"),
            rescale_slope=number(dataset, "RescaleSlope"),
            rescale_intercept=number(dataset, "RescaleIntercept"),
            rescale_type=word(dataset, "RescaleType"),
            has_modality_lut="ModalityLUTSequence" in dataset,
            echo_time=number(dataset, "EchoTime"),
            contrast=tuple(word(dataset, k) for k in CONTRAST_KEYWORDS),
            pixel_bytes=_pixel_bytes(dataset, path),
        )


def _pixel_bytes(dataset: FileDataset, path: Path) -> int | None:
    element: Any = dataset.get_item("PixelData", keep_deferred=True) if "PixelData" in dataset else None
    if element is None:
        return None
    if not isinstance(element, RawDataElement):
        return len(element.value)
    if element.length == 0xFFFFFFFF:
        return -1
    if element.value is not None:
        return len(element.value)
    if dataset.file_meta.get("TransferSyntaxUID") == DeflatedExplicitVRLittleEndian:
        return int(element.length)
    # pydicom skips over deferred values without looking whether the file goes on that far.
    return max(0, min(int(element.length), path.stat().st_size - element.value_tell))
