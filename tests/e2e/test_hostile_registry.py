"""A registry whose files or tags were altered by somebody who can write where MLflow keeps them."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from flows.measure.subject import find_subject
from flows.records.registry import find_registered_champion, register_model
from flows.records.released import pull_model
from flows.settings import CONFIGURATION, Settings
from proxyrob.config import load_config
from proxyrob.errors import DataIntegrityError
from proxyrob.evaluate import read_verdicts
from proxyrob.export import CARD, CARD_JSON, MODEL
from proxyrob.storage.files import sha256_of, write_bytes
from tests.e2e.conftest import NAME, Finished, Record
from tests.e2e.test_registry import succeed
from tests.hostile import MARKER, many_rows, outside
from tests.toys import files_below


def _model_folder(record: Record) -> Path:
    """Where MLflow keeps the files of version 1."""
    version = record.tracker.client.get_model_version(NAME, "1")
    return Path(urlsplit(record.tracker.client.get_model_version_download_uri(NAME, version.version)).path)


@contextmanager
def altered(path: Path, content: bytes) -> Iterator[None]:
    """Another content for the block: other tests read the same files."""
    before = path.read_bytes()
    write_bytes(path, content)
    try:
        yield
    finally:
        write_bytes(path, before)


def _pull(record: Record, folder: Path) -> Path:
    return pull_model(record.tracker.uri, f"{NAME}@champion", folder)


def test_what_was_registered_is_what_is_pulled(record: Record, tmp_path: Path) -> None:
    """The file whose hash is on the card."""
    path = _pull(record, tmp_path / "pulled")
    assert files_below(tmp_path / "pulled") == {MODEL, CARD, CARD_JSON}
    assert json.loads((tmp_path / "pulled" / CARD_JSON).read_text())["model_sha256"] == sha256_of(path)
    assert sha256_of(path) == sha256_of(record.plan.export.verified(MODEL))


def test_another_network_is_refused(record: Record, finished: Finished, tmp_path: Path) -> None:
    """By its hash; the command says so in one line, and leaves no file."""
    planted, folder = outside("/etc/passwd"), _model_folder(record)
    with altered(folder / MODEL, planted):
        with pytest.raises(DataIntegrityError, match=r"model\.onnx of digits-linf version 1 is not the file that its card"):
            _pull(record, tmp_path / "pulled")
        done = finished.program("pull", f"{NAME}@challenger", "--to", str(tmp_path / "pulled"))
    assert done.returncode == 1
    assert "is not the file that its card describes: expected sha256" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "pulled").exists()


@pytest.mark.parametrize("location", ["/etc/passwd", "../../../../etc/passwd"])
def test_a_network_that_reads_other_files_is_refused(location: str, record: Record, tmp_path: Path) -> None:
    """Even where its card was altered, too: no file outside is opened."""
    folder, card = _model_folder(record), _model_folder(record) / "extra_files" / CARD_JSON
    with altered(folder / MODEL, outside(location)):
        content = {**json.loads(card.read_text()), "model_sha256": sha256_of(folder / MODEL)}
        with (
            altered(card, json.dumps(content).encode()),
            pytest.raises(DataIntegrityError, match=rf"another file \({location}\)"),
        ):
            _pull(record, tmp_path / "pulled")
    assert not (tmp_path / "pulled").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"[" * 1_000_000, r"card\.json of digits-linf version 1 cannot be read as JSON \(recursion limit .*restore it"),
        (b"[]", "is not the file that its card describes: expected sha256 None"),
        (b" " * ((64 << 20) + 1), r"card\.json has 67108865 bytes, and at most 67108864 are read"),
    ],
    ids=["nested", "empty", "large"],
)
def test_a_card_that_is_none_is_refused(content: bytes, message: str, record: Record, tmp_path: Path) -> None:
    """Whatever it is."""
    with altered(_model_folder(record) / "extra_files" / CARD_JSON, content), pytest.raises(DataIntegrityError, match=message):
        _pull(record, tmp_path / "pulled")
    assert not (tmp_path / "pulled").exists()


@pytest.mark.parametrize("digest", ["../../../../escaped", "a" * 63, "A" * 64])
def test_a_tag_that_is_a_path_is_refused(digest: str, record: Record, tmp_path: Path) -> None:
    """A server's tag says in which folder of the store a version is put: only a digest does."""
    record.tracker.client.set_model_version_tag(NAME, "1", "proxyrob.digest", digest)
    before = files_below(tmp_path)
    with pytest.raises(ValueError, match="was not registered by this program; give its file"):
        find_subject(f"{NAME}@champion", Settings(home=tmp_path))
    assert {path for path in files_below(tmp_path) - before if not path.startswith("mlflow")} == set()


def _verdicts_of_champion(record: Record) -> Path:
    run = record.tracker.client.get_run(record.run_id)
    return Path(urlsplit(str(run.info.artifact_uri)).path) / "tables" / "verdicts.parquet"


def test_verdicts_that_fill_memory_promote_nobody(record: Record, tmp_path: Path) -> None:
    """The gate is undecided and says why; who attacks the champion again is told what to do."""
    bomb = many_rows(tmp_path / "rows.parquet", {"index": 1, "label": 1, "broken_by": "x"}, 20_000_000).read_bytes()
    table, _ = read_verdicts(record.plan.variants[record.plan.released].evaluate)
    with altered(_verdicts_of_champion(record), bomb):
        found = register_model(succeed(record.plan, tmp_path / "other", table), record.tracker, record.run_id)
        with pytest.raises(DataIntegrityError, match=r"verdicts\.parquet holds \d+ bytes and promises \d+"):
            find_registered_champion(record.tracker, NAME)
    assert found.decision.verdict == "UNDECIDED"
    assert "more than 500 times as many" in found.decision.reasons[-1]
    assert record.aliases()["champion"] == "1"


def test_a_configuration_that_calls_a_function(record: Record, tmp_path: Path) -> None:
    """That of the champion's run, from which it is attacked again, is read as plain values or not at all."""
    parent = record.tracker.client.get_run(record.run_id).data.tags["mlflow.parentRunId"]
    folder = Path(urlsplit(str(record.tracker.client.get_run(parent).info.artifact_uri)).path)
    planted = f"name: !!python/object/apply:os.mkdir [{tmp_path / MARKER}]\n".encode()
    with altered(folder / CONFIGURATION, planted):
        path = record.tracker.download(parent, CONFIGURATION, tmp_path)
        with pytest.raises(ValueError, match="is not valid YAML: could not determine a constructor"):
            load_config(str(path))
    assert not (tmp_path / MARKER).exists()
