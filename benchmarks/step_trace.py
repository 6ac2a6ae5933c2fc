"""The kernels of one training step, counted without a GPU and without weights.

    configuration, collated batch
      -> model and the trainer's loss on fake tensors: shapes and dtypes, no numbers           trace
      -> every operator that starts a kernel, forward, recomputed and backward                 Counter
      -> [Kernel]: pass, kind, operations, bytes read and written
      -> seconds at least on a Device: the longer of operations / peak and bytes / bandwidth   Kernel.floor

The operators are the model library's and `token_losses`', so what autocast casts, what gradient checkpointing
computes again and what the library does not fuse is all there. A kernel reads each input and writes each
output once; what a cache keeps is left out, and views start none. Operations are twice the multiply-adds of
matrix products and of attention, whose backward pass has two and a half times those of its forward pass.

What a forward operator is comes from the module that runs; a backward operator is what the operator was that
made its autograd node. Layers are alike: four of each tower run, the last one counts for all that follow.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers.vision_utils import (
    get_vision_cu_seqlens,
    get_vision_interpolation_indices_and_weights,
    get_vision_position_ids,
)

from qwenvl.nano.architecture import random_model
from qwenvl.train import attention, experts
from qwenvl.train.model_loading import PatchProjection
from qwenvl.train.trainer import token_losses

aten = torch.ops.aten
MATRIX_PRODUCTS = {aten.mm, aten.addmm, aten.bmm, aten.baddbmm, aten._grouped_mm}
ATTENTION = {"torch_attn::_varlen_attn": 1.0, "torch_attn::_varlen_attn_backward": 2.5}
ALLOCATIONS = {aten.empty, aten.empty_like, aten.new_empty, aten.empty_strided, aten.new_empty_strided}
# These read and write the rows that an index names, no more.
PICKED, PLACED = {aten.index, aten.embedding, aten.gather}, {aten.index_put_, aten._index_put_impl_}
OVERWRITES = {aten.copy_, aten.fill_, aten.zero_}
# The first pattern that a module's name has says whose matrix product it is.
TOWERS = {
    "lm_head": r"^lm_head",
    "merger": r"visual\.(deepstack_)?merger",
    "vision": r"visual",
    "language": "",
}
# The first pattern that the class of the innermost module has says what else happens there.
KINDS = {
    "norms": r"Norm", "activations": r"MLP|GELU|SiLU|Experts", "rotary and heads": r"Attention|Rotary",
    "casts of activations": r"Linear|PatchProjection", "residuals": r"DecoderLayer|VisionBlock",
    "routing": r"Moe|Router", "embeddings": "",
}  # fmt: skip
WEIGHT_CASTS, PRODUCTS = "casts of weights", "products: "
TRACED_LAYERS = 4


@dataclass(frozen=True)
class Device:
    """Of a data sheet: dense operations a second in bf16 and fp32, bytes a second, bytes."""

    name: str
    bf16: float
    fp32: float
    bandwidth: float
    memory: float = 0.0


@dataclass(frozen=True)
class Kernel:
    """times: how often it runs alike; moment: forward, recomputed, backward; fp32: of matrix products."""

    moment: str
    kind: str
    operator: str
    operations: float
    bytes: float
    fp32: bool
    times: int

    def floor(self, device: Device) -> float:
        """Seconds that all of them take at least."""
        peak = device.fp32 if self.fp32 else device.bf16
        return self.times * max(self.operations / peak, self.bytes / device.bandwidth)


@dataclass(frozen=True)
class Numbers:
    """What fakes of a batch no longer know.

    pictures: tokens that stand for some; carried: tokens that carry loss; token_pairs, patch_pairs: how many
    attend to one another, of half the square of each sample and the square of each frame.
    """

    tokens: int
    patches: int
    samples: int
    pictures: int
    carried: int
    token_pairs: float
    patch_pairs: float

    @classmethod
    def of(cls, batch: dict[str, Any], config: Any) -> Numbers:
        """Of a collated, flattened batch with pictures."""
        lengths, grids = batch["cu_seq_lens_q"].diff().double(), batch["image_grid_thw"].double()
        return cls(
            tokens=int(lengths.sum()),
            patches=int(grids.prod(-1).sum()),
            samples=len(lengths),
            pictures=int((batch["input_ids"] == config.image_token_id).sum()),
            carried=int((batch["labels"][:, 1:] != -100).sum()),
            token_pairs=float((lengths**2).sum() / 2),
            patch_pairs=float((grids[:, 0] * (grids[:, 1] * grids[:, 2]) ** 2).sum()),
        )


@dataclass(frozen=True)
class Place:
    """Where an operator ran: tower, kind, and for how many layers it stands."""

    kind: str
    times: int = 1


class Counter(TorchDispatchMode):
    """Counts kernels and what the backward pass keeps; above a FakeTensorMode, or with numbers None on real
    tensors.

    repeats: for how many layers the last one of a tower stands, by the tower's name.
    """

    def __init__(self, model: nn.Module, numbers: Numbers | None, repeats: dict[str, int]) -> None:
        super().__init__()
        self.kernels: list[Kernel] = []
        self.kept: dict[int, tuple[torch.Tensor, str, int]] = {}  # Storage -> tensor, tower or "", times.
        self._numbers = numbers
        self._repeats = repeats
        self._weights = {_storage(weight) for weight in model.parameters()}
        self._copies: set[int] = set()
        self._made: dict[int, Place] = {}  # Number of an autograd node -> what made it.
        self._running: list[tuple[str, str]] = []  # Names and classes of modules.

    @contextmanager
    def watching(self, model: nn.Module) -> Iterator[None]:
        """Counts within the block, and knows which module runs."""
        with ExitStack() as stack:
            for name, module in model.named_modules():
                place = (name, type(module).__name__)
                entered = module.register_forward_pre_hook(partial(self._enter, place))
                # Recomputing ends as soon as all is there, with an exception out of the layer.
                left = module.register_forward_hook(partial(self._leave, place), always_call=True)
                stack.callback(entered.remove)
                stack.callback(left.remove)
            stack.enter_context(torch.autograd.graph.saved_tensors_hooks(self._keep, lambda kept: kept))
            stack.enter_context(self)
            yield

    def _enter(self, place: tuple[str, str], *_: Any) -> None:
        self._running.append(place)

    def _leave(self, place: tuple[str, str], *_: Any) -> None:
        while self._running.pop() != place:
            pass

    def _layer(self) -> tuple[str, int]:
        """The tower whose layer runs, and for how many layers it stands."""
        for name, _ in self._running:
            if found := re.search(r"(language|visual).*\.(\d+)$", name):
                last = int(found[2]) == TRACED_LAYERS - 1
                return found[1], self._repeats.get(found[1], 1) if last else 1
        return "", 1

    def _keep(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = _storage(tensor)
        if storage not in self._weights and storage not in self._copies:
            self.kept.setdefault(storage, (tensor, *self._layer()))
        return tensor

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        if self._numbers:
            if given and not any(isinstance(leaf, FakeTensor) for leaf in given):
                with unset_fake_temporarily():  # The sizes of pictures, which shapes depend on.
                    return func(*args, **kwargs)
            if func is aten.nonzero.default:
                return args[0].new_empty(self._numbers.carried, args[0].dim(), dtype=torch.long)
            if func is aten._local_scalar_dense.default:
                return True  # Whether there are as many features as placeholders.
            if func.overloadpacket in PICKED | PLACED | {aten.index_put} and isinstance(
                args[1], list | tuple
            ):
                args = (args[0], self._places(args[1]), *args[2:])
        result = func(*args, **kwargs)
        self._count(func, given, result)
        return result

    def _places(self, indices: Any) -> list[Any]:
        """Masks as numbers, as many as the mask of pictures has."""
        assert self._numbers is not None
        places: list[Any] = []
        for index in indices:
            if index is not None and index.dtype == torch.bool:
                count = round(index.numel() * self._numbers.pictures / self._numbers.tokens)
                places += [index.new_empty(count, dtype=torch.long) for _ in range(index.dim())]
            else:
                places.append(index)
        return places

    def _count(self, func: Any, given: list[torch.Tensor], result: Any) -> None:
        node = torch._C._current_autograd_node()
        number = node._sequence_nr() if node else torch._C._autograd._get_sequence_nr() - 1
        if node and not self._running:
            moment, place = "backward", self._made.get(number, Place("loss"))
        else:
            moment, place = "recomputed" if node else "forward", self._place(func, given)
            if not node:
                self._made.setdefault(number, place)
        made = [leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        if place.kind == WEIGHT_CASTS:
            self._copies |= {_storage(leaf) for leaf in made}
        known = {_storage(leaf) for leaf in given}
        view = not func._schema.is_mutable and all(_storage(leaf) in known for leaf in made)
        if view or func.overloadpacket in ALLOCATIONS:
            return
        operations = self._operations(func, given, result)
        kind = place.kind
        if kind.startswith(PRODUCTS) and not operations:
            kind = "bias gradients" if moment == "backward" else "casts of activations"
        single = func.overloadpacket in MATRIX_PRODUCTS and given[1].dtype == torch.float32
        moved = _moved(func.overloadpacket, given, made)
        self.kernels.append(Kernel(moment, kind, str(func), operations, moved, single, place.times))

    def _place(self, func: Any, given: list[torch.Tensor]) -> Place:
        _, times = self._layer()
        if func.name() in ATTENTION:
            return Place("attention", times)
        if func.overloadpacket is aten._to_copy and _storage(given[0]) in self._weights:
            return Place(WEIGHT_CASTS, times)
        if not self._running:
            return Place("loss")
        name, innermost = self._running[-1]
        if func.overloadpacket in MATRIX_PRODUCTS:
            return Place(PRODUCTS + _first(TOWERS, name), times)
        return Place(_first(KINDS, innermost), times)

    def _operations(self, func: Any, given: list[torch.Tensor], result: Any) -> float:
        if func.name() in ATTENTION and self._numbers:
            language = result[0].shape[0] == self._numbers.tokens
            pairs = self._numbers.token_pairs if language else self._numbers.patch_pairs
            return ATTENTION[func.name()] * 4 * pairs * result[0].shape[1:].numel()
        if func.overloadpacket not in MATRIX_PRODUCTS:
            return 0.0
        one, other = given[1:3] if func.overloadpacket in (aten.addmm, aten.baddbmm) else given[:2]
        return 2.0 * one.numel() * other.shape[-1]


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _first(patterns: dict[str, str], text: str) -> str:
    return next(name for name, pattern in patterns.items() if re.search(pattern, text))


def size(tensor: torch.Tensor) -> float:
    """Bytes of a tensor; what is broadcast is read once."""
    shape = (length for length, step in zip(tensor.shape, tensor.stride(), strict=True) if step)
    return float(torch.Size(shape).numel() * tensor.element_size())


def _moved(packet: Any, given: list[torch.Tensor], made: list[torch.Tensor]) -> float:
    read, written = [size(leaf) for leaf in given], sum(map(size, made))
    if packet in PICKED:
        return 2 * written + sum(read[1:])
    if packet in PLACED:
        return sum(read[1:]) + read[-1]
    return sum(read[packet in OVERWRITES :]) + written


@contextmanager
def as_on_gpu() -> Iterator[None]:
    """Fakes of CPU tensors, since the backward pass of others wants their device, that compute as on a GPU.

    There autocast takes layer norms too in fp32, and attention has a kernel for segments in bf16.
    """
    layer_norm = nn.functional.layer_norm

    def in_fp32(input: torch.Tensor, *arguments: Any, **options: Any) -> torch.Tensor:
        return layer_norm(input.float(), *arguments, **options)

    def kernel(*arguments: Any, dropout: float, **options: Any) -> torch.Tensor:
        return attention._kernel_attention(*arguments, **options)

    with ExitStack() as stack:
        stack.enter_context(patch.object(nn.functional, "layer_norm", in_fp32))
        stack.enter_context(patch.object(attention, "_compute_dtype", lambda *_: torch.bfloat16))
        stack.enter_context(patch.object(attention, "_batched_attention", kernel))
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        yield


def shortened(config: Any) -> tuple[Any, dict[str, int]]:
    """A configuration of few layers, and for how many the last one of each tower stands."""
    short = copy.deepcopy(config)
    text, vision = short.text_config, short.vision_config
    repeats = {
        "language": max(1, text.num_hidden_layers - TRACED_LAYERS + 1),
        "visual": max(1, vision.depth - TRACED_LAYERS + 1),
    }
    text.num_hidden_layers = min(TRACED_LAYERS, text.num_hidden_layers)
    vision.depth = min(TRACED_LAYERS, vision.depth)
    vision.deepstack_visual_indexes = list(range(len(vision.deepstack_visual_indexes)))
    return short, repeats


def vision_inputs(config: Any, grids: torch.Tensor) -> dict[str, Any]:
    """What the vision tower would compute from the sizes of pictures, which fakes don't have."""
    vision = config.vision_config
    segments = get_vision_cu_seqlens(grids)
    side, merge = round(vision.num_position_embeddings**0.5), vision.spatial_merge_size
    indices, weights = get_vision_interpolation_indices_and_weights(grids, side, "bilinear", True, merge)
    return {
        "image_cu_seqlens": segments, "image_max_seqlen": int(segments.diff().max()),
        "image_position_ids": get_vision_position_ids(grids, merge),
        "image_interp_indices": indices, "image_interp_weights": weights,
    }  # fmt: skip


def _fake(value: Any) -> Any:
    return torch.empty(value.shape, dtype=value.dtype) if isinstance(value, torch.Tensor) else value


def trace(
    config: Any, batch: dict[str, Any], *, checkpointing: bool, losses: Callable[..., Any] = token_losses
) -> Counter:
    """Forward and backward of a collated, flattened batch with pictures, bf16, all weights trained."""
    grids, numbers = batch["image_grid_thw"], Numbers.of(batch, config)
    extra = vision_inputs(config, grids)
    short, repeats = shortened(config)
    with as_on_gpu():
        model = random_model(short, device="cpu", dtype=torch.float32, seed=0)
        embedding = model.model.visual.patch_embed
        embedding.proj = PatchProjection(embedding.proj)
        experts.follow_autocast(model)
        attention.enable(model)
        model.train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False, "preserve_rng_state": False})
        named = {name: value for name, value in batch.items() if name != "dataset"}
        inputs = {name: _fake(value) for name, value in (named | extra).items()}
        inputs |= {"pixel_values": inputs["pixel_values"].float(), "image_grid_thw": grids}
        counter = Counter(model, numbers, repeats)
        with counter.watching(model):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss = losses(model, inputs).losses.sum()
            loss.backward()
    return counter
