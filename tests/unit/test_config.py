"""Configurations: strict, frozen, identified by a digest, and read with errors that name the key."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import pytest
from pydantic import ValidationError

from proxyrob.certify import certified_radius, lower_bound
from proxyrob.config import (
    CertifyConfig,
    CnnModel,
    DiffusionProxy,
    DigitsSource,
    JitterProxy,
    LabelConfig,
    LabelerConfig,
    NaturalObjective,
    PgdObjective,
    PipelineConfig,
    ResnetModel,
    RobustTrainConfig,
    SmoothTrainConfig,
    TradesObjective,
    flatten,
    load_config,
    preset_names,
    preset_text,
)
from proxyrob.config.base import Config, digest_of
from proxyrob.config.pipeline import largest_radius
from proxyrob.threat import parse_threat
from tests.toys import join

REAL_ONLY = ("proxy=null", "train.synthetic_fraction=0", "train.gamma=1", "smooth.synthetic_fraction=0", "smooth.gamma=1")


# Presets


def test_every_preset_loads_and_is_named_after_its_file() -> None:
    """A preset that ships is valid, and its name (the MLflow experiment) is that of its file."""
    assert {name: load_config(name).name for name in preset_names()} == {name: name for name in preset_names()}
    assert {"digits", "digits-l2", "digits-trades", "digits-jitter"} <= set(preset_names())


def test_presets_are_different_configurations() -> None:
    """No two presets share a digest."""
    assert len({load_config(name).digest() for name in preset_names()}) == len(preset_names())


def test_presets_change_what_they_say() -> None:
    """Each preset differs from «digits» in the choice it is named after, and shares the rest of it."""
    base = load_config("digits")
    assert load_config("digits-l2").threat == parse_threat("l2:0.6")
    assert load_config("digits-trades").train == base.train.replace(objective=TradesObjective())
    jitter = load_config("digits-jitter")
    assert isinstance(base.proxy, DiffusionProxy)
    assert jitter == base.replace(name="digits-jitter", proxy=JitterProxy(num_images=base.proxy.num_images))


def test_an_unknown_preset_is_refused_with_the_nearest_name() -> None:
    """A typing mistake in a preset's name is answered with the name that was meant and with all names."""
    with pytest.raises(ValueError, match=r"there is no preset 'digit-l2'; did you mean 'digits-l2'\?; presets: digits, "):
        preset_text("digit-l2")


# Keys and values


def test_a_change_is_applied_and_nothing_else_moves() -> None:
    """``key.path=value`` changes that value alone."""
    changed = flatten(load_config("digits", ["train.gamma=0.4"]))
    assert changed == {**flatten(load_config("digits")), "train.gamma": 0.4}


def test_later_changes_win_and_may_need_each_other() -> None:
    """Changes are applied in order and validated once at the end, so that two that belong together can be given."""
    config = load_config("digits", ["train.steps=5", "train.steps=7", *REAL_ONLY])
    assert (config.train.steps, config.proxy, config.train.gamma) == (7, None, 1.0)


def test_flattened_keys_are_the_keys_of_changes() -> None:
    """What is logged as parameters can be given back with ``--set`` and yields the same configuration."""
    config = load_config("digits-trades")
    changes = [f"{key}={json.dumps(value)}" for key, value in flatten(config).items()]
    assert load_config("digits", changes) == config


@pytest.mark.parametrize(
    ("change", "key", "meant"),
    [
        ("train.gama=0.4", "train.gama", "gamma"),
        ("trian.gamma=0.4", "trian", "train"),
        ("proxy.sampler_step=10", "proxy.sampler_step", "sampler_steps"),
        ("train.objective.attack_step=3", "train.objective.attack_step", "attack_steps"),
        ("label.first.model.width=[8]", "label.first.model.width", "widths"),
        ("certify.radius=[0.1]", "certify.radius", "radii"),
    ],
)
def test_an_unknown_key_is_refused_with_the_nearest_one(change: str, key: str, meant: str) -> None:
    """A key that does not exist is named as it was typed, with the nearest key of the same place."""
    with pytest.raises(ValueError, match=f"^{key}: there is no such key; did you mean '{meant}'") as error:
        load_config("digits", [change])
    assert str(error.value).count("\n") == 0


def test_a_key_of_another_kind_is_refused() -> None:
    """Sigma belongs to the jitter proxy; given to the diffusion proxy it is an unknown key, not ignored."""
    with pytest.raises(ValueError, match=r"^proxy\.sigma: there is no such key"):
        load_config("digits", ["proxy.sigma=0.2"])


@pytest.mark.parametrize(
    "change",
    [
        "train.steps=abc",
        "train.steps=10.5",
        "train.steps=null",
        "train.steps=[1, 2]",
        "train.steps=0",
        "train.batch_size=1",
        "train.gamma=half",
        "train.gamma=1.5",
        "train.gamma=-0.1",
        "train.learning_rate=0",
        "train.learning_rate=.nan",
        "train.learning_rate=.inf",
        "train.ema_decay=1",
        "train.warmup=1.1",
        "train.shift=-1",
        "train.objective.relative_step=2.5",
        "train.objective.attack_steps=0",
        "seed=-1",
        "name=Upper Case",
        "threat=0.15",
        "source=digits",
        "source.kind=cifar10",
        "proxy.conditional=maybe",
        "proxy.sampler_steps=1",
        "label.threshold=1.01",
        "model.widths=[]",
        "model.widths=[8, 8, 8, 8, 8]",
        "certify.radii=0.25",
        "certify.radii=[]",
        "certify.radii=[0.5, 0.25]",
        "certify.radii=[0.25, 0.25]",
        "certify.radii=[-0.1, 0.25]",
        "certify.alpha=1",
        "gate.margin=2",
    ],
)
def test_a_mistyped_value_is_refused_with_its_key(change: str) -> None:
    """A value of another type or out of range is refused in one line that starts with the key."""
    key = change.partition("=")[0]
    with pytest.raises(ValueError, match=rf"^{key}: .") as error:
        load_config("digits", [change])
    assert str(error.value).count("\n") == 0


@pytest.mark.parametrize("key", ["train.steps", "seed", "train.learning_rate"])
def test_yes_is_no_number(key: str) -> None:
    """YAML reads «yes» as true; a number that is given as true is a mistake, not 1."""
    with pytest.raises(ValueError, match=rf"^{key}: "):
        load_config("digits", [f"{key}=yes"])


@pytest.mark.parametrize("key", ["proxy", "model", "train.objective"])
def test_an_unknown_kind_is_refused_with_the_known_ones(key: str) -> None:
    """A kind that does not exist is refused, and the message lists those that do."""
    with pytest.raises(ValueError, match=rf"^{key}: .*'gan'.*expected tags: '"):
        load_config("digits", [f"{key}.kind=gan"])


def test_a_wrong_threat_is_explained_in_its_own_words() -> None:
    """The threat model's own error, with its suggestion, comes through under its key."""
    with pytest.raises(ValueError, match=r"^threat: expected an epsilon.*did you mean 'linf:8/255'"):
        load_config("digits", ["threat=linf:8"])


@pytest.mark.parametrize("change", ["train.gamma", "=3", "", " =3"])
def test_a_change_of_another_form_is_refused_with_an_example(change: str) -> None:
    """A change without key or equals sign is answered with the form."""
    with pytest.raises(ValueError, match=r"expected key.path=value, such as train\.gamma=0\.4"):
        load_config("digits", [change])


def test_a_change_that_is_not_yaml_is_refused() -> None:
    """An unclosed bracket is named with its key."""
    with pytest.raises(ValueError, match=r"train\.gamma: '\[' is not a valid value"):
        load_config("digits", ["train.gamma=["])


def test_every_fault_is_named_at_once() -> None:
    """Three mistakes give three lines, so that nobody has to run three times."""
    with pytest.raises(ValueError, match="train") as error:
        load_config("digits", ["train.gama=0.4", "train.steps=abc", "seed=-1"])
    assert sorted(line.split(":")[0] for line in str(error.value).splitlines()) == ["seed", "train.gama", "train.steps"]


# Switching kinds


def test_switching_a_kind_drops_the_keys_of_the_other() -> None:
    """Another proxy keeps what both know (the number of images) and forgets the rest."""
    config = load_config("digits", ["proxy.num_images=77", "proxy.kind=jitter"])
    assert config.proxy == JitterProxy(num_images=77)


def test_switching_an_objective_keeps_what_both_know() -> None:
    """PGD and TRADES share the attack's settings; natural training has none."""
    changes = ["train.objective.attack_steps=3", "train.objective.kind=trades"]
    assert load_config("digits", changes).train.objective == TradesObjective(attack_steps=3)
    assert load_config("digits", [*changes, "train.objective.kind=natural"]).train.objective == NaturalObjective()


def test_naming_the_same_kind_again_changes_nothing() -> None:
    """Only *another* kind drops keys."""
    assert load_config("digits", ["proxy.width=64", "proxy.kind=diffusion"]).proxy == DiffusionProxy(width=64)


# Files


def test_a_file_extends_a_preset(tmp_path: Path) -> None:
    """A file holds only what differs; the rest comes from what it extends, and a switched kind drops foreign keys."""
    path = tmp_path / "mine.yaml"
    path.write_text(join(["extends: digits-trades", "name: mine", "seed: 3", "train: {steps: 5, objective: {kind: natural}}"]))
    base = load_config("digits-trades")
    train = base.train.replace(steps=5, objective=NaturalObjective())
    assert load_config(str(path)) == base.replace(name="mine", seed=3, train=train)


def test_files_extend_files(tmp_path: Path) -> None:
    """A chain of files is merged from its root on: the nearest wins."""
    first, second = tmp_path / "first.yaml", tmp_path / "second.yml"
    first.write_text("extends: digits\nname: first\nsmooth: {steps: 11}\nseed: 1\n")
    second.write_text(f"extends: {first}\nname: second\nseed: 2\n")
    config = load_config(str(second))
    assert (config.name, config.seed, config.smooth.steps, config.smooth.learning_rate) == ("second", 2, 11, 0.006)


def test_a_configuration_cannot_extend_itself(tmp_path: Path) -> None:
    """A circle of files is refused and shown, instead of running for ever."""
    first, second = tmp_path / "first.yaml", tmp_path / "second.yaml"
    first.write_text(f"extends: {second}\n")
    second.write_text(f"extends: {first}\n")
    with pytest.raises(ValueError, match=r"first\.yaml extends .*second\.yaml extends .*first\.yaml: .*cannot extend itself"):
        load_config(str(first))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- a\n- b\n", "expected keys and values, got list"),
        ("train: [", "is not valid YAML"),
        ("extends: digitz\n", "did you mean 'digits'"),
        ("", "^name: this key is missing\nthreat: this key is missing\nsource: this key is missing$"),
    ],
)
def test_a_wrong_file_is_refused(tmp_path: Path, text: str, message: str) -> None:
    """A file that is no mapping, no YAML, extends nothing known or says too little is refused with the reason."""
    path = tmp_path / "wrong.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        load_config(str(path))


def test_a_missing_file_is_refused_with_the_presets() -> None:
    """A path that is not there is answered with what could have been meant."""
    with pytest.raises(ValueError, match=r"there is no file nowhere\.yaml; give a preset \(digits, .*\) or the path"):
        load_config("nowhere.yaml")


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


def test_radii_beyond_the_largest_certifiable_one_are_refused() -> None:
    """A radius that no image can reach with these n and alpha is refused with the cap; the cap itself is not."""
    cap = largest_radius(0.25, 10_000, 0.001)
    assert load_config("digits", [f"certify.radii=[0, {cap}]"]).certify.radii == (0.0, cap)
    with pytest.raises(ValueError, match=rf"certify\.radii asks for .* no radius above {cap:.3f} can be certified"):
        load_config("digits", [f"certify.radii=[0, {cap + 1e-6}]"])


def test_the_largest_radius_is_that_of_unanimous_samples() -> None:
    """The cap is what the certificate of n equal votes says, and grows with n and sigma."""
    for sigma, n, alpha in ((0.25, 100, 0.001), (0.5, 10_000, 0.01)):
        radius = certified_radius(lower_bound(n, n, alpha), sigma)
        assert radius is not None
        assert largest_radius(sigma, n, alpha) == pytest.approx(radius, rel=1e-9)
    assert largest_radius(0.25, 5, 0.001) == 0.0


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
    assert (train.num_synthetic, train.real_only().num_synthetic) == (5, 0)


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


BASES = {"digits": (), "digits-jitter": ("model.kind=resnet", "train.objective.kind=trades")}
OTHER_KIND = {
    "diffusion": "jitter",
    "jitter": "diffusion",
    "cnn": "resnet",
    "resnet": "cnn",
    "pgd": "natural",
    "trades": "natural",
}
FIELDS = [
    pytest.param(name, key, value, id=f"{name}:{key}")
    for name, changes in BASES.items()
    for key, value in flatten(load_config(name, changes)).items()
    if key not in {"source.kind", "smooth.objective.kind"}  # of these there is only one kind
]


def _other_value(key: str, value: object) -> list[str]:
    match value:
        case str() if key.startswith("label."):
            return [f"{key}={OTHER_KIND[value]}", f"{key.removesuffix('kind')}widths=[4]"]  # so that the labelers still differ
        case str():
            return [f"{key}={ {'name': 'other', 'threat': 'linf:0.1'}.get(key) or OTHER_KIND[value] }"]
        case bool():
            return [f"{key}={json.dumps(not value)}"]
        case int():
            return [f"{key}={value + 1}"]
        case float():
            return [f"{key}={value + 0.01 if value < 0.9 else value - 0.01}"]
        case list():
            return [f"{key}={json.dumps(value[:-1])}"]
        case _:
            raise TypeError(f"expected a plain value of {key}, got {value!r}")


@pytest.mark.parametrize(("name", "key", "value"), FIELDS)
def test_the_digest_changes_with_every_field(name: str, key: str, value: object) -> None:
    """No field is left out of the digest: a result found under another value is never taken for this one."""
    base = load_config(name, BASES[name])
    changed = load_config(name, [*BASES[name], *_other_value(key, value)])
    assert flatten(changed)[key] != value
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
