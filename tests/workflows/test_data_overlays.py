"""Every overlay of a data set fits train.yaml, and data of the layout it is for goes all the way through."""

import csv
import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
import yaml
from monai.bundle import ConfigParser
from monai.transforms import Compose

from bundle.data.make_datalist import main as make_datalist
from bundle.data.medmnist import main as import_medmnist

from .conftest import ROOT, TINY

OVERLAYS = sorted((ROOT / "configs").glob("data_*.yaml"))
MODALITIES = ("t1", "t1ce", "t2", "flair")
BRATS_AFFINE = np.array([[-1.0, 0, 0, 0], [0, -1.0, 0, 239.0], [0, 0, 1.0, 0], [0, 0, 0, 1.0]])
ONE_EPOCH = {**TINY, "max_epochs": 1, "warmup_epochs": 0}


def brain(seed: int, grade: int, shape: tuple[int, int, int] = (40, 44, 12)) -> dict[str, np.ndarray]:
    """Four skull-stripped modalities; a high grade has a rim that is bright after contrast."""
    rng = np.random.default_rng(seed)
    x, y, z = np.meshgrid(*(np.linspace(-1, 1, n) for n in shape), indexing="ij")
    inside = x**2 + y**2 + z**2 < 0.8
    tumour = (x - 0.2) ** 2 + y**2 + z**2 < 0.1
    volumes = {}
    for number, name in enumerate(MODALITIES):
        volume = 200 + 100 * number + 20 * rng.standard_normal(shape)
        volume[tumour] += {"t1ce": 300 * grade, "flair": 200}.get(name, 0)
        volumes[name] = np.where(inside, volume, 0).astype(np.int16)
    return volumes


def write_patient(folder: Path, patient: str, volumes: dict[str, np.ndarray]) -> None:
    (folder / patient).mkdir(parents=True)
    for name, volume in volumes.items():
        nib.save(nib.Nifti1Image(volume, BRATS_AFFINE), folder / patient / f"{patient}_{name}.nii.gz")


def shapes(count: int, size: int = 20) -> np.ndarray:
    """Binary balls of different radius, as MedMNIST3D's shapes are stored."""
    grid = np.stack(np.meshgrid(*[np.linspace(-1, 1, size)] * 3, indexing="ij"))
    radii = np.linspace(0.3, 0.8, count)
    return np.stack([((grid**2).sum(0) < radius**2).astype(np.uint8) * 255 for radius in radii])


def image_for(config: dict[str, object], folder: Path) -> str | list[str]:
    """An image as the overlay's data set stores one."""
    count = len(config["channels"])
    volumes = list(brain(0, 1).values())
    if config["channel_files"]:
        write_patient(folder, "p", brain(0, 1))
        return [str(folder / "p" / f"p_{name}.nii.gz") for name in MODALITIES]
    volume = volumes[1] if count == 1 else np.stack(volumes[:count], axis=-1)
    if config["channels"] == ["shape"]:
        volume = shapes(2, 64)[0]
    nib.save(nib.Nifti1Image(volume, np.diag([-1.0, -1.0, 5.0, 1.0])), folder / "image.nii.gz")
    return str(folder / "image.nii.gz")


@pytest.mark.parametrize("overlay", OVERLAYS, ids=[path.stem for path in OVERLAYS])
def test_an_overlay_sets_known_keys_and_its_preparation_makes_bags(overlay, tmp_path):
    train = yaml.safe_load((ROOT / "configs" / "train.yaml").read_text())
    given = yaml.safe_load(overlay.read_text())
    assert {key.split("::")[0] for key in given} <= train.keys()
    parser = ConfigParser()
    parser.read_config([str(ROOT / "configs" / "train.yaml"), str(overlay)])
    assert len(parser["class_names"]) == 2
    prepared = Compose(parser.get_parsed_content("preparation"))
    bag = prepared({"case": "c", "image": image_for(parser.config, tmp_path), "slice_label": None})
    assert bag["image"].shape[1:] == (len(parser["channels"]), *parser["image_size"])
    assert len(bag["image"]) == len(bag["slice_index"]) > 1
    assert float(bag["image"].min()) == 0
    assert 0.5 < float(bag["image"].max()) <= 1


def test_the_medmnist_overlay_keeps_the_frame(tmp_path):
    """Its index into `preparation` must still be that of the crop, or size would be lost without a word."""
    parser = ConfigParser()
    parser.read_config([str(ROOT / "configs" / name) for name in ("train.yaml", "data_medmnist3d.yaml")])
    prepared = Compose(parser.get_parsed_content("preparation"))
    areas = []
    for number, volume in enumerate(shapes(2, 64)):
        nib.save(nib.Nifti1Image(volume, np.eye(4)), tmp_path / f"{number}.nii.gz")
        bag = prepared({"case": str(number), "image": str(tmp_path / f"{number}.nii.gz"), "slice_label": None})
        areas.append([float(slice_.sum()) for slice_ in bag["image"]])
        assert sum(areas[-1]) == (volume > 0).sum()  # not a voxel resized or dropped
    assert max(areas[0]) < max(areas[1])


def test_four_modalities_of_brats_layout_train_and_classify(tmp_path, monai, capsys):
    data = tmp_path / "brats"
    rows = [["patient", "grade", *MODALITIES]]
    for number in range(12):
        patient, grade = f"BraTS20_Training_{number:03d}", number % 2
        write_patient(data, patient, brain(number, grade))
        files = [f"{patient}/{patient}_{name}.nii.gz" for name in MODALITIES]
        rows.append([patient, ("LGG", "HGG")[grade], *files])
    with (data / "volumes.csv").open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    columns = ["--image", ",".join(MODALITIES), "--label", "grade", "--classes", "LGG,HGG", "--folds", "3"]
    assert make_datalist([str(data / "volumes.csv"), "--out", str(data / "datalist.json"), *columns]) == 0
    first = json.loads((data / "datalist.json").read_text())["cases"][0]
    expected = [f"{first['patient']}_{name}.nii.gz" for name in MODALITIES]
    assert [Path(image).name for image in first["image"]] == expected

    tiny = tmp_path / "tiny.yaml"
    tiny.write_text(yaml.safe_dump({**ONE_EPOCH, "cache_dir": str(tmp_path / "cache")}))
    run = tmp_path / "run"
    files = ["configs/train.yaml", "configs/data_brats_grade.yaml", str(tiny)]
    monai("run", "--config_file", str(files), "--dataset_dir", str(data), "--output_dir", str(run))
    weights = torch.load(run / "model.pt", weights_only=True)["model"]
    assert weights["encoder.conv1.weight"].shape[1] == 4

    unseen = tmp_path / "unseen"
    for number, patient in enumerate(("whole", "another")):
        write_patient(unseen, patient, brain(50 + number, number))
    segmentation = nib.Nifti1Image((brain(50, 0)["t1"] > 0).astype(np.uint8), BRATS_AFFINE)
    nib.save(segmentation, unseen / "whole" / "whole_seg.nii.gz")
    write_patient(unseen, "incomplete", {name: v for name, v in brain(60, 1).items() if name != "t2"})
    out = tmp_path / "out"
    arguments = ["--dataset_dir", str(unseen), "--weights", str(run / "model.pt"), "--output_dir", str(out)]
    arguments += ["--device", "cpu", "--progress", "false", "--case_names", "path"]
    monai("run", "--config_file", "configs/inference.yaml", *arguments, status=3)
    with (out / "predictions.csv").open() as file:
        found = {row["case"]: row for row in csv.DictReader(file)}
    assert {name: row["status"] for name, row in found.items()} == {
        "whole": "accepted", "another": "accepted", "incomplete": "refused"
    }  # fmt: skip
    assert found["incomplete"]["reason_code"] == "modalities_incomplete"
    assert float(found["whole"]["probability_LGG"]) + float(found["whole"]["probability_HGG"]) == pytest.approx(1)


def test_a_medmnist_file_trains_on_its_official_splits(tmp_path, monai, capsys):
    volumes = shapes(16)
    arrays = {}
    for split, part in {"train": slice(0, 16, 2), "val": slice(1, 16, 4), "test": slice(3, 16, 4)}.items():
        arrays[f"{split}_images"] = volumes[part]
        arrays[f"{split}_labels"] = (np.arange(len(volumes[part])) % 2)[:, None]
    np.savez(tmp_path / "shapes.npz", **arrays)
    data = tmp_path / "data"
    assert import_medmnist([str(tmp_path / "shapes.npz"), str(data)]) == 0
    assert make_datalist([str(data / "volumes.csv"), "--split", "split", "--out", str(data / "datalist.json")]) == 0
    folds = json.loads((data / "datalist.json").read_text())["folds"]
    assert [{section: len(cases) for section, cases in fold.items()} for fold in folds] == [
        {"training": 8, "validation": 4, "test": 4}
    ]
    tiny = tmp_path / "tiny.yaml"
    tiny.write_text(yaml.safe_dump({**ONE_EPOCH, "cache_dir": str(tmp_path / "cache")}))
    run = tmp_path / "run"
    files = ["configs/train.yaml", "configs/data_medmnist3d.yaml", str(tiny)]
    monai("run", "--config_file", str(files), "--dataset_dir", str(data), "--output_dir", str(run))
    recipe = json.loads(torch.load(run / "model.pt", weights_only=True)["recipe"])
    assert recipe["class_names"] == ["normal", "mass"]
    assert recipe["preparation"][4]["margin"] == 64
