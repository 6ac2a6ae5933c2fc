"""``qwenvl-eval compare``: two files of predictions, sample by sample."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from qwenvl_eval.commands.flags import check_output
from qwenvl_eval.commands.score import task_of
from qwenvl_eval.comparison import as_json, as_text, compare_runs
from qwenvl_eval.store import Predictions


def add(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Say which of two runs on the same questions is better, by how much, and whether that is chance. "
        "Runs of other tasks, options or data are refused."
    )
    parser.add_argument("first", type=Path, metavar="A.jsonl", help="what `qwenvl-eval infer` wrote")
    parser.add_argument("second", type=Path, metavar="B.jsonl", help="the same questions asked otherwise")
    parser.add_argument("--protocol", default="", help="a name (default: the headline's)")
    parser.add_argument(
        "--output-file", type=Path, metavar="F.json",
        help="write everything there, with each answer that one run alone got right",
    )  # fmt: skip
    parser.set_defaults(command=_run)


def _run(arguments: argparse.Namespace) -> None:
    output: Path | None = arguments.output_file
    check_output(output, arguments.first, arguments.second)
    first, second = Predictions(arguments.first), Predictions(arguments.second)
    found = compare_runs(first, second, task_of, arguments.protocol)
    print(as_text(found))
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        written = json.dumps(as_json(found), indent=1, ensure_ascii=False)
        output.write_text(f"{written}\n", encoding="utf-8")
