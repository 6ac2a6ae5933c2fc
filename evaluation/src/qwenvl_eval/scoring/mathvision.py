"""MathVision, as its own script scores it (``evaluate`` and ``is_equal`` there) and strictly.

Targets: ``answer``, a letter A to E for a question with options and else the value in LaTeX, and ``options``,
the texts of A to E or an empty list.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from qwenvl_eval.scoring import choice, maths
from qwenvl_eval.scoring.verdict import Outcome, Verdict

_LETTERS = "ABCDE"
_PHRASES = ("the final answer is", "the answer is", "the correct answer is", "the answer should be")

# What the script takes out or puts in, one after the other; some of it stands there twice.
_CLEANING = (
    *((" ", ""), ("\\,", ""), ("∞", "\\infty"), ("+\\infty", "\\infty"), ("\\\\", "\\"), ("\n", "")),
    *(("\\text", ""), ("\\mbox", ""), ("bmatrix", "pmatrix"), ("\\left", ""), ("\\right", "")),
    *(("^{\\circ}", ""), ("^\\circ", ""), ("{m}^3", ""), ("m^3", "")),
    *(("{units}", ""), ("units", ""), ("{km}", ""), ("km", "")),
    *(("\\!", ""), ("\\\\", "\\"), ("tfrac", "frac"), ("dfrac", "frac"), ("\\left", ""), ("\\right", "")),
    *(("^{\\circ}", ""), ("^\\circ", ""), ("\\$", ""), ("$", ""), ("\\%", ""), ("{.", "{0.")),
)

_DECLARED = re.compile(
    r"(?:\banswer(?:\s+(?:is|should be|must be)\b|\s*[:：=])|答案\s*(?:是|为|[:：]))[\s:：]*(\S[^\n]{0,300})",
    re.IGNORECASE,
)
_BARE = re.compile(
    r"\S{1,60}|(?=[^\n]{1,100}$)(?:\\[A-Za-z]++|\\[^A-Za-z\n]|[^A-Za-z\\\n]|\b[A-Za-z]{1,2}+\b)++"
)


def official(answer: str, target: Mapping[str, Any]) -> Verdict:
    """The benchmark's own verdict; an answer of which nothing is left is UNPARSED.

    An expression that the script would work on for more than a second has no value here.
    """
    extracted = extract(answer)
    if not extracted:
        return Verdict(Outcome.UNPARSED)
    return Verdict(Outcome.RIGHT if is_equal(extracted, target) else Outcome.WRONG, extracted[:200])


def strict(answer: str, target: Mapping[str, Any]) -> Verdict:
    """Ours: the answer has to be declared, and equal to the right one.

    Declared is what stands in the last ``\\boxed{}``, else behind the last "answer is", else all of an answer
    that is one value. It is compared by :func:`maths.compare`, within a relative 1e-6, which is not the
    official rule. With options the declared value has to be the right option's and no other's; letters are
    read by :func:`choice.strict`.
    """
    declared = _declared(answer)
    options = dict(zip(_LETTERS, target["options"], strict=False))
    if not options:
        if declared is None:
            return Verdict(Outcome.UNPARSED)
        return _verdict(declared, {"": target["answer"]}, "")
    if declared is not None and maths.plain(declared).strip("().").upper() not in options:
        by_value = _verdict(declared, options, target["answer"])
        if by_value.outcome is not Outcome.UNPARSED:
            return by_value
    return choice.strict(answer, {"answer": target["answer"], "options": options})


def extract(response: str) -> str:
    """What the script reads in a response, in lower case; official name ``model_answer``."""
    text = response.strip()
    for letter in _LETTERS:
        starts = (f"{letter}\n", f"({letter})\n", f"({letter}) {letter}\n")
        if text.startswith(starts) or text.endswith((f" {letter}.", f" ({letter}).")):
            text = letter
    tail = text.rpartition("is ")[2].rstrip(".")
    if _is_number(tail):
        text = tail
    if "oxed{" not in text:
        for phrase in _PHRASES:
            text = _behind(_behind(text, phrase), phrase.replace("the", "The"))
    elif text.count("oxed{") > 1:
        text = "\\boxed{" + text.rpartition("oxed{")[2]
    text = _cleaned(_unboxed(text.lower().replace("{}", "")))
    for letter in _LETTERS.lower():
        text = text.replace(f"({letter})", letter)
    for letter in _LETTERS.lower():
        text = text.replace(f"{{{letter}}}", letter)
    return text.rstrip(".").lstrip(":").strip()


def is_equal(extracted: str, target: Mapping[str, Any]) -> bool:
    """Whether the script takes ``extracted`` for the letter or the value; official name ``is_equal``.

    Raises ValueError for an answer that is none of the options.
    """
    gold, options = target["answer"], target["options"]
    if not options:
        return _equal(gold, extracted)
    if len(gold) != 1 or gold not in _LETTERS[: len(options)]:
        raise ValueError(f"answer {gold!r} is none of the {len(options)} options; give a letter from A on")
    return _equal(gold, extracted) or _equal(options[_LETTERS.index(gold)], extracted)


def _equal(gold: str, said: str) -> bool:
    gold, said = gold.lower(), said.lower()
    if not gold.strip(" ") or not said.strip(" "):
        return False
    if gold.strip() == said.strip():
        return True
    gold, said = _tuple(gold), _tuple(said)
    if gold == said:
        return True
    wanted = maths.value(gold)
    if wanted is None:
        return False
    found = maths.value(said)
    return found is not None and round(wanted, 2) == round(found, 2)


def _tuple(text: str) -> str:
    """With the numbers of a tuple or list worked out and rounded; unchanged where one of them is no number.

    Official name: ``eval_tuple``.
    """
    parts = text[1:-1].split(",")
    if text[0] + text[-1] not in ("()", "[]") or not 1 < len(parts) <= 24:
        return text
    rounded = []
    for part in parts:
        if "infty" in part or part in ("a", "-a"):
            rounded.append(part)
            continue
        number = maths.value(part)
        if number is None:
            return text
        rounded.append(str(round(number, 2)))
    return text[0] + ",".join(rounded) + text[-1]


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _behind(text: str, phrase: str) -> str:
    """The first sentence behind the last ``phrase``; all of the text where it does not occur."""
    _, found, tail = text.rpartition(phrase)
    tail = tail.strip()
    return tail.partition("\n")[0].partition(". ")[0] if found else tail


def _unboxed(text: str) -> str:
    """From the first box to the last brace, then up to a brace that closes nothing, behind the last "="."""
    start, end = text.find("oxed{") + 5, text.rfind("}")
    if 5 <= start <= end:
        text = text[start:end]
    closing, opening = text.find("}"), text.find("{")
    if closing >= 0 and (opening < 0 or closing < opening):
        text = text[:closing]
    return text.rpartition("=")[2].rpartition("\\approx")[2]


def _cleaned(text: str) -> str:
    """LaTeX in the form in which the script compares it; official name ``_strip_string``.

    Fractions without braces get them only beside a root.
    """
    for old, new in _CLEANING:
        text = text.replace(old, new)
    if text.startswith("."):
        text = "0" + text
    if "sqrt" in text:
        text = _braced_fractions(re.sub(r"\\sqrt(?!\\sqrt)([^{])", r"\\sqrt{\1}", text, flags=re.DOTALL))
    if text == "0.5":
        return "\\frac{1}{2}"
    above, slash, below = text.partition("/")
    if slash and all(re.fullmatch(r"0|-?[1-9]\d{0,4000}", part, re.ASCII) for part in (above, below)):
        return f"\\frac{{{above}}}{{{below}}}"
    return text


def _braced_fractions(text: str) -> str:
    """Official name: ``_fix_fracs``. A fraction that ends too soon leaves all of them as they are."""
    first, *rest = text.split("\\frac")
    parts = [first]
    for part in rest:
        if part.startswith("{"):
            parts.append(part)
        elif len(part) < 2:
            return text
        else:
            below = part[1:] if part[1] == "{" else f"{{{part[1]}}}{part[2:]}"
            parts.append(f"{{{part[0]}}}{below}")
    return "\\frac".join(parts)


def _declared(answer: str) -> str | None:
    """What the answer declares to be the answer; None where it declares nothing."""
    box = _last_box(answer)
    if box is not None:
        return box
    declared = _DECLARED.findall(answer)
    if declared:
        return re.split(r"\.(?:\s|$)|\s(?:because|since|as)\s", declared[-1].strip("*` "), maxsplit=1)[0]
    answer = answer.strip()
    return answer if _BARE.fullmatch(answer) else None


def _last_box(answer: str) -> str | None:
    """What stands in the last box that is closed."""
    openings = list(re.finditer(r"\\f?boxed\s{0,3}\{", answer))
    for opening in reversed(openings[-20:]):
        depth = 1
        for place in range(opening.end(), min(len(answer), opening.end() + 1000)):
            depth += (answer[place] == "{") - (answer[place] == "}")
            if depth == 0:
                return answer[opening.end() : place].strip()
    return None


def _verdict(declared: str, options: Mapping[str, str], gold: str) -> Verdict:
    """Of a declared value against options; UNPARSED where it is none of several, or more than one."""
    comparison = maths.compare(declared, list(options.values()))
    found = [letter for letter, equal in zip(options, comparison.equal, strict=True) if equal]
    if len(options) > 1 and len(found) != 1:
        return Verdict(Outcome.UNPARSED)
    note = f" [{comparison.note}]" if comparison.note else ""
    return Verdict(Outcome.RIGHT if found == [gold] else Outcome.WRONG, declared[:200] + note)
