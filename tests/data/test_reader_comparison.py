"""The comparison of readers judges right: hand-made outcomes first, then some readers through the command line."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from bundle.data.series import read_volume
from bundle.errors import InputError
from tests.data import dicom_factory as factory
from tests.data.comparison_oracle import judge_clean, judge_fault
from tests.data.comparison_tables import SUMMARY_COLUMNS, details, summary
from tests.data.dicom_clean import CLEAN
from tests.data.dicom_faults import FAULTS
from tests.data.fault_kinds import COUNT, OTHER
from tests.data.peer_process import Peer
from tests.data.peers import READERS
from tests.data.reader_comparison import END, START, replace_between
from tests.data.volume_oracle import Expected, differences

ROOT = Path(__file__).resolve().parents[2]
Volume = tuple[np.ndarray, np.ndarray]


@pytest.fixture
def good(tmp_path: Path) -> tuple[Volume, Expected]:
    """A right volume of eight slices and what is expected of it."""
    expected = CLEAN["CT: axial"].write(tmp_path / "good")
    volume = read_volume(tmp_path / "good")
    return (volume.array, volume.affine), expected


def shifted(volume: Volume, axis: int, voxels: float) -> Volume:
    array, affine = volume
    moved = affine.copy()
    moved[:3, 3] += moved[:3, axis] * voxels
    return array, moved


def flipped(volume: Volume, axis: int, with_affine: bool) -> Volume:
    """Turned round along one axis, and the affine with it or not."""
    array, affine = volume
    turned = affine.copy()
    if with_affine:
        turned[:3, 3] += turned[:3, axis] * (array.shape[axis] - 1)
        turned[:3, axis] *= -1
    return np.flip(array, axis), turned


def without(volume: Volume, first: int, last: int) -> Volume:
    array, affine = volume
    moved = affine.copy()
    moved[:3, 3] += moved[:3, 2] * first
    return array[:, :, first:last], moved


def test_a_right_volume_is_right_in_any_order_of_its_axes(good: tuple[Volume, Expected]) -> None:
    volume, expected = good
    assert judge_clean(expected, 0.006, [volume]) == "right"
    for axis in range(3):
        assert judge_clean(expected, 0.006, [flipped(volume, axis, True)]) == "right"
    array, affine = volume
    assert judge_clean(expected, 0.006, [(array.transpose(2, 0, 1), affine[:, [2, 0, 1, 3]])]) == "right"
    assert judge_clean(expected, 0.006, [(array[..., None], affine)]) == "right"
    # Whole numbers are what some readers round to.
    assert judge_clean(expected, 0.006, [(np.rint(array), affine)]) == "right"


def test_a_volume_that_disagrees_with_its_affine_is_wrong(good: tuple[Volume, Expected]) -> None:
    volume, expected = good
    array, affine = volume
    one_voxel = array.copy()
    one_voxel[3, 4, 5] += 2
    mixed = array.copy()
    mixed[:, :, ::2] += OTHER
    exchanged = array[:, :, [0, 1, 2, 4, 3, 5, 6, 7]]
    wrong = [
        *(flipped(volume, axis, False) for axis in range(3)),
        *(shifted(volume, axis, voxels) for axis in range(3) for voxels in (1, -1, 0.5)),
        (array, np.eye(4)),
        (array, np.full((4, 4), np.nan)),
        (array, np.diag([0.0, 1, 1, 1])),
        (one_voxel, affine),
        (mixed, affine),
        (exchanged, affine),
        (np.full_like(array, np.nan), affine),
        (np.delete(array, 4, axis=2), affine),
    ]
    for volume in wrong:
        assert judge_clean(expected, 0.006, [volume]) == "wrong"
        assert judge_fault(FAULTS["middle slice missing"], [volume]) == "wrong"


def test_a_volume_that_lacks_slices_or_is_one_of_several_is_partial(good: tuple[Volume, Expected]) -> None:
    volume, expected = good
    array, affine = volume
    coarse = affine.copy()
    coarse[:3, 2] *= 2
    for part in (without(volume, 0, 7), without(volume, 1, 8), without(volume, 3, 4), (array[:, :, ::2], coarse)):
        assert judge_clean(expected, 0.006, [part]) == "partial"
        assert judge_fault(FAULTS["middle slice missing"], [part]) == "partial"
    # The other of two contrasts, or of two series, chosen without being asked.
    assert judge_clean(expected, 0.006, [(array + OTHER, affine)]) == "partial"
    doubled = FAULTS["echo times: every place twice"]
    for one in (array, array + OTHER):
        assert judge_fault(doubled, [(one, affine)]) == "partial"


def test_all_of_it_and_right_is_accepted(good: tuple[Volume, Expected]) -> None:
    (array, affine), _ = good
    assert judge_fault(FAULTS["another patient's ID: first slice"], [(array, affine)]) == "accepted"
    doubled = FAULTS["echo times: every place twice"]
    both = np.stack([array, array + OTHER], axis=-1)
    assert judge_fault(doubled, [(both, affine)]) == "accepted"
    assert judge_fault(doubled, [(array, affine), (array + OTHER, affine)]) == "accepted"
    # Voxels say nothing of a screenshot: whoever returns it has accepted it.
    assert judge_fault(FAULTS["RGB capture"], [(array + 1000, np.eye(4))]) == "accepted"


def test_tilt_and_resampling_are_judged_where_there_are_images(tmp_path: Path) -> None:
    expected = CLEAN["CT: gantry tilt of 12°"].write(tmp_path / "s")
    volume = read_volume(tmp_path / "s")
    assert judge_clean(expected, 0.006, [(volume.array, volume.affine)]) == "right"
    upright = volume.affine.copy()
    upright[:3, 2] = [0, 0, 2.5]
    assert judge_clean(expected, 0.006, [(volume.array, upright)]) == "wrong"
    # An upright volume whose voxels outside the images are filled up with anything.
    larger = np.full((12, 14, 8), -999.0)
    larger -= differences(larger, upright)
    assert judge_clean(expected, 0.006, [(larger, upright)]) == "right"
    larger[:, 12:, 0] = 0.0
    assert judge_clean(expected, 0.006, [(larger, upright)]) == "right"
    larger[5, 5, 0] += 3
    assert judge_clean(expected, 0.006, [(larger, upright)]) == "wrong"


def test_padding_is_not_compared(tmp_path: Path) -> None:
    expected = CLEAN["CT: padding value"].write(tmp_path / "s")
    volume = read_volume(tmp_path / "s")
    assert judge_clean(expected, 0.006, [(volume.array, volume.affine)]) == "right"
    assert judge_clean(replace(expected, padding=None), 0.006, [(volume.array, volume.affine)]) == "wrong"


def test_every_fault_counts_the_slices_that_it_has(tmp_path: Path) -> None:
    """A volume of the truth, of as many slices as a fault says, is all that can be asked."""
    affine = np.diag([-1.0, -1.0, 1.0, 1.0])
    for fault in FAULTS.values():
        slices = fault.slices or COUNT
        array = np.zeros((12, 10, slices))
        array = array - differences(array, affine)
        assert judge_fault(fault, [(array, affine)]) == "accepted"
        if fault.slices is not None:
            assert judge_fault(fault, [(array[:, :, 1:], affine + 0)]) != "accepted"


READ_BODIES = """
import json, pathlib, sys
import numpy as np
from tests.data import peer_process

for body in sys.stdin.read().splitlines():
    if body.startswith("time."):
        peer_process.SECONDS = 0.2
    names = {"volume": (np.zeros((2, 2, 2)), np.eye(4))}
    exec("import logging, os, sys, time, warnings\\ndef read(folder, policy):\\n    " + body, names)
    out = pathlib.Path(sys.argv[1])
    answer = peer_process._one(names["read"], out, None, out)
    print(json.dumps([answer["kind"], answer["said"]]))
"""


def test_crashes_hangs_and_words_are_outcomes(tmp_path: Path) -> None:
    """In the process of a peer: an exception, a warning, a line on stderr, an end by signal, a wait, a bomb."""
    bodies = {
        "return [volume]": ["volumes", []],
        "warnings.warn('odd'); return [volume]": ["volumes", ["UserWarning: odd"]],
        "logging.warning('odd'); return [volume]": ["volumes", ["log: odd"]],
        "os.write(2, b'odd\\n'); return [volume]": ["volumes", ["stderr: odd"]],
        "print('well'); print('Warning: odd'); return [volume]": ["volumes", ["stdout: Warning: odd"]],
        "raise ValueError('no')": ["refused", []],
        "sys.exit(3)": ["refused", []],
        "os.kill(os.getpid(), 6)": ["crashed", []],
        "return [(bytearray(1 << 40), None)]": ["refused", []],
        "time.sleep(60)": ["timed out", []],
    }
    done = subprocess.run(
        [sys.executable, "-c", READ_BODIES, str(tmp_path)],
        input="\n".join(bodies), capture_output=True, text=True, cwd=ROOT, check=True,
    )  # fmt: skip
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert dict(zip(bodies, found, strict=True)) == bodies


def test_tables_count_and_merge() -> None:
    rows = [
        ("a: first slice", ["refused", "wrong"]),
        ("a: last slice", ["refused", "partial, told"]),
        ("b", ["refused", "refused"]),
    ]
    table = summary("Faults", ["one", "two"], [row for _, row in rows]).splitlines()
    heads = [cell.strip() for cell in table[0].split("|")[2:-1]]
    counts = {
        line.split("|")[1].strip(): dict(zip(heads, [int(c) for c in line.split("|")[2:-1]], strict=True))
        for line in table[2:]
    }
    assert sum(counts["two"].values()) == 3
    assert counts["one"]["refused"] == 3
    assert counts["two"] | {"refused": 1, "wrong, silent": 1, "partial, told": 1} == counts["two"]
    lines = details("Fault", ["one", "two"], rows).splitlines()
    assert lines[2:] == ["| a | refused | partial, told; wrong |", "| b | refused | refused |"]
    assert details("Fault", ["one", "two"], rows, leave_out="refused").count("\n") == 2
    assert len(set(SUMMARY_COLUMNS)) == len(SUMMARY_COLUMNS)


def test_a_page_is_changed_between_its_markers_only() -> None:
    page = f"# Title\n\n{START}\nold\n{END}\n\nmore\n"
    new = replace_between(page, "| a |")
    assert new == f"# Title\n\n{START}\n| a |\n{END}\n\nmore\n"
    assert replace_between(new, "| a |") == new
    for broken in ("# Title\n", f"{END}\n{START}\n", f"{START}\n{START}\n{END}\n"):
        with pytest.raises(InputError, match="begin"):
            replace_between(broken, "")


def test_every_reader_reads_a_plain_series(tmp_path: Path) -> None:
    """Else its column would say more of this script than of the reader; two here, the others take longer to import."""
    expected = CLEAN["MR: oblique"].write(tmp_path / "s")
    for name in ("dicom2nifti", "dcm2niix"):
        peer = Peer(name, tmp_path / "out")
        outcome = peer.read(tmp_path / "s")
        peer.close()
        assert judge_clean(expected, 0.006, outcome.volumes) == "right", name
    assert len(READERS) == 7


def test_the_command_line_compares_and_keeps_the_table(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"before\n{START}\n{END}\nafter\n")
    command = [ROOT / "scripts" / "compare_readers", "--only", "[mru][iap]* slice missing", "--out", page]
    done = subprocess.run(
        [*map(str, command), "--readers", "this reader", "SimpleITK", "dcm2niix"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    text = page.read_text()
    assert text.startswith(f"before\n{START}\n")
    assert text.endswith(f"{END}\nafter\n")
    assert re.search(r"^\| middle slice missing \| refused \| wrong, told \| wrong, told \|$", text, re.MULTILINE)
    assert re.search(r"^\| this reader \| 2 \|( 0 \|)+$", text, re.MULTILINE)
    assert "SimpleITK 2" in text


def test_the_factory_would_notice_a_reader_that_ignores_the_direction(tmp_path: Path) -> None:
    """The oracle's gradient differs along each axis: no exchange or turn of axes gives the same values."""
    slopes = np.abs(factory.GRADIENT)
    assert len(set(slopes)) == 3
    assert slopes.min() > 0.1
