"""Real images."""

from typing import Annotated, Literal

from pydantic import Field

from proxyrob.config.base import Config, Count


class DigitsSource(Config):
    """scikit-learn's handwritten digits: 1,797 grey images of 8×8, ten classes, shipped inside the dependency."""

    kind: Literal["digits"] = "digits"
    num_train: Annotated[int, Field(gt=0, description="real images the models and the proxy are trained on")] = 200
    num_validation: Annotated[int, Field(gt=0, description="images for any selection, cut from the training side")] = 300
    num_test: Count = 797
