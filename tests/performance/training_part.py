"""A training step of this project, of stock MONAI with several heads, and the limit."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from .limit import fastest, may_compile, training_forms
from .made_scans import write_datalist, write_nifti
from .measuring import interleaved, seconds
from .profiling import profiled
from .project import Training, network_of
from .rivals import PlainNetwork, StockTraining, monai_mean, stock_encoder, stock_loader, torchmil_dsmil
from .settings import Run

__all__ = ["COMPILED", "LIMIT", "MILMODEL", "OURS", "PLAIN", "STOCK", "TYPED", "profile_training", "training_cell"]

OURS, PLAIN = "this project", "this project, no augmentation"
COMPILED = "this project, compiled"
STOCK, TYPED = "stock MONAI", "stock MONAI, our type and layout"
MILMODEL = "MONAI MILModel (mean)"
LIMIT = "limit: bare encoder"
Measure = Callable[[], dict[str, float]]


def training_cell(run: Run, size: int, norm: str) -> dict[str, Any]:
    """Seconds a bag of every contender, for one size of slices and one norm."""
    settings, name = run.settings, f"train-{size}-{norm}"
    num_bags = settings.bags_at(size)
    images = [f"case_{number:03d}.nii.gz" for number in range(num_bags)]
    folder = run.work / "cohort"
    for number, image in enumerate(images):
        write_nifti(folder / image, *settings.cohort, number)
    paths = [str(folder / image) for image in images]
    changes = settings.changes(size, norm)

    compiled = may_compile(settings.compiled)

    def ours(**more: Any) -> Measure:
        datalist = write_datalist(folder, images)
        training = Training(datalist, run.store.folder / "slices", settings.device, **{**changes, **more})
        training.epoch()
        return training.measure

    def stock(head: Callable[[nn.Module], Any], augment: bool = False, typed: bool = False) -> Callable[[], Measure]:
        def prepare() -> Measure:
            model, loss = head(stock_encoder(norm, settings.shape))
            cache = run.store.folder / f"persistent-{size}"
            loader = stock_loader(paths, size, settings.bag_size, settings.batch_size, cache, augment)
            training = StockTraining(model, loss, loader, run.device, typed)
            training.epoch()
            return lambda: {"seconds": seconds(training.epoch, run.device) / num_bags}

        return prepare

    def dual_stream(encoder: nn.Module) -> Any:
        network = network_of(settings.device, changes)
        model = PlainNetwork(encoder, network)
        return model, lambda bags, labels: functional.cross_entropy(model(bags), labels)

    def limit() -> Measure:
        known = run.store.get(f"{name}-limit") or {}
        slices = torch.rand(settings.batch_size * settings.bag_size, 1, size, size, device=run.device)
        slices = slices.to(memory_format=torch.channels_last)
        network = network_of(settings.device, changes).train()
        forms = training_forms(
            stock_encoder(norm, settings.shape), network, run.low, run.device, by_slice=norm != "batch",
            compiled=compiled,
        )  # fmt: skip
        form, once, tried = fastest(forms, slices, True, partial(run.tell_of, name), known.get("form"))
        run.store.put(f"{name}-limit", known or {"form": form, "seconds": tried})
        return lambda: {"seconds": seconds(lambda: once(slices), run.device) / settings.batch_size}

    contenders: dict[str, Callable[[], Measure]] = {OURS: ours, PLAIN: lambda: ours(augment=False)}
    if compiled:
        contenders[COMPILED] = lambda: ours(compile_encoder=True)
    contenders |= {
        STOCK: stock(dual_stream, augment=True),
        f"{STOCK}, no augmentation": stock(dual_stream),
        TYPED: stock(dual_stream, augment=True, typed=True),
        "torchmil DSMIL": stock(lambda encoder: torchmil_dsmil(encoder, size, settings.bag_size)),
        MILMODEL: stock(lambda encoder: monai_mean(encoder, settings.num_features)),
        LIMIT: limit,
    }
    records = interleaved(contenders, run.repeats_at(size), run.store, name, run.tell)
    limit_form = run.store.get(f"{name}-limit")
    return {"part": "train", "size": size, "norm": norm, "scans": None, "limit": limit_form, "records": records}


def profile_training(run: Run, size: int, norm: str) -> str:
    """Where the time of this project's step goes."""
    settings = run.settings
    images = [f"case_{number:03d}.nii.gz" for number in range(settings.bags_at(size))]
    datalist = write_datalist(run.work / "cohort", images)
    training = Training(datalist, run.store.folder / "slices", settings.device, **settings.changes(size, norm))
    training.epoch()
    return profiled(training.epoch)
