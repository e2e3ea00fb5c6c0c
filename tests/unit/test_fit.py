"""Does a model fit the images? What is refused before any attack, and which remedy is named."""

import re
from pathlib import Path

import pytest

from proxyrob.config import DigitsSource
from proxyrob.evaluate import require_fit
from proxyrob.source import ImageSubset, prepare_digits, take_test_images
from proxyrob.storage import Stage
from tests.conftest import MakeStage
from tests.somebody import adopted
from tests.toys import stage_in, tiny_split, write_source

HERE = "tests.somebody"


@pytest.fixture(scope="module")
def many_digits(tmp_path_factory: pytest.TempPathFactory) -> Stage:
    """A source with 64 test digits or more."""
    stage = stage_in(tmp_path_factory.mktemp("digits"), "source")
    prepare_digits(DigitsSource(num_train=60, num_validation=30, num_test=100), seed=0, stage=stage)
    return stage


def test_a_model_that_fits(many_digits: Stage, make_stage: MakeStage) -> None:
    """It is told how many of the first images are right."""
    fit = require_fit("good", model=adopted(make_stage, f"{HERE}:good"), source=many_digits)
    assert fit.clean.n == 64
    assert fit.clean.value > 0.8


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("probabilities", "returns probabilities, whose gradients vanish"),
        ("not_a_number", "returns NaN or infinite values"),
        (
            "seven_classes",
            r"returns a tensor of shape \(64, 7\) for 64 images, expected \(64, 10\): one logit for each",
        ),
        ("of_levels", r"would be right if pixels had 255 levels"),
        ("of_centred", r"would be right if images were in \[-1,1\]"),
        (
            "renamed",
            r"classifies \d of 64 unperturbed images .* order: 0, 1, .* right if the classes came in another order",
        ),
        ("guessing", "no more than a guess; .* is normalisation part of the model"),
    ],
)
def test_a_model_that_does_not(name: str, told: str, many_digits: Stage, make_stage: MakeStage) -> None:
    """The error says what was found, what was expected, and what would help."""
    with pytest.raises(ValueError, match=told) as refused:
        require_fit("theirs", model=adopted(make_stage, f"{HERE}:{name}"), source=many_digits)
    assert re.match("theirs ", str(refused.value))


def test_images_of_other_channels(make_stage: MakeStage, tmp_path: Path) -> None:
    """The shape that the model was shown is named, with what the model said."""
    source = make_stage("source", shape=3)
    write_source(source, tiny_split(shape=(8, 8, 3)))
    with pytest.raises(ValueError, match=r"does not take images of 3×8×8 \(channels×height×width, float32 in \[0,1\]\)"):
        require_fit("theirs", model=adopted(make_stage, f"{HERE}:good"), source=source)


def test_few_images_decide_nothing(many_digits: Stage, make_stage: MakeStage) -> None:
    """Of fewer than 32 images even a good model may have as few right as a guess: none is refused for that."""
    few = make_stage("images", count=20)
    take_test_images(ImageSubset(count=20), source=many_digits, stage=few)
    assert require_fit("guessing", model=adopted(make_stage, f"{HERE}:guessing"), source=few).clean.n == 20
