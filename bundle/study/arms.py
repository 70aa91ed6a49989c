"""Arms of a study: named overlays, some made from others."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from ..data.datalist import LOCKED
from ..errors import InputError
from ..files import replacing

__all__ = ["OVERLAYS", "Arm", "Pretraining", "Stage", "read_study", "write_overlay"]


NAME = re.compile(r"\w[\w.-]*")  # becomes a folder's
OVERLAYS = "overlays"  # the folder beside those of the arms
FOLDERS = (OVERLAYS, LOCKED)  # so that no arm may have one of these names


class Pretraining(NamedTuple):
    """Overlays by path that turn a training into the pre-training of its encoder, and settings laid over them."""

    config_files: tuple[str, ...]
    settings: dict[str, Any]


class Arm(NamedTuple):
    """Overlays by path, settings laid over them, and a pre-training before each training if there is to be one."""

    files: tuple[str, ...]
    settings: dict[str, Any]
    pretrain: Pretraining | None = None


class Stage(NamedTuple):
    """Seeds of a stage, and what all its arms have in common: overlays by path, and settings laid over them."""

    seeds: list[int]
    files: tuple[str, ...]
    settings: dict[str, Any]


def read_study(path: str | Path) -> tuple[dict[str, Stage], dict[str, Arm]]:
    """Stages and arms of a study's YAML file, see configs/study.yaml.

    Raises:
        InputError: the file cannot be read, a name is none for a folder, an arm starts from one that is not above it,
            a file is not there, or a pre-training names none.
    """
    path = Path(path).absolute()
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
        stages = {
            str(name): Stage(list(s["seeds"]), s.get("files", []), dict(s["settings"]))
            for name, s in content["stages"].items()
        }
        given: Mapping[str, Mapping[str, Any]] = {str(name): dict(arm or {}) for name, arm in content["arms"].items()}
        known = {str(name): set(stage) for name, stage in content["stages"].items()}
    except (OSError, yaml.YAMLError, KeyError, TypeError, AttributeError, ValueError) as error:
        raise InputError(
            f"{path} is no study ({type(error).__name__}): it needs `stages` (name: seeds, settings) and `arms`"
        ) from None
    for name, stage in stages.items():
        if not NAME.fullmatch(name):
            raise InputError(f"{path}: {name!r} is no name for a stage: use letters, digits, _, - and .")
        unknown = sorted(known[name] - {"seeds", "files", "settings"}, key=str)
        if unknown:
            raise InputError(f"{path}: stage {name} has {unknown[0]!r}; it may have seeds, files and settings")
        numbers = [seed for seed in stage.seeds if type(seed) is int and seed >= 0]
        if not numbers or len(set(numbers)) < len(stage.seeds):
            raise InputError(f"{path}: `seeds` of stage {name} are different whole numbers, not {stage.seeds}")
        _check_names(stage.settings, path)
        stages[name] = stage._replace(files=_paths(stage.files, path, f"stage {name}"))
    arms: dict[str, Arm] = {}
    for name, arm in given.items():
        if not NAME.fullmatch(name) or name in FOLDERS:
            raise InputError(f"{path}: {name!r} is no name for an arm: use letters, digits, _, - and .")
        settings = dict(arm)
        base, files = settings.pop("from", None), settings.pop("files", [])
        if base is not None and (not isinstance(base, str) or base not in arms):
            raise InputError(f"{path}: arm {name} starts from {base!r}, and there is no such arm above it")
        start = arms[base] if base is not None else Arm((), {})
        pretrain = start.pretrain
        if "pretrain" in settings:
            pretrain = _pretraining(settings.pop("pretrain"), path, name)
        _check_names(settings, path)
        paths = _paths(files, path, f"arm {name}")
        arms[name] = Arm((*start.files, *paths), {**start.settings, **settings}, pretrain)
    return stages, arms


def _check_names(settings: Mapping[Any, Any], study: Path) -> None:
    for key in settings:
        if not isinstance(key, str):  # YAML reads `on` as a boolean
            raise InputError(f"{study}: {key!r} is read as {type(key).__name__} and is no setting: put it in quotes")


def _paths(files: Any, study: Path, owner: str) -> tuple[str, ...]:
    if not isinstance(files, list) or not all(isinstance(file, str) for file in files):
        raise InputError(f"{study}: `files` of {owner} is a list of file names, such as [a.yaml], not {files!r}")
    paths = tuple(str(study.parent / file) for file in files)
    absent = [file for file in paths if not Path(file).is_file()]
    if absent:
        raise InputError(f"{study}: {owner} names a file that is not there: {absent[0]}")
    return paths


def _pretraining(given: Any, study: Path, arm: str) -> Pretraining | None:
    if given is None:  # of an arm that starts from one with it
        return None
    if not isinstance(given, Mapping) or not given.get("files"):
        raise InputError(
            f"{study}: `pretrain` of arm {arm} needs `files`, such as [pretrain.yaml], and may have settings"
        )
    settings = {key: value for key, value in given.items() if key != "files"}
    _check_names(settings, study)
    return Pretraining(_paths(given["files"], study, f"arm {arm}"), settings)


def write_overlay(settings: Mapping[str, Any], path: Path, what: str) -> None:
    """Write settings as an overlay that `python -m monai.bundle run` takes; a file that says the same stays as it is.

    Several commands at work in one folder then do not disturb each other.

    Args:
        settings: key → value.
        path: of the YAML file.
        what: for its first line.
    """
    text = f"# {what}\n" + (yaml.safe_dump(dict(settings), sort_keys=False) if settings else "{}\n")
    if not path.exists() or path.read_text(encoding="utf-8") != text:
        with replacing(path) as temporary:
            temporary.write_text(text, encoding="utf-8")
