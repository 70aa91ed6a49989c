"""The fast paths switched off for comparison: the same results by plain means, and measured beside the fast ones."""

from __future__ import annotations

import ast
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from monai.transforms import Compose

from bundle.data.dataset import BagDataset
from bundle.data.reader import LoadImageStrictd
from bundle.data.sampling import AllSlicesd, RandomSlicesd
from bundle.data.transforms import ResizeAndPadd, VolumeToBagd
from bundle.data.volume_transforms import (
    CropToForegroundd,
    OrientForSlicingd,
    ScaleForegroundPercentilesd,
    ScaleWindowd,
)
from tests.performance import before_part, benchmark
from tests.performance.before_part import SWITCHED_OFF
from tests.performance.inference_part import inference_of
from tests.performance.made_scans import write_nifti, write_series
from tests.performance.measuring import ROOT, Store
from tests.performance.plain import INFERENCE, TRAINING, PlainDualStream, WholeBags, plain_of
from tests.performance.profiling import STAGES
from tests.performance.project import Training
from tests.performance.report import table_of_before
from tests.performance.settings import Run
from tests.performance.test_benchmark import TINY, records_of, silent
from tests.performance.training_part import OURS

VOLUMES = {
    "noise": lambda rng, shape: rng.normal(100, 30, shape),
    "body in air": lambda rng, shape: np.where(rng.random(shape) < 0.3, rng.normal(300, 50, shape), 0),
    "shape": lambda rng, shape: np.pad(np.ones((shape[0], 4, 5, 3)), ((0, 0), (3, 2), (1, 3), (2, 1))),
    "one hot voxel": lambda rng, shape: np.eye(1, int(np.prod(shape)), 200).reshape(shape),
    "a constant channel": lambda rng, shape: rng.normal(0, 1, shape) * np.array([0, 1]).reshape(2, 1, 1, 1) + 7,
}


@pytest.mark.parametrize("make", VOLUMES.values(), ids=VOLUMES)
@pytest.mark.parametrize(
    "step",
    [
        CropToForegroundd("image", 2),
        CropToForegroundd("image", 0),
        ScaleForegroundPercentilesd("image", 1.0, 99.0),
        ScaleForegroundPercentilesd("image", 0.0, 100.0),
    ],
    ids=["crop", "crop without margin", "percentiles", "range"],
)
def test_a_plain_step_gives_the_same_bits(step: Any, make: Callable[[Any, Any], np.ndarray]) -> None:
    volume = make(np.random.default_rng(0), (2, 9, 9, 6)).astype(np.float32)
    given = {"image": MetaTensor(torch.from_numpy(volume), affine=torch.diag(torch.tensor([2.0, 3.0, 4.0, 1.0])))}
    plain = plain_of(step)
    assert type(plain) is not type(step)
    found, expected = plain(dict(given))["image"], step(dict(given))["image"]
    assert torch.equal(found.as_tensor(), expected.as_tensor())
    assert torch.equal(found.affine, expected.affine)
    assert set(plain(dict(given))) == {"image"}


def test_a_plain_window_gives_the_same_up_to_rounding() -> None:
    step, volume = ScaleWindowd("image", -20.0, 80.0), torch.randn(1, 8, 8, 5) * 100
    found, expected = plain_of(step)({"image": volume})["image"], step({"image": volume})["image"]
    torch.testing.assert_close(torch.as_tensor(found), expected, atol=1e-6, rtol=0)


def test_a_step_without_a_fast_path_stays() -> None:
    for step in (CropToForegroundd("image", None), OrientForSlicingd("image", "axial")):
        assert plain_of(step) is step


def steps(draw: Any) -> Compose:
    return Compose([
        LoadImageStrictd("image", channels=1), OrientForSlicingd("image", "axial"), CropToForegroundd("image", 1),
        ScaleForegroundPercentilesd("image"), VolumeToBagd("image", "axial"), ResizeAndPadd("image", (24, 16)), draw,
    ])  # fmt: skip


@pytest.mark.parametrize("in_memory", [False, True])
@pytest.mark.parametrize("draw", [RandomSlicesd(4), AllSlicesd()], ids=["drawn", "all"])
def test_whole_bags_are_those_of_a_bag_dataset(tmp_path: Path, draw: Any, in_memory: bool) -> None:
    cases = []
    for number in range(2):
        write_nifti(tmp_path / f"{number}.nii.gz", 30, 9, number)
        cases.append({"case": f"c{number}", "image": str(tmp_path / f"{number}.nii.gz"), "label": number})
    plain = WholeBags(cases, steps(draw), seed=3, in_memory=in_memory, keep_refused=True, cache=None)
    fast = BagDataset(cases, steps(draw), seed=3)
    assert len(plain) == 2
    for key in (0, (0, 1), (5, 1), (6, 1)):
        found, expected = plain[key], fast[key]
        assert found.keys() == expected.keys()
        assert torch.equal(found["image"], expected["image"])
        assert torch.equal(found["slice_index"], expected["slice_index"])


def test_kept_cases_are_prepared_once(tmp_path: Path) -> None:
    write_nifti(tmp_path / "scan.nii.gz", 30, 9, 0)
    kept = WholeBags([{"case": "c", "image": str(tmp_path / "scan.nii.gz")}], steps(AllSlicesd()), in_memory=True)
    (tmp_path / "scan.nii.gz").unlink()
    assert torch.equal(kept[1, 0]["image"], kept[2, 0]["image"])


def test_the_plain_inference_encodes_a_whole_volume_in_float32_and_gives_the_same(tmp_path: Path) -> None:
    run = Run(TINY, 1, tmp_path, Store(tmp_path, {}), silent)
    shape = np.zeros((30, 34, 12), dtype=np.int16)
    shape[5:20, 8:30, 2:10] = 1
    nib.save(nib.Nifti1Image(shape, np.diag([1.0, 1.0, 3.0, 1.0])), tmp_path / "shape.nii.gz")
    scans = [write_series(tmp_path / "series", 40, 20, 0), tmp_path / "shape.nii.gz"]
    seen: dict[str, list[torch.Tensor]] = {"plain": [], "fast": []}
    inferences = {
        "plain": inference_of(run, 32, "batch", scans, **INFERENCE),
        "fast": inference_of(run, 32, "batch", scans, amp=False),
    }
    bags = {who: inference.bags() for who, inference in inferences.items()}
    found = {}
    for who, inference in inferences.items():
        encoder = inference.network_that_runs.encoder
        encoder.register_forward_pre_hook(lambda _, given, who=who: seen[who].append(given[0]))
        found[who] = torch.stack(inference.run())
    assert all(torch.equal(one, other) for one, other in zip(bags["plain"], bags["fast"], strict=True))
    torch.testing.assert_close(found["plain"], found["fast"], atol=1e-5, rtol=0)
    network = inferences["plain"].network_that_runs
    assert type(network) is PlainDualStream
    assert any(isinstance(module, torch.nn.BatchNorm2d) for module in network.encoder.modules())
    assert [len(slices) for slices in seen["plain"]] == [len(bag) for bag in bags["plain"]]
    assert len(seen["fast"]) > len(seen["plain"])  # in chunks
    assert all(slices.is_contiguous() and slices.dtype is torch.float32 for slices in seen["plain"])
    assert all(parameter.is_contiguous() for parameter in network.encoder.parameters())


def test_the_plain_training_takes_the_same_steps(tmp_path: Path) -> None:
    """Up to rounding, in float32: the same weights at the start, bags, augmentation and optimiser."""
    images = [f"{number}.nii.gz" for number in range(2)]
    for number, image in enumerate(images):
        write_nifti(tmp_path / image, 40, 10, number)
    datalist = before_part.write_datalist(tmp_path, images)
    trainings, after = [], []
    for number, changes in enumerate((TRAINING, {"amp": False})):
        torch.manual_seed(0)
        changes = {**TINY.changes(32, "group"), "dropout": 0.0, **changes}
        training = Training(datalist, tmp_path / f"slices-{number}", "cpu", cache_type="float32", **changes)
        for _ in range(2):
            training.epoch()
        after.append(training.network.state_dict())
        trainings.append(training)
    assert type(trainings[0].network) is PlainDualStream
    assert type(trainings[0].parser.get_parsed_content("train::dataset")) is WholeBags
    assert trainings[0].trainer.amp_dtype is None
    assert all(parameter.is_contiguous() for parameter in trainings[0].network.parameters())
    plain, fast = after
    assert plain.keys() == fast.keys()
    for name in plain:
        torch.testing.assert_close(plain[name], fast[name], atol=1e-5, rtol=1e-4)


def test_the_time_and_its_shares_are_measured_before_and_after_and_kept(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["--parts", "before", "--sizes", "32", "--repeats", "3", "--norms", "batch", "--output", str(tmp_path)]

    def measured() -> list[dict[str, Any]]:
        assert benchmark.main(words, TINY) == 0
        return json.loads((tmp_path / "benchmark.json").read_text())["before"]

    found = measured()
    assert [cell["scans"] for cell in found] == [None, "DICOM 40", "DICOM 48", "NIfTI"]
    for cell in found:
        assert len(cell["records"]) == before_part.REPEATS
        for who in (SWITCHED_OFF, OURS):
            assert cell["records"][0][who]["seconds"] > 0
            known = (
                {"encoding", "backward"} if cell["part"] == "train" else {"reading the scan", "preparing", "encoding"}
            )
            assert known < cell["shares"][who].keys()
    assert "reading the cache" in found[0]["shares"][OURS]
    assert "reading the cache" not in found[0]["shares"][SWITCHED_OFF]
    assert capsys.readouterr().out.count("before and after") == 4

    def unexpected(*_: Any, **__: Any) -> None:
        raise AssertionError("this was measured already")

    for name in ("Training", "inference_of"):
        monkeypatch.setattr(before_part, name, unexpected)
    assert measured() == found


def test_every_stage_of_a_profile_names_functions_that_there_are() -> None:
    """A function that was renamed or moved would be counted under the rest, without a word."""
    places = [place for stage in STAGES.values() for place in stage if place[0].startswith(("bundle/", "tests/"))]
    assert len(places) > 10
    for file, name in places:
        nodes = ast.walk(ast.parse((ROOT / file).read_text(encoding="utf-8")))
        assert name in {node.name for node in nodes if isinstance(node, ast.FunctionDef)}, (file, name)


def test_the_table_of_before_and_after_shows_ratio_and_shares() -> None:
    records = records_of(**{SWITCHED_OFF: [3.0, 3.0], OURS: [1.0, 2.0]})
    shares = {SWITCHED_OFF: {"encoding": 3.0, "the rest": 1.0}, OURS: {"reading the cache": 1.0, "the rest": 1.0}}
    cell = {"part": "train", "size": 64, "norm": "group", "scans": None, "records": records, "shares": shares}
    lines = [line.split("  ") for line in table_of_before(cell).splitlines()[2:]]
    told = {line[0] or line[1]: [part.strip() for part in line[2:] if part.strip()] for line in lines}
    assert told["ms a bag, 2 repeats"] == ["3000.0", "1500.0"]
    assert told["× this project"] == ["2.25 [1.88–2.62]", "1.00 [1.00–1.00]"]
    assert told["encoding"] == ["75.0%"]
    assert told["reading the cache"] == ["50.0%"]
    assert list(told)[-1] == "the rest"
    assert told["the rest"] == ["25.0%", "50.0%"]
