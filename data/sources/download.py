"""Download many files from web addresses that a stranger's table names.

A table may name anything, and so may a server's answer: other schemes, the router of the home network, an endless file,
a page in place of a picture. So only http and https are spoken, only public addresses are connected to, and every file
has a limit of bytes and seconds. What fails for a while is tried again, what was received before a kill is kept.
"""

from __future__ import annotations

import ipaddress
import json
import os
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import closing, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import BinaryIO

import httpcore2
import httpx2

from safelight.data.atomic import atomic_writer, naming, sync_folder
from safelight.text import counted, shortened
from safelight.untrusted import UnsafeFile, open_to_write, read_json_object

# HOST:PORT that is connected to although its address is not public: for tests, whose servers run on this machine
ALSO_FROM = "SAFELIGHT_DOWNLOAD_ALSO_FROM"
USER_AGENT = "safelight"
NO_JPEG = "what the server sends is not a JPEG"
JPEG_START, JPEG_END = b"\xff\xd8\xff", b"\xff\xd9"
# some programs write more behind the end
MAX_BYTES_AFTER_END = 2**12
# of types that say nothing, which some servers send for every file
UNKNOWN_TYPES = ("", "application/octet-stream", "binary/octet-stream")
# answers that a later request may not get
PASSING_STATUS = (408, 425, 429, 500, 502, 503, 504)
REDIRECT_STATUS = (301, 302, 303, 307, 308)
# how often a worker looks whether it shall stop
POLL_S = 0.5
# over which the speed is measured
SPEED_WINDOW_S = 5.0
MAX_NOTE_BYTES = 2**14
# of a file's length
MAX_DIGITS = 18


@dataclass(frozen=True)
class Limits:
    """Bounds of a download. Sizes are of one file, times of one try of it.

    read_s: the longest silence. max_wait_s: the longest pause that a server may ask for. max_failures: files that may
    fail one after the other before the rest is given up, as the network is down or the server refuses us.
    """

    max_bytes: int = 2**26
    num_parallel: int = 8
    num_tries: int = 5
    num_redirects: int = 5
    connect_s: float = 10.0
    read_s: float = 20.0
    total_s: float = 300.0
    first_wait_s: float = 1.0
    max_wait_s: float = 120.0
    max_failures: int = 20


@dataclass(frozen=True)
class Wanted:
    """A JPEG to download. path: the file that it becomes, once it is whole."""

    url: str
    path: Path


@dataclass(frozen=True)
class Failure:
    """A file that could not be downloaded, with the reason."""

    wanted: Wanted
    reason: str


class _Refused(Exception):
    """A file that another try would not get either."""


class _Failed(Exception):
    """A try that failed for a reason that may pass. wait_s: the pause that the server asks for, or None."""

    def __init__(self, reason: str, wait_s: float | None = None):
        super().__init__(reason)
        self.wait_s = wait_s


class _Stopped(Exception):
    """The download was interrupted."""


def is_public(address: str) -> bool:
    """Return whether an IP address is one of the public internet, also the one that it wraps for IPv6."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        low_32 = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
        is_nat64 = ip in ipaddress.IPv6Network("64:ff9b::/96")
        wrapped = [ip.ipv4_mapped, ip.sixtofour, *(ip.teredo or ()), low_32 if is_nat64 else None]
        if inner := [other for other in wrapped if other is not None]:
            return all(map(is_public, map(str, inner)))
    return ip.is_global and not (ip.is_multicast or ip.is_reserved)


def public_addresses(host: str, port: int) -> list[str]:
    """Return the public IP addresses of a host. Raises _Refused if it has others only, _Failed if it is unknown."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise _Failed(f"the address of {shortened(host)} is not known ({getattr(error, 'strerror', error)})") from None
    addresses = list(dict.fromkeys(str(entry[4][0]) for entry in found))
    also = os.environ.get(ALSO_FROM)
    public = [address for address in addresses if is_public(address) or f"{address}:{port}" == also]
    if not public:
        name = host if host == addresses[0] else f"{shortened(host)} ({addresses[0]})"
        raise _Refused(f"{name} is no address of the public internet")
    return public


class _Stream(httpcore2.NetworkStream):
    """A connection whose waits end when the time of the try is over, or when the download is stopped."""

    def __init__(self, inner: httpcore2.NetworkStream, network: _Network):
        self._inner, self._network = inner, network

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        end = time.monotonic() + self._network.left(timeout)
        while True:
            left = end - time.monotonic()
            self._network.left(None)
            if left <= 0:
                raise httpcore2.ReadTimeout("the server went silent")
            with suppress(httpcore2.ReadTimeout):
                return self._inner.read(max_bytes, min(POLL_S, left))

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        self._inner.write(buffer, self._network.left(timeout))

    def close(self) -> None:
        self._inner.close()

    def start_tls(self, ssl_context, server_hostname: str | None = None, timeout: float | None = None) -> _Stream:
        inner = self._inner.start_tls(ssl_context, server_hostname, self._network.left(timeout))
        return _Stream(inner, self._network)

    def get_extra_info(self, info: str):
        return self._inner.get_extra_info(info)


class _Network(httpcore2.NetworkBackend):
    """Connects one worker to public addresses.

    A name is resolved here, and the very address that was checked is connected to: a name server that answers
    differently the next time gains nothing.
    """

    def __init__(self, stop: threading.Event):
        self._stop = stop
        self.deadline = float("inf")

    def left(self, timeout: float | None) -> float:
        """Return how long to wait at most, in seconds. Raises if the time is over or the download is stopped."""
        if self._stop.is_set():
            raise _Stopped
        left = self.deadline - time.monotonic()
        if left <= 0:
            raise httpcore2.ReadTimeout("the server takes too long")
        return left if timeout is None else min(timeout, left)

    def connect_tcp(
        self, host: str, port: int, timeout: float | None = None, local_address=None, socket_options=None
    ) -> _Stream:
        addresses = public_addresses(host, port)
        for address in addresses:
            try:
                inner = httpcore2.SyncBackend().connect_tcp(
                    address, port, self.left(timeout), local_address, socket_options
                )
                return _Stream(inner, self)
            except (httpcore2.ConnectError, httpcore2.ConnectTimeout):
                if address == addresses[-1]:
                    raise
        raise AssertionError("a host without addresses")


class _Transport(httpx2.BaseTransport):
    """httpx2's way to httpcore2, over a network of our own."""

    def __init__(self, network: _Network, ssl_context):
        self.network = network
        self._pool = httpcore2.ConnectionPool(ssl_context=ssl_context, network_backend=network)

    def handle_request(self, request: httpx2.Request) -> httpx2.Response:
        url = request.url
        response = self._pool.handle_request(
            httpcore2.Request(
                request.method,
                httpcore2.URL(scheme=url.raw_scheme, host=url.raw_host, port=url.port, target=url.raw_path),
                headers=request.headers.raw,
                content=request.stream,
                extensions=request.extensions,
            )
        )
        return httpx2.Response(response.status, headers=response.headers, stream=_Body(response.stream))

    def close(self) -> None:
        """Close all connections; a later request opens a new one."""
        self._pool.close()


class _Body(httpx2.SyncByteStream):
    def __init__(self, stream):
        self._stream = stream

    def __iter__(self) -> Iterator[bytes]:
        yield from self._stream

    def close(self) -> None:
        self._stream.close()


def _why(error: Exception) -> str:
    """Return in words why a connection failed."""
    if isinstance(error, httpcore2.ConnectTimeout):
        return "the server does not answer"
    if isinstance(error, httpcore2.TimeoutException):
        return str(error) or "the server went silent"
    if isinstance(error, httpcore2.ConnectError):
        return f"no connection to the server: {error}"
    if str(error).startswith("peer closed connection"):
        return "cut off before its end"
    return f"the connection broke: {error}"


def _retry_after_s(response: httpx2.Response) -> float | None:
    """Return how many seconds the server asks to wait, None if it does not say so."""
    value = response.headers.get("retry-after", "").strip()
    if value.isascii() and value.isdigit():
        return float(value[:9])
    # dates that Python cannot read, or that it has not
    with suppress(ValueError, TypeError, LookupError, OverflowError):
        then = parsedate_to_datetime(value)
        return max(0.0, (then - datetime.now(UTC if then.tzinfo else None)).total_seconds())
    return None


def part_of(path: Path) -> Path:
    """Return the hidden file that holds what has been received of a file."""
    return path.with_name(f".{path.name}.part")


def _note_of(path: Path) -> Path:
    """Return the hidden file that says of which version of which address the part is."""
    return path.with_name(f".{path.name}.note")


def _forget(path: Path) -> None:
    part_of(path).unlink(missing_ok=True)
    _note_of(path).unlink(missing_ok=True)


def _etag_of_part(wanted: Wanted) -> str:
    """Return the version that the part received earlier belongs to; empty if there is none to go on with."""
    try:
        note = read_json_object(_note_of(wanted.path), MAX_NOTE_BYTES)
    except (OSError, UnsafeFile):
        return ""
    etag = note.get("etag")
    return etag if note.get("url") == wanted.url and isinstance(etag, str) else ""


def _strong_etag(response: httpx2.Response) -> str:
    """Return the version's name, empty if there is none of which parts can be put together."""
    etag = response.headers.get("etag", "")
    return etag if etag.startswith('"') and etag.isascii() and etag.isprintable() else ""


def _length(response: httpx2.Response) -> int | None:
    """Return how many bytes the body has, None if the answer does not say so."""
    text = response.headers.get("content-length", "")
    return int(text[:MAX_DIGITS]) if text.isascii() and text.isdigit() else None


def _end_of_rest(response: httpx2.Response, start: int, etag: str) -> int | None:
    """Return how many bytes the whole file has, None unless the answer is the rest of this version from `start` on."""
    text = response.headers.get("content-range", "")
    total = text.rpartition("/")[2]
    is_number = total.isascii() and total.isdigit() and len(total) <= MAX_DIGITS
    if response.status_code != 206 or not is_number or text != f"bytes {start}-{int(total) - 1}/{total}":
        return None
    return int(total) if _strong_etag(response) == etag else None


class Downloader:
    """Downloads a list of files with several workers.

    num_bytes: received so far. failures: files that could not be downloaded. troubles: files that are tried again, and
    why.
    """

    def __init__(self, wanted: list[Wanted], limits: Limits):
        self.limits, self.num_bytes, self.num_done = limits, 0, 0
        self.failures: list[Failure] = []
        self.troubles: dict[Path, str] = {}
        self._waiting = deque(wanted)
        self._stop = threading.Event()
        self._lock = threading.Lock()
        # no request is sent before: a server asked for a pause
        self._resume_at = 0.0
        self._num_failed_in_a_row = 0
        self._given_up = ""

    def run(self, progress: Callable[[int, str], None]) -> None:
        """Download all files. progress(files done, note) is called several times a second."""
        context = httpx2.create_ssl_context()
        num_workers = min(self.limits.num_parallel, len(self._waiting))
        speeds = deque([(time.monotonic(), 0)])
        with ThreadPoolExecutor(max(1, num_workers)) as executor:
            workers = [executor.submit(self._work, context) for _ in range(num_workers)]
            try:
                while workers:
                    done, _ = wait(workers, 1 / 4, FIRST_EXCEPTION)
                    for worker in done:
                        worker.result()
                    workers = [worker for worker in workers if worker not in done]
                    speeds.append((time.monotonic(), self.num_bytes))
                    while len(speeds) > 2 and speeds[0][0] < speeds[-1][0] - SPEED_WINDOW_S:
                        speeds.popleft()
                    (start, before), (end, now) = speeds[0], speeds[-1]
                    speed = f"{(now - before) / max(end - start, 1e-3) / 1e6:.1f} MB/s"
                    # a copy: workers change it meanwhile
                    troubles = list(self.troubles.values())
                    progress(self.num_done, f"{speed}  {len(troubles)} retried: {troubles[-1]}" if troubles else speed)
            finally:
                self._stop.set()

    def _work(self, ssl_context) -> None:
        """Download files until none is left: what one worker does."""
        transport = _Transport(_Network(self._stop), ssl_context)
        with httpx2.Client(transport=transport) as client:
            while not self._stop.is_set():
                try:
                    wanted = self._waiting.popleft()
                except IndexError:
                    return
                try:
                    reason = self._fetch(client, transport, wanted)
                except _Stopped:
                    return
                self.troubles.pop(wanted.path, None)
                with self._lock:
                    self.num_done += 1
                    if reason:
                        self.failures.append(Failure(wanted, reason))

    def _fetch(self, client: httpx2.Client, transport: _Transport, wanted: Wanted) -> str:
        """Return "" once the file is there, or the reason why it will not be."""
        reason = ""
        for attempt in range(self.limits.num_tries):
            if self._given_up:
                return f"not tried: {self._given_up}"
            self._pause()
            transport.network.deadline = time.monotonic() + self.limits.total_s
            try:
                self._try(client, wanted)
            except _Refused as error:
                _forget(wanted.path)
                self._num_failed_in_a_row = 0
                return str(error)
            except _Failed as error:
                reason, wait_s = str(error), error.wait_s
            except (httpcore2.TimeoutException, httpcore2.NetworkError, httpcore2.ProtocolError) as error:
                reason, wait_s = _why(error), None
            else:
                self._num_failed_in_a_row = 0
                return ""
            # what is left of a faulty answer must not be taken for the next one
            transport.close()
            self.troubles[wanted.path] = reason
            if wait_s is not None and wait_s > self.limits.max_wait_s:
                self._give_up(f"the server asks to wait {wait_s:,.0f} s; run it again then")
                return f"{reason} and asks to wait {wait_s:,.0f} s"
            if wait_s is not None:
                self._resume_at = max(self._resume_at, time.monotonic() + wait_s)
            elif attempt + 1 < self.limits.num_tries:
                self._sleep(min(self.limits.first_wait_s * 2**attempt, self.limits.max_wait_s))
        self._num_failed_in_a_row += 1
        if self._num_failed_in_a_row >= self.limits.max_failures:
            self._give_up(f"{self._num_failed_in_a_row} files failed one after the other; run it again later")
        return f"{reason} (tried {counted(self.limits.num_tries, 'time')})"

    def _give_up(self, reason: str) -> None:
        self._given_up = self._given_up or reason

    def _pause(self) -> None:
        """Wait as long as the server asked for."""
        while (left := self._resume_at - time.monotonic()) > 0:
            self._sleep(left)

    def _sleep(self, seconds: float) -> None:
        if self._stop.wait(seconds):
            raise _Stopped

    def _try(self, client: httpx2.Client, wanted: Wanted) -> None:
        """Download a file, or the rest of it. Raises what tells `_fetch` whether to try again."""
        with open_to_write(part_of(wanted.path)) as part:
            num_held = part.seek(0, os.SEEK_END)
            etag = _etag_of_part(wanted) if num_held else ""
            resume = {"Range": f"bytes={num_held}-", "If-Range": etag} if etag else {}
            with closing(self._answer(client, wanted.url, resume)) as response:
                is_rest = bool(etag) and response.status_code in (206, 416)
                end = _end_of_rest(response, num_held, etag) if is_rest else _length(response)
                if is_rest and end is None:
                    part.truncate(0)
                    raise _Failed("the server cannot go on where it was cut off")
                self._check_answer(response, end, is_rest)
                if not is_rest:
                    part.truncate(0)
                    part.seek(0)
                    with atomic_writer(_note_of(wanted.path), sync=False) as note:
                        note.write(json.dumps({"url": wanted.url, "etag": _strong_etag(response)}).encode())
                self._receive(response, part, end, wanted.path)
            with naming(wanted.path):
                _check_jpeg(part)
                part.flush()
                os.fsync(part.fileno())
        os.replace(part_of(wanted.path), wanted.path)
        _forget(wanted.path)

    def _answer(self, client: httpx2.Client, url: str, headers: dict[str, str]) -> httpx2.Response:
        """Return the answer to a request, after redirects; its body is yet to be read, or closed."""
        limits = self.limits
        # they would be kept for all that follows, any number of them
        client.cookies.clear()
        timeout = httpx2.Timeout(limits.read_s, connect=limits.connect_s)
        # compressed, a small answer could unpack to an endless one
        headers = {"User-Agent": USER_AGENT, "Accept": "image/jpeg", "Accept-Encoding": "identity", **headers}
        try:
            request = client.build_request("GET", url, headers=headers, timeout=timeout)
        except (httpx2.InvalidURL, ValueError) as error:
            raise _Refused(f"not a web address: {error}") from None
        for _ in range(limits.num_redirects + 1):
            if request.url.scheme not in ("http", "https") or not request.url.host:
                raise _Refused(f"{shortened(str(request.url))} is no http or https address")
            response = client.send(request, stream=True, follow_redirects=False)
            if response.status_code not in REDIRECT_STATUS:
                return response
            response.close()
            if response.next_request is None:
                raise _Refused(f"the server redirects to nowhere (status {response.status_code})")
            request = response.next_request
        raise _Refused(f"more than {limits.num_redirects} redirects")

    def _check_answer(self, response: httpx2.Response, end: int | None, is_rest: bool) -> None:
        """Raise _Failed or _Refused unless an answer brings a JPEG, or the rest of one, within the limits.

        end: how many bytes the whole file has, None if the answer does not say so.
        """
        status, headers = response.status_code, response.headers
        if status in PASSING_STATUS:
            raise _Failed(f"the server answers {status} {response.reason_phrase}".rstrip(), _retry_after_s(response))
        if status != 200 and not is_rest:
            raise _Refused(f"the server answers {status} {response.reason_phrase}".rstrip())
        if headers.get("content-encoding", "").strip().lower() not in ("", "identity"):
            raise _Refused("the server compresses the file, although it was asked not to")
        content_type = headers.get("content-type", "").partition(";")[0].strip().lower()
        if content_type not in ("image/jpeg", "image/jpg", *UNKNOWN_TYPES):
            raise _Refused(f"the server sends {shortened(content_type)}, not a JPEG")
        if end is not None and end > self.limits.max_bytes:
            raise _Refused(f"{end:,} bytes are too many (limit {self.limits.max_bytes:,})")
        if end is None and "chunked" not in headers.get("transfer-encoding", "").lower():
            raise _Refused("the server does not say how long the file is")

    def _receive(self, response: httpx2.Response, part: BinaryIO, end: int | None, path: Path) -> None:
        """Append what the server sends to the part."""
        num_bytes = part.tell()
        for chunk in response.iter_raw():
            if num_bytes == 0 and not chunk.startswith(JPEG_START[: len(chunk)]):
                raise _Refused(NO_JPEG)
            num_bytes += len(chunk)
            if num_bytes > self.limits.max_bytes:
                raise _Refused(f"more than {self.limits.max_bytes:,} bytes, which is too many")
            with naming(path):
                part.write(chunk)
            with self._lock:
                self.num_bytes += len(chunk)
        if end is not None and num_bytes != end:
            raise _Failed(f"cut off after {num_bytes:,} of {end:,} bytes")


def _check_jpeg(part: BinaryIO) -> None:
    """Raise unless a file begins and ends as a JPEG does."""
    part.seek(0)
    if part.read(len(JPEG_START)) != JPEG_START:
        raise _Refused(NO_JPEG)
    part.seek(max(0, part.seek(0, os.SEEK_END) - MAX_BYTES_AFTER_END))
    if JPEG_END not in part.read():
        part.truncate(0)
        raise _Failed("cut off: the JPEG has no end")


def _in_the_way(path: Path) -> str:
    """Return why a file cannot be kept at a path, empty if it can: a folder, pipe or dead link is there."""
    for place in (path, part_of(path), _note_of(path)):
        if os.path.lexists(place) and not os.path.isfile(place):
            return f"{place} is no file; move it away"
    return ""


def download(
    wanted: list[Wanted], progress: Callable[[int, int, str], None], limits: Limits | None = None
) -> list[Failure]:
    """Download JPEGs, and return those that failed with the reason. Files that exist are not asked for again.

    progress(files done, files in total, note) is called while it runs; the note has the speed, and why files wait. A
    call after a kill goes on where the last one was. Raises OSError if a file cannot be written.
    """
    blocked = [Failure(one, reason) for one in wanted if (reason := _in_the_way(one.path))]
    skipped = {failure.wanted.path for failure in blocked}
    missing = [one for one in wanted if one.path not in skipped and not os.path.lexists(one.path)]
    num_there = len(wanted) - len(missing)
    if not missing:
        return blocked
    downloader = Downloader(missing, limits or Limits())
    downloader.run(lambda done, note: progress(num_there + done, len(wanted), note))
    sync_folder(missing[0].path.parent)
    order = {one.path: index for index, one in enumerate(wanted)}
    return sorted(blocked + downloader.failures, key=lambda failure: order[failure.wanted.path])
