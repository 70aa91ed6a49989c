"""Scan → probability, end to end: this project, stock MONAI and the limit; latency, throughput and agreement."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from monai.transforms import Compose
from torch import Tensor

from bundle.data.series import read_volume
from bundle.errors import InputError, Refusal
from bundle.weights import read_checkpoint

from .limit import decode, fastest, inference_forms, may_compile
from .made_scans import write_datalist, write_nifti, write_series
from .measuring import digest_of_files, interleaved, seconds
from .plain import READ_IN_MAIN_THREAD
from .profiling import profiled
from .project import Inference, network_of, save_weights
from .rivals import PlainNetwork, StockInference, stock_encoder, stock_transforms
from .settings import Run
from .training_part import COMPILED, LIMIT, OURS, STOCK, TYPED, Measure

__all__ = [
    "agreement",
    "inference_cell",
    "inference_of",
    "plain_network",
    "profile_inference",
    "readable",
    "scans_of",
    "sources",
    "weights_of",
]

logger = logging.getLogger(__name__)


def sources(run: Run, many: bool) -> list[str]:
    """Names of the kinds of made scans: one study each and, for throughput, many of the first."""
    series = [f"DICOM {side}" for side in run.settings.series_sides]
    return [*series, "NIfTI", *([f"{run.settings.studies} × {series[0]}"] if many else [])]


def scans_of(run: Run, source: str, size: int) -> list[Path]:
    """Write the scans of a source where they are not there yet."""
    count, _, kind = source.rpartition(" × ")
    number = run.settings.fewer(int(count), size) if count else 1
    folder = run.work / f"{number} {kind}"
    if kind == "NIfTI":
        path = folder / "scan.nii.gz"
        write_nifti(path, run.settings.series_sides[0], run.settings.study_slices, 0)
        return [path]
    side, slices = int(kind.partition(" ")[2]), run.settings.study_slices
    return [write_series(folder / f"{k:03d}", side, slices, k) for k in range(number)]


def readable(folder: Path, run: Run) -> list[Path]:
    """Scans directly in a folder that both this project and stock MONAI can read.

    Raises:
        InputError: when there is none.
    """
    stock = Compose(stock_transforms(run.settings.grow_side))
    found = []
    paths = sorted(p for p in folder.iterdir() if p.is_dir() or p.name.endswith((".nii", ".nii.gz")))
    for number, path in enumerate(paths, start=1):
        try:
            read_volume(path)
            if stock({"image": str(path)})["image"].shape[0] == 1:
                found.append(path)
        except Refusal as refusal:
            logger.warning("scan %d of %d is left out: this project refuses it (%s)", number, len(paths), refusal.code)
        except Exception as error:
            logger.warning(
                "scan %d of %d is left out: stock MONAI fails (%s)", number, len(paths), type(error).__name__
            )
    if not found:
        raise InputError(f"--scans: no scan directly in {folder} can be read both by this project and by stock MONAI")
    return found


def inference_cell(run: Run, size: int, norm: str, source: str, scans: Sequence[Path]) -> dict[str, Any]:
    """Seconds a scan of every contender, for one size of slices, one norm and some scans."""
    settings, kind = run.settings, f"{source.replace(' ', '_')}-{digest_of_files(scans)}"
    name = f"infer-{size}-{norm}-{kind}"
    # The form is that of the encoder alone, whatever the scans.
    form_name = f"infer-{size}-{norm}-limit"

    compiled = may_compile(settings.compiled)

    def ours(**changes: Any) -> Measure:
        inference = inference_of(run, size, norm, scans, **changes)
        inference.run()
        return inference.measure

    def stock(typed: bool) -> Callable[[], Measure]:
        def prepare() -> Measure:
            stock = StockInference(plain_network(run, size, norm), size, run.device, typed)

            def all_of_them() -> None:
                for path in scans:
                    stock(str(path))

            all_of_them()  # each shape asks for memory and kernels of its own
            return lambda: {"seconds": seconds(all_of_them, run.device) / len(scans)}

        return prepare

    def limit() -> Measure:
        known = run.store.get(form_name) or {}
        inference = inference_of(run, size, norm, scans)
        bags = [bag.to(run.device, memory_format=torch.channels_last) for bag in inference.bags()]
        forms = inference_forms(
            stock_encoder(norm, settings.shape), inference.network_that_runs, run.low, run.device, bags[0],
            compiled,
        )  # fmt: skip
        form, once, tried = fastest(forms, bags[0], False, partial(run.tell_of, name), known.get("form"))
        run.store.put(form_name, known or {"form": form, "seconds": tried})

        def all_of_them() -> None:
            for path, bag in zip(scans, bags, strict=True):
                decode(path)
                once(bag)

        all_of_them()  # the form was warmed up on the shape of the first scan alone
        return lambda: {"seconds": seconds(all_of_them, run.device) / len(scans)}

    contenders: dict[str, Callable[[], Measure]] = {OURS: ours}
    if compiled:
        contenders[COMPILED] = partial(ours, compile_encoder=True)
    contenders |= {STOCK: stock(False), TYPED: stock(True), f"{LIMIT} + decode": limit}
    repeats = min(run.repeats_at(size), 3) if len(scans) > 1 else run.repeats_at(size)
    records = interleaved(contenders, repeats, run.store, name, run.tell)
    limit_form = run.store.get(form_name)
    return {"part": "infer", "size": size, "norm": norm, "scans": source, "limit": limit_form, "records": records}


def agreement(run: Run, size: int, norm: str, scans: Sequence[Path]) -> dict[str, Any]:
    """How far this project's paths are from the plain one on the same bags.

    Returns:
        `float32` and `mixed precision`: the largest difference of a probability; `critical slices`: under the same two
        names, in how many bags the slice with the largest selection weight is another one (for any class); `bags`.
    """
    name = f"agreement-{size}-{norm}-{digest_of_files(scans)}"
    found = run.store.get(name)
    if found is None:
        run.tell(f"{name}: comparing probabilities and critical slices")
        plain = plain_network(run, size, norm).to(run.device).eval()
        paths = {"float32": False, "mixed precision": True}
        inferences = {path: inference_of(run, size, norm, scans, amp=amp) for path, amp in paths.items()}
        with torch.no_grad():
            truth = [plain.explain(bag[None].to(run.device)) for bag in inferences["float32"].bags()]
        probabilities = [output.logits.softmax(dim=-1)[0].cpu() for output in truth]
        critical = [output.selection_weights[0].argmax(dim=0).cpu() for output in truth]
        found = {path: _apart(inference.run(), probabilities) for path, inference in inferences.items()}
        found["critical slices"] = {path: _changed(i.critical, critical) for path, i in inferences.items()}
        found["bags"] = len(truth)
        run.store.put(name, found)
    return {"size": size, "norm": norm, **found}


def profile_inference(run: Run, size: int, norm: str, scans: Sequence[Path]) -> str:
    """Where the time of this project's inference goes."""
    # The project reads ahead in a thread, where a profile does not look; here the main thread reads.
    inference = inference_of(run, size, norm, scans, dataloader=READ_IN_MAIN_THREAD)
    inference.run()
    return profiled(inference.run)


def _apart(found: Sequence[Tensor], truth: Sequence[Tensor]) -> float:
    return max(float((one - other).abs().max()) for one, other in zip(found, truth, strict=True))


def _changed(found: Sequence[Tensor], truth: Sequence[Tensor]) -> int:
    return sum(not torch.equal(one, other) for one, other in zip(found, truth, strict=True))


def weights_of(run: Run, size: int, norm: str) -> Path:
    """The model.pt of one size of slices and one norm."""
    path = run.store.folder / f"model-{size}-{norm}.pt"
    return path if path.exists() else save_weights(path, run.settings.device, run.settings.changes(size, norm))


def inference_of(run: Run, size: int, norm: str, scans: Sequence[Path], **changes: Any) -> Inference:
    """This project's inference on some scans."""
    folder = run.work / "inference"
    folder.mkdir(exist_ok=True)
    datalist = write_datalist(folder, [str(path.absolute()) for path in scans])
    places = {"datalist": str(datalist), "section": "training"}
    return Inference(weights_of(run, size, norm), folder, run.settings.device, **places, **changes)


def plain_network(run: Run, size: int, norm: str) -> PlainNetwork:
    """The same weights in stock modules."""
    weights = read_checkpoint(weights_of(run, size, norm))["model"]
    network = network_of(run.settings.device, run.settings.changes(size, norm))
    network.load_state_dict(weights)
    encoder = stock_encoder(norm, run.settings.shape)
    inner = {name.removeprefix("encoder."): t for name, t in weights.items() if name.startswith("encoder.")}
    encoder.load_state_dict(inner)
    return PlainNetwork(encoder, network)
