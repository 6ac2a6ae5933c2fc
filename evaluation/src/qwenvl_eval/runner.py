"""Ask a back end every question that has no answer yet, and keep each answer as it arrives.

    Dataset -> questions (sample, replicate, key) -> not in the store -> batches -> workers: backend.generate
                                                                                       |
                                            progress bar <- store (JSONL) <- predictions

An engine that runs requests side by side (vLLM, an endpoint) gets them one by one from many threads;
transformers gets batches of similar length. A sample that can't be answered is kept with the reason and
stops nothing.
"""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice
from queue import SimpleQueue
from typing import Any

from tqdm import tqdm

from qwen_vl_serve import Backend, BackendError, Message, Reply, RequestRefused, Sampling
from qwen_vl_utils import MediaError
from qwenvl_eval.media import Describe, hash_media
from qwenvl_eval.store import Prediction, Store
from qwenvl_eval.task import Dataset, Sample

HOPELESS = 50
"""So many failures without one answer end a run: the server is gone, or was never there."""

WINDOW = 4
"""Batches that are sorted by length together; their pictures are in memory."""


@dataclass(frozen=True)
class Question:
    """A sample asked for the ``replicate``-th time. ``prompt`` is what is kept of its messages."""

    sample: Sample
    index: int
    replicate: int
    key: str
    prompt: list[Message]
    sampling: Sampling


@dataclass(frozen=True)
class Outcome:
    """What a run came to: questions that have an answer or a refusal now, and those that failed."""

    answered: int
    failed: int


def question_key(prompt: Sequence[Message], sampling: Sampling, replicate: int, before: int) -> str:
    """SHA-256 in hexadecimal of all that decides an answer besides the model: ``prompt`` with the hashes of
    its media, sampling parameters, and which replicate it is; and of how often the same prompt stood
    ``before`` in the data.
    """
    parts = [prompt, {k: v for k, v in asdict(sampling).items() if v is not None}, replicate, before]
    return hashlib.sha256(json.dumps(parts, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def questions(data: Dataset, sampling: Sampling, replicates: int) -> Iterator[Question]:
    """Every question of a run in the order of the data; replicate r is sampled with seed + r."""
    met = Counter[bytes]()
    for index, sample in enumerate(data):
        prompt = hash_media(sample.messages)
        digest = hashlib.md5(json.dumps(prompt, sort_keys=True).encode(), usedforsecurity=False).digest()
        for number in range(replicates):
            seed = None if sampling.seed is None else sampling.seed + number
            chosen = replace(sampling, seed=seed)
            key = question_key(prompt, chosen, number, met[digest])
            yield Question(sample, index, number, key, prompt, chosen)
        met[digest] += 1


def infer(
    backend: Backend,
    data: Dataset,
    store: Store,
    sampling: Sampling,
    *,
    replicates: int = 1,
    batch_size: int = 64,
    concurrency: int = 32,
    describe: Describe | None = None,
) -> Outcome:
    """Ask what ``store`` does not hold yet.

    ``batch_size`` is for an engine that wants batches, ``concurrency`` for one that runs requests side by
    side. ``describe`` tells the sizes and frames that the model sees of a sample's media. Raises
    BackendError where nothing but failures comes.
    """
    waiting = (q for q in questions(data, sampling, replicates) if q.key not in store)
    workers, batches = 1, _sorted_batches(waiting, batch_size)
    if backend.concurrent:
        workers, batches = concurrency, ([question] for question in waiting)
    total, answered, failed = len(data) * replicates, len(store), 0
    with tqdm(total=total, initial=answered, unit=" questions", dynamic_ncols=True) as bar:
        for predictions in _in_threads(
            lambda batch: _ask(backend, batch, describe, workers), batches, workers
        ):
            store.add(predictions)
            lost = [p.error for p in predictions if p.finish_reason == "failed"]
            failed += len(lost)
            answered += len(predictions) - len(lost)
            if failed >= HOPELESS and answered == bar.initial:
                raise BackendError(
                    f"{failed} questions failed and none was answered; the last one: {lost[-1]}"
                )
            if failed:
                bar.set_postfix_str(f"{failed} failed", refresh=False)
            bar.update(len(predictions))
    return Outcome(answered, failed)


def _ask(
    backend: Backend, batch: Sequence[Question], describe: Describe | None, beside: int
) -> list[Prediction]:
    """The predictions of a batch; where it can't be answered together, each question is asked alone.

    ``beside``: how many batches are under way together; they share the time.
    """
    began = time.perf_counter()
    try:
        media = [describe(q.sample.messages) if describe else [] for q in batch]
        replies = backend.generate([q.sample.messages for q in batch], batch[0].sampling)
    except (BackendError, ValueError) as error:
        if len(batch) > 1:
            return [p for question in batch for p in _ask(backend, [question], describe, beside)]
        refused = isinstance(error, RequestRefused) or not isinstance(error, BackendError | MediaError)
        kind = "refused" if refused else "failed"
        seconds = (time.perf_counter() - began) / beside
        return [_prediction(batch[0], [], None, seconds, kind, str(error))]
    seconds = (time.perf_counter() - began) / len(batch) / beside
    rows = zip(batch, media, replies, strict=True)
    return [_prediction(q, seen, reply, seconds, reply.finish_reason, "") for q, seen, reply in rows]


def _prediction(
    question: Question,
    media: list[Mapping[str, Any]],
    reply: Reply | None,
    seconds: float,
    finish_reason: str,
    error: str,
) -> Prediction:
    sample = question.sample
    return Prediction(
        id=sample.id,
        index=question.index,
        replicate=question.replicate,
        key=question.key,
        prompt=question.prompt,
        media=media,
        answer=reply.text if reply else "",
        reasoning=reply.reasoning if reply else "",
        finish_reason=finish_reason,
        error=error,
        prompt_tokens=reply.prompt_tokens if reply else 0,
        completion_tokens=reply.completion_tokens if reply else 0,
        seconds=seconds,
        target=sample.target,
        cluster=sample.cluster,
        groups=sample.groups,
    )


def _sorted_batches(waiting: Iterator[Question], size: int) -> Iterator[list[Question]]:
    """Batches of one sampling and of similar length, the longest of each window first, so that padding is
    small.
    """
    while window := list(islice(waiting, size * WINDOW)):
        window.sort(key=lambda q: (q.replicate, _length(q.prompt)), reverse=True)
        start = 0
        while start < len(window):
            same = (q for q in islice(window, start, start + size) if q.sampling == window[start].sampling)
            batch = list(same)
            start += len(batch)
            yield batch


def _length(prompt: Sequence[Message]) -> tuple[int, int, int]:
    """Orders prompts by tokens: videos, pixels of pictures, characters."""
    videos = pixels = characters = 0
    for message in prompt:
        content = message["content"]
        items: list[Any] = [{"type": "text", "text": content}] if isinstance(content, str) else content
        for item in items:
            match item["type"]:
                case "text":
                    characters += len(item["text"])
                case "image":
                    pixels += item["image"].get("pixels", 0)
                case "video":
                    videos += 1
    return videos, pixels, characters


def _in_threads(work: Any, batches: Iterator[list[Question]], workers: int) -> Iterator[list[Prediction]]:
    """``work(batch)`` of every batch as it is done; an error in it is raised here.

    The threads are daemons: whoever stops the run does not wait for answers that are on their way.
    """
    todo: SimpleQueue[list[Question] | None] = SimpleQueue()
    done: SimpleQueue[list[Prediction] | BaseException] = SimpleQueue()

    def run() -> None:
        while (batch := todo.get()) is not None:
            try:
                done.put(work(batch))
            except BaseException as error:  # handed on to the caller's thread
                done.put(error)

    def finished() -> list[Prediction]:
        result = done.get()
        if isinstance(result, BaseException):
            raise result
        return result

    threads = [threading.Thread(target=run, daemon=True) for _ in range(workers)]
    for thread in threads:
        thread.start()
    pending = 0
    try:
        for batch in batches:
            todo.put(batch)
            pending += 1
            while pending >= 2 * workers:
                yield finished()
                pending -= 1
        for _ in range(pending):
            yield finished()
            pending -= 1
    finally:
        for _ in threads:
            todo.put(None)
        if not pending:
            for thread in threads:
                thread.join()
