"""Attacks on a smoothed classifier: they bound from above what certificates bound from below.

A smoothed classifier and the network it is made of are two classifiers: what breaks one says nothing of the other.
"""

import numpy as np
import pandas as pd
import pyarrow as pa
import torch
from jaxtyping import Int64
from scipy import stats
from torch.nn import functional as F

from proxyrob.attacks import attack_pgd
from proxyrob.certify.votes import count_votes_of_several
from proxyrob.config.certify import SmoothAttackConfig
from proxyrob.intervals import Measured, measure_share
from proxyrob.models import FoldedCopy, hash_inputs, in_pieces, load_model
from proxyrob.rng import Streams
from proxyrob.source import read_rows, read_split, source_report
from proxyrob.storage import DataPlace, Report, Stage
from proxyrob.storage.files import read_frame, read_header, write_table
from proxyrob.storage.shared import SharedTables, finish_once
from proxyrob.threat import Threat
from proxyrob.train.smoothing import Smoothed, draw_noise
from proxyrob.types import OnProgress, no_progress

ATTACKED = "attacked.parquet"


class SmoothAttackHeader(Report):
    """Under which conditions a smoothed classifier was attacked."""

    norm: str
    epsilon: str
    sigma: float
    n: int
    alpha: float
    precision: str
    seed: int
    split: str
    model: str
    data_sha256: str


class SmoothAttackReport(Report):
    """The share of images that withstood the attack: all but those for which another class is shown to be predicted."""

    attacked: Measured


def attack_smoothed_classifier(
    config: SmoothAttackConfig,
    *,
    sigma: float,
    threat: Threat,
    source: Stage,
    model: Stage,
    seed: int,
    stage: Stage,
    device: str = "cpu",
    on_progress: OnProgress = no_progress,
) -> SmoothAttackReport:
    """Attack the smoothed classifier on the first ``config.num_images`` test images and write ``attacked.parquet``.

    PGD maximises the loss of the average prediction under noise that is drawn once (Salman et al. 2019). The attacked image
    is judged on ``n`` fresh samples by PREDICT (Cohen et al. 2019), which may abstain. A row has ``index``, ``label``,
    ``prediction`` (null where abstained), ``count`` of the label among ``n``, and ``distance_l2`` of the attacked image.
    Any number of workers may do this at once, batch by batch; what is done is not done again after a kill.

    Randomness: ``certify/attack`` by batch, ``certify/judge`` by image.
    """
    return finish_once(
        stage,
        SmoothAttackReport,
        lambda started: _attack(config, sigma, threat, source, model, seed, stage, device, on_progress, started),
    )


def _attack(
    config: SmoothAttackConfig,
    sigma: float,
    threat: Threat,
    source: Stage,
    model: Stage,
    seed: int,
    stage: Stage,
    device: str,
    on_progress: OnProgress,
    started: float,
) -> SmoothAttackReport:
    streams = Streams(seed)
    split, in_whole = read_split(source, "test").first(config.num_images), read_rows(source)
    images, labels = split.images.to(device), split.targets.to(device)
    classifier = load_model(model, device)
    network = in_pieces(FoldedCopy(classifier, getattr(torch, config.precision), example=images[:2]))
    about = {
        "attack": config.dump(),
        "sigma": sigma,
        "norm": threat.norm,
        "epsilon": str(threat.epsilon),
        "seed": seed,
        **hash_inputs(classifier, split.images, split.targets),
    }
    work = SharedTables(DataPlace.of(stage.scratch / "attacked"), about, stage.is_whole)
    size = max(1, config.batch_size // config.num_noise)
    units = {f"images-{start:06d}": slice(start, min(start + size, len(split))) for start in range(0, len(split), size)}

    def attack_some(name: str) -> pa.Table:
        rows = units[name]
        x, y = images[rows], labels[rows]
        generator = streams.torch("certify/attack", device, batch=rows.start)
        attacked = attack_pgd(
            Smoothed(network, sigma * draw_noise(x, generator, config.num_noise)),
            x,
            lambda log_probabilities: F.nll_loss(log_probabilities, y, reduction="sum"),
            threat,
            steps=config.steps,
            relative_step=config.relative_step,
            generator=generator,
            start=x,
        )
        judges = [streams.torch("certify/judge", device, image=int(row)) for row in in_whole[rows]]
        votes = count_votes_of_several(network, attacked, sigma, config.n, config.batch_size, judges)
        table = pd.DataFrame(
            {
                "index": in_whole[rows],
                "label": split.labels[rows],
                "prediction": pd.array([predict(row, config.alpha) for row in votes.cpu().numpy()], dtype="Int64"),
                "count": votes.gather(1, y[:, None]).squeeze(1).cpu().numpy(),
                "n": config.n,
                "distance_l2": (attacked.double() - x.double()).flatten(1).norm(dim=1).cpu().numpy(),
            }
        )
        return pa.Table.from_pandas(table, preserve_index=False)

    def tell(done: set[str]) -> bool:
        on_progress(sum(units[name].stop - units[name].start for name in done), len(split))
        return False

    work.tabulate(list(units), attack_some, tell)
    table = work.join(list(units))
    header = SmoothAttackHeader(
        norm=threat.norm,
        epsilon=str(threat.epsilon),
        sigma=sigma,
        n=config.n,
        alpha=config.alpha,
        precision=config.precision,
        seed=seed,
        split="test",
        model=model.digest,
        data_sha256=source_report(source).content_sha256,
    )
    broken = (table.prediction != table.label).fillna(False)

    def conclude() -> SmoothAttackReport:
        write_table(stage.folder / ATTACKED, table, header.model_dump(mode="json"))
        report = SmoothAttackReport(attacked=measure_share(len(table) - int(broken.sum()), len(table)))
        return stage.finish(report, [ATTACKED], started)

    return work.conclude(conclude)


def predict(votes: Int64[np.ndarray, " k"], alpha: float) -> int | None:
    """Algorithm PREDICT (Cohen et al. 2019): the class of the smoothed classifier, wrong with probability alpha at most.

    ``None`` where the two classes with most votes are not shown to differ, by the exact two-sided binomial test.
    """
    second, first = np.argsort(votes, kind="stable")[-2:]
    test = stats.binomtest(int(votes[first]), int(votes[first] + votes[second]), 0.5)
    return int(first) if test.pvalue <= alpha else None


def read_attacks(stage: Stage) -> tuple[pd.DataFrame, SmoothAttackHeader]:
    """A finished table of attacked images and the conditions it was made under, hash checked."""
    path = stage.verified(ATTACKED)
    return read_frame(path, stage.remedy), read_header(path, SmoothAttackHeader, stage.remedy)
