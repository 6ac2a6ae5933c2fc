"""Things in pictures: recognise, attributes, count, where they are, pictures compared."""

import json
from dataclasses import replace
from random import Random

from PIL import Image

from qwenvl.nano.skills import assets, canvas
from qwenvl.nano.skills.base import Example, Skill, relative
from qwenvl.nano.skills.canvas import Item, Placed, any_item
from qwenvl.nano.skills.shapes import PLURAL

SIZE = (128, 128)

# Grounding names these and training never does, so that finding them takes what recognising taught.
FOUND = {"test": assets.NAMED[3::6]}
FOUND["train"] = [name for name in assets.NAMED if name not in FOUND["test"]]
# Counting is trained on the other kinds.
COUNTED = {"train": ("animal", "food", "object", "sport or game"), "test": ("travel",)}

# The wordings, by what is asked; {} stands for names. Conversations of training use the same.
COLOUR = ("What colour is the {}?", "Name the colour of the {}.", "The {} is of which colour?")
SHAPE = ("Which shape is {}?", "Name the {} shape.", "What is the {} thing?")
HOLLOW = ("Is the {} filled or hollow?", "The {}: filled or hollow?")
SIZES = {word: f"Which is {word}, the {{}} or the {{}}?" for word in ("larger", "smaller")}
COUNT = ("How many {} are there?", "Count the {}.")
COUNT_ALL = ("How many things are there?", "Count everything.")
SIDE = "Where is the {} seen from the {}: left, right, above or below?"
SIDE_TRUE = ("Is the {} {} the {}?", "The {} is {} the {}: yes or no?")
LOCATE = ("Locate the {}.", "Give the box of the {} as JSON.", "Find the {}, bbox_2d.")
POINT = ("Point to the {}.", "Give a point on the {} as JSON.", "Where is the {}? point_2d.")
DETECT = ("Locate all {}.", "Give the boxes of all {} as JSON.")
NAME = ("What is this?", "Name the thing in the picture.", "What do you see here?")
CLOSED = ("circle", "square", "triangle", "heart", "pentagon")  # shapes that may be hollow


def scene(
    random: Random, items: list[Item], radius: tuple[float, float], size: tuple[int, int] = SIZE
) -> tuple[Image.Image, list[Placed]]:
    picture = canvas.ground(random, size, [item.rgb for item in items if item.colour])
    return picture, canvas.scatter(random, picture, items, radius)


def different(random: Random, split: str, count: int, *, unseen: int = 1) -> list[Item]:
    """Items of which no two share shape and colour; the first ``unseen`` of the test are new to the model."""
    items: list[Item] = []
    while len(items) < count:
        item = any_item(random, split, unseen=len(items) < unseen)
        if item.name not in [other.name for other in items]:
            items.append(item)
    return items


def any_shape(random: Random, shape: str = "") -> Item:
    """A shape that training shows, a tenth of those that may be hollow."""
    item = any_item(random, "train", shape=shape)
    return replace(item, hollow=item.shape in CLOSED and random.random() < 0.1)


def _others(random: Random, split: str, item: Item, count: int, attribute: str) -> list[Item]:
    """Items that differ from ``item`` in shape or in colour."""
    items: list[Item] = []
    while len(items) < count:
        other = any_item(random, split)
        if getattr(other, attribute) != getattr(item, attribute):
            items.append(other)
    return items


def recognise(random: Random, split: str) -> Example:
    if random.random() < 0.3:
        item, form = any_item(random, split, unseen=True), "Which shape is this?"
    else:
        item = Item(random.choice(assets.NAMED))
        form = random.choice(NAME)
    picture, _ = scene(random, [item], (22, 56))
    return Example(form, f"<image>{form}", assets.name_of(item.shape), (picture,))


def kind(random: Random, split: str) -> Example:
    kinds = assets.kinds()[split]
    answer = random.choice(tuple(kinds))
    picture, _ = scene(random, [Item(random.choice(kinds[answer]))], (30, 56))
    form = "Which kind is this: animal, food, object, face, travel, sport or game?"
    return Example(form, f"<image>{form}", answer, (picture,))


def colour(random: Random, split: str) -> Example:
    item = any_item(random, split, unseen=True)
    others = _others(random, split, item, random.randint(0, 3), "shape")
    picture, _ = scene(random, [item, *others], (10, 26))
    form = random.choice(COLOUR)
    return Example(form, f"<image>{form.format(item.shape)}", item.colour, (picture,))


def shape(random: Random, split: str) -> Example:
    item = any_item(random, split, unseen=True)
    others = _others(random, split, item, random.randint(0, 3), "colour")
    picture, _ = scene(random, [item, *others], (12, 26))
    form = random.choice(SHAPE)
    return Example(form, f"<image>{form.format(item.colour)}", item.shape, (picture,))


def attributes(random: Random, split: str) -> Example:
    """Larger or smaller of two; filled or hollow."""
    first, second = different(random, split, 2, unseen=2)
    if random.random() < 0.5:
        form = random.choice(HOLLOW)
        hollow = random.random() < 0.5
        closed = any_item(
            random,
            split,
            unseen=True,
            shape=random.choice(CLOSED),
        )
        first = Item(closed.shape, closed.colour, closed.rgb, hollow)
        picture, _ = scene(random, [first, *_others(random, split, first, 1, "colour")], (15, 26))
        return Example(
            form, f"<image>{form.format(first.name)}", "hollow" if hollow else "filled", (picture,)
        )
    word = random.choice(("larger", "smaller"))
    form = SIZES[word]
    picture = canvas.ground(random, SIZE, [first.rgb, second.rgb])
    sprites = [canvas.sprite(random, first, 24), canvas.sprite(random, second, 12)]
    for place, one in enumerate(sprites):
        spot = (64 * place + random.randint(0, 62 - one.width), random.randint(0, 127 - one.height))
        picture.paste(one, spot, one)
    if random.random() < 0.5:
        picture = picture.transpose(Image.Transpose.ROTATE_180)
    named = [first.name, second.name]
    random.shuffle(named)
    answer = first.name if word == "larger" else second.name
    return Example(form, f"<image>{form.format(*named)}", answer, (picture,))


def count(random: Random, split: str) -> Example:
    number = random.randint(0, 9)
    most = (8, 16) if number > 5 else (10, 20)
    if random.random() < 0.5:
        form = random.choice(COUNT)
        item = any_item(random, split, unseen=True)
        items = [any_item(random, split, shape=item.shape) for _ in range(number)]
        items[:1] = [item][:number]
        items += _others(
            random, split, item, random.randint(0 if number else 1, min(3, 10 - number)), "shape"
        )
        picture, _ = scene(random, items, most)
        return Example(form, f"<image>{form.format(PLURAL[item.shape])}", str(number), (picture,))
    form = random.choice(COUNT_ALL)
    pictures = assets.kinds()[split][random.choice(COUNTED[split])]
    one, same = random.choice(pictures), random.random() < 0.5
    items = [Item(one if same else random.choice(pictures)) for _ in range(number)]
    picture, _ = scene(random, items, most)
    return Example(form, f"<image>{form}", str(number), (picture,))


SIDE_WORDS = {"left": "left of", "right": "right of", "above": "above", "below": "below"}
OPPOSITE = {"left": "right", "right": "left", "above": "below", "below": "above"}


def side_of(one: Placed, other: Placed) -> str | None:
    """Where ``one`` is seen from ``other``, None where that is in doubt."""
    across, down = (a - b for a, b in zip(one.centre, other.centre, strict=True))
    if abs(across) > 2 * abs(down):
        return "right" if across > 0 else "left"
    if abs(down) > 2 * abs(across):
        return "below" if down > 0 else "above"
    return None


def spatial(random: Random, split: str) -> Example:
    while True:
        items = different(random, split, random.randint(2, 4), unseen=2)
        picture, placed = scene(random, items, (10, 20))
        side = side_of(placed[0], placed[1])
        if side is not None:
            break
    one, other = items[0].name, items[1].name
    if random.random() < 0.5:
        return Example(SIDE, f"<image>{SIDE.format(one, other)}", side, (picture,))
    form = random.choice(SIDE_TRUE)
    true = random.random() < 0.5
    asked = SIDE_WORDS[side if true else OPPOSITE[side]]
    return Example(form, f"<image>{form.format(one, asked, other)}", "yes" if true else "no", (picture,))


def _to_find(random: Random, split: str) -> tuple[Image.Image, Placed, str]:
    if random.random() < 0.6:
        items = different(random, split, random.randint(1, 4))
    else:
        items = [Item(random.choice(FOUND[split]))]
        items += [Item(name) for name in random.sample(assets.NAMED, 3) if name != items[0].shape][
            : random.randint(0, 2)
        ]
    picture, placed = scene(random, items, (12, 28))
    return picture, placed[0], items[0].name


def grounding(random: Random, split: str) -> Example:
    picture, found, name = _to_find(random, split)
    form = random.choice(LOCATE)
    box = relative(found.box, picture.size)
    answer = json.dumps({"bbox_2d": box, "label": name})
    return Example(form, f"<image>{form.format(name)}", answer, (picture,), target={"boxes": [box]})


def pointing(random: Random, split: str) -> Example:
    picture, found, name = _to_find(random, split)
    form = random.choice(POINT)
    answer = json.dumps({"point_2d": relative(found.centre, picture.size), "label": name})
    target = {"box": relative(found.box, picture.size)}
    return Example(form, f"<image>{form.format(name)}", answer, (picture,), target=target)


def boxes_json(boxes: list[list[int]], label: str) -> str:
    """The answer of a detection, from left to right."""
    return json.dumps([{"bbox_2d": box, "label": label} for box in sorted(boxes)])


def detection(random: Random, split: str) -> Example:
    """Everything of a shape, from left to right."""
    item = any_item(random, split, unseen=True)
    number = random.randint(1, 3)
    items = [item, *(any_item(random, split, shape=item.shape) for _ in range(number - 1))]
    items += _others(random, split, item, random.randint(0, 2), "shape")
    picture, placed = scene(random, items, (12, 22))
    boxes = sorted(relative(one.box, picture.size) for one in placed[:number])
    form = random.choice(DETECT)
    answer = boxes_json(boxes, item.shape)
    question = f"<image>{form.format(PLURAL[item.shape])}"
    return Example(form, question, answer, (picture,), target={"boxes": boxes})


def compare(random: Random, split: str) -> Example:
    """Two pictures with the same things or not; which picture shows a thing; what is missing."""
    items = different(random, split, 4, unseen=2)
    way = random.choice(("same", "which", "missing"))
    if way == "which":
        random.shuffle(items)
        pictures = tuple(scene(random, [item], (14, 30))[0] for item in items[:3])
        place = random.randrange(3)
        form, answer = "Which picture shows the {}: 1, 2 or 3?", str(place + 1)
        question = f"<image><image><image>{form.format(items[place].name)}"
        return Example(form, question, answer, pictures)
    first, _ = scene(random, items[1:], (10, 20))
    if way == "missing":
        second, _ = scene(random, items[2:], (10, 20))
        form = "What is missing in the second picture?"
        return Example(form, f"<image><image>{form}", items[1].name, (first, second))
    same = random.random() < 0.5
    second, _ = scene(random, items[1:] if same else [items[0], *items[2:]], (10, 20))
    form = "Do both pictures show the same things?"
    return Example(form, f"<image><image>{form}", "yes" if same else "no", (first, second))


PAIRS = "shapes in colours that training never shows on them"
SKILLS = (
    Skill("recognise", "exact", recognise, f"{PAIRS}; of pictograms only the drawing is new, not the name"),
    Skill("kind", "exact", kind, "pictograms"),
    Skill("colour", "exact", colour, PAIRS),
    Skill("shape", "exact", shape, PAIRS),
    Skill("attributes", "exact", attributes, PAIRS),
    Skill("count", "exact", count, f"{PAIRS}; pictograms of travel"),
    Skill("spatial", "exact", spatial, PAIRS),
    Skill("grounding", "box", grounding, f"{PAIRS}; names of pictograms"),
    Skill("pointing", "point", pointing, f"{PAIRS}; names of pictograms"),
    Skill("detection", "boxes", detection, PAIRS),
    Skill("compare", "exact", compare, PAIRS),
)
