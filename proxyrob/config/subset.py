"""Which of the labelled synthetic images are trained on."""

from typing import Annotated

from pydantic import Field, model_validator

from proxyrob.config.base import Config, Share


class SubsetConfig(Config):
    """A view of the images that the filter kept, without copying any; by default all of them.

    The conditions apply in this order: ``min_confidence``, then ``top_share`` by ``score``, then ``per_class``.
    """

    min_confidence: Annotated[Share, Field(description="least confidence of the surer labeler")] = 0.0
    score: Annotated[str | None, Field(description="column of the side tables by which images are ranked, highest best")] = None
    top_share: Annotated[float, Field(gt=0.0, le=1.0, description="share of the images, those with the best score")] = 1.0
    per_class: Annotated[
        int | None, Field(gt=0, description="images of each class, the first or those with the best score")
    ] = None

    @property
    def is_all(self) -> bool:
        """Whether nothing is left out."""
        return self == SubsetConfig()

    @model_validator(mode="after")
    def _effective(self) -> "SubsetConfig":
        if self.score is None and self.top_share < 1.0:
            raise ValueError(f"top_share {self.top_share:g} needs a score to rank images by; set score to a column")
        if self.score is not None and self.top_share == 1.0 and self.per_class is None:
            raise ValueError(f"score {self.score!r} has no effect without top_share or per_class; set one of them")
        return self
