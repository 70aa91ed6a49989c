"""A MetaImage file → one checked volume, or a refusal with its reason.

The header is parsed here first, by the letter: itk takes a missing matrix for the identity, a missing offset for 0, a
missing spacing for ElementSize or 1, the last of two equal keys, and turns an axis round for a negative spacing. The
voxels are then decoded by itk, and `read_with_itk` says what is checked around it.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..errors import Refusal
from .grid import check_axes, check_matrix, check_shape, check_sizes, check_stated_sizes, not_3d, other_units
from .policy import ReaderPolicy
from .raster import (
    TextHeader,
    as_count,
    as_numbers,
    damaged,
    detached,
    header_lines,
    read_with_itk,
    readable,
    required,
    voxel_type,
)
from .volume import Volume

__all__ = ["is_metaimage_name", "read_metaimage"]

# Bytes of one number as itk reads it on every system; it takes MET_LONG for 4.
TYPE_BYTES = {
    "MET_CHAR": 1, "MET_UCHAR": 1, "MET_SHORT": 2, "MET_USHORT": 2, "MET_INT": 4, "MET_UINT": 4, "MET_LONG": 4,
    "MET_ULONG": 4, "MET_LONG_LONG": 8, "MET_ULONG_LONG": 8, "MET_FLOAT": 4, "MET_DOUBLE": 8,
}  # fmt: skip
SYNONYMS = {
    "Rotation": "TransformMatrix",
    "Orientation": "TransformMatrix",
    "Position": "Offset",
    "Origin": "Offset",
    "ElementByteOrderMSB": "BinaryDataByteOrderMSB",
}
# Keys that change what the voxels or places mean. All others are free text, and nothing here reads or repeats them.
MEANINGFUL = {
    "ObjectType", "NDims", "BinaryData", "BinaryDataByteOrderMSB", "CompressedData", "CompressedDataSize",
    "TransformMatrix", "Offset", "CenterOfRotation", "AnatomicalOrientation", "ElementSpacing", "ElementSize",
    "DimSize", "HeaderSize", "ElementNumberOfChannels", "ElementType", "ElementDataFile", "DistanceUnits",
    "ElementToIntensityFunctionSlope", "ElementToIntensityFunctionOffset", *SYNONYMS,
}  # fmt: skip
GEOMETRY = {
    "ElementSpacing": ("spacing_absent", "how far apart voxels are"),
    "TransformMatrix": ("no_orientation", "how the image lies in the body"),
    "Offset": ("position_absent", "where the image lies"),
}
SPELLING = {key.lower(): key for key in MEANINGFUL}
# LPS coordinates of where an axis comes from, by its letter.
FROM = {"R": (1, 0, 0), "L": (-1, 0, 0), "A": (0, 1, 0), "P": (0, -1, 0), "I": (0, 0, 1), "S": (0, 0, -1)}
# itk assigns letters greedily: over 5,000 rotations and mirrors, an axis and its letter had cosines from 0.33.
SMALLEST_COSINE = 0.2


def is_metaimage_name(path: Path) -> bool:
    """Whether a file is called .mha or .mhd."""
    return path.name.lower().endswith((".mha", ".mhd"))


def read_metaimage(path: Path, policy: ReaderPolicy, channels: int = 1) -> Volume:
    """Read one MetaImage file that holds its voxels (.mha). Its positions are LPS mm, by itk's convention.

    Args:
        path: the file.
        policy: limits of what is accepted.
        channels: the expected number of channels; more than 1 is a fourth axis, or numbers side by side in a voxel
            (ElementNumberOfChannels).

    Returns:
        The volume; array (X, Y, Z), or (X, Y, Z, C) where `channels` > 1.

    Raises:
        Refusal: `file_damaged`, `file_truncated`, `file_excess`, `detached_data`, `encoding`, `not_3d`,
            `channel_count`, `voxel_type`, `units`, `bad_spacing`, `bad_affine`, `bad_scaling`, `no_orientation`,
            `position_absent`, `spacing_absent`, `affines_disagree`, `spacing_disagrees`, `sheared`, `gantry_tilt`,
            `non_finite`, `too_few_slices`, `too_large`.
    """
    with readable("MetaImage"):
        lines, offset = header_lines(path, "MetaImage", _is_last)
        fields = _fields(lines)
        axes, shape = _shape(fields, policy, channels)
        voxel_bytes = _voxel_bytes(fields)
        affine = _affine(fields, axes, policy)
        packed = _packed(fields, path.stat().st_size - offset)
        header = TextHeader(
            name="MetaImage",
            shape=shape,
            axes=axes,
            voxel_bytes=voxel_bytes,
            offset=offset,
            packing="zlib" if packed else None,
            affine=affine,
        )
        return read_with_itk(path, header)


def _split(line: str) -> tuple[str, str] | None:
    key, equals, value = line.partition("=")
    key = key.strip(" \t")
    # itk takes a colon for an equals sign.
    return (key, value.strip(" \t")) if equals and key and ":" not in key else None


def _is_last(line: str) -> bool:
    return (_split(line) or ("",))[0] == "ElementDataFile"


def _fields(lines: list[str]) -> dict[str, str]:
    fields: dict[str, str] = {}
    seen: set[str] = set()
    for line in lines:
        if not line.strip(" \t"):
            continue
        found = _split(line)
        if found is None:
            raise damaged("MetaImage", "a line of its header is not of the form key = value")
        key, value = found
        if SPELLING.get(key.lower(), key) != key:
            raise damaged("MetaImage", "a key of its header is spelt with wrong capitals")
        if key not in MEANINGFUL:
            continue
        meaning = SYNONYMS.get(key, key)
        if key in seen or fields.get(meaning, value) != value:
            raise damaged("MetaImage", f"its header gives {meaning} twice")
        seen.add(key)
        fields[meaning] = value
    if fields.get("ObjectType") != "Image":
        raise damaged("MetaImage", "its header does not say ObjectType = Image")
    if fields["ElementDataFile"] != "LOCAL":
        if "LOCAL".startswith(fields["ElementDataFile"]):
            raise damaged("MetaImage", "its header is cut short")
        raise detached("MetaImage", "one .mha file")
    return fields


def _flag(fields: dict[str, str], key: str, absent: str | None = None) -> bool:
    value = fields.get(key, absent) or required(fields, key, "MetaImage")
    if value.lower() not in ("true", "false"):
        raise damaged("MetaImage", f"{key} in its header is neither True nor False")
    return value.lower() == "true"


def _shape(fields: dict[str, str], policy: ReaderPolicy, channels: int) -> tuple[int, tuple[int, ...]]:
    axes = as_count(required(fields, "NDims", "MetaImage"), "MetaImage", "number of dimensions")
    if axes not in (3, 4):
        raise not_3d(axes)
    sizes = [as_count(word, "MetaImage", "size") for word in required(fields, "DimSize", "MetaImage").split()]
    if len(sizes) != axes:
        raise damaged("MetaImage", "its header contradicts itself on the number of dimensions")
    numbers = as_count(fields.get("ElementNumberOfChannels", "1"), "MetaImage", "number of channels")
    if numbers > 1 and axes == 4 and sizes[3] == 1:
        sizes.pop()
    return axes, check_shape(sizes + [numbers] * (numbers > 1), policy, channels)


def _voxel_bytes(fields: dict[str, str]) -> int:
    kind = required(fields, "ElementType", "MetaImage")
    if kind not in TYPE_BYTES:
        if kind.startswith("MET_"):
            raise voxel_type()
        raise damaged("MetaImage", "its voxel type is unknown")
    if not _flag(fields, "BinaryData"):
        raise Refusal("encoding", "The voxels are written as text; export the image with binary voxels.")
    # Without it, itk takes the order of the computer that reads.
    _flag(fields, "BinaryDataByteOrderMSB", absent="False" if TYPE_BYTES[kind] == 1 else None)
    if fields.get("HeaderSize", "0") != "0":
        raise Refusal("encoding", "Bytes are to be skipped before the voxels (HeaderSize); export the image again.")
    for key, neutral in (("ElementToIntensityFunctionSlope", 1), ("ElementToIntensityFunctionOffset", 0)):
        if key in fields and as_numbers([fields[key]])[0] != neutral:
            raise Refusal(
                "bad_scaling", f"The header scales voxel values ({key}), which itk passes over; export real values."
            )
    return TYPE_BYTES[kind]


def _numbers(fields: dict[str, str], key: str, count: int) -> NDArray[np.float64]:
    if key not in fields:
        code, what = GEOMETRY[key]
        raise Refusal(code, f"The header does not say {what} ({key}), and nothing is assumed; export the image again.")
    words = fields[key].split()
    if len(words) != count:
        raise damaged("MetaImage", f"{key} in its header has not {count} numbers")
    return as_numbers(words)


def _affine(fields: dict[str, str], axes: int, policy: ReaderPolicy) -> NDArray[np.float64]:
    if fields.get("DistanceUnits", "mm") not in ("mm", "?"):
        raise other_units()
    spacing = _numbers(fields, "ElementSpacing", axes)
    # A row of the file is the direction of an axis: the numbers run down the columns of itk's matrix.
    directions = _numbers(fields, "TransformMatrix", axes * axes).reshape(axes, axes)
    origin = _numbers(fields, "Offset", axes)
    centre = _numbers(fields, "CenterOfRotation", axes) if "CenterOfRotation" in fields else np.zeros(axes)
    check_sizes(spacing[:3], policy)
    if np.any(directions[:3, 3:]) or np.any(directions[3:, :3]):
        raise Refusal("bad_affine", "The orientation of the file turns space into channels or time; export it again.")
    affine = np.eye(4)
    affine[:3, :3] = directions[:3, :3].T
    affine[:3, 3] = origin[:3]
    check_matrix(affine)
    affine[:3, :3] *= spacing[:3]
    check_stated_sizes(affine, spacing[:3], policy)
    check_axes(affine, policy)
    if np.any(centre):
        raise Refusal(
            "affines_disagree",
            "The header turns the image about a point (CenterOfRotation), which some readers heed and some do not; "
            "export it again with its position in Offset alone.",
        )
    _check_letters(fields.get("AnatomicalOrientation", "?"), affine, axes)
    return np.diag([-1.0, -1, 1, 1]) @ affine


def _check_letters(letters: str, affine: NDArray[np.float64], axes: int) -> None:
    """Refuse letters that contradict the matrix.

    MetaIO's document has them say where axes run to, and itk writes where they come from; both pass.
    """
    if "?" in letters:
        return
    if len(letters) != axes or not set(letters[:3]) <= set(FROM):
        raise damaged("MetaImage", "AnatomicalOrientation in its header is none")
    directions = affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0)
    cosines = np.einsum("ij,ji->i", np.array([FROM[letter] for letter in letters[:3]]), directions)
    if not ((cosines > SMALLEST_COSINE).all() or (cosines < -SMALLEST_COSINE).all()):
        raise Refusal(
            "affines_disagree",
            "The two orientations in the header (TransformMatrix and AnatomicalOrientation) contradict each other; "
            "export the image again.",
        )


def _packed(fields: dict[str, str], available: int) -> bool:
    if not _flag(fields, "CompressedData", absent="False"):
        return False
    # Without it, itk returns other voxels than were packed, and no error.
    declared = as_count(required(fields, "CompressedDataSize", "MetaImage"), "MetaImage", "size of its packed voxels")
    if declared != available:
        few = available < declared
        raise Refusal(
            "file_truncated" if few else "file_excess",
            f"The file holds {available} bytes of packed voxels and its header declares {declared}; copy or export it "
            "again.",
            declared_bytes=declared,
            found_bytes=available,
        )
    return True
