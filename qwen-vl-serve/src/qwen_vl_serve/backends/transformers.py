"""Answers through the model library itself: fp32 on the CPU, bf16 on CUDA.

conversations [B] -> processor_inputs -> input_ids [B, S] (padded left), pixel_values, grids
                  -> model.generate  -> ids [B, S + N]
                  -> cut at the end token, decoded -> Reply [B]
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import torch
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    BatchFeature,
    GenerationConfig,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.generation.streamers import BaseStreamer

from qwen_vl_serve.backends.base import Event, Finished, FinishReason, Message, Reply, Sampling, TextDelta
from qwen_vl_utils import PERMISSIVE, MediaPolicy, processor_inputs

DEFAULT_MAX_NEW_TOKENS = 512
"""Where neither the caller nor the checkpoint's generation_config names a limit."""


class TransformersBackend:
    """A model and its processor. Calls from several threads are served one after another."""

    def __init__(self, model: Any, processor: Any, policy: MediaPolicy = PERMISSIVE) -> None:
        self.model = model.eval()
        self.processor = processor
        self.policy = policy
        self._busy = threading.Lock()
        config = model.generation_config
        ends = config.eos_token_id if config.eos_token_id is not None else processor.tokenizer.eos_token_id
        self._ends = frozenset(ends if isinstance(ends, list) else [ends])

    @classmethod
    def load(
        cls, checkpoint: str | Path, *, device: str | None = None, policy: MediaPolicy = PERMISSIVE
    ) -> TransformersBackend:
        """Load a checkpoint folder (or a model hub's name); see :func:`qwen_vl_serve.open_backend`."""
        folder = Path(checkpoint)
        if folder.is_dir() and not (folder / "config.json").is_file():
            raise ValueError(
                f"{folder}: no checkpoint, config.json is missing; give the folder that holds it"
            )
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        dtype = torch.float32 if device == "cpu" else torch.bfloat16
        model: Any = AutoModelForImageTextToText.from_pretrained(checkpoint, dtype=dtype)
        return cls(model.to(device), AutoProcessor.from_pretrained(checkpoint), policy)

    def generate(self, batch: Sequence[Sequence[Message]], sampling: Sampling) -> list[Reply]:
        """See :meth:`Backend.generate <qwen_vl_serve.backends.base.Backend.generate>`."""
        if not batch:
            return []
        inputs = self._inputs(batch)
        with self._busy:
            output = self._run(inputs, sampling)
        prompts = inputs["attention_mask"].sum(dim=1).tolist()
        answers = output[:, inputs["input_ids"].shape[1] :].tolist()
        return [self._reply(*pair) for pair in zip(prompts, map(self._cut, answers), strict=True)]

    def stream(self, messages: Sequence[Message], sampling: Sampling) -> Iterator[Event]:
        """See :meth:`Backend.stream <qwen_vl_serve.backends.base.Backend.stream>`."""
        inputs = self._inputs([messages])
        tokens = _TokenQueue()
        text = TextPieces(self.processor.tokenizer)
        cancel = threading.Event()
        with ThreadPoolExecutor(max_workers=1) as pool:
            worker = pool.submit(self._generate_into, tokens, inputs, sampling, cancel)
            try:
                for token in tokens:
                    if piece := text.add(token):
                        yield TextDelta(piece)
            finally:
                cancel.set()
            worker.result()
        if piece := text.rest():
            yield TextDelta(piece)
        yield Finished(self._reply(inputs["input_ids"].shape[1], text.token_ids))

    def _generate_into(
        self, tokens: _TokenQueue, inputs: BatchFeature, sampling: Sampling, cancel: threading.Event
    ) -> None:
        try:
            with self._busy:
                stop = StoppingCriteriaList([_Stop(cancel)])
                self._run(inputs, sampling, streamer=tokens, stopping_criteria=stop)
        finally:
            tokens.close()

    def _inputs(self, batch: Sequence[Sequence[Message]]) -> BatchFeature:
        inputs = processor_inputs(
            self.processor,
            [list(messages) for messages in batch],
            add_generation_prompt=True,
            padding=True,
            padding_side="left",
            policy=self.policy,
        )
        return inputs.to(self.model.device)

    def _run(self, inputs: BatchFeature, sampling: Sampling, **streaming: Any) -> torch.Tensor:
        config = self._generation_config(sampling)
        with torch.inference_mode(), _seeded(sampling.seed, self.model.device):
            return self.model.generate(**inputs, generation_config=config, **streaming)

    def _generation_config(self, sampling: Sampling) -> GenerationConfig:
        config = copy.deepcopy(self.model.generation_config)
        config.max_new_tokens = sampling.max_new_tokens or config.max_new_tokens or DEFAULT_MAX_NEW_TOKENS
        config.max_length = None
        config.eos_token_id = sorted(self._ends)
        if config.pad_token_id is None:
            config.pad_token_id = self.processor.tokenizer.pad_token_id
        if sampling.temperature == 0:
            config.do_sample = False
            config.temperature = config.top_p = config.top_k = config.min_p = None
        elif sampling.temperature is not None:
            config.do_sample = True
            config.temperature = sampling.temperature
        for name in ("top_p", "top_k", "repetition_penalty"):
            value = getattr(sampling, name)
            if value is not None and (config.do_sample or name == "repetition_penalty"):
                setattr(config, name, value)
        return config

    def _cut(self, ids: list[int]) -> list[int]:
        """A row of a batch is padded behind its end token."""
        for place, token in enumerate(ids):
            if token in self._ends:
                return ids[: place + 1]
        return ids

    def _reply(self, prompt_tokens: int, ids: list[int]) -> Reply:
        reason: FinishReason = "stop" if ids and ids[-1] in self._ends else "length"
        return Reply(_decode(self.processor.tokenizer, ids), reason, prompt_tokens, tuple(ids))


class TextPieces:
    """Turns token ids, one at a time, into text that is never cut inside a character."""

    def __init__(self, tokenizer: Any) -> None:
        self.token_ids: list[int] = []
        self._tokenizer = tokenizer
        self._shown = 0

    def add(self, token: int) -> str:
        """The text this token completes; "" while a character is still open."""
        self.token_ids.append(token)
        text = _decode(self._tokenizer, self.token_ids[self._shown :])
        if text.endswith("\ufffd"):
            return ""
        self._shown = len(self.token_ids)
        return text

    def rest(self) -> str:
        """What is left when no more tokens come: an open character becomes U+FFFD."""
        text = _decode(self._tokenizer, self.token_ids[self._shown :])
        self._shown = len(self.token_ids)
        return text


def _decode(tokenizer: Any, ids: list[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


class _TokenQueue(BaseStreamer):
    """Carries tokens from the thread that generates to the one that reads."""

    def __init__(self) -> None:
        self._queue: SimpleQueue[list[int] | None] = SimpleQueue()
        self._prompt_seen = False

    def put(self, value: torch.Tensor) -> None:
        if self._prompt_seen:
            self._queue.put(value.flatten().tolist())
        self._prompt_seen = True

    def end(self) -> None:
        """The model library calls this only where nothing failed; :meth:`close` comes in any case."""

    def close(self) -> None:
        self._queue.put(None)

    def __iter__(self) -> Iterator[int]:
        while (ids := self._queue.get()) is not None:
            yield from ids


class _Stop(StoppingCriteria):
    def __init__(self, cancel: threading.Event) -> None:
        self._cancel = cancel

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> Any:
        return torch.full(input_ids.shape[:1], self._cancel.is_set(), device=input_ids.device)


@contextmanager
def _seeded(seed: int | None, device: torch.device) -> Iterator[None]:
    """Seeds torch for the time of a call, where a seed is given, and puts its generators back."""
    devices = [device.index or 0] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices, enabled=seed is not None):
        if seed is not None:
            torch.manual_seed(seed)
        yield
