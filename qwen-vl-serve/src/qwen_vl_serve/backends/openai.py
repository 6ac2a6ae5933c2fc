"""Answers from an OpenAI-compatible endpoint: vLLM, SGLang or somebody's cloud.

messages -> endpoint_messages -> POST /chat/completions (asynchronous, retried) -> events

A server started by ``qwenvl-serve`` prepares pictures and videos with qwen_vl_utils itself, as training does,
so they travel as they are. Retries go on with growing pauses (up to 8 s each), long enough for a server that
restarts; a stream that has already shown something is not asked anew.
"""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any

import openai
from openai.types.chat import ChatCompletion

from qwen_vl_serve.backends.base import (
    BackendError,
    Event,
    Finished,
    FinishReason,
    Message,
    ReasoningDelta,
    Reply,
    RequestRefused,
    Sampling,
    TextDelta,
    Tool,
    ToolCall,
)
from qwen_vl_serve.backends.loop import LoopThread
from qwen_vl_serve.endpoint_messages import endpoint_messages
from qwen_vl_utils import PERMISSIVE, MediaPolicy

REFUSALS = (400, 413, 422)
"""Statuses by which a server says that it will never take this request."""

RETRIES = 12
"""About a minute and a half in all; vLLM needs most of one to come back on a small machine."""


class OpenAIBackend:
    """A client of one model at one endpoint; see :func:`qwen_vl_serve.open_backend`."""

    concurrent = True

    def __init__(
        self,
        base_url: str,
        *,
        name: str | None = None,
        api_key: str | None = None,
        policy: MediaPolicy = PERMISSIVE,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        token_ids: bool = False,
        concurrency: int = 32,
        retries: int = RETRIES,
        timeout: float = 600.0,
    ) -> None:
        """``name``: the model's at the endpoint; without it the only one it serves. ``api_key``: without it
        the variable OPENAI_API_KEY, else none. ``token_ids``: ask for the ids of prompt and answer, which
        vLLM tells. ``concurrency``: requests at once. ``timeout``: seconds without a sign of life.
        """
        self.policy = policy
        self._loop = LoopThread("openai")
        self._client = openai.AsyncOpenAI(
            base_url=base_url, api_key=api_key or _environment_key(), max_retries=retries, timeout=timeout
        )
        self._slots = asyncio.Semaphore(concurrency)
        self._extra: dict[str, Any] = {"return_token_ids": True} if token_ids else {}
        if chat_template_kwargs:
            self._extra["chat_template_kwargs"] = dict(chat_template_kwargs)
        self.name = name or self._loop.run(self._only_model())

    @asynccontextmanager
    async def _named(self) -> AsyncIterator[None]:
        try:
            yield
        except openai.APIStatusError as error:
            kind = RequestRefused if error.status_code in REFUSALS else BackendError
            raise kind(f"{self._client.base_url}: {error}") from error
        except openai.OpenAIError as error:
            raise BackendError(f"{self._client.base_url}: {error}") from error

    async def _only_model(self) -> str:
        async with self._named():
            names = [model.id async for model in self._client.models.list()]
        if len(names) != 1:
            raise ValueError(f"{self._client.base_url} serves {names or 'no model'}; say which with name=")
        return names[0]

    def close(self) -> None:
        """See :meth:`Backend.close <qwen_vl_serve.backends.base.Backend.close>`."""
        self._loop.run(self._client.close())
        self._loop.close()

    def generate(
        self, batch: Sequence[Sequence[Message]], sampling: Sampling, *, tools: Sequence[Tool] = ()
    ) -> list[Reply]:
        """See :meth:`Backend.generate <qwen_vl_serve.backends.base.Backend.generate>`."""
        if len(batch) == 1:  # as in stream: the caller's thread would only wait
            request = self._request(batch[0], sampling, tools)
            return [self._loop.run(self._sent(request))]

        async def reply(messages: Sequence[Message]) -> Reply:
            return await self._answer(lambda: self._request(messages, sampling, tools))

        return self._loop.gather(map(reply, batch))

    def stream(
        self, messages: Sequence[Message], sampling: Sampling, *, tools: Sequence[Tool] = ()
    ) -> Iterator[Event]:
        """See :meth:`Backend.stream <qwen_vl_serve.backends.base.Backend.stream>`."""
        # In the caller's thread: it would only wait, and the loop has others to serve.
        request = self._request(messages, sampling, tools)
        yield from self._loop.iterate(self._events(request))

    def _request(
        self, messages: Sequence[Message], sampling: Sampling, tools: Sequence[Tool]
    ) -> dict[str, Any]:
        """What both ways of asking share."""
        request: dict[str, Any] = {
            "model": self.name,
            "messages": endpoint_messages(messages, self.policy),
        }
        names = {"max_new_tokens": "max_tokens"}
        for field in ("max_new_tokens", "temperature", "top_p", "presence_penalty", "seed"):
            if (value := getattr(sampling, field)) is not None:
                request[names.get(field, field)] = value
        extra = dict(self._extra)
        for field in ("top_k", "repetition_penalty"):
            if (value := getattr(sampling, field)) is not None:
                extra[field] = value
        if sampling.json_schema is not None:
            schema = {"name": "answer", "schema": dict(sampling.json_schema), "strict": True}
            request["response_format"] = {"type": "json_schema", "json_schema": schema}
        if tools:
            request["tools"] = list(tools)
        return request | {"extra_body": extra}

    async def _answer(self, request: Callable[[], Mapping[str, Any]]) -> Reply:
        """One answer of many. ``request`` is called when its turn has come: then its media are read."""
        async with self._slots:
            return await self._reply(await asyncio.to_thread(request))

    async def _sent(self, request: Mapping[str, Any]) -> Reply:
        async with self._slots:
            return await self._reply(request)

    async def _reply(self, request: Mapping[str, Any]) -> Reply:
        async with self._named():
            answer = await self._completion(request)
        choice = answer.choices[0]
        calls = [
            ToolCall(call.function.name, call.function.arguments)
            for call in choice.message.tool_calls or []
            if call.type == "function"
        ]
        return Reply(
            text=choice.message.content or "",
            finish_reason=_finish_reason(choice.finish_reason),
            prompt_tokens=answer.usage.prompt_tokens if answer.usage else 0,
            completion_tokens=answer.usage.completion_tokens if answer.usage else 0,
            reasoning=_reasoning(choice.message),
            tool_calls=tuple(calls),
            token_ids=tuple(_extra(choice, "token_ids") or ()),
            prompt_token_ids=tuple(_extra(answer, "prompt_token_ids") or ()),
        )

    async def _completion(self, request: Mapping[str, Any]) -> ChatCompletion:
        """The endpoint's answer; where it is no chat completion it is asked for again.

        The body is sent as it is: the client's own method walks through every message of it first, which
        costs more than all else that is done for a request here.
        """
        body = {name: value for name, value in request.items() if name != "extra_body"} | request[
            "extra_body"
        ]
        for pause in (0.5, 2.0, None):
            try:
                answer = await self._client.post("/chat/completions", body=body, cast_to=ChatCompletion)
                if isinstance(answer, ChatCompletion) and answer.choices and answer.choices[0].message:
                    return answer
                found = repr(answer)
            except json.JSONDecodeError as error:
                found = str(error)
            if pause is not None:
                await asyncio.sleep(pause)
        raise BackendError(f"{self._client.base_url}: its answer is no chat completion: {found[:300]}")

    async def _events(self, request: Mapping[str, Any]) -> AsyncGenerator[Event, None]:
        reply = _Growing()
        async with self._slots, self._named():
            chunks = await self._client.chat.completions.create(
                **request, stream=True, stream_options={"include_usage": True}
            )
            async with chunks:
                async for chunk in chunks:
                    for event in reply.add(chunk):
                        yield event
        yield Finished(reply.finished())


class _Growing:
    """A reply as its chunks come in."""

    def __init__(self) -> None:
        self._text: list[str] = []
        self._reasoning: list[str] = []
        self._calls: dict[int, list[str]] = {}
        self._token_ids: list[int] = []
        self._prompt_ids: list[int] = []
        self._usage: Any = None
        self._finish_reason: str | None = None

    def add(self, chunk: Any) -> Iterator[Event]:
        self._usage = chunk.usage or self._usage
        self._prompt_ids += _extra(chunk, "prompt_token_ids") or []
        for choice in chunk.choices:
            self._finish_reason = choice.finish_reason or self._finish_reason
            self._token_ids += _extra(choice, "token_ids") or []
            if reasoning := _reasoning(choice.delta):
                self._reasoning.append(reasoning)
                yield ReasoningDelta(reasoning)
            if choice.delta.content:
                self._text.append(choice.delta.content)
                yield TextDelta(choice.delta.content)
            for call in choice.delta.tool_calls or []:
                parts = self._calls.setdefault(call.index, ["", ""])
                parts[0] += call.function.name or ""
                parts[1] += call.function.arguments or ""

    def finished(self) -> Reply:
        return Reply(
            text="".join(self._text),
            finish_reason=_finish_reason(self._finish_reason),
            prompt_tokens=self._usage.prompt_tokens if self._usage else 0,
            completion_tokens=self._usage.completion_tokens if self._usage else 0,
            reasoning="".join(self._reasoning),
            tool_calls=tuple(ToolCall(*parts) for _, parts in sorted(self._calls.items())),
            token_ids=tuple(self._token_ids),
            prompt_token_ids=tuple(self._prompt_ids),
        )


def _extra(part: Any, name: str) -> Any:
    """A field that the endpoint adds to OpenAI's."""
    return (part.model_extra or {}).get(name)


def _reasoning(message: Any) -> str:
    return _extra(message, "reasoning") or _extra(message, "reasoning_content") or ""


def _finish_reason(told: str | None) -> FinishReason:
    if told in ("stop", "length", "tool_calls"):
        return told
    kind = RequestRefused if told == "content_filter" else BackendError
    raise kind(f"the endpoint ended its answer with finish_reason={told!r}, which is no answer")


def _environment_key() -> str:
    return os.environ.get("OPENAI_API_KEY") or "none"
