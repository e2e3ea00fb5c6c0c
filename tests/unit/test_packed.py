"""Convolutions with rearranged weights are the convolutions that they replace."""

import pytest
import torch
from torch import nn

from proxyrob.models import FoldedCopy
from proxyrob.models.packed import PackedConv2d
from tests.toys import random_images

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch without oneDNN: nothing is replaced")


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    ("size", "stride", "padding"), [(3, 1, 1), (3, 2, 1), (1, 2, 0), (3, 1, 0), (5, 1, 2), ((3, 1), 1, (2, 0))]
)
def test_outputs_and_gradients(size: int, stride: int, padding: int, bias: bool) -> None:
    """With any kernel, stride and padding both are those of torch's own convolution, also of another number of images."""
    conv = nn.Conv2d(3, 4, size, stride, padding, bias=bias).requires_grad_(False)
    packed = PackedConv2d(conv)
    for count, side in ((2, 8), (5, 11)):
        images = random_images(count, shape=(3, side, side + 1), seed=count)
        found, expected = (images.clone().requires_grad_(True) for _ in range(2))
        ours, theirs = packed(found), conv(expected)
        torch.testing.assert_close(ours, theirs)
        ours.square().sum().backward()
        theirs.square().sum().backward()
        torch.testing.assert_close(found.grad, expected.grad)
        with torch.inference_mode():
            torch.testing.assert_close(packed(images), theirs.detach())


def test_only_what_can_be_replaced_is() -> None:
    """Grouped, dilated and otherwise padded convolutions stay as they are, and the copy still computes what the model does."""
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1),
        nn.Conv2d(4, 4, 3, padding=1, groups=2),
        nn.Conv2d(4, 4, 3, dilation=2),
        nn.Conv2d(4, 4, 3, padding="same"),
        nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"),
        nn.Conv2d(4, 4, 1, padding=1),
        nn.Flatten(),
    )
    images = random_images(3, shape=(3, 8, 8))
    copy = FoldedCopy(model, example=images)
    assert isinstance(copy.network, nn.Sequential)
    assert [isinstance(layer, PackedConv2d) for layer in copy.network] == [True] + 6 * [False]
    torch.testing.assert_close(copy(images), model(images).detach())
