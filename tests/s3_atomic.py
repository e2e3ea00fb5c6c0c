"""A filter in front of Swift that makes conditional writes what Amazon S3 promises: of two at once exactly one succeeds.

Swift alone looks whether an object is there before it reads the content, so two requests that overlap may both find none.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

Application = Callable[[dict[str, Any], Callable[..., Any]], Iterable[bytes]]


def one_claim_at_a_time(global_conf: dict[str, str], **conf: str) -> Callable[[Application], Application]:
    """Let requests with ``If-None-Match: *`` for the same path through one after the other."""
    from eventlet.semaphore import Semaphore  # type: ignore[import-untyped]  # installed with Swift, and used in its process alone

    def wrap(app: Application) -> Application:
        claims: dict[str, Any] = defaultdict(Semaphore)

        def handle(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
            if environ.get("HTTP_IF_NONE_MATCH") != "*":
                return app(environ, start_response)
            with claims[environ["PATH_INFO"]]:
                answer = app(environ, start_response)
                try:
                    return [b"".join(answer)]
                finally:
                    getattr(answer, "close", lambda: None)()

        return handle

    return wrap
