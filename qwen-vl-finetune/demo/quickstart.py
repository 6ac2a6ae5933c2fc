"""Fine-tune a small Qwen3-VL on easy-vqa, measure what it gained, ask it.

    python qwen-vl-finetune/demo/quickstart.py [--output-dir output/quickstart] [--minutes 4]

    easy-vqa -> data/{train,test}.jsonl, data/images                       convert
      base checkpoint -> qwenvl-eval infer -> base.jsonl                   measure
      base checkpoint -> torchrun train_qwen.py -> checkpoint/             train
      checkpoint/ -> qwenvl-eval infer -> tuned.jsonl                      measure again
      -> table, a few questions aloud, report.html                         show

Every stage can be interrupted; the same command goes on where it was. A finished run prints its table again.
"""

from __future__ import annotations

import argparse
import ctypes
import fcntl
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import IO, Any

import easy_vqa
from PIL import Image, ImageOps
from quickstart_report import Curve, Row, Shown, write_report

from qwenvl_eval import Prediction, Predictions, blind_accuracy, build, verdict_of
from qwenvl_eval.tasks.conversations import question_answer_pairs
from qwenvl_eval.tasks.easyvqa import EasyVqa

ROOT = Path(__file__).resolve().parents[2]
TRAIN_SCRIPT = ROOT / "qwen-vl-finetune" / "qwenvl" / "train" / "train_qwen.py"
SEED = 0

# Questions about one picture are turns of one conversation, so that it is looked at once for all of them. Not
# too many: a late answer can be guessed from those before it, which teaches nothing about looking.
QUESTIONS_PER_CONVERSATION = 5
MIRROR_PICTURES = True

TRAINING_FLAGS = {
    "tune_mm_llm": True,
    "tune_mm_mlp": True,
    "tune_mm_vision": True,
    "muon": True,
    "model_max_length": 1024,
    "min_pixels": 128 * 128,
    "max_pixels": 512 * 512,
    "per_device_train_batch_size": 16,
    "num_train_epochs": 30,
    "learning_rate": 2e-3,
    "warmup_ratio": 0.03,
    "lr_scheduler_type": "cosine",
    "logging_steps": 10,
    "logging_first_step": True,
    "save_steps": 200,
    "save_total_limit": 2,
    "report_to": "none",
    "seed": SEED,
}
MAX_NEW_TOKENS = 8  # no answer of easy-vqa is longer
QUESTIONS_ALOUD = 6
SECONDS_TO_WAIT_FOR_ANOTHER_RUN = 60


class StageError(Exception):
    """A stage's command failed; what it printed says why."""


@dataclass(frozen=True)
class Workplace:
    """The output folder: what is in it, and which stages are done."""

    folder: Path
    lock: IO[str]

    @property
    def data(self) -> Path:
        return self.folder / "data"

    @property
    def checkpoint(self) -> Path:
        return self.folder / "checkpoint"

    @property
    def report(self) -> Path:
        return self.folder / "report.html"

    def predictions(self, name: str) -> Path:
        return self.folder / f"{name}.jsonl"

    def check_settings(self, settings: dict[str, Any]) -> None:
        """Keep the settings at the first start; refuse others later."""
        path = self.folder / "settings.json"
        if not path.exists():
            _write_whole(path, json.dumps(settings, indent=2))
            return
        kept = json.loads(path.read_text())
        for name in sorted(kept.keys() | settings.keys()):
            if kept.get(name) != settings.get(name):
                raise ValueError(
                    f"{self.folder} holds a run with another {name} ({kept.get(name)} there, "
                    f"{settings.get(name)} here); choose another --output-dir or delete it"
                )

    def is_done(self, stage: str) -> bool:
        return (self.folder / f".{stage}-done").exists()

    def mark_done(self, stage: str) -> None:
        (self.folder / f".{stage}-done").touch()


@contextmanager
def open_workplace(folder: Path) -> Iterator[Workplace]:
    """Hold the output folder alone. The stages' commands inherit the lock and keep it while they live."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("a") as lock:
        deadline = time.monotonic() + SECONDS_TO_WAIT_FOR_ANOTHER_RUN
        told = False
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise ValueError(f"{folder}: another quickstart works there; let it end first") from None
            if not told:
                print(f"{folder} is in use by an earlier run; waiting for it to end", flush=True)
                told = True
            time.sleep(0.2)
        yield Workplace(folder, lock)


def _write_whole(path: Path, text: str) -> None:
    """The file is there with all of the text, or not at all."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


# easy-vqa in the conversation format


def convert(data: Path, test_questions: int) -> None:
    """Write pictures, train.jsonl, test.jsonl and datasets.toml; easy-vqa's own split."""
    train = _by_picture(easy_vqa.get_train_questions())
    test = _by_picture(easy_vqa.get_test_questions())
    shuffled = random.Random(SEED)
    rows = []
    for picture, path in sorted(easy_vqa.get_train_image_paths().items()):
        for image in _save_views(Path(path), data, f"images/train/{picture}"):
            pairs = shuffled.sample(train[picture], len(train[picture]))
            for start in range(0, len(pairs), QUESTIONS_PER_CONVERSATION):
                rows.append(_row(image, pairs[start : start + QUESTIONS_PER_CONVERSATION]))
    _write_whole(data / "train.jsonl", "".join(rows))
    test_rows = list(_test_rows(data, test, test_questions))
    _write_whole(data / "test.jsonl", "".join(test_rows))
    _write_whole(data / "datasets.toml", '[easy_vqa]\nannotation_path = "train.jsonl"\ndata_path = "."\n')
    print(f"{len(rows):,} training conversations, {len(test_rows):,} test questions: {data}")


def _by_picture(split: tuple[list[str], list[str], list[int]]) -> dict[int, list[tuple[str, str]]]:
    found: dict[int, list[tuple[str, str]]] = defaultdict(list)
    for question, answer, picture in zip(*split, strict=True):
        found[picture].append((question, answer))
    return found


def _save_views(source: Path, data: Path, name: str) -> list[str]:
    """The picture, and its mirror image: no answer of easy-vqa depends on left and right."""
    (data / name).parent.mkdir(parents=True, exist_ok=True)
    with Image.open(source) as opened:
        picture = opened.convert("RGB")
    views = {f"{name}.png": picture}
    if MIRROR_PICTURES:
        views[f"{name}-mirrored.png"] = ImageOps.mirror(picture)
    for path, view in views.items():
        view.save(data / path, compress_level=1)
    return list(views)


def _row(image: str, pairs: Sequence[tuple[str, str]]) -> str:
    turns = []
    for number, (question, answer) in enumerate(pairs):
        turns.append({"from": "human", "value": question if number else f"<image>\n{question}"})
        turns.append({"from": "gpt", "value": answer})
    return json.dumps({"image": image, "conversations": turns}) + "\n"


def _test_rows(data: Path, test: dict[int, list[tuple[str, str]]], questions: int) -> Iterator[str]:
    """All questions of seeded pictures, a row each, until there are at least ``questions``."""
    paths = easy_vqa.get_test_image_paths()
    (data / "images" / "test").mkdir(parents=True, exist_ok=True)
    written = 0
    for picture in random.Random(SEED).sample(sorted(test), len(test)):
        if written >= questions:
            return
        image = f"images/test/{picture}.png"
        shutil.copyfile(paths[picture], data / image)
        for pair in test[picture]:
            yield _row(image, [pair])
        written += len(test[picture])


# The commands


def _evaluate(place: Workplace, model: Path, name: str) -> None:
    flags = {
        "model-path": model,
        "data-dir": place.data / "test.jsonl",
        "output-file": place.predictions(name),
        "max-new-tokens": MAX_NEW_TOKENS,
        "engine": "transformers",
    }
    _run(place, [sys.executable, "-m", "qwenvl_eval.cli", "infer", "easyvqa", *as_flags(flags)])


def _train(place: Workplace, model: Path, minutes: float) -> None:
    flags = {
        "model_name_or_path": model,
        "dataset_config": place.data / "datasets.toml",
        "dataset_use": "easy_vqa",
        "output_dir": place.checkpoint,
        "max_minutes": minutes,
        **TRAINING_FLAGS,
    }
    command, threads = training_command(flags)
    _run(place, command, environment=threads)


def training_processes() -> int:
    """One a GPU, without one two where there are two cores."""
    import torch

    return torch.cuda.device_count() or min(2, os.cpu_count() or 1)


def training_command(flags: dict[str, Any]) -> tuple[list[str], dict[str, str]]:
    """torchrun with train_qwen.py and these flags; what it adds to the environment."""
    processes = training_processes()
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    threads = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // processes))}
    return [*command, str(TRAIN_SCRIPT), *as_flags(flags)], threads


def as_flags(flags: dict[str, Any]) -> list[str]:
    return [str(part) for name, value in flags.items() for part in (f"--{name}", value)]


def _run(place: Workplace, command: list[str], environment: dict[str, str] | None = None) -> None:
    """Run a stage's command in the foreground; it ends when this process does."""
    with subprocess.Popen(
        command,
        env=os.environ | (environment or {}),
        pass_fds=[place.lock.fileno()],
        preexec_fn=_end_with_parent,
    ) as process:
        try:
            status = process.wait()
        except KeyboardInterrupt:
            process.terminate()
            process.wait()
            raise
    if status:
        raise StageError(f"`{' '.join(command[1:4])} ...` ended with status {status}, see above")


def _end_with_parent() -> None:
    """In the child: be told to end when the parent dies, even where it is killed (Linux)."""
    if sys.platform == "linux":
        set_parent_death_signal = 1
        ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGTERM)


# What came of it


def read_curve(checkpoint: Path) -> Curve:
    """The loss curve and the speed the trainer logged."""
    history = json.loads((checkpoint / "trainer_state.json").read_text())["log_history"]
    lines = [line for line in history if "loss" in line]
    if not lines:
        raise ValueError(f"{checkpoint}/trainer_state.json: not one step was made; give more --minutes")
    steps = [line["step"] for line in lines]
    covered = [step - before for before, step in pairwise([0, *steps])]

    def rate(name: str) -> float:
        # Steps are alike, so the time of a line's steps is their number over its rate.
        return steps[-1] / sum(count / line[name] for count, line in zip(covered, lines, strict=True))

    return Curve(
        [(line["step"], line["loss"]) for line in lines],
        rate("samples_per_second"),
        rate("tokens_per_second"),
    )


def read_rows(place: Workplace) -> list[Row]:
    """The three lines of the table."""
    rows = []
    for label, name in (("base", "base"), ("fine-tuned", "tuned")):
        predictions = Predictions(place.predictions(name))
        report = build(EasyVqa(), predictions)
        rows.append(Row(label, report.headline.accuracy, report.speed.samples, report.speed.tokens))
    training = question_answer_pairs(place.data / "train.jsonl")
    return [Row("without looking", blind_accuracy(predictions, training), None, None), *rows]


def print_table(rows: Sequence[Row], curve: Curve) -> None:
    """The table, the speed of training, and the line that says how good it became."""
    print(f"\n{'':17}{'accuracy':>9}{'95 % interval':>19}{'samples/s':>12}{'tokens/s':>11}")
    for row in rows:
        score = row.accuracy
        interval = f"{100 * score.low:.1f} to {100 * score.high:.1f} %"
        speeds = ("-", "-")
        if row.samples_per_second is not None and row.tokens_per_second is not None:
            speeds = (f"{row.samples_per_second:.1f}", f"{row.tokens_per_second:,.0f}")
        print(f"{row.name:17}{100 * score.value:>7.1f} %{interval:>19}{speeds[0]:>12}{speeds[1]:>11}")
    score = rows[-1].accuracy
    print(
        f"\n{score.total:,} test questions about {score.clusters} pictures never trained on. Without looking:"
    )
    print("the most frequent training answer to the same question text.")
    print(
        f"Training: {curve.steps[-1][0]:,} steps, {curve.conversations_per_second:.1f} conversations/s "
        f"(each of up to {QUESTIONS_PER_CONVERSATION} questions), {curve.tokens_per_second:,.0f} tokens/s."
    )
    print(f"fine-tuned accuracy: {100 * score.value:.1f} %")


def ask_aloud(place: Workplace) -> None:
    """Ask the fine-tuned checkpoint a few test questions, printing the answers as they come."""
    from transformers.utils.logging import disable_progress_bar

    from qwen_vl_serve import GREEDY, TextDelta, open_backend

    disable_progress_bar()
    samples = list(EasyVqa().open(place.data / "test.jsonl"))
    backend = open_backend(place.checkpoint)
    for sample in random.Random(SEED + 1).sample(samples, min(QUESTIONS_ALOUD, len(samples))):
        picture, question = place.data / sample.cluster, sample.target["question"]
        print(f"{_short(picture)}: {question} ", end="", flush=True)
        for event in backend.stream(sample.messages, GREEDY):
            if isinstance(event, TextDelta):
                print(event.text, end="", flush=True)
        print(f"   (right: {sample.target['answer']})")


def shown(place: Workplace) -> list[Shown]:
    """All predictions of the fine-tuned checkpoint, in a seeded order."""
    predictions = list(Predictions(place.predictions("tuned")))

    def show(p: Prediction) -> Shown:
        right = verdict_of(EasyVqa(), "exact", p).right
        return Shown(place.data / p.cluster, p.target["question"], p.answer, p.target["answer"], right)

    return [show(p) for p in random.Random(SEED).sample(predictions, len(predictions))]


def print_next(place: Workplace, model: Path) -> None:
    """What to type next."""
    question = '"what color is the shape?"'
    picture = next((place.data / "images" / "test").iterdir())
    ask = Path(sys.executable).with_name("qwenvl-ask")
    print("\nNext:")
    print(f"  see it            {_short(place.report)} in a browser")
    print(
        f"  ask it            {_short(ask)} {_short(place.checkpoint)} --image {_short(picture)} {question}"
    )
    print(f"  ask the base      {_short(ask)} {_short(model)} --image {_short(picture)} {question}")
    print("  your own data     qwen-vl-finetune/README.md")


def _short(path: Path) -> str:
    return os.path.relpath(path) if path.is_relative_to(Path.cwd()) else str(path)


# The whole way


def quickstart(place: Workplace, model: Path, minutes: float, test_questions: int) -> None:
    """Go through the stages that are not done yet."""
    place.check_settings(
        {"model": str(model), "minutes": minutes, "test_questions": test_questions}
        | {"questions_per_conversation": QUESTIONS_PER_CONVERSATION, "mirror_pictures": MIRROR_PICTURES}
        | {f"training flag {name}": value for name, value in TRAINING_FLAGS.items()}
    )
    began = time.monotonic()
    stages = {
        "data": ("easy-vqa becomes conversations", lambda: convert(place.data, test_questions)),
        "base": ("the base checkpoint answers the test questions", lambda: _evaluate(place, model, "base")),
        "train": (f"training, at most {minutes:g} minutes", lambda: _train(place, model, minutes)),
        "tuned": (
            "the fine-tuned checkpoint answers them",
            lambda: _evaluate(place, place.checkpoint, "tuned"),
        ),
    }
    finished = place.report.exists()
    for number, (stage, (title, work)) in enumerate(stages.items(), 1):
        if place.is_done(stage):
            continue
        print(f"\n[{number}/{len(stages)}] {title}", flush=True)
        work()
        place.mark_done(stage)
    for leftover in place.checkpoint.glob("checkpoint-*"):
        shutil.rmtree(leftover)

    rows, curve = read_rows(place), read_curve(place.checkpoint)
    if finished:
        print(f"{place.folder} holds a finished run; delete it to start anew")
    print_table(rows, curve)
    if not finished:
        print("\nAsking it:")
        ask_aloud(place)
        write_report(place.report, rows, curve, shown(place))
        print(f"\nDone in {(time.monotonic() - began) / 60:.1f} minutes.")
    print_next(place, model)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Fine-tune a small Qwen3-VL on easy-vqa, measure it, ask it."
    )
    parser.add_argument("--output-dir", type=Path, default=ROOT / "output" / "quickstart")
    parser.add_argument("--minutes", type=float, default=4.0, help="longest training (default: %(default)s)")
    parser.add_argument(
        "--model", type=Path, default=ROOT / "models" / "qwen3-vl-nano", help="where to start"
    )
    parser.add_argument("--test-questions", type=int, default=2000, help="at least so many (%(default)s)")
    return parser


def _interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


def main() -> int:
    """The command; returns the exit status."""
    arguments = _parser().parse_args()
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        if arguments.minutes <= 0 or arguments.test_questions < 1:
            raise ValueError("--minutes and --test-questions must be positive")
        if not (arguments.model / "config.json").is_file():
            raise ValueError(f"--model {arguments.model}: no checkpoint there (config.json is missing)")
        with open_workplace(arguments.output_dir.resolve()) as place:
            quickstart(place, arguments.model.resolve(), arguments.minutes, arguments.test_questions)
    except (ValueError, StageError) as error:
        print(f"quickstart: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nquickstart: stopped; the same command goes on where it was", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
