"""Files that are either whole or not there."""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from .errors import InputError

__all__ = ["FULL", "file_hash", "replacing", "write_json"]

# FULL and NO_WRITING come of writing alone; NO_ACCESS may also be about something that is read.
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
NO_WRITING = (*FULL, errno.EROFS)
NO_ACCESS = (errno.EACCES, errno.EPERM, errno.EIO)


def file_hash(path: str | os.PathLike[str]) -> str:
    """SHA-256 of a file's content."""
    with Path(path).open("rb") as file:
        found = hashlib.sha256()
        while block := file.read(2**20):
            found.update(block)
    return found.hexdigest()


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Give a temporary file beside `path` to write to; it takes the name only when the block ends without an error.

    Args:
        path: the file to make or replace; missing folders above it are made.

    Raises:
        InputError: the folder cannot be made or written to, be it that the disk is full.
    """
    target = Path(path)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        # The suffixes stay: nibabel chooses a format by them.
        handle, name = tempfile.mkstemp(prefix=".part-", suffix="".join(target.suffixes[-2:]), dir=target.parent)
    except OSError as error:
        raise _unwritable(target, error) from error
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        # mkstemp makes a file for its owner alone; results follow the umask like every other file.
        mask = os.umask(0)
        os.umask(mask)
        temporary.chmod(0o666 & ~mask)
        os.replace(temporary, target)
    except IsADirectoryError as error:
        raise InputError(f"cannot write {target.name}: a folder has that name; choose another or remove it") from error
    except OSError as error:
        if not _is_of_writing(error, temporary, target):
            raise
        raise _unwritable(target, error) from error
    finally:
        with suppress(OSError):  # it would hide the error that the block ended with
            temporary.unlink(missing_ok=True)


def _is_of_writing(error: OSError, temporary: Path, target: Path) -> bool:
    """Whether an error of a block is about the file that it makes, and not about something that it reads."""
    named = None if error.filename is None else Path(os.path.abspath(os.fsdecode(error.filename)))
    if error.errno in NO_WRITING:
        return named is None or named.is_relative_to(os.path.abspath(target.parent))
    if error.errno in NO_ACCESS:
        return named is None or named in (Path(os.path.abspath(temporary)), Path(os.path.abspath(target)))
    return False


def _unwritable(target: Path, error: OSError) -> InputError:
    advice = f"free space in {target.parent}" if error.errno in FULL else "choose a folder that is writable"
    return InputError(f"cannot write {target.name}: {error.strerror}; {advice}")


def write_json(path: str | os.PathLike[str], content: Any) -> None:
    """Write JSON in one step; a number that is not finite becomes null, as JSON has no other word for it."""
    text = json.dumps(_plain(content), indent=2, ensure_ascii=False, allow_nan=False)
    with replacing(path) as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")


def _plain(value: Any) -> Any:
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value.item() if hasattr(value, "item") and not isinstance(value, (str, bytes)) else value
