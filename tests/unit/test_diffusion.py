"""The diffusion proxy: exact resumes, and samples that depend on their own seed alone."""

import math

import numpy as np
import pytest
import safetensors.torch
import torch

from proxyrob.config import DiffusionProxy, SamplingConfig
from proxyrob.errors import DataIntegrityError, NonFiniteLoss
from proxyrob.proxy import ProxyReport, fit_diffusion, sample_proxy
from proxyrob.proxy.diffusion import DiffusionSampler
from proxyrob.proxy.network import Denoiser
from proxyrob.source import read_split
from proxyrob.storage import Stage
from tests.conftest import MakeStage
from tests.toys import Killer, Recorder, StopHereError, damage, files_below

TINY = DiffusionProxy(num_images=20, width=8, num_blocks=1, steps=2, batch_size=8, sampler_steps=4)
LONG = TINY.replace(steps=560)


@pytest.fixture(scope="module")
def fitted(digits: Stage, tmp_path_factory: pytest.TempPathFactory) -> Stage:
    """A proxy fitted without interruption, with its curve's last loss."""
    stage = Stage("proxy", "1" * 64, tmp_path_factory.mktemp("proxy"), {})
    fit_diffusion(LONG, source=digits, seed=0, stage=stage)
    return stage


def test_stopping_and_resuming_equals_not_stopping(fitted: Stage, digits: Stage, make_stage: MakeStage) -> None:
    """Killed after its checkpoint and resumed, the fit ends with the same file byte for byte."""
    stage, recorder = make_stage("proxy"), Recorder()
    with pytest.raises(StopHereError):
        fit_diffusion(LONG, source=digits, seed=0, stage=stage, on_progress=Killer(lambda done: done == 550))
    report = fit_diffusion(LONG, source=digits, seed=0, stage=stage, on_progress=recorder)
    assert recorder.told == [(550, 560), (560, 560)], "it went on from the checkpoint after 500 steps"
    assert report == fitted.finished(ProxyReport)
    assert (stage.folder / "proxy.safetensors").read_bytes() == (fitted.folder / "proxy.safetensors").read_bytes()
    assert files_below(stage.folder) == {"proxy.safetensors", "stage.json"}


def test_fitting_learns_the_training_images(fitted: Stage, digits: Stage) -> None:
    """The loss is well below that of a network that predicts nothing (the variance of v, about 1), and is reported."""
    report = fitted.finished(ProxyReport)
    assert report is not None
    assert report.final_loss is not None
    assert 0.0 < report.final_loss < 0.7
    assert (report.kind, report.num_train) == ("diffusion", 60)


def test_samples_look_more_like_digits_than_noise_does(fitted: Stage, digits: Stage) -> None:
    """The mean of many samples is nearer to the mean digit than half-grey is: v, schedule and sampler belong together."""
    sampler = DiffusionSampler(LONG, source=digits, proxy=fitted, seed=0)
    mean = sampler.sample(np.arange(100)).mean(axis=0)
    digit = read_split(digits, "train").stored.mean(axis=0)
    assert np.abs(mean - digit).mean() < 0.5 * np.abs(127.5 - digit).mean()


def test_a_conditional_proxy_draws_image_i_from_class_i_mod_k(fitted: Stage, digits: Stage) -> None:
    """The class is that of the embedding: without it the same seeds give other images; classes are balanced by id."""
    assert "classes.weight" in safetensors.torch.load_file(fitted.folder / "proxy.safetensors")
    sampler = DiffusionSampler(LONG, source=digits, proxy=fitted, seed=0)
    assert sampler.model.classes is not None
    ids = np.arange(20)
    before = sampler.sample(ids)
    sampler.model.classes.weight[3, 0] += 5.0
    changed = (sampler.sample(ids) != before).any(axis=(1, 2, 3))
    assert changed.tolist() == [i % 10 == 3 for i in range(20)]


def test_an_unconditional_proxy_has_no_classes(digits: Stage, make_stage: MakeStage) -> None:
    """One distribution for all: the network has no embedding of classes and is smaller by it."""
    reports = {}
    for conditional in (True, False):
        stage = make_stage("proxy", conditional=conditional)
        reports[conditional] = fit_diffusion(TINY.replace(conditional=conditional), source=digits, seed=0, stage=stage)
        names = safetensors.torch.load_file(stage.folder / "proxy.safetensors").keys()
        assert ("classes.weight" in names) == conditional
    assert reports[True].num_parameters - reports[False].num_parameters == 10 * 8


def test_the_seed_decides_fit_and_samples(fitted: Stage, digits: Stage, make_stage: MakeStage) -> None:
    """Another seed fits another network, and draws other images from the same one."""
    stages = [make_stage("proxy", k=k) for k in range(3)]
    for stage, seed in zip(stages, (0, 0, 1), strict=True):
        fit_diffusion(TINY, source=digits, seed=seed, stage=stage)
    first, again, other = ((stage.folder / "proxy.safetensors").read_bytes() for stage in stages)
    assert first == again != other
    images = [DiffusionSampler(LONG, source=digits, proxy=fitted, seed=seed).sample(np.arange(3)) for seed in (0, 0, 1)]
    assert np.array_equal(images[0], images[1])
    assert not np.array_equal(images[0], images[2])


def test_more_sampler_steps_are_used(fitted: Stage, digits: Stage) -> None:
    """The number of solver steps is read: another number gives other images of the same seeds."""
    few, many = (
        DiffusionSampler(LONG.replace(sampler_steps=steps), source=digits, proxy=fitted, seed=0).sample(np.arange(3))
        for steps in (2, 8)
    )
    assert not np.array_equal(few, many)


def test_diverging_names_the_step(digits: Stage, make_stage: MakeStage) -> None:
    """An absurd learning rate ends in an error that names the step and the setting, and leaves no proxy."""
    stage = make_stage("proxy")
    with pytest.raises(
        NonFiniteLoss, match=r"the proxy's loss is (nan|inf) at step 3; lower proxy\.learning_rate \(now 1e\+30\)"
    ):
        fit_diffusion(TINY.replace(steps=4, learning_rate=1e30), source=digits, seed=0, stage=stage)
    assert stage.record() is None
    assert not (stage.folder / "proxy.safetensors").exists()


def test_a_finished_fit_is_not_run_again(fitted: Stage, digits: Stage) -> None:
    """A second call gives the report and does no step."""
    recorder = Recorder()
    assert fit_diffusion(LONG, source=digits, seed=0, stage=fitted, on_progress=recorder) == fitted.finished(ProxyReport)
    assert recorder.told == []


def test_a_damaged_proxy_is_not_sampled(digits: Stage, make_stage: MakeStage) -> None:
    """The proxy's file is hashed before it is used."""
    stage = make_stage("proxy")
    fit_diffusion(TINY, source=digits, seed=0, stage=stage)
    damage(stage.folder / "proxy.safetensors")
    with pytest.raises(DataIntegrityError, match=r"proxy\.safetensors is damaged"):
        DiffusionSampler(TINY, source=digits, proxy=stage, seed=0)


def test_a_proxy_of_another_width_is_refused(digits: Stage, make_stage: MakeStage) -> None:
    """Weights that do not fit the configured denoiser are refused, with the folder to delete."""
    stage = make_stage("proxy")
    fit_diffusion(TINY, source=digits, seed=0, stage=stage)
    with pytest.raises(DataIntegrityError, match=r"(?s)does not hold the configured denoiser.*delete the folder"):
        DiffusionSampler(TINY.replace(width=16), source=digits, proxy=stage, seed=0)


def test_the_diffusion_proxy_needs_the_stage_that_fitted_it(digits: Stage, make_stage: MakeStage) -> None:
    """Sampling without a fitted proxy is refused before anything is written."""
    stage = make_stage("samples")
    with pytest.raises(ValueError, match="expected the stage that fitted the diffusion model, got None"):
        sample_proxy(TINY, SamplingConfig(), source=digits, proxy=None, seed=0, stage=stage)
    assert files_below(stage.folder) == set()


# The denoiser


def test_a_fresh_denoiser_predicts_nothing() -> None:
    """Its last layer starts at 0, so that fitting starts from the loss of a constant."""
    torch.manual_seed(0)
    model = Denoiser(num_pixels=6, num_classes=3, width=8, num_blocks=2)
    found = model(torch.randn(4, 6), torch.tensor([0, 1, 500, 999]), torch.tensor([0, 1, 2, 0]))
    assert torch.equal(found, torch.zeros(4, 6))


def test_the_denoiser_uses_time_class_and_image() -> None:
    """Another time, class or noisy image gives another prediction, row by row."""
    torch.manual_seed(0)
    model = Denoiser(num_pixels=6, num_classes=3, width=8, num_blocks=1)
    torch.nn.init.normal_(model.outlet.weight)
    noisy, time, labels = torch.randn(2, 6), torch.tensor([10, 10]), torch.tensor([1, 1])
    base = model(noisy, time, labels)
    for other in (
        model(noisy, torch.tensor([10, 900]), labels),
        model(noisy, time, torch.tensor([1, 2])),
        model(torch.stack([noisy[0], noisy[1] + 1]), time, labels),
    ):
        assert torch.allclose(other[0], base[0], atol=1e-6)
        assert not torch.allclose(other[1], base[1], atol=1e-3)


def test_times_are_embedded_as_sines_and_cosines() -> None:
    """Time 0 is all sines 0 and cosines 1; the lowest frequency is that of 10,000 to the power of (half-1)/half."""
    model = Denoiser(num_pixels=6, num_classes=0, width=8, num_blocks=1)
    found = model._embed(torch.tensor([0, 7]), torch.float64)
    assert found[0].tolist() == [0.0] * 4 + [1.0] * 4
    assert found[1, 0].item() == pytest.approx(math.sin(7.0))
    assert found[1, 7].item() == pytest.approx(math.cos(7.0 * 10_000 ** (-3 / 4)))


def test_images_that_are_not_finite_are_refused(fitted: Stage, digits: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    """A network that gives NaN for some images ends the sampling with their numbers; it is not stored as black."""
    sampler = DiffusionSampler(LONG, source=digits, proxy=fitted, seed=0)

    def breaks(state: torch.Tensor, times: torch.Tensor, labels: torch.Tensor | None) -> torch.Tensor:
        velocity = torch.zeros_like(state)
        velocity[1::2] = math.nan
        return velocity

    monkeypatch.setattr(sampler.model, "forward", breaks)
    with pytest.raises(
        NonFiniteLoss, match=r"the proxy's images \[11, 13\] are not finite; fit it anew with a lower proxy\.lear"
    ):
        sampler.sample(np.arange(10, 14))
