"""Answers through vLLM in this process: its asynchronous engine, truly streaming, many at once.

messages -> prompt_and_media -> {"prompt": text, "multi_modal_data": {image, video}} -> AsyncLLM -> events

Pictures and frames reach the engine at their final size, so it resizes nothing (``do_resize: False``).
"""

from __future__ import annotations

import asyncio
import itertools
import os
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwen_vl_serve import adapters
from qwen_vl_serve.answers import AnswerParser, TextPieces, opens_thinking
from qwen_vl_serve.backends.base import (
    DEFAULT_MAX_NEW_TOKENS,
    Event,
    Finished,
    Message,
    Reply,
    Sampling,
    Tool,
)
from qwen_vl_serve.backends.loop import LoopThread
from qwen_vl_utils import PERMISSIVE, MediaPolicy, prompt_and_media

if TYPE_CHECKING:
    from collections.abc import Iterator

    from vllm import SamplingParams  # pyright: ignore[reportMissingImports]

MEDIA_AT_ONCE = 64
"""Pictures, and videos, in one prompt, where the caller's ``limit_mm_per_prompt`` says nothing."""


class VllmBackend:
    """An engine and its processor; see :func:`qwen_vl_serve.open_backend`."""

    concurrent = True

    def __init__(
        self,
        engine: Any,
        processor: Any,
        generation_config: Any,
        loop: LoopThread,
        *,
        adapter: Any = None,
        policy: MediaPolicy = PERMISSIVE,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        self.engine = engine
        self.processor = processor
        self.policy = policy
        self.chat_template_kwargs = dict(chat_template_kwargs or {})
        self._generation_config = generation_config
        self._loop = loop
        self._adapter = adapter
        self._numbers = itertools.count()

    @classmethod
    def load(
        cls,
        checkpoint: str | Path,
        *,
        adapter: str | Path | None = None,
        policy: MediaPolicy = PERMISSIVE,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        **engine_args: Any,
    ) -> VllmBackend:
        """Start the engine. ``engine_args`` are vLLM's own, such as ``tensor_parallel_size``."""
        from transformers import AutoProcessor, GenerationConfig

        defaults: dict[str, Any] = {
            "limit_mm_per_prompt": {"image": MEDIA_AT_ONCE, "video": MEDIA_AT_ONCE},
            # Between JSON's tokens a small model may write spaces without end.
            "structured_outputs_config": {"backend": "xgrammar", "disable_any_whitespace": True},
        }
        if on_cpu():
            os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # the engine does not start without it
            defaults |= {"dtype": "float32", "enforce_eager": True, "max_model_len": 4096}
        from vllm.engine.arg_utils import AsyncEngineArgs  # pyright: ignore[reportMissingImports]
        from vllm.lora.request import LoRARequest  # pyright: ignore[reportMissingImports]
        from vllm.v1.engine.async_llm import AsyncLLM  # pyright: ignore[reportMissingImports]

        if adapter is not None:
            defaults |= {"enable_lora": True, "max_lora_rank": adapters.served_rank(Path(adapter))}
        arguments = AsyncEngineArgs(
            model=str(checkpoint),
            **(defaults | engine_args),
            mm_processor_kwargs={"do_resize": False},
        )

        async def start() -> AsyncLLM:
            return AsyncLLM.from_engine_args(arguments)

        loop = LoopThread("vllm")
        return cls(
            loop.run(start()),
            AutoProcessor.from_pretrained(checkpoint),
            GenerationConfig.from_pretrained(checkpoint),
            loop,
            adapter=LoRARequest("adapter", 1, str(adapter)) if adapter is not None else None,
            policy=policy,
            chat_template_kwargs=chat_template_kwargs,
        )

    def close(self) -> None:
        """See :meth:`Backend.close <qwen_vl_serve.backends.base.Backend.close>`."""

        async def stop() -> None:
            if self.engine.output_handler is not None:
                self.engine.output_handler.cancel()
            await asyncio.to_thread(self.engine.shutdown)

        self._loop.run(stop())
        self._loop.close()
        del self.engine

    def generate(
        self, batch: Sequence[Sequence[Message]], sampling: Sampling, *, tools: Sequence[Tool] = ()
    ) -> list[Reply]:
        """See :meth:`Backend.generate <qwen_vl_serve.backends.base.Backend.generate>`."""

        async def reply(messages: Sequence[Message]) -> Reply:
            async for event in self._events(messages, sampling, tools):
                if isinstance(event, Finished):
                    return event.reply
            raise RuntimeError("vLLM ended a request without a last output")

        return self._loop.gather(reply(messages) for messages in batch)

    def stream(
        self, messages: Sequence[Message], sampling: Sampling, *, tools: Sequence[Tool] = ()
    ) -> Iterator[Event]:
        """See :meth:`Backend.stream <qwen_vl_serve.backends.base.Backend.stream>`."""
        return self._loop.iterate(self._events(messages, sampling, tools))

    async def _events(
        self, messages: Sequence[Message], sampling: Sampling, tools: Sequence[Tool]
    ) -> AsyncGenerator[Event, None]:
        prompt, thinking = await asyncio.to_thread(self._prompt, messages, tools)
        [rendered] = await self.engine.renderer.render_cmpl_async([prompt])
        text = TextPieces(self.processor.tokenizer)
        parser = AnswerParser(thinking=thinking, tools=bool(tools))
        outputs = self.engine.generate(
            rendered, self._params(sampling), str(next(self._numbers)), lora_request=self._adapter
        )
        last: Any = None
        async with aclosing(outputs):
            async for last in outputs:
                for token in last.outputs[0].token_ids:
                    for event in parser.add(text.add(token)):
                        yield event
        for event in parser.add(text.rest(), last=True):
            yield event
        ended = last.outputs[0].finish_reason == "stop"
        yield Finished(parser.reply(last.prompt_token_ids, text.token_ids, ended))

    def _prompt(self, messages: Sequence[Message], tools: Sequence[Tool]) -> tuple[dict[str, Any], bool]:
        text, images, videos = prompt_and_media(
            self.processor,
            list(messages),
            add_generation_prompt=True,
            tools=list(tools) or None,
            policy=self.policy,
            **self.chat_template_kwargs,
        )
        prompt: dict[str, Any] = {"prompt": text, "multi_modal_data": {}}
        if images:
            prompt["multi_modal_data"]["image"] = images
        if videos:
            prompt["multi_modal_data"]["video"] = [
                (video.frames, {**video.metadata, "do_sample_frames": False}) for video in videos
            ]
            if "second_per_grid_ts" in self.processor.model_input_names:
                rates = [float(video.metadata.sample_fps) for video in videos]
                prompt["mm_processor_kwargs"] = {"fps": rates}
        return prompt, opens_thinking(text)

    def _params(self, sampling: Sampling) -> SamplingParams:
        from vllm import SamplingParams  # pyright: ignore[reportMissingImports]
        from vllm.sampling_params import RequestOutputKind, StructuredOutputsParams  # pyright: ignore[reportMissingImports]

        config = self._generation_config
        chosen: dict[str, Any] = {
            "max_tokens": sampling.max_new_tokens or config.max_new_tokens or DEFAULT_MAX_NEW_TOKENS,
            "repetition_penalty": _first(sampling.repetition_penalty, config.repetition_penalty, 1.0),
            "presence_penalty": _first(sampling.presence_penalty, 0.0),
        }
        sampled = sampling.temperature != 0 and (sampling.temperature is not None or config.do_sample)
        if sampled:
            chosen["temperature"] = _first(sampling.temperature, config.temperature, 1.0)
            chosen["top_p"] = _first(sampling.top_p, config.top_p, 1.0)
            chosen["top_k"] = _first(sampling.top_k, config.top_k, 50)
            chosen["seed"] = sampling.seed
        else:
            chosen["temperature"] = 0.0
        if sampling.json_schema is not None:
            chosen["structured_outputs"] = StructuredOutputsParams(json=dict(sampling.json_schema))
        ends = config.eos_token_id
        return SamplingParams(
            **chosen,
            stop_token_ids=ends if isinstance(ends, list) else None,
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
        )


def _first(*values: Any) -> Any:
    return next(value for value in values if value is not None)


def on_cpu() -> bool:
    """Whether the vLLM that is installed here is the one for CPUs."""
    from importlib.metadata import version

    return "cpu" in version("vllm")
