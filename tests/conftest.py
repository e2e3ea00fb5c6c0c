"""What all tests share: types and shapes enforced at run time, one thread, small stages that are made once."""

# ruff: noqa: E402  (the hook has to be installed before the library is imported)

from collections.abc import Callable, Iterator
from pathlib import Path

import hypothesis
import pytest
import torch
from jaxtyping import install_import_hook

from tests import runtime_types  # the hook below names it, so it has to be imported first

assert runtime_types.check_types
install_import_hook("proxyrob", "tests.runtime_types.check_types")

from proxyrob.certify import certify_classifier
from proxyrob.config import CnnModel, JitterProxy, NaturalObjective, ResnetModel, RobustTrainConfig, SamplingConfig
from proxyrob.evaluate import evaluate_classifier
from proxyrob.label import label_shards
from proxyrob.mix import SyntheticSet
from proxyrob.proxy import sample_proxy
from proxyrob.source import Split, prepare_digits
from proxyrob.storage import DataPlace, Stage
from proxyrob.train import train_classifier
from tests.s3_server import S3Server, why_not
from tests.toys import (
    SMALL_CERTIFY,
    SMALL_DIGITS,
    SMALL_EVALUATE,
    SMALL_SIGMA,
    SMALL_THREAT,
    Linear,
    random_linear,
    stage_in,
    tiny_split,
)

MakeStage = Callable[..., Stage]

# Random examples would make a run depend on luck: the same ones every time, and no limit on how long one takes.
hypothesis.settings.register_profile(
    "repeatable",
    derandomize=True,
    deadline=None,
    max_examples=50,
    suppress_health_check=[hypothesis.HealthCheck.too_slow, hypothesis.HealthCheck.function_scoped_fixture],
)
hypothesis.settings.load_profile("repeatable")


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """Tests run beside each other, and sums in another order would round differently."""
    torch.set_num_threads(1)


@pytest.fixture
def make_stage(tmp_path: Path) -> MakeStage:
    """``make_stage("train", seed=0)``: a stage with a folder of its own below the test's folder."""

    def make(name: str, **configuration: object) -> Stage:
        return stage_in(tmp_path, name, **configuration)

    return make


@pytest.fixture
def split() -> Split:
    """30 random images of 4×4, three of each class."""
    return tiny_split()


@pytest.fixture
def linear_model() -> Linear:
    """A random linear model for 8×8 images and ten classes."""
    return random_linear()


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Images come out of files in blocks of four, so that a few cross blocks."""
    monkeypatch.setattr("proxyrob.source.arrays.BLOCK_ROWS", 4)


@pytest.fixture(scope="session")
def shared_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the stages that are made once; tests read them and never write there."""
    return tmp_path_factory.mktemp("shared")


@pytest.fixture(scope="session")
def digits(shared_folder: Path) -> Stage:
    """A finished source: 60 training, 30 validation and 60 test digits."""
    stage = stage_in(shared_folder, "source")
    prepare_digits(SMALL_DIGITS, seed=0, stage=stage)
    return stage


@pytest.fixture(scope="session")
def toy_classifier(shared_folder: Path, digits: Stage) -> Stage:
    """A finished training: a small CNN that has learnt the small digits."""
    return _train_toy(shared_folder, digits, CnnModel(widths=(8, 16)))


@pytest.fixture(scope="session")
def other_classifier(shared_folder: Path, digits: Stage) -> Stage:
    """A finished training of another architecture, with batch normalisation."""
    return _train_toy(shared_folder, digits, ResnetModel(widths=(8, 16)))


@pytest.fixture(scope="session")
def samples(shared_folder: Path, digits: Stage) -> Stage:
    """Finished samples of the jitter proxy: 120 images in three shards."""
    stage = stage_in(shared_folder, "samples")
    config = JitterProxy(num_images=120, sigma=0.3)
    sample_proxy(config, SamplingConfig(shard_size=50, batch_size=20), source=digits, proxy=None, seed=0, stage=stage)
    return stage


@pytest.fixture(scope="session")
def labels(shared_folder: Path, digits: Stage, samples: Stage, toy_classifier: Stage, other_classifier: Stage) -> Stage:
    """Finished labels of ``samples``."""
    stage = stage_in(shared_folder, "labels")
    images = DataPlace.of(samples.folder)
    label_shards(0.9, source=digits, images=images, first=toy_classifier, second=other_classifier, stage=stage)
    return stage


@pytest.fixture
def synthetic(samples: Stage, labels: Stage) -> SyntheticSet:
    """``samples`` and ``labels``, as training takes them."""
    return SyntheticSet(DataPlace.of(samples.folder), DataPlace.of(labels.folder))


@pytest.fixture(scope="session")
def evaluation(shared_folder: Path, digits: Stage, toy_classifier: Stage) -> Stage:
    """A finished evaluation of the toy classifier: of 60 test images some are misclassified, all others broken."""
    stage = stage_in(shared_folder, "evaluate")
    evaluate_classifier(SMALL_EVALUATE, source=digits, model=toy_classifier, threat=SMALL_THREAT, seed=0, stage=stage)
    return stage


@pytest.fixture(scope="session")
def certified(shared_folder: Path, digits: Stage, toy_classifier: Stage) -> Stage:
    """Finished certificates of the toy classifier on 25 test images."""
    stage = stage_in(shared_folder, "certify")
    certify_classifier(SMALL_CERTIFY, sigma=SMALL_SIGMA, source=digits, model=toy_classifier, seed=0, stage=stage)
    return stage


def _train_toy(folder: Path, digits: Stage, model: CnnModel | ResnetModel) -> Stage:
    stage = stage_in(folder, "train", model=model.kind)
    config = RobustTrainConfig(
        objective=NaturalObjective(),
        steps=80,
        batch_size=30,
        synthetic_fraction=0.0,
        gamma=1.0,
        learning_rate=1e-2,
        ema_decay=0.9,
    )
    train_classifier(model, config, source=digits, synthetic=(), threat=None, seed=0, stage=stage)
    return stage


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """A real S3 server."""
    folder = tmp_path_factory.mktemp("s3")
    reason = why_not(folder)
    if reason is not None:
        pytest.skip(reason)
    with S3Server(folder) as server:
        yield server
