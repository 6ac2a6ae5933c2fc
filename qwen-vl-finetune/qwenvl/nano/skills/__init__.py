"""The skills of the small model: each makes questions with true answers about pictures that it draws.

    (skill, split, seed) -> Random -> Skill.make -> Example(question, answer, media) -> a row for training
                                                                                  \\-> a question of nanobench

The same three always give the same example. What the test keeps from training, whole pairs of shape and
colour, pictograms, fonts, layouts, is said by each skill's ``held_out``; the words of the prompts are shared.
A pictogram's name can only be known from training, so `recognise` keeps back drawings, not names; `kind` and
half of `count` show pictograms that training never shows.

`qwenvl.nano.corpus` mixes them for training, `qwenvl.nano.bench` writes the test.  Measured on one core,
without writing files: 0.1 to 3 ms an example (`long_document` 7), 1.4 ms in the mean.
"""

from qwenvl.nano.skills import charts, code, screens, solids, text, things, video
from qwenvl.nano.skills.base import FPS, SPLITS, Example, Skill

SKILLS: dict[str, Skill] = {
    skill.name: skill
    for module in (things, text, screens, video, charts, solids, code)
    for skill in module.SKILLS
}

__all__ = ["FPS", "SKILLS", "SPLITS", "Example", "Skill"]
