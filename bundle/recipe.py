"""A recipe: what weights mean. It is saved with them, and evaluation and inference are built from it."""

from __future__ import annotations

import hashlib
import inspect
import json
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from pydoc import ErrorDuringImport, locate
from typing import Any

from monai.bundle import ConfigExpression, ConfigParser
from monai.transforms import Transform
from torch import nn

from .errors import InputError
from .weights import read_checkpoint

__all__ = ["Recipe"]

# A weights file comes from outside, so what it says may build networks and transforms and nothing else: nothing that
# reads, writes, downloads, or calls what it is given by name (as monai.transforms.LoadImage does with its reader).
TRUSTED_MODULES = ("bundle", "monai.networks", "monai.transforms", "torch.nn", "torchvision.models")
FOREIGN_NETWORKS = ("monai.networks", "torchvision.models")
NETWORKS = ("bundle.model", "torch.nn", *FOREIGN_NETWORKS)
TRANSFORMS = (
    "bundle.data", "monai.transforms.compose", "monai.transforms.croppad", "monai.transforms.intensity",
    "monai.transforms.spatial", "monai.transforms.utility",
)  # fmt: skip
TRUSTED_OBJECTS = (
    "bundle.data.policy.ReaderPolicy",
    "bundle.data.policy.SeriesRules",
    "bundle.model.encoder.with_norm",
    "bundle.settings.choose",
)
ARGUMENTS_OF_MONAI = (
    "_target_",
    "_desc_",
    "_disabled_",
    "_requires_",
)  # not _mode_ and _debug_, which start a debugger
# What calibration sets in weights that are trained, and what weights mean that were saved without it.
CALIBRATION = ("threshold", "calibration_temperature", "abstain_below")
WITHOUT = {"calibration_temperature": 1.0, "abstain_below": 0.0}
# Settings that give the weights their meaning; what these refer to belongs to them.
RECIPE_KEYS = (
    "network_def", "preparation", "eval_sampling", "class_names", "channels", "channel_files", "norm", "scorer",
    "selection", "sampling_strategy", "bag_size", "slicing_axis", "spacing", "crop_margin", "image_size", "intensity",
    "neighbours", "blank_slices", "reader_policy", "top_k", "dropout", *CALIBRATION,
)  # fmt: skip
CHOICE = "bundle.choose"
# Definitions that refer to the settings above, which are compared one by one.
BUILT_FROM_SETTINGS = ("network_def", "preparation", "eval_sampling")


class Recipe:
    """Preparation, channels, classes, sampling, network and operating point of a set of weights, as plain values.

    Args:
        config: {key: value}; dictionaries with `_target_` are definitions of objects. No expressions or references.
        trusted_modules: modules besides the built-in ones, any object of which may be built.

    Raises:
        InputError: on an expression, a reference, or a target that is no network or transform of a trusted module.
    """

    def __init__(self, config: Mapping[str, Any], trusted_modules: tuple[str, ...] | list[str] = ()) -> None:
        self.config = dict(config)
        self.trusted_modules = tuple(trusted_modules)
        _check(self.config, self.trusted_modules, "")

    @classmethod
    def of_config(cls, trusted_modules: tuple[str, ...] | list[str] = ()) -> Recipe:
        """The recipe of the config whose expression calls this: every reference and expression becomes its value."""
        from .settings import config_in_use

        return cls.of_parser(config_in_use(), trusted_modules)

    @classmethod
    def of_parser(
        cls, parser: ConfigParser, trusted_modules: tuple[str, ...] | list[str] = (), keys: Sequence[str] = RECIPE_KEYS
    ) -> Recipe:
        """The recipe of a config, or the part of it under some keys."""
        present = [key for key in keys if key in parser.config]  # type: ignore[operator]
        return cls({key: _literal(parser, parser[key], key) for key in present}, trusted_modules)

    @classmethod
    def load(cls, weights: str | Path, trusted_modules: tuple[str, ...] | list[str] = ()) -> Recipe:
        """The recipe in a weights file.

        Raises:
            InputError: when the file is absent, unreadable, holds no recipe, or its recipe was changed.
        """
        content = read_checkpoint(weights)
        text = content.get("recipe")
        if not isinstance(text, str):
            raise InputError(f"{Path(weights).name} holds no recipe; give the model.pt of a training run")
        if content.get("recipe_hash") != _digest(text):
            raise InputError(f"the recipe in {Path(weights).name} does not match its hash: the file was changed")
        return cls(json.loads(text), trusted_modules)

    def __getitem__(self, key: str) -> Any:
        if key not in self.config and key in WITHOUT:
            return WITHOUT[key]
        if key not in self.config:
            raise InputError(f"the recipe of these weights holds no '{key}': it was made by another version or changed")
        return self.config[key]

    @property
    def text(self) -> str:
        """Canonical JSON."""
        return json.dumps(self.config, sort_keys=True)

    @property
    def hash(self) -> str:
        """SHA-256 of the text."""
        return _digest(self.text)

    def build(self, key: str) -> Any:
        """A new object from the definition under a key, such as the network under `network_def`."""
        parser = ConfigParser({key: json.loads(json.dumps(self[key]))})
        return parser.get_parsed_content(key)

    def definitions(self) -> dict[str, Any]:
        """Network and preprocessing of evaluation and inference as a config would define them, without expressions."""
        transforms = [*self["preparation"], self["eval_sampling"]]
        return {
            "network_def": self["network_def"],
            "preprocessing": {"_target_": "monai.transforms.Compose", "transforms": transforms},
        }

    def disagreements(self, config: Mapping[str, Any], base: Mapping[str, Any]) -> list[str]:
        """A sentence for every setting that a config sets to something else than these weights were made with.

        Args:
            config: as the user gave it, merged.
            base: the bundle's own configs; a value left at its default there says nothing.
        """
        sentences = []
        for key, ours in {**WITHOUT, **self.config}.items():
            theirs = config.get(key, ours)
            expression = isinstance(theirs, str) and theirs[:1] in ("$", "@", "%")
            if not expression and theirs != ours and theirs != base.get(key) and key not in BUILT_FROM_SETTINGS:
                made = "hold" if key in CALIBRATION else "were trained with"
                sentences.append(f"{key} is {theirs!r} in the config, but the weights {made} {ours!r}")
        # Definitions written out are what would be built, so here the bundle's own count too.
        for key, ours in self.definitions().items():
            if not holds_expression(config.get(key, ours)):
                sentences += list(_differences(key, ours, config.get(key, ours)))[:1]
        return sentences


def holds_expression(value: Any) -> bool:
    """Whether an expression, reference or macro of a config is anywhere in a value."""
    if isinstance(value, Mapping):
        return any(map(holds_expression, value.values()))
    if isinstance(value, (list, tuple)):
        return any(map(holds_expression, value))
    return isinstance(value, str) and value[:1] in ("$", "@", "%")


def _differences(where: str, ours: Any, theirs: Any) -> Iterator[str]:
    """A sentence for each innermost place where two definitions differ."""
    if isinstance(ours, Mapping) and isinstance(theirs, Mapping) and ours.keys() == theirs.keys():
        for key in ours:
            yield from _differences(f"{where}::{key}", ours[key], theirs[key])
    elif isinstance(ours, list) and isinstance(theirs, list) and len(ours) == len(theirs):
        for index, (one, other) in enumerate(zip(ours, theirs, strict=True)):
            yield from _differences(f"{where}::{index}", one, other)
    elif ours != theirs:
        yield f"{where} is {_short(theirs)} in the config, but the weights were trained with {_short(ours)}"


def _short(value: Any) -> str:
    return textwrap.shorten(repr(value), 120, placeholder=" …")


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _check(value: Any, own: tuple[str, ...], where: str) -> None:
    """Refuse what a recipe may not hold; `own` are the modules that the user trusts."""
    if isinstance(value, Mapping):
        if "_target_" in value:
            _check_target(value, own, where)
        for key, inner in value.items():
            _check(inner, own, f"{where}::{key}" if where else key)
    elif isinstance(value, (list, tuple)):
        for index, inner in enumerate(value):
            _check(inner, own, f"{where}::{index}")
    elif isinstance(value, str) and value[:1] in ("$", "@", "%"):
        raise InputError(f"recipe {where}: a recipe holds plain values, not the expression {value!r}")


def _check_target(definition: Mapping[str, Any], own: tuple[str, ...], where: str) -> None:
    target = definition["_target_"]
    # The name first: looking it up imports modules.
    found = _located(target) if isinstance(target, str) and _within(target, (*TRUSTED_MODULES, *own)) else None
    # Through a module's own imports a trusted path can lead anywhere, so the object's home counts.
    home = str(getattr(found, "__module__", None) or "")
    if found is None or not (_within(f"{home}.", own) or _is_harmless(found, home)):
        raise InputError(
            f"recipe {where}: '{target}' is no network or transform of a trusted module; if it is yours, add its "
            "module to trusted_modules"
        )
    for key, value in definition.items():
        unknown = key.startswith("_") and key not in ARGUMENTS_OF_MONAI
        if unknown or (value and _fetches(target, key)):
            raise InputError(
                f"recipe {where}: '{key}' is not allowed; weights come from the file that holds the recipe"
            )


def _located(target: str) -> Any:
    try:
        return locate(target)
    except ErrorDuringImport as error:
        raise InputError(f"recipe: importing '{target}' failed: {error.value}") from error


def _is_harmless(found: Any, home: str) -> bool:
    if f"{home}.{getattr(found, '__qualname__', '')}" in TRUSTED_OBJECTS:
        return True
    if inspect.isclass(found):
        network = issubclass(found, nn.Module) and _within(f"{home}.", NETWORKS)
        return network or (issubclass(found, Transform) and _within(f"{home}.", TRANSFORMS))
    # Functions such as resnet18 declare that they make a network.
    if not (inspect.isfunction(found) and _within(f"{home}.", FOREIGN_NETWORKS)):
        return False
    function = inspect.unwrap(found)
    result = function.__annotations__.get("return")
    kind = function.__globals__.get(result) if isinstance(result, str) else result
    return inspect.isclass(kind) and issubclass(kind, nn.Module)


def _fetches(target: str, argument: str) -> bool:
    """Whether an argument makes a network of MONAI or torchvision download weights when it is built."""
    return _within(target, FOREIGN_NETWORKS) and (argument == "weights" or argument.startswith("pretrained"))


def _within(name: str, modules: tuple[str, ...]) -> bool:
    return any(name.startswith(f"{module}.") for module in modules)


def _literal(parser: ConfigParser, value: Any, where: str) -> Any:
    """A config value with references replaced by what they refer to and expressions by their values."""
    if isinstance(value, Mapping):
        if value.get("_target_") == CHOICE:
            # Only what was chosen belongs to the weights; a later version may offer other options.
            name = _literal(parser, value["name"], f"{where}::name")
            if name in value["options"]:
                return _literal(parser, value["options"][name], f"{where}::options::{name}")
        target = str(value.get("_target_"))
        # The weights come with the recipe: what training started from is not fetched again.
        kept = {key: None if inner and _fetches(target, key) else inner for key, inner in value.items()}
        return {key: _literal(parser, inner, f"{where}::{key}") for key, inner in kept.items()}
    if isinstance(value, (list, tuple)):
        return [_literal(parser, inner, f"{where}::{index}") for index, inner in enumerate(value)]
    if isinstance(value, str) and value.startswith("@"):
        return _literal(parser, parser[value[1:]], value[1:])
    if ConfigExpression.is_expression(value):
        result = parser.get_parsed_content(where)
        try:
            return json.loads(json.dumps(result))
        except TypeError as error:
            raise InputError(
                f"{where}: the expression {value!r} gives a {type(result).__name__}, which cannot be saved with the "
                "weights; write it as a _target_"
            ) from error
    return value
