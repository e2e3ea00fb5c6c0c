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

__all__ = [
    "MODEL_FILES",
    "Classifier",
    "ClassifierCard",
    "build_classifier",
    "channel_statistics",
    "load_classifier",
    "read_classifier",
    "save_classifier",
]
