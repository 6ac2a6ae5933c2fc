"""Back ends: every one of them is a :class:`~qwen_vl_serve.backends.base.Backend`."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from qwen_vl_serve.backends.base import Backend
from qwen_vl_utils import PERMISSIVE, MediaPolicy

Engine = Literal["transformers", "vllm", "openai"]
PACKAGES: dict[Engine, tuple[str, str]] = {
    "transformers": ("transformers", "pip install qwen-vl-serve"),
    "vllm": ("vllm", "pip install 'qwen-vl-serve[vllm]' (without a GPU: make serve)"),
    "openai": ("openai", "pip install openai"),
}


def open_backend(
    model: str | Path,
    *,
    engine: Engine | None = None,
    adapter: str | Path | None = None,
    policy: MediaPolicy = PERMISSIVE,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    **options: Any,
) -> Backend:
    """The back end that answers with a model.

    ``model``: a checkpoint folder, a model hub's name, or the address of an OpenAI-compatible endpoint
    (``http://127.0.0.1:8000/v1``). ``engine``: "transformers" (the default for a checkpoint), "vllm", or
    "openai" (an address is always that). ``adapter``: a LoRA adapter's folder. ``policy``: what messages may
    fetch and cost; ``MediaPolicy.strict()`` where strangers write them. ``chat_template_kwargs``: for
    instance ``{"enable_thinking": True}``.

    ``options`` belong to the engine. transformers: ``device`` ("cpu", "cuda:1"; without it CUDA where there
    is some), ``attention`` (such as "flash_attention_2"). vllm: the engine's own arguments, such as
    ``tensor_parallel_size``. openai: ``name`` (the model's at the endpoint), ``api_key``, ``concurrency``,
    ``retries``, ``timeout``, ``token_ids``.

    Raises ValueError for a folder that holds no checkpoint, ModuleNotFoundError for an engine that is not
    installed (it says how to install it), OSError for a name nobody knows.
    """
    engine = engine or ("openai" if is_address(model) else "transformers")
    if is_address(model) != (engine == "openai"):
        raise ValueError(
            f"engine={engine!r} does not fit {model}: an address takes 'openai', a checkpoint not"
        )
    package, remedy = PACKAGES[engine]
    if find_spec(package) is None:
        raise ModuleNotFoundError(
            f"the engine {engine!r} needs the package {package}: {remedy}", name=package
        )
    common: dict[str, Any] = {"policy": policy, "chat_template_kwargs": chat_template_kwargs, **options}
    if engine == "openai":
        if adapter is not None:
            raise ValueError("adapter: an endpoint serves an adapter under a name of its own; give name=")
        from qwen_vl_serve.backends.openai import OpenAIBackend

        return OpenAIBackend(str(model), **common)
    _check_folder(Path(model))
    if engine == "vllm":
        from qwen_vl_serve.backends.vllm import VllmBackend

        return VllmBackend.load(model, adapter=adapter, **common)
    from qwen_vl_serve.backends.transformers import TransformersBackend

    return TransformersBackend.load(model, adapter=adapter, **common)


def is_address(model: str | Path) -> bool:
    """Whether a model is an endpoint's address and not a checkpoint."""
    return str(model).startswith(("http://", "https://"))


def _check_folder(folder: Path) -> None:
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise ValueError(f"{folder}: no checkpoint, config.json is missing; give the folder that holds it")
