import json
import math

import numpy as np
import pytest

from bundle.errors import InputError
from bundle.evaluation.calibration import calibrated, fit_temperature, operating_point
from bundle.study.out_of_fold import fitted_on_validation, out_of_fold, read_predictions

from .made_pieces import record, write_records

RNG = np.random.default_rng(1)


def drawn(names, classes=2):
    """Records of random probabilities that know something of the label."""
    found = []
    for number, name in enumerate(names):
        logits = 2 * RNG.standard_normal(classes)
        logits[number % classes] += 3
        p = np.exp(logits) / np.exp(logits).sum()
        found.append(record(name, number % classes, p, patient=f"p{number // 2}"))
    return found


def folds(folder, classes=2, cases=8):
    """Two folds, of which the second has the names that come first."""
    parts = []
    for number, prefix in enumerate("ba"):
        test = drawn([f"{prefix}{i}" for i in range(cases)], classes)
        validation = drawn([f"v{i}" for i in range(20)], classes)
        write_records(folder / f"{number}" / "test", test)
        write_records(folder / f"{number}" / "validation", validation)
        parts.append((test, validation))
    return [folder / "0", folder / "1"], parts


def logits(records):
    return np.log(np.array([one["probabilities"] for one in records]))


def labels(records):
    return np.array([one["label"] for one in records])


@pytest.mark.parametrize("classes", [2, 3])
def test_every_case_gets_what_its_own_fold_says(tmp_path, classes):
    folders, parts = folds(tmp_path, classes)
    found = out_of_fold(folders)
    assert found.raw.cases == [f"a{i}" for i in range(8)] + [f"b{i}" for i in range(8)]
    expected = {}
    for test, validation in parts:
        temperature = fit_temperature(logits(validation), labels(validation)).value
        after = calibrated(logits(test), temperature)
        if classes == 2:
            point = operating_point(labels(validation), calibrated(logits(validation), temperature), 0.9).threshold
            chosen = (after[:, 1] >= point).astype(int)
        else:
            chosen = after.argmax(axis=1)
        for one, p, predicted in zip(test, after, chosen, strict=True):
            expected[one["case"]] = (one["patient"], one["label"], one["probabilities"], p, predicted)
    for i, case in enumerate(found.raw.cases):
        patient, label, raw, p, predicted = expected[case]
        assert (found.raw.patients[i], found.raw.labels[i], found.at_point[i]) == (patient, label, predicted)
        np.testing.assert_allclose(found.raw.probabilities[i], raw)
        np.testing.assert_allclose(found.calibrated[i], p, rtol=1e-9)
    assert len(found.temperatures) == 2
    assert found.temperatures[0] != found.temperatures[1]


def test_a_ranking_that_one_fold_lacks_is_left_out_for_all(tmp_path, caplog):
    """Else a training whose scores are all the same would leave its cases out of a mean that looks whole."""

    def fold(name, cases):
        write_records(tmp_path / name / "test", cases)
        write_records(tmp_path / name / "validation", drawn([f"v{i}" for i in range(4)]))
        return tmp_path / name

    good = fold("good", [record("a", 1, [0.4, 0.6], scores=[0.0, 3.0, 1.0], truth=[0, 1, 0])])
    flat = fold("flat", [record("b", 1, [0.4, 0.6], scores=[2.0, 2.0, 2.0], truth=[0, 1, 0])])
    without = fold("without", [record("c", 0, [0.4, 0.6], truth=[0, 0, 0]), record("d", 1, [0.4, 0.6])])
    assert out_of_fold([good, without]).evidence["hit_1"]["score"][0] == 1.0  # no true slice there to be missed
    assert not caplog.messages
    found = out_of_fold([good, flat])
    assert np.isnan(found.evidence["hit_1"]["score"]).all()
    assert np.isnan(found.evidence["distance_mm"]["score"]).all()
    assert np.isnan(found.top_slice["score"]).all()
    assert "flat: no order of slices by" in caplog.text


def test_evidence_is_counted_where_the_truth_is_known(tmp_path):
    test = [
        record("hit", 1, [0.4, 0.6], scores=[0.0, 3.0, 1.0], truth=[0, 1, 0]),
        record("miss", 1, [0.4, 0.6], scores=[0.0, 3.0, 1.0], truth=[1, 0, 0]),
        record("negative", 0, [0.4, 0.6], scores=[5.0, 3.0, 1.0], truth=[0, 0, 0]),
        record("unknown", 1, [0.4, 0.6], scores=[0.0, 3.0, 4.0]),
    ]
    write_records(tmp_path / "test", test)
    write_records(tmp_path / "validation", drawn(["v0", "v1", "v2", "v3"]))
    found = out_of_fold([tmp_path])
    expected = {
        ("hit_1", "score"): [1, 0], ("hit_1", "attention"): [0, 1],  # attention runs against the scores
        ("hit_3", "score"): [1, 1], ("distance_mm", "score"): [0, 5], ("instance_auc", "score"): [1, 0],
    }  # fmt: skip
    for (name, by), values in expected.items():
        np.testing.assert_array_equal(found.evidence[name][by], [*values, math.nan, math.nan], err_msg=f"{name} {by}")
    np.testing.assert_array_equal(found.top_slice["score"], [2, 2, 1, 3])  # stored numbers


def test_refused_and_unlabelled_cases_are_told_apart(tmp_path):
    test = [*drawn(["b", "c"]), record("a", 1, [], status="refused"), record("d", 0, [0.5, 0.5]) | {"label": None}]
    test[0]["patient"] = None
    write_records(tmp_path / "test", test)
    write_records(tmp_path / "validation", drawn(["v0", "v1"]))
    found = out_of_fold([tmp_path]).raw
    assert (found.cases, found.refused) == (["b", "c"], ["a"])
    assert found.patients == ["\0b", "p0"]


def test_a_probability_of_zero_has_a_finite_logit(tmp_path):
    write_records(tmp_path, [record("a", 1, [1.0, 0.0]), record("b", 0, [1.0, 0.0])])
    found = read_predictions(tmp_path)
    assert np.isfinite(found.logits).all()
    np.testing.assert_allclose(calibrated(found.logits, 1.0), found.probabilities, rtol=0, atol=1e-30)


def test_validation_cases_of_one_class_give_no_operating_point(tmp_path):
    write_records(tmp_path, [record(f"a{i}", 0, [0.7, 0.3]) for i in range(4)])
    temperature, point = fitted_on_validation(read_predictions(tmp_path))
    assert temperature > 0
    assert point is None


def test_a_fold_that_has_to_answer_without_an_operating_point_says_so(tmp_path, caplog):
    folders, _ = folds(tmp_path)
    assert len(out_of_fold(folders).at_point)
    assert not caplog.messages
    write_records(folders[1] / "validation", [record(f"v{i}", 0, [0.7, 0.3]) for i in range(20)])
    found = out_of_fold(folders)
    assert [line for line in caplog.messages if f"{folders[1]}: its validation cases give no operating point" in line]
    last = [case.startswith("a") for case in found.raw.cases]
    np.testing.assert_array_equal(found.at_point[last], found.calibrated[last].argmax(axis=1))


def test_a_case_in_two_folds_is_refused(tmp_path):
    folders, _ = folds(tmp_path)
    write_records(folders[1] / "test", drawn(["b3"]))
    with pytest.raises(InputError, match="a case is in the test part of two folds, so these are not folds"):
        out_of_fold(folders)


def test_what_holds_no_records_is_refused_in_a_sentence(tmp_path):
    with pytest.raises(InputError, match="has no classified case of a known label"):
        read_predictions(tmp_path)
    (tmp_path / "cases").mkdir()
    (tmp_path / "cases" / "a.json").write_text(json.dumps({"case": "a"}))
    with pytest.raises(InputError, match=r"holds no records \(KeyError\)"):
        read_predictions(tmp_path)
