"""Whole trainings that ``benchmarks/training.py`` looks at, each run in a process of its own.

    python benchmarks/loops.py '{"loop": "overhead", "network": "digits", …}'

prints one JSON object. ``overhead``: what a training does beside its steps. ``quality``: how robust networks get on the plain
path, on the fast one, and in bfloat16.
"""

import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from benchmarks.steps import LEARNING_RATE, NETWORKS, NUM_CLASSES, batch_of, images_of, labels_of
from proxyrob.attacks import attack_pgd
from proxyrob.config import PgdObjective, RobustTrainConfig
from proxyrob.config.models import ResnetModel
from proxyrob.config.optimizer import SgdOptimizer
from proxyrob.config.source import Cifar10Source
from proxyrob.config.train import ComputeConfig
from proxyrob.models import ClassifierCard, build_classifier, load_classifier
from proxyrob.rng import Streams
from proxyrob.source import Split, prepare_source, read_split
from proxyrob.source.fingerprint import pin_source
from proxyrob.threat import parse_threat
from proxyrob.train import build_optimizer, train_classifier
from proxyrob.train.curves import read_history
from proxyrob.train.loop import REPORT_EVERY
from proxyrob.train.step import Stepper
from tests.toys import stage_in, write_set, write_source

NUM_REAL, NUM_SYNTHETIC = 200, 20_000
NUM_TRAIN, NUM_VALIDATION = 4000, 1000
QUALITY_MODEL, QUALITY_THREAT = ResnetModel(widths=(16, 32, 64)), parse_threat("linf:8/255")
EVALUATION_STEPS, EVALUATION_BATCH = 20, 250
COMPARED_STEPS = 200
"""The first steps, whose losses are compared."""


def overhead(task: dict[str, Any]) -> dict[str, Any]:
    """Seconds of a step by itself, on a batch that is already there, and of a training's step with all that belongs to it.

    Between two calls of ``on_progress`` there are ten steps with their batches, the average of the weights and the metrics;
    after some of the calls there is a checkpoint. Either is a median over all such times.
    """
    model, (channels, height, width), threat = NETWORKS[task["network"]]
    config = RobustTrainConfig(
        steps=task["steps"],
        batch_size=task["batch"],
        checkpoint_every=task["checkpoint_every"],
        compute=ComputeConfig(precision=task["precision"]),
    )
    rng = np.random.default_rng(0)
    synthetic, real = (rng.integers(0, 256, (count, height, width, channels), np.uint8) for count in (NUM_SYNTHETIC, NUM_REAL))
    with tempfile.TemporaryDirectory(dir=task["folder"]) as name:
        folder = Path(name)
        source = stage_in(folder, "source")
        write_source(source, Split(real, np.arange(NUM_REAL) % NUM_CLASSES))
        of = write_set(folder / "set", synthetic, np.arange(NUM_SYNTHETIC) % NUM_CLASSES, shard_size=NUM_SYNTHETIC // 2)
        marks: dict[int, tuple[float, float]] = {}

        def mark(done: int, total: int, **_: float) -> None:
            marks[done] = time.perf_counter(), time.process_time()

        train_classifier(
            model,
            config,
            source=source,
            synthetic=[of],
            threat=threat,
            seed=0,
            stage=stage_in(folder, "train"),
            on_progress=mark,
        )
    found: dict[str, Any] = {}
    alone = _steps_alone(task, config)
    for clock, name in enumerate(("wall_s", "cpu_s")):
        spans = {done: marks[done + REPORT_EVERY][clock] - marks[done][clock] for done in marks if done + REPORT_EVERY in marks}
        with_checkpoint = [span for done, span in spans.items() if done % config.checkpoint_every == 0]
        without = [span for done, span in spans.items() if done % config.checkpoint_every]
        found[name] = {
            "alone": median(times[clock] for times in alone),
            "loop": median(without) / REPORT_EVERY,
            "checkpoint": median(with_checkpoint) - median(without),
        }
    return found


def _steps_alone(task: dict[str, Any], config: RobustTrainConfig) -> list[tuple[float, float]]:
    """Seconds of each step, by the clock and of computing; those that warm up are left out."""
    model, shape, threat = NETWORKS[task["network"]]
    half = (0.5,) * shape[0]
    card = ClassifierCard(model=model, image_shape=shape, num_classes=NUM_CLASSES, mean=half, std=half)
    classifier = build_classifier(card, 0).train()
    optimizer, _ = build_optimizer(config, classifier)
    images, times = images_of(task["batch"], shape, seed=1), []
    stepper = Stepper(config, classifier, optimizer, threat, example=images[:2])
    batch, make_generator = batch_of(images, labels_of(task["batch"])), partial(Streams(0).torch, "train/perturb")
    for _ in range(task["first"] + task["alone"]):
        wall, cpu = time.perf_counter(), time.process_time()
        stepper.take(batch, config.steps, make_generator)
        times.append((time.perf_counter() - wall, time.process_time() - cpu))
    return times[task["first"] :]


def quality(task: dict[str, Any]) -> dict[str, Any]:
    """Train on CIFAR-10 images with one seed: clean and PGD-20 accuracy on validation images, measured in float32.

    ``losses`` are those of every tenth of the first steps.
    """
    config = RobustTrainConfig(
        objective=PgdObjective(attack_steps=5, relative_step=0.4),
        steps=task["steps"],
        batch_size=task["batch"],
        synthetic_fraction=0.0,
        gamma=1.0,
        learning_rate=10 * LEARNING_RATE,
        optimizer=SgdOptimizer(),
        warmup=0.0,
        flip=True,
        shift=2,
        checkpoint_every=task["steps"],
        compute=ComputeConfig(path=task["path"], precision=task["precision"]),
    )
    source_config = Cifar10Source(
        path=task["cifar"],
        train_file=task["train_file"],
        test_file=task["test_file"],
        num_train=NUM_TRAIN,
        num_validation=NUM_VALIDATION,
        num_test=100,
    )
    with tempfile.TemporaryDirectory(dir=task["folder"]) as name:
        folder = Path(name)
        source, stage = stage_in(folder, "source"), stage_in(folder, "train")
        prepare_source(pin_source(source_config), seed=0, stage=source, downloads=folder)
        started = time.process_time()
        train_classifier(
            QUALITY_MODEL, config, source=source, synthetic=[], threat=QUALITY_THREAT, seed=task["seed"], stage=stage
        )
        cpu_s = time.process_time() - started
        losses = read_history(stage).loss.tolist()[: COMPARED_STEPS // REPORT_EVERY]
        classifier, validation = load_classifier(stage), read_split(source, "validation")
    clean, robust = 0, 0
    for start in range(0, len(validation), EVALUATION_BATCH):
        part = Split(*(array[start : start + EVALUATION_BATCH] for array in (validation.stored, validation.labels)))
        images, labels = part.images, part.targets
        attacked = attack_pgd(
            classifier,
            images,
            lambda logits, labels=labels: F.cross_entropy(logits, labels, reduction="sum"),
            QUALITY_THREAT,
            steps=EVALUATION_STEPS,
            relative_step=0.1,
            generator=Streams(0).torch("evaluate", first=start),
        )
        with torch.no_grad():
            clean += int((classifier(images).argmax(1) == labels).sum())
            robust += int((classifier(attacked).argmax(1) == labels).sum())
    return {"clean": clean / len(validation), "robust": robust / len(validation), "cpu_s": cpu_s, "losses": losses}


LOOPS: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {"overhead": overhead, "quality": quality}


def main() -> None:
    task = json.loads(sys.argv[1])
    os.sched_setaffinity(0, task["cores"])
    torch.set_num_threads(task["threads"])
    print(json.dumps(LOOPS[task["loop"]](task)))


if __name__ == "__main__":
    main()
