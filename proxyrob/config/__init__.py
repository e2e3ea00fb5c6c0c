"""Frozen configurations, one file per stage; ``pipeline`` is the tree and ``load`` reads it."""

from proxyrob.config.evaluate import CertifyConfig, EvaluateConfig, GateConfig
from proxyrob.config.label import LabelConfig, LabelerConfig
from proxyrob.config.load import flatten, load_config, preset_names, preset_text
from proxyrob.config.models import CnnModel, ModelConfig, ResnetModel
from proxyrob.config.objective import (
    AwpConfig,
    GaussianObjective,
    MartObjective,
    NaturalObjective,
    PgdObjective,
    SmoothAdvObjective,
    StabilityObjective,
    TradesObjective,
)
from proxyrob.config.optimizer import (
    AdamWOptimizer,
    CosineSchedule,
    OneCycleSchedule,
    OptimizerConfig,
    PiecewiseSchedule,
    ScheduleConfig,
    SgdOptimizer,
)
from proxyrob.config.pipeline import PipelineConfig
from proxyrob.config.proxy import (
    DiffusionProxy,
    JitterProxy,
    MixtureProxy,
    ProxyConfig,
    PublishedProxy,
    SamplingConfig,
    WeightedProxy,
    weighted_parts,
)
from proxyrob.config.source import (
    Cifar2Source,
    Cifar10Source,
    Cifar100Source,
    DigitsSource,
    FolderSource,
    NpzSource,
    ParquetSource,
    SourceConfig,
)
from proxyrob.config.subset import SubsetConfig
from proxyrob.config.train import RobustObjective, RobustTrainConfig, SmoothObjective, SmoothTrainConfig, TrainConfig

__all__ = [
    "AdamWOptimizer",
    "AwpConfig",
    "CertifyConfig",
    "Cifar2Source",
    "Cifar10Source",
    "Cifar100Source",
    "CnnModel",
    "CosineSchedule",
    "DiffusionProxy",
    "DigitsSource",
    "EvaluateConfig",
    "FolderSource",
    "GateConfig",
    "GaussianObjective",
    "JitterProxy",
    "LabelConfig",
    "LabelerConfig",
    "MartObjective",
    "MixtureProxy",
    "ModelConfig",
    "NaturalObjective",
    "NpzSource",
    "OneCycleSchedule",
    "OptimizerConfig",
    "ParquetSource",
    "PgdObjective",
    "PiecewiseSchedule",
    "PipelineConfig",
    "ProxyConfig",
    "PublishedProxy",
    "ResnetModel",
    "RobustObjective",
    "RobustTrainConfig",
    "SamplingConfig",
    "ScheduleConfig",
    "SgdOptimizer",
    "SmoothAdvObjective",
    "SmoothObjective",
    "SmoothTrainConfig",
    "SourceConfig",
    "StabilityObjective",
    "SubsetConfig",
    "TradesObjective",
    "TrainConfig",
    "WeightedProxy",
    "flatten",
    "load_config",
    "preset_names",
    "preset_text",
    "weighted_parts",
]
