"""How slices go through an encoder: in chunks, recomputed in the backward pass, compiled. It changes no result."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo.exc import BackendCompilerFailed
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from ..errors import InputError
from .stages import stages_of

__all__ = ["SliceEncoding"]

# On a CPU the activations of so many slices stay near the caches, and more of them gain nothing; a GPU needs more
# slices at once to be busy.
CHUNK_ON_CPU, CHUNK_ON_GPU = 16, 256


class SliceEncoding:
    """Slices (M, C, H, W) and an encoder → features (M, F).

    Without gradients and in evaluation mode slices are encoded in chunks, so that memory does not grow with their
    number. In training all slices of a batch go through together, because a batch norm looks at all of them; with
    `recompute` the backward pass computes activations anew instead of keeping them: chunk by chunk where no norm sees
    more than one slice, and stage by stage for all slices where a batch norm does.

    Args:
        chunk_slices: slices a chunk; None chooses by device (16 on a CPU, 256 on a GPU), 0 takes all at once.
        recompute: activation checkpointing. Half again the time of a training step, a fraction of its memory.
        compile: `torch.compile` the encoder; it needs a C++ compiler, and some time at the first pass.
        first_stage: of the encoder (see `stages_of`) to start from; what is given then are outputs of the stage before,
            (M, F, 1, 1) for the last.

    Raises:
        InputError: `chunk_slices` below 0; when called, recomputation with batch norm in an encoder of unknown stages,
            no compiler, PyTorch in a folder whose path has a space (which torch.compile cannot do), or a training batch
            that leaves a batch norm one number a channel; also see `check`.
    """

    def __init__(
        self, chunk_slices: int | None = None, recompute: bool = False, compile: bool = False, first_stage: int = 0
    ) -> None:
        if chunk_slices is not None and chunk_slices < 0:
            raise InputError(f"chunk_slices must be 0 (all at once) or more, or null, not {chunk_slices}")
        self.chunk_slices, self.recompute, self.compile, self.first_stage = (
            chunk_slices, recompute, compile, first_stage
        )  # fmt: skip
        self._compiled: dict[int, Callable[[Tensor], Tensor]] = {}

    def check(self, encoder: nn.Module) -> None:
        """Refuse an encoder that cannot be trained so, before anything else is done.

        Raises:
            InputError: recomputation with batch norm in an encoder of unknown stages, or in one that is compiled.
        """
        norms = [module for module in encoder.modules() if isinstance(module, _BatchNorm)]
        if self.recompute and norms:
            stages_of(encoder)
            if self.compile and any(norm.training for norm in norms):
                # It would go stage by stage, and what is compiled is the whole.
                raise InputError(
                    "compile_encoder and activation_checkpointing do not go together in training with batch norm: set "
                    "one of them to false, or norm to group"
                )

    def __deepcopy__(self, memo: dict[int, Any]) -> SliceEncoding:
        # Compiled code belongs to the encoder that it was compiled for.
        return SliceEncoding(self.chunk_slices, self.recompute, self.compile, self.first_stage)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_compiled": {}}

    def __call__(self, encoder: nn.Module, slices: Tensor) -> Tensor:
        """Features (M, F) of slices (M, C, H, W)."""
        try:
            return self._encoded(encoder, slices)
        except (ValueError, RuntimeError) as error:  # the latter where it is compiled
            if "Expected more than 1 value per channel" not in str(error):
                raise
            raise InputError(
                "batch norm cannot train on a batch of one slice, of which one pixel is left: raise bag_size or "
                "image_size, or set norm to group"
            ) from None

    def _encoded(self, encoder: nn.Module, slices: Tensor) -> Tensor:
        across_slices = any(module.training for module in encoder.modules() if isinstance(module, _BatchNorm))
        apply = self._applied(encoder)
        if torch.is_grad_enabled() and encoder.training:
            if not self.recompute:
                return apply(channels_last(slices))
            if across_slices:
                return self._recomputed_by_stage(encoder, channels_last(slices))
            apply = _recomputed(apply)
        elif across_slices:
            return apply(channels_last(slices))
        size = self.chunk_slices
        if size is None:
            size = CHUNK_ON_GPU if slices.device.type == "cuda" else CHUNK_ON_CPU
        # No look at the number of slices with 0: an export keeps it open.
        if size == 0 or len(slices) <= size:
            return apply(channels_last(slices))
        # Laid out a chunk at a time, as there is no other copy of a bag.
        return torch.cat([apply(channels_last(chunk)) for chunk in slices.split(size)])

    def _applied(self, encoder: nn.Module) -> Callable[[Tensor], Tensor]:
        whole: nn.Module = encoder
        if self.first_stage:
            whole = nn.Sequential(*stages_of(encoder)[self.first_stage :], nn.Flatten())
        if not self.compile:
            return whole
        if id(encoder) not in self._compiled:
            self._compiled[id(encoder)] = _compiled(whole)
        return self._compiled[id(encoder)]

    def _recomputed_by_stage(self, encoder: nn.Module, slices: Tensor) -> Tensor:
        for stage in stages_of(encoder)[self.first_stage :]:
            slices = _recomputed(stage)(slices)
        return slices.flatten(1)


def channels_last(slices: Tensor) -> Tensor:
    """The same slices (M, C, H, W) channels-last in memory, which computes faster; stacks of slices as they are."""
    # Not `contiguous`, which leaves one channel as it is, as either layout: kernels would go by its strides.
    return slices.to(slices.dtype, memory_format=torch.channels_last) if slices.dim() == 4 else slices


def _recomputed(module: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    norms = [m for m in module.modules() if isinstance(m, _BatchNorm)] if isinstance(module, nn.Module) else []

    def contexts() -> tuple[contextlib.AbstractContextManager[None], contextlib.AbstractContextManager[None]]:
        return contextlib.nullcontext(), _statistics_kept(norms)

    def apply(slices: Tensor) -> Tensor:
        result: Tensor = checkpoint(module, slices, use_reentrant=False, context_fn=contexts)
        return result

    return apply


@contextlib.contextmanager
def _statistics_kept(norms: list[_BatchNorm]) -> Iterator[None]:
    """The second pass over the same slices must not count for running statistics again."""
    # Tracking stays on, so that as many tensors are saved as before; a momentum of 0 leaves the statistics alone.
    before = [(norm, norm.momentum, norm.num_batches_tracked) for norm in norms if norm.training]
    counts = [None if count is None else count.clone() for _, _, count in before]
    for norm, _, _ in before:
        norm.momentum = 0.0
    try:
        yield
    finally:
        for (norm, momentum, tracked), count in zip(before, counts, strict=True):
            norm.momentum = momentum
            if tracked is not None and count is not None:
                tracked.copy_(count)


def _compiled(module: nn.Module) -> Callable[[Tensor], Tensor]:
    apply = torch.compile(module)

    def checked(slices: Tensor) -> Tensor:
        # Chunks and batches differ in their number of slices only; one compiled form serves all but a single slice.
        if len(slices) > 1:
            torch._dynamo.mark_dynamic(slices, 0)
        try:
            result: Tensor = apply(slices)
        except BackendCompilerFailed as error:
            # The exceptions for these are in a module that is only there once something was compiled.
            told, home = f"{type(error.inner_exception).__name__} {error}", str(Path(torch.__file__).parent)
            if "InvalidCxxCompiler" in told:
                raise InputError("compile_encoder needs a C++ compiler, and none was found: set it to false") from error
            if "CppCompileError" in told and " " in home:
                raise InputError(
                    f"compile_encoder does not work where the path of PyTorch has a space ({home}): set it to false "
                    "or move the environment"
                ) from error
            raise
        return result

    return checked
