"""Digests known before any work."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest

from flows.describe import describe_data
from flows.plan import Plan, pin_config, plan_pipeline
from flows.settings import Settings
from flows.train_robust import require_shares
from proxyrob.config import (
    DiffusionProxy,
    JitterProxy,
    MixtureProxy,
    PipelineConfig,
    PublishedProxy,
    WeightedProxy,
    load_config,
)
from proxyrob.config.evaluate import CheckName
from proxyrob.config.proxy import SingleProxy
from proxyrob.errors import DataIntegrityError
from proxyrob.storage import DataPlace
from tests.toys import tiny_split, write_images

STORE = Path("store")
PUBLISHED = PublishedProxy(name="others", sha256="1" * 64, num_images=100)
JITTER = JitterProxy(num_images=50)


def _with(proxy: SingleProxy | MixtureProxy) -> PipelineConfig:
    return load_config("digits").replace(proxy=proxy)


def _mixture(*parts: tuple[float, SingleProxy]) -> PipelineConfig:
    return _with(MixtureProxy(parts=tuple(WeightedProxy(weight=weight, proxy=proxy) for weight, proxy in parts)))


def _plan(config: PipelineConfig) -> Plan:
    return plan_pipeline(config, STORE, DataPlace("/data"))


def _digests(plan: Plan) -> set[str]:
    return {stage.digest for stage in plan.stages()}


def _changed(*changes: str, preset: str = "digits") -> set[str]:
    """The kinds of stages that a change makes anew."""
    before = {stage.digest for stage in plan_pipeline(load_config("digits"), STORE).stages()}
    return {stage.name for stage in plan_pipeline(load_config(preset, changes), STORE).stages() if stage.digest not in before}


@pytest.mark.parametrize(
    ("change", "anew"),
    [
        ("train.gamma=0.4", {"train", "evaluate", "sanity", "export", "pictures"}),
        ("certify.n=20000", {"certify", "pictures"}),
        ("evaluate.pgd_steps=10", {"evaluate", "sanity", "export"}),
        ("label.threshold=0.8", {"labels", "train", "evaluate", "sanity", "certify", "export", "pictures"}),
        ("gate.margin=0.01", set()),
        ("gate.waivers.transfer=known", set()),
    ],
)
def test_a_change_redoes_what_depends_on_it(change: str, anew: set[str]) -> None:
    """A setting changes the digests of the stages that read it and of those after them, and of no others."""
    assert _changed(change) == anew


def test_seed_changes_everything() -> None:
    """Another seed shares no stage."""
    kinds = {stage.name for stage in plan_pipeline(load_config("digits"), STORE).stages()}
    assert _changed("seed=1") == kinds


def test_real_only_does_not_depend_on_the_proxy() -> None:
    """The jitter control shares its real-only model, attacks and certificates with the diffusion preset."""
    plans = [plan_pipeline(load_config(preset), STORE) for preset in ("digits", "digits-jitter")]
    assert plans[0].variants["real-only"] == plans[1].variants["real-only"]
    assert plans[0].variants["mixed"].train != plans[1].variants["mixed"].train


def test_without_a_proxy_there_is_one_model() -> None:
    """Real images alone: one variant, which is the one released, and no stage of a proxy."""
    real = {"synthetic_fraction": 0.0, "gamma": 1.0}
    config = load_config("digits").replace(proxy=None, train=real, smooth=real)
    plan = plan_pipeline(config, STORE)
    assert list(plan.variants) == ["real-only"]
    assert plan.released == "real-only"
    assert {stage.name for stage in plan.stages()} == {"source", "train", "evaluate", "sanity", "certify", "export", "pictures"}


# Evidence for the sanity checks


def test_a_labeler_is_the_twin_of_every_model() -> None:
    """A transfer attack goes through the first labeler where there is one: both sanity stages follow from it."""
    plan = _plan(_with(JITTER))
    assert plan.labelers is not None
    for variant in plan.variants:
        assert plan.twin(variant) == plan.labelers[0]
        assert ["train", plan.labelers[0].digest] in plan.variants[variant].sanity.configuration["inputs"]


def test_without_labelers_real_images_alone_give_the_twin() -> None:
    """The mixed model is attacked through that of real images alone, which itself has no twin."""
    plan = _plan(_with(PUBLISHED))
    assert plan.twin("mixed") == plan.variants["real-only"].train
    assert plan.twin("real-only") is None


def test_the_labels_of_a_training_are_evidence() -> None:
    """Near-duplicates are counted in every set that a model was trained on, and in none for real images alone."""
    plan = _plan(_mixture((1.0, JITTER), (1.0, PUBLISHED)))
    assert plan.labels("mixed") == tuple(proxy.labels for proxy in plan.proxies)
    assert plan.labels("real-only") == ()
    given = plan.variants["mixed"].sanity.configuration["inputs"]
    assert all(["labels", proxy.labels.digest] in given for proxy in plan.proxies)


def test_other_checks_are_another_stage() -> None:
    """The names of the checks are part of the digest: a report without a check is never taken for one that has it."""
    for stages in _plan(_with(JITTER)).variants.values():
        assert stages.sanity.configuration["checks"] == list(get_args(CheckName))


# Where images lie


def test_images_lie_in_the_store_or_in_the_place_for_data() -> None:
    """Samples and labels are below the stage's folder in the store, or under the same names in the place for data."""
    config = load_config("digits")
    (at_home,), (away,) = plan_pipeline(config, STORE).proxies, _plan(config).proxies
    assert at_home.images_at.is_folder(at_home.samples.folder)
    assert at_home.labels_at.is_folder(at_home.labels.folder)
    assert away.images_at.uri == f"/data/samples/{away.samples.folder.name}"
    assert away.labels_at.uri == f"{away.images_at.uri}/labels/{away.labels.folder.name}"
    assert (at_home.samples, at_home.labels) == (away.samples, away.labels), "where images lie changes no digest"


# Published sets


def test_a_published_set_is_neither_fitted_nor_voted_on() -> None:
    """With the labels it came with there is nothing to fit and no labeler; images and labels lie under its name."""
    plan = _plan(_with(PUBLISHED))
    (proxy,) = plan.proxies
    assert (proxy.fit, plan.labelers, proxy.takes_given_labels) == (None, None, True)
    assert [stage.name for stage in plan.stages()][:3] == ["source", "samples", "labels"]
    assert proxy.images_at.uri == "/data/sets/others"
    assert proxy.given_at.uri == "/data/sets/others/labels/given"
    assert proxy.labels_at.uri == f"/data/sets/others/labels/{proxy.labels.folder.name}"


def test_a_published_set_can_be_voted_on() -> None:
    """With ``labels: labelers`` both labelers are trained, the threshold counts, and its own labels do not."""
    config = _with(PUBLISHED.replace(labels="labelers"))
    plan = _plan(config)
    assert plan.labelers is not None
    assert not plan.proxies[0].takes_given_labels
    other = _plan(config.replace(label=config.label.replace(threshold=0.8)))
    assert plan.proxies[0].labels != other.proxies[0].labels
    given = _plan(_with(PUBLISHED))
    assert given.proxies[0].labels.digest != plan.proxies[0].labels.digest


@pytest.mark.parametrize("changes", [{"batch_size": 2}, {"batch_size": 256, "synthetic_fraction": 0.25, "cutmix": 0.5}])
def test_batches_that_processes_cannot_share_are_refused_with_the_plan(changes: dict[str, Any]) -> None:
    """Before any work: each process of a training needs its part of the real and of the synthetic images of every batch."""
    config = load_config("digits")
    require_shares(_plan(config), 4)
    config = config.replace(train=config.train.replace(**changes))
    require_shares(_plan(config), 1)
    with pytest.raises(ValueError, match=r"images of a batch cannot be shared by (4|64) process"):
        require_shares(_plan(config), 4 if "cutmix" not in changes else 64)


def test_the_labelers_do_not_matter_where_labels_are_given() -> None:
    """A threshold that nothing is compared with changes no stage."""
    config = _with(PUBLISHED)
    assert _digests(_plan(config)) == _digests(_plan(config.replace(label=config.label.replace(threshold=0.8))))


def test_the_name_of_a_published_set_is_no_part_of_any_digest() -> None:
    """The same images under another name share every stage; other images under the same name share none that uses them."""
    plans = [_plan(_with(PUBLISHED.replace(**changes))) for changes in ({}, {"name": "renamed"}, {"sha256": "2" * 64})]
    assert _digests(plans[0]) == _digests(plans[1])
    assert plans[1].proxies[0].images_at.uri == "/data/sets/renamed"
    kinds = {stage.name for stage in plans[2].stages() if stage.digest not in _digests(plans[0])}
    assert kinds == {"samples", "labels", "train", "evaluate", "sanity", "certify", "export", "pictures"}
    assert plans[0].variants["real-only"] == plans[2].variants["real-only"]


def test_a_published_set_without_identity_is_not_planned() -> None:
    """What would share its digest with any set of that name is refused, with the remedy."""
    with pytest.raises(ValueError, match="the published set 'others' has no identity yet: expected a configuration from pin"):
        _plan(_with(PublishedProxy(name="others")))


def test_pinning_fills_in_what_lies_below_the_home(tmp_path: Path) -> None:
    """The set's hash and size come from its manifest, wherever it stands in the configuration; a missing one is named."""
    settings = Settings(home=tmp_path)
    manifest = write_images(settings.sets.below("others"), tiny_split(7).stored)
    expected = PublishedProxy(name="others", sha256=manifest.sha256, num_images=7)
    assert pin_config(_with(PublishedProxy(name="others")), settings).proxy == expected
    mixed = pin_config(_mixture((2.0, PublishedProxy(name="others")), (1.0, JITTER)), settings)
    assert mixed == _mixture((2.0, expected), (1.0, JITTER))
    assert pin_config(load_config("digits"), settings) == load_config("digits")
    with pytest.raises(DataIntegrityError, match=r"sets/absent holds no finished set .*: proxyrob import FILE --name absent"):
        pin_config(_with(PublishedProxy(name="absent")), settings)


# Mixtures


def test_every_part_of_a_mixture_has_its_own_stages() -> None:
    """What a proxy is fitted, sampled and labelled by is what it has alone, so that nothing is made twice."""
    diffusion = load_config("digits").proxy
    assert isinstance(diffusion, DiffusionProxy)
    plan = _plan(_mixture((1.0, diffusion), (1.0, JITTER), (1.0, PUBLISHED)))
    assert [proxy.name for proxy in plan.proxies] == ["diffusion", "jitter", "others"]
    for part, alone in zip(plan.proxies, (diffusion, JITTER, PUBLISHED), strict=True):
        (single,) = _plan(_with(alone)).proxies
        assert (part.fit, part.samples, part.labels) == (single.fit, single.samples, single.labels)
    assert plan.labelers == _plan(_with(JITTER)).labelers


@pytest.mark.parametrize("of", [lambda plan: plan.variants["mixed"].train, lambda plan: plan.variants["mixed"].smooth])
def test_weights_change_only_training(of: Callable[[Plan], object]) -> None:
    """Another weight makes trainings and what follows from them anew, but neither images nor labels nor real-only models."""
    one, other = (_plan(_mixture((weight, JITTER), (1.0, PUBLISHED))) for weight in (1.0, 2.0))
    assert of(one) != of(other)
    anew = {stage.name for stage in other.stages() if stage.digest not in _digests(one)}
    assert anew == {"train", "evaluate", "sanity", "certify", "export", "pictures"}
    assert one.variants["real-only"] == other.variants["real-only"]
    assert [proxy.weight for proxy in other.proxies] == [of.weight for of in other.synthetic] == [2.0, 1.0]


def test_the_weight_of_a_single_proxy_does_not_exist() -> None:
    """A single proxy is trained on as ever: its stages have no weights in them."""
    plan = _plan(load_config("digits"))
    assert all("weights" not in stage.configuration for stage in plan.stages())


def test_parts_of_one_kind_are_told_apart() -> None:
    """Jitter proxies are sets with names of their own, also beside a published set that is called so."""
    jitters = [(1.0, JITTER.replace(sigma=sigma)) for sigma in (0.1, 0.2, 0.3)]
    plan = _plan(_mixture(*jitters, (1.0, PUBLISHED.replace(name="jitter-2"))))
    assert [proxy.name for proxy in plan.proxies] == ["jitter", "jitter-2", "jitter-3", "jitter-2-2"]
    assert len({proxy.samples.digest for proxy in plan.proxies}) == 4


def test_the_card_names_every_set() -> None:
    """A model's card says of which images it was trained on how many there are, and which were published by others."""
    described = describe_data(_mixture((1.0, JITTER), (1.0, PUBLISHED)), "mixed")
    assert "50 synthetic ones (jitter proxy fitted to the same real images)" in described
    assert "100 synthetic ones (a published set, others)" in described
    assert describe_data(_with(PUBLISHED), "real-only") == "200 real images of digits"
