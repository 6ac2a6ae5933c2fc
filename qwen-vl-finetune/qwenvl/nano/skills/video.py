"""What moves in a video, in which direction, in which order, and when."""

import json
from random import Random

from PIL import Image

from qwenvl.nano.skills import canvas
from qwenvl.nano.skills.base import FPS, Example, Skill
from qwenvl.nano.skills.things import PAIRS, different

SIZE = (128, 128)
FRAMES = 8

WAYS = {
    "left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1),
}  # fmt: skip


def _with(picture: Image.Image, sprite: Image.Image, centre: tuple[float, float]) -> None:
    spot = round(centre[0] - sprite.width / 2), round(centre[1] - sprite.height / 2)
    picture.paste(sprite, spot, sprite)


def direction(random: Random, split: str) -> Example:
    """One thing moves, up to two lie still."""
    items = different(random, split, random.randint(1, 3), unseen=1)
    back = canvas.ground(random, SIZE, [item.rgb for item in items])
    sprites = [canvas.sprite(random, item, random.uniform(10, 16)) for item in items]
    answer = random.choice(tuple(WAYS))
    still = [(random.randint(20, 108), random.randint(20, 108)) for _ in sprites[1:]]
    way, reach = WAYS[answer], random.randint(26, 44)
    middle = random.randint(48, 80), random.randint(48, 80)
    frames = []
    for number in range(FRAMES):
        frame = back.copy()
        for one, spot in zip(sprites[1:], still, strict=True):
            _with(frame, one, spot)
        share = 2 * number / (FRAMES - 1) - 1
        _with(frame, sprites[0], (middle[0] + share * reach * way[0], middle[1] + share * reach * way[1]))
        frames.append(frame)
    if random.random() < 0.7:
        form = random.choice(
            ("In which direction does the {} move?", "Where does the {} go: left, right, up, down?")
        )
        return Example(form, f"<video>{form.format(items[0].name)}", answer, frames=tuple(frames))
    form = "What moves?"
    return Example(form, f"<video>{form}", items[0].name, frames=tuple(frames))


def _appearing(
    random: Random, split: str, count: int
) -> tuple[list[canvas.Item], list[Image.Image], Image.Image]:
    items = different(random, split, count, unseen=1)
    random.shuffle(items)
    back = canvas.ground(random, SIZE, [item.rgb for item in items])
    return items, [canvas.sprite(random, item, random.uniform(12, 20)) for item in items], back


def order(random: Random, split: str) -> Example:
    """Three things appear one after the other and stay."""
    items, sprites, back = _appearing(random, split, 3)
    spots = random.sample([(32, 32), (96, 32), (32, 96), (96, 96)], 3)
    begins = sorted(random.sample(range(1, FRAMES), 3))
    frames = []
    for number in range(FRAMES):
        frame = back.copy()
        for one, spot, begin in zip(sprites, spots, begins, strict=True):
            if number >= begin:
                _with(frame, one, spot)
        frames.append(frame)
    place = random.randrange(3)
    form = f"What appears {('first', 'second', 'last')[place]}?"
    return Example(form, f"<video>{form}", items[place].name, frames=tuple(frames))


def when(random: Random, split: str) -> Example:
    """A thing is there from one time to another."""
    items, sprites, back = _appearing(random, split, 2)
    start = random.randint(0, FRAMES - 3)
    end = random.randint(start + 2, FRAMES)
    spots = random.sample([(36, 36), (92, 36), (36, 92), (92, 92)], 2)
    frames = []
    for number in range(FRAMES):
        frame = back.copy()
        _with(frame, sprites[1], spots[1])
        if start <= number < end:
            _with(frame, sprites[0], spots[0])
        frames.append(frame)
    form = random.choice(
        (
            "When is the {} there? Give start and end in seconds as JSON.",
            "From when to when do you see the {}?",
        )
    )
    times = {"start": start / FPS, "end": end / FPS}
    target = {"span": [times["start"], times["end"]]}
    return Example(
        form, f"<video>{form.format(items[0].name)}", json.dumps(times), frames=tuple(frames), target=target
    )


SKILLS = (
    Skill("direction", "exact", direction, PAIRS),
    Skill("order", "exact", order, PAIRS),
    Skill("when", "span", when, PAIRS),
)
