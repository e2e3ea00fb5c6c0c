"""Models that are none of ours, as somebody's module would offer them: functions without arguments, and an ONNX file."""

from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from sklearn.datasets import load_digits
from torch import Tensor, nn

from proxyrob.models import adopt_model, identify_model
from proxyrob.storage import Stage
from tests.toys import Linear, random_linear


@cache
def _fitted() -> Linear:
    """Least squares on the digits: nine of ten are right."""
    images, labels = load_digits(return_X_y=True)
    pixels = np.hstack([images / 16.0, np.ones((len(images), 1))])
    solution, *_ = np.linalg.lstsq(pixels, np.eye(10)[labels], rcond=None)
    weight = torch.from_numpy(10 * solution).float()
    return Linear(weight[:-1].T.contiguous(), weight[-1].clone())


def good() -> nn.Module:
    """A model that knows the digits."""
    return _fitted()


class _Before(nn.Module):
    """A model that wants other images than those in [0,1]."""

    def __init__(self, scale: float, shift: float) -> None:
        super().__init__()
        self.model, self.scale, self.shift = _fitted(), scale, shift

    def forward(self, images: Tensor) -> Tensor:
        return self.model(images * self.scale + self.shift)


def of_levels() -> nn.Module:
    """A model that wants levels from 0 to 255."""
    return _Before(1 / 255, 0.0)


def of_centred() -> nn.Module:
    """A model that wants images in [-1,1]."""
    return _Before(0.5, 0.5)


class _Renamed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.model = _fitted()

    def forward(self, images: Tensor) -> Tensor:
        return self.model(images)[:, [3, 4, 5, 6, 7, 8, 9, 0, 1, 2]]


def renamed() -> nn.Module:
    """A model whose classes come in another order."""
    return _Renamed()


def guessing() -> nn.Module:
    """A model that knows nothing."""
    return random_linear()


def probabilities() -> nn.Module:
    """A model that ends in a softmax."""
    return nn.Sequential(_fitted(), nn.Softmax(dim=1))


class _Nan(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        return torch.full((len(images), 10), float("nan"))


def not_a_number() -> nn.Module:
    """A model whose outputs are not finite."""
    return _Nan()


def seven_classes() -> nn.Module:
    """A model of another data set."""
    return random_linear(classes=7)


def drawn() -> nn.Module:
    """Other weights at every call."""
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))


def nothing() -> str:
    """No model at all."""
    return "a model"


def failing() -> nn.Module:
    """A function that does not find its weights."""
    raise FileNotFoundError("weights.pt")


def write_onnx_file(path: Path, *, batch: int | str = "batch") -> Path:
    """``good`` as an ONNX file, made without torch's exporter."""
    model = _fitted()
    tensors = {"weight": model.weight, "bias": model.bias}
    graph = helper.make_graph(
        [
            helper.make_node("Flatten", ["x"], ["flat"]),
            helper.make_node("Gemm", ["flat", "weight", "bias"], ["y"], transB=1),
        ],
        "linear",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [batch, 1, 8, 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [batch, 10])],
        [numpy_helper.from_array(tensor.detach().numpy(), name) for name, tensor in tensors.items()],
    )
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)])
    proto.ir_version = 10
    onnx.save(proto, path)
    return path


def adopted(make_stage: Callable[..., Stage], reference: str, published_as: str | None = None) -> Stage:
    """A model of anybody's, kept as ``proxyrob evaluate`` keeps it."""
    identity = identify_model(reference, published_as)
    stage = make_stage("given", model=identity.about())
    adopt_model(identity, stage=stage)
    return stage
