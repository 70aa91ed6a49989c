from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from bundle.data.sampling import AllSlicesd, RandomSlicesd, StratifiedSlicesd, UniformSlicesd
from bundle.errors import InputError

DRAWS = [RandomSlicesd, StratifiedSlicesd, UniformSlicesd]
CHANCE = [RandomSlicesd, StratifiedSlicesd]


def bag(num_slices: int, seed: int = 0, epoch: int = 0, case: str = "c1") -> dict[str, Any]:
    number = torch.arange(num_slices)
    return {
        "image": number[:, None, None, None].float() * torch.ones(1, 1, 2, 2),
        "slice_index": number + 100,
        "slice_position": number * 1.5,
        "slice_label": number % 2,
        "slice_uid": tuple(f"1.{n}" for n in range(num_slices)),
        "case": case,
        "draw": (seed, epoch),
    }


def drawn(step: Any, *arguments: Any, **more: Any) -> list[int]:
    return [int(n) - 100 for n in step(bag(*arguments, **more))["slice_index"]]


@pytest.mark.parametrize("kind", DRAWS)
@pytest.mark.parametrize(("num_slices", "size"), [(2, 1), (7, 6), (10, 3), (88, 24), (89, 64), (200, 1)])
def test_a_draw_is_sorted_unique_and_of_its_size(kind: Any, num_slices: int, size: int) -> None:
    for epoch in range(20):
        chosen = drawn(kind(size), num_slices, epoch=epoch)
        assert len(chosen) == size
        assert chosen == sorted(set(chosen))
        assert 0 <= chosen[0] <= chosen[-1] < num_slices


@pytest.mark.parametrize("kind", DRAWS)
def test_every_field_follows(kind: Any) -> None:
    out = kind(4)(bag(11))
    chosen = out["slice_index"] - 100
    assert torch.equal(out["image"][:, 0, 0, 0], chosen.float())
    assert torch.equal(out["slice_position"], chosen * 1.5)
    assert torch.equal(out["slice_label"], chosen % 2)
    assert out["slice_uid"] == tuple(f"1.{n}" for n in chosen.tolist())


@pytest.mark.parametrize("kind", DRAWS)
@pytest.mark.parametrize("num_slices", [1, 3, 5])
def test_a_short_bag_is_whole_and_never_filled(kind: Any, num_slices: int) -> None:
    assert drawn(kind(5), num_slices) == list(range(num_slices))


def test_all_slices() -> None:
    assert drawn(AllSlicesd(), 37) == list(range(37))
    assert drawn(AllSlicesd(), 1) == [0]


@pytest.mark.parametrize(("num_slices", "size"), [(10, 3), (12, 4), (89, 64), (7, 6)])
def test_stratified_takes_one_from_each_equal_part(num_slices: int, size: int) -> None:
    seen = [set[int]() for _ in range(size)]
    for epoch in range(300):
        for part, chosen in zip(seen, drawn(StratifiedSlicesd(size), num_slices, epoch=epoch), strict=True):
            part.add(chosen)
    # The parts cover the bag without a gap, and are as equal as whole slices allow.
    assert [n for part in seen for n in sorted(part)] == list(range(num_slices))
    assert {len(part) for part in seen} <= {num_slices // size, num_slices // size + 1}


def test_uniform_is_even_symmetric_and_without_chance() -> None:
    assert drawn(UniformSlicesd(3), 9) == [1, 4, 7]
    assert drawn(UniformSlicesd(1), 9) == [4]
    assert drawn(UniformSlicesd(4), 8, epoch=3, seed=9, case="other") == drawn(UniformSlicesd(4), 8)
    for num_slices, size in ((88, 24), (65, 64)):
        gaps = np.diff(drawn(UniformSlicesd(size), num_slices))
        assert gaps.max() - gaps.min() <= 1


@pytest.mark.parametrize("kind", CHANCE)
def test_a_draw_depends_on_seed_epoch_and_case_alone(kind: Any) -> None:
    step = kind(16)
    here = drawn(step, 64, seed=1, epoch=5, case="c7")
    for _ in range(3):  # whatever was drawn before and whatever the state of the global generators
        drawn(step, 64, seed=2, epoch=0, case="other")
        np.random.seed(3)
        torch.manual_seed(3)
        assert drawn(kind(16), 64, seed=1, epoch=5, case="c7") == here
    others = [
        drawn(step, 64, seed=2, epoch=5, case="c7"),
        drawn(step, 64, seed=1, epoch=6, case="c7"),
        drawn(step, 64, seed=5, epoch=1, case="c7"),
        drawn(step, 64, seed=1, epoch=5, case="c8"),
    ]
    assert here not in others
    assert len({tuple(other) for other in others}) == 4


def test_two_kinds_of_draw_do_not_share_numbers() -> None:
    """Numbers of the sampling must not come again in the augmentation."""
    one, two = (kind(4).generator(bag(9)).random(8) for kind in CHANCE)
    assert not np.intersect1d(one, two).size


def test_known_draws() -> None:
    """Held, because published results name their seeds: a change here changes every bag."""
    assert drawn(RandomSlicesd(5), 30, seed=0, epoch=1, case="c1") == [0, 3, 8, 9, 16]
    assert drawn(StratifiedSlicesd(5), 30, seed=0, epoch=1, case="c1") == [1, 11, 13, 19, 28]


def test_random_is_uniform_over_slices_and_pairs() -> None:
    step, epochs, n, k = RandomSlicesd(4), 3000, 10, 4
    member = np.zeros((epochs, n))
    for epoch in range(epochs):
        member[epoch, drawn(step, n, epoch=epoch)] = 1
    share = k / n
    assert np.abs(member.mean(axis=0) - share).max() < 4.5 * np.sqrt(share * (1 - share) / epochs)
    together = (member.T @ member / epochs)[np.triu_indices(n, 1)]
    share = k * (k - 1) / (n * (n - 1))
    assert np.abs(together - share).max() < 4.5 * np.sqrt(share * (1 - share) / epochs)
    # Consecutive epochs have nothing to do with each other.
    overlap = (member[1:] * member[:-1]).sum(axis=1).mean()
    assert overlap == pytest.approx(k * k / n, abs=0.1)


def test_stratified_is_uniform_within_a_part() -> None:
    step, epochs = StratifiedSlicesd(3), 2000
    counts = np.zeros(12)
    for epoch in range(epochs):
        counts[drawn(step, 12, epoch=epoch)] += 1
    assert np.abs(counts / epochs - 0.25).max() < 4.5 * np.sqrt(0.25 * 0.75 / epochs)


@pytest.mark.parametrize("kind", DRAWS)
def test_a_bag_of_no_slices_is_refused(kind: Any) -> None:
    for size in (0, -3):
        with pytest.raises(InputError, match="bag_size must be at least 1"):
            kind(size)
