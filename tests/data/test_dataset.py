from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.bundle import ConfigParser
from monai.transforms import Compose, Transform
from torch.utils.data import DataLoader

from bundle.data.augment import RandBagAffined, RandSliceIntensityd
from bundle.data.cache import SliceCache
from bundle.data.collate import collate_bags
from bundle.data.dataset import BagDataset, BagSampler, watched
from bundle.data.sampling import AllSlicesd, RandomSlicesd
from bundle.errors import InputError, Refusal, input_error_behind
from tests.data.dicom_factory import CANARY, make_series

ROOT = Path(__file__).parents[2]
# Python 3.12 warns of every fork beside threads; workers are forked by PyTorch.
forks = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")


class Prepare(Transform):
    """A bag whose voxels are a function of the case; refuses where the case says so. Counts its calls."""

    def __init__(self) -> None:
        self._calls: list[str] = []

    def __call__(self, data: dict[str, Any]) -> dict[str, Any]:
        self._calls.append(data["case"])
        if data.get("broken") == "refusal":
            raise Refusal("non_finite", "3 voxels are not a number.")
        if data.get("broken") == "bug":
            raise KeyError("a mistake of the programmer")
        number = torch.arange(data["length"])
        image = torch.rand(data["length"], 1, 8, 8, generator=torch.Generator().manual_seed(data["length"]))
        return {
            **{key: data[key] for key in ("case", "label", "patient")},
            "image": image,
            "slice_index": number,
            "slice_position": number * 2.0,
            "slice_label": number % 2,
            "slice_uid": None,
        }


def cases(count: int = 7) -> list[dict[str, Any]]:
    return [{"case": f"c{i}", "label": i % 2, "patient": f"p{i}", "length": 5 + 3 * i} for i in range(count)]


def dataset(data: list[dict[str, Any]] | None = None, draws: list[Any] | None = None, **more: Any) -> BagDataset:
    steps = [RandomSlicesd(6), RandBagAffined(), RandSliceIntensityd()] if draws is None else draws
    return BagDataset(cases() if data is None else data, Compose([Prepare(), *steps]), progress=False, **more)


def exact(folder: Path) -> SliceCache:
    """A cache from which bags come back as they were."""
    return SliceCache(folder / "cache", cache_type="float32")


def every(data: BagDataset) -> list[dict[str, Any]]:
    return [data[i] for i in range(len(data))]


def epoch_of(data: BagDataset, epoch: int, num_workers: int = 0, batch_size: int = 1) -> dict[str, dict[str, Any]]:
    """case → its bag, through a loader."""
    sampler = BagSampler(len(data), seed=data.seed)
    sampler.set_epoch(epoch)
    loader = DataLoader(data, batch_size=batch_size, sampler=sampler, num_workers=num_workers, collate_fn=collate_bags)
    bags = {}
    for batch in loader:
        for i, case in enumerate(batch["case"]):
            assert case not in bags
            real = batch["mask"][i]
            bags[case] = {key: batch[key][i][real] for key in ("image", "slice_index", "slice_label")}
    return bags


def assert_equal_bags(one: dict[str, dict[str, Any]], two: dict[str, dict[str, Any]]) -> None:
    assert one.keys() == two.keys()
    for case, bag in one.items():
        for key, value in bag.items():
            assert torch.equal(value, two[case][key]), (case, key)


@forks
def test_same_bags_with_any_number_of_workers_cache_and_batch_size(tmp_path: Path) -> None:
    data = dataset(seed=3, cache=exact(tmp_path))
    epochs = {epoch: epoch_of(data, epoch) for epoch in (0, 1)}
    assert not torch.equal(epochs[0]["c6"]["image"], epochs[1]["c6"]["image"])
    for workers in (1, 2):
        for batch_size in (1, 3):
            assert_equal_bags(epoch_of(data, 1, workers, batch_size), epochs[1])
    uncached = dataset(seed=3)
    for workers in (0, 2):
        assert_equal_bags(epoch_of(uncached, 1, workers), epochs[1])


def test_same_bags_in_another_order_of_cases_and_after_a_resume() -> None:
    data = dataset(seed=3)
    for epoch in range(3):
        epoch_of(data, epoch)
    third = epoch_of(data, 3)
    assert_equal_bags(epoch_of(dataset(seed=3), 3), third)
    assert_equal_bags(epoch_of(dataset(cases()[::-1], seed=3), 3), third)
    alone = epoch_of(dataset(cases()[4:5], seed=3), 3)
    assert_equal_bags(alone, {"c4": third["c4"]})
    other = epoch_of(dataset(seed=4), 3)
    assert not torch.equal(other["c6"]["image"], third["c6"]["image"])


@forks
def test_persistent_workers_learn_the_epoch() -> None:
    data, sampler = dataset(seed=3), BagSampler(7, seed=3)
    loader = DataLoader(
        data, sampler=sampler, num_workers=1, persistent_workers=True, collate_fn=collate_bags, batch_size=1
    )
    for epoch in (0, 1, 2):
        sampler.set_epoch(epoch)
        expected = epoch_of(dataset(seed=3), epoch)
        for batch in loader:
            assert torch.equal(batch["image"][0], expected[batch["case"][0]]["image"])


def test_an_index_alone_is_epoch_0() -> None:
    data = dataset(seed=3)
    for i in range(len(data)):
        assert torch.equal(data[i]["image"], data[0, i]["image"])
    assert not torch.equal(data[6]["image"], data[1, 6]["image"])
    assert "draw" not in data[0]
    assert [bag["case"] for bag in every(data)] == [f"c{i}" for i in range(7)]


def test_preparation_is_done_once_with_a_cache_and_each_time_without(tmp_path: Path) -> None:
    cached, uncached = dataset(cache=exact(tmp_path)), dataset()
    for data, expected in ((cached, 1), (uncached, 3)):
        for _ in range(3):
            for i in range(7):
                data[i]
        prepare = data.transform.transforms[0]
        assert [prepare._calls.count(f"c{i}") for i in range(7)] == [expected] * 7
    again = dataset(cache=exact(tmp_path))
    assert torch.equal(again[6]["image"], uncached[6]["image"])
    assert again.transform.transforms[0]._calls == []


class Darken(Transform):
    def __call__(self, data: dict[str, Any]) -> dict[str, Any]:
        return {**data, "image": data["image"] / 2}


def test_slices_are_counted_where_a_cache_knows_them(tmp_path: Path) -> None:
    assert dataset(cache=exact(tmp_path)).lengths() == [case["length"] for case in cases()]
    assert dataset().lengths() == []


def test_what_follows_the_first_draw_is_done_each_time(tmp_path: Path) -> None:
    """A transform without chance after a draw is not part of the kept preparation."""
    data = dataset(draws=[AllSlicesd(), Darken()], cache=exact(tmp_path))
    plain = dataset(draws=[])
    for _ in range(2):
        assert torch.equal(data[2]["image"], plain[2]["image"] / 2)


@pytest.mark.parametrize("draws", [[], [AllSlicesd()], [RandomSlicesd(100)], [RandomSlicesd(3)]])
def test_kept_cases_are_not_changed_through_what_was_given(draws: list[Any], tmp_path: Path) -> None:
    data = dataset(draws=draws, cache=exact(tmp_path))
    before = copy.deepcopy(data[5])
    given = data[5]
    for key in ("image", "slice_index", "slice_position", "slice_label"):
        given[key].fill_(77)
    given["case"] = "other"
    given["new"] = 1
    again = data[5]
    assert again.keys() == before.keys()
    assert again["case"] == "c5"
    for key in ("image", "slice_index", "slice_position", "slice_label"):
        assert torch.equal(again[key], before[key])


@pytest.mark.parametrize("cached", [True, False])
def test_given_cases_are_not_changed(cached: bool, tmp_path: Path) -> None:
    mine = cases()
    data = dataset(mine, cache=exact(tmp_path) if cached else None)
    data[3]
    assert mine == cases()


def broken() -> list[dict[str, Any]]:
    data = cases()
    data[1]["broken"] = "refusal"
    data[4]["refusal"] = Refusal("modalities_incomplete", "The folder should hold two files.")
    return data


@forks
def test_refusals_are_collected_one_line_a_case(tmp_path: Path) -> None:
    for workers in (0, 2):
        with pytest.raises(InputError) as caught:
            dataset(broken(), cache=exact(tmp_path), num_workers=workers)
        assert str(caught.value).splitlines() == [
            "case c1: 3 voxels are not a number.",
            "case c4: The folder should hold two files.",
        ]
    late = dataset(broken())
    assert late[0]["case"] == "c0"
    with pytest.raises(InputError, match=r"^case c1: 3 voxels are not a number\.$"):
        late[1]


@pytest.mark.parametrize("cached", [True, False])
def test_refused_cases_are_kept_where_asked(cached: bool, tmp_path: Path) -> None:
    data = dataset(broken(), cache=exact(tmp_path) if cached else None, keep_refused=True)
    for i, code in ((1, "non_finite"), (4, "modalities_incomplete")):
        bag = data[2, i]
        assert bag["refusal"].code == code
        assert {key: bag[key] for key in ("case", "label", "patient")} == {
            "case": f"c{i}", "label": i % 2, "patient": f"p{i}"
        }  # fmt: skip
        assert "image" not in bag
        bag["refusal"] = None
        assert data[2, i]["refusal"].code == code
    whole = dataset()
    for i in (0, 2, 3, 5, 6):
        assert torch.equal(data[2, i]["image"], whole[2, i]["image"])


@pytest.mark.parametrize("cached", [True, False])
def test_a_kept_refusal_holds_no_volume(cached: bool, tmp_path: Path) -> None:
    data = dataset(broken(), cache=exact(tmp_path) if cached else None, keep_refused=True)
    refusal = data[1]["refusal"]
    assert (refusal.__traceback__, refusal.__cause__, refusal.__context__) == (None, None, None)


@forks
def test_a_refusal_comes_out_of_a_worker_whole() -> None:
    data = dataset(broken(), keep_refused=True)
    loader = DataLoader(data, sampler=BagSampler(7), num_workers=2, collate_fn=collate_bags, batch_size=1)
    refusals = {case["case"]: case["refusal"] for batch in loader for case in batch.get("refused", [])}
    assert {case: (r.code, r.sentence) for case, r in refusals.items()} == {
        "c1": ("non_finite", "3 voxels are not a number."),
        "c4": ("modalities_incomplete", "The folder should hold two files."),
    }


def test_a_mistake_of_the_programmer_is_no_refusal() -> None:
    data = cases()
    data[1]["broken"] = "bug"
    with pytest.raises(RuntimeError) as caught:
        every(dataset(data, keep_refused=True))
    assert input_error_behind(caught.value) is None


def test_a_negative_seed_is_refused() -> None:
    with pytest.raises(InputError, match="seed must be 0 or more"):
        dataset(seed=-1)


@pytest.mark.parametrize("cached", [True, False])
def test_watched_cases_share_the_preparation(cached: bool, tmp_path: Path) -> None:
    data = dataset(cache=exact(tmp_path) if cached else None, seed=3)
    part = watched(data, AllSlicesd(), 3)
    assert [bag["case"] for bag in every(part)] == ["c0", "c3", "c6"]
    plain = dataset(draws=[])
    for bag, i in zip(every(part), (0, 3, 6), strict=True):
        assert torch.equal(bag["image"], plain[i]["image"])
    if cached:
        assert len(data.transform.transforms[0]._calls) == 7
    assert len(watched(data, AllSlicesd(), 100)) == 7
    assert len(watched(data, AllSlicesd(), 1)) == 1
    drawn = watched(data, RandomSlicesd(2), 7)
    assert all(len(bag["image"]) == 2 for bag in every(drawn))


def test_each_case_comes_once_an_epoch_in_an_order_of_seed_and_epoch() -> None:
    orders = {}
    for seed in (0, 1, 2):
        sampler = BagSampler(20, seed)
        assert len(sampler) == 20
        for epoch in (1, 2, 3):
            sampler.set_epoch(epoch)
            pairs = list(sampler)
            torch.manual_seed(epoch)
            assert list(sampler) == pairs
            assert {e for e, _ in pairs} == {epoch}
            order = tuple(i for _, i in pairs)
            assert sorted(order) == list(range(20))
            assert all(type(i) is int for i in order)
            orders[seed, epoch] = order
    assert len(set(orders.values())) == 9
    fresh = BagSampler(20, 1)
    fresh.set_epoch(3)
    assert tuple(i for _, i in fresh) == orders[1, 3]


def test_order_without_shuffling_and_of_nothing() -> None:
    sampler = BagSampler(4, shuffle=False)
    sampler.set_epoch(9)
    assert list(sampler) == [(9, 0), (9, 1), (9, 2), (9, 3)]
    with pytest.raises(InputError, match="no cases"):
        BagSampler(0)


def test_the_first_place_is_uniform_over_epochs() -> None:
    sampler, first = BagSampler(5, 7), np.zeros(5)
    for epoch in range(1000):
        sampler.set_epoch(epoch)
        first[next(iter(sampler))[1]] += 1
    assert np.abs(first - 200).max() < 4.5 * np.sqrt(1000 * 0.2 * 0.8)


# --- the preparation of configs/train.yaml, from files ---


def preparation(**settings: Any) -> list[Any]:
    config = ConfigParser.load_config_file(ROOT / "configs" / "train.yaml")
    parser = ConfigParser({**config, "image_size": [32, 32], **settings})
    return list(parser.get_parsed_content("preparation"))


def head(seed: int = 0, shape: tuple[int, ...] = (24, 22, 12)) -> np.ndarray:
    volume = np.random.default_rng(seed).normal(100, 20, shape)
    x, y = np.mgrid[-1 : 1 : shape[0] * 1j, -1 : 1 : shape[1] * 1j]
    volume[x**2 + y**2 > 0.8] = 0
    return volume.astype(np.float32)


def save(path: Path, array: np.ndarray) -> Path:
    nib.save(nib.Nifti1Image(array, np.diag([2.0, 2.0, 4.0, 1.0])), path)
    return path


def with_nan() -> np.ndarray:
    volume = head()
    volume[3, 3, 3] = np.nan
    return volume


BAD_ARRAYS: dict[str, tuple[np.ndarray, str]] = {
    "2D image": (head()[:, :, 0], "not_3d"),
    "one slice": (head()[:, :, :1], "too_few_slices"),
    "two slices": (head()[:, :, :2], "too_few_slices"),
    "NaN": (with_nan(), "non_finite"),
    "constant": (np.full((24, 22, 12), 5.0, dtype=np.float32), "constant_volume"),
    "two channels": (np.stack([head(), head(1)], axis=-1), "channel_count"),
    "five dimensions": (np.zeros((4, 4, 4, 2, 2), dtype=np.float32), "not_3d"),
}


def refusal_of(image: Any, **settings: Any) -> InputError:
    """Of the whole preparation, found behind MONAI's own errors; checks the sentence."""
    with pytest.raises(RuntimeError) as caught:
        Compose(preparation(**settings))({"case": "c", "image": image, "label": 0})
    found = input_error_behind(caught.value)
    assert found is not None
    sentence = str(found)
    assert 20 < len(sentence) < 250
    assert "\n" not in sentence
    for secret in ("CANARY", "/tmp", "private"):
        assert secret not in sentence
    with pytest.raises(InputError) as told:
        BagDataset([{"case": "c", "image": image}], Compose(preparation(**settings)), progress=False)[0]
    assert str(told.value) == f"case c: {sentence}"
    return found


@pytest.mark.parametrize("kind", BAD_ARRAYS)
@pytest.mark.parametrize("name", ["private.nii", "private.nii.gz"])
def test_bad_volumes_end_as_one_sentence(tmp_path: Path, kind: str, name: str) -> None:
    array, code = BAD_ARRAYS[kind]
    (tmp_path / CANARY).mkdir()
    found = refusal_of(save(tmp_path / CANARY / name, array))
    assert isinstance(found, Refusal)
    assert found.code == code


@pytest.mark.parametrize("name", ["private.nii", "private.nii.gz"])
def test_bad_files_end_as_one_sentence(tmp_path: Path, name: str) -> None:
    (tmp_path / CANARY).mkdir()
    path = tmp_path / CANARY / name
    whole = save(path, head()).read_bytes()
    codes = set()
    for content in (b"", b"no image at all", whole[:200], whole[: len(whole) // 2], whole[:-1]):
        path.write_bytes(content)
        found = refusal_of(path)
        assert isinstance(found, Refusal)
        codes.add(found.code)
    assert codes == {"file_damaged", "file_truncated"}
    path.rename(path.with_name("private.png"))
    path.with_name("private.png").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(50))
    found = refusal_of(path.with_name("private.png"))
    assert isinstance(found, Refusal)
    assert found.code == "not_an_image"


def test_wrong_number_of_channels_or_files(tmp_path: Path) -> None:
    one, two = save(tmp_path / "1.nii", head()), save(tmp_path / "2.nii", head(1))
    other = save(tmp_path / "3.nii", head(1, (20, 22, 12)))
    dicom = make_series(tmp_path / CANARY)
    two_channels = {"channels": ["a", "b"]}
    for image, settings, code in (
        ([one, two], {}, "channel_count"),
        (one, two_channels, "channel_count"),
        (dicom, two_channels, "channel_count"),
        ([one, two, one], two_channels, "channel_count"),
        ([one, other], two_channels, "modalities_disagree"),
    ):
        found = refusal_of(image, **settings)
        assert isinstance(found, Refusal)
        assert found.code == code
    bag = Compose(preparation(**two_channels))({"case": "c", "image": [one, two]})
    assert bag["image"].shape == (12, 2, 32, 32)


def test_a_window_that_shows_nothing(tmp_path: Path) -> None:
    window = {"_target_": "monai.transforms.ScaleIntensityRanged", "keys": "image", "a_min": 1000.0, "a_max": 2000.0}
    window |= {"b_min": 0.0, "b_max": 1.0, "clip": True}
    found = refusal_of(save(tmp_path / "private.nii", head()), intensity=window)
    assert isinstance(found, Refusal)
    assert found.code == "all_slices_blank"


def test_fewer_slices_than_the_policy_allows(tmp_path: Path) -> None:
    policy = {"_target_": "bundle.ReaderPolicy", "min_slices": 9}
    dicom = make_series(tmp_path / CANARY, count=8)
    nifti = save(tmp_path / "private.nii", head()[:, :, :8])
    for image in (dicom, nifti):
        found = refusal_of(image, reader_policy=policy)
        assert isinstance(found, Refusal)
        assert found.code == "too_few_slices"
    fewer = {"_target_": "bundle.ReaderPolicy", "min_slices": 1}
    one = save(tmp_path / "one.nii", head()[:, :, :1])
    bag = Compose(preparation(reader_policy=fewer))({"case": "c", "image": one})
    assert bag["image"].shape == (1, 1, 32, 32)


def test_truth_of_too_many_slices_ends_as_one_sentence(tmp_path: Path) -> None:
    case = {"case": "c", "image": save(tmp_path / "private.nii", head()), "slice_label": [0] * 13}
    with pytest.raises(InputError, match="^case c: the slice truth lists 13 slices, the volume has 12") as caught:
        BagDataset([case], Compose(preparation()), progress=False)[0]
    assert "\n" not in str(caught.value)


def test_good_files_become_bags_with_their_truth(tmp_path: Path) -> None:
    truth = [int(k in (4, 5)) for k in range(12)]
    image = save(tmp_path / "a.nii.gz", head())
    series = make_series(tmp_path / "s", count=12)
    data = BagDataset(
        [
            {"case": "n", "image": image, "label": 1, "patient": "p", "slice_label": truth},
            {"case": "d", "image": series, "label": None, "patient": None, "slice_label": None},
        ],
        Compose([*preparation(neighbours=1), RandomSlicesd(7)]),
        progress=False,
    )
    for epoch in (0, 1):
        nifti, dicom = data[epoch, 0], data[epoch, 1]
        assert nifti["image"].shape == dicom["image"].shape == (7, 3, 32, 32)
        assert nifti["slice_label"].tolist() == [truth[k] for k in nifti["slice_index"].tolist()]
        np.testing.assert_allclose(nifti["slice_position"], nifti["slice_index"] * 4.0)
        assert (dicom["slice_label"] == -1).all()
        assert [uid.rsplit(".", 1)[1] for uid in dicom["slice_uid"]] == [
            str(k + 1) for k in dicom["slice_index"].tolist()
        ]
        assert nifti["slice_uid"] is None
        for bag in (nifti, dicom):
            assert bag["image"].min() >= 0
            assert bag["image"].max() <= 1
            assert type(bag["image"]) is torch.Tensor
            assert str(tmp_path) not in repr({key: value for key, value in bag.items() if key != "image"})
