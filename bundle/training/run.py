"""The beginning and the end of a training run."""

from __future__ import annotations

import logging
from pathlib import Path

import torch

from ..model.encoder import FrozenBatchNorm2d, load_encoder_weights
from ..model.network import DualStreamMIL
from ..results.figures import draw_curves
from .checkpoint import BestModel

__all__ = ["finish_training", "start_network"]

logger = logging.getLogger(__name__)


def start_network(network: DualStreamMIL, encoder_weights: str | Path | None = None) -> DualStreamMIL:
    """The network to train: with weights in its encoder if there are any, laid out for fast convolutions.

    Args:
        network: newly built.
        encoder_weights: see `load_encoder_weights`; None starts from random weights.
    """
    if encoder_weights is not None:
        load_encoder_weights(network.encoder, encoder_weights)
    frozen = [module for module in network.encoder.modules() if isinstance(module, FrozenBatchNorm2d)]
    if any(bool((norm.running_var == 1).all()) and not bool(norm.running_mean.any()) for norm in frozen):  # type: ignore
        logger.warning("norm frozen_batch has no trained statistics and changes nothing: give encoder_weights")
    network.encoder.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return network


def finish_training(output_dir: str | Path, best: BestModel) -> None:
    """Draw the curves and say what was made."""
    folder = Path(output_dir)
    draw_curves(folder / "epochs.csv", folder / "curves.png")
    logger.info("best epoch %d, %s %.4f; weights in %s", best.epoch, best.metric, best.value, best.path)
