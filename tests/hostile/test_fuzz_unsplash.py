"""10,000 tables, conditions and answers of a server each: every one ends in a result or in a reason, none hangs."""

from __future__ import annotations

import random
import socket
import threading
import time

import pytest

from safelight.data.sources.download import ALSO_FROM, Limits, Wanted, download
from safelight.data.sources.table_filter import columns_of, holds, parse_conditions
from safelight.data.sources.unsplash import DERIVED, Request, choose
from safelight.errors import UserError
from tests.data.photo_server import jpeg
from tests.data.test_unsplash import COLUMNS, row, write_table
from tests.hostile.test_fuzz_prepare import mutated

NUM_INPUTS = 10_000
pytestmark = pytest.mark.slow


def test_tables_of_any_bytes(tmp_path):
    pick = random.Random(1)
    path = tmp_path / "photos.tsv000"
    contents = [
        write_table(path, [row(number) for number in range(4)], delimiter=delimiter).read_bytes() for delimiter in "\t,"
    ]
    num_read = 0
    for _ in range(NUM_INPUTS):
        path.write_bytes(mutated(pick.choice(contents), pick))
        began = time.monotonic()
        try:
            chosen, rejected, num = choose(Request((path,), captions="ai", where="photo_width > 5"))
        except UserError:
            continue
        num_read += 1
        assert len(chosen) <= num
        for one in chosen:
            assert (len(one.id), one.id.isascii(), "/" in one.id) == (11, True, False)
            assert one.caption.encode() is not None
        assert all(rejection.reason.isprintable() or rejection.kind == "row" for rejection in rejected)
        assert time.monotonic() - began < 1
    assert num_read > NUM_INPUTS / 3


def test_conditions_of_any_words():
    pick = random.Random(2)
    words = ["photo_width", "landscape", "camera", "and", "AND", "=", "==", "!=", "<", ">=", "~", "'", '"', "5", "-1e9"]
    words += ["nan", "inf", "'a b'", "(", ")", "__class__", "\0", "é", "\u2028", "canon", " ", "!", "1_0", "٣"]
    one = dict.fromkeys(COLUMNS, "") | row(1)
    num_read = 0
    for _ in range(NUM_INPUTS):
        text = pick.choice(("", " ")).join(pick.choices(words, k=pick.randrange(1, 9)))
        try:
            conditions = parse_conditions(text)
            columns_of(conditions, COLUMNS, DERIVED)
        except UserError:
            continue
        num_read += 1
        assert all(holds(condition, one, DERIVED) in (True, False) for condition in conditions)
    assert num_read > 100


class AnyAnswer:
    """A server whose every answer is a proper one with some bytes changed, and sometimes a part of one."""

    def __init__(self):
        self.pick, self.photo = random.Random(3), jpeg(1)
        self._socket = socket.create_server(("127.0.0.1", 0), backlog=64)
        self.address = f"127.0.0.1:{self._socket.getsockname()[1]}"
        heads = (
            'HTTP/1.1 200 OK\r\nContent-Type: image/jpeg\r\nContent-Length: {n}\r\nETag: "1"\r\n\r\n',
            "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nSet-Cookie: a=b; Domain=x\r\n\r\n{n:x}\r\n",
            "HTTP/1.1 302 Found\r\nLocation: http://127.0.0.1/\r\nContent-Length: 0\r\n\r\n",
            "HTTP/1.1 302 Found\r\nLocation: //10.0.0.1:80/a?b#c\r\n\r\n",
            "HTTP/1.1 206 Partial Content\r\nContent-Range: bytes 0-9/10\r\nContent-Length: 10\r\n\r\n",
            "HTTP/1.1 429 Slow\r\nRetry-After: 0\r\nContent-Length: 0\r\n\r\n",
            "HTTP/1.1 503 Busy\r\nRetry-After: Wed, 21 Oct 2015 07:28:00 GMT\r\nContent-Length: 0\r\n\r\n",
            "HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: {n}\r\n\r\n",
        )
        self.answers = [head.format(n=len(self.photo)).encode() + self.photo for head in heads]
        self.answers[1] += b"\r\n0\r\n\r\n"
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self):
        while True:
            try:
                connection, _ = self._socket.accept()
            except OSError:
                return
            threading.Thread(target=self._answer, args=(connection,), daemon=True).start()

    def _answer(self, connection):
        with connection:
            try:
                connection.recv(10_000)
                connection.sendall(mutated(self.pick.choice(self.answers), self.pick))
                connection.shutdown(socket.SHUT_WR)
                connection.settimeout(1)
                while connection.recv(10_000):
                    pass
            except OSError:
                pass

    def close(self):
        self._socket.close()


def test_answers_of_any_bytes(tmp_path, monkeypatch):
    server = AnyAnswer()
    monkeypatch.setenv(ALSO_FROM, server.address)
    limits = Limits(read_s=1, total_s=3, connect_s=2, num_tries=2, first_wait_s=0, max_wait_s=1, max_failures=10**9)
    num_whole = num_failed = 0
    try:
        for start in range(0, NUM_INPUTS, 500):
            wanted = [Wanted(f"http://{server.address}/{n}", tmp_path / f"{n}.jpg") for n in range(start, start + 500)]
            failures = download(wanted, lambda done, total, note: None, limits)
            failed = {failure.wanted.path for failure in failures}
            assert all(failure.reason for failure in failures)
            num_failed += len(failed)
            for one in wanted:
                assert one.path.exists() == (one.path not in failed)
                if one.path.exists():
                    num_whole += 1
                    assert one.path.read_bytes().startswith(b"\xff\xd8\xff")
    finally:
        server.close()
    assert num_whole > NUM_INPUTS / 10
    assert num_failed > NUM_INPUTS / 10
