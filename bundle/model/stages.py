"""An encoder as a row of stages, for freezing the first ones and for starting from what they give."""

from __future__ import annotations

from torch import Tensor, nn

from ..errors import InputError

__all__ = ["Stage", "freeze_stages", "stages_of"]

Stage = nn.Sequential
FORWARDS = ("monai.networks.nets.resnet.ResNet.forward", "torchvision.models.resnet.ResNet.forward")
LAYERS = ("layer1", "layer2", "layer3", "layer4")
PARTS = ("conv1", "bn1", "maxpool", "avgpool", *LAYERS)


class _Flatten(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1)


def stages_of(encoder: nn.Module) -> list[Stage]:
    """The stages of an encoder, which one after the other give what the encoder gives.

    A ResNet of MONAI or torchvision has five: stem, layer1, layer2, layer3, and layer4 with the pooling. Of a
    `torch.nn.Sequential` each child is one. The stages hold the encoder's own modules, not copies.

    Raises:
        InputError: the encoder is neither.
    """
    if isinstance(encoder, nn.Sequential) and type(encoder).forward is nn.Sequential.forward:
        return [nn.Sequential(child) for child in encoder]
    # A subclass with a forward of its own is another function, whatever its parts are called.
    known = f"{type(encoder).forward.__module__}.{type(encoder).forward.__qualname__}" in FORWARDS
    if not known or not all(_has(encoder, name) for name in PARTS):
        raise InputError(
            f"the stages of a {type(encoder).__name__} are not known: frozen_stages and recomputation with batch norm "
            "need a ResNet of MONAI or torchvision, or a torch.nn.Sequential"
        )
    activation = "act" if _has(encoder, "act") else "relu"
    stem = [encoder.get_submodule(name) for name in ("conv1", "bn1", activation)]
    if not getattr(encoder, "no_max_pool", False):
        stem.append(encoder.get_submodule("maxpool"))
    end = [encoder.get_submodule("layer4"), encoder.get_submodule("avgpool"), _Flatten()]
    if _has(encoder, "fc"):
        end.append(encoder.get_submodule("fc"))
    between = [nn.Sequential(encoder.get_submodule(name)) for name in LAYERS[:-1]]
    return [nn.Sequential(*stem), *between, nn.Sequential(*end)]


def _has(encoder: nn.Module, name: str) -> bool:
    return isinstance(getattr(encoder, name, None), nn.Module)


def freeze_stages(encoder: nn.Module, count: int) -> list[Stage]:
    """Freeze the first stages of an encoder: their weights are not trained.

    Args:
        encoder: see `stages_of`.
        count: 0 freezes nothing; the number of stages or more freezes all.

    Returns:
        The frozen stages.

    Raises:
        InputError: `count` is negative, or the stages are not known.
    """
    if count < 0:
        raise InputError(f"frozen_stages must be 0 or more, not {count}")
    stages = stages_of(encoder)[:count] if count else []
    for stage in stages:
        stage.requires_grad_(False)
    return stages
