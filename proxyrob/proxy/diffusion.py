"""A diffusion model as proxy distribution: fitted to training images only, sampled one seed per image."""

import time
from typing import cast

import numpy as np
import safetensors
import safetensors.torch
import torch
from jaxtyping import Float, Int64, UInt8
from torch import Tensor
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel

from proxyrob.config.proxy import DiffusionProxy
from proxyrob.errors import DataIntegrityError, NonFiniteLoss
from proxyrob.memory import at_most
from proxyrob.proxy.network import Denoiser
from proxyrob.rng import Streams, isolated_rng
from proxyrob.schedule import average_with_warmup, cosine_with_warmup
from proxyrob.source import Split, read_split, source_report
from proxyrob.storage import Report, Stage
from proxyrob.storage.checkpoints import Checkpoints
from proxyrob.storage.files import write_bytes
from proxyrob.types import OnProgress, as_stored, no_progress

NUM_DIFFUSION_STEPS = 1000
CHECKPOINT_EVERY = 500
REPORT_EVERY = 50
WEIGHTS = "proxy.safetensors"


class ProxyReport(Report):
    """A fitted proxy."""

    kind: str
    num_parameters: int
    num_train: int
    final_loss: float | None


def fit_diffusion(
    config: DiffusionProxy,
    *,
    source: Stage,
    seed: int,
    stage: Stage,
    device: str = "cpu",
    on_progress: OnProgress = no_progress,
) -> ProxyReport:
    """Fit the denoiser to the training split by the mean squared error of v, and keep an exponential average of it.

    Cosine schedule of 1,000 steps (Nichol & Dhariwal 2021). Goes on from its checkpoint.

    Randomness: ``proxy/initial``, and ``proxy/fit`` by step. Raises ``NonFiniteLoss`` when it diverges.
    """
    # not at the top: it costs seconds that whoever only schedules need not pay
    from diffusers.schedulers.scheduling_ddpm import DDPMScheduler

    if (report := stage.finished(ProxyReport)) is not None:
        return report
    started = time.monotonic()
    streams = Streams(seed)
    split = read_split(source, "train")
    pixels = (split.images.flatten(1) * 2.0 - 1.0).to(device)
    labels = split.targets.to(device)
    model = _build(config, split, streams.entropy("proxy/initial")).to(device)
    average = AveragedModel(model, multi_avg_fn=average_with_warmup(config.ema_decay))
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.learning_rate, fused=True)
    schedule = cosine_with_warmup(optimizer, config.steps)
    noising = DDPMScheduler(NUM_DIFFUSION_STEPS, beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction")
    parts = {"model": model, "average": average, "optimizer": optimizer, "schedule": schedule}
    with Checkpoints(stage) as checkpoints:
        first, _ = checkpoints.load(parts, device)
        recent = float("nan")
        for step in range(first, config.steps):
            generator = streams.torch("proxy/fit", device, step=step)
            rows = torch.randint(len(pixels), (config.batch_size,), generator=generator, device=device)
            drawn = torch.randint(NUM_DIFFUSION_STEPS, (config.batch_size,), generator=generator, device=device)
            times = cast(torch.IntTensor, drawn)  # so diffusers names any tensor of integers
            noise = torch.randn((config.batch_size, pixels.shape[1]), generator=generator, device=device)
            clean = pixels[rows]
            noisy = noising.add_noise(clean, noise, times)
            target = noising.get_velocity(clean, noise, times)
            optimizer.zero_grad(set_to_none=True)
            loss = torch.zeros((), device=device)
            for part in torch.arange(config.batch_size, device=device).split(at_most(config.batch_size)):
                error = F.mse_loss(model(noisy[part], times[part], labels[rows[part]]), target[part])
                share = error * (len(part) / config.batch_size)
                share.backward()
                loss += share.detach()
            optimizer.step()
            schedule.step()
            average.update_parameters(model)
            if (step + 1) % REPORT_EVERY == 0 or step + 1 == config.steps:
                recent = loss.item()
                if not np.isfinite(recent):
                    raise NonFiniteLoss(
                        f"the proxy's loss is {recent} at step {step}; lower proxy.learning_rate (now {config.learning_rate})"
                    )
                on_progress(step + 1, config.steps, loss=recent)
            if (step + 1) % CHECKPOINT_EVERY == 0 and step + 1 < config.steps:
                checkpoints.save(step + 1, parts)
        state = {name: tensor.cpu().contiguous() for name, tensor in average.module.state_dict().items()}
        write_bytes(stage.folder / WEIGHTS, safetensors.torch.save(state))
        report = ProxyReport(
            kind=config.kind,
            num_parameters=sum(parameter.numel() for parameter in model.parameters()),
            num_train=len(split),
            final_loss=recent if np.isfinite(recent) else None,
        )
        stage.finish(report, [WEIGHTS], started)
        checkpoints.clear()
    return report


class DiffusionSampler:
    """Draws image i from seed i alone.

    Computed in float64, so that rounding in batches of another size cannot move a pixel to another of its 256 levels.
    """

    def __init__(self, config: DiffusionProxy, *, source: Stage, proxy: Stage, seed: int, device: str = "cpu") -> None:
        report = source_report(source)
        self.config = config
        self.shape = report.image_shape
        self.num_classes = len(report.class_names)
        self.streams = Streams(seed)
        self.device = device
        path = proxy.verified(WEIGHTS)
        self.model = _denoiser(config, self.shape, self.num_classes)
        try:
            self.model.load_state_dict(safetensors.torch.load_file(path))
        except (RuntimeError, safetensors.SafetensorError) as error:
            raise DataIntegrityError(f"{path} does not hold the configured denoiser: {error}; {proxy.remedy}") from error
        self.model.double().to(device).eval().requires_grad_(False)

    def sample(self, ids: Int64[np.ndarray, " n"]) -> UInt8[np.ndarray, "n h w c"]:
        """The images of ``ids``; a conditional proxy draws image i from class i mod K, so that classes are balanced.

        DPM-Solver++ of second order (Lu et al. 2022), without guidance.

        Randomness: ``proxy/sample`` by image.
        """
        from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler  # as in fit_diffusion

        scheduler = DPMSolverMultistepScheduler(
            NUM_DIFFUSION_STEPS, beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction"
        )
        scheduler.set_timesteps(self.config.sampler_steps)
        state = torch.stack([self._noise(int(i)) for i in ids]).to(self.device)
        labels = torch.as_tensor(ids % self.num_classes, device=self.device)
        for moment in scheduler.timesteps:
            times = torch.full((len(ids),), int(moment), device=self.device)
            (state,) = scheduler.step(self.model(state, times, labels), moment, state, return_dict=False)
        if wrong := (~state.isfinite().all(dim=1)).nonzero().flatten().tolist():
            raise NonFiniteLoss(
                f"the proxy's images {ids[wrong].tolist()} are not finite; fit it anew with a lower proxy.learning_rate "
                f"(now {self.config.learning_rate})"
            )
        return as_stored((state.view(-1, *self.shape) + 1.0) / 2.0)

    def _noise(self, image: int) -> Float[Tensor, " p"]:
        channels, height, width = self.shape
        generator = self.streams.torch("proxy/sample", image=image)
        return torch.randn(channels * height * width, generator=generator, dtype=torch.float64)


def _build(config: DiffusionProxy, split: Split, seed: int) -> Denoiser:
    height, width, channels = split.stored.shape[1:]
    with isolated_rng(seed):
        return _denoiser(config, (channels, height, width), int(split.labels.max()) + 1)


def _denoiser(config: DiffusionProxy, shape: tuple[int, int, int], num_classes: int) -> Denoiser:
    channels, height, width = shape
    return Denoiser(channels * height * width, num_classes if config.conditional else 0, config.width, config.num_blocks)
