"""A step of training: the fast path is the plain one to rounding, a batch in parts is the batch, and a stop loses nothing."""

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from proxyrob.config import CnnModel, ModelConfig, PgdObjective, ResnetModel, RobustTrainConfig, SmoothTrainConfig
from proxyrob.config.objective import (
    AwpConfig,
    GaussianObjective,
    MartObjective,
    NaturalObjective,
    SmoothAdvObjective,
    StabilityObjective,
    TradesObjective,
)
from proxyrob.config.train import ComputeConfig
from proxyrob.mix import Mix
from proxyrob.models import Classifier, ClassifierCard, build_classifier
from proxyrob.rng import RowGenerator, Streams, draw
from proxyrob.threat import parse_threat
from proxyrob.train.optimizer import build_optimizer
from proxyrob.train.recompute import recomputed
from proxyrob.train.step import Stepper
from tests.toys import random_images, same_state, tiny_split

SHAPE = (8, 8, 1)
THREAT = parse_threat("linf:0.1")
CNN, RESNET = CnnModel(widths=(4, 6)), ResnetModel(widths=(4, 6))
SHORT: dict[str, Any] = {"steps": 200, "batch_size": 12, "synthetic_fraction": 0.0, "gamma": 1.0, "learning_rate": 1e-3}
STREAMS = Streams(0)
AWP = AwpConfig(gamma=0.01)

ROBUST = [
    NaturalObjective(),
    PgdObjective(attack_steps=2, awp=AWP),
    PgdObjective(attack_steps=2, attack_batchnorm="train"),
    TradesObjective(attack_steps=2, awp=AWP),
    MartObjective(attack_steps=2),
]
SMOOTH = [StabilityObjective(), GaussianObjective(), SmoothAdvObjective(attack_steps=2)]

Config = RobustTrainConfig | SmoothTrainConfig


def name_of(objective: Any) -> str:
    """What a test is called by."""
    return f"{objective.kind}-{getattr(objective, 'attack_batchnorm', 'eval')}"


def classifier_for(model: ModelConfig) -> Classifier:
    """A fresh classifier in train mode, always the same."""
    card = ClassifierCard(model=model, image_shape=(1, 8, 8), num_classes=10, mean=(0.5,), std=(0.3,))
    return build_classifier(card, 0).train()


def take_steps(config: Config, model: ModelConfig, count: int) -> tuple[list[float], dict[str, Tensor]]:
    """The losses of the first steps, and the state after them."""
    classifier = classifier_for(model)
    optimizer, _ = build_optimizer(config, classifier)
    split = tiny_split(60, shape=SHAPE)
    mix = Mix(split, batch_size=config.batch_size, num_synthetic=0, gamma=1.0, num_classes=10, streams=STREAMS)
    threat = THREAT if isinstance(config, RobustTrainConfig) else None
    stepper = Stepper(config, classifier, optimizer, threat, example=split.first(2).images)
    losses = []
    for step in range(count):
        loss, logits = stepper.take(mix.batch(step), step, partial(STREAMS.torch, "train/perturb", step=step))
        assert logits.shape == (config.batch_size, 10)
        losses.append(float(loss))
    return losses, classifier.state_dict()


def config_of(objective: Any, **settings: Any) -> Config:
    """A training with an objective of either kind."""
    kind = SmoothTrainConfig if objective in SMOOTH else RobustTrainConfig
    return kind(objective=objective, **(SHORT | settings))


@pytest.mark.parametrize(
    ("model", "objective"),
    [
        pytest.param(model, objective, id=f"{model.kind}-{name_of(objective)}")
        for model in (CNN, RESNET)
        for objective in (*ROBUST, *SMOOTH)
        if model is RESNET or getattr(objective, "attack_batchnorm", "eval") == "eval"
    ],
)
def test_a_batch_in_parts_is_the_batch(model: ModelConfig, objective: Any) -> None:
    """Losses, weights and running statistics after three steps are the same, to rounding, in parts of 5, 5 and 2 images."""
    losses, state = take_steps(config_of(objective), model, 3)
    in_parts, state_in_parts = take_steps(config_of(objective, micro_batch=5), model, 3)
    assert in_parts == pytest.approx(losses, rel=1e-4)
    for name, tensor in state.items():
        torch.testing.assert_close(state_in_parts[name], tensor, rtol=1e-3, atol=3e-4, msg=name)


@pytest.mark.parametrize("objective", [PgdObjective(attack_steps=2), TradesObjective(attack_steps=2)], ids=name_of)
def test_the_fast_path_is_the_plain_one(objective: Any) -> None:
    """Over 60 steps with batch normalisation no loss differs by more than rounding has grown to."""
    plain, _ = take_steps(config_of(objective, compute=ComputeConfig(path="plain")), RESNET, 60)
    fast, _ = take_steps(config_of(objective), RESNET, 60)
    assert fast != plain, "nothing was folded"
    assert fast[:20] == pytest.approx(plain[:20], rel=2e-3)
    assert sum(fast) == pytest.approx(sum(plain), rel=5e-3)


def test_bfloat16_is_near() -> None:
    """Layers in bfloat16 give losses within a few per cent, float32 weights, and not the same losses."""
    objective = PgdObjective(attack_steps=2)
    exact, _ = take_steps(config_of(objective), RESNET, 30)
    rounded, state = take_steps(config_of(objective, compute=ComputeConfig(precision="bfloat16")), RESNET, 30)
    assert rounded != exact
    assert rounded == pytest.approx(exact, rel=0.05)
    assert {tensor.dtype for tensor in state.values()} == {torch.float32, torch.int64}


def test_the_plain_path_computes_in_float32() -> None:
    """A setting without effect is refused."""
    with pytest.raises(ValueError, match="leave out path"):
        ComputeConfig(path="plain", precision="bfloat16")


def test_recomputing_changes_no_bit() -> None:
    """Gradients and running statistics are those of a plain pass bit for bit, and less is held for the backward pass."""
    images, states, gradients, held = random_images(8), [], [], []
    for when in (False, True):
        classifier = classifier_for(RESNET)
        saved: dict[int, int] = {}

        def keep(tensor: Tensor, saved: dict[int, int] = saved) -> Tensor:
            saved[tensor.data_ptr()] = tensor.numel()
            return tensor

        with recomputed(classifier, when=when):
            with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
                loss = classifier(images).square().sum()
            held.append(sum(saved.values()))
            loss.backward()
        states.append(classifier.state_dict())
        gradients.append({name: parameter.grad for name, parameter in classifier.named_parameters()})
        assert "forward" not in vars(next(iter(classifier.network.get_submodule("blocks").children())))
    assert same_state(*states)
    assert same_state(*gradients)
    assert held[1] < held[0]


def test_an_image_sees_the_same_numbers_in_any_part() -> None:
    """What some rows are given is what they have when all are drawn."""

    def normal(whole: Tensor, generator: torch.Generator) -> Tensor:
        return whole.normal_(generator=generator)

    like = torch.zeros(1)
    whole = draw((7, 3), like, STREAMS.torch("x"), normal)
    assert torch.equal(draw((3, 3), like, RowGenerator(STREAMS.torch("x"), slice(2, 5), 7), normal), whole[2:5])
    rows = torch.tensor([6, 0])
    assert torch.equal(draw((2, 3), like, RowGenerator(STREAMS.torch("x"), rows, 7), normal), whole[rows])
