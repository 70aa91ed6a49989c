import math

import numpy as np
import pytest

from bundle.errors import InputError
from bundle.study.steadiness import STEADINESS, read_log, steadiness

RNG = np.random.default_rng(0)


def log(num_epochs, per_epoch=7):
    epochs = {"epoch": np.arange(1, num_epochs + 1)}
    for name in ("val_accuracy", "val_auc", "train_accuracy", "train_eval_accuracy", "flip_rate", "attention_drift",
                 "clipped_share"):  # fmt: skip
        epochs[name] = RNG.uniform(0.3, 0.9, num_epochs)
    number = np.repeat(epochs["epoch"], per_epoch)
    return epochs, {"epoch": number, "nll": RNG.gamma(2, size=len(number)) - 0.01 * np.arange(len(number))}


@pytest.mark.parametrize(
    ("num_epochs", "last"), [(24, range(17, 25)), (10, (8, 9, 10)), (3, (3,)), (2, (2,)), (1, (1,))]
)
def test_against_polyfit_over_the_last_third(num_epochs, last):
    epochs, batches = log(num_epochs)
    found = steadiness(epochs, batches, num_validation=50)
    assert found.keys() == STEADINESS.keys()
    chosen = np.isin(epochs["epoch"], last)
    nll = batches["nll"][np.isin(batches["epoch"], last)]
    steps = np.arange(len(nll))
    residual = nll - np.polyval(np.polyfit(steps, nll, 1), steps)
    accuracy = epochs["val_accuracy"][chosen]
    expected = {
        "epochs": len(last),
        "nll_mean": nll.mean(),
        "nll_variance": (residual**2).sum() / (len(nll) - 2),
        "nll_min": nll.min(),
        "nll_max": nll.max(),
        "val_accuracy_mean": accuracy.mean(),
        "val_accuracy_sd": accuracy.std(ddof=1) if len(last) > 1 else math.nan,
        "val_accuracy_range": accuracy.max() - accuracy.min(),
        "val_sampling_error": np.sqrt(accuracy.mean() * (1 - accuracy.mean()) / 50),
        "val_auc_mean": epochs["val_auc"][chosen].mean(),
        "train_accuracy": epochs["train_accuracy"][chosen].mean(),
        "train_minus_validation": epochs["train_accuracy"][chosen].mean() - accuracy.mean(),
        "train_minus_eval_mode": (epochs["train_accuracy"] - epochs["train_eval_accuracy"])[chosen].mean(),
        **{name: epochs[name][chosen].mean() for name in ("flip_rate", "attention_drift", "clipped_share")},
    }
    assert found == pytest.approx(expected, nan_ok=True, rel=1e-9)


def test_a_loss_that_falls_along_a_line_is_steady():
    batches = {"epoch": np.ones(50), "nll": np.linspace(2, 1, 50)}
    assert steadiness({"epoch": [1.0]}, batches, 10)["nll_variance"] == pytest.approx(0, abs=1e-25)
    batches["nll"] = batches["nll"] + np.tile([0.1, -0.1], 25)
    assert steadiness({"epoch": [1.0]}, batches, 10)["nll_variance"] == pytest.approx(0.01, rel=0.05)


def test_cells_without_a_number_are_left_out():
    epochs, batches = log(9)
    full = steadiness(epochs, batches, 50)
    epochs["val_accuracy"][[6, 8]] = math.nan  # of the last three, one is validated
    epochs["flip_rate"][7] = math.nan
    found = steadiness(epochs, batches, 50)
    assert found["val_accuracy_mean"] == epochs["val_accuracy"][7]
    assert math.isnan(found["val_accuracy_sd"])
    assert found["val_accuracy_range"] == 0
    assert found["flip_rate"] == pytest.approx(epochs["flip_rate"][[6, 8]].mean())
    assert found["nll_variance"] == full["nll_variance"]


def test_what_was_not_recorded_is_nan():
    found = steadiness({"epoch": [1.0, 2.0]}, {"epoch": [1.0, 2.0], "nll": [0.5, math.nan]}, 0)
    assert found.pop("epochs") == 1
    assert all(math.isnan(value) for value in found.values())
    found = steadiness({"epoch": [1.0]}, {"epoch": [1.0, 1.0], "nll": [0.5, 0.7]}, 0)  # no line through two with a rest
    assert found["nll_mean"] == pytest.approx(0.6)
    assert math.isnan(found["nll_variance"])


@pytest.mark.parametrize("epochs", [{}, {"epoch": []}])
def test_an_empty_log_is_refused(epochs):
    with pytest.raises(InputError, match="the log of the training is empty"):
        steadiness(epochs, {"epoch": [1.0], "nll": [1.0]}, 5)
    with pytest.raises(InputError, match="the log of the training is empty"):
        steadiness({"epoch": [1.0]}, epochs, 5)


def test_a_log_is_read_and_what_is_none_is_refused(tmp_path):
    path = tmp_path / "epochs.csv"
    path.write_text("epoch,flip_rate\n1,\n2,0.25\n")
    np.testing.assert_array_equal(read_log(path)["flip_rate"], [math.nan, 0.25])
    for text in ("epoch\nfirst\n", "epoch,x\n1\n"):
        path.write_text(text)
        if text.startswith("epoch,x"):
            assert math.isnan(read_log(path)["x"][0])
        else:
            with pytest.raises(InputError, match=r"epochs\.csv is no log of a training \(ValueError\): train again"):
                read_log(path)
    with pytest.raises(InputError, match="FileNotFoundError"):
        read_log(tmp_path / "none.csv")
