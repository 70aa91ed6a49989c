"""Handlers of the evaluator: evidence → case records, tables, metrics and pictures."""

from __future__ import annotations

import logging
import math
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ignite.engine import Engine, Events
from monai.utils import CommonKeys as Keys
from torch import Tensor

from ..errors import InputError, Refusal
from ..evaluation.abstention import confidence, predicted_classes
from ..evaluation.metrics import evaluate_records, write_metrics
from ..model.bag_network import evidence_of_class
from ..processes import rank
from .calibration_figures import draw_reliability
from .figures import draw_key_slices
from .predictions import write_predictions
from .records import (
    Abstention,
    case_record,
    refused_record,
    remove_foreign_records,
    write_record,
)
from .run_folder import RunFolder

__all__ = ["DrawKeySlices", "WriteMetrics", "WriteRecords", "exit_status"]

logger = logging.getLogger(__name__)
EXIT_SOME_REFUSED = 3


class WriteRecords:
    """Writes `cases/<case>.json` as each case ends, and `predictions.csv` when all have.

    `records` are this run's, in the order of the cases. With a run folder they are there at the end, those of earlier
    runs and of other processes among them, and without their slices.

    Args:
        output_dir: folder of the results.
        class_names: K names.
        threshold: with two classes, the probability from which the second is predicted.
        temperature: logits are divided by it before the softmax. The network's own stay as they are, so that losses,
            exports and other tools see what was trained.
        abstain_below: cases whose `confidence` is below it end as abstained; 0: none.
        num_key_slices: key slices noted for each case.
        run_folder: shares the cases out and knows which are done; None: all are this process's and done anew.
    """

    def __init__(
        self,
        output_dir: str | Path,
        class_names: Sequence[str],
        threshold: float = 0.5,
        temperature: float = 1.0,
        abstain_below: float = 0.0,
        num_key_slices: int = 5,
        run_folder: RunFolder | None = None,
    ) -> None:
        if not 0 < threshold < 1:
            raise InputError(f"threshold is a probability between 0 and 1, not {threshold}")
        if not 0 < temperature < math.inf:
            raise InputError(f"calibration_temperature must be above 0, not {temperature}")
        if not 0 <= abstain_below <= 1:
            raise InputError(f"abstain_below is a confidence from 0 to 1, not {abstain_below}")
        if num_key_slices < 1:
            raise InputError(f"num_key_slices must be at least 1, not {num_key_slices}")
        self.output_dir, self.class_names = Path(output_dir), list(class_names)
        self.threshold, self.temperature, self.abstain_below = threshold, temperature, abstain_below
        self.num_key_slices, self.run_folder = num_key_slices, run_folder
        self.records: list[dict[str, Any]] = []
        self.latest: list[dict[str, Any]] = []  # of the last batch

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.STARTED, self._start)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self)
        engine.add_event_handler(Events.COMPLETED, self._write_table)

    def _start(self, engine: Engine) -> None:
        self.records = []
        if self.run_folder is not None:
            self.run_folder.open()
            # Now, so that it comes after all that other handlers write: who enters next removes unfinished files.
            if not engine.has_event_handler(self.run_folder.close, Events.COMPLETED):
                engine.add_event_handler(Events.COMPLETED, self.run_folder.close)

    def __call__(self, engine: Engine) -> None:
        batch: dict[str, Any] = engine.state.batch  # type: ignore[assignment]
        output: dict[str, Any] = engine.state.output  # type: ignore[assignment]
        self.latest = self._classified(batch, output) if "image" in batch else []
        for case in batch.get("refused", []):  # by rising position
            record = refused_record(case["case"], case["refusal"], case.get("label"), case.get("patient"))
            self.latest.insert(case["position"], record)
        for record in self.latest:
            if self.run_folder is not None:
                self.run_folder.finish(record)
            else:
                write_record(self.output_dir / "cases", record)
                self.records.append(record)

    def _classified(self, batch: dict[str, Any], output: dict[str, Any]) -> list[dict[str, Any]]:
        logits: Tensor = output[Keys.PRED]
        probabilities = (logits.float() / self.temperature).softmax(dim=-1).double().cpu().numpy()  # (B, K)
        # From what the records hold, so that a reader of the records comes to the same.
        predictions = predicted_classes(probabilities, self.threshold)
        confidences = confidence(probabilities, self.threshold)
        chosen = torch.from_numpy(predictions).to(logits.device)
        evidence = [values.float().cpu().numpy() for values in evidence_of_class(output["evidence"], chosen)]
        records = []
        for i, case in enumerate(batch["case"]):
            real = output["mask"][i].cpu().numpy()
            scores, weights, attention = (values[i][real] for values in evidence)
            occlusion = output["occlusion"][i].cpu().numpy()[real] if "occlusion" in output else None
            known = {"label": int(batch["label"][i]), "patient": batch["patient"][i]}
            known["label"] = None if known["label"] < 0 else known["label"]
            probability = probabilities[i]
            numbers = [probability, scores, weights, attention, *([] if occlusion is None else [occlusion])]
            if not all(np.isfinite(values).all() for values in numbers):
                sentence = "the network gave no finite number for this case: check the weights and the intensities"
                records.append(refused_record(case, Refusal("non_finite_output", sentence), **known))
                continue
            records.append(
                case_record(
                    case,
                    probabilities=probability,
                    class_names=self.class_names,
                    slice_index=batch["slice_index"][i][real].numpy(),
                    slice_position=batch["slice_position"][i][real].numpy(),
                    weights=weights,
                    attention=attention,
                    scores=scores,
                    occlusion=occlusion,
                    slice_label=batch["slice_label"][i][real].numpy(),
                    sop_instance_uids=batch["slice_uid"][i],
                    frame_numbers=batch["slice_frame"][i],
                    reading=batch["reading"][i],
                    prediction=int(predictions[i]),
                    num_key_slices=self.num_key_slices,
                    abstention=self._abstention(float(confidences[i])),
                    **known,
                )
            )
        return records

    def _abstention(self, confidence: float) -> Abstention | None:
        if confidence >= self.abstain_below:
            return None
        sentence = "No prediction: its confidence would be below the limit of these weights."
        facts = {"confidence": confidence, "abstain_below": self.abstain_below}
        return Abstention("low_confidence", sentence, facts)

    def _write_table(self) -> None:
        if self.run_folder is not None:
            self.records = self.run_folder.write_table(self.class_names)
        else:
            write_predictions(self.output_dir / "predictions.csv", self.records, self.class_names)
            remove_foreign_records(self.output_dir / "cases", [record["case"] for record in self.records])

    def whole_records(self) -> Iterable[dict[str, Any]]:
        """The records with their slices."""
        return self.records if self.run_folder is None else self.run_folder.records()

    def report(self) -> None:
        """Say on the log what was written, abstained and refused; of several processes, the first does."""
        if rank() > 0:
            return
        refused = [record for record in self.records if record["status"] == "refused"]
        abstained = sum(record["status"] == "abstained" for record in self.records)
        without = f" ({abstained} of them abstained: no prediction)" if abstained else ""
        logger.info("%d cases classified%s, %d refused", len(self.records) - len(refused), without, len(refused))
        for record in refused:
            logger.warning("refused %s: %s (%s)", record["case"], record["reason"], record["reason_code"])
        logger.info("results are in %s", self.output_dir)


class WriteMetrics:
    """Writes `metrics.json` and `reliability.png` when all cases have ended; attach it after the records.

    Args:
        results: the records.
        resamples: bootstrap resamples over patients.
        seed: of the resampling.
    """

    def __init__(self, results: WriteRecords, resamples: int = 1000, seed: int = 0) -> None:
        self.results, self.resamples, self.seed = results, resamples, seed

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.COMPLETED, self)

    def __call__(self, engine: Engine) -> None:
        results = self.results
        records = list(results.whole_records())
        metrics = evaluate_records(records, results.class_names, self.resamples, self.seed, results.threshold)
        write_metrics(results.output_dir / "metrics.json", metrics)
        bins, png = metrics["calibration"]["bins"], results.output_dir / "reliability.png"
        if bins:
            draw_reliability(png, {"": bins}, results.class_names)
        else:
            png.unlink(missing_ok=True)  # of an earlier run
        for name in ("auc", "accuracy", "f1_macro", "nll"):
            entry = metrics["scores"].get(name)
            if entry is not None:
                logger.info("%s %.3f (%.3f to %.3f)", name, entry["value"], entry["low"], entry["high"])


class DrawKeySlices:
    """Draws `key_slices.png` of the first cases that this process classified itself; attach it after the records.

    With nothing classified, or in another than the first of several processes, the picture stays as it is.

    Args:
        results: the records.
        max_cases: rows; 0 draws nothing.
        channel: shown, of the slice's own channels (not those of its neighbours).

    Raises:
        InputError: on a negative number.
    """

    def __init__(self, results: WriteRecords, max_cases: int = 8, channel: int = 0) -> None:
        if max_cases < 0 or channel < 0:
            raise InputError(f"figure_cases and channel must be 0 or more, not {max_cases} and {channel}")
        self.results, self.max_cases, self.channel = results, max_cases, channel
        self.shown: list[dict[str, Any]] = []
        self.images: dict[str, np.ndarray] = {}

    def attach(self, engine: Engine) -> None:
        if rank() == 0:
            engine.add_event_handler(Events.STARTED, self._start)
            engine.add_event_handler(Events.ITERATION_COMPLETED, self)
            engine.add_event_handler(Events.COMPLETED, self._draw)

    def _start(self) -> None:
        self.shown, self.images = [], {}

    def __call__(self, engine: Engine) -> None:
        batch: dict[str, Any] = engine.state.batch  # type: ignore[assignment]
        row = {case: i for i, case in enumerate(batch.get("case", []))}
        for record in self.results.latest:
            if record["key_slices"] and len(self.shown) < self.max_cases:
                i = row[record["case"]]
                # By position: where a volume was resampled, one stored slice may stand for several.
                position = batch["slice_position"][i].numpy()
                rows = [int(np.nanargmin(np.abs(position - key["position_mm"]))) for key in record["key_slices"]]
                first, _ = batch["own_channels"][i] if "own_channels" in batch else (0, 0)
                self.shown.append(record)
                self.images[record["case"]] = batch["image"][i, rows, first + self.channel].float().numpy()

    def _draw(self) -> None:
        if self.shown:
            png = self.results.output_dir / "key_slices.png"
            draw_key_slices(png, self.shown, self.images, max_cases=self.max_cases)


def exit_status(results: WriteRecords) -> None:
    """End the process with exit status 3 when a case of the list was refused; of several processes, the first.

    SystemExit, because a config's `finalize` has no other way to a command's exit status.
    """
    if rank() == 0 and any(record["status"] == "refused" for record in results.records):
        if results.run_folder is not None:
            results.run_folder.wait_for_others()
        sys.exit(EXIT_SOME_REFUSED)
