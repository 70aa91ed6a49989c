"""Many pieces, with a made command in place of the trainings."""

import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bundle.errors import InputError
from bundle.study.arms import Pretraining
from bundle.study.piece import BUSY, Piece
from bundle.study.pieces import do_pieces, done_pieces, duration, probe_seconds, projected_seconds

from .made_pieces import ROOT, TRAIN, datalist

# Notes that it began and ended; what it does is written in the piece's settings.
WORK = """
import json, pathlib, sys, time
folder = pathlib.Path(sys.argv[1])
settings = json.loads((folder / "settings.json").read_text())["settings"]
with (folder.parents[1] / "journal").open("a") as file:
    file.write(f"{folder.parent.name}/{folder.name}\\n")
if settings.get("says"):
    print(settings["says"], file=sys.stderr)
time.sleep(settings.get("sleeps", 0))
if settings.get("status"):
    sys.exit(settings["status"])
(folder / "piece.json").write_text(json.dumps({"format": 1, "made_from": {}, "seconds": 10.0}))
"""


def command(piece):
    return [sys.executable, "-c", WORK, str(piece.folder)]


@pytest.fixture
def make(tmp_path):
    """Pieces of an arm, of which `those` have further settings."""
    path = str(datalist(tmp_path))

    def pieces(arm, count, those=(), **more):
        common = {"dataset_dir": str(tmp_path), "datalist": path, "seed": 0}
        return [
            Piece(
                tmp_path / arm / f"seed0_fold{fold}",
                (TRAIN,),
                {**common, "fold": fold, **(more if fold in those else {})},
            )
            for fold in range(count)
        ]

    return pieces


def journal(folder):
    return (folder / "journal").read_text().split()


@pytest.mark.parametrize("processes", [1, 3])
def test_each_piece_is_done_once_and_not_again(tmp_path, make, processes):
    pieces = make("a", 4)
    do_pieces(pieces[:1], command=command)
    do_pieces(pieces, processes, progress=False, command=command)
    do_pieces(pieces, processes, progress=False, command=command)
    assert sorted(journal(tmp_path)) == [f"a/seed0_fold{i}" for i in range(4)]
    assert list(done_pieces(pieces)) == [piece.folder for piece in pieces]
    assert Piece.load(pieces[3].folder) == pieces[3]


def test_a_failure_is_told_and_the_others_are_done(tmp_path, make, capsys):
    pieces = make("a", 4, those=[1], status=2, says="error: lr must be a number\nand more")
    with pytest.raises(
        InputError, match=r"^pieces failed: 1; the first: lr must be a number \(more in .*fold1/log.txt\)$"
    ):
        do_pieces(pieces, progress=False, command=command)
    assert len(done_pieces(pieces)) == 3
    assert f"failed: {pieces[1].folder}: lr must be a number" in capsys.readouterr().err
    # What failed is tried again; the sentence of the first time is no longer the reason.
    again = make("a", 4, those=[1], status=1, says="Killed")
    with pytest.raises(InputError, match="pieces failed: 1; the first: Killed"):
        do_pieces(again, progress=False, command=command)
    do_pieces(make("a", 4), progress=False, command=command)
    assert journal(tmp_path).count("a/seed0_fold1") == 3
    assert len(journal(tmp_path)) == 6


def test_an_arm_is_left_after_three_failures_and_others_are_not(tmp_path, make):
    pieces = [*make("bad", 5, those=range(5), status=1), *make("good", 2)]
    with pytest.raises(
        InputError, match="pieces failed: 3, 2 were not begun; the first: its process ended with status 1"
    ):
        do_pieces(pieces, progress=False, command=command)
    assert journal(tmp_path) == [*(f"bad/seed0_fold{i}" for i in range(3)), "good/seed0_fold0", "good/seed0_fold1"]


def test_a_piece_that_is_killed_says_so(make):
    pieces = make("a", 1)

    def killed(piece):
        return [sys.executable, "-c", "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"]

    with pytest.raises(InputError, match="its process was ended by signal 9"):
        do_pieces(pieces, progress=False, command=killed)


def test_what_another_process_is_at_is_no_failure(tmp_path, make, caplog):
    pieces = make("a", 5, those=range(4), status=BUSY)
    do_pieces(pieces, progress=False, command=command)
    assert "pieces that another process is doing: 4" in caplog.text
    assert list(done_pieces(pieces)) == [pieces[4].folder]


def test_cores_are_shared_among_processes(make, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(8), raising=False)

    def threads(piece):
        return [sys.executable, "-c", "import os, sys; sys.exit('threads ' + os.environ['OMP_NUM_THREADS'])"]

    for processes, expected in ((1, 8), (3, 2), (20, 1)):
        with pytest.raises(InputError, match=f"threads {expected} "):
            do_pieces(make(f"a{processes}", 1), processes, progress=False, command=threads)


@pytest.mark.parametrize("processes", [0, -2])
def test_no_process_is_refused(make, processes):
    with pytest.raises(InputError, match=f"--processes must be at least 1, not {processes}"):
        do_pieces(make("a", 1), processes)


PARENT = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs start without
sys.path.insert(0, sys.argv[1])
from tests.study.test_pieces import command
from bundle.errors import command_line
from bundle.study.piece import Piece
from bundle.study.pieces import do_pieces
pieces = [Piece.load(folder) for folder in sys.argv[2:]]
def with_id(piece):
    return [sys.executable, "-c", "import os, pathlib, sys, time; p = pathlib.Path(sys.argv[1]) / 'id'; "
            "p.write_text(str(os.getpid())); p.rename(p.with_name('process')); time.sleep(300)", str(piece.folder)]
command_line(lambda: do_pieces(pieces, 2, False, with_id))
"""


@pytest.mark.parametrize(("sent", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_nothing_is_left_running_when_it_is_interrupted(make, sent, status):
    pieces = make("a", 3)
    for piece in pieces:
        piece.folder.mkdir(parents=True)
        piece.save()
    process = subprocess.Popen([sys.executable, "-c", PARENT, str(ROOT), *(str(piece.folder) for piece in pieces)])
    begun = [piece.folder / "process" for piece in pieces[:2]]
    deadline = time.monotonic() + 120
    while not all(path.exists() for path in begun) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(sent)  # to it alone: a terminal's Ctrl-C reaches the pieces as well
    assert process.wait(60) == status
    for path in begun:
        with pytest.raises(ProcessLookupError):
            os.kill(int(path.read_text()), 0)
    assert not (pieces[2].folder / "process").exists()


def planned(tmp_path, arm, fold, epochs, pretrain=None):
    config = tmp_path / "train.yaml"
    config.write_text("max_epochs: 60\n")
    return Piece(Path(arm) / str(fold), (str(config),), {"max_epochs": epochs} if epochs else {}, pretrain)


@pytest.mark.parametrize("epochs", ["abc", "$2 * 10", [3]])
def test_epochs_that_are_no_number_are_refused_before_anything_is_timed(tmp_path, epochs, monkeypatch):
    monkeypatch.setattr("bundle.study.pieces.start", lambda *_: pytest.fail("two epochs were trained first"))
    with pytest.raises(InputError, match="max_epochs must be a whole number, not"):
        probe_seconds([planned(tmp_path, "a", 0, epochs)])


def test_the_projection_is_by_the_mean_of_the_arm_then_by_epochs(tmp_path):
    pieces = [planned(tmp_path, arm, fold, 10) for arm in ("a", "b") for fold in range(3)]
    overlay = tmp_path / "pretrain.yaml"
    overlay.write_text("max_epochs: 30\n")
    pieces += [
        planned(tmp_path, "c", 0, 20),
        planned(tmp_path, "d", 0, None),  # 60, of the config
        planned(tmp_path, "e", 0, 10, Pretraining((str(overlay),), {})),  # and 30, of two views each
        planned(tmp_path, "f", 0, 10, Pretraining((str(overlay),), {"max_epochs": 5})),
        planned(tmp_path, "g", 0, 10, Pretraining((), {})),
        planned(tmp_path, "h", 0, 10),
    ]
    done = {
        pieces[0].folder: {"seconds": 10.0},
        pieces[1].folder: {"seconds": 30.0},
        pieces[3].folder: {"seconds": 5.0},
        pieces[-1].folder: {"seconds": None},  # was interrupted
    }
    # One of a at 20, two of b at 5, the rest at 1.5 an epoch.
    expected = 20 + 2 * 5 + 1.5 * (20 + 60 + (10 + 60) + (10 + 10) + (10 + 20))
    assert projected_seconds(pieces, done, 1) == pytest.approx(expected)
    assert projected_seconds(pieces, done, 4) == pytest.approx(expected / 4)
    assert projected_seconds(pieces[:1], done, 1) == 0
    assert math.isnan(projected_seconds(pieces, {}, 1))
    assert math.isnan(projected_seconds(pieces, {pieces[-1].folder: {"seconds": None}}, 1))


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0 min"), (61, "2 min"), (7199, "120 min"), (7200, "2.0 h"), (9e4, "25.0 h")]
)
def test_durations_for_people(seconds, text):
    assert duration(seconds) == text
