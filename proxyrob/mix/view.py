"""Synthetic images on disk or S3, seen through a filter: read row by row, in flat memory."""

import math
import os
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from jaxtyping import Bool, Int32, Int64, UInt8

from proxyrob.config.subset import SubsetConfig
from proxyrob.errors import DataIntegrityError
from proxyrob.mix.order import WINDOW, Window, WindowOrder
from proxyrob.rng import Streams
from proxyrob.shards import (
    MANIFEST,
    ShardEntry,
    SideEntry,
    read_manifest,
    read_shard,
    read_side_index,
    read_side_table,
    shard_file,
)
from proxyrob.shares import share_out
from proxyrob.storage import DataPlace

REMOTE_READERS = 8  # objects under way at a time
LOCAL_READERS = 2  # of a folder: the system reads ahead by itself, and every thread keeps memory of its own
CONFIDENCES = ("first_confidence", "second_confidence")


@dataclass(frozen=True)
class SyntheticSet:
    """Images and side tables of one proxy, and how much of the synthetic part of a batch is drawn from it."""

    images: DataPlace
    labels: DataPlace
    weight: float = 1.0
    name: str = "synthetic"


@dataclass(frozen=True)
class _Loaded:
    """A window's images, open, in the order they are drawn in.

    An image of ``files`` is one item, which numpy copies whole; ``first_ids`` are the ids of their first images.
    """

    files: list[np.ndarray]
    first_ids: Int64[np.ndarray, " f"]
    file: Int32[np.ndarray, " m"]
    row: Int32[np.ndarray, " m"]
    labels: Int32[np.ndarray, " m"]


class SyntheticView:
    """The labelled images of a set that the filter kept and the subset chooses.

    Only the manifest and the index are read when it is opened (with a subset other than «all» the side tables too); image
    files are mapped into memory window by window, the next window being fetched and checked in the background.
    """

    def __init__(
        self,
        of: SyntheticSet,
        *,
        streams: Streams,
        path: str = "mix/synthetic",
        subset: SubsetConfig | None = None,
        window: int = WINDOW,
    ) -> None:
        """Raises ``DataIntegrityError`` when images and labels do not belong together or nothing is left to draw from."""
        self.of = of
        self.manifest = read_manifest(of.images)
        index = read_side_index(of.labels, self.manifest)
        self.class_names = index.class_names
        self._shards: list[tuple[ShardEntry, SideEntry]] = list(zip(self.manifest.shards, index.tables, strict=True))
        self._chosen = None if subset is None or subset.is_all else self._choose(subset)
        if self._chosen is None:
            counts = np.array([table.num_kept for _, table in self._shards], np.int64)
        else:
            counts = np.array([int(chosen.sum()) for chosen in self._chosen], np.int64)
        if not counts.sum():
            raise DataIntegrityError(
                f"the filter leaves none of the {self.manifest.num_images} images of {of.images.uri}; lower label.threshold "
                "or the conditions of train.subset"
            )
        self.order = WindowOrder(streams, path, counts, window)
        is_local = of.images.open().local_path(MANIFEST) is not None
        self._readers = ThreadPoolExecutor(LOCAL_READERS if is_local else REMOTE_READERS, thread_name_prefix="shards")
        self._windows: dict[tuple[int, int], Future[_Loaded]] = {}

    def __len__(self) -> int:
        return self.order.size

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(h, w, c)."""
        return self.manifest.image_shape

    def take(
        self, start: int, count: int
    ) -> tuple[UInt8[np.ndarray, "n h w c"], Int64[np.ndarray, " n"], Int64[np.ndarray, " n"]]:
        """Images, labels and image ids at the positions from ``start`` on, across the ends of epochs.

        Raises ``DataIntegrityError`` when a file is missing or damaged, and what the store raises.
        """
        images = np.empty((count, *self.image_shape), np.uint8)
        labels, ids = np.empty(count, np.int64), np.empty(count, np.int64)
        done = 0
        for window, first, number in self.order.pieces(start, count):
            loaded = self._loaded(window)
            here, there = slice(done, done + number), slice(first, first + number)
            file, row = loaded.file[there], loaded.row[there]
            labels[here], ids[here] = loaded.labels[there], loaded.first_ids[file] + row
            _gather(loaded.files, file, row, images[here])
            done += number
        return images, labels, ids

    def close(self) -> None:
        """Stop fetching; what is under way ends first."""
        self._readers.shutdown(cancel_futures=True)

    def _loaded(self, window: Window) -> _Loaded:
        """The window, and the one after it under way."""
        following = self._following(window)
        wanted = [window, following] if len(self._shards) > 1 else [window]
        keys = {(entry.epoch, entry.number): entry for entry in wanted}
        for key in [key for key in self._windows if key not in keys]:
            del self._windows[key]
        for key, entry in keys.items():
            if key not in self._windows:
                self._windows[key] = self._start(entry)
        return self._windows[window.epoch, window.number].result()

    def _following(self, window: Window) -> Window:
        """The window after ``window``."""
        windows = self.order.windows(window.epoch)
        if window.number + 1 < len(windows):
            return windows[window.number + 1]
        return self.order.windows(window.epoch + 1)[0]

    def _start(self, window: Window) -> "Future[_Loaded]":
        parts = [self._readers.submit(self._open, int(number)) for number in window.parts]
        return self._readers.submit(self._join, window, parts)  # when its turn comes, all parts are under way

    def _open(self, number: int) -> "_Part":
        shard, table = self._shards[number]
        rows = read_side_table(self.of.labels, table, ["label", "kept"])
        chosen = rows.kept.to_numpy() if self._chosen is None else self._chosen[number]
        kept = np.flatnonzero(chosen)
        _read_ahead(shard_file(self.of.images, shard))  # fetched and checked beside others
        images = read_shard(self.of.images, shard, self.image_shape, mapped=True)
        labels = rows.label.to_numpy()[kept].astype(np.int32)
        return _Part(_whole_images(images), shard.first_id, kept.astype(np.int32), labels)

    def _join(self, window: Window, opened: "list[Future[_Part]]") -> _Loaded:
        parts = [part.result() for part in opened]
        order = self.order.permutation(window)
        sizes = [len(part.rows) for part in parts]
        return _Loaded(
            [part.images for part in parts],
            np.array([part.first_id for part in parts], np.int64),
            np.repeat(np.arange(len(parts), dtype=np.int32), sizes)[order],
            np.concatenate([part.rows for part in parts])[order],
            np.concatenate([part.labels for part in parts])[order],
        )

    def _choose(self, subset: SubsetConfig) -> list[Bool[np.ndarray, " n"]]:
        """Which rows of each shard the subset leaves."""
        columns = ["label", "kept", *(CONFIDENCES if subset.min_confidence else ()), *((subset.score,) if subset.score else ())]
        columns = list(dict.fromkeys(columns))  # the score may be a confidence
        tables = [read_side_table(self.of.labels, table, columns) for _, table in self._shards]
        table = pd.concat(tables, ignore_index=True)
        chosen = table.kept.to_numpy().copy()
        if subset.min_confidence:
            chosen &= table[list(CONFIDENCES)].max(axis=1).to_numpy() >= subset.min_confidence
        ranks = np.arange(len(table))
        if subset.score is not None:
            if not pd.api.types.is_numeric_dtype(table[subset.score]):
                raise ValueError(
                    f"{self.of.labels.uri}: column {subset.score!r} holds {table[subset.score].dtype}, expected numbers to "
                    "rank images by; set train.subset.score to another column"
                )
            score = table[subset.score].to_numpy(np.float64)
            if (wrong := np.flatnonzero(~np.isfinite(score) & chosen)).size:
                raise DataIntegrityError(f"{self.of.labels.uri}: image {wrong[0]} has score {score[wrong[0]]}")
            ranks = np.lexsort((np.arange(len(table)), -score)).argsort()
            places = np.flatnonzero(chosen)
            worst = places[np.argsort(ranks[places])][round(subset.top_share * len(places)) :]
            chosen[worst] = False
        if subset.per_class is not None:
            for label in range(len(self.class_names)):
                places = np.flatnonzero(chosen & (table.label.to_numpy() == label))
                if len(places) < subset.per_class:
                    raise DataIntegrityError(
                        f"class {self.class_names[label]} has {len(places)} images to choose from, fewer than "
                        f"train.subset.per_class={subset.per_class}; lower it or sample more images"
                    )
                chosen[places[np.argsort(ranks[places])][subset.per_class :]] = False
        return np.split(chosen, np.cumsum([len(part) for part in tables])[:-1])


@dataclass(frozen=True)
class _Part:
    """One shard's chosen rows."""

    images: np.ndarray
    first_id: int
    rows: Int32[np.ndarray, " m"]
    labels: Int32[np.ndarray, " m"]


def _whole_images(images: UInt8[np.ndarray, "n h w c"]) -> np.ndarray:
    """The same memory as a plain array with one item per image."""
    plain = images.view(np.ndarray)  # numpy's own class for mapped files takes time at every access
    size = math.prod(plain.shape[1:])
    return plain.reshape(len(plain), size).view(f"V{size}")[:, 0]


def _read_ahead(path: Path) -> None:
    """Ask the system to read a file that is about to be read in random places; it does nothing to one in memory."""
    if hasattr(os, "posix_fadvise"):  # not on macOS
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_WILLNEED)


def _gather(
    files: list[np.ndarray], file: Int32[np.ndarray, " n"], row: Int32[np.ndarray, " n"], out: UInt8[np.ndarray, "n h w c"]
) -> None:
    """Copy the chosen rows out of the mapped files, file by file."""
    order = np.argsort(file, kind="stable")
    rows = row[order]
    numbers, begins = np.unique(file[order], return_index=True)
    gathered = np.empty(len(file), files[0].dtype)
    for number, begin, end in zip(numbers.tolist(), begins.tolist(), [*begins[1:].tolist(), len(file)], strict=True):
        files[number].take(rows[begin:end], out=gathered[begin:end], mode="clip")  # in other modes numpy buffers the output
    _whole_images(out)[order] = gathered


def split_count(count: int, weights: Iterable[float]) -> tuple[int, ...]:
    """The images of a batch that each set gives, in proportion to its weight.

    Raises ``ValueError`` when a set would give none.
    """
    shares = np.array(list(weights), np.float64)
    parts = share_out(count, shares)
    if (parts == 0).any():
        raise ValueError(
            f"{count} synthetic images in a batch cannot be split by the weights {tuple(shares.tolist())}: a set would get "
            "none; use a larger batch or synthetic_fraction, or fewer sets"
        )
    return tuple(int(part) for part in parts)
