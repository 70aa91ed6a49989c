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
from .grid import corner_distance
from .policy import ReaderPolicy
from .volume import Volume

__all__ = ["has_nifti_content", "is_nifti_name", "read_nifti"]

HEADER_BYTES = {1: 348, 2: 540}
SINGLE_FILE_MAGIC = (b"n+1\0", b"n+2\0")
PAIR_MAGIC = (b"ni1\0", b"ni2\0")
UNIT_MM, UNIT_UNKNOWN = 2, 0
# Deflate cannot pack tighter than 1032 to 1, so a header that promises more than that lies.
MOST_COMPRESSION = 1032
CHUNK_BYTES = 1 << 24
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


def _damaged(reason: str, **facts: Any) -> Refusal:
    return Refusal("nifti_damaged", f"The NIfTI file is damaged: {reason}; copy or export it again.", **facts)


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
        Refusal: `nifti_damaged`, `nifti_truncated`, `nifti_excess`, `nifti_pair`, `not_3d`, `channel_count`,
            `voxel_type`, `units`, `bad_spacing`, `no_orientation`, `bad_sform`, `bad_qform`, `affines_disagree`,
            `spacing_disagrees`, `sheared`, `bad_scaling`, `non_finite`, `too_few_slices`, `too_large`.
    """
    try:
        header = _header(path)
        shape = _shape(header, policy, channels)
        dtype = _dtype(header)
        affine = _affine(header, shape, policy)
        slope, intercept = _scaling(header)
        raw = _voxels(path, header, shape, dtype)
    except (OSError, EOFError, zlib.error) as error:
        raise Refusal(
            "nifti_truncated",
            "The NIfTI file cannot be read to its end: it is cut short or damaged; copy or export it again.",
        ) from error
    array = np.empty(shape, dtype=np.float32, order="F")
    with np.errstate(over="ignore", invalid="ignore"):
        for k in range(shape[2]):
            array[:, :, k] = raw[:, :, k].astype(np.float64) * slope + intercept
    if not np.isfinite(array).all():
        bad = int(array.size - np.count_nonzero(np.isfinite(array)))
        raise Refusal(
            "non_finite", f"{bad} voxels are not a number or infinite; repair the image before use.", voxels=bad
        )
    return Volume(array=array, affine=affine, modality=None, source="nifti", slice_uids=None, series_uid=None)


def _header(path: Path) -> Any:
    with _open(path) as file:
        block = file.read(HEADER_BYTES[2])
    magic = _magic(block)
    if magic in PAIR_MAGIC:
        raise Refusal("nifti_pair", "This is half of a two-file NIfTI (.hdr, .img); convert it to one .nii file.")
    if magic not in SINGLE_FILE_MAGIC:
        raise _damaged("it does not begin with a NIfTI header")
    version = 2 if magic == b"n+2\0" else 1
    block = block[: HEADER_BYTES[version]]
    if len(block) < HEADER_BYTES[version]:
        raise _damaged("its header is cut short")
    kind = nib.Nifti2Header if version == 2 else nib.Nifti1Header
    header = kind(binaryblock=block, check=False)
    if int(header["sizeof_hdr"]) != HEADER_BYTES[version]:
        raise _damaged("its header gives a wrong size for itself")
    return header


def _shape(header: Any, policy: ReaderPolicy, channels: int) -> tuple[int, ...]:
    sizes = [int(n) for n in header["dim"]]
    if not 1 <= sizes[0] <= 7 or any(n < 1 for n in sizes[1 : sizes[0] + 1]):
        raise _damaged("its header gives impossible dimensions")
    shape = sizes[1 : sizes[0] + 1]
    while len(shape) > 3 and shape[-1] == 1:
        shape.pop()
    if len(shape) < 3 or len(shape) > 4:
        raise Refusal(
            "not_3d",
            f"The image has {len(shape)} dimensions; a volume has 3, or 4 with channels.",
            dimensions=len(shape),
        )
    found = shape[3] if len(shape) == 4 else 1
    if found != channels:
        raise Refusal(
            "channel_count",
            f"The image has {found} channel{'' if found == 1 else 's'} (or time points); {channels} "
            f"{'is' if channels == 1 else 'are'} expected.",
            found=found,
            expected=channels,
        )
    if min(shape[:3]) < policy.min_slices:
        raise Refusal(
            "too_few_slices",
            f"The image is {' × '.join(map(str, shape[:3]))} voxels, a single picture rather "
            f"than a volume; at least {policy.min_slices} are needed along each axis.",
            shape=shape[:3],
            smallest=policy.min_slices,
        )
    if math.prod(shape) > policy.max_voxels:
        raise Refusal(
            "too_large",
            f"The header declares {math.prod(shape)} voxels; at most {policy.max_voxels} are read.",
            voxels=math.prod(shape),
            largest=policy.max_voxels,
        )
    return tuple(shape)


def _dtype(header: Any) -> np.dtype[Any]:
    try:
        dtype: np.dtype[Any] = header.get_data_dtype()
    except Exception as error:  # nibabel has its own error for unknown codes, and none for absent ones
        raise _damaged("its voxel type is unknown") from error
    if dtype.names is not None or dtype.kind not in "iuf" or dtype.itemsize not in (1, 2, 4, 8):
        raise Refusal(
            "voxel_type", "The voxels are colour, complex or of another type than plain numbers; export grey values."
        )
    if int(header["bitpix"]) != dtype.itemsize * 8:
        raise _damaged("its header contradicts itself on bits per voxel")
    return dtype


def _affine(header: Any, shape: tuple[int, ...], policy: ReaderPolicy) -> NDArray[np.float64]:
    unit = int(header["xyzt_units"]) & 7
    if unit not in (UNIT_MM, UNIT_UNKNOWN):
        raise Refusal("units", "The header gives voxel sizes in another unit than millimetres.", unit_code=unit)
    sizes = np.array(header["pixdim"][1:4], dtype=np.float64)
    low, high = policy.spacing_range_mm
    if not np.isfinite(sizes).all() or (sizes < low).any() or (sizes > high).any():
        raise Refusal(
            "bad_spacing",
            f"The voxel size in the header lies outside {low} to {high} mm (or is zero, negative or no number).",
        )
    has_sform, has_qform = int(header["sform_code"]) > 0, int(header["qform_code"]) > 0
    if not has_sform and not has_qform:
        raise Refusal(
            "no_orientation",
            "The file says nothing about orientation (neither sform nor qform is set), so left and right are unknown.",
        )
    sform = _checked(header.get_sform(coded=False), "sform") if has_sform else None
    qform = _qform(header) if has_qform else None
    if sform is not None and qform is not None:
        distance = corner_distance(sform, qform, shape)
        if distance > policy.affine_tolerance_mm:
            raise Refusal(
                "affines_disagree",
                f"The two orientations in the header (sform and qform) place voxels up to "
                f"{distance:.2f} mm apart; one is wrong.",
                distance_mm=distance,
            )
    affine = sform if sform is not None else qform
    assert affine is not None
    lengths = np.linalg.norm(affine[:3, :3], axis=0)
    if (np.abs(lengths - sizes) > policy.voxel_size_tolerance_relative * sizes).any():
        raise Refusal(
            "spacing_disagrees",
            "The voxel size in the header and the one in its orientation matrix differ.",
            header_mm=sizes.tolist(),
            matrix_mm=lengths.tolist(),
        )
    unit_axes = affine[:3, :3] / lengths
    skew = float(np.abs(np.triu(unit_axes.T @ unit_axes, 1)).max())
    if skew > math.sin(math.radians(policy.orientation_tolerance_degrees)):
        degrees = math.degrees(math.asin(min(1.0, skew)))
        raise Refusal(
            "sheared",
            f"The axes of the image are {degrees:.2f}° off a right angle (gantry tilt or an affine "
            "registration); resample it to an upright grid.",
            degrees=degrees,
        )
    return affine


def _checked(affine: NDArray[Any], name: str) -> NDArray[np.float64]:
    matrix = np.array(affine, dtype=np.float64)
    lengths = np.linalg.norm(matrix[:3, :3], axis=0)
    if not np.isfinite(matrix).all() or (lengths == 0).any() or abs(np.linalg.det(matrix[:3, :3] / lengths)) < 1e-3:
        raise Refusal(f"bad_{name}", f"The orientation matrix ({name}) of the file is zero, singular or no number.")
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
        raise Refusal("bad_qform", "The orientation (qform) of the file is no rotation.") from error


def _scaling(header: Any) -> tuple[float, float]:
    slope, intercept = float(header["scl_slope"]), float(header["scl_inter"])
    # The standard's 0 and nibabel's NaN both say that values are not scaled.
    if slope == 0 or (math.isnan(slope) and math.isnan(intercept)):
        return 1.0, 0.0
    if not math.isfinite(slope) or not math.isfinite(intercept):
        raise Refusal("bad_scaling", "The scaling of voxel values (scl_slope, scl_inter) is no number.")
    return slope, intercept


def _voxels(path: Path, header: Any, shape: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray[Any]:
    declared = float(header["vox_offset"])
    smallest = HEADER_BYTES[1] if len(header.binaryblock) == HEADER_BYTES[1] else HEADER_BYTES[2]
    if not math.isfinite(declared) or declared != int(declared) or not smallest <= declared <= LARGEST_OFFSET:
        raise _damaged("its header gives an impossible place for the voxels")
    offset = int(declared)
    expected = math.prod(shape) * dtype.itemsize
    size = path.stat().st_size
    packed = _is_packed(path)
    if offset + expected > (size * MOST_COMPRESSION if packed else size):
        raise _truncated(expected)
    # Read as it comes: memory grows with what is really there, never with what a header promises.
    content = bytearray()
    with _open(path) as file:
        if len(file.read(offset)) < offset:
            raise _truncated(expected)
        while len(content) < expected and (chunk := file.read(min(CHUNK_BYTES, expected - len(content)))):
            content += chunk
        # One byte further also makes gzip compare its checksum.
        excess = file.read(1)
    if len(content) < expected:
        raise _truncated(expected, len(content))
    if excess:
        raise Refusal(
            "nifti_excess",
            f"The file holds more voxels than the {expected} bytes its header declares, so its "
            "dimensions or voxel type are wrong.",
            declared_bytes=expected,
        )
    return np.frombuffer(content, dtype=dtype).reshape(shape, order="F")


def _truncated(expected: int, found: int | None = None) -> Refusal:
    return Refusal(
        "nifti_truncated",
        f"The file is cut short: its header declares {expected} bytes of voxels and they are "
        "not there; copy or export it again.",
        declared_bytes=expected,
        found_bytes=found,
    )
