from __future__ import annotations

import struct

import numpy as np
import pydicom
import pytest
from pydicom.data import get_testdata_file
from pydicom.dataset import Dataset
from pydicom.encaps import encapsulate
from pydicom.uid import (
    HTJ2KLossless,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    JPEGLosslessSV1,
    JPEGLSLossless,
    RLELossless,
)

from bundle.data.codestream import CodestreamFacts, codestream_facts, disagreement, frame_spans
from tests.data import dicom_encodings as encodings
from tests.data.dicom_factory import make_slices

SIZED = {name: uid for name, uid in encodings.CODECS.items() if name != "RLE"}
# Grey images of pydicom, written by several vendors: rows, columns, precision, signed as pydicom's own parser has them.
REAL = {
    "693_J2KI.dcm": (512, 512, 16, True),
    "J2K_pixelrep_mismatch.dcm": (512, 512, 13, False),
    "JPEG2000.dcm": (1024, 256, 16, True),
    "JPEG-lossy.dcm": (1024, 256, 12, None),
    "JPEGLSNearLossless_08.dcm": (45, 10, 8, None),
    "MR_small_jp2klossless.dcm": (64, 64, 16, True),
    "MR_small_jpeg_ls_lossless.dcm": (64, 64, 16, None),
}


def frame_of(name: str, matrix: tuple[int, int] = (36, 44)) -> bytes:
    ds = make_slices(matrix=matrix, count=1)[0]
    encodings.compress(ds, SIZED[name])
    return encodings.codestreams(ds)[0]


def joined(ds: Dataset) -> bytes:
    syntax = str(ds.file_meta.TransferSyntaxUID)
    return b"".join(ds.PixelData[a:b] for a, b in frame_spans(ds.PixelData, 1, syntax)[0])


@pytest.mark.parametrize("name", SIZED)
def test_facts_of_what_encoders_write(name: str) -> None:
    facts = codestream_facts(frame_of(name), SIZED[name])
    assert facts is not None
    assert facts[:4] == (36, 44, 1, 16)
    assert not facts.signed


@pytest.mark.parametrize("name", REAL)
def test_facts_of_real_files(name: str) -> None:
    rows, columns, precision, signed = REAL[name]
    ds = pydicom.dcmread(str(get_testdata_file(name, download=False)))
    facts = codestream_facts(joined(ds), ds.file_meta.TransferSyntaxUID)
    lossy = name in ("JPEG2000.dcm", "JPEG-lossy.dcm", "JPEGLSNearLossless_08.dcm")
    assert facts == CodestreamFacts(rows, columns, 1, precision, signed, lossy)


def test_rle_states_nothing() -> None:
    assert codestream_facts(b"anything", RLELossless) is None


def segment(kind: int, body: bytes) -> bytes:
    return bytes([0xFF, kind]) + struct.pack(">H", len(body) + 2) + body


def start_of_frame(kind: int, rows: int = 3, columns: int = 5) -> bytes:
    return segment(kind, struct.pack(">BHHB3B", 12, rows, columns, 1, 1, 0x11, 0))


def test_every_segment_before_the_start_of_frame_is_passed_over() -> None:
    thumbnail = segment(0xE1, b"\xff\xd8" + start_of_frame(0xC3, 99, 99) + b"\xff\xd9")
    frame = b"\xff\xd8" + thumbnail + segment(0xFE, b"words") + segment(0xC4, bytes(20)) + b"\xff\xff\xff"
    frame += start_of_frame(0xC3) + segment(0xDA, bytes(6)) + b"\x12\xff\xd9\x07\x08"
    assert codestream_facts(frame, JPEGLosslessSV1) == CodestreamFacts(3, 5, 1, 12, None)
    for other in (JPEGBaseline8Bit, JPEGLSLossless):
        with pytest.raises(ValueError, match="another process"):
            codestream_facts(frame, other)


def in_boxes(codestream: bytes, header: bytes = b"ihdr", wide: bool = False) -> bytes:
    boxes = b"\0\0\0\x0cjP  \r\n\x87\n" + struct.pack(">I4s", 8 + len(header), b"jp2h") + header
    if wide:
        return boxes + struct.pack(">I4sQ", 1, b"jp2c", 16 + len(codestream)) + codestream
    return boxes + struct.pack(">I4s", 0, b"jp2c") + codestream


@pytest.mark.parametrize("wide", [False, True])
def test_jpeg_2000_in_boxes(wide: bool) -> None:
    frame = frame_of("JPEG 2000")
    facts = codestream_facts(frame, JPEG2000Lossless)
    assert codestream_facts(in_boxes(frame, wide=wide), HTJ2KLossless) == facts
    with pytest.raises(ValueError, match="plain codestream"):
        codestream_facts(in_boxes(frame, b"ihdr....pclr"), JPEG2000Lossless)


def test_offset_and_coarse_jpeg_2000_grids() -> None:
    frame = bytearray(frame_of("JPEG 2000"))
    frame[8:24] = struct.pack(">4I", 51, 41, 7, 5)  # right, bottom, left, top
    frame[43:45] = bytes([2, 3])
    # ⌈51/2⌉ − ⌈7/2⌉ columns, ⌈41/3⌉ − ⌈5/3⌉ rows
    assert codestream_facts(bytes(frame), JPEG2000Lossless) == CodestreamFacts(12, 22, 1, 16, False)


@pytest.mark.parametrize("name", SIZED)
def test_damaged_frames_raise_a_value_error_and_nothing_else(name: str) -> None:
    frame = frame_of(name)
    for cut in (*range(120), len(frame) // 2, len(frame) - 4):
        with pytest.raises(ValueError):  # noqa: PT011
            codestream_facts(frame[:cut], SIZED[name])
    rng = np.random.default_rng(0)
    for _ in range(300):
        damaged = bytearray(frame)
        for place in rng.integers(0, 80, 4):
            damaged[place] = rng.integers(0, 256)
        try:
            facts = codestream_facts(bytes(damaged), SIZED[name])
            assert facts is not None
        except ValueError:
            continue
    for junk in (b"", b"\xff", b"\xff\xd8\xff", b"\xff\xd8" + b"\xff" * 5000, b"\0\0\0\x0cjP  \r\n\x87\n" * 300):
        with pytest.raises(ValueError):  # noqa: PT011
            codestream_facts(junk, SIZED[name])


def test_what_counts_as_disagreement() -> None:
    facts = CodestreamFacts(10, 12, 1, 12, None)
    assert disagreement(facts, 10, 12, 16, 12, signed=True) is None
    assert disagreement(facts, 12, 10, 16, 12, signed=False) == "Rows"
    assert disagreement(facts, 10, 120, 16, 12, signed=False) == "Columns"
    assert disagreement(facts._replace(components=3), 10, 12, 16, 12, signed=False) == "SamplesPerPixel"
    assert disagreement(facts, 10, 12, 8, 8, signed=False) == "BitsAllocated"
    # Fewer bits than stored: the values may need no more, but a sign would have been lost.
    assert disagreement(facts, 10, 12, 16, 16, signed=False) is None
    assert disagreement(facts, 10, 12, 16, 16, signed=True) == "BitsStored"
    assert disagreement(facts._replace(signed=True), 10, 12, 16, 16, signed=True) is None


JPEG_FRAMES = [b"\xff\xd8\xff" + bytes([k]) * (10 + 2 * k) + b"\xff\xd9" for k in range(4)]
RLE_FRAMES = [bytes([k]) * (64 + 2 * k) for k in range(4)]


def spans_of(pixels: bytes, frames: int, syntax: str = JPEGLosslessSV1) -> list[bytes]:
    return [b"".join(pixels[a:b] for a, b in spans) for spans in frame_spans(pixels, frames, syntax)]


def padded(frame: bytes) -> bytes:
    return frame + b"\0" * (len(frame) % 2)


@pytest.mark.parametrize("fragments", [1, 2, 3])
@pytest.mark.parametrize("table", [True, False])
def test_frames_in_any_number_of_fragments(fragments: int, table: bool) -> None:
    pixels = encapsulate(JPEG_FRAMES, fragments_per_frame=fragments, has_bot=table)
    assert spans_of(pixels, 4) == [padded(f) for f in JPEG_FRAMES]
    assert spans_of(pixels + b"\xfe\xff\xdd\xe0\0\0\0\0", 4) == [padded(f) for f in JPEG_FRAMES]
    for wrong in (1, 3, 5):
        with pytest.raises(ValueError):  # noqa: PT011
            frame_spans(pixels, wrong, JPEGLosslessSV1)


def test_rle_frames_are_one_fragment_each() -> None:
    for table in (True, False):
        assert spans_of(encapsulate(RLE_FRAMES, has_bot=table), 4, RLELossless) == RLE_FRAMES
        for frames, fragments in ((3, 1), (1, 1), (4, 2)):
            pixels = encapsulate(RLE_FRAMES, has_bot=table, fragments_per_frame=fragments)
            with pytest.raises(ValueError):  # noqa: PT011
                frame_spans(pixels, frames, RLELossless)


def test_damaged_items_and_tables() -> None:
    pixels = encapsulate(JPEG_FRAMES)
    assert pixels[4:8] == struct.pack("<I", 16)
    for cut in range(0, len(pixels), 3):
        with pytest.raises(ValueError):  # noqa: PT011
            frame_spans(pixels[:cut], 4, JPEGLosslessSV1)
    offsets = list(struct.unpack("<4I", pixels[8:24]))
    for wrong in ([0, 0, *offsets[2:]], [offsets[1], 0, *offsets[2:]], [*offsets[:3], offsets[3] + 1], [2**32 - 1] * 4):
        with pytest.raises(ValueError):  # noqa: PT011
            frame_spans(pixels[:8] + struct.pack("<4I", *wrong) + pixels[24:], 4, JPEGLosslessSV1)
    # A table of two frames over four codestreams: a codec would decode one of each two and say nothing.
    two = pixels[:4] + struct.pack("<III", 8, 0, offsets[2]) + pixels[24:]
    with pytest.raises(ValueError, match="or several"):
        frame_spans(two, 2, JPEGLosslessSV1)
