"""A web server on this machine that serves invented photographs, and misbehaves where a test says so."""

from __future__ import annotations

import io
import sys
import threading
from collections import Counter
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

import numpy as np
from PIL import Image


def jpeg(number: int, width: int = 64, height: int = 48) -> bytes:
    """Return an invented photograph, a different one for each number."""
    pixels = np.random.default_rng(number).integers(0, 255, (height // 8, width // 8, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).resize((width, height), Image.Resampling.NEAREST).save(buffer, "JPEG", quality=80)
    return buffer.getvalue()


class Handler(BaseHTTPRequestHandler):
    """Answers with the file of the request's path, or as the path's behaviour does."""

    protocol_version = "HTTP/1.1"

    def do_GET(self):
        server, path = self.server, urlsplit(self.path).path
        with server.lock:
            server.requests.append((self.path, dict(self.headers)))
            server.num_of_path[path] += 1
        behaviour = server.behaviours.get(path)
        if behaviour is not None:
            behaviour(self, server.num_of_path[path])
        elif path in server.files:
            self.send_file(server.files[path])
        else:
            self.send(404, b"no such photo", {"Content-Type": "text/plain"})

    def send(self, status: int, body: bytes = b"", headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(body))} | (headers or {})).items():
            if value is not None:
                self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def send_file(self, content: bytes, headers: dict[str, str] | None = None) -> None:
        """Send a file, or the part that is asked for."""
        etag = f'"{hash(content):x}"'
        headers = {"Content-Type": "image/jpeg", "ETag": etag, **(headers or {})}
        wanted = self.headers.get("Range", "")
        if wanted.startswith("bytes=") and self.headers.get("If-Range") == headers["ETag"]:
            start = int(wanted.removeprefix("bytes=").rstrip("-"))
            total = len(content)
            headers["Content-Range"] = f"bytes {start}-{total - 1}/{total}"
            self.send(206, content[start:], headers)
        else:
            self.send(200, content, headers)

    def log_message(self, *arguments):
        pass


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request, client_address):
        """Report a behaviour's mistakes, but not clients that have gone."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)


class PhotoServer:
    """Serves `files` by path until it is closed. behaviours: path -> what answers in place of the file.

    A behaviour is called with the handler and how many requests of the path there have been, this one included.
    requests: (path with query, headers) of every request.
    """

    def __init__(self):
        self._server = _Server(("127.0.0.1", 0), Handler)
        self._server.lock = threading.Lock()
        self._server.files = self.files = {}
        self._server.behaviours = self.behaviours = {}
        self._server.requests = self.requests = []
        self._server.num_of_path = self.num_of_path = Counter()
        self.address = f"127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def url(self, path: str) -> str:
        return f"http://{self.address}{path}"

    def add(self, path: str, content: bytes | Callable) -> str:
        """Serve a file, or let a behaviour answer; return the address."""
        (self.behaviours if callable(content) else self.files)[path] = content
        return self.url(path)

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
