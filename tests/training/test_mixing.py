"""Mixed bags: whose slices they hold, what their label says, and what is refused."""

import pytest
import torch

from bundle.data.collate import collate_bags
from bundle.errors import InputError
from bundle.training.engine import prepare_bags
from bundle.training.mixing import MixBags

from .conftest import make_bag

CPU = torch.device("cpu")


def batch_of(*sizes, labels=(0, 1, 1, 0)):
    """Bags whose slices hold their own bag's number (from 1), so that each slice tells where it is from."""
    bags = []
    for bag, (size, label) in enumerate(zip(sizes, labels, strict=False), start=1):
        made = make_bag(bag, size, label)
        made["image"] = torch.full((size, 1, 2, 2), float(bag))
        bags.append(made)
    return collate_bags(bags)


def owners(image):
    return image[:, :, 0, 0, 0].round().int()


def test_without_it_the_batch_is_as_it_was():
    batch = batch_of(4, 3)
    for found, expected in zip(MixBags(0.0, 2)(batch, CPU)[:2], prepare_bags(batch, CPU)[:2], strict=True):
        assert torch.equal(found, expected)
        assert found.dtype == expected.dtype


def test_a_mixed_bag_keeps_most_of_its_slices_and_the_label_counts_them():
    torch.manual_seed(0)
    batch, counts = batch_of(8, 5, 1, 6), set()
    image_before = batch["image"].clone()
    for _ in range(200):
        image, shares, (mask,), _ = MixBags(1.0, 2)(batch, CPU)
        assert torch.equal(mask, batch["mask"])
        for bag, size in enumerate((8, 5, 1, 6)):
            own = owners(image)[bag]
            assert (own[size:] == 0).all()  # padding
            others = own[:size][own[:size] != bag + 1]
            assert len(others) < size / 2
            assert len(set(others.tolist())) <= 1  # of one other bag
            label = [0, 1, 1, 0]
            expected = torch.zeros(2)
            for owner in own[:size].tolist():
                expected[label[owner - 1]] += 1 / size
            torch.testing.assert_close(shares[bag], expected)
            counts.add((bag, len(others)))
    assert torch.equal(batch["image"], image_before)
    # Every number of slices occurs; a bag of one slice keeps it.
    assert {(0, n) for n in range(4)} | {(1, n) for n in range(3)} | {(2, 0)} == {c for c in counts if c[0] < 3}


def test_the_probability_is_that_of_a_bag():
    torch.manual_seed(0)
    mixing, mixed = MixBags(0.3, 2), 0
    batch = batch_of(60, 60)
    for _ in range(1000):
        image, *_ = mixing(batch, CPU)
        mixed += int((owners(image) != torch.tensor([[1], [2]])).any(dim=1).sum())
    # At least one of 0 to 29 slices: 29/30.
    assert mixed / 2000 == pytest.approx(0.3 * 29 / 30, abs=0.03)


def test_the_highest_class_wins_where_one_slice_decides():
    torch.manual_seed(0)
    batch = batch_of(4, 4)
    for _ in range(50):
        image, shares, _, _ = MixBags(1.0, 2, "highest")(batch, CPU)
        assert shares[1].tolist() == [0, 1]
        assert shares[0].tolist() == ([0, 1] if (owners(image)[0] == 2).any() else [1, 0])


def test_a_bag_that_is_alone_stays_as_it_is():
    batch = batch_of(6, labels=(1,))
    image, shares, _, _ = MixBags(1.0, 2)(batch, CPU)
    assert torch.equal(image, batch["image"])
    assert shares.tolist() == [[0, 1]]


def test_a_seed_gives_the_same_bags_again():
    batch = batch_of(6, 6, 6, 6)
    torch.manual_seed(3)
    first = MixBags(0.8, 2)(batch, CPU)[0]
    torch.manual_seed(3)
    assert torch.equal(MixBags(0.8, 2)(batch, CPU)[0], first)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((1.5, 2), "bag_mixing must be a probability"),
        ((-0.1, 2), "bag_mixing must be a probability"),
        ((0.5, 2, "both"), "bag_mixing_label must be one of share, highest"),
        ((0.5, 2, "share", False), "bag_mixing needs a network of single slices"),
    ],
)
def test_what_is_refused(arguments, said):
    with pytest.raises(InputError, match=said):
        MixBags(*arguments)
    MixBags(0.0, 2, slicewise=False)
