"""What a prepared case depends on → one digest: the scan's content, the preparation, the code that does it."""

from __future__ import annotations

import enum
import functools
import hashlib
import json
import os
import re
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from importlib import metadata
from pathlib import Path
from pydoc import locate
from types import CodeType, ModuleType
from typing import Any

import numpy as np
from torch import Tensor, nn

from ..files import file_hash
from .dicom_files import DicomFiles, files_below

__all__ = [
    "PACKAGES",
    "case_digest",
    "case_stamp",
    "code_digest",
    "described",
    "digest",
    "package_version",
    "sources_of",
]

# What decodes and computes; another version of any may give other voxels.
PACKAGES = (
    "numpy", "monai", "torch", "pydicom", "nibabel", "itk", "python-gdcm", "pyjpegls", "pylibjpeg",
    "pylibjpeg-openjpeg", "pylibjpeg-rle",
)  # fmt: skip
# Their versions, or the sources of this folder, are in the digest already.
KNOWN = (__name__.rpartition(".")[0], "monai", "torch", "numpy", "builtins")
# Deeper than any transform; ends where an object refers to itself.
DEPTH = 10
# A file changed twice within one tick of the file system's clock may keep its times, so young files are hashed anew.
YOUNG_NS = 2_000_000_000
PLAIN = (bool, int, float, str, type(None))


def digest(value: Any) -> str:
    """SHA-256 of plain values as canonical JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def described(value: Any, depth: int = DEPTH) -> Any:
    """What an object is made of as plain values, equal in every process and for every object made alike.

    Attributes that begin with an underscore are left out: they hold what changes while an object works.
    """
    if isinstance(value, PLAIN):
        return value
    if isinstance(value, (list, tuple)):
        return [described(item, depth) for item in value]
    if isinstance(value, Mapping):
        return {"mapping": sorted(([described(k, depth), described(v, depth)] for k, v in value.items()), key=digest)}
    if isinstance(value, (set, frozenset)):
        return {"set": sorted((described(item, depth) for item in value), key=digest)}
    if isinstance(value, (np.ndarray, Tensor)):
        array = np.ascontiguousarray(value.detach().cpu() if isinstance(value, Tensor) else value)
        return {"array": [str(array.dtype), list(array.shape), hashlib.sha256(array.tobytes()).hexdigest()]}
    if isinstance(value, functools.partial):
        return {"partial": described([value.func, value.args, value.keywords], depth - 1) if depth else None}
    named = value if hasattr(value, "__qualname__") else type(value)
    name = f"{named.__module__}.{named.__qualname__}"
    if named is value:
        return {"name": name, **(_function(value, depth - 1) if depth else {})}
    if isinstance(value, enum.Enum) or not hasattr(value, "__dict__"):
        # That of `object` gives an address.
        own = any("__repr__" in vars(kind) for kind in type(value).__mro__[:-1])
        return {name: str(value) if own else None}
    public = {key: inner for key, inner in vars(value).items() if not key.startswith("_")}
    if isinstance(value, nn.Module):
        public |= {"state": value.state_dict(), "structure": str(value)}
    return {name: described(public, depth - 1) if depth else None}


def _function(value: Any, depth: int) -> dict[str, Any]:
    """What a function does: its code, and the values that it holds besides."""
    code = getattr(value, "__code__", None)
    cells = [cell.cell_contents for cell in getattr(value, "__closure__", None) or ()]
    held = [getattr(value, "__defaults__", None), getattr(value, "__kwdefaults__", None), cells]
    owner = getattr(value, "__self__", None)
    return {
        "code": _code(code) if code else None,
        "held": described(held, depth),
        "owner": None if isinstance(owner, ModuleType) else described(owner, depth),
    }


def _code(code: CodeType) -> list[Any]:
    constants = [_code(constant) if isinstance(constant, CodeType) else constant for constant in code.co_consts]
    return [code.co_code.hex(), list(code.co_names), [c if isinstance(c, list) else described(c) for c in constants]]


def sources_of(files: Iterable[Path]) -> list[list[str]]:
    """Name and digest of each file of code."""
    return [[path.name, hashlib.sha256(path.read_bytes()).hexdigest()] for path in files]


# When this module is imported: later the files may no longer be those that run.
SOURCES = sources_of(sorted(Path(__file__).parent.glob("*.py")))


def code_digest(modules: Iterable[str], definition: Any = (), sources: list[list[str]] = SOURCES) -> str:
    """Digest of the sources and versions of all code that prepares.

    Args:
        modules: of the steps. The source files of those that are neither in `sources` nor MONAI's or PyTorch's count
            too, but not what these import in turn.
        definition: configs of the steps; the modules of their `_target_`s count likewise.
        sources: of this folder.
    """
    named = {getattr(locate(target), "__module__", None) or "" for target in _targets(definition)} | set(modules)
    foreign = sorted(name for name in named if not f"{name}.".startswith(tuple(f"{known}." for known in KNOWN)))
    files = [Path(file) for name in foreign if (file := getattr(sys.modules.get(name), "__file__", None))]
    versions = [list(sys.version_info[:2]), *(package_version(package) for package in PACKAGES)]
    return digest([sources, foreign, sources_of(files), versions])


def package_version(package: str) -> str | None:
    """Of an installed package; None where it is not there."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _targets(definition: Any) -> Iterator[str]:
    if isinstance(definition, Mapping):
        if isinstance(target := definition.get("_target_"), str) and "." in target:
            yield target
        definition = list(definition.values())
    if isinstance(definition, (list, tuple)):
        for inner in definition:
            yield from _targets(inner)


def case_stamp(case: Mapping[str, Any]) -> str:
    """Digest of paths, sizes, times and inodes of all files of a case: what changes when one of them is written to.

    Raises:
        OSError: a file is not there.
        Refusal: a folder of a scan cannot be read.
    """
    return _stamp([file for key, value in case.items() for file in _files(value, key == "image")])[0]


def case_digest(case: Mapping[str, Any], memo: Path) -> str:
    """Digest of the content of a case: of all its values, and in place of paths of the files that they lead to.

    Args:
        case: `image` and other values, of which path objects, and text with a separator that leads to a file, count as
            files too.
        memo: folder that remembers the content digest of files by `case_stamp`, so that they are hashed once. It holds
            no name and no path. Where it cannot be written nothing is remembered.

    Raises:
        OSError: a file is not there or cannot be read.
        Refusal: a folder of a scan cannot be read.
    """
    values = {}
    for key, value in case.items():
        files = _files(value, key == "image")
        values[key] = {"files": _content(files, memo)} if files else described(value)
    return digest(values)


def _files(value: Any, certain: bool) -> list[tuple[str, Path]]:
    """Name and path of each file that a value leads to; names count too, because readers go by them.

    Args:
        value: of a case.
        certain: text is a path, whatever it looks like.
    """
    if isinstance(value, DicomFiles):
        above = os.path.commonpath([path.parent for path in value.paths])
        return [(os.path.relpath(path, above), path) for path in value.paths]
    if isinstance(value, (list, tuple)):
        each = [_files(one, certain) if isinstance(one, (str, os.PathLike, DicomFiles)) else [] for one in value]
        return [(f"{i}/{name}", path) for i, files in enumerate(each) for name, path in files] if all(each) else []
    if isinstance(value, str):
        certain = certain or (os.sep in value and os.path.exists(value))
    elif not isinstance(value, os.PathLike):
        return []
    else:
        certain = True
    if not certain:
        return []
    path = Path(value)
    if path.is_dir():
        return [(str(file.relative_to(path)), file) for file in files_below(path)]
    return [(path.name, path)]


def _stamp(files: Iterable[tuple[str, Path]]) -> tuple[str, int]:
    """The stamp of some files, and when the youngest was changed, in ns."""
    rows, youngest = [], 0
    for name, path in files:
        found = path.stat()
        rows.append([name, os.path.abspath(path), found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino])
        youngest = max(youngest, found.st_mtime_ns, found.st_ctime_ns)
    return digest(rows), youngest


def _content(files: list[tuple[str, Path]], memo: Path) -> str:
    now = time.time_ns()
    stamp, youngest = _stamp(files)
    note = memo / stamp
    try:
        known = note.read_text(encoding="ascii")
    except (OSError, UnicodeDecodeError):
        known = ""
    # A note that another process is writing, or that a full disk cut short, is not of this length.
    if re.fullmatch(r"[0-9a-f]{64}", known):
        return known
    content = digest([[name, file_hash(path)] for name, path in files])
    if youngest < now - YOUNG_NS and _stamp(files)[0] == stamp:
        try:
            memo.mkdir(parents=True, exist_ok=True)
            note.write_text(content, encoding="ascii")
        except OSError:
            pass  # only speed is lost
    return content
