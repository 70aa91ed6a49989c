from __future__ import annotations

import bz2
import gzip
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bundle.data.nrrd import BYTES_OF, is_nrrd_name, read_nrrd
from bundle.data.policy import ReaderPolicy
from bundle.errors import Refusal
from tests.data import ramp

LPS = np.diag([-1.0, -1, 1, 1])
SPACES = {
    "left-posterior-superior": (-1, -1, 1),
    "right-anterior-superior": (1, 1, 1),
    "left-anterior-superior": (-1, 1, 1),
}
SHAPE = (7, 6, 5)


def voxels(shape: tuple[int, ...] = SHAPE, dtype: Any = np.int16) -> np.ndarray:
    return (np.arange(np.prod(shape)) % 120).reshape(shape).astype(dtype)


def vector(values: np.ndarray) -> str:
    return "(" + ",".join(repr(float(value)) for value in values) + ")"


def fields(affine: np.ndarray, space: str = "left-posterior-superior") -> dict[str, str]:
    """A header as itk writes it, of an affine that is voxel → RAS+ mm."""
    inside = np.diag([*SPACES[space], 1.0]) @ affine
    return {
        "type": "short",
        "dimension": "3",
        "space": space,
        "sizes": "7 6 5",
        "space directions": " ".join(vector(column) for column in inside[:3, :3].T),
        "kinds": "domain domain domain",
        "endian": "little",
        "encoding": "raw",
        "space units": '"mm" "mm" "mm"',
        "space origin": vector(inside[:3, 3]),
    }


def write(path: Path, content: bytes | None = None, affine: np.ndarray | None = None, **changed: str | None) -> Path:
    """A file of `voxels()`; fields are given with _ for a blank, and None leaves one out."""
    changed = {key.replace("_", " "): value for key, value in changed.items()}
    space = changed.get("space") or ""
    header = fields(ramp.turned(0) if affine is None else affine, *([space] if space in SPACES else []))
    lines = ["NRRD0005", f"# {ramp.CANARY}", f"patient:={ramp.CANARY}"]
    lines += [f"{key}: {value}" for key, value in {**header, **changed}.items() if value is not None]
    block = voxels().tobytes(order="F") if content is None else content
    path.write_bytes(("\n".join(lines) + "\n\n").encode() + block)
    return path


def refused(path: Path, channels: int = 1, policy: ReaderPolicy | None = None) -> Refusal:
    return ramp.refused(read_nrrd, path, channels, policy)


@pytest.mark.parametrize(
    ("name", "expected"),
    [("a.nrrd", True), ("A.NRRD", True), ("b.nhdr", True), ("b.Nhdr", True), ("nrrd", False), ("a.nrrd.gz", False)],
)
def test_names(name: str, expected: bool) -> None:
    assert is_nrrd_name(Path(name)) is expected


def numpy_type(kind: str) -> np.dtype:
    if kind in ("float", "double"):
        return np.dtype(f"f{BYTES_OF[kind]}")
    return np.dtype(f"{'u' if kind.startswith('u') else 'i'}{BYTES_OF[kind]}")


@pytest.mark.parametrize("kind", BYTES_OF)
@pytest.mark.parametrize("endian", ["little", "big"])
def test_every_type_order_and_encoding(tmp_path: Path, kind: str, endian: str) -> None:
    content = voxels(dtype=numpy_type(kind).newbyteorder(endian)).tobytes(order="F")
    for encoding in ("raw", "gzip", "gz"):
        block = content if encoding == "raw" else gzip.compress(content)
        path = write(tmp_path / "a.nrrd", block, type=kind, endian=endian, encoding=encoding)
        volume = read_nrrd(path, ReaderPolicy())
        np.testing.assert_array_equal(volume.array, voxels())
        np.testing.assert_allclose(volume.affine, ramp.turned(0), atol=1e-12)
        assert (volume.array.dtype, volume.affine.dtype, volume.source) == (np.float32, np.float64, "nrrd")
        assert (volume.modality, volume.slice_uids, volume.series_uid) == (None, None, None)


@pytest.mark.parametrize("degrees", [0, 33, 90, 180, -120])
@pytest.mark.parametrize("mirrored", [False, True])
@pytest.mark.parametrize("space", SPACES)
def test_agrees_with_itk(tmp_path: Path, degrees: float, mirrored: bool, space: str) -> None:
    import itk

    affine = ramp.turned(degrees, mirrored=mirrored)
    short = "".join(word[0] for word in space.split("-")).upper()
    for name in (space, space.title(), short, short.lower()):
        path = write(tmp_path / "s.nrrd", affine=affine, space=space)
        path.write_bytes(path.read_bytes().replace(f"space: {space}".encode(), f"space: {name}".encode()))
        volume = read_nrrd(path, ReaderPolicy())
        image = itk.imread(path, itk.F)
        by_itk = np.eye(4)
        by_itk[:3, :3] = itk.array_from_matrix(image.GetDirection()) * np.array(image.GetSpacing())
        by_itk[:3, 3] = np.array(image.GetOrigin())
        np.testing.assert_allclose(volume.affine, affine, atol=1e-12)
        np.testing.assert_allclose(volume.affine, LPS @ by_itk, atol=1e-12)
        np.testing.assert_array_equal(volume.array, itk.array_from_image(image).transpose())
        np.testing.assert_array_equal(volume.array, voxels())


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.float32])
@pytest.mark.parametrize("compressed", [False, True])
def test_reads_what_itk_writes(tmp_path: Path, dtype: type, compressed: bool) -> None:
    import itk

    path = tmp_path / "itk.nrrd"
    itk.imwrite(itk.image_from_array(voxels(dtype=dtype).transpose().copy()), path, compression=compressed)
    volume = read_nrrd(path, ReaderPolicy())
    np.testing.assert_array_equal(volume.array, voxels())
    np.testing.assert_array_equal(volume.affine, LPS)
    several = voxels((*SHAPE, 2), dtype)
    image = itk.image_from_array(several.transpose(2, 1, 0, 3).copy(), is_vector=True)
    itk.imwrite(image, path, compression=compressed)
    np.testing.assert_array_equal(read_nrrd(path, ReaderPolicy(), 2).array, several)


@pytest.mark.parametrize("place", range(4))
@pytest.mark.parametrize("kind", ["list", "vector", "2-vector", "Covariant-Vector"])
def test_channels_on_any_axis(tmp_path: Path, place: int, kind: str) -> None:
    values = voxels((*SHAPE, 2))

    def inserted(text: str, word: str) -> str:
        words = text.split()
        return " ".join([*words[:place], word, *words[place:]])

    plain = fields(ramp.turned(20))
    changed = {
        "dimension": "4",
        "sizes": inserted(plain["sizes"], "2"),
        "space_directions": inserted(plain["space directions"], "none"),
        "kinds": inserted(plain["kinds"], kind),
    }
    path = write(
        tmp_path / "c.nrrd", np.moveaxis(values, -1, place).tobytes(order="F"), affine=ramp.turned(20), **changed
    )
    volume = read_nrrd(path, ReaderPolicy(), 2)
    np.testing.assert_array_equal(volume.array, values)
    np.testing.assert_allclose(volume.affine, ramp.turned(20), atol=1e-12)
    for channels in (1, 3):
        assert refused(path, channels).facts == {"found": 2, "expected": channels}
    one = {**changed, "sizes": inserted(plain["sizes"], "1"), "kinds": inserted(plain["kinds"], "list")}
    np.testing.assert_array_equal(read_nrrd(write(tmp_path / "o.nrrd", **one), ReaderPolicy()).array, voxels())
    assert refused(tmp_path / "o.nrrd", 2).code == "channel_count"
    for kinds, code in (
        (inserted(plain["kinds"], "RGB-color"), "voxel_type"),
        (inserted(plain["kinds"], "complex"), "voxel_type"),
        (inserted(plain["kinds"], "time"), "voxel_type"),
        (inserted(plain["kinds"], "domain"), "file_damaged"),
        (inserted(plain["kinds"], "3-vector"), "file_damaged"),
        (None, "file_damaged"),
    ):
        assert refused(write(path, values.tobytes(order="F"), **{**changed, "kinds": kinds}), 2).code == code
    elsewhere = " ".join(reversed(inserted(plain["kinds"], "list").split()))  # itk reads it
    refusal = refused(write(path, values.tobytes(order="F"), **{**changed, "kinds": elsewhere}), 2)
    assert refusal.code in ("not_3d", "file_damaged")


def test_what_changes_nothing(tmp_path: Path) -> None:
    path = write(
        tmp_path / "n.nrrd",
        measurement_frame="(0,1,0) (1,0,0) (0,0,1)",
        thicknesses="3 3 3",
        centerings="node node node",
        labels='"a" "b" "c"',
        byte_skip="0",
        line_skip="0",
        content=None,
        space_units=None,
        kinds=None,
    )
    np.testing.assert_allclose(read_nrrd(path, ReaderPolicy()).affine, ramp.turned(0), atol=1e-12)
    header, _, content = write(path).read_bytes().partition(b"\n\n")
    path.write_bytes((header + b"\n\n").replace(b"\n", b"\r\n") + content)
    np.testing.assert_array_equal(read_nrrd(path, ReaderPolicy()).array, voxels())
    path.write_bytes((header + b"\n\n").replace(b"\n", b"\r") + content)  # itk takes it
    assert refused(path).code == "file_damaged"


@pytest.mark.parametrize("first", [b"\n\n", b"\r\n", b" \n", b"\t\0", b": "])
def test_voxels_that_look_like_text(tmp_path: Path, first: bytes) -> None:
    content = first + voxels().tobytes(order="F")[2:]
    volume = read_nrrd(write(tmp_path / "w.nrrd", content), ReaderPolicy())
    np.testing.assert_array_equal(volume.array, np.frombuffer(content, "<i2").reshape(SHAPE, order="F"))


DIRECTIONS = "(1,0,0) (0,1,0) (0,0,1)"
FAULTS: dict[str, tuple[str, dict[str, str | None]]] = {
    "no type": ("file_damaged", {"type": None}),
    "type unknown": ("file_damaged", {"type": "half"}),
    "block": ("voxel_type", {"type": "block", "block_size": "2"}),
    "no dimension": ("file_damaged", {"dimension": None}),
    "two dimensions": ("not_3d", {"dimension": "2"}),
    "five dimensions": ("not_3d", {"dimension": "5"}),
    "no sizes": ("file_damaged", {"sizes": None}),
    "two sizes": ("file_damaged", {"sizes": "7 30"}),
    "size negative": ("file_damaged", {"sizes": "7 -6 5"}),
    "size no whole number": ("file_damaged", {"sizes": "7.0 6 5"}),
    "one slice": ("too_few_slices", {"sizes": "42 5 1"}),
    "declares far too much": ("too_large", {"sizes": "32767 32767 32767"}),
    "declares more": ("file_truncated", {"sizes": "7 6 6"}),
    "declares less": ("file_excess", {"sizes": "7 6 4"}),
    "no space": ("no_orientation", {"space": None}),
    "a space without a body": ("no_orientation", {"space": "scanner-xyz"}),
    "a space with time": ("no_orientation", {"space": "right-anterior-superior-time"}),
    "only a number of dimensions": ("file_damaged", {"space": None, "space_dimension": "3"}),
    "no directions": ("no_orientation", {"space_directions": None}),
    "no directions but spacings": ("no_orientation", {"space_directions": None, "spacings": "1 1 2"}),
    "spacings and directions": ("file_damaged", {"spacings": "1 1 2"}),
    "ranges and directions": ("file_damaged", {"axis_mins": "0 0 0"}),
    "units and directions": ("file_damaged", {"units": '"mm" "mm" "mm"'}),
    "an axis without direction": ("not_3d", {"space_directions": "(1,0,0) (0,1,0) none"}),
    "two directions": ("file_damaged", {"space_directions": "(1,0,0) (0,1,0)"}),
    "directions in a plane": ("file_damaged", {"space_directions": "(1,0) (0,1) (0,0)"}),
    "directions with more": ("file_damaged", {"space_directions": DIRECTIONS + "x"}),
    "direction NaN": ("bad_affine", {"space_directions": "(1,0,0) (0,1,0) (0,0,nan)"}),
    "direction with a word, which itk cuts off": ("bad_affine", {"space_directions": "(1,0,0) (0,1,0) (0,0,1mm)"}),
    "direction hexadecimal": ("bad_affine", {"space_directions": "(1,0,0) (0,1,0) (0,0,0x2)"}),
    "direction zero": ("bad_affine", {"space_directions": "(1,0,0) (0,1,0) (0,0,0)"}),
    "direction singular": ("bad_affine", {"space_directions": "(1,0,0) (1,0,0) (0,0,1)"}),
    "direction huge": ("bad_affine", {"space_directions": "(1e300,0,0) (0,1e300,0) (0,0,1e300)"}),
    "micrometres": ("bad_spacing", {"space_directions": "(800,0,0) (0,800,0) (0,0,2500)"}),
    "sheared": ("sheared", {"space_directions": "(1,0,0) (0.1,1,0) (0,0,1)"}),
    "leans too far": ("gantry_tilt", {"space_directions": "(1,0,0) (0,1,0) (0,1,1)"}),
    "no origin": ("position_absent", {"space_origin": None}),
    "origin none": ("position_absent", {"space_origin": "none"}),
    "origin NaN": ("bad_affine", {"space_origin": "(nan,0,0)"}),
    "origin of two": ("file_damaged", {"space_origin": "(0,0)"}),
    "metres": ("units", {"space_units": '"m" "m" "m"'}),
    "one unit in metres": ("units", {"space_units": '"mm" "mm" "m"'}),
    "two units": ("units", {"space_units": '"mm" "mm"'}),
    "units without quotes": ("units", {"space_units": "mm mm mm"}),
    "kinds of another number": ("file_damaged", {"kinds": "domain domain"}),
    "a kind of time": ("not_3d", {"kinds": "domain domain time"}),
    "no byte order": ("file_damaged", {"endian": None}),
    "byte order unknown": ("file_damaged", {"endian": "middle"}),
    "no encoding": ("file_damaged", {"encoding": None}),
    "text voxels": ("encoding", {"encoding": "ascii"}),
    "hexadecimal voxels": ("encoding", {"encoding": "hex"}),
    "bzip2": ("encoding", {"encoding": "bzip2"}),
    "bytes to skip": ("encoding", {"byte_skip": "4"}),
    "bytes to skip from the end": ("encoding", {"byteskip": "-1"}),
    "lines to skip": ("encoding", {"line_skip": "1"}),
    "values were scaled": ("bad_scaling", {"old_min": "0"}),
    "voxels elsewhere": ("detached_data", {"data_file": "Q7ZKX.raw"}),
    "voxels in many files": ("detached_data", {"datafile": "LIST\nQ7ZKX.raw"}),
    "field unknown": ("file_damaged", {"spacing": "1 1 1"}),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_fault_is_refused_for_its_reason(tmp_path: Path, fault: str) -> None:
    code, changed = FAULTS[fault]
    assert refused(write(tmp_path / "f.nrrd", **changed)).code == code


def test_a_field_given_twice(tmp_path: Path) -> None:
    path = tmp_path / "d.nrrd"
    content = write(path).read_bytes()
    for line in (b"sizes: 7 6 5\n", b"Space Origin: (0,0,0)\n", b"byte skip: 0\nbyteskip: 0\n"):
        path.write_bytes(content.replace(b"\ntype", b"\n" + line + b"type", 1))
        assert refused(path).code == "file_damaged"


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e39])
def test_voxels_that_are_no_number(tmp_path: Path, value: float) -> None:
    data = voxels(dtype=np.float64)
    data[1, 2, 3] = value
    refusal = refused(write(tmp_path / "n.nrrd", data.tobytes(order="F"), type="double"))
    assert (refusal.code, refusal.facts) == ("non_finite", {"voxels": 1})


@pytest.mark.parametrize("encoding", ["raw", "gzip"])
def test_a_file_cut_anywhere_or_padded_is_refused(tmp_path: Path, encoding: str) -> None:
    raw = voxels().tobytes(order="F")
    path = write(tmp_path / "t.nrrd", raw if encoding == "raw" else gzip.compress(raw), encoding=encoding)
    content = path.read_bytes()
    for size in [*range(0, len(content), 13), len(content) - 1]:
        path.write_bytes(content[:size])
        assert refused(path).code in ("file_damaged", "file_truncated")
    for padding in (b"\n", b"x" * 1000):
        path.write_bytes(content + padding)
        assert refused(path).code == ("file_excess" if encoding == "raw" else "file_damaged")


def test_damaged_packing(tmp_path: Path) -> None:
    raw = np.random.default_rng(0).integers(0, 999, SHAPE).astype(np.int16).tobytes(order="F")
    good = gzip.compress(raw, mtime=0)
    path = tmp_path / "z.nrrd"
    members = write(path, gzip.compress(raw[:100]) + gzip.compress(raw[100:]), encoding="gzip")
    np.testing.assert_array_equal(
        read_nrrd(members, ReaderPolicy()).array, np.frombuffer(raw, "<i2").reshape(SHAPE, order="F")
    )
    for place in range(10, len(good)):  # after the member's header; itk 5.4.7 returns other voxels for some
        mutant = bytearray(good)
        mutant[place] ^= 0x55
        refusal = refused(write(path, bytes(mutant), encoding="gzip"))
        assert refusal.code in ("file_damaged", "file_truncated", "file_excess")
    for content, code in (
        (gzip.compress(raw[:-2]), "file_truncated"),
        (gzip.compress(raw + raw), "file_excess"),
        (good + good, "file_excess"),
        (good[:-3], "file_truncated"),
        (good + b"garbage", "file_damaged"),
        (zlib.compress(raw), "file_damaged"),
        (bz2.compress(raw), "file_damaged"),
        (gzip.compress(bytes(1 << 26)), "file_excess"),  # a bomb
    ):
        assert refused(write(path, content, encoding="gzip")).code == code


def test_what_is_no_nrrd(tmp_path: Path) -> None:
    path = tmp_path / "x.nrrd"
    good = write(path).read_bytes()
    for content in (
        b"", b"\n", b"hello", b"hello\n\n", b"NRRD0005", b"NRRD0005\n\n", good.replace(b"NRRD0005", b"NRRD0009"),
        good.replace(b"NRRD0005", b"NRRD0005 "), b"NRRD0005\n" + b"# a\n" * 400_000, b"NRRD0005\n" + b"(" * (1 << 21),
        bytes(5000), b"NRRD0005\n \n\n", b"NRRD0005\nspace directions: " + b"(" * 500_000 + b"\n\n",
    ):  # fmt: skip
        path.write_bytes(content)
        assert refused(path).code in ("file_damaged", "no_orientation")


@pytest.mark.parametrize("encoding", ["raw", "gzip"])
def test_memory_follows_the_file_not_its_header(tmp_path: Path, encoding: str) -> None:
    read_nrrd(write(tmp_path / "first.nrrd"), ReaderPolicy())  # loads itk
    # 400 million voxels of 8 bytes: inside max_voxels, and what a packed file of 4 MB could just hold.
    noise = np.random.default_rng(0).bytes(4 << 20)
    block = noise if encoding == "raw" else gzip.compress(noise, 1)
    path = write(tmp_path / "lie.nrrd", block, sizes="1000 1000 400", type="double", encoding=encoding)
    ramp.check_small_memory(read_nrrd, path)


@pytest.mark.parametrize("choice", ["keep", "resample", "refuse"])
def test_a_leaning_third_axis(tmp_path: Path, choice: str) -> None:
    affine = ramp.turned(25, lean=15)
    path = write(tmp_path / "g.nrrd", affine=affine)
    ramp.check_leaning(read_nrrd, path, affine, choice)


def test_policy_reaches_nrrd(tmp_path: Path) -> None:
    path = write(tmp_path / "p.nrrd", sizes="42 5 1")
    ramp.check_policy(read_nrrd, path)


# What no check can find, because nothing else in the file says it.
UNDETECTABLE = {
    "sizes": ("7 5 6", "sizes exchanged: as many voxels"),
    "space directions": ("(-0.8,0,0) (0,-0.9,0) (0,0,3)", "a plausible voxel size or turn"),
    "space origin": ("(-12,30,24)", "any place is as good"),
    "space": ("RAS", "one of the three that are read for another"),
    "type": ("ushort", "signed or not, integer or float of the same width"),
    "endian": ("big", "the other order"),
}


@pytest.mark.parametrize("name", UNDETECTABLE)
def test_the_undetectable_is_so(tmp_path: Path, name: str) -> None:
    changed = {name.replace(" ", "_"): UNDETECTABLE[name][0]}
    path = write(tmp_path / "u.nrrd", ramp.stored(ramp.turned(0)).tobytes(order="F"), **changed)
    assert ramp.verdict(read_nrrd, path) == "wrong"


@pytest.mark.parametrize("encoding", ["raw", "gzip"])
@pytest.mark.parametrize("mutants", [200, pytest.param(10_000, marks=pytest.mark.slow)])
def test_a_damaged_header_is_refused_or_harmless_or_undetectable(tmp_path: Path, encoding: str, mutants: int) -> None:
    content = ramp.stored(ramp.turned(0)).tobytes(order="F")
    block = content if encoding == "raw" else gzip.compress(content)
    path = write(tmp_path / "f.nrrd", block, encoding=encoding)
    assert ramp.verdict(read_nrrd, path) == "agrees"
    header = path.read_bytes()[: -len(block)].splitlines(keepends=True)
    plausible = [
        *(line.partition(b": ")[2].strip() for line in header),
        b"6 7 5",
        b"ushort",
        b"RAS",
        b"big",
        b"2",
        b"4",
    ]
    wrong = ramp.fields_that_go_wrong(read_nrrd, path, header[:-1], header[-1] + block, plausible, mutants)
    assert wrong <= set(UNDETECTABLE)
