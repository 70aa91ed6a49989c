"""Tables of single trainings, on hand-made rows and against what the study itself wrote of its arms."""

from __future__ import annotations

import csv
import re
from pathlib import Path

import pytest

from tests.study.results_tables import by_fold, by_seed, filled, means

RESULTS = Path(__file__).parents[2] / "docs" / "results"


def piece(arm: str, fold: int, auc: float, variance: float, seed: int = 0) -> dict[str, str]:
    values = {"test_auc": auc, "test_nll": 0.5, "hit_1_score": 0.25, "nll_mean": 0.1, "nll_variance": variance}
    values |= {"val_accuracy_sd": 0.02, "val_sampling_error": 0.05}
    return {"arm": arm, "seed": str(seed), "fold": str(fold)} | {name: str(value) for name, value in values.items()}


def test_a_table_by_fold_has_a_column_a_fold_and_the_mean():
    rows = [piece("a", 0, 0.5, 0.4), piece("a", 1, 1.0, 0.2), piece("b", 1, 0.75, 0.1)]
    lines = by_fold(rows, ["b", "a"]).splitlines()
    assert lines[0] == "|  | arm | fold 0 | fold 1 | mean |"
    assert lines[2:4] == ["| AUC | `b` |  | .750 |  |", "| AUC | `a` | .500 | 1.000 | .750 |"]
    assert lines[-1] == "| its variance | `a` | .400 | .200 | .300 |"


def test_a_table_by_fold_refuses_two_seeds():
    with pytest.raises(ValueError, match="a has a fold more than once"):
        by_fold([piece("a", 0, 0.5, 0.4), piece("a", 0, 0.5, 0.4, seed=1)], [])


def test_a_table_by_seed_has_the_mean_of_the_folds_where_none_is_missing():
    rows = [piece("a", fold, auc, 0.4, seed) for seed, fold, auc in ((0, 0, 0.5), (0, 1, 1.0), (10, 0, 0.8), (2, 1, 1))]
    rows = [{**row, "hit_1_attention": ""} for row in rows] + [{**piece("b", 1, 0.9, 0.1), "hit_1_attention": "1"}]
    lines = by_seed(rows, ["b", "a"]).splitlines()
    assert lines[0] == "| mean of the folds | arm | seed 0 | seed 2 | seed 10 |"
    assert "| AUC | `a` | .750 |  |  |" in lines
    assert "| AUC | `b` |  |  |  |" in lines  # of one fold of two
    assert "| by attention | `a` |  |  |  |" in lines


def test_means_are_compared_on_the_folds_that_both_have():
    rows = [piece("a", 0, 0.5, 0.4), piece("a", 1, 1.0, 0.2), piece("b", 1, 0.75, 0.1), piece("b", 2, 0.75, 9.0)]
    head, _, a, b = ([cell.strip() for cell in line.split("|")] for line in means(rows, []).splitlines())
    of_a, of_b = dict(zip(head, a, strict=True)), dict(zip(head, b, strict=True))
    assert (of_a["AUC"], of_a["trainings"], of_a["times steadier than `a`"]) == (".750", "2", "")
    assert (of_b["its variance"], of_b["times steadier than `a`"]) == ("4.550", "2.0 (2.0–2.0)")


@pytest.mark.parametrize("name", ["side_founding", "side_confirm", "needle1", "phantom"])
def test_means_are_those_of_the_study(name: str):
    with (RESULTS / f"{name}_arms.csv").open(newline="", encoding="utf-8") as file:
        arms = list(csv.DictReader(file))
    with (RESULTS / f"{name}_pieces.csv").open(newline="", encoding="utf-8") as file:
        pieces = list(csv.DictReader(file))
    reference = next(row["arm"] for row in arms if row["times_steadier_low"] == row["times_steadier_high"] == "1")
    others = [row for row in arms if row["arm"] != reference]
    order = [reference, *(row["arm"] for row in others)]
    head, _, _, *lines = ([cell.strip() for cell in line.split("|")] for line in means(pieces, order).splitlines())
    for row, line in zip(others, lines, strict=True):
        shown = dict(zip(head, line, strict=True))
        assert float(shown["its variance"]) == pytest.approx(float(row["nll_variance"]), abs=0.0006), row["arm"]
        steadier = [float(row[f"times_steadier{end}"]) for end in ("", "_low", "_high")]
        told = re.findall(r"[\d.]+", shown[f"times steadier than `{reference}`"])
        assert list(map(float, told)) == pytest.approx(steadier, abs=0.06), row["arm"]  # the files have five digits


def test_a_new_table_is_parted_from_the_text_below_it():
    line = "<!-- table: side_founding means before_60 -->\n\n"
    once = filled(f"{line}Text.\n", RESULTS)
    assert once.startswith(f"{line}| arm |")
    assert once.endswith("|\n\nText.\n")
    assert filled(once, RESULTS) == once
