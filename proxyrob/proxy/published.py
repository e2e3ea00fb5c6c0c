"""Published sample sets: imported into shards once, then used like our own."""

import hashlib
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Int64, UInt8

from proxyrob.config.proxy import MixtureProxy, ProxyConfig, PublishedProxy
from proxyrob.errors import DataIntegrityError
from proxyrob.proxy.sampling import SamplesReport, count_all_constant, count_constant
from proxyrob.shards import (
    GIVEN_LABELS,
    ShardManifest,
    describe_shards,
    read_manifest,
    shard_name,
    write_manifest,
    write_shard,
    write_side_index,
    write_side_table,
)
from proxyrob.source import source_report
from proxyrob.source.fingerprint import fingerprint
from proxyrob.source.formats import ImageFile, Rows, open_images
from proxyrob.storage import DataPlace, Report, Stage
from proxyrob.storage.bounded import parse_json, read_table
from proxyrob.types import OnProgress, no_progress

SHARD_SIZE = 10_000
ORIGIN = "import.json"
GIVEN_REASON = "given with the images"
HASHED_BYTES = 1 << 20


class ImportReport(Report):
    """An imported set. ``class_counts`` is empty where the images came without labels."""

    num_images: int
    num_shards: int
    image_shape: tuple[int, int, int]
    class_counts: tuple[int, ...]
    constant_images: int
    sha256: str


def import_samples(
    path: Path,
    place: DataPlace,
    *,
    labels: Path | None = None,
    image_shape: tuple[int, int, int] | None = None,
    num_classes: int | None = None,
    sha256: str | None = None,
    shard_size: int = SHARD_SIZE,
    on_progress: OnProgress = no_progress,
) -> ImportReport:
    """Cut the images of a file or folder (``proxyrob.source.formats``) into shards at ``place``, with their labels beside.

    Streams: no more than one shard is in memory. Goes on where an interrupted import ended. ``image_shape`` is (h, w, c);
    ``num_classes`` says how many classes there are where the file does not name them (without it the largest label does).
    ``sha256`` is the published hash of the file, compared before anything is written: it alone tells a file of the right
    size whose images were put into another order.

    Raises ``DataIntegrityError`` with file and row when something does not fit (before anything is written where a header
    tells), and when the place holds another set or an interrupted import of another file.
    """
    file = open_images(path, labels=labels, image_shape=image_shape)
    if sha256 is not None and (found := fingerprint(path)) != sha256.lower():
        raise DataIntegrityError(
            f"{path} is not the file that was published: expected sha256 {sha256}, got {found}; fetch it again"
        )
    if not file.num_images:
        raise DataIntegrityError(f"{path} holds no images; there is nothing to import")
    origin = _describe(path, labels, file, shard_size)
    _claim(place, origin)
    given = place.below(f"labels/{GIVEN_LABELS}")
    firsts = range(0, file.num_images, shard_size)
    finished = 0
    while finished < len(firsts) and place.open().stat(f"{shard_name(finished)}.npy") is not None:
        finished += 1
    done = min(finished * shard_size, file.num_images)
    on_progress(done, file.num_images)
    counted: dict[str, int] = {}
    known = len(file.class_names) if file.class_names else num_classes
    if done < file.num_images:
        for number, (images, classes) in enumerate(_recut(file.read(done), shard_size), start=finished):
            if classes is not None:  # before the images: where there are images there are labels
                _require_classes(classes, known, labels or path, done)
                table = {"id": done + np.arange(len(classes)), "label": classes, "kept": True, "reason": GIVEN_REASON}
                write_side_table(given, shard_name(number), pd.DataFrame(table))
            if images.max() == 1:
                raise DataIntegrityError(
                    f"{path}, rows {done} to {done + len(images) - 1}: every value is 0 or 1, but pixels range from 0 to 255; "
                    "were the images scaled to [0,1] before they were rounded?"
                )
            counted[shard_name(number)] = count_constant(images)
            write_shard(place, shard_name(number), images)
            done += len(images)
            on_progress(done, file.num_images)
    manifest = describe_shards(
        place,
        shards=[(shard_name(k), first, min(shard_size, file.num_images - first)) for k, first in enumerate(firsts)],
        image_shape=file.image_shape,
        generator=f"published: {path.name}",
        source_sha256="",
        sampler=origin,
        seed=0,
    )
    write_manifest(place, manifest)
    counts: tuple[int, ...] = ()
    if file.has_labels:
        names = file.class_names or tuple(str(k) for k in range(known or _count_classes(given, manifest)))
        counts = write_side_index(given, manifest, {"rule": "given", "from": path.name}, names).kept_per_class
    return ImportReport(
        num_images=manifest.num_images,
        num_shards=len(manifest.shards),
        image_shape=manifest.image_shape,
        class_counts=counts,
        constant_images=count_all_constant(place, manifest, counted),
        sha256=manifest.sha256,
    )


def pin_proxy(proxy: ProxyConfig | None, sets: DataPlace) -> ProxyConfig | None:
    """Fill in the identity of every published set, which lie by name below ``sets``.

    Raises ``DataIntegrityError`` when a set is not there, is unfinished, or is another than the configuration says.
    """
    match proxy:
        case PublishedProxy():
            try:
                manifest = read_manifest(sets.below(proxy.name))
            except DataIntegrityError as error:
                raise DataIntegrityError(f"{error}: proxyrob import FILE --name {proxy.name}") from error
            if proxy.sha256 not in (None, manifest.sha256):
                raise DataIntegrityError(
                    f"the set {proxy.name!r} is not the one this configuration was made for: expected sha256 {proxy.sha256}, "
                    f"got {manifest.sha256}; import that one, or take proxy.sha256 out"
                )
            return proxy.replace(sha256=manifest.sha256, num_images=manifest.num_images)
        case MixtureProxy():
            return proxy.replace(parts=tuple(part.replace(proxy=pin_proxy(part.proxy, sets)) for part in proxy.parts))
        case _:
            return proxy


def adopt_samples(
    config: PublishedProxy,
    *,
    source: Stage,
    images: DataPlace,
    stage: Stage,
    on_progress: OnProgress = no_progress,
) -> SamplesReport:
    """Check that a published set is the configured one and fits the real images.

    Raises ``DataIntegrityError`` when it does not.
    """
    if (report := stage.finished(SamplesReport)) is not None:
        return report
    started = time.monotonic()
    manifest, real = read_manifest(images), source_report(source)
    channels, height, width = real.image_shape
    if manifest.sha256 != config.sha256:
        raise DataIntegrityError(
            f"{images.uri} is another set than configured: expected {config.sha256}, got {manifest.sha256}"
        )
    if manifest.image_shape != (height, width, channels):
        raise DataIntegrityError(
            f"{images.uri} has images of shape {manifest.image_shape}, the real images have {(height, width, channels)}; "
            "choose a set of the same size"
        )
    constant = count_all_constant(images, manifest, {}, on_progress)
    report = SamplesReport(
        num_images=manifest.num_images,
        num_shards=len(manifest.shards),
        image_shape=real.image_shape,
        constant_images=constant,
        sha256=manifest.sha256,
    )
    return stage.finish(report, [], started)


def _describe(path: Path, labels: Path | None, file: ImageFile, shard_size: int) -> dict[str, Any]:
    """Says which file this is without reading all of it: an interrupted import must not go on with another."""
    described: dict[str, Any] = {"kind": "imported", "from": path.name, "labels": labels.name if labels else None}
    described |= {"num_images": file.num_images, "image_shape": list(file.image_shape), "shard_size": shard_size}
    if path.is_file():
        with path.open("rb") as content:
            found = hashlib.sha256(content.read(HASHED_BYTES))
            content.seek(max(0, path.stat().st_size - HASHED_BYTES))
            found.update(content.read(HASHED_BYTES))
        described |= {"size_bytes": path.stat().st_size, "sha256_of_ends": found.hexdigest()}
    return described


def _claim(place: DataPlace, origin: dict[str, Any]) -> None:
    store = place.open()
    if store.write(ORIGIN, (json.dumps(origin, indent=1) + "\n").encode()):
        return
    where = f"{place.uri}/{ORIGIN}"
    found = parse_json(store.read(ORIGIN), where, f"delete {where} and import again")
    if not isinstance(found, dict):
        raise DataIntegrityError(f"{where} does not say what was imported; delete it and import again")
    if found != origin:
        different = ", ".join(sorted(key for key in origin | found if origin.get(key) != found.get(key)))
        raise DataIntegrityError(
            f"{place.uri} holds an import of {found.get('from')} already, which differs in {different}; choose another name"
        )


def _recut(blocks: Iterator[Rows], size: int) -> Iterator[Rows]:
    """Blocks of exactly ``size`` rows; the last may be shorter."""
    images: list[UInt8[np.ndarray, "n h w c"]] = []
    labels: list[Int64[np.ndarray, " n"]] = []
    have = 0
    for pictures, classes in blocks:
        begin = 0
        while begin < len(pictures):
            end = min(len(pictures), begin + size - have)
            images.append(pictures[begin:end])
            if classes is not None:
                labels.append(classes[begin:end])
            have, begin = have + end - begin, end
            if have == size:
                yield np.concatenate(images), np.concatenate(labels) if labels else None
                images, labels, have = [], [], 0
    if have:
        yield np.concatenate(images), np.concatenate(labels) if labels else None


def _require_classes(classes: Int64[np.ndarray, " n"], num_classes: int | None, path: Path, first_row: int) -> None:
    wrong = np.flatnonzero((classes < 0) | (classes >= (num_classes or np.iinfo(np.int64).max)))
    if wrong.size:
        row = int(wrong[0])
        allowed = f"the {num_classes} classes 0 to {num_classes - 1}" if num_classes else "the classes, which begin at 0"
        raise DataIntegrityError(f"{path}, row {first_row + row}: label {classes[row]} is outside {allowed}")


def _count_classes(given: DataPlace, manifest: ShardManifest) -> int:
    """One more than the largest label."""
    store, largest = given.open(), 0
    for shard in manifest.shards:
        key = f"{shard.name}.parquet"
        table = read_table(store.read(key), f"{given.uri}/{key}", "delete it and import again", ["label"])
        largest = max(largest, int(table["label"].to_numpy().max(initial=0)))
    return largest + 1
