from __future__ import annotations

import gzip
import os
import struct
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from bundle.data.nifti import read_nifti
from bundle.data.policy import ReaderPolicy
from bundle.data.volume import Volume
from bundle.errors import Refusal
from tests.data import ramp

REAL_DATA = os.environ.get("BUNDLE_TEST_DATA")
AFFINE = np.array([[0.0, -0.9, 0, 12], [0.8, 0, 0, -30], [0, 0, 2.5, 4], [0, 0, 0, 1]])
# Byte places in a NIfTI-1 header, little endian.
DIM, DATATYPE, BITPIX, PIXDIM, OFFSET, SLOPE, INTER, UNITS, QCODE, SCODE, QUATERN, SROW, MAGIC = (
    40, 70, 72, 76, 108, 112, 116, 123, 252, 254, 256, 280, 344,
)  # fmt: skip


def voxels(shape: tuple[int, ...] = (7, 6, 5), dtype: object = np.int16) -> np.ndarray:
    return np.arange(np.prod(shape)).reshape(shape).astype(dtype)  # type: ignore[call-overload, no-any-return]


def write(
    path: Path, data: np.ndarray | None = None, codes: tuple[int, int] = (1, 0), affine: np.ndarray = AFFINE
) -> Path:
    image = nib.Nifti1Image(voxels() if data is None else data, affine)
    image.set_sform(affine, code=codes[0])
    image.set_qform(affine, code=codes[1])
    image.header.set_xyzt_units("mm")
    nib.save(image, path)
    return path


def patched(tmp_path: Path, *patches: tuple[int, str, tuple[float, ...]], codes: tuple[int, int] = (1, 0)) -> Path:
    content = bytearray(write(tmp_path / "x.nii", codes=codes).read_bytes())
    for place, layout, values in patches:
        struct.pack_into("<" + layout, content, place, *values)
    (tmp_path / "x.nii").write_bytes(bytes(content))
    return tmp_path / "x.nii"


def read(path: Path, channels: int = 1) -> Volume:
    return read_nifti(path, ReaderPolicy(), channels)


def refused(path: Path, channels: int = 1) -> Refusal:
    return ramp.refused(read_nifti, path, channels)


@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz", "A.NII.GZ"])
@pytest.mark.parametrize("codes", [(1, 0), (0, 1), (2, 1), (4, 4)])
@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.float32, np.float64, np.dtype(">i2")])
def test_loads_as_nibabel_does(tmp_path: Path, name: str, codes: tuple[int, int], dtype: object) -> None:
    path = write(tmp_path / name.lower(), voxels(dtype=dtype), codes).rename(tmp_path / name)
    volume = read(path)
    np.testing.assert_array_equal(volume.array, voxels())
    np.testing.assert_allclose(volume.affine, AFFINE, atol=1e-5)
    assert (volume.array.dtype, volume.affine.dtype, volume.source) == (np.float32, np.float64, "nifti")
    assert (volume.modality, volume.slice_uids, volume.series_uid) == (None, None, None)


def test_nifti_2_and_big_endian_headers(tmp_path: Path) -> None:
    nib.save(nib.Nifti2Image(voxels(), AFFINE), tmp_path / "two.nii.gz")
    np.testing.assert_array_equal(read(tmp_path / "two.nii.gz").array, voxels())
    header = nib.Nifti1Header(endianness=">")
    nib.save(nib.Nifti1Image(voxels(), AFFINE, header=header), tmp_path / "big.nii")
    assert (tmp_path / "big.nii").read_bytes()[:4] == struct.pack(">i", 348)
    np.testing.assert_array_equal(read(tmp_path / "big.nii").array, voxels())


def test_scaling_is_applied(tmp_path: Path) -> None:
    volume = read(patched(tmp_path, (SLOPE, "ff", (0.5, -3))))
    np.testing.assert_array_equal(volume.array, voxels() * 0.5 - 3)
    same = read(patched(tmp_path, (SLOPE, "ff", (0, 5))))  # the standard: slope 0 means not scaled
    np.testing.assert_array_equal(same.array, voxels())


def test_unknown_units_count_as_mm_and_the_name_need_not_fit(tmp_path: Path) -> None:
    path = patched(tmp_path, (UNITS, "B", (0,)))
    np.testing.assert_allclose(read(path).affine, AFFINE, atol=1e-5)
    assert read(path.rename(tmp_path / "scan")).array.shape == (7, 6, 5)


def test_channels(tmp_path: Path) -> None:
    path = write(tmp_path / "c.nii.gz", voxels((7, 6, 5, 2)))
    np.testing.assert_array_equal(read(path, channels=2).array, voxels((7, 6, 5, 2)))
    one = write(tmp_path / "one.nii", voxels((7, 6, 5, 1)))
    assert read(one).array.shape == (7, 6, 5)
    for file, channels, found in ((path, 1, 2), (path, 3, 2), (one, 2, 1)):
        refusal = refused(file, channels)
        assert (refusal.code, refusal.facts) == ("channel_count", {"found": found, "expected": channels})
        assert str(found) in refusal.sentence
        assert str(channels) in refusal.sentence


NAN = float("nan")
FAULTS: dict[str, tuple[str, list[tuple[int, str, tuple[float, ...]]], tuple[int, int]]] = {
    "sform and qform disagree": ("affines_disagree", [(SROW + 12, "f", (15,))], (1, 1)),
    "left and right disagree": ("affines_disagree", [(PIXDIM, "f", (-1,))], (1, 1)),
    "sform NaN": ("bad_sform", [(SROW, "f", (NAN,))], (1, 0)),
    "sform zero": ("bad_sform", [(SROW, "12f", (0,) * 12)], (1, 0)),
    "sform singular": ("bad_sform", [(SROW, "12f", (1, 0, 0, 0, 0, 1, 0, 0, 0, 1, 0, 0))], (1, 0)),
    "neither is set": ("no_orientation", [], (0, 0)),
    "qform is no rotation": ("bad_qform", [(QUATERN, "3f", (2, 2, 2))], (0, 1)),
    "qform NaN": ("bad_qform", [(QUATERN, "f", (NAN,))], (0, 1)),
    "sheared": ("sheared", [(SROW, "12f", (0.8, 0.09, 0, 0, 0, 0.8955, 0, 0, 0, 0, 2.5, 0))], (1, 0)),
    "sform beyond 100 m": ("bad_sform", [(SROW + 12, "f", (1e20,))], (1, 0)),
    "signalling NaN": ("bad_sform", [(SROW, "I", (0x7F800001,))], (1, 0)),
    "leans too far": ("gantry_tilt", [(SROW, "12f", (0.8, 0, 1.77, 0, 0, 0.9, 0, 0, 0, 0, 1.77, 0))], (1, 0)),
    "voxel size zero": ("bad_spacing", [(PIXDIM + 4, "f", (0,))], (1, 0)),
    "voxel size negative": ("bad_spacing", [(PIXDIM + 8, "f", (-0.9,))], (1, 0)),
    "voxel size NaN": ("bad_spacing", [(PIXDIM + 12, "f", (NAN,))], (1, 0)),
    "voxel size and matrix differ": ("spacing_disagrees", [(PIXDIM + 12, "f", (5,))], (1, 0)),
    "metres": ("units", [(UNITS, "B", (1,))], (1, 0)),
    "micrometres": ("units", [(UNITS, "B", (3,))], (1, 0)),
    "complex": ("voxel_type", [(DATATYPE, "hh", (32, 64))], (1, 0)),
    "colour": ("voxel_type", [(DATATYPE, "hh", (128, 24))], (1, 0)),
    "unknown type": ("file_damaged", [(DATATYPE, "hh", (77, 16))], (1, 0)),
    "bits contradict the type": ("file_damaged", [(BITPIX, "h", (8,))], (1, 0)),
    "declares far too much": ("too_large", [(DIM, "8h", (3, 32767, 32767, 32767, 1, 1, 1, 1))], (1, 0)),
    "declares more than there is": ("file_truncated", [(DIM, "8h", (3, 7, 6, 500, 1, 1, 1, 1))], (1, 0)),
    "declares less than there is": ("file_excess", [(DIM, "8h", (3, 7, 6, 4, 1, 1, 1, 1))], (1, 0)),
    "negative size": ("file_damaged", [(DIM, "8h", (3, 7, -6, 5, 1, 1, 1, 1))], (1, 0)),
    "no dimension": ("file_damaged", [(DIM, "h", (0,))], (1, 0)),
    "five dimensions": ("not_3d", [(DIM, "8h", (5, 7, 1, 1, 5, 6, 1, 1))], (1, 0)),
    "two dimensions": ("not_3d", [(DIM, "8h", (2, 42, 5, 1, 1, 1, 1, 1))], (1, 0)),
    "one slice": ("too_few_slices", [(DIM, "8h", (3, 42, 5, 1, 1, 1, 1, 1))], (1, 0)),
    "voxels within the header": ("file_damaged", [(OFFSET, "f", (100,))], (1, 0)),
    "voxels nowhere": ("file_damaged", [(OFFSET, "f", (NAN,))], (1, 0)),
    "slope NaN": ("bad_scaling", [(SLOPE, "ff", (NAN, 1))], (1, 0)),
    "scaling overflows": ("non_finite", [(SLOPE, "ff", (3e38, 0))], (1, 0)),
    "slope infinite": ("bad_scaling", [(SLOPE, "ff", (float("inf"), 1))], (1, 0)),
    "half of a pair": ("detached_data", [(MAGIC, "4s", (b"ni1\0",))], (1, 0)),  # type: ignore[list-item]
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_fault_is_refused_for_its_reason(tmp_path: Path, fault: str) -> None:
    code, patches, codes = FAULTS[fault]
    assert refused(patched(tmp_path, *patches, codes=codes)).code == code


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_voxels_that_are_no_number(tmp_path: Path, value: float) -> None:
    data = voxels(dtype=np.float32)
    data[1, 2, 3] = value
    refusal = refused(write(tmp_path / "n.nii.gz", data))
    assert (refusal.code, refusal.facts["voxels"]) == ("non_finite", 1)


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
def test_a_file_cut_anywhere_is_refused(tmp_path: Path, suffix: str) -> None:
    path = write(tmp_path / f"t{suffix}", np.random.default_rng(0).integers(0, 999, (9, 9, 9)).astype(np.int16))
    content = path.read_bytes()
    for size in [*range(0, len(content), 61), len(content) - 1]:
        path.write_bytes(content[:size])
        assert refused(path).code in ("file_damaged", "file_truncated")


def test_damaged_gzip_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "g.nii.gz", np.random.default_rng(0).integers(0, 999, (20, 20, 20)).astype(np.int16))
    content = bytearray(path.read_bytes())
    for place in range(400, len(content), 97):
        mutant = bytearray(content)
        mutant[place] ^= 0x55
        path.write_bytes(bytes(mutant))
        refused(path)


def test_gzip_members_and_what_follows_them(tmp_path: Path) -> None:
    content = write(tmp_path / "m.nii").read_bytes()
    path = tmp_path / "m.nii.gz"
    path.write_bytes(gzip.compress(content[:500]) + gzip.compress(content[500:]))  # legal: gzip -c a b
    np.testing.assert_array_equal(read(path).array, voxels())
    packed = gzip.compress(content)
    path.write_bytes(packed + b"garbage")
    assert refused(path).code == "file_damaged"
    path.write_bytes(packed + gzip.compress(b"more"))
    assert refused(path).code == "file_excess"
    path.write_bytes(packed[:-8] + bytes([packed[-8] ^ 1]) + packed[-7:])
    assert refused(path).code == "file_damaged"  # the checksum
    path.write_bytes(packed[:-9])
    assert refused(path).code == "file_truncated"
    (tmp_path / "m.nii").write_bytes(content + b"\0")
    assert refused(tmp_path / "m.nii").code == "file_excess"


def test_vectors_and_wide_integers(tmp_path: Path) -> None:
    assert refused(write(tmp_path / "v.nii", voxels((7, 6, 5, 1, 3)))).code == "not_3d"
    assert refused(write(tmp_path / "v.nii", voxels((7, 6, 5, 1, 3))), channels=3).code == "not_3d"
    assert refused(write(tmp_path / "t.nii", voxels((7, 6, 5, 2)))).code == "channel_count"
    wide = voxels(dtype=np.int64) + 2**40 + 1  # rounded to float32, which is no error
    image = nib.Nifti1Image(wide, AFFINE, dtype=np.int64)
    nib.save(image, tmp_path / "w.nii")
    np.testing.assert_array_equal(read(tmp_path / "w.nii").array, wide.astype(np.float32))
    large = voxels(dtype=np.float64)
    large[0, 0, 0] = 1e39
    assert refused(write(tmp_path / "l.nii", large)).code == "non_finite"


@pytest.mark.parametrize("choice", ["keep", "resample", "refuse"])
@pytest.mark.parametrize("between_planes", [False, True])
def test_a_leaning_third_axis(tmp_path: Path, choice: str, between_planes: bool) -> None:
    affine = ramp.turned(25, lean=15)
    content = bytearray(write(tmp_path / "g.nii", affine=affine).read_bytes())
    size = 2.5 * (np.cos(np.radians(15)) if between_planes else 1)
    struct.pack_into("<f", content, PIXDIM + 12, size)
    (tmp_path / "g.nii").write_bytes(bytes(content))
    ramp.check_leaning(read_nifti, tmp_path / "g.nii", affine, choice)


def test_text_called_nifti(tmp_path: Path) -> None:
    (tmp_path / "a.nii.gz").write_text("hello")
    assert refused(tmp_path / "a.nii.gz").code == "file_damaged"
    (tmp_path / "b.nii").touch()
    assert refused(tmp_path / "b.nii").code == "file_damaged"


def test_memory_follows_the_file_not_its_header(tmp_path: Path) -> None:
    # 400 million voxels of 8 bytes: inside max_voxels, and what a file of 4 MB could just hold.
    header = bytearray(patched(tmp_path, (DIM, "8h", (3, 1000, 1000, 400, 1, 1, 1, 1))).read_bytes()[:352])
    struct.pack_into("<hh", header, DATATYPE, 64, 64)
    path = tmp_path / "lie.nii.gz"
    path.write_bytes(gzip.compress(bytes(header) + np.random.default_rng(0).bytes(4 << 20), 1))
    ramp.check_small_memory(read_nifti, path, 100 << 20)


def test_policy_reaches_nifti(tmp_path: Path) -> None:
    path = write(tmp_path / "p.nii", voxels((42, 5, 1)))
    with pytest.raises(Refusal, match="single picture"):
        read_nifti(path, ReaderPolicy())
    assert read_nifti(path, ReaderPolicy(min_slices=1)).array.shape == (42, 5, 1)
    with pytest.raises(Refusal, match="at most 100"):
        read_nifti(path, ReaderPolicy(min_slices=1, max_voxels=100))
    disagreeing = patched(tmp_path, (SROW + 12, "f", (12.3,)), codes=(1, 1))
    with pytest.raises(Refusal, match="mm apart"):
        read_nifti(disagreeing, ReaderPolicy())
    assert read_nifti(disagreeing, ReaderPolicy(affine_tolerance_mm=0.5)).affine[0, 3] == pytest.approx(12.3)


# What no check can find, by what the header holds besides: the values stay plausible, and nothing else says them.
ALWAYS_UNDETECTABLE = {
    "dim": "sizes exchanged: as many voxels",
    "datatype": "signed or not, integer or float of the same width",
    "scl_slope": "any linear scale of values is as good",
    "scl_inter": "likewise",
}
UNDETECTABLE = {
    (1, 1): ALWAYS_UNDETECTABLE,
    (1, 0): {
        **ALWAYS_UNDETECTABLE,
        "srow_x": "a place, or a turn that keeps lengths and right angles; no qform to compare",
        "srow_y": "likewise",
        "srow_z": "likewise",
    },
    (0, 1): {
        **ALWAYS_UNDETECTABLE,
        "pixdim": "a plausible voxel size or side; no sform to compare",
        "quatern_b": "every short quaternion is a rotation",
        "quatern_c": "likewise",
        "quatern_d": "likewise",
        "qoffset_x": "any place is as good",
        "qoffset_y": "likewise",
        "qoffset_z": "likewise",
    },
}
HEADER = nib.Nifti1Header().template_dtype


def mutated(block: bytes, field: np.dtype, rng: np.random.Generator) -> bytes:
    """Random bytes, or numbers that look right: another sign, a little more, exchanged, the next, a small one."""
    content = bytearray(block)
    if rng.random() < 0.5 or field.kind not in "if":
        for _ in range(rng.integers(1, 4)):
            content[rng.integers(len(content))] = rng.integers(256)
        return bytes(content)
    numbers = np.frombuffer(block, field).copy()
    one, other = rng.integers(len(numbers), size=2)
    change = rng.integers(5)
    if change == 0:
        numbers[one] = -numbers[one]
    elif change == 1:
        numbers[one] = np.asarray(numbers[one] * 1.05).astype(field)
    elif change == 2:
        numbers[[one, other]] = numbers[[other, one]]
    elif change == 3:
        numbers = np.roll(numbers, 1)
    else:
        numbers[one] = rng.integers(128)
    return numbers.tobytes()


def ramp_file(path: Path, codes: tuple[int, int]) -> Path:
    return write(path, ramp.stored(AFFINE), codes)


@pytest.mark.parametrize("codes", UNDETECTABLE)
@pytest.mark.parametrize("mutants", [150, pytest.param(20_000, marks=pytest.mark.slow)])
def test_a_damaged_header_is_refused_or_harmless_or_undetectable(
    tmp_path: Path, codes: tuple[int, int], mutants: int
) -> None:
    path = ramp_file(tmp_path / "f.nii", codes)
    content = path.read_bytes()
    assert ramp.verdict(read_nifti, path) == "agrees"
    rng = np.random.default_rng(0)
    verdicts: dict[str, set[str]] = {}
    for _ in range(mutants):
        name = str(rng.choice(HEADER.names))
        place, field = HEADER.fields[name][1], HEADER.fields[name][0]
        block = mutated(content[place : place + field.itemsize], field.base, rng)
        path.write_bytes(content[:place] + block + content[place + field.itemsize :])
        verdicts.setdefault(name, set()).add(ramp.verdict(read_nifti, path))
    wrong = {name for name, found in verdicts.items() if "wrong" in found}
    assert wrong <= set(UNDETECTABLE[codes])
    assert len(set().union(*verdicts.values())) > 6  # many reasons were met


@pytest.mark.parametrize(
    ("codes", "place", "layout", "values"),
    [
        ((1, 1), DIM, "8h", (3, 6, 7, 5, 1, 1, 1, 1)),
        ((1, 1), DATATYPE, "h", (512,)),
        ((1, 1), SLOPE, "f", (2,)),
        ((1, 1), INTER, "f", (9,)),
        ((1, 0), SROW + 12, "f", (22,)),
        ((1, 0), SROW + 16, "f", (-0.8,)),
        ((1, 0), SROW + 44, "f", (22,)),
        ((0, 1), PIXDIM, "f", (-1,)),
        ((0, 1), PIXDIM + 12, "f", (3,)),
        ((0, 1), QUATERN, "f", (0.3,)),
        ((0, 1), QUATERN + 4, "f", (0.3,)),
        ((0, 1), QUATERN + 8, "f", (0.5,)),
        ((0, 1), QUATERN + 12, "f", (22,)),
        ((0, 1), QUATERN + 16, "f", (22,)),
        ((0, 1), QUATERN + 20, "f", (22,)),
    ],
)
def test_the_undetectable_is_so(
    tmp_path: Path, codes: tuple[int, int], place: int, layout: str, values: tuple[float, ...]
) -> None:
    content = bytearray(ramp_file(tmp_path / "u.nii", codes).read_bytes())
    struct.pack_into("<" + layout, content, place, *values)
    (tmp_path / "u.nii").write_bytes(bytes(content))
    assert ramp.verdict(read_nifti, tmp_path / "u.nii") == "wrong"


@pytest.mark.parametrize(
    ("place", "value"),
    [(SROW + 12, 22), (SROW, 0.5), (SROW + 40, -2.5), (PIXDIM, -1), (PIXDIM + 12, 3), (QUATERN, 0.2)],
)
def test_what_is_said_twice_must_be_said_alike(tmp_path: Path, place: int, value: float) -> None:
    content = bytearray(ramp_file(tmp_path / "u.nii", (1, 1)).read_bytes())
    struct.pack_into("<f", content, place, value)
    (tmp_path / "u.nii").write_bytes(bytes(content))
    assert refused(tmp_path / "u.nii").code in ("affines_disagree", "bad_qform")


@pytest.mark.skipif(REAL_DATA is None, reason="BUNDLE_TEST_DATA does not name the folder of real scans")
@pytest.mark.parametrize(("name", "channels", "shape"), [("ct_ich", 1, (192, 192)), ("tcga_lgg", 2, (128, 128))])
def test_real_volumes_load_as_nibabel_does(name: str, channels: int, shape: tuple[int, int]) -> None:
    files = sorted((Path(REAL_DATA or "") / name / "images").iterdir())
    assert len(files) > 80
    for number, path in enumerate(files):
        volume = read(path, channels=channels)
        assert volume.array.shape[:2] == shape
        assert volume.array.shape[3:] == ((channels,) if channels > 1 else ())
        if number % 10 == 0:
            image = nib.load(path)
            np.testing.assert_array_equal(volume.array, image.get_fdata())  # type: ignore[attr-defined]
            np.testing.assert_allclose(volume.affine, image.affine)  # type: ignore[attr-defined]
