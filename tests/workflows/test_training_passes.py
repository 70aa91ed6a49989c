"""Training passes taken apart: each cause alone moves the figures, and what a config does not use moves nothing."""

import shutil

import numpy as np
import pytest
import torch

from bundle.recipe import Recipe
from bundle.study.piece import Piece
from bundle.weights import load_network
from tests.command import ROOT
from tests.study.training_passes import DRAWS, PASSES, judged, main, set_modes


@pytest.fixture
def piece(cohort, trained, tmp_path):
    """The training of the tiny cohort, as a finished piece of an arm."""
    files = tuple(str(path) for path in (ROOT / "configs" / "train.yaml", cohort / "tiny.yaml"))
    settings = {"dataset_dir": str(cohort), "datalist": str(cohort / "datalist.json"), "fold": 0, "seed": 0}
    piece = Piece(tmp_path / "arm" / "seed0_fold0", files, settings)
    piece.folder.mkdir(parents=True)
    piece.save()
    (piece.folder / "piece.json").write_text("{}")
    shutil.copy(trained / "model.pt", piece.folder)
    return piece


def test_evaluation_is_each_case_by_itself_with_all_its_slices(piece):
    config, weights = piece.config, piece.folder / "model.pt"
    config.update({"sampling_strategy": "all", "augment": False})
    network = load_network(Recipe.load(weights).build("network_def"), weights).eval()
    nll, right = [], []
    with torch.no_grad():
        for bag in config.get_parsed_content("train::dataset"):
            said = network(bag["image"][None]).double().log_softmax(dim=-1)[0].numpy()
            nll.append(-said[bag["label"]])
            right.append(said.argmax() == bag["label"])
    assert judged(piece.folder, PASSES["evaluation"]) == pytest.approx((np.mean(right), np.mean(nll)), rel=1e-5)


def test_each_cause_alone_moves_the_nll(piece):
    nll = {name: judged(piece.folder, how)[1] for name, how in PASSES.items()}
    assert len(set(nll.values())) == len(PASSES)


def test_what_a_training_does_not_do_moves_nothing(piece):
    piece._replace(settings={**piece.settings, "sampling_strategy": "all", "augment": False}).save()
    evaluation = judged(piece.folder, PASSES["evaluation"])
    assert judged(piece.folder, PASSES["slices drawn"]) == evaluation
    assert judged(piece.folder, PASSES["augmented"]) == evaluation


def test_statistics_of_the_weights_stay_as_they_are(piece):
    weights = piece.folder / "model.pt"
    network = load_network(Recipe.load(weights).build("network_def"), weights)
    before = {name: value.clone() for name, value in network.state_dict().items() if "running" in name}
    set_modes(network, PASSES["all four"])
    network(torch.rand(2, 5, 1, 32, 32))
    assert before
    assert all(torch.equal(network.state_dict()[name], value) for name, value in before.items())


def test_a_row_a_way_is_printed(piece, capsys):
    main([str(piece.folder.parent)])
    rows = [line[:52].split(maxsplit=1) for line in capsys.readouterr().out.splitlines()[1:]]
    assert [(arm, name.strip()) for arm, name in rows] == [("arm", name) for name in PASSES]
    assert DRAWS > 1


@pytest.mark.parametrize(("settings", "said"), [(None, "holds no finished training"), ({"frozen_stages": 1}, "frozen")])
def test_what_it_cannot_judge_gets_a_sentence(piece, settings, said):
    if settings is None:
        (piece.folder / "piece.json").unlink()
    else:
        piece._replace(settings={**piece.settings, **settings}).save()
    with pytest.raises(SystemExit, match=said):
        main([str(piece.folder.parent)])
