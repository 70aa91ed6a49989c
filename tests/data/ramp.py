"""Volumes whose intensity is an affine function of the place in the body, and what a reader makes of them."""

from __future__ import annotations

import json
import math
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from bundle.data.policy import ReaderPolicy
from bundle.data.volume import Volume
from bundle.errors import Refusal

Reader = Callable[..., Volume]
CANARY = "Q7ZKX"
PER_MM = np.array([2.0, 3.0, 5.0])
CONSTANT = 30.0
# Values are rounded (0.5), and places may be off by the policy's 0.1 mm (0.62).
LARGEST_ERROR = 1.5


def ramp(affine: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """(X, Y, Z) intensity at each voxel's place in RAS+ mm."""
    index = np.stack(np.meshgrid(*map(np.arange, shape[:3]), indexing="ij"), axis=-1)
    return (index @ affine[:3, :3].T + affine[:3, 3]) @ PER_MM + CONSTANT


def stored(affine: np.ndarray, shape: tuple[int, ...] = (7, 6, 5)) -> np.ndarray:
    values = np.rint(ramp(affine, shape))
    assert (values < 0).any()
    assert (values > 0).any()
    return values.astype(np.int16)


def verdict(read: Reader, path: Path) -> str:
    """The code of a refusal, "agrees", or "wrong" where a volume's voxels are not where its affine says."""
    try:
        volume = read(path, ReaderPolicy())
    except Refusal as refusal:
        return refusal.code
    error = np.abs(volume.array - ramp(volume.affine, volume.array.shape)).max()
    return "agrees" if error < LARGEST_ERROR else "wrong"


def refused(read: Reader, path: Path, channels: int = 1, policy: ReaderPolicy | None = None) -> Refusal:
    with pytest.raises(Refusal) as caught:
        read(path, policy or ReaderPolicy(), channels)
    assert caught.value.sentence.endswith(".")
    said = caught.value.sentence + json.dumps(caught.value.facts)
    assert str(path) not in said
    assert path.name not in said
    assert CANARY not in said
    return caught.value


def check_small_memory(read: Reader, path: Path, largest: int = 60 << 20) -> None:
    """A file that holds less than its header declares is refused in bounded memory."""
    tracemalloc.start()
    try:
        assert refused(read, path).code == "file_truncated"
        assert tracemalloc.get_traced_memory()[1] < largest
    finally:
        tracemalloc.stop()


def check_leaning(read: Reader, path: Path, affine: np.ndarray, choice: str) -> None:
    """A volume whose third axis leans is read as it is, or refused where the policy says so."""
    policy = ReaderPolicy(gantry_tilt=choice)
    if choice == "refuse":
        assert refused(read, path, policy=policy).code == "gantry_tilt"
    else:
        np.testing.assert_allclose(read(path, policy).affine, affine, atol=1e-5)


def check_policy(read: Reader, path: Path) -> None:
    """A single picture of 42 × 5 voxels, the first axis below 1 mm."""
    assert read(path, ReaderPolicy(min_slices=1)).array.shape == (42, 5, 1)
    assert refused(read, path, policy=ReaderPolicy(min_slices=1, max_voxels=100)).code == "too_large"
    assert refused(read, path, policy=ReaderPolicy(min_slices=1, spacing_range_mm=(1, 9))).code == "bad_spacing"
    assert refused(read, path).code == "too_few_slices"


def turned(degrees: float, lean: float = 0, mirrored: bool = False) -> np.ndarray:
    """(4, 4): an oblique affine with voxels of 0.8 × 0.9 × 2.5 mm whose third axis leans by `lean` degrees."""
    a, b = math.radians(degrees), math.radians(degrees / 2)
    rotation = np.array([[math.cos(a), -math.sin(a), 0], [math.sin(a), math.cos(a), 0], [0, 0, 1]]) @ np.array(
        [[1, 0, 0], [0, math.cos(b), -math.sin(b)], [0, math.sin(b), math.cos(b)]]
    )
    tilt = math.radians(lean)
    axes = np.array([[1, 0, 0], [0, 1, math.sin(tilt)], [0, 0, math.cos(tilt)]]) * [0.8, 0.9, 2.5]
    affine = np.eye(4)
    affine[:3, :3] = rotation @ axes
    if mirrored:
        affine[:3, 0] *= -1
    affine[:3, 3] = 12, -30, 4
    return affine


def fields_that_go_wrong(
    read: Reader, path: Path, header: list[bytes], block: bytes, plausible: list[bytes], mutants: int
) -> set[str]:
    """The fields of a text header whose change made a reader return voxels where its affine does not say they are.

    Args:
        read: the reader.
        path: where to write the damaged files.
        header: its lines, with their ends.
        block: what follows them.
        plausible: values that may be right elsewhere.
        mutants: how many to try.
    """
    rng = np.random.default_rng(0)
    wrong, verdicts = set(), set()
    for _ in range(mutants):
        number = int(rng.integers(len(header)))
        line = header[number].rstrip(b"\n")
        start = max(line.find(b"=") + 1, line.find(b":") + 1)
        changed = bytearray(line)
        place = int(rng.integers(len(line) + 1))
        change = rng.integers(7)
        if change == 0:
            changed[place : place + 1] = bytes([rng.integers(256)])
        elif change == 1:
            changed[place : place + 1] = bytes([rng.integers(32, 127)])
        elif change == 2:
            del changed[place : place + 1]
        elif change == 3 and start:
            changed[start:] = b" " + plausible[rng.integers(len(plausible))]
        elif change == 4 and start:
            words = line[start:].split()
            rng.shuffle(words)
            changed[start:] = b" " + b" ".join(words)
        elif change == 5:
            changed += b"\n" + header[rng.integers(len(header) - 1)].rstrip(b"\n")
        else:
            digits = [i for i in range(start, len(line)) if line[i : i + 1].isdigit()]
            if digits:
                changed[rng.choice(digits)] = rng.integers(ord("0"), ord("9") + 1)
        lines = [*header[:number], bytes(changed) + b"\n", *header[number + 1 :]]
        path.write_bytes(b"".join(lines) + block)
        found = verdict(read, path)
        verdicts.add(found)
        if found == "wrong":
            wrong.add(line[: start - 1].strip().decode())
    assert len(verdicts) > 6  # many reasons were met
    assert "agrees" in verdicts
    return wrong
