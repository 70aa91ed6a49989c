"""Enhanced, legacy-converted and concatenated multi-frame objects, made from single-frame slices."""

from __future__ import annotations

import copy
from collections.abc import Sequence

from pydicom.dataset import Dataset
from pydicom.sequence import Sequence as DicomSequence

from .dicom_factory import CANARY, CLASS_UID, ROOT

__all__ = ["concatenation", "frame_group", "make_multiframe"]

IN_GROUPS = (
    "ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "SliceThickness", "SpacingBetweenSlices",
    "RescaleSlope", "RescaleIntercept", "RescaleType", "EchoTime", "EchoNumbers", "DiffusionBValue",
    "TemporalPositionIdentifier", "ConvolutionKernel", "XRayTubeCurrent", "KVP", "EchoTrainLength", "FlipAngle",
    "ScanningSequence", "SequenceVariant", "ScanOptions", "MRAcquisitionType", "RepetitionTime",
)  # fmt: skip


def _item(source: Dataset, *keywords: str) -> Dataset:
    item = Dataset()
    for keyword in keywords:
        if keyword in source:
            setattr(item, keyword, copy.deepcopy(source[keyword].value))
    return item


def _groups(source: Dataset) -> dict[str, Dataset]:
    """The functional groups of one frame that say what a single-frame image says at its top level."""
    groups = {
        "PlanePositionSequence": _item(source, "ImagePositionPatient"),
        "PlaneOrientationSequence": _item(source, "ImageOrientationPatient"),
        "PixelMeasuresSequence": _item(source, "PixelSpacing", "SliceThickness", "SpacingBetweenSlices"),
        "PixelValueTransformationSequence": _item(source, "RescaleSlope", "RescaleIntercept", "RescaleType"),
    }
    if "RescaleSlope" in source and "RescaleType" not in source:
        groups["PixelValueTransformationSequence"].RescaleType = "HU" if source.Modality == "CT" else "US"
    kind = _item(source)
    kind.FrameType = [*list(source.ImageType)[:2], *(list(source.ImageType)[2:] or ["VOLUME"]), "NONE"][:4]
    kind.PixelPresentation, kind.VolumetricProperties = "MONOCHROME", "VOLUME"
    kind.VolumeBasedCalculationTechnique = "NONE"
    groups[f"{source.Modality}ImageFrameTypeSequence"] = kind
    if source.Modality == "MR":
        kind.ComplexImageComponent = "PHASE" if "P" in source.ImageType else "MAGNITUDE"
        kind.AcquisitionContrast = "T1"
        if "EchoTime" in source:
            echo = Dataset()
            echo.EffectiveEchoTime = float(source.EchoTime)
            groups["MREchoSequence"] = echo
        if "DiffusionBValue" in source:
            diffusion = Dataset()
            diffusion.DiffusionBValue, diffusion.DiffusionDirectionality = float(source.DiffusionBValue), "ISOTROPIC"
            groups["MRDiffusionSequence"] = diffusion
    return {name: item for name, item in groups.items() if len(item)}


def _content(source: Dataset, place: int, stack: str) -> Dataset:
    content = Dataset()
    content.FrameAcquisitionNumber = 1
    content.FrameAcquisitionDateTime = content.FrameReferenceDateTime = "20200101120000"
    content.StackID, content.InStackPositionNumber = stack, place
    content.DimensionIndexValues = [1, place]
    content.FrameComments = CANARY
    if "TemporalPositionIdentifier" in source:
        content.TemporalPositionIndex = int(source.TemporalPositionIdentifier)
        content.DimensionIndexValues = [1, place, content.TemporalPositionIndex]
    return content


def _dimensions(ds: Dataset, temporal: bool) -> None:
    organization = Dataset()
    organization.DimensionOrganizationUID = f"{ROOT}.7"
    ds.DimensionOrganizationSequence = DicomSequence([organization])
    indices = []
    for tag in (0x00209056, 0x00209057, *([0x00209128] if temporal else [])):
        index = Dataset()
        index.DimensionOrganizationUID = f"{ROOT}.7"
        index.DimensionIndexPointer, index.FunctionalGroupPointer = tag, 0x00209111
        indices.append(index)
    ds.DimensionIndexSequence = DicomSequence(indices)


def make_multiframe(
    slices: Sequence[Dataset],
    *,
    order: Sequence[int] | None = None,
    shared: bool = True,
    legacy: bool = False,
    stacks: Sequence[str] | None = None,
    places: Sequence[int] | None = None,
) -> Dataset:
    """One multi-frame object of uncompressed single-frame slices.

    Args:
        slices: as of `make_slices`; what they say goes into functional groups.
        order: which slice each frame is; as given if None.
        shared: groups that are equal in all frames are written once; False: every group in every frame, and no
            SharedFunctionalGroupsSequence, as one vendor writes it.
        legacy: the legacy-converted class.
        stacks: StackID of each slice; all "1" if None.
        places: InStackPositionNumber of each slice; 1, 2, ... if None.
    """
    order = list(range(len(slices))) if order is None else list(order)
    first = slices[0]
    ds = copy.deepcopy(first)
    for keyword in IN_GROUPS:
        if keyword in ds:
            del ds[keyword]
    ds.SOPClassUID = f"{CLASS_UID[first.Modality]}.{(2 if first.Modality == 'CT' else 4) if legacy else 1}"
    ds.SOPInstanceUID = f"{first.SeriesInstanceUID}.900"
    ds.ImageType = [*list(first.ImageType)[:2], "VOLUME", "NONE"]
    ds.PixelPresentation, ds.VolumetricProperties, ds.VolumeBasedCalculationTechnique = "MONOCHROME", "VOLUME", "NONE"
    ds.PresentationLUTShape, ds.BurnedInAnnotation, ds.LossyImageCompression = "IDENTITY", "NO", "00"
    ds.ContentQualification, ds.AcquisitionDateTime, ds.AcquisitionDuration = "RESEARCH", "20200101120000", 1.0
    _dimensions(ds, any("TemporalPositionIdentifier" in s for s in slices))
    groups = [_groups(s) for s in slices]
    common = {
        name: item
        for name, item in groups[0].items()
        if shared and name != "PlanePositionSequence" and all(g.get(name) == item for g in groups)
    }
    frames = []
    for k in order:
        group = Dataset()
        place = k + 1 if places is None else places[k]
        group.FrameContentSequence = DicomSequence([_content(slices[k], place, "1" if stacks is None else stacks[k])])
        for name, item in groups[k].items():
            if name not in common:
                setattr(group, name, DicomSequence([copy.deepcopy(item)]))
        if legacy:
            unassigned = Dataset()
            unassigned.ProtocolName = CANARY
            group.UnassignedPerFrameConvertedAttributesSequence = DicomSequence([unassigned])
        frames.append(group)
    ds.PerFrameFunctionalGroupsSequence = DicomSequence(frames)
    if shared:
        group = Dataset()
        for name, item in common.items():
            setattr(group, name, DicomSequence([copy.deepcopy(item)]))
        ds.SharedFunctionalGroupsSequence = DicomSequence([group])
    ds.NumberOfFrames = len(order)
    ds.PixelData = b"".join(slices[k].PixelData for k in order)
    ds["PixelData"].VR = "OW"
    return ds


def frame_group(ds: Dataset, frame: int, sequence: str) -> Dataset:
    """The item of a functional group of one frame (from 0), or the shared one."""
    own = ds.PerFrameFunctionalGroupsSequence[frame]
    item: Dataset = (own if sequence in own else ds.SharedFunctionalGroupsSequence[0])[sequence][0]
    return item


def concatenation(ds: Dataset, sizes: Sequence[int]) -> list[Dataset]:
    """Split a multi-frame object over several of the given numbers of frames."""
    assert sum(sizes) == ds.NumberOfFrames
    frame_bytes = len(ds.PixelData) // ds.NumberOfFrames
    parts, start = [], 0
    for number, size in enumerate(sizes, start=1):
        part = copy.deepcopy(ds)
        part.SOPInstanceUID = f"{ds.SOPInstanceUID}.{number}"
        part.SOPInstanceUIDOfConcatenationSource = ds.SOPInstanceUID
        part.ConcatenationUID = f"{ds.SOPInstanceUID}.99"
        part.InConcatenationNumber, part.InConcatenationTotalNumber = number, len(sizes)
        part.ConcatenationFrameOffsetNumber, part.NumberOfFrames, part.InstanceNumber = start, size, number
        part.PerFrameFunctionalGroupsSequence = DicomSequence(
            list(part.PerFrameFunctionalGroupsSequence)[start : start + size]
        )
        part.PixelData = ds.PixelData[start * frame_bytes : (start + size) * frame_bytes]
        part["PixelData"].VR = "OW"
        parts.append(part)
        start += size
    return parts
