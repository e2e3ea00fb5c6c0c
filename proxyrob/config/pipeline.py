"""The whole tree: one configuration for the path from real images to a registered model."""

import math
from statistics import NormalDist
from typing import Annotated

from pydantic import Field, model_validator

from proxyrob.config.base import Config, ThreatField
from proxyrob.config.evaluate import CertifyConfig, EvaluateConfig, GateConfig
from proxyrob.config.label import LabelConfig
from proxyrob.config.models import CnnModel, ModelConfig
from proxyrob.config.proxy import ProxyConfig, SamplingConfig
from proxyrob.config.source import SourceConfig
from proxyrob.config.train import RobustTrainConfig, SmoothTrainConfig


class PipelineConfig(Config):
    """Everything that decides the results, and nothing that does not: no folders, servers or devices."""

    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9-]*$", description="preset and MLflow experiment")]
    seed: Annotated[int, Field(ge=0, description="root of every random stream")] = 0
    threat: ThreatField
    source: SourceConfig
    proxy: ProxyConfig | None = None
    sampling: SamplingConfig = SamplingConfig()
    label: LabelConfig = LabelConfig()
    model: ModelConfig = CnnModel()
    train: RobustTrainConfig = RobustTrainConfig()
    smooth: SmoothTrainConfig = SmoothTrainConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    certify: CertifyConfig = CertifyConfig()
    gate: GateConfig = GateConfig()

    @model_validator(mode="after")
    def _batchnorm_is_there(self) -> "PipelineConfig":
        for name, part in (("train", self.train), ("smooth", self.smooth)):
            if getattr(part.objective, "attack_batchnorm", "eval") == "train" and isinstance(self.model, CnnModel):
                raise ValueError(
                    f"{name}.objective.attack_batchnorm 'train' has no effect on a cnn, which has no batch normalisation; "
                    "leave it out or choose another model.kind"
                )
        return self

    @model_validator(mode="after")
    def _consistent(self) -> "PipelineConfig":
        for name, part in (("train", self.train), ("smooth", self.smooth)):
            if self.proxy is None and part.synthetic_fraction > 0:
                raise ValueError(
                    f"{name}.synthetic_fraction is {part.synthetic_fraction} but there is no proxy to sample from; "
                    f"choose one (proxy.kind=diffusion or jitter) or set {name}.synthetic_fraction=0 and {name}.gamma=1"
                )
            if self.proxy is not None and part.synthetic_fraction == 0:
                raise ValueError(f"{name}.synthetic_fraction is 0, so the proxy would be sampled in vain; set proxy=null")
        num_test = self.source.known_test
        if num_test is not None and self.certify.num_images > num_test:
            raise ValueError(
                f"certify.num_images is {self.certify.num_images}, more than the {num_test} images of the test split"
            )
        cap = largest_radius(self.smooth.objective.sigma, self.certify.n, self.certify.alpha)
        if cap == 0.0:
            raise ValueError(
                f"certify.n is {self.certify.n}: with alpha {self.certify.alpha} so few samples certify nothing, even if all "
                f"agree; expected at least {math.floor(math.log(self.certify.alpha) / math.log(0.5)) + 1}"
            )
        if self.certify.radii[-1] > cap:
            raise ValueError(
                f"certify.radii asks for {self.certify.radii[-1]}, but with sigma {self.smooth.objective.sigma}, "
                f"n {self.certify.n} and alpha {self.certify.alpha} no radius above {cap:.3f} can be certified; "
                "ask for smaller radii or raise certify.n or smooth.objective.sigma"
            )
        return self


def largest_radius(sigma: float, n: int, alpha: float) -> float:
    """The radius certified when all ``n`` samples agree: sigma · Φ⁻¹(alpha^(1/n)) (Cohen et al. 2019)."""
    return sigma * max(0.0, NormalDist().inv_cdf(alpha ** (1.0 / n)))
