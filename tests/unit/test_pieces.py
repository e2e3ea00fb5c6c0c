"""Fewer images at once: the same figures in less memory."""

from collections.abc import Callable

import pytest
import torch
from torch import nn

from proxyrob.attacks import attack_pgd
from proxyrob.config import CnnModel
from proxyrob.errors import OutOfMemory
from proxyrob.memory import at_most, held_at_once, hold_at_once
from proxyrob.models import ClassifierCard, FoldedCopy, InPieces, build_classifier, in_pieces
from proxyrob.threat import parse_threat

CARD = ClassifierCard(model=CnnModel(widths=(4, 6)), image_shape=(1, 8, 8), num_classes=10, mean=(0.5,), std=(0.3,))


class Counting(nn.Module):
    """Notes how many images it is shown at a time, and how many values of theirs wait for a gradient."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.seen = model, list[int]()

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        self.seen.append(len(images))
        return self.model(images)


@pytest.fixture
def model() -> nn.Module:
    return build_classifier(CARD, 0).eval()


@pytest.mark.parametrize("size", [1, 3, 7, 20, 100])
def test_logits_and_gradients_are_those_of_the_whole_batch(model: nn.Module, size: int) -> None:
    images = torch.rand(20, 1, 8, 8)
    labels = torch.arange(20) % 10
    counting = Counting(model)
    found = []
    for reader in (model, InPieces(counting, size)):
        x = images.clone().requires_grad_()
        logits = reader(x)
        (gradient,) = torch.autograd.grad(nn.functional.cross_entropy(logits, labels, reduction="sum"), x)
        found.append((logits.detach(), gradient))
    for whole, pieces in zip(*found, strict=True):
        torch.testing.assert_close(pieces, whole, rtol=1e-5, atol=1e-6)
    assert max(counting.seen) == min(size, 20)


def test_what_waits_for_a_gradient_is_that_of_one_piece(model: nn.Module) -> None:
    """Between reading and gradient no value of any layer is kept, only the images."""
    images = torch.rand(64, 1, 8, 8, requires_grad=True)

    def kept(read: Callable[[torch.Tensor], torch.Tensor]) -> int:
        sizes: list[int] = []

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            sizes.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            read(images)
        return sum(sizes)

    assert kept(InPieces(model, 8)) < kept(model) / 4


def test_an_attack_in_pieces_finds_the_same_images(model: nn.Module) -> None:
    images, labels = torch.rand(12, 1, 8, 8), torch.arange(12) % 10
    folded = FoldedCopy(model, example=images[:2])
    found = []
    for limit in (None, 5):
        with hold_at_once(limit):
            reader = in_pieces(folded)
        assert isinstance(reader, InPieces) == (limit is not None)
        found.append(
            attack_pgd(
                reader,
                images,
                lambda logits: nn.functional.cross_entropy(logits, labels, reduction="sum"),
                parse_threat("linf:0.1"),
                steps=5,
                relative_step=0.3,
                generator=torch.Generator().manual_seed(1),
            )
        )
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=1e-5)


def test_the_limit_is_that_of_the_block() -> None:
    assert (at_most(8), at_most(None), held_at_once()) == (8, None, None)
    with hold_at_once(3):
        assert (at_most(8), at_most(2), at_most(None), held_at_once()) == (3, 2, 3, 3)
    assert held_at_once() is None
    with pytest.raises(ValueError, match="at least one image"), hold_at_once(0):
        pass


def test_real_refusals_of_memory_are_known() -> None:
    """Of torch's allocator and of Python's, and nothing else."""
    with pytest.raises(OutOfMemory, match="can't allocate memory"), hold_at_once(None):
        torch.empty(1 << 60, dtype=torch.uint8)
    with pytest.raises(OutOfMemory, match="MemoryError"), hold_at_once(None):
        bytearray(1 << 62)
    with pytest.raises(RuntimeError, match="shape") as caught, hold_at_once(None):
        torch.mm(torch.zeros(2, 2), torch.zeros(3, 3))
    assert not isinstance(caught.value, OutOfMemory)
    with pytest.raises(OutOfMemory, match="CUDA"), hold_at_once(None):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
