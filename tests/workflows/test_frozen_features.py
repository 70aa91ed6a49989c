"""Training on kept features of a frozen encoder, through the command line: the same run, weights for whole scans."""

import csv
import json
from pathlib import Path

import pytest

from .conftest import train_arguments

# No chance besides the draws of slices, which both runs share, and no rounding to 16 bits.
SETTINGS = (
    "--augment", "false", "--amp", "false", "--dropout", "0.0", "--cache_type", "float32", "--max_epochs", "2",
)  # fmt: skip


def epochs(output: Path) -> list[dict[str, str]]:
    with (output / "epochs.csv").open() as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("stages", [pytest.param(2, marks=pytest.mark.slow), 5])
def test_kept_features_train_as_slices_do(stages, cohort, trained, tmp_path, monai):
    frozen = ("--encoder_weights", str(trained / "model.pt"), "--frozen_stages", str(stages))
    runs = {}
    for kept in ("false", "true"):
        output = tmp_path / kept
        cache = str(tmp_path / "cache")
        monai(*train_arguments(cohort, output), *SETTINGS, *frozen, "--cache_features", kept, "--cache_dir", cache)
        runs[kept] = epochs(output)
    for plain, fast in zip(runs["false"], runs["true"], strict=True):
        for name in ("train_loss", "train_nll_var", "val_nll", "val_auc", "flip_rate"):
            if plain[name]:
                assert float(fast[name]) == pytest.approx(float(plain[name]), abs=1e-4), name

    arguments = train_arguments(cohort, tmp_path / "true", "configs/evaluate.yaml")
    monai(*arguments, "--amp", "false", "--cache_dir", "null", "--section", "validation")
    metrics = json.loads((tmp_path / "true" / "validation" / "metrics.json").read_text())
    annealed = [row for row in runs["true"] if float(row["temperature"]) == float(runs["true"][-1]["temperature"])]
    nll = min(float(row["val_nll"]) for row in annealed)  # of the epoch that was saved
    assert metrics["scores"]["nll"]["value"] == pytest.approx(nll, abs=1e-3), "slices give what features gave"
