"""The facts of many DICOM images → one uniform series, or the reason why they are none."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Hashable, Sequence

from pydicom.pixels import get_decoder

from ..errors import Refusal
from .dicom_contrast import check_one_contrast
from .dicom_header import CT_IMAGE, ENHANCED, MR_IMAGE, SliceHeader
from .dicom_parse import (
    quiet_pydicom,
)
from .dicom_tags import (
    known,
)
from .policy import ReaderPolicy

__all__ = ["check_images", "check_one_series", "has_volume_class", "is_colour", "is_localizer", "known_modality"]

# Values that may be quoted. A tag could hold anything, a patient's name too, so others are never repeated.
KNOWN_MODALITIES = {"CR", "CT", "DX", "ES", "IO", "MG", "MR", "NM", "OCT", "OP", "OT", "PT", "PX", "RF", "SC", "SEG",
                    "SM", "US", "XA", "XC"}  # fmt: skip
COLOURS = {"RGB", "ARGB", "CMYK", "HSV", "PALETTE COLOR", "YBR_FULL", "YBR_FULL_422", "YBR_PARTIAL_420", "YBR_ICT",
           "YBR_RCT"}  # fmt: skip


def known_modality(header: SliceHeader) -> str:
    """The modality, where it is one that may be quoted."""
    return header.modality if header.modality in KNOWN_MODALITIES else "another or none"


def is_localizer(header: SliceHeader) -> bool:
    """Whether an image declares itself a localizer (scout, survey)."""
    return "LOCALIZER" in header.image_type


def is_colour(header: SliceHeader) -> bool:
    """Whether an image is a colour picture."""
    return header.samples != 1 or header.photometric in COLOURS


def has_volume_class(sop_class: str) -> bool:
    """Whether a SOP class is that of CT or MR images, single-frame or enhanced."""
    return sop_class in {CT_IMAGE, MR_IMAGE, *ENHANCED}


def check_one_series(headers: Sequence[SliceHeader]) -> None:
    """Refuse images of several patients, studies or spaces under one series UID."""
    rules: tuple[tuple[str, Callable[[SliceHeader], Hashable], str], ...] = (
        ("several_patients", lambda h: h.patient, "patients under one series UID; these images do not belong together"),
        ("several_studies", lambda h: h.study_uid, "studies under one series UID; these images do not belong together"),
        (
            "several_frames_of_reference",
            lambda h: h.frame_uid,
            "frames of reference under one series UID; their positions cannot be compared",
        ),
    )
    for code, key, words in rules:
        count = len({key(h) for h in headers})
        if count > 1:
            raise Refusal(
                code, f"The {len(headers)} DICOM images belong to {count} {words}.", count=count, images=len(headers)
            )


def check_images(headers: Sequence[SliceHeader], policy: ReaderPolicy) -> None:
    """Refuse images that the policy does not admit, that cannot be decoded, or that are not of one kind."""
    total = len(headers)

    def refuse_where(code: str, bad: Callable[[SliceHeader], bool], sentence: str, **facts: object) -> None:
        count = sum(map(bad, headers))
        if count:
            raise Refusal(code, f"{count} of {total} images: {sentence}.", affected=count, images=total, **facts)

    modality = known_modality(headers[0])
    wanted = " or ".join(policy.modalities)
    refuse_where("localizer", is_localizer, "a localizer (scout), which is no volume")
    refuse_where("colour", is_colour, "a colour picture (a screenshot or a processed view), not measured grey values")
    refuse_where(
        "modality",
        lambda h: h.modality not in policy.modalities,
        f"the modality is {modality}; this task accepts {wanted}",
        modality=modality,
        accepted=list(policy.modalities),
    )
    refuse_where(
        "not_ct_or_mr_image",
        lambda h: not has_volume_class(h.sop_class),
        "neither a CT nor an MR image object (a secondary capture or a derived object), so its values and geometry are "
        "not assured",
    )
    refuse_where("mosaic", lambda h: h.mosaic, "many slices tiled into one picture (a mosaic)")
    refuse_where(
        "burned_in",
        lambda h: h.burned_in,
        "text is burned into the picture (BurnedInAnnotation is YES), which may name the patient and mislead the model",
    )
    refuse_where(
        "multi_frame",
        lambda h: h.groups is None and (h.frames != 1 or h.is_enhanced),
        "several frames without functional groups, so nothing says where each of them lies; export single-frame images",
    )
    refuse_where(
        "frame_count",
        lambda h: h.groups is not None and h.frames != h.groups,
        "the number of frames (NumberOfFrames) is not that of the frames that it describes",
    )
    refuse_where(
        "photometric",
        lambda h: h.photometric not in ("MONOCHROME1", "MONOCHROME2"),
        "PhotometricInterpretation is neither MONOCHROME1 nor MONOCHROME2",
    )
    refuse_where("pixel_data_absent", lambda h: h.pixel_bytes is None, "no pixel data; the file is cut short or empty")
    refuse_where(
        "transfer_syntax",
        lambda h: not _can_decode(h.transfer_syntax),
        f"the compression {_syntax_name(headers)} cannot be decoded here; send the series uncompressed",
    )
    if not policy.accept_lossy:
        refuse_where("lossy", lambda h: h.lossy, "compressed with loss, which this task does not accept")
    refuse_where(
        "pixel_format",
        lambda h: not _sound_format(h),
        "rows, columns, bit layout or the form of the pixel data are absent or impossible",
    )
    refuse_where(
        "pixel_data_truncated",
        lambda h: _length_error(h) < 0,
        "fewer pixels than the header promises; the file is cut short",
    )
    refuse_where(
        "pixel_data_excess",
        lambda h: _length_error(h) > 0,
        "more pixels than the header promises, so rows, columns or bits are wrong",
    )
    _check_uniform(headers)
    check_one_contrast(headers)
    _check_values(headers)


def _syntax_name(headers: Sequence[SliceHeader]) -> str:
    bad = next((known(h.transfer_syntax) for h in headers if not _can_decode(h.transfer_syntax)), None)
    return f"({bad.name})" if bad is not None and bad.name != str(bad) else "(unknown)"


@functools.cache
def _can_decode(transfer_syntax: str) -> bool:
    try:
        with quiet_pydicom():
            return bool(get_decoder(known(transfer_syntax)).is_available)
    except NotImplementedError:
        return False


def _sound_format(h: SliceHeader) -> bool:
    if not h.rows or not h.columns or h.rows < 1 or h.columns < 1:
        return False
    if h.bits_allocated not in (8, 16, 32) or h.pixel_representation not in (0, 1):
        return False
    if h.bits_stored is None or not 1 <= h.bits_stored <= h.bits_allocated:
        return False
    if h.high_bit is None or not h.bits_stored - 1 <= h.high_bit < h.bits_allocated:
        return False
    # Compressed pixels are of undefined length, and carry their stored bits only: there is nothing to shift.
    if (h.pixel_bytes == -1) != h.is_encapsulated:
        return False
    return not h.is_encapsulated or h.high_bit == h.bits_stored - 1


def _length_error(h: SliceHeader) -> int:
    if h.is_encapsulated:
        return 0
    expected = (h.rows or 0) * (h.columns or 0) * (h.bits_allocated or 0) // 8 * h.frames
    # DICOM pads every value to an even length.
    return 0 if h.pixel_bytes in (expected, expected + expected % 2) else (h.pixel_bytes or 0) - expected


def _check_uniform(headers: Sequence[SliceHeader]) -> None:
    rules: tuple[tuple[str, Callable[[SliceHeader], Hashable], str], ...] = (
        ("mixed_matrix", lambda h: (h.rows, h.columns), "numbers of rows or columns"),
        ("mixed_modality", lambda h: (h.modality, h.sop_class), "modalities or kinds of image object"),
        ("mixed_photometric", lambda h: h.photometric, "photometric interpretations"),
    )
    for code, key, words in rules:
        kinds = len({key(h) for h in headers})
        if kinds > 1:
            raise Refusal(
                code,
                f"The {len(headers)} images of the series differ in {words} ({kinds} kinds).",
                kinds=kinds,
                images=len(headers),
            )


def _check_values(headers: Sequence[SliceHeader]) -> None:
    if any(h.has_modality_lut for h in headers):
        raise Refusal("modality_lut", "The images map their values through a Modality LUT, which is not supported.")
    facts = [h.facts for h in headers]
    present = sum(f.rescale_slope is not None for f in facts), sum(f.rescale_intercept is not None for f in facts)
    total = len(headers)
    if present not in ((0, 0), (total, total)):
        raise Refusal(
            "rescale_partly_absent",
            f"RescaleSlope is present in {present[0]} and RescaleIntercept in {present[1]} of {total} images, so their "
            "values are not on one scale.",
            with_slope=present[0],
            with_intercept=present[1],
            images=total,
        )
    for f in facts:
        slope, intercept = f.rescale_slope, f.rescale_intercept
        if slope is not None and intercept is not None and not (
            math.isfinite(slope) and slope != 0 and math.isfinite(intercept)
        ):  # fmt: skip
            raise Refusal("bad_rescale", "RescaleSlope or RescaleIntercept of at least one image is zero or no number.")
    if headers[0].modality == "CT":
        if present == (0, 0):
            raise Refusal(
                "rescale_absent",
                "The CT images carry no RescaleSlope and RescaleIntercept, so their values are not Hounsfield units.",
                images=total,
            )
        # "US" (unspecified) is what several scanners write for plain CT; anything else is another quantity.
        if any(f.rescale_type not in ("", "HU", "US") for f in facts):
            raise Refusal("not_hounsfield", "The CT images hold another quantity than Hounsfield units (RescaleType).")
