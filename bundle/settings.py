"""Checks of a config before anything is built from it: MONAI accepts mistyped keys and the string 'false' silently."""

from __future__ import annotations

import difflib
import inspect
import json
import logging
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from pydoc import locate
from typing import Any

from monai.bundle import ConfigComponent, ConfigExpression, ConfigParser

from .data.cases import split_of
from .data.datalist import LOCKED
from .errors import InputError
from .files import file_hash
from .recipe import Recipe
from .weights import read_checkpoint, trained_on

__all__ = ["check_config", "check_held_out", "check_start", "choose", "config_in_use", "run_settings", "shipped_config"]

logger = logging.getLogger(__name__)
META = ConfigParser.meta_key
# Where a run happens and how much it prints changes no result, so a run may go on with other values of these.
NOT_PART_OF_A_RUN = (
    "bundle_root", "output_dir", "dataset_dir", "cache_dir", "cache_limit_gb", "device", "num_workers", "progress",
    "resume", "resume_changed", "initialize", "run", "finalize", "trusted_modules",
    "activation_checkpointing", "chunk_slices", "compile_encoder",
)  # fmt: skip
# What may also be null. On a command line that is the word: MONAI leaves out arguments whose value is None.
OPTIONAL = ("cache_dir", "crop_margin", "sensitivity", "coverage")
# What no constructor checks before something is built or written. The threshold's ends would predict one class always.
RANGES = {
    "max_epochs": (1, math.inf), "batch_size": (1, math.inf), "accumulation_steps": (1, math.inf),
    "val_interval": (1, math.inf), "num_workers": (0, math.inf), "stability_cases": (1, math.inf),
    "early_stop_patience": (0, math.inf), "weight_decay": (0, math.inf), "lr": (0, math.inf),
    "classifier_lr": (0, math.inf), "dropout": (0, 0.99), "instance_gradient": (0, 1), "weight_average": (0, 0.99999),
    "threshold": (0.001, 0.999), "abstain_below": (0, 1), "calibration_temperature": (0.01, 100),
    "resamples": (1, math.inf), "eval_batch_size": (1, math.inf), "num_key_slices": (1, math.inf),
    "figure_cases": (0, math.inf),
}  # fmt: skip
ARGUMENTS_OF_MONAI = ConfigComponent.non_arg_keys


def config_in_use() -> ConfigParser:
    """The parser whose expression is being evaluated.

    MONAI hands expressions the values that they refer to but not the config as written, which is what has to be
    checked, compared and saved; so it is looked for among the callers.

    Raises:
        RuntimeError: when called from anywhere but a config's expression.
    """
    frame = inspect.currentframe()
    while frame is not None:
        if isinstance(parser := frame.f_locals.get("self"), ConfigParser):
            return parser
        frame = frame.f_back
    raise RuntimeError("this function is for expressions in a config of monai.bundle")


def choose(name: str, options: Mapping[str, Any], setting: str = "this setting") -> Any:
    """The option of that name, for settings that pick one of several definitions.

    Args:
        name: what the user set.
        options: name → what it stands for.
        setting: the key, for the message.

    Raises:
        InputError: when there is no such option.
    """
    if name not in options:
        raise InputError(f"{setting} must be one of {', '.join(options)}, not {name!r}{_meant(str(name), options)}")
    return options[name]


def check_config(*workflows: str, weights: str | Path | None = None, trusted_modules: tuple[str, ...] = ()) -> None:
    """Refuse a config with keys nobody reads or values of the wrong kind; turn 'true' and 'false' into booleans.

    Every key that was not in the bundle's own configs is refused, at the top and inside sections, and so is every
    argument that a `_target_` does not take. Values are held against the defaults: a boolean stays a boolean, a number
    a number, a definition a definition. With weights, preparation and network come from their recipe, and a value that
    disagrees is refused.

    Args:
        *workflows: names of the configs that belong together, such as "train", "evaluate"; later ones extend earlier.
        weights: a file saved by this bundle, for evaluation and inference.
        trusted_modules: of the recipe's targets, see `Recipe.load`.

    Raises:
        InputError: naming every such key, with what may have been meant.
    """
    parser = config_in_use()
    config: dict[str, Any] = parser.config  # type: ignore[assignment]
    base = shipped_config(Path(str(parser.get_parsed_content("bundle_root"))) / "configs", workflows)
    recipe = Recipe.load(weights, trusted_modules) if weights is not None else None
    allowed = set(recipe.config) if recipe is not None else set()
    problems = list(_unknown(config, base, allowed))
    for key, default in base.items():
        if key in config:
            value, problem = _coerced(key, config[key], default)
            problem = problem or _out_of_range(key, value)
            if problem:
                problems.append(problem)
            else:
                config[key] = value
    if not problems:
        problems += _unknown_arguments(config, "")
        problems += _no_booleans(config, base, "")
    if recipe is not None and not problems:
        problems += recipe.disagreements(config, base)
    if problems:
        raise InputError("\n".join(problems))
    parser.ref_resolver.reset()
    parser.parse(reset=True)


def check_held_out(weights: str | Path, datalist: str | Path, fold: int, section: str) -> None:
    """Refuse to evaluate weights on cases of their datalist that they were trained on.

    The weights of an ensemble may be of several folds. Locked cases are in no fold.

    Raises:
        InputError: when they were: another fold's test and validation cases are among the training cases.
    """
    trained_on = read_checkpoint(weights).get("trained_on") or {}
    if not trained_on:
        return
    here = split_of(datalist, fold)
    if here["datalist"] != trained_on["datalist"]:
        logger.warning("the weights were trained on another datalist: make sure that no patient is in both")
    elif isinstance(folds := trained_on["fold"], list):
        if section != LOCKED:
            raise InputError(
                f"these weights are of an ensemble over folds {', '.join(map(str, folds))} of this datalist, so there "
                f"is no fold whose {section} cases none of its members has seen: evaluate it on section {LOCKED} or on "
                "another datalist"
            )
    elif section != LOCKED and here["fold"] != folds:
        raise InputError(
            f"the weights were trained on fold {folds} of this datalist, and the {section} cases of fold {fold} are "
            f"among their training cases: set fold to {folds}"
        )


def check_start(encoder_weights: str | Path | None, datalist: str | Path, fold: int) -> None:
    """Refuse to start from an encoder that was trained, with labels or without, on another fold of the datalist.

    Of one that was trained on another datalist nothing is known; that is said on the log.

    Raises:
        InputError: when it was: it has seen test cases of this fold.
    """
    seen = {} if encoder_weights is None else trained_on(encoder_weights)
    if not seen:
        return
    if seen["datalist"] != split_of(datalist, fold)["datalist"]:
        logger.warning(
            "encoder_weights were trained on another datalist: make sure that no patient of its training part is among "
            "the validation, test or locked cases of this one"
        )
    elif seen["fold"] != fold:
        raise InputError(
            f"encoder_weights were trained on fold {seen['fold']} of this datalist, and test cases of fold {fold} are "
            f"among their training cases: give weights of fold {fold}"
        )


def run_settings(split: Mapping[str, Any] | None = None) -> dict[str, str]:
    """The whole config of this run as {top-level key: canonical JSON}, less what changes no result.

    Saved in checkpoints, so that a run is not resumed with other settings by accident.

    Args:
        split: identifies the content of the datalist, whose path alone says little. That of `encoder_weights` counts
            as well.
    """
    config: dict[str, Any] = config_in_use().config  # type: ignore[assignment]
    kept = {key: value for key, value in config.items() if key not in NOT_PART_OF_A_RUN and key != META}
    kept["split"] = dict(split or {})
    start = config.get("encoder_weights")
    if isinstance(start, str) and Path(start).is_file():
        kept["encoder_weights_content"] = file_hash(start)
    return {key: json.dumps(value, sort_keys=True, default=str) for key, value in kept.items()}


def shipped_config(folder: Path, workflows: tuple[str, ...]) -> dict[str, Any]:
    """The bundle's own configs, merged as MONAI merges them.

    Args:
        folder: of the configs.
        workflows: names of YAML or JSON files in it; later ones extend earlier.

    Raises:
        InputError: when one is not there.
    """
    files = []
    for name in workflows:
        found = [path for suffix in ("yaml", "json") if (path := folder / f"{name}.{suffix}").is_file()]
        if not found:
            raise InputError(f"bundle_root: there is no configs/{name}.yaml or .json under {folder.parent}")
        files.append(str(found[0]))
    merged = ConfigParser()
    merged.read_config(files)
    return {key: value for key, value in merged.config.items() if key != META}  # type: ignore[union-attr]


def _is_section(value: Any) -> bool:
    return isinstance(value, Mapping) and "_target_" not in value


def _unknown(given: Mapping[str, Any], base: Mapping[str, Any], allowed: set[str], where: str = "") -> Iterator[str]:
    for key, value in given.items():
        if key in base:
            if _is_section(value) and _is_section(base[key]) and base[key]:
                yield from _unknown(value, base[key], set(), f"{where}{key}::")
        elif key not in allowed and key != META:
            yield f"there is no setting '{where}{key}'{_meant(key, base)}"


def _meant(key: str, known: Mapping[str, Any]) -> str:
    close = difflib.get_close_matches(key, list(known), n=1)
    return f"; did you mean '{close[0]}'?" if close else ""


def _is_plain(value: Any) -> bool:
    return not isinstance(value, Mapping) and not (isinstance(value, str) and value[:1] in ("$", "@", "%"))


def _coerced(key: str, value: Any, default: Any) -> tuple[Any, str | None]:
    """The value as its default's kind, or a sentence. Expressions and references are left to MONAI."""
    if isinstance(default, Mapping) and isinstance(value, (str, int, float)) and _is_plain(value):
        return value, f"{key} must be a definition, with _target_ and its arguments, not {value!r}"
    if key in OPTIONAL and (value is None or (isinstance(value, str) and value.lower() in ("null", "none"))):
        return None, None
    if default is None or not _is_plain(default) or not _is_plain(value):
        return value, None
    if isinstance(default, bool):
        by_name = {"true": True, "false": False}
        value = by_name.get(value.lower(), value) if isinstance(value, str) else value
        return value, None if isinstance(value, bool) else f"{key} must be true or false, not {value!r}"
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if isinstance(default, int):
        return value, None if number and isinstance(value, int) else f"{key} must be a whole number, not {value!r}"
    if isinstance(default, float):
        hint = "; in YAML write 1.0e-4, not 1e-4" if isinstance(value, str) and "e" in value else ""
        return (float(value), None) if number else (value, f"{key} must be a number, not {value!r}{hint}")
    if isinstance(default, list):
        listed = isinstance(value, (list, tuple))
        return (list(value), None) if listed else (value, f"{key} must be a list, not {value!r}")
    # The command line reads a folder called 2024 as a number.
    return (str(value), None) if isinstance(value, str) or number else (value, f"{key} must be text, not {value!r}")


def _out_of_range(key: str, value: Any) -> str | None:
    low, high = RANGES.get(key, (-math.inf, math.inf))
    if not isinstance(value, (int, float)) or low <= value <= high:
        return None
    return (
        f"{key} must be {low} or more, not {value}"
        if high == math.inf
        else f"{key} must be {low} to {high}, not {value}"
    )


def _unknown_arguments(config: Any, where: str) -> Iterator[str]:
    """A sentence for every argument that the `_target_` beside it does not take; 'true' and 'false' become booleans."""
    if isinstance(config, dict):
        target = config.get("_target_")
        if isinstance(target, str) and not ConfigExpression.is_expression(target):
            yield from _arguments_of(target, config, where)
        for key, value in config.items():
            if key != META:
                yield from _unknown_arguments(value, f"{where}{key}::")
    elif isinstance(config, list):
        for index, value in enumerate(config):
            yield from _unknown_arguments(value, f"{where}{index}::")


def _no_booleans(given: Mapping[str, Any], base: Mapping[str, Any], where: str) -> Iterator[str]:
    """A sentence for every text inside a section or definition where the default is true or false; all text is true."""
    for key, default in base.items():
        value = given.get(key)
        if isinstance(default, Mapping) and isinstance(value, Mapping):
            yield from _no_booleans(value, default, f"{where}{key}::")
        elif isinstance(default, bool) and isinstance(value, str) and _is_plain(value):
            yield f"{where}{key} must be true or false, not {value!r}"


def _arguments_of(target: str, config: dict[str, Any], where: str) -> Iterator[str]:
    found = locate(target) if "." in target else None  # MONAI looks bare names up in its own tables
    if "." in target and found is None:
        yield f"{where}_target_: there is nothing called '{target}' to import"
    names = _parameters_of(found)
    if names is None:
        return
    for key, value in config.items():
        if key not in names and key not in ARGUMENTS_OF_MONAI:
            yield f"'{where}{key}': {target} takes no such argument{_meant(key, dict.fromkeys(names))}"
        if isinstance(value, str) and value.lower() in ("true", "false"):
            # The command line gives text, and every text but the empty one counts as true.
            config[key] = value.lower() == "true"


def _parameters_of(found: Any) -> list[str] | None:
    """Names of the arguments that a callable takes; None where it takes any."""
    steps = [found]
    if inspect.isclass(found) and found.__module__.partition(".")[0] == __package__:
        # Our classes hand further arguments to the class they extend, such as BagTrainer to MONAI's SupervisedTrainer.
        steps = [vars(kind)["__init__"] for kind in found.__mro__ if "__init__" in vars(kind)] or steps
    names: list[str] = []
    for step in steps:
        try:
            parameters = inspect.signature(step).parameters if callable(step) else None
        except ValueError:  # built in C without a signature
            parameters = None
        if parameters is None:
            return None
        names += parameters
        if not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
            return names
    return None
