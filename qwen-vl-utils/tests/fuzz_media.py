"""Broken pictures and videos: each gives a result or one MediaError, and nothing else.

    .venv/bin/python qwen-vl-utils/tests/fuzz_media.py --inputs 20000 --seed 0 [--kinds jpeg,mp4] [--only 12]

    seeds --mutate(seed, index)--> bytes --child: fetch_image, fetch_video--> outcome --parent--> summary

An input depends on --seed, --kinds and its index alone, so --only repeats it. Children work side by side; the
parent replaces one that dies or hangs and keeps its input. A finding is any of: another exception, a warning
from our own modules, a dead child, a hang, an answer after the policy's deadline, a result of the wrong form,
a valid file that is refused, memory that grows. Findings lie in .cache/fuzz_media; with one the exit is 1.
"""

import argparse
import contextlib
import ctypes
import faulthandler
import gc
import itertools
import json
import logging
import os
import random
import re
import select
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import warnings
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fuzz_mutations import make_seeds, mutate

ROOT = Path(__file__).resolve().parents[2]
PICTURES = 0.6
"""Share of pictures; the rest are videos."""
TOTAL_SECONDS, STALL_SECONDS = 40.0, 20.0
"""The policy's limits for one input; a decoder process that was killed starts anew within them."""
LATE_SECONDS = 15.0
"""What may pass beyond the limit on a busy machine before an answer is late."""
HANG_SECONDS = 120.0
"""Without an answer, the parent ends a child; a decoder that must be started anew is not a hang."""
MEMORY_EVERY = 25
GROWTH_MIB, GROWTH_MIB_PER_1000 = 24.0, 2.0
"""How much more memory a child may hold at the end than at the start; the larger of the two counts."""
PLANTED = {5: "raises", 9: "dies", 13: "hangs", 17: "warns"}
"""With --planted the harness is tried itself: what these inputs do, while each input leaks."""


@dataclass(frozen=True)
class Input:
    """One input; `valid` where it is a seed as it was made."""

    name: str
    content: bytes
    valid: bool

    @property
    def is_video(self) -> bool:
        return self.name.startswith("video")


def make_input(seeds: dict[str, bytes], run: str, index: int) -> Input:
    """The input of this index: first every seed as it is, then mutated ones."""
    names = sorted(seeds)
    if index < len(names):
        return Input(names[index], seeds[names[index]], valid=True)
    rng = random.Random(f"{run}:{index}")
    videos = rng.random() >= PICTURES
    chosen = [name for name in names if name.startswith("video") == videos] or names
    # Pillow reads dozens of formats that hardly anybody sends.
    common = [name for name in chosen if "/rare-" not in name]
    name = rng.choice(common if common and rng.random() < 0.85 else chosen)
    other = seeds[rng.choice(chosen)]
    return Input(name, mutate(rng, seeds[name], other, name), valid=False)


def read_seeds(folder: Path, kinds: str) -> dict[str, bytes]:
    wanted = [kind for kind in kinds.split(",") if kind]
    found = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.glob("*/*")}
    return {name: content for name, content in found.items() if not wanted or any(k in name for k in wanted)}


# ---- the child: one input after the other, outcomes on stdout


class WrongForm(Exception):
    """A result that is not what the function promises."""


def require(holds: bool, what: str) -> None:
    if not holds:
        raise WrongForm(what)


def use_picture(content: bytes, policy: dict[str, Any]) -> str:
    from qwen_vl_utils import fetch_image

    picture = fetch_image({"image": content}, **policy)
    require(picture.mode == "RGB", f"mode {picture.mode}")
    require(min(picture.size) > 0 and not any(side % 28 for side in picture.size), f"size {picture.size}")
    return "picture"


def use_video(source: Any, index: int, policy: dict[str, Any]) -> str:
    import torch

    from qwen_vl_utils import fetch_video

    # The three ways to choose a reader, each with floats and with bytes.
    reader = ("torchcodec", "pyav", None)[index % 3]
    os.environ.pop("FORCE_QWENVL_VIDEO_READER", None)
    if reader:
        os.environ["FORCE_QWENVL_VIDEO_READER"] = reader
    dtype = (torch.float32, torch.uint8)[index // 3 % 2]
    more = {"dtype": dtype, **policy} if policy else {}
    (frames, metadata), rate = fetch_video({"video": source}, 14, True, True, **more)
    count, channels, height, width = frames.shape
    require(frames.dtype == (dtype if policy else torch.float32), f"dtype {frames.dtype}")
    require(count >= 2 and count % 2 == 0 and channels == 3, f"shape {tuple(frames.shape)}")
    require(min(height, width) > 0 and height % 28 == 0 == width % 28, f"shape {tuple(frames.shape)}")
    require(len(metadata.timestamps) == len(metadata["frames_indices"]) == count, f"metadata {metadata}")
    require(list(metadata.timestamps) == sorted(metadata.timestamps), f"times {metadata.timestamps}")
    require(0 < rate < float("inf"), f"rate {rate}")
    require(float(frames.min()) >= 0 and float(frames.max()) <= 255, "values outside 0..255")
    return "video"


def use_planted(index: int) -> str:
    _leak.append(b"x" * 2**20)
    match PLANTED.get(index):
        case "raises":
            raise KeyError("planted")
        case "dies":
            os.abort()
        case "hangs":
            time.sleep(3600)
        case "warns":
            warnings.warn_explicit("planted", UserWarning, "planted.py", 1, module="qwen_vl_utils.planted")
    return "planted"


_leak: list[bytes] = []


def attempt(item: Input, index: int, folder: Path, policy: dict[str, Any], planted: bool) -> tuple[str, str]:
    """(outcome, detail) of one input; outcomes that begin with "!" are findings."""
    from qwen_vl_utils import MediaError

    path = folder / f"input{Path(item.name).suffix}"
    try:
        if planted:
            return use_planted(index), ""
        if not item.is_video:
            return use_picture(item.content, policy), ""
        if index % 2:
            return use_video(item.content, index, policy), ""
        path.write_bytes(item.content)
        return use_video(str(path), index, policy), ""
    except MediaError as error:
        message, kind = str(error), type(error).__name__
        # torchcodec can't read some valid files (REFUSED in test_utils_real_media.py), and says so.
        if item.valid and not (item.is_video and os.environ.get("FORCE_QWENVL_VIDEO_READER") == "torchcodec"):
            return f"!valid file refused: {kind}", message
        if not message or len(message) > 2000:
            return f"!message of {len(message)} characters: {kind}", message[:500]
        if died := re.search(r"decoder process died \((.+?)\)", message):
            # A library that crashes there is what the process is for; with an exit status Python raised.
            return f"{'!' if 'exit' in died[1] else ''}{kind}, decoder died: {died[1]}", message
        return kind, message
    except Exception as error:  # what this program looks for: whatever is no MediaError
        return f"!{type(error).__name__}", "".join(traceback.format_exception(error))[-3000:]


def memory(trim: Any) -> tuple[float, float]:
    """MiB that this process holds once all that is free was given back, and its peak so far."""
    gc.collect()
    trim(0)
    lines = Path("/proc/self/status").read_text().splitlines()
    sizes = {line.split(":")[0]: int(line.split()[1]) / 1024 for line in lines if line.startswith("Vm")}
    return sizes["VmRSS"], sizes["VmHWM"]


def make_policy() -> dict[str, Any]:
    import qwen_vl_utils

    # The harness also runs on versions without a policy, to find what they did.
    if not hasattr(qwen_vl_utils, "MediaPolicy"):
        return {}
    policy = qwen_vl_utils.MediaPolicy(total_seconds=TOTAL_SECONDS, stall_seconds=STALL_SECONDS)
    return {"policy": policy}


def warm_up(seeds: dict[str, bytes]) -> None:
    """Every reader once, without a deadline: its first video waits for imports, which take long on a busy
    machine. Readers that can't read it will tell in the loop."""
    from qwen_vl_utils import MediaError

    video = next((content for name, content in sorted(seeds.items()) if name.startswith("video")), None)
    for index in range(3 if video else 0):
        with contextlib.suppress(MediaError):
            use_video(video, index, {})


def child(args: argparse.Namespace) -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    logging.getLogger("qwen_vl_utils").setLevel(logging.CRITICAL)
    warnings.filterwarnings("error", module="qwen_vl_|planted")
    trim = ctypes.CDLL("libc.so.6").malloc_trim
    seeds, policy = read_seeds(args.folder, args.kinds), {} if args.planted else make_policy()
    with tempfile.TemporaryDirectory(dir=args.folder) as scratch:
        if not args.planted:
            warm_up(seeds)
        print("{}", file=answers, flush=True)  # ready
        for count, line in enumerate(sys.stdin):
            index = int(line)
            item = make_input(seeds, str(args.seed), index)
            start = time.perf_counter()
            outcome, detail = attempt(item, index, Path(scratch), policy, args.planted)
            seconds = time.perf_counter() - start
            if seconds > TOTAL_SECONDS + LATE_SECONDS:
                outcome, detail = "!late", f"{seconds:.0f} s: {outcome} {detail}"
            answer: dict[str, Any] = {"outcome": outcome, "detail": detail, "seconds": seconds}
            if count % MEMORY_EVERY == 0:
                answer["memory"], answer["peak"] = memory(trim)
            print(json.dumps(answer), file=answers, flush=True)


# ---- the parent


@dataclass
class Tally:
    """What was seen so far; shared by the threads that watch the children."""

    outcomes: Counter[tuple[str, str]] = field(default_factory=Counter)  # (picture | video, outcome)
    messages: dict[str, str] = field(default_factory=dict)  # the first message of each error type
    findings: list[dict[str, Any]] = field(default_factory=list)
    series: list[list[tuple[int, float]]] = field(default_factory=list)  # of each child: inputs, MiB
    peak: float = 0.0
    slowest: tuple[float, int] = (0.0, -1)  # seconds, index
    lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def done(self) -> int:
        return sum(self.outcomes.values())


class Watcher:
    """One child at a time, replaced when it dies or hangs."""

    def __init__(self, args: argparse.Namespace, tally: Tally, number: int) -> None:
        self.args, self.tally = args, tally
        self.log = args.folder / f"child-{number}.log"
        self.hang = 5.0 if args.planted else HANG_SECONDS
        self.process: subprocess.Popen[bytes] | None = None
        self.count = 0

    def start(self) -> subprocess.Popen[bytes]:
        command = [sys.executable, __file__, "--child", "--folder", str(self.args.folder)]
        command += ["--seed", str(self.args.seed), "--kinds", self.args.kinds]
        command += ["--planted"] if self.args.planted else []
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log.open("wb"),
            start_new_session=True,  # Ctrl-C is for the parent, which then ends its children
        )
        self.count = 0
        self.tally.series.append([])
        self.samples = self.tally.series[-1]
        if self.answer(600.0) is None:
            raise SystemExit(f"a child does not start; its last words:\n{self.last_words()}")
        return self.process

    def answer(self, seconds: float) -> dict[str, Any] | None:
        """The child's next answer; None where it is dead or says nothing for so long."""
        assert self.process and self.process.stdout
        if not select.select([self.process.stdout], [], [], seconds)[0]:
            return None
        line = self.process.stdout.readline()
        if line.endswith(b"\n"):
            return json.loads(line)
        self.process.wait(timeout=60)
        return None

    def last_words(self) -> str:
        return self.log.read_bytes()[-3000:].decode(errors="replace")

    def run(self, index: int) -> dict[str, Any]:
        process = self.process or self.start()
        assert process.stdin
        process.stdin.write(f"{index}\n".encode())
        process.stdin.flush()
        if (answer := self.answer(self.hang)) is not None:
            self.count += 1
            if "memory" in answer:
                self.samples.append((self.count, answer["memory"]))
            return answer
        hangs = process.poll() is None
        if hangs:
            process.send_signal(signal.SIGUSR1)  # every thread's stack into the log
            time.sleep(1)
        self.close()
        outcome = "!hang" if hangs else f"!died with status {process.returncode}"
        return {"outcome": outcome, "detail": self.last_words(), "seconds": self.hang if hangs else 0.0}

    def close(self) -> None:
        """End the child; its decoder processes see their connection close and end too."""
        if self.process:
            self.process.kill()
            self.process.wait()
        self.process = None


def watch(
    watcher: Watcher, indices: Any, seeds: dict[str, bytes], args: argparse.Namespace, stop: threading.Event
) -> None:
    tally = watcher.tally
    while not stop.is_set():
        with tally.lock:
            index = next(indices, None)
        if index is None:
            break
        answer = watcher.run(index)
        if stop.is_set() and answer["outcome"].startswith("!died"):
            break  # ended by the parent
        item = make_input(seeds, str(args.seed), index)
        outcome = answer["outcome"]
        with tally.lock:
            tally.outcomes[item.name.split("/")[0], outcome] += 1
            tally.messages.setdefault(outcome, answer["detail"])
            tally.peak = max(tally.peak, answer.get("peak", 0.0))
            tally.slowest = max(tally.slowest, (answer["seconds"], index))
        if outcome.startswith("!"):
            keep(item, index, outcome, answer["detail"], args, tally)
    watcher.close()


def keep(item: Input, index: int, outcome: str, detail: str, args: argparse.Namespace, tally: Tally) -> None:
    """The input into the folder of findings, with what it did."""
    args.findings.mkdir(parents=True, exist_ok=True)
    path = args.findings / f"{args.seed}-{index}-{Path(item.name).name}"
    path.write_bytes(item.content)
    path.with_name(path.name + ".txt").write_text(f"{outcome}\n{detail}\n")
    with tally.lock:
        tally.findings.append({"index": index, "outcome": outcome, "file": str(path)})
    print(f"FINDING {outcome} at index {index}: {path}", flush=True)


def growth(series: list[tuple[int, float]]) -> dict[str, float] | None:
    """How the memory of one child grew once it was warm; None for a short series."""
    warm = series[len(series) // 4 :]
    if len(warm) < 6:
        return None
    third = len(warm) // 3
    start, end = ([size for _, size in part] for part in (warm[:third], warm[-third:]))
    grown = statistics.median(end) - statistics.median(start)
    inputs = warm[-1][0] - warm[0][0]
    slope = statistics.linear_regression(*zip(*warm, strict=True)).slope
    allowed = max(GROWTH_MIB, GROWTH_MIB_PER_1000 * inputs / 1000)
    return {
        "inputs": inputs,
        "first_third_mib": round(statistics.median(start), 1),
        "last_third_mib": round(statistics.median(end), 1),
        "mib_per_1000": round(slope * 1000, 2),
        "too_much": grown > allowed,
    }


def summarize(tally: Tally, seconds: float) -> dict[str, Any]:
    grown = [found for series in tally.series if (found := growth(series))]
    tally.findings += [{"outcome": "!memory grows", **found} for found in grown if found["too_much"]]
    outcomes: dict[str, dict[str, int]] = {}
    for (kind, outcome), count in sorted(tally.outcomes.items()):
        outcomes.setdefault(kind, {})[outcome] = count
    return {
        "inputs": tally.done,
        "seconds": round(seconds, 1),
        "outcomes": outcomes,
        "memory": grown,
        "peak_mib": round(tally.peak),
        "slowest": {"seconds": round(tally.slowest[0], 2), "index": tally.slowest[1]},
        "first_messages": {k: v[:300] for k, v in sorted(tally.messages.items()) if v},
        "findings": tally.findings,
    }


def show(report: dict[str, Any]) -> None:
    print(f"\n{report['inputs']} inputs in {report['seconds']:.0f} s")
    for kind, counts in report["outcomes"].items():
        print(f"  {kind}: {sum(counts.values())}")
        for outcome, count in sorted(counts.items(), key=lambda pair: -pair[1]):
            print(f"    {count:6} {outcome}")
    for found in report["memory"]:
        print(
            f"  memory of a child: {found['first_third_mib']} -> {found['last_third_mib']} MiB over "
            f"{found['inputs']} inputs, {found['mib_per_1000']} MiB per 1,000 inputs"
        )
    print(f"  peak of a child {report['peak_mib']} MiB; slowest {report['slowest']}")
    print(f"  findings: {len(report['findings'])}", flush=True)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """All inputs, or those until Ctrl-C; returns the report."""
    make_seeds(args.folder)
    seeds, tally, stop, started = read_seeds(args.folder, args.kinds), Tally(), threading.Event(), time.time()
    if not seeds:
        raise SystemExit(f"--kinds {args.kinds!r} names no seed")
    indices = iter([args.only]) if args.only is not None else iter(range(args.inputs))
    watchers = [Watcher(args, tally, number) for number in range(args.workers)]
    threads = [
        threading.Thread(target=watch, args=(watcher, indices, seeds, args, stop), daemon=True)
        for watcher in watchers
    ]
    for thread in threads:
        thread.start()
    try:
        for tick in itertools.count(1):
            threads[tick % len(threads)].join(timeout=0.2)
            if not any(thread.is_alive() for thread in threads):
                break
            if tick % 50 == 0:
                print(f"{tally.done} inputs, {len(tally.findings)} findings", flush=True)
    except KeyboardInterrupt:
        print("stopped", flush=True)
        stop.set()
        for thread in threads:
            thread.join(timeout=2)
    for watcher in watchers:
        watcher.close()
    return summarize(tally, time.time() - started)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--inputs", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", default="", help="parts of seeds' names, as picture,webm; default all")
    parser.add_argument("--only", type=int, help="repeat the input of this index, with the same --kinds")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--findings", type=Path, default=ROOT / ".cache/fuzz_media")
    parser.add_argument("--output", type=Path, help="the summary as JSON")
    parser.add_argument("--planted", action="store_true", help="try the harness: inputs that fail on purpose")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> int:
    args = arguments()
    if args.child:
        child(args)
        return 0
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends with the summary, as Ctrl-C does
    with tempfile.TemporaryDirectory() as folder:
        args.folder = Path(folder)
        report = run(args)
    show(report)
    if args.output:
        args.output.write_text(json.dumps(report, indent=2) + "\n")
    return 1 if report["findings"] else 0


if __name__ == "__main__":
    sys.exit(main())
