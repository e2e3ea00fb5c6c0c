"""Files of a source are identified by their content, wherever they lie."""

import hashlib
from pathlib import Path

import pytest

from proxyrob.config import Cifar10Source, DigitsSource, NpzSource
from proxyrob.errors import DataIntegrityError
from proxyrob.source import fingerprint, pin_source
from proxyrob.source.fingerprint import locate_files, verify_source


def _folder(path: Path, **files: str) -> Path:
    for name, content in files.items():
        file = path / name.replace("__", "/")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(content)
    return path


@pytest.fixture
def given(tmp_path: Path) -> NpzSource:
    """A source whose two files are there (their content does not matter here)."""
    _folder(tmp_path / "data", train="first", test="second")
    return NpzSource(name="toys", train=str(tmp_path / "data" / "train"), test=str(tmp_path / "data" / "test"))


def test_a_file_is_its_sha256(tmp_path: Path) -> None:
    """The fingerprint of a file can be compared with what ``sha256sum`` prints."""
    (tmp_path / "a.bin").write_bytes(b"content")
    assert fingerprint(tmp_path / "a.bin") == hashlib.sha256(b"content").hexdigest()


def test_a_folder_is_its_names_and_contents(tmp_path: Path) -> None:
    """Equal folders at other places are equal; another content, name or number of files is another folder."""
    base = {"a": "1", "deep__b": "2"}
    folders = [base, base, {**base, "a": "3"}, {"a": "1", "deep__c": "2"}, {**base, "c": ""}, {"a": "1", "b": "2"}]
    found = [fingerprint(_folder(tmp_path / str(k), **files)) for k, files in enumerate(folders)]
    assert found[0] == found[1]
    assert len(set(found)) == 5


def test_hidden_files_do_not_count(tmp_path: Path) -> None:
    """What a file manager leaves behind does not make another data set."""
    before = fingerprint(_folder(tmp_path, a="1"))
    _folder(tmp_path, **{".DS_Store": "x", ".cache__b": "y"})
    assert fingerprint(tmp_path) == before


def test_a_pattern_is_the_files_that_it_names(tmp_path: Path) -> None:
    """Other files of the same folder do not count, and the folder of the same files alone is equal."""
    _folder(tmp_path / "one", **{"train-0": "1", "train-1": "2", "test-0": "3"})
    _folder(tmp_path / "other", **{"train-0": "1", "train-1": "2"})
    assert fingerprint(tmp_path / "one" / "train-*") == fingerprint(tmp_path / "other")


@pytest.mark.parametrize("name", ["nothing", "train-*", "empty"])
def test_what_is_not_there_has_no_fingerprint(name: str, tmp_path: Path) -> None:
    """A missing file, a pattern without files and an empty folder are named."""
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"there is nothing at .*; check the path of the source"):
        fingerprint(tmp_path / name)


def test_pinning_fills_in_what_the_files_are(given: NpzSource, monkeypatch: pytest.MonkeyPatch) -> None:
    """The pinned configuration has the fingerprint and absolute places, and pinning it again changes nothing."""
    monkeypatch.chdir(Path(given.train).parent)
    pinned = pin_source(given.replace(train="train", test="test"))
    assert isinstance(pinned, NpzSource)
    assert pinned == given.replace(sha256=pinned.sha256)
    assert pinned.sha256 is not None
    assert pin_source(pinned) == pinned
    verify_source(pinned)


def test_the_identity_is_the_content_and_not_the_place(given: NpzSource, tmp_path: Path) -> None:
    """Equal files elsewhere have the same digest; other files at the same place another; places are no part of it."""
    moved = _folder(tmp_path / "moved", train="first", test="second")
    first = pin_source(given)
    second = pin_source(given.replace(train=str(moved / "train"), test=str(moved / "test")))
    assert first.digest() == second.digest()
    _folder(moved, train="changed")
    third = pin_source(given.replace(train=str(moved / "train"), test=str(moved / "test")))
    assert third.digest() != first.digest()
    swapped = pin_source(given.replace(train=given.test, test=given.train))
    assert swapped.digest() != first.digest()


def test_files_that_changed_are_refused(given: NpzSource) -> None:
    """Neither pinned again nor read: the message has both fingerprints and the two ways out."""
    pinned = pin_source(given)
    assert isinstance(pinned, NpzSource)
    Path(given.train).write_text("altered")
    message = rf"are not those that source\.sha256 names: expected {pinned.sha256}, got .*; put .* or set source\.sha256=null"
    with pytest.raises(DataIntegrityError, match=message):
        pin_source(pinned)
    with pytest.raises(DataIntegrityError, match=message):
        verify_source(pinned)


def test_files_without_fingerprint_are_not_read(given: NpzSource) -> None:
    """Results of unpinned files would be found again under their place, whatever lies there by then."""
    with pytest.raises(ValueError, match=r"source\.sha256 is not filled in; pass the configuration through .*pin_source"):
        verify_source(given)


def test_sources_without_files_need_no_fingerprint() -> None:
    """The digits and a download are identified by what they are."""
    for config in (DigitsSource(), Cifar10Source()):
        assert pin_source(config) is config


def test_a_folder_of_the_hub_is_found_by_its_names(tmp_path: Path) -> None:
    """One file, or all shards of one set, need no further setting."""
    _folder(tmp_path, **{"train-00000-of-00002.parquet": "1", "train-00001-of-00002.parquet": "2", "test.parquet": "3"})
    config = Cifar10Source(path=str(tmp_path))
    assert locate_files(config) == (tmp_path / "train*.parquet", tmp_path / "test*.parquet")


@pytest.mark.parametrize(
    "names", [("train.parquet", "train-lossless.parquet"), ("train-00000-of-00003.parquet", "train-1.parquet")]
)
def test_several_sets_in_a_folder_have_to_be_chosen_from(names: tuple[str, str], tmp_path: Path) -> None:
    """Which of several is meant is not guessed; the message lists them and the setting."""
    _folder(tmp_path, **dict.fromkeys(names, "1"), **{"test.parquet": "2"})
    with pytest.raises(ValueError, match=r"holds train.*: say which with source\.train_file, such as source\.train_file=train"):
        pin_source(Cifar10Source(path=str(tmp_path)))
    config = Cifar10Source(path=str(tmp_path), train_file=names[0])
    assert locate_files(config) == (tmp_path / names[0], tmp_path / "test*.parquet")
