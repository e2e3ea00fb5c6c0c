"""Side tables: what a labeler says of each image of a set, beside shards that are never rewritten."""

import hashlib
import io
import json
from collections.abc import Iterable
from typing import Any

import numpy as np
import pandas as pd
from pydantic import ValidationError

from proxyrob.errors import DataIntegrityError
from proxyrob.shards.manifest import Sha256, ShardManifest, ShardName, Whole
from proxyrob.storage import DataPlace, Report
from proxyrob.storage.bounded import as_frame, first_fault, open_table, parse_json, read_table

INDEX = "index.json"
INDEX_VERSION = 1
REMEDY = "delete it and label again"
GIVEN_LABELS = "given"
"""Where the labels of a published set lie, below ``labels/``."""


class SideEntry(Report):
    """The table of one shard: one row per image, columns ``id, label, kept, reason`` and more."""

    name: ShardName
    num_images: Whole
    kept_per_class: tuple[Whole, ...]
    dropped_per_class: tuple[Whole, ...]
    size_bytes: Whole
    sha256: Sha256

    @property
    def key(self) -> str:
        """The table's file."""
        return f"{self.name}.parquet"

    @property
    def num_kept(self) -> int:
        return sum(self.kept_per_class)


class SideIndex(Report):
    """Which tables there are, of which images, by which labeler. It is written last."""

    version: int
    images_sha256: str
    labeler: dict[str, Any]
    class_names: tuple[str, ...]
    tables: tuple[SideEntry, ...]

    @property
    def num_images(self) -> int:
        return sum(table.num_images for table in self.tables)

    @property
    def kept_per_class(self) -> tuple[int, ...]:
        return tuple(int(count) for count in np.sum([table.kept_per_class for table in self.tables], axis=0))

    @property
    def dropped_per_class(self) -> tuple[int, ...]:
        return tuple(int(count) for count in np.sum([table.dropped_per_class for table in self.tables], axis=0))


def write_side_table(place: DataPlace, name: str, table: pd.DataFrame) -> None:
    """Store the table of the shard ``name``; one that is there already is left as it is."""
    content = io.BytesIO()
    table.to_parquet(content, index=False)
    place.open().write(f"{name}.parquet", content.getvalue())


def write_side_index(
    place: DataPlace, manifest: ShardManifest, labeler: dict[str, Any], class_names: Iterable[str]
) -> SideIndex:
    """Describe the tables (``describe_tables``) and write the index, after which they count as finished."""
    index = describe_tables(place, manifest, labeler, class_names)
    store_index(place, index)
    return index


def store_index(place: DataPlace, index: SideIndex) -> None:
    """Write the index, after which its tables count as finished."""
    content = json.dumps(index.model_dump(mode="json"), allow_nan=False) + "\n"
    place.open().write(INDEX, content.encode(), replace=True)


def describe_tables(
    place: DataPlace, manifest: ShardManifest, labeler: dict[str, Any], class_names: Iterable[str]
) -> SideIndex:
    """Read every table once, check that it fits its shard, and count it.

    Raises ``DataIntegrityError`` when a table does not belong to its shard or has a label outside the classes, naming the
    file and the row.
    """
    store, names = place.open(), tuple(class_names)
    entries = []
    for shard in manifest.shards:
        content = store.read(f"{shard.name}.parquet")
        where = f"{place.uri}/{shard.name}.parquet"
        table = as_frame(read_table(content, where, REMEDY, ["id", "label", "kept"]), where, REMEDY)
        if len(table) != shard.num_images or not np.array_equal(table.id, shard.first_id + np.arange(shard.num_images)):
            raise DataIntegrityError(
                f"{where} has labels for {len(table)} images, not for images {shard.first_id} to "
                f"{shard.first_id + shard.num_images - 1} in order; {REMEDY}"
            )
        if (wrong := np.flatnonzero((table.label < 0) | (table.label >= len(names)))).size:
            row = int(wrong[0])
            raise DataIntegrityError(
                f"{where}, row {row}: label {table.label[row]} is outside the {len(names)} classes 0 to {len(names) - 1}"
            )
        kept = np.bincount(table.label[table.kept], minlength=len(names))
        dropped = np.bincount(table.label[~table.kept], minlength=len(names))
        entries.append(
            SideEntry(
                name=shard.name,
                num_images=len(table),
                kept_per_class=tuple(int(count) for count in kept),
                dropped_per_class=tuple(int(count) for count in dropped),
                size_bytes=len(content),
                sha256=hashlib.sha256(content).hexdigest(),
            )
        )
    return SideIndex(
        version=INDEX_VERSION,
        images_sha256=manifest.sha256,
        labeler=labeler,
        class_names=names,
        tables=tuple(entries),
    )


def read_side_index(place: DataPlace, manifest: ShardManifest) -> SideIndex:
    """The index of side tables that belong to the images of ``manifest``.

    Raises ``DataIntegrityError`` when there is none, it cannot be read, or it does not belong to these images.
    """
    where = f"{place.uri}/{INDEX}"
    try:
        content = parse_json(place.open().read(INDEX), where, REMEDY)
        version = content.get("version", INDEX_VERSION) if isinstance(content, dict) else INDEX_VERSION
        if version != INDEX_VERSION:
            raise DataIntegrityError(
                f"{where} has version {version}, this program reads version {INDEX_VERSION}; upgrade proxyrob"
            )
        index = SideIndex.model_validate(content)
    except FileNotFoundError as error:
        raise DataIntegrityError(f"{place.uri} holds no finished labels ({INDEX} is missing); label again") from error
    except ValidationError as error:
        raise DataIntegrityError(f"{where} cannot be read ({first_fault(error)}); {REMEDY}") from error
    if index.images_sha256 != manifest.sha256:
        raise DataIntegrityError(f"{where} has labels for other images than those it lies beside; {REMEDY}")
    named, wanted = ([(entry.name, entry.num_images) for entry in entries] for entries in (index.tables, manifest.shards))
    if named != wanted:
        raise DataIntegrityError(f"{where} names other tables than there are shards; {REMEDY}")
    return index


def read_side_table(place: DataPlace, entry: SideEntry, columns: list[str] | None = None) -> pd.DataFrame:
    """One side table, its hash checked; ``columns`` are those to read, or all.

    Raises ``DataIntegrityError`` when it is missing or altered, and ``ValueError`` when it lacks a column.
    """
    remedy = f"delete {place.uri}/{entry.key} and {place.uri}/{INDEX} and label again"
    path = place.file(entry.key, sha256=entry.sha256, size_bytes=entry.size_bytes, remedy=remedy)
    where = str(path)
    with open_table(path, where, remedy) as file:
        names = file.schema_arrow.names
    if columns is not None and (missing := set(columns) - set(names)):
        raise ValueError(f"{path} has no column {', '.join(sorted(missing))}; it has {', '.join(names)}")
    table = as_frame(read_table(path, where, remedy, columns), where, remedy)
    if len(table) != entry.num_images:
        raise DataIntegrityError(f"{path} has labels for {len(table)} images, not for {entry.num_images}; {remedy}")
    return table
