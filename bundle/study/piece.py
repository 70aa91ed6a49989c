"""One piece of a study: a training on one fold with one seed, evaluated on its inner validation and its test cases.

A pre-training of the encoder on the training cases of the fold may come before it.
"""

from __future__ import annotations

import copy
import json
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from monai.bundle import ConfigParser, run

from ..data.datalist import hash_of
from ..errors import InputError, command_line
from ..files import file_hash, write_json
from ..recipe import holds_expression
from ..settings import META, NOT_PART_OF_A_RUN
from .arms import Pretraining
from .out_of_fold import read_predictions
from .steadiness import read_log, steadiness

try:
    import fcntl
except ImportError:  # Windows: there one run at a time is the user's affair
    fcntl = None  # type: ignore[assignment]

__all__ = ["BUSY", "Piece", "evaluated", "piece_result"]

BUSY = 75  # exit status of a piece that another process is at
SECTIONS = ("validation", "test")
PRETRAINED = "pretrained"  # the folder of the pre-training within that of the piece
FORMAT = 1
# The report calibrates by itself, so the records hold what the network says, even of weights calibrated since.
AS_TRAINED = {"results::temperature": 1.0, "results::threshold": 0.5, "results::abstain_below": 0.0}
NO_DIFFERENCE = (*NOT_PART_OF_A_RUN, META, "imports", "threshold", "calibration_temperature", "abstain_below")
# What takes space and is needed for going on only, and what a killed process may leave.
LEFT_OVER = ("**/checkpoint.pt", "**/checkpoint.previous.pt", "**/.part-*")


class Piece(NamedTuple):
    """What one piece does.

    Attributes:
        folder: gets the run of the training (model.pt, epochs.csv, …), `validation/` and `test/` of the evaluations,
            and at last `piece.json`, which says that the piece is done.
        config_files: of the training, as for `python -m monai.bundle run`; paths.
        settings: overrides of the config, among them `fold` and `seed`.
        pretrain: what turns the training into the pre-training of its encoder, which is then done first, into
            `pretrained/`; None for none.
    """

    folder: Path
    config_files: tuple[str, ...]
    settings: Mapping[str, Any]
    pretrain: Pretraining | None = None

    @property
    def config(self) -> ConfigParser:
        """Of the training, as MONAI merges it."""
        config = ConfigParser()
        base, _ = _merged(self._dated_files)
        config.read_config(copy.deepcopy(base))
        config.update(dict(self.settings))
        return config

    @property
    def _dated_files(self) -> tuple[tuple[str, int], ...]:
        return _dated(self.config_files)

    def made_from(self) -> dict[str, str]:
        """What the result depends on, as {key: canonical JSON}: settings, overlaid definitions, content of files.

        Definitions of train.yaml itself are left out: they belong to the version of the code.
        """
        config = self.config
        merged: dict[str, Any] = config.config  # type: ignore[assignment]
        overlaid = _merged(self._dated_files)[1] | {_top_level(key) for key in self.settings}
        kept = _differing(merged, overlaid)
        datalist = config.get_parsed_content("datalist")
        kept["datalist"] = _datalist_hash(datalist, os.stat(datalist).st_mtime_ns if os.path.exists(datalist) else 0)
        start = merged.get("encoder_weights")
        if isinstance(start, str) and os.path.isfile(start):
            kept["encoder_weights_content"] = file_hash(start)
        if self.pretrain is not None:
            kept |= self._pretraining_made_from(self.pretrain)
        return {key: json.dumps(value, sort_keys=True, default=str) for key, value in kept.items()}

    def _pretraining_made_from(self, pretrain: Pretraining) -> dict[str, Any]:
        """What a pre-training adds to what a piece depends on.

        Its settings are those that it runs with, be they of its own or of the training. The first entry is a
        definition, which tells a piece with a pre-training from one without.
        """
        files = (*self._dated_files, *_dated(pretrain.config_files))
        config = ConfigParser()
        config.read_config(copy.deepcopy(_merged(files)[0]))
        config.update({**self.settings, **pretrain.settings})
        merged: dict[str, Any] = config.config  # type: ignore[assignment]
        own = [ConfigParser.load_config_file(file) for file in pretrain.config_files[1:]]  # the first is of the code
        overlaid = {_top_level(key) for overlay in (*own, pretrain.settings) for key in overlay}
        kept = {f"pretrain::{key}": value for key, value in _differing(merged, overlaid).items()}
        return {"pretrain": {"files": [Path(file).name for file in pretrain.config_files]}, **kept}

    def save(self) -> None:
        """Write what a process of its own needs to do this piece."""
        content: dict[str, Any] = {"config_files": list(self.config_files), "settings": dict(self.settings)}
        if self.pretrain is not None:
            content["pretrain"] = self.pretrain._asdict()
        write_json(self.folder / "settings.json", content)

    @classmethod
    def load(cls, folder: str | Path) -> Piece:
        """The piece that `save` wrote."""
        content = json.loads((Path(folder) / "settings.json").read_text(encoding="utf-8"))
        pretrain = content.get("pretrain")
        if pretrain is not None:
            pretrain = Pretraining(tuple(pretrain["config_files"]), pretrain["settings"])
        return cls(Path(folder), tuple(content["config_files"]), content["settings"], pretrain)


def _differing(merged: Mapping[str, Any], overlaid: Set[str]) -> dict[str, Any]:
    """Of a merged config what makes a difference: settings, and definitions that are not those of its first file."""
    return {
        key: value
        for key, value in merged.items()
        if key not in NO_DIFFERENCE and (_top_level(key) in overlaid or not _is_definition(value))
    }


def _dated(files: Sequence[str]) -> tuple[tuple[str, int], ...]:
    return tuple((file, os.stat(file).st_mtime_ns) for file in files)


# A study asks for the same few files once for each of its pieces, and reading train.yaml takes a tenth of a second.
@lru_cache(maxsize=256)
def _merged(files: tuple[tuple[str, int], ...]) -> tuple[dict[str, Any], frozenset[str]]:
    """Config of files, given with the time of their last change, and the keys that overlays of the first one set."""
    paths = [path for path, _ in files]
    overlaid = frozenset(_top_level(key) for path in paths[1:] for key in ConfigParser.load_config_file(path))
    return ConfigParser.load_config_files(paths), overlaid


@lru_cache(maxsize=8)
def _datalist_hash(path: str, changed: int) -> str:
    return hash_of(path)


def _top_level(key: str) -> str:
    return key.lstrip("+").replace("#", "::").split("::")[0]


def _is_definition(value: Any) -> bool:
    return isinstance(value, dict) or holds_expression(value)


def piece_result(piece: Piece) -> dict[str, Any] | None:
    """What a piece that is done has found; None where it is not done.

    A plain setting that one side does not know came with another version of the code, whose default changes nothing.

    Raises:
        InputError: the folder holds a piece made with other settings.
    """
    try:
        result: dict[str, Any] = json.loads((piece.folder / "piece.json").read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None
    if result.get("format") != FORMAT:
        raise InputError(f"{piece.folder} was made by another version: choose another output_dir, or delete it")
    then, now = result["made_from"], piece.made_from()
    pairs = [(key, then.get(key), now.get(key)) for key in {**then, **now}]
    # A definition that one side does not have is that of train.yaml there.
    changed = [
        f"{key} {_told(before)} → {_told(after)}"
        for key, before, after in pairs
        if before != after and (None not in (before, after) or _is_definition(json.loads(before or after or "null")))
    ]
    if changed:
        told = "; ".join(changed[:3])
        raise InputError(f"{piece.folder} was made otherwise ({told}): choose another output_dir, or delete it")
    return result


def _told(value: str | None) -> str:
    return "that of train.yaml" if value is None else value


def train(piece: Piece) -> None:
    """The training, after the pre-training if there is to be one; an interrupted one goes on.

    Raises:
        InputError: an overlay was changed during the pre-training.
    """
    settings = dict(piece.settings)
    if piece.pretrain is not None:
        folder, made_from = piece.folder / PRETRAINED, piece.made_from()
        files = [*piece.config_files, *piece.pretrain.config_files]
        # MONAI leaves out what is None.
        own = {key: "null" if value is None else value for key, value in piece.pretrain.settings.items()}
        run(config_file=files, **{**settings, **own, "output_dir": str(folder)})
        if piece.made_from() != made_from:  # the training reads the overlays only now
            raise InputError(f"the settings of {piece.folder} changed while its encoder was pre-trained: start it anew")
        settings["encoder_weights"] = str(folder / "encoder.pt")
    run(config_file=list(piece.config_files), **{**settings, "output_dir": str(piece.folder)})


def evaluated(piece: Piece, section: str) -> bool:
    """Whether the evaluation of a section is there, and younger than the weights."""
    found, weights = piece.folder / section / "metrics.json", piece.folder / "model.pt"
    return found.exists() and found.stat().st_mtime >= weights.stat().st_mtime


def evaluate(piece: Piece, section: str) -> None:
    """Evaluate the weights of a piece on a section of its fold, unless that is done."""
    if evaluated(piece, section):
        return
    files = list(piece.config_files)
    overlay = Path(files[0]).with_name("evaluate.yaml")
    overlay = overlay if overlay.exists() else overlay.with_suffix(".json")
    # Intervals of one fold say little; the study makes those that it reports.
    asked = {"figure_cases": 0, "resamples": 100, "occlusion": section != "validation", **AS_TRAINED}
    settings = {**asked, **piece.settings, "section": section}
    run(config_file=[*files, str(overlay)], **settings, output_dir=str(piece.folder))


def do_piece(piece: Piece) -> None:
    """Train, evaluate on both sections, sum up. What is done is not done again."""
    begun, goes_on = time.monotonic(), any(piece.folder.glob("**/checkpoint.pt"))
    made_from = piece.made_from()  # now: an overlay may be changed while the training runs
    train(piece)
    for section in SECTIONS:
        evaluate(piece, section)
    # Of the last part alone it would mislead a projection.
    seconds = None if goes_on else round(time.monotonic() - begun, 1)
    piece.save()  # again: another command may have changed it meanwhile
    write_json(piece.folder / "piece.json", {**_summary(piece), "made_from": made_from, "seconds": seconds})


def _summary(piece: Piece) -> dict[str, Any]:
    folder = piece.folder
    metrics = {
        section: json.loads((folder / section / "metrics.json").read_text(encoding="utf-8")) for section in SECTIONS
    }
    log = read_log(folder / "epochs.csv")
    return {
        "format": FORMAT,
        "fold": piece.settings["fold"],
        "seed": piece.settings["seed"],
        "scores": {section: {k: v["value"] for k, v in found["scores"].items()} for section, found in metrics.items()},
        "majority_class": metrics["test"]["majority_class"],
        "key_slices": {k: v for k, v in metrics["test"]["key_slices"].items() if k != "intervals"},
        # Near 0 for a model that hedges. With two classes both have the same.
        "probability_sd": float(read_predictions(folder / "test").probabilities.std(axis=0).mean()),
        "steadiness": steadiness(log, read_log(folder / "batches.csv"), metrics["validation"]["counts"]["scored"]),
        "max_epochs": int(log["epoch"].max()),
    }


@contextmanager
def _claimed(folder: Path) -> Iterator[bool]:
    """Whether no other process is at this piece; the claim ends with the process, however it ends."""
    with (folder / ".lock").open("w") as file:
        if fcntl is not None:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield False
                return
        yield True


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line of the process that does one piece: its folder, and "train" or a section to do no more than that."""
    folder, *only = sys.argv[1:] if arguments is None else arguments
    piece = Piece.load(folder)
    with _claimed(piece.folder) as mine:
        if not mine:
            return BUSY
        if only:
            train(piece) if only == ["train"] else evaluate(piece, *only)
            return 0
        if piece_result(piece) is None:
            do_piece(piece)
        for name in LEFT_OVER:
            for path in piece.folder.glob(name):
                path.unlink(missing_ok=True)
    return 0


if __name__ == "__main__":
    command_line(main)
