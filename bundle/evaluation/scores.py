"""One number from labels and class probabilities: the scores this project reports, each with its definition."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from sklearn.metrics import (
    average_precision_score,
    confusion_matrix,
    f1_score,
    matthews_corrcoef,
    recall_score,
    roc_auc_score,
)
from torchmetrics.functional.classification import multiclass_calibration_error

from ..errors import InputError

__all__ = ["DEFINITIONS", "ECE_BINS", "SCORES", "all_scores", "checked_predictions", "higher_is_better", "score"]

ECE_BINS = 15
NLL_FLOOR = float(np.finfo(np.float64).eps)

DEFINITIONS: dict[str, str] = {
    "auc": "area under the ROC curve; more than two classes: one class against the rest, mean over the classes present",
    "auprc": "average precision (no interpolation); more than two classes: mean over the classes present",
    "accuracy": "share of cases whose predicted class is the true one",
    "balanced_accuracy": "mean recall over the classes present",
    "f1_macro": "mean F1 over the classes that occur in the labels or the predictions",
    "sensitivity": "recall of class 1; more than two classes: mean over the classes present",
    "specificity": "recall of class 0; more than two classes: class against rest, mean over the classes present",
    "mcc": "Matthews correlation coefficient; 0 when every prediction is the same class",
    "brier": "mean squared error of the probability of class 1 (0 to 1); "
    "more than two classes: summed over the classes (0 to 2)",
    "nll": "mean negative natural log of the probability of the true class, probabilities floored at 2.2e-16",
    "ece": "expected calibration error of the top label: 15 equal bins of the highest probability, L1 norm, "
    "|accuracy - mean confidence| weighted by the share of cases in the bin",
}
SCORES: tuple[str, ...] = tuple(DEFINITIONS)
LOWER_IS_BETTER = frozenset({"brier", "nll", "ece"})
# Without both sides of the question these have no value; scikit-learn would return 0 or 1 with a warning.
NEEDS_TWO_CLASSES = frozenset({"auc", "auprc", "balanced_accuracy", "f1_macro", "mcc"})


def higher_is_better(name: str) -> bool:
    """Whether a larger value of the score is the better one.

    Args:
        name: one of `SCORES`, or ``f1_<class name>``.

    Raises:
        InputError: no such score.
    """
    _check_name(name, allow_class_f1=True)
    return name not in LOWER_IS_BETTER


def score(name: str, labels: ArrayLike, probabilities: ArrayLike, predictions: ArrayLike | None = None) -> float:
    """One score of a set of predictions, as `DEFINITIONS` has it.

    Args:
        name: one of `SCORES`.
        labels: (M,) true class of each case.
        probabilities: (M, K) probability of each class, each row summing to 1.
        predictions: (M,) predicted class; None takes the most probable one (the first of equals). Give it where an
            operating point other than the highest probability decides.

    Returns:
        The score; NaN where it is undefined (no cases, or a class it needs is absent).

    Raises:
        InputError: no such score, or arrays that do not fit each other.
    """
    _check_name(name)
    y, p, predicted = checked_predictions(labels, probabilities, predictions)
    if len(y) == 0:
        return float("nan")
    num_classes = p.shape[1]
    present = np.unique(y)
    if name in NEEDS_TWO_CLASSES and len(present) < 2:
        return float("nan")
    if name in ("auc", "auprc"):
        area = roc_auc_score if name == "auc" else average_precision_score
        classes = [1] if num_classes == 2 else present
        return float(np.mean([area(y == k, p[:, k]) for k in classes]))
    if name == "accuracy":
        return float(np.mean(predicted == y))
    if name == "balanced_accuracy":
        # balanced_accuracy_score is the same, but warns where a predicted class has no case.
        return float(recall_score(y, predicted, labels=present, average="macro"))
    if name == "f1_macro":
        return float(f1_score(y, predicted, average="macro", zero_division=0))
    if name == "mcc":
        return float(matthews_corrcoef(y, predicted))
    if name == "brier":
        return float(np.mean((p[:, 1] - y) ** 2 if num_classes == 2 else ((p - np.eye(num_classes)[y]) ** 2).sum(1)))
    if name == "nll":
        return float(np.mean(-np.log(np.maximum(p[np.arange(len(y)), y], NLL_FLOOR))))
    if name == "ece":
        return float(multiclass_calibration_error(torch.from_numpy(p), torch.from_numpy(y), num_classes, ECE_BINS))
    classes = np.array([1]) if num_classes == 2 else present
    shares = [_recall(y == k, predicted == k, positive=name == "sensitivity") for k in classes]
    return float(np.mean(shares))


def _recall(truth: NDArray[np.bool_], predicted: NDArray[np.bool_], positive: bool) -> float:
    chosen = truth == positive
    return float(np.mean(predicted[chosen] == positive)) if chosen.any() else float("nan")


def all_scores(
    labels: ArrayLike,
    probabilities: ArrayLike,
    class_names: Sequence[str],
    predictions: ArrayLike | None = None,
) -> dict[str, Any]:
    """Every score, the F1 of each class, and what always answering the majority class would have got.

    Args:
        labels: (M,) true classes.
        probabilities: (M, K) class probabilities.
        class_names: K names.
        predictions: (M,) predicted classes; None takes the most probable.

    Returns:
        A dict with each of `SCORES`, ``f1_<class name>`` for each class (NaN if it is neither present nor predicted),
        ``support`` (class name → number of cases) and ``majority_class`` (``class``, the most frequent of these labels
        and the first of equals, with the ``accuracy``, ``balanced_accuracy`` and ``f1_macro`` of always choosing it).

    Raises:
        InputError: arrays or names that do not fit each other.
    """
    y, p, predicted = checked_predictions(labels, probabilities, predictions)
    num_classes = p.shape[1]
    if len(class_names) != num_classes:
        raise InputError(f"{len(class_names)} class names were given for {num_classes} class probabilities")
    result: dict[str, Any] = {name: score(name, y, p, predicted) for name in SCORES}
    table = confusion_matrix(y, predicted, labels=range(num_classes)) if len(y) else np.zeros((num_classes,) * 2, int)
    for k, name in enumerate(class_names):
        size = int(table[k].sum() + table[:, k].sum())
        result[f"f1_{name}"] = 2 * int(table[k, k]) / size if size else float("nan")
    support = table.sum(axis=1)
    result["support"] = {name: int(count) for name, count in zip(class_names, support, strict=True)}
    majority = int(np.argmax(support))
    always = np.full(len(y), majority)
    result["majority_class"] = {
        "class": class_names[majority] if len(y) else None,
        **{name: score(name, y, p, always) for name in ("accuracy", "balanced_accuracy", "f1_macro")},
    }
    return result


def checked_predictions(
    labels: ArrayLike, probabilities: ArrayLike, predictions: ArrayLike | None = None
) -> tuple[NDArray[np.int64], NDArray[np.float64], NDArray[np.int64]]:
    """Labels (M,), probabilities (M, K) and predicted classes (M,) as arrays that are known to fit each other.

    Raises:
        InputError: wrong shapes, classes out of range, or rows that are no probabilities (outside [0, 1], not finite,
            or a sum further than 1e-3 from 1).
    """
    p = np.asarray(probabilities, dtype=np.float64)
    if p.ndim != 2 or p.shape[1] < 2:
        raise InputError(f"class probabilities must have shape (cases, classes >= 2), not {p.shape}")
    # Softmax in float32 can end a rounding error above 1, which torchmetrics would take for logits.
    tolerance = 1e-3
    bad = ~np.isfinite(p).all(1) | (p < -tolerance).any(1) | (np.abs(p.sum(1) - 1) > tolerance)
    if bad.any():
        raise InputError(f"row {int(np.flatnonzero(bad)[0])} is no set of class probabilities: they must sum to 1")
    p = np.clip(p, 0.0, 1.0)
    y = _class_indices("labels", labels, p.shape)
    predicted = p.argmax(1) if predictions is None else _class_indices("predictions", predictions, p.shape)
    return y, p, predicted.astype(np.int64)


def _class_indices(what: str, values: ArrayLike, shape: tuple[int, ...]) -> NDArray[np.int64]:
    array = np.asarray(values)
    if array.shape != shape[:1]:
        raise InputError(f"{what} must have shape ({shape[0]},) to fit the probabilities, not {array.shape}")
    whole = array.astype(np.int64)
    if (whole != array).any() or (whole < 0).any() or (whole >= shape[1]).any():
        raise InputError(f"{what} must be whole numbers from 0 to {shape[1] - 1}")
    return whole


def _check_name(name: str, allow_class_f1: bool = False) -> None:
    if name not in SCORES and not (allow_class_f1 and name.startswith("f1_")):
        raise InputError(f"there is no score named {name!r}; choose one of {', '.join(SCORES)}")
