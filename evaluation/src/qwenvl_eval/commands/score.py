"""``qwenvl-eval score``: what a file of predictions comes to, under one protocol or under each."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from qwenvl_eval.commands.flags import check_output, positive
from qwenvl_eval.judge import CREDENTIALS, open_judge
from qwenvl_eval.report import Report, as_json, as_text, blind_accuracy, build
from qwenvl_eval.store import Predictions, Run
from qwenvl_eval.task import Task, task_class
from qwenvl_eval.tasks.conversations import question_answer_pairs


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("predictions", type=Path, help="what `qwenvl-eval infer` wrote")
    parser.add_argument("--protocol", default="", help='a name, or "all" (default: the headline\'s)')
    parser.add_argument("--output-file", type=Path, help="write everything there as JSON")
    parser.add_argument(
        "--train-annotations", type=Path,
        help="also score answering without looking: the most frequent answer here to the same question",
    )  # fmt: skip
    add_judge(parser)
    parser.set_defaults(command=_run)


def add_judge(parser: argparse.ArgumentParser) -> None:
    """What says which model decides where a rule can't."""
    group = parser.add_argument_group("judge model")
    group.add_argument("--eval-model", help="its name; rulings are kept beside the predictions")
    group.add_argument("--api-type", choices=tuple(CREDENTIALS), help="address and key are in variables")
    group.add_argument("--judge-url", help="or: the address of an OpenAI-compatible endpoint")
    group.add_argument(
        "--nproc", type=positive, default=32, help="questions to the judge at once (default: 32)"
    )


def scored(predictions: Path, arguments: argparse.Namespace, protocol: str) -> Report:
    """The report, with the judge's protocol where one is named."""
    found = Predictions(predictions)
    task = task_of(found.run)
    if arguments.eval_model is None:
        if arguments.api_type or arguments.judge_url:
            raise ValueError("--api-type and --judge-url say where a judge is; name it with --eval-model")
        return build(task, found, protocol)
    judge = open_judge(
        arguments.eval_model, predictions.with_suffix(".judge.jsonl"), api_type=arguments.api_type,
        base_url=arguments.judge_url, concurrency=arguments.nproc,
    )  # fmt: skip
    with judge:
        return build(task, found, protocol, judge)


def _run(arguments: argparse.Namespace) -> None:
    check_output(arguments.output_file, arguments.predictions)
    report = scored(arguments.predictions, arguments, arguments.protocol)
    print(as_text(report))
    if arguments.train_annotations is not None:
        training = question_answer_pairs(arguments.train_annotations)
        print(f"{'without looking':16} {blind_accuracy(Predictions(arguments.predictions), training)}")
    if arguments.output_file is not None:
        write_json(report, arguments.output_file)


def task_of(run: Run) -> Task:
    """The task of a run with its options."""
    return task_class(run.task)(**run.options)


def write_json(report: Report, path: Path) -> None:
    """Everything that was found, for programs."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(as_json(report), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
