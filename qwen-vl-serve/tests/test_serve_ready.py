"""Ready means: it has answered a picture. And the command hands signals on and leaves no process behind.

A small program stands in for vLLM: it answers when it is told to, has a child like vLLM's engine, and ends
like vLLM. The real one is started in test_serve_endpoint.py.
"""

import base64
import io
import json
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from PIL import Image

from qwen_vl_serve.launch import running_server
from qwen_vl_serve.ready import NotReady, wait_until_ready

NANO = str(Path(__file__).resolve().parents[2] / "models/qwen3-vl-nano")
MODELS = {"object": "list", "data": [{"id": "nano"}]}
STAND_IN = """#!{python}
import json, os, pathlib, signal, subprocess, sys, threading, time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

folder = pathlib.Path(__file__).parent
mode = (folder / "mode").read_text()
child = subprocess.Popen(["sleep", "600"])
(folder / "pids").write_text(f"{{os.getpid()}} {{child.pid}}")
print("stand-in: loading weights", flush=True)
if mode == "dies":
    sys.exit("stand-in: out of memory")


def end(number, frame):
    if mode == "hangs":
        return
    (folder / "ended").write_text(signal.Signals(number).name)
    threading.Timer(0.5, os._exit, [7]).start()


signal.signal(signal.SIGINT, end)
signal.signal(signal.SIGTERM, end)


class Handler(BaseHTTPRequestHandler):
    def answer(self):
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        body = json.dumps({{"data": [{{"id": "nano"}}]}}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_GET = do_POST = answer

    def log_message(self, *_):
        pass


port = int(sys.argv[sys.argv.index("--port") + 1])
if mode == "loads for ever":
    time.sleep(600)
ThreadingHTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""


@contextmanager
def endpoint(answer):
    """A server on a free port; ``answer(handler, body)`` -> (status, JSON or bytes)."""

    class Handler(BaseHTTPRequestHandler):
        def handle_any(self):
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            status, told = answer(self, json.loads(body) if body else None)
            content = told if isinstance(told, bytes) else json.dumps(told).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        do_GET = do_POST = handle_any

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def test_it_waits_until_a_picture_was_answered(monkeypatch):
    """Through 503 on the way, past the environment's proxies, with the key; the picture is one."""
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    seen = []

    def answer(handler, body):
        seen.append((handler.path, handler.headers["Authorization"], body))
        if len(seen) < 3:
            return 503, {"error": "starting"}
        return 200, MODELS if body is None else {"choices": []}

    with endpoint(answer) as url:
        ready = wait_until_ready(url, "secret", timeout=20)
    assert ready.model == "nano"
    assert 0.4 < ready.seconds < 20
    paths, keys, bodies = zip(*seen, strict=True)
    assert paths == ("/v1/models",) * 3 + ("/v1/chat/completions",)
    assert set(keys) == {"Bearer secret"}
    assert bodies[-1]["max_tokens"] == 1 and bodies[-1]["model"] == "nano"
    url = bodies[-1]["messages"][0]["content"][0]["image_url"]["url"]
    picture = Image.open(io.BytesIO(base64.b64decode(url.removeprefix("data:image/png;base64,"))))
    assert picture.convert("RGB").getcolors() == [(64 * 64, (128, 128, 128))]


def test_without_a_picture_where_the_server_takes_none():
    bodies = []
    with endpoint(lambda _, body: (200, MODELS if body is None else bodies.append(body) or {})) as url:
        wait_until_ready(url, timeout=20, picture=False)
    assert [item["type"] for item in bodies[0]["messages"][0]["content"]] == ["text"]


@pytest.mark.parametrize(
    ("status", "told", "match"),
    [
        (400, {"error": "no image"}, "HTTP 400.*no image"),
        (401, {"error": "Unauthorized"}, "give the server's --api-key"),
        (500, {"error": "nan"}, "HTTP 500.*nan"),
        (200, b"<html>hello</html>", "no OpenAI-compatible endpoint"),
        (200, {"models": []}, "no OpenAI-compatible endpoint"),
    ],
)
def test_a_server_that_refuses_is_not_waited_for(status, told, match):
    with endpoint(lambda *_: (status, told)) as url, pytest.raises(NotReady, match=match):
        wait_until_ready(url, timeout=20)


def test_the_time_and_the_process_end_the_waiting():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{probe.getsockname()[1]}/v1"
    with pytest.raises(NotReady, match=r"no answer within 0\.5 seconds"):
        wait_until_ready(url, timeout=0.5)
    process = subprocess.Popen([sys.executable, "-c", "raise SystemExit(3)"])
    with process, pytest.raises(NotReady, match="ended with status 3"):
        wait_until_ready(url, timeout=60, process=process)


@pytest.fixture
def stand_in(tmp_path):
    """mode -> the interpreter that has the stand-in for vLLM beside it."""

    def put(mode):
        (tmp_path / "vllm").write_text(STAND_IN.format(python=sys.executable))
        (tmp_path / "vllm").chmod(0o755)
        (tmp_path / "mode").write_text(mode)
        return tmp_path / "python"

    return put


@pytest.fixture
def serve(stand_in, tmp_path):
    """mode -> the running command, its output in tmp_path/out."""
    started = []

    def begin(mode, *flags):
        code = "import sys; sys.executable = sys.argv.pop(1); from qwen_vl_serve.launch import main"
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        command = [sys.executable, "-c", f"{code}; sys.exit(main())", str(stand_in(mode)), NANO]
        with (tmp_path / "out").open("w") as out:
            started.append(
                subprocess.Popen(
                    [*command, "--port", str(port), *flags], stdout=out, stderr=subprocess.STDOUT
                )
            )
        return started[-1]

    yield begin
    for process in started:
        process.kill()
        process.wait()


def wait_for(what, seconds=30):
    began = time.monotonic()
    while not what():
        assert time.monotonic() - began < seconds
        time.sleep(0.05)


def alive(folder):
    """Which of the stand-in and its child run (a zombie does not)."""
    states = {}
    for pid in (folder / "pids").read_text().split():
        status = Path(f"/proc/{pid}/stat")
        states[pid] = status.exists() and status.read_text().rpartition(")")[2].split()[0] != "Z"
    return [pid for pid, running in states.items() if running]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_reaches_the_server_and_is_waited_for(serve, tmp_path, number):
    process = serve("answers")
    wait_for(lambda: "ready: http://127.0.0.1:" in (tmp_path / "out").read_text())
    assert "answers as nano" in (tmp_path / "out").read_text()
    assert "qwenvl-ask http://127.0.0.1:" in (tmp_path / "out").read_text()
    assert len(alive(tmp_path)) == 2
    process.send_signal(number)
    assert process.wait(30) == 7  # the server's own status
    assert (tmp_path / "ended").read_text() == number.name
    assert alive(tmp_path) == []  # its child is gone with it


def test_a_signal_while_the_model_loads_ends_it_too(serve, tmp_path):
    process = serve("loads for ever")
    wait_for(lambda: "loading weights" in (tmp_path / "out").read_text())
    process.send_signal(signal.SIGINT)
    assert process.wait(30) == 7
    assert alive(tmp_path) == []


def test_the_second_signal_kills_a_server_that_does_not_listen(serve, tmp_path):
    process = serve("hangs")
    wait_for(lambda: "ready: " in (tmp_path / "out").read_text())
    process.send_signal(signal.SIGINT)
    time.sleep(1)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    assert process.wait(30) == 128 + signal.SIGKILL
    assert alive(tmp_path) == []


def test_a_server_that_dies_gives_its_status_and_its_last_words(serve, tmp_path):
    process = serve("dies", "--api-key", "top-secret")
    assert process.wait(30) == 1
    out = (tmp_path / "out").read_text()
    assert "stand-in: out of memory" in out
    assert "the server ended with status 1" in out
    assert "ready:" not in out and "top-secret" not in out
    assert alive(tmp_path) == []


def test_a_taken_port_is_told_before_anything_starts(serve, tmp_path):
    with endpoint(lambda *_: (200, MODELS)) as url:
        process = serve("answers", "--port", url.split(":")[2].removesuffix("/v1"))
        assert process.wait(30) == 1
    assert "is taken by a server that runs already" in (tmp_path / "out").read_text()
    assert not (tmp_path / "pids").exists()


def test_running_server_yields_the_address_and_stops_what_it_started(stand_in, tmp_path):
    with running_server(NANO, python=stand_in("answers"), timeout=30) as url:
        assert wait_until_ready(url, timeout=5).model == "nano"
        assert len(alive(tmp_path)) == 2
    assert alive(tmp_path) == []
    with (
        pytest.raises(NotReady, match=r"status 1.*\n.*loading weights\n.*out of memory"),
        running_server(NANO, python=stand_in("dies"), timeout=30),
    ):
        pass
    assert alive(tmp_path) == []
    with (
        pytest.raises(NotReady, match="no answer within 2 seconds"),
        running_server(NANO, python=stand_in("loads for ever"), timeout=2),
    ):
        pass
    assert alive(tmp_path) == []
    with (
        pytest.raises(FileNotFoundError, match="make serve"),
        running_server(NANO, python=tmp_path / "nowhere/python"),
    ):
        pass
