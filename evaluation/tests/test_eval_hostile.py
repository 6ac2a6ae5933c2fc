"""Ten thousand answers that no honest model gives, through every scorer there is."""

from __future__ import annotations

import functools
import importlib
import inspect
import pkgutil
import random
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from qwenvl_eval import scoring, task, tasks
from qwenvl_eval.scoring import Outcome, Scorer, Verdict, maths
from qwenvl_eval.scoring.skills import METRICS

SECONDS = 2.0
COUNT = 10_000

CHOICE = {
    "type": "multiple-choice",
    "answer": "B",
    "options": {"A": "a red car", "B": "12", "C": "(", "D": ""},
}
OPEN = {"type": "open", "answer": ["\\frac{1}{2}", "0.5", "[a-z]+"], "options": {}}
FREE = {"answer": "$\\frac{3 \\sqrt{6}}{2}$", "options": []}
VALUES = {"answer": "C", "options": ["$\\frac{1}{2}$", "2", "$45^{\\circ}$", "$\\pi$", "none of these"]}
TEXTS = {"answer": ["Rue de la Paix", "12"]}
PICTURE = {
    "dataset": "Raccoon",
    "image_id": 1,
    "height": 480,
    "width": 640,
    "resized": None,
    "categories": ["raccoon"],
    "truth": [{"label": "raccoon", "bbox": [1.0, 2.0, 30.0, 40.0]}],
}
CALL = '<tool_call>{"name": "use", "arguments": %s}</tool_call>'
BOX = {"box": [1, 2, 30, 40], "boxes": [[1, 2, 30, 40]], "most": 0.5}
CUBOID = [0.1, 0.2, 3.0, 1.0, 1.0, 1.0, 0.0, 0.0, 0.5]
SKILLS: dict[str, Mapping[str, Any]] = {
    **{metric: {"answer": "a red car", **BOX} for metric in ("exact", "edit", "box", "boxes", "point")},
    "click": {"answer": CALL % '{"action": "left_click", "coordinate": [5, 5]}', **BOX},
    "zoom": {"answer": CALL % '{"bbox_2d": [1, 2, 30, 40], "label": "a"}', **BOX},
    "fields": {"answer": '{"shop": "Sun Bakery", "total": "12.00"}'},
    "span": {"answer": '{"start": 1.0, "end": 2.5}', "span": [1.0, 2.5]},
    "cuboid": {"answer": f'{{"bbox_3d": {CUBOID}, "label": "a"}}', "cuboid": CUBOID},
    "document": {"answer": '<html><body>\n<p data-bbox="1 2 30 40">a</p>\n</body></html>'},
    "drawing": {"answer": '<svg><rect x="1" y="2" width="30" height="40" fill="red"/></svg>'},
}
TARGETS: dict[str, list[Mapping[str, Any]]] = {
    "qwenvl_eval.scoring.choice": [CHOICE, OPEN],
    "qwenvl_eval.scoring.mathvision": [FREE, VALUES],
    "qwenvl_eval.scoring.mmmu": [CHOICE, OPEN],
    "qwenvl_eval.scoring.realworldqa": [CHOICE, {**OPEN, "answer": "12"}],
    "qwenvl_eval.scoring.skills": [{**SKILLS[metric], "metric": metric} for metric in METRICS],
    "qwenvl_eval.scoring.text": [{**TEXTS, "boxes": [[1, 2, 30, 40]]}],
    "qwenvl_eval.scoring.videomme": [{"answer": "C"}],
    "qwenvl_eval.tasks.odinw": [PICTURE, {**PICTURE, "resized": [476, 644]}],
}


def scorers_of(module: Any) -> Iterator[Scorer]:
    for name, function in vars(module).items():
        if inspect.isfunction(function) and function.__module__ == module.__name__ and name[0] != "_":
            signature = inspect.signature(function)
            if [*signature.parameters] == ["answer", "target"] and signature.return_annotation == "Verdict":
                yield function


def modules() -> Iterator[Any]:
    for package in (scoring, tasks):
        for module in pkgutil.iter_modules(package.__path__):
            yield importlib.import_module(f"{package.__name__}.{module.name}")


SCORERS = {
    f"{module.__name__}.{scorer.__name__}": scorer for module in modules() for scorer in scorers_of(module)
}


def test_every_scorer_is_attacked() -> None:
    assert {name.rpartition(".")[0] for name in SCORERS} == set(TARGETS)
    used = {scorer for name in task.task_names() for scorer in task.task_class(name).protocols.values()}
    assert used <= set(SCORERS.values())


# ---- what is attacked with

WRITES = "pwned"
CODE = (
    f"__import__('os').system('touch {WRITES}')",
    f"open('{WRITES}','w').write('1')",
    f"(lambda: open('{WRITES}','w'))()",
    f"exec(\"open('{WRITES}','w')\")",
    f"`touch {WRITES}`; $(touch {WRITES})",
    f"\\input{{|touch {WRITES}}}",
    f"\\immediate\\write18{{touch {WRITES}}}",
    f"!!python/object/apply:os.system ['touch {WRITES}']",
    "().__class__.__base__.__subclasses__()",
    "{0.__class__.__mro__} %s %n {} \\1 \\g<0> (?P<a>",
    "<script>alert(1)</script> '; DROP TABLE samples; --",
)
BOMBS = (
    *(
        "9**9**9**9",
        "10^{10^{10}}",
        "9^{9^{9^{9}}}",
        "((9^9)^9)^9",
        "2^{2^{2^{2^{2^{2}}}}}",
        "(9^{9^9},9^{9^9})",
    ),
    *("100000000!", "3!!!!!!!!", "((((3!)!)!)!)!", "\\binom{10^9}{10^8}", "\\sum_{n=1}^{10^{12}} n!"),
    *(
        "\\prod_{n=1}^{10^{9}} n",
        "\\int_0^{10^9} e^{x^{x}} dx",
        "\\lim_{x\\to 0} x^{x^{x}}",
        "\\sqrt[99999999]{2}",
    ),
    *(
        "\\gcd(10^{99},9^{99})",
        "\\log_{0} 0",
        "\\frac{1}{0}",
        "0^{-1}",
        "\\infty-\\infty",
        "1e999999999",
        "-1e-999",
    ),
    *("nan", "inf", "-Infinity", "1_000", "0x1F", "1" * 5000, "0." + "3" * 5000, "1/" + "7" * 4400),
)
SIGNS = (
    *(
        "\x00",
        "\x1b[2J",
        "\r\n",
        "\x85",
        "\u2028",
        "\ud800",
        "\udfff",
        "\u202e",
        "\u200f",
        "\ufeff",
        "\u0301" * 9,
    ),
    *("👩‍👩‍👧", "İ", "ß", "ﬀ", "Ω", "选B", "答案是", "٣", "²", "½", "Ⅻ", "１２", "एक", "А", "В", "𝐁", "Ａ"),
)
PIECES = (
    *(
        "\\boxed{",
        "}",
        "{",
        "(",
        ")",
        "[",
        "]",
        "\\left(",
        "\\right)",
        "\\frac{",
        "\\frac",
        "}{",
        "\\sqrt",
        "\\sqrt{",
    ),
    *(
        "^",
        "_",
        "^{",
        "\\text{",
        "$",
        "$$",
        "\\\\",
        "\\",
        "|",
        "=",
        "\\approx",
        "%",
        "\\%",
        "^{\\circ}",
        "\\pi",
        ",",
    ),
    *(
        "the answer is ",
        "The final answer is",
        "is ",
        "so ",
        "Answer:",
        "answer",
        "(A",
        "B)",
        " C ",
        "D.",
        "(E) E\n",
    ),
    *(
        "A",
        "B",
        "AB",
        "1",
        "12",
        "-3",
        "0.5",
        "1/2",
        "1,234",
        ".",
        ". ",
        "\n",
        " ",
        "\t",
        "**B**",
        "```json\n",
        "```",
    ),
    *(
        '{"bbox_2d": [',
        "[[",
        '"label":',
        "[0, 0, 10, 10]",
        "NaN",
        "null",
        "-",
        "x",
        "\\begin{pmatrix}",
        "&",
        "could be ",
    ),
    *(
        "</think>",
        "<think>",
        "I cannot",
        "option",
        "red car",
        "Best answer:",
        "\\{",
        "\\}",
        "*",
        "#",
        "or",
        "and",
    ),
)


def soup(chance: random.Random) -> str:
    pool = PIECES if chance.random() < 0.6 else PIECES + SIGNS
    return "".join(chance.choice(pool) for _ in range(chance.randint(1, 24)))


def framed(chance: random.Random) -> str:
    core = chance.choice(chance.choice((CODE, BOMBS, SIGNS)))
    frame = chance.choice(
        ("{}", "\\boxed{{{}}}", "The answer is {}.", "({})", "$ {} $", "({}, {})", "[{}]", "{}\n{}")
    )
    return frame.replace("{{{}}}", "{" + core + "}").replace("{}", core)


def repeated(chance: random.Random) -> str:
    piece = chance.choice(PIECES + SIGNS)
    return piece * chance.randint(2, 300) + chance.choice(("", chance.choice(PIECES)))


def nested(chance: random.Random) -> str:
    opening, closing = chance.choice((*NESTS, ("{", "}"), ("|", "|")))
    depth = chance.randint(2, 40)
    return opening * depth + chance.choice(("1", "x", "")) + closing * (depth - chance.randint(0, 1))


NESTS = (
    ("(", ")"),
    ("[", "]"),
    ("{", "}"),
    ("\\frac{", "}{2}"),
    ("\\sqrt{", "}"),
    ("\\left(", "\\right)"),
    ("\\boxed{", "}"),
    ("2^{", "}"),
    ('{"a":', "}"),
    ("-", ""),
    ("not ", ""),
)


@functools.cache
def short_answers() -> list[str]:
    chance = random.Random(20250101)
    makers: tuple[Callable[[random.Random], str], ...] = (soup, soup, soup, soup, framed, repeated, nested)
    return ["", " ", "\x00", *(chance.choice(makers)(chance) for _ in range(COUNT - 3))]


MEGABYTE = 1_000_000
LONG = 100_000  # characters, about what a model can answer with 32,768 tokens


@functools.cache
def long_answers() -> dict[str, str]:
    found = {f"{LONG} of {piece!r}": piece * (LONG // len(piece)) for piece in REPEATED}
    found |= {f"{MEGABYTE} of {piece!r}": piece * MEGABYTE for piece in "({[} \\9"}
    for opening, closing in NESTS:
        depth = 30_000
        found[f"nested {opening!r}"] = opening * depth + "1" + closing * depth
    found["a megabyte of digits in a box"] = "\\boxed{" + "7" * MEGABYTE + "}"
    found["a list of boxes"] = "[" + '{"bbox_2d": [1, 2, 3, 4], "label": "raccoon"},' * 300 + "]"
    return found


REPEATED = (
    *("(", "[", "{", "}", "\\", "$", " ", "\n", "\t", ":", ".", "-", "9", "é", "\ud800", "*", "#"),
    *(
        "is ",
        "so ",
        "answer ",
        "answer is ",
        "the answer is ",
        "Answer:\n",
        "the best option ",
        "(A",
        "(A) ",
        "A, ",
        "A or ",
    ),
    *(
        "A\n",
        "1,",
        "1/",
        "0.1",
        "oxed{",
        "\\boxed{",
        "\\boxed{}",
        "\\frac",
        "\\sqrt",
        "=",
        "\\text{B}",
        "\\text{",
        "I choose ",
    ),
    *(
        "答案是",
        "选",
        "option ",
        "correct ",
        "<answer>",
        "**B",
        "__",
        "[1, 2, 3, ",
        "[[1,",
        "```json\n",
        "</think>",
        "<think>",
    ),
    *(
        "Best answer:",
        "cannot ",
        "can't see the ",
        "without the ",
        "and ",
        "A. \n",
        "( ",
        "x=",
        "\\quad",
        "\\approx ",
    ),
)


# ---- the attack


def outcome_of(scorer: Scorer, answer: str, target: Mapping[str, Any]) -> float:
    """Seconds of computing in this process; for the program beside it the kernel sees to the limit."""
    started = time.process_time()
    verdict = scorer(answer, target)
    seconds = time.process_time() - started
    assert isinstance(verdict, Verdict) and isinstance(verdict.outcome, Outcome)
    assert isinstance(verdict.extracted, str) and 0 <= verdict.chance <= 1
    assert verdict.extracted == "" or verdict.outcome is not Outcome.UNPARSED
    return seconds


@pytest.fixture
def nothing_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The program that computes is running, and leaves nothing in the folder, nor does anything else."""
    assert maths.value("1+1") == 2
    folder = tmp_path / "empty"
    folder.mkdir()
    monkeypatch.chdir(folder)
    yield
    assert list(folder.iterdir()) == []


def slow(scorer: Scorer, answer: str, target: Mapping[str, Any]) -> bool:
    """Whether it takes too long twice; a busy machine may make it slow once."""
    return all(outcome_of(scorer, answer, target) > SECONDS for _ in range(2))


@pytest.mark.parametrize("name", SCORERS)
def test_ten_thousand_short_answers(name: str, nothing_written: None) -> None:
    targets = TARGETS[name.rpartition(".")[0]]
    before = maths.ended()
    for number, answer in enumerate(short_answers()):
        target = targets[number // 7 % len(targets)]
        assert not slow(SCORERS[name], answer, target), repr(answer[:300])
    assert maths.ended() - before <= 10


@pytest.mark.parametrize("name", SCORERS)
def test_long_answers(name: str, nothing_written: None) -> None:
    targets = TARGETS[name.rpartition(".")[0]]
    too_long = [
        label
        for number, (label, answer) in enumerate(long_answers().items())
        if slow(SCORERS[name], answer, targets[number % len(targets)])
    ]
    assert too_long == []
