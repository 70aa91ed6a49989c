"""The same results on real cases with trained weights: the AUC of every path of this project against the plain one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bundle.data.cases import labelled_cases
from bundle.errors import InputError
from bundle.evaluation.bootstrap import patient_weights, percentile_interval, weighted_scores
from bundle.evaluation.scores import score
from bundle.recipe import Recipe

from .measuring import digest_of_files
from .plain import INFERENCE
from .project import Inference
from .settings import Run

__all__ = ["PLAIN_PATH", "Trained", "agreement_of_trained"]

PLAIN_PATH = "plain"
RESAMPLES, SEED = 1000, 0
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Trained:
    """Weights and the labelled cases that they are asked about.

    Args:
        weights: model.pt of a training run.
        datalist: of the cases.
        dataset_dir: folder that its image paths start from.
        sections: of the datalist, such as ("validation", "test").
        fold: of the datalist.
    """

    weights: Path
    datalist: Path
    dataset_dir: Path
    sections: tuple[str, ...]
    fold: int

    def cases(self) -> list[dict[str, Any]]:
        """All cases, section after section.

        Raises:
            InputError: as `labelled_cases`, and where they are all of one class.
        """
        names = Recipe.load(self.weights)["class_names"]
        found = [
            case
            for section in self.sections
            for case in labelled_cases(self.datalist, section, self.fold, self.dataset_dir, names)
        ]
        if len({case["label"] for case in found}) < 2:
            raise InputError(
                f"--sections: the cases of {', '.join(self.sections)} are all of one class, and an AUC needs two; "
                "name more sections"
            )
        return found


def agreement_of_trained(run: Run, trained: Trained) -> dict[str, Any]:
    """Classify every case by every path and compare each with the plain one.

    Returns:
        `cases`, `patients`, `positives` (with two classes, cases of the second), and `paths`: for each its `auc`, and
        for each but the plain one `difference` of the AUC with the ends `low` and `high` of its interval (patients
        drawn, the same for both paths), `largest` difference of a probability, and the number of cases whose
        `critical` slice (for any class) and whose `decisions` are others.
    """
    cases, threshold = trained.cases(), float(Recipe.load(trained.weights)["threshold"])
    images = [Path(path) for case in cases for path in np.atleast_1d(case["image"])]
    name = f"trained-{digest_of_files([trained.weights, trained.datalist, *images])}"
    found = {path: _classified(run, trained, name, path, changes) for path, changes in _paths(run).items()}
    labels, patients = np.array([case["label"] for case in cases]), [case["patient"] for case in cases]
    weights = patient_weights(patients, RESAMPLES, SEED)
    plain, truth = found[PLAIN_PATH], _Scored(found[PLAIN_PATH], labels, weights, threshold)
    paths: dict[str, Any] = {PLAIN_PATH: {"auc": truth.auc}}
    for path, one in found.items():
        if path == PLAIN_PATH:
            continue
        scored = _Scored(one, labels, weights, threshold)
        interval = percentile_interval(scored.resampled - truth.resampled)
        paths[path] = {
            "auc": scored.auc, "difference": scored.auc - truth.auc, "low": interval.low, "high": interval.high,
            "largest": float(np.abs(scored.probabilities - truth.probabilities).max()),
            "critical": sum(a != b for a, b in zip(one["critical"], plain["critical"], strict=True)),
            "decisions": int((scored.decisions != truth.decisions).sum()),
        }  # fmt: skip
    return {
        "cases": len(cases), "patients": len(set(patients)), "positives": int((labels == 1).sum()), "paths": paths,
    }  # fmt: skip


class _Scored:
    """AUC, decisions and resampled AUC (R,) of one path."""

    def __init__(self, found: dict[str, Any], labels: NDArray[np.int64], weights: Floats, threshold: float) -> None:
        self.probabilities: Floats = np.array(found["probabilities"], dtype=np.float64)  # (M, K)
        binary = self.probabilities.shape[1] == 2
        self.decisions = self.probabilities[:, 1] >= threshold if binary else self.probabilities.argmax(1)
        self.auc = score("auc", labels, self.probabilities)
        self.resampled = weighted_scores(labels, self.probabilities, self.decisions.astype(np.int64), weights)["auc"]


def _paths(run: Run) -> dict[str, dict[str, Any]]:
    """Changes of configs/inference.yaml."""
    caches = {
        f"float32, {kind} slice cache": {
            "amp": False,
            "dataset::progress": False,
            "dataset::cache": {
                "_target_": "bundle.open_cache", "cache_dir": str(run.store.folder / f"cache-{kind}"),
                "preparation": "$@recipe['preparation']", "cache_type": kind,
            },
        }
        for kind in ("float32", "uint16")
    }  # fmt: skip
    return {PLAIN_PATH: INFERENCE, "float32": {"amp": False}, **caches, "mixed precision": {}}


def _classified(run: Run, trained: Trained, name: str, path: str, changes: dict[str, Any]) -> dict[str, Any]:
    """Probabilities and critical slices of every case by one path."""
    name = f"{name}-{'-'.join(trained.sections)}-{trained.fold}-{path.replace(' ', '_')}"
    kept = run.store.get(name)
    if kept is None:
        kept = {"probabilities": [], "critical": []}
        for section in trained.sections:
            run.tell(f"agreement: {section}, {path}")
            places: dict[str, Any] = {"datalist": str(trained.datalist), "section": section, "fold": trained.fold}
            inference = Inference(trained.weights, trained.dataset_dir, run.settings.device, **places, **changes)
            kept["probabilities"] += _listed(inference.run())
            kept["critical"] += _listed(inference.critical)
        run.store.put(name, kept)
    return kept


def _listed(tensors: Sequence[Any]) -> list[Any]:
    return [tensor.tolist() for tensor in tensors]
