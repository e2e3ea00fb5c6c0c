"""Frozen configurations, one file per stage; ``pipeline`` is the tree and ``load`` reads it."""

from proxyrob.config.evaluate import CertifyConfig, EvaluateConfig, GateConfig
from proxyrob.config.label import LabelConfig, LabelerConfig
from proxyrob.config.load import flatten, load_config, preset_names, preset_text
from proxyrob.config.models import CnnModel, ModelConfig, ResnetModel
from proxyrob.config.pipeline import PipelineConfig
from proxyrob.config.proxy import DiffusionProxy, JitterProxy, ProxyConfig, SamplingConfig
from proxyrob.config.source import DigitsSource
from proxyrob.config.train import (
    NaturalObjective,
    PgdObjective,
    RobustTrainConfig,
    SmoothTrainConfig,
    StabilityObjective,
    TradesObjective,
    TrainConfig,
)

__all__ = [
    "CertifyConfig",
    "CnnModel",
    "DiffusionProxy",
    "DigitsSource",
    "EvaluateConfig",
    "GateConfig",
    "JitterProxy",
    "LabelConfig",
    "LabelerConfig",
    "ModelConfig",
    "NaturalObjective",
    "PgdObjective",
    "PipelineConfig",
    "ProxyConfig",
    "ResnetModel",
    "RobustTrainConfig",
    "SamplingConfig",
    "SmoothTrainConfig",
    "StabilityObjective",
    "TradesObjective",
    "TrainConfig",
    "flatten",
    "load_config",
    "preset_names",
    "preset_text",
]
