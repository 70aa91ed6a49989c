import fcntl
import json

import pytest
import yaml

from bundle.errors import InputError
from bundle.study import piece as module
from bundle.study.arms import Pretraining
from bundle.study.locked import judge_locked
from bundle.study.piece import BUSY, Piece, main, piece_result

from .made_pieces import ROOT, TRAIN, datalist, finish, record, result_of

VALIDATION = [record(f"v{i}", i % 2, [0.4, 0.6]) for i in range(4)]
TEST = [record(f"t{i}", i % 2, [0.1 * i, 1 - 0.1 * i]) for i in range(4)]
OVERLAY = {"lr": 0.001, "encoder": {"_target_": "bundle.ConvEncoder", "widths": [4, 8]}}


@pytest.fixture
def done(tmp_path):
    """A finished piece with an overlay of its own."""
    path = datalist(tmp_path)
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(OVERLAY))
    settings = {"dataset_dir": str(tmp_path), "datalist": str(path), "fold": 1, "seed": 2}
    piece = Piece(tmp_path / "run", (TRAIN, str(tmp_path / "own.yaml")), settings)
    finish(piece, TEST, VALIDATION)
    return piece


def with_overlay(piece, text):
    path = piece.folder.parent / "other.yaml"
    path.write_text(text if isinstance(text, str) else yaml.safe_dump(text))
    return piece._replace(config_files=(TRAIN, str(path)))


def with_settings(piece, **more):
    return piece._replace(settings={**piece.settings, **more})


def test_a_piece_comes_back_as_it_was_saved(done):
    assert Piece.load(done.folder) == done
    found = piece_result(done)
    assert found == result_of(done)
    assert (found["fold"], found["seed"], found["max_epochs"]) == (1, 2, 3)
    assert found["probability_sd"] == pytest.approx(0.1118, abs=1e-4)  # of 0, 0.1, 0.2, 0.3


def test_what_is_not_done_has_no_result(done, tmp_path):
    assert piece_result(done._replace(folder=tmp_path / "none")) is None
    (done.folder / "piece.json").write_text('{"format": 1, "torn')
    assert piece_result(done) is None


def test_comments_places_and_ways_of_running_make_no_difference(done, tmp_path):
    text = yaml.safe_dump(OVERLAY).replace("lr: 0.001", "lr: 1.0e-3 # a comment")
    assert piece_result(with_overlay(done, f"# another\n{text}"))
    (tmp_path / "moved").mkdir()
    moved = datalist(tmp_path / "moved")
    elsewhere = {
        "datalist": str(moved),
        "dataset_dir": "elsewhere",
        "cache_dir": "c",
        "num_workers": 3,
        "device": "cpu",
    }
    assert piece_result(with_settings(done, **elsewhere, progress=True, activation_checkpointing=True))


def test_a_setting_that_another_version_brought_or_dropped_makes_none(done):
    content = result_of(done)
    content["made_from"]["setting_of_old"] = "3"
    del content["made_from"]["weight_decay"]
    (done.folder / "piece.json").write_text(json.dumps(content))
    assert piece_result(done)


@pytest.mark.parametrize(
    ("more", "told"),
    [
        ({"lr": 0.002}, "lr 0.001 → 0.002"),
        ({"fold": 0}, "fold 1 → 0"),
        ({"image_size": [64, 32]}, r"image_size \[128, 128\] → \[64, 32\]"),
        ({"encoder::widths": [8, 8]}, "encoder .*4, 8.* → .*8, 8"),
        ({"preparation::4::margin": 64}, "preparation that of train.yaml → .*64"),
        ({"train#dataloader#num_workers": 2}, "train that of train.yaml → "),
    ],
)
def test_another_setting_is_refused_in_a_sentence(done, more, told):
    with pytest.raises(InputError, match=rf"was made otherwise \({told}.*choose another output_dir, or delete it"):
        piece_result(with_settings(done, **more))


def test_an_overlay_less_is_refused_too(done):
    with pytest.raises(InputError, match="encoder .*4, 8.* → that of train.yaml"):
        piece_result(done._replace(config_files=(TRAIN,), settings={**done.settings, "lr": 0.001}))
    with pytest.raises(InputError, match="lr 0.001 → 0.5"):
        piece_result(with_overlay(done, {**OVERLAY, "lr": 0.5}))


def test_other_cases_and_other_starting_weights_are_refused(done, tmp_path):
    other = datalist(tmp_path / "more", patients=15)
    with pytest.raises(InputError, match="was made otherwise .datalist"):
        piece_result(with_settings(done, datalist=str(other)))
    weights = tmp_path / "start.pt"
    weights.write_bytes(b"one")
    started = with_settings(done, encoder_weights=str(weights))._replace(folder=tmp_path / "started")
    finish(started, TEST, VALIDATION)
    assert piece_result(started)
    weights.write_bytes(b"two")
    with pytest.raises(InputError, match="was made otherwise .encoder_weights_content"):
        piece_result(started)


PRETRAIN = str(ROOT / "configs" / "pretrain.yaml")


def test_a_pre_training_is_part_of_what_a_piece_is(done, tmp_path):
    pretrained = done._replace(pretrain=Pretraining((PRETRAIN,), {"max_epochs": 3}))
    with pytest.raises(InputError, match="was made otherwise .pretrain that of train.yaml → .*pretrain.yaml"):
        piece_result(pretrained)
    pretrained = pretrained._replace(folder=tmp_path / "pretrained_piece")
    pretrained.folder.mkdir()
    pretrained.save()
    assert Piece.load(pretrained.folder) == pretrained
    finish(pretrained, TEST, VALIDATION)
    assert piece_result(pretrained)
    with pytest.raises(InputError, match="was made otherwise .pretrain"):
        piece_result(pretrained._replace(pretrain=None))
    overlay = tmp_path / "views.yaml"
    overlay.write_text("view_steps: []\n")
    for other in (
        Pretraining((PRETRAIN,), {"max_epochs": 4}),
        Pretraining((PRETRAIN,), {}),  # the epochs of the training, which pretrain.yaml does not say
        Pretraining((PRETRAIN,), {"max_epochs": 3, "batch_size": 3}),  # which it does not say either
        Pretraining((PRETRAIN,), {"max_epochs": 3, "vicreg_variance": 1.0}),
        Pretraining((PRETRAIN, str(overlay)), {"max_epochs": 3}),
    ):
        with pytest.raises(InputError, match="was made otherwise .*pretrain"):
            piece_result(pretrained._replace(pretrain=other))
    # A setting that another version's pretrain.yaml brought makes no difference.
    content = result_of(pretrained)
    del content["made_from"]["pretrain::projected_features"]
    (pretrained.folder / "piece.json").write_text(json.dumps(content))
    assert piece_result(pretrained)


def test_the_training_starts_from_what_was_pre_trained(done, monkeypatch, tmp_path):
    calls = []
    monkeypatch.setattr(module, "run", lambda **given: calls.append(given))
    module.train(done._replace(pretrain=Pretraining((PRETRAIN,), {"max_epochs": 3})))
    pre, main_run = calls
    assert pre["config_file"] == [*done.config_files, PRETRAIN]
    assert (pre["max_epochs"], pre["fold"], pre["seed"]) == (3, 1, 2)
    assert pre["output_dir"] == str(done.folder / "pretrained")
    assert main_run["config_file"] == list(done.config_files)
    assert main_run["encoder_weights"] == str(done.folder / "pretrained" / "encoder.pt")
    assert main_run["output_dir"] == str(done.folder)
    assert "max_epochs" not in main_run


def test_nothing_of_a_pre_training_is_left_to_the_config(done, monkeypatch):
    calls = []
    monkeypatch.setattr(module, "run", lambda **given: calls.append(given))
    start = with_settings(done, encoder_weights="weights.pt")
    module.train(start._replace(pretrain=Pretraining((PRETRAIN,), {"encoder_weights": None})))
    assert calls[0]["encoder_weights"] == "null"  # MONAI would leave out None, and start from weights.pt


def test_an_overlay_that_changes_during_the_pre_training_is_refused(done, monkeypatch, tmp_path):
    overlay = tmp_path / "changing.yaml"
    overlay.write_text("lr: 0.5\n")
    calls = []

    def pre_trains_and_someone_edits(**given):
        calls.append(given)
        overlay.write_text("lr: 0.25 # another\n")

    monkeypatch.setattr(module, "run", pre_trains_and_someone_edits)
    piece = done._replace(
        config_files=(*done.config_files, str(overlay)), pretrain=Pretraining((PRETRAIN,), {"max_epochs": 3})
    )
    with pytest.raises(InputError, match="changed while its encoder was pre-trained"):
        module.train(piece)
    assert len(calls) == 1


def test_locked_cases_want_the_weights(done):
    with pytest.raises(InputError, match="run has no weights .model.pt. any more: delete the folder and train"):
        judge_locked([done], progress=False)


def test_another_format_is_refused(done):
    (done.folder / "piece.json").write_text(json.dumps({**result_of(done), "format": 0}))
    with pytest.raises(InputError, match="was made by another version"):
        piece_result(done)


def test_a_piece_that_another_process_is_at_is_left_alone(done, monkeypatch):
    monkeypatch.setattr(module, "do_piece", lambda _: pytest.fail("it was begun"))
    (done.folder / "piece.json").unlink()
    with (done.folder / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert main([str(done.folder)]) == BUSY


def test_what_only_going_on_needs_is_deleted_once_it_is_done(done, monkeypatch):
    names = ("checkpoint.pt", "checkpoint.previous.pt", ".part-1.pt", "test/.part-2.json", "pretrained/checkpoint.pt")
    (done.folder / "pretrained").mkdir()
    for name in names:
        (done.folder / name).touch()
    monkeypatch.setattr(module, "do_piece", lambda _: pytest.fail("it was done again"))
    before = {path for path in done.folder.rglob("*") if path.is_file()}
    assert main([str(done.folder)]) == 0
    assert before - set(done.folder.rglob("*")) == {done.folder / name for name in names}


def test_a_piece_notes_what_it_was_trained_with(done, monkeypatch):
    """Not what an overlay says when the training ends."""
    (done.folder / "piece.json").unlink()
    before = done.made_from()

    def trained(piece):
        (piece.folder.parent / "own.yaml").write_text(yaml.safe_dump({**OVERLAY, "lr": 0.7}))

    monkeypatch.setattr(module, "train", trained)
    monkeypatch.setattr(module, "evaluate", lambda piece, section: None)
    module.do_piece(done)
    assert result_of(done)["made_from"] == before
    with pytest.raises(InputError, match="was made otherwise"):
        piece_result(done)


def test_records_hold_what_the_network_says_even_of_weights_calibrated_since(done, monkeypatch):
    asked = []
    monkeypatch.setattr(module, "run", lambda **settings: asked.append(settings))
    (done.folder / "model.pt").write_text("calibrated")
    module.evaluate(done, "locked")
    assert asked[0]["results::temperature"] == 1
    assert (asked[0]["results::threshold"], asked[0]["results::abstain_below"]) == (0.5, 0)
