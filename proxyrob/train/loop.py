"""The one training loop."""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from proxyrob.config.models import ModelConfig
from proxyrob.config.objective import NaturalObjective
from proxyrob.config.train import RobustTrainConfig, SmoothTrainConfig
from proxyrob.errors import DataIntegrityError, NonFiniteLoss
from proxyrob.mix import Augmentation, Mix, MixedBatch, SyntheticSet
from proxyrob.models import MODEL_FILES, Classifier, ClassifierCard, build_classifier, channel_statistics, save_classifier
from proxyrob.rng import Streams
from proxyrob.source import Split, read_split, source_report
from proxyrob.source.splits import SplitName
from proxyrob.storage import DataPlace, Report, Stage
from proxyrob.storage.checkpoints import Checkpoints
from proxyrob.storage.snapshot import Stateful
from proxyrob.threat import Threat
from proxyrob.train.curves import CURVE, HISTORY, write_curves
from proxyrob.train.optimizer import build_average, build_optimizer
from proxyrob.train.processes import Processes, joined_processes
from proxyrob.train.step import Stepper
from proxyrob.train.stopping import Stop
from proxyrob.train.synced import synchronise_batchnorm
from proxyrob.train.validation import Selection, Validator
from proxyrob.types import OnProgress, no_progress

REPORT_EVERY = 10


class TrainReport(Report):
    """A trained classifier. The released weights are the average after ``released_step`` steps, and ``selection_split`` is the
    split whose images chose that step: none where it is the last."""

    steps: int
    released_step: int
    num_parameters: int
    num_validation: int
    validation_correct: int
    validation_pgd_correct: int | None
    selection: str
    selection_split: SplitName | None = None


def train_classifier(
    model: ModelConfig,
    config: RobustTrainConfig | SmoothTrainConfig,
    *,
    source: Stage,
    synthetic: Sequence[SyntheticSet],
    threat: Threat | None,
    seed: int,
    stage: Stage,
    checkpoints_at: DataPlace | None = None,
    device: str = "cpu",
    should_stop: Callable[[], bool] = lambda: False,
    on_progress: OnProgress = no_progress,
) -> TrainReport:
    """Minimise γ·L(real) + (1-γ)·L(synthetic) and write the exponential average of the weights.

    ``synthetic`` are the sets of labelled synthetic images, none to train on real images alone. The perturbation grows
    linearly over the first ``warmup`` share of the steps. Goes on from its checkpoint and ends with the weights an
    uninterrupted run ends with; copies of the checkpoints lie at ``checkpoints_at`` while it runs. Writes
    ``model.safetensors``, ``model.json``, ``history.parquet`` (step, loss, accuracy on the perturbed batch, learning rate, wall
    time) and ``curve.parquet`` (what was measured every ``validate_every`` steps); progress is told each row of both, as it is
    recorded. Weights are selected on validation images or not at all.

    ``should_stop`` is asked between the steps of every attack. As soon as it says so, the step under way is dropped, a
    checkpoint is written of those that are done, and ``InterruptedError`` is raised.

    Where torch's default process group is initialised, all its processes call this with the same arguments, each with its own
    ``device``, and train together, each on its share of every batch: an image sees the same random numbers as in one process.
    The first process writes, tells its progress and returns last; any may be asked to stop. All need the folder of ``stage``.

    Randomness: ``train/initial``; ``train/perturb`` by step; ``train/validate`` by batch; ``mix/…``. Raises
    ``NonFiniteLoss`` naming the step and the images of its batch, and ``ValueError`` when the parts of a batch cannot be
    shared by the processes.
    """
    with joined_processes() as processes:
        if (report := processes.from_first(stage.finished(TrainReport))) is not None:
            return report
        started = time.monotonic()
        streams, stop = Streams(seed), Stop(processes, should_stop)
        split, validation = read_split(source, "train"), read_split(source, "validation")
        mix = Mix(
            split,
            synthetic,
            batch_size=config.batch_size,
            num_synthetic=config.num_synthetic,
            gamma=config.gamma,
            num_classes=len(source_report(source).class_names),
            streams=streams,
            augmentation=Augmentation(config.shift, config.flip, config.cutmix),
            subset=config.subset,
            rank=processes.rank,
            num_ranks=processes.count,
        )
        classifier = build_classifier(_card(model, source, split), streams.entropy("train/initial"))
        if config.sync_batchnorm:
            synchronise_batchnorm(classifier, processes)
        training = _Training(config, classifier.to(device).train(), split, streams, device, threat, stop)
        adversarial = threat is not None and not isinstance(config.objective, NaturalObjective)
        validator = Validator(
            training.average.module,
            split,
            validation,
            threat if adversarial else None,
            streams,
            device,
            fast=config.compute.path == "fast",
            stop=stop,
        )
        with Checkpoints(stage, checkpoints_at) as checkpoints:
            with training.kept_when_stopped(checkpoints):
                try:
                    training.run(checkpoints, mix, validator, on_progress)
                finally:
                    mix.close()
                released, selection = training.average.module, training.selection
                assert isinstance(released, Classifier)  # a copy of what the average was built from
                if config.selection == "validation":
                    released.load_state_dict(selection.weights)
                correct, pgd_correct = validator.count_correct(validation)
            report = _report_on(config, training, correct, pgd_correct, len(validation))
            if processes.is_first:
                save_classifier(released, stage.folder)
                files = [*MODEL_FILES, *write_curves(stage, {HISTORY: training.rows, CURVE: selection.curve})]
                stage.finish(report, files, started)
                checkpoints.clear()
        processes.wait()
        return report


def _report_on(
    config: RobustTrainConfig | SmoothTrainConfig,
    training: "_Training",
    correct: int,
    pgd_correct: int | None,
    num_validation: int,
) -> TrainReport:
    selects, step = config.selection == "validation", training.selection.step
    return TrainReport(
        steps=config.steps,
        released_step=step if selects else config.steps,
        num_parameters=sum(parameter.numel() for parameter in training.classifier.parameters()),
        num_validation=num_validation,
        validation_correct=correct,
        validation_pgd_correct=pgd_correct,
        selection=f"best on validation images (step {step})" if selects else "last step",
        selection_split="validation" if selects else None,
    )


@dataclass(frozen=True)
class _Step:
    """What a row of the history is made of."""

    logits: Tensor
    labels: Tensor
    learning_rate: float


class _Training:
    """What changes while a classifier is trained. ``done`` steps are in the weights, the average and the schedule."""

    def __init__(
        self,
        config: RobustTrainConfig | SmoothTrainConfig,
        classifier: Classifier,
        split: Split,
        streams: Streams,
        device: str,
        threat: Threat | None,
        stop: Stop,
    ) -> None:
        self.config, self.classifier, self.streams, self.device = config, classifier, streams, device
        self.processes: Processes = stop.processes
        self.average = build_average(config, classifier)
        self.optimizer, self.schedule = build_optimizer(config, classifier)
        example = split.first(2).images.to(device)
        self.stepper = Stepper(config, classifier, self.optimizer, threat, example=example, stop=stop)
        self.selection = Selection()
        self.rows: list[dict[str, float]] = []
        self.recent: list[Tensor] = []
        self.done, self.loaded, self.kept = 0, 0, 0

    @property
    def parts(self) -> dict[str, Stateful]:
        """What a checkpoint holds."""
        return {
            "model": self.classifier,
            "average": self.average,
            "optimizer": self.optimizer,
            "schedule": self.schedule,
            "selection": self.selection,
        }

    def run(self, checkpoints: Checkpoints, mix: Mix, validator: Validator, on_progress: OnProgress) -> None:
        """All steps that are not done yet."""
        with self.processes.first_goes_first():
            self.done, history = checkpoints.load(self.parts, self.device)
        self.rows, self.loaded, self.kept, steps = list(history), self.done, self.done, self.config.steps
        if len(set(found := self.processes.all_values(self.done))) > 1:
            raise DataIntegrityError(
                f"the processes found checkpoints of different steps, {found}: expected all of them to see "
                f"{checkpoints.stage.scratch}"
            )
        self._measure_if_due(validator)  # a training that was stopped may have missed it
        for batch in mix.batches(self.done, steps, self.device):
            step = self._take_step(batch)
            is_checkpoint = self.done % self.config.checkpoint_every == 0 or self.done == steps
            is_report = self.done % REPORT_EVERY == 0 or is_checkpoint
            if is_report:
                self._report(step, mix)
            if is_checkpoint:
                self._require_finite_weights()
            is_measured = self._measure_if_due(validator)
            if self.processes.is_first:
                told = [*(self.rows[-1:] if is_report else ()), *(self.selection.curve[-1:] if is_measured else ())]
                for row in told:  # each as it is recorded, with its own moment
                    on_progress(self.done, steps, **{name: value for name, value in row.items() if name != "step"})
            if is_checkpoint and self.done < steps:
                self.kept = self.done
                if self.processes.is_first:
                    checkpoints.save(self.done, self.parts, self.rows)

    @contextmanager
    def kept_when_stopped(self, checkpoints: Checkpoints) -> Iterator[None]:
        """Write a checkpoint when the block is left because a stop was asked for."""
        try:
            yield
        except InterruptedError:
            if self.done > self.loaded:
                self._require_finite_weights()
                if self.processes.is_first:
                    checkpoints.save(self.done, self.parts, self.rows, wait=True)
            self.processes.wait()
            raise InterruptedError(
                f"asked to stop: {self.done} of {self.config.steps} steps are in a checkpoint; the same command goes on from "
                "there"
            ) from None

    def _take_step(self, batch: MixedBatch) -> _Step:
        learning_rate = float(self.schedule.get_last_lr()[0])
        make_generator = partial(self.streams.torch, "train/perturb", self.device, step=self.done)
        loss, logits = self.stepper.take(batch, self.done, make_generator)
        self.average.update_parameters(self.classifier)
        self.schedule.step()
        self.recent.append(loss)
        self.done += 1
        return _Step(logits, batch.labels, learning_rate)

    def _report(self, step: _Step, mix: Mix) -> None:
        """Look at the losses since the last report, and add a row to the history; both are of the whole batches."""
        accuracy = (step.logits.argmax(1) == step.labels).float().mean()
        own = torch.stack([*self.recent, accuracy])
        whole = own.clone()
        self.processes.average([whole])
        *losses, accuracy = whole.tolist()
        first = self.done - len(losses)
        for number, loss in enumerate(losses):
            if not math.isfinite(loss):
                raise NonFiniteLoss(self._describe_non_finite(first + number, float(own[number]), mix))
        self.recent = []
        self.rows.append(
            {
                "step": self.done,
                "loss": losses[-1],
                "accuracy": accuracy,
                "learning_rate": step.learning_rate,
                "time_s": time.time(),
            }
        )

    @property
    def _last_good(self) -> str:
        """What there is to go on from."""
        return f"the last good checkpoint is of step {self.kept}" if self.kept else "there is no checkpoint yet"

    def _describe_non_finite(self, step: int, own: float, mix: Mix) -> str:
        """Where the loss was not finite: the step, the processes and their images."""
        found = self.processes.all_values((own, mix.batch(step).describe()))
        pieces = [
            f"the loss is {loss} at step {step}{f' in process {rank}' if len(found) > 1 else ''} ({images})"
            for rank, (loss, images) in enumerate(found)
            if not math.isfinite(loss) or all(math.isfinite(each) for each, _ in found)  # then their sum is too large
        ]
        return f"{'; '.join(pieces)}; lower the learning rate or look at these images; {self._last_good}"

    def _require_finite_weights(self) -> None:
        """The loss of a step does not show what its update did to the weights; only the next one would."""
        weights = dict(self.classifier.named_parameters())
        finite = torch.stack([weight.isfinite().all() for weight in weights.values()]).tolist()
        for name, is_finite in zip(weights, finite, strict=True):
            if not is_finite:
                raise NonFiniteLoss(
                    f"the weights {name} are not finite after step {self.done - 1}; lower the learning rate; {self._last_good}"
                )

    def _measure_if_due(self, validator: Validator) -> bool:
        every, done = self.config.validate_every, self.done
        if every is None or not done or self.selection.has(done) or (done % every and done < self.config.steps):
            return False
        self.selection.offer(validator.measure(done), self.average.module)
        return True


def _card(model: ModelConfig, source: Stage, split: Split) -> ClassifierCard:
    report = source_report(source)
    mean, std = channel_statistics(split.stored)
    return ClassifierCard(model=model, image_shape=report.image_shape, num_classes=len(report.class_names), mean=mean, std=std)
