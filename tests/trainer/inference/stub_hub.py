"""A Hugging Face hub for tests: just enough of its HTTP API to create a repository and commit to it."""

from __future__ import annotations

import base64
import contextlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

TOKEN = "hf_of_a_test"


@dataclass
class StubHub:
    """repos: name -> file -> content. private: names of private repositories. fails_at: a path that is answered by
    closing the connection. status: of every answer to a request that needs a token, if not 200."""

    repos: dict[str, dict[str, bytes]] = field(default_factory=dict)
    private: set[str] = field(default_factory=set)
    asked: list[tuple[str, str]] = field(default_factory=list)
    fails_at: str = "nowhere"
    status: int = 200
    url: str = ""

    def answer(self, method: str, path: str, token: str, body: bytes) -> tuple[int, dict]:
        self.asked.append((method, path))
        if token != f"Bearer {TOKEN}":
            return 401, {"error": "Invalid username or password."}
        if self.status != 200:
            return self.status, {"error": "you may not"}
        if path.startswith("/api/whoami"):
            return 200, {"type": "user", "name": "me", "auth": {}}
        if path in ("/api/validate-yaml", "/api/agent-harnesses"):
            return 200, {"errors": [], "warnings": []}
        if path == "/api/repos/create":
            values = json.loads(body)
            name = f"{values.get('organization') or 'me'}/{values['name']}"
            if name in self.repos:
                return 409, {"error": "You already created this model repo", "url": f"{self.url}/{name}"}
            self.repos[name] = {}
            if values.get("private") or values.get("visibility") == "private":
                self.private.add(name)
            return 200, {"url": f"{self.url}/{name}", "name": name, "id": name}
        name = "/".join(path.removeprefix("/api/models/").split("/")[:2]).partition("?")[0]
        if name not in self.repos:
            return 404, {"error": "Repository not found"}
        if "/preupload/" in path:
            files = [
                {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in json.loads(body)["files"]
            ]
            return 200, {"files": files}
        if "/commit/" in path:
            for line in body.splitlines():
                row = json.loads(line)
                if row["key"] == "file":
                    self.repos[name][row["value"]["path"]] = base64.b64decode(row["value"]["content"])
            return 200, {"commitUrl": f"{self.url}/{name}/commit/{'a' * 40}", "commitOid": "a" * 40, "success": True}
        return 200, {"id": name, "modelId": name, "sha": "a" * 40, "siblings": [], "tags": [], "downloads": 0}


@contextlib.contextmanager
def serving(hub: StubHub) -> Iterator[StubHub]:
    """Serve a hub on this computer, and set its url."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *arguments) -> None:
            pass

        def _body(self) -> bytes:
            if self.headers.get("Transfer-Encoding") != "chunked":
                return self.rfile.read(int(self.headers.get("Content-Length") or 0))
            body = b""
            while num := int(self.rfile.readline(), 16):
                body += self.rfile.read(num)
                self.rfile.readline()
            self.rfile.readline()
            return body

        def _answer(self) -> None:
            body = self._body()
            if hub.fails_at in self.path:
                self.close_connection = True
                self.connection.close()
                return
            status, values = hub.answer(self.command, self.path, self.headers.get("Authorization", ""), body)
            content = json.dumps(values).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            if status == 404:
                self.send_header("X-Error-Code", "RepoNotFound")
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

        do_GET = do_POST = do_HEAD = _answer

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
