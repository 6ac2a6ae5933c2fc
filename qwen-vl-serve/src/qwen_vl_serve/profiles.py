"""From a checkpoint and the machine to the arguments and the environment of ``vllm serve``.

Checkpoint, Hardware, Wishes, the user's own vLLM flags --make_plan--> Plan

Nothing here reads a file or starts anything. What stands where, later ones winning:

    profile (by machine and checkpoint) < modifiers (--tools...) < the user's --config file < vLLM flags

Flags that take JSON (--limit-mm-per-prompt, --mm-processor-kwargs, --hf-overrides, --media-io-kwargs) are put
together key by key, so that saying one thing about them does not undo the rest.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qwen_vl_serve.checkpoint import Checkpoint
from qwen_vl_serve.flags import Flag, combine, given, merge, read_flags
from qwen_vl_serve.hardware import Hardware

PROFILES = {
    "cpu": "no GPU: float32, eager, 4,096 tokens of context, 1 GiB of cache",
    "gpu": "one GPU: as much context as its memory holds",
    "gpus": "several GPUs: the language model split over them, the vision tower copied",
    "moe-fp8": "several GPUs, mixture of experts in FP8: whole experts on each",
    "published": "eight GPUs as Qwen serves Qwen3-VL-235B-A22B-Instruct-FP8: all interfaces, port 22002",
}
MEDIA_AT_ONCE = 64
"""Pictures, and videos, in one request."""
CPU_CONTEXT = 4096
MANY_CORES = 8
"""From here on vLLM's own binding of threads to cores pays; it keeps one core per process free."""
USABLE = 0.9
"""Part of a GPU's memory that vLLM takes by default."""


@dataclass(frozen=True, kw_only=True)
class Wishes:
    """The command's own options; the rest of the command line is vLLM's."""

    profile: str | None = None
    long_context: float | None = None
    """How many times the context of the checkpoint."""
    rope_scaling: Mapping[str, Any] | None = None
    """The value of the --rope-scaling of older vLLM."""
    images_only: bool = False
    client_frames: bool = False
    reasoning: bool = False
    """Also where the chat template opens the thinking by itself."""
    tools: bool = False
    stock_media: bool = False
    media_policy: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Plan:
    """What to run: ``vllm serve`` with these arguments, the model first, and these variables."""

    arguments: tuple[str, ...]
    environment: Mapping[str, str]
    notes: tuple[str, ...]
    """What the user should know about it."""


def make_plan(
    checkpoint: Checkpoint,
    hardware: Hardware,
    wishes: Wishes,
    flags: Sequence[Flag] = (),
    *,
    configured: Mapping[str, Any] | None = None,
    environ: Mapping[str, str] | None = None,
) -> Plan:
    """The command for this checkpoint on this machine.

    ``flags``: the user's own for vLLM; ``configured``: those of the user's --config file; ``environ``: what
    the user has set already. Raises ValueError for wishes that contradict each other, and where a wish needs
    the checkpoint's config.json and there is none.
    """
    profile, why = choose_profile(checkpoint, hardware, wishes.profile)
    notes = [f"profile {profile} ({why})"]
    if hardware.problem:
        notes.append(f"GPUs, if there are some, stay out of sight: {hardware.problem}")
    values = _profile_values(profile, checkpoint, hardware, notes)
    longest = _tokens(given(flags, "max-model-len"))
    values = merge(values, _modifier_values(profile, wishes, checkpoint, longest, notes))
    if not wishes.stock_media:
        values["mm-processor-kwargs"] = {"do_resize": False}
    environment = _environment(profile, checkpoint, hardware, wishes, environ or {})
    arguments = (checkpoint.model, *combine(values, flags, configured))
    notes += _open_doors(read_flags(arguments), configured or {}, environ or {})
    return Plan(arguments, environment, tuple(notes))


def _open_doors(
    flags: Sequence[Flag], configured: Mapping[str, Any], environ: Mapping[str, str]
) -> list[str]:
    """A note where others than this machine's users can ask without a key."""
    host = (given(flags, "host") or (str(configured.get("host", "127.0.0.1")),))[0]
    key = given(flags, "api-key") or configured.get("api-key") or environ.get("VLLM_API_KEY")
    if key or host in ("localhost", "::1") or host.startswith("127."):
        return []
    return [
        f"it listens on {host} without a key: whoever reaches that may use it; --api-key closes /v1, and a "
        "proxy before it the rest"
    ]


def choose_profile(checkpoint: Checkpoint, hardware: Hardware, wanted: str | None) -> tuple[str, str]:
    """The profile's name and why it is that one. Raises ValueError for an unknown name."""
    if wanted is not None:
        if wanted not in PROFILES:
            raise ValueError(f"--profile {wanted}: unknown; the profiles are {', '.join(PROFILES)}")
        return wanted, "asked for"
    if not hardware.gpus:
        return "cpu", str(hardware)
    if len(hardware.gpus) == 1:
        return "gpu", str(hardware)
    _need_config(checkpoint, "choosing the profile", "--profile NAME")
    if checkpoint.experts and checkpoint.is_fp8:
        return "moe-fp8", f"{hardware}, {checkpoint.experts} experts in FP8"
    return "gpus", str(hardware)


def _need_config(checkpoint: Checkpoint, what: str, instead: str) -> None:
    if checkpoint.config is None:
        raise ValueError(
            f"{checkpoint.model}: {what} needs its config.json, which can't be had: {checkpoint.problem}; "
            f"give the folder of the checkpoint, or {instead}"
        )


def _profile_values(
    profile: str, checkpoint: Checkpoint, hardware: Hardware, notes: list[str]
) -> dict[str, Any]:
    limits = {"image": MEDIA_AT_ONCE, "video": MEDIA_AT_ONCE}
    name = Path(checkpoint.model).resolve().name if checkpoint.is_local else checkpoint.model
    values: dict[str, Any] = {"served-model-name": name, "host": "127.0.0.1", "port": 8000}
    values["limit-mm-per-prompt"] = limits
    # Between JSON's tokens a small model may write spaces without end.
    values["structured-outputs-config"] = {"backend": "xgrammar", "disable_any_whitespace": True}
    if profile == "cpu":
        positions = checkpoint.text_config.get("max_position_embeddings", CPU_CONTEXT)
        context = min(CPU_CONTEXT, positions)
        return values | {"dtype": "float32", "enforce-eager": True, "max-model-len": context}
    if profile == "published":
        values |= {"host": "0.0.0.0", "port": 22002, "tensor-parallel-size": 8}
        values |= {"mm-encoder-tp-mode": "data", "enable-expert-parallel": True, "async-scheduling": True}
        return values
    split = 1
    values["max-model-len"] = "auto"
    if profile in ("gpus", "moe-fp8"):
        by_experts = profile == "moe-fp8"
        _need_config(checkpoint, f"--profile {profile}", "--profile published")
        if by_experts and not checkpoint.experts:
            raise ValueError(
                f"{checkpoint.model}: --profile moe-fp8 is for a mixture of experts, and its config.json has "
                "no num_experts; take --profile gpus"
            )
        split = tensor_parallel(checkpoint, len(hardware.gpus), by_experts=by_experts)
        values |= {"tensor-parallel-size": split, "mm-encoder-tp-mode": "data", "async-scheduling": True}
        values |= {"enable-expert-parallel": True} if by_experts else {}
        if split < len(hardware.gpus):
            notes.append(
                f"{split} of the {len(hardware.gpus)} GPUs are used: the sizes of the model divide by no "
                "larger power of two; start a second server on the others with CUDA_VISIBLE_DEVICES"
            )
    if any(gpu.capability is not None and gpu.capability < 8 for gpu in hardware.gpus):
        values["dtype"] = "half"
        notes.append("float16, as this GPU is too old for bfloat16")
    notes += _fit(checkpoint, hardware, split)
    return values


def tensor_parallel(checkpoint: Checkpoint, gpus: int, *, by_experts: bool) -> int:
    """Over how many GPUs to split: the largest power of two that the sizes of the model divide by."""
    text = checkpoint.text_config
    heads = text["num_attention_heads"]
    kv_heads = text.get("num_key_value_heads") or heads
    whole = [heads]
    if checkpoint.experts:
        whole.append(checkpoint.experts if by_experts else text.get("moe_intermediate_size") or heads)
    elif inner := text.get("intermediate_size"):
        whole.append(inner)
    split = 1
    while (
        2 * split <= gpus
        and all(size % (2 * split) == 0 for size in whole)
        and (kv_heads % (2 * split) == 0 or (2 * split) % kv_heads == 0)
    ):
        split *= 2
    return split


def _fit(checkpoint: Checkpoint, hardware: Hardware, split: int) -> list[str]:
    """A note where the weights alone are more than the GPUs hold."""
    memories = [gpu.memory for gpu in hardware.gpus if gpu.memory]
    usable = USABLE * split * min(memories, default=0)
    if not memories or checkpoint.weights <= usable:
        return []
    return [
        f"the weights have {checkpoint.weights:.0f} GiB and vLLM gets {usable:.0f} GiB: expect it to run out "
        "of memory; take an FP8 checkpoint, more GPUs, or --quantization fp8"
    ]


def _modifier_values(
    profile: str, wishes: Wishes, checkpoint: Checkpoint, longest: int | None, notes: list[str]
) -> dict[str, Any]:
    values: dict[str, Any] = {}
    if rope := _rope(wishes, checkpoint, notes):
        reached = round(rope["factor"] * rope["original_max_position_embeddings"])
        # vLLM takes the positions of a YaRN checkpoint as scaled already, and no longer context than these.
        positions = max(reached, longest or 0)
        inner = {"rope_parameters": rope, "max_position_embeddings": positions}
        values["hf-overrides"] = {"text_config": inner}
        if profile == "cpu":  # the others take all that fits
            values["max-model-len"] = reached
    if wishes.images_only:
        values["limit-mm-per-prompt"] = {"video": 0}
    if wishes.client_frames:
        values["media-io-kwargs"] = {"video": {"num_frames": -1}}
    if wishes.reasoning:
        values["reasoning-parser"] = "qwen3"
    if wishes.tools:
        values |= {"enable-auto-tool-choice": True, "tool-call-parser": "hermes"}
    return values


def _rope(wishes: Wishes, checkpoint: Checkpoint, notes: list[str]) -> dict[str, Any]:
    """The rope parameters that stretch the context; empty where nobody asked."""
    if wishes.rope_scaling is not None:
        if wishes.long_context is not None:
            raise ValueError("--rope-scaling and --long-context both stretch the context; give one of them")
        rope = dict(wishes.rope_scaling)
        if missing := {"rope_type", "factor", "original_max_position_embeddings"} - rope.keys():
            raise ValueError(f"--rope-scaling: {', '.join(sorted(missing))} missing in {json.dumps(rope)}")
        notes.append("--rope-scaling is gone from vLLM; handed on as --hf-overrides")
        return rope
    if wishes.long_context is None:
        return {}
    if wishes.long_context <= 1:
        raise ValueError(f"--long-context {wishes.long_context:g}: a factor above 1 stretches the context")
    _need_config(checkpoint, "--long-context", "--rope-scaling with all its values")
    text = checkpoint.text_config
    now = text.get("rope_parameters") or text.get("rope_scaling") or {}
    kept = {key: now[key] for key in ("mrope_section", "mrope_interleaved") if key in now}
    original = text["max_position_embeddings"]
    return {
        "rope_type": "yarn",
        "factor": wishes.long_context,
        "original_max_position_embeddings": original,
        **kept,
    }


def _tokens(values: Sequence[str] | None) -> int | None:
    """A --max-model-len as a number; None for "auto" and what is none."""
    units = {"k": 10**3, "m": 10**6, "g": 10**9, "K": 2**10, "M": 2**20, "G": 2**30}
    text = values[0] if values else ""
    if not text:
        return None
    number, unit = (text[:-1], units[text[-1]]) if text[-1] in units else (text, 1)
    try:
        return round(float(number) * unit)
    except ValueError:
        return None


def _environment(
    profile: str, checkpoint: Checkpoint, hardware: Hardware, wishes: Wishes, environ: Mapping[str, str]
) -> dict[str, str]:
    """The variables to set; what the user has set stays, but for those that keep it safe and exact."""
    environment = {"VLLM_MEDIA_URL_ALLOW_REDIRECTS": "0", "VLLM_NO_USAGE_STATS": "1"}
    if not wishes.stock_media:
        where = str(checkpoint.folder) if checkpoint.folder and checkpoint.pinned else checkpoint.model
        settings = {"checkpoint": where, "policy": dict(wishes.media_policy)}
        environment |= {"VLLM_MEDIA_CONNECTOR": "qwen_vl_utils", "QWENVL_MEDIA": json.dumps(settings)}
    if profile == "cpu":
        defaults = {"VLLM_CPU_KVCACHE_SPACE": "1"}
        if hardware.cpus >= MANY_CORES:
            defaults["VLLM_CPU_OMP_THREADS_BIND"] = "auto"
        else:  # bound by vLLM, a small machine's second server would share its cores with the first
            free = max(1, hardware.cpus - 1)
            defaults |= {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": str(free)}
        environment |= {name: value for name, value in defaults.items() if name not in environ}
    return environment
