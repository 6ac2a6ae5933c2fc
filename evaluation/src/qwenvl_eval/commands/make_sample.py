"""``qwenvl-eval make-sample TASK FOLDER``: a small set of one's own, in the benchmark's own format."""

from __future__ import annotations

import argparse
from pathlib import Path

from qwenvl_eval.samples import write_sample


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("task", metavar="TASK")
    parser.add_argument("folder", type=Path, metavar="FOLDER")
    parser.set_defaults(command=_run)


def _run(arguments: argparse.Namespace) -> None:
    print(write_sample(arguments.task, arguments.folder))
