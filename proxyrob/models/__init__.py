"""Networks; normalisation is their first layer."""

from proxyrob.models.classifier import (
    MODEL_FILES,
    Classifier,
    ClassifierCard,
    build_classifier,
    channel_statistics,
    load_classifier,
    read_classifier,
    save_classifier,
)
from proxyrob.models.folded import FoldedCopy
from proxyrob.models.published import PUBLISHED, load_published, published_card

__all__ = [
    "MODEL_FILES",
    "PUBLISHED",
    "Classifier",
    "ClassifierCard",
    "FoldedCopy",
    "build_classifier",
    "channel_statistics",
    "load_classifier",
    "load_published",
    "published_card",
    "read_classifier",
    "save_classifier",
]
