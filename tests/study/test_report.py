"""The report of a study, on pieces made by hand."""

import csv
import math
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest

from bundle.evaluation.abstention import confidence
from bundle.evaluation.calibration import calibrated
from bundle.evaluation.scores import score
from bundle.study import calibration_panels, figures
from bundle.study.arm_results import collect, mean_steadiness, variance_ratio
from bundle.study.calibration_panels import draw_reliability, draw_risk_coverage, errors_kept
from bundle.study.csv_tables import write_arms
from bundle.study.figures import draw_selection, draw_validation
from bundle.study.locked import collect_locked
from bundle.study.out_of_fold import Predictions
from bundle.study.piece import Piece
from bundle.study.report import report
from bundle.study.tables import study_text

from .made_pieces import TRAIN, datalist, finish, record, write_records

TRUTH = {"hit": [0, 1, 0], "miss": [1, 0, 0], "unknown": [-1, -1, -1]}
VALIDATION = [record(f"v{i}", i % 2, [1 - p, p]) for i, p in enumerate((0.2, 0.7, 0.4, 0.8, 0.1, 0.3))]


def make_piece(folder, arm, fold, seed=0):
    path = folder / "datalist.json"
    settings = {"datalist": str(path if path.exists() else datalist(folder)), "fold": fold, "seed": seed}
    return Piece(folder / arm / f"seed{seed}_fold{fold}", (TRAIN,), settings)


def make_arm(
    folder, arm, p=(0.9, 0.4, 0.8, 0.2), seeds=(0,), truth="hit", nll=((1.0, 0, 0, 1), (3.0, 0, 0, 3)), **more
):
    """An arm of two folds with a negative and a positive case each, whose probabilities of class 1 are p."""
    pieces = []
    for seed in seeds:
        for fold in (0, 1):
            piece = make_piece(folder, arm, fold, seed)
            test = [
                record(f"n{fold}", 0, [1 - p[2 * fold + 1], p[2 * fold + 1]], scores=[0, 2, 1], truth=[0, 0, 0]),
                record(f"p{fold}", 1, [1 - p[2 * fold], p[2 * fold]], scores=[0, 2, 1], truth=TRUTH[truth]),
            ]
            shown = {"chance_hit_1": 1 / 3} if truth != "unknown" else {}
            finish(piece, test, VALIDATION, auc=0.6 + 0.2 * fold, nll=nll[fold], key_slices=shown, **more)
            pieces.append(piece)
    return collect(arm, pieces, resamples=50)


def tables(text):
    """Head of the first column → the rows as dicts, of each Markdown table."""
    found = {}
    for block in text.split("\n\n"):
        lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in block.splitlines() if line[0] == "|"]
        if lines:
            found[lines[0][0]] = [dict(zip(lines[0], line, strict=True)) for line in lines[2:]]
    return found


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))


def test_tables_say_what_was_computed_by_hand(tmp_path):
    before = make_arm(tmp_path, "before", nll=((2.0, 0, 0, 2), (6.0, 0, 0, 6)))
    other = make_arm(tmp_path, "other", p=(0.9, 0.1, 0.4, 0.6), truth="miss")
    text = study_text([before, other], "before", ["third"])
    assert "4 test cases of 4 patients" in text
    # Two of four right; the F1 of the class that is always answered is 2/3, of the other 0.
    assert "Always the most frequent class: accuracy 0.500, macro F1 0.333." in text
    assert "Left out, as no seed has all its folds done: third." in text
    found = tables(text)
    first, second = found["arm"]
    assert first["AUC"].startswith("1.000 (")
    assert second["AUC"].startswith("0.750 (")  # 0.9 over both, 0.4 over 0.1 alone
    assert second["AUC, difference"].startswith("-0.250 (")
    assert first["AUC, difference"] == ""
    assert second["accuracy"].startswith("0.500 (")
    assert first["AUC of a piece, mean ± sd"] == "0.700 ± 0.141"  # of 0.6 and 0.8
    assert "AUC of all seeds together" not in first

    hit, miss, chance = found["first slice is a true one"]
    assert hit["by score"] == hit["by weight"] == "1.000 (1.000–1.000)"
    assert (hit["in the first three"], hit["mm from a true one"]) == ("1.000 (1.000–1.000)", "0.0 (0.0–0.0)")
    assert miss["by score"] == "0.000 (0.000–0.000)"
    assert miss["mm from a true one"] == "5.0 (5.0–5.0)"
    assert miss["by attention"] == "1.000 (1.000–1.000)"  # runs against the scores
    assert (chance["first slice is a true one"], chance["by score"]) == ("chance", "0.333")

    steady, other_steady = found["last third of the epochs"]
    # Losses a, 0, 0, a lie a/2 off their level line; divided by n - 2: a² / 2.
    assert steady["its variance"] == f"{(2**2 / 2 + 6**2 / 2) / 2:.4f}"
    assert other_steady["times steadier"] == "4.0 (4.0–4.0)"
    assert steady["times steadier"] == ""
    assert steady["batch NLL"] == "2.000"
    assert steady["training − validation"] == "0.100"  # 0.9 − 0.8
    assert "flips" not in steady  # a column of nothing
    assert steady["sd of test probabilities"] == "0.275"  # of 0.9 and 0.4, and of 0.8 and 0.2

    write_arms([before, other], "before", tmp_path / "arms.csv")
    row, other_row = rows_of(tmp_path / "arms.csv")
    assert (row["probability_sd"], row["hit_3_score"], other_row["distance_mm_score"]) == ("0.275", "1", "5")
    assert float(row["temperature_low"]) <= float(row["temperature_high"])
    assert "agree_score" not in row  # of one seed

    calibration, other_calibration = found["calibration"]
    # Of 0.9, 0.6, 0.8, 0.8 all are right; of 0.9, 0.9, 0.6, 0.6 the first two.
    assert (calibration["errors of all"], other_calibration["errors of all"]) == ("0.000", "0.500")
    assert calibration["of the surest 80%"] == "0.000 (0.000–0.000)"
    assert other_calibration["of the surest 80%"].startswith("0.500 (")
    assert other_calibration["of the surest, mean over all shares"].startswith("0.250 (")  # 0 of two, then 2 of 4
    nll = -np.mean(np.log([0.9, 0.6, 0.8, 0.8]))
    assert calibration["NLL"].startswith(f"{nll:.3f} (")
    low, high = map(float, calibration["temperatures"].split("–"))
    assert low == high > 0


def test_the_ratio_is_of_means_and_its_ends_of_pairs(tmp_path):
    before = make_arm(tmp_path, "before", nll=((2.0, 0, 0, 2), (6.0, 0, 0, 6)))
    other = make_arm(tmp_path, "other", nll=((2.0, 0, 0, 2), (1.0, 0, 0, 1)))
    ratio = variance_ratio(before, other)
    assert ratio == pytest.approx(((2 + 18) / (2 + 0.5), 1, 36))
    assert variance_ratio(before, before) == (1, 1, 1)


def test_pieces_too_short_for_a_figure_are_left_out_of_it(tmp_path):
    before = make_arm(tmp_path, "before")
    short = make_arm(tmp_path, "short", nll=((1.0, 2.0), (3.0, 0, 0, 3)))
    none = make_arm(tmp_path, "none", nll=((1.0, 2.0), (2.0, 1.0)))
    assert variance_ratio(before, short) == pytest.approx((1, 1, 1))
    assert mean_steadiness(short, "nll_variance") == pytest.approx(4.5)
    assert all(map(math.isnan, variance_ratio(before, none)))
    assert math.isnan(mean_steadiness(none, "nll_variance"))
    found = tables(study_text([before, none], "before"))["last third of the epochs"]
    assert found[1]["its variance"] == found[1]["clipped" if "clipped" in found[1] else "its variance"] == ""


def test_an_arm_counts_as_far_as_its_seeds_are_whole(tmp_path):
    make_arm(tmp_path, "arm", seeds=(0, 1))
    pieces = [make_piece(tmp_path, "arm", fold, seed) for seed in (0, 1, 2) for fold in (0, 1)]
    (pieces[3].folder / "piece.json").unlink()
    found = collect("arm", pieces, resamples=10)
    assert list(found.by_seed) == [0]
    assert list(found.pieces) == [piece.folder for piece in pieces[:2]]
    (pieces[0].folder / "piece.json").unlink()
    assert collect("arm", pieces, resamples=10) is None


def test_without_slice_truth_there_is_no_table_of_it(tmp_path):
    one = make_arm(tmp_path, "one", truth="unknown")
    assert tables(study_text([one], "one")).keys() == {"arm", "last third of the epochs", "calibration"}
    report([one], "one", tmp_path / "out")
    assert rows_of(tmp_path / "out" / "arms.csv")[0]["hit_1_score"] == ""


def test_more_seeds_and_refused_cases_are_told(tmp_path):
    one = make_arm(tmp_path, "one", seeds=(0, 1))
    first = one.by_seed[0]
    many = [f"r{i}" for i in range(7)]
    told = {seed: found._replace(raw=found.raw._replace(refused=many)) for seed, found in one.by_seed.items()}
    text = study_text([one._replace(by_seed=told)], "one")
    assert "The reader refused 7 more (r0, r1, r2, r3, r4, …): they are in no figure." in text
    assert "differences" not in text
    (row,) = tables(text)["arm"]
    assert row["seeds"] == "2"
    assert row["AUC of all seeds together"].startswith("1.000")
    assert tables(text)["first slice is a true one"][0]["seeds agree (score)"] == "1.000 (1.000–1.000)"
    assert first.raw.refused == []


def test_three_classes(tmp_path):
    datalist(tmp_path, classes=3)
    pieces = [make_piece(tmp_path, "three", fold) for fold in (0, 1)]
    for fold, piece in enumerate(pieces):
        test = [record(f"c{fold}{k}", k, np.roll([0.6, 0.3, 0.1], k)) for k in (0, 1, 2, 0)[: 3 + fold]]
        if fold:
            test[3] = record("extra", 0, [0.2, 0.5, 0.3])
        finish(piece, test, [record(f"v{k}", k % 3, np.roll([0.5, 0.3, 0.2], k % 3)) for k in range(6)])
    text = study_text([collect("three", pieces, resamples=20)], "three")
    # 3 of 7 cases are of class 0: F1 2 · 3/7 / (1 + 3/7) = 0.6, a third of it over the classes.
    assert "Always the most frequent class: accuracy 0.429, macro F1 0.200." in text
    found = tables(text)
    assert found["arm"][0]["accuracy"].startswith("0.857 (")
    assert "sensitivity at the point" not in found["calibration"][0]
    report([collect("three", pieces, resamples=20)], "three", tmp_path / "out")


@pytest.mark.parametrize("count", [1, 6])
def test_figures_show_something_for_every_arm(tmp_path, count):
    arms = [make_arm(tmp_path, f"arm{i}", p=(0.9, 0.4, 0.5 + 0.05 * i, 0.6)) for i in range(count)]
    report(arms, "not among them", tmp_path / "out")
    heights = {}
    for name in ("arms", "traces", "validation", "selection", "reliability", "risk_coverage"):
        picture = matplotlib.image.imread(tmp_path / "out" / f"{name}.png")
        heights[name] = picture.shape[0]
        assert (picture[..., :3] < 0.9).mean() > 0.01, name  # ink
        assert len(np.unique(picture[..., :3].reshape(-1, 3), axis=0)) > 50
    rows = rows_of(tmp_path / "out" / "arms.csv")
    assert [row["arm"] for row in rows] == [arm.name for arm in arms]
    assert rows[0]["auc_difference"] == "0"  # against the first, where the reference is not there
    assert len(rows_of(tmp_path / "out" / "pieces.csv")) == 2 * count
    assert (tmp_path / "out" / "report.md").read_text() == study_text(arms, "arm0")


def test_epochs_that_were_not_validated_leave_no_gap(tmp_path):
    (arm, *_) = [make_arm(tmp_path, "arm")]
    full = tmp_path / "full.png"
    draw_validation([arm], full)
    for folder in arm.pieces:
        path = folder / "epochs.csv"
        path.write_text(path.read_text().replace("2,0.7,0.7", "2,,"))
        assert "2,," in path.read_text()
    draw_validation([arm], tmp_path / "half.png")
    a, b = (matplotlib.image.imread(path)[..., :3] for path in (full, tmp_path / "half.png"))
    assert a.shape == b.shape
    np.testing.assert_allclose(a, b, atol=0.01)  # the values lie on a line


def test_rows_of_pieces_have_their_scores_and_times(tmp_path):
    one = make_arm(tmp_path, "one", seconds=None)
    report([one], "one", tmp_path / "out")
    rows = rows_of(tmp_path / "out" / "pieces.csv")
    assert [(row["arm"], row["seed"], row["fold"], row["seconds"]) for row in rows] == [
        ("one", "0", "0", ""),
        ("one", "0", "1", ""),
    ]
    assert [row["test_auc"] for row in rows] == ["0.6", "0.8"]
    assert float(rows[0]["nll_variance"]) == 0.5


def test_rows_of_cases_have_what_their_own_fold_says(tmp_path):
    one = make_arm(tmp_path, "one", p=(0.9, 1 / 3, 0.8, 0.2), seeds=(0, 1))
    other = make_arm(tmp_path, "other", p=(0.3, 0.4, 0.4, 0.1), truth="miss")
    first = one.by_seed[0]
    raw = first.raw._replace(refused=["r"], patients=["\0n0", *first.raw.patients[1:]])
    report([one._replace(by_seed={**one.by_seed, 0: first._replace(raw=raw)}), other], "one", tmp_path / "out")
    rows = rows_of(tmp_path / "out" / "predictions.csv")
    refused = [row for row in rows if row["status"] == "refused"]
    assert [(row["arm"], row["seed"], row["case"], row["label"]) for row in refused] == [("one", "0", "r", "")]
    judged = [row for row in rows if row["status"] == "judged"]
    assert [(row["arm"], row["seed"], row["fold"], row["case"]) for row in judged] == [
        (arm, seed, fold, f"{kind}{fold}")
        for arm, seed in (("one", "0"), ("one", "1"), ("other", "0"))
        for kind in "np"
        for fold in "01"
    ]
    row = judged[0]
    assert (row["patient"], judged[4]["patient"]) == ("", "n0")  # not known; known
    assert float(row["probability_1"]) == pytest.approx(1 / 3, rel=1e-8)
    after = calibrated(np.log([[2 / 3, 1 / 3]]), first.temperatures[0])[0, 1]
    assert float(row["calibrated_1"]) == pytest.approx(after, rel=1e-8)
    assert (row["first_slice_score"], row["hit_1_score"]) == ("2", "")  # the first of the slices has number 1
    assert [row["hit_1_score"] for row in judged if row["case"] == "p1"] == ["1", "1", "0"]
    assert [row["hit_1_occlusion"] for row in judged] == [""] * 12
    # The AUC of the table of arms, from the rows alone.
    for arm in rows_of(tmp_path / "out" / "arms.csv"):
        seeds = {row["seed"] for row in judged if row["arm"] == arm["arm"]}
        aucs = []
        for seed in seeds:
            mine = [row for row in judged if (row["arm"], row["seed"]) == (arm["arm"], seed)]
            p = np.array([[float(row["probability_0"]), float(row["probability_1"])] for row in mine])
            aucs.append(score("auc", np.array([int(row["label"]) for row in mine]), p))
        assert float(arm["auc"]) == pytest.approx(np.mean(aucs), rel=1e-4)


def test_locked_cases_are_judged_by_every_piece(tmp_path, capsys):
    found = {}
    for arm, p in (("before", 0.6), ("after", 0.9)):
        make_arm(tmp_path, arm)
        pieces = [make_piece(tmp_path, arm, fold) for fold in (0, 1)]
        for piece in pieces:
            higher = p + 0.05 * piece.settings["fold"]
            cases = [("a", 0, 0.2), ("b", 1, higher), ("c", 0, 0.7), ("d", 1, 0.8)]
            records = [record(c, y, [1 - q, q], scores=[0, 2, 1], truth=[0, y, 0]) for c, y, q in cases]
            write_records(piece.folder / "locked", records)
            for name in ("model.pt", "locked/metrics.json"):
                (piece.folder / name).touch()
        found[arm] = collect_locked(arm, pieces, resamples=50)
    assert list(found["after"].by_seed) == [(0, 0), (1, 0)]  # fold, seed
    # Three of four pairs of a negative and a positive case in order, in both pieces; and all of them.
    assert found["before"].compared.values["auc"] == pytest.approx(0.75)
    assert found["after"].compared.values["auc"] == found["after"].compared.values["ensemble_auc"] == 1
    report(list(found.values()), "before", tmp_path / "locked", locked=True)
    assert "4 locked cases of 4 patients, each judged by every training" in capsys.readouterr().out
    rows = tables((tmp_path / "locked" / "report.md").read_text())
    assert [(row["trainings"], row["AUC"][:5]) for row in rows["arm"]] == [("2", "0.750"), ("2", "1.000")]
    assert rows["first slice is a true one"][1]["trainings agree (score)"] == "1.000 (1.000–1.000)"
    assert "last third of the epochs" not in rows
    assert {path.name for path in (tmp_path / "locked").iterdir()} == {
        "report.md", "arms.csv", "predictions.csv", "arms.png", "reliability.png", "risk_coverage.png"
    }  # fmt: skip
    judged = rows_of(tmp_path / "locked" / "predictions.csv")
    assert [(row["arm"], row["fold"], row["case"]) for row in judged] == [
        (arm, fold, case) for arm in ("before", "after") for fold in "01" for case in "abcd"
    ]
    assert collect_locked("none", [make_piece(tmp_path, "none", 0)]) is None
    (pieces[0].folder / "locked" / "metrics.json").unlink()  # not judged yet
    assert list(collect_locked("after", pieces, resamples=50).by_seed) == [(1, 0)]


def test_errors_of_the_surest_cases_by_a_loop():
    rng = np.random.default_rng(2)
    labels, p = rng.integers(0, 2, 40), np.round(rng.random(40), 1)
    p = np.stack([1 - p, p], axis=1)
    sure, wrong = confidence(p), p.argmax(axis=1) != labels
    for count, found in enumerate(errors_kept(labels, p), 1):
        kept = sure >= np.sort(sure)[-count]
        assert found == pytest.approx(wrong[kept].mean())


@pytest.fixture
def drawn(monkeypatch):
    """The figures that are saved, in their order."""
    found = []
    for module in (figures, calibration_panels):
        monkeypatch.setattr(module, "save_figure", lambda figure, png: found.append(figure))
    return found


def lines(panel):
    """Label → ordinates."""
    return {line.get_label(): line.get_ydata() for line in panel.lines}


def test_flips_drift_and_temperature_are_those_of_the_log(tmp_path, drawn):
    still = make_arm(tmp_path, "still")  # has none of them in its log
    logged = {"flip_rate": (math.nan, 0.4, 0.2), "attention_drift": (math.nan, 0.3, 0.1), "temperature": (5, 2, 0.5)}
    moving = make_arm(tmp_path, "moving", logged=logged)
    draw_selection([still, moving], tmp_path / "x.png")
    first, second, temperature = drawn[0].axes
    assert not first.lines
    np.testing.assert_allclose(lines(second)["flips of the first slice"], [0.4, 0.2])
    np.testing.assert_allclose(lines(second)["drift of attention"], [0.3, 0.1])
    np.testing.assert_allclose(lines(temperature)["temperature"], [5, 2, 0.5])
    assert [text.get_text() for text in drawn[0].legends[0].texts] == [*lines(second), "temperature"]
    draw_selection([still], tmp_path / "x.png")
    assert not drawn[1].legends


def many_cases(tmp_path, seeds, temperature):
    """An arm of 30 cases, each seed of which says the same."""
    made = make_arm(tmp_path, "made", seeds=seeds)
    labels = np.arange(30) % 3 % 2
    p = np.where(np.arange(30) < 10, 0.95, np.where(np.arange(30) < 27, 0.25, 0.55))
    raw = Predictions([f"c{i}" for i in range(30)], [f"p{i // 2}" for i in range(30)], labels, np.c_[1 - p, p], [])
    after = calibrated(raw.logits, temperature)
    told = {run: one._replace(raw=raw, calibrated=after) for run, one in made.by_seed.items()}
    return made._replace(by_seed=told), labels, raw.probabilities, after


@pytest.mark.parametrize("seeds", [(0,), (0, 1, 2, 3, 4, 5)])
def test_reliability_is_of_cases_before_and_after_the_temperature(tmp_path, drawn, seeds):
    arm, labels, raw, after = many_cases(tmp_path, seeds, 2.0)
    draw_reliability([arm], tmp_path / "x.png")
    (panel,) = drawn[0].axes
    for container, p in zip(panel.containers, (raw[:, 1], after[:, 1]), strict=True):
        line, _, (bars,) = container.lines
        # Of the three cases at .55 no point is drawn, however many seeds say it.
        expected = [(p[group].mean(), labels[group].mean()) for group in (slice(10, 27), slice(0, 10))]
        np.testing.assert_allclose(np.transpose(line.get_data()), expected)
        for (said, so), bar in zip(expected, bars.get_segments(), strict=True):
            assert bar[0][0] == pytest.approx(said)
            assert 0 <= bar[0][1] < so < bar[1][1] <= 1


def test_errors_of_the_surest_are_drawn_after_the_temperature(tmp_path, drawn):
    arm, labels, _, after = many_cases(tmp_path, (0, 1), 2.0)
    other = arm.by_seed[1]._replace(calibrated=after[:, ::-1])
    arm = arm._replace(by_seed={0: arm.by_seed[0], 1: other})
    draw_risk_coverage([arm], tmp_path / "x.png")
    (panel,) = drawn[0].axes
    curve = (errors_kept(labels, after) + errors_kept(labels, after[:, ::-1])) / 2
    np.testing.assert_allclose(lines(panel)["mean of the runs, and their range"], curve)
    np.testing.assert_allclose(lines(panel)["all cases"], curve[-1])
