"""A task: data, a prompt, and the protocols by which its answers are scored.

    data folder or file -> Task.open -> Dataset -> Samples, one after the other -> messages for a back end
                                                          \\-> target, groups -> protocols -> verdicts

A benchmark is one file in ``qwenvl_eval/tasks/`` with one subclass of :class:`Task`, whose fields are its
options: each becomes a flag of the command line.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import inspect
import pkgutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

from qwen_vl_serve import Message, Sampling
from qwenvl_eval.scoring import Outcome, Scorer, Verdict


@dataclass(frozen=True)
class Sample:
    """One question.

    ``id`` is unique in the data and stays the same from run to run. ``messages`` are what the back end
    gets; pictures are paths, data URLs or bytes. ``target`` is a JSON object, all that the protocols need
    to judge the answer. ``cluster`` is the picture or video that the question is about: questions about the
    same one are not independent. ``groups`` are for the tables, ``{"subject": "Art"}``.
    """

    id: str
    messages: list[Message]
    target: Mapping[str, Any]
    cluster: str
    groups: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Dataset:
    """What :meth:`Task.open` found: ``files`` that were read for it, how many samples, and a way to walk
    them.

    Iterating reads from disk and keeps one sample at a time; it may be done again and again, in the same
    order.
    """

    files: tuple[Path, ...]
    size: int
    walk: Callable[[], Iterator[Sample]]

    def __len__(self) -> int:
        return self.size

    def __iter__(self) -> Iterator[Sample]:
        return self.walk()

    def checksum(self) -> str:
        """SHA-256 over the files' own, in order, in hexadecimal."""
        whole = hashlib.sha256()
        for path in self.files:
            with path.open("rb") as file:
                whole.update(hashlib.file_digest(file, "sha256").digest())
        return whole.hexdigest()


@dataclass(frozen=True)
class Judged:
    """A prediction and what a protocol says of it; ``truncated`` where it was cut at the token limit."""

    id: str
    replicate: int
    target: Mapping[str, Any]
    cluster: str
    groups: Mapping[str, str]
    truncated: bool
    verdict: Verdict


@dataclass(frozen=True)
class Metric:
    """A figure of the benchmark's own, such as mean AP; ``parts`` are the figures that it is made of."""

    name: str
    value: float
    note: str = ""
    parts: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Task(ABC):
    """A benchmark; see the module's docstring. Fields of subclasses are options, see :func:`option`.

    ``title``: its name as people write it. ``protocols``: name -> scorer, the headline's first. ``tables``:
    groups by which the report breaks the headline down, one table each; of two names, the first are rows
    and the second columns. ``presets``: how the published numbers were sampled, "instruct" and "think"; the
    first is the default. ``judged``: the protocol whose ``undecided`` outcomes a judge model may decide; ""
    for none. ``reads_truncated``: protocols whose published code scores an answer that was cut at the token
    limit.
    """

    title: ClassVar[str]
    protocols: ClassVar[Mapping[str, Scorer]]
    tables: ClassVar[tuple[tuple[str, ...], ...]] = ()
    presets: ClassVar[Mapping[str, Sampling]] = {"greedy": Sampling(temperature=0, max_new_tokens=128)}
    judged: ClassVar[str] = ""
    undecided: ClassVar[frozenset[Outcome]] = frozenset({Outcome.UNPARSED})
    reads_truncated: ClassVar[frozenset[str]] = frozenset()

    @property
    def scorers(self) -> Mapping[str, Scorer]:
        """The protocols that count with these options, the headline's first."""
        return self.protocols

    @abstractmethod
    def open(self, data: Path) -> Dataset:
        """The questions in ``data``.

        Raises ValueError, naming the file, what was found and what to do, for data that is not the
        benchmark's.
        """

    def headline(self, judged: Sequence[Judged]) -> Sequence[Judged]:
        """Those that the share of right answers and the tables are about; the others serve ``notes``."""
        return judged

    def notes(self, judged: Sequence[Judged]) -> list[str]:
        """Lines of Markdown that stand below the headline, such as a table of the benchmark's own."""
        return []

    def metrics(self, protocol: str, judged: Sequence[Judged]) -> list[Metric]:
        """Figures that the share of right answers is not, the benchmark's own headline first."""
        return []


def option(default: Any, help: str) -> Any:
    """A field of a task that is a flag of the command line."""
    return field(default=default, metadata={"help": help})


def task_names() -> list[str]:
    """The tasks that come along."""
    from qwenvl_eval import tasks

    return sorted(module.name for module in pkgutil.iter_modules(tasks.__path__))


def task_class(name: str) -> type[Task]:
    """The task of that name, or the one in a Python file of one's own.

    Raises ValueError for a name nobody knows and for a file without exactly one task.
    """
    if name.endswith(".py"):
        module = _module_of(Path(name))
    elif name in task_names():
        module = importlib.import_module(f"qwenvl_eval.tasks.{name}")
    else:
        known = ", ".join(task_names())
        raise ValueError(f"no task is called {name!r}; there are {known}, and any .py file that defines one")
    found = [
        value
        for value in vars(module).values()
        if inspect.isclass(value) and issubclass(value, Task) and value.__module__ == module.__name__
    ]
    if len(found) != 1:
        raise ValueError(f"{name}: one subclass of qwenvl_eval.Task is expected there, found {len(found)}")
    return found[0]


def _module_of(path: Path) -> ModuleType:
    if not path.is_file():
        raise ValueError(f"{path}: no such file; give a task's name or the .py file that defines it")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
