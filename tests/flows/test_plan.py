"""Digests known before any work."""

from pathlib import Path

import pytest

from flows.plan import plan_pipeline
from proxyrob.config import load_config

STORE = Path("store")


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
