"""Two views of a bag's slices: each slice by its own draw, replayed from (seed, epoch, case, view) alone."""

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from bundle.data.augment import RandBagAffined, RandSliceIntensityd
from bundle.data.collate import collate_bags
from bundle.data.views import RandSliceAffined, RandSliceCutoutd, TwoViewsd
from bundle.errors import InputError


def bag(slices, seed=0, epoch=0, case="c1"):
    unknown = torch.arange(len(slices))
    return {
        "image": slices, "case": case, "draw": (seed, epoch), "label": 1, "slice_label": torch.ones_like(unknown),
        "slice_index": unknown, "slice_position": unknown.double(),
    }  # fmt: skip


def textured(*shape):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(4)) * 0.8 + 0.1


def two_views():
    return TwoViewsd([RandSliceAffined(1.0, 20.0, 0.3, 0.15), RandSliceIntensityd(0.8), RandSliceCutoutd(0.5)])


def test_every_slice_is_seen_through_its_own_matrix():
    slices = textured(5, 2, 20, 28)
    step = RandSliceAffined(prob=1.0)
    out = step(bag(slices))["image"]
    generator = step.generator(bag(slices))
    for n in range(5):
        expected = RandBagAffined().apply(slices[n : n + 1], step.draw(generator))
        torch.testing.assert_close(out[n : n + 1], expected)
    alike = step(bag(slices[:1].expand(5, 2, 20, 28)))["image"]
    assert not any(torch.allclose(alike[0], alike[n], atol=0.01) for n in range(1, 5))


def test_a_cut_out_is_a_rectangle_of_zeros_in_all_channels():
    slices = textured(200, 2, 20, 30)
    step = RandSliceCutoutd(prob=0.5, size=0.4)
    out = step(bag(slices))["image"]
    hidden = out == 0
    assert torch.equal(out[~hidden], slices[~hidden])
    assert torch.equal(hidden[:, 0], hidden[:, 1])
    cut = [plane for plane in hidden[:, 0].numpy() if plane.any()]
    assert 60 < len(cut) < 110
    for plane in cut:
        rows, columns = np.flatnonzero(plane.any(axis=1)), np.flatnonzero(plane.any(axis=0))
        assert plane[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].all()
        assert plane.sum() == len(rows) * len(columns)
        assert len(rows) <= 9
        assert len(columns) <= 13
    assert torch.equal(RandSliceCutoutd(prob=0.0)(bag(slices))["image"], slices)


def test_the_views_are_of_the_same_slices_and_differ():
    slices = textured(6, 2, 16, 16)
    kept = slices.clone()
    found = two_views()(bag(slices))
    assert found["image"].shape == (6, 4, 16, 16)
    first, second = found["image"].chunk(2, dim=1)
    assert not any(torch.allclose(first[n], second[n], atol=0.01) for n in range(6))
    assert torch.equal(slices, kept)
    assert torch.equal(found["slice_index"], torch.arange(6))
    assert found["case"] == "c1"
    same = TwoViewsd([])(bag(slices))["image"]
    assert torch.equal(same, torch.cat([slices, slices], dim=1))


def test_labels_end_there():
    found = two_views()(bag(textured(6, 1, 16, 16)))
    assert found["label"] is None
    assert found["slice_label"].tolist() == [-1] * 6
    assert collate_bags([found])["label"].tolist() == [-1]


def test_views_can_be_replayed_and_differ_between_epochs_cases_and_seeds():
    slices = textured(4, 1, 16, 16)
    here = two_views()(bag(slices, 1, 2, "a"))["image"]
    torch.manual_seed(99)
    assert torch.equal(two_views()(bag(slices, 1, 2, "a"))["image"], here)
    for key in ((1, 3, "a"), (1, 2, "b"), (2, 2, "a")):
        assert not torch.allclose(two_views()(bag(slices, *key))["image"], here)


class Bags(torch.utils.data.Dataset):
    def __len__(self):
        return 4

    def __getitem__(self, index):
        return two_views()(bag(textured(3, 1, 16, 16), case=f"c{index}"))


def test_they_are_the_same_for_any_number_of_workers():
    found = [
        torch.cat([batch["image"] for batch in DataLoader(Bags(), 2, num_workers=workers, collate_fn=collate_bags)])
        for workers in (0, 2)
    ]
    assert torch.equal(*found)


def test_impossible_cut_outs_are_refused():
    for arguments in ({"prob": 1.5}, {"size": 0.0}, {"size": 1.1}):
        with pytest.raises(InputError, match="prob is a probability and size a share"):
            RandSliceCutoutd(**arguments)
