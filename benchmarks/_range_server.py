"""A server of files with HTTP ranges on this machine, whose bandwidth can be limited.

    python -m benchmarks._range_server DIRECTORY BYTES_PER_SECOND

prints its URL, answers until its input ends, and prints the bytes that it sent. 0: without limit.
"""

from __future__ import annotations

import re
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

_RANGE = re.compile(r"bytes=(\d+)-(\d+)")
_PIECE = 1 << 14


class RangeServer(ThreadingHTTPServer):
    """Files below ``root`` at ``http://127.0.0.1:PORT/``, each with an entity tag.

    bytes_per_s: of all answers together; None: without limit. num_bytes, num_requests: answered.
    """

    daemon_threads = True
    request_queue_size = 256

    def __init__(self, root: Path, bytes_per_s: float | None = None) -> None:
        super().__init__(("127.0.0.1", 0), RangeHandler)
        self.root = root
        self.bytes_per_s = bytes_per_s
        self.num_bytes = self.num_requests = 0
        self._free_at = 0.0
        self._lock = threading.Lock()

    @property
    def url(self) -> str:
        """Where it answers."""
        return f"http://127.0.0.1:{self.server_port}"

    def account(self, num_bytes: int) -> None:
        """Count bytes, and wait until the bandwidth has carried them."""
        with self._lock:
            self.num_bytes += num_bytes
            if self.bytes_per_s is None:
                return
            now = time.monotonic()
            self._free_at = max(now, self._free_at) + num_bytes / self.bytes_per_s
            delay = self._free_at - now
        time.sleep(delay)

    def fault(self, handler: RangeHandler) -> bool:
        """Whether a request was answered wrongly; for tests to override."""
        return handler.path == "*"

    @contextmanager
    def serving(self) -> Iterator[RangeServer]:
        """Answer until the block ends."""
        thread = threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True)
        thread.start()
        try:
            yield self
        finally:
            self.shutdown()
            self.server_close()


class RangeHandler(BaseHTTPRequestHandler):
    """One connection."""

    server: RangeServer
    protocol_version = "HTTP/1.1"
    # Answers in two packets wait for each other otherwise.
    disable_nagle_algorithm = True

    def do_HEAD(self) -> None:
        """Answer with the headers alone."""
        self.do_GET()

    def do_GET(self) -> None:
        """Answer with a file, or a range of it."""
        server = self.server
        server.num_requests += 1
        if server.fault(self):
            return
        path = server.root / self.path.lstrip("/").partition("?")[0]
        if ".." in self.path or not path.is_file():
            self.refuse(404)
            return
        status = path.stat()
        tag = f'"{status.st_mtime_ns:x}-{status.st_size:x}"'
        if self.headers.get("If-Match", tag) != tag:
            self.refuse(412)
            return
        match = _RANGE.fullmatch(self.headers.get("Range", ""))
        start, stop = (int(match[1]), int(match[2]) + 1) if match else (0, status.st_size)
        stop = min(stop, status.st_size)
        self.send_response(206 if match else 200)
        if match:
            self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{status.st_size}")
        self.send_header("ETag", tag)
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(max(0, stop - start)))
        self.end_headers()
        if self.command == "GET":
            self.send_file(path, start, stop)

    def send_file(self, path: Path, start: int, stop: int) -> None:
        """Send bytes of a file at the server's bandwidth."""
        with path.open("rb") as file:
            file.seek(start)
            while start < stop:
                piece = file.read(min(_PIECE, stop - start))
                if not piece:
                    break
                self.server.account(len(piece))
                self.wfile.write(piece)
                start += len(piece)

    def refuse(self, status: int) -> None:
        """Answer with a status alone."""
        self.send_response(status)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: Any) -> None:
        """Print nothing."""


if __name__ == "__main__":
    with RangeServer(Path(sys.argv[1]), float(sys.argv[2]) or None).serving() as own:
        print(own.url, flush=True)
        sys.stdin.read()
        print(own.num_bytes)
