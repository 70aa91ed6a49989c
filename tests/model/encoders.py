"""Small encoders of the kinds that users bring: MONAI's and torchvision's ResNets."""

import torch
from monai.networks.nets import ResNet
from torch import nn

PLANES = [8, 8, 16, 16]


def resnet(channels: int = 1, planes=PLANES, seed: int = 0, layers=(1, 1, 1, 1)) -> ResNet:
    """A small one of the kind in train.yaml."""
    torch.manual_seed(seed)
    return ResNet(
        "basic", list(layers), list(planes), spatial_dims=2, n_input_channels=channels, conv1_t_stride=2,
        bias_downsample=False, feed_forward=False,
    )  # fmt: skip


class Block(nn.Module):
    def __init__(self, before: int, planes: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(before, planes, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.relu = nn.ReLU()
        self.conv2 = nn.Conv2d(planes, planes, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.downsample = None
        if stride > 1 or before != planes:
            self.downsample = nn.Sequential(nn.Conv2d(before, planes, 1, stride, bias=False), nn.BatchNorm2d(planes))

    def forward(self, x):
        y = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        return self.relu(y + (x if self.downsample is None else self.downsample(x)))


class Torchvision(nn.Module):
    """A ResNet with the names, shapes and order of torchvision's, written for this test."""

    def __init__(self, channels: int = 3, planes=PLANES, blocks: int = 1, seed: int = 1) -> None:
        torch.manual_seed(seed)
        super().__init__()
        self.conv1 = nn.Conv2d(channels, planes[0], 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(planes[0])
        self.relu = nn.ReLU()
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        before = planes[0]
        for number, width in enumerate(planes, 1):
            stages = []
            for block in range(blocks):
                stages.append(Block(before, width, 2 if number > 1 and block == 0 else 1))
                before = width
            self.add_module(f"layer{number}", nn.Sequential(*stages))
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(before, 10)
        for name, buffer in self.named_buffers():  # as if trained
            if "running" in name:
                buffer.copy_(0.1 * torch.rand_like(buffer) + (0.1 if "var" in name else 0))

    def features(self, x):
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        return self.avgpool(self.layer4(self.layer3(self.layer2(self.layer1(x))))).flatten(1)

    def forward(self, x):
        return self.fc(self.features(x))


# Their stages are known by where the class comes from.
Torchvision.forward.__module__, Torchvision.forward.__qualname__ = "torchvision.models.resnet", "ResNet.forward"
