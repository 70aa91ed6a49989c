"""One sentence, no stack trace: at a script's end, in a config's run, and through workers."""

import copy
import os
import pickle
import subprocess
import sys

import pytest

from bundle.errors import InputError, Refusal, command_line, input_error_behind, plain_errors


def raised(error, cause=None, context=None):
    """The error with what it was raised from or during."""
    error.__cause__, error.__context__ = cause, context
    return error


def test_a_refusal_survives_workers():
    refusal = Refusal("missing_slices", "two slices are missing", count=2, positions=[1.5, 3.0])
    for other in (pickle.loads(pickle.dumps(refusal)), copy.deepcopy(refusal)):
        assert (other.code, other.sentence, other.facts) == (refusal.code, refusal.sentence, refusal.facts)
        assert str(other) == "two slices are missing"
        assert isinstance(other, InputError)
        assert isinstance(other, ValueError)


def test_the_input_error_is_found_behind_others():
    wrong = InputError("lr must be a number")
    assert input_error_behind(wrong) is wrong
    assert input_error_behind(raised(RuntimeError("wrapped"), cause=wrong)) is wrong
    assert input_error_behind(raised(RuntimeError("wrapped"), context=wrong)) is wrong
    twice = raised(RuntimeError("outer"), cause=raised(RuntimeError("inner"), cause=wrong))
    assert input_error_behind(twice) is wrong
    assert input_error_behind(ZeroDivisionError()) is None
    assert input_error_behind(None) is None


def test_a_circle_of_causes_ends():
    first, second = RuntimeError(), RuntimeError()
    first.__cause__, second.__cause__ = second, first
    assert input_error_behind(first) is None


def fail(error):
    def main():
        raise error

    return main


@pytest.mark.parametrize(
    ("main", "status", "told"),
    [
        (lambda: None, 0, ""),
        (lambda: 0, 0, ""),
        (lambda: 3, 3, ""),
        (fail(InputError("there is no folder x")), 2, "error: there is no folder x\n"),
        (fail(Refusal("code", "a slice is missing")), 2, "error: a slice is missing\n"),
        (fail(KeyboardInterrupt()), 130, "interrupted; run the same command again to go on\n"),
    ],
)
def test_command_line(main, status, told, capsys, monkeypatch):
    monkeypatch.delenv("BUNDLE_TRACEBACK", raising=False)
    with pytest.raises(SystemExit) as ended:
        command_line(main)
    assert ended.value.code == status
    assert capsys.readouterr().err == told


def test_a_fault_of_ours_keeps_its_trace(monkeypatch):
    with pytest.raises(ZeroDivisionError):
        command_line(fail(ZeroDivisionError()))
    monkeypatch.setenv("BUNDLE_TRACEBACK", "1")
    with pytest.raises(InputError):
        command_line(fail(InputError("x")))


PROGRAM = """
from bundle.errors import InputError, plain_errors
plain_errors()
try:
    raise {error}
except Exception as error:
    raise RuntimeError("MONAI wraps it") from error
"""


@pytest.mark.parametrize(
    ("error", "switch", "plain"),
    [("InputError('lr must be a number')", "", True), ("InputError('lr')", "1", False), ("KeyError('lr')", "", False)],
)
def test_plain_errors_in_a_process_of_its_own(error, switch, plain):
    environment = {**os.environ, "BUNDLE_TRACEBACK": switch}
    command = [sys.executable, "-c", PROGRAM.format(error=error)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 1
    if plain:
        assert done.stderr == "error: lr must be a number\n"
    else:
        assert "Traceback" in done.stderr
        assert "MONAI wraps it" in done.stderr


def test_plain_errors_only_replaces_the_hook(monkeypatch):
    seen = []
    monkeypatch.setattr(sys, "excepthook", lambda *arguments: seen.append(arguments))
    plain_errors()
    sys.excepthook(KeyError, KeyError("x"), None)
    assert len(seen) == 1
