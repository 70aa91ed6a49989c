"""Calibration of trained weights: records of the inner validation cases → settings that are saved with the weights.

It stands beside `recipe` and `weights`, outside the rooms of data flow: it joins evaluation, results and the file.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ignite.engine import Engine, Events
from numpy.typing import NDArray

from .errors import InputError
from .evaluation.abstention import (
    RiskCoverage,
    abstention_limit,
    confidence,
    losses,
    predicted_classes,
    risk_coverage,
)
from .evaluation.bootstrap import bootstrap_intervals
from .evaluation.calibration import (
    calibrated,
    fit_temperature,
    left_out,
    operating_point,
    reliability_bins,
    share_of,
)
from .evaluation.scores import score
from .files import write_json
from .recipe import Recipe
from .results.calibration_figures import draw_reliability, draw_risk_coverage
from .results.writer import WriteRecords
from .weights import read_checkpoint, save_atomically

__all__ = ["CalibrateWeights"]

logger = logging.getLogger(__name__)
TOLD = ("nll", "brier", "ece", "auc")
DEFINITIONS = {
    "before, after": "on the cases of the fit itself, so `after` is somewhat too good; scores with 95% bootstrap "
    "intervals over patients",
    "nll_left_out": "NLL of cases whose patients were left out of the fit of the temperature, in turn",
    "all, answered": "of all cases, and of those that do not abstain: coverage, error, sensitivity and specificity as "
    "shares of a number of cases with a 95% Wilson interval; risk is the mean loss: 0 for a right prediction, 1 for a "
    "wrong one, or with two classes 2 t for a false positive and 2 (1 - t) for a false negative, t the threshold",
    "threshold": "of those of enough sensitivity the one of the highest specificity, then of the highest sensitivity; "
    "half way between the last positive case that it finds and the next lower case",
    "abstain_below": "half way between the confidence of the last case that is answered and the next lower one",
}


class CalibrateWeights:
    """Fits temperature, operating point and limit of abstention when all cases have ended, and saves them.

    Attach it after the records, which must be of the network's own logits. Beside the records it writes
    `calibration.json`, `reliability.png` and `risk_coverage.png`, and the weights file last.

    Args:
        results: records of labelled cases that the network was not trained on, at temperature 1.
        weights: the file to rewrite.
        recipe: of these weights.
        sensitivity: rule of the operating point with two classes; None keeps the recipe's threshold.
        coverage: rule of abstention, the share of the cases to answer; None: all.
        resamples: bootstrap resamples over patients.
        seed: of the resampling.

    Raises:
        InputError: on a rule outside (0, 1].
    """

    def __init__(
        self,
        results: WriteRecords,
        weights: str | Path,
        recipe: Recipe,
        sensitivity: float | None = 0.9,
        coverage: float | None = None,
        resamples: int = 1000,
        seed: int = 0,
    ) -> None:
        for name, rule in (("sensitivity", sensitivity), ("coverage", coverage)):
            number = isinstance(rule, (int, float)) and not isinstance(rule, bool)
            if rule is not None and not (number and 0 < rule <= 1):
                raise InputError(f"{name} must be above 0 and at most 1, or null, not {rule!r}")
        self.results, self.weights, self.recipe = results, Path(weights), recipe
        self.sensitivity, self.coverage, self.resamples, self.seed = sensitivity, coverage, resamples, seed

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.COMPLETED, self)

    def __call__(self, engine: Engine) -> None:
        found, curve = self._fitted()
        recipe = Recipe({**self.recipe.config, **found["recipe"]}, self.recipe.trusted_modules)
        folder, names = self.results.output_dir, self.results.class_names
        panels = {f"{when} calibration": found[when]["bins"] for when in ("before", "after")}
        draw_reliability(folder / "reliability.png", panels, names)
        draw_risk_coverage(folder / "risk_coverage.png", curve, found["answered"]["coverage"]["value"])
        write_json(folder / "calibration.json", {**found, "recipe_hash": recipe.hash, "definitions": DEFINITIONS})
        content = {**read_checkpoint(self.weights), "recipe": recipe.text, "recipe_hash": recipe.hash}
        save_atomically(content, self.weights)
        for sentence in _sentences(found):
            logger.info("%s", sentence)
        logger.info("saved in %s", self.weights)

    def _fitted(self) -> tuple[dict[str, Any], RiskCoverage]:
        """What calibration.json holds, and the curve of risk over coverage."""
        names = self.results.class_names
        records = [record for record in self.results.records if record["status"] == "accepted"]
        _check_classes(records, names)
        labels = np.array([record["label"] for record in records])
        patients = [str(record["patient"]) for record in records]
        # Up to a constant of each case these are the logits; the floor is float32's, in which the softmax was taken.
        logits = np.log(np.maximum([record["probabilities"] for record in records], np.finfo(np.float32).tiny))

        temperature = fit_temperature(logits, labels)
        probabilities = calibrated(logits, temperature.value)
        threshold, ruled = float(self.recipe["threshold"]), self.sensitivity is not None and len(names) == 2
        if self.sensitivity is not None and ruled:
            threshold = operating_point(labels, probabilities, self.sensitivity).threshold
        predictions = predicted_classes(probabilities, threshold)
        loss = losses(labels, predictions, len(names), threshold)
        sure = confidence(probabilities, threshold)
        limit = abstention_limit(sure, self.coverage)
        found = {
            "cases": {name: int((labels == k).sum()) for k, name in enumerate(names)},
            "refused": len(self.results.records) - len(records),
            "rules": {"sensitivity": self.sensitivity if ruled else None, "coverage": self.coverage},
            "recipe": {"calibration_temperature": temperature.value, "threshold": threshold, "abstain_below": limit},
            "temperature_note": temperature.note,
            "before": self._figures(labels, calibrated(logits, 1.0), patients),
            "after": self._figures(labels, probabilities, patients),
            "nll_left_out": left_out(logits, labels, patients),
            "all": _answers(labels, predictions, loss, sure >= 0, len(names)),
            "answered": _answers(labels, predictions, loss, sure >= limit, len(names)),
        }
        return found, risk_coverage(loss, sure)

    def _figures(
        self, labels: NDArray[np.int64], probabilities: NDArray[np.float64], patients: list[str]
    ) -> dict[str, Any]:
        intervals = bootstrap_intervals(labels, probabilities, patients, resamples=self.resamples, seed=self.seed)
        figures: dict[str, Any] = {"bins": reliability_bins(labels, probabilities)}
        for name in TOLD:
            low, high, _ = intervals[name]
            figures[name] = {"value": score(name, labels, probabilities), "low": low, "high": high}
        return figures


def _answers(
    labels: NDArray[np.int64],
    predictions: NDArray[np.int64],
    loss: NDArray[np.float64],
    kept: NDArray[np.bool_],
    num_classes: int,
) -> dict[str, Any]:
    """How good the answers of the cases that are kept are."""
    right = predictions == labels
    shares = {"coverage": kept, "error": ~right[kept]}
    if num_classes == 2:
        shares |= {"sensitivity": right[kept & (labels == 1)], "specificity": right[kept & (labels == 0)]}
    return {**{name: share_of(hits)._asdict() for name, hits in shares.items()}, "risk": float(loss[kept].mean())}


def _check_classes(records: Sequence[Mapping[str, Any]], names: Sequence[str]) -> None:
    present = sorted({record["label"] for record in records})
    if len(present) > 1:
        return
    those = f"all {len(records)} that could be read are {names[present[0]]!r}" if present else "none could be read"
    raise InputError(
        f"calibration needs validation cases of two classes, and {those}: make folds with more validation cases"
    )


def _sentences(found: Mapping[str, Any]) -> Iterator[str]:
    """What was found, for people."""
    before, after, left, recipe = found["before"], found["after"], found["nll_left_out"], found["recipe"]
    yield "calibrated on " + ", ".join(f"{count} cases {name!r}" for name, count in found["cases"].items())
    yield (
        f"temperature {recipe['calibration_temperature']:.3f}: nll {before['nll']['value']:.3f} to "
        f"{after['nll']['value']:.3f} ({left:.3f} on patients left out of the fit), "
        f"ece {before['ece']['value']:.3f} to {after['ece']['value']:.3f}"
    )
    if found["temperature_note"] is not None:
        yield f"the temperature is not determined: {found['temperature_note']}"
    if left > before["nll"]["value"]:
        yield "on patients left out of the fit the temperature did not help: there are few cases, or few errors in them"
    kept = "" if found["rules"]["sensitivity"] is not None else ", kept"
    yield f"threshold {recipe['threshold']:.3f}{kept}: {_shares(found['all'])}"
    if recipe["abstain_below"]:
        some = found["answered"]
        yield (
            f"abstains below confidence {recipe['abstain_below']:.3f}: answers {some['coverage']['value']:.2f} of the "
            f"cases, risk {some['risk']:.3f} instead of {found['all']['risk']:.3f}; {_shares(some)}"
        )


def _shares(answers: Mapping[str, Any]) -> str:
    names = [name for name in ("sensitivity", "specificity") if name in answers] or ["error"]
    return ", ".join(
        f"{name} {answers[name]['value']:.2f} ({answers[name]['low']:.2f} to {answers[name]['high']:.2f}) of "
        f"{answers[name]['cases']} cases"
        for name in names
    )
