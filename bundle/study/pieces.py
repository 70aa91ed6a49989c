"""Many pieces: one after another, on several processes, or a chosen one for a job array; stopped and gone on with."""

from __future__ import annotations

import logging
import math
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from monai.bundle import ConfigParser
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tqdm import tqdm

from ..errors import InputError
from .piece import BUSY, Piece, piece_result

__all__ = [
    "do_pieces",
    "done_pieces",
    "duration",
    "ended_with_us",
    "last_words",
    "piece_command",
    "probe_seconds",
    "projected_seconds",
    "start",
]

POLL_SECONDS = 0.2
# A mistake in the settings of an arm, or a training that diverges, fails its other pieces in the same way.
FAILURES_OF_AN_ARM = 3
PACKAGE = Path(__file__).resolve().parents[1]


def done_pieces(pieces: Sequence[Piece]) -> dict[Path, dict[str, Any]]:
    """Folder → result of the pieces that are done, in their order."""
    found = {piece.folder: piece_result(piece) for piece in pieces}
    return {folder: result for folder, result in found.items() if result is not None}


def do_pieces(
    pieces: Sequence[Piece],
    processes: int = 1,
    progress: bool = True,
    command: Callable[[Piece], list[str]] | None = None,
) -> None:
    """Do the pieces that are not done, each in a process of its own, and show how far it is.

    Args:
        pieces: in the order in which they are begun.
        processes: at once; each gets its share of the processor's cores.
        progress: show a bar.
        command: of the process for a piece; None for the real one.

    Raises:
        InputError: pieces failed. The others are done all the same, but of an arm (the folder above) of which three
            failed no more are begun.
    """
    if processes < 1:
        raise InputError(f"--processes must be at least 1, not {processes}")
    done = done_pieces(pieces)
    waiting = [piece for piece in pieces if piece.folder not in done]
    for piece in waiting:
        piece.folder.mkdir(parents=True, exist_ok=True)
        piece.save()
    running: dict[Path, subprocess.Popen[bytes]] = {}
    failed: dict[Path, str] = {}
    elsewhere, not_begun = 0, 0
    bar = tqdm(total=len(pieces), initial=len(done), desc="pieces", unit="piece", disable=not progress)
    with bar, ended_with_us(running):
        while running or waiting:
            while waiting and len(running) < processes:
                piece = waiting.pop(0)
                if sum(folder.parent == piece.folder.parent for folder in failed) >= FAILURES_OF_AN_ARM:
                    not_begun += 1
                else:
                    running[piece.folder] = start(piece, processes, command or piece_command)
            time.sleep(POLL_SECONDS)
            for folder, process in list(running.items()):
                status = process.poll()
                if status is None:
                    continue
                del running[folder]
                if status == BUSY:
                    elsewhere += 1
                elif status != 0:
                    failed[folder] = last_words(folder, status)
                    bar.write(f"failed: {folder}: {failed[folder]}", file=sys.stderr)
                bar.update(1)
    if failed:
        folder, told = next(iter(failed.items()))
        left = f", {not_begun} were not begun" if not_begun else ""
        raise InputError(f"pieces failed: {len(failed)}{left}; the first: {told} (more in {folder / 'log.txt'})")
    if elsewhere:
        logging.getLogger(__name__).warning(
            "pieces that another process is doing: %d; run the same command again when it has ended", elsewhere
        )


@contextmanager
def ended_with_us(running: Mapping[Path, subprocess.Popen[bytes]]) -> Iterator[None]:
    """Let no process outlive this one, be it interrupted or terminated, as by a scheduler; pieces go on later."""
    ours = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM)) if ours else None
    try:
        yield
    finally:
        for process in running.values():
            process.terminate()
        for process in running.values():
            process.wait()
        if ours:
            signal.signal(signal.SIGTERM, before)


def piece_command(piece: Piece) -> list[str]:
    """The command that does a piece in a process of its own."""
    return [sys.executable, "-m", f"{PACKAGE.name}.study.piece", str(piece.folder)]


def start(piece: Piece, processes: int, command: Callable[[Piece], list[str]]) -> subprocess.Popen[bytes]:
    """Begin a command for a piece, its output added to the piece's log; it gets its share of the cores."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    path = os.pathsep.join(filter(None, [str(PACKAGE.parent), os.environ.get("PYTHONPATH")]))
    environment = {"OMP_NUM_THREADS": str(max(1, cores // processes)), **os.environ, "PYTHONPATH": path}
    with (piece.folder / "log.txt").open("ab") as log:
        return subprocess.Popen(command(piece), env=environment, stdout=log, stderr=subprocess.STDOUT)


def last_words(folder: Path, status: int) -> str:
    """Why a piece failed: the sentence of the error in its log, or how its process ended."""
    lines = (folder / "log.txt").read_text(encoding="utf-8", errors="replace").strip().splitlines()
    told = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    if status == 2 and told:
        return told[-1]
    if status < 0:
        return f"its process was ended by signal {-status} (9: perhaps for want of memory)"
    return lines[-1] if lines else f"its process ended with status {status}"


def duration(seconds: float) -> str:
    """For people: minutes below two hours, else hours."""
    return f"{math.ceil(seconds / 60)} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def projected_seconds(pieces: Sequence[Piece], done: Mapping[Path, Mapping[str, Any]], processes: int) -> float:
    """What the pieces that are not done will take on this many processes, by those that are done.

    A piece is held to take the mean of those of its arm (the folder above), else what its epochs take by the mean
    time an epoch of all. Those that were interrupted have no time; NaN where none has.
    """
    by_arm: dict[Path, list[float]] = {}
    for folder, result in done.items():
        if result["seconds"] is not None:
            by_arm.setdefault(folder.parent, []).append(float(result["seconds"]))
    timed = [piece for piece in pieces if piece.folder.parent in by_arm and _has_time(done.get(piece.folder))]
    if not timed:
        return math.nan
    an_epoch = sum(done[piece.folder]["seconds"] for piece in timed) / sum(map(_epochs, timed))
    total = 0.0
    for piece in pieces:
        if piece.folder not in done:
            group = by_arm.get(piece.folder.parent)
            total += sum(group) / len(group) if group else an_epoch * _epochs(piece)
    return total / processes


def _has_time(result: Mapping[str, Any] | None) -> bool:
    return result is not None and result["seconds"] is not None


def _epochs(piece: Piece) -> float:
    """Epochs of a piece; one of its pre-training, which looks at each slice twice, counts as two."""
    found = [piece.config["max_epochs"]]
    if piece.pretrain is not None:
        settings = {"max_epochs": found[0]}
        for file in piece.pretrain.config_files:
            settings.update(ConfigParser.load_config_file(file))
        found.append({**settings, **piece.pretrain.settings}["max_epochs"])
    wrong = [epochs for epochs in found if not isinstance(epochs, (int, float))]
    if wrong:
        raise InputError(f"max_epochs must be a whole number, not {wrong[0]!r}")
    return float(sum(weight * epochs for weight, epochs in zip((1, 2), found, strict=False)))


def probe_seconds(pieces: Sequence[Piece], processes: int = 1) -> float:
    """Seconds that pieces are likely to take, from two epochs of the training of the first in a folder deleted again.

    What it prepares stays in the cache and is not prepared again. All are held to take as long an epoch as the first.

    Args:
        pieces: that are not done, at least one.
        processes: that will share the cores, and the pieces.

    Raises:
        InputError: the training fails.
    """
    epochs = [_epochs(piece) for piece in pieces]  # first, as a mistake in them should not take two epochs to show
    with tempfile.TemporaryDirectory() as folder:
        # Its clock is that of the events, whatever the training itself writes.
        short = {"max_epochs": 2, "warmup_epochs": 0, "log::tensorboard": True}
        probe = Piece(Path(folder), pieces[0].config_files, {**pieces[0].settings, **short})
        probe.save()
        begun = time.monotonic()
        process = start(probe, processes, lambda piece: [*piece_command(piece), "train"])
        with ended_with_us({probe.folder: process}):
            status = process.wait()
        if status:
            raise InputError(f"a training of two epochs failed: {last_words(probe.folder, status)}")
        seconds = time.monotonic() - begun
        events = EventAccumulator(str(probe.folder / "events")).Reload()
        first, second = (event.wall_time for event in events.Scalars("train_loss"))
    an_epoch = second - first
    return sum(seconds + an_epoch * (number - 2) for number in epochs) / processes
