"""What the harness itself costs: the runner against the bare client, and its memory over 100,000 samples.

    .venv/bin/python benchmarks/bench_eval.py [--rounds 7] [--quick] [--output FILE]

    requests --bare client | infer: hash, ask, store--> answers --equal?--> rounds A B B A ... --> ratio
    100,000 questions --infer--> resident memory of its process, every 5,000 questions --> growth

The server is a stub in a process of its own. It answers with a hash of the request, so equal answers mean
that the same was asked. The 100,000 questions go to a back end inside the runner's process, because the
client would take most of the time; a fifth as many go through it, to see that it keeps nothing.
Goals: at least 95 % of the bare client's throughput; less than 32 MiB of growth after the first tenth.
Results go to benchmarks/results/eval.json; with --quick only where --output says.
"""

import argparse
import asyncio
import base64
import hashlib
import io
import json
import multiprocessing
import os
import random
import statistics
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openai
from PIL import Image
from provenance import provenance

from qwen_vl_serve import Reply, Sampling, open_backend
from qwenvl_eval import Dataset, Predictions, Run, Sample, Store, infer

ROOT = Path(__file__).resolve().parents[1]
SPAWN = multiprocessing.get_context("spawn")
MIB = 2**20
LATENCY = 0.2  # seconds, of the stub that throughput is measured with
AT_ONCE = 32
AT_ONCE_FOR_MEMORY = 64  # the command line's default
READINGS = 20  # of resident memory, in a run
GREEDY = Sampling(temperature=0, max_new_tokens=32)
GOAL_SHARE = 0.95
GOAL_MIB = 32


@dataclass(frozen=True)
class Round:
    """One round of one side.

    ``answers`` in the order of the requests, ``seconds`` by the clock, ``cpu`` seconds of this process.
    """

    answers: list[str]
    seconds: float
    cpu: float


# ---- the stub, a process of its own


def digest(request: dict[str, Any]) -> str:
    """What the stub answers to a request: a hash of all of it."""
    return hashlib.sha256(json.dumps(request, sort_keys=True).encode()).hexdigest()


def request_of(messages: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """A request in the endpoint's words, with the runner's sampling."""
    return {"model": "stub", "messages": messages, "max_tokens": GREEDY.max_new_tokens, "temperature": 0}


def _response(answer: str) -> bytes:
    choice = {"index": 0, "message": {"role": "assistant", "content": answer}, "finish_reason": "stop"}
    usage = {"prompt_tokens": 9, "completion_tokens": 9, "total_tokens": 18}
    names = {"id": "1", "object": "chat.completion", "created": 0, "model": "stub"}
    body = json.dumps(names | {"choices": [choice], "usage": usage}).encode()
    return b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%s" % (
        len(body),
        body,
    )


async def _serve(latency: float, tell: Any) -> None:
    async def connection(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").lower()
                length = head.partition("content-length:")[2].partition("\r\n")[0]
                body = await reader.readexactly(int(length))
                start = time.monotonic()
                response = _response(digest(json.loads(body)))
                if latency:
                    await asyncio.sleep(start + latency - time.monotonic())
                writer.write(response)
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            writer.close()

    server = await asyncio.start_server(connection, "127.0.0.1", 0)
    tell.send(server.sockets[0].getsockname()[1])
    await server.serve_forever()


def stub(latency: float, tell: Any) -> None:
    """The process: says its port, then answers every request after ``latency`` seconds."""
    asyncio.run(_serve(latency, tell))


@contextmanager
def running_stub(latency: float) -> Iterator[str]:
    heard, tell = SPAWN.Pipe(duplex=False)
    process = SPAWN.Process(target=stub, args=(latency, tell), daemon=True)
    process.start()
    tell.close()
    try:
        yield f"http://127.0.0.1:{heard.recv()}/v1"
    finally:
        process.terminate()
        process.join()


# ---- throughput


def picture(seed: int) -> str:
    """Noise as a JPEG's data URL of about 50 kB."""
    side = 248
    buffer = io.BytesIO()
    noise = Image.frombytes("RGB", (side, side), random.Random(seed).randbytes(3 * side * side))
    noise.save(buffer, "JPEG", quality=75)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def samples(count: int) -> list[Sample]:
    """A question and a picture each, no two alike."""
    result = []
    for index in range(count):
        picture_and_text = [
            {"type": "image", "image": picture(index)},
            {"type": "text", "text": f"What do you see in picture {index}? Answer with one word."},
        ]
        messages = [{"role": "user", "content": picture_and_text}]
        result.append(Sample(str(index), messages, {"answer": "noise"}, str(index)))
    return result


def as_request(sample: Sample) -> dict[str, Any]:
    """What the runner sends for a sample."""
    image, text = sample.messages[0]["content"]
    part = {"type": "image_url", "image_url": {"url": image["image"]}}
    return request_of([{"role": "user", "content": [part, text]}])


async def _bare(client: openai.AsyncOpenAI, requests: Sequence[dict[str, Any]]) -> Round:
    slots = asyncio.Semaphore(AT_ONCE)

    async def ask(request: dict[str, Any]) -> str:
        async with slots:
            answer = await client.chat.completions.create(**request)
        return answer.choices[0].message.content or ""

    start, cpu = time.perf_counter(), time.process_time()
    answers = await asyncio.gather(*map(ask, requests))
    return Round(list(answers), time.perf_counter() - start, time.process_time() - cpu)


def _through_runner(backend: Any, data: Dataset, folder: Path) -> Round:
    """A run as ``qwenvl-eval infer`` does it, progress bar and all; its file is read back untimed."""
    path = folder / "predictions.jsonl"
    path.unlink(missing_ok=True)
    with quiet():
        start, cpu = time.perf_counter(), time.process_time()
        with Store(path, run_of(data)) as store:
            infer(backend, data, store, GREEDY, concurrency=AT_ONCE)
        seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    return Round([prediction.answer for prediction in Predictions(path)], seconds, cpu)


@contextmanager
def quiet() -> Iterator[None]:
    """The progress bar is drawn where nobody sees it."""
    with open(os.devnull, "w") as nowhere, redirect_stderr(nowhere):
        yield


def run_of(data: Dataset) -> Run:
    return Run("bench", {}, "stub", "", "", "", len(data), {})


def throughput(count: int, rounds: int, folder: Path) -> dict[str, Any]:
    """Both sides by turns, the same requests; connections stay open from round to round."""
    kept = samples(count)
    data = Dataset((), count, lambda: iter(kept))
    requests = [as_request(sample) for sample in kept]
    with running_stub(LATENCY) as url, asyncio.Runner() as loop:
        client = openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0)
        backend = open_backend(url, name="stub", concurrency=AT_ONCE)
        sides: dict[str, Callable[[], Round]] = {
            "bare": lambda: loop.run(_bare(client, requests)),
            "runner": lambda: _through_runner(backend, data, folder),
        }
        try:
            report = measure(sides, count, rounds)
        finally:
            backend.close()
            loop.run(client.close())
    return {"latency_seconds": LATENCY, "at_once": AT_ONCE, "picture_bytes": len(picture(0))} | report


def measure(sides: dict[str, Callable[[], Round]], count: int, rounds: int) -> dict[str, Any]:
    """Rounds of both sides by turns, after their answers were found equal; exits where they are not."""
    answers = {name: side().answers for name, side in sides.items()}  # and warm
    for name, got in answers.items():
        if len(got) != count or got != answers["bare"]:
            sys.exit(f"{name} gives other answers than bare: nothing is timed")
    found: dict[str, list[Round]] = {name: [] for name in sides}
    for index in range(rounds):
        for name in list(sides) if index % 2 == 0 else list(sides)[::-1]:
            found[name].append(sides[name]())
    report: dict[str, Any] = {"requests": count, "equal_answers": count * len(sides)}
    for name, runs in found.items():
        shares = [bare.seconds / one.seconds for one, bare in zip(runs, found["bare"], strict=True)]
        report[name] = {
            "seconds": [one.seconds for one in runs],
            "requests_per_second": count / statistics.median(one.seconds for one in runs),
            "cpu_ms_per_request": 1000 * statistics.median(one.cpu for one in runs) / count,
            "share_of_bare": statistics.median(shares), "lowest": min(shares), "highest": max(shares),
        }  # fmt: skip
    return report


# ---- memory


def resident() -> int:
    """Bytes of this process that are in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def question(index: int) -> list[dict[str, Any]]:
    return [{"role": "user", "content": f"Question {index}: which of these is a prime number? " * 4}]


class Inside:
    """A back end without an endpoint: the stub's answers after 2 ms."""

    concurrent = True

    def generate(self, batch: Sequence[Sequence[dict[str, Any]]], sampling: Sampling) -> list[Reply]:
        time.sleep(0.002)
        return [Reply(digest(request_of(messages)), "stop", 9, 9) for messages in batch]

    def close(self) -> None:
        pass


def memory(count: int, url: str, folder: Path) -> dict[str, Any]:
    """``count`` questions of text through the runner of this process, to the endpoint ``url`` or inside.

    A reading is taken as the runner fetches each ``count / 20``-th question; twice 64 others are on their way
    then. What the finished keys take is what a store holds that is opened on the complete file.
    """
    readings: list[list[float]] = []
    every, path, began = count // READINGS, folder / "memory.jsonl", time.perf_counter()

    def walk() -> Iterator[Sample]:
        for index in range(count):
            if index % every == 0:
                readings.append([index, resident() / MIB])
            yield Sample(str(index), question(index), {"answer": "7"}, str(index))

    data = Dataset((), count, walk)
    backend: Any = open_backend(url, name="stub", concurrency=AT_ONCE_FOR_MEMORY) if url else Inside()
    with quiet(), Store(path, run_of(data)) as store:
        infer(backend, data, store, GREEDY, concurrency=AT_ONCE_FOR_MEMORY)
        readings.append([len(store), resident() / MIB])
    seconds = time.perf_counter() - began
    backend.close()
    right = sum(p.answer == digest(request_of(question(p.index))) for p in Predictions(path))
    if right != count:
        sys.exit(f"{count} questions were asked, but {right} have their answer: memory would say nothing")
    tracemalloc.start()
    with Store(path, run_of(data)):
        held, peak = tracemalloc.get_traced_memory()
    return {
        "samples": count, "right_answers": right, "at_once": AT_ONCE_FOR_MEMORY, "seconds": seconds,
        "resident_mib": readings, "growth_mib": growth(readings),
        "finished_keys_mib": held / MIB, "reopening_peak_mib": peak / MIB,
    }  # fmt: skip


def growth(readings: Sequence[Sequence[float]]) -> float:
    """The most that a reading is above the one after the first tenth, in the unit of the readings.

    ``readings``: pairs (samples, resident memory), in order, the last at the end.
    """
    start = next(memory for done, memory in readings if done >= readings[-1][0] / 10)
    return max(memory - start for done, memory in readings if done >= readings[-1][0] / 10)


def measure_memory(count: int, url: str) -> dict[str, Any]:
    """:func:`memory` in a fresh process."""
    with tempfile.TemporaryDirectory() as name, ProcessPoolExecutor(1, mp_context=SPAWN) as pool:
        return pool.submit(memory, count, url, Path(name)).result()


# ---- the report


def tell_throughput(report: dict[str, Any]) -> None:
    print(f"throughput: {report['requests']} requests a round, {AT_ONCE} at once, all answers equal")
    for name in ("bare", "runner"):
        one = report[name]
        print(
            f"  {name:6} {one['requests_per_second']:6.1f}/s   {one['cpu_ms_per_request']:.2f} ms of CPU each"
            f"   {one['share_of_bare']:.3f} of bare ({one['lowest']:.3f} to {one['highest']:.3f})   "
            f"goal {GOAL_SHARE}"
        )


def tell_memory(name: str, report: dict[str, Any]) -> None:
    last = report["resident_mib"][-1][1]
    print(
        f"memory, {name}: {report['samples']} samples in {report['seconds']:.0f} s, {last:.0f} MiB at last,"
        f" {report['growth_mib']:.1f} MiB more than after the first tenth   goal below {GOAL_MIB}\n"
        f"  finished keys {report['finished_keys_mib']:.1f} MiB; reopening the file takes "
        f"{report['reopening_peak_mib']:.1f} MiB for a moment"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--quick", action="store_true", help="2 rounds, 3,000 samples: does it run?")
    parser.add_argument("--output", type=Path, help="default: benchmarks/results/eval.json")
    options = parser.parse_args()
    rounds, requests, many = (2, 192, 3_000) if options.quick else (options.rounds, 1_024, 100_000)
    result: dict[str, Any] = provenance("openai", "qwenvl-eval", "qwen-vl-serve", "qwen-vl-utils")
    result |= {"rounds": rounds, "goal_share_of_bare": GOAL_SHARE, "goal_growth_mib": GOAL_MIB}
    with tempfile.TemporaryDirectory() as name:
        result["throughput"] = throughput(requests, rounds, Path(name))
    tell_throughput(result["throughput"])
    result["memory"] = {"inside": measure_memory(many, "")}
    with running_stub(0) as url:
        result["memory"]["endpoint"] = measure_memory(many // 5, url)
    for name, report in result["memory"].items():
        tell_memory(name, report)
    output = options.output or (None if options.quick else ROOT / "benchmarks/results/eval.json")
    if output:
        output.write_text(json.dumps(result, indent=2) + "\n")
        print(f"written: {output}")


if __name__ == "__main__":
    main()
