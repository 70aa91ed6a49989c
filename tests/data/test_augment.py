from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from bundle.data.augment import RandBagAffined, RandSliceIntensityd
from bundle.errors import InputError


def bag(slices: Tensor, seed: int = 0, epoch: int = 0, case: str = "c1") -> dict[str, Any]:
    return {"image": slices, "case": case, "draw": (seed, epoch), "label": 1}


def textured(*shape: int) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(4)) * 0.8 + 0.1


def blob(height: int, width: int, row: float, column: float, sigma: float = 2.5) -> Tensor:
    """A Gaussian at (row, column) in pixels from the centre."""
    y, x = torch.arange(height) - (height - 1) / 2, torch.arange(width) - (width - 1) / 2
    return torch.exp(-((y[:, None] - row) ** 2 + (x[None] - column) ** 2) / (2 * sigma**2))[None, None]


def centroid(image: Tensor) -> tuple[float, float]:
    height, width = image.shape[-2:]
    y, x = torch.arange(height) - (height - 1) / 2, torch.arange(width) - (width - 1) / 2
    mass = image[0, 0] / image[0, 0].sum()
    return float((mass.sum(dim=1) * y).sum()), float((mass.sum(dim=0) * x).sum())


def test_all_slices_of_a_bag_move_alike() -> None:
    one = textured(1, 2, 20, 24)
    step = RandBagAffined(prob=1.0)
    for epoch in range(5):
        out = step(bag(one.expand(6, 2, 20, 24), epoch=epoch))["image"]
        assert not torch.allclose(out[0], one[0], atol=0.01)
        for n in range(1, 6):
            assert torch.equal(out[n], out[0])
        torch.testing.assert_close(step(bag(one, epoch=epoch))["image"][0], out[0])


@pytest.mark.parametrize("kind", [RandBagAffined, RandSliceIntensityd])
def test_a_draw_can_be_replayed_and_differs_between_epochs_cases_and_seeds(kind: Any) -> None:
    slices = textured(4, 1, 16, 16)
    kept = slices.clone()
    step = kind(prob=1.0)
    here = step(bag(slices, 1, 2, "a"))["image"]
    others = [step(bag(slices, *key))["image"] for key in ((1, 3, "a"), (1, 2, "b"), (2, 2, "a"), (2, 1, "a"))]
    torch.manual_seed(99)
    assert torch.equal(kind(prob=1.0)(bag(slices, 1, 2, "a"))["image"], here)
    assert not any(torch.allclose(other, here) for other in others)
    assert torch.equal(slices, kept)
    assert step(bag(slices))["label"] == 1


@pytest.mark.parametrize("count", [1, 5])
def test_each_slice_is_changed_as_if_it_were_alone(count: int) -> None:
    slices = textured(count, 2, 16, 20)
    slices[:, :, :3] = 0
    for epoch in range(6):
        data = bag(slices, epoch=epoch)
        affine, intensity = RandBagAffined(), RandSliceIntensityd()
        matrix = affine.draw(affine.generator(data)) * [[1, 16 / 20, 1], [20 / 16, 1, 1]]
        theta = torch.from_numpy(matrix).float().expand(count, 2, 3)
        grid = functional.affine_grid(theta, list(slices.shape), align_corners=False)
        assert torch.equal(affine(data)["image"], functional.grid_sample(slices, grid, align_corners=False))

        generator = intensity.generator(data)
        changed = generator.random(count) < 0.5
        gain, offset, spread = generator.uniform([-1, -1, 0], 1, (count, 3)).T * changed
        noise = torch.from_numpy(generator.standard_normal(slices.shape, dtype=np.float32))
        out = intensity(data)["image"]
        for n in range(count):
            visible = (slices[n] > 0).float()
            expected = slices[n] * float(1 + 0.1 * gain[n]) + visible * float(0.1 * offset[n])
            expected = expected + visible * float(0.02 * spread[n]) * noise[n]
            assert torch.equal(out[n], expected.clamp(0, 1))


def test_parameters_are_drawn_apart_from_their_effect() -> None:
    step, data = RandBagAffined(prob=1.0), bag(textured(3, 1, 16, 16), epoch=8)
    matrix = step.draw(step.generator(data))
    assert torch.equal(step.apply(data["image"], matrix), step(data)["image"])


@pytest.mark.parametrize("shape", [(24, 24), (40, 20), (18, 31)])
def test_identity_parameters_are_the_identity(shape: tuple[int, int]) -> None:
    slices = textured(3, 2, *shape)
    for step in (
        RandBagAffined(prob=0.0, mirror=0.0),
        RandBagAffined(prob=1.0, rotate=0.0, scale=0.0, shift=0.0, mirror=0.0),
        RandSliceIntensityd(prob=0.0),
        RandSliceIntensityd(prob=1.0, contrast=0.0, brightness=0.0, noise=0.0),
    ):
        torch.testing.assert_close(step(bag(slices))["image"], slices, atol=1e-4, rtol=0)


def test_mirror_is_left_right_and_as_frequent_as_asked() -> None:
    slices = textured(2, 1, 12, 18)
    mirrored = slices.flip(-1)
    always = RandBagAffined(prob=0.0, mirror=1.0)
    never = RandBagAffined(prob=0.0, mirror=0.0)
    half = RandBagAffined(prob=0.0, mirror=0.5)
    count = 0
    for epoch in range(400):
        if epoch < 30:
            torch.testing.assert_close(always(bag(slices, epoch=epoch))["image"], mirrored, atol=1e-4, rtol=0)
            torch.testing.assert_close(never(bag(slices, epoch=epoch))["image"], slices, atol=1e-4, rtol=0)
        count += bool(half.draw(half.generator(bag(slices, epoch=epoch)))[0, 0] < 0)
    assert abs(count - 200) < 45


def test_no_mirror_image_with_every_other_change() -> None:
    step = RandBagAffined(prob=1.0, mirror=0.0)
    for epoch in range(200):
        matrix = step.draw(step.generator(bag(textured(1, 1, 4, 4), epoch=epoch)))
        assert np.linalg.det(matrix[:, :2]) > 0


@pytest.mark.parametrize("shape", [(64, 64), (96, 48), (48, 96)])
def test_an_oblong_slice_is_turned_and_not_sheared(shape: tuple[int, int]) -> None:
    """A blob keeps its distance from the centre, its angle changes by the drawn one, and it stays round."""
    step = RandBagAffined(prob=1.0, rotate=25.0, scale=0.0, shift=0.0, mirror=0.0)
    angles = []
    for epoch in range(6):
        for row, column in ((0.0, 14.0), (14.0, 0.0), (9.0, -9.0)):
            out = step(bag(blob(*shape, row, column), epoch=epoch))["image"]
            y, x = centroid(out)
            assert np.hypot(y, x) == pytest.approx(np.hypot(row, column), abs=0.05)
            angles.append(np.rad2deg(np.angle(complex(x, y) / complex(column, row))))
        assert np.ptp(angles[-3:]) < 0.3
        assert abs(angles[-1]) <= 25.0
    assert np.ptp(angles) > 10


def test_scale_and_shift_are_within_their_limits() -> None:
    moved, sizes = [], []
    image = blob(60, 40, 0, 0, sigma=4)
    for epoch in range(60):
        y, x = centroid(RandBagAffined(1.0, 0.0, 0.0, 0.1, 0.0)(bag(image, epoch=epoch))["image"])
        moved.append((y / 60, x / 40))
        zoomed = RandBagAffined(1.0, 0.0, 0.2, 0.0, 0.0)(bag(image, epoch=epoch))["image"]
        sizes.append(float((zoomed.sum() / image.sum()).sqrt()))
    largest = np.abs(moved).max(axis=0)
    assert (largest < 0.101).all()
    assert (largest > 0.08).all()
    assert 0.79 < min(sizes) < 0.87
    assert 1.13 < max(sizes) < 1.21


def test_outside_is_zero_and_the_range_is_kept() -> None:
    ones = torch.ones(2, 1, 20, 20)
    step = RandBagAffined(prob=1.0, rotate=30, scale=0.3, shift=0.2)
    for epoch in range(20):
        out = step(bag(ones, epoch=epoch))["image"]
        assert float(out.min()) >= 0
        assert float(out.max()) <= 1 + 1e-6
    assert float(step(bag(ones, epoch=0))["image"].min()) == 0


def test_slices_change_on_their_own() -> None:
    one = textured(1, 2, 32, 32)
    out = RandSliceIntensityd(prob=1.0, noise=0.0)(bag(one.expand(16, 2, 32, 32)))["image"]
    means = out.mean(dim=(1, 2, 3))
    assert len({round(float(m), 5) for m in means}) == 16
    # Without noise a slice is an affine function of what it was, the same in all its channels.
    for n in range(16):
        gain, offset = np.polyfit(one.flatten(), out[n].flatten(), 1)
        assert 0.9 - 1e-4 < gain < 1.1 + 1e-4
        assert abs(offset) < 0.1 + 1e-4
        torch.testing.assert_close(out[n], (one[0] * gain + offset).clamp(0, 1).float(), atol=1e-4, rtol=0)


def test_about_prob_of_the_slices_change() -> None:
    slices = textured(400, 1, 4, 4)
    out = RandSliceIntensityd(prob=0.3)(bag(slices))["image"]
    same = (out == slices).flatten(1).all(dim=1)
    assert 240 < int(same.sum()) < 320


def test_noise_differs_from_slice_to_slice_and_is_as_large_as_allowed() -> None:
    slices = torch.full((64, 1, 32, 32), 0.5)
    out = RandSliceIntensityd(prob=1.0, contrast=0.0, brightness=0.0, noise=0.05)(bag(slices))["image"] - slices
    spread = out.std(dim=(1, 2, 3))
    assert float(spread.max()) < 0.055
    assert float(spread.max()) > 0.04
    assert float(spread.min()) < 0.01
    correlation = np.corrcoef(out.flatten(1).numpy())
    assert np.abs(correlation[np.triu_indices(64, 1)]).max() < 0.2


def test_range_and_background_are_kept() -> None:
    slices = textured(8, 2, 16, 16)
    slices[:, :, :5] = 0
    slices[0, 0, 10, 10], slices[1, 1, 11, 11] = 1.0, 0.001
    step = RandSliceIntensityd(prob=1.0, contrast=0.9, brightness=0.9, noise=0.5)
    for epoch in range(10):
        out = step(bag(slices, epoch=epoch))["image"]
        assert float(out.min()) >= 0
        assert float(out.max()) <= 1
        assert bool((out[:, :, :5] == 0).all())


@pytest.mark.parametrize(
    "build",
    [
        lambda: RandBagAffined(prob=1.1),
        lambda: RandBagAffined(mirror=-0.1),
        lambda: RandBagAffined(scale=1.0),
        lambda: RandBagAffined(rotate=-5.0),
        lambda: RandBagAffined(shift=-0.1),
        lambda: RandSliceIntensityd(prob=2),
        lambda: RandSliceIntensityd(noise=-0.1),
    ],
)
def test_bad_settings_get_one_sentence(build: Any) -> None:
    with pytest.raises(InputError) as caught:
        build()
    assert "\n" not in str(caught.value)
