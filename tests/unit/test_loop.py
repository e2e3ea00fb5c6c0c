"""The training loop: exact resumes, errors that name their step, and a report that can be counted again."""

import re
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from torch.nn import functional as F

from proxyrob.attacks import attack_pgd
from proxyrob.config import (
    CnnModel,
    ModelConfig,
    NaturalObjective,
    PgdObjective,
    ResnetModel,
    RobustTrainConfig,
    SmoothTrainConfig,
    StabilityObjective,
    SubsetConfig,
    TradesObjective,
)
from proxyrob.config.objective import AwpConfig, MartObjective, SmoothAdvObjective
from proxyrob.config.optimizer import OneCycleSchedule, SgdOptimizer
from proxyrob.errors import CheckpointMismatch, DataIntegrityError, NonFiniteLoss
from proxyrob.mix import Augmentation, Mix, SyntheticSet
from proxyrob.models import load_classifier
from proxyrob.rng import Streams
from proxyrob.source import read_split
from proxyrob.storage import Stage
from proxyrob.threat import Threat, parse_threat
from proxyrob.train import TrainReport, read_curve, read_history, train_classifier
from tests.conftest import MakeStage
from tests.toys import Killer, Recorder, StopHereError, damage, files_below, same_state

THREAT = parse_threat("linf:0.15")
CNN, RESNET = CnnModel(widths=(4, 6)), ResnetModel(widths=(4, 6))
REAL_ONLY: dict[str, Any] = {"synthetic_fraction": 0.0, "gamma": 1.0}
SHORT: dict[str, Any] = {"steps": 40, "batch_size": 12, "checkpoint_every": 10, "shift": 1}

NATURAL = RobustTrainConfig(objective=NaturalObjective(), **SHORT)
PGD = RobustTrainConfig(objective=PgdObjective(attack_steps=2), **SHORT)
TRADES = RobustTrainConfig(objective=TradesObjective(attack_steps=2), **SHORT)
STABILITY = SmoothTrainConfig(objective=StabilityObjective(), **SHORT)
SMOOTHADV = SmoothTrainConfig(objective=SmoothAdvObjective(attack_steps=2), **SHORT)
MART = RobustTrainConfig(objective=MartObjective(attack_steps=2, awp=AwpConfig(gamma=0.01, warmup=0.25)), **SHORT)
RECIPE = TRADES.replace(
    optimizer=SgdOptimizer(),
    schedule=OneCycleSchedule(),
    max_gradient_norm=1.0,
    ema_warmup=0.1,
    validate_every=8,
    selection="validation",
)


def _train(
    config: RobustTrainConfig | SmoothTrainConfig,
    digits: Stage,
    stage: Stage,
    *,
    synthetic: SyntheticSet | None = None,
    model: ModelConfig = CNN,
    threat: Threat | None = THREAT,
    seed: int = 0,
    on_progress: Any = None,
) -> TrainReport:
    return train_classifier(
        model,
        config,
        source=digits,
        synthetic=() if synthetic is None else (synthetic,),
        threat=threat,
        seed=seed,
        stage=stage,
        **({"on_progress": on_progress} if on_progress else {}),
    )


def _weights(stage: Stage) -> dict[str, torch.Tensor]:
    return load_classifier(stage).state_dict()


def _curve(stage: Stage) -> pd.DataFrame:
    return read_history(stage).drop(columns="time_s")


@pytest.mark.parametrize(
    ("config", "model", "threat"),
    [
        pytest.param(NATURAL, CNN, THREAT, id="natural"),
        pytest.param(PGD, CNN, THREAT, id="pgd"),
        pytest.param(PGD, CNN, parse_threat("l2:0.6"), id="pgd-l2"),
        pytest.param(TRADES, CNN, THREAT, id="trades"),
        pytest.param(STABILITY, CNN, None, id="stability"),
        pytest.param(PGD, RESNET, THREAT, id="pgd-batchnorm"),
        pytest.param(PGD.replace(flip=True, cutmix=0.5), CNN, THREAT, id="pgd-cutmix"),
        pytest.param(TRADES.replace(cutmix=0.5), CNN, THREAT, id="trades-cutmix"),
        pytest.param(STABILITY.replace(cutmix=1.0), CNN, None, id="stability-cutmix"),
        pytest.param(NATURAL.replace(subset=SubsetConfig(min_confidence=0.5)), CNN, THREAT, id="natural-subset"),
        pytest.param(MART, RESNET, THREAT, id="mart-awp"),
        pytest.param(SMOOTHADV, CNN, None, id="smoothadv"),
        pytest.param(RECIPE, RESNET, THREAT, id="sgd-one-cycle-clipped-selected"),
    ],
)
def test_stopping_and_resuming_equals_not_stopping(
    config: RobustTrainConfig | SmoothTrainConfig,
    model: ModelConfig,
    threat: Threat | None,
    digits: Stage,
    synthetic: SyntheticSet,
    make_stage: MakeStage,
) -> None:
    """Killed twice and resumed from its checkpoints, a training ends with the same weights and curve bit for bit."""
    whole, pieces = make_stage("train", k="whole"), make_stage("train", k="pieces")
    given: dict[str, Any] = {"synthetic": synthetic, "model": model, "threat": threat}
    expected = _train(config, digits, whole, **given)
    first, second, last = Killer(lambda done: done == 20), Killer(lambda done: done == 40), Recorder()
    for killer in (first, second):
        with pytest.raises(StopHereError):
            _train(config, digits, pieces, on_progress=killer, **given)
    assert _train(config, digits, pieces, on_progress=last, **given) == expected
    if config.validate_every is None:
        assert (first.told, second.told, [done for done, _ in last.told]) == ([10, 20], [20, 30, 40], [40])
    assert same_state(_weights(pieces), _weights(whole))
    pd.testing.assert_frame_equal(_curve(pieces), _curve(whole), check_exact=True, check_dtype=False)


def test_selected_weights_are_those_that_were_best_on_validation_images(digits: Stage, make_stage: MakeStage) -> None:
    """The released weights are the average at the measured step of the highest PGD accuracy, the first of equal ones."""
    config = PGD.replace(**REAL_ONLY, validate_every=10, selection="validation", steps=80, learning_rate=0.02)
    stage = make_stage("train")
    report, curve = _train(config, digits, stage), read_curve(stage)
    assert curve.step.tolist() == list(range(10, 81, 10))
    best = curve.loc[curve.validation_pgd_accuracy.idxmax()]
    assert report.released_step == best.step
    assert report.selection == f"best on validation images (step {report.released_step})"
    assert report.selection_split == "validation"
    assert report.validation_pgd_correct == round(best.validation_pgd_accuracy * report.num_validation)
    assert report.validation_correct == round(best.validation_accuracy * report.num_validation)
    assert ((curve.train_pgd_accuracy - curve.validation_pgd_accuracy) == curve.robust_gap).all()


def test_measuring_changes_nothing(digits: Stage, make_stage: MakeStage) -> None:
    """A training that is measured while it runs ends with the weights of one that is not."""
    plain, measured = make_stage("train", k="plain"), make_stage("train", k="measured")
    _train(PGD.replace(**REAL_ONLY), digits, plain, model=RESNET)
    _train(PGD.replace(**REAL_ONLY, validate_every=7), digits, measured, model=RESNET)
    assert same_state(_weights(plain), _weights(measured))
    assert read_curve(plain).empty
    assert read_curve(measured).step.tolist() == [7, 14, 21, 28, 35, 40]


def test_selection_needs_measurements() -> None:
    """Weights cannot be selected on measurements that are not made."""
    with pytest.raises(ValueError, match="set validate_every"):
        PGD.replace(selection="validation")


def test_a_resumed_training_writes_the_same_columns(digits: Stage, make_stage: MakeStage) -> None:
    """The curve's columns have the same types whether or not a kill came between: a step stays an integer."""
    whole, pieces = make_stage("train", k="whole"), make_stage("train", k="pieces")
    _train(NATURAL.replace(**REAL_ONLY), digits, whole)
    with pytest.raises(StopHereError):
        _train(NATURAL.replace(**REAL_ONLY), digits, pieces, on_progress=Killer(lambda done: done == 20))
    _train(NATURAL.replace(**REAL_ONLY), digits, pieces)
    assert read_history(pieces).dtypes.to_dict() == read_history(whole).dtypes.to_dict()


def test_a_checkpoint_comes_after_every_so_many_steps(digits: Stage, make_stage: MakeStage) -> None:
    """«Steps between checkpoints» is a promise also when it is not a multiple of the reports: 15 of 40 steps is 15 and 30."""
    stage = make_stage("train")
    config = NATURAL.replace(**REAL_ONLY, checkpoint_every=15)
    with pytest.raises(StopHereError):
        _train(config, digits, stage, on_progress=Killer(lambda done: done >= 20))
    assert [path.name for path in stage.scratch.glob("checkpoint-*.json")] == ["checkpoint-00000015.json"]


def test_a_training_equals_a_loop_written_out(digits: Stage, synthetic: SyntheticSet, make_stage: MakeStage) -> None:
    """Mix, warm-up, attack, weighted loss, AdamW, cosine and average, written out, give the same weights."""
    config = PGD.replace(steps=12, warmup=0.5, gamma=0.3, ema_decay=0.8)
    stage, streams = make_stage("train"), Streams(3)
    mix = Mix(
        read_split(digits, "train"),
        [synthetic],
        batch_size=12,
        num_synthetic=6,
        gamma=0.3,
        num_classes=10,
        augmentation=Augmentation(shift=1),
        streams=streams,
    )
    _train(
        config.replace(steps=1, learning_rate=1e-12, weight_decay=0.0), digits, make_stage("start"), synthetic=synthetic, seed=3
    )
    model = load_classifier(make_stage("start")).train()  # the initial weights: one step that is too short to round to
    average = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=5e-4)
    for step in range(12):
        optimizer.param_groups[0]["lr"] = 0.01 * 0.5 * (1 + torch.cos(torch.tensor(torch.pi * step / 12))).item()
        batch = mix.batch(step)
        attacked = attack_pgd(
            model,
            batch.images,
            lambda logits, labels=batch.labels: F.cross_entropy(logits, labels, reduction="sum"),
            THREAT,
            steps=2,
            relative_step=0.25,
            generator=streams.torch("train/perturb", step=step),
            scale=min(1.0, (step + 1) / 6),
        )
        losses = F.cross_entropy(model(attacked), batch.labels, reduction="none")
        loss = 0.3 * losses[: batch.num_real].mean() + 0.7 * losses[batch.num_real :].mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        kept = min(0.8, (1 + step) / (10 + step)) if step else 0.0  # torch's average starts as a copy of the first weights
        for name, value in model.state_dict().items():
            average[name] = kept * average[name] + (1 - kept) * value
    _train(config, digits, stage, synthetic=synthetic, seed=3)
    for name, value in _weights(stage).items():
        assert torch.allclose(value, average[name], atol=2e-4), name


def test_diverging_names_the_step_and_the_images(digits: Stage, synthetic: SyntheticSet, make_stage: MakeStage) -> None:
    """With an absurd learning rate the second loss is not finite; the error names step 1 and its images."""
    stage = make_stage("train")
    config = NATURAL.replace(learning_rate=1e25)
    with pytest.raises(NonFiniteLoss, match=r"the loss is (nan|inf) at step 1 \(.*\); lower the learning rate") as error:
        _train(config, digits, stage, synthetic=synthetic)
    mix = Mix(
        read_split(digits, "train"),
        [synthetic],
        batch_size=12,
        num_synthetic=6,
        gamma=0.5,
        num_classes=10,
        augmentation=Augmentation(shift=1),
        streams=Streams(0),
    )
    assert mix.batch(1).describe() in str(error.value)
    assert stage.record() is None
    assert files_below(stage.folder) == set(), "neither weights nor a checkpoint of a diverged training"


def test_mixed_training_uses_the_synthetic_images(digits: Stage, synthetic: SyntheticSet, make_stage: MakeStage) -> None:
    """Real-only and mixed start alike and end apart, and gamma decides how much the synthetic images weigh."""
    stages = {name: make_stage("train", k=name) for name in ("real", "mixed", "more")}
    _train(NATURAL.replace(**REAL_ONLY), digits, stages["real"])
    _train(NATURAL, digits, stages["mixed"], synthetic=synthetic)
    _train(NATURAL.replace(gamma=0.9), digits, stages["more"], synthetic=synthetic)
    weights = [_weights(stage)["network.head.weight"] for stage in stages.values()]
    assert not torch.allclose(weights[0], weights[1], atol=1e-3)
    assert not torch.allclose(weights[1], weights[2], atol=1e-3)


def test_a_share_of_synthetic_images_without_any_is_refused(
    digits: Stage, synthetic: SyntheticSet, make_stage: MakeStage
) -> None:
    """A mix that is asked for and not given, or given and not asked for, is refused before training."""
    with pytest.raises(ValueError, match="expected synthetic images exactly when a batch has some"):
        _train(NATURAL, digits, make_stage("train"))
    with pytest.raises(ValueError, match="expected synthetic images exactly when a batch has some"):
        _train(NATURAL.replace(**REAL_ONLY), digits, make_stage("train"), synthetic=synthetic)


def test_the_seed_decides_the_weights(digits: Stage, make_stage: MakeStage) -> None:
    """The same seed gives the same network bit for bit, another seed another one."""
    config = PGD.replace(**REAL_ONLY, steps=5)
    stages = [make_stage("train", k=k) for k in range(3)]
    for stage, seed in zip(stages, (0, 0, 1), strict=True):
        _train(config, digits, stage, seed=seed)
    first, again, other = map(_weights, stages)
    assert same_state(first, again)
    assert not same_state(first, other)


def test_the_report_can_be_counted_again(digits: Stage, make_stage: MakeStage) -> None:
    """Validation accuracy is that of the released weights on the validation split, and PGD's is not above it."""
    stage = make_stage("train")
    report = _train(PGD.replace(**REAL_ONLY), digits, stage)
    classifier, validation = load_classifier(stage), read_split(digits, "validation")
    correct = int((classifier(validation.images).argmax(1) == validation.targets).sum())
    assert (report.num_validation, report.validation_correct, report.steps) == (30, correct, 40)
    assert report.num_parameters == sum(weight.numel() for weight in classifier.parameters())
    assert report.validation_pgd_correct is not None
    assert 0 <= report.validation_pgd_correct <= correct
    assert (report.selection, report.selection_split) == ("last step", None)


@pytest.mark.parametrize(("config", "threat"), [(NATURAL, THREAT), (STABILITY, None)])
def test_a_training_that_is_not_adversarial_reports_no_pgd(
    config: RobustTrainConfig | SmoothTrainConfig, threat: Threat | None, digits: Stage, make_stage: MakeStage
) -> None:
    """Nothing is attacked that was not trained against an attack: the figure is absent, not 0."""
    report = _train(config.replace(**REAL_ONLY, steps=3), digits, make_stage("train"), threat=threat)
    assert report.validation_pgd_correct is None


def test_the_curve_has_a_row_for_every_ten_steps_and_the_last(digits: Stage, make_stage: MakeStage) -> None:
    """Step, loss, accuracy and learning rate; what is told as progress is what is written."""
    stage, recorder = make_stage("train"), Recorder()
    _train(NATURAL.replace(**REAL_ONLY, steps=25), digits, stage, on_progress=recorder)
    history = read_history(stage)
    assert history.columns.tolist() == ["step", "loss", "accuracy", "learning_rate", "time_s"]
    assert history.step.tolist() == [10, 20, 25]
    assert recorder.told == [(10, 25), (20, 25), (25, 25)]
    assert [figures["loss"] for figures in recorder.figures] == history.loss.tolist()
    assert [figures["accuracy"] for figures in recorder.figures] == history.accuracy.tolist()
    assert history.accuracy.between(0, 1).all()
    assert history.learning_rate.is_monotonic_decreasing
    assert history.loss.iloc[-1] < history.loss.iloc[0]


def test_a_finished_training_is_not_run_again(digits: Stage, make_stage: MakeStage) -> None:
    """A second call gives the report, does no step, and leaves no scratch files."""
    stage, recorder = make_stage("train"), Recorder()
    report = _train(NATURAL.replace(**REAL_ONLY), digits, stage)
    assert _train(NATURAL.replace(**REAL_ONLY), digits, stage, on_progress=recorder) == report
    assert recorder.told == []
    assert files_below(stage.folder) == {"model.safetensors", "model.json", "history.parquet", "stage.json"}


def test_a_checkpoint_of_another_architecture_is_refused(digits: Stage, make_stage: MakeStage) -> None:
    """A folder whose checkpoint holds another network is refused, not silently started anew."""
    stage = make_stage("train")
    with pytest.raises(StopHereError):
        _train(NATURAL.replace(**REAL_ONLY), digits, stage, on_progress=Killer(lambda done: done == 20))
    with pytest.raises(CheckpointMismatch, match="does not hold the state of this configuration"):
        _train(NATURAL.replace(**REAL_ONLY), digits, stage, model=CnnModel(widths=(5,)))


def test_a_damaged_checkpoint_stops_the_resume(digits: Stage, make_stage: MakeStage) -> None:
    """A checkpoint with a flipped byte is named; what to delete to start anew is said."""
    stage = make_stage("train")
    with pytest.raises(StopHereError):
        _train(NATURAL.replace(**REAL_ONLY), digits, stage, on_progress=Killer(lambda done: done == 20))
    (path,) = Path(stage.scratch).glob("checkpoint-*.pt")
    damage(path)
    with pytest.raises(DataIntegrityError, match=re.escape(str(path)) + ".*starts from its first step"):
        _train(NATURAL.replace(**REAL_ONLY), digits, stage)
