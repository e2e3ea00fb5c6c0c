"""Files of a source, found, and identified by their content rather than by where they lie."""

import hashlib
import re
from pathlib import Path

from proxyrob.config.base import digest_of
from proxyrob.config.source import CifarSource, DigitsSource, FileSource, SourceConfig
from proxyrob.errors import DataIntegrityError
from proxyrob.source.walk import walk_files
from proxyrob.storage.files import sha256_of

SHARD = re.compile(r"-\d{5}-of-(\d{5})\.parquet$")


def fingerprint(path: Path) -> str:
    """What identifies the content at ``path``, wherever it lies.

    Of a file it is its sha256 (as ``sha256sum`` prints it), of a folder or a pattern the sha256 over the names and hashes
    of all files, hidden ones left out. Raises ``FileNotFoundError`` when there is no file.
    """
    if path.is_file():
        return sha256_of(path)
    content = hashlib.sha256()
    for file in _files_at(path):
        name = file.relative_to(path if path.is_dir() else path.parent).as_posix()
        content.update(f"{name}\0{sha256_of(file)}\n".encode())
    return content.hexdigest()


def pin_source(config: SourceConfig) -> SourceConfig:
    """The configuration with the fingerprint of its files filled in and their places made absolute.

    A source without files is returned as it is. Raises ``DataIntegrityError`` when the fingerprint is given already and the
    files have another, and ``FileNotFoundError`` or ``ValueError`` when they cannot be found.
    """
    if isinstance(config, DigitsSource) or config.files is None:
        return config
    absolute = {name: str(_absolute(getattr(config, name))) for name in ("path", "train", "test") if hasattr(config, name)}
    found = _fingerprint_of(config)
    if config.sha256 not in (None, found):
        raise _changed(config, found)
    return config.replace(**absolute, sha256=found)


def verify_source(config: FileSource) -> None:
    """Check the files against the fingerprint the configuration is pinned to.

    Raises ``ValueError`` when it is pinned to none, because results would then not be identified by their data, and
    ``DataIntegrityError`` when the files have changed since.
    """
    if config.sha256 is None:
        raise ValueError("source.sha256 is not filled in; pass the configuration through proxyrob.source.pin_source first")
    found = _fingerprint_of(config)
    if found != config.sha256:
        raise _changed(config, found)


def locate_files(config: FileSource) -> tuple[Path, Path]:
    """Where the training and the test images lie.

    Raises ``ValueError`` when a folder holds several sets and the configuration does not say which, and
    ``FileNotFoundError`` when it holds none.
    """
    assert config.files is not None
    train = _absolute(config.files[0])
    if isinstance(config, CifarSource):
        _check_unambiguous(train, "train_file", config.train_file)
    return train, locate_test(config)


def locate_test(config: FileSource) -> Path:
    """Where the test images lie, whether or not there are training images.

    Raises ``ValueError`` when a folder holds several sets and the configuration does not say which, and
    ``FileNotFoundError`` when it holds none.
    """
    assert config.files is not None
    test = _absolute(config.files[1])
    if isinstance(config, CifarSource):
        _check_unambiguous(test, "test_file", config.test_file)
    return test


def _check_unambiguous(pattern: Path, field: str, chosen: str | None) -> None:
    """One file, or all the shards of one set, unless the user has chosen."""
    found = _files_at(pattern)
    if chosen is not None or len(found) == 1:
        return
    shards = [SHARD.search(file.name) for file in found]
    if not all(shard is not None and int(shard.group(1)) == len(found) for shard in shards):
        raise ValueError(
            f"{pattern.parent} holds {', '.join(file.name for file in found)}: say which with source.{field}, such as "
            f"source.{field}={found[0].name}"
        )


def _fingerprint_of(config: FileSource) -> str:
    train, test = locate_files(config)
    return digest_of({"train": fingerprint(train), "test": fingerprint(test)})


def _changed(config: FileSource, found: str) -> DataIntegrityError:
    train, test = locate_files(config)
    return DataIntegrityError(
        f"the source's files ({train}, {test}) are not those that source.sha256 names: expected {config.sha256}, got {found}; "
        "put the former files back, or set source.sha256=null to work with these"
    )


def _files_at(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    if path.is_dir():
        found = [file for file in walk_files(path) if not any(part.startswith(".") for part in file.relative_to(path).parts)]
    else:
        found = [file for file in path.parent.glob(path.name) if file.is_file()]
    if not found:
        raise FileNotFoundError(f"there is nothing at {path}; check the path of the source")
    return sorted(found)


def _absolute(place: str) -> Path:
    return Path(place).expanduser().absolute()
