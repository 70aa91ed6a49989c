"""This project with its fast paths switched off against itself: the time, and where it goes, before and after."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from .inference_part import inference_of, scans_of, sources
from .made_scans import write_datalist, write_nifti
from .measuring import interleaved
from .plain import INFERENCE, READ_IN_MAIN_THREAD, TRAINING
from .profiling import shares
from .project import Training
from .settings import Run
from .training_part import OURS, Measure

__all__ = ["SWITCHED_OFF", "before_and_after"]

SWITCHED_OFF = "this project, plain"
REPEATS = 2  # the plain paths take several times as long, and no target hangs on them
# What is timed, and one call of what a profile looks at.
Contender = Callable[[], tuple[Measure, Callable[[], Any]]]


def before_and_after(run: Run, size: int, norm: str) -> list[dict[str, Any]]:
    """Training, and the classification of one scan of each kind, for one size of slices and one norm.

    Returns:
        Cells, whose `shares` are the seconds of every stage in one profiled call: {contender: {stage: seconds}}.
    """
    cells = [_cell(run, "train", size, norm, None, _trainings(run, size, norm))]
    for source in sources(run, False):
        contenders = _inferences(run, size, norm, scans_of(run, source, size))
        cells.append(_cell(run, "infer", size, norm, source, contenders))
    return cells


def _cell(
    run: Run, part: str, size: int, norm: str, source: str | None, contenders: dict[str, Contender]
) -> dict[str, Any]:
    name = "-".join(["before", part, str(size), norm, *([source.replace(" ", "_")] if source else [])])
    # Built at most once, for both the time and the profile, and not at all where both are known.
    built = {who: functools.cache(contender) for who, contender in contenders.items()}
    timed = {who: lambda who=who: built[who]()[0] for who in built}
    records = interleaved(timed, min(REPEATS, run.repeats_at(size)), run.store, name, run.tell)
    stages = {}
    for who in built:
        stages[who] = run.store.get(f"{name}-shares-{who.replace(' ', '_')}")
        if not stages[who]:
            run.tell(f"{name}: profile of {who}")
            stages[who] = shares(built[who]()[1])
            run.store.put(f"{name}-shares-{who.replace(' ', '_')}", stages[who])
    return {"part": part, "size": size, "norm": norm, "scans": source, "records": records, "shares": stages}


def _trainings(run: Run, size: int, norm: str) -> dict[str, Contender]:
    settings = run.settings
    folder = run.work / "cohort"
    images = [f"case_{number:03d}.nii.gz" for number in range(settings.bags_at(size))]
    for number, image in enumerate(images):
        write_nifti(folder / image, *settings.cohort, number)

    def contender(**changes: Any) -> tuple[Measure, Callable[[], Any]]:
        changes = {**settings.changes(size, norm), **changes}
        datalist = write_datalist(folder, images)
        training = Training(datalist, run.store.folder / "slices", settings.device, **changes)
        training.epoch()
        return training.measure, training.epoch

    return {SWITCHED_OFF: functools.partial(contender, **TRAINING), OURS: contender}


def _inferences(run: Run, size: int, norm: str, scans: Sequence[Path]) -> dict[str, Contender]:
    def plain() -> tuple[Measure, Callable[[], Any]]:
        inference = inference_of(run, size, norm, scans, **INFERENCE)
        inference.run()
        return inference.measure, inference.run

    def ours() -> tuple[Measure, Callable[[], Any]]:
        inference = inference_of(run, size, norm, scans)
        # A profile sees the main thread alone.
        seen = inference_of(run, size, norm, scans, dataloader=READ_IN_MAIN_THREAD)
        for one in (inference, seen):
            one.run()
        return inference.measure, seen.run

    return {SWITCHED_OFF: plain, OURS: ours}
