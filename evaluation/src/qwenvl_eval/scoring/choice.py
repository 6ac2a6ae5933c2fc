"""Which option an answer means: the rule of the judge protocol, and a strict one of our own.

:func:`by_rule` is what comes before the judge model in VLMEvalKit and in the Qwen reports: an answer is
decided when one option's letter stands alone in it, or one option's text. What it leaves UNPARSED goes to the
judge, see :mod:`qwenvl_eval.judge`. It differs from the published code in what it leaves: a letter behind a
word that does not lead up to an answer is part of a name ("Vitamin C deficiency"), an option's text must be
whole words ("2" is not in "12"), and open questions are compared, not turned into two options.

:func:`strict` needs no judge: the answer has to be declared. In this order,

1. a declaration, of several the last: ``\\boxed{B}``, "the answer is B because", "Answer: (B)", "I choose B",
   "B is correct", "答案是B", with the letter or with the option's text;
2. lines that are a letter and nothing else (a small one if the answer has no other line);
3. an answer that is an option's text;
4. lines that open with a letter, "B. red" or "(B) red";
5. letters in brackets or in bold, anywhere.

The first of these that finds something decides. Two letters there, or one that is no option, are no answer.

Where they differ: "The answer is A because ..." means nothing to the rule, since A may be an article, and nor
does "(A) looks right, but the answer is B", with its two letters; strict reads A and B. "It must be the red
car" and "I would say C" declare nothing and mean nothing to strict; the rule reads the option "red car", and
C. Refusals are REFUSED for the rule, which then asks no judge, and UNPARSED for strict. Neither guesses. The
published code does, among the options and "none", without a judge or a readable word from it: ``chance``.

Targets: ``answer`` (a letter; for open questions a text or a list of texts, each of which is right),
``options`` (letter -> text), and ``type``, "multiple-choice" or "open"; without it "multiple-choice".
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from qwenvl_eval.scoring.exact import normalise
from qwenvl_eval.scoring.verdict import Outcome, Verdict

_REFUSAL = re.compile(
    r"\b(?:can(?:no|['’])t|cannot|unable to|not able to|impossible to)\s+"
    r"(?:help with|assist with|process|determine the (?:correct )?answer|answer (?:this|the) question"
    r"|(?:see|view|access) (?:the|this|any|images?))"
    r"|\bwithout (?:the|an|any) (?:image|picture|video)\b"
    r"|\bno (?:image|picture|video) (?:was|is|has been) (?:provided|attached|given)\b",
    re.IGNORECASE,
)

_SPLIT = r".()\[\],:;!*#{}\s"
_LETTER = re.compile(rf"(?<![^{_SPLIT}])([A-Z])(?![^{_SPLIT}])")
_WORD_BEFORE = re.compile(r"([^\W\d_]+)[ \t]+$")
_LEADS_UP = frozenset(
    "is be was are means equals answer option choice letter choose select pick chose selected picked chosen "
    "think believe guess say so therefore thus hence then with for to as only just probably likely".split()
)

_ONE = r"(?!I\s+[a-z])[(\[{\"'“]?\s?([A-Z])\s?[)\]}\"'”]?(?![A-Za-z0-9_'’+#-])"
_FIRST = re.compile(_ONE)
_AND = re.compile(
    rf"\s*(?:,?\s*\b(?:and|or)\b|/|&|、|和|或)\s*{_ONE}|\s*,\s*{_ONE}(?=\s*(?:[.,;)]|$|\n|and\b|or\b))"
)
_SMALL = re.compile(r"[(\[]([a-z])[)\]]|([a-z])(?=[.,;)]?\s*(?:$|\n))")

_BEST = r"(?:correct|right|best|final|chosen|selected)"
_CONTENT = (
    r"(?=[\s:：=\"“]*(?i:(?:therefore|thus|clearly|indeed|definitely|most likely|likely|probably)\b[\s,]*)?"
    rf"(?i:(?:the\s+)?(?:{_BEST}\s+)?(?:option|choice|answer|letter)\b[\s:：]*)?(\S.{{0,400}}))"
)
_DECLARATIONS = tuple(
    re.compile(pattern)
    for pattern in (
        r"\\f?boxed\s*\{((?:[^{}]++|\{[^{}]*+\})*+)\}",
        r"<answer>\s*([^<]{1,400})",
        rf"(?i:(?<!\bthis )\b(?:answer|{_BEST}\s+(?:option|choice|letter))\b"
        rf"(?:[^.\n:：]{{0,60}}?\b(?:is|(?<!could )(?<!might )(?<!may )be)\b|\s*[:：=])){_CONTENT}",
        rf"(?im:^\W{{0,9}}(?:(?:final|correct)\s+){{0,2}}answer[^\w\n]{{0,9}}\n){_CONTENT}",
        r"\bI(?:['’](?:ll|d)| will| would)? (?:choose|select|pick|chose|selected|picked|go with|answer)\b"
        rf"{_CONTENT}",
        rf"(?:答案\s*(?:应该?)?(?:是|为|[:：])|选择?(?!项)){_CONTENT}",
        r"(?<!\bnor )(?<!\bor )(?<!\band )(?<!\bif )(?<!\bwhether )(?<![\w(])"
        r"((?:(?i:option|choice|answer) )?\(?[A-Z]\)?)\s+is\s+(?:therefore |thus |clearly )?"
        r"(?:the answer\b|(?:the )?(?:most |only )?(?:correct|right|best)"
        r"(?=\s+(?:answer|option|choice|one)\b|\s*[.,;!\n]|\s*$))",
        r"(?i:\b(?:therefore|thus|hence|so|option|choice|answer),?\s+)(\(?[A-Z]\)?)[.!\s]*\Z",
    )
)
"""What leads up to an answer, with the answer, or the rest of its line, as the group."""

MOST_DECLARATIONS = 200
"""Of an answer that declares without end only so many are read, the last."""

_ARTICLE = re.compile(r"^(?:the|an?)\s+", re.IGNORECASE)
_BARE = re.compile(r"^[ \t]*[(\[]?([A-Z])[)\]]?[.:,;!]?[ \t]*$", re.MULTILINE)
_SOLE = re.compile(r"\s*[(\[]?([a-z])[)\]]?[.:,;!]?\s*")
_OPENING = re.compile(r"^[ \t]*(?:[-•>][ \t]*)?(?:[(\[]([A-Z])[)\]]|([A-Z])[.:,)])(?!\w).*$", re.MULTILINE)
_BRACKETED = re.compile(r"(?<!\w)[(\[]([A-Z])[)\]]")
_MARKED = re.compile(r"(?<![\w(\[])([A-Z])[.:)](?!\w)")


def by_rule(answer: str, target: Mapping[str, Any]) -> Verdict:
    """The rule of the judge protocol; UNPARSED is what the judge is asked about. See the module's docstring.

    An open question is RIGHT where answer and gold are the same, and UNPARSED everywhere else.
    """
    if _is_open(target):
        right = _open_answer(answer, target)
        return right if right.right else Verdict(Outcome.UNPARSED)
    options = target["options"]
    if _REFUSAL.search(answer) and not any(_REFUSAL.search(text) for text in options.values()):
        return Verdict(Outcome.REFUSED)
    letter = _lone_letter(answer, options) or _lone_text(answer, options)
    if letter is None:
        return Verdict(Outcome.UNPARSED, chance=1 / (len(options) + 1))
    return Verdict(Outcome.RIGHT if letter == target["answer"] else Outcome.WRONG, letter)


def strict(answer: str, target: Mapping[str, Any]) -> Verdict:
    """Ours: only a declared answer counts. See the module's docstring.

    An open question is RIGHT where its last declared answer, or all of it where none is declared, is a gold
    text or a number equal to it.
    """
    if _is_open(target):
        return _open_answer(answer, target)
    options = target["options"]
    letters = _decided(_plain(answer), options)
    if len(letters) != 1 or not letters <= options.keys():
        return Verdict(Outcome.UNPARSED)
    (letter,) = letters
    return Verdict(Outcome.RIGHT if letter == target["answer"] else Outcome.WRONG, letter)


def _is_open(target: Mapping[str, Any]) -> bool:
    return target.get("type", "multiple-choice") == "open"


def _lone_letter(answer: str, options: Mapping[str, str]) -> str | None:
    """The only option whose letter is a word of its own, unless it may be an article or part of a name."""
    found = [match for match in _LETTER.finditer(answer) if match[1] in options]
    if len({match[1] for match in found}) != 1:
        return None
    letter = found[0][1]
    if letter == "A" and len(re.findall(rf"[^{_SPLIT}]+", answer)) > 3:
        return None
    for match in found:
        word = _WORD_BEFORE.search(answer, max(0, match.start() - 40), match.start())
        if word is None or word[1].lower() in _LEADS_UP:
            return letter
    return None


def _lone_text(answer: str, options: Mapping[str, str]) -> str | None:
    """The only option whose text stands in the answer as whole words, in any case."""
    lowered = answer.lower()
    found = [
        letter
        for letter, text in options.items()
        if text.strip() and re.search(rf"(?<!\w){re.escape(text.strip().lower())}(?!\w)", lowered)
    ]
    return found[0] if len(found) == 1 else None


def _decided(text: str, options: Mapping[str, str]) -> set[str]:
    """The letters at the first place that has some, of those the module's docstring lists."""
    declared = (_named(content, options) for content in reversed(_declarations(text)[-MOST_DECLARATIONS:]))
    last = next(filter(None, declared), set[str]())
    return (
        last
        or set(_BARE.findall(text))
        or ({sole[1].upper()} if (sole := _SOLE.fullmatch(text)) else set())
        or _options_of(text, options)
        or {letter for line in _OPENING.finditer(text) for letter in _marked(line)}
        or set(_BRACKETED.findall(text))
    )


def _declarations(text: str) -> list[str]:
    """What is declared to be the answer, each up to the end of its line, in the order of the text."""
    found = [match for pattern in _DECLARATIONS for match in pattern.finditer(text)]
    return [match[1].strip() for match in sorted(found, key=lambda match: match.start(1))]


def _named(content: str, options: Mapping[str, str]) -> set[str]:
    """The letters that a declaration opens with, or that of the option whose text it is."""
    content = re.sub(r"^(?:option|choice)\s+", "", content, flags=re.IGNORECASE)
    if first := _FIRST.match(content):
        letters = {first[1]}
        place = first.end()
        while more := _AND.match(content, place):
            letters.add(more[1] or more[2])
            place = more.end()
        return letters
    for text in (content, _sentence(content), _ARTICLE.sub("", _sentence(content))):
        if by_text := _options_of(text, options):
            return by_text
    small = _SMALL.match(content)
    return {(small[1] or small[2]).upper()} if small else set()


def _options_of(text: str, options: Mapping[str, str]) -> set[str]:
    text = normalise(text)
    return {letter for letter, option in options.items() if text and normalise(_plain(option)) == text}


def _marked(line: re.Match[str]) -> Iterable[str]:
    """All letters in a line that are written like the one it opens with."""
    return (_BRACKETED if line[1] else _MARKED).findall(line[0]) or [line[1] or line[2]]


def _plain(text: str) -> str:
    """Without the marks of Markdown and LaTeX; a letter in bold is one in brackets from here on."""
    text = re.sub(r"\\(?:text|mathrm|textbf|mathbf|mbox)\s*\{([^{}]*)\}", r"\1", text)
    text = re.sub(r"(\*\*|__)\s*[(\[]?([A-Z])[)\]]?[.:]?\s*\1", r"(\2)", text)
    return re.sub(r"\*+|`|\$|^[ \t]*#+[ \t]*", "", text, flags=re.MULTILINE)


def _open_answer(answer: str, target: Mapping[str, Any]) -> Verdict:
    """An open question's answer against its golds: the same text once normalised, or the same number."""
    said = _plain(answer)
    if declared := _declarations(said):
        said = _sentence(declared[-1])
    said = normalise(said)
    if not said:
        return Verdict(Outcome.UNPARSED)
    golds = target["answer"]
    golds = [golds] if isinstance(golds, str) else golds
    right = any(_same(said, normalise(_plain(gold))) for gold in golds)
    return Verdict(Outcome.RIGHT if right else Outcome.WRONG, said)


def _sentence(text: str) -> str:
    return re.split(r"\.\s|\n", text, maxsplit=1)[0]


def _same(one: str, other: str) -> bool:
    if one == other:
        return True
    try:
        return float(one.replace(",", "")) == float(other.replace(",", ""))
    except ValueError:
        return False
