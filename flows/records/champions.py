"""Who is champion: one change at a time, each with its moment and its reason on the registered model."""

import json
import random
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Literal

from mlflow import MlflowClient
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException
from pydantic import ValidationError

from flows.records.patience import is_missing
from proxyrob.storage import Report

CHAMPION = "champion"
CHANGE_TAG = "champion."
"""Tags of a registered model: ``champion.<moment>``, so that their names sort by time."""

LOCK_SUFFIX, HOLDER_TAG = ".being-decided", "holder"
ABANDONED_AFTER_S = 1800.0
"""A claim so old was left behind by a process that died; deciding takes seconds, registering a large model minutes."""
LONGEST_REASON = 3000
"""MLflow's database keeps 5,000 characters of a tag."""


ChangeName = Literal["promoted", "withdrawn"]


class Change(Report):
    """A version became champion, or ceased to be; ``previous`` was champion before."""

    at: str
    event: ChangeName
    version: int
    previous: int | None
    reason: str


@dataclass(frozen=True)
class Claim:
    """The right to change who is champion of a registered model, which nobody else has meanwhile."""

    client: MlflowClient
    name: str
    holder: str

    def promote(self, version: int, reason: str) -> bool:
        """Make a version champion; whether it was not already.

        Raises ``RuntimeError`` when the claim was taken over because it had become too old.
        """
        self._require_held()
        champion = find_champion(self.client, self.name)
        previous = int(champion.version) if champion else None
        if previous == version:
            return False
        self._note("promoted", version, previous, reason)
        self.client.set_registered_model_alias(self.name, CHAMPION, str(version))
        return True

    def withdraw(self, version: int, reason: str) -> bool:
        """Take the alias back from a version; whether it had it.

        Raises ``RuntimeError`` when the claim was taken over because it had become too old.
        """
        self._require_held()
        champion = find_champion(self.client, self.name)
        if champion is None or int(champion.version) != version:
            return False
        self._note("withdrawn", version, version, reason)
        self.client.delete_registered_model_alias(self.name, CHAMPION)
        return True

    def _note(self, event: ChangeName, version: int, previous: int | None, reason: str) -> None:
        at = (
            datetime.now(UTC).replace(tzinfo=None).isoformat(timespec="microseconds") + "Z"
        )  # MLflow refuses «+» in a tag's name
        change = Change(at=at, event=event, version=version, previous=previous, reason=reason[:LONGEST_REASON])
        self.client.set_registered_model_tag(self.name, f"{CHANGE_TAG}{at}", change.model_dump_json())

    def _require_held(self) -> None:
        if _holder(self.client, self.name) != self.holder:
            raise RuntimeError(
                f"another process has taken over the decision on {self.name}, as this one took longer than "
                f"{ABANDONED_AFTER_S / 60:g} minutes; run again"
            )


@contextmanager
def claim_decision(client: MlflowClient, name: str) -> Iterator[Claim]:
    """Decide on the champion of a registered model while nobody else does, on this machine or another.

    The claim is a registered model beside it, which MLflow's database makes only once whoever asks. It is gone after the
    block; that of a process that was killed is taken over when it is ``ABANDONED_AFTER_S`` old.
    """
    claim = Claim(client, name, uuid.uuid4().hex)
    while not _take(client, name, claim.holder):
        _clear_abandoned(client, name)
        time.sleep(random.uniform(0.2, 0.6))  # noqa: S311  (so that those who wait do not ask at the same moments)
    try:
        yield claim
    finally:
        if _holder(client, name) == claim.holder:
            _forget_claim(client, name)


def find_champion(client: MlflowClient, name: str) -> ModelVersion | None:
    """The version that is champion now."""
    try:
        return client.get_model_version_by_alias(name, CHAMPION)
    except MlflowException as error:
        if not is_missing(error):  # who does not know it must not decide as if there were none
            raise
        return None


def read_history(client: MlflowClient, name: str) -> tuple[Change, ...]:
    """Who was champion when and why, oldest first.

    Raises ``ValueError`` when there is no such registered model, naming those there are.
    """
    try:
        tags = client.get_registered_model(name).tags
    except MlflowException as error:
        known = ", ".join(model.name for model in client.search_registered_models()) or "none yet"
        raise ValueError(f"there is no registered model {name!r}; registered models: {known}") from error
    found = []
    for key in sorted(tag for tag in tags if tag.startswith(CHANGE_TAG)):
        with suppress(ValidationError):  # another program may use such tags, too
            found.append(Change.model_validate(json.loads(tags[key])))
    return tuple(found)


def _take(client: MlflowClient, name: str, holder: str) -> bool:
    note = f"Held while the champion of {name} is decided on; left behind only by a process that was killed."
    try:
        client.create_registered_model(name + LOCK_SUFFIX, tags={HOLDER_TAG: holder}, description=note)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
        return _holder(client, name) == holder  # made by us, and the answer was lost
    return True


def _holder(client: MlflowClient, name: str) -> str | None:
    try:
        return client.get_registered_model(name + LOCK_SUFFIX).tags.get(HOLDER_TAG)
    except MlflowException as error:
        if not is_missing(error):
            raise
        return None


def _clear_abandoned(client: MlflowClient, name: str) -> None:
    with suppress(MlflowException):  # it is gone already
        made_at = client.get_registered_model(name + LOCK_SUFFIX).creation_timestamp
        if made_at is not None and time.time() - made_at / 1000 > ABANDONED_AFTER_S:
            _forget_claim(client, name)


def _forget_claim(client: MlflowClient, name: str) -> None:
    try:
        client.delete_registered_model(name + LOCK_SUFFIX)
    except MlflowException as error:
        if not is_missing(error):  # deleted by us, and the answer was lost
            raise
