"""``qwenvl-eval report``: JSON, Markdown and a page with the samples, beside the predictions."""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path

from qwenvl_eval.commands import flags
from qwenvl_eval.commands.score import task_of, write_json
from qwenvl_eval.page import SAMPLES, write_page
from qwenvl_eval.report import Report, as_markdown, as_text, build
from qwenvl_eval.store import Predictions


def add(parser: argparse.ArgumentParser) -> None:
    parser.description = "Write P.json, P.md and P.html beside the predictions P.jsonl and print their paths."
    parser.add_argument("predictions", type=Path, help="what `qwenvl-eval infer` wrote")
    parser.add_argument(
        "--data-dir",
        type=Path,
        help="where the same data lies now, for the pictures (default: as in the run)",
    )
    parser.add_argument(
        "--samples", type=flags.positive, default=SAMPLES,
        help=f"answers on the page: those that went wrong first (default: {SAMPLES})",
    )  # fmt: skip
    parser.set_defaults(command=_run)


def _run(arguments: argparse.Namespace) -> None:
    _, paths, note = write_reports(arguments.predictions, arguments.data_dir, arguments.samples)
    if note:
        print(f"qwenvl-eval: the page is without pictures: {note}", file=sys.stderr)
    for path in paths:
        print(path)


def after_run(arguments: argparse.Namespace) -> None:
    """What ``run`` does once everything is answered: the headline on the terminal, the reports beside it."""
    report, paths, _ = write_reports(arguments.output_file)
    print(as_text(replace(report, summaries=report.summaries[:1], flips=())))
    print(f"{'page':16} {paths[-1]}")


def write_reports(
    path: Path, data: Path | None = None, samples: int = SAMPLES
) -> tuple[Report, list[Path], str]:
    """The report, the paths of JSON, Markdown and page, and why that has no pictures, "" where it has them.

    ``data``: where the run's data lies now, None for where it was. Raises ValueError for predictions that are
    not complete, and where a report would overwrite them.
    """
    paths = [path.with_suffix(suffix) for suffix in (".json", ".md", ".html")]
    for written in paths:
        if written.exists() and written.samefile(path):
            raise ValueError(f"{path}: the report would overwrite it; give its name the ending .jsonl")
    predictions = Predictions(path)
    task = task_of(predictions.run)
    report = build(task, predictions)
    write_json(report, paths[0])
    paths[1].write_text(as_markdown(report), encoding="utf-8")
    note = write_page(paths[2], report, task, predictions, data or Path(predictions.run.data), samples)
    return report, paths, note
