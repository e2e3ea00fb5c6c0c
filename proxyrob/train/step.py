"""One step of training: the batch is perturbed, the loss taken on it, the weights updated."""

from collections.abc import Callable, Iterator

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.optim import Optimizer

from proxyrob.config.objective import MartObjective, PgdObjective, SmoothAdvObjective, TradesObjective
from proxyrob.config.train import RobustTrainConfig, SmoothTrainConfig
from proxyrob.device import has_batchnorm
from proxyrob.mix import MixedBatch
from proxyrob.rng import RowGenerator
from proxyrob.threat import Threat
from proxyrob.train.awp import awp_gamma, perturbed_weights
from proxyrob.train.objectives import PerturbedBatch, join_batches, losses_on, perturb_images
from proxyrob.train.optimizer import clip_gradients
from proxyrob.train.reading import Reader
from proxyrob.train.recompute import recomputed

PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class Stepper:
    """Takes the steps of a training.

    On the fast path attacks read a folded copy of the classifier (``FoldedCopy``) that takes over its weights at every step.
    Where an attack reads the statistics of the batch, or there is no batch normalisation to fold, it reads the classifier
    itself, as all attacks do on the plain path.
    """

    def __init__(
        self,
        config: RobustTrainConfig | SmoothTrainConfig,
        classifier: nn.Module,
        optimizer: Optimizer,
        threat: Threat | None,
        *,
        example: Float[Tensor, "b c h w"],
        before_reading: Callable[[], None] = lambda: None,
    ) -> None:
        """``before_reading`` is called before every forward pass of an attack, and may raise to leave the step undone."""
        self.config, self.classifier, self.optimizer, self.threat = config, classifier, optimizer, threat
        dtype = PRECISIONS[config.compute.precision]
        self.has_batchnorm = has_batchnorm(classifier)
        self.attack_ties_images = self.has_batchnorm and _attack_batchnorm(config) == "train"
        folds = config.compute.path == "fast" and self.has_batchnorm and _attack_batchnorm(config) == "eval"
        if folds:
            classifier.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]  (missing in torch's stubs)
        self.attacked = Reader(classifier, dtype, before=before_reading, example=example if folds else None)
        self.trained = Reader(classifier, dtype)

    def take(
        self, batch: MixedBatch, step: int, make_generator: Callable[[], torch.Generator]
    ) -> tuple[Float[Tensor, ""], Float[Tensor, "b k"]]:
        """One update of the weights; the loss before it, and the logits of the perturbed images.

        ``make_generator`` gives the step's generator, at its beginning, as often as it is called.
        """
        config = self.config
        perturbed = self._perturb(batch, step, make_generator)
        parts = self._parts(len(batch), whole=self.has_batchnorm)

        def losses() -> Iterator[tuple[Tensor, Tensor]]:
            for rows in parts:
                found = losses_on(config.objective, self.trained, perturbed.part(rows))
                yield (batch.weights[rows] * found.losses).sum(), found.logits

        self.optimizer.zero_grad(set_to_none=True)
        gamma = awp_gamma(config.objective.awp, step, config.steps)
        total, logits = torch.zeros((), device=batch.images.device), []
        with (
            recomputed(self.classifier, when=self.has_batchnorm and config.micro_batch is not None),
            perturbed_weights(self.classifier, gamma, lambda: (loss for loss, _ in losses())),
        ):
            for loss, found in losses():
                loss.backward()
                total += loss.detach()
                logits.append(found.detach())
        clip_gradients(config, self.classifier)
        self.optimizer.step()
        return total, torch.cat(logits)

    def _perturb(self, batch: MixedBatch, step: int, make_generator: Callable[[], torch.Generator]) -> PerturbedBatch:
        """The perturbed batch, made part by part where no image has to do with another."""
        self.attacked.refresh()
        with recomputed(self.classifier, when=self.attack_ties_images and self.config.micro_batch is not None):
            made = [
                perturb_images(
                    self.config.objective,
                    self.attacked,
                    batch.images[rows],
                    batch.targets[rows],
                    threat=self.threat,
                    scale=_warmup(step, self.config),
                    generator=RowGenerator(make_generator(), rows, len(batch)),
                )
                for rows in self._parts(len(batch), whole=self.attack_ties_images)
            ]
        return join_batches(made)

    def _parts(self, count: int, *, whole: bool) -> list[slice]:
        size = count if whole or self.config.micro_batch is None else self.config.micro_batch
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
