"""A web server for one reader on this computer: the live report of a run, or of all runs below a folder.

Read-only, and it opens no file that a request names: addresses are looked up among the pages that it has. The address
that it prints holds a secret, without which every request is refused alike, so that neither other users of the computer
nor pages of other sites see anything. It is not stored as a cookie, which a browser would send to every port.
"""

from __future__ import annotations

import hmac
import re
import secrets
import socketserver
import sys
import threading
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from safelight.errors import UserError
from safelight.trainer.live.followed_run import FollowedRun
from safelight.trainer.live.live_page import CSP, LivePage
from safelight.trainer.live.runs_below import RunList, find_runs
from safelight.untrusted import is_inside

HOST = "127.0.0.1"
PORT = 8017
# a page of another site that made its own name point here would send that name
HOST_NAMES = re.compile(r"(127\.0\.0\.1|localhost|\[::1\])(:[0-9]{1,5})?", re.IGNORECASE)
MAX_CONNECTIONS = 64
# of a list's runs; each takes as much memory as its report is large
MAX_PAGES = 8
TIMEOUT_S = 20
HEADERS = {
    # as the page's own, which cannot say this one
    "Content-Security-Policy": f"{CSP}; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
}
HTML, JSON, TEXT = "text/html; charset=utf-8", "application/json", "text/plain; charset=utf-8"


def open_server(folder: Path, port: int | None) -> LiveServer:
    """Return a server of a run, or of the runs below a folder, that listens already. A context manager.

    port: None for PORT, or any free one if that is taken. Raises UserError for a folder that is neither, and for a
    given port that cannot be had.
    """
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder; give a run folder, or a folder that holds runs")
    if port is not None and not 0 <= port < 2**16:
        raise UserError(f"--port {port} is not a port; ports go up to 65535")
    for number in (PORT, 0) if port is None else (port,):
        try:
            return LiveServer(folder, number)
        except OSError as error:
            # the last of them
            if number != PORT or port is not None:
                reason = error.strerror or error
                raise UserError(f"port {number} cannot be used ({reason}); leave out --port, or name another") from None
    raise AssertionError


class LiveServer(ThreadingHTTPServer):
    """address: of its first page, with the secret."""

    # a request that still runs does not keep the process alive
    daemon_threads = True

    def __init__(self, folder: Path, port: int):
        self._folder, self._is_run = folder, (folder / "config.toml").is_file()
        self._token = secrets.token_urlsafe(24)
        self._failure: BaseException | None = None
        self._slots = threading.BoundedSemaphore(MAX_CONNECTIONS)
        self._pages: dict[str, LivePage] = {}
        self._pages_lock = threading.Lock()
        runs = RunList(folder)
        self._first = self._page_of(folder) if self._is_run else LivePage(runs.mark, runs.read, self._fail)
        super().__init__((HOST, port), _Handler)
        self.address = f"http://{HOST}:{self.server_port}/{self._token}/"

    def server_bind(self) -> None:
        # without looking up this computer's name, which may take seconds
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = HOST, self.server_address[1]

    def serve_until_interrupted(self) -> None:
        """Serve until Ctrl-C. Raises what a page failed with, if that is nobody's fault but ours."""
        try:
            self.serve_forever()
        except KeyboardInterrupt:
            # the terminal shows ^C
            print(file=sys.stderr)
        if self._failure is not None:
            raise self._failure

    def answer(self, path: str) -> tuple[HTTPStatus, str, str, str]:
        """Return (status, type, body, where to go instead) for a path. One without the secret tells nothing."""
        token, *names = path.partition("?")[0].removeprefix("/").split("/")
        if not hmac.compare_digest(token.encode("utf-8", "replace"), self._token.encode()):
            return HTTPStatus.FORBIDDEN, TEXT, "forbidden\n", ""
        page: LivePage | None = self._first
        if names[:1] == ["runs"] and len(names) > 2:
            page, names = self._listed(names[1]), names[2:]
        # an address without its last slash leads to the same with it: a page's own addresses are relative to it
        if not names:
            return HTTPStatus.TEMPORARY_REDIRECT, TEXT, "", f"/{self._token}/"
        if names[:1] == ["runs"] and len(names) == 2 and self._listed(names[1]) is not None:
            return HTTPStatus.TEMPORARY_REDIRECT, TEXT, "", f"/{self._token}/runs/{names[1]}/"
        body, kind = None, JSON
        if page is not None and names == [""]:
            body, kind = page.html(), HTML
        elif page is not None and names == ["version"]:
            body = page.version()
        elif page is not None and len(names) == 2 and names[0] == "part":
            body = page.part(names[1])
        if body is None:
            return HTTPStatus.NOT_FOUND, TEXT, "not found: this run is not, or no longer, in the folder\n", ""
        return HTTPStatus.OK, kind, body, ""

    def _page_of(self, run: Path, home: str = "") -> LivePage:
        followed = FollowedRun(run)
        return LivePage(followed.mark, followed.read, self._fail, home)

    def _listed(self, key: str) -> LivePage | None:
        """Return the page of a run below the folder, None if there is no such run."""
        with self._pages_lock:
            page = self._pages.pop(key, None)
            if page is None and not self._is_run:
                run = next((run for run in find_runs(self._folder) if run.key == key), None)
                if run is not None and is_inside(run.folder, self._folder):
                    page = self._page_of(run.folder, "../../")
            if page is not None:
                # the one that was asked for longest ago comes first
                self._pages[key] = page
                if len(self._pages) > MAX_PAGES:
                    del self._pages[next(iter(self._pages))]
            return page

    def _fail(self, error: BaseException) -> None:
        """End serving: the command reports the error as a bug."""
        self._failure = error
        threading.Thread(target=self.shutdown, daemon=True).start()

    def process_request(self, request, client_address) -> None:
        if not self._slots.acquire(blocking=False):
            self.shutdown_request(request)
            return
        super().process_request(request, client_address)

    def process_request_thread(self, request, client_address) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._slots.release()

    def handle_error(self, request, client_address) -> None:
        error = sys.exc_info()[1]
        # a browser that goes away, or sends nothing, is no error; no request ends the server
        if not isinstance(error, OSError):
            print(f"safelight report: a request failed: {type(error).__name__}", file=sys.stderr)


class _Handler(BaseHTTPRequestHandler):
    timeout = TIMEOUT_S
    server: LiveServer

    def do_GET(self) -> None:
        hosts = self.headers.get_all("Host", [])
        if len(hosts) != 1 or not HOST_NAMES.fullmatch(hosts[0].strip()):
            self._send(HTTPStatus.FORBIDDEN, TEXT, "forbidden\n")
            return
        self._send(*self.server.answer(self.path))

    do_HEAD = do_GET

    def send_error(self, code, message=None, explain=None) -> None:
        """Answer what is not HTTP, or another method, in one line that repeats nothing of the request."""
        is_method = code == HTTPStatus.NOT_IMPLEMENTED
        self._send(HTTPStatus.METHOD_NOT_ALLOWED if is_method else HTTPStatus(code), TEXT, "not allowed\n")

    def _send(self, status: HTTPStatus, kind: str, body: str, location: str = "") -> None:
        content = body.encode("utf-8")
        self.send_response_only(status)
        for name, value in HEADERS.items():
            self.send_header(name, value)
        if status == HTTPStatus.METHOD_NOT_ALLOWED:
            self.send_header("Allow", "GET, HEAD")
        if location:
            self.send_header("Location", location)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, *args) -> None:
        """Print nothing: an address holds the secret."""
