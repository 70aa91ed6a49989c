"""A prepared draw equals the draw from everything prepared, and costs the pixels of the drawn slices alone."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.transforms import Compose, ScaleIntensityRanged
from pydicom.dataset import Dataset

import bundle
from bundle.data import series
from bundle.data.dicom_files import DicomFiles
from bundle.data.policy import ReaderPolicy, SeriesRules
from bundle.data.selective import can_select, prepare_drawn
from bundle.errors import Refusal

from . import dicom_factory as factory
from .dicom_encodings import encode
from .dicom_multiframe import make_multiframe

COUNT = 13
DRAWS = (bundle.RandomSlicesd(5), bundle.StratifiedSlicesd(4), bundle.UniformSlicesd(6), bundle.RandomSlicesd(1))
ALL = (bundle.AllSlicesd(), bundle.UniformSlicesd(COUNT), bundle.RandomSlicesd(40))


def steps_of(
    slicing_axis: str = "acquired",
    policy: ReaderPolicy | None = None,
    channels: int = 1,
    spacing: Sequence[float] | None = None,
    margin: int | None = None,
    intensity: Any = None,
    neighbours: int = 0,
    min_foreground: float = 0.0,
) -> list[Any]:
    return [
        bundle.LoadImageStrictd("image", channels=channels, policy=policy),
        bundle.CheckVolumed("image"),
        bundle.OrientForSlicingd("image", slicing_axis),
        bundle.ResampleVolumed("image", spacing),
        bundle.CropToForegroundd("image", margin),
        intensity or ScaleIntensityRanged("image", a_min=-60.0, a_max=40.0, b_min=0.0, b_max=1.0, clip=True),
        bundle.VolumeToBagd("image", slicing_axis),
        bundle.ResizeAndPadd("image", (9, 16)),
        bundle.AddNeighboursd("image", neighbours),
        bundle.DropBlankSlicesd(0.05, min_foreground),
    ]


def case_of(path: Any, epoch: int = 0, **more: Any) -> dict[str, Any]:
    return {"case": "a", "image": path, "label": 1, "draw": (3, epoch), "slice_label": [0, 1] * 6, **more}


def whole(case: dict[str, Any], steps: list[Any], draw: Any) -> dict[str, Any]:
    return dict(Compose([*steps, draw])(dict(case)))


def assert_equal(found: dict[str, Any] | None, expected: dict[str, Any], decoded: int | None) -> None:
    assert found is not None
    assert found.keys() == expected.keys()
    (reading,), (usual,) = found["reading"], expected["reading"]
    more = {} if decoded is None else {"decoded_slices": decoded, "slices": COUNT}
    assert reading == usual | more
    for key in expected.keys() - {"reading"}:
        if isinstance(expected[key], torch.Tensor):
            assert type(found[key]) is torch.Tensor
            assert found[key].dtype == expected[key].dtype
            assert torch.equal(found[key], expected[key].as_subclass(torch.Tensor)), key
        else:
            assert found[key] == expected[key], key


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many slices were decoded, call by call."""
    counts: list[int] = []
    read = series.read_pixels

    def counting(headers: Sequence[Any], accept_lossy: bool = True) -> Any:
        counts.append(len(headers))
        return read(headers, accept_lossy)

    monkeypatch.setattr(series, "read_pixels", counting)
    return counts


ORIENTATIONS = {
    "axial": factory.AXIAL,
    "coronal": factory.CORONAL,
    "sagittal": factory.SAGITTAL,
    "flipped": factory.FLIPPED,
    "oblique": factory.oblique(),
}


@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_every_draw_equals_the_draw_from_everything(tmp_path: Path, orientation: str, decoded: list[int]) -> None:
    path = factory.make_series(tmp_path / "s", count=COUNT, orientation=ORIENTATIONS[orientation], gap=-1.5)
    steps = steps_of()
    for draw in DRAWS:
        for epoch in range(3):
            case = case_of(path, epoch)
            expected = whole(case, steps, draw)
            decoded.clear()
            assert_equal(prepare_drawn(case, steps, draw), expected, draw.size)
            assert decoded == [draw.size]
    window = steps_of(intensity=bundle.ScaleWindowd("image", -60.0, 40.0))
    assert_equal(prepare_drawn(case_of(path), window, DRAWS[1]), whole(case_of(path), steps, DRAWS[1]), 4)
    for draw in ALL:
        assert_equal(prepare_drawn(case, steps, draw), whole(case, steps, draw), None)


def several_frames(folder: Path, change: Callable[[Dataset], None] = lambda ds: None) -> Path:
    order = np.random.default_rng(2).permutation(COUNT).tolist()
    ds = make_multiframe(factory.make_slices(count=COUNT), order=order)
    change(ds)
    folder.mkdir()
    return factory.save(ds, folder / "a.dcm")


@pytest.mark.parametrize("encoding", ["explicit", "big endian", "deflated", "RLE", "JPEG-LS", "JPEG 2000"])
def test_encodings_and_frames(tmp_path: Path, encoding: str, decoded: list[int]) -> None:
    files = factory.make_series(tmp_path / "single", lambda ds, k: encode(ds, encoding), count=COUNT)
    paths: list[Any] = [files, DicomFiles(tuple(files.iterdir())), [files]]
    if encoding not in ("JPEG 2000", "big endian"):  # which the factory cannot write as several frames
        paths.append(several_frames(tmp_path / "several", lambda ds: encode(ds, encoding)))
    steps, draw = steps_of("axial"), bundle.StratifiedSlicesd(4)
    for path in paths:
        expected = whole(case_of(path), steps, draw)
        decoded.clear()
        assert_equal(prepare_drawn(case_of(path), steps, draw), expected, 4)
        assert decoded == [4]


def pad(slices: Sequence[int]) -> factory.Edit:
    def change(ds: Dataset, k: int) -> None:
        ds.PixelPaddingValue = 7
        stored = factory.stored_pixels(ds).copy()
        if k in slices:
            stored[0, :3] = 7
        factory.set_pixels(ds, stored)

    return change


def test_padding_in_a_drawn_slice_needs_the_whole_volume(tmp_path: Path) -> None:
    draw = bundle.UniformSlicesd(6)
    drawn = draw.choose(COUNT, np.random.default_rng(0)).tolist()
    others = [k for k in range(COUNT) if k not in drawn]
    steps = steps_of()
    beside = factory.make_series(tmp_path / "beside", pad(others), count=COUNT)
    found, expected = prepare_drawn(case_of(beside), steps, draw), whole(case_of(beside), steps, draw)
    assert found is not None
    assert torch.equal(found["image"], expected["image"])
    assert found["reading"][0]["padding_voxels"] == 0
    hit = factory.make_series(tmp_path / "hit", pad([drawn[2]]), count=COUNT)
    assert prepare_drawn(case_of(hit), steps, draw) is None
    assert_equal(prepare_drawn(case_of(hit), steps, ALL[0]), whole(case_of(hit), steps, ALL[0]), None)


def test_drawn_slices_of_nothing_but_padding_say_nothing_of_the_whole(tmp_path: Path) -> None:
    draw = bundle.UniformSlicesd(2)
    drawn = draw.choose(COUNT, np.random.default_rng(0)).tolist()

    def empty(ds: Dataset, k: int) -> None:
        ds.PixelPaddingValue = 7
        if k in drawn:
            factory.set_pixels(ds, np.full((ds.Rows, ds.Columns), 7))

    path = factory.make_series(tmp_path / "s", empty, count=COUNT)
    assert prepare_drawn(case_of(path), steps_of(), draw) is None
    assert len(whole(case_of(path), steps_of(), draw)["image"]) == 2


def test_a_constant_part_says_nothing_of_the_whole(tmp_path: Path) -> None:
    draw = bundle.UniformSlicesd(2)
    varying = next(k for k in range(COUNT) if k not in draw.choose(COUNT, np.random.default_rng(0)))

    def flat(ds: Dataset, k: int) -> None:
        if k != varying:
            factory.set_pixels(ds, np.full((ds.Rows, ds.Columns), 30000))

    path = factory.make_series(tmp_path / "s", flat, count=COUNT)
    assert prepare_drawn(case_of(path), steps_of(), draw) is None
    assert len(whole(case_of(path), steps_of(), draw)["image"]) == 2
    constant = factory.make_series(
        tmp_path / "c", lambda ds, k: factory.set_pixels(ds, np.full((ds.Rows, ds.Columns), 30000)), count=COUNT
    )
    with pytest.raises(Refusal) as caught:
        prepare_drawn(case_of(constant), steps_of(), bundle.AllSlicesd())
    assert caught.value.code == "constant_volume"


class MyCrop(bundle.CropToForegroundd):
    def __call__(self, data: Any) -> Any:
        return super().__call__(data)


class MyWindow(ScaleIntensityRanged):
    pass


class MyCut(bundle.VolumeToBagd):
    """Its own way to cut, in a method that the bundle's `__call__` calls."""

    def _cut(self, *arguments: Any) -> Any:
        return super()._cut(*arguments)


class MyDraw(bundle.UniformSlicesd):
    def __call__(self, data: Any) -> Any:
        return super().__call__(data)


def test_what_looks_at_other_voxels_is_prepared_whole() -> None:
    draw = bundle.UniformSlicesd(3)
    assert can_select(steps_of(), draw)
    percentiles = bundle.ScaleForegroundPercentilesd("image")
    for steps in (
        steps_of(spacing=(1.0, 1.0, -1)),
        steps_of(margin=2),
        steps_of(intensity=percentiles),
        steps_of(neighbours=1),
        steps_of(min_foreground=0.02),
        steps_of(intensity=MyWindow("image", 0.0, 80.0, 0.0, 1.0)),
        [*steps_of()[:4], MyCrop("image", None), *steps_of()[5:]],
        [*steps_of()[:6], MyCut("image", "acquired"), *steps_of()[7:]],
        [*steps_of(), lambda bag: bag],
        [steps_of()[0], *steps_of()[5:6], *steps_of()[1:5], *steps_of()[6:]],  # the check after the window
        steps_of()[1:],
        steps_of()[:6],
    ):
        assert not can_select(steps, draw)
    assert not can_select(steps_of(), MyDraw(3))
    assert not can_select(steps_of(), bundle.RandBagAffined())
    assert prepare_drawn(case_of("nowhere"), steps_of(margin=2), draw) is None


def test_what_a_scan_may_need_the_whole_for(tmp_path: Path, decoded: list[int]) -> None:
    draw = bundle.UniformSlicesd(4)
    path = factory.make_series(tmp_path / "s", count=COUNT)
    mr = factory.make_series(tmp_path / "mr", count=COUNT, modality="MR")
    tilted = factory.make_series(tmp_path / "t", count=COUNT, positions=factory.stack(COUNT, lean=(0.0, 0.4)))
    packed = factory.make_series(tmp_path / "p", lambda ds, k: encode(ds, "RLE"), count=COUNT)
    mixed = factory.make_series(tmp_path / "m", lambda ds, k: fewer_bits(ds, k), count=COUNT)
    image = tmp_path / "a.nii"
    nib.save(nib.Nifti1Image(np.random.default_rng(0).normal(size=(8, 9, COUNT)).astype(np.float32), np.eye(4)), image)
    for where, steps in (
        (path, steps_of("coronal")),
        (image, steps_of()),
        ([path, path], steps_of(channels=2)),
        (mr, steps_of(policy=ReaderPolicy(n4_bias_correction=True))),
        (tilted, steps_of(policy=ReaderPolicy(gantry_tilt="resample"))),
        (packed, steps_of(policy=ReaderPolicy(accept_lossy=False))),
        (mixed, steps_of()),
    ):
        assert prepare_drawn(case_of(where, slice_label=None), steps, draw) is None
    assert decoded == []
    for where, policy in ((path, ReaderPolicy(n4_bias_correction=True)), (tilted, ReaderPolicy()), (packed, None)):
        steps = steps_of(policy=policy)
        assert_equal(prepare_drawn(case_of(where), steps, draw), whole(case_of(where), steps, draw), 4)


def fewer_bits(ds: Dataset, k: int) -> None:
    if k == 2:
        ds.BitsStored, ds.HighBit = 15, 14


def test_series_rules_of_the_case_hold(tmp_path: Path) -> None:
    factory.make_series(tmp_path / "s" / "1", lambda ds, k: setattr(ds, "SeriesDescription", "thick"), count=COUNT)
    factory.make_series(
        tmp_path / "s" / "2", lambda ds, k: setattr(ds, "SeriesDescription", "thin"), count=COUNT, series=2, gap=1.0
    )
    case = case_of(tmp_path / "s", series_rules=SeriesRules(description=("thin",)))
    draw = bundle.UniformSlicesd(4)
    assert_equal(prepare_drawn(case, steps_of(), draw), whole(case, steps_of(), draw), 4)
    with pytest.raises(Refusal) as caught:
        prepare_drawn(case_of(tmp_path / "s"), steps_of(), draw)
    assert caught.value.code == "several_series"


# The middle of each third is drawn: 2, 6 and 10.
UNDRAWN = 4
FAULTS: dict[str, Callable[[list[Dataset]], Any]] = {
    "missing_slices": lambda slices: slices.pop(UNDRAWN),
    "uneven_spacing": lambda slices: setattr(
        slices[UNDRAWN], "ImagePositionPatient", [*slices[UNDRAWN].ImagePositionPatient[:2], -19.0]
    ),
    "several_patients": lambda slices: setattr(slices[UNDRAWN], "PatientID", "another"),
    "mixed_matrix": lambda slices: setattr(slices[UNDRAWN], "Rows", 6),
    "pixel_data_truncated": lambda slices: setattr(slices[UNDRAWN], "PixelData", slices[UNDRAWN].PixelData[:-2]),
    "bad_tag": lambda slices: setattr(slices[UNDRAWN], "PixelSpacing", [1.0, 1.0, 1.0]),
    "rescale_partly_absent": lambda slices: delattr(slices[UNDRAWN], "RescaleSlope"),
    "conflicting_copies": lambda slices: setattr(slices[UNDRAWN], "SOPInstanceUID", slices[0].SOPInstanceUID),
}


@pytest.mark.parametrize("code", FAULTS)
def test_faults_of_slices_that_are_not_drawn_refuse(tmp_path: Path, code: str, decoded: list[int]) -> None:
    slices = factory.make_slices(count=COUNT)
    FAULTS[code](slices)
    path = factory.write_series(tmp_path / "s", slices)
    draw = bundle.UniformSlicesd(3)
    with pytest.raises(Refusal) as caught:
        prepare_drawn(case_of(path), steps_of(), draw)
    assert caught.value.code in (code, "pixel_data_excess")
    assert decoded == []
    with pytest.raises(RuntimeError) as usual:
        whole(case_of(path), steps_of(), draw)
    assert isinstance(usual.value.__cause__, Refusal)
    assert usual.value.__cause__.code == caught.value.code


@pytest.mark.parametrize("damage", [lambda content: b"", lambda content: content[:300], lambda content: content[:-9]])
def test_a_file_that_is_not_drawn_and_cut_short_refuses(tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
    path = factory.write_series(tmp_path / "s", factory.make_slices(count=COUNT))
    some = sorted(path.iterdir())[5]
    some.write_bytes(damage(some.read_bytes()))
    for take in (lambda: prepare_drawn(case_of(path), steps_of(), DRAWS[0]), lambda: series.read_volume(path)):
        with pytest.raises(Refusal) as caught:
            take()
        assert caught.value.code in ("empty_file", "unreadable_file", "pixel_data_truncated")


def test_pixels_that_are_not_drawn_are_not_looked_at(tmp_path: Path) -> None:
    slices = factory.make_slices(count=COUNT)
    for ds in slices:
        encode(ds, "JPEG-LS")
    ds = slices[UNDRAWN]
    ds.PixelData = ds.PixelData[:60] + bytes(20) + ds.PixelData[80:]
    path = factory.write_series(tmp_path / "s", slices)
    found = prepare_drawn(case_of(path), steps_of(), bundle.UniformSlicesd(3))
    assert found is not None
    assert found["slice_index"].tolist() == [2, 6, 10]
    with pytest.raises(Refusal) as caught:
        prepare_drawn(case_of(path), steps_of(), bundle.AllSlicesd())
    assert caught.value.code == "pixel_data_corrupt"


@pytest.mark.parametrize("encoding", ["explicit", "big endian", "RLE"])
@pytest.mark.parametrize("keep_time", [False, True])
def test_a_file_that_changes_between_header_and_pixels(
    tmp_path: Path, encoding: str, keep_time: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    slices = factory.make_slices(count=COUNT)
    for ds in slices:
        encode(ds, encoding)
    path = factory.write_series(tmp_path / "s", slices)
    read = series.read_pixels

    def changed(headers: Sequence[Any], accept_lossy: bool = True) -> Any:
        file = headers[1].path
        status = file.stat()
        uid = headers[1].sop_uid.encode()
        content = file.read_bytes()
        file.write_bytes(content.replace(uid, uid[:-1] + b"9"))
        os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns + (0 if keep_time else 10**9)))
        return read(headers, accept_lossy)

    monkeypatch.setattr(series, "read_pixels", changed)
    with pytest.raises(Refusal) as caught:
        prepare_drawn(case_of(path), steps_of(), bundle.UniformSlicesd(3))
    assert caught.value.code == "file_changed"


def test_real_series(data_dir: Path, decoded: list[int]) -> None:
    steps = steps_of(policy=ReaderPolicy(spacing_tolerance_mm=1.0))
    draw = bundle.UniformSlicesd(7)
    case = case_of(data_dir / "dicom" / "philips_ct_5mm")
    case.pop("slice_label")
    found, expected = prepare_drawn(case, steps, draw), whole(case, steps, draw)
    if expected["reading"][0]["padding_voxels"]:
        assert decoded[0] == 7
    else:
        assert found is not None
        assert torch.equal(found["image"], expected["image"])
