"""A folded copy computes what the model computes in eval mode, and leaves the model alone."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from proxyrob.config.models import (
    CnnModel,
    ModelConfig,
    PreactResnetModel,
    ResnetModel,
    StandardResnetModel,
    WideResnetModel,
)
from proxyrob.models import Classifier, ClassifierCard, FoldedCopy, build_classifier
from tests.toys import random_images, same_state

COLOUR = (3, 16, 16)


def trained(model: ModelConfig) -> Classifier:
    """A classifier whose running statistics and normalisation weights are not those of a fresh one."""
    card = ClassifierCard(model=model, image_shape=COLOUR, num_classes=10, mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.25))
    classifier = build_classifier(card, 0).train()
    for step in range(3):
        classifier(random_images(16, shape=COLOUR, seed=step))
    with torch.no_grad():
        for layer in classifier.modules():
            if isinstance(layer, _BatchNorm):
                layer.weight.uniform_(0.5, 1.5, generator=torch.Generator().manual_seed(1))
                layer.bias.normal_(0.0, 0.3, generator=torch.Generator().manual_seed(2))
    return classifier


def plain_logits(classifier: nn.Module, images: Tensor) -> Tensor:
    """Logits of the model itself in eval mode."""
    flags = classifier.training
    with torch.no_grad():
        logits = classifier.eval()(images)
    classifier.train(flags)
    return logits


def count_norms(module: nn.Module) -> int:
    """How many batch normalisations a module has."""
    return sum(isinstance(layer, _BatchNorm) for layer in module.modules())


@pytest.mark.parametrize(
    ("model", "left"),
    [
        (CnnModel(widths=(4, 8)), 0),
        (ResnetModel(widths=(4, 8)), 0),
        (StandardResnetModel(base_channels=4), 0),
        (StandardResnetModel(depth=50, base_channels=4, activation="silu"), 0),
        (PreactResnetModel(base_channels=4), 9),  # one before each of 8 blocks, and the last
        (PreactResnetModel(base_channels=4, variant="deepmind"), 9),
        (WideResnetModel(depth=10, width=1), 4),
        (WideResnetModel(depth=10, width=1, variant="deepmind"), 4),
    ],
)
def test_every_network(model: ModelConfig, left: int) -> None:
    """Logits and input gradients are the model's to rounding; only normalisations that follow no convolution are left."""
    classifier, images = trained(model), random_images(6, shape=COLOUR, seed=9)
    copy = FoldedCopy(classifier, example=images[:2])
    expected = plain_logits(classifier, images)
    assert count_norms(copy) == left
    torch.testing.assert_close(copy(images), expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))

    def gradient(network: nn.Module) -> Tensor:
        leaf = images.clone().requires_grad_(True)
        (found,) = torch.autograd.grad(network(leaf).square().sum(), leaf)
        return found

    ours = gradient(copy)
    classifier.eval()
    theirs = gradient(classifier)
    assert float((ours - theirs).norm() / theirs.norm()) < 1e-3


def test_model_untouched() -> None:
    """Building a copy changes no weight, statistic or mode of the model, and asks for no gradient of it."""
    classifier = trained(ResnetModel(widths=(4, 8)))
    before = {name: tensor.clone() for name, tensor in classifier.state_dict().items()}
    copy = FoldedCopy(classifier, example=random_images(2, shape=COLOUR))
    copy(random_images(4, shape=COLOUR).requires_grad_(True)).sum().backward()
    assert same_state(before, classifier.state_dict())
    assert classifier.training
    assert all(module.training for module in classifier.modules())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in classifier.parameters())
    assert not any(parameter.requires_grad for parameter in copy.parameters())
    assert not copy.train().network.training


def test_refresh() -> None:
    """The copy follows weights and statistics when it is told to, and not before."""
    classifier, images = trained(ResnetModel(widths=(4, 8))), random_images(6, shape=COLOUR, seed=9)
    copy = FoldedCopy(classifier, example=images[:2])
    before = copy(images)
    optimizer = torch.optim.SGD(classifier.parameters(), lr=0.5)
    classifier(images).square().sum().backward()
    optimizer.step()
    assert torch.equal(copy(images), before)
    copy.refresh()
    assert not torch.allclose(copy(images), before, atol=1e-2)
    torch.testing.assert_close(copy(images), plain_logits(classifier, images), rtol=1e-4, atol=1e-3)


def test_bfloat16() -> None:
    """In bfloat16 the layers compute in it; images and logits are float32, and near those of the model."""
    classifier, images = trained(PreactResnetModel(base_channels=4)), random_images(8, shape=COLOUR, seed=9)
    copy = FoldedCopy(classifier, torch.bfloat16, example=images[:2])
    seen = []
    head = copy.network.get_submodule("network.linear")
    head.register_forward_hook(lambda _module, _given, output: seen.append(output.dtype))
    logits, expected = copy(images), plain_logits(classifier, images)
    assert seen == [torch.bfloat16]
    assert logits.dtype == torch.float32
    assert 0.0 < float((logits - expected).abs().max()) < 0.1 * float(expected.abs().max())


class SharedNorm(nn.Module):
    """One normalisation that two convolutions share."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 3, 3, padding=1)
        self.norm = nn.BatchNorm2d(3)

    def forward(self, images: Tensor) -> Tensor:
        return self.norm(self.second(self.norm(self.first(images)))).mean(dim=(2, 3))


class Tapped(nn.Module):
    """A convolution whose output is used before its normalisation, too."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)
        nn.init.constant_(self.norm.weight, 3.0)

    def forward(self, images: Tensor) -> Tensor:
        y = self.conv(images)
        return (self.norm(y) + y).mean(dim=(2, 3))


@pytest.mark.parametrize("module", [SharedNorm, Tapped])
def test_what_cannot_be_folded(module: type[nn.Module]) -> None:
    """Where folding would change the logits, the copy keeps the normalisation."""
    torch.manual_seed(0)
    model, images = module().train(), random_images(6, shape=COLOUR, seed=9)
    model(images)
    copy = FoldedCopy(model, example=images[:2])
    assert copy.pairs == ()
    assert count_norms(copy) == 1
    torch.testing.assert_close(copy(images), plain_logits(model, images))


def test_many_images_are_read_piece_by_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the CPU no layer is given more values than its caches hold; logits and gradients are those of all images at once."""
    classifier, images = trained(ResnetModel(widths=(4, 8))), random_images(7, shape=COLOUR, seed=9)
    copy = FoldedCopy(classifier, example=images[:2])
    sizes: list[int] = []
    copy.network.register_forward_hook(lambda _module, given, _output: sizes.append(len(given[0])))

    def read() -> tuple[Tensor, Tensor]:
        leaf = images.clone().requires_grad_(True)
        logits = copy(leaf)
        return logits.detach(), torch.autograd.grad(logits.square().sum(), leaf)[0]

    at_once = read()
    monkeypatch.setattr("proxyrob.models.folded.VALUES_AT_ONCE", 3 * images[0].numel())
    torch.testing.assert_close(read(), at_once)
    assert sizes == [7, 3, 3, 1]
