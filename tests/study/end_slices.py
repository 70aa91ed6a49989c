"""How often the slice that a model calls most suspicious is an end of its volume: an outlier, and rarely the finding.

python -m tests.study.end_slices OUTPUT_DIR/ARM …, from the repository root, where OUTPUT_DIR is that of a study or a
cross-validation. Prints, an arm and seed, the share of the test cases whose first slice by score is the lowest or the
highest slice of the bag, the same by attention, and the share that a random order would have.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from bundle.study.piece import Piece

Record = Mapping[str, Any]
SHOWN = ("score", "attention")


def ends(record: Record) -> tuple[float, ...]:
    """1 or 0 for each of `SHOWN`, and the chance, of a classified case; one without a single first slice has NaN."""
    slices = record["slices"]
    indices = [one["index"] for one in slices]
    outer = {min(indices), max(indices)}
    found = []
    for by in SHOWN:
        values = [one.get(by) for one in slices]
        known = None not in values and values.count(max(values)) == 1
        found.append(float(indices[int(np.argmax(values))] in outer) if known else float("nan"))
    return (*found, len(outer) / len(indices))


def of_cases(records: Iterable[Record]) -> np.ndarray:
    """Mean of `ends` over the classified cases; NaN for an order that none has."""
    rows = np.array([ends(record) for record in records if record["status"] != "refused"]).reshape(-1, len(SHOWN) + 1)
    known = np.isfinite(rows)
    return np.where(known, rows, 0).sum(axis=0) / np.where(known.any(axis=0), known.sum(axis=0), np.nan)


def main(arms: list[str]) -> None:
    """Print a row an arm and seed."""
    print(f"{'an end slice is the first':32}{'seed':>6}{'by score':>12}{'by attention':>14}{'by chance':>12}")
    for arm in map(Path, arms):
        seeds: dict[int, list[Path]] = {}
        for done in sorted(arm.glob("*/piece.json")):
            seeds.setdefault(Piece.load(done.parent).settings["seed"], []).append(done.parent / "test" / "cases")
        if not seeds:
            raise SystemExit(f"{arm} holds no finished training: give the folder of an arm")
        for seed, folders in sorted(seeds.items()):
            paths = [path for folder in folders for path in sorted(folder.glob("[!.]*.json"))]
            score, attention, chance = of_cases(json.loads(path.read_text(encoding="utf-8")) for path in paths)
            print(f"{arm.name:32}{seed:6}{score:12.2f}{attention:14.2f}{chance:12.2f}")


if __name__ == "__main__":
    main(sys.argv[1:])
