"""A bucket for the tests: moto's S3 server in a process of its own, and in front of it a proxy that misbehaves.

Both listen on 127.0.0.1 and end with the tests. moto answers S3's requests over HTTP and keeps objects in its memory: a
simulation of S3, whose conditional writes, ranges and listings are those that are tested against here.
"""

from __future__ import annotations

import http.client
import os
import socket
import struct
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

SECRET = "tests-secret-key-of-nobody"
KEY_ID = "AKIATESTSKEYID"
SERVER = """
import sys
from moto.server import ThreadedMotoServer
server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
server.start()
print(server.get_host_and_port()[1], flush=True)
sys.stdin.read()
"""
SLOW_DOWN = (
    b"<?xml version='1.0'?><Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"
)
DENIED = b"<?xml version='1.0'?><Error><Code>AccessDenied</Code><Message>no</Message></Error>"


@dataclass(frozen=True)
class Fault:
    """What happens to a request. ``status``: it is answered so and goes no further; the others are about its answer.

    ``delay_s`` before it is passed on; ``hang_s``: it is not answered, and the connection is held; ``keep``: so many
    bytes of the body come, then the connection ends; ``short``: so many come, and no more are announced; ``reset``: the
    connection ends without an answer, after the request was ``served`` or before; ``flip``: this byte is another one.
    """

    status: int = 0
    body: bytes = b""
    delay_s: float = 0.0
    hang_s: float = 0.0
    keep: int | None = None
    short: int | None = None
    reset: bool = False
    served: bool = True
    flip: int | None = None


Rule = Callable[[str, str, dict[str, str]], Fault | None]


class Proxy:
    """Passes requests on to a server; ``rule`` (method, path, headers) says what goes wrong with each.

    Attributes:
        seen: method and path of every request.
    """

    def __init__(self, upstream: int) -> None:
        self.rule: Rule = lambda method, path, headers: None
        self.seen: list[tuple[str, str]] = []
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True

            def log_message(self, *_: object) -> None:
                """Not on stderr."""

            def serve(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                headers = {name.lower(): value for name, value in self.headers.items()}
                proxy.seen.append((self.command, self.path))
                fault = proxy.rule(self.command, self.path, headers) or Fault()
                time.sleep(fault.delay_s)
                if fault.status:
                    self._answer(fault.status, {}, fault.body)
                    return
                if fault.hang_s:
                    time.sleep(fault.hang_s)
                if (fault.reset and not fault.served) or fault.hang_s:
                    self._reset()
                    return
                upstream_connection = http.client.HTTPConnection("127.0.0.1", upstream, timeout=30)
                upstream_connection.request(self.command, self.path, body, headers)
                answer = upstream_connection.getresponse()
                data = answer.read()
                kept = {name: value for name, value in answer.getheaders() if name.lower() not in HOP}
                upstream_connection.close()
                if fault.reset:
                    self._reset()
                    return
                if fault.flip is not None and len(data) > fault.flip:
                    data = data[: fault.flip] + bytes([data[fault.flip] ^ 1]) + data[fault.flip + 1 :]
                self._answer(answer.status, kept, data, fault)

            def _answer(self, status: int, headers: dict[str, str], data: bytes, fault: Fault | None = None) -> None:
                fault = fault or Fault()
                self.send_response_only(status)
                length = next((value for name, value in headers.items() if name.lower() == "content-length"), None)
                data = data if fault.short is None else data[: fault.short]
                for name, value in headers.items():
                    if name.lower() != "content-length":
                        self.send_header(name, value)
                announced = length if self.command == "HEAD" and length is not None else str(len(data))
                self.send_header("Content-Length", announced)
                self.end_headers()
                if self.command == "HEAD":
                    return
                if fault.keep is not None and fault.keep < len(data):
                    self.wfile.write(data[: fault.keep])
                    self.wfile.flush()
                    self._reset()
                    return
                self.wfile.write(data)

            def _reset(self) -> None:
                self.close_connection = True
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                self.connection.close()

            do_GET = do_PUT = do_HEAD = do_DELETE = do_POST = serve

        class Quiet(ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, *_: object) -> None:
                """A client that hung up is what some of the tests are about."""

        self._server = Quiet(("127.0.0.1", 0), Handler)
        self.port = self._server.server_address[1]
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


HOP = {"connection", "keep-alive", "transfer-encoding", "server", "date"}


@contextmanager
def s3_server() -> Iterator[int]:
    """moto in a process of its own, on a port that is free; it ends with this process, too."""
    server = subprocess.Popen(
        [sys.executable, "-c", SERVER],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    try:
        assert server.stdout is not None
        yield int(server.stdout.readline())
    finally:
        server.kill()
        server.communicate()


@dataclass(frozen=True)
class Cloud:
    """A server with one bucket in it, and the proxy that requests of `environment` go through."""

    port: int
    proxy: Proxy
    bucket: str

    def url(self, name: str = "") -> str:
        """A prefix that nobody has used."""
        return f"s3://{self.bucket}/{name or uuid.uuid4().hex}/c.zarr"

    @property
    def environment(self) -> dict[str, str]:
        return {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{self.proxy.port}",
            "AWS_ALLOW_HTTP": "true",
            "AWS_REGION": "us-east-1",
            "AWS_ACCESS_KEY_ID": KEY_ID,
            "AWS_SECRET_ACCESS_KEY": SECRET,
        }

    def request(self, method: str, path: str, body: bytes | None = None) -> tuple[int, bytes]:
        """To the server itself, by no client of ours."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        credentials = f"AWS4-HMAC-SHA256 Credential={KEY_ID}/20260101/us-east-1/s3/aws4_request"
        connection.request(method, path, body, {"Authorization": credentials})
        answer = connection.getresponse()
        data = answer.read()
        connection.close()
        return answer.status, data


@pytest.fixture(scope="session")
def one_cloud() -> Iterator[Cloud]:
    pytest.importorskip("obstore")
    pytest.importorskip("moto")
    with s3_server() as port:
        proxy = Proxy(port)
        cloud = Cloud(port, proxy, "feedfast-tests")
        assert cloud.request("PUT", f"/{cloud.bucket}")[0] == 200
        yield cloud
        proxy.close()


@pytest.fixture
def cloud(one_cloud: Cloud, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cloud]:
    """A bucket that this process finds by its environment; nothing goes wrong until ``proxy.rule`` says so."""
    for name in list(os.environ):
        if name.startswith("AWS_"):
            monkeypatch.delenv(name)
    for name, value in one_cloud.environment.items():
        monkeypatch.setenv(name, value)
    one_cloud.proxy.seen.clear()
    yield one_cloud
    one_cloud.proxy.rule = lambda method, path, headers: None
