"""What differs from image to image within a DICOM object: geometry, rescaling and contrast of each frame."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from pydicom.dataset import Dataset

from .dicom_tags import hint, items, number, numbers, private_number, word, words

__all__ = ["FRAME_SEQUENCES", "FrameFacts", "frame_facts", "root_facts"]

FRAME_SEQUENCES = ("SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence")
# Words of ImageType and FrameType that tell one reconstruction of an acquisition from another, as scanners write them:
# magnitude, phase, real, imaginary; Dixon's water, fat, in and out of phase.
COMPONENTS = frozenset((
    "M", "P", "R", "I", "MAGNITUDE", "PHASE", "REAL", "IMAGINARY", "PHASE_MAP", "W", "F", "IP", "OP", "WATER", "FAT",
    "IN_PHASE", "OUT_PHASE", "OPP_PHASE",
))  # fmt: skip


@dataclass(frozen=True)
class FrameFacts:
    """Facts of one image; None where the file does not say. Lengths are in mm, times in ms.

    Args:
        position: ImagePositionPatient.
        orientation: ImageOrientationPatient.
        pixel_spacing: PixelSpacing: between rows, between columns.
        slice_thickness: SliceThickness.
        slice_spacing: SpacingBetweenSlices.
        rescale_slope: RescaleSlope.
        rescale_intercept: RescaleIntercept.
        rescale_type: RescaleType.
        echo: EchoNumbers, as written.
        echo_time: EchoTime, or EffectiveEchoTime.
        time_point: TemporalPositionIdentifier or TemporalPositionIndex, as written.
        b_value: DiffusionBValue or a vendor's private one, s/mm².
        components: words of ImageType or FrameType such as magnitude, phase, water.
        moment: when it was acquired, as written; differs from slice to slice in most series, and so only explains.
    """

    position: tuple[float, ...] | None
    orientation: tuple[float, ...] | None
    pixel_spacing: tuple[float, ...] | None
    slice_thickness: float | None
    slice_spacing: float | None
    rescale_slope: float | None
    rescale_intercept: float | None
    rescale_type: str
    echo: str
    echo_time: float | None
    time_point: str
    b_value: float | None
    components: frozenset[str]
    moment: tuple[str, ...]


def root_facts(dataset: Dataset, b_values: Sequence[tuple[int, str]]) -> FrameFacts:
    """The facts of a single-frame object.

    Args:
        dataset: the object.
        b_values: private tags of b-values and the owners of their blocks.

    Raises:
        Refusal: `bad_tag`.
    """
    b_value = hint(dataset, "DiffusionBValue")
    for tag, owner in b_values:
        if b_value is None and (found := private_number(dataset, tag, owner)) is not None:
            b_value = found % 1e9  # GE adds multiples of 10⁹
    return _facts(
        lambda sequence: dataset,
        echo_time=hint(dataset, "EchoTime"),
        time_point=word(dataset, "TemporalPositionIdentifier"),
        b_value=b_value,
        components=frozenset(words(dataset, "ImageType")) & COMPONENTS,
        moment=tuple(word(dataset, k) for k in ("AcquisitionTime", "AcquisitionNumber", "TriggerTime")),
    )


def frame_facts(dataset: Dataset, groups: Sequence[Dataset]) -> Iterator[FrameFacts]:
    """The facts of each frame of an object with functional groups, in the order of its frames.

    A frame's own group wins over the shared one (the standard allows each macro in one of them only). Rescaling that
    lies in neither is taken from the object itself, where converters of old series leave it.

    Args:
        dataset: the object.
        groups: its per-frame functional groups.

    Raises:
        Refusal: `bad_tag`.
    """
    shared = _first(dataset, "SharedFunctionalGroupsSequence") or Dataset()
    empty = Dataset()
    for group in groups:

        def macro(sequence: str, own: Dataset = group) -> Dataset:
            found = _first(own, sequence) or _first(shared, sequence)
            if found is None and sequence == "PixelValueTransformationSequence":
                return dataset
            return empty if found is None else found

        content, diffusion = macro("FrameContentSequence"), macro("MRDiffusionSequence")
        kinds = macro("MRImageFrameTypeSequence"), macro("CTImageFrameTypeSequence")
        parts = [words(kind, keyword) for kind in kinds for keyword in ("FrameType", "ComplexImageComponent")]
        yield _facts(
            macro,
            echo_time=hint(macro("MREchoSequence"), "EffectiveEchoTime"),
            time_point=word(content, "TemporalPositionIndex"),
            b_value=hint(diffusion, "DiffusionBValue"),
            components=frozenset().union(*parts) & COMPONENTS,
            moment=tuple(word(content, k) for k in ("FrameAcquisitionDateTime", "FrameAcquisitionNumber")),
        )


def _first(dataset: Dataset, sequence: str) -> Dataset | None:
    found = items(dataset, sequence)
    return found[0] if found else None


def _facts(macro: Callable[[str], Dataset], **contrast: Any) -> FrameFacts:
    measures, values = macro("PixelMeasuresSequence"), macro("PixelValueTransformationSequence")
    return FrameFacts(
        position=numbers(macro("PlanePositionSequence"), "ImagePositionPatient", 3),
        orientation=numbers(macro("PlaneOrientationSequence"), "ImageOrientationPatient", 6),
        pixel_spacing=numbers(measures, "PixelSpacing", 2),
        slice_thickness=hint(measures, "SliceThickness"),
        slice_spacing=hint(measures, "SpacingBetweenSlices"),
        rescale_slope=number(values, "RescaleSlope"),
        rescale_intercept=number(values, "RescaleIntercept"),
        rescale_type=word(values, "RescaleType"),
        echo=word(macro("MREchoSequence"), "EchoNumbers"),
        **contrast,
    )
