"""Certifying robustness by randomized smoothing."""

import math
from statistics import NormalDist
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, PlainSerializer, field_validator

from proxyrob.config.base import Config, OpenShare
from proxyrob.threat import Threat, parse_threat

Precision = Annotated[
    Literal["float32", "bfloat16"], Field(description="in which the network computes; certificates are of that network")
]


class FixedMethod(Config):
    """All ``n`` samples for every image: the largest radius they certify (Cohen et al. 2019, algorithm CERTIFY)."""

    kind: Literal["fixed"] = "fixed"

    @property
    def last_share(self) -> float:
        """The share of alpha that the last look at the samples is sure to have."""
        return 1.0


class SequentialMethod(Config):
    """Samples until it is known which of the radii that are reported are certified, ``n`` at most, at the same alpha."""

    kind: Literal["sequential"] = "sequential"
    looks: Annotated[int, Field(gt=0, description="how often the votes are looked at, at most")] = 50
    early_share: Annotated[
        float,
        Field(ge=0.0, lt=1.0, description="share of alpha spent before the last look; 0 certifies what `fixed` certifies"),
    ] = 0.2
    futility: Annotated[
        float, Field(ge=0.0, lt=0.5, description="give a radius up when so few votes are less likely; 0: when all is lost")
    ] = 0.003

    @property
    def last_share(self) -> float:
        """The share of alpha that the last look at the samples is sure to have."""
        return 1.0 - self.early_share


def _read_linf(value: Any) -> Any:
    return parse_threat(f"linf:{value}") if isinstance(value, str | int | float) else value


LinfField = Annotated[Threat, BeforeValidator(_read_linf), PlainSerializer(lambda threat: str(threat.epsilon))]


class CertifyConfig(Config):
    """Randomized smoothing (Cohen et al. 2019); sigma is that of the smoothing training."""

    num_images: Annotated[int, Field(gt=0, description="the first n images of the test split")] = 200
    n0: Annotated[int, Field(gt=0, description="samples that choose the class")] = 100
    n: Annotated[int, Field(gt=0, description="samples that bound its probability, at most where the method is sequential")] = (
        10_000
    )
    alpha: Annotated[OpenShare, Field(description="probability of a false certificate, per image")] = 0.001
    radii: Annotated[tuple[float, ...], Field(description="L2 radii to report")] = (0.0, 0.25, 0.5, 0.75)
    linf: Annotated[tuple[LinfField, ...], Field(description="L∞ thresholds to report, e.g. 2/255")] = ()
    method: Annotated[FixedMethod | SequentialMethod, Field(discriminator="kind")] = FixedMethod()
    precision: Precision = "float32"
    batch_size: Annotated[int, Field(gt=0, description="noisy samples classified at once")] = 512

    @field_validator("radii")
    @classmethod
    def _ascending(cls, radii: tuple[float, ...]) -> tuple[float, ...]:
        if not radii or list(radii) != sorted(set(radii)) or radii[0] < 0:
            raise ValueError(f"expected ascending radii of at least 0, got {radii}")
        return radii

    @field_validator("linf")
    @classmethod
    def _ascending_thresholds(cls, linf: tuple[Threat, ...]) -> tuple[Threat, ...]:
        epsilons = [threat.epsilon for threat in linf]
        if epsilons != sorted(set(epsilons)) or any(threat.norm != "linf" for threat in linf):
            raise ValueError(f"expected ascending L∞ thresholds such as 2/255, got {', '.join(map(str, linf))}")
        return linf

    def linf_radii(self, num_values: int) -> dict[str, float]:
        """For each L∞ threshold the L2 radius that implies it, for images of ``num_values`` values."""
        return {str(threat.epsilon): threat.enclosing_l2_radius(num_values) for threat in self.linf}

    def grid(self, num_values: int) -> tuple[float, ...]:
        """All L2 radii that are reported, ascending."""
        return tuple(sorted({*self.radii, *self.linf_radii(num_values).values()}))

    def require_reachable(self, sigma: float, num_values: int | None) -> None:
        """Raise ``ValueError`` when not even ``n`` samples that all agree would certify what is asked for.

        L∞ thresholds are left for later where ``num_values``, the number of values of an image, is not known yet.
        """
        share = self.method.last_share
        alpha = f"alpha {self.alpha}" + (f" ({100 * share:g} % of it for the last look)" if share < 1.0 else "")
        cap = largest_radius(sigma, self.n, share * self.alpha)
        if cap == 0.0:
            raise ValueError(
                f"certify.n is {self.n}: with {alpha} so few samples certify nothing, even if all agree; expected at least "
                f"{math.floor(math.log(share * self.alpha) / math.log(0.5)) + 1}"
            )
        bounds = f"with sigma {sigma}, n {self.n} and {alpha} no radius above {cap:.3f} can be certified"
        if self.radii[-1] > cap:
            raise ValueError(
                f"certify.radii asks for {self.radii[-1]}, but {bounds}; "
                "ask for smaller radii or raise certify.n or smooth.objective.sigma"
            )
        for threshold, radius in self.linf_radii(num_values).items() if num_values else ():
            if radius > cap:
                raise ValueError(
                    f"certify.linf asks for {threshold}, which on images of {num_values} values needs an L2 radius of "
                    f"{radius:.3f}, but {bounds}; ask for smaller thresholds or raise certify.n or smooth.objective.sigma"
                )


class SmoothAttackConfig(Config):
    """An attack on a smoothed classifier (PGD on its average prediction, Salman et al. 2019), and how its success is judged."""

    num_images: Annotated[int, Field(gt=0, description="the first n images of the test split")] = 200
    steps: Annotated[int, Field(gt=0, description="gradient steps")] = 20
    relative_step: Annotated[float, Field(gt=0.0, le=2.0, description="their size as a share of epsilon")] = 0.125
    num_noise: Annotated[int, Field(gt=0, description="noisy copies whose average prediction is attacked")] = 16
    n: Annotated[int, Field(gt=0, description="samples that judge the attacked image")] = 1000
    alpha: Annotated[OpenShare, Field(description="probability of a wrong judgement, per image")] = 0.001
    precision: Precision = "float32"
    batch_size: Annotated[int, Field(gt=0, description="noisy samples classified at once")] = 512


def largest_radius(sigma: float, n: int, alpha: float) -> float:
    """The radius certified when all ``n`` samples agree: sigma · Φ⁻¹(alpha^(1/n)) (Cohen et al. 2019)."""
    return sigma * max(0.0, NormalDist().inv_cdf(alpha ** (1.0 / n)))
