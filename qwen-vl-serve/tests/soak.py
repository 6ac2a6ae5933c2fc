"""Many clients at once through nginx to a real vLLM, which is killed halfway: no answer lost, none mixed up.

    .venv/bin/python qwen-vl-serve/tests/soak.py --seconds 120 --clients 200
    .venv/bin/python qwen-vl-serve/tests/soak.py --seconds 10 --clients 20 --server http://127.0.0.1:8000/v1

questions -> asked one by one (greedy): what is expected -> all clients at random, streamed or not
          -> halfway SIGKILL to the server and a new one; clients try again until they have their answer

Every answer must have its own prompt's token ids, the expected tokens and text, and the id that nginx gave to
its request. With --server that server is used and not killed. Loopback only. Exits with 1 when an answer was
wrong or never came.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import collections
import io
import json
import random
import socket
import ssl
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import httpx2
from PIL import Image, ImageDraw

from qwen_vl_serve import launch
from qwen_vl_serve.proxy import ProxySettings, add_key, make_certificate, running_nginx
from qwen_vl_serve.ready import wait_until_ready

ROOT = Path(__file__).resolve().parents[2]
TEMPLATE = ROOT / "qwen-vl-serve/deploy/nginx/default.conf.template"
MODEL = ROOT / "models/qwen3-vl-nano"
KEYS = 8  # API keys that the clients share
COLOURS = ["red", "green", "blue", "yellow", "purple", "orange"]
WORDS = ["What do you see?", "How many shapes are there?", "Name the colour of the circle.", "Describe it."]


@dataclass(frozen=True)
class Question:
    """A request body without "stream", and what kind it is."""

    kind: str
    body: dict


@dataclass(frozen=True)
class Answer:
    """What must be the same whenever the question is asked."""

    prompt_ids: tuple[int, ...]
    ids: tuple[int, ...]
    text: str
    finish: str


class Unfinished(Exception):
    """An answer that did not come, and may be asked for again; the message is its kind in the table."""


@dataclass
class Tally:
    """What happened."""

    seconds: dict[str, list[float]] = field(default_factory=lambda: collections.defaultdict(list))
    errors: collections.Counter[str] = field(default_factory=collections.Counter)
    wrong: list[str] = field(default_factory=list)
    begun: int = 0
    answered: int = 0
    after_restart: int = 0


def picture(size: tuple[int, int], seed: int) -> str:
    """A data URL of a few shapes."""
    choice = random.Random(seed)
    image = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(image)
    for _ in range(3):
        x, y = choice.randrange(size[0] // 2), choice.randrange(size[1] // 2)
        box = (x, y, x + size[0] // 3, y + size[1] // 3)
        choice.choice([draw.ellipse, draw.rectangle])(box, fill=choice.choice(COLOURS))
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def questions(model: str) -> list[Question]:
    """24 different ones: short and long text, one and two pictures, small and large."""
    found = []
    for n in range(24):
        kind = ["short text", "long text", "small picture", "large picture", "two pictures", "small picture"][
            n % 6
        ]
        content: list[dict] = []
        sizes = {"small picture": [(96, 96)], "large picture": [(640, 480)], "two pictures": [(128, 96)] * 2}
        for m, size in enumerate(sizes.get(kind, [])):
            content.append({"type": "image_url", "image_url": {"url": picture(size, 100 * n + m)}})
        filler = " ".join(["Please look at this and think about it."] * (30 if kind == "long text" else 1))
        text = f"{n}. {filler if kind == 'long text' else ''}{WORDS[n % len(WORDS)]}"
        content.append({"type": "text", "text": text})
        body = {
            "model": model,
            "messages": [{"role": "user", "content": content}],
            "max_tokens": [4, 16, 32][n % 3],
            "temperature": 0,
            "ignore_eos": n % 2 == 0,  # some answers are to last
            "return_token_ids": True,
        }
        found.append(Question(kind, body))
    return found


async def ask(client: httpx2.AsyncClient, key: str, question: Question, stream: bool) -> Answer:
    """One request. Raises Unfinished where trying again is right, ValueError for what is wrong."""
    body = question.body | ({"stream": True} if stream else {})
    headers = {"Authorization": f"Bearer {key}"}
    try:
        async with client.stream("POST", "/v1/chat/completions", json=body, headers=headers) as response:
            if response.status_code in (500, 502, 503):
                raise Unfinished(f"HTTP {response.status_code}")
            if response.status_code != 200:
                raise ValueError(f"HTTP {response.status_code}: {(await response.aread())[:300]!r}")
            if stream:
                identity, answer = await read_stream(response)
            else:
                whole = json.loads(await response.aread())
                identity, choice = whole["id"], whole["choices"][0]
                answer = Answer(
                    tuple(whole["prompt_token_ids"]),
                    tuple(choice["token_ids"]),
                    choice["message"]["content"],
                    choice["finish_reason"],
                )
    except httpx2.TransportError as error:
        raise Unfinished(type(error).__name__) from error
    if response.headers["X-Request-Id"] not in identity:
        raise ValueError(f"answer {identity} came to request {response.headers['X-Request-Id']}")
    return answer


async def read_stream(response: httpx2.Response) -> tuple[str, Answer]:
    identities, prompt, ids, text, finish, done = set(), (), [], "", None, False
    async for line in response.aiter_lines():
        if not line.startswith("data: "):
            continue
        if line == "data: [DONE]":
            done = True
            continue
        chunk = json.loads(line[6:])
        if "error" in chunk:
            raise Unfinished("error in a stream")
        identities.add(chunk["id"])
        prompt = prompt or tuple(chunk.get("prompt_token_ids") or ())
        for choice in chunk["choices"]:
            ids += choice.get("token_ids") or []
            text += choice["delta"].get("content") or ""
            finish = choice["finish_reason"] or finish
    if not done or finish is None:
        raise Unfinished("stream cut off")
    if len(identities) != 1:
        raise ValueError(f"chunks of several answers in one stream: {identities}")
    return identities.pop(), Answer(prompt, tuple(ids), text, finish)


class Soak:
    """The clients, what they expect, and what they saw."""

    def __init__(self, options: argparse.Namespace, address: str, keys: list[str], certificate: Path) -> None:
        self.options, self.keys = options, keys
        limits = httpx2.Limits(max_connections=options.clients, max_keepalive_connections=options.clients)
        context = ssl.create_default_context(cafile=str(certificate))
        self.client = httpx2.AsyncClient(
            base_url=address, verify=context, limits=limits, timeout=options.patience, trust_env=False
        )
        self.tally = Tally()
        self.questions: list[Question] = []
        self.expected: list[Answer] = []
        self.end = self.last = 0.0
        self.restarted: float | None = None

    async def learn(self) -> None:
        """Ask everything once, one by one: alone in the server, each answer is what it must always be."""
        headers = {"Authorization": f"Bearer {self.keys[0]}"}
        models = (await self.client.get("/v1/models", headers=headers)).raise_for_status().json()
        self.questions = questions(models["data"][0]["id"])
        for question in self.questions:
            self.expected.append(await ask(self.client, self.keys[0], question, stream=False))
        if len({answer.prompt_ids for answer in self.expected}) != len(self.questions):
            raise ValueError("two questions have the same prompt: a mixed-up answer would not be seen")

    async def one_client(self, number: int) -> None:
        choice = random.Random(number)
        while time.monotonic() < self.end:
            n, stream = choice.randrange(len(self.questions)), choice.random() < 0.5
            self.tally.begun += 1
            began = time.monotonic()
            if await self.until_answered(choice, self.keys[number % KEYS], n, stream):
                kind = self.questions[n].kind + (", streamed" if stream else "")
                self.tally.seconds[kind].append(time.monotonic() - began)

    async def until_answered(self, choice: random.Random, key: str, n: int, stream: bool) -> bool:
        pause = 0.5
        while time.monotonic() < self.last:
            try:
                answer = await ask(self.client, key, self.questions[n], stream)
            except Unfinished as error:
                self.tally.errors[str(error)] += 1
                await asyncio.sleep(pause * choice.uniform(0.5, 1.5))
                pause = min(2 * pause, 4)
                continue
            except ValueError as error:
                self.tally.wrong.append(f"question {n}: {error}")
                return False
            self.check(n, answer)
            self.tally.answered += 1
            self.tally.after_restart += self.restarted is not None
            return True
        return False

    def check(self, n: int, answer: Answer) -> None:
        expected = self.expected[n]
        if answer == expected:
            return
        whose = [m for m, other in enumerate(self.expected) if other.prompt_ids == answer.prompt_ids]
        told = f"question {n} (stream or not): {answer.text!r}, expected {expected.text!r}"
        self.tally.wrong.append(told + ("" if whose == [n] else f"; the prompt was that of {whose}"))

    async def run(self, disturb) -> float:
        await self.learn()
        began = time.monotonic()
        self.end = began + self.options.seconds
        self.last = self.end + self.options.patience
        async with asyncio.TaskGroup() as tasks:
            for number in range(self.options.clients):
                tasks.create_task(self.one_client(number))
            if disturb is not None:
                tasks.create_task(self.kill_halfway(disturb))
        await self.client.aclose()
        return time.monotonic() - began

    async def kill_halfway(self, disturb) -> None:
        await asyncio.sleep(self.options.seconds / 2)
        before = self.tally.answered
        seconds = await asyncio.to_thread(disturb)
        self.restarted = time.monotonic()
        print(f"killed after {before} answers; the new server was ready after {seconds:.0f} s", flush=True)


def report(tally: Tally, seconds: float, kill: bool) -> int:
    print(f"{tally.begun} requests begun, {tally.answered} answered in {seconds:.0f} s", end="")
    print(
        f" ({tally.answered / seconds:.1f}/s), {tally.after_restart} of them after the restart"
        if kill
        else ""
    )
    print(f"{'':28}{'count':>7}{'p50':>9}{'p95':>9}{'p99':>9}{'max':>9}")
    everything = [second for group in tally.seconds.values() for second in group]
    for kind, times in [*sorted(tally.seconds.items()), ("all", everything)]:
        cuts = statistics.quantiles(times, n=100, method="inclusive") if len(times) > 1 else times * 99
        shown = [cuts[49], cuts[94], cuts[98], max(times)] if times else []
        print(f"{kind:28}{len(times):7}" + "".join(f"{value:8.2f}s" for value in shown))
    print("tries that failed and were made again:", dict(tally.errors) or "none")
    lost = tally.begun - tally.answered - sum("HTTP" in told or "came to" in told for told in tally.wrong)
    print(f"lost: {lost}; wrong or mixed up: {len(tally.wrong)}")
    for told in tally.wrong[:10]:
        print("   ", told)
    idle = kill and tally.after_restart == 0
    if idle:
        print("no answer came after the restart")
    return 1 if lost or tally.wrong or idle or not tally.answered else 0


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextmanager
def killable_server(log: Path) -> Iterator[tuple[str, object]]:
    """A server's address, and what kills it and brings it back (returning the seconds that took)."""
    server, _ = launch.prepare([str(MODEL), "--port", str(free_port())])
    assert server.base_url is not None
    with open(log, "ab") as output:
        running = [launch.start(server, output)]

        def kill() -> float:
            began = time.monotonic()
            launch.kill_group(running[0])
            running[0].wait()
            running[0] = launch.start(server, output)
            wait_until_ready(server.base_url, None, 300, running[0])
            return time.monotonic() - began

        try:
            wait_until_ready(server.base_url, None, 300, running[0])
            yield server.base_url, kill
        finally:
            launch.stop(running[0])


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    result.add_argument(
        "--seconds", type=float, default=120, help="as long new requests begin (default: 120)"
    )
    result.add_argument("--clients", type=int, default=200, help="at once (default: 200)")
    result.add_argument(
        "--patience", type=float, default=180, help="seconds to wait for an answer after that"
    )
    result.add_argument("--server", help="http://127.0.0.1:PORT/v1 of a server to use; it is not killed")
    result.add_argument("--server-key", help="that server's --api-key")
    result.add_argument("--no-kill", action="store_true", help="leave the server alone")
    return result


def main(argv: list[str] | None = None) -> int:
    options = parser().parse_args(argv)
    if not (0 < options.seconds <= 3600 and 0 < options.clients <= 1000):
        parser().error("--seconds up to 3600 and --clients up to 1000")
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="soak-")))
        if options.server:
            base_url, kill = options.server, None
        else:
            base_url, kill = stack.enter_context(killable_server(folder / "server.log"))
        host = base_url.removeprefix("http://").removesuffix("/v1")
        if not host.startswith(("127.0.0.1:", "localhost:")):
            parser().error(f"--server: an address of this machine, not {base_url}")
        certificate, certificate_key = make_certificate(folder)
        settings = ProxySettings(
            servers=f"server {host};",
            keys=str(folder / "keys.conf"),
            certificate=str(certificate),
            certificate_key=str(certificate_key),
            listen=f"127.0.0.1:{free_port()}",
            rate="10000r/s",
            burst="10000",
            connections="1000",
            access_log=str(folder / "access.log"),
            server_authorization=f"Bearer {options.server_key}" if options.server_key else "",
        )
        keys = [add_key(folder / "keys.conf", f"client-{n}") for n in range(KEYS)]
        stack.enter_context(running_nginx(TEMPLATE, settings, folder))
        soak = Soak(options, f"https://{settings.listen}", keys, certificate)
        seconds = asyncio.run(soak.run(None if options.no_kill else kill))
        return report(soak.tally, seconds, kill is not None and not options.no_kill)


if __name__ == "__main__":
    sys.exit(main())
