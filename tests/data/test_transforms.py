from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from monai.transforms import Compose, ScaleIntensityRanged

from bundle.data.orientation import nearest_axes
from bundle.data.transforms import (
    AddNeighboursd,
    DropBlankSlicesd,
    ResizeAndPadd,
    VolumeToBagd,
    take_slices,
)
from bundle.data.volume_transforms import (
    CheckVolumed,
    CropToForegroundd,
    OrientForSlicingd,
    ResampleVolumed,
    ScaleForegroundPercentilesd,
    ScaleWindowd,
)
from bundle.errors import InputError, Refusal

SHAPE = (5, 6, 7)
SPACING = np.array([0.8, 1.3, 2.5])
GRADIENT = np.array([0.6, 1.1, 1.7])
PLANES = {"sagittal": 0, "coronal": 1, "axial": 2}


class Stored(NamedTuple):
    """One volume in one storage layout; stored axis i is axis `axes[i]` of the original, perhaps reversed."""

    array: np.ndarray  # (C, X, Y, Z)
    affine: np.ndarray
    axes: tuple[int, ...]
    flipped: tuple[bool, ...]


def rotation(axis: tuple[float, float, float], degrees: float) -> np.ndarray:
    x, y, z = np.array(axis) / np.linalg.norm(axis)
    cross, angle = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]]), np.deg2rad(degrees)
    return np.eye(3) + np.sin(angle) * cross + (1 - np.cos(angle)) * cross @ cross


def affine_of(turn: np.ndarray | None = None, spacing: np.ndarray = SPACING) -> np.ndarray:
    affine = np.eye(4)
    affine[:3, :3] = (np.eye(3) if turn is None else turn) * spacing
    affine[:3, 3] = -31.0, 12.0, 55.0
    return affine


def world_of(affine: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    index = np.stack(np.meshgrid(*(np.arange(n) for n in shape), indexing="ij"), axis=-1)
    return index @ affine[:3, :3].T + affine[:3, 3]  # (X, Y, Z, 3)


def layouts(affine: np.ndarray, shape: tuple[int, ...] = SHAPE, normal: np.ndarray | None = None) -> Iterator[Stored]:
    """All 48 ways to store one volume whose first channel is affine in the world position, its second n · position."""
    world = world_of(affine, shape)
    array = np.stack([7 + world @ GRADIENT, world @ (np.eye(3)[2] if normal is None else normal)]).astype(np.float32)
    for axes in itertools.permutations(range(3)):
        for flipped in itertools.product((False, True), repeat=3):
            stored = array.transpose(0, *(1 + a for a in axes))
            stored = np.flip(stored, tuple(1 + i for i in range(3) if flipped[i]))
            change = np.zeros((4, 4))  # stored index → original index
            change[3, 3] = 1
            for i, a in enumerate(axes):
                change[a, i] = -1 if flipped[i] else 1
                change[a, 3] = shape[a] - 1 if flipped[i] else 0
            yield Stored(np.ascontiguousarray(stored), affine @ change, axes, flipped)


def loaded(array: np.ndarray, affine: np.ndarray, **more: Any) -> dict[str, Any]:
    """As LoadImageStrictd gives it."""
    meta = {"original_affine": affine.copy(), "spatial_shape": np.array(array.shape[1:])}
    meta["slice_uids"] = tuple(f"1.2.{k}" for k in range(array.shape[-1]))
    volume = MetaTensor(torch.from_numpy(array.copy()), affine=torch.from_numpy(affine.copy()), meta=meta)
    return {"image": volume, "case": "c", **more}


def cut(data: dict[str, Any], plane: str, *between: Any) -> dict[str, Any]:
    steps = [OrientForSlicingd("image", plane), *between, VolumeToBagd("image", plane)]
    return dict(Compose(steps)(data))


def truth_as_stored(stored: Stored, plane: str, truth: list[int]) -> tuple[int, list[int]]:
    axis = stored.axes.index(PLANES[plane])
    return axis, truth[::-1] if stored.flipped[axis] else truth


def assert_same(bag: dict[str, Any], other: dict[str, Any]) -> None:
    assert torch.equal(bag["image"], other["image"])
    np.testing.assert_allclose(bag["slice_position"], other["slice_position"], atol=1e-9)
    assert torch.equal(bag["slice_label"], other["slice_label"])
    np.testing.assert_allclose(bag["pixel_spacing"], other["pixel_spacing"])


TURNS = {
    "straight": None,
    "tilted": rotation((1, 0.3, -0.2), 17),
    "doubly oblique": rotation((1, 1, 1), 50),
    "at 45 degrees": rotation((1, 0, 0), 45),
    "straight but permuted": rotation((1, 1, 1), 120),
}


@pytest.mark.parametrize("plane", PLANES)
@pytest.mark.parametrize("turn", TURNS)
def test_the_bag_does_not_depend_on_how_the_volume_is_stored(plane: str, turn: str) -> None:
    affine = affine_of(TURNS[turn])
    first: dict[str, Any] | None = None
    for stored in layouts(affine):
        bag = cut(loaded(stored.array, stored.affine), plane)
        first = first or bag
        assert_same(bag, first)
        for n, index in enumerate(bag["slice_index"].tolist()):
            # The stored slice of that index, wherever its axis was stored, holds the voxels of this bag slice.
            candidates = [stored.array.take(index, 1 + a) for a in range(3) if index < stored.array.shape[1 + a]]
            mine = np.sort(bag["image"][n].numpy(), axis=None)
            assert any(c.size == mine.size and np.array_equal(np.sort(c, axis=None), mine) for c in candidates)


@pytest.mark.parametrize("plane", PLANES)
def test_slices_are_upright_and_run_along_ras(plane: str) -> None:
    """An oracle for a straight volume: sort the world coordinates themselves."""
    affine = affine_of()
    world = world_of(affine, SHAPE)
    x, y, z = (np.unique(world[..., a]) for a in range(3))
    down, left, back = z[::-1], x[::-1], y[::-1]
    # Rows run from anterior to posterior or downwards, columns from the patient's right to left or front to back.
    expected = {
        "axial": np.array([[[(c, r, s) for c in left] for r in back] for s in z]),
        "coronal": np.array([[[(c, s, r) for c in left] for r in down] for s in y]),
        "sagittal": np.array([[[(s, c, r) for c in back] for r in down] for s in x]),
    }[plane]
    for stored in layouts(affine):
        bag = cut(loaded(stored.array, stored.affine), plane)
        np.testing.assert_allclose(bag["image"][:, 0].numpy(), 7 + expected @ GRADIENT, rtol=1e-5)
        np.testing.assert_allclose(bag["slice_position"].numpy(), (x, y, z)[PLANES[plane]])


@pytest.mark.parametrize("plane", PLANES)
def test_index_and_truth_belong_to_the_stored_slice(plane: str) -> None:
    number = SHAPE[PLANES[plane]]
    truth = [(k * k + k // 2) % 2 if k != 1 else -1 for k in range(number)]
    assert truth != truth[::-1]
    for stored in layouts(affine_of(TURNS["tilted"])):
        axis, as_stored = truth_as_stored(stored, plane, truth)
        bag = cut(loaded(stored.array, stored.affine, slice_label=as_stored), plane)
        assert bag["slice_label"].tolist() == [as_stored[k] for k in bag["slice_index"].tolist()]
        for n, index in enumerate(bag["slice_index"].tolist()):
            there = np.sort(stored.array.take(index, 1 + axis), axis=None)
            np.testing.assert_array_equal(np.sort(bag["image"][n].numpy(), axis=None), there)


def test_acquired_is_the_plane_nearest_to_the_third_stored_axis() -> None:
    for stored in layouts(affine_of(TURNS["tilted"])):
        plane = next(p for p, axis in PLANES.items() if axis == stored.axes[2])
        bag = cut(loaded(stored.array, stored.affine), "acquired")
        assert_same(bag, cut(loaded(stored.array, stored.affine), plane))
        assert sorted(bag["slice_index"].tolist()) == list(range(stored.array.shape[3]))
        assert bag["slice_uid"] == tuple(f"1.2.{k}" for k in bag["slice_index"].tolist())


@pytest.mark.parametrize("turn", ["straight", "tilted", "doubly oblique", "straight but permuted"])
def test_position_is_the_centre_along_the_unit_normal(turn: str) -> None:
    """The second channel holds n · position, n the third direction of the volume, so each slice shows its position."""
    affine = affine_of(TURNS[turn])
    normal = affine[:3, 2] / np.linalg.norm(affine[:3, 2])
    sliced = next(plane for plane, axis in PLANES.items() if axis == nearest_axes(affine)[2, 0])
    for stored in itertools.islice(layouts(affine, normal=normal), 0, None, 7):
        bag = cut(loaded(stored.array, stored.affine), sliced)
        positions = bag["slice_position"].numpy()
        towards = np.sign(normal[PLANES[sliced]])  # the normal of the bag points to RAS+
        for n, slice_ in enumerate(bag["image"][:, 1]):
            np.testing.assert_allclose(towards * slice_, positions[n], atol=1e-4)
        np.testing.assert_allclose(np.diff(positions), SPACING[2])


def test_the_normal_points_to_ras() -> None:
    """Positions are world coordinates of a straight volume, also where it is stored the other way round."""
    for stored in layouts(affine_of()):
        for plane, axis in PLANES.items():
            bag = cut(loaded(stored.array, stored.affine), plane)
            lowest = affine_of()[axis, 3]
            assert float(bag["slice_position"][0]) == pytest.approx(lowest)


def test_uids_follow_their_slices_and_are_absent_across_them() -> None:
    for stored in itertools.islice(layouts(affine_of()), 0, None, 5):
        for plane, axis in PLANES.items():
            bag = cut(loaded(stored.array, stored.affine), plane)
            if stored.axes[2] == axis:
                assert bag["slice_uid"] == tuple(f"1.2.{k}" for k in bag["slice_index"].tolist())
                some = take_slices(bag, [3, 1])
                assert some["slice_uid"] == (bag["slice_uid"][3], bag["slice_uid"][1])
            else:
                assert bag["slice_uid"] is None
                assert take_slices(bag, [1])["slice_uid"] is None


def test_truth_of_another_length() -> None:
    stored = next(layouts(affine_of()))
    short = cut(loaded(stored.array, stored.affine, slice_label=[0, 1, 1]), "axial")
    assert short["slice_label"].tolist() == [0, 1, 1, -1, -1, -1, -1]
    unknown = cut(loaded(stored.array, stored.affine, slice_label=None), "axial")
    assert unknown["slice_label"].tolist() == [-1] * 7
    with pytest.raises(InputError, match="lists 8 slices, the volume has 7") as caught:
        VolumeToBagd("image", "axial")(
            OrientForSlicingd("image", "axial")(loaded(stored.array, stored.affine, slice_label=[0] * 8))
        )
    assert "\n" not in str(caught.value)


def test_take_slices_takes_from_every_field() -> None:
    stored = next(layouts(affine_of()))
    bag = cut(loaded(stored.array, stored.affine, slice_label=[0, 1, 0, 0, 1, 1, 0], label=1), "axial")
    taken = take_slices(bag, np.array([5, 0, 4]))
    assert torch.equal(taken["image"], bag["image"][[5, 0, 4]])
    assert taken["slice_index"].tolist() == [5, 0, 4]
    assert taken["slice_label"].tolist() == [1, 0, 1]
    assert torch.equal(taken["slice_position"], bag["slice_position"][[5, 0, 4]])
    assert (taken["label"], taken["case"]) == (1, "c")
    assert len(bag["image"]) == 7


@pytest.mark.parametrize(("spacing", "number"), [(1.25, 13), (0.75, 21), (5.0, 4)])
def test_resampling_along_the_slicing_axis_records_the_nearest_stored_slice(spacing: float, number: int) -> None:
    affine = affine_of(TURNS["tilted"])
    normal = affine[:3, 2] / np.linalg.norm(affine[:3, 2])
    truth = [0, 1, 1, 0, 1, 0, 0]
    first: dict[str, Any] | None = None
    for stored in layouts(affine, normal=normal):
        # Stored every 2.5 mm: at 1.25 mm every second new slice lies half-way between two stored ones.
        axis, as_stored = truth_as_stored(stored, "axial", truth)
        data = loaded(stored.array, stored.affine, slice_label=as_stored)
        bag = cut(data, "axial", ResampleVolumed("image", (-1.0, -1.0, spacing)))
        first = first or bag
        assert len(bag["image"]) == number
        np.testing.assert_allclose(bag["slice_position"].diff(), spacing)
        shown = bag["image"][:, 1].mean(dim=(1, 2)).double()
        np.testing.assert_allclose(shown, bag["slice_position"], atol=1e-3)
        place = world_of(stored.affine, stored.array.shape[1:]) @ normal  # mm, of each stored voxel
        of_slice = place.mean(axis=tuple(a for a in range(3) if a != axis))
        distance = np.abs(of_slice - bag["slice_position"].numpy()[:, None])
        chosen = distance[np.arange(number), bag["slice_index"].numpy()]
        np.testing.assert_allclose(chosen, distance.min(axis=1), atol=1e-6)
        assert bag["slice_label"].tolist() == [as_stored[k] for k in bag["slice_index"].tolist()]
        np.testing.assert_allclose(bag["image"], first["image"], atol=1e-3)
        assert bag["slice_label"].tolist() == first["slice_label"].tolist()


def test_resampling_in_plane_keeps_the_slices_and_the_world() -> None:
    world = world_of(affine_of(), SHAPE)
    array = (7 + world @ GRADIENT)[None].astype(np.float32)
    bag = cut(loaded(array, affine_of()), "axial", ResampleVolumed("image", (0.5, 0.5, -1.0)))
    assert bag["pixel_spacing"] == pytest.approx((0.5, 0.5))
    assert bag["slice_index"].tolist() == list(range(7))
    steps = bag["image"][0, 0]
    np.testing.assert_allclose(steps[:-1].diff(dim=0), -0.5 * GRADIENT[1], atol=1e-3)
    np.testing.assert_allclose(steps[:, :-1].diff(dim=1), -0.5 * GRADIENT[0], atol=1e-3)
    same = loaded(array, affine_of())["image"]
    assert ResampleVolumed("image", None)({"image": same})["image"] is same
    for bad in ((1.0, 1.0), (1.0, 0.0, 1.0)):
        with pytest.raises(InputError, match="three numbers"):
            ResampleVolumed("image", bad)


def head(affine: np.ndarray, shape: tuple[int, ...] = (24, 22, 20)) -> np.ndarray:
    """A textured box in air: voxels 5–15, 4–17, 3–13."""
    rng = np.random.default_rng(0)
    array = rng.uniform(0, 1, (1, *shape))
    array[0, 5:16, 4:18, 3:14] += 50 + rng.uniform(0, 20, (11, 14, 11))
    return array.astype(np.float32)


def test_cropping_keeps_every_voxel_at_its_place() -> None:
    affine = affine_of(TURNS["tilted"])
    array = head(affine)
    data = loaded(array, affine, slice_label=[int(k == 8) for k in range(20)])
    whole = cut(dict(data), "axial")
    bag = cut(dict(data), "axial", CropToForegroundd("image", margin=2))
    # Two voxels of margin on every side of the box.
    assert bag["image"].shape == (15, 1, 18, 15)
    index = bag["slice_index"].tolist()
    assert index == list(range(1, 16))
    np.testing.assert_allclose(bag["slice_position"], whole["slice_position"][1:16])
    assert bag["slice_label"].tolist() == [int(k == 8) for k in index]
    np.testing.assert_array_equal(np.sort(bag["image"][4].flatten()), np.sort(array[0, 3:18, 2:20, index[4]].flatten()))
    at_the_border = CropToForegroundd("image", margin=100)(loaded(array, affine))["image"]
    assert at_the_border.shape == array.shape


def test_the_field_of_view_does_not_change_what_is_cropped() -> None:
    affine = affine_of()
    array = head(affine)
    wide = np.random.default_rng(1).uniform(0, 1, (1, 34, 30, 24)).astype(np.float32)
    wide[0, 6:30, 5:27, 1:21] = array[0]
    moved = affine.copy()
    moved[:3, 3] -= affine[:3, :3] @ [6, 5, 1]
    one = cut(loaded(array, affine), "coronal", CropToForegroundd("image", margin=0))
    two = cut(loaded(wide, moved), "coronal", CropToForegroundd("image", margin=0))
    assert torch.equal(one["image"], two["image"])
    np.testing.assert_allclose(one["slice_position"], two["slice_position"])
    assert (two["slice_index"] - one["slice_index"]).tolist() == [5] * 14


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_the_box_holds_what_exceeds_the_threshold_in_any_channel(order: tuple[int, ...]) -> None:
    rng = np.random.default_rng(2)
    for _ in range(5):
        array = np.full((2, 12, 11, 10), -50.0, dtype=np.float32)
        for channel in array:
            first = rng.integers(0, 6, 3)
            block = tuple(slice(start, start + size) for start, size in zip(first, rng.integers(2, 5, 3), strict=True))
            channel[block] = rng.integers(-20, 90, channel[block].shape) / rng.integers(1, 3)
        seen = np.zeros(array.shape[1:], dtype=bool)
        for channel in array:
            low, high = np.percentile(channel, [0.5, 99.5])
            seen |= channel > low + 0.1 * (high - low)
        box = tuple(slice(int(places.min()), int(places.max()) + 1) for places in np.nonzero(seen))
        # The same volume with its axes in another order in memory.
        laid_out = np.ascontiguousarray(array.transpose(0, *(1 + axis for axis in order)))
        view = torch.from_numpy(laid_out).permute(0, *(1 + order.index(axis) for axis in range(3)))
        volume = MetaTensor(view, meta=loaded(array, affine_of())["image"].meta)
        cropped = CropToForegroundd("image", margin=0)({"image": volume})["image"]
        assert torch.equal(cropped.as_tensor(), torch.from_numpy(array[(slice(None), *box)]))


def test_nothing_to_crop_to() -> None:
    array = np.ones((1, 10, 10, 10), dtype=np.float32)
    array[0, 0, 0, 0] = 0
    assert CropToForegroundd("image")(loaded(array, np.eye(4)))["image"].shape == array.shape
    with pytest.raises(InputError, match="margin"):
        CropToForegroundd("image", margin=-1)


def leaning(turn: np.ndarray | None, lean: tuple[float, float], spacing: np.ndarray = SPACING) -> np.ndarray:
    """Slices as in `affine_of`, each shifted in its plane against the one before, in mm."""
    affine = affine_of(turn, spacing)
    affine[:3, 2] += affine[:3, :2] / spacing[:2] @ lean
    return affine


LEANS = {"along columns": (0.0, 0.9), "along rows": (-0.6, 0.0), "both": (0.7, -0.8), "little": (0.0, 0.01)}
PLANE_TURNS = {
    **{k: TURNS[k] for k in ("straight", "tilted", "straight but permuted")},
    "gantry, column upright": rotation((1, 0, 0), 20),
    "half over": rotation((1, 0, 0), 38),
}


@pytest.mark.parametrize("lean", LEANS)
@pytest.mark.parametrize("turn", PLANE_TURNS)
@pytest.mark.parametrize("flips", [(1, 1, 1), (-1, 1, 1), (1, -1, -1)])
def test_leaning_slices_stay_as_acquired(lean: str, turn: str, flips: tuple[int, ...]) -> None:
    affine = leaning(PLANE_TURNS[turn], LEANS[lean]) * [*flips, 1]
    normal = affine_of(PLANE_TURNS[turn])[:3, 2] / SPACING[2]
    # The plane of the slices decides, not the direction in which they are stacked.
    plane = next(p for p, a in PLANES.items() if a == int(np.abs(normal).argmax()))
    upwards = normal * np.sign(normal[PLANES[plane]])
    world = world_of(affine, SHAPE)
    array = np.stack([7 + world @ GRADIENT, world @ upwards]).astype(np.float32)
    for asked in ("acquired", plane):
        bag = cut(loaded(array, affine), asked)
        assert sorted(bag["slice_index"].tolist()) == list(range(SHAPE[2]))
        assert bag["slice_uid"] == tuple(f"1.2.{k}" for k in bag["slice_index"].tolist())
        assert (bag["slice_position"].diff() > 0).all()
        np.testing.assert_allclose(bag["slice_position"].diff(), SPACING[2], rtol=1e-6)
        for n, index in enumerate(bag["slice_index"].tolist()):
            there = np.sort(array[0, :, :, index], axis=None)
            np.testing.assert_array_equal(np.sort(bag["image"][n, 0].numpy(), axis=None), there)
            np.testing.assert_allclose(bag["image"][n, 1], float(bag["slice_position"][n]), atol=1e-4)
        # Pictures are not distorted: steps of a pixel along both axes are those of the acquired pixels.
        assert sorted(bag["pixel_spacing"]) == pytest.approx(sorted(SPACING[:2]))
        steps = {round(abs(float(affine[:3, a] @ GRADIENT)), 3) for a in (0, 1)}
        found = {round(abs(float(bag["image"][0, 0].diff(dim=d)[0, 0])), 3) for d in (0, 1)}
        assert max(min(abs(a - b) for b in steps) for a in found) < 2e-3


@pytest.mark.parametrize("lean", [name for name in LEANS if name != "little"])
@pytest.mark.parametrize("turn", PLANE_TURNS)
def test_leaning_slices_are_not_cut_across(lean: str, turn: str) -> None:
    affine = leaning(PLANE_TURNS[turn], LEANS[lean])
    normal = affine_of(PLANE_TURNS[turn])[:3, 2]
    array = np.random.default_rng(0).uniform(size=(1, *SHAPE)).astype(np.float32)
    across = [p for p, a in PLANES.items() if a != int(np.abs(normal).argmax())]
    for plane in across:
        with pytest.raises(Refusal, match="gantry_tilt to resample") as caught:
            OrientForSlicingd("image", plane)(loaded(array, affine))
        assert caught.value.code == "sheared_slices"
        assert caught.value.facts["degrees"] > 10
    with pytest.raises(Refusal, match="gantry_tilt to resample") as caught:
        ResampleVolumed("image", (1.0, 1.0, -1.0))(loaded(array, affine))
    assert caught.value.code == "sheared_slices"
    same = loaded(array, affine)["image"]
    assert ResampleVolumed("image", None)({"image": same})["image"] is same


def test_rounding_is_no_lean() -> None:
    affine = leaning(None, (0.0, 0.001))  # 0.02°
    array = np.random.default_rng(0).uniform(size=(1, *SHAPE)).astype(np.float32)
    for plane in PLANES:
        cut(loaded(array, affine), plane, ResampleVolumed("image", (1.0, 1.0, -1.0)))


def test_cropping_leaning_slices_keeps_every_voxel_at_its_place() -> None:
    affine = leaning(TURNS["tilted"], (0.0, 0.9))
    array = head(affine)
    data = loaded(array, affine)
    whole, bag = cut(dict(data), "acquired"), cut(dict(data), "acquired", CropToForegroundd("image", margin=2))
    index = bag["slice_index"].tolist()
    assert index == list(range(1, 16))
    np.testing.assert_allclose(bag["slice_position"], whole["slice_position"][1:16])
    np.testing.assert_array_equal(np.sort(bag["image"][4].flatten()), np.sort(array[0, 3:18, 2:20, index[4]].flatten()))


def scaled(array: np.ndarray, lower: float = 1.0, upper: float = 99.0) -> np.ndarray:
    data = {"image": torch.from_numpy(array)}
    return np.asarray(ScaleForegroundPercentilesd("image", lower, upper)(data)["image"])


def test_percentiles_equal_a_loop() -> None:
    rng = np.random.default_rng(3)
    array = np.concatenate([head(np.eye(4)) * 3, rng.gamma(2.0, 100.0, (1, 24, 22, 20))]).astype(np.float32)
    kept = array.copy()
    for lower, upper in ((1.0, 99.0), (0.0, 90.0), (20.0, 100.0)):
        result = scaled(array, lower, upper)
        for channel, values in zip(result, array, strict=True):
            flat = np.sort(values.astype(np.float64), axis=None)

            def percentile(q: float, data: np.ndarray) -> float:
                place = q / 100 * (len(data) - 1)
                low = int(place)
                high = min(low + 1, len(data) - 1)
                return float(data[low] + (place - low) * (data[high] - data[low]))

            floor, ceiling = percentile(0.5, flat), percentile(99.5, flat)
            foreground = np.array([v for v in flat if v > floor + 0.1 * (ceiling - floor)])
            low, high = percentile(lower, foreground), percentile(upper, foreground)
            expected = [min(max((float(v) - low) / (high - low), 0.0), 1.0) for v in values.ravel()]
            np.testing.assert_allclose(channel.ravel(), expected, atol=1e-5)
    np.testing.assert_array_equal(array, kept)


@pytest.mark.parametrize("factor", [1e-9, 0.01, 1.0, 1e6])
def test_units_of_intensity_do_not_matter(factor: float) -> None:
    array = head(np.eye(4))
    result = scaled((array * factor).astype(np.float32))
    np.testing.assert_allclose(result, scaled(array), atol=1e-4)
    assert result.max() == 1
    assert result.min() == 0


def test_the_amount_of_air_does_not_matter() -> None:
    array = head(np.eye(4))
    padded = np.pad(array, ((0, 0), (6, 6), (6, 6), (2, 2)), constant_values=0.5)
    np.testing.assert_allclose(scaled(padded)[:, 6:-6, 6:-6, 2:-2], scaled(array), atol=2e-2)


def test_constant_channels_and_binary_shapes() -> None:
    array = np.concatenate([head(np.eye(4)), np.full((1, 24, 22, 20), 9.0)]).astype(np.float32)
    result = scaled(array)
    assert (result[1] == 0).all()
    assert result[0].max() == 1
    noisy = array[1:] + np.float32(1e-6) * (np.arange(array[1:].size).reshape(array[1:].shape) % 2)
    assert (scaled(noisy) == 0).all()
    for voxels in (3, 900, 9000):  # below and above the 0.5% of the percentiles
        shape = np.zeros(24 * 22 * 20, dtype=np.float32)
        shape[:voxels] = 1
        np.testing.assert_array_equal(scaled(shape.reshape(1, 24, 22, 20)).ravel(), shape)


@pytest.mark.parametrize(("lower", "upper"), [(-1, 99), (1, 101), (50, 50), (99, 1)])
def test_bad_percentiles(lower: float, upper: float) -> None:
    with pytest.raises(InputError, match="percentiles"):
        ScaleForegroundPercentilesd("image", lower, upper)


def test_a_constant_volume_is_refused() -> None:
    ok = torch.zeros(2, 4, 4, 4)
    ok[1, 0, 0, 0] = 1
    assert CheckVolumed("image")({"image": ok})["image"] is ok
    each = torch.stack([torch.zeros(4, 4, 4), torch.full((4, 4, 4), -1000.0)])
    for volume, named in ((each, "0, -1000"), (each[1:], "-1000")):
        with pytest.raises(Refusal, match=f"every voxel of the volume is {named}:") as caught:
            CheckVolumed("image")({"image": volume})
        assert caught.value.code == "constant_volume"


def resized(image: np.ndarray, spacing: tuple[float, float], size: tuple[int, int]) -> tuple[np.ndarray, float]:
    bag = {"image": torch.from_numpy(image.astype(np.float32))[None, None], "pixel_spacing": spacing}
    out = ResizeAndPadd("image", size)(bag)
    assert out["pixel_spacing"][0] == out["pixel_spacing"][1]
    return out["image"][0, 0].numpy(), out["pixel_spacing"][0]


@pytest.mark.parametrize(
    ("shape", "spacing", "size", "inside"),
    [
        ((64, 48), (1.0, 1.5), (40, 60), (40, 45)),  # 64 × 72 mm
        ((64, 48), (1.5, 1.0), (40, 60), (40, 20)),  # 96 × 48 mm
        ((20, 50), (3.0, 0.6), (96, 32), (64, 32)),  # 60 × 30 mm, enlarged
        ((40, 40), (1.0, 1.0), (40, 40), (40, 40)),
    ],
)
def test_aspect_in_mm_is_kept_and_padding_is_centred(
    shape: tuple[int, int], spacing: tuple[float, float], size: tuple[int, int], inside: tuple[int, int]
) -> None:
    result, pixel = resized(np.ones(shape), spacing, size)
    assert result.shape == size
    top, left = ((s - i) // 2 for s, i in zip(size, inside, strict=True))
    expected = np.zeros(size)
    expected[top : top + inside[0], left : left + inside[1]] = 1
    np.testing.assert_allclose(result, expected, atol=1e-6)
    assert pixel == pytest.approx(max(n * mm / s for n, mm, s in zip(shape, spacing, size, strict=True)))

    rows, columns = ((np.arange(n) - (n - 1) / 2) * mm for n, mm in zip(shape, spacing, strict=True))
    radius = 0.35 * min(shape[0] * spacing[0], shape[1] * spacing[1])
    disc = (np.hypot(rows[:, None], columns[None]) < radius).astype(float)
    result, pixel = resized(disc, spacing, size)
    # A disc stays a disc of the same size in mm.
    tall, wide = (result.max(axis=a).sum() * pixel for a in (1, 0))
    coarse = max(*spacing, pixel)
    assert tall == pytest.approx(2 * radius, abs=1.6 * coarse)
    assert wide == pytest.approx(2 * radius, abs=1.6 * coarse)
    assert result.sum() * pixel**2 == pytest.approx(disc.sum() * spacing[0] * spacing[1], rel=0.02)


def test_shrinking_is_anti_aliased() -> None:
    noise = np.random.default_rng(0).standard_normal((256, 256))
    result, _ = resized(noise, (1.0, 1.0), (32, 32))
    assert result.std() < 0.15  # without a filter about 0.5
    stripes = np.zeros((64, 64))
    stripes[:, ::7] = 1
    assert resized(stripes, (1.0, 1.0), (16, 16))[0].max() < 0.5


def test_slices_are_not_changed_where_nothing_is_to_be_done() -> None:
    image = np.random.default_rng(0).uniform(0, 1, (24, 40))
    result, pixel = resized(image, (0.7, 0.7), (24, 40))
    np.testing.assert_allclose(result, image, atol=1e-6)
    assert pixel == pytest.approx(0.7)
    for bad in ((24,), (24, 4), (24.0, 24), (8, 8, 8)):
        with pytest.raises(InputError, match="two whole numbers"):
            ResizeAndPadd("image", bad)  # type: ignore[arg-type]


@pytest.mark.parametrize("neighbours", [0, 1, 2, 9])
def test_neighbours_equal_a_loop(neighbours: int) -> None:
    slices = torch.rand(5, 2, 4, 3, generator=torch.Generator().manual_seed(0))
    bag = AddNeighboursd("image", neighbours)({"image": slices})
    assert bag["image"].shape == (5, 2 * (2 * neighbours + 1), 4, 3)
    for n in range(5):
        channel = 0
        for shift in range(-neighbours, neighbours + 1):
            for c in range(2):
                there = slices[min(max(n + shift, 0), 4), c]
                assert torch.equal(bag["image"][n, channel], there)
                channel += 1
    first, end = bag["own_channels"]
    assert torch.equal(bag["image"][:, first:end], slices)


@pytest.mark.parametrize("window", [(0.0, 80.0), (-1000.0, 400.5), (0.1, 0.7)])
def test_a_window_is_that_of_monai_to_the_last_bit(window: tuple[float, float]) -> None:
    values = torch.randn(2, 9, 8, 7, generator=torch.Generator().manual_seed(3)) * 300
    peer = ScaleIntensityRanged("image", *window, 0.0, 1.0, clip=True)
    for given in (values, values.permute(0, 3, 1, 2), values[:, 1:6, ::2], MetaTensor(values)):
        kept = given.clone()
        found, expected = ScaleWindowd("image", *window)({"image": given})["image"], peer({"image": given})["image"]
        assert type(found) is type(given)
        assert torch.equal(torch.as_tensor(found), torch.as_tensor(expected))
        assert torch.equal(given, kept)
    with pytest.raises(InputError, match="low < high"):
        ScaleWindowd("image", window[1], window[0])


def test_no_margin_crops_nothing() -> None:
    affine = affine_of()
    data = loaded(head(affine), affine)
    assert CropToForegroundd("image", margin=None)(data)["image"] is data["image"]
    assert CropToForegroundd("image", margin=0)(data)["image"].shape != data["image"].shape
    for margin in (1.5, True, "2"):
        with pytest.raises(InputError, match="crop_margin"):
            CropToForegroundd("image", margin=margin)  # type: ignore[arg-type]


def test_negative_neighbours() -> None:
    with pytest.raises(InputError, match="neighbours"):
        AddNeighboursd("image", -1)


def partly_bright(shares: list[float], labels: list[int]) -> dict[str, Any]:
    image = torch.zeros(len(shares), 2, 10, 10)
    for n, share in enumerate(shares):
        image[n, n % 2].view(-1)[: round(share * 100)] = 0.06
    number = torch.arange(len(shares))
    return {
        "image": image,
        "slice_index": number + 3,
        "slice_position": number * 2.0,
        "slice_label": torch.tensor(labels),
        "slice_uid": None,
    }


def test_blank_slices_are_dropped_whatever_their_label() -> None:
    shares = [0.0, 0.01, 0.02, 0.5, 0.01, 1.0]
    for labels in ([1, 1, 1, 1, 1, 1], [0, 0, 0, 0, 0, 0], [1, 0, -1, 0, 1, 0]):
        bag = DropBlankSlicesd(threshold=0.05, min_foreground=0.02)(partly_bright(shares, labels))
        assert bag["slice_index"].tolist() == [5, 6, 8]
        assert bag["slice_position"].tolist() == [4, 6, 10]
        assert bag["slice_label"].tolist() == [labels[k] for k in (2, 3, 5)]
        assert len(bag["image"]) == 3
    everything = DropBlankSlicesd(min_foreground=0)(partly_bright(shares, [0] * 6))
    assert len(everything["image"]) == 6


def test_neighbours_do_not_make_a_blank_slice_visible() -> None:
    bag = partly_bright([0.0, 0.0, 0.9, 0.9, 0.0], [0] * 5)
    alone = DropBlankSlicesd()(bag)["slice_index"].tolist()
    assert alone == [5, 6]
    for neighbours in (0, 1, 2):
        assert DropBlankSlicesd()(AddNeighboursd("image", neighbours)(bag))["slice_index"].tolist() == alone


def test_all_blank_is_refused() -> None:
    with pytest.raises(Refusal, match="all 3 slices are blank") as caught:
        DropBlankSlicesd()(partly_bright([0.0, 0.0, 0.0], [1, 1, 1]))
    assert caught.value.code == "all_slices_blank"
    assert caught.value.facts == {"slices": 3}
    for bad in (-0.1, 1.0):
        with pytest.raises(InputError, match="min_foreground"):
            DropBlankSlicesd(min_foreground=bad)


def test_unknown_slicing_axis() -> None:
    for kind in (OrientForSlicingd, VolumeToBagd):
        with pytest.raises(InputError, match="axial, coronal, sagittal, acquired, not 'transverse'"):
            kind("image", "transverse")


def test_the_given_volume_is_not_changed() -> None:
    stored = list(layouts(affine_of()))[21]
    data = loaded(stored.array, stored.affine)
    cut(dict(data), "coronal", CropToForegroundd("image"), ScaleForegroundPercentilesd("image"))
    np.testing.assert_array_equal(data["image"].numpy(), stored.array)
    np.testing.assert_array_equal(data["image"].affine, stored.affine)


def test_the_whole_preparation_does_not_depend_on_storage() -> None:
    affine = affine_of(TURNS["tilted"], np.array([1.1, 1.2, 2.5]))
    shape = (24, 22, 20)
    array = head(affine, shape)
    truth = [int(5 <= k < 9) for k in range(20)]
    steps = [
        CheckVolumed("image"),
        OrientForSlicingd("image", "axial"),
        ResampleVolumed("image", (1.5, 1.5, 1.25)),
        CropToForegroundd("image"),
        ScaleForegroundPercentilesd("image"),
        VolumeToBagd("image", "axial"),
        ResizeAndPadd("image", (32, 24)),
        AddNeighboursd("image", 1),
        DropBlankSlicesd(),
    ]
    first: dict[str, Any] | None = None
    for stored in itertools.islice(layouts(affine, shape), 0, None, 5):
        mine = np.flip(
            array.transpose(0, *(1 + a for a in stored.axes)), tuple(1 + i for i in range(3) if stored.flipped[i])
        )
        _, as_stored = truth_as_stored(stored, "axial", truth)
        bag = Compose(steps)(loaded(mine, stored.affine, slice_label=as_stored))
        first = first or bag
        np.testing.assert_allclose(bag["image"], first["image"], atol=1e-5)
        np.testing.assert_allclose(bag["slice_position"], first["slice_position"])
        assert bag["slice_label"].tolist() == first["slice_label"].tolist()
        assert bag["slice_label"].tolist() == [as_stored[k] for k in bag["slice_index"].tolist()]
        assert bag["slice_label"].sum() == 8
