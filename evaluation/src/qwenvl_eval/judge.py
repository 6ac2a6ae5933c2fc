"""A judge model says what the answers mean that no rule could decide.

cases -> prompts -> not in the cache -> judge model behind an endpoint -> cache (JSONL) -> verdicts

Multiple choice: which option the answer means. Open questions: whether it says the same as the gold answer.
Every ruling is kept with the prompt and the judge's own words, so that it can be read, and is asked for once.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

from tqdm import tqdm

from qwen_vl_serve import GREEDY, Backend, BackendError, open_backend
from qwenvl_eval.scoring.choice import strict
from qwenvl_eval.scoring.verdict import Outcome, Verdict
from qwenvl_eval.store import drop_half_line

ApiType = Literal["dash", "mit"]
CREDENTIALS: dict[ApiType, tuple[str, str]] = {
    "dash": ("CHATGPT_DASHSCOPE_API_KEY", "DASHSCOPE_API_BASE"),
    "mit": ("MIT_SPIDER_TOKEN", "MIT_SPIDER_URL"),
}
"""Variables that hold key and address."""

HOPELESS = 50
"""So many failures without one reply end it: the judge is not there."""

UNCLEAR, SAME, DIFFERENT = "UNCLEAR", "SAME", "DIFFERENT"
_LINE = re.compile(r"^\W*(?:(?:final )?(?:answer|verdict)\b\W*)?|\W+$", re.IGNORECASE)

_CHOICE_PROMPT = """\
Below are a multiple-choice question, its options and what somebody replied. Find out which option the reply \
settles on. Whether that option is correct is not your concern: do not solve the question, and do not repair \
the reply.

<question>
{question}
</question>
<options>
{options}
</options>
<reply>
{answer}
</reply>

Write the letter of that option and nothing else. If the reply settles on none of them, or on more than one, \
write UNCLEAR."""

_OPEN_PROMPT = """\
Below are a question, its reference answer and what somebody replied. Decide whether the final answer in \
the reply is the reference answer. Another notation, unit or wording for the same thing is the same; a \
different value, a missing part or several competing answers are different. Trust the reference answer. \
Where it has several lines, one of them is enough.

<question>
{question}
</question>
<reference>
{gold}
</reference>
<reply>
{answer}
</reply>

Write SAME or DIFFERENT and nothing else."""


@dataclass(frozen=True)
class Case:
    """An undecided answer. ``target`` is that of :mod:`qwenvl_eval.scoring.choice`."""

    question: str
    answer: str
    target: Mapping[str, Any]

    @property
    def open(self) -> bool:
        return self.target.get("type", "multiple-choice") == "open"


@dataclass(frozen=True)
class Rulings:
    """``verdicts`` in the order of the cases.

    ``asked``: requests sent this time. ``failed``: cases that got no reply; the next run asks again.
    ``unreadable``: cases whose reply is no ruling. Both are UNPARSED.
    """

    verdicts: list[Verdict]
    asked: int
    failed: int
    unreadable: int


class Judge:
    """``with Judge(backend, name, cache) as judge: judge.rule(cases)``; leaving it closes the back end.

    ``name`` is the judge model's: rulings in ``cache`` by another one do not count. Raises ValueError for a
    cache that is damaged elsewhere than in its last line.
    """

    def __init__(self, backend: Backend, name: str, cache: Path, *, concurrency: int = 32) -> None:
        self.name = name
        self._backend, self._cache = backend, cache
        self._concurrency = concurrency if backend.concurrent else 1
        self._known = _read_cache(cache)

    def rule(self, cases: Sequence[Case]) -> Rulings:
        """What the judge makes of the answers; an empty one is UNPARSED without being asked about.

        An answer that settles on no option is UNPARSED. ``chance`` is set where the published protocol would
        have guessed among the options and "none": without a ruling. Raises BackendError where nothing but
        failures comes.
        """
        prompts = {index: prompt_of(case) for index, case in enumerate(cases) if case.answer.strip()}
        keys = {index: self._key(prompt) for index, prompt in prompts.items()}
        first = {key: index for index, key in reversed(keys.items())}
        waiting = {index: prompts[index] for key, index in first.items() if key not in self._known}
        for index, words in self._ask(waiting):
            self._keep(keys[index], prompts[index], words, read_ruling(cases[index], words))
        verdicts = [
            _verdict(case, self._known.get(keys[index], "")) if index in keys else Verdict(Outcome.UNPARSED)
            for index, case in enumerate(cases)
        ]
        failed = sum(key not in self._known for key in keys.values())
        unreadable = sum(self._known.get(key) == "" for key in keys.values())
        return Rulings(verdicts, len(waiting), failed, unreadable)

    def _key(self, prompt: str) -> str:
        return hashlib.sha256(json.dumps([self.name, prompt]).encode()).hexdigest()

    def _ask(self, waiting: Mapping[int, str]) -> Iterator[tuple[int, str]]:
        """The judge's words as they come; what it gives none for is left out."""
        if not waiting:
            return
        replied = failed = 0
        pool = ThreadPoolExecutor(self._concurrency)
        bar = tqdm(total=len(waiting), unit=" rulings", dynamic_ncols=True)
        try:
            futures = {pool.submit(self._reply, prompt): index for index, prompt in waiting.items()}
            for future in as_completed(futures):
                words = future.result()
                bar.update()
                if isinstance(words, BackendError):
                    failed += 1
                    bar.set_postfix_str(f"{failed} failed", refresh=False)
                    if failed >= HOPELESS and not replied:
                        raise BackendError(f"the judge {self.name} replied to none of {failed}: {words}")
                else:
                    replied += 1
                    yield futures[future], words
        finally:
            bar.close()
            pool.shutdown(cancel_futures=True)

    def _reply(self, prompt: str) -> str | BackendError:
        try:
            (reply,) = self._backend.generate([[{"role": "user", "content": prompt}]], GREEDY)
        except BackendError as error:
            return error
        return reply.text

    def _keep(self, key: str, prompt: str, words: str, ruling: str) -> None:
        record = {"key": key, "judge": self.name, "prompt": prompt, "words": words, "ruling": ruling}
        self._cache.parent.mkdir(parents=True, exist_ok=True)
        with self._cache.open("a", encoding="utf-8", errors="backslashreplace") as file:
            file.write(json.dumps(record, ensure_ascii=False) + "\n")
        self._known[key] = ruling

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._backend.close()


def open_judge(
    name: str,
    cache: Path,
    *,
    api_type: ApiType | None = None,
    base_url: str | None = None,
    api_key: str | None = None,
    concurrency: int = 32,
    **options: Any,
) -> Judge:
    """The judge ``name`` at an OpenAI-compatible endpoint; rulings are kept in ``cache``.

    Either ``base_url`` (and ``api_key``), or ``api_type``: then address and key are those in the variables
    that :data:`CREDENTIALS` names. An address may end in /chat/completions. ``options`` are the back end's,
    such as ``retries`` and ``timeout``. Raises ValueError for a variable that is not set, naming it.
    """
    if (api_type is None) == (base_url is None):
        raise ValueError(f"judge {name}: give either base_url or api_type ({' or '.join(CREDENTIALS)})")
    if api_type is not None:
        if api_type not in CREDENTIALS:
            raise ValueError(f"api_type is {api_type!r}; there are {' and '.join(CREDENTIALS)}")
        api_key, base_url = (_variable(variable, api_type) for variable in CREDENTIALS[api_type])
    address = str(base_url).rstrip("/").removesuffix("/chat/completions")
    backend = open_backend(
        address, engine="openai", name=name, api_key=api_key, concurrency=concurrency, **options
    )
    return Judge(backend, name, cache, concurrency=concurrency)


def prompt_of(case: Case) -> str:
    """What the judge is asked about a case. Another wording makes every cached ruling a stranger."""
    if case.open:
        golds = case.target["answer"]
        gold = golds if isinstance(golds, str) else "\n".join(golds)
        return _OPEN_PROMPT.format(question=case.question, gold=gold, answer=case.answer)
    options = "\n".join(f"{letter}. {text}" for letter, text in case.target["options"].items())
    return _CHOICE_PROMPT.format(question=case.question, options=options, answer=case.answer)


def read_ruling(case: Case, words: str) -> str:
    """A letter or UNCLEAR, for open questions SAME or DIFFERENT; "" for words that are no ruling.

    A word must have a line of its own, and be the same wherever it has one; a letter may be declared in any
    way that :func:`~qwenvl_eval.scoring.choice.strict` reads. Thoughts before ``</think>`` do not count.
    """
    words = words.rpartition("</think>")[2]
    alone = {_LINE.sub("", line).upper() for line in words.splitlines()}
    said = alone & ({SAME, DIFFERENT} if case.open else {UNCLEAR})
    if said:
        return said.pop() if len(said) == 1 else ""
    return "" if case.open else strict(words, case.target).extracted


def _verdict(case: Case, ruling: str) -> Verdict:
    if case.open:
        outcomes = {SAME: Outcome.RIGHT, DIFFERENT: Outcome.WRONG}
        return Verdict(outcomes[ruling], ruling.lower()) if ruling else Verdict(Outcome.UNPARSED)
    if not ruling:
        return Verdict(Outcome.UNPARSED, chance=1 / (len(case.target["options"]) + 1))
    if ruling == UNCLEAR:
        return Verdict(Outcome.UNPARSED)
    return Verdict(Outcome.RIGHT if ruling == case.target["answer"] else Outcome.WRONG, ruling)


def _variable(name: str, api_type: str) -> str:
    value = os.environ.get(name)
    if not value:
        raise ValueError(f"api_type {api_type!r} needs the environment variable {name}, which is not set")
    return value


def _read_cache(path: Path) -> dict[str, str]:
    """Key -> ruling; a last line that was only half written is cut off."""
    if not drop_half_line(path):
        return {}
    known: dict[str, str] = {}
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], 1):
        try:
            record = json.loads(line)
            known[record["key"]] = record["ruling"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}, line {number}: no ruling: {error!r}; delete the line") from error
    return known
