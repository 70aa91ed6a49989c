from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bundle.data.dicom_files import DicomFiles
from bundle.data.identity import END_BYTES, scan_folders, scan_identity
from bundle.data.policy import SeriesRules
from bundle.errors import Refusal


@pytest.fixture
def scans(tmp_path: Path) -> Path:
    for name in ("a.nii.gz", "b.nii.gz", "study/1/x.dcm", "study/2/y.dcm"):
        path = tmp_path / "scans" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(name.encode())
    return tmp_path / "scans"


KINDS: dict[str, Callable[[Path], Any]] = {
    "file": lambda scans: scans / "a.nii.gz",
    "text": lambda scans: str(scans / "a.nii.gz"),
    "files": lambda scans: [scans / "a.nii.gz", scans / "b.nii.gz"],
    "folder": lambda scans: scans / "study",
    "study": lambda scans: DicomFiles((scans / "study" / "1" / "x.dcm", scans / "study" / "2" / "y.dcm")),
}


def identity(scans: Path, kind: str, **more: Any) -> str:
    return scan_identity({"case": "c", "label": 1, "image": KINDS[kind](scans), **more})


def touched(path: Path) -> None:
    status = path.stat()
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 1))


@pytest.mark.parametrize("kind", KINDS)
def test_it_follows_every_change_and_nothing_else(scans: Path, kind: str) -> None:
    before = identity(scans, kind)
    assert identity(scans, kind) == before
    moved = scans.parent / "elsewhere"
    shutil.copytree(scans, moved, copy_function=shutil.copy2)
    assert identity(moved, kind) == before
    (scans / "neighbour.nii.gz").write_bytes(b"another scan")
    assert identity(scans, kind) == before
    first = scans / ("study/1/x.dcm" if kind in ("folder", "study") else "a.nii.gz")
    seen = {before}
    for change in (touched, lambda path: path.write_bytes(b"longer than before"), Path.unlink):
        change(first)
        seen.add(identity(scans, kind))
    assert len(seen) == 4


def overwritten(path: Path, at: int) -> None:
    """One byte other than before, and neither size nor time."""
    status, content = path.stat(), bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [10, END_BYTES, END_BYTES + 1, 2 * END_BYTES, 3 * END_BYTES])
def test_a_scan_in_place_of_one_of_the_same_size_and_time_is_another(scans: Path, kind: str, size: int) -> None:
    first = scans / ("study/1/x.dcm" if kind in ("folder", "study") else "a.nii.gz")
    first.write_bytes(bytes(size))
    seen = {identity(scans, kind)}
    places = (0, min(size, END_BYTES) - 1, max(size - END_BYTES, 1), size - 1)
    for place in places:
        before = identity(scans, kind)
        overwritten(first, place)
        assert identity(scans, kind) not in seen, place
        overwritten(first, place)
        assert identity(scans, kind) == before
    if size > 2 * END_BYTES:  # the price of not reading the whole
        overwritten(first, size // 2)
        assert identity(scans, kind) in seen


def test_a_pipe_in_the_folder_of_a_scan_is_not_opened(scans: Path) -> None:
    os.mkfifo(scans / "study" / "pipe")
    end = os.open(scans / "study" / "pipe", os.O_RDWR)  # with it, opening another would not wait
    os.write(end, b"x")
    identity(scans, "folder")
    os.set_blocking(end, False)
    assert os.read(end, 1) == b"x"
    os.close(end)


def test_the_folders_in_which_every_file_may_count(scans: Path) -> None:
    found = {kind: list(scan_folders(make(scans))) for kind, make in KINDS.items()}
    assert found["folder"] == [scans / "study"]
    assert found["study"] == [scans / "study" / "1", scans / "study" / "2"]
    assert list(scan_folders([scans / "study", str(scans / "study" / "1")])) == [
        scans / "study",
        scans / "study" / "1",
    ]


def test_files_that_come_go_or_change_their_names_in_a_folder_count(scans: Path) -> None:
    seen = {identity(scans, "folder")}
    (scans / "study" / "1" / "x.dcm").rename(scans / "study" / "1" / "z.dcm")
    seen.add(identity(scans, "folder"))
    (scans / "study" / "3").mkdir()
    (scans / "study" / "3" / "new.dcm").touch()
    seen.add(identity(scans, "folder"))
    (scans / "study" / "up").symlink_to(scans / "study")  # a circle ends
    seen.add(identity(scans, "folder"))
    (scans / "study" / "lost").symlink_to(scans / "nowhere")
    seen.add(identity(scans, "folder"))
    assert len(seen) >= 4


def test_what_the_list_says_of_the_case_counts(scans: Path) -> None:
    rules = SeriesRules(description=("t2",))
    others = [{"label": 0}, {"patient": "p"}, {"slice_label": [0, 1]}, {"series_rules": rules}]
    seen = {identity(scans, "file", **more) for more in ({}, *others)}
    assert len(seen) == 5
    again = identity(scans, "file", series_rules=SeriesRules(description=("t2",)))
    assert again in seen


def test_a_case_that_is_refused_before_it_is_read_has_one_too() -> None:
    def of(*given: Any, **facts: Any) -> str:
        return scan_identity({"case": "c", "refusal": Refusal(*given, **facts)})

    first = of("a", "sentence")
    assert of("a", "sentence") == first
    assert len({first, of("a", "other"), of("a", "sentence", found=[1]), of("a", "sentence", found=[2])}) == 4


def test_no_name_can_be_read_from_it(scans: Path) -> None:
    text = identity(scans, "file")
    assert len(text) == 64
    assert set(text) <= set("0123456789abcdef")
