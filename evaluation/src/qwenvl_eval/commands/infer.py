"""``qwenvl-eval infer TASK``: ask the questions and keep the answers; ``run`` scores and reports them too."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from qwen_vl_serve import Sampling, open_backend
from qwenvl_eval.commands import flags
from qwenvl_eval.media import Describe, describe_with
from qwenvl_eval.provenance import describe_run
from qwenvl_eval.runner import infer, questions
from qwenvl_eval.store import Run, Store
from qwenvl_eval.task import Task, task_class, task_names

Then = Callable[[argparse.Namespace], int | None]
Check = Callable[[Run], None]


def add(parser: argparse.ArgumentParser, task: str = "", *, then: Then | None = None) -> None:
    """``task`` as it stands on the command line: its options become flags. ``then`` runs after all is
    answered.
    """
    parser.add_argument("task", metavar="TASK", help=f"{', '.join(task_names())}, or a .py file with one")
    kind = task_class(task) if task and not task.startswith("-") else None
    parser.set_defaults(command=lambda arguments: run(arguments, kind or task_class(arguments.task), then))
    add_flags(parser, kind)


def add_flags(parser: argparse.ArgumentParser, kind: type[Task] | None) -> None:
    """What says who is asked, what, and how."""
    parser.add_argument(
        "--model-path", required=True, help="checkpoint folder, hub id, or an endpoint's address"
    )
    flags.add_data(parser)
    parser.add_argument(
        "--output-file", required=True, type=Path, help="predictions; an unfinished file goes on"
    )
    if kind is not None:
        flags.add_options(parser, kind)
    flags.add_sampling(parser, (kind or Task).presets)
    parser.add_argument("--replicates", type=flags.positive, default=1, help="ask everything so many times")
    add_engine(parser)


def add_engine(parser: argparse.ArgumentParser) -> None:
    """What says by which engine, and how."""
    group = parser.add_argument_group("engine")
    group.add_argument(
        "--engine",
        choices=("transformers", "vllm", "openai"),
        help="default: openai for an address, else vllm where it is installed, else transformers",
    )
    group.add_argument("--adapter", type=Path, help="folder of a LoRA adapter")
    group.add_argument(
        "--batch-size", type=flags.positive, default=64, help="transformers: questions at once"
    )
    group.add_argument("--device", help="transformers: cpu, cuda, cuda:1")
    group.add_argument(
        "--concurrency", type=flags.positive, default=64, help="vllm, openai: questions at once"
    )
    group.add_argument("--tensor-parallel-size", type=flags.positive, help="vllm: GPUs")
    group.add_argument("--gpu-memory-utilization", type=float, help="vllm: share of each GPU")
    group.add_argument(
        "--max-model-len", type=flags.positive, help="vllm: longest prompt and answer, in tokens"
    )
    group.add_argument("--max-images-per-prompt", type=flags.positive, help="vllm")
    group.add_argument("--max-videos-per-prompt", type=flags.positive, help="vllm")
    group.add_argument("--model-name", help="openai: the model's name there, where it serves several")
    group.add_argument("--api-key", help="openai: default: the variable OPENAI_API_KEY")
    group.add_argument("--timeout", type=float, default=600.0, help="openai: seconds without a sign of life")
    group.add_argument("--retries", type=int, default=8, help="openai: with growing pauses (default: 8)")
    group.add_argument(
        "--processor", help="openai: checkpoint whose processor tells the sizes that the model sees"
    )


def run(arguments: argparse.Namespace, kind: type[Task], then: Then | None = None) -> int | None:
    """Ask everything that has no answer yet; exit status 1 where questions failed."""
    task = flags.task_from(arguments, kind)
    sampling = flags.sampling_from(arguments, kind.presets)
    failed = execute(arguments, arguments.task, task, sampling)
    status = then(arguments) if then else None
    return 1 if failed else status


def execute(
    arguments: argparse.Namespace,
    name: str,
    task: Task,
    sampling: Sampling,
    *,
    check: Check = lambda run: None,
) -> int:
    """Ask what is left; how many questions failed. ``check`` sees the run before anything is asked and may
    refuse.
    """
    data = flags.data_from(arguments)
    dataset = task.open(data)
    engine = _engine(arguments)
    backend = _open(arguments, engine) if engine == "openai" else None
    try:
        run = describe_run(
            name, task, data, dataset, arguments.model_path, sampling,
            replicates=arguments.replicates, engine=engine, adapter=arguments.adapter,
            served=backend.name if backend else "",
        )  # fmt: skip
        check(run)
        with Store(arguments.output_file, run) as store:
            asked = questions(dataset, sampling, arguments.replicates)
            if len(store) >= run.samples * run.replicates and all(q.key in store for q in asked):
                return 0
            backend = backend or _open(arguments, engine)
            outcome = infer(
                backend, dataset, store, sampling, replicates=arguments.replicates,
                batch_size=arguments.batch_size, concurrency=arguments.concurrency,
                describe=_describe(arguments),
            )  # fmt: skip
    finally:
        if backend is not None:
            backend.close()
    if outcome.failed:
        print(
            f"qwenvl-eval: {outcome.failed} questions failed; the same command asks them again",
            file=sys.stderr,
        )
    return outcome.failed


def _describe(arguments: argparse.Namespace) -> Describe | None:
    """An endpoint does not tell its processor: without ``--processor`` only hashes are kept."""
    source = arguments.processor or (None if "://" in arguments.model_path else arguments.model_path)
    if source is None:
        return None
    from transformers import AutoProcessor

    return describe_with(AutoProcessor.from_pretrained(source))


def _engine(arguments: argparse.Namespace) -> Any:
    if arguments.engine:
        return arguments.engine
    if "://" in arguments.model_path:
        return "openai"
    return "vllm" if find_spec("vllm") else "transformers"


def _open(arguments: argparse.Namespace, engine: Any) -> Any:
    options: dict[str, Any] = {}
    if engine == "openai":
        options = {"name": arguments.model_name, "api_key": arguments.api_key, "retries": arguments.retries}
        options |= {"timeout": arguments.timeout, "concurrency": arguments.concurrency}
    elif engine == "transformers":
        options = {"device": arguments.device}
    else:
        names = ("tensor_parallel_size", "gpu_memory_utilization", "max_model_len")
        options = {name: getattr(arguments, name) for name in names if getattr(arguments, name) is not None}
        limits = {"image": arguments.max_images_per_prompt, "video": arguments.max_videos_per_prompt}
        if any(limits.values()):
            options["limit_mm_per_prompt"] = {kind: limit or 1 for kind, limit in limits.items()}
    print(f"engine: {engine}", file=sys.stderr)
    return open_backend(arguments.model_path, engine=engine, adapter=arguments.adapter, **options)
