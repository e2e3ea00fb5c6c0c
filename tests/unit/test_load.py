"""Reading configurations: presets, files that extend each other, changes of single keys, and errors that name the key."""

import json
from pathlib import Path

import pytest

from proxyrob.config import (
    AdamWOptimizer,
    AwpConfig,
    DiffusionProxy,
    JitterProxy,
    MartObjective,
    MixtureProxy,
    NaturalObjective,
    PublishedProxy,
    SgdOptimizer,
    SmoothAdvObjective,
    TradesObjective,
    WeightedProxy,
    flatten,
    load_config,
    preset_names,
    preset_text,
)
from proxyrob.threat import parse_threat
from tests.toys import REAL_ONLY, join

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
    with pytest.raises(ValueError, match=r"there is no preset 'digit-l2'; did you mean 'digits-l2'\?; presets: .*, digits, "):
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
        "train.objective.relative_step=0",
        "train.objective.relative_step=2.5",
        "train.objective.attack_batchnorm=batch",
        "train.objective.sigma=0.25",
        "train.optimizer=sgd",
        "train.max_gradient_norm=-1",
        "train.objective.attack_steps=0",
        "seed=-1",
        "name=Upper Case",
        "threat=0.15",
        "source=digits",
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


@pytest.mark.parametrize("key", ["source", "proxy", "model", "train.objective"])
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


def test_another_kind_has_its_own_defaults() -> None:
    """Only what was set to something else than its default goes over: SGD spares biases though AdamW, by default, does not."""
    optimizer = load_config("digits", ["train.optimizer.kind=sgd"]).train.optimizer
    assert optimizer == SgdOptimizer()
    assert optimizer.decayed != AdamWOptimizer().decayed
    chosen = ["train.optimizer.decayed=no-normalisation", "train.optimizer.kind=sgd"]
    assert load_config("digits", chosen).train.optimizer == SgdOptimizer(decayed="no-normalisation")
    assert load_config("digits", ["train.objective.kind=mart"]).train.objective == MartObjective()
    assert load_config("digits", ["smooth.objective.kind=smoothadv"]).smooth.objective == SmoothAdvObjective()


def test_a_part_that_is_absent_is_begun_by_a_key_in_it() -> None:
    """Weight perturbation is off; one of its keys turns it on with the other's default, and null turns it off again."""
    changes = ["train.objective.awp.gamma=0.01"]
    assert load_config("digits", changes).train.objective.awp == AwpConfig(gamma=0.01)
    assert load_config("digits", [*changes, "train.objective.awp=null"]).train == load_config("digits").train


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
    with pytest.raises(ValueError, match=r"there is no file nowhere\.yaml; give a preset \(.*, digits, .*\) or the path"):
        load_config("nowhere.yaml")


def test_a_mixture_of_proxies_is_read_from_a_file(tmp_path: Path) -> None:
    """Several proxies are a list in the file; each has its own kind, and a weight of 1 unless it says another."""
    path = tmp_path / "mixture.yaml"
    path.write_text(
        join(
            [
                "extends: digits",
                "proxy:",
                "  kind: mixture",
                "  parts:",
                "    - {weight: 3, proxy: {kind: published, name: others}}",
                "    - proxy: {kind: jitter, num_images: 50}",
            ]
        )
    )
    expected = (
        WeightedProxy(weight=3.0, proxy=PublishedProxy(name="others")),
        WeightedProxy(weight=1.0, proxy=JitterProxy(num_images=50)),
    )
    assert load_config(str(path)).proxy == MixtureProxy(parts=expected)


def test_a_file_extends_its_neighbour(tmp_path: Path) -> None:
    """``extends`` names a file as seen from the file it stands in, wherever the program is started."""
    (tmp_path / "below").mkdir()
    (tmp_path / "below" / "base.yaml").write_text("extends: digits\nname: base\nseed: 5\n")
    (tmp_path / "mine.yaml").write_text("extends: below/base.yaml\nname: mine\n")
    config = load_config(str(tmp_path / "mine.yaml"))
    assert (config.name, config.seed) == ("mine", 5)
