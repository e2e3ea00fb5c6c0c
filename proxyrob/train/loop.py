"""The one training loop."""

import time
from collections.abc import Sequence

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel

from proxyrob.config.models import ModelConfig
from proxyrob.config.objective import NaturalObjective
from proxyrob.config.train import RobustTrainConfig, SmoothTrainConfig
from proxyrob.errors import NonFiniteLoss
from proxyrob.mix import Augmentation, Mix, MixedBatch, SyntheticSet
from proxyrob.models import MODEL_FILES, Classifier, ClassifierCard, build_classifier, channel_statistics, save_classifier
from proxyrob.rng import Streams
from proxyrob.source import Split, read_split, source_report
from proxyrob.storage import Report, Stage
from proxyrob.storage.checkpoint import load_checkpoint, save_checkpoint
from proxyrob.storage.files import write_table
from proxyrob.threat import Threat
from proxyrob.train.awp import awp_gamma, perturbed_weights
from proxyrob.train.objectives import losses_on, perturb_images
from proxyrob.train.optimizer import build_average, build_optimizer, clip_gradients
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
    on_progress: OnProgress = no_progress,
) -> TrainReport:
    """Minimise γ·L(real) + (1-γ)·L(synthetic) and write the exponential average of the weights.

    ``synthetic`` are the sets of labelled synthetic images, none to train on real images alone. The perturbation grows
    linearly over the first ``warmup`` share of the steps. Goes on from its checkpoint and ends with the weights an
    uninterrupted run ends with. Writes ``model.safetensors``, ``model.json``, ``history.parquet`` (step, loss, accuracy on
    the perturbed batch, learning rate, wall time) and ``curve.parquet`` (what was measured every ``validate_every`` steps).
    Weights are selected on validation images or not at all.

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
    average = build_average(config, classifier)
    optimizer, schedule = build_optimizer(config, classifier)
    adversarial = threat is not None and not isinstance(config.objective, NaturalObjective)
    validation = read_split(source, "validation")
    validator = Validator(split, validation, threat if adversarial else None, streams, device)
    selection = Selection()
    parts = {
        "model": classifier,
        "average": average,
        "optimizer": optimizer,
        "schedule": schedule,
        "selection": selection,
    }
    first, history = load_checkpoint(stage, parts, device)
    rows = list(history)
    recent: list[Tensor] = []
    for step, batch in enumerate(mix.batches(first, config.steps, device), start=first):
        loss, logits = _take_step(
            config, classifier, optimizer, batch, threat, step, streams.torch("train/perturb", device, step=step)
        )
        average.update_parameters(classifier)
        recent.append(loss)
        is_last = step + 1 == config.steps
        is_checkpoint = (step + 1) % config.checkpoint_every == 0 or is_last
        is_measured = config.validate_every is not None and ((step + 1) % config.validate_every == 0 or is_last)
        if (step + 1) % REPORT_EVERY == 0 or is_checkpoint:
            losses = torch.stack(recent).tolist()
            _require_finite(losses, step, mix)
            rows.append(
                {
                    "step": step + 1,
                    "loss": losses[-1],
                    "accuracy": (logits.argmax(1) == batch.labels).float().mean().item(),
                    "learning_rate": float(schedule.get_last_lr()[0]),
                    "time_s": time.time(),
                }
            )
            recent = []
        if is_measured:
            selection.offer(validator.measure(average.module, step + 1), average.module)
        if not recent or is_measured:
            on_progress(step + 1, config.steps, **_figures(rows[-1:], selection.curve[-1:] if is_measured else []))
        schedule.step()
        if is_checkpoint and not is_last:
            save_checkpoint(stage, step + 1, parts, tuple(rows))
    mix.close()
    _require_finite_weights(average, config.steps)
    released = average.module
    assert isinstance(released, Classifier)  # a copy of what the average was built from
    if config.selection == "validation":
        released.load_state_dict(selection.weights)
    save_classifier(released, stage.folder)
    files = [*MODEL_FILES, *_write_curves(stage, {HISTORY: rows, CURVE: selection.curve})]
    correct, pgd_correct = validator.count_correct(released, validation)
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


def _take_step(
    config: RobustTrainConfig | SmoothTrainConfig,
    classifier: Classifier,
    optimizer: Optimizer,
    batch: MixedBatch,
    threat: Threat | None,
    step: int,
    generator: torch.Generator,
) -> tuple[Float[Tensor, ""], Float[Tensor, "b k"]]:
    """One update of the weights; the loss before it, and the logits of the perturbed images."""
    perturbed = perturb_images(
        config.objective,
        classifier,
        batch.images,
        batch.targets,
        threat=threat,
        scale=_warmup(step, config),
        generator=generator,
    )

    def weighted() -> tuple[Float[Tensor, ""], Float[Tensor, "b k"]]:
        found = losses_on(config.objective, classifier, perturbed)
        return (batch.weights * found.losses).sum(), found.logits

    optimizer.zero_grad(set_to_none=True)
    gamma = awp_gamma(config.objective.awp, step, config.steps)
    with perturbed_weights(classifier, gamma, lambda: weighted()[0]):
        loss, logits = weighted()
        loss.backward()
    clip_gradients(config, classifier)
    optimizer.step()
    return loss.detach(), logits.detach()


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


def _warmup(step: int, config: RobustTrainConfig | SmoothTrainConfig) -> float:
    steps = round(config.warmup * config.steps)
    return min(1.0, (step + 1) / steps) if steps else 1.0


def _require_finite(losses: list[float], last_step: int, mix: Mix) -> None:
    for step, loss in enumerate(losses, start=last_step + 1 - len(losses)):
        if not torch.isfinite(torch.tensor(loss)):
            raise NonFiniteLoss(
                f"the loss is {loss} at step {step} ({mix.batch(step).describe()}); lower the learning rate or look at these "
                "images. The last checkpoint is from before this step"
            )


def _require_finite_weights(average: AveragedModel, step: int) -> None:
    """The loss of a step does not show what its update did to the weights; the last update has no loss after it."""
    for name, weight in average.module.named_parameters():
        if not bool(torch.isfinite(weight).all()):
            raise NonFiniteLoss(f"the weights {name} are not finite after step {step - 1}; lower the learning rate")
