"""nginx in front of the real vLLM: what passes, what does not, and what Prometheus will find."""

import base64
import http.server
import importlib.util
import json
import re
import socket
import ssl
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path

import openai
import pytest

from qwen_vl_serve.launch import running_server
from qwen_vl_serve.proxy import ProxySettings, add_key, make_certificate, running_nginx
from qwen_vl_serve.ready import wait_until_ready

HERE = Path(__file__).parent
NANO = HERE.parents[1] / "models/qwen3-vl-nano"
TEMPLATE = HERE.parent / "deploy/nginx/default.conf.template"
OPEN = {
    ("post", "/v1/chat/completions"),
    ("post", "/v1/completions"),
    ("post", "/v1/responses"),
    ("get", "/v1/models"),
    ("get", "/health"),
}


@pytest.fixture(scope="module")
def served():
    """The server's own address, behind the proxy's back."""
    with running_server(NANO, "--api-key", "inner-key") as url:
        yield url.removesuffix("/v1")


@dataclass
class Front:
    """The proxy's address, alice's key and the certificate to trust."""

    url: str
    key: str
    certificate: str

    def ask(self, method: str, path: str, body: bytes | None = None, key: bool = True) -> tuple[int, bytes]:
        headers = {"Content-Type": "application/json"}
        headers |= {"Authorization": f"Bearer {self.key}"} if key else {}
        request = urllib.request.Request(self.url + path, body, headers, method=method.upper())
        context = ssl.create_default_context(cafile=self.certificate)
        try:
            with urllib.request.urlopen(request, timeout=120, context=context) as answer:
                return answer.status, answer.read()
        except urllib.error.HTTPError as error:
            return error.code, error.read()

    def chat(self, content: list[dict] | str, **more: object) -> tuple[int, dict]:
        body = {"model": "qwen3-vl-nano", "messages": [{"role": "user", "content": content}], "max_tokens": 8}
        status, answer = self.ask("POST", "/v1/chat/completions", json.dumps(body | more).encode())
        return status, json.loads(answer)


@pytest.fixture(scope="module")
def front(served, tmp_path_factory):
    folder = tmp_path_factory.mktemp("front")
    key = add_key(folder / "keys.conf", "alice")
    certificate, certificate_key = make_certificate(folder)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        listen = f"127.0.0.1:{probe.getsockname()[1]}"
    settings = ProxySettings(
        servers=f"server {served.removeprefix('http://')};",
        keys=str(folder / "keys.conf"),
        certificate=str(certificate),
        certificate_key=str(certificate_key),
        listen=listen,
        max_body="1m",
        rate="1000r/s",
        burst="1000",
        access_log=str(folder / "access.log"),
        server_authorization="Bearer inner-key",
    )
    with running_nginx(TEMPLATE, settings, folder):
        yield Front(f"https://{listen}", key, str(certificate))


def image(url: str) -> dict:
    return {"type": "image_url", "image_url": {"url": url}}


def test_none_of_the_servers_other_routes_can_be_reached(served, front):
    with urllib.request.urlopen(f"{served}/openapi.json", timeout=10) as answer:
        paths = json.load(answer)["paths"]
    # Mounted beside the routes, so not in the list.
    routes = {("get", "/metrics"), ("get", "/openapi.json"), ("get", "/docs")}
    routes |= {(method, path) for path, methods in paths.items() for method in methods}
    assert routes >= OPEN and len(routes - OPEN) > 15
    reached = {}
    for method, path in sorted(routes - OPEN):
        status, body = front.ask(method, re.sub(r"\{[^}]*\}", "x", path), b"{}" if method != "get" else None)
        if status not in (404, 405) or json.loads(body)["error"]["code"] not in (
            "not_found",
            "method_not_allowed",
        ):
            reached[method, path] = status
    assert not reached


def test_without_the_proxy_some_of_them_are_open(served):
    """Why the list is needed: with --api-key, and without sending it."""
    for path in ["/metrics", "/openapi.json", "/load", "/version"]:
        with urllib.request.urlopen(served + path, timeout=10) as answer:
            assert answer.status == 200
    body = json.dumps({"model": "qwen3-vl-nano", "prompt": "hello"}).encode()
    request = urllib.request.Request(served + "/tokenize", body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=10) as answer:
        assert json.load(answer)["tokens"]


def test_keys_and_sizes_are_checked_before_the_server_is_asked(front):
    for method, path in sorted(OPEN - {("get", "/health")}):
        status, body = front.ask(method, path, b"{}" if method == "post" else None, key=False)
        assert (status, json.loads(body)["error"]["code"]) == (401, "invalid_api_key")
    assert front.ask("GET", "/health", key=False)[0] == 200
    status, answer = front.chat([image("data:image/png;base64," + "A" * (1 << 20))])
    assert (status, answer["error"]["code"]) == (413, "request_too_large")


def test_the_servers_own_errors_come_through_with_their_reason(front):
    status, answer = front.chat("hello", model="another")
    assert status == 404 and "another" in answer["error"]["message"]
    status, answer = front.chat("hello", temperature=-1)
    assert status == 400 and "temperature" in answer["error"]["message"]


class Recorder(http.server.BaseHTTPRequestHandler):
    seen: list[str]

    def do_GET(self) -> None:
        self.seen.append(self.path)
        self.send_error(404)

    def log_message(self, format: str, *values: object) -> None:
        pass


def test_pictures_from_inside_are_not_fetched(front):
    handler = type("Handler", (Recorder,), {"seen": []})
    inside = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=inside.serve_forever, daemon=True).start()
    port = inside.server_address[1]
    try:
        for url in [
            f"http://127.0.0.1:{port}/a.png",
            f"https://127.0.0.1:{port}/a.png",
            f"http://localhost:{port}/a.png",
            f"http://2130706433:{port}/a.png",
            f"http://[::ffff:127.0.0.1]:{port}/a.png",
            "http://169.254.169.254/latest/meta-data/iam/security-credentials/",
            "https://169.254.169.254/latest/meta-data/",
            "http://10.0.0.1/a.png",
            "file:///etc/passwd",
            "ftp://127.0.0.1/a.png",
            "/etc/passwd",
        ]:
            status, answer = front.chat([image(url), {"type": "text", "text": "What do you see?"}])
            assert 400 <= status < 500, (url, status, answer)
            assert "root:" not in json.dumps(answer)
    finally:
        inside.shutdown()
        inside.server_close()
    assert not handler.seen


def test_the_official_client_gets_answers_whole_and_streamed(front, pictures):
    picture = "data:image/png;base64," + base64.b64encode(Path(pictures[0]).read_bytes()).decode()
    content = [image(picture), {"type": "text", "text": "What do you see?"}]
    messages = [{"role": "user", "content": content}]
    context = ssl.create_default_context(cafile=front.certificate)

    def connected(key: str) -> openai.OpenAI:
        http_client = openai.DefaultHttpxClient(verify=context)
        return openai.OpenAI(base_url=f"{front.url}/v1", api_key=key, http_client=http_client)

    with connected(front.key) as client:
        model = client.models.list().data[0].id
        asked = {"model": model, "messages": messages, "max_tokens": 24, "temperature": 0}
        whole = client.chat.completions.create(**asked)
        text = whole.choices[0].message.content
        chunks = list(client.chat.completions.create(**asked, stream=True))
        assert text and "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == text
        assert len(chunks) > 3
        completion = client.completions.create(model=model, prompt="hello", max_tokens=4)
        assert completion.usage.completion_tokens and completion.choices[0].finish_reason
        response = client.responses.create(model=model, input="hello", max_output_tokens=16, temperature=0)
        assert response.usage.output_tokens and response.error is None
    with connected("wrong") as client, pytest.raises(openai.AuthenticationError, match="missing or unknown"):
        client.models.list()


def test_readiness_can_be_asked_through_the_proxy(front):
    ready = wait_until_ready(f"{front.url}/v1", front.key, 60, certificate=front.certificate)
    assert ready.model == "qwen3-vl-nano"


def test_every_measurement_of_the_dashboard_and_the_alerts_exists(served, front):
    """After an answer with a picture and one error: names that are missing now would stay empty for ever."""
    specification = importlib.util.spec_from_file_location("deploy_tests", HERE / "test_serve_deploy.py")
    deploy = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(deploy)
    assert front.chat("hello")[0] == 200
    with urllib.request.urlopen(served + "/metrics", timeout=10) as answer:
        text = answer.read().decode()
    there = set(re.findall(r"^([\w:]+)(?:\{| )", text, re.M))
    wanted = {where: deploy.metrics(expr) - there for where, expr in deploy.expressions().items()}
    assert not {where: missing for where, missing in wanted.items() if missing}
    # So do the labels that the expressions choose and group by.
    assert re.search(r'^vllm:num_requests_running\{.*model_name="qwen3-vl-nano"', text, re.M)
    assert re.search(r'^vllm:request_success_total\{.*finished_reason="length"', text, re.M)
    assert re.search(r'^http_requests_total\{.*status="2xx"', text, re.M)


def test_twenty_clients_at_once_get_their_own_answers(served, tmp_path):
    """The soak's short form, against the server that runs; the long one kills its own."""
    command = [sys.executable, HERE / "soak.py", "--seconds", "8", "--clients", "20", "--patience", "100"]
    done = subprocess.run(
        [*command, "--server", f"{served}/v1", "--server-key", "inner-key"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "lost: 0; wrong or mixed up: 0" in done.stdout
