"""The count of trainings that lose the slice, and its table in docs/results.md."""

from __future__ import annotations

from pathlib import Path

import pytest

from .lost_slices import ATTENTION, MEAN, ROOT, by_order, order, table

HEAD = "arm,seed,fold,hit_1_score\n"


@pytest.mark.parametrize(
    ("network", "scorer", "weight", "named"),
    [
        ("bundle.DualStreamMIL", "tied", 1.0, "scorer tied, taught"),
        ("bundle.DualStreamMIL", "separate", 0.0, "scorer separate, not taught"),
        ("bundle.GatedAttentionMIL", "tied", 0.0, ATTENTION),  # the scorer of train.yaml is of no use there
        ("bundle.MonaiMIL", "tied", 0.0, ATTENTION),
        ("bundle.MeanPoolMIL", "tied", 0.0, MEAN),
        ("bundle.VolumeNet", "tied", 0.0, None),
    ],
)
def test_what_orders_the_slices_is_read_from_the_settings(
    network: str, scorer: str, weight: float, named: str | None
) -> None:
    assert order({"network_def": {"_target_": network}, "scorer": scorer, "instance_weight": weight}) == named


def test_a_training_counts_once_and_is_lost_at_the_chance_of_its_set(tmp_path: Path) -> None:
    (tmp_path / "side_screen_pieces.csv").write_text(HEAD + "a,0,0,.379\na,0,1,.38\nb,0,0,0\nc,0,0,\n")
    (tmp_path / "side_confirm_pieces.csv").write_text(HEAD + "a,0,0,.379\na,1,0,.2\n")  # the first of a again
    (tmp_path / "needle1_pieces.csv").write_text(HEAD + "a,0,0,.06\n")  # another set, above its chance
    found = by_order(sorted(tmp_path.iterdir()), {"a": "tied", "b": None, "c": "tied"})
    assert found == {"tied": (4, 2)}


def test_the_page_holds_the_table() -> None:
    assert table() in (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
