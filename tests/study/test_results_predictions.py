"""What docs/results.md shows comes out of the predictions beside its tables, by code that is not the study's."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn.metrics import f1_score, log_loss, roc_auc_score

RESULTS = Path(__file__).resolve().parents[2] / "docs" / "results"
KEPT = sorted(path.name.removesuffix("_predictions.csv") for path in RESULTS.glob("*_predictions.csv"))


def rows_of(name: str) -> list[dict[str, str]]:
    with (RESULTS / name).open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def scores(rows: list[dict[str, str]]) -> dict[str, float]:
    """Of the cases of one arm and seed."""
    label = np.array([int(row["label"]) for row in rows])
    p = np.array([float(row["probability_1"]) for row in rows])
    hits = [float(row["hit_1_score"]) for row in rows if row["hit_1_score"]]
    return {
        "auc": roc_auc_score(label, p),
        "nll": log_loss(label, p),
        "f1_macro": f1_score(label, p > 0.5, average="macro"),
        "calibrated_nll": log_loss(label, [float(row["calibrated_1"]) for row in rows]),
        "point_accuracy": np.mean([row["prediction"] == row["label"] for row in rows]),
        "hit_1_score": np.mean(hits),
    }


def by(rows: list[dict[str, str]], *keys: str) -> dict[Any, list[dict[str, str]]]:
    found: dict[Any, list[dict[str, str]]] = {}
    for row in rows:
        found.setdefault(tuple(row[key] for key in keys), []).append(row)
    return found


def test_some_are_kept() -> None:
    assert KEPT


@pytest.mark.parametrize("name", KEPT)
def test_the_tables_come_out_of_the_predictions(name: str) -> None:
    predictions = rows_of(f"{name}_predictions.csv")
    assert {row["status"] for row in predictions} == {"judged"}
    seeds: dict[str, dict[str, dict[str, float]]] = {}
    for (arm, seed), rows in by(predictions, "arm", "seed").items():
        assert len({row["case"] for row in rows}) == len(rows)
        seeds.setdefault(arm, {})[seed] = scores(rows)
    arms = rows_of(f"{name}_arms.csv")
    assert {row["arm"] for row in arms} == seeds.keys()
    for row in arms:
        for score in next(iter(seeds[row["arm"]].values())):
            found = np.mean([one[score] for one in seeds[row["arm"]].values()])
            assert float(row[score]) == pytest.approx(found, rel=1e-4), (row["arm"], score)


@pytest.mark.parametrize("name", KEPT)
def test_the_folds_come_out_of_the_predictions(name: str) -> None:
    pieces = by(rows_of(f"{name}_pieces.csv"), "arm", "seed", "fold")
    folds = by(rows_of(f"{name}_predictions.csv"), "arm", "seed", "fold")
    assert pieces.keys() == folds.keys()
    for place, rows in folds.items():
        assert float(pieces[place][0]["test_auc"]) == pytest.approx(scores(rows)["auc"], rel=1e-4), place
