"""``qwenvl-eval list``."""

from __future__ import annotations

import argparse

from qwenvl_eval.task import task_class, task_names


def add(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(command=_run)


def _run(arguments: argparse.Namespace) -> None:
    for name in task_names():
        kind = task_class(name)
        print(f"{name:14} {kind.title}: {' '.join((kind.__doc__ or '').split())}")
        print(f"{'':14} protocols {', '.join(kind.protocols)}; presets {', '.join(kind.presets)}")
