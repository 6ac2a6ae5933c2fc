"""What a skill and one question of it are."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from random import Random
from typing import Any

from PIL import Image

SPLITS = ("train", "test")
FPS = 2  # frames a second of every video


@dataclass(frozen=True)
class Example:
    """One question with its answer.

    ``form`` names the wording without what it is filled with: the constant answer is chosen for each form.
    ``question`` has <image> or <video> where the media stand. ``pictures`` are the images in order;
    ``frames`` are those of one video at `FPS`, of even number. ``target`` is what the skill's metric needs
    besides the answer. Coordinates are whole numbers, 0 to 1000 over width or height.
    """

    form: str
    question: str
    answer: str
    pictures: tuple[Image.Image, ...] = ()
    frames: tuple[Image.Image, ...] = ()
    target: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Skill:
    """A name, how it is scored (a name of `qwenvl_eval.scoring.skills.METRICS`), who makes a question, and
    what the test keeps from training.
    """

    name: str
    metric: str
    make: Callable[[Random, str], Example]
    held_out: str

    def example(self, split: str, seed: int) -> Example:
        """The example of (skill, split, seed), always the same. Raises ValueError for an unknown split."""
        if split not in SPLITS:
            raise ValueError(f"split is {split!r}; there are {', '.join(SPLITS)}")
        return self.make(Random(f"{self.name}/{split}/{seed}"), split)


def relative(values, size: tuple[int, int]) -> list[int]:
    """Pixels x, y, x, y, ... of a picture of (width, height) as whole numbers from 0 to 1000."""
    return [min(1000, max(0, round(1000 * value / size[place % 2]))) for place, value in enumerate(values)]
