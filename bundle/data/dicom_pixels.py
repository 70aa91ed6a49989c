"""The pixel data of ordered DICOM slices → the values they stand for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydicom.dataelem import RawDataElement
from pydicom.dataset import FileDataset
from pydicom.pixels import pixel_array

from ..errors import Refusal
from .dicom_header import SliceHeader
from .dicom_tags import quiet_pydicom, read_dataset

__all__ = ["read_values", "stored_values"]

PIXEL_TAGS = (
    "SOPInstanceUID", "NumberOfFrames", "Rows", "Columns", "SamplesPerPixel", "PhotometricInterpretation",
    "BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation", "PixelPaddingValue", "PixelPaddingRangeLimit",
    "PixelData",
)  # fmt: skip


def read_values(headers: Sequence[SliceHeader]) -> NDArray[np.float32]:
    """Decode the slices in the order given.

    Value = stored · RescaleSlope + RescaleIntercept of the same slice; without the two tags the stored value itself.
    MONOCHROME1 is not inverted: it says how to display, while the rescaled value is the measured quantity (Hounsfield
    units for CT) under either. Padding outside the scanner's field (PixelPaddingValue) is no measurement: it takes the
    least real value of the volume, so that it is never brighter than air and never widens an intensity range.

    Args:
        headers: checked images of one series, ordered.

    Returns:
        (X, Y, Z) float32: columns, rows, slices.

    Raises:
        Refusal: `pixel_data_corrupt`, `file_changed`, `bad_values`, `only_padding`.
    """
    columns, rows = headers[0].columns or 0, headers[0].rows or 0
    values = np.empty((columns, rows, len(headers)), dtype=np.float32, order="F")
    padded = False
    for k, header in enumerate(headers):
        stored, padding = _read_slice(header)
        slope = 1.0 if header.rescale_slope is None else header.rescale_slope
        intercept = 0.0 if header.rescale_intercept is None else header.rescale_intercept
        with np.errstate(over="ignore"):
            values[:, :, k] = (stored.astype(np.float64) * slope + intercept).T
        if not np.isfinite(values[:, :, k]).all():
            raise Refusal("bad_values", "The rescaled values of at least one image are beyond any measurement.")
        if padding.any():
            padded = True
            values[:, :, k][padding.T] = np.nan
    if padded:
        if np.isnan(values).all():
            raise Refusal("only_padding", "Every pixel is marked as padding (PixelPaddingValue); nothing was measured.")
        values[np.isnan(values)] = np.nanmin(values)
    return values


def _read_slice(header: SliceHeader) -> tuple[NDArray[np.integer], NDArray[np.bool_]]:
    with quiet_pydicom():
        dataset = read_dataset(header.path, PIXEL_TAGS, None)
        same = (str(dataset.get("SOPInstanceUID", "")).strip("\0 "), dataset.get("Rows"), dataset.get("Columns"))
        if same != (header.sop_uid, header.rows, header.columns):
            raise Refusal("file_changed", "A DICOM file changed while it was being read; read the folder again.")
        allocated, bits, high = header.bits_allocated or 0, header.bits_stored or 0, header.high_bit or 0
        native = header.pixel_bytes != -1
        try:
            # pydicom shifts away unused bits as if the highest stored bit were BitsStored − 1; older files place their
            # bits elsewhere, with overlays beside them. For compressed pixels its sign corrections are the right ones.
            raw = pixel_array(dataset, raw=True, correct_unused_bits=not native)
        except MemoryError:
            raise
        except Exception as error:  # every codec raises its own types
            raise _corrupt() from error
        if raw.shape != (header.rows, header.columns) or raw.dtype.kind not in "iu":
            raise _corrupt()
        raw = raw.astype(raw.dtype.newbyteorder("="), copy=False)
        signed = header.pixel_representation == 1
        stored = stored_values(raw, allocated, bits, high, signed) if native else raw
        limits = [_padding(dataset, k, allocated) for k in ("PixelPaddingValue", "PixelPaddingRangeLimit")]
    if limits[0] is None:
        return stored, np.zeros(stored.shape, dtype=bool)
    first = limits[0]
    last = first if limits[1] is None else limits[1]
    low, high_value = sorted(_as_stored(v, allocated, signed) for v in (first, last))
    padding = (stored >= low) & (stored <= high_value)
    if native and first == last:
        # A padding value may need more bits than are stored; then only the pixel as written matches.
        padding |= raw.view(f"u{raw.dtype.itemsize}") == first
    return stored, padding


def _corrupt() -> Refusal:
    return Refusal("pixel_data_corrupt", "The pixels of at least one image cannot be decoded; copy the series again.")


def stored_values(
    raw: NDArray[np.integer], allocated: int, stored: int, high_bit: int, signed: bool
) -> NDArray[np.integer]:
    """Cut the stored bits out of each pixel, dropping overlay bits above and below, and extend the sign.

    Args:
        raw: pixels as written, `allocated` bits wide.
        allocated: 8, 16 or 32 bits.
        stored: number of bits of the value.
        high_bit: place of its highest bit.
        signed: two's complement or not.

    Returns:
        The values, of the same width.
    """
    width = allocated // 8
    top = np.left_shift(raw.view(f"u{width}"), np.array(allocated - 1 - high_bit, dtype=f"u{width}"))
    kind = "i" if signed else "u"
    shifted: NDArray[np.integer] = np.right_shift(
        top.view(f"{kind}{width}"), np.array(allocated - stored, dtype=f"{kind}{width}")
    )
    return shifted


def _padding(dataset: FileDataset, keyword: str, allocated: int) -> int | None:
    # The bytes themselves: many files give the tag the wrong of its two types (US, SS).
    element: Any = dataset.get_item(keyword) if keyword in dataset else None
    if element is None or element.value in (None, b"", ""):
        return None
    if isinstance(element, RawDataElement) and isinstance(element.value, bytes):
        number = int.from_bytes(element.value[:2], "little" if element.is_little_endian else "big", signed=False)
    else:
        number = int(element.value)
    # Two bytes, to be read as a pixel of the given width; a negative value keeps its meaning in wider pixels.
    if allocated == 32 and number >= 1 << 15 and dataset.get("PixelRepresentation") == 1:
        number -= 1 << 16
    return number % (1 << allocated)


def _as_stored(pattern: int, allocated: int, signed: bool) -> int:
    return pattern - (1 << allocated) if signed and pattern >= 1 << (allocated - 1) else pattern
