"""Downloads over real connections to a server on this machine that stalls, cuts, lies and refuses."""

from __future__ import annotations

import re
import socket
import time
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import pytest

from safelight.data.sources import download as module
from safelight.data.sources.download import ALSO_FROM, Limits, Wanted, download, is_public, part_of
from tests.data.photo_server import PhotoServer, jpeg

QUICK = Limits(read_s=0.3, total_s=2, connect_s=1, first_wait_s=0.01, num_tries=3, num_parallel=4)
PHOTO = jpeg(1)


@pytest.fixture
def server(monkeypatch):
    server = PhotoServer()
    monkeypatch.setenv(ALSO_FROM, server.address)
    yield server
    server.close()


def get(tmp_path, *urls, limits=QUICK):
    """Download addresses into tmp_path as 0.jpg, 1.jpg, ...; return (reason or "" of each, the notes shown)."""
    wanted = [Wanted(url, tmp_path / f"{index}.jpg") for index, url in enumerate(urls)]
    notes = []
    failures = download(wanted, lambda done, total, note: notes.append((done, total, note)), limits)
    reasons = {failure.wanted.path: failure.reason for failure in failures}
    for one in wanted:
        assert one.path.exists() == (one.path not in reasons)
    return [reasons.get(one.path, "") for one in wanted], notes


def hidden(tmp_path):
    return sorted(path.name for path in tmp_path.iterdir() if path.name.startswith("."))


def test_files_arrive_whole_and_are_not_asked_for_again(tmp_path, server):
    photos = [jpeg(number) for number in range(12)]
    urls = [server.add(f"/{number}", photo) for number, photo in enumerate(photos)]
    reasons, notes = get(tmp_path, *urls)
    assert reasons == [""] * 12
    assert [(tmp_path / f"{number}.jpg").read_bytes() for number in range(12)] == photos
    assert hidden(tmp_path) == []
    assert notes[-1][:2] == (12, 12)
    assert notes[-1][2].endswith(" MB/s")
    headers = server.requests[0][1]
    assert (headers["User-Agent"], headers["Accept-Encoding"]) == ("safelight", "identity")
    get(tmp_path, *urls)
    assert len(server.requests) == 12


@pytest.mark.parametrize("status", [408, 429, 500, 502, 503, 504])
def test_a_passing_failure_is_tried_again_after_a_growing_pause(tmp_path, server, status):
    def refuse_twice(handler, num):
        times.append(time.monotonic())
        handler.send_file(PHOTO) if num == 3 else handler.send(status)

    times = []
    url = server.add("/a", refuse_twice)
    assert get(tmp_path, url, limits=replace(QUICK, first_wait_s=0.1))[0] == [""]
    assert times[1] - times[0] >= 0.1
    assert times[2] - times[1] >= 0.2


def test_what_keeps_failing_ends_with_its_reason(tmp_path, server):
    url = server.add("/a", lambda handler, num: handler.send(503))
    reasons, notes = get(tmp_path, url, limits=replace(QUICK, first_wait_s=0.3))
    assert reasons == ["the server answers 503 Service Unavailable (tried 3 times)"]
    assert any("MB/s  1 retried: the server answers 503" in note for _, _, note in notes)
    assert server.num_of_path["/a"] == 3


@pytest.mark.parametrize("form", ["seconds", "date"])
@pytest.mark.long
def test_retry_after_is_kept_by_all_workers(tmp_path, server, form):
    """The server asks for a pause of a second or two: nobody asks it in the meantime."""

    def busy_once(handler, num):
        if num > 1:
            handler.send_file(jpeg(int(handler.path[1:])))
            return
        then = datetime.now(UTC).replace(microsecond=0) + timedelta(seconds=2)
        handler.send(429, headers={"Retry-After": "1" if form == "seconds" else format_datetime(then, usegmt=True)})
        answered.append(time.monotonic())

    answered = []
    urls = [server.add(f"/{number}", busy_once) for number in range(4)]
    start = time.monotonic()
    assert get(tmp_path, *urls)[0] == [""] * 4
    assert len(answered) == 4
    assert 0.9 < time.monotonic() - start < 10


HUGE = "9" * 20


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("Retry-After", value) for value in ("soon", "-1", "1e9", "\xb2", "Wed, 21 Oct", f"Wed, {HUGE} Oct 2015")),
        ("Retry-After", f"Mon, 1 Jan 2026 00:00:{HUGE} GMT"),
        ("Retry-After", f"Mon, 1 Jan 2026 00:00:00 +{HUGE}"),
        ("Retry-After", "Mon, 1 Jan 0001 00:00:00 +2359"),
        ("Retry-After", f"Mon, 1 Jan {HUGE} 00:00:00 GMT"),
        ("Set-Cookie", f"a=b; expires=Mon, 1 Jan {HUGE} 00:00:{HUGE} GMT; max-age={HUGE}{HUGE}; port={HUGE}"),
        ("Content-Type", "\xff; charset=\xfe"),
        ("Content-Range", f"bytes {HUGE}-{HUGE}/{HUGE}"),
        ("ETag", "\xff" * 9),
        ("Date", HUGE),
    ],
)
def test_a_header_that_says_nothing_is_none(tmp_path, server, name, value):
    url = server.add("/a", lambda handler, num: handler.send(503, headers={name: value}))
    assert get(tmp_path, url)[0] == ["the server answers 503 Service Unavailable (tried 3 times)"]


def test_a_server_that_asks_for_a_long_pause_is_left_alone(tmp_path, server):
    urls = [
        server.add(f"/{number}", lambda handler, num: handler.send(429, headers={"Retry-After": "3600"}))
        for number in range(40)
    ]
    start = time.monotonic()
    reasons, _ = get(tmp_path, *urls)
    assert time.monotonic() - start < 60
    assert reasons[0] == "the server answers 429 Too Many Requests and asks to wait 3,600 s"
    assert reasons[-1] == "not tried: the server asks to wait 3,600 s; run it again then"
    assert len(server.requests) <= 2 * QUICK.num_parallel


def test_a_network_that_is_down_is_given_up(tmp_path, server, monkeypatch):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{unused.getsockname()[1]}"
        monkeypatch.setenv(ALSO_FROM, address)
        urls = [f"http://{address}/{number}" for number in range(60)]
        reasons, _ = get(tmp_path, *urls, limits=replace(QUICK, max_failures=8))
    assert re.fullmatch(r"no connection to the server: .*\(tried 3 times\)", reasons[0])
    assert reasons[-1].startswith("not tried: 8 files failed one after the other")


def test_a_file_that_does_not_exist_is_not_asked_for_again(tmp_path, server):
    good = server.add("/good", PHOTO)
    assert get(tmp_path, server.url("/gone"), good)[0] == ["the server answers 404 Not Found", ""]
    assert server.num_of_path["/gone"] == 1
    assert hidden(tmp_path) == []


def stall(handler, num):
    handler.send_response(200)
    handler.send_header("Content-Type", "image/jpeg")
    handler.send_header("Content-Length", str(len(PHOTO)))
    handler.end_headers()
    handler.wfile.write(PHOTO[:100])
    handler.wfile.flush()
    time.sleep(1)


def silent(handler, num):
    time.sleep(1)


def dribble(handler, num):
    """Send a byte of the headers now and then, for as long as anybody listens."""
    handler.wfile.write(b"HTTP/1.1 200 OK\r\n")
    try:
        for _ in range(100):
            handler.wfile.write(b"X-Filler: x\r\n")
            handler.wfile.flush()
            time.sleep(0.05)
    except OSError:
        handler.close_connection = True


def endless(handler, num):
    handler.send_response(200)
    handler.send_header("Content-Type", "image/jpeg")
    handler.send_header("Transfer-Encoding", "chunked")
    handler.end_headers()
    handler.close_connection = True
    body = PHOTO
    while True:
        try:
            handler.wfile.write(b"%x\r\n%s\r\n" % (len(body), body))
        except OSError:
            return


def cut(handler, num):
    handler.send(200, PHOTO[:500], {"Content-Type": "image/jpeg", "Content-Length": str(len(PHOTO))})
    handler.close_connection = True


def close_at_once(handler, num):
    handler.close_connection = True


def no_http(handler, num):
    handler.wfile.write(b"SSH-2.0-OpenSSH_9.9\r\n\r\n")
    handler.close_connection = True


def answer(body=PHOTO, status=200, **headers):
    """Return a behaviour that sends a body under headers of any content; a header of None is left out."""
    given = {name.replace("_", "-"): value for name, value in headers.items()}
    return lambda handler, num: handler.send(status, body, {"Content-Type": "image/jpeg", **given})


FAULTS = {
    "stalls in the body": (stall, "the server went silent (tried 2 times)"),
    "never answers": (silent, "the server went silent (tried 2 times)"),
    "dribbles its headers": (dribble, "the server takes too long (tried 2 times)"),
    "cuts the connection": (cut, "cut off before its end (tried 2 times)"),
    "closes at once": (close_at_once, "the connection broke: Server disconnected without sending a response. (tried"),
    "speaks another protocol": (no_http, "the connection broke: illegal status line"),
    "sends a shorter length": (answer(Content_Length=str(len(PHOTO) - 50)), "cut off: the JPEG has no end (tried"),
    "says no length": (answer(Content_Length=None, Connection="close"), "the server does not say how long the file is"),
    "announces too much": (answer(Content_Length=str(10**6)), "1,000,000 bytes are too many (limit 100,000)"),
    "announces absurdly much": (answer(Content_Length="9" * 18), "are too many (limit 100,000)"),
    "announces a negative length": (answer(Content_Length="-5"), "the connection broke: bad Content-Length"),
    "announces two lengths": (answer(Content_Length="5, 6"), "the connection broke: conflicting Content-Length"),
    "never ends": (endless, "more than 100,000 bytes, which is too many"),
    "sends a page": (answer(b"<html>", Content_Type="text/html"), "the server sends text/html, not a JPEG"),
    "sends a page as a picture": (answer(b"<html></html>"), "what the server sends is not a JPEG"),
    "sends another picture": (answer(b"\x89PNG\r\n\x1a\n"), "what the server sends is not a JPEG"),
    "sends nothing": (answer(b""), "what the server sends is not a JPEG"),
    "compresses": (answer(Content_Encoding="gzip"), "the server compresses the file, although it was asked not to"),
    "sends a part unasked": (
        answer(status=206, Content_Range="bytes 0-9/10"),
        "the server answers 206 Partial Content",
    ),
    "says that nothing changed": (answer(status=304, Content_Length=None), "the server answers 304 Not Modified"),
    "redirects to nowhere": (answer(b"", status=302), "the server redirects to nowhere (status 302)"),
    "redirects to no address": (
        answer(b"", status=302, Location="http://[::1"),
        "the server redirects to nowhere (status 302)",
    ),
    "redirects to a file": (answer(b"", status=302, Location="file:///etc/passwd"), "is no http or https address"),
    "redirects in a circle": (answer(b"", status=301, Location="/"), "more than 5 redirects"),
    "redirects to this machine": (
        answer(b"", status=302, Location="http://127.0.0.1:9/"),
        "127.0.0.1 is no address of the public internet",
    ),
    "redirects to this machine by name": (
        answer(b"", status=302, Location="http://localhost:9/"),
        "is no address of the public internet",
    ),
    "redirects to a private network": (
        answer(b"", status=307, Location="http://192.168.0.1/"),
        "192.168.0.1 is no address of the public internet",
    ),
    "redirects to a cloud's metadata": (
        answer(b"", status=308, Location="http://169.254.169.254/latest"),
        "169.254.169.254 is no address of the public internet",
    ),
    "redirects to a wrapped address": (
        answer(b"", status=302, Location="http://[::ffff:10.0.0.1]/"),
        "is no address of the public internet",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_faulty_answer_costs_one_file_only(tmp_path, server, fault):
    behaviour, reason = FAULTS[fault]
    urls = [server.add("/", behaviour), server.add("/good", PHOTO)]
    limits = replace(QUICK, num_tries=2, total_s=0.6, max_bytes=100_000)
    start = time.monotonic()
    reasons, _ = get(tmp_path, *urls, limits=limits)
    assert time.monotonic() - start < 10
    assert reason in reasons[0]
    assert reasons[1] == ""
    assert {"0.jpg", "1.jpg"} - {path.name for path in tmp_path.iterdir()} == {"0.jpg"}


def test_redirects_are_followed(tmp_path, server):
    server.add("/photo", PHOTO)
    url = server.add("/a", lambda handler, num: handler.send(302, headers={"Location": "/b"}))
    server.add("/b", lambda handler, num: handler.send(301, headers={"Location": server.url("/photo")}))
    assert get(tmp_path, url)[0] == [""]


def test_addresses_that_are_not_of_the_web_are_not_asked_for(tmp_path, server):
    urls = [
        "file:///etc/passwd",
        "ftp://example.org/a",
        "//host",
        "",
        "http://",
        "http://[::1",
        "data:,x",
        "http://\x7f/",
    ]
    reasons, _ = get(tmp_path, *urls)
    assert all("no http or https address" in reason or "not a web address" in reason for reason in reasons)


@pytest.mark.parametrize(
    ("address", "public"),
    {
        "93.184.216.34": True,
        "2606:2800:220:1:248:1893:25c8:1946": True,
        "64:ff9b::5db8:d822": True,
        "127.0.0.1": False,
        "0.0.0.0": False,
        "10.1.2.3": False,
        "172.16.0.1": False,
        "192.168.1.1": False,
        "169.254.169.254": False,
        "100.64.0.1": False,
        "224.0.0.1": False,
        "255.255.255.255": False,
        "240.0.0.1": False,
        "::1": False,
        "::": False,
        "fe80::1%eth0": False,
        "fc00::1": False,
        "ff02::1": False,
        "::ffff:127.0.0.1": False,
        "::ffff:93.184.216.34": True,
        "64:ff9b::7f00:1": False,
        "2002:7f00:1::": False,
        "2002:a00:1::": False,
        "2001:0:a00:1::": False,
    }.items(),
)
def test_which_addresses_are_public(address, public):
    assert is_public(address) == public


def test_the_address_that_was_checked_is_the_one_connected_to(tmp_path, server, monkeypatch):
    """A name server that first answers with a public address and then with a private one gains nothing."""
    port = int(server.address.rpartition(":")[2])
    asked, connected = [], []
    resolve = socket.getaddrinfo

    def rebind(host, port, *arguments, **options):
        if host != "rebind.test":
            return resolve(host, port, *arguments, **options)
        asked.append(host)
        address = "93.184.216.34" if len(asked) == 1 else "127.0.0.1"
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port))]

    def connect(address, *arguments, **options):
        connected.append(address[0])
        raise ConnectionRefusedError("nobody there")

    monkeypatch.delenv(ALSO_FROM)
    monkeypatch.setattr(socket, "getaddrinfo", rebind)
    monkeypatch.setattr(socket, "create_connection", connect)
    reasons, _ = get(tmp_path, f"http://rebind.test:{port}/", limits=replace(QUICK, num_tries=2))
    assert connected == ["93.184.216.34"]
    assert reasons == ["rebind.test (127.0.0.1) is no address of the public internet"]
    assert server.requests == []


def test_of_several_addresses_the_public_ones_are_tried_in_turn(tmp_path, server, monkeypatch):
    connected = []
    addresses = ["10.0.0.1", "93.184.216.34", "93.184.216.35"]
    found = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, 80)) for address in addresses]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *arguments, **options: found)

    def connect(address, *arguments, **options):
        connected.append(address[0])
        raise ConnectionRefusedError("nobody there")

    monkeypatch.setattr(socket, "create_connection", connect)
    get(tmp_path, "http://several.test/", limits=replace(QUICK, num_tries=1))
    assert connected == ["93.184.216.34", "93.184.216.35"]


def test_a_name_that_is_not_known_is_tried_again(tmp_path, monkeypatch):
    def unknown(*arguments, **options):
        asked.append(arguments[0])
        raise socket.gaierror(-3, "Temporary failure in name resolution")

    asked = []
    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    reasons, _ = get(tmp_path, "http://nowhere.test/")
    assert reasons == [
        "the address of nowhere.test is not known (Temporary failure in name resolution) (tried 3 times)"
    ]
    assert len(asked) == 3


def cut_once(content, etag='"1"', **headers):
    """Return a behaviour that breaks the first answer off in the middle and can send the rest."""

    def behave(handler, num):
        if num == 1:
            given = {"Content-Type": "image/jpeg", "ETag": etag, "Content-Length": str(len(content))}
            handler.send(200, content[:700], given)
            handler.close_connection = True
        else:
            handler.send_file(content, {"ETag": etag, **headers})

    return behave


def test_a_cut_file_goes_on_where_it_was(tmp_path, server):
    url = server.add("/a", cut_once(PHOTO))
    assert get(tmp_path, url)[0] == [""]
    assert (tmp_path / "0.jpg").read_bytes() == PHOTO
    assert server.requests[1][1]["Range"] == "bytes=700-"
    assert server.requests[1][1]["If-Range"] == '"1"'


def test_a_part_of_an_earlier_call_is_gone_on_with(tmp_path, server):
    url = server.add("/a", cut_once(PHOTO))
    assert get(tmp_path, url, limits=replace(QUICK, num_tries=1))[0] != [""]
    assert hidden(tmp_path) == [".0.jpg.note", ".0.jpg.part"]
    assert get(tmp_path, url)[0] == [""]
    assert (tmp_path / "0.jpg").read_bytes() == PHOTO
    assert server.requests[1][1]["Range"] == "bytes=700-"
    assert hidden(tmp_path) == []


@pytest.mark.parametrize("change", ["etag", "weak", "url", "note", "no note"])
def test_a_part_of_something_else_is_started_anew(tmp_path, server, change):
    etag = 'W/"1"' if change == "weak" else '"1"'
    url = server.add("/a", cut_once(PHOTO, etag))
    get(tmp_path, url, limits=replace(QUICK, num_tries=1))
    other = jpeg(2)
    if change == "url":
        url = server.add("/b", other)
    else:
        server.add("/a", lambda handler, num: handler.send_file(other, {"ETag": '"2"'}))
    note = tmp_path / ".0.jpg.note"
    if change == "note":
        note.write_text("{")
    elif change == "no note":
        note.unlink()
    assert get(tmp_path, url)[0] == [""]
    assert (tmp_path / "0.jpg").read_bytes() == other
    assert ("Range" in server.requests[-1][1]) == (change == "etag")


@pytest.mark.parametrize(
    "headers",
    [
        {"Content_Range": "bytes 0-{end}/{total}"},
        {"Content_Range": "bytes 700-{end}/*"},
        {"Content_Range": "bytes 700-800/{total}"},
        {"Content_Range": "700"},
        {"Content_Range": None},
        {"Content_Range": "bytes 700-{end}/{total}", "ETag": '"2"'},
    ],
)
def test_another_part_than_was_asked_for_is_not_put_together(tmp_path, server, headers):
    """Neither is it repeated for ever: what the server sends next, without a part to go on with, counts."""
    total = len(PHOTO)
    wrong = bytes(total - 702) + PHOTO[-2:]
    filled = {
        name: value and value.format(end=total - 1, total=total).replace("\\", "") for name, value in headers.items()
    }

    def behave(handler, num):
        if num == 1:
            cut_once(PHOTO)(handler, num)
        elif "Range" in handler.headers:
            answer(wrong, 206, **{"ETag": '"1"', **filled})(handler, num)
        else:
            handler.send_file(PHOTO)

    url = server.add("/a", behave)
    assert get(tmp_path, url)[0] == [""]
    assert (tmp_path / "0.jpg").read_bytes() == PHOTO


def test_a_part_that_is_longer_than_the_file_is_started_anew(tmp_path, server):
    url = server.add("/a", cut_once(PHOTO))
    get(tmp_path, url, limits=replace(QUICK, num_tries=1))
    with part_of(tmp_path / "0.jpg").open("ab") as part:
        part.write(bytes(10**5))

    def behave(handler, num):
        handler.send(416) if "Range" in handler.headers else handler.send_file(PHOTO)

    server.add("/a", behave)
    assert get(tmp_path, url)[0] == [""]
    assert (tmp_path / "0.jpg").read_bytes() == PHOTO


def test_a_link_in_place_of_a_part_is_not_written_through(tmp_path, server):
    precious = tmp_path / "precious"
    precious.write_text("precious")
    part_of(tmp_path / "0.jpg").symlink_to(precious)
    with pytest.raises(module.UnsafeFile, match="is a link"):
        get(tmp_path, server.add("/a", PHOTO))
    assert precious.read_text() == "precious"


def test_a_full_disk_ends_the_download_and_names_the_file(tmp_path, server, monkeypatch):
    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module.os, "fsync", full)
    with pytest.raises(OSError, match="No space left") as caught:
        get(tmp_path, *(server.add(f"/{number}", PHOTO) for number in range(20)))
    assert str(caught.value.filename).endswith(".jpg")


def test_an_interrupt_ends_the_wait_for_a_silent_server(tmp_path, server):
    def interrupt(*arguments):
        raise KeyboardInterrupt

    url = server.add("/a", lambda handler, num: time.sleep(5))
    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        download([Wanted(url, tmp_path / "0.jpg")], interrupt, Limits())
    assert time.monotonic() - start < 4


def test_cookies_are_not_kept(tmp_path, server):
    def bake(handler, num):
        handler.send_file(PHOTO, {"Set-Cookie": "a=b"})

    urls = [server.add(f"/{number}", bake) for number in range(4)]
    get(tmp_path, *urls, limits=replace(QUICK, num_parallel=1))
    assert not any("Cookie" in headers for _, headers in server.requests)
