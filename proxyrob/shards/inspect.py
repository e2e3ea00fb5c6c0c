"""What sets of images a place holds, and whether every byte of them is as it was written."""

import hashlib
import tempfile
from pathlib import Path
from typing import Literal

import pandas as pd

from proxyrob.errors import DataIntegrityError
from proxyrob.shards.manifest import MANIFEST, ShardManifest, read_manifest
from proxyrob.shards.side import INDEX, SideIndex, read_side_index, read_side_table
from proxyrob.storage import DataPlace, Report
from proxyrob.types import OnProgress, no_progress

FileState = Literal["whole", "missing", "damaged"]


class FoundSet(Report):
    """A set of images at a place; ``manifest`` is ``None`` while its shards are still being made."""

    name: str
    num_shards: int
    size_bytes: int
    manifest: ShardManifest | None
    labels: tuple[str, ...]


class FileFinding(Report):
    """A file that is not as the manifest or index says."""

    key: str
    state: FileState
    expected_sha256: str


class VerifyReport(Report):
    """Every file of a set, read and hashed."""

    num_files: int
    size_bytes: int
    findings: tuple[FileFinding, ...]


def find_sets(place: DataPlace) -> list[FoundSet]:
    """All sets at a place, by name (the folder of their shards, seen from the place).

    Raises what the store raises.
    """
    shards: dict[str, list[int]] = {}
    manifests, labels = set[str](), dict[str, list[str]]()
    for found in place.open().list():
        folder, _, file = found.key.rpartition("/")
        if file == MANIFEST:
            manifests.add(folder)
        elif file.startswith("shard-") and file.endswith(".npy"):
            shards.setdefault(folder, []).append(found.size_bytes)
        elif file == INDEX and "/labels/" in f"/{folder}":
            of, _, name = f"/{folder}".rpartition("/labels/")
            labels.setdefault(of.removeprefix("/"), []).append(name)
    return [
        FoundSet(
            name=name,
            num_shards=len(sizes),
            size_bytes=sum(sizes),
            manifest=read_manifest(at(place, name)) if name in manifests else None,
            labels=tuple(sorted(labels.get(name, ()))),
        )
        for name, sizes in sorted(shards.items())
    ]


def is_complete(images: DataPlace, labels: DataPlace | None = None) -> bool:
    """Whether every shard of a set (or, with ``labels``, every side table) is there with its recorded size.

    One listing of the store; nothing is read but the manifest and the index.
    """
    try:
        manifest = read_manifest(images)
        entries = manifest.shards if labels is None else read_side_index(labels, manifest).tables
    except DataIntegrityError:
        return False
    sizes = {found.key: found.size_bytes for found in (images if labels is None else labels).open().list("shard-")}
    return all(sizes.get(entry.key) == entry.size_bytes for entry in entries)


def at(place: DataPlace, name: str) -> DataPlace:
    """Where the set ``name`` of a place lies; the place itself where the name is empty."""
    return place.below(name) if name else place


def count_reasons(labels: DataPlace, index: SideIndex) -> pd.Series:
    """How many images there are for each reason to keep or drop them."""
    columns = ["kept", "reason"]
    return pd.concat([read_side_table(labels, table, columns) for table in index.tables]).value_counts(sort=True)


def verify_set(place: DataPlace, labels: tuple[str, ...], *, on_progress: OnProgress = no_progress) -> VerifyReport:
    """Read every shard of a set, and the side tables of ``labels``, from the store itself and compare all hashes.

    Raises ``DataIntegrityError`` when the manifest or an index cannot be read.
    """
    manifest = read_manifest(place)
    files = [(shard.key, shard.size_bytes, shard.sha256) for shard in manifest.shards]
    for name in labels:
        tables = read_side_index(place.below(f"labels/{name}"), manifest).tables
        files += [(f"labels/{name}/{table.key}", table.size_bytes, table.sha256) for table in tables]
    total = sum(size for _, size, _ in files)
    findings, done = [], 0
    for key, size, sha256 in files:
        state = _state(place, key, sha256, size)
        if state != "whole":
            findings.append(FileFinding(key=key, state=state, expected_sha256=sha256))
        done += size
        on_progress(done, total)
    return VerifyReport(num_files=len(files), size_bytes=total, findings=tuple(findings))


def _state(place: DataPlace, key: str, sha256: str, size_bytes: int) -> FileState:
    store = place.open()
    local = store.local_path(key)
    try:
        if local is not None:
            with local.open("rb") as file:
                return "whole" if hashlib.file_digest(file, "sha256").hexdigest() == sha256 else "damaged"
        with tempfile.TemporaryDirectory() as folder:
            store.download(key, Path(folder) / "content", sha256=sha256, size_bytes=size_bytes)
    except FileNotFoundError:
        return "missing"
    except DataIntegrityError:
        return "damaged"
    return "whole"
