"""Configs that stand alone: overlays merged, settings from a recipe, definitions as plain values."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from monai.bundle import ConfigParser

from .recipe import BUILT_FROM_SETTINGS, CHOICE, Recipe, holds_expression
from .settings import shipped_config

__all__ = ["WORKFLOWS", "filled_metadata", "flattened_config"]

# Name of the packaged config → the bundle's configs that it is merged from.
WORKFLOWS = {"train": ("train",), "evaluate": ("train", "evaluate"), "inference": ("inference",)}
# `bundle` lies beside `configs`, so a package finds itself wherever it is loaded from.
ROOT = "$os.path.dirname(os.path.dirname(os.path.abspath(bundle.__file__)))"


def flattened_config(configs: Path, workflow: str, recipe: Recipe, modules: tuple[str, ...] = ()) -> dict[str, Any]:
    """One self-contained config of a workflow for weights with this recipe.

    In "train" the settings become the recipe's, so that its network is the one of the weights and every setting still
    works. In "evaluate" and "inference" network and preprocessing become plain definitions, which other tools can read
    without the weights; `check_config` refuses them beside weights of another recipe.

    Args:
        configs: folder of the bundle's configs.
        workflow: a key of WORKFLOWS.
        recipe: of the weights.
        modules: of the recipe's own classes besides the built-in ones.

    Returns:
        The config: values that JSON can hold, expressions and references within itself.
    """
    config = shipped_config(configs, WORKFLOWS[workflow])
    if "train" in WORKFLOWS[workflow]:
        plain = shipped_config(configs, ("train",))
        ours = _with_recipe(plain, recipe)
        config |= {key: ours[key] for key in plain if config[key] == plain[key]}
    imports = ["$import bundle", "$import os"]
    config["imports"] = imports + [line for line in config["imports"] if line not in imports]
    config["bundle_root"] = ROOT
    config["trusted_modules"] = list(modules)
    if workflow != "train":
        config["weights"] = "$@bundle_root + '/models/model.pt'"
        config["output_dir"] = f"output/{workflow}"
        config |= recipe.definitions()
    return config


def filled_metadata(metadata: Mapping[str, Any], recipe: Recipe) -> dict[str, Any]:
    """The bundle's metadata with channels, size and classes of the recipe.

    Args:
        metadata: content of configs/metadata.json.
        recipe: of the weights.
    """
    filled = copy.deepcopy(dict(metadata))
    classes, channels, neighbours = recipe["class_names"], recipe["channels"], recipe["neighbours"]
    # AddNeighboursd puts all channels of the lowest neighbour first.
    shifts = range(-neighbours, neighbours + 1)
    of_slice = [f"{name}, slice {shift:+d}" if shift else name for shift in shifts for name in channels]
    filled["image_classes"] = f"one CT or MR volume a case; channels: {', '.join(channels)}"
    filled["label_classes"] = f"one class a volume: {', '.join(classes)}"
    filled["pred_classes"] = f"logits of the classes {', '.join(classes)}"
    image = filled["network_data_format"]["inputs"]["image"]
    image["spatial_shape"] = [len(of_slice), *recipe["image_size"]]
    image["channel_def"] = {
        "0": "a bag is (bag, slice, channel, height, width): MONAI's channel axis counts slices, of which there may be "
        f"any number; the spatial shape is (channel, height, width); channels of a slice: {', '.join(of_slice)}"
    }
    pred = filled["network_data_format"]["outputs"]["pred"]
    pred["num_channels"] = len(classes)
    pred["channel_def"] = {str(index): f"logit of the class '{name}'" for index, name in enumerate(classes)}
    return filled


def _with_recipe(config: dict[str, Any], recipe: Recipe) -> dict[str, Any]:
    """The config with its settings changed such that it describes the recipe."""
    config = copy.deepcopy(config)
    # Plain settings first: a definition's choice is made by one of them.
    for key in sorted(recipe.config, key=lambda key: key in BUILT_FROM_SETTINGS):
        if key in config:
            config[key] = _adopted(config, config[key], recipe[key])
    for key in BUILT_FROM_SETTINGS:
        # What no setting can express, such as a definition written anew in an overlay, is taken over as it is.
        if key in config and not _is_call(config[key]) and _resolved(config, key, recipe) != recipe[key]:
            config[key] = recipe[key]
    return config


def _adopted(config: dict[str, Any], template: Any, value: Any) -> Any:
    """The template, or what replaces it, so that it resolves to the value; changes the settings that it refers to."""
    if isinstance(template, str) and template.startswith("@") and template[1:] in config:
        config[template[1:]] = _adopted(config, config[template[1:]], value)
        return template
    if _is_call(template):
        return template
    if isinstance(template, Mapping) and template.get("_target_") == CHOICE and value.get("_target_") != CHOICE:
        name = config.get(str(template["name"]).removeprefix("@"), template["name"])
        if name in template["options"]:
            options = template["options"] | {name: _adopted(config, template["options"][name], value)}
            return {**template, "options": options}
    if isinstance(template, Mapping) and isinstance(value, Mapping) and template.keys() == value.keys():
        return {key: _adopted(config, inner, value[key]) for key, inner in template.items()}
    if (
        isinstance(template, list)
        and isinstance(value, list)
        and len(template) == len(value)
        and holds_expression(template)
    ):
        return [_adopted(config, inner, ours) for inner, ours in zip(template, value, strict=True)]
    return copy.deepcopy(value)


def _is_call(value: Any) -> bool:
    return isinstance(value, str) and value[:1] in ("$", "@", "%")


def _resolved(config: dict[str, Any], key: str, recipe: Recipe) -> Any:
    return Recipe.of_parser(ConfigParser(copy.deepcopy(config)), recipe.trusted_modules, (key,))[key]
