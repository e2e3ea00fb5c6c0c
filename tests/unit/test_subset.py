"""Test images alone: which are taken, how they are named, and that nothing depends on the rest."""

from pathlib import Path

import numpy as np
import pytest

from proxyrob.certify import certify_classifier, read_certificates
from proxyrob.compare import compare_verdicts
from proxyrob.config import NpzSource
from proxyrob.errors import DataIntegrityError
from proxyrob.evaluate import ADVERSARIAL, evaluate_classifier, read_adversarial, read_verdicts, replay_classifier
from proxyrob.source import (
    ImageSubset,
    fingerprint_test,
    read_rows,
    read_split,
    read_test_images,
    source_report,
    take_test_images,
)
from proxyrob.storage import Stage
from tests.conftest import MakeStage
from tests.toys import SMALL_CERTIFY, SMALL_EVALUATE, SMALL_SIGMA, SMALL_THREAT, tiny_split

DRAWN = ImageSubset(count=12, seed=3)


@pytest.fixture
def drawn(digits: Stage, make_stage: MakeStage) -> Stage:
    """Twelve of the 60 test digits, drawn."""
    stage = make_stage("images", subset=DRAWN.model_dump())
    take_test_images(DRAWN, source=digits, stage=stage)
    return stage


def test_names_and_rows() -> None:
    """All, the first, or drawn ones; of one seed the fewer are among the more, and another seed draws others."""
    named = [ImageSubset(), ImageSubset(count=60), ImageSubset(count=9), ImageSubset(count=9, seed=4)]
    assert [subset.identify(60) for subset in named] == ["all", "all", "first-9", "seed-4-9"]
    assert np.array_equal(ImageSubset(count=9).rows(60), np.arange(9))
    few, more, other = (ImageSubset(count=n, seed=seed).rows(60) for n, seed in ((9, 4), (30, 4), (9, 5)))
    assert set(few) < set(more)
    assert list(few) == sorted(set(few))
    assert set(few) != set(other)
    with pytest.raises(ValueError, match="expected 1 to 60 images, the number of test images, got 61"):
        ImageSubset(count=61).rows(60)


def test_drawn_images_keep_their_rows(digits: Stage, drawn: Stage) -> None:
    """Pixels and labels are those of the rows, and the content says that these are other images."""
    rows, whole, taken = read_rows(drawn), read_split(digits, "test"), read_split(drawn, "test")
    assert np.array_equal(taken.stored, whole.stored[rows])
    assert np.array_equal(taken.labels, whole.labels[rows])
    report = source_report(drawn)
    assert (report.subset, report.num_test, report.num_train) == ("seed-3-12", 12, 0)
    assert report.content_sha256 != source_report(digits).content_sha256
    assert np.array_equal(read_rows(digits), np.arange(60))


def test_verdicts_say_which_images(drawn: Stage, toy_classifier: Stage, evaluation: Stage, make_stage: MakeStage) -> None:
    """The header names the subset, rows are those of the whole split, clean predictions are the same, and replaying finds
    the images; verdicts on others are not compared."""
    stage = make_stage("evaluate")
    evaluate_classifier(SMALL_EVALUATE, source=drawn, model=toy_classifier, threat=SMALL_THREAT, seed=0, stage=stage)
    (table, header), (whole, _) = read_verdicts(stage), read_verdicts(evaluation)
    rows = read_rows(drawn)
    assert header.subset == "seed-3-12"
    assert np.array_equal(table["index"], rows)
    assert np.array_equal(table.clean_prediction, whole.clean_prediction.to_numpy()[rows])
    kept = np.concatenate([part.indices for part in read_adversarial(stage.folder / ADVERSARIAL)])
    assert set(kept) <= set(rows)
    replayed = replay_classifier(source=drawn, evaluation=stage, model=toy_classifier)
    assert replayed.fooled.value == 1.0
    assert replayed.clean.n == 12
    with pytest.raises(ValueError, match=r"subset is seed-3-12 and all; evaluate both alike: evaluate both on the same number"):
        compare_verdicts(read_verdicts(stage), read_verdicts(evaluation))


def test_a_certificate_depends_on_no_other_image(
    digits: Stage, drawn: Stage, toy_classifier: Stage, make_stage: MakeStage
) -> None:
    """An image drawn has the votes that it has among all, and the header names the subset."""
    few = SMALL_CERTIFY.replace(num_images=12)
    for name, source, config in (("some", drawn, few), ("all", digits, SMALL_CERTIFY.replace(num_images=60))):
        stage = make_stage("certify", of=name)
        certify_classifier(config, sigma=SMALL_SIGMA, source=source, model=toy_classifier, seed=0, stage=stage)
    (some, header), (every, _) = (read_certificates(make_stage("certify", of=name)) for name in ("some", "all"))
    assert header.subset == "seed-3-12"
    joined = some.merge(every, on="index", suffixes=("", "_all"))
    assert len(joined) == 12
    assert (joined["count"] == joined.count_all).all()


def test_the_first_images_certified_are_named(certified: Stage) -> None:
    """Of a whole split the first n are certified, and the header says so."""
    assert read_certificates(certified)[1].subset == "first-25"


def test_test_images_are_read_without_training_images(tmp_path: Path, make_stage: MakeStage) -> None:
    """A file alone is enough; the classes are those that occur; a file that changes meanwhile is refused."""
    split = tiny_split(20)
    np.savez(tmp_path / "theirs.npz", image=split.stored, label=split.labels)
    path = str(tmp_path / "theirs.npz")
    config, stage = NpzSource(name="theirs", train=path, test=path), make_stage("images")
    sha256 = fingerprint_test(config)
    report = read_test_images(config, ImageSubset(count=5, seed=1), sha256=sha256, stage=stage)
    assert (report.num_test, report.class_names, report.image_shape) == (5, tuple("0123456789"), (1, 4, 4))
    assert np.array_equal(read_split(stage, "test").stored, split.stored[read_rows(stage)])
    with pytest.raises(DataIntegrityError, match="changed while it was being read"):
        read_test_images(config, ImageSubset(), sha256="0" * 64, stage=make_stage("images", other=1))


def test_images_that_were_normalised_are_refused(tmp_path: Path, make_stage: MakeStage) -> None:
    """Pixels are 8-bit levels: floats, scaled or normalised, are named and refused."""
    np.savez(tmp_path / "theirs.npz", image=np.zeros((4, 8, 8, 1), np.float32), label=np.zeros(4, np.int64))
    path = str(tmp_path / "theirs.npz")
    config = NpzSource(name="theirs", train=path, test=path)
    with pytest.raises(DataIntegrityError, match="float32"):
        read_test_images(config, ImageSubset(), sha256=fingerprint_test(config), stage=make_stage("images"))
