"""How time and memory grow with slices a bag, cases a cohort and data-loading processes."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .inference_part import inference_of, weights_of
from .made_scans import write_datalist, write_nifti, write_series
from .measuring import Record, interleaved, seconds
from .memory_child import peak_of
from .project import Training, prepared_cohort
from .settings import Run
from .training_part import OURS, STOCK, Measure

__all__ = ["growth"]

logger = logging.getLogger(__name__)
VOXEL_BYTES = 4  # of a decoded volume, which readers give as float32
REPEATED = 3  # processes whose median counts
LONG = 30  # slices of the small volumes of a growing cohort


def growth(run: Run, norm: str) -> dict[str, Any]:
    """All growth measurements.

    Returns:
        `timed`: a list of {"what", "records"}, whose contenders are the sizes; `memory`: a list of {"what", "who",
        "side", "slices", "bytes"} with `before` and `peak` of the process; `memory of a cohort`: a list of {"cases",
        "workers", "bytes"}, likewise, and `worker`, the peak of the largest data-loading process.
    """
    settings = run.settings
    side = settings.series_sides[0]
    series = {n: write_series(run.work / "long" / str(n) / "000", side, n, 0) for n in settings.memory_slices}
    volume = run.work / "growth" / "long.nii.gz"
    write_nifti(volume, settings.grow_side, max(settings.grow_bags), 0)
    timed = {
        "training a bag": {f"{n} slices": _bag(run, norm, volume, n) for n in settings.grow_bags},
        "classifying a series": {f"{n} slices": _series(run, norm, folder) for n, folder in series.items()},
        "a case of a cohort": {f"{n} cases": _preparing(run, norm, n) for n in settings.grow_cases},
        "training by workers": {f"{n} workers": _workers(run, norm, n) for n in settings.grow_workers},
    }
    return {
        "timed": [{"what": what, "records": _measured(run, what, norm, them)} for what, them in timed.items()],
        "memory": [*_memory_of_inference(run, norm, series), *_memory_of_training(run, norm, volume)],
        "memory of a cohort": _memory_of_cohort(run, norm),
    }


def _measured(run: Run, what: str, norm: str, contenders: dict[str, Callable[[], Measure]]) -> list[Record]:
    name = f"growth-{norm}-{what.replace(' ', '_')}"
    return interleaved(contenders, min(3, run.repeats_at(run.settings.grow_side)), run.store, name, run.tell)


def _changes(run: Run, norm: str) -> dict[str, Any]:
    return run.settings.changes(run.settings.grow_side, norm)


def _cache(run: Run) -> Path:
    return run.store.folder / "slices"


def _bag(run: Run, norm: str, volume: Path, slices: int) -> Callable[[], Measure]:
    def prepare() -> Measure:
        training = Training(_one(volume), _cache(run), run.settings.device, **_bag_changes(run, norm, slices))
        training.epoch()
        return training.measure

    return prepare


def _bag_changes(run: Run, norm: str, slices: int) -> dict[str, Any]:
    return {**_changes(run, norm), "bag_size": slices, "batch_size": 1}


def _one(volume: Path) -> Path:
    return write_datalist(volume.parent, [volume.name])


def _series(run: Run, norm: str, folder: Path) -> Callable[[], Measure]:
    def prepare() -> Measure:
        inference = inference_of(run, run.settings.grow_side, norm, [folder])
        inference.run()
        return inference.measure

    return prepare


def _cohort(run: Run, count: int) -> Path:
    folder = run.work / "growth"
    images = [f"small_{number:03d}.nii.gz" for number in range(count)]
    for number, image in enumerate(images):
        write_nifti(folder / image, run.settings.grow_side, LONG, number)
    return write_datalist(folder, images)


def _preparing(run: Run, norm: str, count: int) -> Callable[[], Measure]:
    def prepare() -> Measure:
        datalist, cache = _cohort(run, count), run.store.folder / f"grown-{count}"

        def opened() -> tuple[Callable[[], None], float]:
            once, preparing = prepared_cohort(datalist, cache, run.settings.device, **_changes(run, norm))
            return once, (preparing + seconds(once, run.device)) / count

        def measure() -> dict[str, float]:
            shutil.rmtree(cache, ignore_errors=True)
            _, first = opened()
            once, again = opened()
            return {"seconds": first, "second start": again, "reading a bag": seconds(once, run.device) / count}

        measure()
        return measure

    return prepare


def _workers(run: Run, norm: str, workers: int) -> Callable[[], Measure]:
    def prepare() -> Measure:
        training = Training(
            _cohort(run, run.settings.grow_cases[-2]), _cache(run), run.settings.device, num_workers=workers,
            **_changes(run, norm),
        )  # fmt: skip
        training.epoch()
        return training.measure

    return prepare


def _memory_of_inference(run: Run, norm: str, series: dict[int, Path]) -> list[dict[str, Any]]:
    """Bytes above the process before its first scan and above the decoded scan."""
    settings = run.settings
    measured = [(settings.grow_side, slices, who) for slices in series for who in (OURS, STOCK)]
    # The target compares the last two; stock MONAI at large slices would take longer than all the rest.
    measured += [(side, slices, OURS) for side in settings.memory_sides for slices in list(series)[-2:]]
    small = write_series(run.work / "long" / "first" / "000", settings.series_sides[0] // 4, 8, 0)
    first, rows = write_datalist(small.parent, [str(small.absolute())]).absolute(), []
    for side, slices, who in measured:
        folder = series[slices]
        task = {
            "task": "inference", "weights": str(weights_of(run, side, norm).absolute()),
            "datalist": str(write_datalist(folder.parent, [str(folder.absolute())]).absolute()),
            "device": settings.device, "side": side, "norm": norm, "shape": settings.shape,
            "stock": who == STOCK, "first": str(first),
        }  # fmt: skip
        # What is left above the scan is little, and a process may hold some MiB more or less at its start.
        times = REPEATED if who == OURS else 1
        kept = _in_child(run, f"memory-inference-{side}-{norm}-{slices}-{who.replace(' ', '_')}", task, times)
        if kept:
            above = kept["peak"] - kept["before"] - slices * settings.series_sides[0] ** 2 * VOXEL_BYTES
            rows.append(_row("classifying a series", who, side, slices, above, kept))
    return rows


def _row(what: str, who: str, side: int, slices: int, above: float, kept: dict[str, float]) -> dict[str, Any]:
    return {"what": what, "who": who, "side": side, "slices": slices, "bytes": above, **kept}


def _memory_of_training(run: Run, norm: str, volume: Path) -> list[dict[str, Any]]:
    """Bytes above the process before its first step."""
    rows = []
    for slices in run.settings.grow_bags:
        task = {
            "task": "training", "datalist": str(_one(volume).absolute()), "cache_dir": str(_cache(run).absolute()),
            "device": run.settings.device, "changes": _bag_changes(run, norm, slices),
        }  # fmt: skip
        kept = _in_child(run, f"memory-training-{norm}-{slices}", task)
        if kept:
            above = kept["peak"] - kept["before"]
            rows.append(_row("training a bag", OURS, run.settings.grow_side, slices, above, kept))
    return rows


def _memory_of_cohort(run: Run, norm: str) -> list[dict[str, Any]]:
    """Bytes above the process before its first step, by cases and by data-loading processes."""
    most = run.settings.grow_cases[-1]
    sizes = [(cases, 0) for cases in run.settings.grow_cases]
    sizes += [(most, workers) for workers in run.settings.grow_workers if workers]
    rows = []
    for cases, workers in sizes:
        task = {
            "task": "training", "datalist": str(_cohort(run, cases).absolute()),
            "cache_dir": str(_cache(run).absolute()), "device": run.settings.device,
            "changes": {**_changes(run, norm), "num_workers": workers},
        }  # fmt: skip
        kept = _in_child(run, f"memory-cohort-{norm}-{cases}-{workers}", task)
        if kept:
            rows.append({"cases": cases, "workers": workers, "bytes": kept["peak"] - kept["before"], **kept})
    return rows


def _in_child(run: Run, name: str, task: dict[str, Any], times: int = 1) -> dict[str, float]:
    """What a process of its own measured, of several the one of median growth; nothing where one was killed."""
    kept = run.store.get(name)
    if not kept:
        run.tell(name)
        found = sorted((peak_of(task) for _ in range(times)), key=lambda one: one.get("peak", 0) - one.get("before", 0))
        kept = found[times // 2] if all(found) else {}
        # Where there was no memory today there may be some tomorrow.
        if kept:
            run.store.put(name, kept)
        else:
            logger.warning("%s: the process was killed and is not in the table", name)
    return kept
