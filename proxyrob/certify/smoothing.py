"""Certification by randomized smoothing (Cohen et al. 2019, «Certified Adversarial Robustness via Randomized Smoothing»)."""

import time

import pandas as pd
import pyarrow as pa
import torch
from jaxtyping import Float
from torch import Tensor, nn

from proxyrob.certify.bounds import certified_radius, lower_bound
from proxyrob.certify.certificates import CERTIFICATES, CertificateHeader, CertificationReport, summarise
from proxyrob.certify.sequential import SequentialDesign, certify_sequentially, design_looks
from proxyrob.certify.votes import count_votes
from proxyrob.config.certify import CertifyConfig, FixedMethod, SequentialMethod
from proxyrob.models import FoldedCopy, hash_inputs, in_pieces, load_model
from proxyrob.rng import Streams
from proxyrob.source import ImageSubset, read_rows, read_split, source_report
from proxyrob.storage import DataPlace, Stage
from proxyrob.storage.files import write_table
from proxyrob.storage.shared import SharedTables, finish_once
from proxyrob.types import OnProgress, no_progress

UNIT_SIZE = {"fixed": 10, "sequential": 100}
"""Images whose certificates are kept together; sequentially they take a tenth of the samples, and share batches."""


def certify_classifier(
    config: CertifyConfig,
    *,
    sigma: float,
    source: Stage,
    model: Stage,
    seed: int,
    stage: Stage,
    device: str = "cpu",
    on_progress: OnProgress = no_progress,
) -> CertificationReport:
    """Certify the first ``config.num_images`` test images and write ``certificates.parquet``.

    The network is certified as it computes in ``config.precision``: certificates of one in bfloat16 say nothing of one in
    float32. Any number of workers may do this at once, in units of images; what is done is not done again after a kill.
    ``elapsed_s`` is the time of an image's unit, shared among its images by their samples.

    Randomness: ``certify/select`` and ``certify/estimate`` by image.

    Raises ``ValueError`` for thresholds that no image can reach, before any work.
    """
    return finish_once(
        stage,
        CertificationReport,
        lambda started: _certify(config, sigma, source, model, seed, stage, device, on_progress, started),
    )


def _certify(
    config: CertifyConfig,
    sigma: float,
    source: Stage,
    model: Stage,
    seed: int,
    stage: Stage,
    device: str,
    on_progress: OnProgress,
    started: float,
) -> CertificationReport:
    streams = Streams(seed)
    real, in_whole = source_report(source), read_rows(source)
    split = read_split(source, "test").first(config.num_images)
    images = split.images.to(device)
    num_values = images[0].numel()
    config.require_reachable(sigma, num_values)
    design = _design(config, sigma, num_values)
    classifier = load_model(model, device)
    network = in_pieces(FoldedCopy(classifier, getattr(torch, config.precision), example=images[:2]))
    about = {
        "certify": config.dump(),
        "sigma": sigma,
        "seed": seed,
        **hash_inputs(classifier, split.images, split.targets),
    }
    work = SharedTables(DataPlace.of(stage.scratch / "certificates"), about, stage.is_whole)
    size = UNIT_SIZE[config.method.kind]
    units = {
        f"images-{k:05d}": range(start, min(start + size, len(split))) for k, start in enumerate(range(0, len(split), size))
    }

    def certify_some(name: str) -> pa.Table:
        indices, before = units[name], time.monotonic()
        select, estimate = (
            [streams.torch(path, device, image=int(in_whole[index])) for index in indices]
            for path in ("certify/select", "certify/estimate")
        )
        if design is None:
            rows = [
                certify_image(
                    network,
                    images[index],
                    sigma=sigma,
                    n0=config.n0,
                    n=config.n,
                    alpha=config.alpha,
                    batch_size=config.batch_size,
                    select=first,
                    estimate=second,
                )
                for index, first, second in zip(indices, select, estimate, strict=True)
            ]
        else:
            rows = certify_sequentially(
                network,
                images[indices.start : indices.stop],
                design,
                sigma=sigma,
                n0=config.n0,
                batch_size=config.batch_size,
                select=select,
                estimate=estimate,
            )
        table = pd.DataFrame(rows)
        samples = table.n0 + table.n
        table["elapsed_s"] = (time.monotonic() - before) * samples / samples.sum()
        table.insert(0, "index", in_whole[indices.start : indices.stop])
        table.insert(1, "label", split.labels[indices.start : indices.stop])
        return pa.Table.from_pandas(table.astype({"prediction": "Int64"}), preserve_index=False)

    def tell(done: set[str]) -> bool:
        on_progress(sum(len(units[name]) for name in done), len(split))
        return False

    work.tabulate(list(units), certify_some, tell)
    table = work.join(list(units))
    header = CertificateHeader(
        sigma=sigma,
        n0=config.n0,
        n=config.n,
        alpha=config.alpha,
        method=config.method.dump(),
        grid=None if design is None else design.radii,
        precision=config.precision,
        num_values=num_values,
        seed=seed,
        split="test",
        model=model.digest,
        data_sha256=real.content_sha256,
        subset=ImageSubset(count=len(split)).identify(len(in_whole)) if real.subset == "all" else real.subset,
    )

    def conclude() -> CertificationReport:
        write_table(stage.folder / CERTIFICATES, table, header.model_dump(mode="json"))
        return stage.finish(summarise(table, config, num_values), [CERTIFICATES], started)

    return work.conclude(conclude)


def certify_image(
    model: nn.Module,
    image: Float[Tensor, "c h w"],
    *,
    sigma: float,
    n0: int,
    n: int,
    alpha: float,
    batch_size: int,
    select: torch.Generator,
    estimate: torch.Generator,
) -> dict[str, object]:
    """Algorithm CERTIFY: the class from ``n0`` samples, its probability from ``n`` fresh ones.

    Returns ``prediction`` (``None`` when abstaining), ``count`` of the chosen class among ``n``, ``n0``, ``n``,
    ``alpha``, ``sigma`` and ``radius_l2`` (0 when abstaining). The noise is not clipped to [0,1].

    Randomness: ``select`` for the first sample, ``estimate`` for the second; they must be different streams.
    """
    chosen = int(count_votes(model, image, sigma, n0, batch_size, select).argmax())
    count = int(count_votes(model, image, sigma, n, batch_size, estimate)[chosen])
    radius = certified_radius(lower_bound(count, n, alpha), sigma)
    return {
        "prediction": None if radius is None else chosen,
        "count": count,
        "n0": n0,
        "n": n,
        "alpha": alpha,
        "sigma": sigma,
        "radius_l2": 0.0 if radius is None else radius,
    }


def _design(config: CertifyConfig, sigma: float, num_values: int) -> SequentialDesign | None:
    match config.method:
        case FixedMethod():
            return None
        case SequentialMethod(looks=looks, early_share=early_share, futility=futility):
            return design_looks(
                config.grid(num_values),
                sigma=sigma,
                n=config.n,
                alpha=config.alpha,
                looks=looks,
                early_share=early_share,
                futility=futility,
            )
