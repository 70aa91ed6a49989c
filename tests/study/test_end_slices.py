"""End slices, on records made by hand."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from bundle.study.piece import Piece

from .end_slices import ends, main, of_cases
from .made_pieces import TRAIN, datalist, record, write_records


def test_an_end_is_the_lowest_or_the_highest_slice_in_any_order() -> None:
    # Attention of these records runs against the scores.
    assert ends(record("a", 1, [0.5, 0.5], scores=[3, 2, 2.5, 1], truth=[0] * 4)) == (1, 1, 0.5)
    assert ends(record("a", 1, [0.5, 0.5], scores=[1, 2, 3, 2], truth=[0] * 4)) == (0, 1, 0.5)
    turned = record("a", 1, [0.5, 0.5], scores=[1, 2, 3, 2], truth=[0] * 4)
    turned["slices"] = turned["slices"][::-1]
    assert ends(turned) == (0, 1, 0.5)


def test_an_order_that_tells_nothing_is_in_no_figure() -> None:
    flat = record("a", 1, [0.5, 0.5], scores=[1, 1, 1], truth=[0] * 3)
    assert math.isnan(ends(flat)[0])
    other = record("b", 1, [0.5, 0.5], scores=[1, 0, 2], truth=[0] * 3)
    refused = record("c", 1, [0.5, 0.5], status="refused")
    score, attention, chance = of_cases([flat, other, refused])
    assert (score, attention, chance) == (1, 0, pytest.approx(2 / 3))
    assert math.isnan(of_cases([flat])[0])
    assert math.isnan(of_cases([refused])[2])
    assert math.isnan(ends(record("d", 1, [0.5, 0.5], scores=[2, 2, 1], truth=[0] * 3))[0])  # two are first


def test_a_row_an_arm_and_seed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for seed, scores in ((0, [0, 2, 1]), (1, [2, 0, 1])):
        piece = Piece(
            tmp_path / "arm" / f"seed{seed}", (TRAIN,), {"datalist": str(datalist(tmp_path)), "fold": 0, "seed": seed}
        )
        write_records(piece.folder / "test", [record("a", 1, [0.5, 0.5], scores=scores, truth=[0] * 3)])
        piece.save()
        (piece.folder / "piece.json").write_text(json.dumps({}))
    main([str(tmp_path / "arm")])
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[1:]]
    assert rows == [["arm", "0", "0.00", "1.00", "0.67"], ["arm", "1", "1.00", "0.00", "0.67"]]
    with pytest.raises(SystemExit, match="holds no finished training"):
        main([str(tmp_path / "none")])
