"""A DICOM file → the facts of each of its images that decide whether it belongs in a volume."""

from __future__ import annotations

import hashlib
import zlib
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from pydicom.dataelem import RawDataElement
from pydicom.dataset import FileDataset
from pydicom.uid import DeflatedExplicitVRLittleEndian, ExplicitVRBigEndian

from ..errors import Refusal
from .dicom_frames import FRAME_SEQUENCES, FrameFacts, frame_facts, root_facts
from .dicom_parse import (
    quiet_pydicom,
    read_dataset,
    stamp,
    unreadable,
)
from .dicom_tags import (
    hint,
    integer,
    items,
    known,
    private_number,
    required_uid,
    uid,
    word,
    words,
)

__all__ = ["PADDING_KEYWORDS", "PixelPlace", "SliceHeader", "is_image", "read_headers", "uid_of"]

PADDING_KEYWORDS = ("PixelPaddingValue", "PixelPaddingRangeLimit")
# What lies in these files is not what pixels are made of: bytes of words exchanged, or packed with all of the file.
PARSED_SYNTAXES = {ExplicitVRBigEndian, DeflatedExplicitVRLittleEndian}
PIXEL_KEYWORDS = ("PixelData", "FloatPixelData", "DoubleFloatPixelData")
CT_IMAGE = "1.2.840.10008.5.1.4.1.1.2"
MR_IMAGE = "1.2.840.10008.5.1.4.1.1.4"
# Enhanced and legacy-converted CT and MR: geometry lies in functional groups, whatever the number of frames.
ENHANCED = {CT_IMAGE + ".1", CT_IMAGE + ".2", MR_IMAGE + ".1", MR_IMAGE + ".4"}

# JPEG baseline and extended, JPEG-LS near-lossless: never without loss, whatever the tags say.
LOSSY_SYNTAXES = {f"1.2.840.10008.1.2.4.{number}" for number in (50, 51, 81)}
SIEMENS_MOSAIC = 0x0019100A
# Private b-values, by the scanners' owners of the block.
B_VALUES = ((0x0019100C, "SIEMENS MR HEADER"), (0x00431039, "GEMS_PARM_01"), (0x20011003, "Philips Imaging DD 001"))
# More than max_slices of any policy in use; each costs a fifth of a millisecond.
MAX_FRAMES = 20_000
RESCALE = ("RescaleSlope", "RescaleIntercept", "RescaleType")
# Nothing else of a file is parsed: what is not read cannot leak. Of the patient only a digest is kept.
HEADER_TAGS: tuple[str | int, ...] = (
    "SOPClassUID", "SOPInstanceUID", "SeriesInstanceUID", "StudyInstanceUID", "FrameOfReferenceUID",
    "PatientID", "PatientName", "Modality", "ImageType", "BurnedInAnnotation", "NumberOfFrames", "SeriesDescription",
    "Rows", "Columns", "SamplesPerPixel", "PhotometricInterpretation",
    "BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation", "LossyImageCompression",
    "ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "SliceThickness", "SpacingBetweenSlices",
    *RESCALE, "ModalityLUTSequence", "ContrastBolusAgent",
    "EchoTime", "EchoNumbers", "TemporalPositionIdentifier", "DiffusionBValue", "AcquisitionNumber", "AcquisitionTime",
    "TriggerTime", "ImagesInAcquisition", "ConcatenationUID", "InConcatenationTotalNumber",
    "ConcatenationFrameOffsetNumber", "ConvolutionKernel",
    SIEMENS_MOSAIC, *(tag for tag, _ in B_VALUES), 0x00190010, 0x00430010, 0x20010010,
)  # fmt: skip


class Part(NamedTuple):
    """A part of a concatenation: its UID, how many parts it has, and the place of this one's first frame, from 0."""

    uid: str
    total: int | None
    offset: int | None


class PixelPlace(NamedTuple):
    """Where the value of PixelData begins in its file, and what the reader needs from before it.

    `before` is the CRC-32 of all bytes before the value, by which the file is known again; `padding` are the elements
    PixelPaddingValue and PixelPaddingRangeLimit.
    """

    offset: int
    before: int
    padding: tuple[Any, Any]


@dataclass(frozen=True)
class SliceHeader:
    """The facts of one image: a single-frame DICOM file, or one frame of a multi-frame one.

    None where the file does not say. Lengths are in mm.

    Args:
        path: the file.
        frame: number of the frame in the file, from 0; None for a single-frame image.
        patient: digest of PatientID and PatientName, good for telling two patients apart and nothing else.
        patient_id: digest of PatientID alone; None where there is none.
        frames: NumberOfFrames of the file.
        groups: number of functional groups in the file; None where it has none.
        mosaic: many slices tiled into one picture.
        pixel_bytes: what the file really holds of the pixel data; −1 where encapsulated, None where there is none.
        images_in_acquisition: as written; with it `acquisition` tells whether all of them are there.
        concatenation: where the object is one of several that hold one image, or None.
        kernel: ConvolutionKernel, and whether ImageType begins with DERIVED: one volume is made in one way.
        stamp: size and time of the file when it was read.
        pixels: where the pixel data lie, if they can be taken as they are; None where they have to be parsed.
        description: SeriesDescription; free text that may name a patient, to be matched and never to be shown unasked.
        facts: geometry, rescaling and contrast of this frame.
    """

    path: Path
    frame: int | None
    sop_uid: str
    series_uid: str
    study_uid: str | None
    frame_uid: str | None
    patient: bytes
    patient_id: bytes | None
    sop_class: str
    transfer_syntax: str
    modality: str
    image_type: tuple[str, ...]
    burned_in: bool
    mosaic: bool
    lossy: bool
    contrast_agent: bool
    description: str
    frames: int
    groups: int | None
    rows: int | None
    columns: int | None
    samples: int
    photometric: str
    bits_allocated: int | None
    bits_stored: int | None
    high_bit: int | None
    pixel_representation: int | None
    has_modality_lut: bool
    images_in_acquisition: float | None
    acquisition: float | None
    concatenation: Part | None
    kernel: tuple[str, bool]
    pixel_bytes: int | None
    facts: FrameFacts
    stamp: list[int] = field(compare=False)
    pixels: PixelPlace | None = field(compare=False)

    @property
    def is_enhanced(self) -> bool:
        """Whether geometry lies in functional groups."""
        return self.sop_class in ENHANCED

    @property
    def is_encapsulated(self) -> bool:
        """Whether the transfer syntax compresses pixels."""
        syntax = known(self.transfer_syntax)
        return syntax.is_transfer_syntax and syntax.is_encapsulated


def is_image(path: Path) -> bool:
    """Whether a DICOM file is an image, or damaged so that it may be one; False for SR, PR, DICOMDIR and their like."""
    with quiet_pydicom():
        try:
            dataset = read_dataset(path, ("SOPClassUID", *PIXEL_KEYWORDS), 4096)
            return _is_image(dataset)
        except Refusal:
            return True


def uid_of(path: Path, keyword: str) -> str | None:
    """A UID of a DICOM file, such as its StudyInstanceUID; None where it cannot be known."""
    with quiet_pydicom():
        try:
            return uid(read_dataset(path, (keyword,), 4096), keyword)
        except Refusal:
            return None


def _is_image(dataset: FileDataset) -> bool:
    declared = uid(dataset, "SOPClassUID"), uid(dataset.file_meta, "MediaStorageSOPClassUID")
    names = [(one, known(one).name) for one in declared if one]
    # Only what is known to be something else is no image: an image cut short before its pixels must not vanish.
    other = bool(names) and all(name != one and "Image" not in name for one, name in names)
    return not other or any(keyword in dataset for keyword in PIXEL_KEYWORDS)


def read_headers(path: Path) -> list[SliceHeader]:
    """Read the facts of one DICOM file without its pixels.

    Returns:
        A header an image; several for a multi-frame object with functional groups; none where the file is DICOM but
        holds no image (SR, PR, DICOMDIR, plans, waveforms).

    Raises:
        Refusal: `unreadable_file`, `bad_tag`, `uid_absent`, `too_large`.
    """
    with quiet_pydicom():
        dataset = read_dataset(path, HEADER_TAGS + PADDING_KEYWORDS + PIXEL_KEYWORDS, 4096)
        if not _is_image(dataset):
            return []
        # A file that was cut: pydicom gives nothing where it ends within its pixels, and less where within its header.
        whole = any(keyword in dataset for keyword in PIXEL_KEYWORDS)
        if not whole and not all(keyword in dataset for keyword in ("SOPInstanceUID", "SeriesInstanceUID")):
            raise unreadable()
        sop_class = uid(dataset, "SOPClassUID") or ""
        groups = None
        if sop_class in ENHANCED:
            # On its own: these sequences may be of any length, and must be read whole.
            sequences = read_dataset(path, (*FRAME_SEQUENCES, *RESCALE), None, stop_before_pixels=True)
            groups = items(sequences, "PerFrameFunctionalGroupsSequence")
            if groups is not None and len(groups) > MAX_FRAMES:
                raise Refusal("too_large", f"An image object describes {len(groups)} frames, far beyond a volume.")
        name, patient_id = _raw(dataset, "PatientName"), _raw(dataset, "PatientID")
        syntax = uid(dataset.file_meta, "TransferSyntaxUID") or ""
        header = SliceHeader(
            path=path,
            frame=None,
            sop_uid=required_uid(dataset, "SOPInstanceUID"),
            series_uid=required_uid(dataset, "SeriesInstanceUID"),
            study_uid=uid(dataset, "StudyInstanceUID"),
            frame_uid=uid(dataset, "FrameOfReferenceUID"),
            patient=hashlib.sha256(patient_id + b"\0" + name).digest(),
            patient_id=hashlib.sha256(patient_id).digest() if patient_id else None,
            sop_class=sop_class,
            transfer_syntax=syntax,
            modality=word(dataset, "Modality"),
            image_type=words(dataset, "ImageType"),
            burned_in=word(dataset, "BurnedInAnnotation") == "YES",
            mosaic=_is_mosaic(dataset),
            lossy=word(dataset, "LossyImageCompression") == "01" or syntax in LOSSY_SYNTAXES,
            contrast_agent=word(dataset, "ContrastBolusAgent") not in ("", "NONE", "NO"),
            description=word(dataset, "SeriesDescription"),
            frames=integer(dataset, "NumberOfFrames") or 1,
            groups=None if groups is None else len(groups),
            rows=integer(dataset, "Rows"),
            columns=integer(dataset, "Columns"),
            samples=integer(dataset, "SamplesPerPixel") or 1,
            photometric=word(dataset, "PhotometricInterpretation"),
            bits_allocated=integer(dataset, "BitsAllocated"),
            bits_stored=integer(dataset, "BitsStored"),
            high_bit=integer(dataset, "HighBit"),
            pixel_representation=integer(dataset, "PixelRepresentation"),
            has_modality_lut="ModalityLUTSequence" in dataset,
            images_in_acquisition=hint(dataset, "ImagesInAcquisition"),
            acquisition=hint(dataset, "AcquisitionNumber"),
            concatenation=_part(dataset),
            kernel=(word(dataset, "ConvolutionKernel"), words(dataset, "ImageType")[:1] == ("DERIVED",)),
            pixel_bytes=_pixel_bytes(dataset, path),
            facts=root_facts(dataset, B_VALUES),
            stamp=stamp(path),
            pixels=_pixel_place(dataset, path, syntax),
        )
        if groups is None:
            return [header]
        return [replace(header, frame=k, facts=facts) for k, facts in enumerate(frame_facts(sequences, groups))]


def _raw(dataset: FileDataset, keyword: str) -> bytes:
    """The bytes of a text value: decoding it would bring character sets, and their warnings, into a comparison."""
    element: Any = dataset.get_item(keyword) if keyword in dataset else None
    value = element.value if element is not None else None
    raw = value if isinstance(element, RawDataElement) and isinstance(value, bytes) else str(value or "").encode()
    return raw.strip(b"\0 ").rstrip(b"^")


def _part(dataset: FileDataset) -> Part | None:
    concatenation = uid(dataset, "ConcatenationUID")
    if concatenation is None:
        return None
    total = integer(dataset, "InConcatenationTotalNumber")
    return Part(concatenation, total, integer(dataset, "ConcatenationFrameOffsetNumber"))


def _is_mosaic(dataset: FileDataset) -> bool:
    tiles = private_number(dataset, SIEMENS_MOSAIC, "SIEMENS MR HEADER")
    # VFRAME: the same of United Imaging.
    return not {"MOSAIC", "VFRAME"}.isdisjoint(words(dataset, "ImageType")) or (tiles is not None and tiles > 1)


def _pixel_place(dataset: FileDataset, path: Path, syntax: str) -> PixelPlace | None:
    element: Any = dataset.get_item("PixelData", keep_deferred=True) if "PixelData" in dataset else None
    if syntax in PARSED_SYNTAXES or not known(syntax).is_transfer_syntax or not isinstance(element, RawDataElement):
        return None
    # What pydicom asks of an image and the reader does not check.
    if integer(dataset, "SamplesPerPixel") != 1:
        return None
    with path.open("rb") as file:
        before = zlib.crc32(file.read(element.value_tell))
    padding = [dataset.get_item(keyword) if keyword in dataset else None for keyword in PADDING_KEYWORDS]
    return PixelPlace(element.value_tell, before, (padding[0], padding[1]))


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
    if uid(dataset.file_meta, "TransferSyntaxUID") == DeflatedExplicitVRLittleEndian:
        return int(element.length)
    # pydicom skips over deferred values without looking whether the file goes on that far.
    return max(0, min(int(element.length), path.stat().st_size - element.value_tell))
