"""A small convolutional net with GELU activations, for small images such as digits of 8x8 pixels."""

from __future__ import annotations

from torch import Tensor, nn


class GeluNet(nn.Module):
    """Three blocks of convolution, BatchNorm and GELU, then average pooling and a linear head `fc`.

    Input: batch x `in_channels` x height x width, of any height and width; the second and third block halve
    them. Output: batch x `num_classes`. 94,762 parameters for 3 channels and 10 classes, initialised as torch
    does. It is not a published architecture; use it where the large smooth backbones are too slow.

    >>> import torch
    >>> GeluNet(num_classes=10, in_channels=1)(torch.zeros(2, 1, 8, 8)).shape
    torch.Size([2, 10])
    """

    def __init__(self, num_classes: int, in_channels: int = 3) -> None:
        super().__init__()
        self.features = nn.Sequential(
            *_block(in_channels, 32, stride=1), *_block(32, 64, stride=2), *_block(64, 128, stride=2)
        )
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(128, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.fc(self.avgpool(self.features(x)).flatten(1))
        return scores


def _block(inputs: int, outputs: int, stride: int) -> list[nn.Module]:
    convolution = nn.Conv2d(inputs, outputs, kernel_size=3, stride=stride, padding=1, bias=False)
    return [convolution, nn.BatchNorm2d(outputs), nn.GELU()]
