"""Our PGD against foolbox's: the same start and the same steps give the same images."""

import pytest
import torch
from eagerpy.astensor import astensor
from eagerpy.tensor.tensor import Tensor as EagerTensor
from foolbox.attacks.projected_gradient_descent import L2ProjectedGradientDescentAttack, LinfProjectedGradientDescentAttack
from foolbox.models.pytorch import PyTorchModel
from torch import Tensor, nn
from torch.nn import functional as F

from proxyrob.attacks import attack_pgd, random_start
from proxyrob.models import load_classifier
from proxyrob.source import read_split
from proxyrob.storage import Stage
from proxyrob.threat import Threat, parse_threat

STEPS, RELATIVE_STEP = 20, 0.125


class _StartsAt:
    """Makes a foolbox attack start where ours starts."""

    start: Tensor

    def get_random_start(self, x0: EagerTensor, epsilon: float) -> EagerTensor:
        return astensor(self.start)


class LinfPgd(_StartsAt, LinfProjectedGradientDescentAttack):
    """foolbox's L∞ PGD from a given start."""


class L2Pgd(_StartsAt, L2ProjectedGradientDescentAttack):
    """foolbox's L2 PGD from a given start."""


@pytest.mark.parametrize(
    ("text", "peer"), [("linf:0.15", LinfPgd), ("linf:8/255", LinfPgd), ("l2:0.6", L2Pgd), ("l2:2", L2Pgd)]
)
def test_our_images_are_foolboxs(text: str, peer: type[LinfPgd | L2Pgd], digits: Stage, toy_classifier: Stage) -> None:
    """Twenty steps from the same random start end in the same pixels to 1e-6, on a trained network."""
    threat, model, split = parse_threat(text), load_classifier(toy_classifier), read_split(digits, "test")
    start = random_start(split.images, threat, torch.Generator().manual_seed(0))
    ours = _attack(model, split.images, split.targets, threat, start)
    attack = peer(rel_stepsize=RELATIVE_STEP, steps=STEPS, random_start=True)
    attack.start = start
    bounded = PyTorchModel(model, bounds=(0.0, 1.0), device="cpu")
    theirs = attack.run(bounded, split.images, split.targets, epsilon=float(threat.epsilon))
    assert (ours - split.images).abs().max() > 0.5 * float(threat.epsilon) / (1 if threat.norm == "linf" else 8)
    assert torch.allclose(ours, theirs, rtol=0.0, atol=1e-6)


def _attack(model: nn.Module, images: Tensor, labels: Tensor, threat: Threat, start: Tensor) -> Tensor:
    return attack_pgd(
        model,
        images,
        lambda logits: F.cross_entropy(logits, labels, reduction="sum"),
        threat,
        steps=STEPS,
        relative_step=RELATIVE_STEP,
        generator=torch.Generator(),
        start=start,
    )
