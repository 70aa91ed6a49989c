from __future__ import annotations

import csv
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from matplotlib.image import imread

from bundle.errors import InputError, Refusal
from bundle.results.figures import draw_curves, draw_key_slices, main
from bundle.results.records import Abstention, case_record, refused_record

COLUMNS = (
    "epoch train_loss train_nll_mean train_nll_var train_nll_min train_nll_max clipped_share train_accuracy "
    "train_eval_accuracy flip_rate temperature lr val_nll val_accuracy val_auc"
)


def log_rows(epochs: int = 6) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = [dict.fromkeys(COLUMNS.split(), 0.5) for _ in range(epochs)]
    for number, row in enumerate(rows, start=1):
        row.update(epoch=number, train_nll_min=0.1, train_nll_max=2.0 + number, train_nll_var=0.04)
    rows[0]["flip_rate"] = ""
    return rows


def write_log(path: Path, rows: list[dict[str, Any]]) -> Path:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def record(case: str = "c1", n: int = 12, label: int | None = 1, **changes: Any) -> dict[str, Any]:
    scores = np.cos(np.arange(n) - 4.0)
    weights = np.exp(scores) / np.exp(scores).sum()
    arguments: dict[str, Any] = {
        "probabilities": [0.25, 0.75],
        "class_names": ["healthy", "tumour"],
        "slice_index": np.arange(n),
        "slice_position": 3.0 * np.arange(n) - 10,
        "weights": weights,
        "attention": np.full(n, 1 / n),
        "scores": scores,
        "slice_label": np.isin(np.arange(n), (3, 4, 8)).astype(int),
        "label": label,
        **changes,
    }
    return case_record(case, **arguments)


def pictures(num: int = 5, height: int = 20, width: int = 16) -> np.ndarray:
    return np.random.default_rng(0).normal(size=(num, height, width))


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures that were saved, to look into."""
    figures: list[Figure] = []
    save = Figure.savefig

    def keep(self: Figure, *arguments: Any, **settings: Any) -> None:
        figures.append(self)
        save(self, *arguments, **settings)

    monkeypatch.setattr(Figure, "savefig", keep)
    return figures


def panel(figure: Figure, title: str) -> Axes:
    return next(axes for axes in figure.axes if axes.get_title() == title)


def test_curves_show_what_was_logged(tmp_path: Path, drawn: list[Figure]) -> None:
    rows = log_rows()
    rows[2]["val_auc"] = ""
    rows[3]["val_auc"] = 0.875
    draw_curves(write_log(tmp_path / "epochs.csv", rows), tmp_path / "out" / "curves.png")
    picture = imread(tmp_path / "out" / "curves.png")
    assert picture.shape[0] >= 800
    assert picture.shape[1] >= 1500
    assert picture[..., :3].std() > 0.05  # not blank
    (figure,) = drawn
    assert len(figure.axes) == 6
    for axes in figure.axes:
        assert axes.get_xlabel() == "epoch"
        assert axes.get_ylabel()
        assert axes.lines
    assert len(panel(figure, "Loss").lines) == len(panel(figure, "Accuracy").lines) == 3
    (auc,) = panel(figure, "Validation AUC").lines
    assert list(auc.get_xdata()) == [1, 2, 4, 5, 6]
    assert list(auc.get_ydata()) == [0.5, 0.5, 0.875, 0.5, 0.5]
    outer, inner = panel(figure, "Spread of the training-batch NLL").collections
    assert outer.get_datalim(figure.axes[4].transData).intervaly == pytest.approx([0.1, 8.0])
    # One standard deviation, the root of the variance: 0.5 ± 0.2.
    assert inner.get_datalim(figure.axes[4].transData).intervaly == pytest.approx([0.3, 0.7])


@pytest.mark.parametrize("columns", [["epoch"], ["epoch", "train_loss"], ["epoch", "train_nll_mean", "val_auc"]])
def test_missing_columns_leave_a_note(tmp_path: Path, drawn: list[Figure], columns: list[str]) -> None:
    rows = [{name: row[name] for name in columns} for row in log_rows(1)]
    draw_curves(write_log(tmp_path / "epochs.csv", rows), tmp_path / "curves.png")
    empty = [axes for axes in drawn[0].axes if not axes.lines]
    assert empty
    for axes in empty:
        assert [text.get_text() for text in axes.texts] == ["not measured"]


def test_columns_that_are_not_drawn_may_hold_words(tmp_path: Path) -> None:
    rows = [{**row, "note": "best so far"} for row in log_rows()]
    draw_curves(write_log(tmp_path / "epochs.csv", rows), tmp_path / "curves.png")
    assert (tmp_path / "curves.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, "cannot be read"),
        ("", "no training log"),
        ("epoch,val_auc\n", "no training log"),
        ("step,val_auc\n1,0.5\n", "no training log"),
        ("epoch,val_auc\n1,high\n", "'val_auc' holds a cell that is no number"),
        ("epoch,val_auc\n,0.5\n", "an epoch number is missing"),
    ],
)
def test_a_bad_log_is_told_and_nothing_is_written(tmp_path: Path, text: str | None, words: str) -> None:
    if text is not None:
        (tmp_path / "epochs.csv").write_text(text)
    with pytest.raises(InputError, match=words):
        draw_curves(tmp_path / "epochs.csv", tmp_path / "curves.png")
    assert not list(tmp_path.glob("*.png")) + list(tmp_path.glob(".*"))


def test_key_slices_show_pictures_weights_and_truth(tmp_path: Path, drawn: list[Figure]) -> None:
    case, stack = record(), pictures()
    draw_key_slices(tmp_path / "key_slices.png", [case], {"c1": stack})
    picture = imread(tmp_path / "key_slices.png")
    assert picture.shape[1] >= 1400
    assert picture[..., :3].std() > 0.05
    (figure,) = drawn
    shown = [axes for axes in figure.axes if axes.images]
    assert len(shown) == 4
    for place, axes in enumerate(shown):
        key = case["key_slices"][place]
        assert np.array_equal(axes.images[0].get_array(), stack[place])
        assert f"weight {key['weight']:.3f}" in axes.get_title()
        assert f"{key['position_mm']:.1f} mm" in axes.get_title()
    assert ["no lesion" in axes.get_title() for axes in shown] == [k["label"] == 0 for k in case["key_slices"][:4]]
    (curve,) = [axes for axes in figure.axes if not axes.images]
    assert curve.get_xlabel() == "slice position (mm)"
    weights = [s["weight"] for s in case["slices"]]
    assert any(np.array_equal(line.get_ydata(), weights) for line in curve.lines)
    dots = [
        (float(line.get_xdata()[0]), float(line.get_ydata()[0])) for line in curve.lines if len(line.get_xdata()) == 1
    ]
    assert dots == [(key["position_mm"], key["weight"]) for key in case["key_slices"][:4]]
    # Slices 3 and 4 lie at -1 and 2 mm, slice 8 at 14 mm; each is 3 mm wide.
    assert [(p.get_x(), p.get_x() + p.get_width()) for p in curve.patches] == [(-2.5, 3.5), (12.5, 15.5)]
    texts = [text.get_text() for part in (figure, *_parts(figure)) for text in part.texts]
    assert "Research use only; not for diagnosis" in texts
    titles = [part.get_suptitle() for part in _parts(figure) if part.get_suptitle()]
    assert titles == ["c1    truth: tumour, predicted: tumour (probability 0.750)"]


def _parts(figure: Any) -> list[Any]:
    return [part for sub in figure.subfigs for part in (sub, *_parts(sub))]


def test_cases_are_those_with_pictures_in_order_up_to_the_limit(tmp_path: Path, drawn: list[Figure]) -> None:
    records = [record(name) for name in "abcd"] + [refused_record("e", Refusal("empty", "Empty."))]
    images = {name: pictures() for name in "dbae"}
    draw_key_slices(tmp_path / "k.png", records, images, max_cases=2)
    titles = [part.get_suptitle()[0] for part in _parts(drawn[0]) if part.get_suptitle()]
    assert titles == ["a", "b"]


def test_unknown_truth_is_not_shaded(tmp_path: Path, drawn: list[Figure]) -> None:
    draw_key_slices(tmp_path / "k.png", [record(label=None, slice_label=None)], {"c1": pictures()})
    (curve,) = [axes for axes in drawn[0].axes if not axes.images]
    assert not curve.patches
    assert not any("lesion" in axes.get_title() for axes in drawn[0].axes)
    assert not any("truth" in part.get_suptitle() for part in _parts(drawn[0]) if part.get_suptitle())


@pytest.mark.parametrize("case", ["price $1_x$ {", "x" * 200, "病例 1", "a\nb"])
def test_any_case_name_can_be_drawn(tmp_path: Path, case: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        draw_key_slices(tmp_path / "k.png", [record(case)], {case: pictures()})


@pytest.mark.parametrize(
    ("n", "stack"),
    [(1, np.zeros((1, 4, 4))), (2, pictures(2)), (12, np.full((5, 4, 4), np.nan)), (12, pictures(4))],
    ids=["one constant slice", "two slices", "NaN", "only the four shown"],
)
def test_unusual_cases_are_drawn(tmp_path: Path, n: int, stack: np.ndarray) -> None:
    draw_key_slices(tmp_path / "k.png", [record(n=n, slice_label=np.ones(n))], {"c1": stack})
    assert (tmp_path / "k.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("images", "words"),
    [
        ({}, "no case to draw"),
        ({"other": pictures()}, "'other', which has no record"),
        ({"c1": pictures()[0]}, r"must have shape \(slices, rows, columns\)"),
        ({"c1": pictures(3)}, "3 pictures were given for 5 key slices"),
        ({"c1": pictures(12)}, "12 pictures were given for 5 key slices"),
    ],
)
def test_pictures_that_do_not_fit_are_told(tmp_path: Path, images: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        draw_key_slices(tmp_path / "k.png", [record()], images)
    assert not list(tmp_path.iterdir())


def test_a_failed_save_leaves_the_old_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "k.png").write_bytes(b"old")

    def fail(self: Figure, path: Path, **_: Any) -> None:
        path.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(Figure, "savefig", fail)
    with pytest.raises(OSError, match="disk full"):
        draw_key_slices(tmp_path / "k.png", [record()], {"c1": pictures()})
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [("k.png", b"old")]


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_log(tmp_path / "epochs.csv", log_rows())
    main([str(tmp_path)])
    assert capsys.readouterr().out.strip() == str(tmp_path / "curves.png")
    assert (tmp_path / "curves.png").stat().st_size > 10_000


def test_command_line_tells_what_is_wrong_in_one_sentence(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "bundle.results.figures", str(tmp_path)]
    root = Path(__file__).parents[2]
    result = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert "error: epochs.csv cannot be read" in result.stderr
    assert "Traceback" not in result.stderr


def test_an_abstained_case_is_drawn_without_a_prediction(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    titles: list[str] = []
    monkeypatch.setattr(SubFigure, "suptitle", lambda self, text, **_: titles.append(text))
    unsure = record("unsure", abstention=Abstention("low_confidence", "Not sure.", {}))
    draw_key_slices(tmp_path / "k.png", [unsure, record("sure")], {"unsure": pictures(), "sure": pictures()})
    assert titles == [
        "unsure    truth: tumour, no prediction (probability of tumour 0.750)",
        "sure    truth: tumour, predicted: tumour (probability 0.750)",
    ]
