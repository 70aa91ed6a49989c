"""What formats of one header and one block of voxels share: the exact length, a strict text header, itk's decoding."""

from __future__ import annotations

import gzip
import math
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from ..errors import Refusal
from .grid import corner_distance
from .itk_loader import load_itk
from .volume import Volume

__all__ = [
    "CHUNK_BYTES",
    "TextHeader",
    "as_count",
    "as_numbers",
    "check_finite",
    "check_length",
    "check_room",
    "damaged",
    "detached",
    "header_lines",
    "read_with_itk",
    "readable",
    "required",
    "voxel_type",
]

CHUNK_BYTES = 1 << 24
# Deflate cannot pack tighter than 1032 to 1, so a header that promises more than that lies.
MOST_COMPRESSION = 1032
# Text headers have some kilobytes, with all DICOM attributes copied into them.
LARGEST_TEXT = 1 << 20
# Absolute, mm: rounding of decimals to float32 at 100 m is 0.004, at a scanner's 1 m 0.00003.
ITK_TOLERANCE_MM = 0.01
NUMBER = re.compile(r"[-+]?(\d+(\.\d*)?|\.\d+)([eE][-+]?\d+)?", re.ASCII)


def damaged(name: str, reason: str) -> Refusal:
    """A refusal of a file of format `name` that contradicts itself or its format."""
    return Refusal("file_damaged", f"The {name} file is damaged: {reason}; copy or export it again.")


def detached(name: str, remedy: str) -> Refusal:
    """A refusal of a header whose voxels are in another file, which nothing ties to it."""
    return Refusal(
        "detached_data", f"This is a {name} header whose voxels are in another file; convert it to {remedy}."
    )


def voxel_type() -> Refusal:
    """A refusal of voxels that are no plain numbers."""
    return Refusal(
        "voxel_type", "The voxels are colour, complex or of another type than plain numbers; export grey values."
    )


def check_room(available: int, expected: int, packed: bool) -> None:
    """Refuse a header that promises more bytes than its file can hold, before anything is read or unpacked."""
    if expected > (available * MOST_COMPRESSION if packed else available):
        raise _truncated(expected, None if packed else available)


def check_length(found: int, expected: int) -> None:
    """Refuse a block of voxels that has not the length its header declares, in bytes."""
    if found < expected:
        raise _truncated(expected, found)
    if found > expected:
        raise Refusal(
            "file_excess",
            f"The file holds more than the {expected} bytes its header declares, so its dimensions or voxel type are "
            "wrong; export it again.",
            declared_bytes=expected,
        )


def _truncated(expected: int, found: int | None) -> Refusal:
    return Refusal(
        "file_truncated",
        f"The file is cut short: its header declares {expected} bytes of voxels and they are "
        "not there; copy or export it again.",
        declared_bytes=expected,
        found_bytes=found,
    )


def check_finite(array: NDArray[np.float32]) -> None:
    """Refuse voxels that are not a number or infinite."""
    good = int(np.count_nonzero(np.isfinite(array)))
    if good < array.size:
        raise Refusal(
            "non_finite",
            f"{array.size - good} voxels are not a number or infinite; repair the image before use.",
            voxels=array.size - good,
        )


@contextmanager
def readable(name: str) -> Iterator[None]:
    """Turn what reading and unpacking raise into refusals."""
    try:
        yield
    except EOFError as error:
        raise Refusal(
            "file_truncated",
            f"The {name} file cannot be read to its end: it is cut short or damaged; copy or export it again.",
        ) from error
    except (OSError, zlib.error) as error:
        raise damaged(name, "it cannot be read or unpacked to its end") from error


def header_lines(path: Path, name: str, is_last: Callable[[str], bool]) -> tuple[list[str], int]:
    """The lines of a text header up to and with its last, and the byte at which the voxels begin.

    Raises:
        Refusal: `file_damaged`: control characters, which readers understand differently, or no end.
    """
    with path.open("rb") as file:
        block = file.read(LARGEST_TEXT)
    lines: list[str] = []
    start = 0
    while start < len(block):
        end = block.find(b"\n", start)
        if end < 0:
            if len(block) == LARGEST_TEXT:
                break
            end = len(block)
        line = block[start:end].removesuffix(b"\r").decode("latin-1")
        start = min(end + 1, len(block))
        if any(c < " " and c != "\t" for c in line):
            raise damaged(name, "its header is no text")
        lines.append(line)
        if is_last(line):
            return lines, start
    raise damaged(name, "its header has no end")


def as_numbers(words: Iterable[str]) -> NDArray[np.float64]:
    """Plain decimal numbers, and NaN for any other word: "1abc", "0x1" and "nan" are read differently by readers."""
    return np.array([float(w) if NUMBER.fullmatch(w) else math.nan for w in words], dtype=np.float64)


def as_count(word: str, name: str, what: str) -> int:
    """A whole number of at least 1, refused as `file_damaged` where it is none."""
    if not re.fullmatch(r"[1-9]\d{0,17}", word, re.ASCII):
        raise damaged(name, f"its header gives an impossible {what}")
    return int(word)


def required(fields: dict[str, str], key: str, name: str) -> str:
    """The value of a key, refused as `file_damaged` where the header has none."""
    if key not in fields:
        raise damaged(name, f"its header lacks {key}")
    return fields[key]


@dataclass(frozen=True, kw_only=True)
class TextHeader:
    """A checked MetaImage or NRRD header.

    Args:
        name: "MetaImage" or "NRRD".
        shape: (X, Y, Z) or (X, Y, Z, C).
        axes: number of axes that itk sees, channels within a voxel not counted: 3 or 4.
        voxel_bytes: of one number.
        offset: byte at which the voxels begin.
        packing: how they are packed.
        affine: (4, 4) voxel index → RAS+ mm.
    """

    name: str
    shape: tuple[int, ...]
    axes: int
    voxel_bytes: int
    offset: int
    packing: str | None
    affine: NDArray[np.float64]


class _Zlib:
    """A zlib stream read in pieces of bounded size, to its checksum."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.engine = zlib.decompressobj()

    def read(self, size: int) -> bytes:
        while not self.engine.eof:
            packed = self.engine.unconsumed_tail or self.file.read(1 << 20)
            if content := self.engine.decompress(packed, size):
                return content
            if not packed and not self.engine.eof:
                raise EOFError("cut short")
        if self.engine.unused_data or self.file.read(1):
            raise zlib.error("bytes after the end of the stream")
        return b""


def read_with_itk(path: Path, header: TextHeader) -> Volume:
    """Let itk decode the voxels of a file whose length is right, and compare what it understood of the header.

    itk alone is no judge of a damaged file. Version 5.4.7 returns wrong voxels without an error from a MetaImage whose
    zlib stream is corrupt or lacks CompressedDataSize, and from an NRRD whose gzip stream is corrupt in the middle; it
    ignores what follows a block. So the stream is first unpacked here to its checksum, in bounded memory.

    Raises:
        Refusal: `file_damaged`, `file_truncated`, `file_excess`, `non_finite`.
    """
    expected = math.prod(header.shape) * header.voxel_bytes
    with path.open("rb") as file:
        available = file.seek(0, 2) - header.offset
        check_room(available, expected, header.packing is not None)
        if header.packing is None:
            check_length(available, expected)
        else:
            file.seek(header.offset)
            stream: Any = gzip.GzipFile(fileobj=file) if header.packing == "gzip" else _Zlib(file)
            found = 0
            while found <= expected and (chunk := stream.read(CHUNK_BYTES)):
                found += len(chunk)
            check_length(found, expected)
    array, affine = _decoded(path, header)
    if corner_distance(affine, header.affine, header.shape) > ITK_TOLERANCE_MM:
        raise damaged(header.name, "its header can be understood in more than one way")
    check_finite(array)
    return Volume(array=array, affine=header.affine, modality=None, source=header.name.lower())


def _decoded(path: Path, header: TextHeader) -> tuple[NDArray[np.float32], NDArray[np.float64]]:
    itk = load_itk()
    # An itk.Image would make luminance of three channels, and multiply the first of two by the second.
    kind = itk.VectorImage[itk.F, header.axes]
    io = itk.MetaImageIO.New() if header.name == "MetaImage" else itk.NrrdImageIO.New()
    try:
        reader = itk.ImageFileReader[kind].New(FileName=str(path), ImageIO=io)
        reader.Update()
        image = reader.GetOutput()
        stored = itk.array_from_image(image)  # ([T,] Z, Y, X, C)
        axes = itk.array_from_matrix(image.GetDirection()) * np.array(image.GetSpacing())
        array = stored.transpose(*range(header.axes - 1, -1, -1), header.axes).reshape(header.shape)
    except Exception as error:  # itk: RuntimeError of many kinds; ValueError where the shape is another
        raise damaged(header.name, "itk cannot read it") from error
    affine = np.eye(4)
    affine[:3, :3] = axes[:3, :3]
    affine[:3, 3] = np.array(image.GetOrigin())[:3]
    return array, np.diag([-1.0, -1, 1, 1]) @ affine
