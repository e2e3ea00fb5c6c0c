"""The networks of the literature: their sizes, their names, and what images they take."""

from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from pydantic import ValidationError
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from proxyrob.config import CnnModel, ModelConfig, ResnetModel
from proxyrob.config.models import PreactResnetModel, StandardResnetModel, WideResnetModel
from proxyrob.export import write_onnx
from proxyrob.models import Classifier, ClassifierCard, build_classifier, read_classifier, save_classifier
from tests.toys import random_images, same_state

Shape = tuple[int, int, int]

SMALL: dict[str, ModelConfig] = {
    "resnet-18": StandardResnetModel(depth=18, base_channels=4),
    "resnet-34": StandardResnetModel(depth=34, base_channels=4),
    "resnet-50": StandardResnetModel(depth=50, base_channels=4),
    "resnet-18-silu": StandardResnetModel(depth=18, base_channels=4, activation="silu"),
    "preact-18": PreactResnetModel(depth=18, base_channels=4),
    "preact-34": PreactResnetModel(depth=34, base_channels=4),
    "preact-18-silu": PreactResnetModel(depth=18, base_channels=4, activation="silu"),
    "preact-18-deepmind": PreactResnetModel(depth=18, base_channels=4, variant="deepmind"),
    "preact-34-deepmind-silu": PreactResnetModel(depth=34, base_channels=4, activation="silu", variant="deepmind"),
    "wide-10-1": WideResnetModel(depth=10, width=1),
    "wide-16-2-silu": WideResnetModel(depth=16, width=2, activation="silu"),
    "wide-10-1-deepmind": WideResnetModel(depth=10, width=1, variant="deepmind"),
    "wide-16-2-deepmind-silu": WideResnetModel(depth=16, width=2, activation="silu", variant="deepmind"),
}


def _card(model: ModelConfig, shape: Shape = (1, 8, 8), num_classes: int = 10) -> ClassifierCard:
    channels = shape[0]
    return ClassifierCard(
        model=model, image_shape=shape, num_classes=num_classes, mean=(0.5,) * channels, std=(0.25,) * channels
    )


def _trained(model: ModelConfig, shape: Shape = (1, 8, 8)) -> Classifier:
    """A classifier whose running statistics are no longer those it starts with, in eval mode."""
    classifier = build_classifier(_card(model, shape), seed=0).train()
    with torch.no_grad():
        for seed in range(3):
            classifier(random_images(8, shape=shape, seed=seed))
    return classifier.eval()


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (StandardResnetModel(depth=18), 11_173_962),
        (StandardResnetModel(depth=34), 21_282_122),
        (StandardResnetModel(depth=50), 23_520_842),
        (PreactResnetModel(depth=18), 11_172_170),
        (PreactResnetModel(depth=18, variant="deepmind"), 12_548_426),
        (WideResnetModel(depth=28, width=10), 36_479_194),
        (WideResnetModel(depth=34, width=10), 46_160_474),
        (WideResnetModel(depth=34, width=20), 184_531_674),
        (WideResnetModel(depth=70, width=16), 266_796_506),
        (WideResnetModel(depth=82, width=8), 79_125_466),
        (WideResnetModel(depth=28, width=10, variant="deepmind"), 36_479_194),
        (WideResnetModel(depth=70, width=16, variant="deepmind"), 266_796_506),
    ],
    ids=lambda value: value.kind if not isinstance(value, int) else str(value),
)
def test_the_number_of_parameters_is_the_published_one(model: ModelConfig, expected: int) -> None:
    """For CIFAR-10; the networks are laid out without memory for their weights."""
    with torch.device("meta"):
        classifier = Classifier(_card(model, (3, 32, 32)))
    assert sum(parameter.numel() for parameter in classifier.parameters()) == expected


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 32, 32), (2, 9, 13)], ids=str)
@pytest.mark.parametrize("name", SMALL)
def test_every_network_goes_forward_and_back(name: str, shape: Shape) -> None:
    """A float32 logit per class for any size and number of channels, and a gradient for every weight and pixel."""
    classifier = build_classifier(_card(SMALL[name], shape, num_classes=7), seed=0).train()
    images = random_images(2, shape=shape).requires_grad_(True)
    logits = classifier(images)
    assert (logits.shape, logits.dtype) == ((2, 7), torch.float32)
    logits.logsumexp(1).sum().backward()
    assert images.grad is not None
    for gradient in (images.grad, *(parameter.grad for parameter in classifier.parameters())):
        assert gradient is not None
        assert bool(torch.isfinite(gradient).all())
    assert float(images.grad.abs().max()) > 0


@pytest.mark.parametrize("name", SMALL)
def test_every_network_takes_channels_last(name: str) -> None:
    """The layout that convolutions on a GPU prefer changes no logit beyond rounding."""
    classifier, images = _trained(SMALL[name], (3, 16, 16)), random_images(4, shape=(3, 16, 16))
    with torch.inference_mode():
        expected = classifier(images)
        found = classifier.to(memory_format=torch.channels_last)(images.to(memory_format=torch.channels_last))
    assert torch.allclose(found, expected, atol=1e-4)


@pytest.mark.parametrize("name", SMALL)
def test_every_network_is_saved_and_read(name: str, tmp_path: Path) -> None:
    """Card, weights and running statistics survive bit for bit."""
    classifier = _trained(SMALL[name])
    save_classifier(classifier, tmp_path)
    found = read_classifier(tmp_path / "model.safetensors", tmp_path / "model.json")
    assert found.card == classifier.card
    assert same_state(found.state_dict(), classifier.state_dict())


PUBLISHED_NAMES = {
    "resnet-18": {"conv1.weight", "bn1.bias", "layer2.0.shortcut.1.running_var", "layer4.1.bn2.weight", "linear.bias"},
    "resnet-50": {"layer1.0.shortcut.0.weight", "layer3.5.conv3.weight", "layer4.2.bn3.running_mean"},
    "preact-18": {"conv1.weight", "layer1.0.bn1.weight", "layer2.0.shortcut.0.weight", "bn.weight", "linear.weight"},
    "preact-18-deepmind": {"conv_2d.weight", "layer_1.0.shortcut.weight", "layer_3.1.conv_2d_2.weight", "logits.bias"},
    "wide-16-2-silu": {"conv1.weight", "block1.layer.0.convShortcut.weight", "block3.layer.1.bn2.bias", "fc.weight"},
    "wide-16-2-deepmind-silu": {"init_conv.weight", "layer.2.block.1.batchnorm_1.bias", "layer.0.block.0.shortcut.weight"},
}


@pytest.mark.parametrize("name", PUBLISHED_NAMES)
def test_parameters_have_their_published_names(name: str) -> None:
    """Below ``network.`` the names are those of published checkpoints; normalisation lies beside them."""
    state = build_classifier(_card(SMALL[name]), seed=0).state_dict()
    assert {f"network.{published}" for published in PUBLISHED_NAMES[name]} <= state.keys()
    assert {other for other in state if not other.startswith("network.")} == {"normalise.mean", "normalise.std"}


@pytest.mark.parametrize("name", SMALL)
def test_each_option_makes_another_network(name: str) -> None:
    """Depth, channels, activation and variant are all used: no two networks give the same logits."""
    images = random_images(2)
    with torch.inference_mode():
        logits = {other: build_classifier(_card(model), seed=0).eval()(images) for other, model in SMALL.items()}
    assert [other for other in SMALL if torch.equal(logits[other], logits[name])] == [name]


@pytest.mark.parametrize("name", ["preact-18", "preact-18-deepmind", "resnet-18-silu", "wide-16-2-deepmind-silu"])
def test_the_exported_network_is_the_trained_one(name: str, tmp_path: Path) -> None:
    """ONNX gives torch's logits, for a batch of any size and odd images too."""
    shape = (3, 9, 12)
    classifier, images = _trained(SMALL[name], shape), random_images(5, shape=shape, seed=7)
    write_onnx(classifier, shape, tmp_path / "model.onnx", {})
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    with torch.inference_mode():
        expected = classifier(images).numpy()
    for count in (1, 5):
        (found,) = session.run(["logits"], {"images": images[:count].numpy()})
        assert np.allclose(np.asarray(found), expected[:count], atol=1e-4 * max(1.0, np.abs(expected).max()))


def test_same_padding_is_tensorflows() -> None:
    """A strided convolution sees a pixel more at the end of an even side, and one at both ends of an odd one."""
    network = build_classifier(_card(WideResnetModel(depth=10, width=1, variant="deepmind")), seed=0).network
    convolution = network.get_submodule("layer.1.block.0.conv_0")
    assert isinstance(convolution, nn.Conv2d)
    nn.init.ones_(convolution.weight)
    with torch.inference_mode():
        even, odd = (convolution(torch.ones(1, 16, size, size))[0, 0] / 16 for size in (4, 5))
    assert even.tolist() == [[9, 6], [6, 4]]
    assert odd.tolist() == [[4, 6, 4], [6, 9, 6], [4, 6, 4]]


@pytest.mark.parametrize(
    ("model", "pairs"),
    [
        (SMALL["resnet-18"], [("conv1", "bn1"), ("layer2.0.conv2", "layer2.0.bn2")]),
        (SMALL["resnet-50"], [("layer1.0.conv3", "layer1.0.bn3"), ("layer1.0.shortcut.0", "layer1.0.shortcut.1")]),
        (SMALL["preact-18"], [("layer2.0.conv1", "layer2.0.bn2")]),
        (SMALL["preact-18-deepmind"], [("layer_1.0.conv_2d_1", "layer_1.0.batchnorm_1")]),
        (SMALL["wide-16-2-silu"], [("block2.layer.0.conv1", "block2.layer.0.bn2")]),
        (SMALL["wide-16-2-deepmind-silu"], [("layer.1.block.0.conv_0", "layer.1.block.0.batchnorm_1")]),
    ],
    ids=["resnet-18", "resnet-50", "preact", "preact-deepmind", "wide", "wide-deepmind"],
)
def test_batch_normalisation_folds_into_the_convolution_before_it(model: ModelConfig, pairs: list[tuple[str, str]]) -> None:
    """A convolution and the normalisation of its output can be made one, by their names, without changing a logit."""
    classifier, images = _trained(model), random_images(4)
    with torch.inference_mode():
        expected = classifier(images)
        for convolution, normalisation in pairs:
            conv, norm = (classifier.network.get_submodule(name) for name in (convolution, normalisation))
            assert isinstance(conv, nn.Conv2d)
            assert isinstance(norm, nn.BatchNorm2d)
            classifier.network.set_submodule(convolution, fuse_conv_bn_eval(conv, norm))
            classifier.network.set_submodule(normalisation, nn.Identity())
        assert torch.allclose(classifier(images), expected, atol=1e-4)


@pytest.mark.parametrize(
    ("model", "shape", "message"),
    [
        (SMALL["resnet-18"], (1, 7, 32), "halves images 3 times: expected at least 8×8 pixels, got 7×32"),
        (SMALL["preact-18"], (1, 8, 4), "halves images 3 times: expected at least 8×8 pixels, got 8×4"),
        (SMALL["wide-10-1"], (1, 3, 4), "halves images 2 times: expected at least 4×4 pixels, got 3×4"),
    ],
    ids=["resnet", "preact", "wide"],
)
def test_images_too_small_are_refused(model: ModelConfig, shape: Shape, message: str) -> None:
    """Nothing is left to average when the last stages have nothing to halve; the error names a kind that works."""
    with pytest.raises(ValueError, match=rf"{message}; use kind resnet or cnn"):
        build_classifier(_card(model, shape), seed=0)


@pytest.mark.parametrize("depth", [4, 9, 27, 30])
def test_a_wide_depth_without_whole_blocks_is_refused(depth: int) -> None:
    """A wide residual network has 4 layers and 6 for each block of a stage."""
    with pytest.raises(ValidationError, match=rf"expected 10, 16, 22, 28, 34, … .*got {depth}"):
        WideResnetModel(depth=depth)


def test_an_unknown_choice_is_refused() -> None:
    """Depths, activations and variants that no paper has are named as wrong, with what there is."""
    with pytest.raises(ValidationError, match="Input should be 18, 34 or 50"):
        StandardResnetModel.model_validate({"depth": 20})
    with pytest.raises(ValidationError, match="Input should be 18 or 34"):
        PreactResnetModel.model_validate({"depth": 50})
    with pytest.raises(ValidationError, match="Input should be 'relu' or 'silu'"):
        WideResnetModel.model_validate({"activation": "gelu"})
    with pytest.raises(ValidationError, match="Input should be 'standard' or 'deepmind'"):
        WideResnetModel.model_validate({"variant": "trades"})


@pytest.mark.parametrize("model", [CnnModel(), ResnetModel()], ids=["cnn", "resnet"])
def test_the_small_networks_keep_their_names(model: ModelConfig) -> None:
    """Weights that were saved before the larger networks existed still load."""
    names = {name.split(".")[1] for name in build_classifier(_card(model), seed=0).state_dict()} - {"mean", "std"}
    assert names == ({"features", "head"} if isinstance(model, CnnModel) else {"conv1", "bn1", "blocks", "head"})
