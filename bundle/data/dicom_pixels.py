"""The pixel data of ordered DICOM slices → the values they stand for."""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydicom.dataelem import RawDataElement
from pydicom.dataset import FileDataset
from pydicom.pixels import pixel_array

from ..errors import Refusal
from .codestream import codestream_facts, frame_spans
from .decoder import decode_frames
from .dicom_header import PADDING_KEYWORDS, SliceHeader
from .dicom_parse import (
    quiet_pydicom,
    read_dataset,
    stamp,
)
from .stored_bits import Stored, holds_more, stored_values

__all__ = ["Pixels", "read_pixels"]

PIXEL_TAGS = (
    "SOPInstanceUID", "NumberOfFrames", "Rows", "Columns", "SamplesPerPixel", "PhotometricInterpretation",
    "BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation", "PixelPaddingValue", "PixelPaddingRangeLimit",
    "PixelData",
)  # fmt: skip
# Nothing is less dense than vacuum, −1000 HU; scanners clip at −1024, the least value of a 12-bit CT.
LEAST_HU = -1024.0


class Pixels(NamedTuple):
    """Values of a series: (X, Y, Z) float32 (columns, rows, slices); how many are padding; whether compression lost."""

    array: NDArray[np.float32]
    padding: int
    lossy: bool


def read_pixels(headers: Sequence[SliceHeader], accept_lossy: bool = True) -> Pixels:
    """Decode the slices in the order given.

    Value = stored · RescaleSlope + RescaleIntercept of the same slice; without the two tags the stored value itself.
    MONOCHROME1 is not inverted: it says how to display, while the rescaled value is the measured quantity (Hounsfield
    units for CT) under either. Padding outside the scanner's field (PixelPaddingValue) is no measurement: it takes the
    least real value of the volume, so that it is never brighter than air and never widens an intensity range.

    Compression with loss blurs padding into values beside it. In a lossy CT image whose padding lies below −1024 HU
    everything below −1024 HU therefore counts as padding.

    Args:
        headers: checked images of one series, ordered.
        accept_lossy: whether compression with loss is accepted, declared or seen in the compressed pixels.

    Raises:
        Refusal: `lossy`, `pixel_data_corrupt`, `decode_limit`, `decoder_unavailable`, `file_changed`,
            `mixed_pixel_format`, `bad_values`, `only_padding`.
    """
    columns, rows = headers[0].columns or 0, headers[0].rows or 0
    values = np.empty((columns, rows, len(headers)), dtype=np.float32, order="F")
    mixed = len({(h.bits_allocated, h.bits_stored, h.high_bit) for h in headers}) > 1
    padded: dict[int, int] = {}
    lossy = any(h.lossy for h in headers)
    files: dict[Path, list[int]] = {}
    for k, header in enumerate(headers):
        files.setdefault(header.path, []).append(k)
    for places in files.values():
        images = [headers[k] for k in places]
        lost = _loses(images)
        lossy = lossy or lost
        if lossy and not accept_lossy:
            raise Refusal("lossy", "The pixels are compressed with loss, which this task does not accept.")
        for k, (stored, padding, stray) in zip(places, _read_file(images, mixed), strict=True):
            if stray:
                raise _mixed_format()
            picture = values[:, :, k].T
            _rescale(stored, headers[k], picture)
            if padding is None:
                continue
            if lost or headers[k].lossy:
                padding |= _blurred_padding(picture, padding, headers[k])
            if padding.any():
                padded[k] = int(padding.sum())
                picture[padding] = np.nan
    if padded:
        if sum(padded.values()) == values.size:
            raise Refusal("only_padding", "Every pixel is marked as padding (PixelPaddingValue); nothing was measured.")
        least = np.nanmin(values)
        for k in padded:
            picture = values[:, :, k]
            picture[np.isnan(picture)] = least
    return Pixels(values, sum(padded.values()), lossy)


def _loses(headers: Sequence[SliceHeader]) -> bool:
    """Whether the compressed pixels of one file say that they lost something, whatever the header declares."""
    first = headers[0]
    if not first.is_encapsulated:
        return False
    if first.pixels is not None:
        with _unchanged(first) as file:
            pixels = file.read()
    else:
        with quiet_pydicom():
            pixels = bytes(read_dataset(first.path, ("PixelData",), None).get("PixelData", b""))
    try:
        for span in frame_spans(pixels, first.frames, first.transfer_syntax):
            facts = codestream_facts(b"".join(pixels[start:end] for start, end in span), first.transfer_syntax)
            if facts is not None and facts.lossy:
                return True
    except ValueError:  # damaged, which decoding will say
        return False
    return False


def _rescale(stored: Stored, header: SliceHeader, out: NDArray[np.float32]) -> None:
    slope = 1.0 if header.facts.rescale_slope is None else header.facts.rescale_slope
    intercept = 0.0 if header.facts.rescale_intercept is None else header.facts.rescale_intercept
    if slope == 1 and stored.itemsize <= 2 and abs(intercept) < 1 << 23 and float(intercept).is_integer():
        np.add(stored, np.float32(intercept), out=out)  # whole numbers of 24 bits, which float32 holds as float64 does
        return
    values = np.multiply(stored, slope, dtype=np.float64)
    values += intercept
    most = float(np.finfo(np.float32).max)
    # Of nearly every image the tags tell that no value can be too large.
    if not abs(slope) * 2.0 ** (8 * stored.itemsize) + abs(intercept) <= most and not (np.abs(values) <= most).all():
        raise Refusal("bad_values", "The rescaled values of at least one image are beyond any measurement.")
    out[...] = values


def _blurred_padding(values: NDArray[np.float32], padding: NDArray[np.bool_], header: SliceHeader) -> NDArray[np.bool_]:
    if not (header.modality == "CT" and padding.any() and values[padding].max() < LEAST_HU):
        return padding
    return values < LEAST_HU


def _mixed_format() -> Refusal:
    return Refusal(
        "mixed_pixel_format",
        "The images of the series differ in their bit layout (BitsStored, HighBit), and at least one holds pixels that "
        "do not fit its own: its layout is wrong.",
    )


def _read_file(headers: Sequence[SliceHeader], mixed: bool) -> Iterator[tuple[Stored, NDArray[np.bool_] | None, bool]]:
    """The images of one file: stored values, padding, and where layouts are mixed, whether other bits are used too."""
    first = headers[0]
    native = not first.is_encapsulated
    frames = [h.frame or 0 for h in headers]
    with quiet_pydicom() if first.pixels is None else nullcontext():
        if first.pixels is None:
            dataset = read_dataset(first.path, PIXEL_TAGS, None)
            same = (str(dataset.get("SOPInstanceUID", "")).strip("\0 "), dataset.get("Rows"), dataset.get("Columns"))
            if same != (first.sop_uid, first.rows, first.columns) or stamp(first.path) != first.stamp:
                raise _changed()
            elements = [dataset.get_item(k) if k in dataset else None for k in PADDING_KEYWORDS]
            images = _native(dataset, frames) if native else _compressed(first.path, frames)
        else:
            elements = list(first.pixels.padding)
            images = _plain(headers) if native else _compressed(first.path, frames)
        limits = [_padding(*pair, first) for pair in zip(PADDING_KEYWORDS, elements, strict=True)]
        for raw in images:
            if raw.shape != (first.rows, first.columns) or raw.dtype.kind not in "iu":
                raise _corrupt()
            yield _interpreted(raw.astype(raw.dtype.newbyteorder("="), copy=False), first, native, limits, mixed)


def _changed() -> Refusal:
    return Refusal("file_changed", "A DICOM file changed while it was being read; read the folder again.")


@contextmanager
def _unchanged(header: SliceHeader) -> Iterator[BinaryIO]:
    """The file of a header at the first byte of its pixel data, if all that precedes them is as it was."""
    assert header.pixels is not None
    with header.path.open("rb") as file:
        status = os.fstat(file.fileno())
        before = zlib.crc32(file.read(header.pixels.offset))
        if [status.st_size, status.st_mtime_ns] != header.stamp or before != header.pixels.before:
            raise _changed()
        yield file


def _plain(headers: Sequence[SliceHeader]) -> Iterator[Stored]:
    """Frames that lie in the file as they are."""
    first = headers[0]
    assert first.pixels is not None
    allocated = (first.bits_allocated or 0) // 8
    dtype = np.dtype(f"<{'i' if first.pixel_representation == 1 else 'u'}{allocated}")
    count = (first.rows or 0) * (first.columns or 0)
    with _unchanged(first) as file:
        for header in headers:
            file.seek(first.pixels.offset + (header.frame or 0) * count * allocated)
            values = np.frombuffer(file.read(count * allocated), dtype=dtype)
            if len(values) != count:
                raise _corrupt()
            yield values.reshape(first.rows or 0, first.columns or 0)


def _native(dataset: FileDataset, frames: Sequence[int]) -> Iterator[Stored]:
    for frame in frames:
        try:
            # pydicom shifts away unused bits as if the highest stored bit were BitsStored − 1; older files place their
            # bits elsewhere, with overlays beside them.
            raw = pixel_array(dataset, index=frame, raw=True, correct_unused_bits=False)
        except MemoryError:
            raise
        except Exception as error:  # pydicom raises what it meets
            raise _corrupt() from error
        yield raw


def _compressed(path: Path, frames: Sequence[int]) -> Iterator[Stored]:
    # For compressed pixels pydicom's corrections of sign and unused bits are the right ones.
    yield from decode_frames(path, frames)


def _corrupt() -> Refusal:
    return Refusal("pixel_data_corrupt", "The pixels of at least one image cannot be decoded; copy the series again.")


def _interpreted(
    raw: Stored, header: SliceHeader, native: bool, limits: Sequence[int | None], mixed: bool
) -> tuple[Stored, NDArray[np.bool_] | None, bool]:
    allocated, signed = header.bits_allocated or 0, header.pixel_representation == 1
    bits, high = header.bits_stored or 0, header.high_bit or 0
    # Where every bit is stored there is nothing to cut out.
    stored = stored_values(raw, allocated, bits, high, signed) if native and bits < allocated else raw
    padding = None
    if limits[0] is not None:
        first = limits[0]
        last = first if limits[1] is None else limits[1]
        low, most = sorted(_as_stored(v, allocated, signed) for v in (first, last))
        padding = (stored >= low) & (stored <= most)
        if native and first == last:
            # A padding value may need more bits than are stored; then only the pixel as written matches.
            padding |= raw.view(f"u{raw.dtype.itemsize}") == first
    if not (native and mixed):
        return stored, padding, False
    more = holds_more(raw, stored, bits, high)
    return stored, padding, bool((more if padding is None else more & ~padding).any())


def _padding(keyword: str, element: Any, header: SliceHeader) -> int | None:
    # The bytes themselves: many files give the tag the wrong of its two types (US, SS).
    if element is None or element.value in (None, b"", ""):
        return None
    try:
        if isinstance(element, RawDataElement) and isinstance(element.value, bytes):
            number = int.from_bytes(element.value[:2], "little" if element.is_little_endian else "big", signed=False)
        else:
            number = int(element.value)
    except (TypeError, ValueError) as error:
        raise Refusal("bad_tag", f"The DICOM tag {keyword} holds no valid value in at least one image.") from error
    allocated = header.bits_allocated or 0
    # Two bytes, to be read as a pixel of the given width; a negative value keeps its meaning in wider pixels.
    if allocated == 32 and number >= 1 << 15 and header.pixel_representation == 1:
        number -= 1 << 16
    return number % (1 << allocated)


def _as_stored(pattern: int, allocated: int, signed: bool) -> int:
    return pattern - (1 << allocated) if signed and pattern >= 1 << (allocated - 1) else pattern
