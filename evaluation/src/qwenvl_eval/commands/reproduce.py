"""``qwenvl-eval reproduce``: make a run again from its file, and refuse where something is not the same."""

from __future__ import annotations

import argparse
from pathlib import Path

from qwenvl_eval.commands import infer
from qwenvl_eval.commands.flags import check_output
from qwenvl_eval.commands.score import task_of
from qwenvl_eval.provenance import sampling_of
from qwenvl_eval.store import Predictions, Run


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("predictions", type=Path, help="the run that is to be made again")
    parser.add_argument("--output-file", type=Path, required=True, help="the new predictions")
    parser.add_argument("--model-path", help="where the same weights lie now")
    parser.add_argument("--data-dir", help="where the same data lies now")
    parser.add_argument(
        "--other-versions", action="store_true", help="take other versions of code and packages"
    )
    infer.add_engine(parser)
    parser.set_defaults(command=_run)


def _run(arguments: argparse.Namespace) -> int:
    check_output(arguments.output_file, arguments.predictions)
    old = Predictions(arguments.predictions)
    run = old.run
    arguments.model_path = arguments.model_path or run.model
    arguments.data_dir = arguments.data_dir or run.data
    arguments.engine = arguments.engine or run.engine
    arguments.replicates = run.replicates

    def check(now: Run) -> None:
        different = run.difference(now)
        if not arguments.other_versions:
            if run.revision != now.revision:
                different.append(
                    f"code {run.revision[:12]} there, {now.revision[:12]} here (--other-versions)"
                )
            different += [
                f"{name} {run.versions.get(name)} there, {now.versions.get(name)} here (--other-versions)"
                for name in sorted({*run.versions, *now.versions})
                if run.versions.get(name) != now.versions.get(name)
            ]
        if different:
            raise ValueError(f"{old.path} can't be made again: {'; '.join(different)}")

    failed = infer.execute(arguments, run.task, task_of(run), sampling_of(run), check=check)
    same = _same_answers(old, Predictions(arguments.output_file))
    return 0 if same and not failed else 1


def _same_answers(old: Predictions, new: Predictions) -> bool:
    """Whether all answers are the same; says how many. Raises ValueError where another question was asked."""
    before = {(p.index, p.replicate): (p.key, p.answer, p.finish_reason) for p in old}
    different = []
    for p in new:
        key, answer, reason = before.get((p.index, p.replicate), ("", "", ""))
        if key != p.key:
            raise ValueError(
                f"{new.path}: sample {p.id} was asked with other media or another prompt than before"
            )
        if (answer, reason) != (p.answer, p.finish_reason):
            different.append(p.id)
    print(f"{len(new) - len(different)} of {len(old)} answers are the same")
    if different:
        print(f"not the same: {', '.join(different[:10])}{' ...' if len(different) > 10 else ''}")
    return not different and len(new) == len(old)
