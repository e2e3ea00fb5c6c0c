"""Measuring robustness."""

from typing import Annotated

from pydantic import Field, field_validator

from proxyrob.config.base import Config, Count, OpenShare, Share


class EvaluateConfig(Config):
    """Clean accuracy, PGD-20 and AutoAttack *standard* on the whole test split."""

    pgd_steps: Count = 20
    pgd_relative_step: Annotated[float, Field(gt=0.0, le=2.0, description="attack step size as a share of epsilon")] = 0.125
    batch_size: Annotated[int, Field(gt=0, description="images attacked at once")] = 266


class CertifyConfig(Config):
    """Randomized smoothing (Cohen et al. 2019); sigma is that of the smoothing training."""

    num_images: Annotated[int, Field(gt=0, description="the first n images of the test split")] = 200
    n0: Annotated[int, Field(gt=0, description="samples that choose the class")] = 100
    n: Annotated[int, Field(gt=0, description="samples that bound its probability")] = 10_000
    alpha: Annotated[OpenShare, Field(description="probability of a false certificate, per image")] = 0.001
    radii: Annotated[tuple[float, ...], Field(description="L2 radii to report")] = (0.0, 0.25, 0.5, 0.75)
    batch_size: Annotated[int, Field(gt=0, description="noisy samples classified at once")] = 512

    @field_validator("radii")
    @classmethod
    def _ascending(cls, radii: tuple[float, ...]) -> tuple[float, ...]:
        if not radii or list(radii) != sorted(set(radii)) or radii[0] < 0:
            raise ValueError(f"expected ascending radii of at least 0, got {radii}")
        return radii


class GateConfig(Config):
    """When a challenger may become champion."""

    margin: Annotated[Share, Field(description="AutoAttack accuracy that may be lost, as a share of the images")] = 0.02
    confidence: OpenShare = 0.95
