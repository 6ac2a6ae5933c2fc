"""What the back end and the proxy cost: a server asked bare, through OpenAIBackend, through nginx.

    .venv/bin/python benchmarks/bench_serve.py [--rounds 7] [--quick] [--stub-only] [--output FILE]

    server --the same questions each way--> answers --equal?--> rounds A B C C B A ... --> ratios
           --vllm bench serve, bare and through nginx, by turns--> its own figures

Two servers: a stub of fixed latency (100 ms to the first token, 20 more of 10 ms), before which the cost of
the way itself shows (goal: at most 5 %), and the real vLLM with models/qwen3-vl-nano. "Bare" is the official
asynchronous client. Results go to benchmarks/results/serve.json; with --quick only where --output says.
"""

import argparse
import asyncio
import base64
import io
import json
import os
import socket
import ssl
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openai
from PIL import Image, ImageDraw
from provenance import provenance

from qwen_vl_serve import Finished, Sampling, open_backend
from qwen_vl_serve.launch import running_server
from qwen_vl_serve.proxy import ProxySettings, add_key, make_certificate, running_nginx

ROOT = Path(__file__).resolve().parents[1]
MODEL = ROOT / "models/qwen3-vl-nano"
TEMPLATE = ROOT / "qwen-vl-serve/deploy/nginx/default.conf.template"
VLLM = ROOT / ".venv-vllm/bin/vllm"
FIRST, NEXT, TOKENS = 0.1, 0.01, 21  # the stub's seconds and tokens
GOAL = 1.05


@dataclass(frozen=True)
class Run:
    """One round of one way: every answer, and seconds."""

    answers: list[str]
    first: list[float]
    seconds: float


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


# ---- the stub, a process of its own


async def _serve_stub(port: int) -> None:
    async def connection(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").lower()
                length = next(
                    (line for line in head.split("\r\n") if line.startswith("content-length:")), ":0"
                )
                await reader.readexactly(int(length.partition(":")[2]))
                await (_models(writer) if head.startswith("get") else _stream(writer))
        except (asyncio.IncompleteReadError, ConnectionError):
            writer.close()

    server = await asyncio.start_server(connection, "127.0.0.1", port)
    await server.serve_forever()


async def _models(writer: asyncio.StreamWriter) -> None:
    body = b'{"object":"list","data":[{"id":"stub","object":"model","created":0,"owned_by":"stub"}]}'
    writer.write(
        b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(body)
    )
    writer.write(body)
    await writer.drain()


async def _stream(writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n")
    start = time.monotonic()
    for index in range(TOKENS + 1):
        await asyncio.sleep(start + FIRST + NEXT * index - time.monotonic())
        last = index == TOKENS
        choice = {
            "index": 0,
            "delta": {} if last else {"content": "x"},
            "finish_reason": "stop" if last else None,
        }
        chunk = {
            "id": "1",
            "object": "chat.completion.chunk",
            "created": 0,
            "model": "stub",
            "choices": [choice],
        }
        line = b"data: " + json.dumps(chunk).encode() + b"\n\n" + (b"data: [DONE]\n\n" if last else b"")
        writer.write(b"%x\r\n%s\r\n" % (len(line), line))
        await writer.drain()
    writer.write(b"0\r\n\r\n")
    await writer.drain()


@contextmanager
def running_stub() -> Iterator[str]:
    port = free_port()
    process = subprocess.Popen([sys.executable, __file__, "--stub", str(port)])
    try:
        while True:
            try:
                socket.create_connection(("127.0.0.1", port), timeout=1).close()
                break
            except OSError:
                time.sleep(0.05)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.terminate()
        process.wait()


# ---- the ways to ask


async def _bare(client: openai.AsyncOpenAI, model: str, questions: list[Any], at_once: int) -> Run:
    slots, first = asyncio.Semaphore(at_once), [0.0] * len(questions)

    async def ask(place: int) -> str:
        async with slots:
            start, pieces = time.perf_counter(), []
            stream = await client.chat.completions.create(
                model=model, messages=questions[place], max_tokens=32, temperature=0, stream=True
            )
            async for chunk in stream:
                for choice in chunk.choices:
                    if choice.delta.content:
                        first[place] = first[place] or time.perf_counter() - start
                        pieces.append(choice.delta.content)
            return "".join(pieces)

    start = time.perf_counter()
    answers = await asyncio.gather(*(ask(place) for place in range(len(questions))))
    return Run(list(answers), first, time.perf_counter() - start)


def _through_backend(backend: Any, questions: list[Any], at_once: int) -> Run:
    def ask(messages: Any) -> tuple[str, float]:
        start, first = time.perf_counter(), 0.0
        for event in backend.stream(messages, Sampling(max_new_tokens=32, temperature=0)):
            first = first or time.perf_counter() - start
            if isinstance(event, Finished):
                return event.reply.text, first
        raise RuntimeError("the stream ended without its last event")

    start = time.perf_counter()
    with ThreadPoolExecutor(at_once) as pool:
        results = list(pool.map(ask, questions))
    return Run([text for text, _ in results], [first for _, first in results], time.perf_counter() - start)


@contextmanager
def ways(url: str, folder: Path, at_once: int) -> Iterator[tuple[dict[str, Callable[[list], Run]], str, str]]:
    """name -> how to ask, and nginx's address and key. Connections stay open from round to round."""
    certificate, key_file = make_certificate(folder)
    key = add_key(folder / "keys.conf", "bench")
    settings = ProxySettings(
        servers=f"server {url.removeprefix('http://').removesuffix('/v1')};", keys=str(folder / "keys.conf"),
        certificate=str(certificate), certificate_key=str(key_file), listen=f"127.0.0.1:{free_port()}",
        rate="10000r/s", burst="10000", connections="1000", access_log=str(folder / "access.log"),
    )  # fmt: skip
    with running_nginx(TEMPLATE, settings, folder), asyncio.Runner() as runner:
        front = f"https://{settings.listen}/v1"
        trust = openai.DefaultAsyncHttpxClient(verify=ssl.create_default_context(cafile=certificate))
        direct = openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0)
        proxied = openai.AsyncOpenAI(base_url=front, api_key=key, max_retries=0, http_client=trust)
        backend = open_backend(url, concurrency=at_once)

        def run(coroutine: Awaitable[Run]) -> Run:
            return runner.run(coroutine)  # pyright: ignore[reportArgumentType]

        name = backend.name  # pyright: ignore[reportAttributeAccessIssue]
        yield (
            {
                "bare": lambda questions: run(_bare(direct, name, questions, at_once)),
                "back end": lambda questions: _through_backend(backend, questions, at_once),
                "nginx": lambda questions: run(_bare(proxied, name, questions, at_once)),
            },
            front,
            key,
        )
        backend.close()
        runner.run(direct.close())
        runner.run(proxied.close())


# ---- measuring


def questions(count: int) -> list[list[dict[str, Any]]]:
    """Text and pictures of two sizes, by turns, no two alike."""
    result = []
    for index in range(count):
        content: list[dict[str, Any]] = [{"type": "text", "text": f"What do you see, {index}?"}]
        if index % 3:
            image = Image.new("RGB", (128, 128) if index % 3 == 1 else (320, 224), "white")
            ImageDraw.Draw(image).ellipse((10, 10, 60 + index % 40, 100), fill=(40, 5 * index % 256, 200))
            buffer = io.BytesIO()
            image.save(buffer, "PNG")
            url = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
            content.insert(0, {"type": "image_url", "image_url": {"url": url}})
        result.append([{"role": "user", "content": content}])
    return result


def measure(asks: dict[str, Callable[[list], Run]], asked: list, rounds: int) -> dict[str, Any]:
    """Rounds of all ways by turns, after their answers were found equal."""
    answers = {name: ask(asked).answers for name, ask in asks.items()}  # and warm
    for name, got in answers.items():
        if got != answers["bare"]:
            sys.exit(f"{name} gives other answers than bare: nothing is timed")
    seconds: dict[str, list[float]] = {name: [] for name in asks}
    first: dict[str, list[float]] = {name: [] for name in asks}
    for index in range(rounds):
        for name in list(asks) if index % 2 == 0 else list(asks)[::-1]:
            run = asks[name](asked)
            seconds[name].append(run.seconds)
            first[name].append(statistics.median(run.first))
    report: dict[str, Any] = {"requests": len(asked), "equal_answers": len(asked) * len(asks)}
    for name in asks:
        ratios = [one / bare for one, bare in zip(seconds[name], seconds["bare"], strict=True)]
        report[name] = {
            "seconds": seconds[name],
            "requests_per_second": len(asked) / statistics.median(seconds[name]),
            "first_token_seconds": first[name],
            "times_bare": statistics.median(ratios), "lowest": min(ratios), "highest": max(ratios),
        }  # fmt: skip
    return report


def vllm_bench(targets: dict[str, tuple[str, str]], folder: Path, rounds: int) -> dict[str, Any]:
    """`vllm bench serve` with random text and one picture a request, by turns; its own figures."""
    found: dict[str, list[dict[str, float]]] = {name: [] for name in targets}
    for index in range(rounds):
        for name, (url, key) in targets.items() if index % 2 == 0 else reversed(targets.items()):
            command = [
                str(VLLM),
                "bench",
                "serve",
                "--backend",
                "openai-chat",
                "--insecure",
                "--disable-tqdm",
            ]
            command += ["--base-url", url.removesuffix("/v1"), "--endpoint", "/v1/chat/completions"]
            command += [
                "--model",
                str(MODEL),
                "--served-model-name",
                MODEL.name,
                "--dataset-name",
                "random-mm",
            ]
            command += ["--num-prompts", "64", "--max-concurrency", "16", "--seed", str(index)]
            command += ["--random-input-len", "32", "--random-output-len", "32", "--ignore-eos"]
            command += ["--random-mm-base-items-per-request", "1"]
            command += ["--random-mm-limit-mm-per-prompt", '{"image": 1, "video": 0}']
            command += ["--random-mm-bucket-config", "{(128, 128, 1): 1.0}", "--temperature", "0"]
            command += ["--save-result", "--result-dir", str(folder), "--result-filename", "bench.json"]
            environment = {**os.environ, "OPENAI_API_KEY": key, "HF_HUB_OFFLINE": "1"}
            done = subprocess.run(command, capture_output=True, text=True, env=environment)
            if done.returncode != 0:
                sys.exit(f"vllm bench serve, {name}: {(done.stdout + done.stderr)[-3000:]}")
            result = json.loads((folder / "bench.json").read_text())
            if result["completed"] != 64:
                sys.exit(f"vllm bench serve, {name}: {result['completed']} of 64 requests were answered")
            kept = ("request_throughput", "output_throughput", "median_ttft_ms", "median_tpot_ms")
            found[name].append({key: result[key] for key in kept})
    return found


def tell(name: str, report: dict[str, Any], goal: str = "") -> None:
    print(f"\n{name}: {report['requests']} requests a round, all answers equal")
    for way in ("bare", "back end", "nginx"):
        one = report[way]
        first = statistics.median(one["first_token_seconds"]) * 1000
        print(
            f"  {way:10} {one['requests_per_second']:7.1f}/s   first token {first:7.1f} ms   "
            f"{one['times_bare']:.3f}x bare ({one['lowest']:.3f} to {one['highest']:.3f}){goal}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--quick", action="store_true", help="2 rounds of few requests: does it run?")
    parser.add_argument("--stub-only", action="store_true", help="without vLLM")
    parser.add_argument("--output", type=Path, help="default: benchmarks/results/serve.json")
    parser.add_argument("--stub", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.stub:
        asyncio.run(_serve_stub(options.stub))
    rounds, many, at_once = (2, 24, 8) if options.quick else (options.rounds, 192, 16)
    nginx = subprocess.run(["/usr/sbin/nginx", "-v"], capture_output=True, text=True).stderr.strip()
    origin = provenance("openai", vllm="0.32.0", nginx=nginx.rpartition("/")[2])
    result: dict[str, Any] = origin | {"rounds": rounds, "at_once": at_once, "goal_times_bare": GOAL}
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        folder = Path(name)
        url = stack.enter_context(running_stub())
        (folder / "stub").mkdir()
        with ways(url, folder / "stub", at_once) as (asks, _, _):
            result["stub"] = measure(asks, questions(many), rounds)
        tell("stub of fixed latency", result["stub"], f"   goal {GOAL}x")
        if not options.stub_only:
            url = stack.enter_context(running_server(MODEL))
            (folder / "vllm").mkdir()
            with ways(url, folder / "vllm", at_once) as (asks, front, key):
                result["vllm"] = measure(asks, questions(many), rounds)
                tell("vLLM", result["vllm"])
                targets = {"bare": (url, "none"), "nginx": (front, key)}
                result["vllm bench serve"] = vllm_bench(targets, folder, 1 if options.quick else 3)
            for way, runs in result["vllm bench serve"].items():
                medians = {key: statistics.median(run[key] for run in runs) for key in runs[0]}
                print(f"vllm bench serve, {way}: " + ", ".join(f"{k} {v:.1f}" for k, v in medians.items()))
    output = options.output or (
        None if options.quick or options.stub_only else ROOT / "benchmarks/results/serve.json"
    )
    if output:
        output.write_text(json.dumps(result, indent=2) + "\n")
        print(f"written: {output}")


if __name__ == "__main__":
    main()
