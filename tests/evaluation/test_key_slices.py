from __future__ import annotations

import math
from itertools import combinations
from typing import Any

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from bundle.evaluation.key_slices import (
    RANKINGS,
    case_key_slices,
    key_slice_intervals,
    key_slice_scores,
    rank_slices,
    rankings_that_tell,
    tells_apart,
)


def record(
    case: str,
    label: int | None,
    truth: list[int],
    score: list[float],
    *,
    weight: list[float] | None = None,
    attention: list[float] | None = None,
    occlusion: list[float] | None = None,
    spacing: float = 5.0,
    status: str = "accepted",
) -> dict[str, Any]:
    slices = [
        {
            "index": i,
            "position_mm": -20.0 + spacing * i,
            "weight": (weight or score)[i],
            "attention": (attention or score)[i],
            "score": score[i],
            **({} if occlusion is None else {"occlusion": occlusion[i]}),
            "sop_instance_uid": None,
            "label": truth[i],
        }
        for i in range(len(truth))
    ]
    return {"case": case, "status": status, "label": label, "patient": case, "slices": slices}


# hit: the top slice is true; near: the top slice lies 2 slices of 5 mm away and the third ranked hits; miss: 2 of 4 mm
# away, nothing in the top three; negative: counts in the pooled area only.
HIT = record("hit", 1, [0, 1, 1, 0, 0], [0.0, 3.0, 1.0, 2.0, -1.0])
NEAR = record("near", 1, [1, 0, 0, 0, 0], [1.0, 2.0, 3.0, 0.0, 0.0])
MISS = record("miss", 1, [0, 0, 0, 1, 0, 1], [3.0, 4.0, 3.5, 0.0, 0.5, 0.2], spacing=4.0)
NEGATIVE = record("negative", 0, [0, 0, 0], [-1.0, -2.0, 2.5])


def test_by_hand() -> None:
    result = key_slice_scores([HIT, NEAR, MISS, NEGATIVE])
    assert result["cases_with_truth"] == 4
    assert result["positive_cases"] == 3
    scored = result["score"]
    assert scored["hit_1"] == pytest.approx(1 / 3)
    assert scored["hit_3"] == pytest.approx(2 / 3)
    assert scored["distance_mm_mean"] == pytest.approx((0 + 10 + 8) / 3)
    assert scored["distance_mm_median"] == pytest.approx(8.0)
    # Wins of true over false slices, pair by pair: 5 of 6, 2 of 4, 0 of 8.
    assert scored["instance_auc"] == pytest.approx(np.mean([5 / 6, 2 / 4, 0.0]))
    assert result["chance_hit_1"] == pytest.approx(np.mean([2 / 5, 1 / 5, 2 / 6]))
    pooled = [s for r in (HIT, NEAR, MISS, NEGATIVE) for s in r["slices"]]
    expected = roc_auc_score([s["label"] for s in pooled], [s["score"] for s in pooled])
    assert scored["instance_auc_pooled"] == pytest.approx(expected)


def test_chance_hit_3_is_that_of_every_draw() -> None:
    draws = list(combinations([0, 0, 0, 1, 0, 1], 3))
    assert key_slice_scores([MISS])["chance_hit_3"] == pytest.approx(np.mean([any(d) for d in draws]))
    assert key_slice_scores([record("short", 1, [0, 1], [1.0, 0.0])])["chance_hit_3"] == 1.0


def test_score_weight_and_attention_are_ranked_apart() -> None:
    case = record("c", 1, [1, 0, 0], [2.0, 1.0, 0.0], weight=[0.1, 0.8, 0.1], attention=[0.1, 0.1, 0.8])
    result = key_slice_scores([case])
    assert [result[by]["hit_1"] for by in ("score", "weight", "attention")] == [1.0, 0.0, 0.0]
    assert [result[by]["distance_mm_mean"] for by in ("score", "weight", "attention")] == [0.0, 5.0, 10.0]
    assert [result[by]["instance_auc"] for by in ("score", "weight", "attention")] == [1.0, 0.25, 0.25]


def test_ties_go_to_the_first_position_and_hard_weights_to_the_score() -> None:
    tied = record("tied", 1, [0, 1, 0], [1.0, 1.0, 0.0])
    assert rank_slices(tied["slices"], "score") == [0, 1, 2]
    assert key_slice_scores([tied])["score"]["hit_1"] == 0.0
    hard = record("hard", 1, [0, 0, 0, 1], [0.0, 1.0, 3.0, 2.0], weight=[0.0, 0.0, 1.0, 0.0])
    assert rank_slices(hard["slices"], "weight") == [2, 3, 1, 0]


def test_a_ranking_that_tells_no_slices_apart_is_none() -> None:
    flat = record("flat", 1, [1, 0, 0], [0.0] * 3, weight=[1 / 3] * 3, attention=[1 / 3] * 3, occlusion=[0.2, 0.1, 0.0])
    assert rankings_that_tell([flat, flat]) == ["occlusion"]
    assert [by for by in RANKINGS if by in key_slice_scores([flat])] == ["occlusion"]
    assert key_slice_intervals([flat], ["p"]).keys() == {"occlusion"}
    assert tells_apart(flat["slices"], "occlusion")
    assert not tells_apart(flat["slices"])
    # One case in which slices differ is enough; equal weights of different scores are ranked by score.
    scored = record("scored", 1, [1, 0, 0], [0.0, 1.0, 0.0], weight=[1 / 3] * 3, occlusion=[0.0] * 3)
    assert rankings_that_tell([flat, scored]) == list(RANKINGS)
    assert rankings_that_tell([flat, {**scored, "status": "refused", "slices": []}]) == ["occlusion"]


def test_only_positive_accepted_cases_of_known_truth_count() -> None:
    alone = key_slice_scores([HIT])
    others = [
        record("unknown", 1, [-1, -1], [1.0, 0.0]),
        record("refused", 1, [1, 0], [0.0, 1.0], status="refused"),
        record("no truth in it", 1, [0, 0], [-5.0, -5.0]),
        record("unlabelled", None, [0, 1], [-5.0, 5.0]),
    ]
    result = key_slice_scores([HIT, *others])
    assert result["positive_cases"] == 1
    assert result["positive_cases_without_true_slice"] == 1
    for name in ("hit_1", "hit_3", "distance_mm_mean", "instance_auc"):
        assert result["score"][name] == alone["score"][name]
    assert key_slice_scores(others[:2]) == {}
    assert key_slice_scores([]) == {}


def test_slices_of_unknown_truth_are_passed_over() -> None:
    case = record("partly", 1, [-1, 0, 1], [9.0, 1.0, 2.0])
    result = key_slice_scores([case])
    assert result["score"]["hit_1"] == 1.0
    assert result["chance_hit_1"] == 0.5


def test_no_positive_case_gives_nan_not_an_exception() -> None:
    result = key_slice_scores([NEGATIVE])
    assert result["positive_cases"] == 0
    assert math.isnan(result["score"]["hit_1"])
    assert math.isnan(result["score"]["instance_auc_pooled"])
    assert math.isnan(result["score"]["distance_mm_median"])
    assert math.isnan(key_slice_intervals([NEGATIVE], ["n"], resamples=10)["score"]["hit_1"][0])


def test_intervals_are_over_patients() -> None:
    cases = [HIT, NEAR, MISS, NEGATIVE]
    apart = key_slice_intervals(cases, ["a", "b", "c", "d"], resamples=400)
    assert apart["score"]["hit_1"] == [0.0, 1.0]
    assert apart["score"]["distance_mm_mean"][0] < 6 < apart["score"]["distance_mm_mean"][1]
    one = key_slice_intervals(cases, ["a", "a", "a", "d"], resamples=50)
    assert one["score"]["hit_1"] == pytest.approx([1 / 3, 1 / 3])
    assert key_slice_intervals([], []) == {}


def test_cases_one_by_one_average_to_the_scores_of_all() -> None:
    unknown = record("unknown", 1, [-1, -1], [0.0, 1.0])
    cases = [case_key_slices(one) for one in (HIT, NEAR, MISS, NEGATIVE, unknown)]
    together = key_slice_scores([HIT, NEAR, MISS, NEGATIVE, unknown])
    for by in RANKINGS[:3]:
        assert [one[by]["index"] for one in cases] == [1, 2, 1, 2, 1]
        for name, of_all in (("hit_1", "hit_1"), ("hit_3", "hit_3"), ("distance_mm", "distance_mm_mean")):
            values = [one[by][name] for one in cases]
            assert np.mean(values[:3]) == pytest.approx(together[by][of_all])
            assert all(map(math.isnan, values[3:]))
        assert np.mean([one[by]["instance_auc"] for one in cases[:3]]) == pytest.approx(together[by]["instance_auc"])


def test_occlusion_counts_where_every_record_holds_it() -> None:
    truth, falls = [0, 1, 0], [0.1, -0.5, 0.3]
    held = record("held", 1, truth, [0.0, 1.0, 0.5], occlusion=falls)
    found = key_slice_scores([held])
    assert (found["score"]["hit_1"], found["occlusion"]["hit_1"]) == (1, 0)
    assert found["occlusion"]["distance_mm_mean"] == 5
    assert found["occlusion"]["instance_auc"] == roc_auc_score(truth, falls)
    assert case_key_slices(held)["occlusion"]["index"] == 2
    assert set(key_slice_intervals([held], ["a"], resamples=10)) == set(RANKINGS)
    for cases in ([held, HIT], [HIT]):
        assert "occlusion" not in key_slice_scores(cases)
        assert "occlusion" not in key_slice_intervals(cases, ["a"] * len(cases), resamples=10)
    assert "occlusion" not in case_key_slices(HIT)
