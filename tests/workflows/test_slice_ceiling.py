"""The ceiling by slice labels: on a cohort that slices solve, it is 1, and it follows the labels that it is given."""

import json

import pytest

from bundle.study.piece import Piece
from tests.command import ROOT
from tests.study.slice_ceiling import main

PATTERN = "slices taught, first slice: AUC "


@pytest.fixture
def arm(cohort, tmp_path):
    """An arm with one training on the tiny cohort that counts as finished."""
    files = tuple(str(path) for path in (ROOT / "configs" / "train.yaml", cohort / "tiny.yaml"))
    settings = {"dataset_dir": str(cohort), "datalist": str(cohort / "datalist.json"), "fold": 0, "seed": 0}
    # Half as many are not enough for every seed, and then the rounding of the processor decides.
    piece = Piece(tmp_path / "arm" / "seed0_fold0", files, settings | {"max_epochs": 24})
    piece.folder.mkdir(parents=True)
    piece.save()
    (piece.folder / "piece.json").write_text("{}")
    return piece


def told(arm, capsys):
    """AUC and hit@1 by the first slice."""
    main([str(arm.folder.parent)])
    line = next(line for line in capsys.readouterr().out.splitlines() if PATTERN in line)
    assert line.startswith("arm, ")
    return float(line.split(PATTERN)[1].split()[0]), float(line.split()[-1])


def test_slices_that_show_it_solve_the_cohort(arm, capsys):
    assert told(arm, capsys) == (1.0, 1.0)


def test_it_learns_from_the_labels_of_slices_alone(arm, cohort, tmp_path, capsys):
    content = json.loads((cohort / "datalist.json").read_text())
    for case in content["cases"]:
        if case["label"] and case["case"] not in content["folds"][0]["test"]:
            case["slice_label"] = [1 - truth for truth in case["slice_label"]]
    content.pop("hash")
    (tmp_path / "datalist.json").write_text(json.dumps(content))
    other = arm._replace(settings={**arm.settings, "datalist": str(tmp_path / "datalist.json")})
    other.save()
    assert told(other, capsys)[1] == 0  # the slices of the lesion come last


def test_an_arm_from_trained_weights_gets_a_sentence(arm):
    arm._replace(settings={**arm.settings, "encoder_weights": "encoder.pt"}).save()
    with pytest.raises(SystemExit, match="starts from trained weights"):
        main([str(arm.folder.parent)])


def test_a_folder_without_trainings_gets_a_sentence(tmp_path):
    with pytest.raises(SystemExit, match="holds no finished training"):
        main([str(tmp_path)])
