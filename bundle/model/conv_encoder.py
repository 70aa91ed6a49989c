"""A small encoder for studies of many trainings and for small slices."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from ..errors import InputError

__all__ = ["ConvEncoder"]


class ConvEncoder(nn.Sequential):
    """A stage for each width: 3 × 3 convolution, batch norm, ReLU, 2 × 2 maximum; the last ends in the plane's mean.

    Maps (M, C, H, W) to (M, F) with F the last width; H and W must be at least 2 to the number of stages less one.
    Its norms are those that `with_norm` can replace, and its stages can be frozen.

    Args:
        num_channels: C of a slice.
        widths: channels after each stage.

    Raises:
        InputError: without a width, or with one below 1.
    """

    def __init__(self, num_channels: int = 1, widths: Sequence[int] = (16, 32, 64, 128)) -> None:
        if not widths or min(widths) < 1:
            raise InputError(f"widths of a ConvEncoder are numbers of channels, one a stage, not {list(widths)}")
        stages: list[nn.Module] = []
        for before, width in zip([num_channels, *widths[:-1]], widths, strict=True):
            last = len(stages) == len(widths) - 1
            pool: list[nn.Module] = [nn.AdaptiveAvgPool2d(1), nn.Flatten()] if last else [nn.MaxPool2d(2)]
            convolution = nn.Conv2d(before, width, 3, padding=1, bias=False)
            stages.append(nn.Sequential(convolution, nn.BatchNorm2d(width), nn.ReLU(), *pool))
        super().__init__(*stages)
