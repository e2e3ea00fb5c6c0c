"""Labelers and the filter rule."""

from typing import Annotated

from pydantic import Field, model_validator

from proxyrob.config.base import Config, Count, NonNegative, Positive, Share
from proxyrob.config.models import CnnModel, ModelConfig, ResnetModel


class LabelerConfig(Config):
    """A naturally trained classifier that votes on synthetic images."""

    model: ModelConfig
    steps: Count = 400
    batch_size: Count = 64
    learning_rate: Positive = 3e-3
    weight_decay: NonNegative = 1e-4
    shift: Annotated[int, Field(ge=0, description="random translation of the training images, in pixels")] = 1


class LabelConfig(Config):
    """Two labelers of different architecture, and the paper's rule.

    An image is dropped when the labelers disagree **and** both are less sure than ``threshold``; otherwise the more
    confident labeler's class is its label.
    """

    first: LabelerConfig = LabelerConfig(model=ResnetModel(), steps=250)
    second: LabelerConfig = LabelerConfig(model=CnnModel())
    threshold: Share = 0.9

    @model_validator(mode="after")
    def _different(self) -> "LabelConfig":
        if self.first.model == self.second.model:
            raise ValueError("expected two labelers of different architecture: networks that err alike do not check each other")
        return self
