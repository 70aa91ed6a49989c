"""What others would write for the same task: stock MONAI transforms and loops, and the heads of MONAI and torchmil."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from monai.data import PersistentDataset
from monai.inferers import SimpleInferer
from monai.networks.nets import MILModel, ResNet
from monai.transforms import (
    Compose,
    CropForegroundd,
    EnsureChannelFirstd,
    LoadImaged,
    Orientationd,
    RandAffined,
    RandFlipd,
    RandGaussianNoised,
    RandLambdad,
    RandScaleIntensityd,
    RandShiftIntensityd,
    Resized,
    ScaleIntensityRangePercentilesd,
)
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader
from torchmil.models import DSMIL

from bundle.model.bag_network import BagOutput
from bundle.training.engine import autocast_dtype

__all__ = [
    "Flattened",
    "PlainNetwork",
    "StockInference",
    "StockTraining",
    "monai_mean",
    "stock_encoder",
    "stock_loader",
    "stock_transforms",
    "torchmil_dsmil",
]

Loss = Callable[[Tensor, Tensor], Tensor]


def stock_encoder(norm: str, shape: dict[str, Any], num_groups: int = 8) -> nn.Module:
    """MONAI's ResNet as it comes, contiguous and in float32; for "group" its batch norms become torch's group norms.

    Args:
        norm: "batch" or "group".
        shape: arguments of monai.networks.nets.ResNet.
        num_groups: of a group norm.
    """
    encoder = ResNet(**shape)
    if norm == "group":
        for parent in list(encoder.modules()):
            for name, child in list(parent.named_children()):
                if isinstance(child, nn.BatchNorm2d):
                    setattr(parent, name, nn.GroupNorm(num_groups, child.num_features))
    return encoder


class Flattened(nn.Module):
    """An encoder of slices, for models that hand it whole bags (B, N, C, H, W) and expect (B, N, F)."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, bags: Tensor) -> Tensor:
        return self.encoder(bags.flatten(0, -4)).unflatten(0, bags.shape[:-3])


class PlainNetwork(nn.Module):
    """The project's dual-stream head on an encoder that is called on all slices at once, as they lie in memory.

    Args:
        encoder: maps (M, C, H, W) to (M, F).
        network: a DualStreamMIL, of which a copy without its encoder is used.
    """

    def __init__(self, encoder: nn.Module, network: nn.Module) -> None:
        super().__init__()
        self.slices, self.network = Flattened(encoder), copy.deepcopy(network)
        self.network.encoder = nn.Identity()

    def forward(self, bags: Tensor) -> Tensor:
        """Logits (B, K) of bags (B, N, C, H, W)."""
        return self.explain(bags).logits

    def explain(self, bags: Tensor) -> BagOutput:
        """Logits and evidence of bags."""
        features = self.slices(bags).float()
        mask = torch.ones(features.shape[:2], dtype=torch.bool, device=features.device)
        with torch.autocast(features.device.type, enabled=False):
            return self.network.head(features, mask)


def torchmil_dsmil(encoder: nn.Module, side: int, bag_size: int) -> tuple[nn.Module, Loss]:
    """torchmil's DSMIL around the encoder, with its own loss (bag plus critical instance)."""
    model = DSMIL((bag_size, 1, side, side), nonlinear_q=True, nonlinear_v=True, feat_ext=Flattened(encoder))

    def loss(bags: Tensor, labels: Tensor) -> Tensor:
        return sum(model.compute_loss(labels, bags)[1].values(), torch.zeros(()))

    return model, loss


def monai_mean(encoder: nn.Module, num_features: int) -> tuple[nn.Module, Loss]:
    """MONAI's MILModel in its mode "mean" (of the logits of all slices) around the encoder, and cross entropy."""
    model = MILModel(2, "mean", pretrained=False, backbone=encoder, backbone_num_features=num_features)
    return model, lambda bags, labels: functional.cross_entropy(model(bags), labels)


def stock_transforms(side: int) -> list[Any]:
    """File → (1, side, side, slices) in [0, 1], by stock transforms alone."""
    with warnings.catch_warnings():
        # It registers every reader there is, one of which is for a GPU.
        warnings.filterwarnings("ignore", "NvImgCodecPydicomReader", UserWarning)
        load = LoadImaged("image")
    return [
        load,
        EnsureChannelFirstd("image"),
        Orientationd("image", axcodes="RAS", labels=None),
        CropForegroundd("image", "image", select_fn=_body, allow_smaller=True, margin=2),
        ScaleIntensityRangePercentilesd("image", 1, 99, 0.0, 1.0, clip=True),
        Resized("image", (side, side, -1)),
    ]


def _body(volume: Tensor) -> Tensor:
    return volume > volume.min() + 0.1 * (volume.max() - volume.min())


class _Draw:
    """`size` random slices of a volume (1, H, W, N) as channels (size, H, W)."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __call__(self, volume: Tensor) -> Tensor:
        chosen = torch.randperm(volume.shape[-1])[: self.size]
        return volume[0, :, :, chosen].permute(2, 0, 1).contiguous()


def stock_loader(
    images: Sequence[str], side: int, bag_size: int, batch_size: int, cache_dir: Path, augment: bool
) -> DataLoader:
    """MONAI's PersistentDataset of whole prepared volumes, a random draw of slices, and (B, N, H, W) batches.

    Slices are channels of one 2D image, so that MONAI's 2D transforms move all of them alike and change the intensity
    of each by itself.
    """
    random: list[Any] = [RandLambdad("image", _Draw(bag_size), prob=1.0)]
    if augment:
        random += [
            RandAffined(
                "image", prob=0.8, rotate_range=0.17, scale_range=(0.1, 0.1),
                translate_range=(0.05 * side, 0.05 * side), padding_mode="zeros",
            ),
            RandFlipd("image", prob=0.5, spatial_axis=0),
            RandScaleIntensityd("image", factors=0.1, prob=0.5, channel_wise=True),
            RandShiftIntensityd("image", offsets=0.1, prob=0.5, channel_wise=True),
            RandGaussianNoised("image", prob=0.5, std=0.02),
        ]  # fmt: skip
    data = [{"image": image, "label": number % 2} for number, image in enumerate(images)]
    dataset = PersistentDataset(data, Compose([*stock_transforms(side), *random]), cache_dir)
    return DataLoader(dataset, batch_size, shuffle=True)


class StockTraining:
    """The loop of MONAI's tutorials: batch, zero_grad, loss, backward, step.

    Args:
        model: its parameters are trained by AdamW.
        loss: (bags (B, N, 1, H, W), labels (B,)) → a scalar.
        loader: see `stock_loader`.
        device: of the model.
        typed: in this project's type and layout: mixed precision and channels-last. Else float32, contiguous.
    """

    def __init__(
        self, model: nn.Module, loss: Loss, loader: DataLoader, device: torch.device, typed: bool = False
    ) -> None:
        self.loss, self.loader, self.device = loss, loader, device
        self.model, self.low = _placed(model, device, typed)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, weight_decay=1e-4)

    def epoch(self) -> None:
        """Every batch of the loader once."""
        self.model.train()
        for batch in self.loader:
            bags, labels = batch["image"].unsqueeze(2).to(self.device), batch["label"].to(self.device)
            self.optimizer.zero_grad()
            with torch.autocast(self.device.type, dtype=self.low, enabled=self.low is not None):
                loss = self.loss(bags, labels)
            loss.backward()
            self.optimizer.step()


class StockInference:
    """File → probabilities (K,) by LoadImaged with the reader that it chooses, stock transforms and SimpleInferer.

    Args:
        network: maps (B, N, C, H, W) to logits (B, K).
        side: of a slice in pixels.
        device: of the network.
        typed: as for StockTraining.
    """

    def __init__(self, network: nn.Module, side: int, device: torch.device, typed: bool = False) -> None:
        self.transforms, self.inferer, self.device = Compose(stock_transforms(side)), SimpleInferer(), device
        self.network, self.low = _placed(network.eval(), device, typed)

    def __call__(self, path: str) -> Tensor:
        volume = self.transforms({"image": path})["image"].as_tensor()  # (1, H, W, N)
        bag = volume.permute(3, 0, 1, 2).contiguous()[None].to(self.device)  # (1, N, 1, H, W)
        precision = torch.autocast(self.device.type, dtype=self.low, enabled=self.low is not None)
        with torch.no_grad(), precision:
            return self.inferer(bag, self.network).float().softmax(dim=-1)[0]


def _placed(network: nn.Module, device: torch.device, typed: bool) -> tuple[nn.Module, torch.dtype | None]:
    if not typed:
        return network.to(device), None
    return network.to(device, memory_format=torch.channels_last), autocast_dtype(device, True)
