"""A live server in this process, and requests to it as nobody's browser sends them."""

from __future__ import annotations

import contextlib
import http.client
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from safelight.trainer.live.serve import LiveServer, open_server


@dataclass(frozen=True)
class Answer:
    status: int
    headers: http.client.HTTPMessage
    body: bytes

    @property
    def text(self) -> str:
        return self.body.decode()

    @property
    def json(self) -> dict:
        return json.loads(self.body)


@dataclass(frozen=True)
class Client:
    server: LiveServer

    @property
    def token(self) -> str:
        return self.server.address.split("/")[3]

    def ask(self, path: str = "", *, method: str = "GET", host: str | None = None, token: str | None = None) -> Answer:
        """Ask for a path behind the secret. host: '' for none."""
        return self.raw(f"/{self.token if token is None else token}/{path}", method, host)

    def raw(self, target: str, method: str = "GET", host: str | None = None) -> Answer:
        connection = http.client.HTTPConnection("127.0.0.1", self.server.server_port, timeout=20)
        try:
            connection.putrequest(method, target, skip_host=True)
            if host != "":
                connection.putheader("Host", host or f"127.0.0.1:{self.server.server_port}")
            connection.endheaders()
            response = connection.getresponse()
            return Answer(response.status, response.headers, response.read())
        finally:
            connection.close()


@contextlib.contextmanager
def serving(folder: Path) -> Iterator[Client]:
    """A server of a folder on any free port; what it failed with is raised at the end."""
    with open_server(folder, 0) as server:
        failed: list[BaseException] = []

        def serve() -> None:
            try:
                server.serve_until_interrupted()
            except BaseException as error:
                failed.append(error)

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield Client(server)
        finally:
            server.shutdown()
            thread.join(20)
        if failed:
            raise failed[0]
