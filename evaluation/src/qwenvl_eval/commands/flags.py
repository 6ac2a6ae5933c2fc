"""Flags that several commands share."""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping
from dataclasses import MISSING, fields, replace
from pathlib import Path
from typing import Any, get_args, get_type_hints

from qwen_vl_serve import Sampling
from qwenvl_eval.task import Task


def positive(text: str) -> int:
    """A whole number from 1 up."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text}: give a whole number from 1 up")
    return value


def add_options(parser: argparse.ArgumentParser, kind: type[Task]) -> None:
    """A flag for each option of a task."""
    group = parser.add_argument_group(f"options of {kind.title}")
    hints = get_type_hints(kind)
    for item in fields(kind):
        assert item.default is not MISSING, f"{kind.__name__}.{item.name} needs a default"
        name, help = f"--{item.name.replace('_', '-')}", item.metadata.get("help")
        if hints[item.name] is bool:
            group.add_argument(name, action=argparse.BooleanOptionalAction, default=item.default, help=help)
        else:
            shown = f"{help} (default: {item.default})" if item.default not in ("", 0, None) else help
            group.add_argument(name, type=type_of(hints[item.name]), default=item.default, help=shown)


def type_of(hint: Any) -> type:
    """int, float or str of a hint such as ``int | None``."""
    return next((kind for kind in (int, float) if kind is hint or kind in get_args(hint)), str)


def task_from(arguments: argparse.Namespace, kind: type[Task]) -> Task:
    """The task with the options that were given."""
    return kind(**{item.name: getattr(arguments, item.name) for item in fields(kind)})


def add_sampling(parser: argparse.ArgumentParser, presets: Mapping[str, Sampling]) -> None:
    """``--preset`` and a flag for each parameter, which wins over the preset."""
    group = parser.add_argument_group("sampling")
    first = next(iter(presets))
    group.add_argument(
        "--preset", choices=tuple(presets), default=first, help=f"published values (default: {first})"
    )
    group.add_argument("--max-new-tokens", type=positive)
    group.add_argument("--temperature", type=float, help="0 is greedy")
    group.add_argument("--top-p", type=float)
    group.add_argument("--top-k", type=_top_k, help="0 or -1: all tokens")
    group.add_argument("--repetition-penalty", type=float)
    group.add_argument("--presence-penalty", type=float)
    group.add_argument(
        "--seed", type=int, default=0, help="of sampling; replicate r takes seed + r (default: 0)"
    )


def sampling_from(arguments: argparse.Namespace, presets: Mapping[str, Sampling]) -> Sampling:
    """The preset with the parameters that were given in its place."""
    names = (
        "max_new_tokens",
        "temperature",
        "top_p",
        "top_k",
        "repetition_penalty",
        "presence_penalty",
        "seed",
    )
    given = {name: getattr(arguments, name) for name in names if getattr(arguments, name) is not None}
    return replace(presets[arguments.preset], **given)


def check_output(output: Path | None, *inputs: Path) -> None:
    """Raises ValueError where what is written would take the place of what is read."""
    for path in inputs:
        if output is not None and output.exists() and path.exists() and output.samefile(path):
            raise ValueError(f"{path}: --output-file would overwrite it; choose another name")


def add_data(parser: argparse.ArgumentParser) -> None:
    """``--data-dir``, for which the variable LMUData stands where it is not given."""
    parser.add_argument(
        "--data-dir", type=Path, default=os.environ.get("LMUData"),  # noqa: SIM112
        help="the benchmark's files, or a hub id where the task takes one (default: the variable LMUData)",
    )  # fmt: skip


def data_from(arguments: argparse.Namespace) -> Path:
    """Raises ValueError where neither the flag nor the variable says where the data is."""
    if arguments.data_dir is None:
        raise ValueError("say where the data is with --data-dir, or with the variable LMUData")
    return Path(arguments.data_dir)


def _top_k(text: str) -> int:
    return max(0, int(text))
