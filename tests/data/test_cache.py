"""The slice cache: what comes out is what was prepared, nothing stale or damaged is taken, and many may share it."""

from __future__ import annotations

import copy
import errno
import functools
import json
import logging
import multiprocessing
import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.bundle import ConfigParser
from monai.transforms import AdjustContrastd, Compose, ScaleIntensityRanged, Transform
from pydicom.uid import UID
from torch.utils.data import DataLoader

from bundle.data import cache as cache_module
from bundle.data import cache_key
from bundle.data.augment import RandBagAffined, RandSliceIntensityd
from bundle.data.cache import SliceCache, open_cache
from bundle.data.cache_entry import DamagedEntry, Entry, write_entry
from bundle.data.cache_key import case_digest, case_stamp, code_digest, described, digest
from bundle.data.collate import collate_bags
from bundle.data.dataset import BagDataset, watched
from bundle.data.dicom_files import DicomFiles
from bundle.data.policy import ReaderPolicy, SeriesRules
from bundle.data.reader import LoadImageStrictd
from bundle.data.sampling import (
    AllSlicesd,
    DrawTransform,
    RandomSlicesd,
    StratifiedSlicesd,
    UniformSlicesd,
    draws_by_number,
)
from bundle.errors import InputError, Refusal
from tests.data.dicom_factory import CANARY, make_series

ROOT = Path(__file__).parents[2]
# Python 3.12 warns of every fork beside threads.
forks = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
FORK = multiprocessing.get_context("fork")


# --- an entry ---


def written(folder: Path, image: torch.Tensor, cache_type: str = "uint16", **others: Any) -> Entry:
    folder.mkdir()
    size = write_entry(folder, {"image": image, **others}, {}, cache_type)
    assert size == sum(path.stat().st_size for path in folder.iterdir())
    return Entry(folder)


def uniform(low: float, high: float, shape: tuple[int, ...] = (5, 2, 9, 7), seed: int = 0) -> torch.Tensor:
    values = np.random.default_rng(seed).uniform(low, high, shape).astype(np.float32)
    values.flat[:2] = low, high
    return torch.from_numpy(values)


@pytest.mark.parametrize(
    ("low", "high"), [(0, 1), (0, 1e-6), (-1000, 3000), (0.25, 0.5), (-1, 0), (0, 3e38), (5, 5), (-3, -2.9)]
)
def test_fixed_point_is_off_by_at_most_half_a_step(low: float, high: float, tmp_path: Path) -> None:
    image = uniform(low, high)
    entry = written(tmp_path / "e", image)
    back = entry.slices()
    assert (back.dtype, back.shape) == (torch.float32, image.shape)
    rounding = np.spacing(np.float32(max(abs(low), abs(high))))
    assert (back.double() - image.double()).abs().max() <= (high - low) / 131070 + rounding
    assert back.min() == image.min()
    assert back.max() <= image.max()
    assert (tmp_path / "e" / "image.npy").stat().st_size == 128 + image.numel() * 2
    again = written(tmp_path / "f", back).slices()
    assert torch.equal(back, again), "storing what came out must not change it"


def test_background_and_binary_shapes_come_back_exactly(tmp_path: Path) -> None:
    image = torch.rand(6, 1, 8, 8).clamp_min(0.4).sub(0.4)
    back = written(tmp_path / "e", image).slices()
    assert torch.equal(back == 0, image < 0.3 / 65535)
    shapes = (torch.rand(6, 1, 8, 8) > 0.5).float()
    assert torch.equal(written(tmp_path / "f", shapes).slices(), shapes)


def with_value(value: float) -> torch.Tensor:
    image = uniform(0, 1)
    image[2, 0, 3, 3] = value
    return image


EXACT: dict[str, torch.Tensor] = {
    "NaN": with_value(np.nan),
    "infinity": with_value(np.inf),
    "minus infinity": with_value(-np.inf),
    "infinity alone": torch.full((2, 1, 3, 3), np.inf),
    "too wide": uniform(-3e38, 3e38),
    "too narrow beside its values": uniform(1, 1 + 1e-6),
    "too narrow": uniform(0, 1e-40),
    "float64": uniform(0, 1).double(),
    "float16": uniform(0, 1).half(),
    "integers": torch.arange(24).view(4, 1, 2, 3),
    "booleans": torch.ones(3, 1, 2, 2, dtype=torch.bool),
    "no slices": torch.zeros(0, 1, 4, 4),
}


@pytest.mark.parametrize("kind", EXACT)
def test_what_levels_cannot_hold_comes_back_bit_for_bit(kind: str, tmp_path: Path) -> None:
    image = EXACT[kind]
    back = written(tmp_path / "e", image, "uint16").slices()
    assert back.dtype == image.dtype
    assert np.array_equal(back.numpy(), image.numpy(), equal_nan=image.is_floating_point())


def test_float32_comes_back_bit_for_bit_whatever_its_layout(tmp_path: Path) -> None:
    image = uniform(0, 1).permute(0, 1, 3, 2)
    assert torch.equal(written(tmp_path / "e", image, "float32").slices(), image)


def test_the_file_is_a_plain_array_that_numpy_reads(tmp_path: Path) -> None:
    image = uniform(-2, 5)
    entry = written(tmp_path / "e", image)
    codes = np.load(tmp_path / "e" / "image.npy", mmap_mode="r", allow_pickle=False)
    assert codes.dtype == np.uint16
    assert codes.shape == tuple(image.shape)
    expected = -2 + codes.astype(np.float64) * 7 / 65535
    np.testing.assert_allclose(entry.slices().numpy(), expected, atol=1e-6)


@pytest.mark.parametrize("positions", [[0], [4], [1, 3], [3, 1, 1], [], [0, 1, 2, 3, 4]])
@pytest.mark.parametrize("cache_type", ["uint16", "float32"])
def test_slices_are_those_asked_for_and_belong_to_the_caller(
    positions: list[int], cache_type: str, tmp_path: Path
) -> None:
    entry = written(tmp_path / "e", uniform(0, 1), cache_type)
    whole, before = entry.slices(), (tmp_path / "e" / "image.npy").read_bytes()
    some = entry.slices(torch.tensor(positions, dtype=torch.int64))
    assert torch.equal(some, whole[positions])
    some.fill_(7)
    whole.fill_(7)
    assert torch.equal(entry.slices(), Entry(tmp_path / "e").slices())
    assert (tmp_path / "e" / "image.npy").read_bytes() == before


def assert_same(one: Any, two: Any) -> None:
    assert type(one) is type(two)
    if isinstance(one, (torch.Tensor, np.ndarray)):
        assert (one.dtype, one.shape) == (two.dtype, two.shape)
        assert np.array_equal(np.asarray(one), np.asarray(two), equal_nan=np.asarray(one).dtype.kind == "f")
    elif isinstance(one, dict):
        assert list(one) == list(two)
        for key in one:
            assert_same(one[key], two[key])
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(two)
        for a, b in zip(one, two, strict=True):
            assert_same(a, b)
    else:
        assert repr(one) == repr(two)


def test_everything_else_comes_back_with_its_type(tmp_path: Path) -> None:
    others = {
        "none": None, "yes": True, "one": 1, "float": 0.1, "nan": float("nan"), "inf": -float("inf"), "text": "ü\n\0",
        "tuple": (1, (2.0, "x"), []), "list": [None, (1,)], "dict": {"tuple": (1,), 3: {"a": None}}, "empty": {},
        "position": torch.linspace(0, 1, 5, dtype=torch.float64) / 3, "index": torch.arange(5),
        "flags": torch.tensor([True, False]), "nothing": torch.zeros(0, 3), "scalar": torch.tensor(2.5),
        "array": np.array([[np.nan, 1e-300]]), "number": np.float32(0.1), "complex": np.array([1j]),
    }  # fmt: skip
    entry = written(tmp_path / "e", uniform(0, 1), **others, uid=(UID("1.2.3"), UID("1.2.4")))
    found = entry.bag({})
    assert found.pop("uid") == ("1.2.3", "1.2.4")
    assert found.pop("image").tolist() == [0, 1, 2, 3, 4]
    assert_same(found, others)
    found["position"].fill_(7)
    found["array"][:] = 7
    assert_same(entry.bag({})["position"], others["position"])


def test_what_came_through_unchanged_is_taken_from_the_case_and_not_written(tmp_path: Path) -> None:
    case = {"case": f"{CANARY} case", "patient": CANARY, "label": 1, "path": Path(CANARY)}
    bag = {"case": case["case"], "image": uniform(0, 1), "patient": CANARY, "path": case["path"], "label": 2}
    write_entry(tmp_path, bag, case, "uint16")
    assert not any(CANARY.encode() in path.read_bytes() for path in tmp_path.iterdir())
    found = Entry(tmp_path).bag({**case, "patient": "another"})
    assert found | {"image": None} == {**bag, "image": None, "patient": "another"}
    assert list(found) == list(bag)


@pytest.mark.parametrize(
    ("bag", "what"),
    [
        ({"image": uniform(0, 1).bfloat16()}, "image as Tensor"),
        ({"image": [1, 2]}, "image as list"),
        ({"image": torch.tensor(1.0)}, "image as Tensor"),
        ({"image": uniform(0, 1), "path": Path("x")}, "path as PosixPath"),
        ({"image": uniform(0, 1), "odd": [object()]}, "odd as object"),
        ({"image": uniform(0, 1), "words": np.array(["a"])}, "words as ndarray"),
    ],
)
def test_what_cannot_be_kept_is_one_sentence(bag: dict[str, Any], what: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=f"^the preparation gives {what}, which the slice cache cannot keep: .*null$"):
        write_entry(tmp_path, bag, {}, "uint16")


def flip(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 4
    path.write_bytes(content)


def other_header(path: Path) -> None:
    """A header of the same length that asks for more than any memory holds."""
    content = path.read_bytes()
    path.write_bytes(content[:128].replace(b"(5, 2, 9, 7)", b"(5, 2, 9e99)") + content[128:])


def newer_format(path: Path) -> None:
    path.write_bytes(path.read_bytes().replace(b'"format": 1', b'"format": 2'))


# name → file and what happens to it
DAMAGES: dict[str, tuple[str, Callable[[Path], Any]]] = {
    "no image": ("image.npy", Path.unlink),
    "no bag": ("bag.jsonl", Path.unlink),
    "empty image": ("image.npy", lambda path: path.write_bytes(b"")),
    "empty bag": ("bag.jsonl", lambda path: path.write_bytes(b"")),
    "image cut short": ("image.npy", lambda path: path.write_bytes(path.read_bytes()[:-1])),
    "image cut in its header": ("image.npy", lambda path: path.write_bytes(path.read_bytes()[:50])),
    "image too long": ("image.npy", lambda path: path.write_bytes(path.read_bytes() + b"\0")),
    "header of an absurd shape": ("image.npy", other_header),
    "header of a zip file": ("image.npy", lambda path: path.write_bytes(b"PK\3\4" + path.read_bytes()[4:])),
    "bit in the first slice": ("image.npy", lambda path: flip(path, 128)),
    "bit in the last slice": ("image.npy", lambda path: flip(path, -1)),
    "bit in the bag": ("bag.jsonl", lambda path: flip(path, 300)),
    "bit in its checksum": ("bag.jsonl", lambda path: flip(path, 27)),
    "another format": ("bag.jsonl", newer_format),
    "bag cut short": ("bag.jsonl", lambda path: path.write_bytes(path.read_bytes()[:-10])),
    "bag is deep garbage": ("bag.jsonl", lambda path: path.write_bytes(b"[" * 100_000)),
    "bag is binary": ("bag.jsonl", lambda path: path.write_bytes(bytes(range(256)) * 4)),
    "bag is a folder": ("bag.jsonl", lambda path: (path.unlink(), path.mkdir())),
    "image is a folder": ("image.npy", lambda path: (path.unlink(), path.mkdir())),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_noticed(damage: str, tmp_path: Path) -> None:
    written(tmp_path / "e", uniform(0, 1), text="x" * 300)
    name, change = DAMAGES[damage]
    change(tmp_path / "e" / name)
    with pytest.raises(DamagedEntry):
        Entry(tmp_path / "e").slices()


def test_only_the_slices_that_are_asked_for_are_looked_at(tmp_path: Path) -> None:
    whole = written(tmp_path / "e", uniform(0, 1)).slices()
    flip(tmp_path / "e" / "image.npy", 128 + 3 * 2 * 9 * 7 * 2)
    entry = Entry(tmp_path / "e")
    assert torch.equal(entry.slices(torch.tensor([0, 1, 2, 4])), whole[[0, 1, 2, 4]])
    with pytest.raises(DamagedEntry, match="checksum of slice 3 of 5"):
        entry.slices(torch.tensor([0, 3]))


# --- the key ---


def held_by(number: int) -> Any:
    return lambda x: x + number


def test_descriptions_are_equal_for_equal_objects_and_differ_for_others() -> None:
    def steps(**more: Any) -> list[Any]:
        policy = ReaderPolicy(**{"min_slices": 3, "series": SeriesRules(plane="axial"), **more})
        return [
            LoadImageStrictd("image", 2, policy),
            ScaleIntensityRanged(keys="image", a_min=0.0, a_max=80.0, b_min=0.0, b_max=1.0, clip=True),
        ]

    first = steps()
    assert digest(described(first)) == digest(described(steps()))
    assert digest(described(first)) != digest(described(steps(min_slices=4)))
    assert digest(described(first)) != digest(described(steps(series=SeriesRules(plane="coronal"))))
    assert digest(described(first)) != digest(described(first[::-1]))
    values = [1, 1.0, True, "1", None, (1,), {1}, {1: 1}, np.array([1]), np.array([1.0]), torch.tensor([1.0]), np.sin]
    values += [np.cos, lambda x: x + 1, lambda x: x + 2, torch.float32, Path("1"), SeriesRules(), ReaderPolicy()]
    assert len({digest(described(value)) for value in values}) == len(values)
    held = [held_by(1), held_by(2), functools.partial(torch.clamp, min=0.0), functools.partial(torch.clamp, min=0.5)]
    held += [lambda x: x.exp(), lambda x: x.log(), lambda x, y=1: x, lambda x, y=2: x, [1].count, [2].count]
    assert len({digest(described(value)) for value in held}) == len(held)
    assert digest(described(held_by(1))) == digest(described(held_by(1)))
    first_weights = torch.nn.Linear(2, 2)
    other_weights = copy.deepcopy(first_weights)
    assert digest(described([first_weights])) == digest(described([other_weights]))
    other_weights.bias.data += 1
    assert digest(described([first_weights])) != digest(described([other_weights]))
    assert "0x" not in json.dumps(described([object(), *first]))
    loop: list[Any] = [SeriesRules()]
    object.__setattr__(loop[0], "itself", loop[0])
    described(loop)  # ends


def test_a_description_does_not_change_in_use(tmp_path: Path) -> None:
    """Steps are shared by training and validation data, of which the second are described after the first were used."""
    steps = preparation()
    before = digest(described(steps))
    Compose(steps)(head_case(tmp_path))
    assert digest(described(steps)) == before


def image_kinds(folder: Path) -> dict[str, Any]:
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("a.nii", "b.nii"):
        (folder / name).write_bytes(name.encode() * 100)
    for name in ("1.dcm", "sub/2.dcm"):
        (folder / "series" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "series" / name).write_bytes(name.encode() * 100)
    series = folder / "series"
    return {
        "file": str(folder / "a.nii"),
        "path": folder / "a.nii",
        "list": [str(folder / "a.nii"), folder / "b.nii"],
        "folder": str(series),
        "files": DicomFiles((series / "1.dcm", series / "sub" / "2.dcm")),
    }


KINDS = ("file", "path", "list", "folder", "files")


@pytest.mark.parametrize("kind", KINDS)
def test_a_key_follows_the_content_and_not_the_place(kind: str, tmp_path: Path) -> None:
    first, second = (image_kinds(tmp_path / name)[kind] for name in ("one", "two"))
    memo = tmp_path / "memo"
    assert case_digest({"image": first}, memo) == case_digest({"image": second}, memo)
    changed = (
        tmp_path
        / "two"
        / {"list": "b.nii", "folder": "series/sub/2.dcm", "files": "series/sub/2.dcm"}.get(kind, "a.nii")
    )
    flip(changed, 7)
    assert case_digest({"image": first}, memo) != case_digest({"image": second}, memo)
    flip(changed, 7)
    assert case_digest({"image": first}, memo) == case_digest({"image": second}, memo)


def test_names_order_and_further_files_count(tmp_path: Path) -> None:
    image = image_kinds(tmp_path / "one")
    shutil.copy(image["file"], tmp_path / "one" / "a.nii.gz")  # readers choose a format by the name
    (tmp_path / "more").mkdir()
    for number in range(3):
        folder = tmp_path / "more" / str(number)
        shutil.copytree(image["folder"], folder)
    (tmp_path / "more/1/3.dcm").write_bytes(b"")
    (tmp_path / "more/2/sub/2.dcm").rename(tmp_path / "more/2/2.dcm")
    every = [
        *(image[kind] for kind in ("file", "list", "folder")), image["list"][::-1], tmp_path / "one" / "a.nii.gz",
        *(tmp_path / "more" / str(number) for number in (1, 2)),
    ]  # fmt: skip
    digests = [case_digest({"image": one}, tmp_path / "memo") for one in every]
    assert len(set(digests)) == len(every)
    assert case_digest({"image": tmp_path / "more/0"}, tmp_path / "memo") == digests[2]


def test_everything_else_of_a_case_counts(tmp_path: Path) -> None:
    image = image_kinds(tmp_path / "one")["file"]
    mask = tmp_path / "one" / "b.nii"
    base = {"case": "c", "image": image, "slice_label": [0, 1], "label": 0}
    others = [
        {**base, "slice_label": [0, 0]}, {**base, "label": 1}, {**base, "series_rules": SeriesRules(plane="axial")},
        {**base, "series_rules": SeriesRules(plane="coronal")}, {**base, "mask": str(mask)}, {**base, "mask": "b.nii"},
    ]  # fmt: skip
    digests = {case_digest(case, tmp_path / "memo") for case in (base, *others)}
    assert len(digests) == 1 + len(others)
    flip(mask, 3)
    assert case_digest(others[4], tmp_path / "memo") not in digests
    assert case_digest(dict(reversed(base.items())), tmp_path / "memo") in digests


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Which files were hashed; files count as old at once."""
    calls: list[Path] = []
    real = cache_key.file_hash
    monkeypatch.setattr(cache_key, "file_hash", lambda path: (calls.append(path), real(path))[1])
    monkeypatch.setattr(cache_key, "YOUNG_NS", -10_000_000_000)
    return calls


@pytest.mark.parametrize("kind", KINDS)
def test_files_are_hashed_once_and_again_when_changed_in_place(kind: str, tmp_path: Path, hashed: list[Path]) -> None:
    image = image_kinds(tmp_path / CANARY)[kind]
    memo = tmp_path / "cache" / "memo"
    digests = [case_digest({"image": image}, memo) for _ in range(3)]
    files = 1 if kind in ("file", "path") else 2
    assert len(hashed) == files
    assert len(set(digests)) == 1
    changed = hashed[-1]
    before = changed.stat()
    flip(changed, 9)  # neither the size nor, set back, the time of the last change tell
    os.utime(changed, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert case_digest({"image": image}, memo) != digests[0]
    assert len(hashed) == 2 * files
    for note in memo.iterdir():
        assert CANARY not in note.name + note.read_text()
        note.write_text(note.read_text()[:40])  # as a full disk leaves it
    case_digest({"image": image}, memo)
    assert len(hashed) == 3 * files
    next(memo.iterdir()).unlink()


def test_young_files_are_hashed_each_time(tmp_path: Path, hashed: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_key, "YOUNG_NS", 60_000_000_000)
    image = image_kinds(tmp_path / "one")["file"]
    for _ in range(2):
        case_digest({"image": image}, tmp_path / "memo")
    assert len(hashed) == 2
    assert not (tmp_path / "memo").exists()


def test_a_memo_that_cannot_be_written_costs_only_time(tmp_path: Path, hashed: list[Path]) -> None:
    image = image_kinds(tmp_path / "one")["file"]
    (tmp_path / "memo").write_text("a file")
    assert case_digest({"image": image}, tmp_path / "memo") == case_digest({"image": image}, tmp_path / "other")
    assert len(hashed) == 2


def test_missing_files_are_told(tmp_path: Path) -> None:
    for image in (tmp_path / "no.nii", str(tmp_path / "no.nii"), [str(tmp_path / "no.nii")]):
        with pytest.raises(FileNotFoundError):
            case_stamp({"image": image})
    make_series(tmp_path / "s")
    (tmp_path / "s" / "x.dcm").symlink_to(tmp_path / "nowhere")
    with pytest.raises(Refusal):
        case_stamp({"image": tmp_path / "s"})


def test_other_code_is_another_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = code_digest([])
    names = [name for name, _ in cache_key.SOURCES]
    assert {"reader.py", "grid.py", "transforms.py", "decoder_process.py"} <= set(names)
    for name in ("a.py", "b.py"):
        (tmp_path / name).write_text("x = 1\n")
    mini = cache_key.sources_of(sorted(tmp_path.glob("*.py")))
    (tmp_path / "b.py").write_text("x = 2\n")
    changed = cache_key.sources_of(sorted(tmp_path.glob("*.py")))
    assert len({before, code_digest([], sources=mini), code_digest([], sources=changed)}) == 3
    (tmp_path / "my_steps.py").write_text("class Mine: pass\nclass Other: pass\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    nested = [{"_target_": "bundle.LoadImageStrictd", "inner": {"_target_": "my_steps.Mine"}}]
    mine = {code_digest([], nested), code_digest(["my_steps"])}
    assert len(mine | {before}) == 2
    (tmp_path / "my_steps.py").write_text("class Mine: pass\n# changed\n")
    assert code_digest(["my_steps"]) not in mine | {before}
    assert code_digest(["bundle.data.reader", "monai.transforms"]) == before
    assert code_digest(["bundle.model.encoder"]) != before, "it is no part of bundle.data"
    real = cache_key.package_version
    monkeypatch.setattr(cache_key, "package_version", lambda name: "9" if name == "pydicom" else real(name))
    assert code_digest([]) != before


def test_preparation_steps_and_type_are_part_of_the_key(tmp_path: Path) -> None:
    steps = preparation()
    plain = [{"_target_": "bundle.CheckVolumed", "keys": "image"}]
    made = {
        SliceCache(tmp_path / "c", plain).steps_digest(steps),
        SliceCache(tmp_path / "c", plain, cache_type="float32").steps_digest(steps),
        SliceCache(tmp_path / "c", [{**plain[0], "keys": "other"}]).steps_digest(steps),
        SliceCache(tmp_path / "c", plain).steps_digest(preparation(image_size=[40, 32])),
        SliceCache(tmp_path / "c", plain).steps_digest(steps[:-1]),
    }
    assert len(made) == 5
    assert SliceCache(tmp_path / "other", plain, limit_gb=1).steps_digest(preparation()) in made


# --- the dataset ---


def preparation(**settings: Any) -> list[Any]:
    config = ConfigParser.load_config_file(ROOT / "configs" / "train.yaml")
    parser = ConfigParser({**config, "image_size": [32, 32], **settings})
    return list(parser.get_parsed_content("preparation"))


def head(seed: int = 0, slices: int = 12) -> np.ndarray:
    volume = np.random.default_rng(seed).normal(100, 20, (24, 22, slices))
    x, y = np.mgrid[-1:1:24j, -1:1:22j]
    volume[x**2 + y**2 > 0.8] = 0
    return volume.astype(np.float32)


def head_case(folder: Path, number: int = 0) -> dict[str, Any]:
    path = folder / f"{number}.nii.gz"
    nib.save(nib.Nifti1Image(head(number, 9 + number), np.diag([2.0, 2.0, 4.0, 1.0])), path)
    truth = [k % 2 for k in range(9 + number)]
    return {"case": f"c{number}", "image": str(path), "label": number % 2, "patient": CANARY, "slice_label": truth}


@pytest.fixture(scope="module")
def heads(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("heads")
    dicom = make_series(folder / "series", count=10)
    series = {"case": "dicom", "image": str(dicom), "label": 1, "patient": CANARY, "slice_label": None}
    return [*(head_case(folder, number) for number in range(4)), series]


def bags(data: list[dict[str, Any]], steps: list[Any], cache: SliceCache | None, **more: Any) -> BagDataset:
    return BagDataset(data, Compose(steps), seed=5, cache=cache, progress=False, **more)


class FirstBright(DrawTransform):
    """A random step that is no draw of slices: it looks at the image."""

    def __call__(self, data: Any) -> dict[str, Any]:
        assert data["image"].dtype == torch.float32
        return {**data, "image": data["image"] * float(self.generator(data).random())}


DRAWS: dict[str, list[Any]] = {
    "none": [],
    "all": [AllSlicesd()],
    "random": [RandomSlicesd(4)],
    "longer than any": [RandomSlicesd(50)],
    "uniform": [UniformSlicesd(3)],
    "stratified": [StratifiedSlicesd(5)],
    "two draws": [RandomSlicesd(6), UniformSlicesd(2)],
    "no draw first": [FirstBright(), RandomSlicesd(4)],
    "augmented": [RandomSlicesd(4), RandBagAffined(), RandSliceIntensityd()],
}


@pytest.mark.parametrize("neighbours", [0, 1])
def test_bags_with_a_cache_are_those_without(
    neighbours: int, heads: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = preparation(neighbours=neighbours)
    cache, exact = SliceCache(tmp_path / "c"), SliceCache(tmp_path / "c", cache_type="float32")
    for name, draws in DRAWS.items():
        plain = bags(heads, [*steps, *draws], None)
        kept, same = (bags(heads, [*steps, *draws], one) for one in (cache, exact))
        for epoch, index in ((0, 0), (1, 2), (7, 4)):
            expected = plain[epoch, index]
            for found, limit in ((kept[epoch, index], 1 / 131070 + 1e-7), (same[epoch, index], 0.0)):
                assert list(found) == list(expected)
                difference = (found["image"] - expected["image"]).abs()
                if name == "augmented" and limit:
                    # Brightness acts on what is above 0, which the least values no longer are.
                    limit, difference = 2.5 / 131070, difference[expected["image"] * found["image"] > 0]
                assert difference.max() <= limit, name
                for key in set(expected) - {"image"}:
                    assert_same(found[key], expected[key])


def test_steps_of_monai_give_plain_tensors_with_and_without_a_cache(heads: list[Any], tmp_path: Path) -> None:
    steps = [*preparation(), AdjustContrastd("image", 0.8), RandomSlicesd(4)]
    plain, kept = bags(heads, steps, None)[0], bags(heads, steps, SliceCache(tmp_path / "c"))[0]
    assert type(plain["image"]) is type(kept["image"]) is torch.Tensor
    torch.testing.assert_close(plain["image"], kept["image"], atol=1 / 131070, rtol=0)


def test_only_drawn_slices_are_read(heads: list[dict[str, Any]], tmp_path: Path) -> None:
    """Every slice but those drawn is damaged, and nobody notices."""
    data = bags(heads[3:4], [*preparation(), UniformSlicesd(3)], SliceCache(tmp_path / "c"))
    expected = data[0]
    (file,) = (tmp_path / "c").glob("entries/*/image.npy")
    content = bytearray(file.read_bytes())
    size = (len(content) - 128) // 12
    drawn = [int(k) for k in UniformSlicesd(3).choose(12, np.random.default_rng())]
    for position in set(range(12)) - set(drawn):
        content[128 + position * size] ^= 1
    file.write_bytes(content)
    before = file.stat().st_ino
    found = data[0]
    assert torch.equal(found["image"], expected["image"])
    assert file.stat().st_ino == before
    assert draws_by_number(RandomSlicesd(2))
    assert not draws_by_number(FirstBright())


class Looks(RandomSlicesd):
    """Draws by what it sees."""

    def __call__(self, data: Any) -> dict[str, Any]:
        assert data["image"].ndim == 4
        return super().__call__(data)


def test_a_draw_that_looks_at_the_image_is_given_it(heads: list[dict[str, Any]], tmp_path: Path) -> None:
    assert bags(heads, [*preparation(), Looks(3)], SliceCache(tmp_path / "c"))[0]["image"].shape == (3, 1, 32, 32)


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_entries_are_made_again_from_the_scan(
    damage: str, heads: list[dict[str, Any]], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = bags(heads[:1], [*preparation(), AllSlicesd()], SliceCache(tmp_path / "c"))
    expected = data[0]
    (entry,) = (tmp_path / "c" / "entries").iterdir()
    name, change = DAMAGES[damage]
    if damage == "header of an absurd shape":
        flip(entry / name, 70)
    else:
        change(entry / name)
    with caplog.at_level(logging.WARNING):
        found = data[1, 0]
        again = bags(heads[:1], [*preparation(), AllSlicesd()], SliceCache(tmp_path / "c"))[1, 0]
    assert torch.equal(found["image"], expected["image"])
    assert torch.equal(again["image"], expected["image"])
    assert len(caplog.messages) == 1, "one line, and whole afterwards"
    assert caplog.messages[0].startswith("an entry of the slice cache was damaged (")
    assert "\n" not in caplog.messages[0]
    assert CANARY not in caplog.messages[0]
    assert list((tmp_path / "c" / "tmp").iterdir()) == []


def test_a_cache_deleted_in_the_middle_is_made_again(heads: list[dict[str, Any]], tmp_path: Path) -> None:
    data = bags(heads, [*preparation(), RandomSlicesd(4)], SliceCache(tmp_path / "c"))
    expected = data[0, 1]
    shutil.rmtree(tmp_path / "c")
    assert torch.equal(data[0, 1]["image"], expected["image"])
    assert len(list((tmp_path / "c" / "entries").iterdir())) == 1


def test_damage_that_comes_back_ends_in_a_sentence(
    heads: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = bags(heads[:1], [*preparation(), AllSlicesd()], SliceCache(tmp_path / "c"))
    monkeypatch.setattr(Entry, "slices", lambda *_: (_ for _ in ()).throw(DamagedEntry("checksum")))
    with pytest.raises(InputError, match="is damaged \\(checksum\\): delete cache_dir, and check the disk$"):
        data[0]


def test_a_scan_changed_in_place_is_prepared_anew(tmp_path: Path) -> None:
    case = head_case(tmp_path, 0)
    steps = [*preparation(), AllSlicesd()]
    first = bags([case], steps, SliceCache(tmp_path / "c"))[0]
    flip_voxel = nib.load(case["image"])
    nib.save(nib.Nifti1Image(np.asarray(flip_voxel.dataobj)[::-1].copy(), flip_voxel.affine), case["image"])
    second = bags([case], steps, SliceCache(tmp_path / "c"))[0]
    assert not torch.equal(first["image"], second["image"])
    torch.testing.assert_close(second["image"], bags([case], steps, None)[0]["image"], atol=1 / 131070, rtol=0)
    assert len(list((tmp_path / "c" / "entries").iterdir())) == 2


class Rewrites(Transform):
    """A preparation during which someone copies over the scan."""

    def __call__(self, data: Any) -> dict[str, Any]:
        flip(Path(data["image"]), -1)
        return dict(data)


def test_a_scan_that_changes_while_it_is_read_is_not_kept(tmp_path: Path) -> None:
    (tmp_path / "scan").write_bytes(b"content")
    with pytest.raises(InputError, match="^case c was changed while it was read: run again when its files are"):
        bags([{"case": "c", "image": str(tmp_path / "scan")}], [Rewrites()], SliceCache(tmp_path / "c"))
    assert list((tmp_path / "c").glob("entries/*")) == []


def test_refused_cases_are_not_kept_and_unreadable_ones_are_told_by_the_reader(tmp_path: Path) -> None:
    (tmp_path / "bad.nii").write_text("no image")
    (tmp_path / "empty").mkdir()
    data = [
        {"case": "bad", "image": str(tmp_path / "bad.nii"), "label": 0},
        {"case": "gone", "image": str(tmp_path / "gone.nii"), "label": 1},
        {"case": "empty", "image": str(tmp_path / "empty"), "label": 1},
        head_case(tmp_path, 1),
    ]
    steps = [*preparation(), AllSlicesd()]
    plain, kept = (bags(data, steps, one, keep_refused=True) for one in (None, SliceCache(tmp_path / "c")))
    for index in range(3):
        assert str(kept[index]["refusal"]) == str(plain[index]["refusal"])
    assert len(kept[3]["image"]) == 10
    assert len(list((tmp_path / "c" / "entries").iterdir())) == 1


def test_no_name_or_patient_is_in_the_cache(tmp_path: Path) -> None:
    (tmp_path / CANARY).mkdir()
    case = head_case(tmp_path / CANARY, 0) | {"case": CANARY}
    dicom = {"case": f"{CANARY} 2", "image": str(make_series(tmp_path / CANARY / "s", count=9)), "patient": CANARY}
    bags([case, dicom], [*preparation(), AllSlicesd()], SliceCache(tmp_path / "c"))
    paths = list((tmp_path / "c").rglob("*"))
    assert len(paths) > 6
    for path in paths:
        assert CANARY not in str(path.relative_to(tmp_path))
        assert path.is_dir() or CANARY.encode() not in path.read_bytes()


# --- the folder ---


def gb(folder: Path) -> float:
    return sum(path.stat().st_size for path in folder.glob("entries/*/*")) / 1e9


@forks
@pytest.mark.parametrize("workers", [0, 2])
def test_the_limit_is_kept_and_told(workers: int, heads: list[dict[str, Any]], tmp_path: Path) -> None:
    steps = [*preparation(), AllSlicesd()]
    bags(heads[:1], steps, SliceCache(tmp_path / "c"))
    bags(heads[:1], steps, SliceCache(tmp_path / "c", ["another preparation"]))
    limit = gb(tmp_path / "c") * 1.2
    with pytest.raises(InputError) as caught:
        bags(heads, steps, SliceCache(tmp_path / "c", limit_gb=limit), num_workers=workers)
    sentence = str(caught.value)
    assert "\n" not in sentence
    assert sentence.startswith(f"the slice cache {tmp_path / 'c'} holds ")
    for part in ("cache_limit_gb", "raise it", "delete the folder", "image_size", "null", "1 of 5 cases are prepared"):
        assert part in sentence
    need = float(sentence.split("all of them need about ")[1].split(" GB")[0])
    bags(heads, steps, SliceCache(tmp_path / "whole"))
    assert need == pytest.approx(gb(tmp_path / "whole"), rel=0.3)
    assert gb(tmp_path / "c") <= limit
    assert len(list((tmp_path / "c" / "entries").iterdir())) == 2
    bags(heads[:1], steps, SliceCache(tmp_path / "c", limit_gb=limit / 10))  # reading needs no room


def test_what_others_add_is_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sizes are added up again though this process had added them up before."""
    monkeypatch.setattr(cache_module, "SCAN_SHARE", 1e9)
    bag = {"image": uniform(0, 1, (50, 1, 20, 20))}
    mine, other = (SliceCache(tmp_path / "c", limit_gb=1.1e-4) for _ in range(2))
    mine.store("0" * 64, bag, {})
    other.store("1" * 64, bag, {})
    with pytest.raises(InputError, match="more than cache_limit_gb, 0.00011"):
        mine.store("2" * 64, bag, {})


@pytest.mark.parametrize(
    ("number", "sentence"),
    [
        (errno.ENOSPC, "the disk of the slice cache .* is full: free space, choose another cache_dir, or set it to"),
        (errno.EROFS, "the slice cache .* cannot be written to \\(Read-only file system\\): choose another cache_dir"),
    ],
)
@pytest.mark.parametrize("place", ["fsync", "rename", "mkdir"])
def test_a_disk_that_takes_no_more_is_one_sentence(
    number: int, sentence: str, place: str, heads: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise OSError(number, os.strerror(number))

    steps = [*preparation(), AllSlicesd()]
    bags(heads[:1], steps, SliceCache(tmp_path / "c"))
    bad = {"case": "bad", "image": str(tmp_path / "gone.nii")}
    with monkeypatch.context() as patch:
        patch.setattr(os, place, fail)
        data = bags([heads[0], bad], steps, SliceCache(tmp_path / "c"), keep_refused=True)
        assert len(data[0]["image"]) == 9, "what is there is read"
        assert data[1]["refusal"].code == "missing_file"
        with pytest.raises(InputError, match=sentence):
            bags(heads[:2], steps, SliceCache(tmp_path / "c"))
    assert len(list((tmp_path / "c" / "entries").iterdir())) == 1
    assert list((tmp_path / "c" / "tmp").iterdir()) == []


def test_a_cache_lies_in_a_folder_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "scan.nii").write_text("something else")
    with pytest.raises(InputError, match="holds other files: choose a folder for the cache alone") as caught:
        SliceCache(tmp_path)
    assert "scan" not in str(caught.value)
    with pytest.raises(InputError, match="cannot be read \\(Not a directory\\)"):
        SliceCache(tmp_path / "scan.nii")
    SliceCache(tmp_path / "new")
    assert not (tmp_path / "new").exists(), "nothing is made before something is stored"


def test_settings_of_the_cache_are_checked(tmp_path: Path) -> None:
    assert open_cache(None, []) is None
    assert isinstance(open_cache(str(tmp_path / "c"), []), SliceCache)
    for text in ("", " "):
        with pytest.raises(InputError, match="cache_dir is a folder, or null to keep nothing"):
            open_cache(text, [])
    with pytest.raises(InputError, match="cache_type must be uint16 or float32, not 'int8'"):
        SliceCache(tmp_path / "c", cache_type="int8")
    for limit in (0, -1, float("nan")):
        with pytest.raises(InputError, match="cache_limit_gb must be above 0"):
            SliceCache(tmp_path / "c", limit_gb=limit)


# --- many at once ---


class Slow(Transform):
    """Notes each preparation in a file, which processes share, and takes its time."""

    def __init__(self, log: Path, seconds: float = 0.05) -> None:
        self._log, self._seconds = log, seconds

    def __call__(self, data: Any) -> dict[str, Any]:
        with self._log.open("a") as file:
            file.write(f"{data['case']}\n")
        time.sleep(self._seconds)
        number = torch.arange(6)
        image = torch.rand(6, 1, 8, 8, generator=torch.Generator().manual_seed(data["number"]))
        fields = {"slice_index": number, "slice_position": number * 2.0, "slice_label": number % 2}
        return {"case": data["case"], "label": 0, "image": image, **fields}


def numbered(count: int) -> list[dict[str, Any]]:
    return [{"case": f"c{number}", "number": number} for number in range(count)]


def slow(folder: Path, count: int = 12, seconds: float = 0.05, **more: Any) -> BagDataset:
    steps = [Slow(folder / "log", seconds), RandomSlicesd(3)]
    return bags(numbered(count), steps, SliceCache(folder / "c", cache_type="float32"), **more)


def calls(folder: Path) -> list[str]:
    return sorted((folder / "log").read_text().split()) if (folder / "log").exists() else []


def assert_whole(folder: Path, count: int = 12) -> None:
    """Every entry is there, right, and nothing else."""
    before = calls(folder)
    kept, plain = slow(folder, count), bags(numbered(count), [Slow(folder / "no", 0), RandomSlicesd(3)], None)
    assert calls(folder) == before
    for index in range(count):
        assert torch.equal(kept[3, index]["image"], plain[3, index]["image"])
    cache = SliceCache(folder / "c")
    keys = [path.name for path in (folder / "c" / "entries").iterdir()]
    assert len(keys) == count
    assert all(cache.holds(key, thorough=True) for key in keys)
    assert list((folder / "c" / "tmp").iterdir()) == []


@forks
@pytest.mark.parametrize("workers", [0, 2])
def test_processes_that_prepare_one_cohort_share_it_out(workers: int, tmp_path: Path) -> None:
    processes = [FORK.Process(target=slow, args=(tmp_path,), kwargs={"num_workers": workers}) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    assert calls(tmp_path) == sorted(case["case"] for case in numbered(12)), "each case once"
    assert_whole(tmp_path)


def test_without_locks_the_first_entry_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(errno.ENOLCK, "no locks")

    monkeypatch.setattr(cache_module.fcntl, "flock", refuse)
    first, second = (SliceCache(tmp_path / "c") for _ in range(2))
    key, bag = "ab" * 32, {"image": uniform(0, 1)}
    with first.claim(key, wait=False) as mine, second.claim(key, wait=False) as other:
        assert mine
        assert other
        first.store(key, bag, {})
        second.store(key, {"image": uniform(0, 2)}, {})
    assert first.open(key).slices().max() == 1
    assert list((tmp_path / "c" / "tmp").iterdir()) == []


def started(target: Callable[[], Any]) -> multiprocessing.Process:
    """A process that leads a group of its own."""

    def run() -> None:
        os.setsid()
        target()

    process = FORK.Process(target=run)
    process.start()
    return process


def wait_until(condition: Callable[[], bool], seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def group_is_gone(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return True
    return False


@forks
@pytest.mark.parametrize("workers", [0, 2])
def test_a_killed_preparation_goes_on_where_it_was(workers: int, tmp_path: Path) -> None:
    process = started(lambda: slow(tmp_path, seconds=0.1, num_workers=workers))
    wait_until(lambda: len(list((tmp_path / "c").glob("entries/*"))) >= 4)
    os.killpg(process.pid, signal.SIGKILL)
    process.join()
    wait_until(lambda: group_is_gone(process.pid))
    ready, before = len(list((tmp_path / "c" / "entries").iterdir())), len(calls(tmp_path))
    assert 4 <= ready < 12
    left = tmp_path / "c" / "tmp" / f"{'ab' * 32}-12345678"  # as one killed while it wrote leaves it
    left.mkdir()
    (left / "image.npy").write_bytes(b"half of it")
    slow(tmp_path)
    assert len(calls(tmp_path)) - before == 12 - ready
    assert_whole(tmp_path)


@forks
@pytest.mark.parametrize("workers", [0, 2])
def test_ctrl_c_ends_all_processes_and_leaves_no_damage(workers: int, tmp_path: Path) -> None:
    def prepare() -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            slow(tmp_path, seconds=0.1, num_workers=workers)
        except KeyboardInterrupt:
            os._exit(130)

    process = started(prepare)
    wait_until(lambda: len(list((tmp_path / "c").glob("entries/*"))) >= 3)
    os.killpg(process.pid, signal.SIGINT)
    process.join(30)
    assert process.exitcode == 130
    wait_until(lambda: group_is_gone(process.pid))
    assert list((tmp_path / "c" / "tmp").iterdir()) == []
    slow(tmp_path)
    assert_whole(tmp_path)


def test_others_are_waited_for_and_what_they_write_is_left_alone(tmp_path: Path) -> None:
    cache = SliceCache(tmp_path / "c")
    with cache.claim("ab" * 32) as claimed:
        assert claimed
        at_work = tmp_path / "c" / "tmp" / f"{'ab' * 32}-12345678"
        at_work.mkdir(parents=True)
        cache.sweep()
        with SliceCache(tmp_path / "c").claim("ab" * 32, wait=False) as second:
            assert not second
        with SliceCache(tmp_path / "c").claim("ac" * 32, wait=False) as another:
            assert another
        assert at_work.exists()
    cache.sweep()
    assert not at_work.exists()


class Told(BagDataset):
    """Says what the worker that reads a bag would call it."""

    def __getitem__(self, key: Any) -> dict[str, Any]:
        steps = SliceCache(self._cache.folder, [{"_target_": "bundle.CheckVolumed"}]).steps_digest(preparation())
        return {**super().__getitem__(key), "steps": steps}


@forks
@pytest.mark.parametrize("method", ["fork", "spawn", pytest.param("forkserver", marks=pytest.mark.slow)])
def test_workers_of_a_loader_read_and_mend_and_have_the_same_keys(
    method: str, heads: list[dict[str, Any]], tmp_path: Path
) -> None:
    data = Told(heads, Compose([*preparation(), RandomSlicesd(4)]), cache=SliceCache(tmp_path / "c"), progress=False)
    expected = [data[index] for index in range(len(data))]
    for file in (tmp_path / "c").glob("entries/*/image.npy"):
        flip(file, -1)
    loader = DataLoader(data, 1, num_workers=1, multiprocessing_context=method, collate_fn=collate_bags)
    for bag, batch in zip(expected, loader, strict=True):
        assert torch.equal(batch["image"][0], bag["image"])
        assert batch["steps"] == [bag["steps"]]
    for index in range(len(data)):
        assert torch.equal(data[index]["image"], expected[index]["image"])


def test_preparing_leaves_the_random_state_alone(tmp_path: Path) -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    watched(slow(tmp_path, 2), AllSlicesd(), 1)[0]
    assert torch.equal(torch.get_rng_state(), before)


def test_real_volumes_come_out_of_the_cache(data_dir: Path, tmp_path: Path) -> None:
    images = sorted((data_dir / "ct_ich").rglob("*.nii.gz"))[:3]
    series = sorted(path for path in (data_dir / "dicom").iterdir() if path.is_dir())
    data = [{"case": str(number), "image": str(path)} for number, path in enumerate([*images, *series])]
    steps = [*preparation(image_size=[64, 64]), RandomSlicesd(8)]
    plain, kept = (bags(data, steps, one, keep_refused=True) for one in (None, SliceCache(tmp_path / "c")))
    read = 0
    for index in range(len(data)):
        one, two = plain[2, index], kept[2, index]
        assert list(one) == list(two)
        if "refusal" not in one:
            read += 1
            torch.testing.assert_close(one["image"], two["image"], atol=1 / 131070 + 1e-7, rtol=0)
            assert one["slice_uid"] == two["slice_uid"]
            assert torch.equal(one["slice_position"], two["slice_position"])
            assert_same(two["reading"], one["reading"])
    assert read >= 4
