"""Readers in processes of their own, so that a crash, a bomb or a hang is an outcome like others.

One process a reader imports it once and forks for every case; the fork has a limit of memory and time.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import resource
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["Outcome", "Peer"]

SECONDS = 20.0
MEMORY = 4 << 30  # bytes above what the imports take
SAYS_TROUBLE = re.compile(r"warn|error|fail|invalid|unable|could not|missing|not supported|exit status", re.IGNORECASE)


@dataclass
class Outcome:
    """What became of one folder: kind is volumes, refused, crashed or timed out; said is what a program could catch."""

    kind: str
    volumes: list[tuple[NDArray[Any], NDArray[np.float64]]] = field(default_factory=list)
    said: frozenset[str] = frozenset()
    detail: str = ""


class Peer:
    """A reader in its own process."""

    def __init__(self, name: str, scratch: Path) -> None:
        self.name = name
        self.out = scratch / re.sub(r"\W+", "_", name)
        self.out.mkdir(parents=True, exist_ok=True)
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.data.peer_process", name, str(self.out)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        )  # fmt: skip

    def read(self, folder: Path, group: str = "", case: str = "") -> Outcome:
        """Read a folder; `group` and `case` name the fault or clean variant whose policy holds."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps({"folder": str(folder), "group": group, "case": case}) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"the process of {self.name} ended")
        answer = json.loads(line)
        volumes = []
        for k in range(answer["volumes"]):
            with np.load(self.out / f"{k}.npz", allow_pickle=False) as file:
                volumes.append((file["array"], file["affine"]))
        said = frozenset(_plain_words(text, folder) for text in answer["said"])
        return Outcome(answer["kind"], volumes, said - {""}, answer["detail"])

    def close(self) -> None:
        """End the process."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()


def _plain_words(text: str, folder: Path) -> str:
    """A message without what differs from case to case."""
    return re.sub(r"0x[0-9a-f]+|-?\d+(\.\d+)?(e[-+]\d+)?", "#", text.replace(str(folder), "FOLDER"))[:200].strip()


# --- in the reader's process ---


def _serve(name: str, out: Path) -> None:
    channel = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what imports print is no answer
    from tests.data.peers import OURS, READERS

    read = READERS[name][0]()
    policies: Callable[[str, str], Any] = _no_policy
    if name == OURS:
        from tests.data.dicom_faults import CLEAN, FAULTS

        def policies(group: str, case: str) -> Any:
            if not group:
                return None
            return FAULTS[case].policy if group == "fault" else CLEAN[case].policy

    for line in sys.stdin:
        request = json.loads(line)
        policy = policies(request["group"], request["case"])
        channel.write(json.dumps(_one(read, Path(request["folder"]), policy, out)) + "\n")
        channel.flush()


def _no_policy(group: str, case: str) -> Any:
    return None


def _one(read: Callable[[Path, Any], Any], folder: Path, policy: Any, out: Path) -> dict[str, Any]:
    for path in out.iterdir():
        path.unlink()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            _in_child(read, folder, policy, out)
            status = 0
        finally:
            os._exit(status)
    deadline, finished, status = time.monotonic() + SECONDS, 0, 0
    while not finished:
        finished, status = os.waitpid(child, os.WNOHANG)
        if not finished and time.monotonic() > deadline:
            os.killpg(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return {"kind": "timed out", "volumes": 0, "said": [], "detail": f"{SECONDS:.0f} s"}
        time.sleep(0.002)
    answer = out / "answer.json"
    if status != 0 or not answer.exists():
        return {"kind": "crashed", "volumes": 0, "said": [], "detail": f"wait status {status}"}
    found: dict[str, Any] = json.loads(answer.read_text())
    for stream, every_line in (("stderr", True), ("stdout", False)):
        for text in (out / stream).read_text(errors="replace").splitlines():
            if text.strip() and (every_line or SAYS_TROUBLE.search(text)):
                found["said"].append(f"{stream}: {text}")
    return found


def _in_child(read: Callable[[Path, Any], Any], folder: Path, policy: Any, out: Path) -> None:
    os.setsid()  # so that its own children end with it
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(out / name, os.O_WRONLY | os.O_CREAT), number)
    sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
    said: list[str] = []
    _listen(said)
    answer: dict[str, Any] = {"kind": "volumes", "volumes": 0, "detail": ""}
    try:
        for k, (array, affine) in enumerate(read(folder, policy)):
            np.savez(out / f"{k}.npz", array=array, affine=affine)
            answer["volumes"] = k + 1
    except BaseException as error:
        answer = {"kind": "refused", "volumes": 0, "detail": f"{type(error).__name__}: {error}"[:300]}
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):
            stream.flush()
    (out / "answer.json").write_text(json.dumps({**answer, "said": said}))


def _listen(said: list[str]) -> None:
    warnings.simplefilter("always")

    def show(message: Warning | str, category: type[Warning], *rest: object, **more: object) -> None:
        said.append(f"{category.__name__}: {message}")

    warnings.showwarning = show

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            said.append(f"log: {record.getMessage()}")

    logging.getLogger().addHandler(Listener(level=logging.WARNING))


if __name__ == "__main__":
    _serve(sys.argv[1], Path(sys.argv[2]))
