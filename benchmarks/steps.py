"""One step of adversarial training, as ours takes it and as a textbook has it, and what steps that are compared share.

All train the same network from the same weights on the same images with the same attack from the same start, so that their
losses can be compared, too.
"""

import sys
from collections.abc import Callable
from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from proxyrob.config import CnnModel, ModelConfig, PgdObjective, RobustTrainConfig, TradesObjective
from proxyrob.config.models import StandardResnetModel, WideResnetModel
from proxyrob.config.optimizer import PiecewiseSchedule, SgdOptimizer
from proxyrob.config.train import ComputeConfig
from proxyrob.mix import MixedBatch
from proxyrob.models import Classifier, ClassifierCard, build_classifier
from proxyrob.threat import Threat, parse_threat
from proxyrob.train import build_optimizer
from proxyrob.train.step import Stepper

ATTACK_STEPS, RELATIVE_STEP = 10, 0.25
LEARNING_RATE, MOMENTUM, WEIGHT_DECAY = 0.01, 0.9, 5e-4
BETA, START_NOISE = 6.0, 0.001  # of TRADES
NUM_CLASSES = 10
EDGE = 0.1
"""Images keep away from 0 and 1, so that it makes no difference whether an attack's start is clipped to them."""

TOLERANCE = {"float32": 0.02, "bfloat16": 0.05}
"""By which share our loss may differ from the textbook's: ten steps of an attack amplify rounding."""

CIFAR = (3, 32, 32), parse_threat("linf:8/255")
NETWORKS: dict[str, tuple[ModelConfig, tuple[int, int, int], Threat]] = {
    "resnet-18": (StandardResnetModel(depth=18), *CIFAR),
    "wide-resnet-28-10": (WideResnetModel(depth=28, width=10), *CIFAR),
    "wide-resnet-34-10": (WideResnetModel(depth=34, width=10), *CIFAR),
    "digits": (CnnModel(widths=(16, 32, 64)), (1, 8, 8), parse_threat("linf:0.15")),
}

Take = Callable[[Tensor, Tensor], float]
"""One step on images and labels; the loss that it went down from."""


class Bench:
    """What all steps share: the task, the network, the attack. ``shims`` names what a peer needed to start here."""

    def __init__(self, task: dict[str, Any], device: torch.device | str = "cpu") -> None:
        self.task, self.objective, self.device = task, task["objective"], torch.device(device)
        model, self.shape, self.threat = NETWORKS[task["network"]]
        self.epsilon, self.step_size = float(self.threat.epsilon), RELATIVE_STEP * float(self.threat.epsilon)
        self.network = _initial_network(model, self.shape, device)
        self.shims: list[str] = []

    def sgd(self) -> torch.optim.SGD:
        """torch's own, as everybody writes it."""
        return torch.optim.SGD(self.network.parameters(), LEARNING_RATE, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY)

    def checkout(self) -> None:
        """Let the peer's modules be imported."""
        sys.path.insert(0, self.task["checkout"])

    def without(self, *modules: str) -> None:
        """Stand in for modules that the peer imports and that its step has no need of."""
        for name in modules:
            sys.modules[name] = _Absent(name)
        self.shims.append(f"empty modules for {', '.join(modules)}, which a step does not use")

    def without_cuda(self) -> None:
        """Let tensors and modules stay where they are."""
        nn.Module.cuda = lambda self, *_, **__: self  # pyright: ignore[reportAttributeAccessIssue]
        Tensor.cuda = lambda self, *_, **__: self  # pyright: ignore[reportAttributeAccessIssue]
        self.shims.append("Tensor.cuda and Module.cuda, which move nothing")


class _Absent(ModuleType):
    """A module that has a class of every name."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.__path__ = []  # it may have modules in it

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


def _initial_network(model: ModelConfig, shape: tuple[int, int, int], device: torch.device | str) -> Classifier:
    """Fresh weights, and running statistics that are those of a batch."""
    half, quarter = (0.5,) * shape[0], (0.25,) * shape[0]
    card = ClassifierCard(model=model, image_shape=shape, num_classes=NUM_CLASSES, mean=half, std=quarter)
    network = build_classifier(card, 0).to(device).train()
    norms = [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]
    usual = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 1.0
    with torch.no_grad():
        network(images_of(64, shape, seed=2).to(device))
    for norm, momentum in zip(norms, usual, strict=True):
        norm.momentum = momentum
    return network


def images_of(count: int, shape: tuple[int, int, int], *, seed: int) -> Tensor:
    """Smooth noise: pixels are like their neighbours, as in pictures."""
    channels, height, width = shape
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand((count, channels, -(-height // 4), -(-width // 4)), generator=generator)
    return EDGE + (1.0 - 2.0 * EDGE) * F.interpolate(coarse, size=(height, width), mode="bilinear")


def labels_of(count: int) -> Tensor:
    """The classes in turn."""
    return torch.arange(count) % NUM_CLASSES


def batch_of(images: Tensor, labels: Tensor) -> MixedBatch:
    """A batch of real images alone."""
    count = len(labels)
    return MixedBatch(
        images=images,
        labels=labels,
        indices=labels.numpy(force=True),
        targets=labels,
        weights=torch.full((count,), 1.0 / count, device=images.device),
        parts=(("real", count),),
    )


def ours(bench: Bench) -> Take:
    """Training's own step, on the fast path."""
    objective = PgdObjective if bench.objective == "pgd" else partial(TradesObjective, beta=BETA)
    config = RobustTrainConfig(
        objective=objective(attack_steps=ATTACK_STEPS, relative_step=RELATIVE_STEP),
        batch_size=bench.task["batch"],
        synthetic_fraction=0.0,
        gamma=1.0,
        warmup=0.0,
        learning_rate=LEARNING_RATE,
        weight_decay=WEIGHT_DECAY,
        optimizer=SgdOptimizer(momentum=MOMENTUM, nesterov=False, decayed="all"),
        schedule=PiecewiseSchedule(),
        compute=ComputeConfig(precision=bench.task["precision"]),
    )
    optimizer, _ = build_optimizer(config, bench.network)
    stepper = Stepper(
        config, bench.network, optimizer, bench.threat, example=images_of(2, bench.shape, seed=2).to(bench.device)
    )

    def take(images: Tensor, labels: Tensor) -> float:
        seed = torch.initial_seed()  # the others draw from the global stream, which begins there
        loss, _ = stepper.take(batch_of(images, labels), 0, lambda: torch.Generator(images.device).manual_seed(seed))
        return float(loss)

    return take


def plain(bench: Bench) -> Take:
    """The textbook: an attack in eval mode, then the loss in train mode."""
    network, optimizer = bench.network, bench.sgd()

    def take(images: Tensor, labels: Tensor) -> float:
        network.eval()
        if bench.objective == "pgd":
            start = images + torch.empty_like(images).uniform_(-bench.epsilon, bench.epsilon)
            attacked = _attack(bench, start, images, lambda logits: F.cross_entropy(logits, labels))
        else:
            with torch.no_grad():
                reference = F.softmax(network(images), dim=1)
            start = images + START_NOISE * torch.randn_like(images)
            attacked = _attack(bench, start, images, lambda logits: _divergence(logits, reference))
        network.train()
        optimizer.zero_grad()
        if bench.objective == "pgd":
            loss = F.cross_entropy(network(attacked), labels)
        else:
            clean, logits = network(images), network(attacked)
            loss = F.cross_entropy(clean, labels) + BETA * _divergence(logits, F.softmax(clean, dim=1))
        loss.backward()
        optimizer.step()
        return loss.item()

    return take


def _attack(bench: Bench, start: Tensor, images: Tensor, loss: Callable[[Tensor], Tensor]) -> Tensor:
    attacked = start.clamp(0.0, 1.0)
    for _ in range(ATTACK_STEPS):
        attacked = attacked.detach().requires_grad_(True)
        (gradient,) = torch.autograd.grad(loss(bench.network(attacked)), attacked)
        moved = attacked.detach() + bench.step_size * gradient.sign()
        attacked = (images + (moved - images).clamp(-bench.epsilon, bench.epsilon)).clamp(0.0, 1.0)
    return attacked


def _divergence(logits: Tensor, reference: Tensor) -> Tensor:
    return F.kl_div(F.log_softmax(logits, dim=1), reference, reduction="batchmean")
