"""`python -m MODULE …` as a fork of a process that has imported what every command imports.

Starting Python and importing torch and MONAI is most of the time of a command on a tiny cohort. All else is as in a
process of its own: arguments, environment, folder, streams, exit status, what runs at exit. Tests whose subject is the
process (kills, packages alone on the path, thread counts) and the fixtures `cohort` and `trained` start real ones.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
IMPORTED = ("bundle", "fire", "monai.bundle", "torch.utils.tensorboard")

_context = multiprocessing.get_context("forkserver")


def run_module(
    module: str, *arguments: str | Path, environment: Mapping[str, str] | None = None, timeout: float = 240
) -> subprocess.CompletedProcess[str]:
    """Run `python -m module arguments` in the repository root and wait for its end.

    Args:
        module: of the repository, or `monai.bundle`.
        arguments: of its command line.
        environment: of the process; None for this one's.
        timeout: seconds.

    Raises:
        subprocess.TimeoutExpired: it has been killed.
    """
    _context.set_forkserver_preload(list(IMPORTED))
    argv = [module, *map(str, arguments)]
    with tempfile.TemporaryDirectory() as folder:
        streams = [Path(folder) / name for name in ("stdout", "stderr")]
        process = _context.Process(target=_run, args=(argv, dict(environment or os.environ), streams))
        process.start()
        process.join(timeout)
        if process.exitcode is None:
            process.kill()
            process.join()
            raise subprocess.TimeoutExpired(argv, timeout)
        out, err = (path.read_text(encoding="utf-8") for path in streams)
        return subprocess.CompletedProcess(argv, process.exitcode, out, err)


def _run(argv: list[str], environment: dict[str, str], streams: list[Path]) -> None:
    """In the child."""
    for number, path in enumerate(streams, start=1):
        file = os.open(path, os.O_WRONLY | os.O_CREAT)
        os.dup2(file, number)
        os.close(file)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(ROOT)
    sys.path.insert(0, str(ROOT))
    sys.argv = argv  # the first is replaced by the path of the module
    try:
        runpy.run_module(argv[0], run_name="__main__", alter_sys=True)
    except SystemExit:
        raise
    except BaseException:
        # multiprocessing prints the trace itself, and a command may have set another way.
        sys.excepthook(*sys.exc_info())
        raise SystemExit(1) from None
    finally:
        atexit._run_exitfuncs()  # multiprocessing passes over them
