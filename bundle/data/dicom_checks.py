"""The facts of many DICOM images → one uniform series, or the reason why they are none."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Hashable, Sequence

from pydicom.pixels import get_decoder
from pydicom.uid import UID

from ..errors import Refusal
from .dicom_header import SliceHeader
from .policy import ReaderPolicy

__all__ = ["check_images", "check_one_series", "drop_identical_files"]

CT_IMAGE = "1.2.840.10008.5.1.4.1.1.2"
MR_IMAGE = "1.2.840.10008.5.1.4.1.1.4"
# Enhanced and legacy-converted CT and MR: geometry lies in functional groups, whatever the number of frames.
ENHANCED_IMAGES = {CT_IMAGE + ".1", CT_IMAGE + ".2", MR_IMAGE + ".1", MR_IMAGE + ".3", MR_IMAGE + ".4"}

# Values that may be quoted. A tag could hold anything, a patient's name too, so others are never repeated.
KNOWN_MODALITIES = {"CR", "CT", "DX", "ES", "IO", "MG", "MR", "NM", "OCT", "OP", "OT", "PT", "PX", "RF", "SC", "SEG",
                    "SM", "US", "XA", "XC"}  # fmt: skip
COLOURS = {"RGB", "ARGB", "CMYK", "HSV", "PALETTE COLOR", "YBR_FULL", "YBR_FULL_422", "YBR_PARTIAL_420", "YBR_ICT",
           "YBR_RCT"}  # fmt: skip


def drop_identical_files(headers: Sequence[SliceHeader]) -> list[SliceHeader]:
    """Keep one of several byte-identical copies of an image.

    Raises:
        Refusal: `conflicting_copies` where two files carry one SOP Instance UID and differ.
    """
    kept: dict[str, SliceHeader] = {}
    digests: dict[str, bytes] = {}
    for header in headers:
        first = kept.setdefault(header.sop_uid, header)
        if first is header:
            continue
        for one in (first, header):
            if str(one.path) not in digests:
                digests[str(one.path)] = _file_digest(one)
        if digests[str(first.path)] != digests[str(header.path)]:
            raise Refusal(
                "conflicting_copies",
                "Two files claim to be the same image (one SOP Instance UID) and differ; keep the right one.",
                sop_instance_uid=header.sop_uid,
            )
    return list(kept.values())


def _file_digest(header: SliceHeader) -> bytes:
    digest = hashlib.sha256()
    with header.path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.digest()


def check_one_series(headers: Sequence[SliceHeader]) -> None:
    """Refuse images of several series, or of several patients, studies or spaces under one series UID."""
    rules: tuple[tuple[str, Callable[[SliceHeader], Hashable], str], ...] = (
        ("several_series", lambda h: h.series_uid, "series; give a folder that holds one series"),
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

    first = headers[0]
    modality = first.modality if first.modality in KNOWN_MODALITIES else "another or none"
    wanted = " or ".join(policy.modalities)
    refuse_where("localizer", lambda h: "LOCALIZER" in h.image_type, "a localizer (scout), which is no volume")
    refuse_where(
        "colour",
        lambda h: h.samples != 1 or h.photometric in COLOURS,
        "a colour picture (a screenshot or a processed view), not measured grey values",
    )
    refuse_where(
        "modality",
        lambda h: h.modality not in policy.modalities,
        f"the modality is {modality}; this task accepts {wanted}",
        modality=modality,
        accepted=list(policy.modalities),
    )
    refuse_where(
        "multi_frame",
        lambda h: h.frames != 1 or h.sop_class in ENHANCED_IMAGES,
        "a multi-frame (enhanced) DICOM object, which this version does not read; convert it to NIfTI, or export the "
        "series as single-frame images",
    )
    refuse_where(
        "not_ct_or_mr_image",
        lambda h: h.sop_class not in (CT_IMAGE, MR_IMAGE),
        "neither a CT nor an MR image object (a secondary capture or a derived object), so its values and geometry are "
        "not assured",
    )
    refuse_where("mosaic", lambda h: "MOSAIC" in h.image_type, "many slices tiled into one picture (a mosaic)")
    refuse_where(
        "burned_in",
        lambda h: h.burned_in,
        "text is burned into the picture (BurnedInAnnotation is YES), which may name the patient and mislead the model",
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
    refuse_where(
        "pixel_format",
        lambda h: not _sound_format(h),
        "rows, columns or bit layout are absent or impossible",
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
    _check_values(headers)


def _syntax_name(headers: Sequence[SliceHeader]) -> str:
    bad = next((UID(h.transfer_syntax) for h in headers if not _can_decode(h.transfer_syntax)), None)
    return f"({bad.name})" if bad is not None and bad.name != str(bad) else "(unknown)"


def _can_decode(transfer_syntax: str) -> bool:
    try:
        return bool(get_decoder(UID(transfer_syntax)).is_available)
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
    # Compressed pixels carry their stored bits only: there is nothing to shift.
    return h.pixel_bytes != -1 or h.high_bit == h.bits_stored - 1


def _length_error(h: SliceHeader) -> int:
    if h.pixel_bytes == -1 or _is_encapsulated(h.transfer_syntax):
        return 0
    expected = (h.rows or 0) * (h.columns or 0) * (h.bits_allocated or 0) // 8
    # DICOM pads every value to an even length.
    return 0 if h.pixel_bytes in (expected, expected + expected % 2) else (h.pixel_bytes or 0) - expected


def _is_encapsulated(transfer_syntax: str) -> bool:
    return UID(transfer_syntax).is_transfer_syntax and UID(transfer_syntax).is_encapsulated


def _check_uniform(headers: Sequence[SliceHeader]) -> None:
    rules: tuple[tuple[str, Callable[[SliceHeader], Hashable], str], ...] = (
        ("mixed_matrix", lambda h: (h.rows, h.columns), "numbers of rows or columns"),
        ("mixed_modality", lambda h: (h.modality, h.sop_class), "modalities"),
        ("mixed_photometric", lambda h: h.photometric, "photometric interpretations"),
        ("mixed_contrast", lambda h: h.contrast, "echoes, time points or b-values"),
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
    times = [h.echo_time for h in headers]
    known = [t for t in times if t is not None]
    # 1%, relative: vendors write the same echo time with different digits; two echoes lie far apart.
    if len(known) not in (0, len(times)) or (known and not max(known) <= min(known) * 1.01):
        raise Refusal(
            "mixed_contrast",
            "The images of the series differ in echo time, so they are no single volume.",
            tag="EchoTime",
            images=len(headers),
        )


def _check_values(headers: Sequence[SliceHeader]) -> None:
    if any(h.has_modality_lut for h in headers):
        raise Refusal("modality_lut", "The images map their values through a Modality LUT, which is not supported.")
    present = sum(h.rescale_slope is not None for h in headers), sum(h.rescale_intercept is not None for h in headers)
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
    for h in headers:
        slope, intercept = h.rescale_slope, h.rescale_intercept
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
        if any(h.rescale_type not in ("", "HU", "US") for h in headers):
            raise Refusal("not_hounsfield", "The CT images hold another quantity than Hounsfield units (RescaleType).")
