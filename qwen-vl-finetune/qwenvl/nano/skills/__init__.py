"""The skills of the small model: each makes questions with true answers about pictures that it draws.

    (skill, split, seed) -> Random -> Skill.make -> Example(question, answer, media) -> a row for training
                                                                                  \\-> a question of nanobench

The same three always give the same example. What the test keeps from training, whole pairs of shape and
colour, pictograms, fonts, layouts, is said by each skill's ``held_out``; the words of the prompts are shared.
A pictogram's name can only be known from training, so `recognise` keeps back drawings, not names; `kind` and
half of `count` show pictograms that training never shows.

To train on them: `python -m qwenvl.nano.bench FOLDER --train ROWS` writes a corpus, all skills by turns
(`bench._write_part` decides the mix).  Measured on one core, without writing files: 0.1 to 3 ms an example
(`long_document` 7), 1.4 ms in the mean, about 730 a second.  Tokens with today's vocabulary, prompt + answer:
colour 35 + 2, count 33 + 1, grounding 39 + 42, detection 38 + 85, gui 53 + 62, receipt 54 + 49,
document_html 59 + 139, direction 154 + 2; 95 in the mean over twenty skills.  JSON costs most of it: a
vocabulary with its punctuation in whole tokens, and digits one by one, should come first.
"""

from qwenvl.nano.skills import charts, code, screens, solids, text, things, video
from qwenvl.nano.skills.base import FPS, SPLITS, Example, Skill

SKILLS: dict[str, Skill] = {
    skill.name: skill
    for module in (things, text, screens, video, charts, solids, code)
    for skill in module.SKILLS
}

__all__ = ["FPS", "SKILLS", "SPLITS", "Example", "Skill"]
