"""The card: what a model is, what was measured, and how."""

import json
from pathlib import Path

import pytest

from proxyrob.export import ModelCard, ParityReport
from proxyrob.export.card import render_card, write_card
from proxyrob.export.parity import ParityRow
from proxyrob.intervals import measure_share

PARITY = ParityReport(
    passed=True, rows=(ParityRow(kind="clean", num_images=50, different_classes=0, largest_relative_difference=3e-7),)
)


@pytest.fixture
def card() -> ModelCard:
    """A card with figures that differ from each other."""
    return ModelCard(
        name="digits-linf",
        architecture="cnn with 1,234 parameters",
        class_names=("cat", "dog"),
        image_shape=(3, 32, 24),
        threat="linf:8/255",
        training="TRADES",
        training_data="60 real images",
        test_data="the test split, 50 images",
        clean=measure_share(45, 50),
        pgd=measure_share(30, 50),
        pgd_steps=20,
        autoattack=measure_share(25, 50),
        autoattack_name="few-class AutoAttack",
        autoattack_version="proxyrob few-class AutoAttack (2 classes, 1 target)",
        selection="last step",
        seed=7,
        digests={"model": "abc", "data": "def"},
    )


def test_people_read_every_figure_with_its_interval(card: ModelCard) -> None:
    """Each accuracy stands in its own row with its own interval."""
    rows = [line for line in render_card(card, PARITY, "f00").splitlines() if line.startswith("| ")]
    assert "| unperturbed | 90.0 % | 78.6 – 95.7 % |" in rows
    assert "| PGD-20 | 60.0 % | 46.2 – 72.4 % |" in rows
    assert "| few-class AutoAttack | 50.0 % | 36.6 – 63.4 % |" in rows


def test_people_read_what_they_have_to_feed(card: ModelCard) -> None:
    """Shape, range, classes, threat model, seed, hashes and the proof are on the page."""
    text = render_card(card, PARITY, "f00")
    for part in (
        "`[batch, 3, 32, 24]`",
        "`[batch, 2]`; the classes are cat, dog",
        "**linf:8/255**",
        "Seed: 7",
        "| model.onnx (sha256) | `f00` |",
        "| data | `def` |\n| model | `abc` |",
        "one of 50 images",
        PARITY.describe(),
    ):
        assert part in text


def test_programs_read_the_same(card: ModelCard, tmp_path: Path) -> None:
    """``card.json`` holds the card, the proof and the hash; the card reads back."""
    write_card(tmp_path, card, PARITY, "f00")
    content = json.loads((tmp_path / "card.json").read_text())
    assert content.pop("model_sha256") == "f00"
    assert ParityReport.model_validate(content.pop("parity")) == PARITY
    assert ModelCard.model_validate(content) == card
    assert (tmp_path / "card.md").read_text() == render_card(card, PARITY, "f00")


def test_metadata_is_plain_text(card: ModelCard) -> None:
    """ONNX metadata holds strings only; figures survive without rounding, and the whole card is among them."""
    metadata = card.onnx_metadata()
    assert all(isinstance(value, str) for value in metadata.values())
    assert float(metadata["autoattack_accuracy"]) == 0.5
    assert json.loads(metadata["labels"]) == ["cat", "dog"]
    assert ModelCard.model_validate_json(metadata["proxyrob.card"]) == card
