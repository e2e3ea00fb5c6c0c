"""Files that appear whole or not at all, and are recognised by their hash."""

import gc
import hashlib
import json
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from proxyrob.errors import DataIntegrityError
from proxyrob.storage.files import (
    read_array,
    read_frame,
    read_header,
    require_writable,
    sha256_of,
    verify_file,
    write_array,
    write_bytes,
    write_json,
    write_table,
    written_whole,
)
from proxyrob.storage.stage import Report
from tests.toys import damage, files_below


class Header(Report):
    """What tables say of themselves here."""

    n: int
    name: str = ""


def _write_half(path: Path) -> None:
    with written_whole(path) as temporary:
        temporary.write_bytes(b"half")
        raise OSError("the disk is full")


def test_a_file_appears_only_when_it_is_whole(tmp_path: Path) -> None:
    """While it is written there is no file of that name; afterwards there is nothing else."""
    path = tmp_path / "deep" / "file.bin"
    with written_whole(path) as temporary:
        temporary.write_bytes(b"half")
        assert not path.exists()
        assert temporary.parent == path.parent, "a rename is atomic only within one file system"
    assert path.read_bytes() == b"half"
    assert files_below(tmp_path) == {"deep/file.bin"}


def test_a_block_that_raises_leaves_nothing(tmp_path: Path) -> None:
    """A write that fails half-way leaves neither the file nor its temporary one."""
    with pytest.raises(OSError, match="disk is full"):
        _write_half(tmp_path / "file.bin")
    assert files_below(tmp_path) == set()


def test_a_block_that_raises_leaves_the_old_file(tmp_path: Path) -> None:
    """A write that fails half-way leaves what was there before."""
    path = tmp_path / "file.bin"
    write_bytes(path, b"old")
    with pytest.raises(OSError, match="disk is full"):
        _write_half(path)
    assert (path.read_bytes(), files_below(tmp_path)) == (b"old", {"file.bin"})


def test_a_file_is_replaced_even_when_it_is_read_only(tmp_path: Path) -> None:
    """A stage that is computed anew replaces its read-only files."""
    path = tmp_path / "file.bin"
    write_bytes(path, b"old")
    path.chmod(0o444)
    write_bytes(path, b"new")
    assert path.read_bytes() == b"new"


def test_json_is_readable_and_has_no_nan(tmp_path: Path) -> None:
    """A person can read it line by line, it ends with a newline, and what other programs cannot read is never written."""
    path = tmp_path / "file.json"
    write_json(path, {"a": 2, "b": [1.5, None]})
    assert json.loads(path.read_text()) == {"a": 2, "b": [1.5, None]}
    assert path.read_text().startswith('{\n  "a": 2,\n')
    assert path.read_text().endswith("\n}\n")
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(path, {"a": float("nan")})
    assert json.loads(path.read_text())["a"] == 2


def test_what_a_killed_writer_left_is_overwritten(tmp_path: Path) -> None:
    """A temporary file of a killed process neither stops the next writer nor stays behind."""
    path = tmp_path / "file.bin"
    with written_whole(path) as temporary:
        temporary.write_bytes(b"whole")
        leftover = temporary.name
    (tmp_path / leftover).write_bytes(b"left by a kill, and longer")
    write_bytes(path, b"again")
    assert (path.read_bytes(), files_below(tmp_path) - {leftover}) == (b"again", {"file.bin"})


def test_arrays_are_never_pickled(tmp_path: Path) -> None:
    """An array of objects is neither written nor read: reading it would run foreign code."""
    with pytest.raises(ValueError, match="Object arrays cannot be saved"):
        write_array(tmp_path / "objects.npy", np.array([{}], dtype=object))
    assert files_below(tmp_path) == set()
    np.save(tmp_path / "foreign.npy", np.array([{}], dtype=object), allow_pickle=True)
    with pytest.raises(DataIntegrityError, match=r"foreign\.npy holds pickled Python objects; .*never unpickled"):
        read_array(tmp_path / "foreign.npy")


def test_an_array_can_stay_on_disk(tmp_path: Path) -> None:
    """``mapped`` reads nothing until it is needed and does not allow writing."""
    array = np.arange(6, dtype=np.uint8).reshape(2, 3)
    write_array(tmp_path / "a.npy", array)
    mapped = read_array(tmp_path / "a.npy", mapped=True)
    assert isinstance(mapped, np.memmap)
    assert not mapped.flags.writeable
    assert np.array_equal(mapped, array)
    assert not isinstance(read_array(tmp_path / "a.npy"), np.memmap)


def test_a_table_keeps_its_header_and_types(tmp_path: Path) -> None:
    """The header travels in the file, and integers that may be missing stay integers; other programs read the same table."""
    columns = {"index": [0, 1], "prediction": pd.array([3, None], dtype="Int64"), "by": ["σ", None], "none": [None, None]}
    table = pd.DataFrame({**columns, "hit": pd.array([True, None], dtype="boolean"), "radius": [0.25, 1e-9]})
    write_table(tmp_path / "t.parquet", table, {"n": 5, "name": "σ"})
    pd.testing.assert_frame_equal(pd.read_parquet(tmp_path / "t.parquet"), table)
    pd.testing.assert_frame_equal(read_frame(tmp_path / "t.parquet"), table)
    assert read_header(tmp_path / "t.parquet", Header) == Header(n=5, name="σ")


def test_a_table_without_header_is_refused(tmp_path: Path) -> None:
    """A foreign table is not mistaken for one of ours."""
    write_table(tmp_path / "t.parquet", pd.DataFrame({"a": [1]}))
    with pytest.raises(DataIntegrityError, match=r"t\.parquet has no header of proxyrob"):
        read_header(tmp_path / "t.parquet", Header)
    write_table(tmp_path / "t.parquet", pd.DataFrame({"a": [1]}), {"n": "many"})
    with pytest.raises(DataIntegrityError, match=r"t\.parquet has another header than expected \(n: .*\); make it again"):
        read_header(tmp_path / "t.parquet", Header, "make it again")


def test_a_file_with_the_recorded_hash_is_accepted(tmp_path: Path) -> None:
    """The hash is the sha256 of the content, as any other tool computes it."""
    path = tmp_path / "file.bin"
    path.write_bytes(b"content" * 100_000)
    expected = hashlib.sha256(b"content" * 100_000).hexdigest()
    assert sha256_of(path) == expected
    verify_file(path, expected, "nothing to do")


def test_a_damaged_file_is_named_with_both_hashes_and_the_remedy(tmp_path: Path) -> None:
    """One flipped byte is found; the message has all that is needed to act."""
    path = tmp_path / "file.bin"
    path.write_bytes(b"content")
    expected = sha256_of(path)
    damage(path)
    with pytest.raises(DataIntegrityError) as error:
        verify_file(path, expected, "sample it again")
    for part in (str(path), "is damaged", f"expected sha256 {expected}", f"got {sha256_of(path)}", "sample it again"):
        assert part in str(error.value)


def test_a_missing_file_is_named_with_its_hash_and_the_remedy(tmp_path: Path) -> None:
    """A file that is gone is not reported as damaged."""
    path = tmp_path / "gone.bin"
    with pytest.raises(DataIntegrityError, match=rf"{path} is missing \(its recorded sha256 is abc\); sample it again"):
        verify_file(path, "abc", "sample it again")


def test_a_folder_is_made_and_tried(tmp_path: Path) -> None:
    """A folder that does not exist is made; the trial leaves no file behind."""
    require_writable(tmp_path / "a" / "b")
    assert (tmp_path / "a" / "b").is_dir()
    assert files_below(tmp_path) == set()


@pytest.mark.parametrize("below", ["file", "file/store"])
def test_a_file_in_the_way_of_a_folder_is_named(tmp_path: Path, below: str) -> None:
    """A store below a file is refused before any work, saying which path it is."""
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError, match=rf"{tmp_path / below} cannot hold results because a file is in the way"):
        require_writable(tmp_path / below)


def test_a_folder_that_cannot_be_written_is_named() -> None:
    """A store where nobody may write (here: the kernel's own folder) is refused with the system's reason."""
    with pytest.raises(PermissionError, match=r"/proc/proxyrob cannot be written \(.+\); choose another folder"):
        require_writable(Path("/proc/proxyrob"))


def test_many_threads_read_arrays_at_once(tmp_path: Path) -> None:
    """Readers that are interrupted while numpy parses a header, at different depths of their stacks, all get the array."""
    array = np.arange(6, dtype=np.uint8).reshape(2, 3)
    write_array(tmp_path / "a.npy", array)

    def read(depth: int) -> bool:
        if depth:
            return read(depth - 1)
        return all(np.array_equal(read_array(tmp_path / "a.npy", mapped=True), array) for _ in range(50))

    def let_others_run(phase: str, info: dict[str, int]) -> None:
        time.sleep(1e-6)

    before = gc.get_threshold()
    gc.callbacks.append(let_others_run)
    gc.set_threshold(5)
    try:
        with ThreadPoolExecutor(8) as readers:
            assert all(readers.map(read, range(16)))
    finally:
        gc.set_threshold(*before)
        gc.callbacks.remove(let_others_run)
