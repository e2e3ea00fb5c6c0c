"""What identifies a model and its inputs: hashes of tensors, by name, type, shape and content."""

import hashlib

import torch
from torch import Tensor, nn


def hash_model(model: nn.Module) -> str:
    """The sha256 of a model's structure, as it describes itself, and of all its parameters and buffers."""
    content = hashlib.sha256(repr(model).encode())
    for name, value in sorted(model.state_dict().items()):
        content.update(f"{name} {hash_tensor(value)}".encode())
    return content.hexdigest()


def hash_inputs(model: nn.Module, images: Tensor, labels: Tensor) -> dict[str, str]:
    """What a measurement is of, by name: the hashes of a model, of images and of their labels."""
    return {"model": hash_model(model), "images": hash_tensor(images), "labels": hash_tensor(labels)}


def hash_tensor(values: Tensor) -> str:
    """The sha256 of a tensor's type, shape and content."""
    content = hashlib.sha256(f"{values.dtype} {tuple(values.shape)}".encode())
    content.update(values.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return content.hexdigest()
