"""The training steps that ``benchmarks/training.py`` compares, each run in a process of its own.

    python benchmarks/trainers.py '{"trainer": "plain", "objective": "pgd", "network": "resnet-18", …}'

prints one JSON object. A peer's own training loop is called with a loader of one batch. Its arithmetic is left alone; what it
needed to start on this machine is said in ``shims``.
"""

import json
import os
import sys
import time
from collections.abc import Callable
from statistics import median
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.steps import (
    ATTACK_STEPS,
    BETA,
    LEARNING_RATE,
    NUM_CLASSES,
    WEIGHT_DECAY,
    Bench,
    Take,
    images_of,
    labels_of,
    ours,
    plain,
)


def paper(bench: Bench) -> Take:
    """inspire-group/proxy-distributions: each step begins with a pass of its own, and its PGD attacks in train mode."""
    bench.without_cuda()
    architectures = "robustbench.model_zoo.architectures"
    networks = (f"{architectures}.{name}" for name in ("wide_resnet", "resnet", "resnest"))
    bench.without("easydict", "autoattack", "robustbench", "robustbench.model_zoo", architectures, *networks)
    bench.checkout()
    import utils  # pyright: ignore[reportMissingImports]

    meters: dict[str, Any] = {}

    class Meter(utils.AverageMeter):
        def __init__(self, name: str, *rest: str) -> None:
            super().__init__(name, *rest)
            meters[name] = self

    utils.AverageMeter = Meter
    bench.shims.append("AverageMeter, which is remembered so that the loss can be read")
    optimizer, criterion = bench.sgd(), nn.CrossEntropyLoss()
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)
    settings = SimpleNamespace(
        rank=1,  # the process that prints nothing
        gpu=None,
        print_freq=1,
        attack="linf",
        epsilon=bench.epsilon,
        step_size=bench.step_size,
        num_steps=ATTACK_STEPS,
        clip_min=0.0,
        clip_max=1.0,
    )

    def take(images: Tensor, labels: Tensor) -> float:
        loader = [(images, labels)]
        utils.trainfxn(bench.objective, bench.network, loader, criterion, optimizer, schedule, 0, settings, NUM_CLASSES, None)
        return meters["Loss"].avg

    return take


def dm_improves_at(bench: Bench) -> Take:
    """wzekai99/DM-Improves-AT, whose trainer is that of imrahulr/adversarial_robustness_pytorch."""
    import pandas as pd

    bench.without_cuda()
    bench.without("autoattack", "autoattack.autopgd_base", "RandAugment")
    pd.DataFrame.append = lambda self, row, **_: pd.concat([self, row], ignore_index=True)  # pyright: ignore
    bench.shims.append("DataFrame.append, as it was before pandas 2")
    bench.checkout()
    from core.utils import Trainer  # pyright: ignore[reportMissingImports]

    settings = SimpleNamespace(
        seed=0,
        model="resnet18",
        normalize=False,
        pretrained_file=None,
        lr=LEARNING_RATE,
        weight_decay=WEIGHT_DECAY,
        nesterov=False,
        scheduler="none",
        num_adv_epochs=0,
        clip_grad=None,
        attack="linf-pgd",
        attack_eps=bench.epsilon,
        attack_step=bench.step_size,
        attack_iter=ATTACK_STEPS,
        beta=BETA if bench.objective == "trades" else None,
        mart=False,
        keep_clean=False,
    )
    trainer = Trainer({"data": "cifar10", "num_classes": NUM_CLASSES}, settings)
    trainer.model = bench.network
    bench.shims.append("Trainer.model, the network that all train in place of its own ResNet-18")
    trainer.init_optimizer(settings.num_adv_epochs)
    trainer.attack, _ = trainer.init_attack(
        trainer.model, trainer.criterion, settings.attack, bench.epsilon, ATTACK_STEPS, bench.step_size
    )
    return lambda images, labels: float(trainer.train([(images, labels)], adversarial=True)["loss"])


def robustness(bench: Bench) -> Take:
    """MadryLab/robustness with its ``random_start``, and without ``use_best``, which is a forward pass more."""
    bench.without_cuda()
    bench.without("cox", "cox.utils", "cox.store", "dill")
    bench.checkout()
    from robustness.attacker import AttackerModel  # pyright: ignore[reportMissingImports]
    from robustness.train import _model_loop  # pyright: ignore[reportMissingImports]

    statistics = SimpleNamespace(mean=torch.zeros(bench.shape[0]), std=torch.ones(bench.shape[0]))
    model, optimizer = AttackerModel(_Tolerant(bench.network), statistics), bench.sgd()
    bench.shims.append("the network that all train, which is made to take with_latent, fake_relu and no_relu (all false)")
    settings = SimpleNamespace(
        custom_eps_multiplier=None,
        eps=bench.epsilon,
        attack_lr=bench.step_size,
        attack_steps=ATTACK_STEPS,
        constraint="inf",
        random_start=True,
        use_best=False,
        mixed_precision=False,
    )
    return lambda images, labels: _model_loop(settings, "train", [(images, labels)], model, optimizer, 0, True, None)[1]


class _Tolerant(nn.Module):
    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor, **_: bool) -> Tensor:
        return self.network(images)


def torchattacks(bench: Bench) -> Take:
    """Its PGD, and the textbook's update."""
    sys.path.insert(0, bench.task["torchattacks"])
    from torchattacks import PGD  # pyright: ignore[reportMissingImports]

    network, optimizer = bench.network, bench.sgd()
    attack = PGD(network, eps=bench.epsilon, alpha=bench.step_size, steps=ATTACK_STEPS)

    def take(images: Tensor, labels: Tensor) -> float:
        attacked = attack(images, labels)
        optimizer.zero_grad()
        loss = F.cross_entropy(network(attacked), labels)
        loss.backward()
        optimizer.step()
        return loss.item()

    return take


TRAINERS: dict[str, Callable[[Bench], Take]] = {
    "ours": ours,
    "plain": plain,
    "paper": paper,
    "DM-Improves-AT": dm_improves_at,
    "robustness": robustness,
    "torchattacks": torchattacks,
}


def measure(task: dict[str, Any]) -> dict[str, Any]:
    """``first`` steps that warm up and ``steps`` that are timed; the loss of the very first, before which all are alike."""
    bench = Bench(task)
    take = TRAINERS[task["trainer"]](bench)
    images, labels = images_of(task["batch"], bench.shape, seed=1), labels_of(task["batch"])
    losses, seconds = [], []
    for number in range(task["first"] + task["steps"]):
        torch.manual_seed(number)
        wall, cpu = time.perf_counter(), time.process_time()
        losses.append(take(images, labels))
        seconds.append((time.perf_counter() - wall, time.process_time() - cpu))
    wall_s, cpu_s = (median(times) for times in zip(*seconds[task["first"] :], strict=True))
    return {"loss": losses[0], "wall_s": wall_s, "cpu_s": cpu_s, "shims": bench.shims}


def main() -> None:
    task = json.loads(sys.argv[1])
    os.sched_setaffinity(0, task["cores"])
    torch.set_num_threads(task["threads"])
    print(json.dumps(measure(task)))


if __name__ == "__main__":
    main()
