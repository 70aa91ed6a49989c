"""What results are made from: weights, settings, code and libraries, as hashes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path

import torch

from . import __version__
from .data.cache_key import PACKAGES, package_version
from .files import file_hash
from .settings import NOT_PART_OF_A_RUN, run_settings
from .training.engine import autocast_dtype

__all__ = ["made_from"]

# What changes which cases there are, how fast they come and what is printed or drawn, but no case's record.
NOT_PART_OF_A_RECORD = (
    *NOT_PART_OF_A_RUN, "weights", "datalist", "section", "fold", "split", "case_names", "batch_size", "figure_cases",
    "dataloader", "handlers", "imports", "amp", "precision",
)  # fmt: skip
# Those that read and prepare, and those that only the network may need.
LIBRARIES = (*PACKAGES, "entmax", "torchvision")


def made_from(
    weights: str | Path,
    device: torch.device | str,
    amp: bool,
    precision: str,
    trusted_modules: Iterable[str] = (),
) -> dict[str, str]:
    """What every record of this run is made from, besides its scan. For expressions in a config.

    Args:
        weights: a file saved by this bundle.
        device: of the network; it and the next two tell the type that convolutions compute in.
        amp: whether to use mixed precision.
        precision: see `autocast_dtype`.
        trusted_modules: modules of the user's own classes.

    Returns:
        `version` of this software; SHA-256 of the `weights` file; SHA-256 of the `settings` that can change a result,
        of the software's code, and of the versions of the libraries.
    """
    settings = {key: value for key, value in run_settings().items() if key not in NOT_PART_OF_A_RECORD}
    counted = {
        "settings": settings,
        "convolutions": str(autocast_dtype(torch.device(device), amp, precision)),
        "code": [_code_hash(Path(__file__).parent), *(_code_hash(_home(name)) for name in sorted(trusted_modules))],
        "libraries": {name: package_version(name) for name in LIBRARIES},
    }
    return {
        "version": __version__,
        "weights": file_hash(weights),
        "settings": hashlib.sha256(json.dumps(counted, sort_keys=True).encode()).hexdigest(),
    }


def _code_hash(home: Path | None) -> str | None:
    """Of a module's file, or of all modules of a package; None where it has no source."""
    if home is None or not home.exists():
        return None
    files = sorted(home.rglob("*.py")) if home.is_dir() else [home]
    named = [(path.relative_to(home).as_posix(), file_hash(path)) for path in files]
    return hashlib.sha256(json.dumps(named).encode()).hexdigest()


def _home(module: str) -> Path | None:
    found = find_spec(module.partition(".")[0])
    if found is None or found.origin is None:
        return None
    return Path(found.origin).parent if found.submodule_search_locations else Path(found.origin)
