"""How many trainings of the tumour sets find the slice no more often than chance, by what orders the slices.

python -m tests.study.lost_slices, from the repository root, reads docs/results/*_pieces.csv and writes a table.
"""

from __future__ import annotations

import csv
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

from bundle.study.arms import read_study

__all__ = ["by_order", "order", "table"]

ROOT = Path(__file__).parents[2]
CHANCE = {"side": 0.379, "needle8": 0.293, "needle4": 0.184, "needle2": 0.102, "needle1": 0.054}  # of docs/results.md
OTHERS = ("side_founding", "side_default_other_rounding")  # another encoder, and one training done twice
ATTENTION, MEAN = "attention alone (gated attention, MILModel)", "mean pooling"


def order(settings: dict[str, Any]) -> str | None:
    """What orders the slices of a network with these settings; None: nothing does."""
    network = settings["network_def"]["_target_"].rpartition(".")[2]
    if network == "VolumeNet":
        return None
    if network in ("GatedAttentionMIL", "MonaiMIL"):
        return ATTENTION
    if network == "MeanPoolMIL":
        return MEAN
    taught = "taught" if settings["instance_weight"] else "not taught"
    return f"scorer {settings['scorer']}, {taught}"


def by_order(tables: Iterable[Path], orders: dict[str, str | None]) -> dict[str, tuple[int, int]]:
    """What orders the slices → trainings, and those whose hit@1 by score is no more than chance.

    Args:
        tables: pieces.csv files of a set each, whose names begin with that of the set; a training may be in several.
        orders: of each arm.
    """
    right: dict[tuple[str, str, str, str, str], float] = {}
    for path in tables:
        for row in csv.DictReader(path.read_text(encoding="utf-8").splitlines()):
            if row["hit_1_score"] and (ordered := orders[row["arm"]]):
                key = (ordered, path.name.split("_")[0], row["arm"], row["seed"], row["fold"])
                right.setdefault(key, float(row["hit_1_score"]))
    found: dict[str, tuple[int, int]] = {}
    for (ordered, name, *_), hits in right.items():
        trainings, lost = found.get(ordered, (0, 0))
        found[ordered] = trainings + 1, lost + (hits <= CHANCE[name])
    return found


def table() -> str:
    """The table of docs/results.md."""
    train = yaml.safe_load((ROOT / "configs" / "train.yaml").read_text(encoding="utf-8"))
    orders = {}
    for name, arm in read_study(ROOT / "configs" / "study.yaml")[1].items():
        settings = dict(train)
        for file in arm.files:
            settings |= yaml.safe_load(Path(file).read_text(encoding="utf-8"))
        orders[name] = order(settings | arm.settings)
    paths = [
        path
        for path in sorted((ROOT / "docs" / "results").glob("*_pieces.csv"))
        if path.name.split("_")[0] in CHANCE and not path.name.startswith(OTHERS)
    ]
    rows = sorted(by_order(paths, orders).items(), key=lambda item: item[1][1] / item[1][0])
    return "\n".join(
        [
            "| what orders the slices | trainings | first slice right no more often than chance |",
            "| --- | --- | --- |",
            *(f"| {name} | {trainings} | {lost} |" for name, (trainings, lost) in rows),
        ]
    )


if __name__ == "__main__":
    print(table())
