"""Compressed DICOM frames → stored pixels, decoded in a child process.

Codecs are C and C++ code that reads what strangers wrote: a frame can end the process (GDCM 3.2.6 does so by an
uncaught exception where a JPEG-LS frame is smaller than the header says), hang, or ask for all memory. Here only the
child pays. It is started on the first use, serves all later ones, and is replaced after a failure. It is no child of
multiprocessing, which a data-loading worker may not have; what comes back is shape, type and plain bytes.
"""

from __future__ import annotations

import atexit
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from ..errors import Refusal
from .decoder_process import MAX_FRAME_PIXELS, REQUEST_FRAMES, corrupt, limit
from .dicom_parse import (
    stamp,
    unreadable,
)

__all__ = ["decode_frames"]

Frame = NDArray[np.integer]

# A frame takes from 1 ms (512², RLE) to 0.3 s (2048², JPEG 2000); the constant part is for disks that sleep.
SECONDS, SECONDS_PER_FRAME = 60.0, 2.0
START_SECONDS = 60.0  # 0.4 s on a local disk; installations on a network disk have taken 30 s
EXIT_SECONDS = 2.0  # between the end of the pipe and the end of the process
TYPES = frozenset(np.dtype(kind).str for kind in ("u1", "i1", "u2", "i2", "u4", "i4"))
MAX_MESSAGE_BYTES = 2**16

# Where modules are found is told by the parent: the folder above this package first, wherever the program was started.
PROGRAM = """
import json, sys
sys.path[:] = json.loads(sys.argv[1])
from bundle.data.decoder_process import serve
serve()
"""


class _Ended(Exception):
    """The child has closed its pipe, or what came through it is no message."""


class _Child:
    """One child process, which answers one request at a time."""

    def __init__(self, program: str, start_seconds: float) -> None:
        paths = [str(Path(__file__).resolve().parents[2]), *filter(None, sys.path)]
        one_thread = {f"{name}_NUM_THREADS": "1" for name in ("OMP", "OPENBLAS", "MKL")}
        self.process = subprocess.Popen(
            [sys.executable, "-c", program, json.dumps(paths)],
            bufsize=0,  # a buffer would be written twice after a fork
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,  # codecs quote what they read
            env={**os.environ, **one_thread},
            creationflags=getattr(subprocess, "CREATE_NO_WINDOW", 0),
        )
        self.late = False
        try:
            self._timed(start_seconds, self._message)
        except BaseException:
            self.end()
            raise

    def ask(self, request: dict[str, Any], seconds: float) -> tuple[list[Frame], Refusal | None]:
        """The frames that came, and why no more did; fewer than asked for and no reason means: ask again."""
        frames: list[Frame] = []

        def talk() -> Refusal | None:
            message = json.dumps(request).encode()
            self._pipe(self.process.stdin).write(len(message).to_bytes(4, "big") + message)
            while True:
                answer = self._message()
                if "refusal" in answer:
                    return Refusal(answer["refusal"], answer["sentence"], **answer["facts"])
                if "done" in answer:
                    return None
                frames.append(self._frame(answer))

        return frames, self._timed(seconds, talk)

    def _timed(self, seconds: float, action: Any) -> Any:
        timer = threading.Timer(seconds, self._too_late)
        timer.daemon = True
        timer.start()
        try:
            return action()
        except (OSError, ValueError, KeyError, TypeError) as error:  # a broken pipe, or garbage in it
            raise _Ended from error
        finally:
            timer.cancel()

    def _too_late(self) -> None:
        self.late = True
        self.process.kill()

    @staticmethod
    def _pipe(pipe: IO[bytes] | None) -> IO[bytes]:
        assert pipe is not None
        return pipe

    def _fill(self, buffer: memoryview) -> None:
        while buffer:
            count = self._pipe(self.process.stdout).readinto(buffer)  # type: ignore[attr-defined]
            if not count:
                raise _Ended
            buffer = buffer[count:]

    def _message(self) -> dict[str, Any]:
        head = bytearray(4)
        self._fill(memoryview(head))
        length = int.from_bytes(head, "big")
        if length > MAX_MESSAGE_BYTES:
            raise _Ended
        body = bytearray(length)
        self._fill(memoryview(body))
        return dict(json.loads(body))

    def _frame(self, answer: dict[str, Any]) -> Frame:
        rows, columns = answer["shape"]
        if answer["type"] not in TYPES or not 0 < rows * columns <= MAX_FRAME_PIXELS:
            raise _Ended
        frame: Frame = np.empty((rows, columns), dtype=answer["type"])
        self._fill(frame.data.cast("B"))
        return frame

    def end(self) -> None:
        """Kill the process, if it still runs."""
        self.process.kill()
        self.process.wait()
        self._close()

    def forget(self) -> None:
        """Let go of a process that is the child of another one, from which this was forked."""
        self.process.returncode = 0  # or Popen would wait for a child that is not ours
        self._close()  # our copies of the pipes: with them open the child would outlive its parent

    def _close(self) -> None:
        for pipe in (self.process.stdin, self.process.stdout):
            self._pipe(pipe).close()


class _Decoder:
    """The child of this process, if it has one, and its time limits (seconds; tests lower them)."""

    def __init__(self, program: str = PROGRAM, seconds: float = SECONDS, start_seconds: float = START_SECONDS) -> None:
        self.program, self.seconds, self.start_seconds = program, seconds, start_seconds
        self.child: _Child | None = None
        self.lock = threading.Lock()
        atexit.register(self.close)
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=self._forked)

    def _forked(self) -> None:
        self.lock = threading.Lock()  # another thread of the parent may hold the old one, for ever
        if self.child is not None:
            self.child.forget()
            self.child = None

    def close(self) -> None:
        """End the child; the next decoding starts another."""
        child, self.child = self.child, None
        if child is not None:
            child.end()

    def decode(self, path: Path, frames: Sequence[int]) -> Iterator[Frame]:
        try:
            file = {"path": str(path.absolute()), "stamp": stamp(path)}
        except OSError as error:
            raise unreadable() from error
        numbers = [int(frame) for frame in frames]
        while numbers:
            # The lock is not held while a frame is looked at: that may decode another file, or never end.
            with self.lock:
                found = self._ask({**file, "frames": numbers[:REQUEST_FRAMES]})
            numbers = numbers[len(found) :]
            yield from found

    def _ask(self, request: dict[str, Any]) -> list[Frame]:
        if self.child is not None and self.child.process.poll() is not None:
            self.close()  # it ended while idle, by no fault of this file
        if self.child is None:
            self.child = self._start()
        frames: list[Frame] = []
        try:
            seconds = self.seconds + SECONDS_PER_FRAME * len(request["frames"])
            frames, refusal = self.child.ask({**request, "seconds": int(seconds) + 10}, seconds)
        except _Ended:
            refusal = self._reason(self.child)
        except BaseException:  # an interrupt leaves half an answer in the pipe
            self.close()
            raise
        if refusal is None and not 0 < len(frames) <= len(request["frames"]):
            refusal = corrupt("crash")
        if refusal is not None:
            self.close()
            raise refusal
        return frames

    def _start(self) -> _Child:
        try:
            return _Child(self.program, self.start_seconds)
        except (_Ended, OSError, TypeError, ValueError) as error:  # TypeError: no executable is known
            raise Refusal(
                "decoder_unavailable",
                "The process that decodes compressed images could not be started; check that Python can start "
                "processes here and that NumPy and pydicom are installed, or send the series uncompressed.",
            ) from error

    def _reason(self, child: _Child) -> Refusal:
        self.child = None
        try:
            status = child.process.wait(EXIT_SECONDS)
        except subprocess.TimeoutExpired:  # it lives, but what it wrote made no sense
            status = 1
        child.end()
        if child.late:
            return limit("time")
        # Nobody else kills a process so: the system does, when memory is short.
        return limit("memory") if status == -getattr(signal, "SIGKILL", 0) else corrupt("crash")


_decoder = _Decoder()


def decode_frames(path: Path, frames: Sequence[int]) -> Iterator[Frame]:
    """Decode compressed frames of one grey-scale DICOM file.

    The values are those of `pydicom.pixels.pixel_array(dataset, index=i, raw=True)`: stored values, sign and unused
    bits corrected as pydicom does by default. What the codestream says of its size is held against the header first.

    Args:
        path: a DICOM file with encapsulated pixel data.
        frames: numbers of frames, from 0, in the order wanted.

    Yields:
        For each frame (rows, columns) integers of BitsAllocated bits.

    Raises:
        Refusal: `pixel_data_corrupt` (the fact `reason`: frames, codestream, size, codec, values, crash),
            `decode_limit` (`reason`: size, time, memory), `decoder_unavailable`, `transfer_syntax`, `file_changed`, and
            what `dicom_tags` raises: `unreadable_file`, `bad_tag`, `too_large`.
    """
    yield from _decoder.decode(path, frames)
