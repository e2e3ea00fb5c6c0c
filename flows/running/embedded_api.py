"""Prefect's API for one run: a server of our own on loopback that ends when the run does, however that ends.

Prefect's built-in ephemeral server outlives a parent that is killed, and is started only after the client has imported
the whole server a second time. This one is started while the rest is still being imported, inherits a listening socket,
and watches a pipe to its parent.
"""

import atexit
import gc
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from typing import Any

STARTUP_TIMEOUT_S = 120


def start_api() -> subprocess.Popen[bytes] | None:
    """Start the server unless ``PREFECT_API_URL`` names one, and point ``PREFECT_API_URL`` at it.

    Must be called before ``prefect`` is imported, for two reasons: Prefect reads the URL then, and its exit handlers
    (which deliver the last events) must run before ours, which stops the server.
    """
    if os.environ.get("PREFECT_API_URL"):
        return None
    if "prefect" in sys.modules:
        raise RuntimeError("start_api() must be called before prefect is imported")
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    listener.listen(128)
    reading, writing = os.pipe()
    process = subprocess.Popen(
        [sys.executable, "-m", "flows.running.embedded_api", str(listener.fileno()), str(reading)],
        pass_fds=(listener.fileno(), reading),
        env={**os.environ, "PREFECT_UI_ENABLED": "false", "PREFECT__SERVER_EPHEMERAL": "1", "PREFECT__SERVER_FINAL": "1"},
        stdin=subprocess.DEVNULL,
    )
    os.close(reading)
    url = f"http://127.0.0.1:{listener.getsockname()[1]}/api"
    listener.close()
    os.environ["PREFECT_API_URL"] = url

    def stop() -> None:
        os.close(writing)
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    atexit.register(stop)
    return process


def await_api(process: subprocess.Popen[bytes]) -> None:
    """Wait until the server that was started answers.

    Raises ``TimeoutError`` after two minutes and ``RuntimeError`` when the server has ended, saying what to do.
    """
    url = os.environ["PREFECT_API_URL"]
    deadline = time.monotonic() + STARTUP_TIMEOUT_S
    while True:
        if process.poll() is not None:
            raise RuntimeError(
                f"Prefect's embedded server ended with exit code {process.returncode}; its messages are above. "
                "Reinstall from requirements.lock, or start a server yourself and set PREFECT_API_URL"
            )
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=STARTUP_TIMEOUT_S):  # noqa: S310  (our own server's address)
                return
        except (urllib.error.URLError, OSError) as error:
            if time.monotonic() > deadline:
                raise TimeoutError(
                    f"Prefect's embedded server at {url} did not answer within {STARTUP_TIMEOUT_S} s; its messages are above. "
                    "Start one yourself with 'prefect server start' and set PREFECT_API_URL"
                ) from error
            time.sleep(0.2)


def _end_with_parent(pipe: int, servers: list[Any]) -> None:
    """The pipe ends when the parent closes it or dies; then ask the server, once there is one, to stop; insist in 5 s."""
    os.read(pipe, 1)
    for server in servers:
        server.should_exit = True
        time.sleep(5)
    os._exit(1)


def _serve() -> None:
    listener = socket.socket(fileno=int(sys.argv[1]))
    for sig in (signal.SIGINT, signal.SIGTERM):
        signal.signal(sig, signal.SIG_IGN)  # they may reach all processes of a run; the parent decides when to stop
    servers: list[Any] = []
    threading.Thread(target=_end_with_parent, args=(int(sys.argv[2]), servers), daemon=True).start()

    gc.disable()  # the import below makes a few million lasting objects; looking through them costs two seconds
    import uvicorn  # not at the top: the parent imports this module, and needs neither of the two
    from prefect.server.api.server import create_app

    class Server(uvicorn.Server):
        def handle_exit(self, sig: int, frame: object) -> None:
            """Signals are ignored here, too."""

    app = create_app()
    gc.enable()
    gc.freeze()
    config = uvicorn.Config(app, log_level="error", access_log=False, timeout_graceful_shutdown=3)
    servers.append(Server(config))
    servers[0].run(sockets=[listener])


if __name__ == "__main__":
    _serve()
