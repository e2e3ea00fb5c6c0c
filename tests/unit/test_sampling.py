"""Sampling a proxy into shards."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from proxyrob.config import JitterProxy, SamplingConfig
from proxyrob.errors import DataIntegrityError
from proxyrob.proxy import SamplesReport, sample_proxy, sampling
from proxyrob.proxy.jitter import JitterSampler
from proxyrob.shards import ShardEntry, read_manifest, read_shard, shard_name
from proxyrob.source import source_report
from proxyrob.storage import DataPlace, Stage
from proxyrob.types import OnProgress, no_progress
from tests.conftest import MakeStage
from tests.toys import Killer, Recorder, StopHereError, files_below, read_images, tiny_split, write_source

JITTER = JitterProxy(num_images=25)
SAMPLING = SamplingConfig(shard_size=10, batch_size=4)


def _sample(
    digits: Stage,
    stage: Stage,
    config: JitterProxy = JITTER,
    sampling: SamplingConfig = SAMPLING,
    on_progress: OnProgress = no_progress,
) -> SamplesReport:
    return sample_proxy(config, sampling, source=digits, proxy=None, seed=0, stage=stage, on_progress=on_progress)


def _bytes(stage: Stage) -> dict[str, bytes]:
    return {name: (stage.folder / name).read_bytes() for name in files_below(stage.folder) if name.endswith((".npy", ".json"))}


def test_shards_hold_all_images_in_order(digits: Stage, make_stage: MakeStage) -> None:
    """25 images in shards of 10, 10 and 5, together the images 0 to 24 of the sampler; the manifest names their origin."""
    stage = make_stage("samples")
    report = _sample(digits, stage)
    place = DataPlace.of(stage.folder)
    manifest = read_manifest(place)
    assert [(shard.first_id, shard.num_images) for shard in manifest.shards] == [(0, 10), (10, 10), (20, 5)]
    assert [len(read_shard(place, shard, manifest.image_shape)) for shard in manifest.shards] == [10, 10, 5]
    assert np.array_equal(read_images(place), JitterSampler(JITTER, source=digits, seed=0).sample(np.arange(25)))
    assert (report.num_images, report.num_shards, report.image_shape, report.constant_images) == (25, 3, (1, 8, 8), 0)
    assert (manifest.source_sha256, manifest.seed) == (source_report(digits).content_sha256, 0)
    assert (manifest.sampler, manifest.generator) == (JITTER.dump(), stage.digest)


@pytest.mark.parametrize("batch_size", [1, 7, 100])
def test_shards_do_not_depend_on_the_batch_size(digits: Stage, make_stage: MakeStage, batch_size: int) -> None:
    """However many images are drawn at once, the bytes of every shard are the same."""
    one, other = make_stage("samples", k=1), make_stage("samples", k=2)
    _sample(digits, one)
    _sample(digits, other, sampling=SamplingConfig(shard_size=10, batch_size=batch_size))
    for name in ("shard-000000.npy", "shard-000001.npy", "shard-000002.npy"):
        assert (one.folder / name).read_bytes() == (other.folder / name).read_bytes()


def test_a_kill_between_shards_changes_no_byte(digits: Stage, make_stage: MakeStage) -> None:
    """Killed after a shard and resumed, every shard and the manifest are what they would have been."""
    whole, pieces = make_stage("samples", k="whole"), make_stage("samples", k="pieces")
    _sample(digits, whole)
    with pytest.raises(StopHereError):
        _sample(digits, pieces, on_progress=Killer(lambda done: any(pieces.folder.glob("*.npy"))))
    (first,) = files_below(pieces.folder)
    before = (pieces.folder / first).stat().st_mtime_ns
    assert _sample(digits, pieces).num_images == 25
    assert (pieces.folder / first).stat().st_mtime_ns == before, "a finished shard is not sampled again"
    ours, theirs = _bytes(pieces), _bytes(whole)
    assert ours.keys() == theirs.keys()
    assert {name for name in ours if name.endswith(".npy") and ours[name] != theirs[name]} == set()
    assert read_manifest(DataPlace.of(pieces.folder)).shards == read_manifest(DataPlace.of(whole.folder)).shards


def test_a_kill_within_a_shard_leaves_no_shard(digits: Stage, make_stage: MakeStage) -> None:
    """Half a shard is never taken for a whole one."""
    stage = make_stage("samples")
    with pytest.raises(StopHereError):
        _sample(digits, stage, on_progress=Killer(lambda done: done > 0))
    assert files_below(stage.folder) == set()


def test_finished_samples_are_not_sampled_again(digits: Stage, make_stage: MakeStage) -> None:
    """A second call gives the report and draws nothing; progress ends with all images."""
    stage, first, second = make_stage("samples"), Recorder(), Recorder()
    report = _sample(digits, stage, on_progress=first)
    assert _sample(digits, stage, on_progress=second) == report
    assert (first.told[-1], second.told) == ((25, 25), [])
    assert [done for done, _ in first.told] == sorted(done for done, _ in first.told)


def _half_black(stage: Stage, black: int) -> Stage:
    """A source of 100 training images of which ``black`` are constant."""
    split = tiny_split(100)
    split.stored[:black] = 0
    write_source(stage, split)
    return stage


@pytest.mark.parametrize(("black", "collapsed"), [(1, False), (2, True)])
def test_a_collapsed_generator_is_refused(make_stage: MakeStage, black: int, collapsed: bool) -> None:
    """One constant image in a hundred is let through and counted, two are refused."""
    source, stage = _half_black(make_stage("source"), black), make_stage("samples")
    config = JitterProxy(num_images=100, sigma=1e-9)
    if collapsed:
        with pytest.raises(DataIntegrityError, match="2 of 100 sampled images are constant: the generator has collapsed"):
            _sample(source, stage, config)
        assert stage.record() is None
        assert not (stage.folder / "manifest.json").exists()
    else:
        assert _sample(source, stage, config).constant_images == 1


def test_images_are_counted_without_reading_what_was_written(make_stage: MakeStage, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of its own shards a worker knows how many images are constant; those of others it reads, and adds them."""
    read: list[str] = []

    def recorded(place: DataPlace, entry: ShardEntry, *args: Any, **options: Any) -> np.ndarray:
        read.append(entry.name)
        return read_shard(place, entry, *args, **options)

    monkeypatch.setattr(sampling, "read_shard", recorded)
    source, stage, config = _half_black(make_stage("source"), 1), make_stage("samples"), JitterProxy(num_images=100, sigma=1e-9)
    report = _sample(source, stage, config)
    assert (report.constant_images, read) == (1, [])
    black = int(np.flatnonzero((read_images(DataPlace.of(stage.folder)) == 0).all(axis=(1, 2, 3)))[0]) // SAMPLING.shard_size
    for number in (black, black + 1):
        (stage.folder / f"{shard_name(number % 10)}.npy").unlink()
        stage.forget()
        read.clear()
        assert _sample(source, stage, config).constant_images == 1
        assert read == [shard_name(other) for other in range(10) if other != number % 10]


def test_sampling_needs_a_finished_source(make_stage: MakeStage, tmp_path: Path) -> None:
    """There is nothing to sample from before the source is prepared."""
    with pytest.raises(DataIntegrityError, match="holds no finished source"):
        _sample(make_stage("source"), make_stage("samples"))
    assert not list(tmp_path.rglob("*.npy"))


def test_samples_can_lie_elsewhere(digits: Stage, make_stage: MakeStage, tmp_path: Path) -> None:
    """With a place for images the stage's own folder has the record alone, and the images are the same."""
    beside, elsewhere, place = make_stage("samples", k=1), make_stage("samples", k=2), DataPlace.of(tmp_path / "data")
    _sample(digits, beside)
    report = sample_proxy(JITTER, SAMPLING, source=digits, proxy=None, seed=0, stage=elsewhere, images=place)
    assert files_below(elsewhere.folder) == {"stage.json"}
    assert np.array_equal(read_images(place), read_images(DataPlace.of(beside.folder)))
    assert report.sha256 == read_manifest(place).sha256


def test_a_damaged_shard_is_made_anew_when_it_is_deleted(digits: Stage, make_stage: MakeStage) -> None:
    """Following the remedy, only the deleted shard is sampled, with the bytes it had."""
    stage = make_stage("samples")
    _sample(digits, stage)
    before, path = _bytes(stage), stage.folder / "shard-000001.npy"
    others = {name: (stage.folder / name).stat().st_mtime_ns for name in ("shard-000000.npy", "shard-000002.npy")}
    path.unlink()
    _sample(digits, stage)
    assert {name: content for name, content in _bytes(stage).items() if name != "stage.json"} == {
        name: content for name, content in before.items() if name != "stage.json"
    }
    assert {name: (stage.folder / name).stat().st_mtime_ns for name in others} == others


def test_another_set_is_not_sampled_into_a_place(digits: Stage, make_stage: MakeStage, tmp_path: Path) -> None:
    """A place that holds the images of another seed is refused: its shards are not taken for these."""
    place = DataPlace.of(tmp_path / "data")
    sample_proxy(JITTER, SAMPLING, source=digits, proxy=None, seed=0, stage=make_stage("samples"), images=place)
    with pytest.raises(DataIntegrityError, match="describes another set than the shards beside it"):
        sample_proxy(JITTER, SAMPLING, source=digits, proxy=None, seed=1, stage=make_stage("samples", k=1), images=place)
