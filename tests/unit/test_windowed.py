"""A model read again where a window changed gives what it gives when it is read whole."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from proxyrob.attacks.windowed import WindowedModel
from proxyrob.attacks.windows import Convolution, Window
from proxyrob.config.models import CnnModel, ModelConfig, PreactResnetModel, ResnetModel, StandardResnetModel, WideResnetModel
from proxyrob.models import ClassifierCard, FoldedCopy, build_classifier
from tests.toys import random_images

SHAPE = (3, 20, 18)
PLACES = [(0, 0), (17, 15), (0, 15), (17, 0), (8, 7), (1, 14)]
"""Corners, edges and the inside."""


def _network(model: ModelConfig) -> nn.Module:
    card = ClassifierCard(model=model, image_shape=SHAPE, num_classes=10, mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.25))
    classifier = build_classifier(card, 0).train()
    classifier(random_images(16, shape=SHAPE))
    return classifier.eval().requires_grad_(False)


def _compare(model: nn.Module, images: Tensor, *, side: int = 3, tolerance: float = 1e-5) -> WindowedModel:
    """Change windows one after the other, take some over, let some images leave."""
    windowed, images = WindowedModel(model, images, side, side), images.clone()
    for number, (top, left) in enumerate(PLACES):
        window = Window(top, left, side, side)
        patch = random_images(len(images), shape=(images.shape[1], side, side), seed=number)
        changed = images.clone()
        changed[window.place] = patch
        found, expected = windowed.read(patch, window), model(changed)
        assert float((found - expected).abs().max()) <= tolerance * float(expected.abs().max())
        rows = torch.arange(len(images)) % 2 == number % 2
        windowed.accept(rows)
        images[rows] = changed[rows]
        if number == 3:
            stays = torch.tensor([True, False, True, True])
            windowed.keep(stays)
            images = images[stays]
    assert windowed.is_right()
    return windowed


@pytest.mark.parametrize(
    "model",
    [
        CnnModel(widths=(4, 8, 8)),
        ResnetModel(widths=(4, 8)),
        StandardResnetModel(base_channels=4),
        PreactResnetModel(base_channels=4),
        WideResnetModel(depth=10, width=1),
        WideResnetModel(depth=10, width=1, variant="deepmind"),
    ],
    ids=lambda model: f"{model.kind} {getattr(model, 'variant', '')}",
)
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16, None])
def test_logits_are_those_of_the_whole_model(model: ModelConfig, precision: torch.dtype | None) -> None:
    """For networks of the field, folded or not, wherever the window lies, after some images took patches over and some left."""
    network, images = _network(model), random_images(4, shape=SHAPE)
    read = network if precision is None else FoldedCopy(network, precision, example=images)
    with torch.no_grad():
        windowed = _compare(read, images, tolerance=0.02 if precision == torch.bfloat16 else 1e-5)
    assert windowed.saved_operations > 0


def test_windows_are_followed_in_more_images_than_are_read_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A folded copy that reads many images piece by piece shows all of them to whoever follows them."""
    images = random_images(4, shape=SHAPE)
    copy = FoldedCopy(_network(CnnModel(widths=(4, 8, 8))), example=images)
    monkeypatch.setattr("proxyrob.models.folded.VALUES_AT_ONCE", images[0].numel())
    with torch.no_grad():
        assert _compare(copy, images).saved_operations > 0


class _Custom(nn.Module):
    """A convolution, then anything."""

    def __init__(self, then: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1).requires_grad_(False)
        self.then = then

    def forward(self, images: Tensor) -> Tensor:
        return self.then(self.conv(images), images).flatten(1).sum(1, keepdim=True)


@pytest.mark.parametrize(
    "then",
    [
        lambda x, images: F.max_pool2d(x, 2) ** 2,
        lambda x, images: F.conv2d(x, torch.ones(2, 4, 3, 3), padding=2, dilation=2) ** 2,
        lambda x, images: F.conv2d(x, torch.ones(2, 4, 3, 3), padding="same") ** 2,
        lambda x, images: F.conv2d(x, torch.ones(4, 1, 3, 3), groups=4).abs_(),
        lambda x, images: F.relu(x, inplace=True) + x,
        lambda x, images: (x.add_(1.0) * x).relu_(),
        lambda x, images: F.avg_pool2d(x, x.shape[2:]) ** 2 * x.size(0),
        lambda x, images: torch.cat([x, images], dim=1) ** 2,
        lambda x, images: x * torch.linspace(0, 1, 18) + F.batch_norm(x, torch.zeros(4), torch.ones(4), training=True),
        lambda x, images: x + F.pad(images[:, :1], (0, 0, 0, 0)) + torch.linspace(0, 1, 20)[:, None],
        lambda x, images: (x - x.mean(dim=1, keepdim=True)) ** 2 + len(x) + x.dim(),
        lambda x, images: [x.__setitem__((0, 0), 1.0), x * 2][1],
        lambda x, images: [x.__iadd__(x), x * 2][1],
    ],
)
def test_layers_that_are_not_followed_are_read_whole(then: Callable[[Tensor, Tensor], Tensor]) -> None:
    """Pooling, dilation, functions that change their input, sizes asked for, statistics over the batch: the logits are right
    whatever comes after the layers that can be followed."""
    torch.manual_seed(0)
    with torch.no_grad():
        _compare(_Custom(then), random_images(4, shape=SHAPE))


def test_what_is_not_followed_rightly_is_noticed() -> None:
    """A function that changes another tensor's memory through a view is not seen; that the logits are wrong then, is."""
    with torch.no_grad():
        windowed = WindowedModel(_Custom(lambda x, images: [x[:, :1].mul_(3.0), x**2][1]), random_images(4, shape=SHAPE), 3, 3)
        assert not windowed.is_right()


def test_a_large_window_is_not_followed() -> None:
    """Where most of the image changes there is nothing to save, and nothing but the images is kept."""
    network = _network(ResnetModel(widths=(4, 8)))
    with torch.no_grad():
        windowed = WindowedModel(network, random_images(4, shape=SHAPE), 18, 16)
    assert windowed.saved_operations == 0
    assert windowed.size_bytes == 4 * 3 * 20 * 18 * 4


@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize(("kernel", "padding"), [(1, 0), (2, 0), (3, 1), (5, 1)])
def test_the_outputs_that_see_a_window_are_found(stride: int, kernel: int, padding: int) -> None:
    """By trying: every output that changes with a pixel of the window is inside, and their number is the same everywhere."""
    weight = torch.ones(1, 1, kernel, kernel)
    convolution = Convolution(weight, None, (stride, stride), (padding, padding), 1)
    images = torch.zeros(1, 1, 11, 13)
    outputs = F.conv2d(images, weight, stride=stride, padding=padding)
    whole = Window(0, 0, *outputs.shape[2:])
    for top in range(9):
        for left in range(11):
            window = Window(top, left, 3, 3)
            images.zero_()[window.place] = 1.0
            changed = F.conv2d(images, weight, stride=stride, padding=padding)
            reached = convolution.reached(window, whole)
            assert (reached.height, reached.width) == ((1 + kernel) // stride + 1,) * 2
            changed[reached.place] = 0.0
            assert not bool(changed.any())
