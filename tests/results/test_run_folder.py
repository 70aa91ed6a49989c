from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import bundle.results.run_folder as module
from bundle.data.dicom_files import DicomFiles
from bundle.errors import InputError, Refusal
from bundle.files import replacing
from bundle.results.records import read_record, record_file_name, refused_record, write_record
from bundle.results.run_folder import ENTRY, FIRST_CASE, INSIDE, RunFolder

from .test_records import make, rows_of

MADE_FROM = {"version": "1", "weights": "w", "settings": "s"}
HOLD = """
import fcntl, sys
file = open(sys.argv[1], "r+b")
fcntl.lockf(file, fcntl.LOCK_SH, 1, int(sys.argv[2]))
for byte in map(int, sys.argv[3:]):
    fcntl.lockf(file, fcntl.LOCK_EX, 1, byte)
print("held", flush=True)
sys.stdin.read()
"""
LEAVING = """
import fcntl, sys, time
file = open(sys.argv[1], "r+b")
fcntl.lockf(file, fcntl.LOCK_EX, 1, int(sys.argv[2]))
print("held", flush=True)
time.sleep(1)
"""
LOOK = """
import fcntl, sys
fcntl.lockf(open(sys.argv[1], "r+b"), fcntl.LOCK_EX | fcntl.LOCK_NB, 1, int(sys.argv[2]))
"""


@pytest.fixture
def cases(tmp_path: Path) -> list[dict[str, Any]]:
    """Five, each with a file."""
    scans = [tmp_path / "scans" / f"{i}.nii.gz" for i in range(5)]
    scans[0].parent.mkdir()
    for path in scans:
        path.write_text("a scan")
    return [{"case": f"c{i}", "image": path, "label": None, "patient": None} for i, path in enumerate(scans)]


def folder(tmp_path: Path, cases: list[dict[str, Any]], **more: Any) -> RunFolder:
    return RunFolder(tmp_path / "out", cases, **{"made_from": MADE_FROM, **more})


def work(run: RunFolder, refuse: dict[str, str] | None = None) -> list[str]:
    """Do all that is left, as the workflow does; the cases in the order in which they were done."""
    run.open()
    did = []
    for one_pass in run:
        for i in one_pass:
            case = run.cases[i]["case"]
            code = (refuse or {}).get(case)
            run.finish(make(case) if code is None else refused_record(case, Refusal(code, "a sentence")))
            did.append(case)
    run.write_table(["low", "high"])
    run.close()
    return did


@contextmanager
def another_process(output: Path, *bytes_held: int) -> Iterator[subprocess.Popen[bytes]]:
    """One that is inside the folder and holds some locks."""
    command = [sys.executable, "-c", HOLD, str(output / ".lock"), str(INSIDE), *map(str, bytes_held)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"held\n"
        yield process
        process.kill()


def lines(tmp_path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (tmp_path / "out" / "cases.jsonl").read_text().splitlines()]


def test_each_case_is_done_once_and_told_of(tmp_path, cases):
    assert work(folder(tmp_path, cases), {"c1": "missing_slices"}) == [case["case"] for case in cases]
    told = lines(tmp_path)
    assert [line["case"] for line in told] == [case["case"] for case in cases]
    assert (told[0]["status"], told[0]["class_name"], told[0]["probabilities"]) == (
        "accepted",
        "high",
        pytest.approx([0.2, 0.8]),
    )
    assert (told[1]["status"], told[1]["reason_code"], told[1]["prediction"]) == ("refused", "missing_slices", None)
    record = read_record(tmp_path / "out" / told[0]["file"])
    assert record is not None
    assert record["made_from"].items() >= MADE_FROM.items()
    assert len(record["made_from"]["scan"]) == 64
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out" / "cases").iterdir()}
    assert work(folder(tmp_path, cases)) == []
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out" / "cases").iterdir()} == before
    assert lines(tmp_path) == told
    assert [row["case"] for row in rows_of(tmp_path / "out" / "predictions.csv")] == [case["case"] for case in cases]


def test_what_changed_is_done_anew_and_nothing_else(tmp_path, cases):
    work(folder(tmp_path, cases), {"c1": "missing_slices", "c2": "missing_slices"})
    cases[1]["image"].write_text("a scan with all its slices")
    cases[3]["label"] = 1
    cases.append({"case": "new", "image": cases[0]["image"]})
    assert work(folder(tmp_path, cases)) == ["c1", "c3", "new"]
    assert [row["status"] for row in rows_of(tmp_path / "out" / "predictions.csv")].count("refused") == 1
    for key in MADE_FROM:
        assert len(work(folder(tmp_path, cases, made_from={**MADE_FROM, key: "other"}))) == 6
        assert len(work(folder(tmp_path, cases))) == 6
    assert len(work(folder(tmp_path, cases, resume=False))) == 6
    assert len(lines(tmp_path)) == 6


def test_what_the_machine_was_to_blame_for_is_tried_again(tmp_path, cases):
    work(folder(tmp_path, cases), {"c1": "missing_slices", "c2": "unreadable"})
    assert work(folder(tmp_path, cases), {"c2": "unreadable"}) == ["c2"]
    assert work(folder(tmp_path, cases)) == ["c2"]
    assert [line["case"] for line in lines(tmp_path)][-1] == "c2"
    assert len(lines(tmp_path)) == 5


DAMAGE = {
    "empty": "",
    "garbage": "\0\1{",
    "list": "[]",
    "nested too deep": "[" * 100_000,
    "no UTF-8": b"\xff\xfe",
    "another case": {"case": "c0"},
    "another status": {"status": "done"},
    "no origin": {"made_from": None},
    "no probabilities": {"probabilities": None},
    "one probability": {"probabilities": [0.5]},
    "a class that is none": {"prediction": 2},
    "no class": {"prediction": None},
    "abstained with a class": {"status": "abstained", "prediction": 1, "reason_code": "low_confidence"},
    "no key slice": {"key_slices": []},
    "key slices that are none": {"key_slices": [1]},
    "refused without a reason": {"status": "refused", "prediction": None, "reason_code": None},
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_record_is_no_result(tmp_path, cases, kind):
    work(folder(tmp_path, cases))
    path = tmp_path / "out" / "cases" / "c3.json"
    content = DAMAGE[kind]
    if isinstance(content, dict):
        path.write_text(json.dumps({**json.loads(path.read_text()), **content}))
    else:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert work(folder(tmp_path, cases)) == ["c3"]
    assert len(rows_of(tmp_path / "out" / "predictions.csv")) == 5


def test_a_run_that_was_cut_short_goes_on(tmp_path, cases):
    run = folder(tmp_path, cases)
    run.open()
    (first, *_) = [i for i in next(iter(run)) if i == 0 and not run.finish(make("c0"))]  # claims the rest and ends
    assert first == 0
    run.close()
    (tmp_path / "out" / "cases" / ".part-x.json").write_text("cut sh")
    with (tmp_path / "out" / "cases.jsonl").open("a") as file:
        file.write('{"case": "c1", "stat')
    assert work(folder(tmp_path, cases)) == ["c1", "c2", "c3", "c4"]
    assert [line["case"] for line in lines(tmp_path)] == ["c0", "c1", "c2", "c3", "c4"]
    assert sorted(path.name for path in (tmp_path / "out" / "cases").iterdir()) == [f"c{i}.json" for i in range(5)]


def test_cases_of_another_process_are_left_to_it_and_taken_over_when_it_dies(tmp_path, cases):
    work(folder(tmp_path, cases[:1]))
    run = folder(tmp_path, cases)
    run.open()  # makes the identity of this run that of the folder
    run.close()
    with another_process(tmp_path / "out", FIRST_CASE + 1, FIRST_CASE + 3) as other:
        run.open()
        passes = iter(run)
        for i in next(passes):
            run.finish(make(f"c{i}"))
        assert sorted(run.done) == [0, 2, 4]
        write_record(tmp_path / "out" / "cases", {**make("c1"), "made_from": run._made_from(1)})
        other.send_signal(signal.SIGKILL)
        other.wait()
        assert list(next(passes)) == [3]  # c1 it had done
        run.finish(make("c3"))
        assert next(passes, None) is None
    assert [record["case"] for record in run.write_table(["low", "high"])] == [case["case"] for case in cases]
    run.close()


def test_a_case_of_another_process_is_left_to_it_whatever_the_order_of_the_cases(tmp_path, cases):
    first = folder(tmp_path, cases)
    first.open()
    with another_process(tmp_path / "out", FIRST_CASE + 1) as process:  # c1 of c0 … c4
        run = folder(tmp_path, cases[::-1])
        run.open()
        assert [run.cases[i]["case"] for i in next(iter(run))] == ["c4", "c3", "c2", "c0"]
        process.kill()
        process.wait()
    assert work(folder(tmp_path, cases[2:] + cases[:2])) == ["c2", "c3", "c4", "c0", "c1"]


def test_runs_that_differ_do_not_share_a_folder_at_one_time(tmp_path, cases):
    work(folder(tmp_path, cases))
    with another_process(tmp_path / "out"):
        for other in (
            folder(tmp_path, cases, made_from={**MADE_FROM, "weights": "v"}),
            folder(tmp_path, cases[1:]),
        ):
            with pytest.raises(InputError, match="another run is at work in .* with other weights, settings or cases"):
                other.open()
        # The same run joins, also one that was told to begin anew: it would take the other's results away.
        assert work(folder(tmp_path, cases, resume=False)) == []
    assert len(work(folder(tmp_path, cases[1:], made_from={**MADE_FROM, "weights": "v"}))) == 4


def test_of_several_processes_each_begins_with_its_share_and_helps_with_the_rest(tmp_path, cases, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    assert work(folder(tmp_path, cases)) == ["c1", "c3", "c0", "c2", "c4"]
    assert [row["case"] for row in rows_of(tmp_path / "out" / "predictions.csv")] == [case["case"] for case in cases]


def test_the_one_with_an_exit_status_waits_until_the_others_have_left(tmp_path, cases, monkeypatch):
    run = folder(tmp_path, cases)
    work(run)
    monkeypatch.setenv("WORLD_SIZE", "2")
    waited = []
    with another_process(tmp_path / "out") as other:

        def sleep(seconds: float) -> None:
            waited.append(seconds)
            if len(waited) == 3:
                other.kill()
                other.wait()

        monkeypatch.setattr(module.time, "sleep", sleep)
        run.wait_for_others()
    assert len(waited) == 3
    monkeypatch.setattr(module, "LEAVE_SECONDS", 0.0)
    with another_process(tmp_path / "out"):
        run.wait_for_others()


def test_one_that_looks_whether_it_is_the_last_does_not_keep_others_from_being_inside(tmp_path, cases):
    run = folder(tmp_path, cases)
    run.open()
    run.close()
    lock = str(tmp_path / "out" / ".lock")
    with subprocess.Popen([sys.executable, "-c", LEAVING, lock, str(INSIDE)], stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"held\n"
        run.open()
    looked = subprocess.run([sys.executable, "-c", LOOK, lock, str(INSIDE)], capture_output=True, text=True)
    assert "BlockingIOError" in looked.stderr
    run.close()


def test_who_looks_whether_it_is_the_last_waits_for_those_about_to_enter(tmp_path, cases):
    run = folder(tmp_path, cases)
    run.open()
    run.close()
    command = [sys.executable, "-c", HOLD, str(tmp_path / "out" / ".lock"), str(ENTRY)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"held\n"
        run._lock_file = run._opened()
        assert not run._is_empty()
        other.kill()
        other.wait()
        assert run._is_empty()
        # Nothing is held afterwards.
        for byte in (ENTRY, INSIDE):
            subprocess.run([sys.executable, "-c", LOOK, str(tmp_path / "out" / ".lock"), str(byte)], check=True)
    run.close()


def test_results_in_the_folder_of_a_scan_are_refused_before_anything_is_written(tmp_path):
    scan = tmp_path / "data" / "study" / "series" / "1.dcm"
    scan.parent.mkdir(parents=True)
    scan.write_text("an image")
    (tmp_path / "link").symlink_to(scan.parent)
    study, series = scan.parent.parent, scan.parent
    images = {"folder": study, "text": str(series), "files": [tmp_path / "a.nii", series], "study": DicomFiles((scan,))}
    for image in images.values():
        case = {"case": "c", "image": image}
        for output in (series, series / "out", series / "out" / "deeper", tmp_path / "link" / "out"):
            with pytest.raises(InputError, match=r"output_dir is, or lies in, a folder of DICOM images .*: choose a"):
                RunFolder(output, [{"case": "refused"}, case], MADE_FROM)
        for output in (tmp_path, tmp_path / "data", tmp_path / "data" / "out", tmp_path / "data" / "study-2"):
            RunFolder(output, [{"case": "refused"}, case], MADE_FROM)
    with pytest.raises(InputError, match="output_dir is, or lies in"):
        RunFolder(study / "out", [{"case": "c", "image": study}], MADE_FROM)
    study.rename(tmp_path / "data" / "cases")
    with pytest.raises(InputError, match="output_dir is, or lies in"):  # where the records go
        RunFolder(tmp_path / "data", [{"case": "c", "image": tmp_path / "data" / "cases"}], MADE_FROM)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["1.dcm", "cases", "data", "link", "series"]


def test_a_scan_in_place_of_one_of_the_same_size_and_time_is_done_anew(tmp_path, cases):
    work(folder(tmp_path, cases))
    status = cases[2]["image"].stat()
    cases[2]["image"].write_text("a SCAN")
    os.utime(cases[2]["image"], ns=(status.st_atime_ns, status.st_mtime_ns))
    assert work(folder(tmp_path, cases)) == ["c2"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is full")
def test_a_full_disk_is_told_in_a_sentence(tmp_path, cases):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / ".lock").symlink_to("/dev/full")
    run = folder(tmp_path, cases)
    with pytest.raises(InputError, match=r"output_dir: cannot write in .*out \(No space left on device\); free space"):
        run.open()
    assert run._lock_file is None
    with (
        pytest.raises(InputError, match=r"cannot write x\.json: No space left on device; free space in .*out$"),
        replacing(tmp_path / "out" / "x.json"),
        Path("/dev/full").open("w") as full,
    ):
        full.write("text")
    assert [path.name for path in (tmp_path / "out").iterdir()] == [".lock"]


def test_what_cannot_be_removed_is_told_in_a_sentence(tmp_path, cases):
    (tmp_path / "out" / "cases" / ".part-x").mkdir(parents=True)
    with pytest.raises(InputError, match=r"output_dir: cannot write in .*; choose a folder that is writable"):
        folder(tmp_path, cases).open()


@pytest.mark.parametrize(
    ("number", "name", "told"),
    [
        (errno.ENOSPC, None, True),
        (errno.EDQUOT, "out/below/y", True),
        (errno.EROFS, "elsewhere/y", False),
        (errno.EIO, None, True),
        (errno.EACCES, "out/x.json", True),
        (errno.EACCES, "out/y", False),
        (errno.ENOENT, "out/x.json", False),
        (None, None, False),
    ],
)
def test_only_errors_of_writing_become_one_of_the_file_written(tmp_path, number, name, told):
    error = OSError("a sentence") if number is None else OSError(number, os.strerror(number))
    if name is not None:
        error.filename = str(tmp_path / name)
    with pytest.raises(InputError if told else OSError) as raised, replacing(tmp_path / "out" / "x.json"):
        raise error
    assert (raised.value is error) != told
    assert not list((tmp_path / "out").iterdir())


def test_only_a_whole_table_removes_records_and_only_of_other_cases(tmp_path, cases):
    output = tmp_path / "out" / "cases"
    write_record(output, make("foreign"))
    (output / "notes.json").write_text('{"mine": 1}')
    run = folder(tmp_path, cases)
    run.open()
    for i in next(iter(run)):
        if i < 4:
            run.finish(make(f"c{i}"))
    assert len(run.write_table(["low", "high"])) == 4
    assert (output / record_file_name("foreign")).exists()
    run.close()
    work(folder(tmp_path, cases))
    assert sorted(path.name for path in output.iterdir()) == [*(f"c{i}.json" for i in range(5)), "notes.json"]


def test_folders_that_cannot_be_used_are_told(tmp_path, cases):
    def spoilt(name: str, make_it: Any) -> RunFolder:
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        (tmp_path / "out").unlink(missing_ok=True) if (tmp_path / "out").is_file() else None
        path = tmp_path / "out" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        make_it(path)
        return folder(tmp_path, cases)

    with pytest.raises(InputError, match=r"output_dir: cannot write in .*; choose a folder that is writable"):
        spoilt("../out2", lambda _: shutil.rmtree(tmp_path / "out") or (tmp_path / "out").write_text("a file")).open()
    with pytest.raises(InputError, match="output_dir: cannot write in"):
        spoilt(".lock", Path.mkdir).open()
    with pytest.raises(InputError, match=r"cannot write cases\.jsonl"):
        work(spoilt("cases.jsonl", Path.mkdir))
    with pytest.raises(InputError, match=r"cannot write c2\.json: a folder has that name"):
        work(spoilt("cases/c2.json", lambda path: path.mkdir(parents=True)))
    assert len(work(spoilt(".lock", lambda path: path.write_bytes(os.urandom(500))))) == 5
    with pytest.raises(InputError, match="two cases have the same name"):
        folder(tmp_path, [*cases, cases[0]])
