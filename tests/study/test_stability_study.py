"""The command line of a study against the settings of its arms."""

import csv

import pytest
import yaml

from bundle.data.make_datalist import main as make_datalist
from bundle.errors import InputError
from bundle.study import stability_study
from bundle.study.stability_study import main

ARMS = {"plain": {}, "small": {"from": "plain", "bag_size": 4}, "both": {"bag_size": 4, "lr": 0.1}, "alike": {}}


@pytest.fixture
def words(tmp_path):
    with (tmp_path / "volumes.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["patient", "image", "label"], *([n, f"{n}.nii", n % 2] for n in range(12))])
    for n in range(12):
        (tmp_path / f"{n}.nii").touch()
    make_datalist([str(tmp_path / "volumes.csv"), "--out", str(tmp_path / "datalist.json"), "--folds", "3"])
    study = {"stages": {"quick": {"seeds": [0], "settings": {}}}, "arms": ARMS}
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(study))
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "train.yaml").write_text("bag_size: 64")
    given = {"study": "study.yaml", "config_file": "configs/train.yaml", "dataset_dir": ".", "output_dir": "out"}
    return ["--stage", "quick", "--list", *(w for k, v in given.items() for w in (f"--{k}", str(tmp_path / v)))]


def test_what_the_command_line_replaces_is_said(words, capsys):
    main([*words, "--arms", "plain,both", "--bag_size", "8"])
    told = capsys.readouterr()
    assert told.err == "both: --bag_size of the command line stands above what the arm sets\n"
    assert [line.split("\t")[2] for line in told.out.splitlines()[-6:]] == [
        f"{arm}/seed0_fold{fold}" for arm in ("plain", "both") for fold in range(3)
    ]
    main(words)  # with two arms that are alike by themselves
    assert capsys.readouterr().err == ""


def test_settings_lie_over_files_and_arms_over_stages(words, tmp_path, monkeypatch):
    (tmp_path / "stage.yaml").write_text("bag_size: 3\nlr: 0.5\nseed: 7\n")
    (tmp_path / "arm.yaml").write_text("lr: 0.25\nnorm: group\n")
    study = {
        "stages": {"quick": {"seeds": [0], "files": ["stage.yaml"], "settings": {"bag_size": 5, "norm": "batch"}}},
        "arms": {"a": {"files": ["arm.yaml"], "lr": 0.125}, "b": {}},
    }
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(study))
    given = []
    monkeypatch.setattr(stability_study, "carry_out", lambda pieces, _: given.extend(pieces))
    main(words)
    found = {piece.folder.parent.name: [piece.config[key] for key in ("bag_size", "lr", "norm")] for piece in given}
    assert found == {"a": [5, 0.125, "group"], "b": [5, 0.5, "batch"]}


def test_arms_that_the_command_line_makes_the_same_are_refused(words):
    with pytest.raises(InputError, match="arms plain and small are the same with --bag_size of the command line"):
        main([*words, "--arms", "plain,small", "--bag_size", "8"])
    with pytest.raises(InputError, match="arms small and plain are the same with --bag_size of the command line"):
        main([*words, "--arms", "small,plain", "--bag_size", "8"])
