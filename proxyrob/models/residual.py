"""Residual networks of the literature, each with the parameter names under which its robust checkpoints are published.

All take images of any size and any number of channels, and end in an average over all pixels. Batch normalisation follows
each convolution that it belongs to as a named neighbour (``conv1``, ``bn1``), so that the pair can be made one convolution.
"""

from collections import OrderedDict
from collections.abc import Callable
from functools import partial

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from proxyrob.config.models import Activation
from proxyrob.models.networks import BasicBlock, activation_layer, projection_shortcut

MakeBlock = Callable[[int, int, int], nn.Module]
"""A block by its channels in, its channels out and its stride."""

_BLOCKS_PER_STAGE = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3)}


class Bottleneck(nn.Module):
    """Convolutions of 1×1, 3×3 and 1×1, the first two with a quarter of the channels (He et al. 2016)."""

    def __init__(self, channels_in: int, channels_out: int, stride: int, activation: Activation) -> None:
        super().__init__()
        inner = channels_out // 4
        self.conv1 = nn.Conv2d(channels_in, inner, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(inner)
        self.conv2 = nn.Conv2d(inner, inner, 3, stride=stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(inner)
        self.conv3 = nn.Conv2d(inner, channels_out, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(channels_out)
        self.shortcut = projection_shortcut(channels_in, channels_out, stride)
        self.activation = activation_layer(activation)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d i j"]:
        y = self.activation(self.bn1(self.conv1(x)))
        y = self.activation(self.bn2(self.conv2(y)))
        return self.activation(self.bn3(self.conv3(y)) + self.shortcut(x))


class StandardResnet(nn.Module):
    """ResNet-18, -34 and -50 (He et al. 2016, table 1).

    Differs from the source: the stem is a 3×3 convolution with stride 1 and without pooling, as is usual for CIFAR.
    """

    def __init__(self, channels: int, num_classes: int, depth: int, base_channels: int, activation: Activation) -> None:
        super().__init__()
        width = base_channels if depth < 50 else 4 * base_channels
        block: MakeBlock = partial(BasicBlock if depth < 50 else Bottleneck, activation=activation)
        self.conv1 = nn.Conv2d(channels, base_channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(base_channels)
        self.activation = activation_layer(activation)
        stages = _stages(block, base_channels, width, _BLOCKS_PER_STAGE[depth])
        self.layer1, self.layer2, self.layer3, self.layer4 = stages
        self.linear = nn.Linear(8 * width, num_classes)
        _initialise(self)

    def forward(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b k"]:
        x = self.activation(self.bn1(self.conv1(images)))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.linear(x.mean(dim=(2, 3)))


class PreactBlock(nn.Module):
    """Normalisation and activation before each of two convolutions; a projection shares the first (He et al. 2016b)."""

    def __init__(self, channels_in: int, channels_out: int, stride: int, activation: Activation) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(channels_in)
        self.conv1 = nn.Conv2d(channels_in, channels_out, 3, stride=stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels_out)
        self.conv2 = nn.Conv2d(channels_out, channels_out, 3, padding=1, bias=False)
        self.shortcut = None
        if stride != 1 or channels_in != channels_out:
            self.shortcut = nn.Sequential(nn.Conv2d(channels_in, channels_out, 1, stride=stride, bias=False))
        self.activation = activation_layer(activation)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d i j"]:
        y = self.activation(self.bn1(x))
        shortcut = x if self.shortcut is None else self.shortcut(y)
        return self.conv2(self.activation(self.bn2(self.conv1(y)))) + shortcut


class PreactResnet(nn.Module):
    """ResNet-18 and -34 of blocks with pre-activation (He et al. 2016b).

    Differs from the source: the stem is a 3×3 convolution with stride 1 and without pooling, as is usual for CIFAR.
    """

    def __init__(self, channels: int, num_classes: int, depth: int, base_channels: int, activation: Activation) -> None:
        super().__init__()
        block: MakeBlock = partial(PreactBlock, activation=activation)
        self.conv1 = nn.Conv2d(channels, base_channels, 3, padding=1, bias=False)
        stages = _stages(block, base_channels, base_channels, _BLOCKS_PER_STAGE[depth])
        self.layer1, self.layer2, self.layer3, self.layer4 = stages
        self.bn = nn.BatchNorm2d(8 * base_channels)
        self.activation = activation_layer(activation)
        self.linear = nn.Linear(8 * base_channels, num_classes)
        _initialise(self)

    def forward(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b k"]:
        x = self.layer4(self.layer3(self.layer2(self.layer1(self.conv1(images)))))
        return self.linear(self.activation(self.bn(x)).mean(dim=(2, 3)))


class WideBlock(nn.Module):
    """The block with pre-activation, under the names of wide residual networks (Zagoruyko & Komodakis 2016)."""

    def __init__(self, channels_in: int, channels_out: int, stride: int, activation: Activation) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(channels_in)
        self.conv1 = nn.Conv2d(channels_in, channels_out, 3, stride=stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels_out)
        self.conv2 = nn.Conv2d(channels_out, channels_out, 3, padding=1, bias=False)
        self.convShortcut = None  # spelt as in the published checkpoints
        if channels_in != channels_out:
            self.convShortcut = nn.Conv2d(channels_in, channels_out, 1, stride=stride, bias=False)
        self.activation = activation_layer(activation)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d i j"]:
        y = self.activation(self.bn1(x))
        shortcut = x if self.convShortcut is None else self.convShortcut(y)
        return self.conv2(self.activation(self.bn2(self.conv1(y)))) + shortcut


class WideResnet(nn.Module):
    """WRN-``depth``-``width`` (Zagoruyko & Komodakis 2016), without dropout."""

    def __init__(self, channels: int, num_classes: int, depth: int, width: int, activation: Activation) -> None:
        super().__init__()
        count = (depth - 4) // 6
        block: MakeBlock = partial(WideBlock, activation=activation)
        self.conv1 = nn.Conv2d(channels, 16, 3, padding=1, bias=False)
        stages = _stages(block, 16, 16 * width, (count, count, count))
        self.block1, self.block2, self.block3 = (_group("layer", stage) for stage in stages)
        self.bn1 = nn.BatchNorm2d(64 * width)
        self.activation = activation_layer(activation)
        self.fc = nn.Linear(64 * width, num_classes)
        _initialise(self)

    def forward(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b k"]:
        x = self.block3(self.block2(self.block1(self.conv1(images))))
        return self.fc(self.activation(self.bn1(x)).mean(dim=(2, 3)))


class SameConv(nn.Conv2d):
    """A 3×3 convolution with TensorFlow's «SAME» padding.

    With stride 2 that is a pixel at the bottom and on the right where the size is even, on all sides where it is odd.
    """

    def __init__(self, channels_in: int, channels_out: int, stride: int) -> None:
        super().__init__(channels_in, channels_out, 3, stride=stride, padding=1 if stride == 1 else 0, bias=False)

    def forward(self, input: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d i j"]:  # noqa: A002  (torch's own name)
        if self.stride == (2, 2):
            height, width = input.shape[2:]
            input = F.pad(input, (width % 2, 1, height % 2, 1))  # noqa: A001  (torch's own name)
        return super().forward(input)


class DeepmindPreactBlock(nn.Module):
    """The block with pre-activation of Gowal et al. 2021: a projection is 3×3 and takes the input itself."""

    def __init__(self, channels_in: int, channels_out: int, stride: int, activation: Activation) -> None:
        super().__init__()
        self.batchnorm_0 = nn.BatchNorm2d(channels_in)
        self.conv_2d_1 = SameConv(channels_in, channels_out, stride)
        self.batchnorm_1 = nn.BatchNorm2d(channels_out)
        self.conv_2d_2 = SameConv(channels_out, channels_out, 1)
        self.shortcut = None
        if stride != 1 or channels_in != channels_out:
            self.shortcut = SameConv(channels_in, channels_out, stride)
        self.activation = activation_layer(activation)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d i j"]:
        y = self.conv_2d_1(self.activation(self.batchnorm_0(x)))
        shortcut = x if self.shortcut is None else self.shortcut(x)
        return self.conv_2d_2(self.activation(self.batchnorm_1(y))) + shortcut


class DeepmindPreactResnet(nn.Module):
    """ResNet-18 and -34 with pre-activation as in Gowal et al. 2021 and Rebuffi et al. 2021."""

    def __init__(self, channels: int, num_classes: int, depth: int, base_channels: int, activation: Activation) -> None:
        super().__init__()
        block: MakeBlock = partial(DeepmindPreactBlock, activation=activation)
        self.conv_2d = SameConv(channels, base_channels, 1)
        stages = _stages(block, base_channels, base_channels, _BLOCKS_PER_STAGE[depth])
        self.layer_0, self.layer_1, self.layer_2, self.layer_3 = stages
        self.batchnorm = nn.BatchNorm2d(8 * base_channels)
        self.activation = activation_layer(activation)
        self.logits = nn.Linear(8 * base_channels, num_classes)
        _initialise(self)

    def forward(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b k"]:
        x = self.layer_3(self.layer_2(self.layer_1(self.layer_0(self.conv_2d(images)))))
        return self.logits(self.activation(self.batchnorm(x)).mean(dim=(2, 3)))


class DeepmindWideBlock(nn.Module):
    """The block of wide residual networks of Gowal et al. 2020: strided convolutions have «SAME» padding."""

    def __init__(self, channels_in: int, channels_out: int, stride: int, activation: Activation) -> None:
        super().__init__()
        self.batchnorm_0 = nn.BatchNorm2d(channels_in)
        self.conv_0 = SameConv(channels_in, channels_out, stride)
        self.batchnorm_1 = nn.BatchNorm2d(channels_out)
        self.conv_1 = SameConv(channels_out, channels_out, 1)
        self.shortcut = None
        if channels_in != channels_out:
            self.shortcut = nn.Conv2d(channels_in, channels_out, 1, stride=stride, bias=False)
        self.activation = activation_layer(activation)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d i j"]:
        y = self.activation(self.batchnorm_0(x))
        shortcut = x if self.shortcut is None else self.shortcut(y)
        return self.conv_1(self.activation(self.batchnorm_1(self.conv_0(y)))) + shortcut


class DeepmindWideResnet(nn.Module):
    """WRN-``depth``-``width`` as in Gowal et al. 2020 and the works that build on it."""

    def __init__(self, channels: int, num_classes: int, depth: int, width: int, activation: Activation) -> None:
        super().__init__()
        count = (depth - 4) // 6
        block: MakeBlock = partial(DeepmindWideBlock, activation=activation)
        self.init_conv = SameConv(channels, 16, 1)
        stages = _stages(block, 16, 16 * width, (count, count, count))
        self.layer = nn.Sequential(*(_group("block", stage) for stage in stages))
        self.batchnorm = nn.BatchNorm2d(64 * width)
        self.activation = activation_layer(activation)
        self.logits = nn.Linear(64 * width, num_classes)
        _initialise(self)

    def forward(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b k"]:
        x = self.layer(self.init_conv(images))
        return self.logits(self.activation(self.batchnorm(x)).mean(dim=(2, 3)))


def _stages(block: MakeBlock, channels_in: int, width: int, counts: tuple[int, ...]) -> list[nn.Sequential]:
    """One stage per entry of ``counts``, its number of blocks; each but the first doubles the channels and halves the image."""
    stages = []
    for position, count in enumerate(counts):
        channels_out = width * 2**position
        first = block(channels_in, channels_out, 1 if position == 0 else 2)
        stages.append(nn.Sequential(first, *(block(channels_out, channels_out, 1) for _ in range(count - 1))))
        channels_in = channels_out
    return stages


def _group(name: str, stage: nn.Sequential) -> nn.Sequential:
    """A stage that is called ``name`` within its group, as in the published checkpoints."""
    return nn.Sequential(OrderedDict([(name, stage)]))


def _initialise(network: nn.Module) -> None:
    """Weights of He et al. 2015 for convolutions, by their outputs; normalisation layers are 1 and 0 from the start."""
    for module in network.modules():
        match module:
            case nn.Conv2d():
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            case nn.Linear():
                nn.init.zeros_(module.bias)
