"""What training minimises."""

from typing import Annotated, Literal

from pydantic import Field

from proxyrob.config.base import Config, Count, Positive, ThreatField
from proxyrob.device import BatchNormMode
from proxyrob.threat import parse_threat

AttackStart = Literal["uniform", "gaussian"]

RelativeStep = Annotated[float, Field(gt=0.0, le=2.0, description="attack step size as a share of epsilon")]
LabelSmoothing = Annotated[
    float, Field(ge=0.0, lt=1.0, description="share of the target that is spread evenly over all classes")
]
Sigma = Annotated[float, Field(gt=0.0, le=2.0, description="noise in pixel units of [0,1]")]


class AwpConfig(Config):
    """Adversarial weight perturbation (Wu et al. 2020): the gradient is taken where the weights are worst nearby."""

    gamma: Annotated[
        float,
        Field(
            gt=0.0,
            lt=1.0,
            description="length of a weight tensor's perturbation as a share of the tensor's; the authors take 0.01 with "
            "pgd and 0.005 with trades",
        ),
    ] = 0.005
    warmup: Annotated[float, Field(ge=0.0, lt=1.0, description="share of the steps before it begins")] = 0.0


Awp = Annotated[AwpConfig | None, Field(description="perturb the weights too (Wu et al. 2020)")]


class NaturalObjective(Config):
    """Cross-entropy on unperturbed images."""

    kind: Literal["natural"] = "natural"
    label_smoothing: LabelSmoothing = 0.0
    awp: Awp = None


class PgdObjective(Config):
    """Cross-entropy on images perturbed by projected gradient descent (Madry et al. 2018)."""

    kind: Literal["pgd"] = "pgd"
    attack_steps: Count = 10
    relative_step: RelativeStep = 0.25
    attack_start: Annotated[
        AttackStart, Field(description="uniform in the ball, or the image with noise of standard deviation 0.001")
    ] = "uniform"
    attack_batchnorm: Annotated[
        BatchNormMode,
        Field(
            description="statistics that the attack reads. eval, the default: the attack on an image is the one that the "
            "released model meets and does not depend on the rest of the batch, which Pang et al. 2021 found to raise clean "
            "accuracy at equal robustness. train: the batch's, as in Rice et al. 2020; the running ones do not move"
        ),
    ] = "eval"
    label_smoothing: LabelSmoothing = 0.0
    awp: Awp = None


class TradesObjective(Config):
    """Cross-entropy plus beta times the divergence to perturbed images (Zhang et al. 2019)."""

    kind: Literal["trades"] = "trades"
    beta: Positive = 6.0
    attack_steps: Count = 10
    relative_step: RelativeStep = 0.25
    attack_start: Annotated[
        AttackStart,
        Field(
            description="the image with noise of standard deviation 0.001, as in Zhang et al. 2019, or uniform in the ball, "
            "as in Gowal et al. 2020 and Wang et al. 2023"
        ),
    ] = "gaussian"
    attack_batchnorm: Annotated[
        BatchNormMode,
        Field(
            description="statistics that the attack reads. eval, the default: as in Zhang et al. 2019, since those of the "
            "batch would make its images change each other's attack. train: the batch's, as in Gowal et al. 2020 and Wang et "
            "al. 2023; the running ones do not move"
        ),
    ] = "eval"
    label_smoothing: LabelSmoothing = 0.0
    awp: Awp = None


class MartObjective(Config):
    """Boosted cross-entropy on perturbed images plus a divergence that counts misclassified ones more (Wang et al. 2020)."""

    kind: Literal["mart"] = "mart"
    beta: Positive = 6.0
    attack_steps: Count = 10
    relative_step: RelativeStep = 0.25
    attack_start: Annotated[
        AttackStart,
        Field(description="the image with noise of standard deviation 0.001, as the authors', or uniform in the ball"),
    ] = "gaussian"
    attack_batchnorm: Annotated[
        BatchNormMode,
        Field(
            description="statistics that the attack reads. eval, the default: as the authors', so that an image counts as "
            "misclassified by what the model makes of it alone. train: the batch's; the running ones do not move"
        ),
    ] = "eval"
    awp: Awp = None


class StabilityObjective(Config):
    """Cross-entropy plus beta times the divergence under Gaussian noise, for smoothing (Li et al. 2019)."""

    kind: Literal["stability"] = "stability"
    beta: Positive = 6.0
    sigma: Sigma = 0.25
    label_smoothing: LabelSmoothing = 0.0
    awp: Awp = None


class GaussianObjective(Config):
    """Cross-entropy under Gaussian noise, for smoothing (Cohen et al. 2019)."""

    kind: Literal["gaussian"] = "gaussian"
    sigma: Sigma = 0.25
    label_smoothing: LabelSmoothing = 0.0
    awp: Awp = None


class SmoothAdvObjective(Config):
    """Cross-entropy under Gaussian noise around images on which the smoothed classifier is attacked (Salman et al. 2019)."""

    kind: Literal["smoothadv"] = "smoothadv"
    sigma: Sigma = 0.25
    threat: Annotated[ThreatField, Field(description="what the attack may change, the noise apart")] = parse_threat("l2:1/4")
    num_noise: Annotated[int, Field(gt=0, description="noise samples of each image, in the attack and in the loss")] = 2
    attack_steps: Count = 10
    relative_step: RelativeStep = 0.2
    attack_batchnorm: Annotated[
        BatchNormMode,
        Field(
            description="statistics that the attack reads. eval, the default: as the authors', since the classifier that is "
            "smoothed and certified is in eval mode. train: the batch's; the running ones do not move"
        ),
    ] = "eval"
    label_smoothing: LabelSmoothing = 0.0
    awp: Awp = None
