"""Every fault and every clean variant × this project's reader and those of others, as tables in Markdown."""

from __future__ import annotations

import argparse
import datetime
import fnmatch
import platform
import shutil
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from bundle.data.policy import ReaderPolicy
from bundle.errors import InputError, command_line
from bundle.files import replacing

from .comparison_oracle import judge_clean, judge_fault
from .comparison_tables import details, summary
from .dicom_faults import CLEAN, FAULTS
from .peer_process import Outcome, Peer
from .peers import READERS, packages_of
from .volume_oracle import Expected

__all__ = ["Case", "main", "replace_between"]

START, END = "<!-- comparison: begin -->", "<!-- comparison: end -->"
# What a reader says of a good series too says nothing about a fault.
ORDINARY = ("CT: axial", "MR: axial")


@dataclass(frozen=True)
class Case:
    """One folder to read: a fault in one modality, or a clean variant."""

    group: str
    name: str
    modality: str
    folder: Path
    expected: Expected | None = None


def written(scratch: Path, pattern: str) -> list[Case]:
    """Write the folders of all cases whose name fits."""
    cases: list[Case] = []
    # Only this reader has a policy: what only a policy forbids or finds is no question to the others.
    common = ReaderPolicy()
    for fault in FAULTS.values():
        asked = fault.policy == common and fnmatch.fnmatch(fault.name, pattern)
        for modality in fault.modalities if asked else ():
            folder = scratch / f"{len(cases):04d}"
            fault.write(folder, modality)
            cases.append(Case("fault", fault.name, modality, folder))
    for variant in CLEAN.values():
        if variant.policy.series != common.series:
            continue
        if fnmatch.fnmatch(variant.name, pattern) or variant.name in ORDINARY:
            folder = scratch / f"{len(cases):04d}"
            cases.append(Case("clean", variant.name, variant.modality, folder, variant.write(folder)))
    return cases


def verdict(case: Case, outcome: Outcome, ordinary: frozenset[str]) -> str:
    """One of OUTCOMES; wrong and partial with ", told" where the reader said anything beyond the ordinary."""
    if outcome.kind != "volumes":
        return outcome.kind
    if case.expected is None:
        judged = judge_fault(FAULTS[case.name], outcome.volumes)
    else:
        judged = judge_clean(case.expected, CLEAN[case.name].tolerance, outcome.volumes)
    told = judged in ("wrong", "partial") and bool(outcome.said - ordinary)
    return f"{judged}, told" if told else judged


def run_reader(name: str, cases: Sequence[Case], scratch: Path, bar: tqdm[Any]) -> list[str]:
    """The verdict on each case, in order."""

    def judged(case: Case) -> str:
        found = verdict(case, _read(peer, case), ordinary)
        bar.update()
        return found

    peer = Peer(name, scratch)
    try:
        ordinary = frozenset[str]().union(*(peer.read(c.folder).said for c in cases if c.name in ORDINARY))
        return [judged(case) for case in cases]
    finally:
        peer.close()


def _read(peer: Peer, case: Case) -> Outcome:
    outcome = peer.read(case.folder, case.group, case.name)
    # A busy machine can take a reader's time too: only who is late twice is late.
    return peer.read(case.folder, case.group, case.name) if outcome.kind == "timed out" else outcome


def heading(readers: Sequence[str], faults: int, clean: int) -> str:
    """What was measured, with what and when."""
    versions = ", ".join(dict.fromkeys(package for name in readers for package in packages_of(name)))
    return (
        f"Measured on {datetime.date.today()} by `scripts/compare_readers` with Python {platform.python_version()}: "
        f"{faults} faulty and {clean} clean folders; {versions}."
    )


def replace_between(text: str, table: str) -> str:
    """Put a table between the two markers of a page."""
    if text.count(START) != 1 or text.count(END) != 1 or text.index(START) > text.index(END):
        raise InputError(f"the page must hold one line {START} and after it one line {END}")
    before, after = text.split(START)[0], text.split(END)[1]
    return f"{before}{START}\n{table}\n{END}{after}"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="scripts/compare_readers", description=__doc__)
    parser.add_argument("--out", type=Path, help="a Markdown page whose part between two markers is replaced")
    parser.add_argument("--only", default="*", help="pattern of the names of faults and clean variants")
    parser.add_argument("--readers", nargs="+", default=list(READERS), choices=list(READERS), metavar="NAME")
    parser.add_argument("--jobs", type=int, default=2, help="readers that run at a time")
    given = parser.parse_args(arguments)
    if given.jobs < 1:
        raise InputError(f"--jobs must be 1 or more, not {given.jobs}")
    if given.out is not None and not given.out.is_file():
        raise InputError(f"there is no page {given.out}")
    page = None if given.out is None else replace_between(given.out.read_text(), "")
    scratch = Path(tempfile.mkdtemp(prefix="readers-"))
    try:
        cases = written(scratch, given.only)
        if all(case.name in ORDINARY and not fnmatch.fnmatch(case.name, given.only) for case in cases):
            raise InputError(f"--only {given.only}: no fault and no clean variant is called so")
        bar = tqdm(total=len(cases) * len(given.readers), desc="reading folders", disable=None)
        with bar, ThreadPoolExecutor(given.jobs) as pool:
            columns = list(pool.map(lambda name: run_reader(name, cases, scratch / "out", bar), given.readers))
    finally:
        shutil.rmtree(scratch)
    found = [(c.group, c.name, row) for c, row in zip(cases, zip(*columns, strict=True), strict=True)]
    faults = [(name, row) for group, name, row in found if group == "fault"]
    clean = [(name, row) for group, name, row in found if group == "clean"]
    table = "\n\n".join(
        [
            heading(given.readers, len(faults), len(clean)),
            summary("Faulty folders", given.readers, [row for _, row in faults]),
            summary("Clean folders", given.readers, [row for _, row in clean]),
            details("Fault", given.readers, faults),
            details("Clean variant that a reader did not get right", given.readers, clean, leave_out="right"),
        ]
    )
    if page is None:
        print(table)
    else:
        with replacing(given.out) as path:
            path.write_text(replace_between(page, table))
    return 0


if __name__ == "__main__":
    command_line(lambda: main(sys.argv[1:]))
