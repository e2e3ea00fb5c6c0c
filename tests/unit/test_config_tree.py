"""The whole configuration tree: every field is read somewhere, and every choice it offers runs."""

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from pydantic import BaseModel

import flows
import proxyrob
from flows.plan import labeler_training
from proxyrob.certify import certify_classifier
from proxyrob.config import (
    AwpConfig,
    CertifyConfig,
    DiffusionProxy,
    JitterProxy,
    LabelerConfig,
    MixtureProxy,
    PipelineConfig,
    PublishedProxy,
    RobustTrainConfig,
    SamplingConfig,
    SmoothTrainConfig,
    SubsetConfig,
    WeightedProxy,
)
from proxyrob.config.models import (
    CnnModel,
    ModelConfig,
    PreactResnetModel,
    ResnetModel,
    StandardResnetModel,
    WideResnetModel,
)
from proxyrob.config.train import NaturalObjective, PgdObjective, StabilityObjective, TradesObjective
from proxyrob.models import load_classifier
from proxyrob.proxy import fit_diffusion, sample_proxy
from proxyrob.shards import read_manifest, read_shard
from proxyrob.source import read_split
from proxyrob.storage import DataPlace, Stage
from proxyrob.threat import parse_threat
from proxyrob.train import train_classifier
from tests.conftest import MakeStage

LIBRARY, FLOWS = (Path(next(iter(package.__path__))) for package in (proxyrob, flows))


def _models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for part in get_args(annotation):
        yield from _models_in(part)


def _models_below(model: type[BaseModel]) -> Iterator[type[BaseModel]]:
    yield model
    for field in model.model_fields.values():
        for below in _models_in(field.annotation):
            yield from _models_below(below)


def _choices(model: type[BaseModel], field: str) -> list[type[BaseModel]]:
    return list(_models_in(model.model_fields[field].annotation))


def _names_in(tree: ast.AST) -> set[str]:
    """Every attribute that is read, and every keyword of a class pattern."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
            names.add(node.attr)
        elif isinstance(node, ast.MatchClass):
            names.update(node.kwd_attrs)
    return names


def _names_read() -> set[str]:
    """What the sources outside ``config/`` read, also through a property of a configuration."""
    inside = [ast.parse(path.read_text()) for path in (LIBRARY / "config").rglob("*.py")]
    outside = [path for path in LIBRARY.rglob("*.py") if "config" not in path.relative_to(LIBRARY).parts]
    names = set().union(*(_names_in(ast.parse(path.read_text())) for path in [*outside, *FLOWS.rglob("*.py")]))
    for node in (node for tree in inside for node in ast.walk(tree)):
        if isinstance(node, ast.FunctionDef) and node.name in names and "property" in map(ast.unparse, node.decorator_list):
            names |= _names_in(node)
    return names


ALL_MODELS = list(dict.fromkeys(_models_below(PipelineConfig)))
FIELDS = [pytest.param(field, id=f"{model.__name__}.{field}") for model in ALL_MODELS for field in model.model_fields]


@pytest.fixture(scope="module")
def names_read() -> set[str]:
    """What the sources outside ``config/`` read."""
    return _names_read()


def test_the_tree_is_walked_into_its_unions() -> None:
    """The two tests below see the alternatives of every union, not only the root."""
    expected = {PgdObjective, TradesObjective, StabilityObjective, JitterProxy, DiffusionProxy, ResnetModel, LabelerConfig}
    assert expected | {PublishedProxy, WeightedProxy, SubsetConfig} <= set(ALL_MODELS)


@pytest.mark.parametrize("field", FIELDS)
def test_every_field_is_read(field: str, names_read: set[str]) -> None:
    """A setting that is parsed and never read is a lie: each is read somewhere outside ``config/``."""
    assert field in names_read


def _train(config: RobustTrainConfig | SmoothTrainConfig, model: Any, source: Stage, stage: Stage, threat: str | None) -> None:
    train_classifier(
        model,
        config,
        source=source,
        synthetic=(),
        threat=parse_threat(threat) if threat else None,
        seed=0,
        stage=stage,
    )
    classifier = load_classifier(stage)
    assert classifier(read_split(source, "test").images).shape == (60, 10)
    assert all(bool(torch.isfinite(value).all()) for value in classifier.state_dict().values())


def _two_steps(**values: Any) -> dict[str, Any]:
    return {"steps": 2, "batch_size": 8, "synthetic_fraction": 0.0, "gamma": 1.0, **values}


@pytest.mark.parametrize("threat", ["linf:0.15", "l2:0.6"])
@pytest.mark.parametrize("objective", _choices(RobustTrainConfig, "objective"))
def test_every_robust_objective_runs(objective: type[Any], threat: str, digits: Stage, make_stage: MakeStage) -> None:
    """Each objective of robust training trains for two steps, under both norms, and leaves a classifier."""
    config = RobustTrainConfig(**_two_steps(objective=objective()))
    _train(config, CnnModel(widths=(4,)), digits, make_stage("train"), threat)


@pytest.mark.parametrize("objective", _choices(SmoothTrainConfig, "objective"))
def test_every_objective_for_smoothing_runs(objective: type[Any], digits: Stage, make_stage: MakeStage) -> None:
    """Each objective for smoothing trains for two steps without a threat model."""
    config = SmoothTrainConfig(**_two_steps(objective=objective()))
    _train(config, CnnModel(widths=(4,)), digits, make_stage("train"), None)


@pytest.mark.parametrize("objective", [*_choices(RobustTrainConfig, "objective"), *_choices(SmoothTrainConfig, "objective")])
def test_every_objective_runs_with_its_options(objective: type[Any], digits: Stage, make_stage: MakeStage) -> None:
    """What an objective offers runs with it, on mixed images: label smoothing, weight perturbation, modes of its attack."""
    options = {"label_smoothing": 0.1, "awp": AwpConfig(gamma=0.01), "attack_batchnorm": "train", "attack_start": "uniform"}
    given = objective(**{name: value for name, value in options.items() if name in objective.model_fields})
    kind = RobustTrainConfig if objective in _choices(RobustTrainConfig, "objective") else SmoothTrainConfig
    config = kind(**_two_steps(objective=given, cutmix=1.0))
    _train(config, ResnetModel(widths=(4, 6)), digits, make_stage("train"), "linf:0.15")


@pytest.mark.parametrize("schedule", _choices(RobustTrainConfig, "schedule"))
@pytest.mark.parametrize("optimizer", _choices(RobustTrainConfig, "optimizer"))
def test_every_optimizer_runs_under_every_schedule(
    optimizer: type[Any], schedule: type[Any], digits: Stage, make_stage: MakeStage
) -> None:
    """Each pair trains for two steps, with clipped gradients and a delayed average."""
    values = {"optimizer": optimizer(), "schedule": schedule(), "max_gradient_norm": 1.0, "ema_warmup": 0.5}
    config = RobustTrainConfig(**_two_steps(objective=NaturalObjective(), **values))
    _train(config, CnnModel(widths=(4,)), digits, make_stage("train"), None)


MODELS = {
    "cnn": CnnModel(widths=(4, 6)),
    "resnet": ResnetModel(widths=(4, 6)),
    "standard-resnet": StandardResnetModel(base_channels=4),
    "preact-resnet": PreactResnetModel(base_channels=4),
    "preact-resnet-deepmind": PreactResnetModel(base_channels=4, activation="silu", variant="deepmind"),
    "wide-resnet": WideResnetModel(depth=10, width=1),
    "wide-resnet-deepmind": WideResnetModel(depth=10, width=1, activation="silu", variant="deepmind"),
}


def test_every_model_is_trained_below() -> None:
    """A new kind of network has to be added to the test below, small enough for it."""
    assert {type(model) for model in MODELS.values()} == set(_choices(PipelineConfig, "model"))


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_every_model_runs(model: ModelConfig, digits: Stage, make_stage: MakeStage) -> None:
    """Each architecture trains adversarially for two steps."""
    config = RobustTrainConfig(**_two_steps(objective=PgdObjective(attack_steps=2)))
    _train(config, model, digits, make_stage("train"), "linf:0.15")


def test_every_proxy_is_sampled_below() -> None:
    """A new kind of proxy has to be added to the test below; what is imported or made of others is not sampled."""
    assert set(_choices(PipelineConfig, "proxy")) - {PublishedProxy, MixtureProxy} == {DiffusionProxy, JitterProxy}


@pytest.mark.parametrize(
    "config",
    [
        JitterProxy(num_images=12),
        DiffusionProxy(num_images=12, conditional=True, width=8, num_blocks=1, steps=2, batch_size=4, sampler_steps=2),
        DiffusionProxy(num_images=12, conditional=False, width=8, num_blocks=1, steps=2, batch_size=4, sampler_steps=2),
    ],
    ids=["jitter", "diffusion-conditional", "diffusion-unconditional"],
)
def test_every_proxy_runs(config: DiffusionProxy | JitterProxy, digits: Stage, make_stage: MakeStage) -> None:
    """Each proxy is fitted for two steps where it needs fitting, and sampled into shards."""
    proxy = None
    if isinstance(config, DiffusionProxy):
        proxy = make_stage("proxy")
        fit_diffusion(config, source=digits, seed=0, stage=proxy)
    stage = make_stage("samples")
    sampling = SamplingConfig(shard_size=5, batch_size=3)
    report = sample_proxy(config, sampling, source=digits, proxy=proxy, seed=0, stage=stage)
    assert (report.num_images, report.num_shards, report.image_shape) == (12, 3, (1, 8, 8))
    place = DataPlace.of(stage.folder)
    manifest = read_manifest(place)
    images = [read_shard(place, shard, manifest.image_shape) for shard in manifest.shards]
    assert [len(part) for part in images] == [5, 5, 2]
    assert len({image.tobytes() for part in images for image in part}) == 12


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("method", _choices(CertifyConfig, "method"))
def test_every_way_to_certify_runs(
    method: type[Any], precision: str, digits: Stage, toy_classifier: Stage, make_stage: MakeStage
) -> None:
    """Each method issues certificates in each precision, at L2 radii and L∞ thresholds."""
    values = {"linf": ("1/255",), "method": method(), "precision": precision}
    config = CertifyConfig(num_images=4, n0=5, n=50, radii=(0.0,)).replace(**values)
    stage = make_stage("certify")
    report = certify_classifier(config, sigma=0.25, source=digits, model=toy_classifier, seed=0, stage=stage)
    assert (report.certified["0"].n, report.certified_linf["1/255"].n) == (4, 4)


def test_a_labeler_of_each_architecture_trains_naturally(digits: Stage, make_stage: MakeStage) -> None:
    """What a labeler's configuration says is enough to train it: naturally, on real images alone."""
    for labeler in (
        LabelerConfig(model=CnnModel(widths=(4,)), steps=2),
        LabelerConfig(model=ResnetModel(widths=(4,)), steps=2),
    ):
        _train(labeler_training(labeler), labeler.model, digits, make_stage("train", model=labeler.model.kind), None)
