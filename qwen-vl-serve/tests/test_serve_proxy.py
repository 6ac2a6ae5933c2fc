"""The real nginx with our template, before a server that answers every address and remembers what came."""

import http.client
import json
import os
import re
import socket
import ssl
import subprocess
import threading
import time
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from qwen_vl_serve import proxy
from qwen_vl_serve.proxy import ProxySettings, add_key, make_certificate, program, render, running_nginx

TEMPLATE = Path(__file__).parents[1] / "deploy/nginx/default.conf.template"
CHAT = "/v1/chat/completions"
POSTS = [CHAT, "/v1/completions", "/v1/responses"]
# What vLLM 0.32 leaves open, some of it even with --api-key.
OTHERS = """/ /docs /openapi.json /redoc /metrics /load /ping /version /server_info /tokenize /detokenize
    /tokenizer_info /invocations /pause /resume /is_paused /sleep /wake_up /is_sleeping /collective_rpc
    /reset_prefix_cache /reset_mm_cache /reset_encoder_cache /start_profile /stop_profile /abort_requests
    /inference/v1/generate /update_weights /init_weight_transfer_engine /get_world_size /scale_elastic_ep
    /fault_tolerance/apply /fault_tolerance/status /v1/load_lora_adapter /v1/unload_lora_adapter
    /v1/chat/completions/render /v1/completions/render /v1/chat/completions/derender /v1/messages
    /v1/messages/count_tokens /v1/embeddings /v1/score /v1/rerank /v1/audio/transcriptions /v1/realtime
    /v1/responses/resp_1 /v1/responses/resp_1/cancel /v1/models/nano /v1 /v1/ /score /rerank /classify
    /pooling /mcp /generative_scoring /.env""".split()


@dataclass
class Upstream:
    """What the server behind nginx saw, and how it is to behave."""

    port: int = 0
    seen: list[tuple[str, str, dict[str, str], bytes]] = field(default_factory=list)
    ports: set[int] = field(default_factory=set)  # of the connections that came
    lost: threading.Event = field(default_factory=threading.Event)  # set when a reader went away
    go_on: threading.Event = field(default_factory=threading.Event)  # a stream's second half waits for it
    silent: bool = False  # closes the connection without an answer


def handler(state: Upstream) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, format: str, *values: object) -> None:
            pass

        def do_GET(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            state.ports.add(self.client_address[1])
            state.seen.append((self.command, self.path, dict(self.headers), body))
            if state.silent:
                self.close_connection = True
            elif b'"stream"' in body:
                self.stream()
            else:
                self.answer(json.dumps({"path": self.path, "length": len(body)}).encode())

        do_POST = do_GET

        def answer(self, body: bytes) -> None:
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.send_header("X-Request-Id", "the server's own")
            self.end_headers()
            self.wfile.write(body)

        def stream(self) -> None:
            self.send_response(200)
            self.send_header("Content-Type", "text/event-stream")
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            try:
                self.chunk(b"data: first\n\n")
                state.go_on.wait(10)
                for _ in range(50):
                    self.chunk(b"data: more\n\n")
                    time.sleep(0.002 if not state.lost.is_set() else 0)
                self.chunk(b"")
            except OSError:
                state.lost.set()
                self.close_connection = True

        def chunk(self, data: bytes) -> None:
            self.wfile.write(b"%x\r\n%s\r\n" % (len(data), data))
            self.wfile.flush()

    return Handler


@contextmanager
def upstream():
    state = Upstream()
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler(state))
    server.daemon_threads = True
    state.port = server.server_address[1]
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield state
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@dataclass
class Front:
    """A running nginx, with what a client needs."""

    port: int
    folder: Path
    keys: dict[str, str]
    upstream: Upstream
    settings: ProxySettings

    def tls(self) -> ssl.SSLContext:
        return ssl.create_default_context(cafile=str(self.folder / "tls.crt"))

    def ask(self, method: str, path: str, body: bytes | None = None, key: str | None = "alice", **headers):
        """Status, headers, body. `key` names a client, None sends none."""
        headers = {name.replace("_", "-"): value for name, value in headers.items()}
        if key is not None:
            headers.setdefault("Authorization", f"Bearer {self.keys[key]}")
        connection = http.client.HTTPSConnection("127.0.0.1", self.port, timeout=15, context=self.tls())
        try:
            connection.request(method, path, body, headers)
            response = connection.getresponse()
            return response.status, response.headers, response.read()
        finally:
            connection.close()

    def raw(self, data: bytes) -> bytes:
        """Everything that comes back for these bytes, until nginx closes or is silent for a second."""
        plain = socket.create_connection(("127.0.0.1", self.port), timeout=5)
        with self.tls().wrap_socket(plain, server_hostname="localhost") as connection:
            connection.settimeout(1)
            connection.sendall(data)
            answer = b""
            while True:
                try:
                    part = connection.recv(65536)
                except (TimeoutError, ConnectionResetError):
                    return answer
                if not part:
                    return answer
                answer += part

    def log(self) -> list[dict]:
        return [json.loads(line) for line in (self.folder / "access.log").read_text().splitlines()]


@contextmanager
def front(folder: Path, states: list[Upstream], **changes: str):
    keys = {client: add_key(folder / "keys.conf", client) for client in ["alice", "bob"]}
    certificate, certificate_key = make_certificate(folder)
    settings = ProxySettings(
        servers=" ".join(f"server 127.0.0.1:{state.port};" for state in states),
        keys=str(folder / "keys.conf"),
        certificate=str(certificate),
        certificate_key=str(certificate_key),
        listen=f"127.0.0.1:{free_port()}",
        access_log=str(folder / "access.log"),
        rate="1000r/s",
        burst="1000",
        server_authorization="Bearer the-servers-own-key",
    )
    settings = replace(settings, **changes)
    with running_nginx(TEMPLATE, settings, folder):
        yield Front(int(settings.listen.rpartition(":")[2]), folder, keys, states[0], settings)


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    with upstream() as state, front(tmp_path_factory.mktemp("nginx"), [state], max_body="64k") as running:
        yield running


@pytest.fixture
def nginx(shared):
    """The shared one, its server's memory emptied."""
    state = shared.upstream
    state.seen.clear()
    state.ports.clear()
    state.lost.clear()
    state.go_on.clear()
    state.silent = False
    return shared


def error_of(body: bytes) -> dict:
    error = json.loads(body)["error"]
    assert set(error) == {"message", "type", "param", "code"} and error["message"]
    return error


# ---- What is open, and what is not


@pytest.mark.parametrize("method, path", [*(("POST", path) for path in POSTS), ("GET", "/v1/models")])
def test_paths_on_the_list_are_passed_on(nginx, method, path):
    status, headers, body = nginx.ask(method, path, b'{"model": "nano"}' if method == "POST" else None)
    assert (status, json.loads(body)["path"]) == (200, path)
    assert [(seen[0], seen[1]) for seen in nginx.upstream.seen] == [(method, path)]
    assert (
        re.fullmatch(r"[0-9a-f]{32}", headers["X-Request-Id"]) and len(headers.get_all("X-Request-Id")) == 1
    )
    assert headers["Server"] == "nginx"


@pytest.mark.parametrize("method", ["GET", "POST"])
@pytest.mark.parametrize("path", OTHERS)
def test_other_paths_are_not_there(nginx, method, path):
    status, _, body = nginx.ask(method, path, b"{}" if method == "POST" else None)
    assert (status, error_of(body)["code"]) == (404, "not_found")
    assert not nginx.upstream.seen


@pytest.mark.parametrize("path", [*POSTS, "/v1/models", "/health"])
@pytest.mark.parametrize("method", "GET POST PUT PATCH DELETE OPTIONS HEAD TRACE PROPFIND".split())
def test_other_methods_are_refused(nginx, method, path):
    allowed = "POST" if path in POSTS else "GET"
    status, headers, body = nginx.ask(method, path)
    if method == allowed:
        assert status == 200
        return
    assert status == 405 and not nginx.upstream.seen
    if method != "TRACE":  # nginx refuses TRACE before it looks at the configuration
        assert headers["Allow"] == allowed
        assert method == "HEAD" or error_of(body)["code"] == "method_not_allowed"


TRICKS = """//metrics /v1//models //v1/models /v1/../metrics /v1/./models /v1/models/ /v1/models/../../metrics
    /v1/chat/completions/../../../metrics /v1/chat/../../metrics /v1/%2e%2e/metrics /v1/%2e%2e%2fmetrics
    /v1/..%2fmetrics /v1/..;/metrics /v1/models;/../metrics /v1%2fmodels /v1/model%73 /V1/models /v1/Models
    /v1/MODELS /v1/models%00 /v1/models%20 /v1/models%0d%0aX:1 /v1/models# /v1/models/. /v1/models/..
    /v1/models\\ /v1\\models /v1/models%3f/../metrics /metrics?/v1/models /metrics#/v1/models
    /metrics/../v1/models /metrics%23/../v1/models /%76%31/models /v1/models%2f..%2f..%2fmetrics
    /..%5cmetrics /.%2e/metrics /v1/models?x#y /v1/models%ff /v1/models\xff //127.0.0.1/metrics""".split()


@pytest.mark.parametrize("path", TRICKS)
def test_tricks_with_the_path_find_nothing(nginx, path):
    request = f"GET {path} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {nginx.keys['alice']}\r\n"
    answer = nginx.raw(request.encode("latin-1") + b"Connection: close\r\n\r\n")
    assert answer.startswith((b"HTTP/1.1 404 ", b"HTTP/1.1 400 ")), answer
    error_of(answer.partition(b"\r\n\r\n")[2])
    assert not nginx.upstream.seen


@pytest.mark.parametrize("page", ["bad_request", "slow", "long_address", "plain_http"])
def test_the_pages_of_errors_have_no_address_of_their_own(nginx, page):
    assert nginx.ask("GET", f"/-/{page}")[0] == 404


@pytest.mark.parametrize(
    "line",
    [
        "GET http://127.0.0.1/metrics HTTP/1.1",
        "GET https://x/v1/../metrics HTTP/1.1",
        "GET http://x@127.0.0.1:8000/metrics HTTP/1.1",
        "CONNECT 127.0.0.1:8000 HTTP/1.1",
        "OPTIONS * HTTP/1.1",
        "GET metrics HTTP/1.1",
        "GET /metrics",
        "GET /v1/models HTTP/0.9",
        "GET /v1/models HTTP/2.0",
        "PRI * HTTP/2.0",
        "get /v1/models HTTP/1.1",
        "GET  /metrics  HTTP/1.1",
        "GET /v1/models HTTP/1.1 /metrics HTTP/1.1",
        "GET\t/metrics\tHTTP/1.1",
    ],
)
def test_odd_request_lines_reach_nothing(nginx, line):
    key = nginx.keys["alice"]
    answer = nginx.raw(
        f"{line}\r\nHost: x\r\nAuthorization: Bearer {key}\r\nConnection: close\r\n\r\n".encode()
    )
    assert re.match(rb"HTTP/1\.1 (400|404|405|505) |<html|\{", answer) or answer == b"", answer
    assert not nginx.upstream.seen


def test_an_absolute_address_is_the_address_in_it(nginx):
    """RFC 9112 wants it taken; its host says nothing about where the question goes."""
    key = nginx.keys["alice"]
    head = f"Host: x\r\nAuthorization: Bearer {key}\r\nConnection: close\r\n\r\n"
    answer = nginx.raw(f"GET http://169.254.169.254/v1/models HTTP/1.1\r\n{head}".encode())
    assert answer.startswith(b"HTTP/1.1 200 ")
    assert [(seen[1], seen[2]["Host"]) for seen in nginx.upstream.seen] == [("/v1/models", "qwenvl")]


INNER = b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n"
SMUGGLING = {
    "length and chunks": b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n" + INNER,
    "chunks and length": b"Transfer-Encoding: chunked\r\nContent-Length: 40\r\n\r\n0\r\n\r\n" + INNER,
    "two lengths": b"Content-Length: 0\r\nContent-Length: 36\r\n\r\n" + INNER,
    "two lengths in one": b"Content-Length: 0, 36\r\n\r\n" + INNER,
    "signed length": b"Content-Length: +36\r\n\r\n" + INNER,
    "unknown coding": b"Transfer-Encoding: xchunked\r\n\r\n0\r\n\r\n" + INNER,
    "hidden coding": b"Transfer-Encoding : chunked\r\nContent-Length: 5\r\n\r\n0\r\n\r\n" + INNER,
    "coding after a tab": b"Transfer-Encoding:\tchunked\r\nContent-Length: 5\r\n\r\n0\r\n\r\n" + INNER,
    "folded coding": b"Transfer-Encoding:\r\n chunked\r\nContent-Length: 5\r\n\r\n0\r\n\r\n" + INNER,
    "coding twice": b"Transfer-Encoding: chunked\r\nTransfer-Encoding: identity\r\n\r\n0\r\n\r\n" + INNER,
    "bad chunk size": b"Transfer-Encoding: chunked\r\n\r\n0x0\r\n\r\n" + INNER,
    "huge chunk size": b"Transfer-Encoding: chunked\r\n\r\nfffffffffffffffff\r\n\r\n" + INNER,
    "inside a body": b"Content-Length: %d\r\n\r\n" % len(INNER) + INNER,
    "upgrade": b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABk\r\n"
    b"Content-Length: 2\r\n\r\n{}",
}


@pytest.mark.parametrize("name", SMUGGLING)
def test_nothing_is_smuggled_inside_a_request(nginx, name):
    head = f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {nginx.keys['alice']}\r\n".encode()
    nginx.raw(head + SMUGGLING[name])
    for method, path, headers, body in nginx.upstream.seen:
        assert (method, path) == ("POST", CHAT)
        assert "Upgrade" not in headers and "Transfer-Encoding" not in headers
        assert int(headers["Content-Length"]) == len(body)


def test_pipelined_requests_are_judged_one_by_one(nginx):
    head = f"Host: x\r\nAuthorization: Bearer {nginx.keys['alice']}\r\n".encode()
    answer = nginx.raw(
        b"GET /v1/models HTTP/1.1\r\n%s\r\nGET /metrics HTTP/1.1\r\n%s\r\n" % (head, head)
        + b"GET /v1/models HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
    )
    assert re.findall(rb"HTTP/1\.1 (\d+)", answer) == [b"200", b"404", b"401"]
    assert [seen[1] for seen in nginx.upstream.seen] == ["/v1/models"]


# ---- Keys


WRONG_KEYS = {
    "none": None,
    "empty": "",
    "scheme only": "Bearer ",
    "unknown": "Bearer sk-qwenvl-" + "0" * 64,
    "client's name": "alice",
    "another scheme": "Basic YWxpY2U6",
    "the servers' own": "Bearer the-servers-own-key",
    "pattern": "Bearer ~.*",
    "word of the map": "default",
    "long": "Bearer " + "a" * 4000,
}


@pytest.mark.parametrize("name", WRONG_KEYS)
@pytest.mark.parametrize("method, path", [("POST", CHAT), ("GET", "/v1/models")])
def test_without_a_known_key_nothing_is_passed_on(nginx, name, method, path):
    value = WRONG_KEYS[name]
    headers = {} if value is None else {"Authorization": value}
    status, headers, body = nginx.ask(method, path, b"{}" if method == "POST" else None, key=None, **headers)
    assert (status, error_of(body)["code"]) == (401, "invalid_api_key")
    assert headers["WWW-Authenticate"].startswith("Bearer")
    assert not nginx.upstream.seen


def test_parts_and_extensions_of_a_key_are_no_key(nginx):
    key = nginx.keys["alice"]
    for wrong in [key[:-1], key + "0", key + " ", " " + key, key.replace("sk-", ""), f"{key},{key}"]:
        value = f"Bearer {wrong}" if wrong != key + " " else f"Bearer {key} x"
        assert nginx.ask("GET", "/v1/models", key=None, Authorization=value)[0] == 401, wrong
    for name in ["x-api-key", "api-key", "Proxy-Authorization", "X-Authorization"]:
        assert nginx.ask("GET", "/v1/models", key=None, **{name: f"Bearer {key}"})[0] == 401
    assert nginx.ask("GET", f"/v1/models?api_key={key}&key={key}", key=None)[0] == 401
    assert not nginx.upstream.seen


def test_health_needs_no_key(nginx):
    assert nginx.ask("GET", "/health", key=None)[0] == 200


def test_what_the_client_says_of_itself_is_not_handed_on(nginx):
    claims = {
        "X_Forwarded_For": "10.0.0.1",
        "X_Forwarded_Host": "evil",
        "X_Forwarded_Proto": "gopher",
        "Forwarded": "for=10.0.0.1",
        "X_Real_IP": "10.0.0.1",
        "Cookie": "a=b",
        "X_Request_Id": "mine",
        "X_User_Id": "bob",
        "X_data_parallel_rank": "1",
        "X_Session_ID": "bob",
        "Traceparent": "00-1-1-01",
        "Referer": "https://secret.example/",
        "Content_Type": "application/json",
        "Accept": "text/event-stream",
    }
    assert nginx.ask("POST", CHAT + "?priority=9&key=secret", b"{}", **claims)[0] == 200
    ((_, path, headers, body),) = nginx.upstream.seen
    identity = headers.pop("X-Request-Id")
    assert re.fullmatch(r"[0-9a-f]{32}", identity)
    assert (path, body) == (CHAT, b"{}")
    assert {name: value for name, value in headers.items() if name != "Connection"} == {
        "Host": "qwenvl",
        "Content-Type": "application/json",
        "Content-Length": "2",
        "Accept": "text/event-stream",
        "Authorization": "Bearer the-servers-own-key",
        "X-Forwarded-For": "127.0.0.1",
        "X-User-Id": "alice",
    }


# ---- Sizes, rates, time


def test_a_body_over_the_limit_is_refused_and_one_at_the_limit_is_not(nginx):
    assert nginx.ask("POST", CHAT, b"x" * 65536)[0] == 200
    status, _, body = nginx.ask("POST", CHAT, b"x" * 65537)
    assert (status, error_of(body)["code"]) == (413, "request_too_large")
    assert "64k" in error_of(body)["message"]
    assert len(nginx.upstream.seen) == 1


def test_a_body_of_chunks_over_the_limit_is_refused_while_it_arrives(nginx):
    head = f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {nginx.keys['alice']}\r\n"
    chunks = b"2000\r\n" + b"x" * 8192 + b"\r\n"
    answer = nginx.raw(head.encode() + b"Transfer-Encoding: chunked\r\n\r\n" + chunks * 20)
    assert answer.startswith(b"HTTP/1.1 413 ") and not nginx.upstream.seen


def test_a_key_is_checked_before_the_body_is_read(nginx):
    answer = nginx.raw(f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Length: 60000\r\n\r\n".encode() + b"x")
    assert answer.startswith(b"HTTP/1.1 401 ")


def test_bodies_stay_out_of_files(nginx):
    assert nginx.ask("POST", CHAT, b"secret prompt " * 4000)[0] == 200
    left = [
        path for path in nginx.folder.rglob("*") if path.is_file() and b"secret prompt" in path.read_bytes()
    ]
    assert not left
    assert "is buffered to a temporary file" not in (nginx.folder / "error.log").read_text()


def test_headers_too_large_and_an_address_too_long_are_told_so(nginx):
    status, _, body = nginx.ask("GET", "/v1/models", X_Big="x" * 9000)
    assert (status, error_of(body)["code"]) == (400, "bad_request")
    status, _, body = nginx.ask("GET", "/v1/models?" + "x" * 9000)
    assert (status, error_of(body)["code"]) == (414, "address_too_long")
    assert not nginx.upstream.seen


def test_a_stream_arrives_as_it_is_made(nginx):
    connection = http.client.HTTPSConnection("127.0.0.1", nginx.port, timeout=10, context=nginx.tls())
    connection.request("POST", CHAT, b'{"stream": true}', {"Authorization": "Bearer " + nginx.keys["alice"]})
    response = connection.getresponse()
    # The server waits for the event: what is read here cannot have waited for the rest.
    assert response.readline() == b"data: first\n"
    nginx.upstream.go_on.set()
    assert response.read().count(b"data: more") == 50
    assert response.headers["Content-Type"] == "text/event-stream"
    connection.close()


def test_the_server_notices_when_the_client_leaves(nginx):
    connection = http.client.HTTPSConnection("127.0.0.1", nginx.port, timeout=10, context=nginx.tls())
    connection.request("POST", CHAT, b'{"stream": true}', {"Authorization": "Bearer " + nginx.keys["alice"]})
    response = connection.getresponse()
    response.readline()
    response.close()
    connection.close()
    time.sleep(0.2)
    nginx.upstream.go_on.set()
    assert nginx.upstream.lost.wait(10)


def test_connections_to_the_server_are_used_again(nginx):
    for _ in range(20):
        assert nginx.ask("POST", CHAT, b"{}")[0] == 200
    assert len(nginx.upstream.ports) <= 4  # each of nginx's two processes keeps its own


def test_a_question_is_not_asked_twice(nginx):
    """The server that got it may be answering: a second one would cost double, or answer twice."""
    nginx.upstream.silent = True
    status, headers, body = nginx.ask("POST", CHAT, b"{}")
    assert (status, error_of(body)["code"]) == (503, "server_unavailable")
    assert headers["Retry-After"] and len(nginx.upstream.seen) == 1


def test_a_server_that_is_down_is_passed_over_and_taken_back(tmp_path):
    with upstream() as first, ExitStack() as stack:
        down = Upstream(port=free_port())
        changes = {"servers": " ".join(f"server 127.0.0.1:{s.port} fail_timeout=1s;" for s in (down, first))}
        nginx = stack.enter_context(front(tmp_path, [first, down], **changes))
        assert [nginx.ask("POST", CHAT, b"{}")[0] for _ in range(8)] == [200] * 8
        assert len(first.seen) == 8
        server = ThreadingHTTPServer(("127.0.0.1", down.port), handler(down))
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, daemon=True).start()
        stack.callback(server.server_close)
        stack.callback(server.shutdown)
        end = time.monotonic() + 10
        while not down.seen and time.monotonic() < end:
            assert nginx.ask("POST", CHAT, b"{}")[0] == 200
        assert down.seen


def test_no_server_at_all_is_told_so(tmp_path):
    with front(tmp_path, [Upstream(port=free_port())]) as nginx:
        status, headers, body = nginx.ask("POST", CHAT, b"{}")
        assert (status, error_of(body)["type"], headers["Retry-After"]) == (503, "server_error", "5")
        assert nginx.ask("GET", "/health", key=None)[0] == 503


def test_rate_and_connections_are_limited_for_each_key(tmp_path):
    with upstream() as state, front(tmp_path, [state], rate="1r/s", burst="4", connections="2") as nginx:
        statuses = [nginx.ask("GET", "/v1/models")[0] for _ in range(8)]
        assert statuses[:5] == [200] * 5 and statuses[-1] == 429
        status, headers, body = nginx.ask("GET", "/v1/models")
        assert (status, error_of(body)["code"], headers["Retry-After"]) == (429, "rate_limit_exceeded", "1")
        # Another key has its own. An unknown one is refused before it counts.
        assert nginx.ask("GET", "/v1/models", key="bob")[0] == 200
        statuses = []

        def stream() -> None:
            statuses.append(nginx.ask("POST", CHAT, b'{"stream": 1}', key="bob")[0])

        threads = [threading.Thread(target=stream) for _ in range(2)]
        for thread in threads:
            thread.start()
        end = time.monotonic() + 5
        while sum(seen[1] == CHAT for seen in state.seen) < 2 and time.monotonic() < end:
            time.sleep(0.01)
        assert nginx.ask("POST", CHAT, b"{}", key="bob")[0] == 429
        state.go_on.set()
        for thread in threads:
            thread.join()
        assert statuses == [200, 200]


def test_a_server_silent_for_too_long_is_given_up(tmp_path):
    with upstream() as state, front(tmp_path, [state], timeout="1s") as nginx:
        with pytest.raises(http.client.IncompleteRead):  # after the first word the only way is to hang up
            nginx.ask("POST", CHAT, b'{"stream": 1}')
        state.go_on.set()


# ---- TLS


def handshake(port: int, version: ssl.TLSVersion | None) -> str | None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    if version is not None:
        context.set_ciphers("ALL:@SECLEVEL=0")
        context.minimum_version = context.maximum_version = version
    with socket.create_connection(("127.0.0.1", port)) as plain, context.wrap_socket(plain) as connection:
        return connection.version()


@pytest.mark.filterwarnings("ignore:ssl.TLSVersion")
def test_tls_is_1_2_or_newer(nginx):
    assert handshake(nginx.port, ssl.TLSVersion.TLSv1_2) == "TLSv1.2"
    assert handshake(nginx.port, None) == "TLSv1.3"
    for old in [ssl.TLSVersion.TLSv1, ssl.TLSVersion.TLSv1_1]:
        with pytest.raises((ssl.SSLError, ConnectionResetError)):
            handshake(nginx.port, old)


def test_plain_http_is_told_to_use_https(nginx):
    connection = http.client.HTTPConnection("127.0.0.1", nginx.port, timeout=5)
    connection.request("GET", "/v1/models", headers={"Authorization": "Bearer " + nginx.keys["alice"]})
    response = connection.getresponse()
    assert (response.status, error_of(response.read())["code"]) == (400, "https_required")
    assert not nginx.upstream.seen


# ---- The log


def test_the_log_says_who_and_how_much_but_neither_prompts_nor_keys(nginx):
    before = len(nginx.log())
    key = nginx.keys["bob"]
    nginx.ask("POST", CHAT + "?q=query-secret", b'{"content": "prompt-secret"}', key="bob")
    nginx.ask("GET", f"/v1/modelz/{key}?x={key}", key="bob")
    nginx.ask("GET", "/v1/models", key=None, Authorization="Bearer wrong-secret")
    end = time.monotonic() + 5
    while len(nginx.log()) < before + 3 and time.monotonic() < end:
        time.sleep(0.02)
    first, second, third = nginx.log()[before:]
    assert first["client"] == "bob" and first["path"] == CHAT and first["status"] == 200
    assert first["bytes_in"] > 28 and first["bytes_out"] > 50 and first["seconds"] >= 0
    assert first["server"] == f"127.0.0.1:{nginx.upstream.port}" and float(first["server_first_byte"]) >= 0
    assert first["id"] == nginx.upstream.seen[0][2]["X-Request-Id"]
    assert (second["path"], second["status"]) == ("(not on the list)", 404)
    assert (third["client"], third["status"]) == ("", 401)
    text = (nginx.folder / "access.log").read_text()
    assert not [word for word in [key, "prompt-secret", "query-secret", "wrong-secret"] if word in text]


# ---- The template and the command


def test_the_images_envsubst_gives_the_same_text(tmp_path, shared):
    """The official image replaces every variable of its environment; with its filter, ours only."""
    environment = shared.settings.environment()
    names = " ".join(f"${{{name}}}" for name in environment)
    text = TEMPLATE.read_text()
    command = [program("envsubst", "gettext-base"), names]
    done = subprocess.run(
        command, input=text, env=environment | {"host": "x"}, capture_output=True, text=True, check=True
    )
    assert done.stdout == render(text, shared.settings)
    assert set(re.findall(r"\$\{(\w+)\}", text)) == set(environment)


def test_the_command_makes_keys_and_a_configuration_that_nginx_takes(tmp_path, capsys):
    keys = tmp_path / "keys.conf"
    assert proxy.main(["add-key", str(keys), "alice"]) == 0
    key = capsys.readouterr().out.strip()
    assert proxy.read_keys(keys) == {key: "alice"} and keys.stat().st_mode & 0o777 == 0o640
    (tmp_path / "server-key").write_text("inner\n")
    certificate, certificate_key = make_certificate(tmp_path)
    output = tmp_path / "qwenvl.conf"
    arguments = ["render", str(TEMPLATE), "--server", "127.0.0.1:8000", "--server", "[::1]:8001"]
    arguments += ["--keys", str(keys), "--certificate", str(certificate)]
    arguments += ["--certificate-key", str(certificate_key), "--output", str(output)]
    arguments += ["--access-log", str(tmp_path / "access.log")]
    assert proxy.main([*arguments, "--server-key-file", str(tmp_path / "server-key")]) == 0
    assert output.stat().st_mode & 0o777 == 0o640 and '"Bearer inner"' in output.read_text()
    (tmp_path / "nginx.conf").write_text(
        f"pid {tmp_path}/pid; events {{}} http {{ include {output}; }}", encoding="utf-8"
    )
    check = [program("nginx", "nginx"), "-t", "-e", "stderr", "-c", str(tmp_path / "nginx.conf")]
    done = subprocess.run(check, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "[warn]" not in done.stderr or os.geteuid() != 0


@pytest.mark.parametrize(
    "change, word",
    [
        ({"servers": "server a:1; } server { listen 80"}, "servers"),
        ({"servers": ""}, "servers"),
        ({"servers": "vllm:8000"}, "servers"),
        ({"rate": "10"}, "rate"),
        ({"max_body": "40 MB"}, "max_body"),
        ({"max_body": "0"}, "max_body"),
        ({"keys": "keys.conf"}, "keys"),
        ({"keys": "/a;b"}, "keys"),
        ({"timeout": "600"}, "timeout"),
        ({"listen": "8443 ssl"}, "listen"),
        ({"server_authorization": 'Bearer a"; evil'}, "server_authorization"),
    ],
)
def test_a_setting_that_nginx_would_misread_is_refused(shared, change, word):
    with pytest.raises(ValueError, match=f"^{word}: expected") as caught:
        replace(shared.settings, **change)
    assert "evil" not in str(caught.value)


def test_a_file_of_keys_that_nginx_would_misread_is_refused(tmp_path):
    path = tmp_path / "keys.conf"
    key = "sk-" + "a" * 40
    wrong = [
        f"Bearer {key} alice;",
        '"Bearer short" alice;',
        f'"Bearer {key}" ;',
        "default evil;",
        "include x;",
    ]
    for line in [*wrong, f'"Bearer {key.upper()}" alice;']:
        path.write_text(f"# comment\n\n{line}\n")
        with pytest.raises(ValueError, match=r"keys\.conf:3: expected"):
            proxy.read_keys(path)
    path.write_text(f'"Bearer {key}" alice;\n"Bearer {key}" bob;\n')
    with pytest.raises(ValueError, match=r"keys\.conf:2: the key of alice again, for bob"):
        proxy.read_keys(path)
    with pytest.raises(ValueError, match="client: lower-case"):
        add_key(tmp_path / "new.conf", "Alice; evil")


def test_the_command_says_what_is_missing(tmp_path, capsys):
    keys = tmp_path / "keys.conf"
    arguments = ["render", str(TEMPLATE), "--server", "a:1", "--keys", str(keys)]
    arguments += ["--certificate", "/c", "--certificate-key", "/k"]
    assert proxy.main(arguments) == 1 and "keys.conf" in capsys.readouterr().err
    keys.touch()
    assert proxy.main(arguments) == 1 and "add-key" in capsys.readouterr().err
    with pytest.raises(ValueError, match="the template has"):
        render("${QWENVL_NEW}", ProxySettings("server a:1;", "/k", "/c", "/k"))


def test_a_program_that_is_missing_is_named(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="sudo apt-get install shellcheck"):
        program("no-such-shellcheck", "shellcheck")


def test_an_nginx_that_does_not_start_says_why(tmp_path, shared):
    settings = replace(shared.settings, certificate=str(tmp_path / "none.crt"), listen="127.0.0.1:1")
    with pytest.raises(RuntimeError, match=r"none\.crt"), running_nginx(TEMPLATE, settings, tmp_path):
        pass
