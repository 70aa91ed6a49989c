"""Prepared in parts, a case is to the last bit what its steps make of it one after the other, in little memory."""

from __future__ import annotations

import tracemalloc
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from monai.transforms import Compose, ScaleIntensityRanged
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import bundle
from bundle.data import parts
from bundle.data.parts import SLICES, prepare_in_parts
from bundle.errors import InputError, Refusal

from . import dicom_factory as factory
from .test_selective import ORIENTATIONS, case_of, steps_of

SHAPE = (23, 18, 2 * SLICES + 5)
WINDOW = bundle.ScaleWindowd("image", -60.0, 40.0)
OF_MONAI = ScaleIntensityRanged("image", a_min=-60.0, a_max=40.0, b_min=0.0, b_max=1.0, clip=True)
PERCENTILES = bundle.ScaleForegroundPercentilesd("image")
STORED = {"RAS": (2.0, 2.0, 4.0), "LPS": (-2.0, -2.0, 4.0), "LPI": (-2.0, -2.0, -4.0)}


def head(seed: int, kind: str = "whole") -> np.ndarray:
    """(X, Y, Z) a noisy body in air, whose first and last slices are blank."""
    rng = np.random.default_rng(seed)
    x, y, z = np.ogrid[-1 : 1 : SHAPE[0] * 1j, -1 : 1 : SHAPE[1] * 1j, -1 : 1 : SHAPE[2] * 1j]
    volume = np.where((x / 0.8) ** 2 + (y / 0.6) ** 2 + (z / 0.9) ** 2 < 1, rng.normal(20, 15, SHAPE), -100.0)
    volume = np.round(volume)
    return {
        "whole": volume,
        "fractions": volume / 7,
        "small": volume * 1e-9,
        "huge": volume * 1e7,
        "unsigned": volume * 300 + 30000,
        "constant": np.full(SHAPE, -3.0),
        "hot": np.where(rng.random(SHAPE) < 1e-4, 1e6, volume),
    }[kind].astype(np.float32)


def stored(path: Path, channels: Sequence[np.ndarray], spacing: Sequence[float] = STORED["LPS"]) -> Path:
    array = channels[0] if len(channels) == 1 else np.stack(channels, axis=-1)
    nib.save(nib.Nifti1Image(array, np.diag([*spacing, 1.0])), path)
    return path


def assert_same(case: dict[str, Any], steps: list[Any]) -> dict[str, Any]:
    expected = dict(Compose(steps)(dict(case)))
    found = prepare_in_parts(case, Compose(steps), len(steps))
    assert list(found) == list(expected)
    for key, value in expected.items():
        if isinstance(value, torch.Tensor):
            assert type(found[key]) is torch.Tensor
            assert found[key].dtype == value.dtype
            assert torch.equal(found[key], value.as_subclass(torch.Tensor)), key
        else:
            assert found[key] == value, key
    assert found["image"].is_contiguous()
    return found


@pytest.fixture
def in_parts(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether the volume was that of the preparation alone, for each case that was done in parts."""
    calls: list[bool] = []
    usual = parts._in_parts

    def noted(*arguments: Any) -> dict[str, Any]:
        calls.append(arguments[-1])
        return usual(*arguments)

    monkeypatch.setattr(parts, "_in_parts", noted)
    return calls


@pytest.mark.parametrize("kind", ["whole", "fractions", "small", "huge", "unsigned", "hot"])
@pytest.mark.parametrize("intensity", [PERCENTILES, WINDOW], ids=["percentiles", "window"])
@pytest.mark.parametrize("margin", [None, 0, 2])
def test_values_crops_and_intensities(
    tmp_path: Path, kind: str, intensity: Any, margin: int | None, in_parts: list[bool]
) -> None:
    path = stored(tmp_path / "a.nii", [head(0, kind)])
    bag = assert_same(case_of(path, slice_label=None), steps_of("axial", margin=margin, intensity=intensity))
    assert in_parts == [True]
    assert bag["image"].max() > 0.5 or kind == "small"


@pytest.mark.parametrize("orientation", STORED)
@pytest.mark.parametrize("plane", ["axial", "coronal", "sagittal", "acquired"])
@pytest.mark.parametrize("neighbours", [0, 2])
def test_planes_channels_neighbours_and_blank_slices(
    tmp_path: Path, orientation: str, plane: str, neighbours: int, in_parts: list[bool]
) -> None:
    channels = [head(1), head(2, "constant"), head(3, "fractions")]
    path = stored(tmp_path / "a.nii.gz", channels, STORED[orientation])
    settings: dict[str, Any] = {"channels": 3, "margin": 30, "neighbours": neighbours, "min_foreground": 0.05}
    case = case_of(path, slice_label=None)
    bag = assert_same(case, steps_of(plane, intensity=PERCENTILES, **settings))
    assert bag["image"].shape[1] == 3 * (1 + 2 * neighbours)
    assert len(bag["image"]) < SHAPE[{"coronal": 1, "sagittal": 0}.get(plane, 2)]
    files = [str(stored(tmp_path / f"{k}.nii", [one], STORED[orientation])) for k, one in enumerate(channels)]
    again = assert_same(case_of(files, slice_label=None), steps_of(plane, intensity=PERCENTILES, **settings))
    assert torch.equal(again["image"], bag["image"])
    assert in_parts == [True, True]


@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_dicom_series(tmp_path: Path, orientation: str, in_parts: list[bool]) -> None:
    path = factory.make_series(tmp_path / "s", count=19, orientation=ORIENTATIONS[orientation], gap=-1.5)
    for plane in ("acquired", "axial"):
        for intensity in (PERCENTILES, WINDOW, OF_MONAI):
            assert_same(case_of(path, slice_label=None), steps_of(plane, margin=1, intensity=intensity))
    assert in_parts == [True] * 6


def test_leaning_slices_and_resampled_ones(tmp_path: Path, in_parts: list[bool]) -> None:
    lean = np.diag([-2.0, -2.0, 4.0, 1.0])
    lean[1, 2] = 1.2
    nib.save(nib.Nifti1Image(head(4), lean), tmp_path / "lean.nii")
    policy = bundle.ReaderPolicy(gantry_tilt="keep")
    case = case_of(tmp_path / "lean.nii", slice_label=None)
    assert_same(case, steps_of("axial", policy, margin=1, intensity=PERCENTILES))
    path = stored(tmp_path / "a.nii", [head(5)])
    steps = steps_of("axial", spacing=(1.5, 3.0, 5.0), margin=1, intensity=PERCENTILES)
    assert_same(case_of(path, slice_label=None), steps)
    assert in_parts == [True, True]


def test_a_window_before_percentiles_is_done_with_the_whole_volume(tmp_path: Path, in_parts: list[bool]) -> None:
    steps = steps_of("axial", margin=1, intensity=WINDOW)
    steps.insert(6, bundle.ScaleForegroundPercentilesd("image", 10.0, 90.0))
    assert_same(case_of(stored(tmp_path / "a.nii", [head(6)]), slice_label=None), steps)
    assert in_parts == [True]


class MyPercentiles(bundle.ScaleForegroundPercentilesd):
    def __call__(self, data: Any) -> dict[str, Any]:
        scaled = super().__call__(data)
        return {**scaled, "image": scaled["image"] / scaled["image"].mean()}


class Keeps:
    """A step of a user's own that keeps what it is given."""

    def __call__(self, data: Any) -> dict[str, Any]:
        self.given = data["image"]
        return dict(data)


def test_steps_of_others_give_what_they_give(tmp_path: Path, in_parts: list[bool]) -> None:
    case = case_of(stored(tmp_path / "a.nii", [head(7)]), slice_label=None)
    assert_same(case, steps_of("axial", margin=1, intensity=MyPercentiles("image")))
    assert in_parts == [False]
    for place in range(1, 10):
        keeps, steps = Keeps(), steps_of("axial", margin=1, intensity=PERCENTILES)
        steps.insert(place, keeps)
        assert_same(case, steps)
        kept = keeps.given.clone()
        Compose(steps)(dict(case))
        assert torch.equal(keeps.given, kept), place
    assert in_parts == [False] + [False] * 6 + [True] * 3


@pytest.mark.parametrize("ours", [True, False])
def test_slices_are_given_back_once_they_are_in_the_bag(
    tmp_path: Path, ours: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[tuple[int, int]] = []
    monkeypatch.setattr(parts, "give_back", lambda volume, axis, start, end: given.append((start, end)))
    steps = steps_of("axial", margin=None, intensity=PERCENTILES)
    steps[1:1] = [] if ours else [Keeps()]
    prepare_in_parts(case_of(stored(tmp_path / "a.nii", [head(11)]), slice_label=None), Compose(steps), len(steps))
    assert given == ([(0, SLICES), (SLICES, 2 * SLICES)] if ours else [])


def test_without_a_cut_nothing_is_done_in_parts(tmp_path: Path, in_parts: list[bool]) -> None:
    steps = steps_of("axial", margin=1, intensity=PERCENTILES)[:6]
    case = case_of(stored(tmp_path / "a.nii", [head(8)]))
    found, expected = prepare_in_parts(case, Compose(steps), 6), dict(Compose(steps)(dict(case)))
    assert isinstance(found["image"], MetaTensor)
    assert torch.equal(found["image"], expected["image"])
    assert prepare_in_parts(case, Compose(steps), 0) == case
    assert not in_parts


@pytest.mark.parametrize("kind", ["constant", "blank", "truth"])
def test_refusals_are_the_same(tmp_path: Path, kind: str) -> None:
    path = stored(tmp_path / "a.nii", [head(9, "constant" if kind == "constant" else "whole")])
    window = bundle.ScaleWindowd("image", 1000.0, 2000.0)
    steps = steps_of("axial", intensity=window if kind == "blank" else PERCENTILES, min_foreground=0.02)
    case = case_of(path, slice_label=[0] * 99 if kind == "truth" else None)
    told = []
    for way in (lambda: Compose(steps)(dict(case)), lambda: prepare_in_parts(case, Compose(steps), len(steps))):
        with pytest.raises((RuntimeError, InputError)) as caught:  # MONAI's own error around what a step raises
            way()
        told.append(bundle.errors.input_error_behind(caught.value))
    assert isinstance(told[0], InputError if kind == "truth" else Refusal)
    assert (type(told[0]), str(told[0])) == (type(told[1]), str(told[1]))


def test_number_of_threads_does_not_matter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = stored(tmp_path / "a.nii", [head(10)])
    steps = steps_of("axial", margin=1, intensity=PERCENTILES)
    expected = prepare_in_parts(case_of(path, slice_label=None), Compose(steps), len(steps))["image"]
    for threads in (1, 2, 5):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        found = prepare_in_parts(case_of(path, slice_label=None), Compose(steps), len(steps))["image"]
        assert torch.equal(found, expected)


class Allocations(TorchDispatchMode):
    """Notes the bytes of every new tensor."""

    def __init__(self, known: torch.Tensor) -> None:
        super().__init__()
        self.known = known.untyped_storage().data_ptr()
        self.most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for one in tree_leaves(out):
            if isinstance(one, torch.Tensor) and one.device.type == "cpu":
                storage = one.untyped_storage()
                if storage.data_ptr() != self.known:
                    self.most = max(self.most, storage.nbytes())
        return out


@pytest.mark.parametrize("intensity", [PERCENTILES, WINDOW], ids=["percentiles", "window"])
def test_beside_the_volume_there_are_the_bag_and_a_few_slices(intensity: Any) -> None:
    slices, side = 20 * SLICES, 64
    array = np.random.default_rng(0).integers(-5, 200, (slices, side, side)).astype(np.float32)
    meta = {"original_affine": np.diag([-1.0, -1.0, 2.0, 1.0]), "spatial_shape": np.array([side, side, slices])}
    affine = torch.from_numpy(meta["original_affine"])
    volume = MetaTensor(torch.from_numpy(array).permute(2, 1, 0)[None], affine=affine, meta=meta)
    steps = steps_of("axial", margin=1, intensity=intensity)[1:]
    whole, few = slices * side * side * 4, 2 * SLICES * side * side * 4

    def prepared() -> tuple[dict[str, Any], int]:
        with Allocations(volume) as noted:
            return prepare_in_parts({"image": volume}, Compose(steps), len(steps)), noted.most

    prepared()  # imports modules
    tracemalloc.start()
    try:
        bag, torchs = prepared()
        numpys = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert len(bag["image"]) == slices
    assert torchs <= few < whole / 5
    # Counters of whole numbers, one set a thread, and their sum.
    assert numpys < few + 8 * 2**20
