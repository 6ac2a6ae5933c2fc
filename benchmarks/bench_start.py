"""How long training takes to start: --help, and the first step of the quickstart.

    .venv/bin/python benchmarks/bench_start.py [--rounds 5] [--quick] [--output FILE]

    parser   python -c: import Trainer and TrainingArguments, print the help of Hugging Face's own parser
    help     train_qwen.py --help, the same flags and ours
      --help names every flag that parser names?--> rounds, in turn --> seconds, difference
    step     torchrun train_qwen.py as the quickstart starts it, until its first step is logged

Goals: help at most 1 s over parser; the first step within 20 s. Results go to benchmarks/results/start.json;
with --quick only where --output says.
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from provenance import provenance

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "qwen-vl-finetune/demo"))
import quickstart  # noqa: E402

GOAL_HELP, GOAL_STEP = 1.0, 20.0
# As make starts them: the first start of each writes the bytecode that the others read.
ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
OWN_PARSER = (
    "from transformers import HfArgumentParser, Trainer, TrainingArguments; "
    "HfArgumentParser(TrainingArguments).print_help()"
)
COMMANDS = {
    "parser": [sys.executable, "-c", OWN_PARSER],
    "help": [sys.executable, str(quickstart.TRAIN_SCRIPT), "--help"],
}


def seconds(command: list[str]) -> tuple[float, str]:
    began = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT)
    taken = time.perf_counter() - began
    if done.returncode:
        sys.exit(f"{' '.join(command[:3])} failed: {done.stderr[-2000:]}")
    return taken, done.stdout


def first_step(folder: Path) -> float:
    """From the start of torchrun to the log line of the first step."""
    command, threads = quickstart.training_command(quickstart.TRAINING_FLAGS | {
        "model_name_or_path": ROOT / "models/qwen3-vl-nano",
        "dataset_config": folder / "data/datasets.toml", "dataset_use": "easy_vqa",
        "output_dir": folder / "out", "max_steps": 1, "save_strategy": "no", "disable_tqdm": True,
    })  # fmt: skip
    environment = ENVIRONMENT | threads | {"PYTHONUNBUFFERED": "1"}
    began, taken = time.perf_counter(), None
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as run:
        assert run.stdout is not None
        lines = []
        for line in run.stdout:
            lines.append(line)
            if taken is None and "'loss'" in line:
                taken = time.perf_counter() - began
    if run.returncode or taken is None:
        sys.exit(f"training failed: {''.join(lines)[-2000:]}")
    return taken


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="1 round: does it run?")
    parser.add_argument("--output", type=Path, help="default: benchmarks/results/start.json")
    options = parser.parse_args()
    rounds = 1 if options.quick else options.rounds
    result = provenance("torch", "transformers")
    texts = {name: seconds(command)[1] for name, command in COMMANDS.items()}
    theirs, ours = (set(re.findall(r"--\w+", texts[name])) for name in COMMANDS)
    # A flag that is off by default has no opposite.
    if missing := {flag for flag in theirs - ours if not flag.startswith("--no_")}:
        sys.exit(f"train_qwen.py --help lacks {', '.join(sorted(missing))}: nothing is timed")
    taken: dict[str, list[float]] = {"parser": [], "help": [], "step": []}
    with tempfile.TemporaryDirectory() as name:
        (Path(name) / "data").mkdir()
        quickstart.convert(Path(name) / "data", 1)
        for _ in range(rounds):
            for side, command in COMMANDS.items():
                taken[side].append(seconds(command)[0])
            taken["step"].append(first_step(Path(name)))
    over = [own - base for own, base in zip(taken["help"], taken["parser"], strict=True)]
    result |= {
        "rounds": rounds,
        "goals": {"help over parser": GOAL_HELP, "step": GOAL_STEP},
        "seconds": {side: spread(times) for side, times in taken.items()},
        "help over parser": spread(over),
    }
    for side, times in result["seconds"].items():
        print(f"  {side:18} {times['median']:5.1f} s ({times['lowest']:.1f} to {times['highest']:.1f})")
    times = result["help over parser"]
    print(f"  help over parser   {times['median']:5.1f} s ({times['lowest']:.1f} to {times['highest']:.1f})")
    print(f"  goals: {GOAL_HELP} s over parser, first step within {GOAL_STEP} s")
    output = options.output or (None if options.quick else ROOT / "benchmarks/results/start.json")
    if output:
        output.write_text(json.dumps(result, indent=2) + "\n")
        print(f"written: {output}")


def spread(times: list[float]) -> dict[str, float]:
    return {"median": statistics.median(times), "lowest": min(times), "highest": max(times)}


if __name__ == "__main__":
    main()
