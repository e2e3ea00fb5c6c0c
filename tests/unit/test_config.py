"""Configurations: consistent, frozen, and identified by a digest."""

import json
from collections.abc import Iterator
from typing import ClassVar

import pytest
from pydantic import ValidationError

from proxyrob.config import (
    CertifyConfig,
    CnnModel,
    DigitsSource,
    JitterProxy,
    LabelConfig,
    LabelerConfig,
    MixtureProxy,
    NaturalObjective,
    PgdObjective,
    PipelineConfig,
    PublishedProxy,
    ResnetModel,
    RobustTrainConfig,
    SmoothTrainConfig,
    SubsetConfig,
    TradesObjective,
    WeightedProxy,
    flatten,
    load_config,
    weighted_parts,
)
from proxyrob.config.base import Config, digest_of
from tests.toys import REAL_ONLY

# Rules between fields


@pytest.mark.parametrize(("gamma", "part"), [(0, "real"), (1, "synthetic")])
@pytest.mark.parametrize("section", ["train", "smooth"])
def test_a_part_of_the_batch_without_weight_is_refused(section: str, gamma: int, part: str) -> None:
    """Gamma 0 or 1 with synthetic images in the batch computes losses for nothing: refused, naming the idle part."""
    with pytest.raises(ValueError, match=rf"^{section}: gamma {gamma} gives the {part} part of each batch no weight"):
        load_config("digits", [f"{section}.gamma={gamma}"])


def test_gamma_without_synthetic_images_is_refused() -> None:
    """A gamma that would have no effect is not silently ignored."""
    with pytest.raises(ValidationError, match=r"gamma 0\.5 has no effect with synthetic_fraction 0; set gamma to 1"):
        RobustTrainConfig(synthetic_fraction=0.0)


@pytest.mark.parametrize(("batch_size", "fraction", "count"), [(2, 0.2, 0), (2, 0.9, 2)])
def test_a_batch_with_an_empty_part_is_refused(batch_size: int, fraction: float, count: int) -> None:
    """A share that rounds to no synthetic image, or to no real one, is refused with the count."""
    with pytest.raises(ValidationError, match=f"has {count} synthetic images"):
        RobustTrainConfig(batch_size=batch_size, synthetic_fraction=fraction)


@pytest.mark.parametrize("section", ["train", "smooth"])
def test_a_share_of_synthetic_images_needs_a_proxy(section: str) -> None:
    """Synthetic images asked for with no proxy to sample them from are refused, with both ways out."""
    kept = [change for change in REAL_ONLY if not change.startswith(section)]
    with pytest.raises(ValueError, match=rf"{section}\.synthetic_fraction is 0\.5 but there is no proxy.*{section}\.gamma=1"):
        load_config("digits", kept)


def test_a_proxy_that_nobody_uses_is_refused() -> None:
    """A proxy that would be fitted and sampled in vain is refused."""
    with pytest.raises(ValueError, match=r"train\.synthetic_fraction is 0, so the proxy would be sampled in vain"):
        load_config("digits", REAL_ONLY[1:3])


def test_more_certificates_than_test_images_are_refused() -> None:
    """The first 61 of 60 test images cannot be certified; the first 60 can."""
    changes = ["source.num_test=60", "certify.num_images=60"]
    assert load_config("digits", changes).certify.num_images == 60
    with pytest.raises(ValueError, match=r"certify\.num_images is 61, more than the 60 images"):
        load_config("digits", [*changes, "certify.num_images=61"])


def test_a_batchnorm_mode_without_batchnorm_is_refused() -> None:
    """The statistics that an attack reads cannot be chosen for a network that has none."""
    with pytest.raises(ValueError, match="has no effect on a cnn"):
        load_config("digits", ["train.objective.attack_batchnorm=train"])
    assert load_config("digits", ["train.objective.attack_batchnorm=train", "model.kind=resnet"])


def test_two_labelers_of_one_architecture_are_refused() -> None:
    """Labelers check each other only if they differ."""
    labeler = LabelerConfig(model=CnnModel(), steps=3)
    with pytest.raises(ValidationError, match="two labelers of different architecture"):
        LabelConfig(first=labeler, second=LabelerConfig(model=CnnModel(), steps=9))
    assert LabelConfig(first=labeler, second=LabelerConfig(model=CnnModel(widths=(4,)))).first == labeler


def test_real_only_training_differs_in_nothing_but_the_mix() -> None:
    """The control trains with the same steps, batch size and objective, without synthetic images."""
    train = RobustTrainConfig(steps=7, batch_size=10, objective=TradesObjective())
    expected = {**train.dump(), "synthetic_fraction": 0.0, "gamma": 1.0}
    assert train.real_only().dump() == expected
    assert train.replace(subset=SubsetConfig(per_class=3)).real_only() == train.real_only()
    assert (train.num_synthetic, train.real_only().num_synthetic) == (5, 0)


def test_a_subset_of_no_images_is_refused() -> None:
    """A choice of synthetic images where there are none would have no effect: refused."""
    with pytest.raises(ValidationError, match="subset chooses synthetic images and has no effect with synthetic_fraction 0"):
        RobustTrainConfig(synthetic_fraction=0.0, gamma=1.0, subset=SubsetConfig(per_class=3))


def test_a_share_of_the_best_needs_a_score() -> None:
    """A share without anything to rank by, and a ranking that chooses nothing, are refused with what to set."""
    with pytest.raises(ValidationError, match=r"top_share 0\.5 needs a score to rank images by; set score to a column"):
        SubsetConfig(top_share=0.5)
    with pytest.raises(ValidationError, match=r"score 'realism' has no effect without top_share or per_class"):
        SubsetConfig(score="realism")
    assert not SubsetConfig(score="realism", top_share=0.5).is_all
    assert not SubsetConfig(score="realism", per_class=2).is_all
    assert not SubsetConfig(per_class=2).is_all
    assert SubsetConfig().is_all


def test_a_mixture_is_of_several_proxies_with_positive_weights() -> None:
    """One proxy is no mixture, a mixture is no part of another, and a part that weighs nothing would be made in vain."""
    jitter = WeightedProxy(proxy=JitterProxy())
    with pytest.raises(ValidationError, match="at least 2 items"):
        MixtureProxy(parts=(jitter,))
    with pytest.raises(ValidationError, match="greater than 0"):
        jitter.replace(weight=0.0)
    with pytest.raises(ValidationError, match="'mixture' found using 'kind' does not match"):
        jitter.replace(proxy=MixtureProxy(parts=(jitter, jitter)))


def test_the_parts_of_a_proxy() -> None:
    """No proxy has no part, a single one is its own part of weight 1, a mixture has those it names."""
    parts = (WeightedProxy(weight=2.0, proxy=JitterProxy()), WeightedProxy(proxy=PublishedProxy(name="others")))
    assert weighted_parts(None) == ()
    assert weighted_parts(JitterProxy()) == (WeightedProxy(weight=1.0, proxy=JitterProxy()),)
    assert weighted_parts(MixtureProxy(parts=parts)) == parts


@pytest.mark.parametrize("values", [{"name": "../up"}, {"name": "Upper"}, {"name": "a", "sha256": "abc"}, {"name": ""}])
def test_a_published_set_has_a_plain_name(values: dict[str, str]) -> None:
    """The name becomes part of an address: lower case, digits and dashes; a hash is a whole sha256."""
    with pytest.raises(ValidationError):
        PublishedProxy.model_validate(values)


# Frozen, and replaced


def test_a_configuration_is_frozen() -> None:
    """Nobody changes a configuration after it was validated."""
    with pytest.raises(ValidationError, match="frozen"):
        DigitsSource().num_train = 5  # pyright: ignore[reportAttributeAccessIssue]  # that it fails is the point


def test_replace_changes_a_copy() -> None:
    """``replace`` leaves the original as it was and keeps the other fields and the type."""
    original = SmoothTrainConfig(steps=9)
    changed = original.replace(gamma=0.25)
    assert type(changed) is SmoothTrainConfig
    assert (original.gamma, changed.gamma, changed.steps) == (0.5, 0.25, 9)


@pytest.mark.parametrize("changes", [{"gamma": 1.5}, {"gama": 0.5}, {"gamma": 1.0}, {"steps": "many"}])
def test_replace_validates_again(changes: dict[str, object]) -> None:
    """A copy is checked as a whole: ranges, unknown keys and the rules between fields."""
    with pytest.raises(ValidationError):
        RobustTrainConfig().replace(**changes)


# Digests


def test_equal_configurations_have_equal_digests() -> None:
    """However it was written, the same configuration has the same digest, in this process and in the next."""
    config = load_config("digits")
    assert load_config("digits", ["train.gamma=0.50", "threat=linf:3/20"]).digest() == config.digest()
    assert PipelineConfig.model_validate(json.loads(config.model_dump_json())).digest() == config.digest()


def test_the_digest_is_the_sha256_of_canonical_json() -> None:
    """Keys in another order are the same content; the digest is fixed, because folders of old results are named by it."""
    assert digest_of({"b": 1, "a": [1, 2.5]}) == digest_of({"a": [1, 2.5], "b": 1})
    assert digest_of({"a": 1}) == "015abd7f5cc57a2dd94b7590f04ad8084273905ee33ec5cebeae62276a97f862"


SUBSET = ("subset.score=realism", "subset.top_share=0.5", "subset.per_class=3")
BASES = {
    "digits": (),
    "digits-jitter": (
        "model.kind=resnet",
        "train.objective.kind=trades",
        "train.objective.awp.gamma=0.01",
        "train.optimizer.kind=sgd",
        "train.schedule.kind=one-cycle",
        "train.schedule.cycles_momentum=false",
        "smooth.objective.kind=smoothadv",
        "smooth.schedule.kind=piecewise",
        "smooth.max_gradient_norm=1.0",
        *(f"{section}.{change}" for section in ("train", "smooth") for change in (*SUBSET, "validate_every=5")),
    ),
}
OTHER_TEXT = {
    "name": "other",
    "threat": "linf:0.1",
    "score": "beauty",
    "decayed": "no-normalisation",
    "attack_batchnorm": "train",
    "max_gradient_norm": "1.0",
    "validate_every": "10",
    "awp": "{gamma: 0.01}",
    "precision": "bfloat16",
    "target": "0.5",
}
OTHER_KIND = {
    "uniform": "gaussian",
    "gaussian": "uniform",
    "diffusion": "jitter",
    "jitter": "diffusion",
    "cnn": "resnet",
    "resnet": "cnn",
    "pgd": "natural",
    "trades": "natural",
    "stability": "gaussian",
    "smoothadv": "gaussian",
    "adamw": "sgd",
    "sgd": "adamw",
    "cosine": "one-cycle",
    "one-cycle": "piecewise",
    "piecewise": "cosine",
    "digits": "cifar10",
    "last": "validation",
    "fixed": "sequential",
    "fast": "plain",
    "standard": "gate",
}
FIELDS = [
    pytest.param(name, key, value, id=f"{name}:{key}")
    for name, changes in BASES.items()
    for key, value in flatten(load_config(name, changes)).items()
    # of a subset of all images nothing can be changed alone, weights are selected only where something is measured, a
    # network without batch normalisation has no mode of it, and how much is held in memory at once is no part of a result
    if not (name == "digits" and (".subset." in key or key.endswith((".selection", "_batchnorm")))) and "micro_batch" not in key
]


def _other_value(key: str, value: object) -> list[str]:
    match value:
        case str() if key.startswith("label."):
            return [f"{key}={OTHER_KIND[value]}", f"{key.removesuffix('kind')}widths=[4]"]  # so that the labelers still differ
        case str() | None:
            other = OTHER_TEXT.get(key.rpartition(".")[2]) or OTHER_KIND[str(value)]
            return [f"{key}={other}", *(["evaluate.mode=gate"] if key == "evaluate.target" else [])]
        case bool():
            return [f"{key}={json.dumps(not value)}"]
        case int():
            return [f"{key}={value + 1}"]
        case float():
            return [f"{key}={value + 0.01 if value < 0.9 else value - 0.01}"]
        case list():
            return [f"{key}={json.dumps(value[:-1] or ['2/255'])}"]
        case _:
            raise TypeError(f"expected a plain value of {key}, got {value!r}")


@pytest.mark.parametrize(("name", "key", "value"), FIELDS)
def test_the_digest_changes_with_every_field(name: str, key: str, value: object) -> None:
    """No field is left out of the digest: a result found under another value is never taken for this one."""
    base = load_config(name, BASES[name])
    changed = load_config(name, [*BASES[name], *_other_value(key, value)])
    assert flatten(changed).get(key, "a part with keys of its own") != value
    assert changed.digest() != base.digest()


def test_the_digest_changes_with_the_revision() -> None:
    """When the same configuration comes to mean another result, its revision is raised and so is the digest changed."""

    class Revised(DigitsSource):
        REVISION: ClassVar[int] = 2

    assert Revised().dump() == DigitsSource().dump()
    assert Revised().digest() != DigitsSource().digest()


def test_the_digest_changes_with_the_revision_of_a_part(monkeypatch: pytest.MonkeyPatch) -> None:
    """Raising the revision of PGD training changes the digest of every training that uses it, and of no other."""
    with_pgd, natural = RobustTrainConfig(), RobustTrainConfig(objective=NaturalObjective())
    before = with_pgd.digest(), natural.digest()
    monkeypatch.setattr(PgdObjective, "REVISION", 2)
    assert natural.digest() == before[1]
    assert with_pgd.digest() != before[0]


def test_the_digest_changes_with_the_revision_of_a_part_of_a_mixture(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts in a tuple count like any others."""
    mixture = MixtureProxy(parts=(WeightedProxy(proxy=JitterProxy()), WeightedProxy(proxy=PublishedProxy(name="others"))))
    before = mixture.digest()
    monkeypatch.setattr(PublishedProxy, "REVISION", 2)
    assert mixture.digest() != before


def test_how_much_is_held_in_memory_is_no_part_of_the_identity() -> None:
    """A training that ran out of memory goes on in smaller parts."""
    assert RobustTrainConfig(micro_batch=16).digest() == RobustTrainConfig().digest()


def test_where_something_lies_is_no_part_of_its_identity() -> None:
    """A published set under another name is the same set, alone and in a mixture; another set under its name is not."""
    sets = [PublishedProxy(name=name, sha256=digit * 64) for name, digit in (("one", "1"), ("other", "1"), ("one", "2"))]
    jitter = WeightedProxy(proxy=JitterProxy())
    for digests in (
        [proxy.digest() for proxy in sets],
        [MixtureProxy(parts=(WeightedProxy(proxy=proxy), jitter)).digest() for proxy in sets],
    ):
        assert digests[0] == digests[1] != digests[2]


def _parts(config: Config) -> Iterator[type[Config]]:
    """The types of a configuration and of everything below it."""
    yield type(config)
    for name in type(config).model_fields:
        if isinstance(below := getattr(config, name), Config):
            yield from _parts(below)


@pytest.mark.parametrize("part", list(dict.fromkeys(_parts(load_config("digits")))))
def test_the_digest_of_the_whole_changes_with_the_revision_of_any_part(
    part: type[Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    """However deep in the tree a part lies, raising its revision gives the pipeline another digest."""
    before = load_config("digits").digest()
    monkeypatch.setattr(part, "REVISION", part.REVISION + 1)
    assert load_config("digits").digest() != before


@pytest.mark.parametrize("config", [CertifyConfig(), ResnetModel(), load_config("digits")])
def test_a_dump_is_json_and_reads_back(config: CertifyConfig | ResnetModel | PipelineConfig) -> None:
    """What is stored for people to read is the whole configuration."""
    assert type(config).model_validate(json.loads(json.dumps(config.dump()))) == config
