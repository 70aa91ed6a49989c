"""`scripts/predict`: a trained model and a folder of scans → a table of results, on disk and on the screen."""

from __future__ import annotations

import argparse
import csv
from collections.abc import Sequence
from pathlib import Path

from .errors import InputError, command_line
from .processes import rank

ROOT = Path(__file__).resolve().parent.parent


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the inference workflow; see `--help`.

    Returns:
        0, or 3 when a case was refused.

    Raises:
        InputError: when the folder or the model is not usable.
    """
    parser = argparse.ArgumentParser(
        prog="scripts/predict",
        description="Classify every DICOM series and NIfTI file of a folder with a trained model. Research use only; "
        "not for diagnosis. The same command again does what is new or was changed. Exit status: 0, 2 on an error, "
        "3 when a case was refused.",
    )
    parser.add_argument("folder", type=Path, help="searched with all its subfolders")
    parser.add_argument("--model", type=Path, required=True, help="model.pt of a training run")
    parser.add_argument(
        "--output", type=Path, default=Path("predictions"),
        help="folder of the results, in none that holds a case's DICOM images (%(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--case-names", choices=("pseudonym", "path"), default="pseudonym",
        help="name cases by a hash (%(default)s) or by file and folder names, which can identify people",
    )  # fmt: skip
    parser.add_argument("--device", help="cpu or cuda; by default a GPU if there is one")
    parser.add_argument(
        "--workers", type=int, default=0, help="processes that read ahead (%(default)s; with 0 a thread does)"
    )
    parser.add_argument("--batch-size", type=int, default=1, help="cases at once (%(default)s)")
    parser.add_argument("--anew", action="store_true", help="do all cases again, also those that are done")
    given = parser.parse_args(arguments)
    if given.output.exists() and not given.output.is_dir():
        raise InputError(f"--output: {given.output} is a file; give a folder")
    status = _classify(given)
    if rank() == 0:
        _print_table(given.output / "predictions.csv")
    return status


def _classify(given: argparse.Namespace) -> int:
    from monai.bundle import ConfigWorkflow

    config = next(p for p in (ROOT / "configs" / f"inference.{suffix}" for suffix in ("yaml", "json")) if p.exists())
    settings = {
        "bundle_root": str(ROOT),
        "dataset_dir": str(given.folder),
        "weights": str(given.model),
        "output_dir": str(given.output),
        "case_names": given.case_names,
        "num_workers": given.workers,
        "batch_size": given.batch_size,
        "resume": not given.anew,
    }
    if given.device is not None:
        settings["device"] = given.device
    workflow = ConfigWorkflow(config_file=str(config), workflow_type="inference", **settings)
    try:
        workflow.initialize()
        workflow.run()
        workflow.finalize()
    except SystemExit as end:  # the workflow's own way to say that cases were refused
        return int(end.code or 0)
    return 0


def _print_table(path: Path) -> None:
    """The table of results with its most asked-for columns."""
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    probabilities = [name for name in (rows[0] if rows else {}) if name.startswith("probability_")]
    shown = ["case", "status", "class_name", *probabilities, "key_slice_index", "key_slice_position_mm", "reason_code"]
    lines = [shown, *([row[name] for name in shown] for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(shown))]
    for line in lines:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
    print(f"\n{path}")


if __name__ == "__main__":
    command_line(main)
