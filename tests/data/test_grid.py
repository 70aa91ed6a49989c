from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from bundle.data.grid import (
    check_axes,
    check_matrix,
    check_shape,
    check_sizes,
    check_stated_sizes,
    corner_distance,
    tilt_of,
)
from bundle.data.policy import ReaderPolicy
from bundle.errors import Refusal
from tests.data.ramp import turned

POLICY = ReaderPolicy()


def code(check: object, *arguments: object) -> str | None:
    try:
        check(*arguments)  # type: ignore[operator]
    except Refusal as refusal:
        return refusal.code
    return None


def test_corner_distance_is_the_largest_over_all_voxels() -> None:
    first, second = turned(20), turned(21)
    shape = (4, 5, 6)
    slow = max(
        np.linalg.norm((first - second) @ [*index, 1])
        for index in itertools.product(*map(range, shape))  # every voxel, not corners alone
    )
    assert corner_distance(first, second, shape) == pytest.approx(slow)
    assert corner_distance(first, first, shape) == 0


@pytest.mark.parametrize("lean", [0, 0.01, 5, 22.5, 60])
@pytest.mark.parametrize("degrees", [0, 17, 45])
@pytest.mark.parametrize("mirrored", [False, True])
def test_tilt_is_the_angle_between_the_third_axis_and_the_normal(lean: float, degrees: float, mirrored: bool) -> None:
    affine = turned(degrees, lean, mirrored)
    assert tilt_of(affine) == pytest.approx(lean, abs=1e-6)
    affine[:3, 2] *= -1
    assert tilt_of(affine) == pytest.approx(lean, abs=1e-6)
    assert code(check_matrix, affine) is None


def test_tilt_of_an_upright_or_singular_matrix() -> None:
    assert tilt_of(np.eye(4)) == 0
    assert tilt_of(np.array([[1.0, 0, 1, 0], [0, 1, 1, 0], [0, 0, 0, 0], [0, 0, 0, 1]])) == 90


@pytest.mark.parametrize(
    ("place", "value"),
    [((0, 0), math.nan), ((1, 3), math.inf), ((2, 3), 2e5), ((0, 0), 1e300), ((0, 1), 1.0), ((2, 2), 0.0)],
)
def test_matrices_that_are_no_orientation(place: tuple[int, int], value: float) -> None:
    affine = np.eye(4)
    affine[place] = value
    if place == (0, 1):
        affine[1, 1] = 1e-4  # nearly the first axis again
    assert code(check_matrix, affine) == "bad_affine"
    assert code(check_matrix, affine, "sform") == "bad_sform"


def test_sizes_outside_the_policy() -> None:
    assert code(check_sizes, np.array([0.05, 1, 50]), POLICY) is None
    for wrong in (0.049, 50.1, 0, -1, math.nan, math.inf):
        assert code(check_sizes, np.array([1, wrong, 1]), POLICY) == "bad_spacing"
    assert code(check_sizes, np.array([1, 1, 60.0]), ReaderPolicy(spacing_range_mm=(1, 100))) is None


def test_stated_sizes_may_be_of_the_leaning_axis_or_of_the_planes() -> None:
    upright, leaning = turned(10), turned(10, lean=20)
    along, between = np.array([0.8, 0.9, 2.5]), np.array([0.8, 0.9, 2.5 * math.cos(math.radians(20))])
    assert code(check_stated_sizes, upright, along, POLICY) is None
    assert code(check_stated_sizes, upright, between, POLICY) == "spacing_disagrees"
    assert code(check_stated_sizes, leaning, along, POLICY) is None
    assert code(check_stated_sizes, leaning, between, POLICY) is None
    assert code(check_stated_sizes, leaning, (along + between) / 2, POLICY) == "spacing_disagrees"
    for axis in range(3):
        wrong = along.copy()
        wrong[axis] *= 1.02
        assert code(check_stated_sizes, leaning, wrong, POLICY) == "spacing_disagrees"


@pytest.mark.parametrize("choice", ["keep", "resample", "refuse"])
@pytest.mark.parametrize("mirrored", [False, True])
def test_a_lean_of_the_third_axis_is_a_tilt(choice: str, mirrored: bool) -> None:
    policy = ReaderPolicy(gantry_tilt=choice)
    found = {lean: code(check_axes, turned(30, lean, mirrored), policy) for lean in (0, 0.04, 0.06, 22, 34, 36, 80)}
    small = "gantry_tilt" if choice == "refuse" else None
    assert found == {0: None, 0.04: None, 0.06: small, 22: small, 34: small, 36: "gantry_tilt", 80: "gantry_tilt"}
    assert code(check_axes, turned(30, 36), ReaderPolicy(max_tilt_degrees=40, gantry_tilt=choice)) == small


def test_tilt_is_told_in_degrees() -> None:
    with pytest.raises(Refusal, match="22.50°.*policy") as caught:
        check_axes(turned(30, 22.5), ReaderPolicy(gantry_tilt="refuse"))
    assert caught.value.facts["degrees"] == pytest.approx(22.5)
    with pytest.raises(Refusal, match="40.0°.*beyond the 35°"):
        check_axes(turned(30, 40), POLICY)


@pytest.mark.parametrize(("degrees", "expected"), [(0.04, None), (0.06, "sheared"), (10, "sheared"), (-40, "sheared")])
def test_the_first_two_axes_must_be_at_right_angles(degrees: float, expected: str | None) -> None:
    affine, angle = turned(30), math.radians(degrees)
    first, second = affine[:3, 0] / 0.8, affine[:3, 1] / 0.9
    affine[:3, 1] = 0.9 * (math.sin(angle) * first + math.cos(angle) * second)
    assert code(check_axes, affine, POLICY) == expected
    if expected:
        with pytest.raises(Refusal, match=f"{abs(degrees):.2f}°"):
            check_axes(affine, POLICY)


def test_shapes() -> None:
    assert check_shape([4, 5, 6], POLICY, 1) == check_shape([4, 5, 6, 1, 1], POLICY, 1) == (4, 5, 6)
    assert check_shape([4, 5, 6, 2], POLICY, 2) == (4, 5, 6, 2)
    for sizes, channels, expected in (
        ([4, 5], 1, "not_3d"),
        ([4, 5, 6, 1, 2], 2, "not_3d"),
        ([4, 5, 6, 2], 1, "channel_count"),
        ([4, 5, 6], 2, "channel_count"),
        ([4, 5, 2], 1, "too_few_slices"),
        ([1, 5, 6], 1, "too_few_slices"),
        ([1024, 1024, 1024], 1, "too_large"),
        ([512, 512, 2048, 2], 2, "too_large"),
    ):
        assert code(check_shape, sizes, POLICY, channels) == expected
