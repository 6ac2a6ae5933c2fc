"""Whether the small model has the skills that its card claims, on held-out examples drawn here.

card -> claimed skills; skill, seed -> example -> answer -> score, beside the best answer without looking
"""

import re
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

from qwen_vl_serve import GREEDY, Backend, Message
from qwenvl.nano.bench import constants, save_media
from qwenvl.nano.skills import SKILLS, Example
from qwenvl_eval.scoring.skills import METRICS

from .model import LONGEST_ANSWER, NANO, is_nano, lane

FIRST = 10_000  # seed of the first example; nanobench's questions are those before


def claimed() -> set[str]:
    """The skills that the card of the model that comes along claims, by the last column of its table."""
    card = (NANO / "README.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\w+) \|.*\| (yes|no) \|$", card, re.MULTILINE)
    if not rows:
        raise ValueError(f"{NANO / 'README.md'}: no table of skills with a last column of yes or no")
    return {name for name, answer in rows if answer == "yes"}


def check_skills(model: Backend, *names: str) -> None:
    """Ask held-out questions of each skill and print the scores.

    Raises AssertionError where the small model's card claims a skill and it is no better here than the best
    answer given without looking.
    """
    known = claimed()
    for name in names:
        skill = SKILLS[name]
        examples = [skill.example("test", FIRST + place) for place in range(lane(20, 200))]
        blind = constants(skill, lane(60, 300))
        with TemporaryDirectory() as folder:
            batch = [_messages(one, Path(folder), str(place)) for place, one in enumerate(examples)]
            replies = model.generate(batch, replace(GREEDY, max_new_tokens=LONGEST_ANSWER))
        metric = METRICS[skill.metric]
        targets = [{"answer": one.answer, **one.target} for one in examples]
        score = sum(metric(r.text, target) for r, target in zip(replies, targets, strict=True))
        fixed = sum(
            metric(blind.get(one.form, ""), target) for one, target in zip(examples, targets, strict=True)
        )
        claim = "claimed" if name in known else "not claimed"
        total = len(examples)
        print(f"{name}: {score / total:.0%} of {total} right, {fixed / total:.0%} without looking ({claim})")
        if is_nano() and name in known:
            assert score > fixed, f"the card claims {name}: {score:g} of {total}, {fixed:g} without looking"


def _messages(example: Example, folder: Path, name: str) -> list[Message]:
    """The example as a conversation; its media are written to the folder."""
    kind = "video" if example.frames else "image"
    paths = iter(save_media(folder, name, example.pictures, example.frames))
    parts = re.split("(<image>|<video>)", example.question)
    content = [
        {"type": kind, kind: str(folder / next(paths))} if part[:1] == "<" else {"type": "text", "text": part}
        for part in parts
        if part
    ]
    return [{"role": "user", "content": content}]
