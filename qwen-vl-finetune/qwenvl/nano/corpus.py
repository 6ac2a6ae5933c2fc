"""Generated pictures and conversations about them: what models/qwen3-vl-nano is trained on.

    seed -> Scene (objects with shape, colour, place)  -> picture   `draw`
                                                       -> questions `converse`
                                                       -> a label for each visual token `cell_labels`

Everything is drawn from a seeded generator: the same seed gives the same picture and the same questions.
"""

import json
import math
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import count
from pathlib import Path
from random import Random

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

SIZE = 128  # width and height of a picture, in pixels
CELL = 32  # one visual token of Qwen3-VL covers 32x32 pixels

SHAPES = (
    "circle",
    "square",
    "rectangle",
    "triangle",
    "star",
    "cross",
    "ring",
    "heart",
    "diamond",
    "pentagon",
)
PLURAL = {shape: "crosses" if shape == "cross" else f"{shape}s" for shape in SHAPES}

# Several anchors a name: a colour is a region, not a value.
COLOURS: dict[str, tuple[tuple[int, int, int], ...]] = {
    "red": ((220, 30, 30), (240, 20, 20), (200, 20, 40)),
    "green": ((40, 160, 60), (20, 200, 40), (30, 230, 30), (60, 130, 50)),
    "blue": ((40, 70, 220), (20, 20, 240), (50, 110, 230)),
    "yellow": ((240, 220, 40), (250, 250, 30), (235, 200, 30)),
    "orange": ((250, 140, 20), (240, 120, 40)),
    "purple": ((130, 40, 170), (150, 60, 200), (100, 30, 140)),
    "pink": ((250, 130, 180), (240, 100, 160), (255, 170, 200)),
    "brown": ((130, 70, 30), (110, 60, 40), (150, 60, 45), (160, 95, 50)),
    "black": ((15, 15, 15), (5, 5, 5), (35, 35, 38)),
    "white": ((245, 245, 245), (252, 252, 252)),
    "gray": ((128, 128, 128), (105, 108, 110), (150, 150, 148)),
    "teal": ((20, 130, 130), (10, 150, 140), (30, 110, 120)),
}
COLOUR_NAMES = tuple(COLOURS)

COUNT_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
WORDS = (
    "sun cat dog bus car tree fish bird star moon book cup hat key box red blue stop open exit left right "
    "north south east west one two three four five six seven eight nine ten yes no day night hot cold "
    "milk tea bread apple house door lamp chair train boat plane road river sea sky hand foot eye time "
    "date name price total"
).split()


@dataclass(frozen=True)
class Thing:
    """One object: its names, centre and half size in pixels of the picture, turn in radians."""

    shape: str
    colour: str
    rgb: tuple[int, int, int]
    x: float
    y: float
    radius: float
    turn: float
    stretch: float


@dataclass(frozen=True)
class Scene:
    background: tuple[tuple[int, int, int], tuple[int, int, int]]
    texture: str
    things: tuple[Thing, ...]
    word: str | None
    seed: int


def near(random: Random, anchor: tuple[int, int, int], spread: int = 12) -> tuple[int, int, int]:
    r, g, b = (min(255, max(0, value + random.randint(-spread, spread))) for value in anchor)
    return r, g, b


def _distance(a: tuple[int, int, int], b: tuple[int, int, int]) -> float:
    return math.dist(a, b)


def make_scene(seed: int, *, most_things: int = 5, words: bool = True) -> Scene:
    """A random scene of 1 to `most_things` objects that hardly touch, or of one written word."""
    random = Random(seed)
    pale = random.random() < 0.6
    anchor = tuple(random.randint(190, 255) if pale else random.randint(0, 255) for _ in range(3))
    first = (anchor[0], anchor[1], anchor[2])
    second = near(random, first, 40)
    texture = random.choice(("plain", "plain", "gradient", "noise", "stripes"))
    if words and random.random() < 0.15:
        return Scene((first, second), texture, (), random.choice(WORDS), seed)
    wanted = random.choice((1, 1, *range(1, most_things + 1)))
    things: list[Thing] = []
    for _ in range(12 * wanted):
        if len(things) == wanted:
            break
        radius = random.uniform(8, 34 if wanted == 1 else 24 if wanted < 4 else 17)
        x, y = (random.uniform(0.85 * radius, SIZE - 0.85 * radius) for _ in range(2))
        if any(math.hypot(x - t.x, y - t.y) < 0.95 * (radius + t.radius) for t in things):
            continue
        colour = random.choice(COLOUR_NAMES)
        rgb = near(random, random.choice(COLOURS[colour]))
        if min(_distance(rgb, first), _distance(rgb, second)) < 60:
            continue
        shape = random.choice(SHAPES)
        upright = random.random() < 0.5
        turn = random.uniform(-0.25, 0.25) if upright else random.uniform(0, 2 * math.pi)
        if shape in ("square", "diamond"):  # a turned square is a diamond: keep them apart
            turn = random.uniform(-0.2, 0.2)
        things.append(Thing(shape, colour, rgb, x, y, radius, turn, random.uniform(0.35, 0.62)))
    return Scene((first, second), texture, tuple(things), None, seed)


@lru_cache(maxsize=64)
def _outline(shape: str) -> tuple[tuple[float, float], ...]:
    """The corners of a shape inside the unit circle."""
    turns = {"triangle": 3, "square": 4, "diamond": 4, "pentagon": 5}
    if shape in turns:
        n = turns[shape]
        start = math.pi / 4 if shape == "square" else -math.pi / 2
        points = [
            (math.cos(start + 2 * math.pi * i / n), math.sin(start + 2 * math.pi * i / n)) for i in range(n)
        ]
        return tuple((0.68 * x, y) if shape == "diamond" else (x, y) for x, y in points)
    if shape == "star":
        angles = [-math.pi / 2 + math.pi * i / 5 for i in range(10)]
        return tuple(
            ((1, 0.42)[i % 2] * math.cos(a), (1, 0.42)[i % 2] * math.sin(a)) for i, a in enumerate(angles)
        )
    if shape == "cross":
        a, b = 0.3, 0.95
        return (
            (-a, -b),
            (a, -b),
            (a, -a),
            (b, -a),
            (b, a),
            (a, a),
            (a, b),
            (-a, b),
            (-a, a),
            (-b, a),
            (-b, -a),
            (-a, -a),
        )
    if shape == "heart":
        return tuple(
            (
                0.06 * 16 * math.sin(t) ** 3,
                -0.06 * (13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)),
            )
            for t in (2 * math.pi * i / 28 for i in range(28))
        )
    return tuple((math.cos(2 * math.pi * i / 30), math.sin(2 * math.pi * i / 30)) for i in range(30))


def polygon(thing: Thing, scale: float) -> list[tuple[float, float]]:
    unit = _outline(thing.shape)
    if thing.shape == "rectangle":
        unit = ((-1, -thing.stretch), (1, -thing.stretch), (1, thing.stretch), (-1, thing.stretch))
    cos, sin = math.cos(thing.turn), math.sin(thing.turn)
    r = thing.radius
    return [
        (scale * (thing.x + r * (x * cos - y * sin)), scale * (thing.y + r * (x * sin + y * cos)))
        for x, y in unit
    ]


def _background(scene: Scene) -> Image.Image:
    first, second = (np.array(colour, np.float32) for colour in scene.background)
    random = np.random.default_rng(scene.seed)
    if scene.texture == "plain":
        return Image.new("RGB", (SIZE, SIZE), scene.background[0])
    if scene.texture == "gradient":
        angle = random.uniform(0, 2 * math.pi)
        ramp = np.linspace(-0.5, 0.5, SIZE, dtype=np.float32)
        mix = 0.5 + math.cos(angle) * ramp[None, :] * 0.7 + math.sin(angle) * ramp[:, None] * 0.7
    elif scene.texture == "noise":
        mix = random.random((SIZE, SIZE), np.float32)
    else:
        period = int(random.integers(4, 24))
        mix = ((np.arange(SIZE)[None, :] // period) % 2).astype(np.float32).repeat(SIZE, 0)
        mix = mix.T if random.random() < 0.5 else mix
    pixels = first + (second - first) * mix[:, :, None]
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def draw(scene: Scene) -> Image.Image:
    """The scene as an RGB picture of SIZE x SIZE pixels."""
    random = Random(scene.seed + 1)
    picture = _background(scene)
    if scene.word is not None:
        return _write(picture, scene, random)
    smooth = random.random() < 0.6
    scale = 2 if smooth else 1
    canvas = picture.resize((SIZE * 2, SIZE * 2), Image.Resampling.NEAREST) if smooth else picture
    pen = ImageDraw.Draw(canvas)
    for thing in scene.things:
        corners = polygon(thing, scale)
        if thing.shape == "ring":
            inner = polygon(
                Thing("circle", "", (0, 0, 0), thing.x, thing.y, 0.55 * thing.radius, 0, 1), scale
            )
            mask = Image.new("L", canvas.size)
            mask_pen = ImageDraw.Draw(mask)
            mask_pen.polygon(corners, fill=255)
            mask_pen.polygon(inner, fill=0)
            canvas.paste(thing.rgb, (0, 0), mask)
        else:
            edge = near(random, (60, 60, 60), 40) if random.random() < 0.15 else None
            pen.polygon(corners, fill=thing.rgb, outline=edge)
    return canvas.reduce(2) if smooth else canvas


@lru_cache(maxsize=32)
def _font(size: int):
    return ImageFont.load_default(size)


def _write(picture: Image.Image, scene: Scene, random: Random) -> Image.Image:
    assert scene.word is not None
    pen = ImageDraw.Draw(picture)
    light = sum(scene.background[0]) > 380
    ink = tuple(random.randint(0, 90) if light else random.randint(190, 255) for _ in range(3))
    font = _font(random.randint(26, 40) if len(scene.word) < 5 else random.randint(22, 30))
    left, top, right, bottom = pen.textbbox((0, 0), scene.word, font=font)
    x = random.uniform(4, max(4.0, SIZE - (right - left) - 4)) - left
    y = random.uniform(4, SIZE - (bottom - top) - 4) - top
    pen.text((x, y), scene.word, font=font, fill=ink)
    return picture


def cell_labels(scene: Scene) -> tuple[np.ndarray, np.ndarray]:
    """What each visual token shows: (shape, colour) index per cell, [16] each, row by row; 0 is background.

    A cell shows the object whose square of half side 0.8 radius covers it most, if by 4 % or more.
    """
    side = SIZE // CELL
    cover = np.zeros((len(scene.things) + 1, side, side), np.float32)
    cover[0] = 0.04 * CELL * CELL
    edges = np.arange(side, dtype=np.float32) * CELL
    for index, thing in enumerate(scene.things, 1):
        half = 0.8 * thing.radius
        wide = np.minimum(edges + CELL, thing.x + half) - np.maximum(edges, thing.x - half)
        high = np.minimum(edges + CELL, thing.y + half) - np.maximum(edges, thing.y - half)
        cover[index] = np.maximum(high, 0)[:, None] * np.maximum(wide, 0)[None, :]
    owner = cover.argmax(0).reshape(-1)
    shapes = np.array([0] + [1 + SHAPES.index(thing.shape) for thing in scene.things])
    colours = np.array([0] + [1 + COLOUR_NAMES.index(thing.colour) for thing in scene.things])
    return shapes[owner], colours[owner]


def _place(thing: Thing) -> str:
    row = ("top", "", "bottom")[min(2, int(3 * thing.y / SIZE))]
    column = ("left", "", "right")[min(2, int(3 * thing.x / SIZE))]
    return f"{row} {column}".strip() or "centre"


def _only(things: tuple[Thing, ...], **wanted: str) -> Thing | None:
    found = [t for t in things if all(getattr(t, key) == value for key, value in wanted.items())]
    return found[0] if len(found) == 1 else None


def _reading_order(things: tuple[Thing, ...]) -> list[Thing]:
    return sorted(things, key=lambda t: (int(t.y // CELL), t.x))


def _ask_list(random: Random, things) -> tuple[str, str]:
    question = random.choice(
        ("List all objects in reading order.", "Describe the picture.", "What do you see?")
    )
    return question, ", ".join(f"{t.colour} {t.shape}" for t in _reading_order(things))


def _ask_colour(random: Random, things) -> tuple[str, str] | None:
    thing = random.choice(things)
    if _only(things, shape=thing.shape) is None:
        return None
    forms = ("Name the colour of the {}.", "The {} has which colour?", "Tell me the {}'s colour.")
    return random.choice(forms).format(thing.shape), thing.colour


def _ask_shape(random: Random, things) -> tuple[str, str] | None:
    thing = random.choice(things)
    if _only(things, colour=thing.colour) is None:
        return None
    forms = ("Which shape is {}?", "Name the {} shape.", "The {} object has which shape?")
    return random.choice(forms).format(thing.colour), thing.shape


def _ask_presence(random: Random, things) -> tuple[str, str]:
    thing = random.choice(things)
    truth = random.random() < 0.5
    kind = random.choice(("shape", "colour", "both"))
    shape = thing.shape if truth else random.choice(SHAPES)
    colour = thing.colour if truth else random.choice(COLOUR_NAMES)
    if not truth and kind == "both" and random.random() < 0.6:  # a near miss
        shape, colour = random.choice(((thing.shape, colour), (shape, thing.colour)))
    wanted = {"shape": {"shape": shape}, "colour": {"colour": colour}}.get(
        kind, {"shape": shape, "colour": colour}
    )
    name = {"shape": shape, "colour": f"{colour} object"}.get(kind, f"{colour} {shape}")
    present = any(all(getattr(t, key) == value for key, value in wanted.items()) for t in things)
    forms = ("Can you see any {}?", "Yes or no: {}?", "Do you find one {} here?")
    negative = ("Is every {} missing?", "Are you unable to find any {}?")
    if random.random() < 0.3:
        return random.choice(negative).format(name), "no" if present else "yes"
    return random.choice(forms).format(name), "yes" if present else "no"


def _ask_count(random: Random, things) -> tuple[str, str]:
    if random.random() < 0.5:
        return random.choice(("How many objects are here?", "Count the objects.")), COUNT_WORDS[len(things)]
    shape = random.choice((random.choice(things).shape, random.choice(SHAPES)))
    number = sum(t.shape == shape for t in things)
    return random.choice(("How many {} are here?", "Count the {}.")).format(PLURAL[shape]), COUNT_WORDS[
        number
    ]


def _ask_place(random: Random, things) -> tuple[str, str] | None:
    thing = random.choice(things)
    if _only(things, shape=thing.shape, colour=thing.colour) is None:
        return None
    forms = ("Where do you find the {}?", "In which part of the picture lies the {}?")
    return random.choice(forms).format(f"{thing.colour} {thing.shape}"), _place(thing)


def _ask_word(random: Random, scene: Scene) -> tuple[str, str]:
    assert scene.word is not None
    return random.choice(("What is written here?", "Read the word.", "Which word do you see?")), scene.word


# A skill's name and who asks for it; presence twice, as half of its answers carry little.
ASKS = {
    "list": _ask_list,
    "colour": _ask_colour,
    "shape": _ask_shape,
    "presence": _ask_presence,
    "presence again": _ask_presence,
    "count": _ask_count,
    "place": _ask_place,
}


def converse(scene: Scene, *, turns: int = 6) -> list[tuple[str, str]]:
    """Questions and answers about a scene, `turns` at most."""
    random = Random(scene.seed + 2)
    if scene.word is not None:
        return [_ask_word(random, scene)]
    asks = list(ASKS.values())
    random.shuffle(asks)
    found = [pair for ask in asks if (pair := ask(random, scene.things)) is not None]
    return list(dict(found).items())[:turns]


def ask_skill(scene: Scene, skill: str) -> tuple[str, str] | None:
    """One question for one skill ("word" or a name of ASKS), or None where the scene has none."""
    random = Random(scene.seed + 3)
    if skill == "word" or scene.word is not None:
        return _ask_word(random, scene) if skill == "word" and scene.word is not None else None
    return ASKS[skill](random, scene.things) if scene.things else None


def _save(scene: Scene, folder: Path, pairs: list[tuple[str, str]]) -> str:
    """Draw a scene into `folder`; its row in the training format."""
    name = f"{scene.seed}.png"
    draw(scene).save(folder / name, compress_level=1)
    conversation = []
    for question, answer in pairs:
        prompt = question if conversation else f"<image>\n{question}"
        conversation += [{"from": "human", "value": prompt}, {"from": "gpt", "value": answer}]
    return json.dumps({"image": name, "conversations": conversation}) + "\n"


def _write_one(seed: int, folder: Path) -> str:
    scene = make_scene(seed)
    return _save(scene, folder, converse(scene)) if scene.things or scene.word else ""


def write_corpus(folder: str | Path, *, scenes: int, first_seed: int) -> Path:
    """Write `scenes` pictures and `annotations.jsonl` in the training format; one seed a scene.

    A finished corpus is left as it is.
    """
    folder = Path(folder)
    annotations = folder / "annotations.jsonl"
    if annotations.is_file():
        return annotations
    folder.mkdir(parents=True, exist_ok=True)
    seeds = range(first_seed, first_seed + scenes)
    with ProcessPoolExecutor() as pool:
        rows = pool.map(partial(_write_one, folder=folder), seeds, chunksize=256)
        lines = list(tqdm(rows, total=scenes, desc="drawing", unit="picture"))
    unfinished = annotations.with_suffix(".part")
    unfinished.write_text("".join(lines), encoding="utf-8")
    unfinished.rename(annotations)
    return annotations


def write_skill_tests(folder: str | Path, *, questions: int = 500, first_seed: int = 0) -> list[Path]:
    """Write one annotation file a skill, `questions` rows each, about scenes that training never uses."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for skill in ("colour", "shape", "presence", "count", "place", "list", "word"):
        lines: list[str] = []
        for seed in count(first_seed):
            scene = make_scene(seed)
            if (pair := ask_skill(scene, skill)) is not None:
                lines.append(_save(scene, folder, [pair]))
            if len(lines) == questions:
                break
        files.append(folder / f"{skill}.jsonl")
        files[-1].write_text("".join(lines), encoding="utf-8")
    return files
