"""What the child process of `decoder` runs: one DICOM file and frame numbers in, frames out.

It loads no more than NumPy, pydicom and the codecs, so that it starts quickly.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydicom.encaps import encapsulate
from pydicom.pixels import get_decoder
from pydicom.pixels.decoders.base import Decoder
from pydicom.uid import JPEGExtended12Bit

from ..errors import Refusal
from .codestream import CodestreamFacts, codestream_facts, disagreement, frame_spans
from .dicom_parse import (
    quiet_pydicom,
    read_dataset,
    stamp,
)
from .dicom_tags import (
    integer,
    known,
    uid,
    word,
)
from .stored_bits import holds_more, stored_values

__all__ = ["MAX_FRAME_PIXELS", "REQUEST_FRAMES", "corrupt", "limit", "serve"]

# 8192²; CT and MR slices have at most 4096², and a codec needs about 16 bytes a pixel.
MAX_FRAME_PIXELS = 2**26
# Address space: 0.6 GiB of programs, 1 GiB for the largest frame, the compressed file twice.
MAX_MEMORY_BYTES = 4 * 2**30
# One answer: enough that asking costs nothing, and little beside the volume that the frames go into.
REQUEST_FRAMES, ANSWER_BYTES = 64, 2**25

TAGS = (
    "NumberOfFrames", "Rows", "Columns", "SamplesPerPixel", "PhotometricInterpretation",
    "BitsAllocated", "BitsStored", "PixelRepresentation", "PixelData",
)  # fmt: skip

Frame = NDArray[np.integer]
SENTENCES = {
    "size": "The compressed pixels of at least one image are not of the size or bits that its header states, so they "
    "cannot be put in place.",
    "values": "The compressed pixels of at least one image hold values that do not fit the bits that its header states "
    "(BitsStored, PixelRepresentation).",
    "frames": "The compressed pixels of at least one file are damaged, or are not as many frames as its header states; "
    "copy the series again.",
}


def corrupt(reason: str, **facts: Any) -> Refusal:
    """The refusal of pixels that cannot be decoded to what the header promises."""
    usual = "The pixels of at least one image cannot be decoded; copy the series again."
    return Refusal("pixel_data_corrupt", SENTENCES.get(reason, usual), reason=reason, **facts)


def limit(reason: str, **facts: Any) -> Refusal:
    """The refusal of pixels that would take too much memory or time."""
    return Refusal(
        "decode_limit",
        f"Decoding at least one image takes more {'time' if reason == 'time' else 'memory'} than an image can need; it "
        "is damaged or not what it says, or the computer is overloaded.",
        reason=reason,
        **facts,
    )


class _Image(NamedTuple):
    """One opened file: its compressed pixels, where each frame lies in them, and what its header says of them."""

    pixels: bytes
    spans: list[list[tuple[int, int]]]
    decoder: Decoder
    options: dict[str, Any]


def _open(path: Path) -> _Image:
    dataset = read_dataset(path, TAGS, None)
    keywords = ("Rows", "Columns", "BitsAllocated", "BitsStored", "PixelRepresentation", "SamplesPerPixel")
    rows, columns, allocated, stored, sign, samples = (integer(dataset, keyword) or 0 for keyword in keywords)
    frames = integer(dataset, "NumberOfFrames") or 1
    if rows < 1 or columns < 1 or samples != 1 or allocated not in (8, 16, 32) or not 1 <= stored <= allocated:
        raise corrupt("size")
    if rows * columns > MAX_FRAME_PIXELS:
        raise limit("size", limit_pixels=MAX_FRAME_PIXELS)
    syntax = known(uid(dataset.file_meta, "TransferSyntaxUID") or "")
    if syntax == JPEGExtended12Bit and stored > 8:
        raise Refusal(
            "transfer_syntax", "Lossy JPEG of 12 bits (JPEG Extended) cannot be decoded here; send it uncompressed."
        )
    options = {
        "rows": rows,
        "columns": columns,
        "bits_allocated": allocated,
        "bits_stored": stored,
        "pixel_representation": sign,
        "samples_per_pixel": 1,
        "photometric_interpretation": word(dataset, "PhotometricInterpretation"),
        "number_of_frames": 1,
        "pixel_keyword": "PixelData",
    }
    try:
        pixels = bytes(dataset.PixelData)
        return _Image(pixels, frame_spans(pixels, frames, syntax), get_decoder(syntax), options)
    except MemoryError:
        raise
    except Exception as error:  # no pixel data, no fragments, no decoder
        raise corrupt("frames") from error


def _decode(image: _Image, number: int) -> Frame:
    if not 0 <= number < len(image.spans):
        raise corrupt("frames")
    options = image.options
    frame = b"".join(image.pixels[start:end] for start, end in image.spans[number])
    try:
        facts = codestream_facts(frame, image.decoder.UID)
    except ValueError as error:
        raise corrupt("codestream") from error
    signed = options["pixel_representation"] == 1
    if facts is not None:
        tag = disagreement(
            facts, options["rows"], options["columns"], options["bits_allocated"], options["bits_stored"], signed
        )
        if tag is not None:
            raise corrupt("size", tag=tag)
    bits = options["bits_stored"]
    # GDCM drops bits above BitsStored without a word, so it is told of all that the codestream has.
    unmasked = {"bits_stored": max(bits, facts.precision if facts is not None else bits), "correct_unused_bits": False}
    raw: Frame = image.decoder.as_array(
        encapsulate([frame], has_bot=False), index=0, raw=True, **{**options, **unmasked}
    )[0]
    if raw.shape != (options["rows"], options["columns"]) or raw.dtype.kind not in "iu":
        raise corrupt("codec")
    raw = np.ascontiguousarray(raw, dtype=raw.dtype.newbyteorder("="))
    # The same bits that pydicom would keep, but it does not say when it drops some that are not zero.
    array = stored_values(raw, raw.dtype.itemsize * 8, bits, bits - 1, signed)
    wider = facts is not None and facts.precision > bits  # a codestream with room for the sign has extended it
    more = raw.view(array.dtype) != array if wider else holds_more(raw, array, bits, bits - 1)
    if more.any() or not _fits_sign(array, facts, signed):
        raise corrupt("values")
    return array


def _fits_sign(array: Frame, facts: CodestreamFacts | None, signed: bool) -> bool:
    """False where header and codestream differ on signs, and a value is another one for each of them."""
    if facts is None or facts.signed is None or facts.signed == signed:
        return True
    return bool(array.min() >= 0) and (signed or int(array.max()) < 1 << facts.precision - 1)


def _answer(request: dict[str, Any], opened: dict[str, _Image], send: Callable[..., None]) -> None:
    path = Path(request["path"])
    key = json.dumps([request["path"], request["stamp"]])
    if stamp(path) != request["stamp"]:
        raise Refusal("file_changed", "A DICOM file changed while it was being read; read the folder again.")
    if key not in opened:
        opened.clear()
        opened[key] = _open(path)
    sent = 0
    for number in request["frames"]:
        frame = _decode(opened[key], number)
        send({"shape": frame.shape, "type": frame.dtype.str}, frame)
        sent += frame.nbytes
        if sent >= ANSWER_BYTES:
            break


def serve() -> None:
    """Answer requests from standard input on standard output until the parent closes them.

    A message is its length (4 bytes, big endian) and JSON; behind the message of a frame follow its bytes.
    """
    _bound()
    requests = sys.stdin.buffer
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # codecs print

    def send(message: dict[str, Any], frame: Frame | None = None) -> None:
        body = json.dumps(message).encode()
        answers.write(len(body).to_bytes(4, "big") + body)
        if frame is not None:
            answers.write(frame.data)
        answers.flush()

    send({"ready": True})
    opened: dict[str, _Image] = {}
    with quiet_pydicom():
        while head := requests.read(4):
            request = json.loads(requests.read(int.from_bytes(head, "big")))
            _alarm(request["seconds"])
            try:
                _answer(request, opened, send)
                send({"done": True})
            except Refusal as refusal:
                _send_refusal(send, refusal)
            except MemoryError:
                opened.clear()
                _send_refusal(send, limit("memory"))
            except (KeyboardInterrupt, SystemExit):
                raise
            except BaseException:  # the RLE codec, written in Rust, raises no Exception when it panics
                _send_refusal(send, corrupt("codec"))
            _alarm(0)


def _send_refusal(send: Callable[..., None], refusal: Refusal) -> None:
    send({"refusal": refusal.code, "sentence": refusal.sentence, "facts": refusal.facts})


def _bound() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent decides
    if hasattr(signal, "SIGALRM"):
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
    try:
        import resource
    except ImportError:  # Windows
        return
    for kind, most in ((resource.RLIMIT_AS, MAX_MEMORY_BYTES), (resource.RLIMIT_CORE, 0)):  # cores hold patients
        hard = resource.getrlimit(kind)[1]
        try:
            resource.setrlimit(kind, (most if hard == resource.RLIM_INFINITY else min(most, hard), hard))
        except (OSError, ValueError):  # macOS knows no limit of address space
            continue


def _alarm(seconds: int) -> None:
    # The parent ends a process that hangs; this ends one whose parent is gone.
    if hasattr(signal, "alarm"):
        signal.alarm(seconds)
