from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
import sklearn.metrics as sk
import torch
from torchmetrics.classification import MulticlassCalibrationError

from bundle.errors import InputError
from bundle.evaluation.scores import SCORES, all_scores, higher_is_better, score


def predictions(seed: int, cases: int, num_classes: int, decimals: int = 2) -> tuple[np.ndarray, np.ndarray]:
    """Labels and probabilities with some signal; rounding to few decimals makes ties."""
    generator = np.random.default_rng(seed)
    labels = generator.integers(0, num_classes, cases)
    raw = generator.gamma(1.0, size=(cases, num_classes)) + np.eye(num_classes)[labels] * 0.7
    probabilities = np.round(raw / raw.sum(1, keepdims=True), decimals)
    probabilities[:, 0] = 1 - probabilities[:, 1:].sum(1)
    return labels, np.clip(probabilities, 0, 1)


def loop_ece(labels: np.ndarray, probabilities: np.ndarray, bins: int = 15) -> float:
    confidence, correct = probabilities.max(1), probabilities.argmax(1) == labels
    total = 0.0
    for b in range(bins):
        inside = [
            i
            for i in range(len(labels))
            if b / bins <= confidence[i] < (b + 1) / bins or (b + 1 == bins and confidence[i] == 1)
        ]
        if inside:
            total += len(inside) / len(labels) * abs(correct[inside].mean() - confidence[inside].mean())
    return total


@pytest.mark.parametrize("seed", range(4))
def test_two_classes_agree_with_scikit_learn(seed: int) -> None:
    y, p = predictions(seed, 50, 2, decimals=1 if seed == 0 else 3)
    hard = p.argmax(1)
    expected = {
        "auc": sk.roc_auc_score(y, p[:, 1]),
        "auprc": sk.average_precision_score(y, p[:, 1]),
        "accuracy": sk.accuracy_score(y, hard),
        "balanced_accuracy": sk.balanced_accuracy_score(y, hard),
        "f1_macro": sk.f1_score(y, hard, average="macro"),
        "sensitivity": sk.recall_score(y, hard),
        "specificity": sk.recall_score(1 - y, 1 - hard),
        "mcc": sk.matthews_corrcoef(y, hard),
        "brier": sk.brier_score_loss(y, p[:, 1]),
        "nll": sk.log_loss(y, p),
    }
    for name, value in expected.items():
        assert score(name, y, p) == pytest.approx(value, abs=1e-12), name


def test_three_classes_agree_with_scikit_learn() -> None:
    y, p = predictions(1, 60, 3, decimals=4)
    hard = p.argmax(1)
    table = sk.multilabel_confusion_matrix(y, hard)  # (K, 2, 2): one class against the rest
    expected = {
        "auc": sk.roc_auc_score(y, p, multi_class="ovr", average="macro"),
        "auprc": sk.average_precision_score(np.eye(3)[y], p, average="macro"),
        "balanced_accuracy": sk.balanced_accuracy_score(y, hard),
        "f1_macro": sk.f1_score(y, hard, average="macro"),
        "sensitivity": sk.recall_score(y, hard, average="macro"),
        "specificity": np.mean([t[0, 0] / t[0].sum() for t in table]),
        "mcc": sk.matthews_corrcoef(y, hard),
        "brier": np.mean([sum((p[i, k] - (y[i] == k)) ** 2 for k in range(3)) for i in range(len(y))]),
        "nll": sk.log_loss(y, p),
    }
    for name, value in expected.items():
        assert score(name, y, p) == pytest.approx(value, abs=1e-12), name


@pytest.mark.parametrize("num_classes", [2, 3])
def test_ece_is_that_of_the_top_label(num_classes: int) -> None:
    y, p = predictions(3, 80, num_classes, decimals=4)
    metric = MulticlassCalibrationError(num_classes, n_bins=15, norm="l1")
    assert score("ece", y, p) == pytest.approx(float(metric(torch.tensor(p), torch.tensor(y))), abs=1e-7)
    # Absolute, float32: the library bins in single precision.
    assert score("ece", y, p) == pytest.approx(loop_ece(y, p), abs=1e-6)


def test_ece_by_hand() -> None:
    # Two cases in the bin of 0.9, one right: |1/2 - 0.9| = 0.4; one in that of 0.7, right: |1 - 0.7| = 0.3.
    p = np.array([[0.1, 0.9], [0.9, 0.1], [0.3, 0.7]])
    assert score("ece", [1, 1, 1], p) == pytest.approx((2 * 0.4 + 0.3) / 3, abs=1e-6)


@pytest.mark.parametrize("num_classes", [2, 3])
@pytest.mark.parametrize("only", [0, 1])
def test_one_class_only_is_nan_without_a_warning(num_classes: int, only: int) -> None:
    _, p = predictions(0, 12, num_classes)
    labels = np.full(12, only)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        values = {name: score(name, labels, p) for name in SCORES}
    undefined = {name for name, value in values.items() if math.isnan(value)}
    one_sided = {"specificity"} if num_classes == 3 or only == 1 else {"sensitivity"}
    assert undefined == {"auc", "auprc", "balanced_accuracy", "f1_macro", "mcc"} | one_sided


def test_no_cases_is_nan() -> None:
    assert all(math.isnan(score(name, [], np.zeros((0, 2)))) for name in SCORES)


def test_a_class_that_is_predicted_but_absent_gives_no_warning() -> None:
    p = np.array([[0.8, 0.1, 0.1], [0.1, 0.1, 0.8], [0.1, 0.8, 0.1]])
    assert score("balanced_accuracy", [0, 1, 1], p) == pytest.approx(0.75)
    assert score("auc", [0, 1, 1], p) == pytest.approx(np.mean([1.0, 0.75]))


def test_predictions_of_an_operating_point_decide() -> None:
    p = np.array([[0.7, 0.3], [0.9, 0.1], [0.6, 0.4]])
    assert score("sensitivity", [1, 0, 1], p) == 0.0
    assert score("sensitivity", [1, 0, 1], p, predictions=[1, 0, 1]) == 1.0
    assert score("auc", [1, 0, 1], p, predictions=[0, 0, 0]) == 1.0


def test_certain_and_wrong_stays_finite() -> None:
    assert score("nll", [0], [[0.0, 1.0]]) == pytest.approx(-math.log(np.finfo(float).eps))
    assert score("brier", [0], [[0.0, 1.0]]) == 1.0


def test_float32_rounding_above_one_is_no_logit() -> None:
    p = np.array([[1.0000001, 0.0], [0.2, 0.8]])
    assert score("ece", [0, 1], p) == pytest.approx(0.1, abs=1e-6)


def test_which_way_is_better() -> None:
    assert {name for name in SCORES if not higher_is_better(name)} == {"brier", "nll", "ece"}
    assert higher_is_better("f1_high grade")
    # The direction is that of the numbers: predictions nearer the truth are never worse.
    y, p = predictions(0, 40, 2)
    better = 0.5 * p + 0.5 * np.eye(2)[y]
    for name in ("auc", "accuracy", "mcc", "brier", "nll"):
        gain = score(name, y, better) - score(name, y, p)
        assert (gain > 0) == higher_is_better(name), name


def test_all_scores_by_hand() -> None:
    p = np.array([[0.9, 0.1], [0.6, 0.4], [0.3, 0.7], [0.2, 0.8], [0.6, 0.4]])
    result = all_scores([0, 0, 0, 1, 1], p, ["low", "high"])
    assert set(SCORES) < set(result)
    assert result["accuracy"] == pytest.approx(3 / 5)
    assert result["f1_low"] == pytest.approx(2 * 2 / (3 + 3))
    assert result["f1_high"] == pytest.approx(2 * 1 / (2 + 2))
    assert result["support"] == {"low": 3, "high": 2}
    assert result["majority_class"] == {
        "class": "low",
        "accuracy": pytest.approx(3 / 5),
        "balanced_accuracy": 0.5,
        "f1_macro": pytest.approx((6 / 8) / 2),
    }


def test_f1_of_a_class_neither_present_nor_predicted_is_nan() -> None:
    p = np.array([[0.8, 0.1, 0.1], [0.1, 0.8, 0.1]])
    result = all_scores([0, 1], p, ["a", "b", "c"])
    assert math.isnan(result["f1_c"])
    assert result["f1_macro"] == 1.0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("auroc", [0, 1], [[0.5, 0.5]] * 2), "no score named 'auroc'"),
        (("auc", [0, 2], [[0.5, 0.5]] * 2), "from 0 to 1"),
        (("auc", [0, 0.5], [[0.5, 0.5]] * 2), "whole numbers"),
        (("auc", [0], [[0.5, 0.5]] * 2), "shape"),
        (("auc", [0, 1], [0.5, 0.5]), "shape"),
        (("auc", [0, 1], [[0.5, 0.5], [2.0, -1.0]]), "row 1"),
        (("auc", [0, 1], [[0.5, np.nan], [0.5, 0.5]]), "row 0"),
        (("auc", [0, 1], [[0.5, 0.5], [0.5, 0.4]]), "row 1"),
    ],
)
def test_bad_input_is_told(arguments: tuple, words: str) -> None:
    with pytest.raises(InputError, match=words):
        score(*arguments)


def test_class_names_must_fit() -> None:
    with pytest.raises(InputError, match="3 class names"):
        all_scores([0], [[0.5, 0.5]], ["a", "b", "c"])
