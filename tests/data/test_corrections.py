from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
from scipy import ndimage

from bundle.data.corrections import correct_bias, make_upright
from bundle.data.volume import Volume
from tests.data.dicom_factory import true_value

SPACING = np.array([0.8, 1.3, 2.5])
SHAPE = (21, 18, 7)


def rotation(axis: tuple[float, float, float], degrees: float) -> np.ndarray:
    x, y, z = np.array(axis) / np.linalg.norm(axis)
    cross, angle = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]]), np.deg2rad(degrees)
    return np.eye(3) + np.sin(angle) * cross + (1 - np.cos(angle)) * cross @ cross


def leaning(lean: tuple[float, float], turn: np.ndarray | None = None, flip: tuple[int, ...] = (1, 1, 1)) -> np.ndarray:
    """(4, 4): slices 2.5 mm apart, each shifted in its plane by `lean` mm against the one before."""
    axes = np.eye(3) if turn is None else turn
    affine = np.eye(4)
    affine[:3, :3] = axes * SPACING * flip
    affine[:3, 2] += axes[:, :2] @ lean
    affine[:3, 3] = -31.0, 12.0, 55.0
    return affine


def places(affine: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    index = np.stack(np.meshgrid(*(np.arange(n) for n in shape), indexing="ij"), axis=-1)
    return index @ affine[:3, :3].T + affine[:3, 3]  # (X, Y, Z, 3) RAS mm


def volume_of(array: np.ndarray, affine: np.ndarray, **facts: object) -> Volume:
    positions = tuple(2.5 * k for k in range(array.shape[2]))
    uids = tuple(f"1.2.{k}" for k in range(array.shape[2]))
    return Volume(
        array.astype(np.float32), affine, "CT", "dicom", slice_uids=uids, slice_positions=positions, facts=facts
    )


CASES = {
    "gantry": leaning((0.0, 0.83)),
    "backwards": leaning((0.0, -0.83)),
    "along rows": leaning((0.61, 0.0)),
    "both, oblique": leaning((0.5, -0.7), rotation((1, 0.4, -0.3), 25)),
    "mirrored": leaning((0.0, 0.83), flip=(-1, 1, 1)),
    "head last": leaning((-0.4, 0.83), flip=(1, 1, -1)),
    "by whole pixels": leaning((0.8, -1.3)),
}


@pytest.mark.parametrize("case", CASES)
def test_upright_voxels_have_the_value_of_their_place(case: str) -> None:
    """The truth is an affine function of position, which linear interpolation keeps."""
    affine = CASES[case]
    volume = volume_of(true_value(places(affine, SHAPE) * [-1, -1, 1]), affine, tilt_degrees=18.0, corrections=["x"])
    upright = make_upright(volume)
    axes = upright.affine[:3, :3]
    np.testing.assert_allclose(axes.T @ axes, np.diag(SPACING**2), atol=1e-9)
    np.testing.assert_array_equal(axes[:, :2], affine[:3, :2])
    assert upright.array.dtype == np.float32

    # Where each new voxel lies among the acquired ones says whether it is between pixels, at an edge, or outside.
    inside = (places(upright.affine, upright.array.shape) - affine[:3, 3]) @ np.linalg.inv(affine[:3, :3]).T
    np.testing.assert_allclose(inside[..., 2], np.broadcast_to(np.arange(SHAPE[2]), inside.shape[:3]), atol=1e-9)
    last = np.array(SHAPE[:2]) - 1
    between = ((inside[..., :2] > -1e-6) & (inside[..., :2] < last + 1e-6)).all(axis=-1)
    outside = ((inside[..., :2] < -0.5 - 1e-6) | (inside[..., :2] > last + 0.5 + 1e-6)).any(axis=-1)
    truth = true_value(places(upright.affine, upright.array.shape) * [-1, -1, 1])
    np.testing.assert_allclose(upright.array[between], truth[between], rtol=2e-6)
    assert (upright.array[outside] == volume.array.min()).all()
    assert outside.any()
    assert between.sum() >= (SHAPE[0] - 1) * (SHAPE[1] - 1) * SHAPE[2]

    assert (upright.slice_uids, upright.slice_positions) == (volume.slice_uids, volume.slice_positions)
    assert upright.facts["tilt_degrees"] == 18.0
    assert upright.facts["corrections"][0] == "x"
    assert volume.facts["corrections"] == ["x"]
    json.dumps(upright.facts)


@pytest.mark.parametrize("case", CASES)
def test_upright_equals_scipy(case: str) -> None:
    affine = CASES[case]
    volume = volume_of(np.random.default_rng(1).normal(size=SHAPE), affine)
    upright = make_upright(volume)
    change = np.linalg.inv(affine) @ upright.affine  # new index → acquired index
    expected = ndimage.affine_transform(
        volume.array.astype(np.float64), change[:3, :3], change[:3, 3], upright.array.shape, order=1, mode="nearest"
    )
    index = np.stack(np.meshgrid(*(np.arange(n) for n in upright.array.shape), indexing="ij"), axis=-1)
    acquired = index @ change[:3, :3].T + change[:3, 3]
    known = ((acquired[..., :2] > -0.5) & (acquired[..., :2] < np.array(SHAPE[:2]) - 0.5)).all(axis=-1)
    np.testing.assert_allclose(upright.array[known], expected[known], atol=1e-5)


@pytest.mark.parametrize("case", CASES)
def test_no_acquired_voxel_is_lost(case: str) -> None:
    affine = CASES[case]
    upright = make_upright(volume_of(np.zeros(SHAPE), affine))
    corners = np.stack(np.meshgrid(*((0, n - 1) for n in SHAPE), indexing="ij"), axis=-1).reshape(-1, 3)
    there = (corners @ affine[:3, :3].T + affine[:3, 3] - upright.affine[:3, 3]) @ np.linalg.inv(
        upright.affine[:3, :3]
    ).T
    assert (there > -1e-5).all()
    assert (there < np.array(upright.array.shape) - 1 + 1e-5).all()
    # And no more than a voxel of room on either side.
    assert there[:, :2].min(axis=0).max() < 1
    assert (np.array(upright.array.shape[:2]) - 1 - there[:, :2].max(axis=0)).max() < 1


def test_shifts_by_whole_pixels_copy_the_pixels() -> None:
    array = np.random.default_rng(0).normal(size=SHAPE).astype(np.float32)
    upright = make_upright(volume_of(array, leaning((0.8, -1.3))))
    assert upright.array.shape == (SHAPE[0] + 6, SHAPE[1] + 6, SHAPE[2])
    for k in range(SHAPE[2]):
        np.testing.assert_array_equal(upright.array[k : k + SHAPE[0], 6 - k : 6 - k + SHAPE[1], k], array[:, :, k])


def test_channels_are_shifted_alike() -> None:
    affine = CASES["both, oblique"]
    channels = np.random.default_rng(0).normal([0, 100], size=(*SHAPE, 2))
    both = make_upright(volume_of(channels, affine))
    for c in (0, 1):
        one = make_upright(volume_of(channels[..., c], affine))
        np.testing.assert_array_equal(both.array[..., c], one.array)
        np.testing.assert_array_equal(both.affine, one.affine)


def test_the_angle_and_the_shift_are_told() -> None:
    affine = leaning((0.0, 2.5 * np.tan(np.radians(18.5))))
    (note,) = make_upright(volume_of(np.zeros(SHAPE), affine)).facts["corrections"]
    assert note == (
        "upright: gantry tilt of 18.5° taken out, slices shifted in their plane by up to 5.0 mm (linear)"
    )  # 6 steps of 0.836 mm


def test_what_stands_upright_stays_and_what_is_no_stack_is_refused() -> None:
    volume = volume_of(np.zeros(SHAPE), leaning((0.0, 0.0), rotation((1, 0.4, -0.3), 25)))
    assert make_upright(volume) is volume
    skew = leaning((0.0, 0.8))
    skew[0, 1] = 0.1
    flat = leaning((0.0, 0.8))
    flat[:3, 2] = flat[:3, 0] + flat[:3, 1]
    for affine in (skew, flat):
        with pytest.raises(ValueError, match="right angles"):
            make_upright(volume_of(np.zeros(SHAPE), affine))


# --- bias field ---


def phantom(shape: tuple[int, ...] = (80, 72, 16)) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Values of an even head with noise, its white tissue, and a smooth field."""
    grid = np.stack(np.meshgrid(*(np.linspace(-1, 1, n) for n in shape), indexing="ij"))
    radius = np.sqrt((grid**2).sum(axis=0))
    head = np.select([radius < 0.45, radius < 0.75, radius < 0.85], [420.0, 300.0, 600.0], 0.0)
    head += np.abs(np.random.default_rng(0).normal(0, 4, shape))
    field = np.exp(0.45 * grid[0] - 0.3 * grid[1] ** 2 + 0.25 * grid[2] * grid[0])
    return head.astype(np.float32), (radius >= 0.46) & (radius < 0.74), field.astype(np.float32)


def spread(values: np.ndarray) -> float:
    """Coefficient of variation."""
    return float(values.std() / values.mean())


def test_bias_is_taken_out_and_an_even_head_is_left() -> None:
    head, tissue, field = phantom()
    affine = np.diag([2.4, 2.6, 9.0, 1.0])
    biased = volume_of(head * field, affine)
    even = correct_bias(biased)
    assert even.facts["corrections"] == ["n4 bias correction"]
    assert (even.array.shape, even.array.dtype) == (head.shape, np.float32)
    assert spread(biased.array[tissue]) > 0.1
    assert spread(even.array[tissue]) < 0.25 * spread(biased.array[tissue])
    # What was divided by is the field, but for one factor.
    ratio = biased.array / even.array / field
    assert spread(ratio[tissue]) < 0.03
    left = correct_bias(volume_of(head, affine)).array
    assert np.abs(left / head - 1)[tissue].max() < 0.01
    np.testing.assert_array_equal(biased.array, head * field)  # the given volume is not changed


def test_the_field_equals_itks_own_where_nothing_is_left_out() -> None:
    """An image of 32 × 32 pixels is fitted whole, so itk's own corrected image is the oracle of the spline."""
    import itk

    head, _, field = phantom((40, 36, 12))
    values = head * field
    ours = correct_bias(volume_of(values, np.diag([2.4, 2.6, 9.0, 1.0]))).array
    turned = np.ascontiguousarray(values.T)
    image = itk.image_from_array(turned)
    image.SetSpacing([2.4, 2.6, 9.0])
    otsu = itk.OtsuThresholdImageFilter.New(image, NumberOfHistogramBins=200)
    otsu.Update()
    tissue = turned > float(otsu.GetThreshold())
    mask = itk.image_from_array(tissue.astype(np.uint8))
    mask.SetSpacing([2.4, 2.6, 9.0])
    n4 = itk.N4BiasFieldCorrectionImageFilter[type(image), type(mask), type(image)].New()
    n4.SetInput(image)
    n4.SetMaskImage(mask)
    n4.SetNumberOfFittingLevels(4)
    n4.SetMaximumNumberOfIterations([50] * 4)
    n4.SetConvergenceThreshold(0.001)
    n4.Update()
    np.testing.assert_allclose(ours, itk.array_from_image(n4.GetOutput()).T, rtol=2e-3)


def test_signs_and_zeros_stay() -> None:
    head, _, field = phantom()
    values = head * field
    values[:3], values[3:5] = 0, -7
    found = correct_bias(volume_of(values, np.eye(4))).array
    np.testing.assert_array_equal(np.sign(found), np.sign(values))
    assert np.isfinite(found).all()


def test_each_channel_has_its_own_field() -> None:
    head, _, field = phantom()
    pair = np.stack([head * field, head / field, np.full_like(head, 3.0)], axis=-1)
    found = correct_bias(volume_of(pair, np.eye(4)))
    for c in (0, 1):
        alone = correct_bias(volume_of(pair[..., c], np.eye(4)))
        np.testing.assert_array_equal(found.array[..., c], alone.array)
    np.testing.assert_array_equal(found.array[..., 2], pair[..., 2])
    assert found.facts["corrections"] == [
        "n4 bias correction, left out in channel 3 of 3: too few voxels of tissue, or one value only"
    ]


def binary(shape: tuple[int, ...]) -> np.ndarray:
    array = np.zeros(shape, dtype=np.float32)
    array[5:-5, 5:-5] = 100
    return array


@pytest.mark.parametrize(
    "array",
    [
        np.zeros((40, 40, 10)),
        np.full((40, 40, 10), 5.0),
        np.full((40, 40, 10), -5.0),
        np.ones((1, 1, 1)),
        np.random.default_rng(0).normal(100, 9, (4, 4, 4)),
        np.random.default_rng(0).normal(100, 9, (200, 200, 1)),
        np.random.default_rng(0).normal(-100, 9, (40, 40, 10)),
    ],
)
def test_nothing_to_fit_is_left_alone_and_told(array: np.ndarray) -> None:
    found = correct_bias(volume_of(array, np.eye(4)))
    np.testing.assert_array_equal(found.array, array.astype(np.float32))
    assert found.facts["corrections"] == ["n4 bias correction left out: too few voxels of tissue, or one value only"]


@pytest.mark.parametrize(
    "array",
    [
        binary((40, 40, 10)),
        binary((33, 140, 4)),
        np.random.default_rng(0).normal(100, 9, (40, 40, 5)),
        np.random.default_rng(0).normal(0, 9, (40, 40, 5)),
        np.random.default_rng(0).lognormal(0, 4, (60, 40, 9)),
        1e-9 * (binary((40, 40, 10)) + np.random.default_rng(0).uniform(1, 2, (40, 40, 10))),
        1e9 * (binary((40, 40, 10)) + np.random.default_rng(0).uniform(1, 2, (40, 40, 10))),
    ],
)
def test_odd_volumes_give_finite_values_of_the_same_sign(array: np.ndarray) -> None:
    found = correct_bias(volume_of(array, np.diag([0.5, 0.5, 8.0, 1.0]))).array
    assert np.isfinite(found).all()
    np.testing.assert_array_equal(np.sign(found), np.sign(array.astype(np.float32)))


def test_the_same_bits_with_any_number_of_threads() -> None:
    import itk

    head, _, field = phantom((40, 36, 12))
    volume = volume_of(head * field, np.eye(4))
    before = itk.MultiThreaderBase.GetGlobalDefaultNumberOfThreads()
    found = []
    try:
        for threads in (1, 2, 5, 5):
            itk.MultiThreaderBase.SetGlobalDefaultNumberOfThreads(threads)
            found.append(correct_bias(volume).array)
            assert itk.MultiThreaderBase.GetGlobalDefaultNumberOfThreads() == threads
    finally:
        itk.MultiThreaderBase.SetGlobalDefaultNumberOfThreads(before)
    for other in found[1:]:
        np.testing.assert_array_equal(found[0], other)


@pytest.mark.slow  # importing itk takes seconds
def test_the_same_bits_in_every_process() -> None:
    program = """
import hashlib, warnings
warnings.simplefilter("ignore")
import numpy as np
from bundle.data.corrections import correct_bias
from tests.data.test_corrections import phantom, volume_of
head, _, field = phantom()
print(hashlib.sha256(correct_bias(volume_of(head * field, np.eye(4))).array.tobytes()).hexdigest())
"""
    command = [sys.executable, "-c", program]
    digests = {subprocess.run(command, check=True, capture_output=True, text=True).stdout for _ in range(2)}
    assert len(digests) == 1
