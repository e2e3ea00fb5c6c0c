"""One step of training: the batch is perturbed, the loss taken on it, the weights updated."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from proxyrob.config.objective import MartObjective, PgdObjective, SmoothAdvObjective, TradesObjective
from proxyrob.config.train import RobustTrainConfig, SmoothTrainConfig
from proxyrob.memory import at_most
from proxyrob.mix import MixedBatch
from proxyrob.rng import RowGenerator
from proxyrob.threat import Threat
from proxyrob.train.awp import awp_gamma, perturbed_weights
from proxyrob.train.objectives import PerturbedBatch, join_batches, losses_on, perturb_images
from proxyrob.train.optimizer import clip_gradients
from proxyrob.train.reading import Reader
from proxyrob.train.recompute import recomputed
from proxyrob.train.stopping import NEVER, Stop
from proxyrob.train.synced import SyncedBatchNorm

PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class Stepper:
    """Takes the steps of a training.

    On the fast path attacks read a folded copy of the classifier (``FoldedCopy``) that takes over its weights at every step.
    Where an attack reads the statistics of the batch, or there is no batch normalisation to fold, it reads the classifier
    itself, as all attacks do on the plain path.

    Of several processes each perturbs its share of the batch by itself. Their gradients are averaged on the way
    (``DistributedDataParallel``), so that all have the same weights after every step. Running statistics of batch
    normalisation are afterwards those of the first process, unless they are those of all (``SyncedBatchNorm``): a checkpoint
    of one process is the state of all.
    """

    def __init__(
        self,
        config: RobustTrainConfig | SmoothTrainConfig,
        classifier: nn.Module,
        optimizer: Optimizer,
        threat: Threat | None,
        *,
        example: Float[Tensor, "b c h w"],
        stop: Stop = NEVER,
    ) -> None:
        """``stop`` is looked at before every forward pass of an attack; it may leave the step undone."""
        self.config, self.classifier, self.optimizer, self.threat = config, classifier, optimizer, threat
        self.micro_batch = at_most(config.micro_batch)
        self.stop, self.processes = stop, stop.processes
        dtype = PRECISIONS[config.compute.precision]
        norms = [layer for layer in classifier.modules() if isinstance(layer, _BatchNorm)]
        synced = [layer for layer in norms if isinstance(layer, SyncedBatchNorm)]
        self.has_batchnorm = bool(norms)
        self.attack_ties_images = self.has_batchnorm and _attack_batchnorm(config) == "train"
        folds = config.compute.path == "fast" and self.has_batchnorm and _attack_batchnorm(config) == "eval"
        if folds:
            classifier.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]  (missing in torch's stubs)
        self.check_stop = stop.check_together if synced and self.attack_ties_images else stop.check
        self.attacked = Reader(classifier, dtype, before=self.check_stop, example=example if folds else None)
        self.statistics = [
            tensor
            for layer in norms
            if layer not in synced
            for tensor in (layer.running_mean, layer.running_var)
            if tensor is not None
        ]
        self.distributed = None if self.processes.count == 1 else DistributedDataParallel(classifier)
        if self.distributed is not None:
            self.distributed.broadcast_buffers = False  # once in a step is enough; before a second pass it is an error
        self.trained = Reader(classifier if self.distributed is None else self.distributed, dtype)
        self.alone = Reader(classifier, dtype)  # for gradients that DistributedDataParallel has no part in

    def take(
        self, batch: MixedBatch, step: int, make_generator: Callable[[], torch.Generator]
    ) -> tuple[Float[Tensor, ""], Float[Tensor, "b k"]]:
        """One update of the weights; the loss before it on this process's share of the batch, and its logits when perturbed.

        ``make_generator`` gives the step's generator, at its beginning, as often as it is called. Raises
        ``InterruptedError`` in all processes when one was asked to stop; nothing has changed then.
        """
        config = self.config
        with self.stop.agreed():
            self.check_stop()
            perturbed = self._perturb(batch, step, make_generator)
        parts = self._parts(len(batch), whole=self.has_batchnorm)

        def loss_on(rows: slice, model: nn.Module) -> tuple[Tensor, Tensor]:
            found = losses_on(config.objective, model, perturbed.part(rows))
            return (batch.weights[rows] * found.losses).sum(), found.logits

        self.optimizer.zero_grad(set_to_none=True)
        gamma = awp_gamma(config.objective.awp, step, config.steps)
        total, logits = torch.zeros((), device=batch.images.device), []
        with (
            recomputed(self.classifier, when=self.has_batchnorm and self.micro_batch is not None),
            perturbed_weights(
                self.classifier, gamma, lambda: (loss_on(rows, self.alone)[0] for rows in parts), self.processes.average
            ),
        ):
            for rows in parts:
                with self._averaging(when=rows is parts[-1]):
                    loss, found = loss_on(rows, self.trained)
                    loss.backward()
                total += loss.detach()
                logits.append(found.detach())
        clip_gradients(config, self.classifier)
        self.optimizer.step()
        self.processes.follow_first(self.statistics)
        return total, torch.cat(logits)

    def _perturb(self, batch: MixedBatch, step: int, make_generator: Callable[[], torch.Generator]) -> PerturbedBatch:
        """The perturbed batch, made part by part where no image has to do with another."""
        self.attacked.refresh()

        def generator_for(rows: slice) -> RowGenerator:
            share = batch.share
            if share is None:
                return RowGenerator(make_generator(), rows, len(batch))
            return RowGenerator(make_generator(), share.places[rows], share.total)

        with recomputed(self.classifier, when=self.attack_ties_images and self.micro_batch is not None):
            made = [
                perturb_images(
                    self.config.objective,
                    self.attacked,
                    batch.images[rows],
                    batch.targets[rows],
                    threat=self.threat,
                    scale=_warmup(step, self.config),
                    generator=generator_for(rows),
                )
                for rows in self._parts(len(batch), whole=self.attack_ties_images)
            ]
        return join_batches(made)

    def _averaging(self, *, when: bool) -> AbstractContextManager[None]:
        """Average the gradients over the processes at the end of the block, or let them add up until a later one."""
        return nullcontext() if when or self.distributed is None else self.distributed.no_sync()

    def _parts(self, count: int, *, whole: bool) -> list[slice]:
        size = count if whole or self.micro_batch is None else self.micro_batch
        return [slice(start, min(start + size, count)) for start in range(0, count, size)]


def _attack_batchnorm(config: RobustTrainConfig | SmoothTrainConfig) -> str | None:
    """What the attack's batch normalisation divides by; ``None`` where there is no attack."""
    match config.objective:
        case PgdObjective() | TradesObjective() | MartObjective() | SmoothAdvObjective():
            return config.objective.attack_batchnorm
        case _:
            return None


def _warmup(step: int, config: RobustTrainConfig | SmoothTrainConfig) -> float:
    steps = round(config.warmup * config.steps)
    return min(1.0, (step + 1) / steps) if steps else 1.0
