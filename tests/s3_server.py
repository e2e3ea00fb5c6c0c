"""A real S3 server on loopback: OpenStack Swift with its S3 interface, one copy of everything, in a folder.

One thing is added to Swift: conditional writes are atomic, as those of Amazon S3 (see ``tests/s3_atomic.py``).

``python -m tests.s3_server [FOLDER]`` runs one until it is interrupted and prints how to reach it.
"""

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Self

from boto3.session import Session
from botocore.config import Config

KEY, SECRET, REGION = "test:tester", "secret-of-the-tests", "us-east-1"
GUEST_KEY, GUEST_SECRET = "test:guest", "guessing"  # may sign in and see nothing
BUCKET = "proxyrob"
START_S = 90
ROOT = Path(__file__).parents[1]  # where Swift finds tests.s3_atomic

SWIFT_CONF = """\
[swift-hash]
swift_hash_path_suffix = proxyrob
swift_hash_path_prefix = proxyrob
[storage-policy:0]
name = single
default = yes
"""
STORAGE_CONF = """\
[DEFAULT]
bind_ip = 127.0.0.1
bind_port = {port}
swift_dir = {folder}
devices = {folder}/devices
mount_check = false
fallocate_reserve = 0
workers = 0
log_level = ERROR
[pipeline:main]
pipeline = {kind}-server
[app:{kind}-server]
use = egg:swift#{kind}
"""
PROXY_CONF = """\
[DEFAULT]
bind_ip = 127.0.0.1
bind_port = {port}
swift_dir = {folder}
workers = 0
log_level = ERROR
[pipeline:main]
pipeline = catch_errors gatekeeper healthcheck cache listing_formats atomic s3api tempauth copy slo dlo
 versioned_writes symlink proxy-server
[app:proxy-server]
use = egg:swift#proxy
account_autocreate = true
[filter:catch_errors]
use = egg:swift#catch_errors
[filter:gatekeeper]
use = egg:swift#gatekeeper
[filter:healthcheck]
use = egg:swift#healthcheck
[filter:cache]
use = egg:swift#memcache
[filter:listing_formats]
use = egg:swift#listing_formats
[filter:atomic]
paste.filter_factory = tests.s3_atomic:one_claim_at_a_time
[filter:s3api]
use = egg:swift#s3api
location = {region}
[filter:tempauth]
use = egg:swift#tempauth
user_test_tester = {secret} .admin
user_test_guest = guessing
[filter:copy]
use = egg:swift#copy
[filter:slo]
use = egg:swift#slo
[filter:dlo]
use = egg:swift#dlo
[filter:versioned_writes]
use = egg:swift#versioned_writes
allow_versioned_writes = true
[filter:symlink]
use = egg:swift#symlink
"""
START = """\
import ctypes, sys
ctypes.CDLL(None).prctl(1, 9)  # PR_SET_PDEATHSIG: killed when the parent is, however that ends
from swift.{kind}.server import main
sys.exit(main())
"""


def why_not(folder: Path) -> str | None:
    """Why no server can run with its data below ``folder``, or ``None`` when one can."""
    if find_spec("swift") is None:
        return "OpenStack Swift is not installed (it is a development dependency on Linux)"
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=folder) as file:
        try:
            os.setxattr(file.name, "user.swift.probe", b"x")
        except OSError as error:
            return f"Swift needs extended attributes, which the file system of {folder} refuses ({error.strerror})"
    return None


class S3Server:
    """Swift's proxy, account, container and object servers, each a child process; all stop together."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder.absolute()
        self.kinds = {"account": "account", "container": "container", "object": "obj", "proxy": "proxy"}
        self.ports = dict(zip(self.kinds, free_ports(len(self.kinds)), strict=True))
        self.processes: list[subprocess.Popen[bytes]] = []
        self._write_configuration()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.ports['proxy']}"

    @property
    def environment(self) -> dict[str, str]:
        """What a client has to export."""
        return {
            "AWS_ENDPOINT_URL": self.url,
            "AWS_ACCESS_KEY_ID": KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET,
            "AWS_DEFAULT_REGION": REGION,
        }

    def client(self, key: str = KEY, secret: str = SECRET) -> Any:
        """A plain boto3 client of the server."""
        config = Config(s3={"addressing_style": "path"}, retries={"total_max_attempts": 3, "mode": "standard"})
        return Session(key, secret, region_name=REGION).client("s3", endpoint_url=self.url, config=config)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *args: object) -> None:
        self.stop()

    def start(self) -> None:
        """Start and wait until it answers; the bucket exists then."""
        for kind, module in self.kinds.items():
            with (self.folder / f"{kind}.log").open("ab") as log:
                command = [sys.executable, "-c", START.format(kind=module), str(self.folder / f"{kind}.conf")]
                process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True, cwd=ROOT)
            self.processes.append(process)
        try:
            self._wait()
            client = self.client()
            if BUCKET not in [bucket["Name"] for bucket in client.list_buckets()["Buckets"]]:
                client.create_bucket(Bucket=BUCKET)
            client.close()
        except BaseException:
            self.kill()
            raise

    def stop(self) -> None:
        self._end(signal.SIGTERM)

    def kill(self) -> None:
        """As a power cut would."""
        self._end(signal.SIGKILL)

    def restart(self) -> None:
        """Start again on the same ports with the same data."""
        self.kill()
        self.start()

    def object_files(self) -> list[Path]:
        """The files that hold the content of objects, newest last."""
        found = (self.folder / "devices").glob("*/objects/**/*.data")
        return sorted(found, key=lambda path: path.stat().st_mtime_ns)

    def _end(self, how: signal.Signals) -> None:
        for process in self.processes:
            if process.poll() is None:
                os.killpg(process.pid, how)
        for process in self.processes:
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait(10)
        self.processes = []

    def _wait(self) -> None:
        until = time.monotonic() + START_S
        for port in self.ports.values():
            while not _answers(port):
                ended = next((process for process in self.processes if process.poll() is not None), None)
                if ended is not None or time.monotonic() > until:
                    logs = "\n".join(path.read_text()[-2000:] for path in sorted(self.folder.glob("*.log")))
                    raise RuntimeError(f"the S3 server in {self.folder} did not start:\n{logs}")
                time.sleep(0.1)

    def _write_configuration(self) -> None:
        (self.folder / "devices" / "d1").mkdir(parents=True, exist_ok=True)
        (self.folder / "swift.conf").write_text(SWIFT_CONF)
        for kind in ("account", "container", "object"):
            text = STORAGE_CONF.format(kind=kind, port=self.ports[kind], folder=self.folder)
            (self.folder / f"{kind}.conf").write_text(text)
            self._write_ring(kind)
        text = PROXY_CONF.format(port=self.ports["proxy"], folder=self.folder, region=REGION, secret=SECRET)
        (self.folder / "proxy.conf").write_text(text)

    def _write_ring(self, kind: str) -> None:
        script = (
            "import sys; from swift.common.ring import RingBuilder; path, port = sys.argv[1], int(sys.argv[2]);"
            "ring = RingBuilder(2, 1, 1);"
            "ring.add_dev(dict(id=0, region=1, zone=1, ip='127.0.0.1', port=port, device='d1', weight=1));"
            "ring.rebalance(seed=1); ring.get_ring().save(path)"
        )
        path = self.folder / f"{kind}.ring.gz"
        subprocess.run([sys.executable, "-W", "ignore", "-c", script, path, str(self.ports[kind])], check=True)


def free_ports(count: int) -> list[int]:
    """Ports of loopback that nobody listens on."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


def _answers(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/healthcheck", timeout=5):
            return True
    except urllib.error.HTTPError:  # the storage servers have no such page, and say so
        return True
    except OSError:
        return False


def main() -> None:
    """Run a server for a developer, in the folder given or in a temporary one."""
    with tempfile.TemporaryDirectory(prefix="proxyrob-s3-") as temporary:
        folder = Path(sys.argv[1] if len(sys.argv) > 1 else temporary)
        reason = why_not(folder)
        if reason is not None:
            sys.exit(reason)
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
        with S3Server(folder) as server:
            for name, value in server.environment.items():
                print(f"export {name}={value}")
            print(f"# the bucket s3://{BUCKET} is there; data lies in {folder}; stop with Ctrl-C", flush=True)
            try:
                signal.pause()
            except KeyboardInterrupt:
                print()


if __name__ == "__main__":
    main()
