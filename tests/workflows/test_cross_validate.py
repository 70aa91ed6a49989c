"""Cross-validation and stability study through the real command line: stopped, shared out, repeated, refused."""

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml

from bundle.study.piece import Piece
from bundle.study.pieces import probe_seconds
from tests.command import run_module

from .conftest import ROOT, environment

SMALL = {
    "image_size": [32, 32],
    "bag_size": 6,
    "max_epochs": 2,
    "warmup_epochs": 1,
    "lr": 1.0e-2,
    "classifier_lr": 1.0e-2,
    "stability_cases": 4,
    "num_features": 16,
    "encoder": {"_target_": "bundle.ConvEncoder", "num_channels": "@num_channels", "widths": [8, 16]},
    "device": "cpu",
}
STUDY = {
    "stages": {"quick": {"seeds": [0], "settings": {"max_epochs": 2, "label_smoothing": 0.0}}},
    "arms": {"before": {"selection": "hard"}, "soft": {"from": "before", "selection": "soft"}},
}
RUN = ("model.pt", "epochs.csv", "batches.csv", "test/predictions.csv", "validation/predictions.csv")


@pytest.fixture(scope="module")
def small(cohort, tmp_path_factory) -> Path:
    """An overlay of a very small encoder, and a study of two arms."""
    folder = tmp_path_factory.mktemp("small")
    (folder / "small.yaml").write_text(yaml.safe_dump({**SMALL, "cache_dir": str(cohort / "cache")}))
    (folder / "study.yaml").write_text(yaml.safe_dump(STUDY, sort_keys=False))
    return folder / "small.yaml"


def command(small: Path, cohort: Path, output: Path, *more: str, module: str = "cross_validate") -> list[str]:
    files = ["configs/train.yaml", str(small)]
    given = ["--config_file", str(files), "--dataset_dir", str(cohort), "--output_dir", str(output), "--folds", "0,1"]
    return [sys.executable, "-m", f"bundle.study.{module}", *given, *more]


def run(words: list[str], status: int = 0) -> subprocess.CompletedProcess[str]:
    assert words[:2] == [sys.executable, "-m"]
    done = run_module(*words[2:], environment=environment(), timeout=400)
    assert done.returncode == status, f"exit status {done.returncode}\n{done.stdout[-3000:]}\n{done.stderr[-5000:]}"
    return done


def pieces(output: Path) -> dict[str, Path]:
    return {path.name: path for path in sorted(output.glob("seed*"))}


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))


def assert_same(output: Path, other: Path) -> None:
    """Weights, logs, predictions and tables."""
    assert pieces(output).keys() == pieces(other).keys()
    for name, folder in pieces(output).items():
        first, second = (torch.load(path / name / "model.pt", weights_only=True)["model"] for path in (output, other))
        assert all(torch.equal(first[key], second[key]) for key in first)
        for file in RUN[1:]:
            assert (folder / file).read_text() == (other / name / file).read_text(), file
    for table in ("arms.csv", "pieces.csv"):
        ours, theirs = rows_of(output / table), rows_of(other / table)
        for row in (*ours, *theirs):
            row.pop("arm"), row.pop("seconds", None)
        assert ours == theirs


@pytest.fixture(scope="module")
def whole(cohort, small, tmp_path_factory) -> Path:
    """The output folder of a cross-validation over two folds, in one go; what it printed is in `printed`."""
    output = tmp_path_factory.mktemp("whole") / "run"
    done = run(command(small, cohort, output))
    (output / "printed").write_text(done.stdout)
    return output


def test_two_folds_in_one_go(cohort, whole):
    printed = (whole / "printed").read_text()
    assert "timing two epochs of the first piece" in printed
    assert "2 pieces, 0 done; about" in printed
    assert list(pieces(whole)) == ["seed0_fold0", "seed0_fold1"]
    datalist = json.loads((cohort / "datalist.json").read_text())
    for number, folder in enumerate(pieces(whole).values()):
        tested = {row["case"] for row in rows_of(folder / "test" / "predictions.csv")}
        assert tested == set(datalist["folds"][number]["test"])
        assert not (folder / "checkpoint.pt").exists()
        log = (folder / "log.txt").read_text()
        assert log.count("best epoch") == log.count("INFO epoch 2/2") == 1  # once each, though MONAI is run three times
        assert "Traceback" not in log
    text = (whole / "report.md").read_text()
    assert text in printed
    assert "16 test cases of 16 patients" in text
    assert "| run | 1 | " in text
    assert "first slice is a true one" in text
    (row,) = rows_of(whole / "arms.csv")
    assert (row["arm"], row["seeds"], row["pieces"]) == ("run", "1", "2")
    assert 0 <= float(row["auc_low"]) <= float(row["auc"]) <= float(row["auc_high"]) <= 1
    assert len(rows_of(whole / "pieces.csv")) == 2
    assert len({case["case"] for case in rows_of(whole / "predictions.csv")}) == 16
    for name in ("arms", "traces", "validation", "selection", "reliability", "risk_coverage"):
        assert (whole / f"{name}.png").stat().st_size > 5_000


def test_what_is_done_is_listed_and_not_done_again(cohort, small, whole):
    before = {path: path.stat().st_mtime_ns for name in RUN for path in whole.glob(f"*/{name}")}
    done = run(command(small, cohort, whole, "--seeds", "0,1", "--list"))
    assert done.stdout.splitlines() == [
        "0\tdone\tseed0_fold0",
        "1\tdone\tseed0_fold1",
        "2\topen\tseed1_fold0",
        "3\topen\tseed1_fold1",
    ]
    done = run(command(small, cohort, whole))
    assert (whole / "report.md").read_text() in done.stdout
    assert "to go" not in done.stdout
    assert before == {path: path.stat().st_mtime_ns for path in before}


def test_another_setting_in_the_same_folder_is_refused(cohort, small, whole):
    done = run(command(small, cohort, whole, "--lr", "0.02"), status=2)
    assert done.stderr.startswith(f"error: {whole}/seed0_fold0 was made otherwise (lr 0.01 → 0.02): choose another")
    assert len(done.stderr.splitlines()) == 1
    run(command(small, cohort, whole, "--lr=1e-2", "--cache_dir", "null", "--report"))  # the same, said otherwise


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (["--fold", "1"], "--fold is set for each piece: use --folds"),
        (["--seed", "1"], "--seed is set for each piece: use --seeds"),
        (["--folds", "0,3"], "has folds 0 to 2, not 0,3"),
        (["--folds", "0,0"], "--folds takes different whole numbers by commas, such as 0,1,2, not '0,0'"),
        (["--seeds", "one"], "--seeds takes different whole numbers"),
        (["--piece", "2"], "--piece must be 0 to 1, not 2"),
        (["--processes", "0"], "--processes must be at least 1, not 0"),
        (["--lr"], "'--lr' is no option, and settings of the config are given as --key value"),
        (["lr", "1"], "'lr' is no option"),
        (["--datalist", "none.json"], "there is no datalist"),
        (["--config_file", "none.yaml"], "--config_file: there is no file"),
        (["--output_dir", "README.md/out"], "README.md is no folder that can be written to"),
        (["--config_file", "7"], "--config_file is a file or a list of files"),
        (["--report"], "no seed has all its folds done yet"),
        (["--locked"], "has no locked cases: make it with scripts/make_datalist --lock SHARE"),
    ],
)
def test_wrong_options_end_in_a_sentence(cohort, small, tmp_path, more, sentence, monkeypatch, capsys):
    from bundle.errors import command_line
    from bundle.study.cross_validate import main

    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit) as status:
        command_line(lambda: main(command(small, cohort, tmp_path / "out", *more)[3:]))
    assert status.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert sentence in said
    assert len(said.splitlines()) == 1
    assert not list(tmp_path.rglob("*.pt"))


def test_settings_are_read_as_monai_reads_them(cohort, small, tmp_path, monkeypatch):
    from bundle.study import plan

    monkeypatch.chdir(ROOT)
    given = {
        "image_size": ("[64,32]", [64, 32]), "lr": ("1e-4", 1e-4), "classifier_lr": ("1.0e-4", 1e-4),
        "cache_dir": ("null", "null"), "crop_margin": ("None", "null"), "amp": ("false", "false"), "norm": ("no", "no"),
        "encoder::widths": ("[4, 8]", [4, 8]), "mirror": ("-1.5", -1.5), "encoder_weights": ("a=b.pt", "a=b.pt"),
    }  # fmt: skip
    assert plan._overrides([word for key, (text, _) in given.items() for word in (f"--{key}", text)]) == {
        key: value for key, (_, value) in given.items()
    }
    assert plan._overrides([f"--{key}={text}" for key, (text, _) in given.items()]) == {
        key: value for key, (_, value) in given.items()
    }


def test_a_split_without_a_test_part_is_told_what_to_do(cohort, small, tmp_path):
    datalist = json.loads((cohort / "datalist.json").read_text())
    datalist["folds"][0]["test"] = []
    del datalist["hash"]
    (tmp_path / "datalist.json").write_text(json.dumps(datalist))
    done = run(command(small, cohort, tmp_path / "out", "--datalist", str(tmp_path / "datalist.json")), status=2)
    assert (
        "has no test cases: to judge on the official validation part, make the datalist with --validation"
        in done.stderr
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("awaited", "sent"), [("checkpoint.pt", signal.SIGINT), ("validation/metrics.json", signal.SIGKILL)]
)
def test_stopped_and_run_again_equals_the_run_in_one_go(cohort, small, whole, tmp_path, awaited, sent):
    output = tmp_path / "run"
    words = command(small, cohort, output)
    process = subprocess.Popen(
        words, cwd=ROOT, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True,
        # A shell's background jobs ignore it, and so would what they start.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    deadline = time.monotonic() + 300
    while not (output / "seed0_fold0" / awaited).exists() and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.005)
    os.killpg(process.pid, sent)  # as a terminal does it on Ctrl-C
    _, said = process.communicate(timeout=60)
    if sent == signal.SIGINT:
        assert process.returncode == 130
        assert said.decode().endswith("interrupted; run the same command again to go on\n")
        with pytest.raises(ProcessLookupError):  # nobody of the group is left
            os.killpg(process.pid, 0)
    assert not (output / "report.md").exists()
    run(words)
    assert_same(output, whole)
    assert not list(output.rglob(".part-*"))
    log = (output / "seed0_fold0" / "log.txt").read_text()
    assert ("had already reached epoch 2" if sent == signal.SIGKILL else "going on after epoch") in log
    if sent == signal.SIGKILL:
        assert json.loads((output / "seed0_fold0" / "piece.json").read_text())["seconds"] is None


@pytest.mark.slow
def test_piece_by_piece_and_on_two_processes_equals_the_run_in_one_go(cohort, small, whole, tmp_path):
    for number in (1, 0):
        run(command(small, cohort, tmp_path / "run", "--piece", str(number)))
    assert not (tmp_path / "run" / "report.md").exists()
    run(command(small, cohort, tmp_path / "run", "--report"))
    assert_same(tmp_path / "run", whole)
    run(command(small, cohort, tmp_path / "two", "--processes", "2"))
    assert_same(tmp_path / "two", whole)


@pytest.mark.slow
def test_a_piece_can_be_done_anew_from_its_settings(whole, tmp_path):
    done = pieces(whole)["seed0_fold1"]
    again = tmp_path / "run" / "seed0_fold1"
    again.mkdir(parents=True)
    shutil.copy(done / "settings.json", again)
    run([sys.executable, "-m", "bundle.study.piece", str(again)])
    for name in RUN[1:]:
        assert (again / name).read_text() == (done / name).read_text(), name


@pytest.mark.slow
def test_the_time_is_projected_of_a_training_that_writes_no_events(cohort, small, tmp_path):
    files = tuple(map(str, (ROOT / "configs" / "train.yaml", small)))
    settings = {"dataset_dir": str(cohort), "datalist": str(cohort / "datalist.json"), "fold": 0, "seed": 0}
    assert probe_seconds([Piece(tmp_path / "piece", files, {**settings, "log::tensorboard": False})]) > 0


@pytest.mark.slow
def test_a_mistake_is_told_before_the_first_piece(cohort, small, tmp_path):
    done = run(command(small, cohort, tmp_path / "run", "--zzz", "0.1"), status=2)
    assert done.stderr == "error: a training of two epochs failed: there is no setting 'zzz'\n"
    assert not pieces(tmp_path / "run")
    done = run(command(small, cohort, tmp_path / "run", "--zzz", "0.1", "--piece", "1"), status=2)
    assert "error: pieces failed: 1; the first: there is no setting 'zzz' (more in " in done.stderr
    log = (tmp_path / "run" / "seed0_fold1" / "log.txt").read_text()
    assert "error: there is no setting 'zzz'" in log
    assert "Traceback" not in log


@pytest.mark.slow
def test_a_study_of_two_arms_with_a_scan_that_is_refused(cohort, small, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(cohort, data, ignore=shutil.ignore_patterns("cache"))
    datalist = json.loads((data / "datalist.json").read_text())
    broken = datalist["folds"][0]["test"][0]
    (data / "images" / f"{broken}.nii.gz").write_text("no scan")
    output = tmp_path / "study"
    study = ["--study", str(small.with_name("study.yaml")), "--stage", "quick"]
    # Of fold 0 alone: in the training part of another one a scan that cannot be read ends the piece.
    words = command(small, data, output, *study, "--folds", "0", module="stability_study")
    done = run(words)
    text = (output / "report.md").read_text()
    assert text in done.stdout
    assert "7 test cases of 7 patients" in text
    assert f"The reader refused 1 more ({broken}): they are in no figure." in text
    assert "differences are against `before`, paired" in text
    rows = rows_of(output / "arms.csv")
    assert [row["arm"] for row in rows] == ["before", "soft"]
    assert rows[0]["auc_difference"] == "0"
    config = yaml.safe_load((output / "overlays" / "arms" / "soft.yaml").read_text())
    assert config == {"selection": "soft"}
    recipe = json.loads(torch.load(output / "soft" / "seed0_fold0" / "model.pt", weights_only=True)["recipe"])
    assert recipe["selection"] == "soft"
    # One arm more of which not all is done, and names that are none.
    shutil.rmtree(output / "soft" / "seed0_fold0")
    run([*words, "--report"])
    assert "Left out, as no seed has all its folds done: soft." in (output / "report.md").read_text()
    assert "--arms: there is no arm 'hard'" in run([*words, "--arms", "before,hard"], status=2).stderr
    assert "--stage must be one of quick, not 'slow'" in run([*words, "--stage", "slow"], status=2).stderr


@pytest.mark.slow
def test_locked_cases_are_judged_at_the_end_and_once(cohort, small, whole, tmp_path):
    content = json.loads((cohort / "datalist.json").read_text())
    del content["hash"]
    # The cases of the third fold's test part, which then are in no fold.
    content["locked"] = content["folds"].pop()["test"]
    content["folds"] = [
        {name: [case for case in cases if case not in content["locked"]] for name, cases in fold.items()}
        for fold in content["folds"]
    ]
    (tmp_path / "datalist.json").write_text(json.dumps(content))
    words = command(small, cohort, tmp_path / "run", "--datalist", str(tmp_path / "datalist.json"), "--locked")
    done = run(words)
    assert (tmp_path / "run" / "locked" / "report.md").read_text() in done.stdout
    assert f"{len(content['locked'])} locked cases of" in done.stdout
    for folder in pieces(tmp_path / "run").values():
        assert {row["case"] for row in rows_of(folder / "locked" / "predictions.csv")} == set(content["locked"])
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").glob("*/locked/predictions.csv")}
    run(words)
    assert times == {path: path.stat().st_mtime_ns for path in times}
    for path in times:
        shutil.rmtree(path.parent)
    assert "done yet" in run([*words, "--report"], status=2).stderr  # which looks at nothing anew
    assert not any(path.parent.exists() for path in times)
