"""Our TRADES against the authors' algorithm, written out with torch's own KL divergence."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from proxyrob.config import TradesObjective
from proxyrob.threat import parse_threat
from tests.toys import compute_losses, random_images

IMAGES, LABELS = random_images(6), torch.tensor([0, 1, 2, 3, 4, 5])
EPSILON, BETA, STEPS, RELATIVE_STEP = 0.1, 4.0, 5, 0.25


def _model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 10)).train()


def _trades(model: nn.Module, norm: str, generator: torch.Generator) -> Tensor:
    """Zhang et al. 2019, algorithm 1: the loss of the batch, as a mean over its images."""
    model.eval()
    natural = F.softmax(model(IMAGES), dim=1).detach()
    attacked = IMAGES + 0.001 * torch.randn(IMAGES.shape, generator=generator)
    for _ in range(STEPS):
        attacked = attacked.detach().requires_grad_(True)
        loss = F.kl_div(F.log_softmax(model(attacked), dim=1), natural, reduction="sum")
        (gradient,) = torch.autograd.grad(loss, attacked)
        with torch.no_grad():
            if norm == "linf":
                attacked = attacked + RELATIVE_STEP * EPSILON * gradient.sign()
                attacked = torch.clamp(attacked, IMAGES - EPSILON, IMAGES + EPSILON)
            else:
                attacked = attacked + RELATIVE_STEP * EPSILON * gradient / gradient.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
                delta = attacked - IMAGES
                attacked = IMAGES + delta.renorm(p=2, dim=0, maxnorm=EPSILON)
            attacked = attacked.clamp(0.0, 1.0)
    model.train()
    logits = model(IMAGES)
    robust = F.kl_div(F.log_softmax(model(attacked), dim=1), F.softmax(logits, dim=1), reduction="batchmean")
    return F.cross_entropy(logits, LABELS) + BETA * robust


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_loss_and_gradients_are_the_authors(norm: str) -> None:
    """Value and the gradient of every weight agree: batch normalisation is in eval mode in the attack, in train mode after."""
    ours, theirs = _model(), _model()
    found = compute_losses(
        TradesObjective(beta=BETA, attack_steps=STEPS, relative_step=RELATIVE_STEP),
        ours,
        IMAGES,
        LABELS,
        threat=parse_threat(f"{norm}:{EPSILON}"),
        scale=1.0,
        generator=torch.Generator().manual_seed(3),
    ).losses.mean()
    expected = _trades(theirs, norm, torch.Generator().manual_seed(3))
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)
    assert found.item() > F.cross_entropy(_model()(IMAGES), LABELS).item() + 1e-3, "the robust part is there"
    found.backward()
    expected.backward()
    for (name, one), (_, other) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
        assert one.grad is not None
        assert other.grad is not None
        assert torch.allclose(one.grad, other.grad, rtol=1e-4, atol=1e-6), name
    assert torch.allclose(ours.state_dict()["1.running_mean"], theirs.state_dict()["1.running_mean"], atol=1e-6)
