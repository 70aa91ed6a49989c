"""An NRRD file → one checked volume, or a refusal with its reason.

The header is parsed here first, by the letter (teem.sourceforge.net/nrrd/format.html): itk keeps the axes of a space it
does not know as if they were LPS, takes missing directions for the identity and a missing origin for 0, and drops
space units. The voxels are then decoded by itk, and `read_with_itk` says what is checked around it.
"""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..errors import Refusal
from .grid import check_axes, check_matrix, check_shape, check_sizes, not_3d, other_units
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

__all__ = ["is_nrrd_name", "read_nrrd"]

TYPE_BYTES = {
    1: "signed char, int8, int8_t, uchar, unsigned char, uint8, uint8_t",
    2: "short, short int, signed short, signed short int, int16, int16_t, ushort, unsigned short, unsigned short int, "
    "uint16, uint16_t",
    4: "int, signed int, int32, int32_t, uint, unsigned int, uint32, uint32_t, float",
    8: "longlong, long long, long long int, signed long long, signed long long int, int64, int64_t, ulonglong, "
    "unsigned long long, unsigned long long int, uint64, uint64_t, double",
}
BYTES_OF = {name: size for size, names in TYPE_BYTES.items() for name in names.split(", ")}
# What the file's axes must be multiplied by to be RAS.
SPACES = {
    "left-posterior-superior": (-1, -1, 1), "lps": (-1, -1, 1),
    "right-anterior-superior": (1, 1, 1), "ras": (1, 1, 1),
    "left-anterior-superior": (-1, 1, 1), "las": (-1, 1, 1),
}  # fmt: skip
PACKING = {"raw": None, "gzip": "gzip", "gz": "gzip"}
# Fields as the format lists them, without their spaces, which may be left out.
FIELDS = {
    "content", "number", "type", "blocksize", "dimension", "space", "spacedimension", "sizes", "spacings",
    "thicknesses", "axismins", "axismaxs", "spacedirections", "centers", "centerings", "kinds", "labels", "units",
    "min", "max", "oldmin", "oldmax", "endian", "encoding", "lineskip", "byteskip", "sampleunits", "datafile",
    "spaceunits", "spaceorigin", "measurementframe",
}  # fmt: skip
SPATIAL_KINDS = ("domain", "space", "???", "none")
CHANNEL_KINDS = re.compile(r"list|vector|covariant-vector|[234]-vector")
VECTOR = re.compile(r"none|\(([^()]*)\)")


def is_nrrd_name(path: Path) -> bool:
    """Whether a file is called .nrrd or .nhdr."""
    return path.name.lower().endswith((".nrrd", ".nhdr"))


def read_nrrd(path: Path, policy: ReaderPolicy, channels: int = 1) -> Volume:
    """Read one NRRD file that holds its voxels (.nrrd).

    Args:
        path: the file.
        policy: limits of what is accepted.
        channels: the expected number of channels; more than 1 is the axis without a direction.

    Returns:
        The volume; array (X, Y, Z), or (X, Y, Z, C) where `channels` > 1.

    Raises:
        Refusal: `file_damaged`, `file_truncated`, `file_excess`, `detached_data`, `encoding`, `not_3d`,
            `channel_count`, `voxel_type`, `units`, `bad_spacing`, `bad_affine`, `bad_scaling`, `no_orientation`,
            `position_absent`, `sheared`, `gantry_tilt`, `non_finite`, `too_few_slices`, `too_large`.
    """
    with readable("NRRD"):
        lines, offset = header_lines(path, "NRRD", _is_last)
        fields = _fields(lines)
        vectors = _directions(fields)
        shape = _shape(fields, vectors, policy, channels)
        voxel_bytes = _voxel_bytes(fields)
        header = TextHeader(
            name="NRRD",
            shape=shape,
            axes=3,
            voxel_bytes=voxel_bytes,
            offset=offset,
            packing=_packing(fields),
            affine=_affine(fields, vectors, policy),
        )
        return read_with_itk(path, header)


def _split(line: str) -> tuple[str, str] | None:
    key, _, value = line.partition(":")
    key = key.lower().replace(" ", "")
    return (key, value.strip(" \t")) if key in FIELDS and value.startswith(" ") else None


def _is_last(line: str) -> bool:
    # The names of detached files may follow without an end.
    return not line or (_split(line) or ("",))[0] == "datafile"


def _fields(lines: list[str]) -> dict[str, str]:
    if not re.fullmatch("NRRD000[1-5]", lines[0]):
        raise damaged("NRRD", "it does not begin with NRRD0001 to NRRD0005")
    fields: dict[str, str] = {}
    for line in lines[1:]:
        found = _split(line)
        if not line or line.startswith("#") or (found is None and re.match("[^:]*:=", line)):
            continue
        if found is None:
            raise damaged("NRRD", "a line of its header is no field, key or comment")
        if found[0] in fields:
            raise damaged("NRRD", f"its header gives {found[0]} twice")
        fields[found[0]] = found[1]
    if "datafile" in fields:
        raise detached("NRRD", "one .nrrd file")
    for name in ("spacings", "axismins", "axismaxs", "units", "spacedimension"):
        if name in fields and "spacedirections" in fields:
            raise damaged("NRRD", f"its header gives {name} besides its directions in space")
    return fields


def _directions(fields: dict[str, str]) -> list[NDArray[np.float64] | None]:
    """The direction of each stored axis, (3,) in the file's space, or None for channels."""
    axes = as_count(required(fields, "dimension", "NRRD"), "NRRD", "number of dimensions")
    if axes not in (3, 4):
        raise not_3d(axes)
    if fields.get("space", "").lower() not in SPACES or "spacedirections" not in fields:
        raise Refusal(
            "no_orientation",
            "The header does not say how its axes lie in the body (space directions, and a space of left-posterior-"
            "superior, right-anterior-superior or left-anterior-superior), so left and right are unknown; "
            "export it again.",
        )
    vectors = _vectors(fields["spacedirections"], axes)
    spatial = sum(vector is not None for vector in vectors)
    if spatial != 3:
        raise Refusal("not_3d", f"{spatial} axes of the image have a direction; a volume has 3.", axes=spatial)
    return vectors


def _vectors(text: str, count: int) -> list[NDArray[np.float64] | None]:
    words = [found[0] for found in VECTOR.finditer(text)]
    if VECTOR.sub("", text).strip(" \t") or len(words) != count:
        raise damaged("NRRD", "its header gives directions or an origin that are no vectors")
    vectors = [None if word == "none" else as_numbers(w.strip(" ") for w in word[1:-1].split(",")) for word in words]
    if any(vector is not None and len(vector) != 3 for vector in vectors):
        raise damaged("NRRD", "its header gives directions or an origin of other than 3 numbers")
    return vectors


def _shape(
    fields: dict[str, str], vectors: list[NDArray[np.float64] | None], policy: ReaderPolicy, channels: int
) -> tuple[int, ...]:
    sizes = [as_count(word, "NRRD", "size") for word in required(fields, "sizes", "NRRD").split()]
    kinds = fields["kinds"].split() if "kinds" in fields else ["domain"] * len(vectors)
    if len(sizes) != len(vectors) or len(kinds) != len(vectors):
        raise damaged("NRRD", "its header contradicts itself on the number of dimensions")
    spatial = [size for size, vector in zip(sizes, vectors, strict=True) if vector is not None]
    for size, kind, vector in zip(sizes, kinds, vectors, strict=True):
        if vector is not None and kind.lower() not in SPATIAL_KINDS:
            raise Refusal("not_3d", "An axis that has a direction is of a kind (time, list) that has none.")
        if vector is None:
            if kind.lower() in SPATIAL_KINDS:
                raise damaged("NRRD", "its header does not say what the axis without a direction is (kinds)")
            if not CHANNEL_KINDS.fullmatch(kind.lower()):
                raise voxel_type()
            spatial.append(size)
    return check_shape(spatial, policy, channels)


def _voxel_bytes(fields: dict[str, str]) -> int:
    kind = required(fields, "type", "NRRD").lower()
    if kind == "block":
        raise voxel_type()
    if kind not in BYTES_OF:
        raise damaged("NRRD", "its voxel type is unknown")
    if fields.get("endian", "little" if BYTES_OF[kind] == 1 else "").lower() not in ("little", "big"):
        raise damaged("NRRD", "its header does not give the order of bytes (endian)")
    if "oldmin" in fields or "oldmax" in fields:
        raise Refusal("bad_scaling", "The voxel values were scaled (old min, old max); export real values.")
    return BYTES_OF[kind]


def _packing(fields: dict[str, str]) -> str | None:
    encoding = required(fields, "encoding", "NRRD").lower()
    if encoding not in PACKING:
        raise Refusal("encoding", "The voxels are neither raw nor gzip; export the image in one of these encodings.")
    if any(fields.get(name, "0") != "0" for name in ("lineskip", "byteskip")):
        raise Refusal("encoding", "Bytes are to be skipped before the voxels (byte skip, line skip); export it again.")
    return PACKING[encoding]


def _affine(
    fields: dict[str, str], vectors: list[NDArray[np.float64] | None], policy: ReaderPolicy
) -> NDArray[np.float64]:
    if "spaceunits" in fields and fields["spaceunits"].split() != ['"mm"'] * 3:
        raise other_units()
    origin = _vectors(fields.get("spaceorigin", "none"), 1)[0]
    if origin is None:
        raise Refusal(
            "position_absent",
            "The header does not say where the image lies (space origin), and nothing is assumed; export it again.",
        )
    affine = np.eye(4)
    affine[:3, :3] = np.stack([vector for vector in vectors if vector is not None], axis=1)
    affine[:3, 3] = origin
    affine = np.diag([*SPACES[fields["space"].lower()], 1.0]) @ affine
    check_matrix(affine)
    check_sizes(np.linalg.norm(affine[:3, :3], axis=0), policy)
    check_axes(affine, policy)
    return affine
