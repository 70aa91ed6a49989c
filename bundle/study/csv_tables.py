"""A study as tables for programs, in CSV: a row an arm, a row a piece, and a row a case."""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..evaluation.key_slices import RANKINGS
from ..files import replacing
from .arm_results import ArmResult, mean_of, mean_steadiness, of_pieces, variance_ratio
from .comparison import Figure, difference, figure
from .steadiness import STEADINESS

__all__ = ["write_arms", "write_pieces", "write_predictions"]


def write_arms(arms: Sequence[ArmResult], reference: str, path: Path) -> None:
    """A row an arm: every score with its interval and its paired difference, every figure of steadiness."""
    against = next(one for one in arms if one.name == reference)
    rows = []
    for arm in arms:
        row: dict[str, Any] = {"arm": arm.name, "seeds": len(arm.by_seed), "pieces": len(arm.pieces)}
        for name in arm.compared.values:
            row |= _named(name, figure(arm.compared, name))
            row |= _named(f"{name}_difference", difference(arm.compared, against.compared, name))
        row |= _named("times_steadier", variance_ratio(against, arm))
        fitted = [value for one in arm.by_seed.values() for value in one.temperatures]
        row |= {"temperature_low": min(fitted), "temperature_high": max(fitted)}
        row |= {name: mean_steadiness(arm, name) for name in STEADINESS}
        row["probability_sd"] = mean_of(of_pieces(arm, "probability_sd"))
        rows.append(row)
    _write(rows, path)


def write_pieces(arms: Sequence[ArmResult], path: Path) -> None:
    """A row a piece: its scores on the test and the validation cases, its steadiness and how long it took."""
    rows = []
    for arm in arms:
        for result in arm.pieces.values():
            row: dict[str, Any] = {"arm": arm.name, **{key: result[key] for key in ("seed", "fold", "seconds")}}
            for section, scores in result["scores"].items():
                row |= {f"{section}_{name}": value for name, value in scores.items()}
            row |= {f"hit_1_{by}": result["key_slices"].get(by, {}).get("hit_1") for by in RANKINGS}
            rows.append(row | result["steadiness"] | {"probability_sd": result["probability_sd"]})
    _write(rows, path)


def write_predictions(arms: Sequence[ArmResult], path: Path) -> None:
    """A row an arm, training and case: the out-of-fold predictions, or those of the locked cases by every training.

    `prediction` is the class by the piece's operating point (two classes; else the most probable); `first_slice_…` the
    stored number of the first slice by that ranking, `hit_1_…` whether it is a true one, empty where that is not known.
    """
    rows: list[dict[str, Any]] = []
    for arm in arms:
        for one in arm.by_seed.values():
            for i, (case, patient) in enumerate(zip(one.raw.cases, one.raw.patients, strict=True)):
                result = arm.pieces[one.pieces[i]]
                row = {"arm": arm.name, "seed": result["seed"], "fold": result["fold"], "case": case}
                row |= {"status": "judged", "patient": "" if patient.startswith("\0") else patient}
                row["label"] = int(one.raw.labels[i])
                for name, values in (("probability", one.raw.probabilities), ("calibrated", one.calibrated)):
                    row |= {f"{name}_{k}": f"{value:.9g}" for k, value in enumerate(values[i])}
                row["prediction"] = int(one.at_point[i])
                row |= {f"first_slice_{by}": _whole(found[i]) for by, found in one.top_slice.items()}
                row |= {f"hit_1_{by}": _whole(found[i]) for by, found in one.evidence["hit_1"].items()}
                rows.append(row)
            # Which of several folds a refused case belongs to is not kept; the seed is one.
            judges = [arm.pieces[folder] for folder in dict.fromkeys(one.pieces)]
            place = {"arm": arm.name, "seed": judges[0]["seed"], "fold": judges[0]["fold"] if len(judges) == 1 else ""}
            rows += [{**place, "case": case, "status": "refused"} for case in one.raw.refused]
    _write(rows, path)


def _whole(value: float) -> int | str:
    return int(value) if math.isfinite(value) else ""


def _named(name: str, found: Figure) -> dict[str, float]:
    return {name: found.value, f"{name}_low": found.low, f"{name}_high": found.high}


def _write(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    columns = list(dict.fromkeys(key for row in rows for key in row))
    with replacing(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows({key: _cell(value) for key, value in row.items()} for row in rows)


def _cell(value: Any) -> Any:
    if isinstance(value, float):
        return f"{value:.5g}" if math.isfinite(value) else ""
    return "" if value is None else value
