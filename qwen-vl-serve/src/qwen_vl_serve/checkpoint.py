"""What a checkpoint says about itself in its small files, without loading it.

model --find_checkpoint--> Checkpoint     config.json, chat template, size and layout of the weights
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SMALL_FILES = ["*.json", "*.jinja", "*.txt", "*.model"]
SOURCES = ("chat_template.jinja", "chat_template.json", "tokenizer_config.json")


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint folder, or a model hub's checkpoint of which at least the small files are here."""

    model: str
    """As the user named it."""
    folder: Path | None
    """Where its small files are; None where they can't be had."""
    is_local: bool
    """Whether ``model`` is the folder itself."""
    config: Mapping[str, Any] | None
    problem: str = ""
    """Why there is no folder."""
    pinned: bool = False
    """Whether the user asked for one revision of the hub's."""
    weights: float = 0.0
    """Size of the weight files that are here [GiB]."""

    @property
    def text_config(self) -> Mapping[str, Any]:
        """The language model's part of the configuration; empty without one."""
        config = self.config or {}
        return config.get("text_config") or config

    @property
    def experts(self) -> int:
        """Experts of one layer; 0 for a dense model."""
        return self.text_config.get("num_experts") or self.text_config.get("num_local_experts") or 0

    @property
    def is_fp8(self) -> bool:
        """Whether the weights are stored in FP8."""
        quantization = (self.config or {}).get("quantization_config") or {}
        return "fp8" in str(quantization.get("quant_method", "")).lower()


def find_checkpoint(model: str, revision: str | None = None) -> Checkpoint:
    """The checkpoint of that name: a folder, else one of the model hub (its small files are fetched).

    Raises ValueError for a folder that holds none or is not there, and for one whose files are broken.
    """
    folder = Path(model)
    if folder.is_dir():
        weights = sum(path.stat().st_size for path in folder.glob("*.safetensors")) / 2**30
        return Checkpoint(model, folder, True, _config(folder), weights=weights)
    if folder.exists() or model.startswith((".", "/", "~")) or model.count("/") != 1:
        raise ValueError(
            f"{model}: no such folder; give the folder that holds config.json, or a model hub's name "
            "such as Qwen/Qwen3-VL-8B-Instruct"
        )
    from huggingface_hub import snapshot_download

    try:
        fetched = Path(snapshot_download(model, revision=revision, allow_patterns=SMALL_FILES))
    except (OSError, ValueError) as error:
        return Checkpoint(model, None, False, None, problem=str(error).strip().splitlines()[0])
    return Checkpoint(model, fetched, False, _config(fetched), pinned=revision is not None)


def _config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    if not path.is_file():
        raise ValueError(f"{folder}: no checkpoint, config.json is missing; give the folder that holds it")
    return _read_json(path)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not JSON: {error}; fetch or save the checkpoint again") from error
    if not isinstance(content, dict):
        raise ValueError(
            f"{path}: holds a {type(content).__name__}, not an object; save the checkpoint again"
        )
    return content


def chat_template(folder: Path) -> str | None:
    """The checkpoint's chat template, looked for where the model library does; None where there is none."""
    for name in SOURCES:
        path = folder / name
        if not path.is_file():
            continue
        if path.suffix == ".jinja":
            return path.read_text(encoding="utf-8")
        template = _read_json(path).get("chat_template")
        if isinstance(template, list):  # several by name
            template = next((each["template"] for each in template if each["name"] == "default"), None)
        if isinstance(template, str):
            return template
    return None


def starts_thinking(template: str, kwargs: Mapping[str, Any]) -> bool:
    """Whether the template, rendered for an ordinary question, leaves a ``<think>`` open for the model.

    ``kwargs``: what requests pass to the template by default. Raises ValueError for a template that fails.
    """
    import jinja2
    from jinja2.ext import loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    from qwen_vl_serve.answers import opens_thinking

    def refuse(message: str) -> None:
        raise jinja2.TemplateError(message)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols]
    )
    environment.filters["tojson"] = lambda value, **_: json.dumps(value, ensure_ascii=False)
    environment.globals |= {"raise_exception": refuse, "strftime_now": lambda _: ""}
    question = [{"role": "user", "content": "?"}]
    try:
        prompt = environment.from_string(template).render(
            messages=question, add_generation_prompt=True, **kwargs
        )
    except jinja2.TemplateError as error:
        raise ValueError(
            f"the chat template can't be rendered: {error}; correct it, or name another with --chat-template"
        ) from error
    return opens_thinking(prompt)


def check_expert_layout(checkpoint: Checkpoint) -> None:
    """Raise ValueError for experts that lie as the model library saves them, which vLLM can't load.

    gate_up_proj is [experts, hidden, 2 * inner] as published, [experts, 2 * inner, hidden] in the library.
    """
    if not checkpoint.is_local or not checkpoint.experts:
        return
    inner, hidden = (checkpoint.text_config.get(key, 0) for key in ("moe_intermediate_size", "hidden_size"))
    wrong = [2 * inner, hidden]
    if wrong == wrong[::-1]:  # the shape does not tell
        return
    for path in sorted(Path(checkpoint.model).glob("*.safetensors")):
        for name, tensor in _header(path).items():
            if name.endswith("experts.gate_up_proj") and tensor["shape"][1:] == wrong:
                raise ValueError(
                    f"{path}: {name} has the shape {tensor['shape']}, the layout in which the model library "
                    "saves experts and which vLLM can't load; turn it into the published one with: "
                    f"python -m qwenvl.train.expert_layout {checkpoint.model}"
                )


def _header(path: Path) -> dict[str, Any]:
    """Name -> dtype and shape of a safetensors file, which begins with the length of this JSON."""
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(min(length, path.stat().st_size)))
    except (ValueError, struct.error) as error:
        raise ValueError(f"{path}: not a whole safetensors file: {error}; fetch or save it again") from error
    return {name: tensor for name, tensor in header.items() if name != "__metadata__"}
