"""Servers on loopback: files with faults, an S3 API behind a proxy with faults, nginx."""

import http.client
import os
import shutil
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

from benchmarks._range_server import RangeHandler, RangeServer


class FaultyServer(RangeServer):
    """Answers every ``every``-th request with a fault, as many times as ``faults`` says.

    kind: ``throttle`` (503), ``drop`` (the connection breaks in the middle), ``stall`` (nothing
    comes), ``slow`` (a pause before the answer), ``forbid`` (403).
    """

    def __init__(self, root: Path, kind: str = "", every: int = 3, faults: int = 10**9) -> None:
        super().__init__(root)
        self.kind, self.every, self.left = kind, every, faults
        self.num_faults = 0
        self.stall_seconds = 30.0

    def fault(self, handler: RangeHandler) -> bool:
        if not self.kind or self.left <= 0 or self.num_requests % self.every:
            return False
        self.left -= 1
        self.num_faults += 1
        if self.kind == "throttle":
            handler.refuse(503)
        elif self.kind == "forbid":
            handler.refuse(403)
        elif self.kind == "drop":
            handler.close_connection = True
            if handler.command == "GET":
                handler.send_response(206)
                handler.send_header("Content-Length", "100000")
                handler.end_headers()
                handler.wfile.write(b"part of the answer")
        elif self.kind == "stall":
            time.sleep(self.stall_seconds)
            handler.close_connection = True
        else:
            time.sleep(0.1)
            return False
        return True


class ProxyHandler(RangeHandler):
    """Hands requests on to another server, with the other's answers."""

    def do_GET(self) -> None:  # noqa: N802
        server = self.server
        server.num_requests += 1
        length = int(self.headers.get("Content-Length", 0))
        body = self.rfile.read(length) if length else None
        if self.command in ("GET", "HEAD") and server.fault(self):
            return
        connection = http.client.HTTPConnection("127.0.0.1", server.upstream_port)
        connection.request(self.command, self.path, body, dict(self.headers))
        answer = connection.getresponse()
        content = answer.read()
        self.send_response(answer.status)
        for name, value in answer.getheaders():
            if name.lower() not in ("transfer-encoding", "connection", "content-length"):
                self.send_header(name, value)
        size = answer.getheader("Content-Length") if self.command == "HEAD" else len(content)
        self.send_header("Content-Length", str(size or 0))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)
        connection.close()

    do_HEAD = do_PUT = do_POST = do_DELETE = do_GET


class FaultyProxy(FaultyServer):
    """A proxy before the server at a port of this machine, with the faults of `FaultyServer`."""

    def __init__(self, upstream_port: int, kind: str = "", every: int = 3) -> None:
        super().__init__(Path("/nonexistent"), kind, every)
        self.RequestHandlerClass = ProxyHandler
        self.upstream_port = upstream_port


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@contextmanager
def running(command: list[str], port: int, log: Path):
    """A server in a process of its own, once it listens at ``port``."""
    with log.open("wb") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file)
        try:
            deadline = time.monotonic() + 90
            while True:
                assert process.poll() is None, log.read_text()
                with socket.socket() as client:
                    if client.connect_ex(("127.0.0.1", port)) == 0:
                        break
                assert time.monotonic() < deadline, log.read_text()
                time.sleep(0.1)
            yield
        finally:
            process.terminate()
            process.wait(20)


@contextmanager
def s3_server(log: Path):
    """The port of an S3 API that holds nothing yet."""
    port = free_port()
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    with running(command, port, log):
        yield port


@contextmanager
def nginx_server(nginx: str, root: Path, folder: Path):
    """The URL of an nginx that serves ``root``."""
    port = free_port()
    user = "user root;" if os.getuid() == 0 else ""
    paths = "".join(
        f"{kind}_temp_path {folder}/{kind};"
        for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    (folder / "nginx.conf").write_text(
        f"{user} daemon off; worker_processes 1; pid {folder}/nginx.pid; error_log stderr;"
        f" events {{}} http {{ access_log {folder}/access.log; {paths}"
        f" server {{ listen 127.0.0.1:{port}; root {root}; }} }}"
    )
    command = [nginx, "-e", "stderr", "-c", str(folder / "nginx.conf"), "-p", str(folder)]
    with running(command, port, folder / "nginx.log"):
        yield f"http://127.0.0.1:{port}"


def find_nginx() -> str | None:
    """Debian's nginx, which is not on every PATH."""
    return shutil.which("nginx", path=f"{os.environ['PATH']}:/usr/sbin:/usr/local/sbin")
