"""Files that are either whole or not there."""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .errors import InputError

__all__ = ["replacing", "write_json"]


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Give a temporary file beside `path` to write to; it takes the name only when the block ends without an error.

    Args:
        path: the file to make or replace; missing folders above it are made.

    Raises:
        InputError: the folder cannot be made or written to.
    """
    target = Path(path)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        # The suffixes stay: nibabel chooses a format by them.
        handle, name = tempfile.mkstemp(prefix=".part-", suffix="".join(target.suffixes[-2:]), dir=target.parent)
    except OSError as error:
        raise InputError(f"cannot write {target.name}: {error.strerror}; choose a folder that is writable") from error
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
    finally:
        temporary.unlink(missing_ok=True)


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
