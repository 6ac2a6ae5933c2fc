"""What the web demo costs before the first token, and whether it keeps many visitors apart.

    .venv/bin/python benchmarks/bench_demo.py [--rounds 7] [--quick] [--output FILE]

    vLLM --OpenAIBackend-----------------> answers, seconds to the first token
         --web_demo_mm.py, the requests of its page, the picture uploaded before-> the same
                         --gradio_client, which uploads with the question--------> the same
      --32 clients at once: does each get the answer to its own question?--> rounds A B B A ... --> difference

The real vLLM with models/qwen3-vl-nano, on the CPU without a GPU. Goal: at most 50 ms more in the
page, median. Results go to benchmarks/results/demo.json; with --quick only where --output says.
"""

import argparse
import json
import secrets
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import httpx
from gradio_client import Client, handle_file
from provenance import provenance

from qwen_vl_serve import Backend, Finished, Sampling, TextDelta, open_backend
from qwen_vl_serve.launch import running_server
from qwen_vl_utils import MediaPolicy

ROOT = Path(__file__).resolve().parents[1]
MODEL = ROOT / "models/qwen3-vl-nano"
SCENES = sorted((ROOT / "qwen-vl-finetune/demo/images").glob("scene-*.png"))
QUESTIONS = ("Describe the picture.", "How many objects are here?")
MOST_TOKENS = 32
SETTINGS = ["", 0, 1, 50, MOST_TOKENS, 0, 0, 0]  # greedy, as web_demo_mm.Settings has them
CLIENTS = 32
GOAL = 0.05  # seconds

Ask = Callable[[str, Path], tuple[str, float]]
"""Question and picture to the answer and the seconds to its first token."""


def bare(backend: Backend) -> Ask:
    """The back end that the demo uses, asked directly."""

    def ask(question: str, picture: Path) -> tuple[str, float]:
        content = [{"type": "image", "image": str(picture)}, {"type": "text", "text": question}]
        began, first = time.perf_counter(), 0.0
        sampling = Sampling(temperature=0, max_new_tokens=MOST_TOKENS)
        for event in backend.stream([{"role": "user", "content": content}], sampling):
            if isinstance(event, TextDelta):
                first = first or time.perf_counter() - began
            elif isinstance(event, Finished):
                return event.reply.text, first
        raise RuntimeError("the stream ended without an answer")

    return ask


def page(address: str) -> Ask:
    """What the page in a browser sends; its picture went up when it was dropped there, before that."""
    client = httpx.Client(base_url=address, timeout=60)
    [chat] = [
        each["id"] for each in client.get("/config").json()["dependencies"] if each["api_name"] == "chat"
    ]
    uploads: dict[Path, str] = {}

    def ask(question: str, picture: Path) -> tuple[str, float]:
        if picture not in uploads:
            file = {"files": (picture.name, picture.read_bytes())}
            [uploads[picture]] = client.post("/gradio_api/upload", files=file).json()
        session = secrets.token_hex(8)
        files = [{"path": uploads[picture], "meta": {"_type": "gradio.FileData"}}]
        data = [{"text": question, "files": files}, None, *SETTINGS]
        began, first = time.perf_counter(), 0.0
        client.post("/gradio_api/queue/join", json={"data": data, "fn_index": chat, "session_hash": session})
        with client.stream("GET", "/gradio_api/queue/data", params={"session_hash": session}) as lines:
            for line in lines.iter_lines():
                news = json.loads(line.removeprefix("data:")) if line.startswith("data:") else {}
                if news.get("msg") == "process_generating":
                    first = first or time.perf_counter() - began
                if news.get("msg") == "process_completed":
                    return last_text(news["output"]["data"][0]), first
        raise RuntimeError("the stream ended without an answer")

    return ask


def last_text(said: Any) -> str:
    """What was last said in a chat's answer."""
    return said if isinstance(said, str) else last_text(said[-1]["content"])


def through(address: str) -> Ask:
    """A visitor by gradio_client, whose chat is empty at each question."""
    client = Client(address, verbose=False)

    def ask(question: str, picture: Path) -> tuple[str, float]:
        client.reset_session()
        began, first, answer = time.perf_counter(), 0.0, ""
        message = {"text": question, "files": [handle_file(str(picture))]}
        for said, _ in client.submit(message, *SETTINGS, api_name="/chat"):
            first = first or time.perf_counter() - began
            answer = last_text(said)
        return answer, first

    return ask


@contextmanager
def running_demo(url: str) -> Iterator[str]:
    """`python web_demo_mm.py` before the server at `url`; its address."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    flags = ["--backend", "openai", "--base-url", url, "-c", str(MODEL), "--server-port", str(port)]
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(
            [sys.executable, "web_demo_mm.py", *flags], cwd=ROOT, stdout=log, stderr=log
        )
        try:
            for _ in range(240):
                try:
                    urllib.request.urlopen(f"http://127.0.0.1:{port}", timeout=5)
                    break
                except OSError:
                    time.sleep(0.5)
                if process.poll() is not None:
                    log.seek(0)
                    sys.exit(f"the demo did not start:\n{log.read()}")
            yield f"http://127.0.0.1:{port}"
        finally:
            process.terminate()
            process.wait(30)


def check(asks: dict[str, Ask], address: str) -> int:
    """Ask by 32 clients at once; stops where one gets another answer than from the back end."""
    tasks = [(QUESTIONS[number % 2], SCENES[number // 2 % len(SCENES)]) for number in range(CLIENTS)]
    expected = [asks["back end"](*task)[0] for task in tasks]
    found = [asks["page"](*task)[0] for task in tasks]
    if len(set(expected)) < len(SCENES):
        sys.exit(f"only {len(set(expected))} different answers: mixed up ones would not be seen")
    clients = [through(address) for _ in tasks]
    with ThreadPoolExecutor(CLIENTS) as threads:
        found += threads.map(lambda client, task: client(*task)[0], clients, tasks)
    for task, one, other in zip(tasks * 2, found, expected * 2, strict=True):
        if one.strip() != other.strip():
            sys.exit(f"{task}: the demo said {one!r}, the back end {other!r}; nothing is timed")
    return len(clients)


def measure(asks: dict[str, Ask], rounds: int, questions: int) -> dict[str, list[float]]:
    """Seconds to the first token of each way, one question at a time, the order turned each round."""
    seconds: dict[str, list[float]] = {name: [] for name in asks}
    for number in range(rounds):
        for name in list(asks) if number % 2 else list(asks)[::-1]:
            for place in range(questions):
                picture = SCENES[place % len(SCENES)]
                seconds[name].append(asks[name](QUESTIONS[place % 2], picture)[1])
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--quick", action="store_true", help="2 rounds of few questions: does it run?")
    parser.add_argument("--output", type=Path, help="default: benchmarks/results/demo.json")
    options = parser.parse_args()
    rounds, questions = (2, 4) if options.quick else (options.rounds, 16)
    result = provenance("gradio", vllm="0.32.0") | {
        "rounds": rounds,
        "questions": questions,
        "goal_seconds_more": GOAL,
    }
    policy = MediaPolicy.strict(folders=[SCENES[0].parent])
    with (
        running_server(MODEL) as url,
        running_demo(url) as address,
        closing(open_backend(url, engine="openai", policy=policy)) as backend,
    ):
        asks = {"back end": bare(backend), "page": page(address), "gradio_client": through(address)}
        result["clients_at_once"] = check(asks, address)
        print(f"{CLIENTS} clients at once, each with its own answer")
        seconds = measure(asks, rounds, questions)
    result["first_token_seconds"] = {
        name: {"median": statistics.median(each), "lowest": min(each), "highest": max(each)}
        for name, each in seconds.items()
    }
    result["seconds_more"] = {}
    for name, each in seconds.items():
        more = sorted(one - bare for one, bare in zip(each, seconds["back end"], strict=True))
        found = {"median": statistics.median(more), "lowest": more[0], "highest": more[-1]}
        line = f"  {name:13} first token after {1000 * statistics.median(each):.0f} ms (median)"
        if name != "back end":
            result["seconds_more"][name] = found
            line += ", {median:.0f} ms more ({lowest:.0f} to {highest:.0f})".format(
                **{key: 1000 * value for key, value in found.items()}
            )
        print(line)
    print(f"  goal of the page: at most {1000 * GOAL:.0f} ms more")
    output = options.output or (None if options.quick else ROOT / "benchmarks/results/demo.json")
    if output:
        output.write_text(json.dumps(result, indent=2) + "\n")
        print(f"written: {output}")


if __name__ == "__main__":
    main()
