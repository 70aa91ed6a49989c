"""A model and everything it needs as one folder and one zip: `scripts/package MODEL OUT`.

It stands beside `recipe` and `weights`, outside the rooms of data flow: it carries all of them and none needs it.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import re
import shutil
import sys
import tempfile
import zipfile
from importlib import import_module, metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from .errors import InputError, command_line
from .files import replacing
from .flatten import WORKFLOWS, filled_metadata, flattened_config
from .recipe import Recipe
from .settings import shipped_config
from .weights import load_network, read_checkpoint

__all__ = ["make_package"]

ROOT = Path(__file__).resolve().parents[1]
DEFAULT_NAME = "dual_stream_mil"
DOCUMENTS = {".md", ".png", ".svg"}
CARD_SECTION = "## This package"


def make_package(
    model: str | Path, out: str | Path, name: str = DEFAULT_NAME, modules: tuple[str, ...] = ()
) -> tuple[Path, Path]:
    """Build OUT/<name> and OUT/<name>.zip from trained weights; the same input gives the same bytes.

    Args:
        model: weights saved by training, with their recipe.
        out: folder to build in; made if missing.
        name: of the package.
        modules: top-level modules of the user's own classes that the recipe names. Installed ones become requirements,
            others are packed.

    Returns:
        The folder and the zip.

    Raises:
        InputError: when the weights or a module cannot be used, or something of that name is there already.
    """
    model, out, modules = Path(model), Path(out), tuple(modules)
    if not re.fullmatch(r"\w[\w.-]*", name, re.ASCII):
        raise InputError(f"the name of a package holds letters, digits and _ . - only, not {name!r}")
    content, recipe = read_checkpoint(model), Recipe.load(model, modules)
    load_network(recipe.build("network_def"), model)
    folder, archive = out / name, out / f"{name}.zip"
    if out.exists() and not out.is_dir():
        raise InputError(f"{out} is a file; give the folder that the package is to be made in")
    for path in (folder, archive):
        if path.exists() or path.is_symlink():
            raise InputError(f"{path} is already there: choose another --name or folder, or remove it")
    with replacing(archive) as temporary_archive:
        temporary = Path(tempfile.mkdtemp(prefix=f".{name}.", dir=out))
        try:
            temporary.chmod(0o777 & ~_umask())
            _write_folder(temporary, content, recipe, modules)
            _write_zip(temporary, temporary_archive, name)
            os.rename(temporary, folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    return folder, archive


def _write_folder(folder: Path, content: dict[str, Any], recipe: Recipe, modules: tuple[str, ...]) -> None:
    for name in ("configs", "models", "docs"):
        (folder / name).mkdir()
    for workflow in WORKFLOWS:
        config = flattened_config(ROOT / "configs", workflow, recipe, modules)
        _write_json(folder / "configs" / f"{workflow}.json", config)
    # Changes nothing but where a training runs, so it goes as it is.
    several = shipped_config(ROOT / "configs", ("multi_gpu_train",))
    _write_json(folder / "configs" / "multi_gpu_train.json", several)
    about = filled_metadata(json.loads(_own("configs/metadata.json").read_text(encoding="utf-8")), recipe)
    value = content.get("value", math.nan)
    about["weights"] = {
        "recipe": f"sha256:{recipe.hash}",
        "epoch": content.get("epoch"),
        "chosen_by": {content.get("metric", ""): value} if math.isfinite(value) else {},
    }
    _write_json(folder / "configs" / "metadata.json", about)
    # Tensors under their own names too: monai.bundle.load without key_in_ckpt would leave a network with random weights
    # and say nothing. Both names share the memory, so that the file hardly grows.
    with (folder / "models" / "model.pt").open("wb") as file:
        torch.save({**content["model"], **content}, file)
    for name in ("configs/logging.conf", "constraints.txt", "CITATION.cff", "LICENSE"):
        shutil.copyfile(_own(name), folder / name)
    _copy_code(ROOT / "bundle", folder / "bundle")
    requirements = _requirements()
    for module in modules:
        requirements += _pack_module(module, folder)
    (folder / "requirements.txt").write_text("\n".join(requirements) + "\n", encoding="utf-8")
    for path in sorted((ROOT / "docs").rglob("*")):
        if path.is_file() and path.suffix in DOCUMENTS:
            target = folder / path.relative_to(ROOT)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)
    card = folder / "docs" / "README.md"
    text = card.read_text(encoding="utf-8") if card.exists() else f"# {about['name']}\n\n{about['description']}\n"
    # A package can be packed again with other weights: the section of the former ones ends the card.
    text = text.split(f"\n{CARD_SECTION}\n")[0].rstrip()
    card.write_text(f"{text}\n\n{_card_section(recipe, about['weights'])}", encoding="utf-8")


def _own(name: str) -> Path:
    """A file of this checkout or package."""
    path = ROOT / name
    if not path.is_file():
        raise InputError(f"this checkout is incomplete: it has no {name}")
    return path


def _requirements() -> list[str]:
    if (ROOT / "requirements.txt").is_file():
        return (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    # Python 3.10 has no TOML reader of its own, but pip's.
    toml = import_module("tomllib" if sys.version_info >= (3, 11) else "pip._vendor.tomli")
    return list(toml.loads(_own("pyproject.toml").read_text(encoding="utf-8"))["project"]["dependencies"])


def _copy_code(source: Path, target: Path) -> None:
    for path in sorted(source.rglob("*.py")):
        copied = target / path.relative_to(source)
        copied.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, copied)


def _pack_module(module: str, folder: Path) -> list[str]:
    """Copy a module beside `bundle`, or give the requirement that installs it."""
    distributions = metadata.packages_distributions().get(module)
    if distributions:
        return [f"{name}=={metadata.version(name)}" for name in sorted(set(distributions))]
    found = find_spec(module) if "." not in module else None
    origin = Path(found.origin) if found is not None and found.origin else None
    if origin is None or not origin.is_file():
        raise InputError(f"there is no module '{module}' to pack: give the name that `import` takes, without a dot")
    if origin.name == "__init__.py":
        _copy_code(origin.parent, folder / module)
    else:
        shutil.copyfile(origin, folder / origin.name)
    return []


def _card_section(recipe: Recipe, weights: dict[str, Any]) -> str:
    height, width = recipe["image_size"]
    return f"""{CARD_SECTION}
- Classes: {", ".join(recipe["class_names"])}
- Channels: {", ".join(recipe["channels"])}
- Slices: {recipe["slicing_axis"]}, {height} × {width} pixels, {recipe["neighbours"]} neighbours on each side
- Network: {_network(recipe)}
- Operating point: probability {recipe["threshold"]:.4g}
- Calibration: temperature {recipe["calibration_temperature"]:.4g}; abstains {_abstention(recipe)}
- Weights: {_epoch(weights)}
- Recipe: {weights["recipe"]}

Research use only; not for diagnosis. From this folder, with Python 3.10 to 3.13:

    pip install -r requirements.txt -c constraints.txt
    python -m monai.bundle run --config_file configs/inference.json --dataset_dir SCANS
"""


def _network(recipe: Recipe) -> str:
    definition = recipe["network_def"]
    name = definition["_target_"].rpartition(".")[2]
    if name == "EnsembleNetwork":  # whose members may differ in all that follows
        kinds = [member["_target_"].rpartition(".")[2] for member in definition["members"]]
        return f"the mean of {len(kinds)} networks ({', '.join(dict.fromkeys(kinds))})"
    if name == "DualStreamMIL":  # of other networks these two settings say nothing
        name += f", selection {recipe['selection']}, scorer {recipe['scorer']}"
    return f"{name}; norm: {recipe['norm']}"


def _epoch(weights: dict[str, Any]) -> str:
    if weights["epoch"] is None:
        return "of several trainings"
    chosen = "".join(f", {metric} {value:.3f}" for metric, value in weights["chosen_by"].items())
    return f"epoch {weights['epoch']}{chosen} (on the cases that chose the epoch)"


def _abstention(recipe: Recipe) -> str:
    limit = recipe["abstain_below"]
    return f"below a confidence of {limit:.4g}" if limit else "never"


def _write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=4, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")


def _write_zip(folder: Path, archive: Path, name: str) -> None:
    # Stored, not compressed: weights hardly shrink, and what deflate writes depends on the zlib at hand.
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_STORED) as file:
        for path in sorted(path for path in folder.rglob("*") if path.is_file()):
            entry = zipfile.ZipInfo(f"{name}/{path.relative_to(folder).as_posix()}", (1980, 1, 1, 0, 0, 0))
            entry.external_attr = 0o100644 << 16
            entry.create_system = 3
            file.writestr(entry, path.read_bytes())


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def main() -> int:
    """Build a package and say where it is."""
    parser = argparse.ArgumentParser(prog="package", description="Trained weights to a MONAI bundle that runs alone.")
    parser.add_argument("model", help="model.pt of a training run")
    parser.add_argument("out", help="folder to make the package in")
    parser.add_argument("--name", default=DEFAULT_NAME, help="of the package (default: %(default)s)")
    parser.add_argument("--module", action="append", default=[], help="module of your own classes; may be repeated")
    arguments = parser.parse_args()
    folder, archive = make_package(arguments.model, arguments.out, arguments.name, tuple(arguments.module))
    digest = hashlib.sha256(archive.read_bytes()).hexdigest()
    print(f"{folder}: run it from there with")
    print("  python -m monai.bundle run --config_file configs/inference.json --dataset_dir SCANS")
    print(f"{archive}: {archive.stat().st_size / 1e6:.1f} MB, sha256 {digest}")
    return 0


if __name__ == "__main__":
    command_line(main)
