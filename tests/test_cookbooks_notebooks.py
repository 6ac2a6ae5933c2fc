"""The notebooks: each runs and holds what it asserts, in the fast lane; one that asserts in vain fails."""

import http.server
import json
import re
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from gallery import COOKBOOKS, canonical, execute, index, main, notebooks, page
from qwen_vl_serve.launch import running_server

NOTEBOOKS = {path.stem: path for path in notebooks([])}
NAMES = (
    "omni_recognition document_parsing 2d_grounding ocr german_document_ocr video_understanding mobile_agent "
    "computer_use 3d_grounding think_with_images mmcode long_document_understanding spatial_understanding "
    "fine_tuning"
).split()
NANO = str(COOKBOOKS.parent / "models/qwen3-vl-nano")
CLEAN = {"MODEL": "", "COOKBOOKS": ""}


def test_all_fourteen_are_there():
    assert sorted(NOTEBOOKS) == sorted(NAMES)


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_notebook_runs_and_holds_what_it_asserts(name):
    executed = execute(NOTEBOOKS[name], environment=CLEAN, timeout=240)
    assert not executed.error
    shown = page(executed)
    assert executed.title in shown
    assert not re.search(r"""(?:src|href|url\()=?["']?(?:https?:)?//""", re.sub(r"<a [^>]*>", "", shown))


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_notebook_says_what_a_reader_needs(name):
    cells = json.loads(NOTEBOOKS[name].read_text())["cells"]
    text = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")
    headings = ["**What it shows.**", "**When to use it.**"]
    headings += [f"## {one}" for one in ("Set-up", "Check", "On your own data", "What to expect", "Pitfalls")]
    for heading in headings:
        assert heading in text, heading
    assert re.search(r"mechanism|skill", text)
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    assert any("assert " in source for source in code)
    assert not any(re.search(r"https?://|\bexec\(|\beval\(|sys\.path", source) for source in code)


def test_a_false_assertion_fails_and_the_others_run_all_the_same(tmp_path, monkeypatch, capsys):
    cells = {"bad": ["# Bad", "right = False\nassert right"], "good": ["# Good", "print(6 * 7)"]}
    monkeypatch.setattr("gallery.COOKBOOKS", tmp_path)
    for name, (title, code) in cells.items():
        markdown = {"cell_type": "markdown", "id": "a", "source": title}
        whole = {"cells": [markdown, {"cell_type": "code", "id": "b", "source": code}]}
        (tmp_path / f"{name}.ipynb").write_text(canonical(whole))
    assert main(["--output", str(tmp_path / "out")]) == 1
    said = capsys.readouterr().out
    assert "bad: AssertionError" in said and "[assert right]" in said and "good: passed" in said
    front = (tmp_path / "out" / "index.html").read_text()
    assert "1 of 2 notebooks passed" in front and 'href="bad.html"' in front
    assert "AssertionError" in (tmp_path / "out" / "bad.html").read_text()
    assert "42" in (tmp_path / "out" / "good.html").read_text()
    assert main(["good", "--output", str(tmp_path / "out")]) == 0
    with pytest.raises(ValueError, match="ugly is no notebook"):
        main(["ugly"])


def test_the_canonical_form_drops_outputs_and_is_a_fixed_point():
    cell = {"cell_type": "code", "id": "a", "source": ["1 + 1\n", "\n"], "execution_count": 3}
    cell |= {
        "metadata": {"tags": ["x"]},
        "outputs": [{"output_type": "stream", "name": "stdout", "text": "2"}],
    }
    text = canonical({"cells": [cell], "metadata": {"vscode": 1}})
    (kept,) = json.loads(text)["cells"]
    assert kept == {**cell, "metadata": {}, "outputs": [], "execution_count": None, "source": ["1 + 1"]}
    assert canonical(json.loads(text)) == text


class Endpoint(http.server.BaseHTTPRequestHandler):
    """An OpenAI-compatible endpoint that always says the same and keeps its requests."""

    asked: list[dict] = []  # noqa: RUF012

    def do_GET(self) -> None:
        self._send(
            {"object": "list", "data": [{"id": "m", "object": "model", "created": 0, "owned_by": "us"}]}
        )

    def do_POST(self) -> None:
        self.asked.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        message = {"role": "assistant", "content": '[{"bbox_2d": [100, 100, 500, 500], "label": "star"}]'}
        choice = {"index": 0, "finish_reason": "stop", "message": message}
        usage = {"prompt_tokens": 9, "completion_tokens": 9, "total_tokens": 18}
        self._send(
            {
                "id": "1",
                "object": "chat.completion",
                "created": 0,
                "model": "m",
                "choices": [choice],
                "usage": usage,
            }
        )

    def _send(self, body: dict) -> None:
        data = json.dumps(body).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        pass


@pytest.mark.parametrize("name", ["2d_grounding", "computer_use"])
def test_a_notebook_asks_an_endpoint_by_the_same_variable(name):
    Endpoint.asked.clear()
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Endpoint) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        model = f"http://127.0.0.1:{server.server_address[1]}/v1"
        executed = execute(NOTEBOOKS[name], environment={**CLEAN, "MODEL": f"{model}#hosted"})
        server.shutdown()
    assert not executed.error
    assert Endpoint.asked and {request["model"] for request in Endpoint.asked} == {"hosted"}
    # The agent has its tools; the held-out questions of the skill, and boxes, have none.
    plain = sum("tools" not in request for request in Endpoint.asked)
    assert plain == (20 if name == "computer_use" else len(Endpoint.asked)) and len(Endpoint.asked) > 20
    kinds = [part["type"] for request in Endpoint.asked for part in request["messages"][-1]["content"]]
    assert kinds.count("image_url") == len(Endpoint.asked)


@pytest.fixture(scope="module")
def served() -> Iterator[str]:
    with running_server(NANO, "--tools") as url:
        yield url


@pytest.mark.parametrize("name", ["2d_grounding", "computer_use"])
def test_a_notebook_asks_what_make_serve_serves(name, served):
    executed = execute(NOTEBOOKS[name], environment={**CLEAN, "MODEL": served}, timeout=240)
    assert not executed.error


def test_the_front_page_of_a_gallery_escapes_what_it_shows():
    executed = execute(NOTEBOOKS["omni_recognition"], environment={"MODEL": str(COOKBOOKS / "<b>nowhere")})
    assert "FileNotFoundError" in executed.error
    front = index([executed], "<b>model")
    assert "<b>" not in front and "0 of 1 notebooks passed" in front and Path(COOKBOOKS).is_dir()
