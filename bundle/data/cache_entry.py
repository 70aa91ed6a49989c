"""One prepared bag on disk: `image.npy`, of which single slices can be read, and `bag.jsonl` with everything else.

`bag.jsonl` has two lines: the version of the format with the CRC-32 of the second line, and the bag. Nothing in an
entry is believed before its checksum was compared, and nothing in it can run code.
"""

from __future__ import annotations

import base64
import io
import json
import os
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from ..errors import InputError

__all__ = ["CACHE_TYPES", "FORMAT", "DamagedEntry", "Entry", "write_entry"]

FORMAT = 1
CACHE_TYPES = ("uint16", "float32")
IMAGE_FILE, BAG_FILE = "image.npy", "bag.jsonl"
LEVELS = 65535
PLAIN = (bool, int, float, type(None))


class DamagedEntry(InputError):
    """An entry of the slice cache is not what was written, or not there."""

    def __init__(self, reason: str) -> None:
        super().__init__(f"an entry of the slice cache is damaged ({reason}): delete cache_dir, and check the disk")
        self.reason = reason

    def __reduce__(self) -> tuple[Any, ...]:
        return DamagedEntry, (self.reason,)


def write_entry(folder: Path, bag: Mapping[str, Any], case: Mapping[str, Any], cache_type: str) -> int:
    """Write a prepared bag.

    Args:
        folder: empty.
        bag: with `image` (N, ...), and tensors, arrays, numbers, texts, lists, tuples and dictionaries of these.
        case: from which it was prepared. What came through unchanged, such as the patient, is not written.
        cache_type: "uint16" for 65,536 even steps from the least to the greatest value, or "float32". An image that is
            no finite float32 is written as it is.

    Returns:
        The number of bytes on disk.

    Raises:
        InputError: the bag holds something else.
        OSError: the disk is full or cannot be written to.
    """
    image = bag["image"]
    if type(image) is not Tensor or not image.dim():
        raise _unknown("image", image)
    with (folder / IMAGE_FILE).open("wb") as file:
        about = _write_image(file, image.detach().cpu(), cache_type)
        _sync(file)
    others = [[name, _source(name, value, case)] for name, value in bag.items()]
    content = json.dumps({"image": about, "bag": others}).encode()
    with (folder / BAG_FILE).open("wb") as file:
        file.write(_first_line(content) + content)
        _sync(file)
    return sum((folder / name).stat().st_size for name in (IMAGE_FILE, BAG_FILE))


class Entry:
    """A prepared bag in a folder, opened for reading.

    Args:
        folder: that `write_entry` filled.

    Raises:
        DamagedEntry: a file is not there, or is not what was written.
    """

    def __init__(self, folder: Path) -> None:
        try:
            first, newline, content = (folder / BAG_FILE).read_bytes().partition(b"\n")
            if first + newline != _first_line(content):
                raise DamagedEntry(f"checksum of {BAG_FILE}")
            read = json.loads(content)
            self._about, self._others = read["image"], read["bag"]
            raw = np.asarray(np.memmap(folder / IMAGE_FILE, np.uint8, mode="r"))
        except (OSError, ValueError, OverflowError) as error:
            if isinstance(error, DamagedEntry):
                raise
            raise DamagedEntry(f"{type(error).__name__} in reading it") from error
        dtype, shape, start = np.dtype(self._about["dtype"]), tuple(self._about["shape"]), self._about["start"]
        if len(raw) != start + dtype.itemsize * int(np.prod(shape)):
            raise DamagedEntry(f"size of {IMAGE_FILE}")
        # Never parsed: a header that differs from what was written could ask for any shape or type.
        if zlib.crc32(raw[:start].data) != self._about["header_crc32"]:
            raise DamagedEntry(f"header of {IMAGE_FILE}")
        self._stored = raw[start:].view(dtype).reshape(shape)

    def __len__(self) -> int:
        return len(self._stored)

    def bag(self, case: Mapping[str, Any]) -> dict[str, Any]:
        """The bag with 0, 1, 2, ... (N,) in place of the slices of `image`: their positions, for `slices`.

        Args:
            case: gives what came through the preparation unchanged.
        """
        found = {}
        for name, source in self._others:
            if source == {"image": None}:
                found[name] = torch.arange(len(self))
            else:
                found[name] = case[name] if source == {"case": None} else _decoded(source)
        return found

    def slices(self, positions: Tensor | None = None) -> Tensor:
        """Slices of the image in memory of the caller's own.

        Args:
            positions: (n,) int64, from 0; None takes all.

        Returns:
            (n, ...) of the type that was prepared.

        Raises:
            DamagedEntry: one of these slices is not what was written.
        """
        chosen = np.arange(len(self)) if positions is None else positions.numpy()
        stored = self._stored[chosen]
        for position, one in zip(chosen, stored, strict=True):
            if zlib.crc32(one.data) != self._about["crc32"][int(position)]:
                raise DamagedEntry(f"checksum of slice {int(position)} of {len(self)}")
        scale = self._about["scale"]
        if scale is None:
            return torch.from_numpy(stored)
        low, high, step = (np.float32(scale[name]) for name in ("low", "high", "step"))
        values = np.multiply(stored, step, dtype=np.float32)
        if low:
            values += low
        if low + step * np.float32(LEVELS) > high:
            np.minimum(values, high, out=values)
        return torch.from_numpy(values)


def _write_image(file: BinaryIO, image: Tensor, cache_type: str) -> dict[str, Any]:
    """Write an image (N, ...) as .npy and say what is in the file."""
    try:
        array = image.contiguous().numpy()
    except TypeError as error:  # bfloat16 and other types that NumPy lacks
        raise _unknown("image", image) from error
    scale = _fixed_point(image) if cache_type == "uint16" else None
    dtype = np.dtype("<u2") if scale else array.dtype
    header = io.BytesIO()
    description = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": array.shape}
    np.lib.format.write_array_header_1_0(header, description)
    file.write(header.getvalue())
    checksums = []
    for one in array:
        if scale:
            levels = np.rint((one.astype(np.float64) - scale["low"]) / (scale["step"] or 1.0))
            one = levels.clip(0, LEVELS).astype(dtype)
        one = np.ascontiguousarray(one)
        checksums.append(zlib.crc32(one.data))
        file.write(one.data)
    return {
        "dtype": dtype.str, "shape": list(array.shape), "start": len(header.getvalue()), "scale": scale,
        "header_crc32": zlib.crc32(header.getvalue()), "crc32": checksums,
    }  # fmt: skip


def _fixed_point(image: Tensor) -> dict[str, float] | None:
    """Least and greatest value, and the step of even levels between them; None where levels cannot hold the image."""
    if image.dtype != torch.float32 or not image.numel():
        return None
    low, high = (float(value) for value in torch.aminmax(image))
    limits = np.finfo(np.float32)
    # NaN and infinity come out of aminmax. A wider range would overflow on the way back.
    if not (np.isfinite([low, high]).all() and high - low < float(limits.max)):
        return None
    # Levels are counted in the rounded step that they are read with, so that its rounding does not add up.
    step = float(np.float32((high - low) / LEVELS))
    # A step that is no normal number, or vanishes beside the values, would come back in fewer levels.
    held = high == low or step >= max(limits.tiny, limits.eps * max(abs(low), abs(high)))
    return {"low": low, "high": high, "step": step} if held else None


def _first_line(content: bytes) -> bytes:
    return b'{"format": %d, "crc32": "%08x"}\n' % (FORMAT, zlib.crc32(content))


def _sync(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


def _source(name: str, value: Any, case: Mapping[str, Any]) -> Any:
    """Where a value of a bag comes from: the image's file, the case, or what is written here."""
    if name == "image":
        return {"image": None}
    return {"case": None} if name in case and case[name] is value else _encoded(value, name)


def _encoded(value: Any, name: str) -> Any:
    """JSON from which `_decoded` makes the value again; dictionaries with one key stand for what JSON lacks."""
    if type(value) in PLAIN:
        return value
    if isinstance(value, str):
        return str.__str__(value)
    if type(value) is list:
        return [_encoded(item, name) for item in value]
    if type(value) is tuple:
        return {"tuple": [_encoded(item, name) for item in value]}
    if type(value) is dict:
        return {"dict": [[_encoded(key, name), _encoded(item, name)] for key, item in value.items()]}
    kind = "tensor" if type(value) is Tensor else "scalar" if isinstance(value, np.generic) else "array"
    if kind == "array" and type(value) is not np.ndarray:
        raise _unknown(name, value)
    array = np.asarray(value.detach().cpu() if kind == "tensor" else value)
    if array.dtype.kind not in "biufc":
        raise _unknown(name, value)
    content = base64.b64encode(np.ascontiguousarray(array).tobytes()).decode()
    return {kind: [array.dtype.str, list(array.shape), content]}


def _decoded(value: Any) -> Any:
    if isinstance(value, list):
        return [_decoded(item) for item in value]
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "tuple":
        return tuple(_decoded(item) for item in content)
    if kind == "dict":
        return {_decoded(key): _decoded(item) for key, item in content}
    dtype, shape, text = content
    array = np.frombuffer(bytearray(base64.b64decode(text)), dtype).reshape(shape)
    return torch.from_numpy(array) if kind == "tensor" else array[()] if kind == "scalar" else array


def _unknown(name: str, value: Any) -> InputError:
    return InputError(
        f"the preparation gives {name} as {type(value).__name__}, which the slice cache cannot keep: give a tensor, "
        "number, text, list or dictionary, or set cache_dir to null"
    )
