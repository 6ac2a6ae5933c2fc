"""Attention over flattened batches: samples lie end to end in one row and never see each other.

    hidden states [1, T, C] -> q [1, Hq, T, D], k and v [1, Hkv, T, D]
    cu_seqlens [n + 1]: segment i is the tokens cu_seqlens[i] .. cu_seqlens[i + 1]
    -> segment_attention -> [1, T, Hq, D]

Both halves of a model come here.  The language model gets its segments as a `Segments` object among the
forward arguments (`model(..., segments=...)`); the vision tower makes its own `cu_seq_lens_q`, one segment a
picture, frame or window.  `enable` switches a loaded model to this through the model library's attention
interface; no class is patched.

Qwen3.5's layers of linear attention know no segments: their convolution and their recurrence run on over the
end of a sample.  `separate` hands them a flattened row as a batch of its samples, so that no border is left,
neither for the library's PyTorch code nor for the kernels that it takes where they are installed
(flash-linear-attention and causal-conv1d, which need CUDA and were not tried here).

On CUDA, in half precision, the variable-length kernel runs: flash-attn where it is installed, else the one
that comes with torch.  Everywhere else segments are batched by length and run through torch's own attention.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, cached_property, partial
from inspect import signature
from typing import Any, cast

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig, PreTrainedModel
from transformers.models.qwen3_5.modeling_qwen3_5 import Qwen3_5GatedDeltaNet
from transformers.models.qwen3_5_moe.modeling_qwen3_5_moe import Qwen3_5MoeGatedDeltaNet

# The model library hands segments to the vision tower's attention only where the name contains "flash".
NAME = "qwenvl_flash_varlen"

LINEAR = (Qwen3_5GatedDeltaNet, Qwen3_5MoeGatedDeltaNet)

# Causal segments may be padded to the longest of their bucket, by at most this factor.
_PADDING = 1.25


@dataclass(frozen=True)
class Segments:
    """Where the samples of a flattened batch begin and end.

    cu_seqlens: int32 [n + 1] on the model's device; longest: tokens of the longest segment.
    """

    cu_seqlens: torch.Tensor
    longest: int

    @cached_property
    def lengths(self) -> list[int]:
        """Tokens per segment."""
        return self.cu_seqlens.diff().tolist()

    @cached_property
    def similar(self) -> Buckets:
        """Buckets of similar lengths, filled up."""
        return _buckets(self.lengths, _PADDING, self.cu_seqlens.device)

    @cached_property
    def equal(self) -> Buckets:
        """Buckets of equal lengths."""
        return _buckets(self.lengths, 1.0, self.cu_seqlens.device)


@dataclass(frozen=True)
class Buckets:
    """Segments of like length next to each other, each filled up with other tokens to its bucket's longest.

    order [P]: which token of the row is where; shapes: (segments, longest) of each bucket;
    places [T]: where in `order` each token of the row is.
    """

    order: torch.Tensor
    shapes: list[tuple[int, int]]
    places: torch.Tensor

    def split(self, row: torch.Tensor) -> list[torch.Tensor]:
        """[T, ...] -> of each bucket [segments, longest, ...]."""
        parts = row[self.order].split([count * longest for count, longest in self.shapes])
        return [part.unflatten(0, shape) for part, shape in zip(parts, self.shapes, strict=True)]

    def join(self, parts: Sequence[torch.Tensor]) -> torch.Tensor:
        """The reverse of `split`."""
        return torch.cat([part.flatten(0, 1) for part in parts])[self.places]


def _buckets(lengths: Sequence[int], padding: float, device: torch.device) -> Buckets:
    starts = [0]
    for length in lengths:
        starts.append(starts[-1] + length)
    grouped: list[list[int]] = []
    for segment in sorted((i for i, length in enumerate(lengths) if length), key=lambda i: -lengths[i]):
        if not grouped or lengths[grouped[-1][0]] > padding * lengths[segment]:
            grouped.append([])
        grouped[-1].append(segment)
    order, real, shapes = [], [], []
    for group in grouped:
        longest = lengths[group[0]]
        steps = torch.arange(longest)
        own = steps < torch.tensor([lengths[i] for i in group])[:, None]
        order.append(torch.where(own, torch.tensor([starts[i] for i in group])[:, None] + steps, 0).flatten())
        real.append(own.flatten())
        shapes.append((len(group), longest))
    tokens, kept = torch.cat(order), torch.cat(real).nonzero()[:, 0]
    places = torch.empty(starts[-1], dtype=torch.int64)
    places[tokens[kept]] = kept
    return Buckets(tokens.to(device), shapes, places.to(device))


def segment_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    segments: Segments,
    *,
    causal: bool,
    scale: float | None = None,
    dropout: float = 0.0,
) -> torch.Tensor:
    """Attention within each segment.

    query [Hq, T, D], key and value [Hkv, T, D] -> [T, Hq, D].  Same result as a loop over the segments.
    """
    device = query.device.type
    given = value.dtype
    dtype = _compute_dtype(device, given)
    query, key, value = (tensor.to(dtype) for tensor in (query, key, value))
    with torch.autocast(device, enabled=False):
        if device == "cuda" and dtype in (torch.bfloat16, torch.float16) and not dropout:
            output = _kernel_attention(query, key, value, segments, causal=causal, scale=scale)
        else:
            output = _batched_attention(
                query, key, value, segments, causal=causal, scale=scale, dropout=dropout
            )
    return output.to(given)


def _compute_dtype(device: str, given: torch.dtype) -> torch.dtype:
    if device == "cpu":
        # A CPU's backward pass of bf16 attention is 20 times slower than that of fp32.
        return torch.promote_types(given, torch.float32)
    # Rotary positions leave queries and keys in fp32 under autocast.
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else given


@cache
def _flash_attn_installed() -> bool:
    return importlib.util.find_spec("flash_attn") is not None


def _kernel_attention(query, key, value, segments, *, causal: bool, scale: float | None) -> torch.Tensor:
    query, key, value = (tensor.transpose(0, 1).contiguous() for tensor in (query, key, value))
    ends, longest = segments.cu_seqlens, segments.longest
    if _flash_attn_installed():
        from flash_attn import flash_attn_varlen_func  # pyright: ignore[reportMissingImports]

        return flash_attn_varlen_func(
            query, key, value, ends, ends, longest, longest, softmax_scale=scale, causal=causal
        )
    from torch.nn.attention.varlen import varlen_attn

    options: dict[str, Any] = {}
    groups = query.shape[1] // key.shape[1]
    if groups > 1 and "enable_gqa" in signature(varlen_attn).parameters:
        options = {"enable_gqa": True}
    elif groups > 1:  # torch 2.11 wants as many heads of keys as of queries.
        key, value = (tensor.repeat_interleave(groups, dim=1) for tensor in (key, value))
    window = (-1, 0) if causal else (-1, -1)
    output = varlen_attn(
        query, key, value, ends, ends, longest, longest, scale=scale, window_size=window, **options
    )
    assert isinstance(output, torch.Tensor)  # A tuple only where auxiliary results were asked for.
    return output


def _batched_attention(query, key, value, segments: Segments, *, causal, scale, dropout):
    heads, tokens, _ = query.shape
    options = dict(is_causal=causal, scale=scale, dropout_p=dropout, enable_gqa=heads != key.shape[0])
    count = len(segments.lengths)
    if count * segments.longest == tokens:  # All of one length: no token has to move.
        batched = [t.unflatten(1, (count, -1)).transpose(0, 1) for t in (query, key, value)]
        return scaled_dot_product_attention(*batched, **options).transpose(1, 2).flatten(0, 1)
    # What fills a segment up comes after its own tokens, which causal attention hides from them.
    buckets = segments.similar if causal else segments.equal
    split = [buckets.split(t.transpose(0, 1)) for t in (query, key, value)]
    rows = [
        scaled_dot_product_attention(*(t.transpose(1, 2) for t in batched), **options).transpose(1, 2)
        for batched in zip(*split, strict=True)
    ]
    return buckets.join(rows)


def _interface(module, query, key, value, attention_mask, scaling=None, dropout=0.0, segments=None, **kwargs):
    """What the model library calls: query [B, Hq, T, D] -> ([B, T, Hq, D], no weights)."""
    if "cu_seq_lens_q" in kwargs:  # The vision tower, which knows its own segments.
        segments = Segments(kwargs["cu_seq_lens_q"], int(kwargs["max_length_q"]))
    if segments is None or query.shape[0] != 1:
        raise ValueError(
            f"{NAME} attends within the segments of one flattened row, got a batch of {query.shape[0]} rows "
            f"and segments={segments}: pass segments=Segments(...) or set another attention implementation"
        )
    causal = bool(kwargs.get("is_causal", module.is_causal))
    output = segment_attention(
        query[0], key[0], value[0], segments, causal=causal, scale=scaling, dropout=dropout
    )
    return output[None], None


def _no_mask(*args, **kwargs) -> None:
    """Segments take the place of a mask."""


def enable(model: PreTrainedModel) -> None:
    """Switch a loaded model, both halves, to attention within segments."""
    AttentionInterface.register(NAME, _interface)
    AttentionMaskInterface.register(NAME, _no_mask)
    for config in _configs(model.config):
        config._attn_implementation = NAME


def separate(model: PreTrainedModel) -> None:
    """Have a loaded model's linear attention, where it has some, keep the segments of a batch apart.

    Batches without `segments` pass as ever.  Needed whatever implementation the other layers' attention has.
    """
    for module in model.modules():
        if isinstance(module, LINEAR):
            module.forward = cast(Any, partial(_each_segment, module.forward))


def _each_segment(
    forward: Callable[..., torch.Tensor],
    hidden_states: torch.Tensor,
    segments: Segments | None = None,
    **kwargs: Any,
) -> torch.Tensor:
    """Linear attention within each segment, [1, T, C] -> [1, T, C], from a `forward` that knows batches."""
    if segments is None:
        return forward(hidden_states, **kwargs)
    # What fills a segment up comes after its own tokens, from which no linear attention looks forward.
    parts = segments.similar.split(hidden_states[0])
    return segments.similar.join([forward(part, **kwargs) for part in parts])[None]


def describe(config: PreTrainedConfig, device: str, *, half: bool) -> str:
    """What computes the attention of a model that was loaded with this configuration, for people to read."""
    if config._attn_implementation != NAME:
        return str(config._attn_implementation)
    if device != "cuda" or not half:
        return "within samples, batched by length through torch's own"
    kernel = "flash-attn" if _flash_attn_installed() else "torch"
    return f"within samples by the variable-length kernel of {kernel}"


@contextmanager
def suspended(config: PreTrainedConfig) -> Iterator[None]:
    """Torch's own attention, which knows masks and caches, within the block, where `enable` was called."""
    enabled = [each for each in _configs(config) if each._attn_implementation == NAME]
    for each in enabled:
        each._attn_implementation = "sdpa"
    try:
        yield
    finally:
        for each in enabled:
            each._attn_implementation = NAME


def _configs(config: PreTrainedConfig) -> tuple[PreTrainedConfig, ...]:
    return config, config.text_config, config.vision_config
