"""ResNets in plain PyTorch (He et al. 2015), and the shapes of their batch-norm layers.

ResNet-18     basic blocks, 20 batch norms, 11.7 million parameters with 1000 classes
ResNet-50     bottlenecks, 53 batch norms, 25.6 million
"""

from collections import Counter

import torch
from torch import Tensor, nn


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut."""

    expansion = 1

    def __init__(self, before: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(before, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = _projection(before, width, stride)

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn1(self.conv1(x)))
        return self.relu(self.bn2(self.conv2(y)) + self.downsample(x))


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions and a shortcut."""

    expansion = 4

    def __init__(self, before: int, width: int, stride: int) -> None:
        super().__init__()
        after = width * self.expansion
        self.conv1 = nn.Conv2d(before, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, after, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(after)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = _projection(before, after, stride)

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.relu(self.bn2(self.conv2(y)))
        return self.relu(self.bn3(self.conv3(y)) + self.downsample(x))


class ResNet(nn.Module):
    """Four stages of blocks between a stem and a linear classifier."""

    def __init__(
        self, block: type[BasicBlock | Bottleneck], blocks: tuple[int, ...], *, channels: int = 3, classes: int = 1000
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, 64, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        before, stages = 64, []
        for stage, count in enumerate(blocks):
            width = 64 * 2**stage
            for place in range(count):
                stages.append(block(before, width, 2 if stage > 0 and place == 0 else 1))
                before = width * block.expansion
        self.stages = nn.Sequential(*stages)
        self.fc = nn.Linear(before, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        return self.fc(self.stages(x).mean((2, 3)))


def resnet18(**options: int) -> ResNet:
    return ResNet(BasicBlock, (2, 2, 2, 2), **options)


def resnet50(**options: int) -> ResNet:
    return ResNet(Bottleneck, (3, 4, 6, 3), **options)


def batch_norm_shapes(network: nn.Module, shape: tuple[int, ...]) -> Counter[tuple[int, ...]]:
    """How often the network has a batch norm of which input shape, for a batch of this shape."""
    found: Counter[tuple[int, ...]] = Counter()

    def note(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        found[tuple(inputs[0].shape)] += 1

    hooks = [m.register_forward_pre_hook(note) for m in network.modules() if isinstance(m, nn.BatchNorm2d)]
    with torch.device("meta"), torch.no_grad():
        network.to("meta")(torch.empty(shape))
    for hook in hooks:
        hook.remove()
    return found


def _projection(before: int, after: int, stride: int) -> nn.Module:
    if before == after and stride == 1:
        return nn.Identity()
    return nn.Sequential(nn.Conv2d(before, after, 1, stride, bias=False), nn.BatchNorm2d(after))
