"""Asking a server by HTTP, without loading a client that takes seconds to import."""

import base64
import json
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

PATIENCE_S = 5.0


@dataclass(frozen=True)
class Answer:
    """What a server said; ``status`` is ``None`` where nobody answered, and ``content`` the reason then."""

    status: int | None
    content: Any

    @property
    def is_good(self) -> bool:
        return self.status is not None and self.status < 300


def ask(url: str, body: Any = None, *, credentials: str | None = None, patience_s: float = PATIENCE_S) -> Answer:
    """The answer to GET, or to POST of ``body`` as JSON. ``credentials`` are ``user:password``."""
    data = None if body is None else json.dumps(body).encode()
    headers = {"Content-Type": "application/json"}
    if credentials is not None:
        headers["Authorization"] = f"Basic {base64.b64encode(credentials.encode()).decode()}"
    try:
        request = urllib.request.Request(url, data, headers)  # noqa: S310  (the user's own servers)
        with urllib.request.urlopen(request, timeout=patience_s) as answer:  # noqa: S310  (likewise)
            return Answer(answer.status, _parse(answer.read()))
    except urllib.error.HTTPError as error:
        return Answer(error.code, _parse(error.read()))
    except (OSError, ValueError) as error:
        return Answer(None, str(error))


def credentials_of(environment: Mapping[str, str], server: str) -> str | None:
    """``user:password`` for ``prefect`` or ``mlflow``, from the variables that their own clients read."""
    if server == "prefect":
        return environment.get("PREFECT_API_AUTH_STRING")
    user, password = (environment.get(f"MLFLOW_TRACKING_{part}") for part in ("USERNAME", "PASSWORD"))
    return f"{user}:{password or ''}" if user else None


def _parse(content: bytes) -> Any:
    try:
        return json.loads(content)
    except ValueError:
        return content.decode(errors="replace").strip()
