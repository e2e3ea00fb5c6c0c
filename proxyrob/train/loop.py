"""The one training loop."""

import math
import time
from collections.abc import Callable, Sequence
from functools import partial

import pandas as pd
import torch
from torch import Tensor

from proxyrob.config.models import ModelConfig
from proxyrob.config.objective import NaturalObjective
from proxyrob.config.train import RobustTrainConfig, SmoothTrainConfig
from proxyrob.errors import NonFiniteLoss
from proxyrob.mix import Augmentation, Mix, MixedBatch, SyntheticSet
from proxyrob.models import MODEL_FILES, Classifier, ClassifierCard, build_classifier, channel_statistics, save_classifier
from proxyrob.rng import Streams
from proxyrob.source import Split, read_split, source_report
from proxyrob.storage import Report, Stage
from proxyrob.storage.checkpoint import Stateful, load_checkpoint, save_checkpoint
from proxyrob.storage.files import write_table
from proxyrob.threat import Threat
from proxyrob.train.optimizer import build_average, build_optimizer
from proxyrob.train.step import Stepper
from proxyrob.train.validation import Selection, Validator
from proxyrob.types import OnProgress, no_progress

REPORT_EVERY = 10
HISTORY = "history.parquet"
CURVE = "curve.parquet"


class TrainReport(Report):
    """A trained classifier. The released weights are the average after ``released_step`` steps."""

    steps: int
    released_step: int
    num_parameters: int
    num_validation: int
    validation_correct: int
    validation_pgd_correct: int | None
    selection: str


def train_classifier(
    model: ModelConfig,
    config: RobustTrainConfig | SmoothTrainConfig,
    *,
    source: Stage,
    synthetic: Sequence[SyntheticSet],
    threat: Threat | None,
    seed: int,
    stage: Stage,
    device: str = "cpu",
    should_stop: Callable[[], bool] = lambda: False,
    on_progress: OnProgress = no_progress,
) -> TrainReport:
    """Minimise γ·L(real) + (1-γ)·L(synthetic) and write the exponential average of the weights.

    ``synthetic`` are the sets of labelled synthetic images, none to train on real images alone. The perturbation grows
    linearly over the first ``warmup`` share of the steps. Goes on from its checkpoint and ends with the weights an
    uninterrupted run ends with. Writes ``model.safetensors``, ``model.json``, ``history.parquet`` (step, loss, accuracy on
    the perturbed batch, learning rate, wall time) and ``curve.parquet`` (what was measured every ``validate_every`` steps).
    Weights are selected on validation images or not at all.

    ``should_stop`` is asked between the steps of every attack. As soon as it says so, the step under way is dropped, a
    checkpoint is written of those that are done, and ``InterruptedError`` is raised.

    Randomness: ``train/initial``; ``train/perturb`` by step; ``train/validate`` by batch; ``mix/…``. Raises
    ``NonFiniteLoss`` naming the step and the images of its batch.
    """
    if (report := stage.finished(TrainReport)) is not None:
        return report
    started = time.monotonic()
    streams = Streams(seed)
    split = read_split(source, "train")
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
    )
    classifier = build_classifier(_card(model, source, split), streams.entropy("train/initial")).to(device).train()
    adversarial = threat is not None and not isinstance(config.objective, NaturalObjective)
    validation = read_split(source, "validation")
    training = _Training(config, classifier, split, streams, device, threat, should_stop)
    validator = Validator(
        training.average.module,
        split,
        validation,
        threat if adversarial else None,
        streams,
        device,
        fast=config.compute.path == "fast",
        before_reading=training.stop_when_asked,
    )
    try:
        training.run(stage, mix, validator, on_progress)
    finally:
        mix.close()
    released, selection = training.average.module, training.selection
    assert isinstance(released, Classifier)  # a copy of what the average was built from
    if config.selection == "validation":
        released.load_state_dict(selection.weights)
    save_classifier(released, stage.folder)
    files = [*MODEL_FILES, *_write_curves(stage, {HISTORY: training.rows, CURVE: selection.curve})]
    correct, pgd_correct = validator.count_correct(validation)
    report = TrainReport(
        steps=config.steps,
        released_step=selection.step if config.selection == "validation" else config.steps,
        num_parameters=sum(parameter.numel() for parameter in classifier.parameters()),
        num_validation=len(validation),
        validation_correct=correct,
        validation_pgd_correct=pgd_correct,
        selection="last step" if config.selection == "last" else f"best on validation images (step {selection.step})",
    )
    stage.finish(report, files, started)
    stage.clear()
    return report


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
        should_stop: Callable[[], bool],
    ) -> None:
        self.config, self.classifier, self.streams, self.device, self.should_stop = (
            config,
            classifier,
            streams,
            device,
            should_stop,
        )
        self.average = build_average(config, classifier)
        self.optimizer, self.schedule = build_optimizer(config, classifier)
        example = split.first(2).images.to(device)
        self.stepper = Stepper(config, classifier, self.optimizer, threat, example=example, before_reading=self.stop_when_asked)
        self.selection = Selection()
        self.rows: list[dict[str, float]] = []
        self.recent: list[Tensor] = []
        self.done = 0

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

    def stop_when_asked(self) -> None:
        if self.should_stop():
            raise InterruptedError

    def run(self, stage: Stage, mix: Mix, validator: Validator, on_progress: OnProgress) -> None:
        """All steps that are not done yet."""
        self.done, history = load_checkpoint(stage, self.parts, self.device)
        self.rows, first, steps = list(history), self.done, self.config.steps
        try:
            self._measure_if_due(validator)  # a training that was stopped may have missed it
            for batch in mix.batches(first, steps, self.device):
                self.stop_when_asked()
                row = self._take_step(batch)
                is_checkpoint = self.done % self.config.checkpoint_every == 0 or self.done == steps
                is_report = self.done % REPORT_EVERY == 0 or is_checkpoint
                if is_report:
                    self._report(row, mix)
                if is_checkpoint:
                    self._require_finite_weights()
                is_measured = self._measure_if_due(validator)
                if is_report or is_measured:
                    curve = self.selection.curve[-1:] if is_measured else []
                    on_progress(self.done, steps, **_figures(self.rows[-1:], curve))
                if is_checkpoint and self.done < steps:
                    save_checkpoint(stage, self.done, self.parts, tuple(self.rows))
        except InterruptedError:
            if self.done > first:
                self._require_finite_weights()
                save_checkpoint(stage, self.done, self.parts, tuple(self.rows))
            raise InterruptedError(
                f"asked to stop: {self.done} of {steps} steps are in a checkpoint; the same command goes on from there"
            ) from None

    def _take_step(self, batch: MixedBatch) -> Callable[[], dict[str, float]]:
        """One step; what makes the row of the history that describes it, if it is wanted."""
        learning_rate = float(self.schedule.get_last_lr()[0])
        make_generator = partial(self.streams.torch, "train/perturb", self.device, step=self.done)
        loss, logits = self.stepper.take(batch, self.done, make_generator)
        self.average.update_parameters(self.classifier)
        self.schedule.step()
        self.recent.append(loss)
        self.done += 1
        done = self.done
        return lambda: {
            "step": done,
            "loss": float(loss),
            "accuracy": (logits.argmax(1) == batch.labels).float().mean().item(),
            "learning_rate": learning_rate,
            "time_s": time.time(),
        }

    def _report(self, row: Callable[[], dict[str, float]], mix: Mix) -> None:
        """Look at the losses since the last report."""
        losses = torch.stack(self.recent).tolist()
        for step, loss in enumerate(losses, start=self.done - len(losses)):
            if not math.isfinite(loss):
                raise NonFiniteLoss(
                    f"the loss is {loss} at step {step} ({mix.batch(step).describe()}); lower the learning rate or look at "
                    "these images. The last checkpoint is from before this step"
                )
        self.recent = []
        self.rows.append(row())

    def _require_finite_weights(self) -> None:
        """The loss of a step does not show what its update did to the weights; only the next one would."""
        weights = dict(self.classifier.named_parameters())
        finite = torch.stack([weight.isfinite().all() for weight in weights.values()]).tolist()
        for name, is_finite in zip(weights, finite, strict=True):
            if not is_finite:
                raise NonFiniteLoss(f"the weights {name} are not finite after step {self.done - 1}; lower the learning rate")

    def _measure_if_due(self, validator: Validator) -> bool:
        every, done = self.config.validate_every, self.done
        if every is None or not done or self.selection.has(done) or (done % every and done < self.config.steps):
            return False
        self.selection.offer(validator.measure(done), self.average.module)
        return True


def read_history(stage: Stage) -> pd.DataFrame:
    """The curve of a finished training: step, loss, accuracy, learning_rate, time_s."""
    return pd.read_parquet(stage.verified(HISTORY))


def read_curve(stage: Stage) -> pd.DataFrame:
    """What was measured while training ran, of the averaged weights (``Validator.measure``); empty if nothing was."""
    record = stage.record()
    if record is None or CURVE not in {entry.name for entry in record.files}:
        return pd.DataFrame({"step": [], "time_s": []})
    return pd.read_parquet(stage.verified(CURVE))


def _write_curves(stage: Stage, curves: dict[str, list[dict[str, float]]]) -> list[str]:
    """Write those that have points; their names."""
    written = {name: rows for name, rows in curves.items() if rows}
    for name, rows in written.items():
        write_table(stage.folder / name, pd.DataFrame(rows).astype({"step": "int64"}))
    return list(written)


def _figures(rows: list[dict[str, float]], curve: list[dict[str, float]]) -> dict[str, float]:
    """What is worth showing while training runs."""
    row: dict[str, float] = {}
    for part in (*rows, *curve):
        row |= part
    return {name: value for name, value in row.items() if name not in ("step", "time_s")}


def _card(model: ModelConfig, source: Stage, split: Split) -> ClassifierCard:
    report = source_report(source)
    mean, std = channel_statistics(split.images)
    return ClassifierCard(model=model, image_shape=report.image_shape, num_classes=len(report.class_names), mean=mean, std=std)
