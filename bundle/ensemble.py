"""Weights of several trainings → those of one network that gives their mean: `scripts/ensemble MODEL … --out FILE`.

It stands beside `recipe` and `weights`, outside the rooms of data flow: it joins both of several files.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from .errors import InputError, command_line
from .model.ensemble import EnsembleNetwork
from .recipe import CALIBRATION, Recipe
from .weights import load_network, read_checkpoint, save_atomically

__all__ = ["make_ensemble"]

# How members were made may differ: it is no part of what reads a scan for them.
OF_A_MEMBER = (
    "network_def", "norm", "scorer", "selection", "sampling_strategy", "bag_size", "top_k", "dropout", *CALIBRATION
)  # fmt: skip
UNCALIBRATED = {"threshold": 0.5, "calibration_temperature": 1.0, "abstain_below": 0.0}


def make_ensemble(models: Sequence[str | Path], out: str | Path, trusted_modules: Sequence[str] = ()) -> None:
    """Save the ensemble of trained networks as a weights file with a recipe, which is used as any other.

    Members may differ in seed, fold, recipe of training and network; preparation, channels and classes must be alike.
    Their calibration is left behind.

    Args:
        models: weights files of trainings, two or more.
        out: file to write.
        trusted_modules: modules of your own classes that the recipes name.

    Raises:
        InputError: when a file cannot be used, is given twice, is an ensemble, or members do not fit together.
    """
    paths = [Path(model) for model in models]
    if Path(out).resolve() in [path.resolve() for path in paths]:
        raise InputError(f"--out: {out} is one of the members; give another file")
    contents = [read_checkpoint(path) for path in paths]
    recipes = [Recipe.load(path, tuple(trusted_modules)) for path in paths]
    _check_alike(paths, recipes)
    for index, (path, content) in enumerate(zip(paths, contents, strict=True)):
        if "members" in recipes[index]["network_def"]:
            raise InputError(f"{path} is an ensemble: give its members instead")
        for earlier in range(index):
            if contents[earlier]["model"].keys() == content["model"].keys() and all(
                torch.equal(contents[earlier]["model"][name], tensor) for name, tensor in content["model"].items()
            ):
                raise InputError(f"{path} holds the same weights as {paths[earlier]}: give each member once")
    network = EnsembleNetwork(
        [load_network(recipe.build("network_def"), path) for recipe, path in zip(recipes, paths, strict=True)]  # type: ignore[misc]
    )
    # What a head alone can tell is told before anything is saved.
    network.head(torch.zeros(1, 1, network.num_features), torch.ones(1, 1, dtype=torch.bool))
    shared = {
        key: value
        for key, value in recipes[0].config.items()
        if key not in OF_A_MEMBER or all(recipe.config.get(key) == value for recipe in recipes)
    }
    definition = {"_target_": "bundle.EnsembleNetwork", "members": [recipe["network_def"] for recipe in recipes]}
    recipe = Recipe({**shared, **UNCALIBRATED, "network_def": definition}, tuple(trusted_modules))
    content = {
        "model": network.state_dict(),
        "recipe": recipe.text,
        "recipe_hash": recipe.hash,
        "epoch": None,
        "trained_on": _trained_on(paths, contents),
    }
    save_atomically(content, out)


def _check_alike(paths: Sequence[Path], recipes: Sequence[Recipe]) -> None:
    first = recipes[0].config
    for path, recipe in zip(paths[1:], recipes[1:], strict=True):
        for key in sorted({*first, *recipe.config} - set(OF_A_MEMBER)):
            if first.get(key) != recipe.config.get(key):
                raise InputError(
                    f"{path} and {paths[0]} differ in {key}: the members of an ensemble see the same bags, so they "
                    "must have been trained with the same preparation, channels and classes"
                )


def _trained_on(paths: Sequence[Path], contents: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Datalist and folds that any member has seen; one fold as a number, so that its test cases may be evaluated."""
    known = [dict(content.get("trained_on") or {}) for content in contents]
    silent = [path for path, one in zip(paths, known, strict=True) if not {"datalist", "fold"} <= one.keys()]
    if len(silent) == len(paths):
        return {}
    if silent:
        raise InputError(f"{silent[0]} does not tell what it was trained on, as other members do: train it again")
    for path, one in zip(paths[1:], known[1:], strict=True):
        if one["datalist"] != known[0]["datalist"]:
            raise InputError(
                f"{path} and {paths[0]} were trained on different datalists: nothing could tell which cases none of "
                "them has seen"
            )
    folds = sorted({one["fold"] for one in known})
    return {"datalist": known[0]["datalist"], "fold": folds[0] if len(folds) == 1 else folds}


def main() -> int:
    """Make an ensemble and say what it is good for."""
    parser = argparse.ArgumentParser(
        prog="ensemble",
        description="The mean of several trained networks as one weights file, for evaluation, calibration, inference "
        "and packaging. Its time is that of its members together.",
    )
    parser.add_argument("models", nargs="+", type=Path, help="model.pt of each training run")
    parser.add_argument(
        "--out", required=True, type=Path, help="weights file to write, such as output/ensemble/model.pt"
    )
    parser.add_argument("--module", action="append", default=[], help="module of your own classes; may be repeated")
    given = parser.parse_args()
    make_ensemble(given.models, given.out, given.module)
    print(f"{given.out}: {len(given.models)} networks as one; calibration starts anew (threshold 0.5)")
    return 0


if __name__ == "__main__":
    command_line(main)
