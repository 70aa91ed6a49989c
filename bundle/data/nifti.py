"""A NIfTI file → one checked volume, or a refusal with its reason."""

from __future__ import annotations

import gzip
import math
import zlib
from pathlib import Path
from typing import Any, BinaryIO

import nibabel as nib
import numpy as np
from numpy.typing import NDArray

from ..errors import Refusal
from .grid import check_axes, check_matrix, check_shape, check_sizes, check_stated_sizes, corner_distance, other_units
from .policy import ReaderPolicy
from .raster import (
    CHUNK_BYTES,
    check_finite,
    check_length,
    check_room,
    damaged,
    detached,
    readable,
    voxel_type,
)
from .volume import Volume

__all__ = ["has_nifti_content", "is_nifti_name", "read_nifti"]

HEADER_BYTES = {1: 348, 2: 540}
SINGLE_FILE_MAGIC = (b"n+1\0", b"n+2\0")
PAIR_MAGIC = (b"ni1\0", b"ni2\0")
UNIT_MM, UNIT_UNKNOWN = 2, 0
# Header extensions (text) seldom reach a megabyte.
LARGEST_OFFSET = 1 << 26


def is_nifti_name(path: Path) -> bool:
    """Whether a file is called .nii or .nii.gz."""
    return path.name.lower().endswith((".nii", ".nii.gz"))


def has_nifti_content(path: Path) -> bool:
    """Whether a file begins with a NIfTI header, packed or not."""
    try:
        with _open(path) as file:
            block = file.read(HEADER_BYTES[2])
    except (OSError, EOFError, zlib.error):
        return False
    return _magic(block) in SINGLE_FILE_MAGIC + PAIR_MAGIC


def _magic(block: bytes) -> bytes:
    if len(block) < HEADER_BYTES[1]:
        return b""
    return block[4:8] if block[4:7] in (b"n+2", b"ni2") else block[344:348]


def _is_packed(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(2) == b"\x1f\x8b"


def _open(path: Path) -> BinaryIO:
    return gzip.open(path, "rb") if _is_packed(path) else path.open("rb")  # type: ignore[return-value]


def read_nifti(path: Path, policy: ReaderPolicy, channels: int = 1) -> Volume:
    """Read one NIfTI-1 or NIfTI-2 file (.nii, .nii.gz).

    Unlike nibabel's own loading, nothing is mended: it silently takes a zero voxel size for 1, a negative one for its
    absolute value, and an all-zero sform for an affine. Unknown spatial units count as mm, as every viewer takes them.
    A file with only one of sform and qform is complete.

    Args:
        path: the file.
        policy: limits of what is accepted.
        channels: the expected number of channels; more than 1 is the fourth axis.

    Returns:
        The volume; array (X, Y, Z), or (X, Y, Z, C) where `channels` > 1.

    Raises:
        Refusal: `file_damaged`, `file_truncated`, `file_excess`, `detached_data`, `not_3d`, `channel_count`,
            `voxel_type`, `units`, `bad_spacing`, `no_orientation`, `bad_sform`, `bad_qform`, `affines_disagree`,
            `spacing_disagrees`, `sheared`, `gantry_tilt`, `bad_scaling`, `non_finite`, `too_few_slices`, `too_large`.
    """
    # Casting a signalling NaN warns, and so does what overflows; both are found by the checks.
    with readable("NIfTI"), np.errstate(over="ignore", invalid="ignore"):
        header = _header(path)
        shape = _shape(header, policy, channels)
        dtype = _dtype(header)
        affine = _affine(header, shape, policy)
        slope, intercept = _scaling(header)
        raw = _voxels(path, header, shape, dtype)
        array = np.empty(shape, dtype=np.float32, order="F")
        for k in range(shape[2]):
            array[:, :, k] = raw[:, :, k].astype(np.float64) * slope + intercept
    check_finite(array)
    return Volume(array=array, affine=affine, modality=None, source="nifti")


def _header(path: Path) -> Any:
    with _open(path) as file:
        block = file.read(HEADER_BYTES[2])
    magic = _magic(block)
    if magic in PAIR_MAGIC:
        raise detached("NIfTI", "one .nii file")
    if magic not in SINGLE_FILE_MAGIC:
        raise damaged("NIfTI", "it does not begin with a NIfTI header")
    version = 2 if magic == b"n+2\0" else 1
    block = block[: HEADER_BYTES[version]]
    if len(block) < HEADER_BYTES[version]:
        raise damaged("NIfTI", "its header is cut short")
    kind = nib.Nifti2Header if version == 2 else nib.Nifti1Header
    header = kind(binaryblock=block, check=False)
    if int(header["sizeof_hdr"]) != HEADER_BYTES[version]:
        raise damaged("NIfTI", "its header gives a wrong size for itself")
    return header


def _shape(header: Any, policy: ReaderPolicy, channels: int) -> tuple[int, ...]:
    sizes = [int(n) for n in header["dim"]]
    if not 1 <= sizes[0] <= 7 or any(n < 1 for n in sizes[1 : sizes[0] + 1]):
        raise damaged("NIfTI", "its header gives impossible dimensions")
    return check_shape(sizes[1 : sizes[0] + 1], policy, channels)


def _dtype(header: Any) -> np.dtype[Any]:
    try:
        dtype: np.dtype[Any] = header.get_data_dtype()
    except Exception as error:  # nibabel has its own error for unknown codes, and none for absent ones
        raise damaged("NIfTI", "its voxel type is unknown") from error
    if dtype.names is not None or dtype.kind not in "iuf" or dtype.itemsize not in (1, 2, 4, 8):
        raise voxel_type()
    if int(header["bitpix"]) != dtype.itemsize * 8:
        raise damaged("NIfTI", "its header contradicts itself on bits per voxel")
    return dtype


def _affine(header: Any, shape: tuple[int, ...], policy: ReaderPolicy) -> NDArray[np.float64]:
    unit = int(header["xyzt_units"]) & 7
    if unit not in (UNIT_MM, UNIT_UNKNOWN):
        raise other_units()
    sizes = np.array(header["pixdim"][1:4], dtype=np.float64)
    check_sizes(sizes, policy)
    has_sform, has_qform = int(header["sform_code"]) > 0, int(header["qform_code"]) > 0
    if not has_sform and not has_qform:
        raise Refusal(
            "no_orientation",
            "The file says nothing about orientation (neither sform nor qform is set), so left and right are unknown; "
            "convert it again from its source.",
        )
    sform = _checked(header.get_sform(coded=False), "sform") if has_sform else None
    qform = _qform(header) if has_qform else None
    if sform is not None and qform is not None:
        distance = corner_distance(sform, qform, shape)
        if distance > policy.affine_tolerance_mm:
            raise Refusal(
                "affines_disagree",
                f"The two orientations in the header (sform and qform) place voxels up to "
                f"{distance:.2f} mm apart; one is wrong, so convert it again from its source.",
                distance_mm=distance,
            )
    affine = sform if sform is not None else qform
    assert affine is not None
    check_stated_sizes(affine, sizes, policy)
    check_axes(affine, policy)
    return affine


def _checked(affine: NDArray[Any], name: str) -> NDArray[np.float64]:
    matrix = np.array(affine, dtype=np.float64)
    check_matrix(matrix, name)
    return matrix


def _qform(header: Any) -> NDArray[np.float64]:
    header = header.copy()
    if float(header["pixdim"][0]) == 0:
        header["pixdim"][0] = 1  # the standard: 0 counts as 1
    try:
        return _checked(header.get_qform(coded=False), "qform")
    except Refusal:
        raise
    except Exception as error:  # nibabel: ValueError for a quaternion longer than 1, HeaderDataError for qfac
        raise Refusal("bad_qform", "The orientation (qform) of the file is no rotation; convert it again.") from error


def _scaling(header: Any) -> tuple[float, float]:
    slope, intercept = float(header["scl_slope"]), float(header["scl_inter"])
    # The standard's 0 and nibabel's NaN both say that values are not scaled.
    if slope == 0 or (math.isnan(slope) and math.isnan(intercept)):
        return 1.0, 0.0
    if not math.isfinite(slope) or not math.isfinite(intercept):
        raise Refusal("bad_scaling", "The scaling of voxel values (scl_slope, scl_inter) is no number; export again.")
    return slope, intercept


def _voxels(path: Path, header: Any, shape: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray[Any]:
    declared = float(header["vox_offset"])
    smallest = HEADER_BYTES[1] if len(header.binaryblock) == HEADER_BYTES[1] else HEADER_BYTES[2]
    if not math.isfinite(declared) or declared != int(declared) or not smallest <= declared <= LARGEST_OFFSET:
        raise damaged("NIfTI", "its header gives an impossible place for the voxels")
    offset = int(declared)
    expected = math.prod(shape) * dtype.itemsize
    check_room(path.stat().st_size - (0 if _is_packed(path) else offset), expected, _is_packed(path))
    # Read as it comes: memory grows with what is really there, never with what a header promises.
    content = bytearray()
    with _open(path) as file:
        file.read(offset)
        # One byte further shows an excess, and makes gzip compare its checksum.
        while len(content) <= expected and (chunk := file.read(min(CHUNK_BYTES, expected + 1 - len(content)))):
            content += chunk
    check_length(len(content), expected)
    return np.frombuffer(content, dtype=dtype).reshape(shape, order="F")
