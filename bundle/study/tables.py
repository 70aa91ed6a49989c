"""A study as tables for people, in Markdown."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from ..evaluation.key_slices import RANKINGS
from ..evaluation.scores import score
from .arm_results import ArmResult, mean_of, mean_steadiness, of_pieces, variance_ratio
from .comparison import Figure, difference, figure

__all__ = ["study_text"]

Row = dict[str, str]
STEADINESS_HEADS = {
    "val_accuracy_sd": "validation accuracy, sd",
    "val_sampling_error": "by sampling alone",
    "val_accuracy_range": "its range",
    "train_minus_validation": "training − validation",
    "train_minus_eval_mode": "train − eval mode",
    "flip_rate": "flips",
    "attention_drift": "drift",
    "clipped_share": "clipped",
}


def study_text(arms: Sequence[ArmResult], reference: str, left_out: Sequence[str] = (), locked: bool = False) -> str:
    """The tables in Markdown; a column in which no arm has anything is left out.

    Args:
        arms: in the order of the rows.
        reference: name of the one that differences and ratios are against.
        left_out: names of arms of which no seed has all its folds done.
        locked: whether every training judged all cases, instead of each the test cases of its fold.
    """
    against = next(one for one in arms if one.name == reference)
    first = next(iter(against.by_seed.values())).raw
    always = np.full(len(first.labels), np.bincount(first.labels).argmax())
    majority = [score(name, first.labels, first.probabilities, always) for name in ("accuracy", "f1_macro")]
    which, judged = (
        ("locked", "every training, none of which saw") if locked else ("test", "trainings that did not see")
    )
    told = [
        f"{len(first.cases)} {which} cases of {len(set(first.patients))} patients, each judged by {judged} its patient."
        f" Always the most frequent class: accuracy {majority[0]:.3f}, macro F1 {majority[1]:.3f}."
    ]
    if first.refused:
        shown = ", ".join(first.refused[:5]) + (", …" if len(first.refused) > 5 else "")
        told.append(f"The reader refused {len(first.refused)} more ({shown}): they are in no figure.")
    told.append(
        f"Scores are {'averaged over trainings' if locked else 'pooled over folds and averaged over seeds'}, with 95% "
        "bootstrap intervals over patients"
        + (f"; differences are against `{reference}`, paired." if len(arms) > 1 else ".")
    )
    if left_out:
        told.append(f"Left out, as no seed has all its folds done: {', '.join(left_out)}.")
    tables = [_scores(arms, against, locked), _evidence(arms, locked)]
    tables += [_calibration(arms)] if locked else [_steadiness(arms, against), _calibration(arms)]
    return "\n\n".join(["\n".join(told), *(_table(rows) for rows in tables if len(rows[0]) > 1)]) + "\n"


def _scores(arms: Sequence[ArmResult], against: ArmResult, locked: bool) -> list[Row]:
    several = "trainings" if locked else "seeds"
    return [
        {
            "arm": arm.name,
            several: str(len(arm.by_seed)),
            "AUC": _told(figure(arm.compared, "auc")),
            "AUC, difference": _signed(arm, against, "auc"),
            "macro F1": _told(figure(arm.compared, "f1_macro")),
            "macro F1, difference": _signed(arm, against, "f1_macro"),
            "accuracy": _told(figure(arm.compared, "accuracy")),
            # On the locked cases that of a piece is what is averaged.
            "AUC of a piece, mean ± sd": "" if locked else _mean_and_sd(of_pieces(arm, "scores", "test", "auc")),
            f"AUC of all {several} together": _told(figure(arm.compared, "ensemble_auc")),
        }
        for arm in arms
    ]


def _evidence(arms: Sequence[ArmResult], locked: bool) -> list[Row]:
    rows, several = [], "trainings" if locked else "seeds"
    for arm in arms:
        hits = {f"by {by}": _told(figure(arm.compared, f"hit_1_{by}")) for by in RANKINGS}
        if any(hits.values()):
            rows.append(
                {
                    "first slice is a true one": arm.name,
                    **hits,
                    "in the first three": _told(figure(arm.compared, "hit_3_score")),
                    "mm from a true one": _told(figure(arm.compared, "distance_mm_score"), 1),
                    "slice AUC by score": _told(figure(arm.compared, "slice_auc_score")),
                    f"{several} agree (score)": _told(figure(arm.compared, "agree_score")),
                }
            )
    # The pieces know the chance on their own test cases.
    chance = of_pieces(arms[0], "key_slices", "chance_hit_1") if rows and not locked else []
    if chance:
        rows.append({**dict.fromkeys(rows[0], ""), "first slice is a true one": "chance"})
        rows[-1] |= {f"by {by}": _number(float(np.mean(chance))) for by in RANKINGS}
    return rows or [{}]


def _steadiness(arms: Sequence[ArmResult], against: ArmResult) -> list[Row]:
    rows = []
    for arm in arms:
        ratio = variance_ratio(against, arm)
        known = arm.name != against.name and math.isfinite(ratio.value)
        rows.append(
            {
                "last third of the epochs": arm.name,
                "batch NLL": _number(mean_steadiness(arm, "nll_mean")),
                "its variance": _number(mean_steadiness(arm, "nll_variance"), 4),
                "times steadier": f"{ratio.value:.1f} ({ratio.low:.1f}–{ratio.high:.1f})" if known else "",
                **{head: _number(mean_steadiness(arm, name)) for name, head in STEADINESS_HEADS.items()},
                "sd of test probabilities": _number(mean_of(of_pieces(arm, "probability_sd"))),
            }
        )
    return rows


def _calibration(arms: Sequence[ArmResult]) -> list[Row]:
    rows = []
    for arm in arms:
        fitted = [value for one in arm.by_seed.values() for value in one.temperatures]
        two = next(iter(arm.by_seed.values())).raw.probabilities.shape[1] == 2
        rows.append(
            {
                "calibration": arm.name,
                **{
                    head + after: _told(figure(arm.compared, prefix + name))
                    for name, head in (("nll", "NLL"), ("brier", "Brier"), ("ece", "ECE"))
                    for prefix, after in (("", ""), ("calibrated_", " after"))
                },
                "temperatures": f"{min(fitted):.2f}–{max(fitted):.2f}",
                # Of the rule for two classes.
                "sensitivity at the point": _told(figure(arm.compared, "point_sensitivity")) if two else "",
                "specificity there": _told(figure(arm.compared, "point_specificity")) if two else "",
                "errors of all": _number(1 - figure(arm.compared, "accuracy").value),
                "of the surest 80%": _told(figure(arm.compared, "risk_80")),
                "of the surest, mean over all shares": _told(figure(arm.compared, "aurc")),
            }
        )
    return rows


def _mean_and_sd(values: Sequence[float]) -> str:
    return f"{np.mean(values):.3f} ± {np.std(values, ddof=1):.3f}" if len(values) > 1 else ""


def _signed(arm: ArmResult, against: ArmResult, name: str) -> str:
    if arm.name == against.name:
        return ""
    found = difference(arm.compared, against.compared, name)
    return f"{found.value:+.3f} ({found.low:+.3f} to {found.high:+.3f})" if math.isfinite(found.value) else ""


def _told(found: Figure, digits: int = 3) -> str:
    value, low, high = (f"{number:.{digits}f}" for number in found)
    return f"{value} ({low}–{high})" if math.isfinite(found.value) else ""


def _number(value: float, digits: int = 3) -> str:
    return f"{value:.{digits}f}" if math.isfinite(value) else ""


def _table(rows: Sequence[Row]) -> str:
    columns = [name for name in rows[0] if any(row[name] for row in rows)]
    lines = [columns, ["---"] * len(columns), *([row[name] for name in columns] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
