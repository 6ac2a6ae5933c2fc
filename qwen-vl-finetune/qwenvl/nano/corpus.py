"""What the recipe trains the small model on: conversations about drawn pictures, written as a training set.

    (skill, seed) -> Lesson(media, questions and answers) -> media beside annotations.jsonl

A picture costs far more than a question, so scenes and screens are asked several times; other skills ask
once, as their test does.  Only what a skill's training split shows is drawn, in its wordings.
"""

import json
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from random import Random
from textwrap import fill

from PIL import Image, ImageDraw
from tqdm import tqdm

from qwenvl.nano.bench import finish, write_row
from qwenvl.nano.skills import SKILLS, assets, canvas, screens, things
from qwenvl.nano.skills.base import relative
from qwenvl.nano.skills.canvas import Item, Placed
from qwenvl.nano.skills.shapes import PLURAL, SHAPES

PART = 1000  # rows that are written together; an interrupted corpus goes on after the last part
TURNS = 6  # questions about one scene, at most
PAGE = (160, 210)  # pixels of a page in a browser

# As published models are asked for everything, and for points.
LOCATE_ALL = 'Locate every object. Answer in JSON: [{"bbox_2d": [x1, y1, x2, y2], "label": "..."}]'
POINT_AS_LIST = 'Point to the {}. Answer in JSON: [{{"point_2d": [x, y], "label": "..."}}]'

Turn = tuple[str, str]

# Rows of a hundred. Goals come first: things, words, screens, receipts and directions.
MIX = {
    "scene": 29, "recognise": 5, "kind": 2, "attributes": 2, "compare": 3, "word": 14, "line": 4,
    "receipt": 6, "form": 4, "document_html": 1, "document_markdown": 1, "long_document": 1, "screen": 11,
    "direction": 6, "order": 2, "when": 2, "chart": 2, "table": 2, "solid": 1, "drawing": 1, "zoom": 1,
}  # fmt: skip


@dataclass(frozen=True)
class Lesson:
    """Pictures, or the frames of one video, and what is asked; the first question has <image> or <video>."""

    pictures: Sequence[Image.Image]
    frames: Sequence[Image.Image]
    turns: Sequence[Turn]


def _about(picture: Image.Image, turns: list[Turn]) -> Lesson:
    (question, answer), *more = turns
    return Lesson((picture,), (), [(f"<image>{question}", answer), *more])


def scene(random: Random) -> Lesson:
    """Shapes, pictograms or both, with up to `TURNS` questions."""
    number, share = random.choice((1, 2, 2, 3, 3, 4, 4, 5, 6, 7, 8, 9)), random.choice((0.0, 0.0, 0.4, 1.0))
    shared = random.choice(SHAPES) if random.random() < 0.3 else ""
    items = [_item(random, share, shared) for _ in range(number)]
    picture = canvas.ground(random, things.SIZE, [item.rgb for item in items if item.colour])
    radius = {1: (12, 40), 2: (10, 28), 3: (10, 26)}.get(number, (9, 20))
    placed = canvas.scatter(random, picture, items, radius)
    pairs = {turn for ask in ASKS for _ in range(2) if (turn := ask(random, placed)) is not None}
    turns = sorted(pairs)
    random.shuffle(turns)
    return _about(picture, list(dict(turns).items())[:TURNS])


def _item(random: Random, share: float, shape: str) -> Item:
    if random.random() < share:
        return Item(random.choice(assets.NAMED))
    return things.any_shape(random, shape=shape if random.random() < 0.6 else "")


def _only(random: Random, placed: Sequence[Placed], key: Callable[[Item], str]) -> Placed | None:
    """One of those whose key no other has."""
    keys = [key(one.item) for one in placed]
    alone = [one for one, own in zip(placed, keys, strict=True) if own and keys.count(own) == 1]
    return random.choice(alone) if alone else None


def _name(item: Item) -> str:
    return item.name


def _colour(random: Random, placed: Sequence[Placed]) -> Turn | None:
    one = _only(random, placed, lambda item: item.shape if item.colour else "")
    return one and (random.choice(things.COLOUR).format(one.item.shape), one.item.colour)


def _shape(random: Random, placed: Sequence[Placed]) -> Turn | None:
    one = _only(random, placed, lambda item: item.colour)
    return one and (random.choice(things.SHAPE).format(one.item.colour), one.item.shape)


def _hollow(random: Random, placed: Sequence[Placed]) -> Turn | None:
    one = _only(random, placed, _name)
    if one is None or one.item.shape not in things.CLOSED or (not one.item.hollow and random.random() < 0.7):
        return None
    return random.choice(things.HOLLOW).format(one.item.name), "hollow" if one.item.hollow else "filled"


def _size(random: Random, placed: Sequence[Placed]) -> Turn | None:
    one, other = _only(random, placed, _name), _only(random, placed, _name)
    if one is None or other is None:
        return None
    sides = [max(box[2] - box[0], box[3] - box[1]) for box in (one.box, other.box)]
    if max(sides) < 1.5 * min(sides):
        return None
    word = random.choice(tuple(things.SIZES))
    answer = one if (sides[0] > sides[1]) == (word == "larger") else other
    return things.SIZES[word].format(one.item.name, other.item.name), answer.item.name


def _count(random: Random, placed: Sequence[Placed]) -> Turn:
    shape = random.choice((*SHAPES, *(2 * [one.item.shape for one in placed if one.item.colour])))
    number = sum(one.item.shape == shape for one in placed)
    return random.choice(things.COUNT).format(PLURAL[shape]), str(number)


def _count_all(random: Random, placed: Sequence[Placed]) -> Turn:
    return random.choice(things.COUNT_ALL), str(len(placed))


def _side(random: Random, placed: Sequence[Placed]) -> Turn | None:
    one, other = _only(random, placed, _name), _only(random, placed, _name)
    side = one and other and things.side_of(one, other)
    if not (one and other and side):
        return None
    if random.random() < 0.5:
        return things.SIDE.format(one.item.name, other.item.name), side
    true = random.random() < 0.5
    asked = things.SIDE_WORDS[side if true else things.OPPOSITE[side]]
    question = random.choice(things.SIDE_TRUE).format(one.item.name, asked, other.item.name)
    return question, "yes" if true else "no"


def _findable(item: Item) -> str:
    return item.name if item.colour or item.shape in things.FOUND["train"] else ""


def _locate(random: Random, placed: Sequence[Placed]) -> Turn | None:
    one = _only(random, placed, _findable)
    if one is None:
        return None
    name, box = one.item.name, relative(one.box, things.SIZE)
    return random.choice(things.LOCATE).format(name), json.dumps({"bbox_2d": box, "label": name})


def _point(random: Random, placed: Sequence[Placed]) -> Turn | None:
    one = _only(random, placed, _findable)
    if one is None:
        return None
    name, point = one.item.name, relative(one.centre, things.SIZE)
    answer = {"point_2d": point, "label": name}
    if random.random() < 0.3:
        return POINT_AS_LIST.format(name), json.dumps([answer])
    return random.choice(things.POINT).format(name), json.dumps(answer)


def _detect(random: Random, placed: Sequence[Placed]) -> Turn | None:
    shown = [one.item.shape for one in placed if one.item.colour]
    if not shown:
        return None
    shape = random.choice(shown)
    boxes = [relative(one.box, things.SIZE) for one in placed if one.item.shape == shape]
    if len(boxes) > 3:
        return None
    return random.choice(things.DETECT).format(PLURAL[shape]), things.boxes_json(boxes, shape)


def _locate_all(random: Random, placed: Sequence[Placed]) -> Turn | None:
    """Everything, from left to right."""
    if len(placed) > 4 or any(not _findable(one.item) for one in placed) or random.random() < 0.5:
        return None
    found = sorted((relative(one.box, things.SIZE), one.item.name) for one in placed)
    return LOCATE_ALL, json.dumps([{"bbox_2d": box, "label": name} for box, name in found])


def _present(random: Random, placed: Sequence[Placed]) -> Turn:
    """As `_list` and `_place` no skill of the test's, but what one would ask."""
    item, other = random.choice(placed).item, canvas.any_item(random, "train")
    name = random.choice((item, other)).name
    if item.colour and random.random() < 0.5:  # a near miss
        name = random.choice((f"{other.colour} {item.shape}", f"{item.colour} {other.shape}"))
    present = any(one.item.name == name for one in placed)
    return random.choice(("Can you see a {}?", "Yes or no: {}?")).format(name), "yes" if present else "no"


def _list(random: Random, placed: Sequence[Placed]) -> Turn:
    rows = sorted(placed, key=lambda one: (int(one.centre[1] // 32), one.centre[0]))
    question = random.choice(
        ("List all objects in reading order.", "Describe the picture.", "What do you see?")
    )
    return question, ", ".join(one.item.name for one in rows)


def _place(random: Random, placed: Sequence[Placed]) -> Turn | None:
    one = _only(random, placed, _name)
    if one is None:
        return None
    column, row = (
        min(2, int(3 * middle / side)) for middle, side in zip(one.centre, things.SIZE, strict=True)
    )
    place = f"{('top', '', 'bottom')[row]} {('left', '', 'right')[column]}".strip() or "centre"
    question = random.choice(("Where do you find the {}?", "In which part of the picture lies the {}?"))
    return question.format(one.item.name), place


def _named(random: Random, placed: Sequence[Placed]) -> Turn | None:
    if len(placed) > 1:
        return None
    item = placed[0].item
    return ("Which shape is this?", item.shape) if item.colour else (random.choice(things.NAME), item.name)


ASKS = (
    _colour, _shape, _hollow, _size, _count, _count_all, _side, _locate, _point, _detect, _locate_all,
    _present, _list, _place, _named,
)  # fmt: skip


def screen(random: Random) -> Lesson:
    """A screen and up to three clicks on it; a third are narrow pages that begin with what is to be done."""
    device, layout = random.choice(tuple(screens.DEVICES)), random.choice(screens.LAYOUTS["train"])
    size, _, *forms = screens.DEVICES[device]
    page = device == "computer_use" and random.random() < 0.6
    if page:
        size = PAGE
    picture, elements = screens.draw_screen(random, "train", layout, size, 50 if page else 16)
    asked = random.sample(elements, min(3, len(elements)))
    turns = [
        (random.choice(forms).format(label), screens.call_for(device, box, size)) for label, box in asked
    ]
    if page:
        pen, font = ImageDraw.Draw(picture), assets.any_font(random, "train", 11)
        pen.rectangle((0, 0, size[0], 50), fill="yellow")
        pen.multiline_text((4, 4), fill(turns[0][0], 24), "black", font)
    return _about(picture, turns)


LESSONS = {"scene": scene, "screen": screen}
KINDS = [kind for kind, share in MIX.items() for _ in range(share)]


def lesson(place: int, seed: int) -> Lesson:
    """The row number ``place``; kinds by turns, so that any hundred rows hold the mix."""
    kind = KINDS[place * 37 % len(KINDS)]
    random = Random(f"{kind}/train/{seed + place}")
    if kind in LESSONS:
        return LESSONS[kind](random)
    example = SKILLS[kind].make(random, "train")
    return Lesson(example.pictures, example.frames, [(example.question, example.answer)])


def _write_part(part: int, folder: Path, rows: int, seed: int) -> list[str]:
    path, lines = folder / f"part-{part:05}.jsonl", []
    if path.is_file():
        return path.read_text(encoding="utf-8").splitlines(keepends=True)
    (folder / f"media-{part:05}").mkdir(parents=True, exist_ok=True)
    for place in range(part * PART, min(rows, (part + 1) * PART)):
        one = lesson(place, seed)
        row = write_row(folder, f"media-{part:05}/{place}", one.pictures, one.frames, one.turns)
        lines.append(json.dumps(row) + "\n")
    finish(path, lines)
    return lines


def write_corpus(
    folder: str | Path, *, rows: int, seed: int = 1_000_000, processes: int | None = None
) -> Path:
    """Write `rows` rows and `annotations.jsonl`, in parallel; stopped, it goes on with the next part.

    The constant answers of nanobench come from seeds below a million.
    """
    folder = Path(folder)
    annotations = folder / "annotations.jsonl"
    if annotations.is_file():
        return annotations
    parts = range((rows + PART - 1) // PART)
    with ProcessPoolExecutor(processes) as pool:
        written = pool.map(partial(_write_part, folder=folder, rows=rows, seed=seed), parts)
        lines = [line for part in tqdm(written, total=len(parts), desc="parts") for line in part]
    finish(annotations, lines)
    return annotations
