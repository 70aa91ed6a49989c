"""The limit: the bare encoder on slices in memory, in the fastest type, layout and form that this machine has."""

from __future__ import annotations

import contextlib
import copy
import logging
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import nibabel as nib
import numpy as np
import pydicom
import torch
from pydicom.errors import InvalidDicomError
from torch import Tensor, nn

from .measuring import seconds

__all__ = ["decode", "fastest", "inference_forms", "training_forms"]

logger = logging.getLogger(__name__)
CHUNK = 16  # slices: their activations stay in the cache of a processor
CLOSE = 1.25  # times the fastest: near enough for noise to decide
Form = Callable[[Tensor], Tensor]


def training_forms(
    encoder: nn.Module, own: Form, low: torch.dtype | None, device: torch.device, by_slice: bool, compiled: bool
) -> Iterator[tuple[str, Form]]:
    """Forward passes of one encoder in several forms, by name; a backward pass follows each.

    Args:
        encoder: a stock one.
        own: the project's own forward pass of its encoder, which must not be faster than the limit.
        low: the 16-bit type that the machine has, or None.
        device: of the encoder.
        by_slice: the norm treats slices one by one, so that chunks give the same.
        compiled: try torch.compile too.
    """
    last = copy.deepcopy(encoder).to(device, memory_format=torch.channels_last).train()
    forms: dict[str, Form] = {"float32": last}
    if low is not None:
        forms = {"autocast": _cast(last, low, device)}
        pure = copy.deepcopy(last).to(low)
        forms["pure 16 bit"] = lambda slices: pure(slices.to(low))
    if compiled:
        forms["compiled"] = _cast(torch.compile(last, dynamic=False), low, device)
    yield from forms.items()
    if by_slice:
        yield from ((f"{name}, chunks of {CHUNK}", _chunked(form)) for name, form in forms.items())
    yield "the project's encoder", _cast(own, low, device)


def inference_forms(
    encoder: nn.Module, own: Form, low: torch.dtype | None, device: torch.device, example: Tensor, compiled: bool
) -> Iterator[tuple[str, Form]]:
    """As `training_forms`, for inference: also frozen, where convolutions and norms are fused.

    Args:
        encoder: a stock one.
        own: the project's own forward pass of its encoder.
        low: the 16-bit type that the machine has, or None.
        device: of the encoder.
        example: slices (M, C, H, W) of the size asked about.
        compiled: try torch.compile too.
    """
    last = copy.deepcopy(encoder).to(device, memory_format=torch.channels_last).eval()
    forms: dict[str, Form] = {"float32": last}
    if low is not None:
        pure = copy.deepcopy(last).to(low)
        frozen = torch.jit.freeze(torch.jit.trace(pure, example[:2].to(low)))
        forms = {
            "autocast": _cast(last, low, device),
            "pure 16 bit": lambda slices: pure(slices.to(low)),
            "frozen, pure 16 bit": lambda slices: frozen(slices.to(low)),
        }
    if compiled:
        forms["compiled"] = _cast(torch.compile(last, dynamic=False), low, device)
    yield from forms.items()
    yield from ((f"{name}, chunks of {CHUNK}", _chunked(form)) for name, form in forms.items())
    yield "the project's encoder", _cast(own, low, device)


def _cast(form: Form, low: torch.dtype | None, device: torch.device) -> Form:
    def cast(slices: Tensor) -> Tensor:
        with torch.autocast(device.type, dtype=low, enabled=low is not None):
            return form(slices)

    return cast


def _chunked(form: Form) -> Form:
    return lambda slices: torch.cat([form(chunk) for chunk in slices.split(CHUNK)])


def fastest(
    forms: Iterator[tuple[str, Form]],
    slices: Tensor,
    train: bool,
    tell: Callable[[str], None],
    known: str | None = None,
) -> tuple[str, Callable[[Tensor], None], dict[str, float]]:
    """Try every form once to warm it up and once for time, and those near the front again.

    Args:
        forms: name and forward pass.
        slices: (M, C, H, W), laid out as the encoder likes it.
        train: also do the backward pass.
        tell: is told what goes on.
        known: the name of the fastest from an earlier run; the others are left out.

    Returns:
        The name of the fastest, a function that runs it once on slices of that shape, and the seconds of every form
        that was tried.
    """

    def once(form: Form, slices: Tensor) -> None:
        if train:
            form(slices).float().square().mean().backward()
        else:
            with torch.inference_mode():
                form(slices)

    found: dict[str, float] = {}
    runs: dict[str, Callable[[Tensor], None]] = {}
    for name, form in forms:
        if known in (None, name):
            tell(f"the limit: {name}")
            runs[name] = partial(once, form)
            try:
                runs[name](slices)
            # A machine without a compiler, or a type that an operation lacks, leaves the other forms.
            except Exception as error:
                logger.warning("the form '%s' does not work here (%s)", name, type(error).__name__)
                continue
            found[name] = seconds(partial(runs[name], slices), slices.device)
    close = [name for name, taken in found.items() if taken < CLOSE * min(found.values())]
    for name in close if len(close) > 1 else ():
        found[name] = min(found[name], seconds(partial(runs[name], slices), slices.device))
    best = min(close, key=found.__getitem__)
    return best, runs[best], found


def decode(path: Path) -> None:
    """The least that reading a scan takes: the stored pixels of every file that has some, also of folders below."""
    for file in sorted(f for f in path.rglob("*") if f.is_file()) if path.is_dir() else [path]:
        if file.name.endswith((".nii", ".nii.gz")):
            np.asanyarray(nib.load(file).dataobj)
            continue
        with contextlib.suppress(InvalidDicomError):
            header = pydicom.dcmread(file)
            if "PixelData" in header:
                _ = header.pixel_array
