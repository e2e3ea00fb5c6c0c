"""The presets that ship: each can be planned, says how it is run, and has the numbers of the recipe it is named after."""

import math
import re
from pathlib import Path

import pytest

from flows.plan import Plan, plan_pipeline
from proxyrob.config import (
    OneCycleSchedule,
    PipelineConfig,
    PreactResnetModel,
    PublishedProxy,
    SgdOptimizer,
    TradesObjective,
    WideResnetModel,
    load_config,
    preset_names,
    preset_text,
)
from proxyrob.threat import parse_threat

STORE = Path("store")
REAL_IMAGES = 50_000
"""What an epoch of the published recipes goes through, whatever was held out."""

SET = re.compile(r"--set (\S+=[^\s;,()]+)")


def _plan(config: PipelineConfig) -> Plan:
    """As if the set that a preset names had been imported."""
    proxy = config.proxy
    if isinstance(proxy, PublishedProxy):
        config = config.replace(proxy=proxy.replace(sha256="1" * 64, num_images=1_000_000))
    return plan_pipeline(config, STORE)


@pytest.mark.parametrize("name", preset_names())
def test_a_preset_can_be_planned(name: str) -> None:
    """Every preset has all its stages, and a mixed model where it has a proxy."""
    config = load_config(name)
    plan = _plan(config)
    assert list(plan.variants) == ["real-only", *(["mixed"] if config.proxy else [])]
    assert {"source", "train", "evaluate", "certify", "export"} <= {stage.name for stage in plan.stages()}


@pytest.mark.parametrize("name", preset_names())
def test_a_preset_says_how_it_is_run(name: str) -> None:
    """The header begins with one sentence and names the command; whatever changes it suggests are accepted."""
    header = [line for line in preset_text(name).splitlines() if line.startswith("#")]
    assert header[0].endswith(".")
    assert any(re.match(rf"# command .*proxyrob run {name}( |$)", line) for line in header)
    for line in header:
        load_config(name, SET.findall(line))


@pytest.mark.parametrize("name", [name for name in preset_names() if isinstance(load_config(name).proxy, PublishedProxy)])
def test_a_preset_says_what_to_import(name: str) -> None:
    """The header of a preset that takes a published set shows the import under the very name, or where it is shown."""
    proxy = load_config(name).proxy
    assert isinstance(proxy, PublishedProxy)
    text = preset_text(name)
    base = re.search(r"# first +as for (\S+?),? ", text)
    assert f"--name {proxy.name}" in (preset_text(base[1]) if base else text)


# Recipes


def test_the_paper_goes_a_hundred_times_through_the_real_images() -> None:
    """Sehwag et al. 2021: batches of 128 real and 128 synthetic images of equal weight, 100 epochs, the rate falls to 0.001."""
    train = load_config("cifar10-paper").train
    num_real = train.batch_size - train.num_synthetic
    assert (num_real, train.num_synthetic, train.gamma) == (128, 128, 0.5)
    assert train.steps == 100 * math.ceil(REAL_IMAGES / num_real)
    assert train.schedule.kind == "cosine"
    assert train.learning_rate * train.schedule.final_factor == pytest.approx(0.001)
    assert train.optimizer == SgdOptimizer(momentum=0.9, nesterov=False, decayed="all")
    assert (train.ema_decay, train.selection) == (0.0, "last")


def test_wang_2023_goes_four_hundred_epochs_and_weighs_every_image_alike() -> None:
    """Wang et al. 2023: 512 images per step, 70 % of them synthetic; gamma is the share of real images, so none counts more."""
    train = load_config("cifar10-wang2023").train
    epoch = math.ceil(REAL_IMAGES / train.batch_size)
    assert (train.steps, train.validate_every) == (400 * epoch, epoch)
    assert train.num_synthetic == int(0.7 * 512)
    num_real = train.batch_size - train.num_synthetic
    assert train.gamma / num_real == (1.0 - train.gamma) / train.num_synthetic
    assert isinstance(train.schedule, OneCycleSchedule)
    assert train.schedule.warmup_share * train.steps == train.ema_warmup * train.steps == 10 * epoch
    assert train.objective == TradesObjective(
        beta=5.0, attack_start="uniform", attack_batchnorm="train", label_smoothing=0.1, attack_steps=10, relative_step=0.25
    )


@pytest.mark.parametrize(("base", "threat"), [("cifar10-paper", "l2:127/255"), ("cifar10-wang2023", "l2:128/255")])
def test_l2_recipes_share_the_smoothed_classifiers(base: str, threat: str) -> None:
    """Under another threat model the attacked classifiers are others, and the smoothed ones and certificates the same."""
    linf, l2 = load_config(base), load_config(f"{base}-l2")
    assert (linf.threat, l2.threat) == (parse_threat("linf:8/255"), parse_threat(threat))
    ours, theirs = _plan(linf).variants["mixed"], _plan(l2).variants["mixed"]
    assert ours.train != theirs.train
    assert (ours.smooth, ours.certify) == (theirs.smooth, theirs.certify)


@pytest.mark.parametrize("name", ["cifar10-paper", "cifar10-wang2023"])
def test_recipes_train_for_smoothing_as_they_train_robustly(name: str) -> None:
    """The paper's stability loss, in as many steps with the same batches, optimizer and schedule, certified as the paper is."""
    config = load_config(name)
    same = {key for key in type(config.train).model_fields if key not in ("objective", "validate_every", "selection")}
    assert all(getattr(config.train, key) == getattr(config.smooth, key) for key in same)
    objective, certify = config.smooth.objective, config.certify
    assert objective.kind == "stability"
    assert (objective.beta, objective.sigma) == (6.0, 0.25)
    assert (certify.n0, certify.n, certify.alpha, certify.linf) == (100, 10_000, 0.001, (parse_threat("linf:2/255"),))


def test_recipes_take_the_other_networks_of_their_papers() -> None:
    """The changes that the headers show choose those networks, and keep activation and variant where both know them."""
    wide = load_config("cifar10-paper", ["model.kind=wide-resnet", "model.depth=34", "model.width=10"]).model
    assert wide == WideResnetModel(depth=34, width=10)
    small = load_config("cifar10-wang2023", ["model.kind=preact-resnet"]).model
    assert small == PreactResnetModel(depth=18, activation="silu", variant="deepmind")
