"""Finished pieces of a study, made without a training."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bundle.data.datalist import FORMAT, content_hash
from bundle.data.make_datalist import make_folds, write_datalist
from bundle.files import write_json
from bundle.study.piece import Piece, _summary

ROOT = Path(__file__).resolve().parents[2]
TRAIN = str(ROOT / "configs" / "train.yaml")


def datalist(folder: Path, patients: int = 12, folds: int = 3, classes: int = 2) -> Path:
    """A datalist of as many cases as patients, without images."""
    cases = [
        {"case": f"c{i:02d}", "image": f"c{i}.nii", "label": i % classes, "patient": f"p{i}"} for i in range(patients)
    ]
    content: dict[str, Any] = {"format": FORMAT, "class_names": [f"class {k}" for k in range(classes)], "cases": cases}
    content["folds"] = make_folds(cases, folds, 0)
    folder.mkdir(parents=True, exist_ok=True)
    write_datalist({**content, "hash": content_hash(content)}, folder / "datalist.json")
    return folder / "datalist.json"


def record(
    case: str,
    label: int,
    probabilities: Sequence[float],
    *,
    scores: Sequence[float] = (0.0, 1.0, 2.0),
    truth: Sequence[int] = (-1, -1, -1),
    status: str = "accepted",
    patient: str | None = "",
) -> dict[str, Any]:
    """A record as evaluation writes it; attention runs against the scores, and the first stored slice was dropped."""
    slices = [
        {"index": i + 1, "position_mm": 5.0 * i, "weight": s, "attention": -s, "score": s, "label": t}
        for i, (s, t) in enumerate(zip(scores, truth, strict=True))
    ]
    return {
        "case": case, "status": status, "label": label, "patient": case if patient == "" else patient,
        "probabilities": list(probabilities), "slices": slices if status == "accepted" else [],
    }  # fmt: skip


def write_records(folder: Path, records: Sequence[dict[str, Any]]) -> None:
    for one in records:
        write_json(folder / "cases" / f"{one['case']}.json", one)


def finish(
    piece: Piece,
    test: Sequence[dict[str, Any]],
    validation: Sequence[dict[str, Any]],
    *,
    auc: float | None = 0.5,
    nll: Sequence[float] = (1.0, 0.0, 0.0, 1.0),
    key_slices: dict[str, Any] | None = None,
    seconds: float | None = 60.0,
    logged: dict[str, Sequence[float]] | None = None,
) -> None:
    """Write what `do_piece` leaves: three epochs with the columns `logged`, too; the last has the batches `nll`."""
    write_records(piece.folder / "test", test)
    write_records(piece.folder / "validation", validation)
    for section in ("test", "validation"):
        metrics = {"scores": {"auc": {"value": auc}}, "majority_class": {}, "key_slices": key_slices or {},
                   "counts": {"scored": len(validation)}}  # fmt: skip
        write_json(piece.folder / section / "metrics.json", metrics)
    epochs = [{"epoch": e, "val_accuracy": 0.5 + 0.1 * e, "val_auc": 0.7, "train_accuracy": 0.9} for e in (1, 2, 3)]
    for one in epochs:
        one |= {name: values[one["epoch"] - 1] for name, values in (logged or {}).items()}
    batches = [{"epoch": e, "batch": i, "nll": v} for e in (1, 2, 3) for i, v in enumerate(nll, 1)]
    for name, rows in (("epochs", epochs), ("batches", batches)):
        with (piece.folder / f"{name}.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    piece.save()
    content = {**_summary(piece), "made_from": piece.made_from(), "seconds": seconds}
    write_json(piece.folder / "piece.json", content)


def result_of(piece: Piece) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((piece.folder / "piece.json").read_text())
    return found
