"""The tables of docs/results.md, from docs/results/*.csv, which `scripts/stability_study` wrote.

python -m tests.study.results_tables, from the repository root, writes every table anew that stands under a line such as
<!-- table: side_confirm scores --> or <!-- table: side_screen short before after -->: file, kind, and arms (all). Three
kinds (folds, seeds, means) are of *_pieces.csv, the single trainings, the others of *_arms.csv.
"""

from __future__ import annotations

import csv
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean

from bundle.files import replacing

__all__ = ["MARKED", "filled"]

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "results.md"
MARKED = re.compile(r"(<!-- table: (\w+) (\w+)((?: \w+)*) -->\n\n)((?:\|.*\n)*)")

Row = Mapping[str, str]
Column = Callable[[Row], str]


def number(text: str, digits: int = 3) -> str:
    """Without the zero before the point, as the page writes scores; empty where there is none."""
    return re.sub(r"^(-?)0\.", r"\1.", f"{float(text):.{digits}f}").replace("-", "−") if text else ""


def plain(name: str, digits: int = 3) -> Column:
    return lambda row: number(row.get(name, ""), digits)


def interval(name: str, digits: int = 3) -> Column:
    def told(row: Row) -> str:
        value, low, high = (number(row.get(name + end, ""), digits) for end in ("", "_low", "_high"))
        return f"{value} ({low}–{high})" if value else ""

    return told


def signed(name: str) -> Column:
    def one(text: str) -> str:
        return ("" if text.startswith("-") else "+") + number(text)

    def told(row: Row) -> str:
        if not row.get(name) or (not float(row[f"{name}_low"]) and not float(row[f"{name}_high"])):
            return ""  # the arm itself
        return f"{one(row[name])} ({one(row[f'{name}_low'])} to {one(row[f'{name}_high'])})"

    return told


def times(row: Row) -> str:
    value, low, high = (row.get(f"times_steadier{end}", "") for end in ("", "_low", "_high"))
    if not value or float(low) == float(high) == 1:
        return ""  # the arm itself
    return f"{float(value):.1f} ({float(low):.1f}–{float(high):.1f})"


def validation_sd(row: Row) -> str:
    return f"{number(row['val_accuracy_sd'])} ({number(row['val_sampling_error'])})"


HITS: dict[str, Column] = {
    "hit@1 by score": interval("hit_1_score"),
    "by attention": plain("hit_1_attention"),
    "by occlusion": plain("hit_1_occlusion"),
}
KINDS: dict[str, dict[str, Column]] = {
    "scores": {
        "seeds": lambda row: row["seeds"],
        "AUC": interval("auc"),
        "AUC against {reference}, paired": signed("auc_difference"),
        "macro F1": plain("f1_macro"),
        **HITS,
    },
    "rivals": {
        "AUC": interval("auc"),
        "AUC against {reference}, paired": signed("auc_difference"),
        "macro F1": plain("f1_macro"),
        "hit@1 by score": interval("hit_1_score"),
        "hit@1 against {reference}": signed("hit_1_score_difference"),
        "slice AUC against {reference}": signed("slice_auc_score_difference"),
        "NLL": plain("nll"),
        "variance of the batch NLL": plain("nll_variance"),
    },
    "steadiness": {
        "batch NLL": plain("nll_mean"),
        "its variance": plain("nll_variance"),
        "times steadier than {reference}": times,
        "training accuracy": plain("train_accuracy"),
        "validation accuracy, sd (by sampling alone)": validation_sd,
        "its range": plain("val_accuracy_range"),
        "training − validation": plain("train_minus_validation"),
        "train − eval mode": plain("train_minus_eval_mode"),
        "flips": plain("flip_rate", 2),
        "drift of attention": plain("attention_drift", 2),
        "clipped": plain("clipped_share", 2),
        "sd of test probabilities": plain("probability_sd", 2),
    },
    "slices": {
        **{f"hit@1 by {by}": plain(f"hit_1_{by}") for by in ("score", "weight", "attention", "occlusion")},
        "hit@3 by score": interval("hit_3_score"),
        "mm from a true slice, by score": interval("distance_mm_score", 1),
        **{f"slice AUC by {by}": plain(f"slice_auc_{by}") for by in ("score", "attention")},
        "two seeds agree, by score": interval("agree_score", 2),
        "by attention": plain("agree_attention", 2),
    },
    "calibration": {
        "NLL": interval("nll"),
        "after": plain("calibrated_nll"),
        "Brier": plain("brier"),
        "after ": plain("calibrated_brier"),
        "ECE": interval("ece"),
        "after  ": plain("calibrated_ece"),
        "temperatures": lambda row: f"{number(row['temperature_low'], 2)}–{number(row['temperature_high'], 2)}",
        "sensitivity at the point": interval("point_sensitivity"),
        "specificity there": interval("point_specificity"),
    },
    "abstention": {
        "accuracy of all": plain("accuracy"),
        "errors of the surest 80%": interval("risk_80"),
        "of the surest, mean over all shares": interval("aurc"),
        "against {reference}, paired": signed("aurc_difference"),
    },
    "short": {
        "AUC": interval("auc"),
        "macro F1": plain("f1_macro"),
        "hit@1 by score": plain("hit_1_score"),
        "by attention": plain("hit_1_attention"),
        "batch NLL": plain("nll_mean"),
        "its variance": plain("nll_variance"),
        "times steadier than {reference}": times,
        "validation accuracy, sd": plain("val_accuracy_sd"),
        "sd of test probabilities": plain("probability_sd", 2),
        "flips": plain("flip_rate", 2),
        "clipped": plain("clipped_share", 2),
    },
    "accuracy": {
        "seeds": lambda row: row["seeds"],
        "AUC": interval("auc"),
        "against {reference}, paired": signed("auc_difference"),
        "accuracy": interval("accuracy"),
        "macro F1": plain("f1_macro"),
        "batch NLL": plain("nll_mean"),
        "its variance": plain("nll_variance"),
        "calibrated NLL": plain("calibrated_nll"),
    },
    "locked": {
        "AUC, mean of the trainings": interval("auc"),
        "against {reference}, paired": signed("auc_difference"),
        "AUC of all together": interval("ensemble_auc"),
        "macro F1": plain("f1_macro"),
        **HITS,
        "calibrated NLL": plain("calibrated_nll"),
    },
}

SINGLE = {  # of one training
    "AUC": ("test_auc", 3),
    "NLL of the test cases": ("test_nll", 3),
    "first slice right, by score": ("hit_1_score", 2),
    "batch NLL": ("nll_mean", 3),
    "its variance": ("nll_variance", 3),
}
OF_SEEDS = {
    "first slice right, by score": ("hit_1_score", 2),
    "by attention": ("hit_1_attention", 2),
    "AUC": ("test_auc", 3),
    "variance of the batch NLL": ("nll_variance", 3),
}
# Over the trainings of an arm, each judged by itself; the first arm is what the others are compared with.
MEANS: dict[str, Column] = {
    "trainings": lambda row: row["trainings"],
    **{head: plain(f"test_{name}") for head, name in (("AUC", "auc"), ("macro F1", "f1_macro"), ("NLL", "nll"))},
    **{f"hit@1 by {by}": plain(f"hit_1_{by}") for by in ("score", "attention", "occlusion")},
    **KINDS["steadiness"],
}


def by_fold(rows: Sequence[Row], arms: Sequence[str]) -> str:
    """Markdown: a line a score and arm, a column a fold; for arms with one seed."""
    folds = sorted({row["fold"] for row in rows}, key=int)
    lines = [["", "arm", *(f"fold {fold}" for fold in folds), "mean"], ["---"] * (len(folds) + 3)]
    for head, (name, digits) in SINGLE.items():
        for arm, of_arm in _by_arm(rows, arms).items():
            values = {row["fold"]: row[name] for row in of_arm}
            if len(values) < len(of_arm):
                raise ValueError(f"{arm} has a fold more than once: a table by fold is of one seed")
            whole = all(values.get(fold) for fold in folds)  # a mean over the others would be of other cases
            mean = str(fmean(map(float, values.values()))) if whole else ""
            shown = [number(text, digits) for text in (*(values.get(fold, "") for fold in folds), mean)]
            lines.append([head, f"`{arm}`", *shown])
    return _markdown(lines)


def by_seed(rows: Sequence[Row], arms: Sequence[str]) -> str:
    """Markdown: a line a score and arm, a column a seed with the mean over its folds; empty where one is missing."""
    folds, seeds = {row["fold"] for row in rows}, sorted({row["seed"] for row in rows}, key=int)
    lines = [["mean of the folds", "arm", *(f"seed {seed}" for seed in seeds)], ["---"] * (len(seeds) + 2)]
    for head, (name, digits) in OF_SEEDS.items():
        for arm, of_arm in _by_arm(rows, arms).items():
            values = {seed: {row["fold"]: row[name] for row in of_arm if row["seed"] == seed} for seed in seeds}
            whole = {seed: found for seed, found in values.items() if found.keys() == folds and all(found.values())}
            shown = {seed: number(str(fmean(map(float, found.values()))), digits) for seed, found in whole.items()}
            lines.append([head, f"`{arm}`", *(shown.get(seed, "") for seed in seeds)])
    return _markdown(lines)


def means(rows: Sequence[Row], arms: Sequence[str]) -> str:
    """Markdown: a line an arm, with the mean over its trainings."""
    by_arm = _by_arm(rows, arms)
    first = next(iter(by_arm))
    shown = []
    for arm, of_arm in by_arm.items():
        row = {"arm": arm, "trainings": str(len(of_arm))}
        for name in of_arm[0]:
            if name != "arm" and all(one[name] for one in of_arm):
                row[name] = str(fmean(float(one[name]) for one in of_arm))
        row |= _times_steadier(by_arm[first], of_arm)
        shown.append(row)
    return _columns(shown, MEANS, first)


def _by_arm(rows: Sequence[Row], arms: Sequence[str]) -> dict[str, list[Row]]:
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(row["arm"], []).append(row)
    return {arm: found[arm] for arm in arms or found}


def _times_steadier(reference: Sequence[Row], other: Sequence[Row]) -> dict[str, str]:
    """As `bundle.study.arm_results.variance_ratio`."""
    before, after = (
        {(one["fold"], one["seed"]): float(one["nll_variance"]) for one in of} for of in (reference, other)
    )
    both = [place for place in before if place in after]
    ratios = [before[place] / after[place] for place in both]
    found = fmean(before[place] for place in both) / fmean(after[place] for place in both), min(ratios), max(ratios)
    return {f"times_steadier{end}": str(value) for end, value in zip(("", "_low", "_high"), found, strict=True)}


def table(rows: Sequence[Row], kind: str, arms: Sequence[str]) -> str:
    """Markdown; columns of which no row has anything are left out."""
    by_arm = {row["arm"]: row for row in rows}
    itself = [row["arm"] for row in rows if float(row["auc_difference_low"]) == float(row["auc_difference_high"]) == 0]
    shown = [by_arm[name] for name in arms or by_arm]
    return _columns(shown, KINDS[kind], itself[0])


def _columns(shown: Sequence[Row], columns: Mapping[str, Column], reference: str) -> str:
    cells = {head.format(reference=f"`{reference}`"): [told(row) for row in shown] for head, told in columns.items()}
    cells = {"arm": [f"`{row['arm']}`" for row in shown], **{head: c for head, c in cells.items() if any(c)}}
    return _markdown([list(cells), ["---"] * len(cells), *map(list, zip(*cells.values(), strict=True))])


def _markdown(lines: Sequence[Sequence[str]]) -> str:
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


OF_PIECES = {"folds": by_fold, "seeds": by_seed, "means": means}


def filled(page: str, folder: Path) -> str:
    """The page with its marked tables made anew from the files of the folder."""

    def one(match: re.Match[str]) -> str:
        name, kind, arms = match[2], match[3], match[4].split()
        source = "pieces" if kind in OF_PIECES else "arms"
        with (folder / f"{name}_{source}.csv").open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        made = OF_PIECES[kind](rows, arms) if kind in OF_PIECES else table(rows, kind, arms)
        return match[1] + made + ("" if match[5] else "\n")  # what followed a line without a table begins anew

    return MARKED.sub(one, page)


if __name__ == "__main__":
    page = PAGE.read_text(encoding="utf-8")
    with replacing(PAGE) as part:
        part.write_text(filled(page, PAGE.with_suffix("")), encoding="utf-8")
    sys.stdout.write(f"{len(MARKED.findall(page))} tables of {PAGE.relative_to(ROOT)} written\n")
