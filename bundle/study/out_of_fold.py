"""Test predictions of all folds of a cross-validation, put together: every case once for each seed."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..errors import InputError
from ..evaluation.abstention import predicted_classes
from ..evaluation.calibration import calibrated, fit_temperature, operating_point
from ..evaluation.key_slices import CASE_SCORES, RANKINGS, case_key_slices, rankings_that_tell

__all__ = ["OutOfFold", "Predictions", "fitted_on_validation", "out_of_fold", "read_predictions"]

logger = logging.getLogger(__name__)
Floats = NDArray[np.float64]
Record = dict[str, Any]
# Ends the logarithm of a probability; one in float32 is no smaller but for 0.
LEAST = 1e-38


class Predictions(NamedTuple):
    """Classified cases of a known label, M of them, sorted by name.

    Attributes:
        cases: names.
        patients: identifiers; one of its own for a case whose patient is not known.
        labels: (M,) true classes.
        probabilities: (M, K).
        refused: names of the labelled cases that the reader refused; they are in none of the above.
    """

    cases: list[str]
    patients: list[str]
    labels: NDArray[np.int64]
    probabilities: Floats
    refused: list[str]

    @property
    def logits(self) -> Floats:
        """(M, K), up to one number a case, which changes no softmax."""
        return np.log(np.maximum(self.probabilities, LEAST))


class OutOfFold(NamedTuple):
    """What one seed says of every case, each by the piece that did not train on it.

    Attributes:
        raw: the probabilities as the networks gave them.
        calibrated: the same after the temperature of each piece's inner validation.
        at_point: (M,) classes by each piece's operating point (two classes; else the most probable).
        top_slice: ranking → (M,) stored number of the first slice, NaN where the case has no such ranking.
        evidence: each of `CASE_SCORES` → ranking → (M,), NaN for cases without a known true slice, and for all cases
            where a piece with true slices lacks the ranking: a mean over the others would be of other cases.
        temperatures: of the pieces.
        pieces: (M,) folder of the piece that judged the case.
    """

    raw: Predictions
    calibrated: Floats
    at_point: NDArray[np.int64]
    top_slice: dict[str, Floats]
    evidence: dict[str, dict[str, Floats]]
    temperatures: list[float]
    pieces: list[Path]


def read_predictions(folder: str | Path) -> Predictions:
    """The labelled cases of an evaluation.

    Args:
        folder: with `cases/`, a JSON record a case.

    Raises:
        InputError: there is none, or something else.
    """
    return _predictions(_records(Path(folder)), Path(folder))


def _records(folder: Path) -> list[Record]:
    try:
        found = [json.loads(path.read_text(encoding="utf-8")) for path in (folder / "cases").glob("[!.]*.json")]
        return sorted((record for record in found if record["label"] is not None), key=lambda record: record["case"])
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise InputError(f"{folder / 'cases'} holds no records ({type(error).__name__}): delete {folder}") from None


def _predictions(records: Sequence[Record], folder: Path) -> Predictions:
    kept = [record for record in records if record["status"] != "refused"]
    if not kept:
        raise InputError(f"{folder} has no classified case of a known label: see its log for refused cases")
    return Predictions(
        [record["case"] for record in kept],
        # A NUL keeps a case of unknown patient apart from a patient who has its name.
        [record["patient"] or f"\0{record['case']}" for record in kept],
        np.array([record["label"] for record in kept], dtype=np.int64),
        np.array([record["probabilities"] for record in kept], dtype=np.float64),
        [record["case"] for record in records if record["status"] == "refused"],
    )


def fitted_on_validation(validation: Predictions, sensitivity: float = 0.9) -> tuple[float, float | None]:
    """Temperature, and operating point of the calibrated probabilities.

    The point is None with other than two classes, one without a case, or where only a threshold near 0 would do.

    Args:
        validation: inner validation cases of a piece.
        sensitivity: of the rule, see `operating_point`.
    """
    temperature = fit_temperature(validation.logits, validation.labels).value
    after = calibrated(validation.logits, temperature)
    try:
        return temperature, operating_point(validation.labels, after, sensitivity).threshold
    except InputError:
        return temperature, None


def out_of_fold(folders: Sequence[Path], sensitivity: float = 0.9, section: str = "test") -> OutOfFold:
    """Put the pieces of one seed together.

    Args:
        folders: of the pieces, with `validation/` and `test/`.
        sensitivity: of the operating points.
        section: of the folds that is put together.

    Raises:
        InputError: a case is in the test part of two pieces, or a file is missing.
    """
    read = [_piece(folder, sensitivity, section) for folder in folders]
    parts = [part for part, _ in read]
    cases = [case for part in parts for case in part.raw.cases]
    patients = [patient for part in parts for patient in part.raw.patients]
    judges = [folder for part in parts for folder in part.pieces]
    if len(set(cases)) < len(cases):
        raise InputError(f"{folders[0].parent}: a case is in the test part of two folds, so these are not folds")
    order = np.argsort(np.array(cases), kind="stable")

    def joined(values: Sequence[NDArray[Any]]) -> NDArray[Any]:
        return np.concatenate(values)[order]

    lacking = _lacking({folder: part for folder, (part, truth) in zip(folders, read, strict=True) if truth})

    def by_ranking(values: Sequence[dict[str, Floats]]) -> dict[str, Floats]:
        whole = {by: joined([one[by] for one in values]) for by in RANKINGS}
        return {by: np.full_like(found, np.nan) if by in lacking else found for by, found in whole.items()}

    return OutOfFold(
        Predictions(
            [cases[i] for i in order],
            [patients[i] for i in order],
            joined([part.raw.labels for part in parts]),
            joined([part.raw.probabilities for part in parts]),
            sorted(case for part in parts for case in part.raw.refused),
        ),
        joined([part.calibrated for part in parts]),
        joined([part.at_point for part in parts]),
        by_ranking([part.top_slice for part in parts]),
        {name: by_ranking([part.evidence[name] for part in parts]) for name in CASE_SCORES},
        [value for part in parts for value in part.temperatures],
        [judges[i] for i in order],
    )


def _lacking(parts: Mapping[Path, OutOfFold]) -> set[str]:
    """Rankings that some pieces have and others lack, of those whose cases have true slices."""
    had = {
        folder: {by for by, found in part.evidence["hit_1"].items() if np.isfinite(found).any()}
        for folder, part in parts.items()
    }
    known = {by for found in had.values() for by in found}
    for folder, found in had.items():
        if known - found:
            missing = ", ".join(sorted(known - found))
            logger.warning("%s: no order of slices by %s, left out for all folds", folder, missing)
    return {by for found in had.values() for by in known - found}


def _piece(folder: Path, sensitivity: float, section: str) -> tuple[OutOfFold, bool]:
    """What a piece says, and whether any of its positive cases has a true slice."""
    records = _records(folder / section)
    raw = _predictions(records, folder / section)
    temperature, threshold = fitted_on_validation(read_predictions(folder / "validation"), sensitivity)
    after = calibrated(raw.logits, temperature)
    if threshold is None and after.shape[1] == 2:
        logger.warning("%s: its validation cases give no operating point; the more probable class is taken", folder)
    told = rankings_that_tell(records)
    evidence = [
        {by: found for by, found in case_key_slices(record).items() if by in told}
        for record in records
        if record["status"] != "refused"
    ]
    truth = any(record["label"] and any(s["label"] == 1 for s in record["slices"]) for record in records)
    found = OutOfFold(
        raw,
        after,
        after.argmax(axis=1) if threshold is None else predicted_classes(after, threshold),
        _of_cases(evidence, "index"),
        {name: _of_cases(evidence, name) for name in CASE_SCORES},
        [temperature],
        [folder] * len(raw.cases),
    )
    return found, truth


def _of_cases(evidence: Sequence[dict[str, dict[str, float]]], name: str) -> dict[str, Floats]:
    return {by: np.array([one[by][name] if by in one else np.nan for one in evidence]) for by in RANKINGS}
