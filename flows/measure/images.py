"""The images that a model is measured on: those of its own run, or any others."""

import re
from pathlib import Path
from typing import Any

from flows.console import work_here
from flows.measure.subject import Subject, input_of
from flows.plan import derive_stage
from flows.settings import Settings
from proxyrob.config import DigitsSource, NpzSource, ParquetSource, SourceConfig, load_config, preset_names
from proxyrob.config.source import Cifar2Source, Cifar10Source, Cifar100Source, CifarSource, FileSource, FolderSource
from proxyrob.source import (
    ImageSubset,
    fingerprint_test,
    pin_source,
    prepare_source,
    read_test_images,
    source_report,
    take_test_images,
)
from proxyrob.storage import Stage

CIFAR = {"cifar10": Cifar10Source, "cifar100": Cifar100Source, "cifar2": Cifar2Source}
OWN = {"parquet": ParquetSource, "folder": FolderSource, "npz": NpzSource}


def parse_source(name: str, path: str | None) -> SourceConfig:
    """The source of ``--source`` and ``--path``: that of a preset or YAML file, a data set by its name, or files.

    Raises ``ValueError`` saying what is expected.
    """
    if name in preset_names() or name.endswith((".yaml", ".yml")):
        config = load_config(name).source
        if path is None:
            return config
        if not isinstance(config, CifarSource):
            raise ValueError(f"--path {path} has no effect on the {config.kind} of {name}; leave it out")
        return _cifar(type(config), path)
    if name in CIFAR:
        return _cifar(CIFAR[name], path)
    if name == "digits" and path is None:
        return DigitsSource()
    if name in OWN:
        if path is None:
            raise ValueError(f"--source {name} needs --path: where the test images lie")
        slug = re.sub(r"[^a-z0-9]+", "-", Path(path).stem.lower()).strip("-") or "images"
        return OWN[name](name=slug, train=path, test=path)
    known = ", ".join(["digits", *CIFAR, *OWN])
    raise ValueError(f"--source: expected {known}, a preset or a YAML file, got {name!r}")


def find_images(
    subject: Subject, settings: Settings, *, source: str | None, path: str | None, count: int | None, subset_seed: int | None
) -> Stage:
    """A finished source whose test split is what the subject is to be measured on.

    Raises ``ValueError`` when nobody says which images, when there are fewer than asked for, or when a file does not fit,
    and ``OSError`` when files are not there.
    """
    if subset_seed is not None and count is None:
        raise ValueError(f"--subset-seed {subset_seed} draws some of the images; say how many: --images N")
    subset = ImageSubset(count=count, seed=subset_seed)
    if source is None:
        if path is not None:
            raise ValueError(f"--path {path} has no effect without --source; say what it holds, e.g. --source cifar10")
        if subject.source is None:
            raise ValueError(
                f"{subject.title} does not say on which images it is to be measured; say it, e.g. --source cifar10, or "
                "--source cifar10 --path FILE"
            )
        return _subset_of(subject.source, subset, settings)
    config = parse_source(source, path)
    if not isinstance(config, DigitsSource) and config.files is not None:
        return _from_files(config, subset, settings)
    whole = derive_stage(settings.store, subject.seed, "source", (), pin_source(config))
    if not whole.is_whole():
        given: dict[str, Any] = {"config": config, "seed": subject.seed, "downloads": settings.downloads}
        work_here(prepare_source, "source", stage=whole, **given)
    return _subset_of(whole, subset, settings)


def dataset_of(stage: Stage) -> str:
    """What data set a source or some images of one are of, by name."""
    for part, leaf in stage.configuration.items():
        if part.endswith("Source"):
            return leaf["values"].get("name") or leaf["values"]["kind"]
    source = input_of(stage, "source")
    return "an unknown source" if source is None else dataset_of(source)


def _cifar(kind: type[CifarSource], path: str | None) -> Any:
    if path is None:
        return kind()
    place = Path(path)
    return kind(path=path) if place.is_dir() else kind(path=str(place.parent), test_file=place.name)


def _from_files(config: FileSource, subset: ImageSubset, settings: Settings) -> Stage:
    sha256 = fingerprint_test(config)
    about = {"test": sha256, "subset": subset.model_dump()}
    stage = derive_stage(settings.store, 0, "images", (), config.replace(sha256=None), **about)
    work_here(read_test_images, "images", config=config, subset=subset, sha256=sha256, stage=stage)
    return stage


def _subset_of(source: Stage, subset: ImageSubset, settings: Settings) -> Stage:
    total = source_report(source).num_test
    subset.rows(total)  # refuses more than there are, before any work
    if subset.identify(total) == "all":
        return source
    stage = derive_stage(settings.store, 0, "images", (source,), subset=subset.model_dump())
    work_here(take_test_images, "images", subset=subset, source=source, stage=stage)
    return stage
