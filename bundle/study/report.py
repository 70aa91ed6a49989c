"""The report of a study: tables and figures in one folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..files import replacing
from .arm_results import ArmResult
from .calibration_panels import draw_reliability, draw_risk_coverage
from .csv_tables import write_arms, write_pieces, write_predictions
from .figures import draw_arms, draw_selection, draw_traces, draw_validation
from .tables import study_text

__all__ = ["report"]


def report(
    results: Sequence[ArmResult], reference: str, folder: Path, left_out: Sequence[str] = (), locked: bool = False
) -> None:
    """Write the tables and figures of arms, and print the tables.

    Args:
        results: of arms that are whole, in the order of the rows.
        reference: name of the arm that differences are against; the first where it is not among them.
        folder: gets the tables report.md, arms.csv, pieces.csv, predictions.csv and the figures arms.png, traces.png,
            validation.png, selection.png, reliability.png and risk_coverage.png.
        left_out: names of arms that are not whole.
        locked: whether these are results on the locked cases, which have no figures of the trainings of their own.
    """
    against = reference if reference in [one.name for one in results] else results[0].name
    folder.mkdir(parents=True, exist_ok=True)
    text = study_text(results, against, left_out, locked)
    with replacing(folder / "report.md") as temporary:
        temporary.write_text(text, encoding="utf-8")
    write_arms(results, against, folder / "arms.csv")
    write_predictions(results, folder / "predictions.csv")
    draw_arms(results, against, folder / "arms.png")
    draw_reliability(results, folder / "reliability.png")
    draw_risk_coverage(results, folder / "risk_coverage.png")
    if not locked:
        write_pieces(results, folder / "pieces.csv")
        draw_traces(results, folder / "traces.png")
        draw_validation(results, folder / "validation.png")
        draw_selection(results, folder / "selection.png")
    print(f"\n{text}\n{folder}")
