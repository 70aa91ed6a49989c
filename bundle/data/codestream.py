"""Compressed pixel data → where its frames lie, and what each says about itself, without decoding.

A codec gives a frame as a flat run of pixels, which pydicom lays out as Rows × Columns. Measured with pydicom 3.0.2:
where the header exchanges rows and columns, or states another pair of the same product (256 × 512 for 512 × 256),
pyjpegls, pylibjpeg-openjpeg and Pillow give a scrambled picture and no error, and so does GDCM 3.2.6 for JPEG-LS (which
also ends the process where the header asks for one row more). GDCM refuses the same for JPEG and JPEG 2000. The size
that a frame states is therefore held against the header. RLE frames state none: only the number of pixels can be wrong
in a way that shows.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

__all__ = ["CodestreamFacts", "codestream_facts", "disagreement", "frame_spans"]

RLE = "1.2.840.10008.1.2.5"
# Start-of-frame markers that each transfer syntax may hold: what is marked lossless must not be lossy, and pydicom
# corrects signs by the transfer syntax.
START_OF_FRAME = {
    "1.2.840.10008.1.2.4.50": (0xC0, 0xC1, 0xC2),
    "1.2.840.10008.1.2.4.51": (0xC0, 0xC1, 0xC2),
    "1.2.840.10008.1.2.4.57": (0xC3,),
    "1.2.840.10008.1.2.4.70": (0xC3,),
    "1.2.840.10008.1.2.4.80": (0xF7,),
    "1.2.840.10008.1.2.4.81": (0xF7,),
}
LOSSLESS = {f"1.2.840.10008.1.2.4.{number}" for number in (57, 70, 80, 90, 201, 202)}
JPEG_LS_FRAME, LOSSLESS_FRAME = 0xF7, 0xC3
JPEG_START, J2K_START, JP2_START = b"\xff\xd8\xff", b"\xff\x4f\xff\x51", b"\0\0\0\x0cjP  \r\n\x87\n"
# End of image in JPEG, end of codestream in JPEG 2000; compressed pixels can hold it in neither.
END = b"\xff\xd9"
ITEM, DELIMITER = b"\xfe\xff\x00\xe0", b"\xfe\xff\xdd\xe0"
# Segments before the start of frame, and boxes of a JP2 file; files have about ten.
MAX_SEGMENTS = 1000

Span = tuple[int, int]


class CodestreamFacts(NamedTuple):
    """Rows, columns, components (samples a pixel) and bits of each; `signed` is None where the format cannot say.

    `lossy` is whether the process loses: DCT, JPEG-LS with an allowed error, the 9-7 wavelet.
    """

    rows: int
    columns: int
    components: int
    precision: int
    signed: bool | None
    lossy: bool = False


def frame_spans(pixels: bytes, frames: int, transfer_syntax: str) -> list[list[Span]]:
    """Where the fragments of each frame lie in encapsulated pixel data.

    Args:
        pixels: the value of PixelData: offset table and fragments, each an item.
        frames: NumberOfFrames.
        transfer_syntax: its UID.

    Returns:
        For each frame its fragments, as (start, end) in bytes.

    Raises:
        ValueError: the items are damaged, or there are more or fewer frames than stated, or where one ends is unclear.
    """
    table, *fragments = _items(pixels)
    offsets = struct.unpack(f"<{(table[1] - table[0]) // 4}I", pixels[table[0] : table[1]])
    # Offsets count from the header of the first fragment, which is 8 bytes long.
    places = {start - 8 - table[1]: k for k, (start, _) in enumerate(fragments)}
    if offsets:
        if not set(offsets) <= places.keys():
            raise ValueError("the offset table points beside the fragments")
        firsts = [places[offset] for offset in offsets]
    elif transfer_syntax == RLE or len(fragments) == frames:
        firsts = list(range(len(fragments)))
    else:
        firsts = [k for k, span in enumerate(fragments) if _begins(pixels, span)]
    if len(firsts) != frames or firsts[:1] != [0] or sorted(set(firsts)) != firsts:
        raise ValueError("the frames are not as many as stated, or not in order")
    spans = [fragments[a:b] for a, b in zip(firsts, [*firsts[1:], len(fragments)], strict=True)]
    for first, *others in spans:
        # A codec decodes the first of two codestreams and is silent about the other. One of RLE is one fragment.
        if others and (transfer_syntax == RLE or not _begins(pixels, first) or any(_begins(pixels, o) for o in others)):
            raise ValueError("a frame holds no codestream, or several")
    return spans


def _items(pixels: bytes) -> list[Span]:
    found, place = [], 0
    while place < len(pixels) and pixels[place : place + 4] != DELIMITER:
        if pixels[place : place + 4] != ITEM or place + 8 > len(pixels):
            raise ValueError("no item where one should begin")
        start = place + 8
        place = start + int.from_bytes(pixels[place + 4 : start], "little")
        if place > len(pixels):
            raise ValueError("an item is cut short")
        found.append((start, place))
    if len(found) < 2:
        raise ValueError("no fragment")
    return found


def _begins(pixels: bytes, span: Span) -> bool:
    head = pixels[span[0] : min(span[1], span[0] + len(JP2_START))]
    return head.startswith((JPEG_START, J2K_START, JP2_START))


def codestream_facts(frame: bytes, transfer_syntax: str) -> CodestreamFacts | None:
    """What one compressed frame says about itself.

    Args:
        frame: the joined fragments of one frame.
        transfer_syntax: its UID.

    Returns:
        The facts; None for RLE, which states none.

    Raises:
        ValueError: the frame is no codestream of that transfer syntax, is damaged before its pixels, or does not end.

    Source:
        ITU-T T.81 annex B (JPEG), T.87 annex C (JPEG-LS), T.800 annexes A and I (JPEG 2000).
    """
    if transfer_syntax == RLE:
        return None
    if transfer_syntax in START_OF_FRAME:
        facts, place = _jpeg_facts(frame, START_OF_FRAME[transfer_syntax])
    else:
        facts, place = _jpeg_2000_facts(frame)
    if facts.lossy and transfer_syntax in LOSSLESS:
        raise ValueError("a codestream with loss under a transfer syntax without")
    # Not necessarily last: real files carry up to some ten stray bytes after it.
    if frame.rfind(END, place) < 0:
        raise ValueError("the codestream is cut short")
    return facts


def _jpeg_facts(frame: bytes, kinds: tuple[int, ...]) -> tuple[CodestreamFacts, int]:
    if not frame.startswith(JPEG_START):
        raise ValueError("no JPEG frame")
    place = 2
    for _ in range(MAX_SEGMENTS):
        while frame[place : place + 2] == b"\xff\xff":  # fill bytes may precede a marker
            place += 1
        kind, length = frame[place + 1 : place + 2], int.from_bytes(frame[place + 2 : place + 4], "big")
        end = place + 2 + length
        if frame[place : place + 1] != b"\xff" or length < 2 or end > len(frame) or kind == b"\xda":
            break
        if kind[0] in kinds:
            if length < 8:
                break
            precision, rows, columns, components = struct.unpack_from(">BHHB", frame, place + 4)
            lossy = _near(frame, end) > 0 if kind[0] == JPEG_LS_FRAME else kind[0] != LOSSLESS_FRAME
            return CodestreamFacts(rows, columns, components, precision, None, lossy), end
        if (0xC0 <= kind[0] <= 0xCF and kind[0] not in (0xC4, 0xC8, 0xCC)) or kind[0] == 0xF7:
            raise ValueError("a JPEG frame of another process than the transfer syntax says")
        place = end
    raise ValueError("a JPEG frame that states no size")


def _near(frame: bytes, place: int) -> int:
    """The largest error of a JPEG-LS frame, from the header of its scan; 0 where it is without loss."""
    for _ in range(MAX_SEGMENTS):
        kind, length = frame[place + 1 : place + 2], int.from_bytes(frame[place + 2 : place + 4], "big")
        if frame[place : place + 1] != b"\xff" or length < 2 or place + 2 + length > len(frame):
            break
        if kind == b"\xda":
            near = place + 5 + 2 * frame[place + 4]
            return frame[near] if near < place + 2 + length else 0
        place += 2 + length
    raise ValueError("a JPEG-LS frame without a scan")


def _is_irreversible(frame: bytes, place: int) -> bool:
    """Whether a JPEG 2000 codestream uses the 9-7 wavelet, which loses; its coding style follows the size."""
    for _ in range(MAX_SEGMENTS):
        marker, length = frame[place : place + 2], int.from_bytes(frame[place + 2 : place + 4], "big")
        if marker[:1] != b"\xff" or length < 2 or marker == b"\xff\x90":
            break
        if marker == b"\xff\x52":
            return length >= 12 and place + 13 < len(frame) and frame[place + 13] == 0
        place += 2 + length
    raise ValueError("a JPEG 2000 codestream without a coding style")


def _jpeg_2000_facts(frame: bytes) -> tuple[CodestreamFacts, int]:
    start = _codestream_in_boxes(frame) if frame.startswith(JP2_START) else 0
    if frame[start : start + 4] != J2K_START or len(frame) < start + 45:
        raise ValueError("no JPEG 2000 codestream")
    length, _, right, bottom, left, top = struct.unpack_from(">HH4I", frame, start + 4)
    components, depth, step_x, step_y = struct.unpack_from(">H3B", frame, start + 40)
    if not 1 <= components <= 16384 or length != 38 + 3 * components or 0 in (step_x, step_y):
        raise ValueError("a JPEG 2000 codestream with a damaged header")
    # Of the first component, ⌈right / step⌉ − ⌈left / step⌉: it may be coarser than the reference grid.
    columns, rows = -(-right // step_x) - -(-left // step_x), -(-bottom // step_y) - -(-top // step_y)
    end = start + 4 + length
    lossy = _is_irreversible(frame, end)
    return CodestreamFacts(rows, columns, components, (depth & 0x7F) + 1, bool(depth & 0x80), lossy), end


def _codestream_in_boxes(frame: bytes) -> int:
    place = 0
    for _ in range(MAX_SEGMENTS):
        if place + 16 > len(frame):
            break
        size, kind = int.from_bytes(frame[place : place + 4], "big"), frame[place + 4 : place + 8]
        wide = size == 1
        if wide:
            size = int.from_bytes(frame[place + 8 : place + 16], "big")
        if kind == b"jp2c":
            return place + (16 if wide else 8)
        # Decoders map the pixels through a palette; the codestream then says nothing about what comes out.
        if size < 8 or (kind == b"jp2h" and b"pclr" in frame[place : place + size]):
            break
        place += size
    raise ValueError("a JP2 file without a plain codestream")


def disagreement(
    facts: CodestreamFacts, rows: int, columns: int, bits_allocated: int, bits_stored: int, signed: bool
) -> str | None:
    """The DICOM tag that a codestream contradicts; None where they agree.

    The precision need not be BitsStored: of fourteen real grey files one has 16 bits in the codestream for 14
    stored, and encoders may keep as few bits as the values need. More bits do no harm while the values fit BitsStored.
    Fewer are unclear for signed values that the codestream does not know to be signed: whether its highest bit is a
    sign cannot be told.

    Args:
        facts: of the codestream.
        rows: Rows.
        columns: Columns.
        bits_allocated: BitsAllocated.
        bits_stored: BitsStored.
        signed: whether PixelRepresentation is 1.
    """
    if facts.rows != rows:
        return "Rows"
    if facts.columns != columns:
        return "Columns"
    if facts.components != 1:
        return "SamplesPerPixel"
    if facts.precision > bits_allocated:
        return "BitsAllocated"
    if signed and not facts.signed and facts.precision < bits_stored:
        return "BitsStored"
    return None
