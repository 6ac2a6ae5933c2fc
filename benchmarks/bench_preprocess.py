"""Pictures and videos to model inputs: this repository's qwen_vl_utils against the release 0.0.14.

    .venv/bin/python benchmarks/bench_preprocess.py [--rounds 7] [--quick] [--scale small] [--output FILE]

    media --each contestant, a child process of its own--> results --agree?--> rounds A B B A ... --> ratios
                                                                          --> fresh children      --> memory

A contestant times its own call, so neither the pipe to it nor its imports count. "Bare" contestants
decode the same bytes and do nothing else: no way to model inputs is faster. The release is installed once
into .cache/bench_preprocess, and so is the clip's package. Results go to benchmarks/results/preprocess.json;
with --quick or --scale small they are written only where --output says.
"""

import argparse
import datetime
import gc
import hashlib
import importlib.metadata
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import av
import numpy as np
from PIL import Image
from preprocess_media import CACHE, ROOT, SCALES, Media, install, make_media

RELEASE = "0.0.14"
SETTINGS = ("FORCE_QWENVL_VIDEO_READER", "MODEL_SEQ_LEN", "TORCHCODEC_NUM_THREADS")
DECODER_THREADS = 8  # the default of TORCHCODEC_NUM_THREADS on both sides
CORES = len(os.sched_getaffinity(0))
GOAL_OVER_BARE = 1.3
MIB = 2**20


@dataclass(frozen=True)
class Contestant:
    """One way to the result: a child process (`side`) and what it is asked."""

    name: str
    side: str  # release | ours | bare
    task: dict[str, Any]


@dataclass(frozen=True)
class Case:
    """One workload. The first contestant is the release, the second ours; then variants and bare decoding."""

    name: str
    contestants: tuple[Contestant, ...]
    faster: float  # target: median of the release over median of ours
    memory: float | None = None  # target: memory of ours over memory of the release


# ---- a child process: reads tasks from stdin, one JSON a line, and answers on stdout

_loaded: dict[str, Any] = {}


def task_about() -> dict[str, Any]:
    import torch

    import qwen_vl_utils

    return {
        "file": qwen_vl_utils.__file__,
        "version": importlib.metadata.version("qwen-vl-utils"),
        "torch_threads": torch.get_num_threads(),
    }


def task_load(messages: str) -> dict[str, Any]:
    """Messages into memory, so that reading them is neither timed nor weighed."""
    if messages not in _loaded:
        _loaded[messages] = json.loads(Path(messages).read_text())
    return {}


def task_process(
    messages: str, dtype: str | None = None, reader: str | None = None, save: str | None = None
) -> dict[str, Any]:
    """One `process_vision_info`: its seconds, and with `save` what came out of it."""
    import torch

    from qwen_vl_utils import process_vision_info

    task_load(messages)
    os.environ.pop("FORCE_QWENVL_VIDEO_READER", None)
    if reader:
        os.environ["FORCE_QWENVL_VIDEO_READER"] = reader
    more = {"dtype": getattr(torch, dtype)} if dtype else {}
    gc.collect()
    start = time.perf_counter()
    pictures, videos, _ = process_vision_info(
        _loaded[messages], return_video_kwargs=True, return_video_metadata=True, **more
    )
    answer: dict[str, Any] = {"seconds": time.perf_counter() - start}
    if save:
        answer["pictures"] = [
            [picture.mode, *picture.size, hashlib.sha256(picture.tobytes()).hexdigest()]
            for picture in pictures or []
        ]
        answer["indices"] = [list(map(int, metadata["frames_indices"])) for _, metadata in videos or []]
        answer["dtypes"] = [str(frames.dtype) for frames, _ in videos or []]
        for number, (frames, _) in enumerate(videos or []):
            np.save(Path(save) / f"{number}.npy", frames.numpy())
    return answer


def task_pillow(paths: list[str], threads: int) -> dict[str, Any]:
    """Pillow's decoding of the same bytes and nothing else."""
    import io

    contents = [Path(path).read_bytes() for path in paths]

    def decode(content: bytes) -> None:
        Image.open(io.BytesIO(content)).load()

    with ThreadPoolExecutor(threads) as pool:
        start = time.perf_counter()
        list(pool.map(decode, contents))
        return {"seconds": time.perf_counter() - start}


def task_torchcodec(path: str, indices: list[int]) -> dict[str, Any]:
    from torchcodec.decoders import VideoDecoder

    start = time.perf_counter()
    VideoDecoder(path, num_ffmpeg_threads=DECODER_THREADS).get_frames_at(indices=indices)
    return {"seconds": time.perf_counter() - start}


def task_pyav(path: str, indices: list[int]) -> dict[str, Any]:
    start, wanted, frames = time.perf_counter(), set(indices), []
    with av.open(path) as container:
        container.streams.video[0].thread_type = "AUTO"
        for index, frame in enumerate(container.decode(video=0)):
            if index in wanted:
                frames.append(frame.to_ndarray(format="rgb24"))
            if index == indices[-1]:
                break
    return {"seconds": time.perf_counter() - start}


TASKS = {
    "about": task_about,
    "load": task_load,
    "process": task_process,
    "pillow": task_pillow,
    "torchcodec": task_torchcodec,
    "pyav": task_pyav,
}


def child() -> None:
    # What libraries print must not get between the answers.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        task = json.loads(line)
        print(json.dumps(TASKS[task.pop("do")](**task)), file=answers, flush=True)


# ---- the parent: children, media, cases


class Child:
    """A process of one side; `ask` sends a task and waits for its answer."""

    def __init__(self, side: str) -> None:
        environment = {key: value for key, value in os.environ.items() if key not in SETTINGS}
        self.home = CACHE / "release" if side == "release" else ROOT / "qwen-vl-utils/src"
        environment["PYTHONPATH"] = str(self.home)
        command = [sys.executable, __file__, "--child"]
        self.side = side
        self.process = subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def ask(self, do: str, **task: Any) -> dict[str, Any]:
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write(json.dumps({"do": do, **task}) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"the child of side {self.side!r} ended while doing {do!r}; its error is above")
        return json.loads(line)

    def about(self) -> dict[str, Any]:
        """What is loaded there; stops the run where it is not what `side` says."""
        about = self.ask("about")
        if not Path(about["file"]).is_relative_to(self.home):
            raise SystemExit(f"side {self.side!r} loaded {about['file']}, which is not below {self.home}")
        if (about["version"] == RELEASE) != (self.side == "release"):
            raise SystemExit(f"side {self.side!r} runs qwen-vl-utils {about['version']}")
        return about

    def close(self) -> None:
        assert self.process.stdin
        self.process.stdin.close()
        self.process.wait(timeout=60)


def picture_case(name: str, messages: str, media: Media) -> Case:
    paths = [str(path) for path in media.pictures]
    bare = [
        Contestant(f"bare Pillow, {n} thread(s)", "bare", {"do": "pillow", "paths": paths, "threads": n})
        for n in dict.fromkeys((CORES, 1))
    ]
    task = {"do": "process", "messages": messages}
    both = (Contestant(RELEASE, "release", task), Contestant("ours", "ours", task))
    return Case(name, (*both, *bare), faster=1.6)


def video_case(dtype: str | None, media: Media, indices: list[int]) -> Case:
    task: dict[str, Any] = {"do": "process", "messages": media.video}
    ours = {**task, "dtype": dtype} if dtype else task
    decode = {"path": str(media.clip), "indices": indices}
    contestants = (
        Contestant(RELEASE, "release", task),
        Contestant("ours", "ours", ours),
        Contestant("ours, pyav", "ours", {**ours, "reader": "pyav"}),
        Contestant("bare torchcodec", "bare", {"do": "torchcodec", **decode}),
        Contestant("bare PyAV", "bare", {"do": "pyav", **decode}),
    )
    if dtype:
        return Case(f"video {dtype}", contestants, faster=3.0, memory=1 / 3)
    return Case("video float32", contestants, faster=2.0)


# ---- agreement, time, memory


def output(child: Child, contestant: Contestant, folder: Path) -> dict[str, Any]:
    folder.mkdir()
    return child.ask(**contestant.task, save=str(folder))


def largest_difference(one: Path, other: Path) -> float:
    a, b = np.load(one, mmap_mode="r"), np.load(other, mmap_mode="r")
    if a.shape != b.shape:
        raise SystemExit(f"the results do not agree: shapes {a.shape} and {b.shape}")
    return max(float(np.abs(x.astype(np.float32) - y).max()) for x, y in zip(a, b, strict=True))


def check_agreement(case: Case, children: dict[str, Child]) -> dict[str, Any]:
    """Pictures bit for bit, videos with the same indices and within one level; else the run stops."""
    release, *others = [contestant for contestant in case.contestants if contestant.side != "bare"]
    agreement: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(dir=CACHE) as scratch:
        expected = output(children["release"], release, Path(scratch, "release"))
        for number, contestant in enumerate(others):
            folder = Path(scratch, str(number))
            found = output(children["ours"], contestant, folder)
            for key in ("pictures", "indices"):
                if expected[key] != found[key]:
                    raise SystemExit(f"{case.name}: {contestant.name} does not agree in its {key}")
            clips = range(len(expected["indices"]))
            different = [
                largest_difference(Path(scratch, f"release/{i}.npy"), folder / f"{i}.npy") for i in clips
            ]
            if max(different, default=0) > 1:
                raise SystemExit(f"{case.name}: {contestant.name} is off by {max(different)} levels")
            agreement[contestant.name] = {
                "pictures_bit_equal": len(found["pictures"]),
                "frames_same_indices": sum(map(len, found["indices"])),
                "largest_difference": max(different, default=0.0),
                "dtypes": found["dtypes"],
            }
            shutil.rmtree(folder)
    return agreement


def time_rounds(case: Case, children: dict[str, Child], rounds: int) -> dict[str, list[float]]:
    """Seconds of each contestant in each round; every second round runs backwards, the first is dropped."""
    seconds: dict[str, list[float]] = {contestant.name: [] for contestant in case.contestants}
    for number in range(rounds + 1):
        order = case.contestants if number % 2 else case.contestants[::-1]
        for contestant in order:
            taken = children[contestant.side].ask(**contestant.task)["seconds"]
            if number:
                seconds[contestant.name].append(taken)
    return seconds


def status(pid: int, key: str) -> int:
    """Bytes of one line of /proc/PID/status."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:"))


def family(pid: int) -> list[int]:
    """The process and all that it started, directly or not."""
    found, left = [], [pid]
    while left:
        found.append(left.pop())
        for tasks in Path(f"/proc/{found[-1]}/task").glob("*/children"):
            try:
                left += map(int, tasks.read_text().split())
            except (FileNotFoundError, ProcessLookupError):
                continue  # ended meanwhile
    return found


def proportional(pids: list[int]) -> int:
    """Bytes of the processes together; a page that several share counts once (PSS)."""
    total = 0
    for pid in pids:
        try:
            lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        except (FileNotFoundError, ProcessLookupError):
            continue  # ended meanwhile
        total += sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))
    return total


def weigh(child: Child, contestant: Contestant, media: Media) -> dict[str, float]:
    """Peak memory [MiB] of one call, above what the process held after a tiny warm-up.

    `process` is the calling process alone, by the kernel's own high-water mark; `total` counts what it
    started as well, sampled every few milliseconds.
    """
    pid, peak, done = child.process.pid, 0, threading.Event()
    child.ask("load", messages=contestant.task["messages"])
    child.ask(**{**contestant.task, "messages": media.tiny})
    time.sleep(0.2)
    Path(f"/proc/{pid}/clear_refs").write_text("5")  # the high-water mark starts anew
    alone, together = status(pid, "VmRSS"), proportional(family(pid))
    workers = together - proportional([pid])

    def sample() -> None:
        nonlocal peak
        while not done.wait(0.004):
            peak = max(peak, proportional(family(pid)))

    sampler = threading.Thread(target=sample)
    sampler.start()
    child.ask(**contestant.task)
    done.set()
    sampler.join()
    return {
        "process": (status(pid, "VmHWM") - alone) / MIB,
        "total": max(peak - together, 0) / MIB,
        "at_rest": together / MIB,
        "workers_at_rest": workers / MIB,
    }


def weigh_rounds(case: Case, media: Media, rounds: int) -> dict[str, dict[str, float]]:
    """Medians of `weigh`, each in a fresh process, for every contestant that makes model inputs."""
    weights = {}
    for contestant in case.contestants:
        if contestant.side == "bare":
            continue
        runs = []
        for _ in range(rounds):
            child = Child(contestant.side)
            runs.append(weigh(child, contestant, media))
            child.close()
        weights[contestant.name] = {
            key: round(statistics.median(run[key] for run in runs), 1) for key in runs[0]
        }
    return weights


def weigh_here(case: Case, media: Media, children: dict[str, Child]) -> dict[str, dict[str, float]]:
    """`weigh` in processes that have worked already, for smoke tests: their imports take seconds."""
    both = [contestant for contestant in case.contestants if contestant.side != "bare"]
    return {contestant.name: weigh(children[contestant.side], contestant, media) for contestant in both}


# ---- the report


def summary(values: list[float]) -> dict[str, Any]:
    return {
        "median": round(statistics.median(values), 4),
        "min": round(min(values), 4),
        "max": round(max(values), 4),
        "rounds": [round(value, 4) for value in values],
    }


def compare(
    case: Case, seconds: dict[str, list[float]], memory: dict[str, dict[str, float]]
) -> dict[str, Any]:
    """Every variant of ours against the release: ratios, their spread, targets, distance to bare decoding."""
    bare = [contestant.name for contestant in case.contestants if contestant.side == "bare"]
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    sides = {}
    for contestant in case.contestants:
        if contestant.side == "bare":
            continue
        name = contestant.name
        entry: dict[str, Any] = {"over_bare": {b: round(medians[name] / medians[b], 2) for b in bare}}
        if contestant.side == "ours":
            ratios = [a / b for a, b in zip(seconds[RELEASE], seconds[name], strict=True)]
            entry["faster"] = {
                "ratio_of_medians": round(medians[RELEASE] / medians[name], 3),
                "min_of_rounds": round(min(ratios), 3),
                "max_of_rounds": round(max(ratios), 3),
                "target": case.faster,
            }
        if contestant.side == "ours":
            entry["memory"] = {
                key: round(memory[name][key] / memory[RELEASE][key], 3) if memory[RELEASE][key] else None
                for key in ("process", "total")
            } | {"target": case.memory}
        sides[name] = entry
    return sides


def table(result: dict[str, Any]) -> list[str]:
    """The lines that are printed for one case."""
    lines = [
        f"{result['case']}",
        f"  {'':24} {'median':>8} {'min':>8} {'max':>8}   memory: process, total [MiB]",
    ]
    for name, times in result["seconds"].items():
        weight = result["memory_mib"].get(name)
        tail = f"   {weight['process']:8.0f} {weight['total']:8.0f}" if weight else ""
        lines.append(f"  {name:24} {times['median']:7.3f}s {times['min']:7.3f}s {times['max']:7.3f}s{tail}")
    for name, side in result["compared"].items():
        if faster := side.get("faster"):
            lines.append(
                f"  {name}: {faster['ratio_of_medians']:.2f}x as fast as {RELEASE} (rounds "
                f"{faster['min_of_rounds']:.2f} to {faster['max_of_rounds']:.2f}; target {faster['target']}x)"
            )
            memory = side["memory"]
            target = f"; target {memory['target']:.2f}" if memory["target"] else ""
            lines.append(
                f"  {name}: memory {memory['process']} of {RELEASE}'s, {memory['total']} with worker "
                f"processes{target}"
            )
        over = ", ".join(f"{ratio:.2f}x {bare}" for bare, ratio in side["over_bare"].items())
        lines.append(f"  {name}: takes {over} (goal {GOAL_OVER_BARE}x)")
    return lines


def git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    return done.stdout.strip()


def circumstances(children: dict[str, Child], rounds: int, scale: str) -> dict[str, Any]:
    """What a reader needs to judge the numbers."""
    cpu = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    about = {side: children[side].about() for side in ("release", "ours")}
    versions = {name: importlib.metadata.version(name) for name in ("torch", "pillow", "av", "torchcodec")}
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": {
            "hash": git("rev-parse", "HEAD"),
            "dirty": bool(git("status", "--porcelain", "--untracked-files=no")),
        },
        "hardware": {
            "cpu": cpu[0].partition(":")[2].strip() if cpu else platform.processor(),
            "cores": CORES,
            "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
            "load_at_start": os.getloadavg()[0],
        },
        "versions": {
            "python": platform.python_version(),
            **versions,
            "qwen-vl-utils": about["ours"]["version"],
            "release": about["release"]["version"],
        },
        "settings": {
            "rounds": rounds,
            "warm_up_rounds": 1,
            "scale": scale,
            "torch_threads": {side: found["torch_threads"] for side, found in about.items()},
            "decoder_threads": DECODER_THREADS,
        },
    }


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--quick", action="store_true", help="2 rounds, memory once: does it run?")
    parser.add_argument("--scale", choices=SCALES, default="full", help="small: for a smoke test")
    parser.add_argument("--output", type=Path, help="default: benchmarks/results/preprocess.json")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


def make_cases(media: Media, indices: list[int]) -> tuple[Case, ...]:
    return (
        picture_case("pictures by path", media.by_path, media),
        picture_case("pictures as data URLs", media.by_url, media),
        video_case(None, media, indices),
        video_case("uint8", media, indices),
    )


def run_case(
    case: Case,
    media: Media,
    children: dict[str, Child],
    rounds: int,
    weighings: int,
) -> dict[str, Any]:
    """Agreement, then time, then memory (`weighings` 0: see weigh_here); the result is printed too."""
    agreement = check_agreement(case, children)
    seconds = time_rounds(case, children, rounds)
    memory = weigh_rounds(case, media, weighings) if weighings else weigh_here(case, media, children)
    result = {
        "case": case.name,
        "agreement": agreement,
        "seconds": {name: summary(values) for name, values in seconds.items()},
        "memory_mib": memory,
        "compared": compare(case, seconds, memory),
        "tasks": [asdict(contestant) for contestant in case.contestants],
    }
    print(*table(result), "", sep="\n", flush=True)
    return result


def main() -> None:
    args = arguments()
    if args.child:
        return child()
    scale, rounds = SCALES[args.scale], 2 if args.quick else args.rounds
    weighings = min(scale.weighings, 1) if args.quick else scale.weighings
    if args.output is None and not args.quick and args.scale == "full":
        args.output = ROOT / "benchmarks/results/preprocess.json"
    install(f"qwen-vl-utils=={RELEASE}", CACHE / "release")
    media = make_media(args.scale, scale)
    children = {side: Child(side) for side in ("release", "ours", "bare")}
    report = circumstances(children, rounds, args.scale) | {"media": media.about, "cases": []}
    with av.open(str(media.clip)) as container:
        last = container.streams.video[0].frames - 1
    indices = np.linspace(0, last, scale.nframes).round().astype(int).tolist()
    for case in make_cases(media, indices):
        report["cases"].append(run_case(case, media, children, rounds, weighings))
    for process in children.values():
        process.close()
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(report, indent=2).replace(f"{ROOT}/", "") + "\n")
        print(f"written: {args.output}")


if __name__ == "__main__":
    main()
