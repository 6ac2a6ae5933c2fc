"""The client of OpenAI-compatible endpoints against a small HTTP server (the real: test_serve_parity)."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from qwen_vl_serve import (
    BackendError,
    Finished,
    ReasoningDelta,
    Reply,
    Sampling,
    TextDelta,
    ToolCall,
    open_backend,
)
from qwen_vl_serve.ask import main

ASK = [{"role": "user", "content": "Hello?"}]
USAGE = {"prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10}
CALL = {"id": "1", "type": "function", "index": 0, "function": {"name": "click", "arguments": '{"at": 1}'}}


class Endpoint(ThreadingHTTPServer):
    """Answers as vLLM does; `script` holds what to do first: a status to send, or "drop" the connection."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.script, self.requests, self.models, self.at_once, self.most_at_once = [], [], ["tiny"], 0, 0
        self.gone = threading.Event()
        self.guard = threading.Lock()
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}/v1"


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def do_GET(self):
        data = [{"id": name, "object": "model", "created": 0, "owned_by": "x"} for name in self.server.models]
        self.json({"object": "list", "data": data})

    def do_POST(self):
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.guard:
            self.server.requests.append(request)
            step = self.server.script.pop(0) if self.server.script else None
            self.server.at_once += 1
            self.server.most_at_once = max(self.server.most_at_once, self.server.at_once)
        try:
            self.answer(request, step)
        finally:
            with self.server.guard:
                self.server.at_once -= 1

    def answer(self, request, step):
        if step == "drop":
            self.connection.close()
        elif step is not None:
            self.json({"error": {"message": f"scripted {step}"}}, step)
        elif request.get("stream"):
            self.stream(request)
        else:
            text = request["messages"][-1]["content"]
            message = {"role": "assistant", "content": f"echo {text}", "reasoning": "hm"}
            if "tools" in request:
                message |= {"content": None, "tool_calls": [CALL]}
            choice = {"index": 0, "message": message, "finish_reason": "stop", "token_ids": [5, 6, 9]}
            ids = {"prompt_token_ids": [1] * 7}
            self.json({"id": "1", "object": "chat.completion", "created": 0, "model": "tiny",
                       "choices": [choice], "usage": USAGE, **ids})  # fmt: skip

    def stream(self, request):
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        endless = request.get("max_tokens") == 999
        deltas = [{"reasoning": "h"}, {"reasoning": "m"}, {"content": "Hel"}, {"content": "lo"}]
        deltas += [{"tool_calls": [{**CALL, "function": {"name": "click", "arguments": part}}]}
                   if not i else {"tool_calls": [{"index": 0, "function": {"arguments": part}}]}
                   for i, part in enumerate(['{"at"', ": 1}"]) if "tools" in request]  # fmt: skip
        try:
            for delta in deltas:
                self.chunk({"choices": [{"index": 0, "delta": delta, "token_ids": [4]}]})
            while endless:
                self.chunk({"choices": [{"index": 0, "delta": {"content": "."}}]})
            self.chunk({"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]})
            self.chunk({"choices": [], "usage": USAGE})
            self.wfile.write(b"data: [DONE]\n\n")
        except (BrokenPipeError, ConnectionResetError):
            self.server.gone.set()

    def chunk(self, content):
        whole = {"id": "1", "object": "chat.completion.chunk", "created": 0, "model": "tiny", **content}
        self.wfile.write(f"data: {json.dumps(whole)}\n\n".encode())
        self.wfile.flush()

    def json(self, content, status=200):
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


@pytest.fixture
def endpoint():
    server = Endpoint()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def backend(endpoint):
    backend = open_backend(endpoint.url, retries=4, token_ids=True)
    yield backend
    backend.close()


def test_the_only_model_is_found_and_several_must_be_chosen_from(endpoint):
    backend = open_backend(endpoint.url)
    assert backend.name == "tiny"
    backend.close()
    endpoint.models = ["a", "b"]
    with pytest.raises(ValueError, match=r"serves \['a', 'b'\]; say which with name="):
        open_backend(endpoint.url)
    open_backend(endpoint.url, name="b").close()


def test_replies_come_in_order_with_everything_that_is_told(backend):
    batch = [[{"role": "user", "content": str(number)}] for number in range(40)]
    replies = backend.generate(batch, Sampling())
    assert replies[3] == Reply("echo 3", "stop", 7, 3, "hm", (), (5, 6, 9), (1,) * 7)
    assert [reply.text for reply in replies] == [f"echo {number}" for number in range(40)]


def test_what_is_asked_for_reaches_the_endpoint_and_nothing_else(backend, endpoint):
    backend.generate([ASK], Sampling())
    assert set(endpoint.requests[-1]) == {"model", "messages", "return_token_ids"}
    schema = {"type": "object"}
    sampling = Sampling(max_new_tokens=5, temperature=0, top_p=0.5, top_k=3, seed=7, json_schema=schema)
    backend.generate([ASK], sampling)
    request = endpoint.requests[-1]
    told = {"max_tokens": 5, "temperature": 0, "top_p": 0.5, "top_k": 3, "seed": 7}
    assert {name: request[name] for name in told} == told
    assert request["response_format"]["json_schema"]["schema"] == schema


def test_a_stream_brings_thoughts_text_calls_and_usage(backend):
    tool = {"type": "function", "function": {"name": "click", "parameters": {}}}
    *pieces, last = backend.stream(ASK, Sampling(), tools=[tool])
    assert pieces == [ReasoningDelta("h"), ReasoningDelta("m"), TextDelta("Hel"), TextDelta("lo")]
    assert isinstance(last, Finished)
    assert (last.reply.reasoning, last.reply.text, last.reply.completion_tokens) == ("hm", "Hello", 3)
    assert last.reply.tool_calls == (ToolCall("click", '{"at": 1}'),)
    [reply] = backend.generate([ASK], Sampling(), tools=[tool])
    assert reply.tool_calls == (ToolCall("click", '{"at": 1}'),) and reply.text == ""


def test_failures_that_pass_are_retried_and_others_are_not(backend, endpoint):
    endpoint.script = [503, "drop", 429]
    assert backend.generate([ASK], Sampling())[0].text == "echo Hello?"
    assert len(endpoint.requests) == 4
    endpoint.script = ["drop", 500]
    assert list(backend.stream(ASK, Sampling()))[-1].reply.text == "Hello"
    endpoint.script = [400]
    with pytest.raises(BackendError, match=r"127\.0\.0\.1.*scripted 400"):
        list(backend.stream(ASK, Sampling()))
    endpoint.script = [400]
    with pytest.raises(BackendError, match=r"127\.0\.0\.1.*scripted 400"):
        backend.generate([ASK], Sampling())


def test_no_more_requests_at_once_than_asked_for(endpoint):
    backend = open_backend(endpoint.url, concurrency=3)
    backend.generate([ASK] * 30, Sampling())
    assert endpoint.most_at_once <= 3
    backend.close()


def test_closing_a_stream_closes_its_connection(backend, endpoint):
    stream = backend.stream(ASK, Sampling(max_new_tokens=999))
    next(stream)
    stream.close()
    assert endpoint.gone.wait(timeout=10)


def test_the_command_asks_an_endpoint_and_says_in_one_line_what_went_wrong(endpoint, capsys):
    assert main([endpoint.url, "Hello?"]) == 0
    assert capsys.readouterr().out == "Hello\n"
    endpoint.script = [400]
    assert main([endpoint.url, "--name", "tiny", "Hello?"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("qwenvl-ask: http://127.0.0.1") and "scripted 400" in error
    assert main([endpoint.url, "--device", "cpu", "Hello?"]) == 1
    assert "device" in capsys.readouterr().err
