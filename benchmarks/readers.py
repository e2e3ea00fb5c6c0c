"""The readers that ``benchmarks/data.py`` compares, each run in a process of its own.

    PYTHONPATH=. python benchmarks/readers.py '{"reader": "npz", "case": "raw-batches", "place": …}'

prints one JSON object. Nothing of proxyrob is imported unless the reader is ours: a peer may live in an environment that
does not have it.
"""

import json
import os
import resource
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.images import IMAGE_BYTES, NUM_CLASSES, SHAPE, WRITERS, ids_in, images_of, labels_of

BATCH = 512
SHIFT = 4
SHUFFLE = 10_000  # webdataset's buffer
S3_THREADS = 8  # objects under way at a time, on both sides
AUGMENTED, RAW, S3_COLD = "augmented-batches", "raw-batches", "s3-cold"

Batch = tuple[np.ndarray, np.ndarray]
"""Images (uint8 [b, h, w, c] or float32 [b, c, h, w]) and labels."""


# ---- readers: each imports what it needs and returns what is timed, which opens the images and yields their batches

Batches = Callable[[], Iterator[Batch]]


def ours(task: dict[str, Any]) -> Batches:
    """Training's own batches; for raw bytes the view that they are made from."""
    from proxyrob.mix import Augmentation, Mix, SyntheticSet, SyntheticView
    from proxyrob.rng import Streams
    from proxyrob.source import Split
    from proxyrob.storage import DataPlace

    if task["case"] == S3_COLD:
        import proxyrob.storage.s3  # noqa: F401  (else it is imported when the first object is asked for)

    place = DataPlace(task["place"], Path(task["cache"]) if "cache" in task else None)
    of, streams = SyntheticSet(place, place.below("labels")), Streams(0)

    def raw() -> Iterator[Batch]:
        view = SyntheticView(of, streams=streams)
        for start in range(0, task["images"], BATCH):
            yield view.take(start, min(BATCH, task["images"] - start))[:2]
        view.close()

    def augmented() -> Iterator[Batch]:
        one = Split(np.zeros((1, *SHAPE), np.uint8), np.zeros(1, np.int64))  # a batch of training has a real image
        mix = Mix(
            one,
            [of],
            batch_size=1 + BATCH,
            num_synthetic=BATCH,
            gamma=0.5,
            num_classes=NUM_CLASSES,
            streams=streams,
            augmentation=Augmentation(SHIFT, flip=True),
        )
        for batch in mix.batches(0, -(-task["images"] // BATCH)):
            yield batch.images.numpy()[1:], batch.labels.numpy()[1:]
        mix.close()

    return augmented if task["case"] == AUGMENTED else raw


def textbook(task: dict[str, Any], *, in_memory: bool) -> Batches:
    """One image at a time through torchvision: read from one flat file, or cut from an array in memory."""
    from PIL import Image
    from torch.utils.data import Dataset

    folder, move = Path(task["place"]), _move()

    class Images(Dataset):
        def __init__(self) -> None:
            if in_memory:
                with np.load(folder / "images.npz") as content:
                    self.images, self.labels = content["image"], content["label"]
            else:
                self.labels = np.load(folder / "labels.npy")

        def __len__(self) -> int:
            return len(self.labels)

        def __getitem__(self, index: int) -> tuple[Any, int]:
            image = self.images[index] if in_memory else self.read(index)
            return (move(Image.fromarray(image)) if task["case"] == AUGMENTED else image), int(self.labels[index])

        def read(self, index: int) -> np.ndarray:
            with (folder / "images.bin").open("rb") as file:
                file.seek(index * IMAGE_BYTES)
                return np.frombuffer(file.read(IMAGE_BYTES), np.uint8).reshape(SHAPE).copy()

    return lambda: _loaded(task, Images(), shuffle=True)


def plain(task: dict[str, Any]) -> Batches:
    """The textbook: open a flat file, seek, read one image, transform it."""
    return textbook(task, in_memory=False)


def npz(task: dict[str, Any]) -> Batches:
    """All images loaded into memory first."""
    return textbook(task, in_memory=True)


def npz_sliced(task: dict[str, Any]) -> Batches:
    """All images loaded into memory, whole batches cut from the array: what memory allows when it is large enough."""

    def batches() -> Iterator[Batch]:
        with np.load(Path(task["place"]) / "images.npz") as content:
            images, labels = content["image"], content["label"]
        order = np.random.default_rng(0).permutation(len(labels))
        for start in range(0, len(order), BATCH):
            rows = order[start : start + BATCH]
            yield images[rows], labels[rows]

    return batches


def paper(task: dict[str, Any]) -> Batches:
    """The reader of inspire-group/proxy-distributions, from a checkout; it neither shifts nor mirrors."""
    sys.path.insert(0, task["checkout"])
    from data import SyntheticImagesDdpmCIFAR10  # pyright: ignore[reportMissingImports, reportAttributeAccessIssue]
    from torch.utils.data import Subset

    folder = Path(task["place"])

    def batches() -> Iterator[Batch]:
        images = SyntheticImagesDdpmCIFAR10(str(folder / "images.bin"), str(folder / "labels.npy"))
        return _loaded(task, Subset(images, range(len(images.labels))), shuffle=True)  # its own length is that of its set

    return batches


def mosaicml_streaming(task: dict[str, Any]) -> Batches:
    from PIL import Image
    from streaming import StreamingDataset  # pyright: ignore[reportMissingImports]  (as above)

    move = _move()

    class Images(StreamingDataset):
        def __getitem__(self, at: Any) -> tuple[Any, int]:
            found = super().__getitem__(at)
            image = move(Image.fromarray(found["image"])) if task["case"] == AUGMENTED else found["image"]
            return image, found["label"]

    local = str(Path(task["place"]) / "mds")
    return lambda: _loaded(task, Images(local=local, shuffle=True, batch_size=BATCH, shuffle_seed=0))


def webdataset(task: dict[str, Any]) -> Batches:
    from PIL import Image
    from webdataset.compat import WebDataset

    move = _move()

    def decode(found: tuple[bytes, bytes]) -> tuple[Any, int]:
        image = np.frombuffer(found[0], np.uint8).reshape(SHAPE)
        return (move(Image.fromarray(image)) if task["case"] == AUGMENTED else image.copy()), int(found[1])

    def batches() -> Iterator[Batch]:
        files = sorted(str(path) for path in (Path(task["place"]) / "tar").glob("*.tar"))
        images = WebDataset(files, shardshuffle=len(files), seed=0).shuffle(SHUFFLE).to_tuple("bin", "cls").map(decode)
        return _loaded(task, images)

    return batches


def _fetched(task: dict[str, Any], *, into_files: bool) -> Batches:
    from concurrent.futures import ThreadPoolExecutor
    from io import BytesIO

    from boto3.session import Session
    from botocore.config import Config

    bucket, _, prefix = task["place"].removeprefix("s3://").partition("/")

    def batches() -> Iterator[Batch]:
        client = Session().client("s3", config=Config(max_pool_connections=4 * S3_THREADS))
        keys = [found["Key"] for found in client.list_objects_v2(Bucket=bucket, Prefix=f"{prefix}/")["Contents"]]

        def fetch(key: str) -> bytes | Path:
            if not into_files:
                return client.get_object(Bucket=bucket, Key=key)["Body"].read()
            path = Path(task["cache"]) / key.replace("/", "-")
            client.download_file(bucket, key, str(path))
            return path

        with ThreadPoolExecutor(S3_THREADS) as pool:
            for key, content in zip(keys, pool.map(fetch, keys), strict=True):
                if key.endswith(".npy"):
                    images = np.load(BytesIO(content) if isinstance(content, bytes) else content)
                    yield images, labels_of(ids_in(images))

    return batches


def boto3_alone(task: dict[str, Any]) -> Batches:
    """Every object of the prefix into memory, on as many threads as ours has; no hash, no file, no order."""
    return _fetched(task, into_files=False)


def boto3_files(task: dict[str, Any]) -> Batches:
    """Every object of the prefix into a file, by boto3's own transfer."""
    return _fetched(task, into_files=True)


READERS: dict[str, Callable[[dict[str, Any]], Batches]] = {
    "ours": ours,
    "plain": plain,
    "paper": paper,
    "npz": npz,
    "npz-sliced": npz_sliced,
    "mosaicml-streaming": mosaicml_streaming,
    "webdataset": webdataset,
    "boto3": boto3_alone,
    "boto3, into files": boto3_files,
}


def _move() -> Callable[[Any], Any]:
    from torchvision import transforms

    crop, mirror = transforms.RandomCrop(SHAPE[0], padding=SHIFT), transforms.RandomHorizontalFlip()
    return transforms.Compose([crop, mirror, transforms.ToTensor()])


def _loaded(task: dict[str, Any], images: Any, shuffle: bool | None = None) -> Iterator[Batch]:
    """torch's own loader; with several cores it gets as many workers."""
    from torch.utils.data import DataLoader

    workers = task["threads"] if task["threads"] > 1 else 0
    for found, labels in DataLoader(images, batch_size=BATCH, shuffle=shuffle, num_workers=workers):
        yield found.numpy(), labels.numpy()


# ---- one measurement


def private_mb() -> int:
    """Private memory (RssAnon): mapped files are the system's cache and not in it."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))
    return int(line.split()[1]) // 1024


def cpu_s() -> float:
    """Seconds of computing of this process and those it has waited for."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


def measure(task: dict[str, Any]) -> dict[str, Any]:
    """Read ``images`` images or one epoch, whichever ends first; time the first batch and the rate of the others.

    With ``check`` the content is looked at too, which takes time of its own: such a run is for ``whole`` and ``exact``
    alone. ``whole``: every image came exactly once. ``exact``: labels, and unless moved bytes, are those of the images.
    """
    import torch

    torch.set_num_threads(task["threads"])
    torch.manual_seed(0)
    opened = READERS[task["reader"]](task)
    imported_mb, started, used = private_mb(), time.perf_counter(), cpu_s()
    count, most_mb, first, first_s, first_cpu_s = 0, imported_mb, 0, 0.0, 0.0
    seen: list[np.ndarray] = []
    exact = True
    for number, (images, labels) in enumerate(opened()):
        if not number:
            first, first_s, first_cpu_s = len(labels), time.perf_counter() - started, cpu_s() - used
        count += len(labels)
        if number % 16 == 0:
            most_mb = max(most_mb, private_mb())
        if task["check"]:
            ids = ids_in(images)
            seen.append(ids)
            same = images.dtype != np.uint8 or np.array_equal(images, images_of(ids))
            exact = exact and same and np.array_equal(labels, labels_of(ids))
        if count >= task["images"]:
            break
    passed, spent = time.perf_counter() - started, cpu_s() - used
    found = {
        "images": count,
        "first_s": first_s,
        "rate": (count - first) / (passed - first_s) if count > first else None,
        "cpu_rate": (count - first) / (spent - first_cpu_s) if count > first else None,
        "whole_rate": count / passed,
        "imported_mb": imported_mb,
        "private_mb": max(most_mb, private_mb()),
    }
    if task["check"]:
        once = np.sort(np.concatenate(seen)[: task["images"]])  # the last batch of training goes on into the next epoch
        found |= {"exact": exact, "whole": np.array_equal(once, np.arange(task["images"]))}
    return found


def main() -> None:
    task = json.loads(sys.argv[1])
    os.sched_setaffinity(0, task["cores"])
    if "write" in task:
        WRITERS[task["write"]](task["place"], task["images"])
        print("{}")
    else:
        print(json.dumps(measure(task)))


if __name__ == "__main__":
    main()
