"""A stage's folder: bound to a digest, finished by a record that is written last."""

import shutil
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, ValidationError

from proxyrob.errors import CheckpointMismatch, DataIntegrityError
from proxyrob.memory import held_at_once
from proxyrob.storage.bounded import read_small
from proxyrob.storage.files import sha256_of, verify_file, write_json
from proxyrob.storage.placed import checked_key

FORMAT_VERSION = 1
RECORD = "stage.json"


class Report(BaseModel):
    """What a stage says of itself: small, frozen, and stored beside its files."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class FileEntry(Report):
    """One file of a stage."""

    name: Annotated[str, AfterValidator(checked_key)]
    size_bytes: int
    sha256: str


class StageRecord(Report):
    """The last file a stage writes. Its presence says that everything it lists is whole."""

    format_version: int
    stage: str
    digest: str
    configuration: dict[str, Any]
    files: tuple[FileEntry, ...]
    report: dict[str, Any]
    elapsed_s: float
    finished_at: float
    held_at_once: int | None = None
    """How many images of a batch were in memory at once after it had run out; ``None``: as the configuration has it."""


R = TypeVar("R", bound=Report)


@dataclass(frozen=True)
class Stage:
    """One piece of work and the folder that belongs to it alone.

    ``digest`` identifies configuration, seed and inputs; ``configuration`` is stored for people to read.
    """

    name: str
    digest: str
    folder: Path
    configuration: dict[str, Any]

    @property
    def record_path(self) -> Path:
        return self.folder / RECORD

    def record(self) -> StageRecord | None:
        """The finished stage's record, or ``None`` while it is unfinished.

        Raises ``CheckpointMismatch`` when the folder belongs to another configuration and ``DataIntegrityError`` when
        the record cannot be read.
        """
        if not self._has_record():
            return None
        try:
            record = StageRecord.model_validate_json(read_small(self.record_path))
        except ValidationError as error:
            raise DataIntegrityError(
                f"{self.record_path} cannot be read as format {FORMAT_VERSION} of a stage record; {self.remedy}"
            ) from error
        if record.format_version != FORMAT_VERSION:
            raise DataIntegrityError(
                f"{self.record_path} has format {record.format_version}, this program reads format {FORMAT_VERSION}; "
                "use the program that wrote it, or another store"
            )
        if record.digest != self.digest:
            raise CheckpointMismatch(
                f"{self.folder} was written by another configuration of stage {record.stage!r} "
                f"(digest {record.digest[:12]}, expected {self.digest[:12]}); move it away or use another store"
            )
        return record

    def _has_record(self) -> bool:
        """Ask the folder: of the file alone a network file system may believe for a while that it is still missing."""
        try:
            return any(path.name == RECORD for path in self.folder.iterdir())
        except (FileNotFoundError, NotADirectoryError):
            return False

    def is_whole(self) -> bool:
        """Finished, and every file there with its recorded size (hashes are checked when a file is read)."""
        record = self.record()
        if record is None:
            return False
        for entry in record.files:
            path = self.folder / entry.name
            if not path.is_file() or path.stat().st_size != entry.size_bytes:
                return False
        return True

    def finished(self, report_type: type[R]) -> R | None:
        """The report of a whole stage, or ``None`` when there is work to do.

        Raises ``DataIntegrityError`` when it is no such report.
        """
        if not self.is_whole():
            return None
        record = self.record()
        assert record is not None
        try:
            return report_type.model_validate(record.report)
        except ValidationError as error:
            raise DataIntegrityError(
                f"{self.record_path} holds no {report_type.__name__} as expected; {self.remedy}"
            ) from error

    def finish(self, report: R, files: Iterable[str | FileEntry], started: float) -> R:
        """Write the record over ``files`` (names below the folder, or entries of files that were hashed already).

        ``started`` is a ``time.monotonic()`` reading.
        """
        entries = []
        for file in files:
            if isinstance(file, str):
                path = self.folder / file
                entries.append(FileEntry(name=file, size_bytes=path.stat().st_size, sha256=sha256_of(path)))
            else:
                entries.append(file)
        record = StageRecord(
            format_version=FORMAT_VERSION,
            stage=self.name,
            digest=self.digest,
            configuration=self.configuration,
            files=tuple(entries),
            report=report.model_dump(mode="json"),
            elapsed_s=time.monotonic() - started,
            finished_at=time.time(),
            held_at_once=held_at_once(),
        )
        write_json(self.record_path, record.model_dump(mode="json"))
        return report

    def verified(self, name: str) -> Path:
        """The path of one of the stage's files, after its hash was checked.

        Raises ``DataIntegrityError`` when the stage is unfinished, does not list the file, or the file is damaged.
        """
        record = self.record()
        entry = next((entry for entry in record.files if entry.name == name), None) if record else None
        if entry is None:
            raise DataIntegrityError(f"{self.folder / name} is not a finished result of stage {self.name!r}; {self.remedy}")
        verify_file(self.folder / name, entry.sha256, self.remedy)
        return self.folder / name

    @property
    def remedy(self) -> str:
        return f"delete the folder {self.folder} and run again: only this stage is computed anew"

    def forget(self) -> None:
        """Count as unfinished again: what it made elsewhere is gone."""
        self.record_path.unlink(missing_ok=True)

    def clear(self) -> None:
        """Remove scratch files that a finished stage no longer needs."""
        shutil.rmtree(self.folder / "scratch", ignore_errors=True)

    @property
    def scratch(self) -> Path:
        """Where checkpoints and partial results lie until the stage is finished."""
        path = self.folder / "scratch"
        path.mkdir(parents=True, exist_ok=True)
        return path
