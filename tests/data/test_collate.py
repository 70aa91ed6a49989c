from __future__ import annotations

from typing import Any

import pytest
import torch

from bundle.data.collate import collate_bags
from bundle.errors import InputError, Refusal


def bag(num_slices: int, label: int | None = 1, case: str = "c", shape: tuple[int, ...] = (2, 4, 3)) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(num_slices)
    number = torch.arange(num_slices)
    return {
        "image": torch.rand(num_slices, *shape, generator=generator) + 1,
        "slice_index": number + 5,
        "slice_position": number * 2.5 - 7,
        "slice_label": number % 2,
        "slice_uid": tuple(f"1.{n}" for n in range(num_slices)),
        "label": label,
        "case": case,
        "patient": None,
    }


@pytest.mark.parametrize("lengths", [[3, 5, 1], [4, 4], [1], [1, 1, 1], [64, 2]])
def test_a_batch_holds_its_bags(lengths: list[int]) -> None:
    bags = [bag(n, label=i % 2, case=f"c{i}") for i, n in enumerate(lengths)]
    batch = collate_bags(bags)
    most = max(lengths)
    assert batch["image"].shape == (len(lengths), most, 2, 4, 3)
    assert batch["mask"].dtype == torch.bool
    assert batch["label"].dtype == torch.int64
    assert batch["mask"].sum(dim=1).tolist() == lengths
    for i, (one, n) in enumerate(zip(bags, lengths, strict=True)):
        assert batch["mask"][i].tolist() == [True] * n + [False] * (most - n)
        for field in ("image", "slice_index", "slice_position", "slice_label"):
            assert torch.equal(batch[field][i][batch["mask"][i]], one[field])
            assert batch[field].dtype == one[field].dtype
        assert (batch["image"][i, n:] == 0).all()
        assert (batch["slice_index"][i, n:] == -1).all()
        assert (batch["slice_label"][i, n:] == -1).all()
        assert batch["slice_position"][i, n:].isnan().all()
        assert (batch["case"][i], batch["slice_uid"][i]) == (f"c{i}", one["slice_uid"])
        assert int(batch["label"][i]) == i % 2
    assert batch["patient"] == [None] * len(lengths)


def test_a_batch_equals_its_bags_one_by_one() -> None:
    bags = [bag(3, 0, "a"), bag(6, 1, "b"), bag(1, None, "c")]
    batch = collate_bags(bags)
    for i, one in enumerate(bags):
        alone, real = collate_bags([one]), batch["mask"][i]
        for field in ("image", "slice_index", "slice_position", "slice_label"):
            assert torch.equal(alone[field][0], batch[field][i][real])
        assert alone["label"][0] == batch["label"][i]
        assert bool(alone["mask"].all())


def test_an_unknown_label_is_minus_one() -> None:
    assert collate_bags([bag(2, None), bag(2, 0)])["label"].tolist() == [-1, 0]
    without = bag(2)
    del without["label"]
    assert collate_bags([without])["label"].tolist() == [-1]


def test_a_batch_of_several_is_a_copy() -> None:
    bags = [bag(3), bag(3)]
    kept = bags[0]["image"].clone()
    collate_bags(bags)["image"].zero_()
    assert torch.equal(bags[0]["image"], kept)


def test_a_batch_of_one_is_that_bag_and_no_second_one_in_memory() -> None:
    one = bag(3)
    assert collate_bags([one])["image"].data_ptr() == one["image"].data_ptr()


def test_slices_of_different_shape_get_one_sentence() -> None:
    for other in ((2, 4, 5), (1, 4, 3)):
        with pytest.raises(InputError, match="must have one shape") as caught:
            collate_bags([bag(3), bag(3, shape=other)])
        assert "\n" not in str(caught.value)


def test_an_empty_bag_is_refused() -> None:
    with pytest.raises(InputError, match="at least one slice"):
        collate_bags([bag(3), bag(0)])


def refused(case: str) -> dict[str, Any]:
    return {"case": case, "label": 1, "patient": "p", "refusal": Refusal("non_finite", "3 voxels are no number.")}


def test_refused_cases_may_stand_anywhere_and_leave_the_bags_as_they_are() -> None:
    bags = [bag(3, case="a"), bag(5, case="b")]
    plain = collate_bags(bags)
    mixed = collate_bags([refused("r"), bags[0], refused("s"), bags[1]])
    assert [case["case"] for case in mixed.pop("refused")] == ["r", "s"]
    assert mixed.keys() == plain.keys()
    for key, value in plain.items():
        if isinstance(value, torch.Tensor):
            torch.testing.assert_close(mixed[key], value, rtol=0, atol=0, equal_nan=True)
        else:
            assert mixed[key] == value


def test_the_refused_are_listed_with_their_places() -> None:
    given = [refused("r"), bag(3), refused("s")]
    batch = collate_bags(given)
    assert batch["refused"] == [{**given[0], "position": 0}, {**given[2], "position": 2}]
    assert "refused" not in collate_bags([bag(3)])
    assert collate_bags([refused("r")]).keys() == {"refused"}
    assert "position" not in given[0]
