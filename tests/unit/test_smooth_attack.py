"""Attacks on smoothed classifiers, and their join with certificates."""

from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats

from proxyrob.attacks import attack_pgd
from proxyrob.certify import (
    SmoothAttackReport,
    attack_smoothed_classifier,
    count_votes_of_several,
    predict,
    read_attacks,
    read_certificates,
)
from proxyrob.compare import check_sandwich
from proxyrob.config import SmoothAttackConfig
from proxyrob.source import read_split
from proxyrob.storage import Stage
from proxyrob.threat import Threat, parse_threat
from proxyrob.train.smoothing import Smoothed, draw_noise
from tests.conftest import MakeStage
from tests.toys import SMALL_SIGMA, Killer, Linear, StopHereError, files_below

CONFIG = SmoothAttackConfig(num_images=25, steps=5, num_noise=4, n=200, alpha=0.01, batch_size=32)
WIDE, NARROW = parse_threat("l2:2"), parse_threat("l2:0.05")


def _attack(digits: Stage, model: Stage, stage: Stage, threat: Threat = WIDE, **values: Any) -> SmoothAttackReport:
    given: dict[str, Any] = {"sigma": SMALL_SIGMA, "source": digits, "model": model, "seed": 0, "stage": stage, **values}
    return attack_smoothed_classifier(given.pop("config", CONFIG), threat=threat, **given)


@pytest.fixture(scope="module")
def attacked(digits: Stage, toy_classifier: Stage, tmp_path_factory: pytest.TempPathFactory) -> Stage:
    """A finished attack within a wide ball on what ``certified`` certifies."""
    stage = Stage("attack-smoothed", "0" * 64, tmp_path_factory.mktemp("attacked") / "a", {})
    _attack(digits, toy_classifier, stage)
    return stage


@pytest.mark.parametrize(
    ("votes", "alpha", "expected"),
    [([0, 100, 0], 0.001, 1), ([60, 40, 0], 0.001, None), ([60, 40, 0], 0.1, 0), ([5, 5], 0.5, None), ([0, 0, 9], 0.01, 2)],
)
def test_predict_names_a_class_that_is_shown_to_lead(votes: list[int], alpha: float, expected: int | None) -> None:
    """The exact binomial test of the two classes with most votes decides; a tie is abstained from."""
    assert predict(np.array(votes), alpha) == expected


def test_predict_is_rarely_wrong() -> None:
    """Of two classes that lead equally one is named with probability alpha at most, by exact summation."""
    n, alpha = 60, 0.05
    named = sum(stats.binom.pmf(k, n, 0.5) for k in range(n + 1) if predict(np.array([k, n - k]), alpha) is not None)
    assert 0.01 < named <= alpha


def test_the_attack_crosses_the_boundary_where_it_can() -> None:
    """Smoothing leaves a linear boundary where it is: crossed by a ball that reaches beyond it, and by no smaller one."""
    weight = torch.tensor([3.0, -1.0, 2.0, 0.5])
    model = Linear(torch.stack([torch.zeros(4), weight]), torch.tensor([0.0, -float(weight.sum()) / 2]))
    image = 0.5 + (0.1 * weight / weight.norm()).view(1, 1, 2, 2)  # 0.1 from the plane through the middle
    generator = torch.Generator().manual_seed(0)
    for epsilon, count in (("0.05", 0), ("0.2", 1)):
        smoothed = Smoothed(model, 0.25 * draw_noise(image, generator, 64))
        found = attack_pgd(
            smoothed,
            image,
            lambda log_probabilities: -log_probabilities[:, 1].sum(),
            parse_threat(f"l2:{epsilon}"),
            steps=10,
            relative_step=0.25,
            generator=generator,
            start=image,
        )
        votes = count_votes_of_several(model, found, 0.25, 2_000, 2_000, [generator])
        share = float(stats.norm.cdf((0.1 - float(epsilon)) / 0.25))
        assert (int(votes[0, 1]) / 2_000) == pytest.approx(share, abs=0.04)
        assert (predict(votes[0].numpy(), 0.001) == 0) == bool(count)


def test_a_row_says_how_far_an_image_was_moved_and_what_became_of_it(attacked: Stage, digits: Stage) -> None:
    """Distances lie inside the ball, counts inside n; a wide ball breaks images and the report counts those that stand."""
    table, header = read_attacks(attacked)
    assert table["index"].tolist() == list(range(25))
    assert table.label.tolist() == read_split(digits, "test").labels[:25].tolist()
    assert table.distance_l2.between(0.0, 2.0 + 1e-5).all()
    assert table["count"].between(0, 200).all()
    assert (header.norm, header.epsilon, header.sigma, header.n, header.alpha) == ("l2", "2", 0.25, 200, 0.01)
    report = attacked.finished(SmoothAttackReport)
    assert report is not None
    broken = (table.prediction != table.label).fillna(False)
    assert report.attacked.value == pytest.approx(1.0 - broken.mean())
    assert broken.any()


def test_a_killed_attack_goes_on_and_finds_the_same(
    attacked: Stage, digits: Stage, toy_classifier: Stage, make_stage: MakeStage
) -> None:
    """Killed after the first batch and resumed, the table is the same; a finished attack is not made again."""
    stage = make_stage("attack-smoothed")
    with pytest.raises(StopHereError):
        _attack(digits, toy_classifier, stage, on_progress=Killer(lambda done: done == 8))
    assert files_below(stage.folder) == {f"scratch/attacked/{name}" for name in ("binding.json", "images-000000.parquet")}
    report = _attack(digits, toy_classifier, stage)
    pd.testing.assert_frame_equal(read_attacks(stage)[0], read_attacks(attacked)[0])
    assert files_below(stage.folder) == {"attacked.parquet", "stage.json"}
    assert _attack(digits, toy_classifier, stage, on_progress=Killer(lambda _: True)) == report


# The join


def test_certified_is_at_most_attacked(
    certified: Stage, attacked: Stage, digits: Stage, toy_classifier: Stage, make_stage: MakeStage
) -> None:
    """Within a wide and a narrow ball the bounds are in order and no image contradicts its certificate."""
    narrow = make_stage("attack-smoothed")
    _attack(digits, toy_classifier, narrow, NARROW)
    found = [check_sandwich(read_certificates(certified), read_attacks(stage)) for stage in (narrow, attacked)]
    for sandwich in found:
        assert sandwich.certified.value <= sandwich.attacked.value
        assert sandwich.contradictions == ()
        assert sandwich.expected_contradictions == pytest.approx(25 * 0.02)
    assert (found[0].threat, found[1].threat) == ("l2:1/20", "l2:2")
    assert found[0].certified.value > found[1].certified.value == 0.0
    assert found[0].attacked.value > found[1].attacked.value


def test_a_false_certificate_is_found_out(certified: Stage, attacked: Stage) -> None:
    """A radius that does not hold leaves its image more probability than it has where the attack went: an alarm for each."""
    (table, header), attacks = read_certificates(certified), read_attacks(attacked)
    right = (table.prediction == table.label).fillna(False).to_numpy(dtype=bool)
    forged = table.assign(radius_l2=np.where(right, 3.0, 0.0))
    sandwich = check_sandwich((forged, header), attacks)
    broken = right & (attacks[0].prediction != attacks[0].label).fillna(False).to_numpy(dtype=bool)
    assert broken.any()
    assert set(np.flatnonzero(broken)) <= {one.index for one in sandwich.contradictions}
    for one in sandwich.contradictions:
        assert one.found < one.promised == pytest.approx(stats.norm.cdf((3.0 - one.distance_l2) / 0.25))
    wrong = forged.assign(prediction=(forged.label + 1) % 10)
    assert check_sandwich((wrong, header), attacks).contradictions == (), "the certificate of another class says nothing of it"


@pytest.mark.parametrize(
    ("name", "value"),
    [("model", "other"), ("precision", "bfloat16"), ("sigma", 0.5), ("split", "validation"), ("data_sha256", "other")],
)
def test_what_is_not_the_same_classifier_is_not_joined(name: str, value: Any, certified: Stage, attacked: Stage) -> None:
    """Another model, precision, noise or data set is refused, naming it; so are other images."""
    certificates, (table, header) = read_certificates(certified), read_attacks(attacked)
    other = type(header).model_validate({**header.model_dump(), name: value})
    with pytest.raises(ValueError, match=f"certificates and attack cannot be joined: {name} is .* and .*; attack what was"):
        check_sandwich(certificates, (table, other))
    with pytest.raises(ValueError, match="they are of different images"):
        check_sandwich(certificates, (table.iloc[:-1], header))
