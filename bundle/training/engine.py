"""One step for training and evaluation: batch → logits, evidence and loss, with mixed precision on CPU and GPU."""

from __future__ import annotations

import contextlib
import logging
import math
import warnings
from typing import Any

import torch
from ignite.engine import EventEnum, Events
from monai.data import MetaTensor
from monai.engines import SupervisedEvaluator, SupervisedTrainer, Workflow
from monai.engines.utils import IterationEvents
from monai.utils import CommonKeys as Keys
from torch import Tensor

from ..data.dataset import BagSampler
from ..errors import InputError
from ..model.occlusion import leave_one_out
from ..model.sync_norm import count_in_norms
from .distributed import BagBatches, add_up, gathered, group_size, seed_noise

__all__ = ["BagEvaluator", "BagEvents", "BagTrainer", "autocast_dtype", "prepare_bags"]

logger = logging.getLogger(__name__)


class BagEvents(EventEnum):
    """Events of a BagTrainer besides ignite's and MONAI's."""

    GRADIENTS_READY = "gradients_ready"  # mean over all bags of the step, unscaled; once before every optimiser step


def autocast_dtype(device: torch.device | str, amp: bool, precision: str = "auto") -> torch.dtype | None:
    """The type that convolutions compute in, or None for float32.

    Args:
        device: of the network.
        amp: whether to use mixed precision at all.
        precision: "auto" (bfloat16 where the hardware has it, else float16 on a GPU and float32 on a CPU), "bf16" or
            "fp16".

    Raises:
        InputError: on another precision, or fp16 on a CPU.
    """
    if precision not in ("auto", "bf16", "fp16"):
        raise InputError(f"precision must be auto, bf16 or fp16, not {precision!r}")
    if not amp:
        return None
    if torch.device(device).type == "cuda":
        # Older GPUs emulate bfloat16, which PyTorch counts as support unless told otherwise.
        bf16 = precision == "bf16" or (precision == "auto" and torch.cuda.is_bf16_supported(including_emulation=False))
        return torch.bfloat16 if bf16 else torch.float16
    if precision == "fp16":
        raise InputError("precision fp16 needs a GPU; use auto or bf16 on a CPU")
    if precision == "auto" and not (
        torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    ):
        return None  # emulated bfloat16 is slower than float32
    return torch.bfloat16


def prepare_bags(
    batch: dict[str, Any], device: torch.device, non_blocking: bool = False, **_: Any
) -> tuple[Tensor, Tensor, tuple[Tensor, ...], dict[str, Any]]:
    """Image (B, N, C, H, W), label (B,) and further arguments of the network (mask), on the device, as MONAI asks."""

    def moved(tensor: Tensor) -> Tensor:
        plain = tensor.as_tensor() if isinstance(tensor, MetaTensor) else tensor
        return plain.to(device, non_blocking=non_blocking)

    return moved(batch["image"]), moved(batch["label"]), (moved(batch["mask"]),), {}


class _Forward:
    """The pass that trainer and evaluator share."""

    def _init_precision(self, amp: bool, precision: str) -> None:
        self.amp_dtype = autocast_dtype(self.state.device, amp, precision)  # type: ignore[attr-defined]

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        if self.amp_dtype is None:
            return contextlib.nullcontext()
        return torch.autocast(self.state.device.type, dtype=self.amp_dtype)  # type: ignore[attr-defined]

    def _forward(self, engine: Any, batch: dict[str, Any], halves: bool = False) -> dict[str, Any]:
        """Label, mask, logits as `pred` and the BagOutput as `evidence`; the head stays float32 (see the network).

        With `halves` the logits (2 B, K) of two random halves of each bag too.
        """
        image, label, (mask,), _ = engine.prepare_batch(
            batch, engine.state.device, engine.non_blocking, **engine.to_kwargs
        )
        with self._autocast():
            evidence = engine.inferer(image, engine.network, mask, **({"halves": True} if halves else {}))
        given = {Keys.LABEL: label, "mask": mask}
        if halves:
            given["halves"] = evidence.logits[len(label) :]
            evidence = _first(evidence, len(label))
        return {**given, Keys.PRED: evidence.logits, "evidence": evidence}


class BagTrainer(_Forward, SupervisedTrainer):
    """MONAI's SupervisedTrainer for bags.

    `network` is an `Evidence` module (or DistributedDataParallel around one), `loss_function` a DualStreamLoss.
    `state.output` is a dictionary of this process's bags; it keeps no image. Its loss is the mean over the bags of the
    batch, and a step's gradient the mean over the bags of the step: over accumulated batches and over processes,
    however many bags each of them holds.

    Args:
        *args, **kwargs: of SupervisedTrainer.
        amp: mixed precision, on CPU too.
        precision: see `autocast_dtype`.
    """

    def __init__(self, *args: Any, amp: bool = False, precision: str = "auto", **kwargs: Any) -> None:
        kwargs.setdefault("prepare_batch", prepare_bags)
        kwargs.setdefault("decollate", False)
        super().__init__(*args, amp=False, event_names=[BagEvents], **kwargs)  # type: ignore[misc]
        self._init_precision(amp, precision)
        # Only float16 needs its loss scaled: bfloat16 has float32's range.
        scaled = self.amp_dtype is torch.float16
        self.scaler = torch.amp.GradScaler(self.state.device.type) if scaled else None  # type: ignore[assignment]
        self._step_bags = 0.0
        batches = getattr(self.data_loader, "batch_sampler", None)
        self._batches = batches if isinstance(batches, BagBatches) else None
        self._sampler = getattr(batches, "sampler", None)
        self.add_event_handler(Events.EPOCH_STARTED, self._start_epoch)

    def _start_epoch(self) -> None:
        if isinstance(self._sampler, BagSampler):
            self._sampler.set_epoch(self.state.epoch)
            seed_noise(self._sampler.seed, self.state.epoch)

    def run(self) -> None:  # type: ignore[override]
        """Train from the state's epoch to max_epochs; a run that is there is left alone (ignite would start anew)."""
        if self.state.epoch >= self.state.max_epochs:
            logger.info("training had already reached epoch %d of %d", self.state.epoch, self.state.max_epochs)
            return
        with warnings.catch_warnings():
            # A schedule that steps once a batch does so before the first step of accumulated or skipped gradients.
            warnings.filterwarnings("ignore", r"Detected call of `lr_scheduler\.step\(\)` before", UserWarning)
            Workflow.run(self)  # Trainer.run would put None, or a scaler of its own, in the scaler's place

    def _iteration(self, engine: Any, batchdata: dict[str, Any]) -> dict[str, Any]:
        steps = engine.accumulation_steps
        position = (engine.state.iteration - 1) % engine.state.epoch_length
        group = position // steps * steps
        in_group = min(steps, engine.state.epoch_length - group)  # the last group of an epoch may be shorter
        engine.network.train()
        if position == group:
            engine.optimizer.zero_grad()
            self._step_bags = 0.0
        own = len(batchdata["label"]) if self._batches is None else self._batches.num_own(position)
        count_in_norms(engine.network, own > 0)
        given = self._forward(engine, batchdata, halves=getattr(engine.loss_function, "lambda_consistency", 0) > 0)
        target, halves = given[Keys.LABEL], [given.pop("halves")] if "halves" in given else []
        if target.dim() > 1:
            given[Keys.LABEL] = target.argmax(dim=1)  # metrics take classes
        # A process without a bag of the batch was given one to take part with, which is left out of everything.
        output = engine.state.output = given if own else {name: _first(value, 0) for name, value in given.items()}
        engine.fire_event(IterationEvents.FORWARD_COMPLETED)
        loss = own * engine.loss_function(given["evidence"], target, given["mask"], *halves)  # sum over own bags
        total, num_bags = add_up([float(loss.detach()), own])
        if not math.isfinite(total):
            cases = ", ".join(case for cases in gathered(batchdata["case"]) for case in cases)
            raise InputError(
                f"the loss became {total} in epoch {engine.state.epoch} (cases {cases}): "
                "lower lr, grad_clip or lambda_confidence, or set amp to false"
            )
        self._step_bags += num_bags
        output[Keys.LOSS] = loss.new_tensor(total / num_bags)
        engine.fire_event(IterationEvents.LOSS_COMPLETED)
        (loss if engine.scaler is None else engine.scaler.scale(loss)).backward()
        engine.fire_event(IterationEvents.BACKWARD_COMPLETED)
        if position + 1 == group + in_group:
            if engine.scaler is not None:
                engine.scaler.unscale_(engine.optimizer)  # before any handler looks at the gradients
            self._average_gradients()
            engine.fire_event(BagEvents.GRADIENTS_READY)
            if engine.scaler is not None:
                engine.scaler.step(engine.optimizer)
                engine.scaler.update()
            else:
                engine.optimizer.step()
        output["evidence"] = type(output["evidence"])(*(tensor.detach() for tensor in output["evidence"]))
        output[Keys.PRED] = output[Keys.PRED].detach()
        engine.fire_event(IterationEvents.MODEL_COMPLETED)
        return engine.state.output

    def _average_gradients(self) -> None:
        # DistributedDataParallel has divided the sum over all bags by the number of processes.
        factor = group_size() / self._step_bags
        for parameter in self.network.parameters() if factor != 1 else ():
            if parameter.grad is not None:
                parameter.grad.mul_(factor)


def _first(value: Any, number: int) -> Any:
    """The first rows of a tensor, or of every tensor of a BagOutput."""
    return value[:number] if isinstance(value, Tensor) else type(value)(*(tensor[:number] for tensor in value))


class BagEvaluator(_Forward, SupervisedEvaluator):
    """MONAI's SupervisedEvaluator for bags, in evaluation mode and without gradients; see BagTrainer.

    Refused cases (see `collate_bags`) pass through. Where a batch holds nothing else, the output is their `refusal`s.

    Args:
        *args, **kwargs: of SupervisedEvaluator.
        amp: mixed precision, on CPU too.
        precision: see `autocast_dtype`.
        occlusion: whether the output gets `occlusion` (B, N) too: how much each slice counts, by leaving it out, for
            the second of two classes, of more for the predicted one. Slices are then encoded twice. A network whose
            features are not of single slices has none.
    """

    def __init__(
        self, *args: Any, amp: bool = False, precision: str = "auto", occlusion: bool = False, **kwargs: Any
    ) -> None:
        kwargs.setdefault("prepare_batch", prepare_bags)
        kwargs.setdefault("decollate", False)
        self.occlusion = occlusion
        # MONAI registers handlers in its constructor, and they may look at the precision.
        super().__init__(*args, amp=False, **kwargs)  # type: ignore[misc]
        self._init_precision(amp, precision)

    def _iteration(self, engine: Any, batchdata: dict[str, Any]) -> dict[str, Any]:
        if "image" not in batchdata:
            engine.state.output = {"refusal": [case["refusal"] for case in batchdata["refused"]]}
            return engine.state.output
        with engine.mode(engine.network), torch.no_grad():
            engine.state.output = self._forward(engine, batchdata)
            if self.occlusion and engine.network.network.slicewise:
                engine.state.output["occlusion"] = self._occlusion(engine, batchdata)
        engine.fire_event(IterationEvents.MODEL_COMPLETED)
        return engine.state.output

    def _occlusion(self, engine: Any, batch: dict[str, Any]) -> Tensor:
        image, label, (mask,), _ = engine.prepare_batch(
            batch, engine.state.device, engine.non_blocking, **engine.to_kwargs
        )
        two = engine.state.output[Keys.PRED].shape[-1] == 2
        with self._autocast():
            # As the scores of two classes speak for the second, whatever is predicted.
            return leave_one_out(engine.network.network, image, mask, torch.ones_like(label) if two else None)
