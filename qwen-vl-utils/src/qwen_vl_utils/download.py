"""Fetching over HTTP under a policy.

    URL --check scheme, host--> connection --resolve once, check every address--> socket
        --redirect?--> the next URL, checked the same way
        --body, piece by piece, decompressed within max_bytes--> bytes

A name is resolved once and the socket goes to an address that was checked, so a name server that answers
differently the second time gains nothing. A timer cuts the connection when the time is over: whatever a
server sends slowly (headers, TLS, body), nothing outlives the deadline.
"""

import contextlib
import io
import os
import queue
import re
import socket
import threading
import zlib
from collections.abc import Iterator
from http import HTTPStatus
from http.client import HTTPException
from types import TracebackType
from typing import Any
from urllib.parse import urljoin, urlsplit

import requests
from requests.adapters import HTTPAdapter
from requests.utils import requote_uri
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.exceptions import HTTPError

from .errors import MediaError, MediaRefused, MediaTimeout
from .policy import Deadline, MediaPolicy

CONNECT_SECONDS = 10.0
"""Waiting time for one address to accept a connection."""
PIECE_BYTES = 2**16

REDIRECTS = (301, 302, 303, 307, 308)
INFLATE = {"gzip": 16 + zlib.MAX_WBITS, "x-gzip": 16 + zlib.MAX_WBITS, "deflate": zlib.MAX_WBITS}
"""Content encodings that are understood, and zlib's number for each."""

Address = tuple[int, int, int, Any]
"""(family, type, protocol, socket address) of one answer of the resolver."""


def download(url: str, name: str, policy: MediaPolicy, deadline: Deadline) -> bytes:
    """The body behind an http(s) `url`; errors call it `name`.

    Raises MediaRefused, MediaTimeout and, for what servers and networks do wrong, MediaError.
    """
    with Guard(name, policy, deadline) as guard, _session(guard) as session:
        try:
            return _follow(session, url, guard)
        except requests.exceptions.SSLError as error:
            raise guard.failure(error, "TLS failed: ") from None
        # `from None` everywhere: the libraries' messages hold the whole URL, secrets included
        except (requests.RequestException, HTTPError, HTTPException, OSError) as error:
            raise guard.failure(error) from None
        except zlib.error as error:
            raise MediaError(f"{name}: the server's compression is broken: {error}") from None


class Guard:
    """Watches over one download: connects to checked addresses only, and cuts the line when time is over."""

    def __init__(self, name: str, policy: MediaPolicy, deadline: Deadline) -> None:
        self.name, self.policy, self.deadline = name, policy, deadline
        self.expired = False
        self._lines: list[socket.socket] = []
        self._timer = threading.Timer(deadline.left(name), self._cut)
        self._timer.daemon = True

    def __enter__(self) -> "Guard":
        self._timer.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._timer.cancel()
        self._timer.join()
        for line in self._lines:
            line.close()

    def _cut(self) -> None:
        self.expired = True
        for line in self._lines:
            with contextlib.suppress(OSError):  # the other side may have hung up already
                line.shutdown(socket.SHUT_RDWR)

    def check_time(self) -> None:
        """Raise MediaTimeout when the time is over."""
        if self.expired:
            raise self.deadline.over(self.name)
        self.deadline.left(self.name)

    def connect(self, host: str, port: int) -> socket.socket:
        """A connection to one of the host's addresses, all of which must be allowed."""
        answers = self._resolve(host, port)
        for *_, address in answers:
            self.policy.check_address(address[0], self.name)
        patience = min(CONNECT_SECONDS, self.deadline.stall_seconds)
        failures: list[OSError] = []
        for answer in answers:
            wait = min(patience, left := self.deadline.left(self.name))
            try:
                return self._dial(answer, wait)
            except TimeoutError as error:
                if wait == left:
                    raise self.deadline.over(self.name) from None
                failures.append(error)
            except OSError as error:
                failures.append(error)
        self.check_time()
        if not failures or any(isinstance(failure, TimeoutError) for failure in failures):
            raise MediaTimeout(
                f"{self.name}: none of the host's {len(answers)} addresses took the connection within "
                f"{patience:g} s; try again later"
            )
        raise failures[0]

    def _dial(self, answer: Address, wait: float) -> socket.socket:
        family, kind, protocol, address = answer
        with contextlib.ExitStack() as undo:
            line = undo.enter_context(socket.socket(family, kind, protocol))
            line.settimeout(wait)
            line.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            line.connect(address)
            # A copy: TLS takes the socket over, and the copy still cuts the same line.
            self._lines.append(line.dup())
            self.check_time()
            undo.pop_all()
        return line

    def _resolve(self, host: str, port: int) -> list[Address]:
        """What the system's resolver answers; it can't be interrupted, so it is left behind when too slow."""
        answer: queue.SimpleQueue[list[Address] | OSError | UnicodeError] = queue.SimpleQueue()

        def ask() -> None:
            try:
                found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
                answer.put([(family, kind, protocol, at) for family, kind, protocol, _, at in found])
            except (OSError, UnicodeError) as error:
                answer.put(error)

        threading.Thread(target=ask, daemon=True, name="qwen-vl-utils resolver").start()
        wait = self.deadline.wait(self.name)
        try:
            found = answer.get(timeout=wait)
        except queue.Empty:
            raise self.deadline.after(wait, self.name) from None
        if isinstance(found, list):
            return found
        raise MediaError(f"{self.name}: the name {host!r} can't be resolved: {_reason(found)}") from None

    def failure(self, error: Exception, prefix: str = "") -> MediaError:
        """The one error for what a library raised; says nothing of the URL but its name."""
        if isinstance(error, MediaError):
            return error
        if self.expired:
            return self.deadline.over(self.name)
        for cause in _causes(error):
            if isinstance(cause, MediaError):
                return cause
            if isinstance(cause, TimeoutError):
                return self.deadline.stalled(self.name)
        return MediaError(f"{self.name}: {prefix}{_reason(error)}")


class _GuardedConnection(HTTPConnection):
    def __init__(self, *args: Any, guard: Guard, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.guard = guard

    def _new_conn(self) -> socket.socket:
        return self.guard.connect(self._dns_host, self.port)


class _GuardedTLSConnection(_GuardedConnection, HTTPSConnection):
    """TLS goes over the guarded socket; the certificate is still held against the host's name."""


class _Adapter(HTTPAdapter):
    def __init__(self, guard: Guard) -> None:
        self.guard = guard
        super().__init__()

    def get_connection_with_tls_context(self, *args: Any, **kwargs: Any) -> Any:
        pool = super().get_connection_with_tls_context(*args, **kwargs)
        guarded = {HTTPConnection: _GuardedConnection, HTTPSConnection: _GuardedTLSConnection}
        if kind := guarded.get(type(pool).ConnectionCls):  # a SOCKS proxy brings its own
            pool.ConnectionCls = kind
            pool.conn_kw["guard"] = self.guard
        return pool


class _Session(requests.Session):
    def get_redirect_target(self, resp: requests.Response) -> None:
        """None, as redirects are followed here; requests would read the body of one in full before."""


def _session(guard: Guard) -> requests.Session:
    session = _Session()
    session.headers["Accept-Encoding"] = "identity"  # media are compressed as they are
    if guard.policy.networks is not None:
        # Through a proxy no address can be checked, and .netrc would hand out passwords.
        session.trust_env = False
        session.verify = os.environ.get("REQUESTS_CA_BUNDLE") or os.environ.get("CURL_CA_BUNDLE") or True
    for scheme in ("http://", "https://"):
        session.mount(scheme, _Adapter(guard))
    return session


def _follow(session: requests.Session, url: str, guard: Guard) -> bytes:
    for _ in range(guard.policy.redirects + 1):
        request = session.prepare_request(requests.Request("GET", url))
        parts = urlsplit(str(request.url))
        guard.policy.check_scheme(parts.scheme, guard.name)
        guard.policy.check_host(parts.hostname or "", guard.name)
        settings = session.merge_environment_settings(str(request.url), {}, True, None, None)
        guard.check_time()  # the timer watches the whole; the sockets watch for silence
        settings["timeout"] = guard.deadline.stall_seconds
        with session.send(request, allow_redirects=False, **settings) as response:
            if response.status_code in REDIRECTS and "location" in response.headers:
                url = _target(str(request.url), response, guard.name)
                continue
            if not 200 <= response.status_code < 300:
                raise MediaError(f"{guard.name}: {_status(response.status_code)}")
            return _body(response, guard)
    remedy = "give the final URL, or raise MediaPolicy.redirects"
    raise MediaRefused(f"{guard.name}: more redirects than the policy's {guard.policy.redirects}; {remedy}")


def _target(url: str, response: requests.Response, name: str) -> str:
    # headers arrive as Latin-1, and servers mean UTF-8
    location = response.headers["location"].encode("latin-1").decode("utf-8", "replace")
    try:
        target = urljoin(url, requote_uri(location))
        scheme = urlsplit(target).scheme
    except ValueError:
        raise MediaError(f"{name}: the server redirects to what is no URL") from None
    if scheme not in ("http", "https"):
        raise MediaRefused(f"{name}: the server redirects to a {scheme}: URL, which is never followed")
    return target


def _status(code: int) -> str:
    try:
        return f"{code} {HTTPStatus(code).phrase}"
    except ValueError:
        return f"{code} (no known HTTP status)"


def _body(response: requests.Response, guard: Guard) -> bytes:
    length = response.headers.get("content-length", "")
    encoding = response.headers.get("content-encoding", "identity").strip().lower()
    if length.isdecimal():
        guard.policy.check_bytes(int(length[:20]), guard.name)
    pieces = _pieces(response, guard)
    if encoding in INFLATE:
        pieces = _inflated(pieces, encoding, guard)
    elif encoding not in ("identity", ""):
        raise MediaError(f"{guard.name}: the server sent content encoding {encoding[:40]!r}, unasked for")
    body = io.BytesIO()
    for piece in pieces:
        body.write(piece)
        guard.policy.check_bytes(body.tell(), guard.name)
    return body.getvalue()


def _pieces(response: requests.Response, guard: Guard) -> Iterator[bytes]:
    # Not `stream`: it reads chunk sizes by lines of any length in some releases of urllib3.
    received = 0
    while piece := response.raw.read(PIECE_BYTES, decode_content=False):
        guard.check_time()
        received += len(piece)
        guard.policy.check_bytes(received, guard.name)  # also of what decompresses to nothing
        yield piece
    guard.check_time()  # a line that was cut looks like the end of a body without a length


def _inflated(pieces: Iterator[bytes], encoding: str, guard: Guard) -> Iterator[bytes]:
    """`pieces` decompressed, never more than PIECE_BYTES at a time."""
    inflater = zlib.decompressobj(INFLATE[encoding])
    for piece in pieces:
        while piece:
            if inflater.eof:
                inflater = zlib.decompressobj(INFLATE[encoding])
            yield inflater.decompress(piece, PIECE_BYTES)
            piece = inflater.unconsumed_tail or inflater.unused_data
            guard.check_time()
    if not inflater.eof:
        raise MediaError(f"{guard.name}: the server's {encoding} body ends too early")


def _causes(error: BaseException) -> Iterator[BaseException]:
    """`error` and all that caused it, the outermost first."""
    seen: list[BaseException] = [error]
    for current in seen:
        inner = [current.__cause__, current.__context__, getattr(current, "reason", None), *current.args]
        seen += [each for each in inner if isinstance(each, BaseException) and each not in seen]
    yield from seen


def _reason(error: BaseException) -> str:
    """Why, from the system's own error where there is one; the libraries' texts hold URLs."""
    for cause in _causes(error):
        if isinstance(cause, OSError) and cause.strerror:
            return cause.strerror
    if isinstance(error, ValueError):
        return "not a URL that can be fetched"
    kind = type(list(_causes(error))[-1]).__name__
    return re.sub(r"(?<=[a-z])(?=[A-Z])", " ", kind).lower()  # "incomplete read"
