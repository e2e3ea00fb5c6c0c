"""A stage's folder: bound to a digest, finished by a record that is written last."""

import json
import time

import pytest

from proxyrob.errors import CheckpointMismatch, DataIntegrityError
from proxyrob.storage import Report, Stage
from proxyrob.storage.files import sha256_of
from tests.conftest import MakeStage
from tests.toys import damage


class Done(Report):
    """A small report."""

    answer: int
    names: tuple[str, ...] = ()


REPORT = Done(answer=42, names=("a", "b"))


@pytest.fixture
def finished(make_stage: MakeStage) -> Stage:
    """A stage that wrote two files."""
    stage = make_stage("train", seed=0)
    stage.folder.mkdir(parents=True)
    (stage.folder / "weights.bin").write_bytes(b"weights")
    (stage.folder / "notes.txt").write_bytes(b"notes")
    stage.finish(REPORT, ["weights.bin", "notes.txt"], time.monotonic() - 2.0)
    return stage


def _same_folder(stage: Stage, digest: str) -> Stage:
    return Stage(name=stage.name, digest=digest, folder=stage.folder, configuration={})


def test_an_unfinished_stage_has_no_report(make_stage: MakeStage) -> None:
    """Without a record there is work to do, whatever files are there."""
    stage = make_stage("train")
    assert (stage.record(), stage.is_whole(), stage.finished(Done)) == (None, False, None)
    stage.folder.mkdir(parents=True)
    (stage.folder / "weights.bin").write_bytes(b"weights")
    assert stage.finished(Done) is None


def test_a_finished_stage_gives_back_its_report(finished: Stage) -> None:
    """The report is read back as it was given, so that running again does nothing."""
    assert finished.is_whole()
    assert finished.finished(Done) == REPORT


def test_a_record_holds_what_is_needed_to_trust_the_files(finished: Stage) -> None:
    """Name, digest, configuration, time, and of every file its size and hash."""
    record = finished.record()
    assert record is not None
    assert (record.stage, record.digest, record.configuration) == ("train", finished.digest, {"seed": 0})
    weights, notes = record.files
    assert (weights.name, weights.size_bytes, weights.sha256) == ("weights.bin", 7, sha256_of(finished.folder / "weights.bin"))
    assert (notes.name, notes.size_bytes) == ("notes.txt", 5)
    assert 2.0 <= record.elapsed_s < 60.0
    assert abs(record.finished_at - time.time()) < 60.0


def test_a_finished_stage_whose_file_is_gone_is_not_whole(finished: Stage) -> None:
    """A result that somebody deleted is computed again."""
    (finished.folder / "notes.txt").unlink()
    assert (finished.is_whole(), finished.finished(Done)) == (False, None)


def test_a_finished_stage_whose_file_was_truncated_is_not_whole(finished: Stage) -> None:
    """A file of another size is found without hashing it."""
    (finished.folder / "notes.txt").write_bytes(b"note")
    assert (finished.is_whole(), finished.finished(Done)) == (False, None)


def test_a_folder_of_another_configuration_is_refused(finished: Stage) -> None:
    """A record with another digest is never taken for a result of this one; the message has both digests and a remedy."""
    other = _same_folder(finished, "f" * 64)
    for ask in (other.record, other.is_whole, lambda: other.finished(Done), lambda: other.verified("notes.txt")):
        with pytest.raises(CheckpointMismatch) as error:
            ask()
        for part in (str(finished.folder), finished.digest[:12], "ffffffffffff", "move it away or use another store"):
            assert part in str(error.value)


def test_a_record_that_cannot_be_read_is_refused(finished: Stage) -> None:
    """A truncated record is an error that names the folder to delete, not an unfinished stage."""
    finished.record_path.write_text(finished.record_path.read_text()[:50])
    with pytest.raises(DataIntegrityError, match=f"cannot be read as format 1.*delete the folder {finished.folder} and run"):
        finished.record()


def test_a_record_of_another_format_is_refused(finished: Stage) -> None:
    """A record that a later program wrote may mean something else; it is not read as if it were ours."""
    content = json.loads(finished.record_path.read_text())
    finished.record_path.write_text(json.dumps({**content, "format_version": 2}))
    with pytest.raises(DataIntegrityError, match="format"):
        finished.record()


def test_a_verified_file_is_there_and_unaltered(finished: Stage) -> None:
    """An intact file of a finished stage is given as its path."""
    assert finished.verified("weights.bin") == finished.folder / "weights.bin"


def test_a_damaged_file_is_named_with_its_expected_hash(finished: Stage) -> None:
    """A flipped byte keeps the size, so the stage looks whole; reading the file finds it and says what to delete."""
    expected = sha256_of(finished.folder / "weights.bin")
    damage(finished.folder / "weights.bin")
    assert finished.is_whole()
    with pytest.raises(DataIntegrityError) as error:
        finished.verified("weights.bin")
    for part in (str(finished.folder / "weights.bin"), expected, f"delete the folder {finished.folder} and run again"):
        assert part in str(error.value)
    assert finished.verified("notes.txt").is_file(), "its other file is still good"


def test_a_missing_file_is_named_when_it_is_read(finished: Stage) -> None:
    """A file that is gone is reported as missing, with its recorded hash."""
    (finished.folder / "notes.txt").unlink()
    with pytest.raises(DataIntegrityError, match=r"notes\.txt is missing \(its recorded sha256 is [0-9a-f]{64}\)"):
        finished.verified("notes.txt")


def test_a_file_that_is_not_listed_is_no_result(finished: Stage) -> None:
    """A file that lies in the folder but that the stage did not vouch for is not read."""
    (finished.folder / "stray.bin").write_bytes(b"?")
    with pytest.raises(DataIntegrityError, match=r"stray\.bin is not a finished result of stage 'train'"):
        finished.verified("stray.bin")


def test_a_file_of_an_unfinished_stage_is_no_result(make_stage: MakeStage) -> None:
    """Files of a stage that is under way may be half a result; they are not read."""
    stage = make_stage("train")
    stage.folder.mkdir(parents=True)
    (stage.folder / "weights.bin").write_bytes(b"half")
    with pytest.raises(DataIntegrityError, match="is not a finished result"):
        stage.verified("weights.bin")


def test_a_file_that_is_not_there_cannot_be_finished(make_stage: MakeStage) -> None:
    """A stage cannot vouch for a file that it did not write, and stays unfinished."""
    stage = make_stage("train")
    stage.folder.mkdir(parents=True)
    with pytest.raises(FileNotFoundError):
        stage.finish(REPORT, ["weights.bin"], time.monotonic())
    assert stage.record() is None


def test_scratch_goes_and_results_stay(finished: Stage) -> None:
    """Clearing removes what a finished stage no longer needs, also when there is nothing."""
    (finished.scratch / "checkpoint.pt").write_bytes(b"state")
    finished.clear()
    finished.clear()
    assert not (finished.folder / "scratch").exists()
    assert finished.finished(Done) == REPORT
