"""An MLflow server that is away for a while neither fails a run nor is waited for in silence."""

import functools
import re
import sys
import time
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar, cast

from mlflow import MlflowClient
from mlflow.exceptions import MlflowException, RestException

from flows.settings import hide_credentials

P = ParamSpec("P")
T = TypeVar("T")
Tell = Callable[[str], None]

OUTAGE_S = 600.0
"""How long a server may be away before what needs it fails."""
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.5, 5.0
AWAY = {"INTERNAL_ERROR", "TEMPORARILY_UNAVAILABLE", "REQUEST_LIMIT_EXCEEDED"}
"""What a server answers whose database does not."""
UNREACHED = re.compile(r"^API request to .* failed with |Max retries exceeded|Connection |timed out|HTTPStatusCode': 5")
"""What MLflow's client says when no answer came, or not all of one."""
SYSTEMS_CAUSE = re.compile(r"\[Errno -?\d+\] ([\w ]+)")
MISSING = {"RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"}


class Patience:
    """Repeats a call for as long as the server at ``uri`` is away, at most ``longest_s``, and says so through ``tell``.

    A call is made again from its beginning, though the server may have done it before it went away: it has to be one that may
    be repeated. A store without a server (SQLite) is never away.
    """

    def __init__(self, uri: str, tell: Tell, longest_s: float = OUTAGE_S) -> None:
        self._uri, self._tell, self._longest_s = uri, tell, longest_s

    def is_away(self, error: BaseException) -> bool:
        """Whether an error means that the server is away."""
        return self._uri.startswith("http") and is_outage(error)

    def outlast(self, call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """The result of the call. Raises what it raises, at once where the cause is another than a server that is away."""
        failed_at, failures, pause = None, 0, FIRST_PAUSE_S
        while True:
            try:
                result = call(*args, **kwargs)
            except Exception as error:
                now = time.monotonic()
                failed_at = failed_at or now
                if not self.is_away(error) or now - failed_at > self._longest_s:
                    raise
                failures += 1
                if failures == 2:  # one alone is a connection that was closed while idle
                    self._tell(
                        f"MLflow at {hide_credentials(self._uri)} does not answer ({summarise(error)}); trying again for up to "
                        f"{self._longest_s / 60:.0f} minutes"
                    )
                time.sleep(pause)
                pause = min(2 * pause, LONGEST_PAUSE_S)
            else:
                if failures > 1 and failed_at is not None:
                    self._tell(f"MLflow answers again, after {time.monotonic() - failed_at:.0f} s")
                return result


class _Patient:
    """Every method of a client, made with patience."""

    def __init__(self, client: MlflowClient, patience: Patience) -> None:
        self._client, self._patience = client, patience

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._client, name)
        return functools.partial(self._patience.outlast, found) if callable(found) else found


def patient_client(client: MlflowClient, patience: Patience) -> MlflowClient:
    """A client whose every call outlasts an outage: for calls that may be repeated, which making a run is not."""
    return cast("MlflowClient", _Patient(client, patience))


def is_outage(error: BaseException) -> bool:
    """Whether an error says that the server (MLflow, or the store of its artifacts) may do the same a little later."""
    if isinstance(error, RestException):
        return error.error_code in AWAY
    if isinstance(error, MlflowException):
        return error.error_code in AWAY and UNREACHED.search(str(error)) is not None
    response = getattr(error, "response", None)  # requests' has the status, that of S3's client lies deeper
    status = getattr(response, "status_code", None)
    if isinstance(response, dict):
        status = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    if status is not None:
        return status >= 500 or status == 429
    named = {base.__name__ for base in type(error).__mro__}
    if "S3UploadFailedError" in named and error.__context__ is not None:
        return is_outage(error.__context__)
    return bool(named & {"ConnectionError", "HTTPClientError", "Timeout"})  # Python's, those of requests and of botocore


def is_missing(error: MlflowException) -> bool:
    """Whether an error says that what was asked for is not there, rather than that nobody answered."""
    return error.error_code in MISSING


def summarise(error: BaseException) -> str:
    """What an error is about, without the whole request."""
    text = " ".join(str(error).split()) or type(error).__name__
    if (found := SYSTEMS_CAUSE.search(text)) is not None:
        return found[1]
    cause = text.rpartition("Caused by ")[2] or text
    return cause if len(cause) <= 160 else f"{cause[:157]}…"


def tell_stderr(text: str) -> None:
    """Where nobody shows messages in another way."""
    print(text, file=sys.stderr, flush=True)
