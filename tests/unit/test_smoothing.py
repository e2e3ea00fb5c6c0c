"""Certification by randomized smoothing, from votes to tables."""

from statistics import NormalDist
from typing import Any

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
    count_votes_of_several,
    lower_bound,
    read_certificates,
)
from proxyrob.certify.certificates import summarise
from proxyrob.certify.smoothing import UNIT_SIZE
from proxyrob.config import FixedMethod, SequentialMethod
from proxyrob.errors import DataIntegrityError
from proxyrob.models import FoldedCopy, load_classifier
from proxyrob.rng import Streams
from proxyrob.source import read_split
from proxyrob.storage import Stage
from tests.conftest import MakeStage
from tests.toys import SMALL_CERTIFY as CONFIG
from tests.toys import Killer, Linear, Recorder, StopHereError, damage, files_below, random_images


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


@pytest.mark.parametrize(("n", "batch_size"), [(10, 4), (10, 64), (3, 8), (1, 1)])
def test_images_that_share_batches_get_their_own_votes(n: int, batch_size: int) -> None:
    """Copies of several images fill each batch and never overfill it; the votes of each are those it gets alone."""
    images, model = random_images(5, shape=(1, 2, 2)), _Remembering()
    votes = count_votes_of_several(model, images, 0.25, n, batch_size, [_stream(k) for k in range(5)])
    sizes = [len(seen) for seen in model.seen]
    assert sum(sizes) == 5 * n
    assert max(sizes) <= batch_size
    assert n > batch_size or len(sizes) == -(-5 // (batch_size // n)), "as few batches as there can be"
    for index, image in enumerate(images):
        alone = count_votes(model, image, 0.25, n, batch_size, _stream(index))
        assert torch.equal(votes[index], alone)


def test_every_image_needs_a_stream() -> None:
    """Two images cannot share one stream of noise."""
    with pytest.raises(ValueError, match="for 2 images and 1 generators"):
        count_votes_of_several(_Constant(0), random_images(2), 0.25, 5, 4, [_stream(0)])


@pytest.mark.parametrize("name", ["toy_classifier", "other_classifier"])
def test_a_folded_network_gives_the_votes_of_the_network(name: str, digits: Stage, request: pytest.FixtureRequest) -> None:
    """Certificates are issued to a folded copy: on the same noise its votes are those of the network, vote for vote."""
    classifier = load_classifier(request.getfixturevalue(name))
    images = read_split(digits, "test").images[:6]
    folded = FoldedCopy(classifier, example=images[:2])
    ours, theirs = (
        count_votes_of_several(model, images, 0.5, 500, 256, [_stream(k) for k in range(6)]) for model in (folded, classifier)
    )
    assert torch.equal(ours, theirs)


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
    assert (header.method, header.grid, header.precision, header.num_values) == ({"kind": "fixed"}, None, "float32", 64)
    assert header.conditions == "σ = 0.25, n = 200"
    assert header.model == toy_classifier.digest


def test_the_report_is_that_of_the_table(certified: Stage) -> None:
    """Every figure is counted from the table."""
    table, _ = read_certificates(certified)
    assert certified.finished(CertificationReport) == summarise(table, CONFIG, 64)


def test_a_killed_certification_goes_on_and_finds_the_same(
    certified: Stage, digits: Stage, toy_classifier: Stage, make_stage: MakeStage
) -> None:
    """Killed after ten images and resumed, the table is the same but for the time it took."""
    stage, recorder = make_stage("certify"), Recorder()
    given: dict[str, Any] = {"sigma": 0.25, "source": digits, "model": toy_classifier, "seed": 0, "stage": stage}
    with pytest.raises(StopHereError):
        certify_classifier(CONFIG, **given, on_progress=Killer(lambda done: done == 10))
    assert files_below(stage.folder) == {f"scratch/certificates/{name}" for name in ("binding.json", "images-00000.parquet")}
    report = certify_classifier(CONFIG, **given, on_progress=recorder)
    assert [done for done, _ in recorder.told] == [10, 20, 25]
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
    config = CONFIG.replace(num_images=2, n=20, radii=(0.0,))
    certify_classifier(config, sigma=0.25, source=digits, model=toy_classifier, seed=0, stage=stage)
    damage(stage.folder / "certificates.parquet")
    with pytest.raises(DataIntegrityError, match=r"certificates\.parquet is damaged"):
        read_certificates(stage)


def test_a_sequential_stage_stops_where_the_answer_is_known(
    certified: Stage, digits: Stage, toy_classifier: Stage, make_stage: MakeStage
) -> None:
    """The same images, most of them with fewer samples; no radius beyond what all samples certify, and none off the grid."""
    config = CONFIG.replace(method=SequentialMethod(early_share=0.0, futility=0.0), linf=("1/50",))
    stage = make_stage("certify")
    report = certify_classifier(config, sigma=0.25, source=digits, model=toy_classifier, seed=0, stage=stage)
    (table, header), (fixed, _) = read_certificates(stage), read_certificates(certified)
    assert header.grid == (0.0, 0.16, 0.25)
    assert header.conditions == "σ = 0.25, n ≤ 200"
    assert table.columns.tolist() == [*fixed.columns[:-1], "looks", "elapsed_s"]
    assert table.label.tolist() == fixed.label.tolist()
    assert (table.n <= 200).all()
    assert report.samples_per_image == (table.n + 20).mean() < 210
    assert set(table.radius_l2) <= {0.0, 0.16, 0.25}
    assert table.prediction.isna().tolist() == fixed.prediction.isna().tolist()
    assert (table.radius_l2 <= fixed.radius_l2).all()
    full = certified.finished(CertificationReport)
    assert full is not None
    assert {name: report.certified[name] for name in full.certified} == full.certified
    assert report.certified["0.25"].value <= report.certified_linf["1/50"].value <= report.certified["0"].value


def test_a_killed_sequential_certification_goes_on_and_finds_the_same(
    digits: Stage, toy_classifier: Stage, make_stage: MakeStage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed after ten images and resumed, the table is that of one go, but for the time it took."""
    monkeypatch.setitem(UNIT_SIZE, "sequential", 10)
    tables = []
    for resumed in (False, True):
        stage = make_stage("certify", resumed=resumed)
        config = CONFIG.replace(method=SequentialMethod())
        given: dict[str, Any] = {"sigma": 0.25, "source": digits, "model": toy_classifier, "seed": 0, "stage": stage}
        if resumed:
            with pytest.raises(StopHereError):
                certify_classifier(config, **given, on_progress=Killer(lambda done: done == 10))
        certify_classifier(config, **given)
        tables.append(read_certificates(stage)[0].drop(columns="elapsed_s"))
    pd.testing.assert_frame_equal(*tables)


def test_certificates_in_bfloat16_are_those_of_that_network(
    digits: Stage, other_classifier: Stage, make_stage: MakeStage
) -> None:
    """The votes are those of the network computed in bfloat16, and the header says so."""
    config, stage = CONFIG.replace(num_images=3, precision="bfloat16"), make_stage("certify")
    certify_classifier(config, sigma=0.25, source=digits, model=other_classifier, seed=0, stage=stage)
    table, header = read_certificates(stage)
    assert (header.precision, header.conditions) == ("bfloat16", "σ = 0.25, n = 200, bfloat16")
    images = read_split(digits, "test").images[:3]
    network = FoldedCopy(load_classifier(other_classifier), torch.bfloat16, example=images[:2])
    for index, image in enumerate(images):
        chosen = int(count_votes(network, image, 0.25, 20, 64, Streams(0).torch("certify/select", image=index)).argmax())
        votes = count_votes(network, image, 0.25, 200, 64, Streams(0).torch("certify/estimate", image=index))
        assert table["count"].tolist()[index] == votes[chosen]


@pytest.mark.parametrize("method", [FixedMethod(), SequentialMethod()])
def test_a_threshold_beyond_the_cap_is_refused_before_any_work(
    method: FixedMethod | SequentialMethod, digits: Stage, toy_classifier: Stage, make_stage: MakeStage
) -> None:
    """Where the size of the images was not known from the configuration, the stage refuses what no image can reach."""
    stage = make_stage("certify")
    config, recorder = CONFIG.replace(linf=("1/10",), method=method), Recorder()
    with pytest.raises(ValueError, match=r"certify\.linf asks for 1/10, which on images of 64 values needs .* 0\.800"):
        certify_classifier(config, sigma=0.25, source=digits, model=toy_classifier, seed=0, stage=stage, on_progress=recorder)
    assert recorder.told == []
