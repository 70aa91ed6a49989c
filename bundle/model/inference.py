"""A trained network made fast: for evaluation and inference, after which it cannot be trained any more."""

from __future__ import annotations

import copy
import logging
from typing import Any

import torch
from torch import fx, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils import fuse_conv_bn_eval

from .bag_network import BagNetwork
from .encoder import laid_out
from .encoding import SliceEncoding
from .safe_conv import SafeConv2d

__all__ = ["fold_batch_norms", "for_inference"]

logger = logging.getLogger(__name__)
NORMS, CONVOLUTIONS = (nn.BatchNorm2d, nn.BatchNorm3d), (nn.Conv2d, nn.Conv3d, SafeConv2d)


def for_inference(network: BagNetwork, encoding: SliceEncoding, precision: torch.dtype | None = None) -> BagNetwork:
    """A copy of a trained network, ready for inference: nothing learns, norms are folded, the encoder is laid out.

    A copy, because other tools take the weights of the network itself, under the names that they were saved by.

    Args:
        network: with its weights.
        encoding: how slices go through the encoder.
        precision: type of the weights of the encoder's convolutions and linear layers, that of the autocast in which
            it will run (see `autocast_dtype`), which then need not convert them for every chunk. None keeps float32.
            Norms, the head and, on a CPU, an encoder of stacks of slices stay float32.

    Returns:
        The copy, in evaluation mode.
    """
    network = copy.deepcopy(network).requires_grad_(False).eval()
    folded = fold_batch_norms(network.encoder)
    # An encoder of stacks computes in float32 on a CPU, see VolumeNet.
    exact = not network.slicewise and next(network.encoder.parameters()).device.type == "cpu"
    for module in network.encoder.modules() if precision is not None and not exact else ():
        if isinstance(module, (_ConvNd, nn.Linear)):
            module.to(precision)
    laid_out(network.encoder)
    network.encoding = encoding
    logger.debug("%d batch norms folded into convolutions", folded)
    return network


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        # A norm or convolution of our own class is one step as well, not the formula inside it.
        return isinstance(m, (*NORMS, nn.GroupNorm, SafeConv2d)) or super().is_leaf_module(m, module_qualified_name)


def fold_batch_norms(encoder: nn.Module) -> int:
    """Fold every batch norm that directly follows a convolution into that convolution, in place.

    In evaluation mode such a norm is a fixed scale and shift of each channel, which the convolution's own weights can
    hold; the outputs stay the same up to rounding. Group and instance norms look at each slice and cannot be folded.

    Args:
        encoder: in evaluation mode. One whose forward depends on the values of its input cannot be followed and stays
            as it is, which is logged.

    Returns:
        How many norms were folded.
    """
    if not any(isinstance(module, NORMS) for module in encoder.modules()):
        return 0
    try:
        graph = _Tracer().trace(encoder)
    except Exception as error:  # whatever a user's own forward does that symbols cannot follow
        logger.info("batch norms are not folded into convolutions: the encoder cannot be traced (%s)", error)
        return 0
    folded = 0
    modules = dict(encoder.named_modules())
    calls = [node.target for node in graph.nodes if node.op == "call_module"]
    for node in graph.nodes:
        source: Any = node.args[0] if node.op == "call_module" and node.args else None
        if not isinstance(source, fx.Node) or source.op != "call_module":
            continue
        norm, convolution = modules[str(node.target)], modules[str(source.target)]
        # Where the convolution's output goes elsewhere too, or a module is called twice, folding would change more.
        alone = len(source.users) == 1 and calls.count(node.target) == 1 == calls.count(source.target)
        if not alone or not isinstance(norm, NORMS) or type(convolution) not in CONVOLUTIONS:
            continue
        if norm.training or norm.running_mean is None:
            continue
        with torch.no_grad():
            _put(encoder, str(source.target), fuse_conv_bn_eval(convolution, norm))
        _put(encoder, str(node.target), nn.Identity())
        folded += 1
    return folded


def _put(root: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(root.get_submodule(parent), child, module)
