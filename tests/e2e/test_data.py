"""Data sets as a user handles them: import, look, check, train, on a folder and on S3."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from sklearn.datasets import load_digits

from proxyrob.storage import open_store
from tests.e2e.conftest import Finished, Program
from tests.s3_server import BUCKET, S3Server
from tests.toys import damage


def _noisy_digits(path: Path, count: int) -> Path:
    """A published set in the layout of EDM-based work: noisy digits with their true labels."""
    images, labels = load_digits(return_X_y=True)
    rows = np.arange(count) % len(images)
    noise = np.random.default_rng(0).normal(0.0, 20.0, (count, 8, 8, 1))
    levels = np.asarray(images)[rows].reshape(-1, 8, 8, 1) * (255.0 / 16.0) + noise
    np.savez_compressed(path, image=np.rint(levels.clip(0, 255)).astype(np.uint8), label=np.asarray(labels)[rows])
    return path


def test_import_look_and_check(make_program: Callable[[], Program], tmp_path: Path) -> None:
    """A set is imported, listed, shown with its contact sheet, verified; damage is named, repaired, and imported again."""
    program, file = make_program(), _noisy_digits(tmp_path / "noisy.npz", 900)
    arguments = ("import", str(file), "--name", "noisy", "--shape", "8x8x1", "--shard-size", "300")
    done = program(*arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "900 images of 8×8×1 in 3 shards" in done.stdout
    assert "--set proxy.kind=published --set proxy.name=noisy" in done.stdout
    listed = program("data", "ls")
    assert "sets/noisy" in listed.stdout
    assert "900" in listed.stdout
    sheet = tmp_path / "sheet.png"
    shown = program("data", "show", "noisy", "--sheet", str(sheet))
    assert shown.returncode == 0, shown.stderr
    assert "kept: given with the images: 900" in shown.stdout
    assert sheet.read_bytes().startswith(b"\x89PNG")
    verified = program("data", "verify", "noisy", "--against", "digits")
    assert verified.returncode == 0, verified.stdout + verified.stderr
    assert "6 files" in verified.stdout
    assert "0 of 900 images differ" in verified.stdout
    damaged = program.home / "store" / "sets" / "noisy" / "shard-000001.npy"
    damage(damaged)
    found = program("data", "verify", "noisy", "--repair")
    assert found.returncode == 1
    assert "damaged  shard-000001.npy" in found.stdout
    assert not damaged.exists()
    again = program(*arguments)
    assert again.returncode == 0, again.stderr
    assert program("data", "verify", "noisy").returncode == 0


def test_what_cannot_be_imported(make_program: Callable[[], Program], tmp_path: Path) -> None:
    """Wrong names, sizes and hashes are refused with what to do, and nothing is left behind."""
    program, file = make_program(), _noisy_digits(tmp_path / "noisy.npz", 20)
    for arguments, text in (
        (("--name", "Noisy"), "--name: name: String should match pattern"),
        (("--name", "noisy", "--shape", "8x8"), "expected height x width x channels such as 32x32x3"),
        (("--name", "noisy", "--shape", "32x32x3"), "8"),
        (("--name", "noisy", "--sha256", "0" * 64), "is not the file that was published"),
    ):
        refused = program("import", str(file), *arguments)
        assert refused.returncode in (1, 2)
        assert text in refused.stderr
    assert "no sets of images" in program("data", "ls").stdout
    unknown = program("run", str(program.preset), "--set", "proxy.kind=published", "--set", "proxy.name=noisy")
    assert unknown.returncode == 1
    assert "proxyrob import FILE --name noisy" in unknown.stderr


def test_a_run_with_its_images_on_s3_gives_the_same_figures(
    finished: Finished, make_program: Callable[[], Program], s3_server: S3Server
) -> None:
    """With samples and labels on S3 the same run ends with the same figures; what is lost there is made again."""
    place = f"s3://{BUCKET}/e2e"
    program = dataclasses.replace(make_program(), extra={**s3_server.environment, "PROXYROB_DATA": place})
    output = program.home / "output"
    done = program("run", str(program.preset), "--output", str(output))
    assert done.returncode == 0, done.stdout + done.stderr
    report = program.report(output)
    assert report["models"] == finished.report["models"]
    listed = program("data", "ls")
    assert "samples/" in listed.stdout
    assert place in listed.stdout
    assert not list((program.home / "store").rglob("shard-*.npy"))
    with pytest.MonkeyPatch.context() as patch:
        for name, value in s3_server.environment.items():
            patch.setenv(name, value)
        store = open_store(place)
        keys = [found.key for found in store.list("samples/")]
        for ending in ("shard-000002.npy", "shard-000001.parquet"):
            (lost,) = [key for key in keys if key.endswith(ending)]
            store.delete(lost)
    again = program("run", str(program.preset), "--output", str(output))
    assert again.returncode == 0, again.stdout + again.stderr
    report = program.report(output)
    assert {"samples", "labels"}.isdisjoint(report["cached"])
    assert {"train-mixed", "attack-mixed"} <= set(report["cached"])
