"""What strangers send to a server: hosts, bodies, paths and files that want more than they may have.

All servers are on the loopback network: 127.0.0.2 stands for a public host, which the policies allow as a
named network, and 127.0.0.1 for the inside, which nothing may reach.
"""

import base64
import contextlib
import gzip
import io
import itertools
import os
import shutil
import socket
import ssl
import struct
import subprocess
import threading
import time
import traceback
import tracemalloc
import zlib
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from qwen_vl_utils import fetch_image, fetch_video, process_vision_info, readers
from qwen_vl_utils.containers import check_container
from qwen_vl_utils.errors import MediaError, MediaNotFound, MediaRefused, MediaTimeout, VideoError
from qwen_vl_utils.media import locate
from qwen_vl_utils.policy import PERMISSIVE, MediaPolicy

pytestmark = pytest.mark.timeout(60)

OUTSIDE, INSIDE = "127.0.0.2", "127.0.0.1"
OK = b"HTTP/1.1 200 OK\r\n"
SECRET = "hunter2"


def policy(**changes):
    """A strict policy that may reach OUTSIDE over http, with little patience."""
    preset = {
        "schemes": {"http", "https"},
        "networks": [f"{OUTSIDE}/32"],
        "total_seconds": 20,
        "stall_seconds": 15,
    }
    return MediaPolicy.strict(**(preset | changes))


def fetch(source, rule=PERMISSIVE):
    return fetch_image({"image": source}, policy=rule)


class Server:
    """Answers every connection with `behave(connection)`; keeps what it was asked, byte for byte."""

    def __init__(self, host, behave, port=0, context=None):
        self.requests, self.closing = [], threading.Event()
        self._behave, self._context = behave, context
        self._listener = socket.create_server((host, port))
        self._listener.settimeout(0.05)
        self.port = self._listener.getsockname()[1]
        self.url = f"{'https' if context else 'http'}://{host}:{self.port}"
        self._thread = threading.Thread(target=self._accept)
        self._thread.start()

    def _accept(self):
        workers = []
        while not self.closing.is_set():
            with contextlib.suppress(TimeoutError):
                connection, _ = self._listener.accept()
                workers.append(threading.Thread(target=self._serve, args=(connection,)))
                workers[-1].start()
        for worker in workers:
            worker.join()

    def _serve(self, connection):
        connection.settimeout(5)
        with connection, contextlib.suppress(OSError):  # those under test hang up
            if self._context:
                connection = self._context.wrap_socket(connection, server_side=True)
            request = b""
            while b"\r\n\r\n" not in request and (piece := connection.recv(4096)):
                request += piece
            self.requests.append(request)
            self._behave(self, connection)

    def drip(self, connection, pieces, pause=0.05):
        """One piece after another until somebody has had enough."""
        for piece in pieces:
            connection.sendall(piece)
            if self.closing.wait(pause):
                return

    def close(self):
        self.closing.set()
        self._thread.join()
        self._listener.close()


@pytest.fixture
def serve():
    """`serve(answer)`: a Server that sends these bytes, or does what the function says."""
    servers = []

    def start(answer, host=OUTSIDE, **kwargs):
        def send(server, connection):
            connection.sendall(answer)

        servers.append(Server(host, answer if callable(answer) else send, **kwargs))
        return servers[-1]

    yield start
    for server in servers:
        server.close()


def sized(body, headers=b""):
    return OK + headers + b"Content-Length: %d\r\n\r\n" % len(body) + body


def redirect(target, tail=b"Content-Length: 0\r\n\r\n"):
    return b"HTTP/1.1 302 Found\r\nLocation: " + target.encode() + b"\r\n" + tail


@pytest.fixture
def names(monkeypatch):
    """`names["host"] = [[addresses of the first answer], [of the second], ...]`; the last is repeated."""
    table, real = {}, socket.getaddrinfo

    def resolve(host, port, *args, **kwargs):
        if host.rstrip(".") not in table:
            return real(host, port, *args, **kwargs)
        answers = table[host.rstrip(".")]
        addresses = answers.pop(0) if len(answers) > 1 else answers[0]
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port)) for address in addresses]

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    return table


@contextlib.contextmanager
def little_memory(limit=12 * 2**20):
    """The block allocates less than `limit` bytes at any time."""
    tracemalloc.start()
    try:
        yield
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < limit


# --- hosts and addresses


def test_what_is_allowed_arrives(serve):
    server = serve(sized(b"pixels"))
    assert locate(f"{server.url}/a.png", policy()) == b"pixels"
    assert locate(f"{server.url.replace('http', 'HTTP')}/a.png", policy()) == b"pixels"
    assert [request.split()[1] for request in server.requests] == [b"/a.png"] * 2


@pytest.mark.parametrize(
    "host",
    ["127.0.0.1", "localhost", "127.1", "2130706433", "0x7f.1", "017700000001", "0.0.0.0", "[::1]", "[::]",
     "[::ffff:127.0.0.1]", "[::127.0.0.1]", "[64:ff9b::7f00:1]", "169.254.169.254", "10.0.0.1", "localhost."],
)  # fmt: skip
def test_no_spelling_of_a_private_host_is_reached(serve, host):
    server = serve(sized(b"pixels"), host=INSIDE)
    with pytest.raises(MediaError) as caught:
        fetch(f"http://{host}:{server.port}/a.png", policy())
    # a system without IPv6 may not know such an address at all
    assert "is not public" in str(caught.value) or "can't be resolved" in str(caught.value)
    assert not server.requests
    if ":" not in host:
        outside = serve(redirect(f"http://{host}:{server.port}/a.png"))
        with pytest.raises(MediaError, match=r"/b\.png: .*(which is not public|can't be resolved)"):
            fetch(f"{outside.url}/b.png", policy(redirects=3))
        assert len(outside.requests) == 1 and not server.requests


def test_a_name_is_resolved_once_and_that_answer_is_connected(serve, names):
    """DNS rebinding: an allowed address when it is checked, a private one when it is used."""
    outside = serve(sized(b"pixels"))
    inside = serve(sized(b"secret"), host=INSIDE, port=outside.port)
    names["rebind.test"] = [[OUTSIDE], [INSIDE]]
    assert locate(f"http://rebind.test:{outside.port}/a.png", policy()) == b"pixels"
    assert not inside.requests
    assert b"Host: rebind.test:" in outside.requests[0]
    with pytest.raises(MediaRefused, match=f"its host has the address {INSIDE}, which is not public"):
        fetch(f"http://rebind.test:{outside.port}/a.png", policy())
    assert not inside.requests


def test_one_private_address_among_others_refuses_the_host(serve, names):
    outside = serve(sized(b"pixels"))
    names["mixed.test"] = [[OUTSIDE, INSIDE]]
    with pytest.raises(MediaRefused, match="is not public"):
        fetch(f"http://mixed.test:{outside.port}/a.png", policy())
    assert not outside.requests


def test_the_next_address_is_tried_where_one_is_closed(serve, names):
    server = serve(sized(b"pixels"))
    names["two.test"] = [["127.0.0.3", OUTSIDE]]
    fine = policy(networks=["127.0.0.2/31"])
    assert locate(f"http://two.test:{server.port}/a.png", fine) == b"pixels"


def test_only_named_domains_are_reached_also_by_redirects(serve, names):
    names["good.test"] = names["evil.test"] = names["a.good.test"] = [[OUTSIDE]]
    end = serve(sized(b"pixels"))
    rule = policy(domains=["good.test"], redirects=2)
    assert locate(f"http://GOOD.test.:{end.port}/a", rule) == b"pixels"
    for host in (
        "evil.test",
        "a.good.test",
        "good.test@evil.test",
        "evil.test#@good.test",
        r"evil.test\@good.test",
    ):
        with pytest.raises(MediaError, match=r"is not among the policy's domains|not a URL"):
            fetch(f"http://{host}:{end.port}/a".replace("#@good.test", f":{end.port}/#@good.test"), rule)
    start = serve(redirect(f"http://evil.test:{end.port}/a"))
    with pytest.raises(MediaRefused, match=r"the host 'evil.test' is not among the policy's domains"):
        fetch(f"http://good.test:{start.port}/a", rule)
    assert len(end.requests) == 1


def test_redirects_are_counted(serve):
    server = serve(redirect("/again"))
    with pytest.raises(MediaRefused, match="more redirects than the policy's 3; give the final URL"):
        fetch(f"{server.url}/a", policy(redirects=3))
    assert len(server.requests) == 4
    with pytest.raises(MediaRefused, match="more redirects than the policy's 0"):
        fetch(f"{server.url}/a", policy())
    assert len(server.requests) == 5


@pytest.mark.parametrize(
    "target", ["file:///etc/passwd", "ftp://127.0.0.2/a", "data:,x", "gopher://127.0.0.2/"]
)
def test_redirects_lead_to_http_only(serve, target):
    server = serve(redirect(target))
    for rule in (policy(redirects=3), MediaPolicy()):
        with pytest.raises(MediaRefused, match=r"the server redirects to a .*: URL, which is never followed"):
            fetch(server.url, rule)


def test_a_redirect_that_is_no_url(serve):
    with pytest.raises(MediaError, match=r"redirects to what is no URL|not a URL that can be fetched"):
        fetch(serve(redirect("http://[::1")).url, policy(redirects=3))


def test_the_body_of_a_redirect_is_not_read(serve):
    def behave(server, connection):
        connection.sendall(redirect(f"{end.url}/a", b"Transfer-Encoding: chunked\r\n\r\n"))
        server.drip(connection, itertools.repeat(b"10000\r\n" + b"x" * 65536 + b"\r\n"), pause=0)

    end = serve(sized(b"pixels"))
    with little_memory():
        assert locate(serve(behave).url, policy(redirects=1)) == b"pixels"


# --- TLS


@pytest.fixture(scope="module")
def certificate(tmp_path_factory):
    """(certificate, key) of good.test."""
    if not shutil.which("openssl"):
        pytest.skip("openssl, which makes the certificate, is not installed")
    folder = tmp_path_factory.mktemp("tls")
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=good.test",
         "-addext", "subjectAltName=DNS:good.test", "-keyout", "key.pem", "-out", "cert.pem"],
        cwd=folder, check=True, capture_output=True,
    )  # fmt: skip
    return folder / "cert.pem", folder / "key.pem"


def tls(certificate):
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*certificate)
    return context


def test_certificates_are_held_against_the_name(serve, names, certificate, monkeypatch):
    """The socket goes to a checked address; the certificate must be that of the name in the URL."""
    names["good.test"] = names["evil.test"] = [[OUTSIDE]]
    server = serve(sized(b"pixels"), context=tls(certificate))
    with pytest.raises(MediaError, match=r"https://good.test:\d+/a: TLS failed: .*certificate verify failed"):
        fetch(f"https://good.test:{server.port}/a", policy())
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(certificate[0]))
    assert locate(f"https://good.test:{server.port}/a", policy()) == b"pixels"
    with pytest.raises(MediaError, match=r"TLS failed: .*evil.test"):
        fetch(f"https://evil.test:{server.port}/a", policy())
    assert len(server.requests) == 1


def test_https_is_not_left_unless_http_is_allowed(serve, names, certificate, monkeypatch):
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(certificate[0]))
    names["good.test"] = [[OUTSIDE]]
    plain = serve(sized(b"pixels"))
    server = serve(redirect(f"{plain.url}/a"), context=tls(certificate))
    url = f"https://good.test:{server.port}/a"
    assert locate(url, policy(redirects=1)) == b"pixels"
    with pytest.raises(MediaRefused, match="the policy's schemes are https, not http"):
        fetch(url, policy(redirects=1, schemes={"https"}))
    assert len(plain.requests) == 1


# --- slow servers


def slow_headers(server, connection):
    server.drip(connection, itertools.chain([OK, b"X-A: "], itertools.repeat(b"a")))


def slow_body(server, connection):
    server.drip(connection, itertools.chain([OK, b"Content-Length: 9999\r\n\r\n"], itertools.repeat(b"a")))


def slow_endless_body(server, connection):
    server.drip(connection, itertools.chain([OK, b"\r\n"], itertools.repeat(b"a")))


def slow_chunks(server, connection):
    start = OK + b"Transfer-Encoding: chunked\r\n\r\n"
    server.drip(connection, itertools.chain([start], itertools.repeat(b"1\r\na\r\n")))


def slow_chunk_size(server, connection):
    start = OK + b"Transfer-Encoding: chunked\r\n\r\n"
    server.drip(connection, itertools.chain([start], itertools.repeat(b"0")))


def slow_redirects(server, connection):
    time.sleep(0.2)
    connection.sendall(redirect("/again"))


def only_continue(server, connection):
    server.drip(connection, itertools.repeat(b"HTTP/1.1 100 Continue\r\n\r\n"))


@pytest.mark.parametrize(
    "behave",
    [slow_headers, slow_body, slow_endless_body, slow_chunks, slow_chunk_size, slow_redirects, only_continue],
)
def test_no_slow_server_outlives_the_deadline(serve, behave):
    """Each byte comes long before the server counts as stalled."""
    server = serve(behave)
    with pytest.raises(MediaTimeout, match=r"/a\.png: not there after the policy's total_seconds of 0.7"):
        fetch(f"{server.url}/a.png", policy(total_seconds=0.7, stall_seconds=15, redirects=1000))
    assert server.requests


def test_no_slow_handshake_outlives_the_deadline():
    """A TLS record of 16 KiB, a byte at a time."""
    done = threading.Event()
    with socket.create_server((OUTSIDE, 0)) as listener:

        def behave():
            connection, _ = listener.accept()
            with connection, contextlib.suppress(OSError):
                for piece in itertools.chain([b"\x16\x03\x03\x40\x00"], itertools.repeat(b"\x02")):
                    connection.sendall(piece)
                    if done.wait(0.05):
                        return

        thread = threading.Thread(target=behave)
        thread.start()
        with pytest.raises(MediaTimeout, match=r"total_seconds of 0.7"):
            fetch(
                f"https://{OUTSIDE}:{listener.getsockname()[1]}/", policy(total_seconds=0.7, stall_seconds=15)
            )
        done.set()
        thread.join()


@pytest.mark.parametrize(
    "start", [b"", OK, OK + b"Content-Length: 9\r\n\r\nabc"], ids=["mute", "headers", "body"]
)
def test_a_server_that_falls_silent_is_given_up(serve, start):
    def behave(server, connection):
        connection.sendall(start)
        server.closing.wait()

    with pytest.raises(
        MediaTimeout, match=r"no sign of life for the policy's stall_seconds of 0.3; try again"
    ):
        fetch(serve(behave).url, policy(total_seconds=15, stall_seconds=0.3))


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ({"total_seconds": 0.3, "stall_seconds": 15}, "total_seconds of 0.3"),
        ({"total_seconds": 15, "stall_seconds": 0.3}, "stall_seconds of 0.3"),
    ],
)
@pytest.mark.timeout(8)
def test_a_name_server_that_does_not_answer_is_given_up(monkeypatch, limits, message):
    done = threading.Event()
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **kwargs: done.wait(30) and [])
    with pytest.raises(MediaTimeout, match=message):
        fetch("http://slow.test/a", policy(**limits))
    done.set()


# --- large and lying bodies


def endless(start, piece):
    return lambda server, connection: server.drip(
        connection, itertools.chain([start], itertools.repeat(piece)), pause=0
    )


@pytest.mark.parametrize(
    "behave",
    [
        endless(OK + b"\r\n", b"x" * 65536),
        endless(OK + b"Transfer-Encoding: chunked\r\n\r\n", b"10000\r\n" + b"x" * 65536 + b"\r\n"),
        endless(OK + b"Content-Encoding: gzip\r\n\r\n", gzip.compress(b"")),
    ],
    ids=["no length", "chunked", "gzip of nothing"],
)
def test_an_endless_body_is_cut_off(serve, behave):
    with (
        little_memory(),
        pytest.raises(
            MediaRefused, match=r"\d+ bytes or more, above the policy's max_bytes of 1000000; send"
        ),
    ):
        fetch(serve(behave).url, policy(max_bytes=1_000_000))


def test_a_compression_bomb_is_cut_off(serve):
    """10 MB that unpack to 10 GB in many members, and 64 KB that unpack to 64 MiB in one."""
    many, one = gzip.compress(bytes(2**24), 9) * 640, zlib.compress(bytes(2**26), 9)
    server = serve(sized(many, b"Content-Encoding: gzip\r\n"))
    with (
        little_memory(30 * 2**20),
        pytest.raises(MediaRefused, match="above the policy's max_bytes of 20000000"),
    ):
        fetch(server.url, policy(max_bytes=20_000_000))
    server = serve(sized(one, b"Content-Encoding: deflate\r\n"))
    with little_memory(), pytest.raises(MediaRefused, match="above the policy's max_bytes of 1000000"):
        fetch(server.url, policy(max_bytes=1_000_000))


def test_compression_that_stays_within_the_limit_is_undone(serve):
    body = os.urandom(300_000) + bytes(300_000)
    for encoding, packed in (("gzip", gzip.compress(body)), ("deflate", zlib.compress(body))):
        server = serve(sized(packed, b"Content-Encoding: " + encoding.encode() + b"\r\n"))
        assert locate(server.url, policy()) == body
        assert b"Accept-Encoding: identity" in server.requests[0]
        broken = serve(sized(packed[:-3], b"Content-Encoding: " + encoding.encode() + b"\r\n"))
        with pytest.raises(MediaError, match=f"the server's {encoding} body ends too early"):
            fetch(broken.url, policy())
    with pytest.raises(MediaError, match="the server's compression is broken"):
        fetch(serve(sized(b"no gzip", b"Content-Encoding: gzip\r\n")).url, policy())
    with pytest.raises(MediaError, match="content encoding 'br', unasked for"):
        fetch(serve(sized(b"x", b"Content-Encoding: br\r\n")).url, policy())


def test_a_length_that_lies(serve):
    long = serve(OK + b"Content-Length: 1000\r\n\r\nabc")
    with pytest.raises(MediaError, match=r"/a: .*(incomplete read|ends too early)"):
        fetch(f"{long.url}/a", policy())
    huge = serve(OK + b"Content-Length: 99999999999999999999999999\r\n\r\nabc")
    with pytest.raises(MediaRefused, match=r"\d+ bytes or more, above the policy's max_bytes"):
        fetch(huge.url, policy())
    short = serve(OK + b"Content-Length: 3\r\n\r\nabcdef")
    assert locate(short.url, policy()) == b"abc"
    chunk = serve(OK + b"Transfer-Encoding: chunked\r\n\r\nFFFF\r\nabc")
    with pytest.raises(MediaError, match="incomplete read"):
        fetch(chunk.url, policy())


def test_what_is_no_http_is_one_clear_error(serve):
    with pytest.raises(MediaError, match="bad status line"):
        fetch(serve(b"SSH-2.0-OpenSSH_9.6\r\n").url, policy())
    with pytest.raises(MediaError, match="remote disconnected"):
        fetch(serve(b"").url, policy())
    with pytest.raises(MediaError, match="/a: 503 Service Unavailable"):
        fetch(serve(b"HTTP/1.1 503 <b>hi\r\n\r\n").url + "/a", policy())
    with pytest.raises(MediaError, match="/a: 777"):
        fetch(serve(b"HTTP/1.1 777 hi\r\n\r\n").url + "/a", policy())
    for url in ("http://", "http://:80/a", "http://[/", "http://a:99999/", "http://*.test/", "http://a..b/"):
        with pytest.raises(MediaError, match=r"not a URL that can be fetched|can't be resolved"):
            fetch(url, policy())


# --- secrets


def shown(url, rule):
    """All that a log would hold of the failure."""
    with pytest.raises(MediaError) as caught:
        fetch(url, rule)
    return "".join(traceback.format_exception(caught.value))


def test_no_message_holds_a_secret_of_the_url(serve, names, certificate):
    names["good.test"] = [[OUTSIDE]]
    names["inside.test"] = [[INSIDE]]
    with socket.create_server((OUTSIDE, 0)) as gone:
        closed = gone.getsockname()[1]
    missing = serve(b"HTTP/1.1 404 Not Found\r\n\r\n")
    mute = serve(lambda server, connection: server.closing.wait())
    secure = serve(sized(b""), context=tls(certificate))
    away = serve(redirect(f"http://u:{SECRET}@inside.test/a?{SECRET}"))
    cases = [
        (f"http://u:{SECRET}@{OUTSIDE}:{missing.port}/a.png", policy(), "404"),
        (f"http://u:{SECRET}@{OUTSIDE}:{closed}/a.png", policy(), "refused"),
        (f"http://u:{SECRET}@{OUTSIDE}:{mute.port}/a.png", policy(stall_seconds=0.2), "no sign of life"),
        (f"http://u:{SECRET}@{OUTSIDE}:{mute.port}/a.png", policy(total_seconds=0.2), "not there after"),
        (f"https://u:{SECRET}@good.test:{secure.port}/a.png", policy(), "TLS failed"),
        (f"http://u:{SECRET}@{OUTSIDE}:{away.port}/a.png", policy(redirects=1), "is not public"),
        (f"http://u:{SECRET}@{OUTSIDE}/a.png", policy(schemes={"https"}), "schemes"),
        (f"http://u:{SECRET}@{OUTSIDE}/a.png", policy(domains=["a.test"]), "domains"),
        (f"http://u:{SECRET}@nowhere.invalid/a.png", policy(), "resolved"),
        (f"http://u:{SECRET}@a:99999/a.png", policy(), "not a URL"),
    ]
    for url, rule, reason in cases:
        text = shown(f"{url}?token={SECRET}#{SECRET}", rule)
        assert SECRET not in text and "/a.png?...: " in text and reason in text, text


def test_passwords_of_the_machine_stay_at_home(serve, tmp_path, monkeypatch):
    netrc = tmp_path / ".netrc"
    netrc.write_text(f"machine {OUTSIDE} login me password {SECRET}\n")
    netrc.chmod(0o600)
    monkeypatch.setenv("NETRC", str(netrc))
    server = serve(sized(b"pixels"))
    locate(server.url, policy())
    assert b"Authorization" not in server.requests[0]
    locate(server.url, MediaPolicy())  # as 0.0.14 did, for scripts
    assert b"Authorization" in server.requests[1]


def test_a_password_of_the_url_is_not_sent_elsewhere(serve):
    end = serve(sized(b"pixels"), host="127.0.0.3")
    start = serve(redirect(f"{end.url}/a"))
    url = start.url.replace("://", f"://me:{SECRET}@")
    assert locate(url, policy(networks=["127.0.0.2/31"], redirects=1)) == b"pixels"
    assert b"Authorization" in start.requests[0] and b"Authorization" not in end.requests[0]


def test_a_proxy_of_the_environment_does_not_bypass_the_check(serve, monkeypatch):
    proxy, server = serve(sized(b"by proxy"), host=INSIDE), serve(sized(b"pixels"))
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, proxy.url)
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    assert locate(server.url, policy()) == b"pixels"
    assert not proxy.requests
    assert locate(server.url, MediaPolicy()) == b"by proxy"


# --- files


@pytest.fixture
def folders(tmp_path):
    """(allowed, forbidden), with a picture in each, and links between them."""
    allowed, forbidden = tmp_path / "allowed", tmp_path / "forbidden"
    for folder in (allowed, forbidden):
        folder.mkdir()
        Image.new("RGB", (28, 28)).save(folder / "a.png")
    (allowed / "link.png").symlink_to(forbidden / "a.png")
    (allowed / "folder").symlink_to(forbidden)
    (allowed / "%2e%2e").mkdir()
    return allowed, forbidden


def test_files_inside_of_the_folders_open(folders):
    allowed, _ = folders
    rule = MediaPolicy.strict(folders=[allowed])
    real = Path(os.path.realpath(allowed / "a.png"))
    for source in (allowed / "a.png", str(allowed / "a.png"), (allowed / "a.png").as_uri(),
                   f"file://{allowed}/%61.png", f"FILE://localhost{allowed}/a.png",
                   f"{allowed}/../allowed/a.png"):  # fmt: skip
        assert locate(source, rule) == real


def test_no_path_leaves_the_folders(folders, monkeypatch):
    allowed, forbidden = folders
    monkeypatch.chdir(allowed)
    rule = MediaPolicy.strict(folders=[allowed])
    paths = [
        str(forbidden / "a.png"), f"{allowed}/../forbidden/a.png", f"{allowed}/link.png",
        f"{allowed}/folder/a.png", "../forbidden/a.png", "folder/a.png", "/etc/passwd",
        f"{allowed}/folder/../forbidden/a.png", f"{allowed}/../forbidden/no such file", f"{allowed}/..",
    ]  # fmt: skip
    sources = [*paths, *map(Path, paths), *(f"file://{path}" for path in paths if path.startswith("/"))]
    sources += [f"file://{allowed}/%2e%2e/forbidden/a.png", f"file://{allowed}/..%2fforbidden%2fa.png",
                f"file://localhost{forbidden}/a.png", "file://../forbidden/a.png"]  # fmt: skip
    for source in sources:
        with pytest.raises(
            MediaError, match=r"it lies outside of the policy's folders|of this machine"
        ) as caught:
            fetch(source, rule)
        assert not isinstance(caught.value, MediaNotFound), source  # nothing is told about what lies outside
    with pytest.raises(MediaRefused, match="the policy's schemes are data, https, not file"):
        fetch(allowed / "a.png", MediaPolicy.strict())


def test_a_file_url_names_no_other_host():
    for url in ("file://server/share/a.png", "file://127.0.0.1/etc/passwd"):
        with pytest.raises(MediaError, match="a file URL names a file of this machine, not of the host"):
            fetch(url)


def test_what_is_no_regular_file_is_never_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for source in (tmp_path / "pipe", "/dev/zero", tmp_path, "/dev/stdin"):
        with pytest.raises(MediaNotFound, match=r"is not a file|does not exist|can't be opened"):
            fetch(source)
    for source in ("a\0b", "x" * 5000, "file:///a%00b"):
        with pytest.raises(MediaNotFound, match="can't be opened"):
            fetch(source)


def test_a_file_is_measured_before_it_is_read(tmp_path):
    with (tmp_path / "sparse.mp4").open("wb") as file:
        file.truncate(10 * 2**30)
    with pytest.raises(
        MediaRefused, match="10737418240 bytes or more, above the policy's max_bytes of 4294967296"
    ):
        fetch(tmp_path / "sparse.mp4")


class Zeros(io.RawIOBase):
    """A stream that never ends."""

    def readable(self):
        return True

    def readinto(self, buffer):
        return len(buffer)


@pytest.mark.parametrize(
    "source",
    [b"x" * 1001, bytearray(1001), memoryview(bytes(1004)).cast("I"), io.BytesIO(bytes(1001)), Zeros()],
    ids=["bytes", "bytearray", "memoryview", "file object", "endless stream"],
)
def test_bytes_and_streams_are_bounded(source):
    with (
        little_memory(),
        pytest.raises(MediaRefused, match="bytes or more, above the policy's max_bytes of 1000"),
    ):
        fetch(source, MediaPolicy(max_bytes=1000))


def test_a_text_stream_is_one_clear_error():
    with pytest.raises(MediaError, match="reading it gave str; open it in binary mode"):
        locate(io.StringIO("abc"))


def test_data_urls_are_bounded_and_checked():
    rule = MediaPolicy.strict(max_bytes=1000)

    def url(content):
        return "data:;base64," + base64.b64encode(content).decode()

    assert locate(url(bytes(1000)), rule) == bytes(1000)
    assert locate("DATA:image;BASE64,QUJ%4A\n RA==".replace("%4A", "D"), rule) == b"ABCD"
    assert locate("data:,a%20b", rule) == b"a b"
    for source in (url(bytes(1001)), "data:," + "a" * 1001, "data:," + "%41" * 1001):
        with pytest.raises(MediaRefused, match="above the policy's max_bytes of 1000"):
            fetch(source, rule)
    huge = url(bytes(2**24))
    with little_memory(2**20), pytest.raises(MediaRefused, match="above the policy's max_bytes"):
        fetch(huge, rule)
    for body in ("QU!JD", "QUJ", "QUJDé", "====", "A"):
        with pytest.raises(MediaError, match="broken base64"):
            fetch("data:;base64," + body, rule)
    with pytest.raises(MediaRefused, match="the policy's schemes are https, not data"):
        fetch("data:,x", MediaPolicy.strict(schemes={"https"}))


# --- containers


TEXTS = {
    "hls": b"#EXTM3U\n#EXTINF:1,\nfile:///etc/passwd\n",
    "ffconcat": b"ffconcat version 1.0\nfile /etc/passwd\n",
    "dash": b'<?xml version="1.0"?><MPD profiles="urn:mpeg:dash:profile:isoff-on-demand:2011"></MPD>',
    "sdp": b"v=0\nc=IN IP4 127.0.0.1\nm=video 9 RTP/AVP 96\n",
    "avisynth": b'AviSource("x")\n',
}
PREFIXES = [b"", b"\xef\xbb\xbf", b" \n", b"ID3\x03\x00\x00\x00\x00\x00\x05abcde", b"\xff\xfe", b"\x00"]
STARTS = [
    b"AAAAfree",
    b"\x1a\x45\xdf\xa3",
    b"OggS",
    b"FLV\x01",
    b"\xff\xd8\xff",
    b"G",
    b"RIFFaaaaAVI ",
    b"DKIF",
]


@pytest.mark.parametrize("kind", TEXTS)
def test_playlists_and_scripts_are_no_videos(kind):
    for prefix, tail in itertools.product(PREFIXES, (b"", b"\0" * 4000, b" " * 5000)):
        with pytest.raises(VideoError, match=r"a.mp4: a playlist or script, or an unknown container"):
            check_container((prefix + TEXTS[kind] + tail)[:4096], "a.mp4")


@pytest.mark.parametrize("kind", ["hls", "ffconcat", "dash", "sdp"])
@pytest.mark.parametrize("start", STARTS)
def test_text_behind_the_first_bytes_of_a_container_is_refused(start, kind):
    """FFmpeg's reader of manifests searches for its words, and may be surer than that of the container."""
    for tail in (b"", b"\0" * 4000):
        head = bytearray((start + b"\n" + TEXTS[kind].upper() + tail)[:4096])
        if start == b"G":
            head += b" " * (600 - len(head))
            head[0::188] = b"G" * len(head[0::188])
        with pytest.raises(VideoError, match="a playlist or script"):
            check_container(bytes(head), "a.mp4")


@pytest.mark.parametrize(
    "head", [b"", b"\0", b"\0" * 4096, b"MZ\x90\0", b"PK\x03\x04\0", b"\x7fELF\0", b"%PDF-1.7\n\0"]
)
def test_unknown_files_are_no_videos(head):
    with pytest.raises(VideoError, match="unknown container"):
        check_container(head, "a.mp4")


# --- pictures and videos, through the public functions


def png(width, height):
    """A PNG of black pixels; only its header counts the pixels."""

    def chunk(kind, body):
        return struct.pack("!I", len(body)) + kind + body + struct.pack("!I", zlib.crc32(kind + body))

    header = struct.pack("!IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b""))
        + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize("size", [(50_000, 50_000), (2**31 - 1, 2**31 - 1), (8193, 8192), (2**31 - 1, 1)])
def test_a_picture_is_refused_by_its_header(size):
    with little_memory(2**22), pytest.raises(MediaError, match=r"<\d+ bytes>: .*pixels"):
        fetch(png(*size), MediaPolicy.strict())


def test_a_well_compressed_picture_is_refused_before_it_is_decoded():
    """12 KB that decode to 240 MB."""
    stream = io.BytesIO()
    Image.new("1", (9000, 9000)).save(stream, "PNG")
    bomb = stream.getvalue()
    assert len(bomb) < 100_000
    for source in (bomb, "data:image/png;base64," + base64.b64encode(bomb).decode(), io.BytesIO(bomb)):
        with (
            little_memory(2**22),
            pytest.raises(MediaRefused, match="9000 x 9000 = 81000000 pixels, above"),
        ):
            fetch(source, MediaPolicy.strict())
    with pytest.raises(MediaRefused, match="max_pixels"):
        fetch_video({"video": [bomb, bomb]}, policy=MediaPolicy.strict())


def test_a_format_that_starts_another_program_is_refused(tmp_path, monkeypatch):
    called = tmp_path / "called"
    (tmp_path / "gs").write_text(f"#!/bin/sh\ntouch {called}\n")
    (tmp_path / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n%%EOF\n"
    with pytest.raises(MediaRefused, match="a picture of the format EPS"):
        fetch(eps)
    stream = io.BytesIO()
    Image.new("RGB", (28, 28)).save(stream, "TIFF")
    for excluded in (eps, stream):
        with pytest.raises(MediaError, match="in none of the formats of the policy: BMP, GIF, JPEG, MPO"):
            fetch(excluded, MediaPolicy.strict())
    assert not called.exists()


def test_the_number_of_media_and_frames_is_bounded():
    item = {"type": "image", "image": Image.new("RGB", (28, 28))}
    messages = [{"role": "user", "content": [item] * 3}]
    with pytest.raises(MediaRefused, match="3 pictures and videos, above the policy's max_media of 2"):
        process_vision_info(messages, policy=MediaPolicy(max_media=2))
    with pytest.raises(MediaRefused, match="4 frames, above the policy's max_frames of 2"):
        fetch_video({"video": [item["image"]] * 4}, policy=MediaPolicy(max_frames=2))


READERS = [name for name in ("torchcodec", "decord", "pyav") if readers.installed(name)]


@pytest.fixture(params=READERS)
def reader(request, monkeypatch):
    monkeypatch.setenv("FORCE_QWENVL_VIDEO_READER", request.param)
    return request.param


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    path = tmp_path_factory.mktemp("clip") / "secret.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
        for level in range(0, 200, 20):
            frame = av.VideoFrame.from_ndarray(np.full((64, 64, 3), level, np.uint8), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


@pytest.mark.timeout(200)  # a decoder process starts, on a busy machine
def test_a_playlist_opens_neither_files_nor_hosts(serve, reader, clip, tmp_path):
    server = serve(sized(clip.read_bytes()), host=INSIDE)
    hls = "#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:1,\n{}\n#EXT-X-ENDLIST\n"
    concat = "ffconcat version 1.0\nfile '{}'\n"
    dash = (
        '<MPD xmlns="urn:mpeg:dash:schema:mpd:2011" profiles="urn:mpeg:dash:profile:isoff-on-demand:2011" '
        'type="static" mediaPresentationDuration="PT1S"><Period><AdaptationSet mimeType="video/mp4">'
        '<Representation id="1" bandwidth="1"><BaseURL>{}</BaseURL></Representation></AdaptationSet>'
        "</Period></MPD>"
    )
    sdp = f"v=0\no=- 0 0 IN IP4 {INSIDE}\ns=x\nc=IN IP4 {INSIDE}\nt=0 0\nm=video {server.port} RTP/AVP 96\n"
    for text, suffix in ((hls, "m3u8"), (concat, "ffconcat"), (dash, "mpd"), (sdp, "sdp"), (hls, "mp4")):
        for target in (str(clip), clip.name, f"{server.url}/a.mp4"):
            content = text.replace("{}", target).encode()
            path = clip.with_name(f"list.{suffix}")
            path.write_bytes(content)
            for source in (path, content):
                with pytest.raises(VideoError, match="a playlist or script, or an unknown container"):
                    fetch_video({"video": source}, policy=PERMISSIVE)
    outside = serve(sized(hls.replace("{}", f"{server.url}/a.mp4").encode()))
    with pytest.raises(VideoError, match=r"/a\.mp4: a playlist or script"):
        fetch_video({"video": f"{outside.url}/a.mp4"}, policy=policy())
    assert not server.requests


@pytest.mark.timeout(200)  # a decoder process starts, on a busy machine
def test_no_path_is_a_protocol_of_ffmpeg(serve, reader, clip, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    server = serve(sized(clip.read_bytes()), host=INSIDE)
    for source in (f"concat:{clip}|{clip}", f"subfile,,start,0,end,99,,:{clip}", f"crypto:{clip}",
                   f"http:{INSIDE}:{server.port}/a.mp4", f"tcp://{INSIDE}:{server.port}", "pipe:0", "-",
                   f"async:{server.url}", f"file:{clip}", f"rtmp://{INSIDE}:{server.port}/a"):  # fmt: skip
        with pytest.raises(MediaNotFound, match="does not exist"):
            fetch_video({"video": source})
    for name in ("concat:a.mp4|b.mp4", "http:a.mp4", "pipe:0"):
        shutil.copy(clip, tmp_path / name)  # a file that really is called that
        assert fetch_video({"video": name, "nframes": 2}).shape[0] == 2
    assert not server.requests


@pytest.mark.timeout(200)  # a decoder process starts, on a busy machine
def test_a_video_is_held_to_the_limits(serve, reader, clip):
    for change, message in (
        ({"max_pixels": 64 * 63}, "64 x 64 = 4096 pixels, above the policy's max_pixels"),
        ({"max_video_seconds": 0.5}, "max_video_seconds of 0.5"),
        ({"max_frames": 2}, "4 frames, above the policy's max_frames of 2"),
        ({"max_bytes": 100}, "above the policy's max_bytes of 100"),
    ):
        with pytest.raises(MediaRefused, match=message):
            fetch_video({"video": clip, "nframes": 4}, policy=MediaPolicy(**change))
    server = serve(sized(clip.read_bytes()))
    assert (
        fetch_video(
            {"video": f"{server.url}/a.mp4", "nframes": 4},
            policy=policy(total_seconds=150, stall_seconds=100),
        ).shape[0]
        == 4
    )
