"""The whole tree: one configuration for the path from real images to a registered model."""

from typing import Annotated

from pydantic import Field, model_validator

from proxyrob.config.base import Config, ThreatField
from proxyrob.config.certify import CertifyConfig
from proxyrob.config.evaluate import EvaluateConfig, GateConfig
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
            of_batch = getattr(part.objective, "attack_batchnorm", "eval") == "train"
            setting = "objective.attack_batchnorm 'train'" if of_batch else "sync_batchnorm"
            if (of_batch or part.sync_batchnorm) and isinstance(self.model, CnnModel):
                raise ValueError(
                    f"{name}.{setting} has no effect on a cnn, which has no batch normalisation; "
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
        self.certify.require_reachable(self.smooth.objective.sigma, self.source.known_values)
        return self
