"""Certification by randomized smoothing, from votes to tables."""

from statistics import NormalDist
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor, nn

from proxyrob.certify import (
    CertificationReport,
    certified_radius,
    certify_classifier,
    certify_image,
    count_votes,
    lower_bound,
    read_certificates,
    to_smoothing_tsv,
)
from proxyrob.certify.smoothing import summarise
from proxyrob.errors import DataIntegrityError
from proxyrob.models import load_classifier
from proxyrob.rng import Streams
from proxyrob.source import read_split
from proxyrob.storage import Stage
from tests.conftest import MakeStage
from tests.toys import SMALL_CERTIFY as CONFIG
from tests.toys import Killer, Linear, Recorder, StopHereError, damage, files_below


class _Constant(nn.Module):
    """Answers one class for everything."""

    def __init__(self, chosen: int) -> None:
        super().__init__()
        self.chosen = chosen

    def forward(self, images: Tensor) -> Tensor:
        return torch.eye(4)[self.chosen].expand(len(images), 4)


class _Remembering(nn.Module):
    """A linear model that keeps the images it was shown."""

    def __init__(self) -> None:
        super().__init__()
        self.model = Linear(torch.eye(4))
        self.seen: list[Tensor] = []

    def forward(self, images: Tensor) -> Tensor:
        self.seen.append(images.clone())
        return self.model(images)


def _stream(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _certify(model: nn.Module, image: Tensor, **values: Any) -> dict[str, Any]:
    given: dict[str, Any] = {
        "sigma": 0.25,
        "n0": 20,
        "n": 500,
        "alpha": 0.001,
        "batch_size": 64,
        "select": _stream(1),
        "estimate": _stream(2),
        **values,
    }
    return certify_image(model, image, **given)


IMAGE = torch.full((1, 2, 2), 0.5)


def test_every_sample_is_one_vote() -> None:
    """Votes add up to n whatever the batch size, also when it does not divide n, as int64 for every class."""
    for n, batch_size in ((10, 4), (10, 10), (10, 64), (1, 1)):
        votes = count_votes(Linear(torch.eye(4)), IMAGE, 0.25, n, batch_size, _stream(0))
        assert (int(votes.sum()), votes.dtype, len(votes)) == (n, torch.int64, 4)
    assert count_votes(_Constant(2), IMAGE, 0.25, 10, 4, _stream(0)).tolist() == [0, 0, 10, 0]


def test_noise_has_deviation_sigma_and_is_not_clipped() -> None:
    """The model sees image + N(0, σ²): outside [0,1] too, because the theorem is about that noise."""
    model = _Remembering()
    count_votes(model, IMAGE, 0.5, 5000, 1000, _stream(0))
    noise = torch.cat(model.seen) - IMAGE
    assert noise.std().item() == pytest.approx(0.5, rel=0.02)
    assert noise.mean().item() == pytest.approx(0.0, abs=0.01)
    assert torch.cat(model.seen).min() < 0.0
    assert len({part.flatten().tolist()[0] for part in model.seen}) == 5, "every batch draws other noise"


def test_no_sample_is_refused() -> None:
    """There is no vote without a sample."""
    with pytest.raises(ValueError, match="expected at least one sample, got n=0"):
        count_votes(_Constant(0), IMAGE, 0.25, 0, 4, _stream(0))


def test_the_image_is_not_changed() -> None:
    """Noise is added to copies."""
    image = IMAGE.clone()
    count_votes(_Constant(0), image, 0.25, 10, 4, _stream(0))
    assert torch.equal(image, IMAGE)


def test_a_certificate_is_the_bound_on_fresh_votes() -> None:
    """The class comes from the first sample, its count, bound and radius from the second."""
    model, image = Linear(torch.eye(4)), torch.tensor([0.5, 0.2, 0.1, 0.3]).view(1, 2, 2)
    row = _certify(model, image)
    chosen = int(count_votes(model, image, 0.25, 20, 64, _stream(1)).argmax())
    count = int(count_votes(model, image, 0.25, 500, 64, _stream(2))[chosen])
    assert (row["prediction"], row["count"]) == (chosen, count)
    assert row["radius_l2"] == certified_radius(lower_bound(count, 500, 0.001), 0.25)
    assert row["radius_l2"] > 0
    assert (row["n0"], row["n"], row["alpha"], row["sigma"]) == (20, 500, 0.001, 0.25)


def test_a_constant_model_gets_the_largest_radius() -> None:
    """When all samples agree the radius is sigma · Φ⁻¹(alpha^(1/n))."""
    row = _certify(_Constant(3), IMAGE)
    assert (row["prediction"], row["count"]) == (3, 500)
    assert row["radius_l2"] == pytest.approx(0.25 * NormalDist().inv_cdf(0.001 ** (1 / 500)))


def test_a_model_that_guesses_is_abstained_from() -> None:
    """With four equally likely classes there is no majority: no prediction, radius 0, the count is kept."""
    row = _certify(Linear(torch.eye(4)), IMAGE)
    assert (row["prediction"], row["radius_l2"]) == (None, 0.0)
    assert 0 < row["count"] < 250


def test_selection_and_estimation_use_different_samples() -> None:
    """The class must not be chosen on the samples that bound it: no noise of the first sample occurs in the second."""
    model = _Remembering()
    _certify(model, IMAGE, n0=10, n=10, batch_size=10)
    first, second = model.seen
    assert not torch.equal(first, second)
    assert not set(first.flatten().tolist()) & set(second.flatten().tolist())


def test_the_stage_names_two_streams_for_each_image(digits: Stage, toy_classifier: Stage, certified: Stage) -> None:
    """A row of the table is that of the named streams: select and estimate differ, and each image has its own."""
    table, _ = read_certificates(certified)
    streams, split = Streams(0), read_split(digits, "test")
    for index in (0, 7, 24):
        row = certify_image(
            load_classifier(toy_classifier),
            split.images[index],
            sigma=0.25,
            n0=20,
            n=200,
            alpha=0.01,
            batch_size=64,
            select=streams.torch("certify/select", image=index),
            estimate=streams.torch("certify/estimate", image=index),
        )
        found = table.iloc[index]
        assert (found["count"], found.radius_l2) == (row["count"], row["radius_l2"])
        assert (None if pd.isna(found.prediction) else found.prediction) == row["prediction"]


# The stage


def test_the_table_has_a_row_for_each_of_the_first_images(certified: Stage, digits: Stage, toy_classifier: Stage) -> None:
    """Index, label and conditions of each; abstentions are null; the header has what the certificates depend on."""
    table, header = read_certificates(certified)
    assert table["index"].tolist() == list(range(25))
    assert table.label.tolist() == read_split(digits, "test").labels[:25].tolist()
    assert str(table.prediction.dtype) == "Int64"
    assert (table.n.unique().tolist(), table.alpha.unique().tolist(), table.sigma.unique().tolist()) == ([200], [0.01], [0.25])
    assert ((table.radius_l2 > 0) == table.prediction.notna()).all()
    assert table["count"].between(0, 200).all()
    assert (table.elapsed_s > 0).all()
    assert (header.sigma, header.n0, header.n, header.alpha, header.seed, header.split) == (0.25, 20, 200, 0.01, 0, "test")
    assert header.model == toy_classifier.digest


def test_the_report_is_that_of_the_table(certified: Stage) -> None:
    """Every figure is counted from the table."""
    table, _ = read_certificates(certified)
    assert certified.finished(CertificationReport) == summarise(table, (0.0, 0.25), 0.01)


def test_a_killed_certification_goes_on_and_finds_the_same(
    certified: Stage, digits: Stage, toy_classifier: Stage, make_stage: MakeStage
) -> None:
    """Killed after ten images and resumed, the table is the same but for the time it took."""
    stage, recorder = make_stage("certify"), Recorder()
    given: dict[str, Any] = {"sigma": 0.25, "source": digits, "model": toy_classifier, "seed": 0, "stage": stage}
    with pytest.raises(StopHereError):
        certify_classifier(CONFIG, **given, on_progress=Killer(lambda done: done == 10))
    assert files_below(stage.folder) == {"scratch/certificates/images-00000.parquet"}
    report = certify_classifier(CONFIG, **given, on_progress=recorder)
    assert [done for done, _ in recorder.told] == [0, 10, 20, 25]
    ours, theirs = (read_certificates(found)[0].drop(columns="elapsed_s") for found in (stage, certified))
    pd.testing.assert_frame_equal(ours, theirs)
    assert report == certified.finished(CertificationReport)
    assert files_below(stage.folder) == {"certificates.parquet", "stage.json"}


def test_finished_certificates_are_not_made_again(certified: Stage, digits: Stage, toy_classifier: Stage) -> None:
    """A second call gives the report and draws nothing."""
    recorder = Recorder()
    report = certify_classifier(
        CONFIG, sigma=0.25, source=digits, model=toy_classifier, seed=0, stage=certified, on_progress=recorder
    )
    assert (report, recorder.told) == (certified.finished(CertificationReport), [])


def test_damaged_certificates_are_refused(digits: Stage, toy_classifier: Stage, make_stage: MakeStage) -> None:
    """Certificates are hashed before anything is concluded from them."""
    stage = make_stage("certify")
    config = CONFIG.replace(num_images=2, n=20)
    certify_classifier(config, sigma=0.25, source=digits, model=toy_classifier, seed=0, stage=stage)
    damage(stage.folder / "certificates.parquet")
    with pytest.raises(DataIntegrityError, match=r"certificates\.parquet is damaged"):
        read_certificates(stage)


# Tables


def _table(*rows: tuple[int, int | None, float]) -> pd.DataFrame:
    """Rows of (label, prediction, radius)."""
    labels, predictions, radii = zip(*rows, strict=True)
    return pd.DataFrame(
        {
            "index": np.arange(len(rows)),
            "label": labels,
            "prediction": pd.array(predictions, dtype="Int64"),
            "radius_l2": radii,
            "elapsed_s": [0.125] * len(rows),
        }
    )


TABLE = _table((0, 0, 0.1), (1, 1, 0.5), (2, 9, 0.7), (3, None, 0.0))


def test_only_a_right_class_counts_and_only_up_to_its_radius() -> None:
    """A wrong class or an abstention is not certified at any radius; a radius that is just reached counts."""
    report = summarise(TABLE, (0.0, 0.1, 0.25, 0.5, 0.75), 0.01)
    assert {radius: share.value for radius, share in report.certified.items()} == {
        "0": 0.5,
        "0.1": 0.5,
        "0.25": 0.25,
        "0.5": 0.25,
        "0.75": 0.0,
    }
    assert (report.certified["0"].n, report.abstained.value) == (4, 0.25)


def test_the_average_radius_counts_wrong_and_abstained_as_zero() -> None:
    """(0.1 + 0.5 + 0 + 0) / 4."""
    report = summarise(TABLE, (0.0,), 0.01)
    assert report.average_certified_radius.value == pytest.approx(0.15)
    assert report.average_certified_radius.n == 4


def test_the_expected_number_of_false_certificates_is_reported() -> None:
    """Each certificate may be false with probability alpha."""
    assert summarise(TABLE, (0.0,), 0.01).expected_false_certificates == pytest.approx(0.04)


def test_the_tsv_is_that_of_the_smoothing_tools() -> None:
    """Six columns; abstention is -1 and not correct; a wrong class keeps its radius."""
    assert to_smoothing_tsv(TABLE) == (
        "idx\tlabel\tpredict\tradius\tcorrect\ttime\n"
        "0\t0\t0\t0.100\t1\t0.125000\n"
        "1\t1\t1\t0.500\t1\t0.125000\n"
        "2\t2\t9\t0.700\t0\t0.125000\n"
        "3\t3\t-1\t0.000\t0\t0.125000\n"
    )


@pytest.mark.parametrize(("radius", "text"), [(0.4999, "0.499"), (0.4996, "0.499"), (0.5, "0.500"), (0.12345, "0.123")])
def test_the_tsv_rounds_radii_down(radius: float, text: str) -> None:
    """A certificate is never made larger by being written."""
    assert to_smoothing_tsv(_table((0, 0, radius))).splitlines()[1].split("\t")[3] == text


def test_the_tsv_keeps_radii_of_whole_thousandths() -> None:
    """Rounding down does not lose a thousandth to binary fractions, which would only waste a certificate."""
    radii = [k / 1000 for k in range(1, 1000)]
    lines = to_smoothing_tsv(_table(*((0, 0, radius) for radius in radii))).splitlines()[1:]
    assert [float(line.split("\t")[3]) for line in lines] == radii
