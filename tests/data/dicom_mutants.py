"""Damaged headers: one DICOM file → mutants of it, by chance from a seed or every usual damage of every element."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

__all__ = ["KINDS", "Element", "elements", "every_damage", "mutant"]

LONG_VRS = (b"OB", b"OW", b"OF", b"OD", b"OL", b"OV", b"SQ", b"UN", b"UC", b"UR", b"UT", b"SV", b"UV")
PIXEL_DATA = b"\xe0\x7f\x10\x00"


@dataclass(frozen=True)
class Element:
    """Where the parts of one explicit VR little endian element lie in a file."""

    start: int
    vr: bytes
    length_at: int
    length_size: int
    value_at: int
    end: int


def elements(content: bytes) -> list[Element]:
    """The elements at the top level of a file up to its pixel data, without it."""
    found, at = [], 132
    while at < len(content) and content[at : at + 4] != PIXEL_DATA:
        vr = content[at + 4 : at + 6]
        length_at, size = (at + 8, 4) if vr in LONG_VRS else (at + 6, 2)
        value_at = length_at + size
        end = value_at + int.from_bytes(content[length_at:value_at], "little")
        found.append(Element(at, vr, length_at, size, value_at, end))
        at = end
    return found


Mutate = Callable[[bytearray, list[Element], np.random.Generator], bytes]


def random_bytes(content: bytearray, parts: list[Element], rng: np.random.Generator) -> bytes:
    for place in rng.integers(128, parts[-1].end + 12, rng.integers(1, 4)):
        content[place] = rng.integers(0, 256)
    return bytes(content)


def flipped_bits(content: bytearray, parts: list[Element], rng: np.random.Generator) -> bytes:
    for place in rng.integers(128, parts[-1].end + 12, rng.integers(1, 3)):
        content[place] ^= 1 << rng.integers(0, 8)
    return bytes(content)


def inserted(content: bytearray, parts: list[Element], rng: np.random.Generator) -> bytes:
    place = int(rng.integers(128, parts[-1].end + 12))
    content[place:place] = rng.bytes(int(rng.integers(1, 5)))
    return bytes(content)


def deleted(content: bytearray, parts: list[Element], rng: np.random.Generator) -> bytes:
    place = int(rng.integers(128, parts[-1].end + 12))
    del content[place : place + int(rng.integers(1, 5))]
    return bytes(content)


def truncated(content: bytearray, parts: list[Element], rng: np.random.Generator) -> bytes:
    return bytes(content[: rng.integers(0, len(content))])


def swapped(content: bytearray, parts: list[Element], rng: np.random.Generator) -> bytes:
    first, second = sorted(rng.choice(len(parts), 2, replace=False))
    a, b = parts[first], parts[second]
    return bytes(
        content[: a.start] + content[b.start : b.end] + content[a.end : b.start] + content[a.start : a.end]
        + content[b.end :]
    )  # fmt: skip


def dropped(content: bytearray, parts: list[Element], rng: np.random.Generator) -> bytes:
    part = parts[rng.integers(len(parts))]
    return bytes(content[: part.start] + content[part.end :])


def doubled(content: bytearray, parts: list[Element], rng: np.random.Generator) -> bytes:
    part, target = parts[rng.integers(len(parts))], parts[rng.integers(len(parts))]
    return bytes(content[: target.start] + content[part.start : part.end] + content[target.start :])


def lengths(content: bytearray, parts: list[Element], rng: np.random.Generator) -> bytes:
    part = parts[rng.integers(len(parts))]
    length = part.end - part.value_at
    limit = (1 << 8 * part.length_size) - 1
    choices = [0, 1, length + 2, max(0, length - 2), length * 2, limit, limit - 1, int(rng.integers(0, limit))]
    new = min(limit, choices[rng.integers(len(choices))])
    content[part.length_at : part.value_at] = new.to_bytes(part.length_size, "little")
    return bytes(content)


def kinds_of_value(content: bytearray, parts: list[Element], rng: np.random.Generator) -> bytes:
    part = parts[rng.integers(len(parts))]
    codes = [b"DS", b"IS", b"US", b"SS", b"UI", b"LO", b"SQ", b"UN", b"OB", b"FD", b"AT", b"??"]
    content[part.start + 4 : part.start + 6] = codes[rng.integers(len(codes))]
    return bytes(content)


def digits(content: bytearray, parts: list[Element], rng: np.random.Generator) -> bytes:
    part = _one_of(parts, (b"DS", b"IS"), rng)
    place = int(rng.integers(part.value_at, part.end))
    content[place] = b"0123456789.-+eE \\"[rng.integers(17)]
    return bytes(content)


def numbers(content: bytearray, parts: list[Element], rng: np.random.Generator) -> bytes:
    part = _one_of(parts, (b"US", b"SS"), rng)
    value = [0, 1, 7, 8, 15, 16, 0x7FFF, 0x8000, 0xFFFF, int(rng.integers(1 << 16))][rng.integers(10)]
    content[part.value_at : part.value_at + 2] = value.to_bytes(2, "little")
    return bytes(content)


def uids(content: bytearray, parts: list[Element], rng: np.random.Generator) -> bytes:
    part = _one_of(parts, (b"UI",), rng)
    content[int(rng.integers(part.value_at, part.end))] = b"0123456789.A\0 "[rng.integers(14)]
    return bytes(content)


def zeroed(content: bytearray, parts: list[Element], rng: np.random.Generator) -> bytes:
    place = int(rng.integers(0, parts[-1].end))
    size = min(int(rng.choice([4, 16, 64, 512])), parts[-1].end - place)
    content[place : place + size] = bytes(size)
    return bytes(content)


def _one_of(parts: list[Element], vrs: tuple[bytes, ...], rng: np.random.Generator) -> Element:
    fitting = [p for p in parts if p.vr in vrs and p.end > p.value_at]
    return fitting[rng.integers(len(fitting))]


KINDS: tuple[Mutate, ...] = (
    random_bytes, flipped_bits, inserted, deleted, truncated, swapped, dropped, doubled, lengths, kinds_of_value,
    digits, numbers, uids, zeroed,
)  # fmt: skip


def mutant(content: bytes, seed: int) -> tuple[str, bytes]:
    """The name of what was done, and the damaged file."""
    rng = np.random.default_rng([7, seed])
    kind = KINDS[rng.integers(len(KINDS))]
    return kind.__name__, kind(bytearray(content), elements(content), rng)


def every_damage(content: bytes) -> Iterator[tuple[str, bytes]]:
    """Each element lost, emptied, overwritten, doubled, moved, cut, and each of its numbers changed a little."""
    for part in elements(content):
        before, value, after = content[: part.start], content[part.value_at : part.end], content[part.end :]
        whole = content[part.start : part.end]

        def with_value(new: bytes, part: Element = part, before: bytes = before, after: bytes = after) -> bytes:
            padded = new + b" " * (len(new) % 2)
            size = len(padded).to_bytes(part.length_size, "little")
            return before + content[part.start : part.length_at] + size + padded + after

        found = {
            "lost": before + after,
            "emptied": with_value(b""),
            "blank": with_value(b" " * len(value)),
            "zero bytes": with_value(bytes(len(value))),
            "ones": with_value(b"\xff" * len(value)),
            "half of it": with_value(value[: len(value) // 4 * 2]),
            "its value twice": with_value(value + value),
            "two values": with_value(value + b"\\" + value),
            "there twice": before + whole + whole + after,
            "moved to the end": before + after + whole,
            "cut": content[: part.value_at],
        }
        found |= {f"value {number}": with_value(number) for number in _other_values(part, value)}  # type: ignore[str-bytes-safe]
        for name, damaged in found.items():
            if damaged != content:
                yield f"{content[part.start : part.start + 4].hex()} {name}", damaged


def _other_values(part: Element, value: bytes) -> list[bytes]:
    if part.vr == b"US":
        return [n.to_bytes(2, "little") for n in (0, 1, 2, 3, 7, 8, 12, 15, 16, 17, 255, 256, 65535)]
    if part.vr not in (b"DS", b"IS"):
        return []
    parts = value.split(b"\\")
    others = [b"\\".join([text] * len(parts)) for text in (b"1", b"0", b"1e30", b"1e-30", b"NaN", b"abc")]
    for place, text in enumerate(parts):
        number = float(text)
        changed = (b"%.6g" % one for one in (number + 1, number * 1.1, -number, number + 0.2))
        others += [b"\\".join([*parts[:place], one, *parts[place + 1 :]]) for one in changed]
    return others
