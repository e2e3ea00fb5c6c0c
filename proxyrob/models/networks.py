"""Network architectures, each for any number of channels and any image size."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from proxyrob.config.models import Activation


class Normalise(nn.Module):
    """Subtract a mean and divide by a standard deviation, per channel.

    It is the first layer of every model, so that epsilon, sigma and radii stay in pixel units of [0,1] everywhere else.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        super().__init__()
        if len(mean) != len(std) or min(std) <= 0:
            raise ValueError(f"expected as many means as positive standard deviations, got {mean} and {std}")
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1))

    def forward(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        return (images - self.mean) / self.std


def activation_layer(activation: Activation) -> nn.Module:
    """The layer of that name."""
    match activation:
        case "relu":
            return nn.ReLU(inplace=True)
        case "silu":
            return nn.SiLU()


def projection_shortcut(channels_in: int, channels_out: int, stride: int) -> nn.Sequential:
    """A shortcut around a block: a 1×1 convolution with batch normalisation, or nothing where the shapes are the same."""
    if stride == 1 and channels_in == channels_out:
        return nn.Sequential()
    return nn.Sequential(nn.Conv2d(channels_in, channels_out, 1, stride=stride, bias=False), nn.BatchNorm2d(channels_out))


class Cnn(nn.Module):
    """3×3 convolutions without normalisation layers, each but the first with stride 2, then a linear layer."""

    def __init__(self, channels: int, height: int, width: int, num_classes: int, widths: tuple[int, ...]) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for position, channels_out in enumerate(widths):
            stride = 1 if position == 0 else 2
            layers += [nn.Conv2d(channels, channels_out, 3, stride=stride, padding=1), nn.ReLU(inplace=True)]
            channels, height, width = channels_out, -(-height // stride), -(-width // stride)
        self.features = nn.Sequential(*layers)
        self.head = nn.Linear(channels * height * width, num_classes)

    def forward(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b k"]:
        return self.head(self.features(images).flatten(1))


class BasicBlock(nn.Module):
    """Two 3×3 convolutions with batch normalisation and a shortcut (He et al. 2016)."""

    def __init__(self, channels_in: int, channels_out: int, stride: int, activation: Activation = "relu") -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels_out, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels_out)
        self.conv2 = nn.Conv2d(channels_out, channels_out, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels_out)
        self.shortcut = projection_shortcut(channels_in, channels_out, stride)
        self.activation = activation_layer(activation)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d i j"]:
        y = self.activation(self.bn1(self.conv1(x)))
        return self.activation(self.bn2(self.conv2(y)) + self.shortcut(x))


class Resnet(nn.Module):
    """A residual network: one stage per entry of ``widths``, each but the first halving the image."""

    def __init__(self, channels: int, num_classes: int, widths: tuple[int, ...], blocks_per_stage: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, widths[0], 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0])
        blocks = []
        channels_in = widths[0]
        for stage, width in enumerate(widths):
            for block in range(blocks_per_stage):
                blocks.append(BasicBlock(channels_in, width, stride=2 if stage > 0 and block == 0 else 1))
                channels_in = width
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(channels_in, num_classes)

    def forward(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b k"]:
        x = self.blocks(torch.relu(self.bn1(self.conv1(images))))
        return self.head(x.mean(dim=(2, 3)))
