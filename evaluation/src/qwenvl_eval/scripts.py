"""``evaluation/*/run_*.py infer|eval``: the command line of Qwen's evaluation scripts.

infer --model-path M --data-dir D --output-file P.jsonl     ask the questions and keep the answers
eval --input-file P.jsonl --output-file R.json              what they come to

``infer`` is ``qwenvl-eval infer TASK`` and ``eval`` is ``qwenvl-eval score --protocol all``, flags included.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

from qwenvl_eval.cli import run
from qwenvl_eval.commands import infer
from qwenvl_eval.commands.flags import check_output
from qwenvl_eval.commands.score import add_judge, scored, task_of, write_json
from qwenvl_eval.page import open_data
from qwenvl_eval.report import as_text
from qwenvl_eval.store import Predictions, Run
from qwenvl_eval.task import Task, task_class


def main(task: str, argv: Sequence[str] | None = None) -> int:
    """What a ``run_*.py`` does; returns the exit status. ``task``: as in :func:`task_names`."""
    parser = script_parser(task)
    return run(parser.prog, lambda: parser.parse_args(argv))


def script_parser(task: str) -> argparse.ArgumentParser:
    """``infer`` and ``eval`` with their flags."""
    kind = task_class(task)
    parser = argparse.ArgumentParser(description=f"{kind.title}: {' '.join((kind.__doc__ or '').split())}")
    add = parser.add_subparsers(required=True, metavar="infer|eval").add_parser
    asking = add("infer", help="ask the questions and keep the answers")
    asking.set_defaults(command=lambda arguments: infer.run(arguments, kind), task=task)
    infer.add_flags(asking, kind)
    if not _has_dataset(kind):
        asking.add_argument("--dataset", choices=[kind.title], help="there is no other")
    _add_eval(add("eval", help="what the answers come to, under each protocol"), task, kind)
    return parser


def _has_dataset(kind: type[Task]) -> bool:
    return any(item.name == "dataset" for item in fields(kind))


def _add_eval(parser: argparse.ArgumentParser, task: str, kind: type[Task]) -> None:
    parser.add_argument("--input-file", type=Path, required=True, metavar="P.jsonl", help="what infer wrote")
    parser.add_argument(
        "--output-file", type=Path, required=True, metavar="R.json", help="the report, as JSON"
    )
    parser.add_argument(
        "--data-dir", type=Path, help="refuse answers to other data than this (default: not looked at)"
    )
    parser.add_argument("--dataset", help="refuse answers to another data set than this")
    add_judge(parser)
    parser.set_defaults(command=lambda arguments: _evaluate(arguments, task, kind))


def _evaluate(arguments: argparse.Namespace, task: str, kind: type[Task]) -> None:
    path, output = arguments.input_file, arguments.output_file
    check_output(output, path)
    _check(Predictions(path).run, path, arguments, task, kind)
    report = scored(path, arguments, "all")
    print(as_text(report))
    write_json(report, output)
    print(f"{'written':16} {output}")


def _check(run: Run, path: Path, arguments: argparse.Namespace, task: str, kind: type[Task]) -> None:
    """Raises ValueError for answers to something else than was named."""
    if run.task != task:
        raise ValueError(f"{path} holds answers to {run.task}, not to {task}; give that of run infer here")
    found = run.options.get("dataset", kind.title)
    if arguments.dataset not in (None, found):
        raise ValueError(f"{path} holds answers to {found}, not to {arguments.dataset}; drop --dataset")
    if arguments.data_dir is not None:
        dataset = open_data(task_of(run), arguments.data_dir, run)
        if isinstance(dataset, str):
            raise ValueError(f"{path}: {dataset}")
