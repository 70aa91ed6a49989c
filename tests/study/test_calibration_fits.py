"""The fits that docs/results.md compares are judged on the test cases of each piece, and each arm counts once."""

import numpy as np
import pytest

from bundle.evaluation.calibration import calibrated, fit_temperature

from .calibration_fits import ADDED, main
from .test_report import VALIDATION, make_arm


def test_a_row_is_the_mean_over_arms_of_the_mean_over_pieces(tmp_path, capsys):
    ps = {"one": (0.9, 0.4, 0.8, 0.2), "other": (0.6, 0.3, 0.7, 0.9)}
    make_arm(tmp_path, "one", ps["one"])
    make_arm(tmp_path, "other", ps["other"], seeds=(0, 1))
    main([str(tmp_path)])
    name, arms, *told = capsys.readouterr().out.splitlines()[-1].split()
    assert (name, arms) == (tmp_path.name, "2")
    logits = np.log([one["probabilities"] for one in VALIDATION])
    labels = [one["label"] for one in VALIDATION]
    temperatures = [1.0, *(fit_temperature(logits, labels, added).value for added in ADDED)]
    for value, temperature in zip(told, temperatures, strict=True):
        right = [q for p in ps.values() for k, q in enumerate(p)]
        logit = [np.log([1 - q, q]) for q in right]
        nll = [-np.log(calibrated(row[None], temperature)[0, 1 - k % 2]) for k, row in enumerate(logit)]
        assert float(value) == pytest.approx(np.mean(nll), abs=6e-4)


def test_a_folder_without_trainings_gets_a_sentence(tmp_path):
    with pytest.raises(SystemExit, match="holds no finished training"):
        main([str(tmp_path)])
