"""The same AUC within noise: the comparison on hand-made results, and all of it on a cohort with small weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score

from bundle.errors import InputError
from bundle.evaluation.bootstrap import patient_weights
from bundle.files import write_json
from tests.performance import agreement_part, benchmark, plain
from tests.performance.agreement_part import RESAMPLES, SEED, Trained, agreement_of_trained
from tests.performance.made_scans import write_nifti
from tests.performance.measuring import Store
from tests.performance.project import save_weights
from tests.performance.report import table_of_trained, verdicts_of_trained
from tests.performance.settings import Run
from tests.performance.test_benchmark import TINY, silent

CASES = 10


@pytest.fixture
def trained(tmp_path: Path) -> Trained:
    """Small weights and a datalist of ten cases of six patients, half of them for validation and half for the test."""
    names = [f"c{number}" for number in range(CASES)]
    cases = []
    for number, name in enumerate(names):
        write_nifti(tmp_path / "images" / f"{name}.nii.gz", 36, 8 + number % 3, number)
        patient = f"p{number // 2 if number < 8 else number}"
        cases.append({"case": name, "patient": patient, "image": f"images/{name}.nii.gz", "label": number % 2})
    fold = {"training": [], "validation": names[:4], "test": names[4:]}
    content = {"format": 1, "class_names": ["negative", "positive"], "cases": cases, "folds": [fold]}
    write_json(tmp_path / "datalist.json", content)
    weights = save_weights(tmp_path / "model.pt", "cpu", TINY.changes(32, "batch"))
    return Trained(weights, tmp_path / "datalist.json", tmp_path, ("validation", "test"), 0)


def words(trained: Trained, *more: str) -> list[str]:
    places = ["--weights", str(trained.weights), "--datalist", str(trained.datalist)]
    return ["--parts", "agreement", *places, "--output", str(trained.dataset_dir / "out"), *more]


def run_of(folder: Path) -> Run:
    return Run(TINY, None, folder, Store(folder / "store", {}, fresh=True), silent)


def test_every_path_classifies_every_case_alike_and_is_kept(
    trained: Trained, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def measured() -> dict[str, Any]:
        assert benchmark.main(words(trained), TINY) == 0
        return json.loads((trained.dataset_dir / "out" / "benchmark.json").read_text())

    found = measured()
    assert (found["trained"]["cases"], found["trained"]["patients"], found["trained"]["positives"]) == (CASES, 6, 5)
    paths = found["trained"]["paths"]
    assert list(paths) == [
        "plain", "float32", "float32, float32 slice cache", "float32, uint16 slice cache", "mixed precision",
    ]  # fmt: skip
    assert paths["float32"]["largest"] <= 1e-5
    assert paths["float32"]["critical"] == paths["float32"]["decisions"] == 0
    assert paths["float32, float32 slice cache"]["largest"] == paths["float32"]["largest"]
    assert 1e-7 < paths["float32, uint16 slice cache"]["largest"] < 1e-3
    assert paths["mixed precision"]["largest"] < 0.1
    assert "10 cases (5 positive) of 6 patients" in capsys.readouterr().out
    assert not (trained.dataset_dir / "out" / "benchmark.png").exists()

    def unexpected(*_: Any, **__: Any) -> None:
        raise AssertionError("this was measured already")

    monkeypatch.setattr(agreement_part, "Inference", unexpected)
    assert measured()["trained"] == found["trained"]


def test_a_path_that_computes_something_else_is_seen(trained: Trained, monkeypatch: pytest.MonkeyPatch) -> None:
    network_of = plain.trained

    def biased(*arguments: Any, **named: Any) -> Any:
        network = network_of(*arguments, **named)
        with torch.no_grad():  # moves every probability, however little the network has learned
            network.bag_classifier.bias[1] += 1.0
        return network

    monkeypatch.setattr(plain, "trained", biased)
    found = agreement_of_trained(run_of(trained.dataset_dir), trained)
    assert found["paths"]["float32"]["largest"] > 1e-4
    assert not verdicts_of_trained(found)[-1].passed


def test_other_weights_and_other_sections_are_measured_anew(trained: Trained, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def classified(run: Run, trained: Trained, name: str, path: str, changes: dict[str, Any]) -> dict[str, Any]:
        asked.append(name)
        cases = trained.cases()
        return {"probabilities": [[0.5, 0.5]] * len(cases), "critical": [[0]] * len(cases)}

    monkeypatch.setattr(agreement_part, "_classified", classified)
    run = run_of(trained.dataset_dir)
    agreement_of_trained(run, trained)
    agreement_of_trained(run, trained)
    assert len(set(asked)) == 1
    trained.weights.write_bytes(trained.weights.read_bytes() + b"\0")
    agreement_of_trained(run, trained)
    assert len(set(asked)) == 2


def made(
    monkeypatch: pytest.MonkeyPatch, positive: dict[str, np.ndarray], critical: dict[str, list[list[int]]]
) -> None:
    """Probabilities of the second class and critical slices of every path, by hand; the rest as the plain path."""

    def classified(run: Run, trained: Trained, name: str, path: str, changes: dict[str, Any]) -> dict[str, Any]:
        p = positive.get(path, positive["plain"])
        slices = critical.get(path, [[0]] * CASES)
        return {"probabilities": np.stack([1 - p, p], axis=1).tolist(), "critical": slices}

    monkeypatch.setattr(agreement_part, "_classified", classified)


def test_differences_equal_a_slow_reference(trained: Trained, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(1)
    plain_p, mixed_p = rng.uniform(0, 1, CASES), rng.uniform(0, 1, CASES)
    made(monkeypatch, {"plain": plain_p, "mixed precision": mixed_p}, {"mixed precision": [[0]] * 7 + [[1]] * 3})
    found = agreement_of_trained(run_of(trained.dataset_dir), trained)
    cases = trained.cases()
    labels, patients = np.array([case["label"] for case in cases]), [case["patient"] for case in cases]
    differences = []
    for counts in patient_weights(patients, RESAMPLES, SEED).astype(int):
        drawn = np.repeat(np.arange(CASES), counts)
        if len(set(labels[drawn])) == 2:
            one, other = (roc_auc_score(labels[drawn], p[drawn]) for p in (mixed_p, plain_p))
            differences.append(one - other)
    mixed = found["paths"]["mixed precision"]
    assert found["paths"]["plain"] == {"auc": pytest.approx(roc_auc_score(labels, plain_p))}
    assert mixed["auc"] == pytest.approx(roc_auc_score(labels, mixed_p))
    assert mixed["difference"] == pytest.approx(roc_auc_score(labels, mixed_p) - roc_auc_score(labels, plain_p))
    assert (mixed["low"], mixed["high"]) == pytest.approx(tuple(np.quantile(differences, [0.025, 0.975])))
    assert mixed["largest"] == pytest.approx(np.abs(mixed_p - plain_p).max())
    assert mixed["critical"] == 3
    assert mixed["decisions"] == ((mixed_p >= 0.5) != (plain_p >= 0.5)).sum()
    assert found["paths"]["float32"] == {
        "auc": found["paths"]["plain"]["auc"], "difference": 0, "low": 0, "high": 0, "largest": 0, "critical": 0,
        "decisions": 0,
    }  # fmt: skip


def test_an_auc_that_is_lower_beyond_noise_is_a_miss(trained: Trained, monkeypatch: pytest.MonkeyPatch) -> None:
    labels = np.array([case["label"] for case in trained.cases()])
    right = np.where(labels == 1, 0.9, 0.1)
    made(monkeypatch, {"plain": right, "mixed precision": 1 - right}, {})
    found = agreement_of_trained(run_of(trained.dataset_dir), trained)
    assert [verdict.passed for verdict in verdicts_of_trained(found)] == [True, True, True, False, True, False]
    last = table_of_trained(found).splitlines()[-1].split()
    assert last[:2] == ["mixed", "precision"]
    assert last[2:6] == ["0.0000", "-1.0000", "[-1.0000,", "-1.0000]"]
    assert last[6:] == ["8.0e-01", "0", "differ", "10", "differ"]


def test_the_threshold_of_the_weights_decides(trained: Trained, monkeypatch: pytest.MonkeyPatch) -> None:
    low, high = np.linspace(0.1, 0.2, CASES), np.linspace(0.3, 0.4, CASES)
    content = torch.load(trained.weights, weights_only=True)
    recipe = {**json.loads(content["recipe"]), "threshold": 0.25}
    text = json.dumps(recipe, sort_keys=True)
    torch.save({**content, "recipe": text, "recipe_hash": agreement_part.Recipe(recipe).hash}, trained.weights)
    made(monkeypatch, {"plain": low, "float32": high}, {})
    found = agreement_of_trained(run_of(trained.dataset_dir), trained)
    assert found["paths"]["float32"]["decisions"] == CASES


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--fold", "3"], "has folds 0 to 0"),
        (["--sections", "training"], "no cases in section training"),
        (["--weights", "no.pt"], "there is no weights file"),
        (["--datalist", "no.json"], "there is no datalist"),
        (["--dataset-dir", "elsewhere"], "images of .* are not in"),
    ],
)
def test_what_cannot_be_compared_is_refused_before_anything_is_made(
    trained: Trained, arguments: list[str], expected: str
) -> None:
    with pytest.raises(InputError, match=expected):
        benchmark.main(words(trained, *arguments), TINY)
    assert not (trained.dataset_dir / "out").exists()


def test_cases_of_one_class_are_refused(trained: Trained) -> None:
    content = json.loads(trained.datalist.read_text())
    for case in content["cases"]:
        case["label"] = 1
    write_json(trained.datalist, content)
    with pytest.raises(InputError, match="--sections: .* all of one class"):
        benchmark.main(words(trained), TINY)
