"""The beginning and the end of a training run."""

from __future__ import annotations

import logging
from pathlib import Path

from torch.nn.modules.batchnorm import _BatchNorm

from ..data.dataset import BagDataset
from ..model.bag_network import BagNetwork
from ..model.encoder import FrozenBatchNorm2d, laid_out, load_encoder_weights
from ..model.encoding import SliceEncoding
from ..model.stages import freeze_stages
from ..model.sync_norm import with_synced_norms
from ..results.figures import draw_curves
from .checkpoint import BestModel
from .distributed import group_size, is_first

__all__ = ["finish_training", "start_network", "tell_batch_norm", "tell_draws"]

logger = logging.getLogger(__name__)


def start_network(
    network: BagNetwork,
    encoder_weights: str | Path | None = None,
    frozen_stages: int = 0,
    encoding: SliceEncoding | None = None,
) -> BagNetwork:
    """The network to train: with weights in its encoder if there are any, laid out for fast convolutions.

    Among several processes its batch norms compute over all of them.

    Args:
        network: newly built.
        encoder_weights: see `load_encoder_weights`; None starts from random weights.
        frozen_stages: first stages of the encoder that are not trained, see `freeze_stages`.
        encoding: how slices go through the encoder; None sends all slices of a batch through at once.
    """
    if encoder_weights is not None:
        load_encoder_weights(network.encoder, encoder_weights)
    frozen = [module for module in network.encoder.modules() if isinstance(module, FrozenBatchNorm2d)]
    if any(bool((norm.running_var == 1).all()) and not bool(norm.running_mean.any()) for norm in frozen):  # type: ignore
        logger.warning("norm frozen_batch has no trained statistics and changes nothing: give encoder_weights")
    network.frozen = tuple(freeze_stages(network.encoder, frozen_stages))
    if frozen_stages and encoder_weights is None:
        logger.warning("frozen_stages keeps random weights as they are: give encoder_weights")
    if encoding is not None:
        network.encoding = encoding
        encoding.check(network.encoder)
    if group_size() > 1:
        with_synced_norms(network, network.frozen)
    laid_out(network.encoder)
    return network


def tell_draws(dataset: BagDataset, bag_size: int, strategy: str) -> None:
    """Say of how many cases slices are drawn: of those with no more than `bag_size` every strategy takes all.

    Args:
        dataset: for training; without a cache nothing is known and nothing said.
        bag_size: slices a bag.
        strategy: how they are drawn, such as "random".
    """
    lengths = dataset.lengths()
    if not lengths or strategy == "all" or not is_first():
        return
    longer = sum(length > bag_size for length in lengths)
    told = f"bag_size {bag_size}: slices are drawn ({strategy}) of {longer} of {len(lengths)} training cases"
    logger.info(told if longer == len(lengths) else f"{told}; the others have no more and are used whole")


def tell_batch_norm(network: BagNetwork, batch_size: int) -> None:
    """Warn of batch norm over one bag: what a bag is then scaled by is the bag itself, and evaluation scales otherwise.

    Args:
        network: to train.
        batch_size: bags a batch, over all processes.
    """
    frozen = {norm for module in network.frozen for norm in module.modules()}
    norms = [one for one in network.encoder.modules() if isinstance(one, _BatchNorm) and one.training]
    if batch_size == 1 and set(norms) - frozen and is_first():
        logger.warning(
            "batch norm over batches of one bag was seen to be unsteady: raise batch_size, or set norm to group and "
            "instance_gradient to 1.0"
        )


def finish_training(output_dir: str | Path, best: BestModel) -> None:
    """Draw the curves and say what was made."""
    if not is_first():
        return
    folder = Path(output_dir)
    draw_curves(folder / "epochs.csv", folder / "curves.png")
    logger.info("best epoch %d, %s %.4f; weights in %s", best.epoch, best.metric, best.value, best.path)
