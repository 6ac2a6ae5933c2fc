"""Answers through the model library itself: fp32 on the CPU, bf16 on CUDA.

conversations [B] -> processor_inputs -> input_ids [B, S] (padded left), pixel_values, grids
                  -> model.generate  -> ids [B, S + N]
                  -> cut at the end token, decoded, parsed -> Reply [B]

Callers in several threads take turns, token by token: nobody waits for another's whole answer.
"""

from __future__ import annotations

import copy
import threading
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
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
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.generation.streamers import BaseStreamer

from qwen_vl_serve.answers import AnswerParser, TextPieces, decode, opens_thinking
from qwen_vl_serve.backends.base import (
    DEFAULT_MAX_NEW_TOKENS,
    Event,
    Finished,
    Message,
    Reply,
    Sampling,
    Tool,
)
from qwen_vl_utils import PERMISSIVE, MediaPolicy, processor_inputs


class TransformersBackend:
    """A model and its processor; see :func:`qwen_vl_serve.open_backend`."""

    concurrent = False

    def __init__(
        self,
        model: Any,
        processor: Any,
        policy: MediaPolicy = PERMISSIVE,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        self.model = model.eval()
        self.processor = processor
        self.policy = policy
        self.chat_template_kwargs = dict(chat_template_kwargs or {})
        self._turns = _Turns(model)
        config = model.generation_config
        ends = config.eos_token_id if config.eos_token_id is not None else processor.tokenizer.eos_token_id
        self._ends = frozenset(ends if isinstance(ends, list) else [ends])

    @classmethod
    def load(
        cls,
        checkpoint: str | Path,
        *,
        device: str | None = None,
        attention: str | None = None,
        adapter: str | Path | None = None,
        policy: MediaPolicy = PERMISSIVE,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> TransformersBackend:
        """Load a checkpoint folder (or a model hub's name) and, over it, a LoRA adapter's folder.

        attention: the model library's name of one, such as "flash_attention_2"; None is its own choice.
        """
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        dtype = torch.float32 if device == "cpu" else torch.bfloat16
        model: Any = AutoModelForImageTextToText.from_pretrained(
            checkpoint, dtype=dtype, attn_implementation=attention
        )
        if adapter is not None:
            model.load_adapter(str(adapter))
        return cls(model.to(device), AutoProcessor.from_pretrained(checkpoint), policy, chat_template_kwargs)

    def close(self) -> None:
        """See :meth:`Backend.close <qwen_vl_serve.backends.base.Backend.close>`."""

    def generate(
        self, batch: Sequence[Sequence[Message]], sampling: Sampling, *, tools: Sequence[Tool] = ()
    ) -> list[Reply]:
        """See :meth:`Backend.generate <qwen_vl_serve.backends.base.Backend.generate>`."""
        if not batch:
            return []
        inputs = self._inputs(batch, tools)
        output = self._run(inputs, sampling, threading.Event())
        answers = output[:, inputs["input_ids"].shape[1] :].tolist()
        prompts = [
            ids[mask.bool()].tolist()
            for ids, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True)
        ]
        return [
            self._reply(prompt, self._cut(answer), bool(tools))
            for prompt, answer in zip(prompts, answers, strict=True)
        ]

    def stream(
        self, messages: Sequence[Message], sampling: Sampling, *, tools: Sequence[Tool] = ()
    ) -> Iterator[Event]:
        """See :meth:`Backend.stream <qwen_vl_serve.backends.base.Backend.stream>`."""
        inputs = self._inputs([messages], tools)
        prompt = inputs["input_ids"][0].tolist()
        tokens = _TokenQueue()
        text, parser = TextPieces(self.processor.tokenizer), self._parser(prompt, bool(tools))
        cancel = threading.Event()
        with ThreadPoolExecutor(max_workers=1) as pool:
            worker = pool.submit(self._generate_into, tokens, inputs, sampling, cancel)
            try:
                for token in tokens:
                    yield from parser.add(text.add(token))
            finally:
                cancel.set()
            worker.result()
        yield from parser.add(text.rest(), last=True)
        yield Finished(parser.reply(prompt, text.token_ids, self._ended(text.token_ids)))

    def _generate_into(
        self, tokens: _TokenQueue, inputs: BatchFeature, sampling: Sampling, cancel: threading.Event
    ) -> None:
        try:
            self._run(inputs, sampling, cancel, streamer=tokens)
        finally:
            tokens.close()

    def _inputs(self, batch: Sequence[Sequence[Message]], tools: Sequence[Tool]) -> BatchFeature:
        inputs = processor_inputs(
            self.processor,
            [list(messages) for messages in batch],
            add_generation_prompt=True,
            padding=True,
            padding_side="left",
            tools=list(tools) or None,
            policy=self.policy,
            **self.chat_template_kwargs,
        )
        return inputs.to(self.model.device)

    def _run(
        self, inputs: BatchFeature, sampling: Sampling, cancel: threading.Event, **streaming: Any
    ) -> torch.Tensor:
        config = self._generation_config(sampling)
        processors = LogitsProcessorList()
        if sampling.presence_penalty:
            prompt = inputs["input_ids"].shape[1]
            processors.append(_PresencePenalty(sampling.presence_penalty, prompt))
        with torch.inference_mode(), self._turns.turn(sampling.seed) as turn:
            return self.model.generate(
                **inputs,
                generation_config=config,
                logits_processor=processors,
                stopping_criteria=StoppingCriteriaList([_BetweenTokens(cancel, turn)]),
                **streaming,
            )

    def _generation_config(self, sampling: Sampling) -> GenerationConfig:
        if sampling.json_schema is not None:
            raise ValueError(
                "Sampling.json_schema: the model library cannot hold an answer to a schema; open the "
                "checkpoint with engine='vllm', or ask an endpoint"
            )
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

    def _ended(self, ids: list[int]) -> bool:
        return bool(ids) and ids[-1] in self._ends

    def _parser(self, prompt: list[int], tools: bool) -> AnswerParser:
        tail = self.processor.tokenizer.decode(prompt[-8:], skip_special_tokens=False)
        return AnswerParser(thinking=opens_thinking(tail), tools=tools)

    def _reply(self, prompt: list[int], ids: list[int], tools: bool) -> Reply:
        parser = self._parser(prompt, tools)
        for _ in parser.add(decode(self.processor.tokenizer, ids), last=True):
            pass
        return parser.reply(prompt, ids, self._ended(ids))


class _Turns:
    """Who may run the model now. Between two tokens the next in line goes on.

    The model keeps `rope_deltas` from one token to the next, and torch its random state: each turn brings
    its own and puts the others' back.
    """

    def __init__(self, model: Any) -> None:
        self.model = model.model
        self._guard = threading.Condition()
        self._line: deque[object] = deque()

    @contextmanager
    def turn(self, seed: int | None) -> Iterator[_Turn]:
        """The right to run the model, with a random state of its own where a seed is given."""
        turn = _Turn(self, seed)
        turn.begin()
        try:
            yield turn
        finally:
            turn.end()

    def wait_for(self, turn: object) -> None:
        with self._guard:
            self._line.append(turn)
            self._guard.wait_for(lambda: self._line[0] is turn)

    def leave(self) -> None:
        with self._guard:
            self._line.popleft()
            self._guard.notify_all()

    def others_wait(self) -> bool:
        return len(self._line) > 1


class _Turn:
    def __init__(self, turns: _Turns, seed: int | None) -> None:
        self._turns = turns
        self._seed = seed
        self._rope_deltas: Any = None
        self._random: _RandomState | None = None
        self._outside: _RandomState | None = None

    def begin(self) -> None:
        self._turns.wait_for(self)
        self._turns.model.rope_deltas = self._rope_deltas
        if self._seed is not None:
            self._outside = _RandomState.now()
            if self._random is None:
                torch.manual_seed(self._seed)
            else:
                self._random.restore()

    def end(self) -> None:
        self._rope_deltas = self._turns.model.rope_deltas
        if self._outside is not None:
            self._random = _RandomState.now()
            self._outside.restore()
        self._turns.leave()

    def let_others(self) -> None:
        if self._turns.others_wait():
            self.end()
            self.begin()


class _RandomState:
    """The random state of the CPU and of all CUDA devices."""

    def __init__(self, cpu: torch.Tensor, cuda: list[torch.Tensor]) -> None:
        self._cpu, self._cuda = cpu, cuda

    @classmethod
    def now(cls) -> _RandomState:
        return cls(torch.get_rng_state(), torch.cuda.get_rng_state_all())

    def restore(self) -> None:
        torch.set_rng_state(self._cpu)
        torch.cuda.set_rng_state_all(self._cuda)


class _BetweenTokens(StoppingCriteria):
    """Called after each token: lets others have their turn, and stops where the reader has gone."""

    def __init__(self, cancel: threading.Event, turn: _Turn) -> None:
        self._cancel, self._turn = cancel, turn

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> Any:
        self._turn.let_others()
        return torch.full(input_ids.shape[:1], self._cancel.is_set(), device=input_ids.device)


class _PresencePenalty(LogitsProcessor):
    """Tokens that the answer holds already become less likely, as OpenAI and vLLM define it."""

    def __init__(self, penalty: float, prompt: int) -> None:
        self._penalty, self._prompt = penalty, prompt

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        answered = input_ids[:, self._prompt :]
        return scores.scatter(1, answered, scores.gather(1, answered) - self._penalty)


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
