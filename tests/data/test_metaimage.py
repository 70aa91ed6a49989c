from __future__ import annotations

import gzip
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bundle.data.metaimage import is_metaimage_name, read_metaimage
from bundle.data.policy import ReaderPolicy
from bundle.errors import Refusal
from tests.data import ramp

LPS = np.diag([-1.0, -1, 1, 1])
SHAPE = (7, 6, 5)
TYPES = {
    "MET_CHAR": "i1", "MET_UCHAR": "u1", "MET_SHORT": "i2", "MET_USHORT": "u2", "MET_INT": "i4", "MET_UINT": "u4",
    "MET_LONG": "i4", "MET_ULONG": "u4", "MET_LONG_LONG": "i8", "MET_ULONG_LONG": "u8", "MET_FLOAT": "f4",
    "MET_DOUBLE": "f8",
}  # fmt: skip


def voxels(shape: tuple[int, ...] = SHAPE, dtype: Any = np.int16) -> np.ndarray:
    return (np.arange(np.prod(shape)) % 120).reshape(shape).astype(dtype)


def numbers(values: np.ndarray) -> str:
    return " ".join(repr(float(value)) for value in values.ravel())


def fields(affine: np.ndarray, shape: tuple[int, ...] = SHAPE) -> dict[str, str]:
    """A header as itk writes it, of an affine that is voxel → RAS+ mm."""
    lps = LPS @ affine
    spacing = np.linalg.norm(lps[:3, :3], axis=0)
    letters = []
    for direction in (lps[:3, :3] / spacing).T:
        axis = int(np.abs(direction).argmax())
        letters.append(("RAI", "LPS")[int(direction[axis] < 0)][axis])
    return {
        "ObjectType": "Image",
        "NDims": "3",
        "BinaryData": "True",
        "BinaryDataByteOrderMSB": "False",
        "CompressedData": "False",
        "TransformMatrix": numbers((lps[:3, :3] / spacing).T),
        "Offset": numbers(lps[:3, 3]),
        "CenterOfRotation": "0 0 0",
        "AnatomicalOrientation": "".join(letters),
        "ElementSpacing": numbers(spacing),
        "DimSize": " ".join(map(str, shape)),
        "Comment": ramp.CANARY,
        "ElementType": "MET_SHORT",
        "ElementDataFile": "LOCAL",
    }


def write(path: Path, content: bytes | None = None, affine: np.ndarray | None = None, **changed: str | None) -> Path:
    """A file of `voxels()`; a field changed to None is left out, and a new one comes before the last."""
    header: dict[str, str | None] = {**fields(ramp.turned(0) if affine is None else affine)}
    last = header.pop("ElementDataFile")
    header.update({key: value for key, value in changed.items() if key != "ElementDataFile"})
    header["ElementDataFile"] = changed.get("ElementDataFile", last)
    lines = [f"{key} = {value}\n" for key, value in header.items() if value is not None]
    path.write_bytes("".join(lines).encode() + (voxels().tobytes(order="F") if content is None else content))
    return path


def packed(content: bytes | None = None) -> tuple[bytes, dict[str, str]]:
    block = zlib.compress(voxels().tobytes(order="F") if content is None else content)
    return block, {"CompressedData": "True", "CompressedDataSize": str(len(block))}


def refused(path: Path, channels: int = 1, policy: ReaderPolicy | None = None) -> Refusal:
    return ramp.refused(read_metaimage, path, channels, policy)


def read_with_itk(path: Path) -> tuple[np.ndarray, np.ndarray]:
    import itk

    image = itk.imread(path, itk.F)
    affine = np.eye(4)
    affine[:3, :3] = itk.array_from_matrix(image.GetDirection()) * np.array(image.GetSpacing())
    affine[:3, 3] = np.array(image.GetOrigin())
    return itk.array_from_image(image).transpose(), LPS @ affine


@pytest.mark.parametrize(
    ("name", "expected"),
    [("a.mha", True), ("A.MHA", True), ("b.mhd", True), ("b.Mhd", True), ("mha", False), ("a.mha.gz", False)],
)
def test_names(name: str, expected: bool) -> None:
    assert is_metaimage_name(Path(name)) is expected


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("big", [False, True])
@pytest.mark.parametrize("compressed", [False, True])
def test_every_type_order_and_packing(tmp_path: Path, kind: str, big: bool, compressed: bool) -> None:
    values = voxels(dtype=np.dtype(TYPES[kind]).newbyteorder(">" if big else "<"))
    content, extra = packed(values.tobytes(order="F")) if compressed else (values.tobytes(order="F"), {})
    path = write(tmp_path / "a.mha", content, ElementType=kind, BinaryDataByteOrderMSB=str(big), **extra)
    volume = read_metaimage(path, ReaderPolicy())
    np.testing.assert_array_equal(volume.array, voxels())
    np.testing.assert_allclose(volume.affine, ramp.turned(0), atol=1e-12)
    assert (volume.array.dtype, volume.affine.dtype, volume.source) == (np.float32, np.float64, "metaimage")
    assert (volume.modality, volume.slice_uids, volume.series_uid) == (None, None, None)


@pytest.mark.parametrize("degrees", [0, 33, 90, 180, -120])
@pytest.mark.parametrize("mirrored", [False, True])
@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.float32])
@pytest.mark.parametrize("compressed", [False, True])
def test_agrees_with_what_itk_wrote(
    tmp_path: Path, degrees: float, mirrored: bool, dtype: type, compressed: bool
) -> None:
    import itk

    affine = ramp.turned(degrees, mirrored=mirrored)
    image = itk.image_from_array(voxels(dtype=dtype).transpose().copy())
    lps = LPS @ affine
    spacing = np.linalg.norm(lps[:3, :3], axis=0)
    image.SetDirection(itk.matrix_from_array(lps[:3, :3] / spacing))
    image.SetSpacing(spacing.tolist())
    image.SetOrigin(lps[:3, 3].tolist())
    path = tmp_path / "itk.mha"
    itk.imwrite(image, path, compression=compressed)
    volume = read_metaimage(path, ReaderPolicy())
    array, by_itk = read_with_itk(path)
    np.testing.assert_array_equal(volume.array, voxels())
    np.testing.assert_array_equal(volume.array, array)
    np.testing.assert_allclose(volume.affine, affine, atol=1e-6)
    np.testing.assert_allclose(volume.affine, by_itk, atol=1e-12)


def test_channels(tmp_path: Path) -> None:
    values = voxels((*SHAPE, 3))
    inside = np.moveaxis(values, -1, 0).tobytes(order="F")  # the channels of a voxel side by side
    path = write(tmp_path / "i.mha", inside, ElementNumberOfChannels="3")
    np.testing.assert_array_equal(read_metaimage(path, ReaderPolicy(), 3).array, values)
    four = {
        "NDims": "4",
        "DimSize": "7 6 5 3",
        "ElementSpacing": "0.8 0.9 2.5 1",
        "Offset": "-12 30 4 0",
        "CenterOfRotation": "0 0 0 0",
        "AnatomicalOrientation": "????",
        "TransformMatrix": "-1 0 0 0 0 -1 0 0 0 0 1 0 0 0 0 1",
    }
    last = write(tmp_path / "l.mha", values.tobytes(order="F"), **four)
    np.testing.assert_array_equal(read_metaimage(last, ReaderPolicy(), 3).array, values)
    np.testing.assert_allclose(read_metaimage(last, ReaderPolicy(), 3).affine, ramp.turned(0), atol=1e-12)
    one = write(tmp_path / "o.mha", **{**four, "DimSize": "7 6 5 1"})
    np.testing.assert_array_equal(read_metaimage(one, ReaderPolicy()).array, voxels())
    for file, channels, found in ((path, 1, 3), (last, 2, 3), (one, 3, 1)):
        assert refused(file, channels).facts == {"found": found, "expected": channels}
    both = write(tmp_path / "b.mha", ElementNumberOfChannels="3", **four)
    assert refused(both, 3).code == "not_3d"
    turning = {**four, "TransformMatrix": "-1 0 0 0 0 -1 0 0 0 0 1 0.5 0 0 0.5 1"}
    assert refused(write(tmp_path / "t.mha", values.tobytes(order="F"), **turning), 3).code == "bad_affine"


def test_synonyms_and_line_ends(tmp_path: Path) -> None:
    plain = fields(ramp.turned(0))
    path = tmp_path / "s.mha"
    for matrix, offset in (("Rotation", "Position"), ("Orientation", "Origin")):
        other = {"TransformMatrix": None, matrix: plain["TransformMatrix"], "Offset": None, offset: plain["Offset"]}
        order = {"BinaryDataByteOrderMSB": None, "ElementByteOrderMSB": "False"}
        volume = read_metaimage(write(path, **other, **order), ReaderPolicy())
        np.testing.assert_allclose(volume.affine, ramp.turned(0), atol=1e-12)
    assert read_metaimage(write(path, ElementByteOrderMSB="False"), ReaderPolicy()).array[1, 0, 0] == 30
    assert refused(write(path, ElementByteOrderMSB="True")).code == "file_damaged"
    assert refused(write(path, Position="1 2 3")).code == "file_damaged"
    header, _, content = write(path).read_bytes().partition(b"LOCAL\n")
    path.write_bytes((header + b"LOCAL\n").replace(b"\n", b"\r\n") + content)
    np.testing.assert_array_equal(read_metaimage(path, ReaderPolicy()).array, voxels())


@pytest.mark.parametrize("first", [b"\n\n", b"\r\n", b" \n", b"\t\0", b"=:"])
def test_voxels_that_look_like_text(tmp_path: Path, first: bytes) -> None:
    content = first + voxels().tobytes(order="F")[2:]
    volume = read_metaimage(write(tmp_path / "w.mha", content), ReaderPolicy())
    expected = np.frombuffer(content, "<i2").reshape(SHAPE, order="F")
    np.testing.assert_array_equal(volume.array, expected)


FAULTS: dict[str, tuple[str, dict[str, str | None]]] = {
    "no object type": ("file_damaged", {"ObjectType": None}),
    "another object": ("file_damaged", {"ObjectType": "Tube"}),
    "no dimensions": ("file_damaged", {"NDims": None}),
    "dimensions no number": ("file_damaged", {"NDims": "three"}),
    "two dimensions": ("not_3d", {"NDims": "2", "DimSize": "42 5", "ElementNumberOfChannels": "5"}),
    "five dimensions": ("not_3d", {"NDims": "5", "DimSize": "7 6 5 1 1"}),
    "no size": ("file_damaged", {"DimSize": None}),
    "size negative": ("file_damaged", {"DimSize": "7 -6 5"}),
    "size zero": ("file_damaged", {"DimSize": "7 0 5"}),
    "two sizes": ("file_damaged", {"DimSize": "7 30"}),
    "size no whole number": ("file_damaged", {"DimSize": "7 6 5.0"}),
    "size of many digits": ("file_damaged", {"DimSize": "7 6 " + "9" * 5000}),
    "one slice": ("too_few_slices", {"DimSize": "42 5 1"}),
    "declares far too much": ("too_large", {"DimSize": "32767 32767 32767"}),
    "declares more": ("file_truncated", {"DimSize": "7 6 6"}),
    "declares less": ("file_excess", {"DimSize": "7 6 4"}),
    "no type": ("file_damaged", {"ElementType": None}),
    "type of several": ("voxel_type", {"ElementType": "MET_SHORT_ARRAY"}),
    "type unknown": ("file_damaged", {"ElementType": "short"}),
    "text voxels": ("encoding", {"BinaryData": "False"}),
    "no word on binary": ("file_damaged", {"BinaryData": None}),
    "binary no truth": ("file_damaged", {"BinaryData": "1"}),
    "no byte order": ("file_damaged", {"BinaryDataByteOrderMSB": None}),
    "bytes to skip": ("encoding", {"HeaderSize": "4"}),
    "bytes to skip from the end": ("encoding", {"HeaderSize": "-1"}),
    "scaled": ("bad_scaling", {"ElementToIntensityFunctionSlope": "2"}),
    "shifted": ("bad_scaling", {"ElementToIntensityFunctionOffset": "-1024"}),
    "no matrix": ("no_orientation", {"TransformMatrix": None}),
    "no offset": ("position_absent", {"Offset": None}),
    "no spacing": ("spacing_absent", {"ElementSpacing": None}),
    "element size is no spacing": ("spacing_absent", {"ElementSpacing": None, "ElementSize": "1 1 1"}),
    "spacing zero": ("bad_spacing", {"ElementSpacing": "1 1 0"}),
    "spacing negative": ("bad_spacing", {"ElementSpacing": "1 1 -2.5"}),
    "spacing NaN": ("bad_spacing", {"ElementSpacing": "1 1 nan"}),
    "spacing with a comma": ("bad_spacing", {"ElementSpacing": "0,8 0,9 2,5"}),
    "spacing with a unit": ("bad_spacing", {"ElementSpacing": "0.8 0.9 2.5mm"}),
    "spacing in micrometres": ("bad_spacing", {"ElementSpacing": "800 900 2500"}),
    "two spacings": ("file_damaged", {"ElementSpacing": "1 1"}),
    "matrix NaN": ("bad_affine", {"TransformMatrix": "nan 0 0 0 1 0 0 0 1"}),
    "matrix zero": ("bad_affine", {"TransformMatrix": "0 0 0 0 0 0 0 0 0"}),
    "matrix singular": ("bad_affine", {"TransformMatrix": "1 0 0 1 0 0 0 0 1"}),
    "matrix of huge numbers": ("bad_affine", {"TransformMatrix": "1e308 0 0 0 1e308 0 0 0 1e308"}),
    "matrix of eight": ("file_damaged", {"TransformMatrix": "1 0 0 0 1 0 0 0"}),
    "matrix scales": ("spacing_disagrees", {"TransformMatrix": "2 0 0 0 2 0 0 0 2"}),
    "matrix shears": ("sheared", {"TransformMatrix": "1 0 0 0.0995 0.995 0 0 0 1"}),
    "leans too far": ("gantry_tilt", {"TransformMatrix": "-1 0 0 0 -1 0 0 0.7071068 0.7071068"}),
    "offset infinite": ("bad_affine", {"Offset": "inf 0 0"}),
    "offset huge": ("bad_affine", {"Offset": "1e300 0 0"}),
    "letters contradict the matrix": ("affines_disagree", {"AnatomicalOrientation": "RPI"}),
    "letters of other axes": ("affines_disagree", {"AnatomicalOrientation": "PLI"}),
    "letters are none": ("file_damaged", {"AnatomicalOrientation": "XYZ"}),
    "turned about a point": ("affines_disagree", {"CenterOfRotation": "1 2 3"}),
    "centimetres": ("units", {"DistanceUnits": "cm"}),
    "voxels elsewhere": ("detached_data", {"ElementDataFile": "Q7ZKX.raw"}),
    "voxels in many files": ("detached_data", {"ElementDataFile": "LIST"}),
    "capitals": ("file_damaged", {"elementspacing": "2 2 2"}),
    "a colon, which itk takes for an equals sign": ("file_damaged", {"ElementSpacing : 2 2 2 ": "x"}),
    "packing no truth": ("file_damaged", {"CompressedData": "maybe"}),
    "packed without its size": ("file_damaged", {"CompressedData": "True"}),
    "comment too long for itk": ("file_damaged", {"Comment": "x" * 600}),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_fault_is_refused_for_its_reason(tmp_path: Path, fault: str) -> None:
    code, changed = FAULTS[fault]
    assert refused(write(tmp_path / "f.mha", **changed)).code == code


@pytest.mark.parametrize("letters", ["LPI", "RAS", "???"])
def test_letters_say_where_axes_come_from_or_go_to(tmp_path: Path, letters: str) -> None:
    path = write(tmp_path / "a.mha", AnatomicalOrientation=letters, DistanceUnits="mm", HeaderSize="0")
    np.testing.assert_allclose(read_metaimage(path, ReaderPolicy()).affine, ramp.turned(0), atol=1e-12)


def test_a_key_given_twice(tmp_path: Path) -> None:
    content = write(tmp_path / "d.mha").read_bytes()
    for line in (b"ElementSpacing = 0.8 0.9 2.5\n", b"Offset = 0 0 0\n", b"ElementType = MET_SHORT\n"):
        (tmp_path / "d.mha").write_bytes(line + content)
        assert refused(tmp_path / "d.mha").code == "file_damaged"
    (tmp_path / "d.mha").write_bytes(b"Name = a\nName = b\n\n" + content)  # free text
    assert read_metaimage(tmp_path / "d.mha", ReaderPolicy()).array.shape == SHAPE


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e39])
def test_voxels_that_are_no_number(tmp_path: Path, value: float) -> None:
    data = voxels(dtype=np.float64)
    data[1, 2, 3] = value
    refusal = refused(write(tmp_path / "n.mha", data.tobytes(order="F"), ElementType="MET_DOUBLE"))
    assert (refusal.code, refusal.facts) == ("non_finite", {"voxels": 1})


@pytest.mark.parametrize("compressed", [False, True])
def test_a_file_cut_anywhere_or_padded_is_refused(tmp_path: Path, compressed: bool) -> None:
    block, extra = packed() if compressed else (None, {})
    path = write(tmp_path / "t.mha", block, **extra)
    content = path.read_bytes()
    for size in [*range(0, len(content), 13), len(content) - 1]:
        path.write_bytes(content[:size])
        assert refused(path).code in ("file_damaged", "file_truncated")
    for padding in (b"\0", b"\n", b"x" * 1000):
        path.write_bytes(content + padding)
        assert refused(path).code == "file_excess"


def test_damaged_packing(tmp_path: Path) -> None:
    raw = np.random.default_rng(0).integers(0, 999, SHAPE).astype(np.int16).tobytes(order="F")
    good, extra = packed(raw)
    path = tmp_path / "z.mha"
    assert read_metaimage(write(path, good, **extra), ReaderPolicy()).array.shape == SHAPE
    for place in range(len(good)):  # itk 5.4.7 returns other voxels, or the right ones of a block with a wrong sum
        mutant = bytearray(good)
        mutant[place] ^= 0x55
        assert refused(write(path, bytes(mutant), **extra)).code in ("file_damaged", "file_truncated", "file_excess")
    for content, code in (
        (zlib.compress(raw[:-2]), "file_truncated"),
        (zlib.compress(raw + raw), "file_excess"),
        (good[:-3], "file_truncated"),
        (good + b"\0", "file_damaged"),
        (gzip.compress(raw), "file_damaged"),
        (zlib.compress(bytes(1 << 26)), "file_excess"),  # a bomb
    ):
        size = {**extra, "CompressedDataSize": str(len(content))}
        assert refused(write(path, content, **size)).code == code
    for size_word in ("0", "-1", "x", str(len(good) - 1), str(len(good) + 1)):
        refusal = refused(write(path, good, **{**extra, "CompressedDataSize": size_word}))
        assert refusal.code in ("file_damaged", "file_truncated", "file_excess")


def test_what_is_no_metaimage(tmp_path: Path) -> None:
    path = tmp_path / "x.mha"
    for content in (b"", b"hello", b"a = b\n" * 300_000, b" " * (1 << 21), b"=" * 5000, bytes(5000), b"\xff" * 5000):
        path.write_bytes(content)
        assert refused(path).code == "file_damaged"


@pytest.mark.parametrize("compressed", [False, True])
def test_memory_follows_the_file_not_its_header(tmp_path: Path, compressed: bool) -> None:
    read_metaimage(write(tmp_path / "first.mha"), ReaderPolicy())  # loads itk
    # 400 million voxels of 8 bytes: inside max_voxels, and what a packed file of 4 MB could just hold.
    noise = np.random.default_rng(0).bytes(4 << 20)
    block, extra = packed(noise) if compressed else (noise, {})
    path = write(tmp_path / "lie.mha", block, DimSize="1000 1000 400", ElementType="MET_DOUBLE", **extra)
    ramp.check_small_memory(read_metaimage, path)


@pytest.mark.parametrize("choice", ["keep", "resample", "refuse"])
def test_a_leaning_third_axis(tmp_path: Path, choice: str) -> None:
    affine = ramp.turned(25, lean=15)
    path = write(tmp_path / "g.mha", affine=affine)
    ramp.check_leaning(read_metaimage, path, affine, choice)


def test_policy_reaches_metaimage(tmp_path: Path) -> None:
    path = write(tmp_path / "p.mha", DimSize="42 5 1")
    ramp.check_policy(read_metaimage, path)


UNDETECTABLE = {
    "DimSize": "sizes exchanged: as many voxels",
    "ElementSpacing": "a plausible voxel size, and the matrix has none",
    "Offset": "any place is as good",
    "ElementType": "signed or not, integer or float of the same width",
    "BinaryDataByteOrderMSB": "the other order",
    "TransformMatrix": "only with letters left out or unknown; else another turn that keeps them",
}


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("DimSize", "6 7 5"),
        ("ElementSpacing", "0.8 0.9 3"),
        ("Offset", "-22 30 4"),
        ("ElementType", "MET_USHORT"),
        ("BinaryDataByteOrderMSB", "True"),
        ("TransformMatrix", "1 0 0 0 -1 0 0 0 1"),
    ],
)
def test_the_undetectable_is_so(tmp_path: Path, key: str, value: str) -> None:
    assert key in UNDETECTABLE
    letters = {"AnatomicalOrientation": None} if key == "TransformMatrix" else {}
    path = write(tmp_path / "u.mha", ramp.stored(ramp.turned(0)).tobytes(order="F"), **{key: value}, **letters)
    assert ramp.verdict(read_metaimage, path) == "wrong"


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("mutants", [200, pytest.param(10_000, marks=pytest.mark.slow)])
def test_a_damaged_header_is_refused_or_harmless_or_undetectable(
    tmp_path: Path, compressed: bool, mutants: int
) -> None:
    content = ramp.stored(ramp.turned(0)).tobytes(order="F")
    block, extra = packed(content) if compressed else (content, {})
    path = write(tmp_path / "f.mha", block, **extra)
    assert ramp.verdict(read_metaimage, path) == "agrees"
    header = path.read_bytes()[: -len(block)].splitlines(keepends=True)
    plausible = [*(line.partition(b" = ")[2].strip() for line in header), b"6 7 5", b"MET_USHORT", b"True", b"2", b"4"]
    wrong = ramp.fields_that_go_wrong(read_metaimage, path, header, block, plausible, mutants)
    assert wrong <= set(UNDETECTABLE)
