"""What a folder holds, series by series, and which of it can be read: the list that `bundle.data.series` prints."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ..errors import InputError, Refusal, input_error_behind
from .dicom_files import files_below
from .metaimage import is_metaimage_name
from .nifti import is_nifti_name
from .nrrd import is_nrrd_name
from .policy import ReaderPolicy, SeriesRules
from .series import read_series, read_volume
from .series_choice import FoundSeries, Study, choose_series, find_series
from .volume import Volume

__all__ = ["list_series", "main"]

COLUMNS = ("#", "series", "images", "size", "spacing mm", "plane", "verdict", "reason")


def list_series(
    folder: str | Path, policy: ReaderPolicy | None = None, *, descriptions: bool = False, progress: bool = False
) -> dict[str, Any]:
    """Read every series and image file below a folder and say how each ended.

    Args:
        folder: searched with all folders below.
        policy: limits of what is accepted, and the rules that choose.
        descriptions: also give SeriesDescription, free text in which a patient may be named.
        progress: show a bar.

    Returns:
        JSON-serialisable: `series`, a list of what each declares with `verdict` ("chosen", "readable" or "refused"),
        `reason_code` and `reason`; `choice`, the refusal where the rules leave not one; counts of other files.

    Raises:
        InputError: no such folder.
        Refusal: `no_images`, and what `find_series` refuses.
    """
    policy = policy or ReaderPolicy()
    folder = Path(folder).expanduser()
    if not folder.exists():
        raise InputError(f"{folder} does not exist")
    if not folder.is_dir() and not folder.is_file():
        raise InputError(f"{folder} is neither a folder nor a file")
    files = files_below(folder) if folder.is_dir() else [folder]
    others = [path for path in files if is_nifti_name(path) or is_metaimage_name(path) or is_nrrd_name(path)]
    study, choice, chosen = _studied([path for path in files if path not in set(others)], policy, bool(others))
    hidden = None if progress else True  # None: hidden where the screen is a file
    alone = replace(policy, series=SeriesRules(), n4_bias_correction=False)
    rows = []
    for series in tqdm(study.series, "reading series", disable=hidden, unit="series", leave=False):
        row = series.facts() | _verdict(lambda s=series: read_series(s, alone), series is chosen)
        if descriptions:
            row["description"] = _printable(series.headers[0].description) if series.headers else ""
        rows.append(row)
    for path in tqdm(others, "reading files", disable=hidden, unit="file", leave=False):
        row = {"file": _printable(path.name), "images": None, "plane": None, "modality": None}
        rows.append(row | _verdict(lambda p=path: _any_channels(p, alone), False))
    return {
        "series": rows,
        "choice": None if choice is None else {"reason_code": choice.code, "reason": choice.sentence},
        "other_objects": study.other_objects,
        "other_files": study.other_files,
        "damaged_files": [
            {"file": _printable(path.name), "reason_code": refusal.code, "reason": refusal.sentence}
            for path, refusal in study.damaged
        ],
    }


def _printable(text: str) -> str:
    """Text that a terminal shows and does not obey."""
    shown = (c if c.isprintable() else c.encode("unicode_escape", "backslashreplace").decode() for c in text)
    return "".join(shown).encode("utf-8", "backslashreplace").decode()


def _studied(
    files: Sequence[Path], policy: ReaderPolicy, may_be_none: bool
) -> tuple[Study, Refusal | None, FoundSeries | None]:
    try:
        study = find_series(files, keep_damaged=True)
    except Refusal as refusal:
        if refusal.code != "no_images" or not may_be_none:
            raise
        return Study([], 0, len(files)), None, None
    if study.damaged:
        return study, study.damaged[0][1], None
    try:
        return study, None, choose_series(study, policy)
    except Refusal as refusal:
        return study, refusal, None


def _any_channels(path: Path, policy: ReaderPolicy) -> Volume:
    try:
        return read_volume(path, policy)
    except Refusal as refusal:
        if refusal.code != "channel_count":
            raise
        return read_volume(path, policy, int(refusal.facts["found"]))


def _verdict(read: Any, chosen: bool) -> dict[str, Any]:
    try:
        volume: Volume = read()
    except Refusal as refusal:
        return {"verdict": "refused", "reason_code": refusal.code, "reason": refusal.sentence}
    sizes = (volume.affine[:3, :3] ** 2).sum(axis=0) ** 0.5
    return {
        "verdict": "chosen" if chosen else "readable",
        "reason_code": None,
        "reason": "; ".join(volume.facts.get("corrections", [])) or None,
        "shape": list(volume.array.shape),
        "voxel_mm": [round(float(size), 4) for size in sizes],
        "tilt_degrees": volume.facts.get("tilt_degrees", 0.0),
    }


def _table(found: dict[str, Any]) -> str:
    rows: list[Sequence[str]] = [COLUMNS]
    for number, row in enumerate(found["series"], start=1):
        name = row.get("file") or row["modality"] + ("" if row["kind"] == "image" else f" {row['kind']}")
        name += " contrast" if row.get("contrast") else ""
        name += f" '{row['description']}'" if row.get("description") else ""
        size = " × ".join(map(str, row.get("shape", []))) or "–"
        spacing = " × ".join(f"{v:.2f}" for v in row.get("voxel_mm", [])) or "–"
        if not row.get("voxel_mm") and row.get("spacing_mm"):
            spacing = f"{row['spacing_mm']:.2f} apart"
        plane = (row.get("plane") or "–") + (f", tilted {row['tilt_degrees']:.1f}°" if row.get("tilt_degrees") else "")
        reason = f"{row['reason_code']}: {row['reason']}" if row["reason_code"] else row["reason"] or ""
        rows.append((str(number), name, str(row.get("images") or "–"), size, spacing, plane, row["verdict"], reason))
    widths = [max(len(row[i]) for row in rows) for i in range(len(COLUMNS) - 1)]
    lines = ["  ".join([*(c.ljust(w) for c, w in zip(row, widths, strict=False)), row[-1]]).rstrip() for row in rows]
    lines.append(
        f"beside them: {found['other_objects']} DICOM objects without images, {found['other_files']} other files"
    )
    lines += [f"damaged: {row['file']} ({row['reason_code']})" for row in found["damaged_files"]]
    if found["choice"]:
        lines.append(f"as one case this is refused: {found['choice']['reason']} ({found['choice']['reason_code']})")
    return "\n".join(lines)


def _policy(config_files: Sequence[str] | None) -> ReaderPolicy:
    """The reader's policy of some configs, or the default one."""
    if not config_files:
        return ReaderPolicy()
    from monai.bundle import ConfigParser

    names = ", ".join(config_files)
    for file in config_files:
        if not Path(file).is_file():
            raise InputError(f"there is no config file {file}")
    try:
        parser = ConfigParser()
        parser.read_config(list(config_files))
        policy = parser.get_parsed_content("reader_policy") if "reader_policy" in parser else None
    except Exception as error:  # MONAI and PyYAML raise a dozen types for what is no config
        cause = input_error_behind(error)
        raise InputError(f"{names}: reader_policy cannot be made from it: {cause or type(error).__name__}") from error
    if not isinstance(policy, ReaderPolicy):
        raise InputError(
            f"{names}: no reader_policy in it, or one that is no bundle.ReaderPolicy; give configs/train.yaml first"
        )
    return policy


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line: list the series below a folder.

    Args:
        arguments: the command line; by default that of the process.

    Returns:
        0 where every series can be read and the rules leave one; 3 where something is refused (2: nothing to list).

    Raises:
        InputError: no such folder, or nothing to list in it.
    """
    parser = argparse.ArgumentParser(
        prog="python -m bundle.data.series",
        description="List the series and image files below a folder: what each is, whether it can be read, and if not "
        "why. Pixels are read too, so a verdict is what training and inference would meet.",
    )
    parser.add_argument("folder", metavar="FOLDER", help="folder with DICOM or image files, or one file")
    parser.add_argument(
        "--config_file",
        action="append",
        help="take reader_policy (limits, series rules) from this config; may be repeated",
    )
    parser.add_argument("--json", action="store_true", help="print JSON, with the UIDs of the series")
    parser.add_argument(
        "--descriptions", action="store_true", help="show SeriesDescription: free text in which a patient may be named"
    )
    given = parser.parse_args(arguments)
    policy = _policy(given.config_file)
    found = list_series(given.folder, policy, descriptions=given.descriptions, progress=not given.json)
    text = json.dumps(found, indent=2) if given.json else _table(found)
    encoding = sys.stdout.encoding or "utf-8"
    print(text.encode(encoding, "backslashreplace").decode(encoding))
    refused = (
        found["choice"] is not None
        or bool(found["damaged_files"])
        or any(row["verdict"] == "refused" for row in found["series"])
    )
    return 3 if refused else 0
