"""The limit: the bare encoder on slices in memory, in the fastest type, layout and form that this machine has."""

from __future__ import annotations

import contextlib
import copy
import functools
import logging
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pydicom
import torch
from pydicom.errors import InvalidDicomError
from torch import Tensor, nn

from bundle.model.encoding import SliceEncoding

from .measuring import seconds

__all__ = ["decode", "fastest", "inference_forms", "may_compile", "training_forms"]

logger = logging.getLogger(__name__)
CHUNK = 16  # slices: their activations stay in the cache of a processor
WARM = 2  # runs before the first that counts: frozen TorchScript watches its first and compiles in its second
RECOMPILED = 64  # forms of one encoder that torch.compile may make, one for all numbers of slices and some for few
CLOSE = 1.25  # times the fastest: near enough for noise to decide
OWN = "the project's encoder"
Form = Callable[[Tensor], Tensor]


def may_compile(wanted: bool) -> bool:
    """Make torch.compile ready for the contenders of one cell; whether it is wanted and works here."""
    # Encoders share their code, and so the number of forms that is allowed; what earlier ones used up is given back.
    torch.compiler.reset()
    torch._dynamo.config.recompile_limit = RECOMPILED
    return wanted and _can_compile()


@functools.cache
def _can_compile() -> bool:
    # On a CPU it needs a C++ compiler.
    try:
        torch.compile(nn.ReLU())(torch.ones(2))
    except Exception as error:
        logger.warning("torch.compile does not work here (%s) and is left out", type(error).__name__)
        return False
    return True


def training_forms(
    encoder: nn.Module, network: Any, low: torch.dtype | None, device: torch.device, by_slice: bool, compiled: bool
) -> Iterator[tuple[str, Form]]:
    """Forward passes of one encoder in several forms, by name; a backward pass follows each.

    Args:
        encoder: a stock one.
        network: the project's own as it runs, whose encoder must not be faster than the limit.
        low: the 16-bit type that the machine has, or None.
        device: of the encoder.
        by_slice: the norm treats slices one by one, so that chunks give the same.
        compiled: try torch.compile too.
    """
    last = copy.deepcopy(encoder).to(device, memory_format=torch.channels_last).train()
    forms: dict[str, tuple[nn.Module, Form]] = {"float32": (last, last)}
    if low is not None:
        pure = copy.deepcopy(last).to(low)
        forms = {
            "autocast": (last, _cast(last, low, device)),
            "pure 16 bit": (pure, lambda slices: pure(slices.to(low))),
        }
    if compiled:
        forms["compiled"] = last, _cast(_compiled(last), low, device)
    for name, (module, form) in forms.items():
        yield name, _with_new_gradients(module, form)
    for name, (module, form) in forms.items() if by_slice else ():
        yield f"{name}, chunks of {CHUNK}", _with_new_gradients(module, _chunked(form))
    for name, own in _own(network, compiled):
        yield name, _with_new_gradients(own, _cast(_encode_of(own), low, device))


def inference_forms(
    encoder: nn.Module, network: Any, low: torch.dtype | None, device: torch.device, example: Tensor, compiled: bool
) -> Iterator[tuple[str, Form]]:
    """As `training_forms`, for inference: also frozen, where convolutions and norms are fused.

    Args:
        encoder: a stock one.
        network: the project's own as it runs.
        low: the 16-bit type that the machine has, or None.
        device: of the encoder.
        example: slices (M, C, H, W) of the size asked about.
        compiled: try torch.compile too.
    """
    last = copy.deepcopy(encoder).to(device, memory_format=torch.channels_last).eval()
    forms: dict[str, Form]
    if low is None:
        forms = {"float32": last, "frozen, float32": torch.jit.freeze(torch.jit.trace(last, example[:2]))}
    else:
        pure = copy.deepcopy(last).to(low)
        frozen = torch.jit.freeze(torch.jit.trace(pure, example[:2].to(low)))
        forms = {
            "autocast": _cast(last, low, device),
            "pure 16 bit": lambda slices: pure(slices.to(low)),
            "frozen, pure 16 bit": lambda slices: frozen(slices.to(low)),
        }
    if compiled:
        forms["compiled"] = _cast(_compiled(last), low, device)
    yield from forms.items()
    yield from ((f"{name}, chunks of {CHUNK}", _chunked(form)) for name, form in forms.items())
    for name, own in _own(network, compiled):
        yield name, _cast(_encode_of(own), low, device)


def _own(network: Any, compiled: bool) -> Iterator[tuple[str, Any]]:
    yield OWN, network
    if compiled:
        other = copy.deepcopy(network)
        other.encoding = SliceEncoding(compile=True)
        yield f"{OWN}, compiled", other


def _encode_of(network: Any) -> Form:
    return lambda slices: network.encode(slices[None], None)[0]


def _compiled(encoder: nn.Module) -> Any:
    # A second number of slices makes a form for all numbers, so that many scans do not compile a form each.
    return torch.compile(encoder, dynamic=None)


def _with_new_gradients(module: nn.Module, form: Form) -> Form:
    # A step writes gradients; where old ones are left, it adds to them, which costs more.
    def cleared(slices: Tensor) -> Tensor:
        module.zero_grad(set_to_none=True)
        return form(slices)

    return cleared


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
    """Try every form twice to warm it up and once for time, and those near the front again.

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
                for _ in range(WARM):
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
