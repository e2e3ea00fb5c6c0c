"""The one training loop."""

import time
from pathlib import Path

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel

from proxyrob.attacks import attack_pgd
from proxyrob.config.models import ModelConfig
from proxyrob.config.train import NaturalObjective, RobustTrainConfig, SmoothTrainConfig
from proxyrob.errors import NonFiniteLoss
from proxyrob.mix import Mix, read_synthetic
from proxyrob.models import MODEL_FILES, Classifier, ClassifierCard, build_classifier, channel_statistics, save_classifier
from proxyrob.rng import Streams
from proxyrob.schedule import average_with_warmup, cosine_with_warmup
from proxyrob.source import Split, read_split, source_report
from proxyrob.storage import Report, Stage
from proxyrob.storage.checkpoint import load_checkpoint, save_checkpoint
from proxyrob.storage.files import write_table
from proxyrob.threat import Threat
from proxyrob.train.objectives import compute_losses
from proxyrob.types import OnProgress, no_progress

REPORT_EVERY = 10
HISTORY = "history.parquet"
VALIDATION_PGD_STEPS = 10


class TrainReport(Report):
    """A trained classifier. The released weights are the average at the last step: nothing was selected."""

    steps: int
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
    synthetic: tuple[Stage, Stage] | None,
    threat: Threat | None,
    seed: int,
    stage: Stage,
    device: str = "cpu",
    on_progress: OnProgress = no_progress,
) -> TrainReport:
    """Minimise γ·L(real) + (1-γ)·L(synthetic) and write the exponential average of the weights.

    ``synthetic`` is the stages of the samples and of their labels, or ``None`` to train on real images alone. AdamW with
    a cosine schedule; the perturbation grows linearly over the first ``warmup`` share of the steps. Goes on from its
    checkpoint and ends with the weights an uninterrupted run ends with. Writes ``model.safetensors``, ``model.json`` and
    ``history.parquet`` (step, loss, accuracy on the perturbed batch, learning rate, wall time).

    Randomness: ``train/initial``; ``train/perturb`` by step; ``mix/…``. Raises ``NonFiniteLoss`` naming the step and
    the images of its batch.
    """
    if (report := stage.finished(TrainReport)) is not None:
        return report
    started = time.monotonic()
    streams = Streams(seed)
    split = read_split(source, "train")
    mix = Mix(
        split,
        read_synthetic(*synthetic) if synthetic else None,
        batch_size=config.batch_size,
        num_synthetic=config.num_synthetic,
        gamma=config.gamma,
        shift=config.shift,
        streams=streams,
    )
    classifier = build_classifier(_card(model, source, split), streams.entropy("train/initial")).to(device).train()
    average = AveragedModel(classifier, multi_avg_fn=average_with_warmup(config.ema_decay))
    optimizer = torch.optim.AdamW(
        classifier.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay, fused=True
    )
    schedule = cosine_with_warmup(optimizer, config.steps)
    parts = {"model": classifier, "average": average, "optimizer": optimizer, "schedule": schedule}
    first, history = load_checkpoint(stage, parts, device)
    rows = list(history)
    recent: list[Tensor] = []
    for step in range(first, config.steps):
        batch = mix.batch(step, device)
        found = compute_losses(
            config.objective,
            classifier,
            batch.images,
            batch.labels,
            threat=threat,
            scale=_warmup(step, config),
            generator=streams.torch("train/perturb", device, step=step),
        )
        loss = (batch.weights * found.losses).sum()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        average.update_parameters(classifier)
        recent.append(loss.detach())
        is_checkpoint = (step + 1) % config.checkpoint_every == 0 or step + 1 == config.steps
        if (step + 1) % REPORT_EVERY == 0 or is_checkpoint:
            losses = torch.stack(recent).tolist()
            _require_finite(losses, step, mix)
            accuracy = (found.logits.detach().argmax(1) == batch.labels).float().mean().item()
            rows.append(
                {
                    "step": step + 1,
                    "loss": losses[-1],
                    "accuracy": accuracy,
                    "learning_rate": float(schedule.get_last_lr()[0]),
                    "time_s": time.time(),
                }
            )
            recent = []
            on_progress(step + 1, config.steps, loss=losses[-1], accuracy=accuracy)
        schedule.step()
        if is_checkpoint and step + 1 < config.steps:
            save_checkpoint(stage, step + 1, parts, tuple(rows))
    released = average.module
    assert isinstance(released, Classifier)  # a copy of what the average was built from
    save_classifier(released, stage.folder)
    write_table(stage.folder / HISTORY, pd.DataFrame(rows).astype({"step": "int64"}))
    validation = read_split(source, "validation")
    adversarial = threat is not None and not isinstance(config.objective, NaturalObjective)
    report = TrainReport(
        steps=config.steps,
        num_parameters=sum(parameter.numel() for parameter in classifier.parameters()),
        num_validation=len(validation),
        validation_correct=_count_correct(released, validation.images, validation, device),
        validation_pgd_correct=_validate_pgd(released, validation, threat, streams, device) if threat and adversarial else None,
        selection="last step",
    )
    stage.finish(report, [*MODEL_FILES, HISTORY], started)
    stage.clear()
    return report


def read_history(stage: Stage) -> pd.DataFrame:
    """The curve of a finished training: step, loss, accuracy, learning_rate, time_s."""
    path: Path = stage.verified(HISTORY)
    return pd.read_parquet(path)


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


@torch.inference_mode()
def _count_correct(model: nn.Module, images: Float[Tensor, "n c h w"], split: Split, device: str) -> int:
    model.eval()
    return int((model(images.to(device)).argmax(1).cpu() == split.targets).sum())


def _validate_pgd(model: nn.Module, split: Split, threat: Threat, streams: Streams, device: str) -> int:
    targets = split.targets.to(device)
    attacked = attack_pgd(
        model,
        split.images.to(device),
        lambda logits: F.cross_entropy(logits, targets, reduction="sum"),
        threat,
        steps=VALIDATION_PGD_STEPS,
        relative_step=0.25,
        generator=streams.torch("train/validate", device),
    )
    return _count_correct(model, attacked, split, device)
