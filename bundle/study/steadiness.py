"""The log of a training → how steady it was at its end."""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..errors import InputError

__all__ = ["STEADINESS", "read_log", "steadiness"]

Columns = dict[str, NDArray[np.float64]]

STEADINESS: dict[str, str] = {
    "epochs": "how many the figures below are over: the last third of the run",
    "nll_mean": "mean NLL of a training batch before the step on it, unsmoothed, in nats; complete batches only",
    "nll_variance": "variance of that NLL around a straight line through all its batches, n - 2",
    "nll_min": "smallest of them",
    "nll_max": "largest of them",
    "val_accuracy_mean": "validation accuracy, mean over the epochs",
    "val_accuracy_sd": "its standard deviation over the epochs, n - 1",
    "val_accuracy_range": "its largest less its smallest value",
    "val_sampling_error": "standard error of one such accuracy by the number of cases alone: sqrt(p (1 - p) / n)",
    "val_auc_mean": "validation AUC, mean over the epochs",
    "train_accuracy": "accuracy of the training passes (train mode, drawn and augmented bags), mean over the epochs",
    "train_minus_validation": "that less the validation accuracy",
    "train_minus_eval_mode": "that less the accuracy of watched training cases in evaluation mode, with all slices",
    "flip_rate": "share of watched cases whose critical slice changed from one epoch to the next, mean",
    "attention_drift": "share of the attention that moved to other slices from one epoch to the next, mean",
    "clipped_share": "share of the optimiser's steps that were clipped, mean",
}


def read_log(path: str | Path) -> Columns:
    """Columns of `epochs.csv` or `batches.csv`; an empty cell is NaN.

    Raises:
        InputError: there is no such file, or it holds something else.
    """
    try:
        with Path(path).open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        names = list(rows[0]) if rows else []
        return {name: np.array([float(row[name] or "nan") for row in rows]) for name in names}
    except (OSError, ValueError, TypeError) as error:
        raise InputError(f"{path} is no log of a training ({type(error).__name__}): train again") from None


def steadiness(
    epochs: Mapping[str, ArrayLike], batches: Mapping[str, ArrayLike], num_validation: int
) -> dict[str, Any]:
    """The figures that `STEADINESS` defines; NaN where the log has nothing to make them of.

    Args:
        epochs: columns of epochs.csv.
        batches: columns of batches.csv.
        num_validation: cases that each validation looked at.

    Raises:
        InputError: the logs are empty or have no column `epoch`.
    """
    if not np.size(epochs.get("epoch", ())) or not np.size(batches.get("epoch", ())):
        raise InputError("the log of the training is empty: train first")
    number = np.asarray(epochs["epoch"], dtype=float)
    last = number > number.max() - max(1, number.max() // 3)

    def column(name: str) -> NDArray[np.float64]:
        values = np.asarray(epochs.get(name, np.full(len(number), math.nan)), dtype=float)[last]
        return values[np.isfinite(values)]

    late = np.asarray(batches["epoch"], dtype=float) >= number[last].min()
    nll = np.asarray(batches["nll"], dtype=float)[late]
    nll = nll[np.isfinite(nll)]
    accuracies = column("val_accuracy")
    accuracy, training = _mean(accuracies), _mean(column("train_accuracy"))
    return {
        "epochs": int(last.sum()),
        "nll_mean": _mean(nll),
        "nll_variance": _variance_around_line(nll),
        "nll_min": float(nll.min()) if len(nll) else math.nan,
        "nll_max": float(nll.max()) if len(nll) else math.nan,
        "val_accuracy_mean": accuracy,
        "val_accuracy_sd": float(accuracies.std(ddof=1)) if len(accuracies) > 1 else math.nan,
        "val_accuracy_range": float(np.ptp(accuracies)) if len(accuracies) else math.nan,
        "val_sampling_error": math.sqrt(accuracy * (1 - accuracy) / num_validation) if num_validation else math.nan,
        "val_auc_mean": _mean(column("val_auc")),
        "train_accuracy": training,
        "train_minus_validation": training - accuracy,
        "train_minus_eval_mode": training - _mean(column("train_eval_accuracy")),
        "flip_rate": _mean(column("flip_rate")),
        "attention_drift": _mean(column("attention_drift")),
        "clipped_share": _mean(column("clipped_share")),
    }


def _mean(values: NDArray[np.float64]) -> float:
    return float(values.mean()) if len(values) else math.nan


def _variance_around_line(values: NDArray[np.float64]) -> float:
    """Residual variance of a least-squares line, so that a loss that still falls does not count as unsteady."""
    if len(values) < 3:
        return math.nan
    steps = np.arange(len(values), dtype=float)
    residual = values - np.polynomial.Polynomial.fit(steps, values, 1)(steps)
    return float((residual**2).sum() / (len(values) - 2))
