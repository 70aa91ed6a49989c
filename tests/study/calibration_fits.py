"""Ways to fit a temperature on the inner validation cases, judged by the NLL of the test cases.

python -m tests.study.calibration_fits OUTPUT_DIR …, from the repository root, where OUTPUT_DIR is that of a study;
prints the test NLL as trained and after `fit_temperature` with several numbers of `added` cases (1 is Platt's rule, 0
the plain fit), the mean over the finished trainings of each arm and then over the arms.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

from bundle.evaluation.calibration import calibrated, fit_temperature
from bundle.evaluation.scores import score
from bundle.study.out_of_fold import read_predictions

ADDED = (1.0, 0.5, 0.25, 0.0)


def judged(piece: Path) -> list[float]:
    """NLL of the test cases as they are, and after each fit."""
    validation, test = (read_predictions(piece / section) for section in ("validation", "test"))
    logits, test_logits = (np.log(np.maximum(one.probabilities, 1e-7)) for one in (validation, test))
    fits = [1.0, *(fit_temperature(logits, validation.labels, added).value for added in ADDED)]
    return [score("nll", test.labels, calibrated(test_logits, value)) for value in fits]


def main(folders: list[str]) -> None:
    """Print a row a study."""
    heads = ["as trained", *(f"{added:g} added" for added in ADDED)]
    print(f"{'NLL of the test cases':32}{'arms':>6}" + "".join(f"{head:>14}" for head in heads))
    for folder in map(Path, folders):
        pieces = sorted(path.parent for path in folder.glob("*/seed*_fold*/piece.json"))
        if not pieces:
            raise SystemExit(f"{folder} holds no finished training: give the output_dir of a study")
        by_arm: dict[str, list[list[float]]] = {}
        for piece in pieces:
            by_arm.setdefault(piece.parent.name, []).append(judged(piece))
        mean = np.mean([np.mean(rows, axis=0) for rows in by_arm.values()], axis=0)
        print(f"{folder.name:32}{len(by_arm):6}" + "".join(f"{value:14.3f}" for value in mean))


if __name__ == "__main__":
    main(sys.argv[1:])
