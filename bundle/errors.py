"""What goes wrong because of input, told in one sentence."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any

__all__ = ["InputError", "Refusal", "command_line", "input_error_behind", "plain_errors"]

TRACEBACK_SWITCH = "BUNDLE_TRACEBACK"


class InputError(ValueError):
    """Something the user gave is wrong: a path, a table, a setting, a scan or a checkpoint.

    The message is one sentence: what is wrong, where, and what to do. Command lines print it without a stack trace.
    """


class Refusal(InputError):
    """A scan that cannot be read honestly.

    Args:
        code: stable, lower-case reason code such as ``missing_slices``; programs may rely on it.
        sentence: the reason for people, without any value that could identify a patient.
        **facts: the measured facts that led to it (numbers, counts, tag names), JSON-serialisable.
    """

    def __init__(self, code: str, sentence: str, **facts: Any) -> None:
        super().__init__(sentence)
        self.code = code
        self.sentence = sentence
        self.facts = facts

    def __reduce__(self) -> tuple[Any, ...]:
        # Data-loading workers pickle exceptions; the default would lose the code and the facts.
        return _rebuild_refusal, (self.code, self.sentence, self.facts)


def _rebuild_refusal(code: str, sentence: str, facts: dict[str, Any]) -> Refusal:
    return Refusal(code, sentence, **facts)


def input_error_behind(error: BaseException | None) -> InputError | None:
    """The first InputError in a chain of exceptions; MONAI wraps what a config raises in its own RuntimeErrors."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        if isinstance(error, InputError):
            return error
        seen.add(id(error))
        error = error.__cause__ or error.__context__
    return None


def plain_errors() -> None:
    """Let this process end on an InputError with its sentence and exit status 1 instead of a stack trace.

    For `python -m monai.bundle run`, which the project's configs call first thing in `initialize`. Every other
    exception keeps its stack trace, and so does every one where the environment sets BUNDLE_TRACEBACK=1.
    """
    previous = sys.excepthook

    def hook(kind: type[BaseException], error: BaseException, trace: Any) -> None:
        found = input_error_behind(error)
        if found is None or os.environ.get(TRACEBACK_SWITCH) == "1":
            previous(kind, error, trace)
        else:
            print(f"error: {found}", file=sys.stderr)

    sys.excepthook = hook


def command_line(main: Callable[[], int | None]) -> None:
    """Run a script's `main` and exit: 0 or its return value, 2 with one sentence on an InputError, 130 on Ctrl-C."""
    try:
        status = main()
    except Exception as error:
        found = input_error_behind(error)
        if found is None or os.environ.get(TRACEBACK_SWITCH) == "1":
            raise
        print(f"error: {found}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted; run the same command again to go on", file=sys.stderr)
        sys.exit(130)
    sys.exit(status or 0)
