"""Charts and tables read: values, the largest, the smallest."""

import math
from collections.abc import Sequence
from random import Random

from PIL import Image, ImageDraw

from qwenvl.nano.skills import assets
from qwenvl.nano.skills.base import Example, Skill
from qwenvl.nano.skills.shapes import COLOURS
from qwenvl.nano.skills.text import CITIES, GOODS, PEOPLE, Font, write

SIZE = (192, 160)
LEFT, TOP, RIGHT, BOTTOM = 30, 12, 186, 132  # of the field that bars and lines are drawn in
MOST = 10  # the largest value of an axis

# (kind, lines across, box around): some of them are the test's.
STYLES = [(kind, grid, box) for kind in ("bars", "lying", "line") for grid in (0, 1) for box in (0, 1)]
STYLES_OF = {"test": [style for place, style in enumerate(STYLES) if place % 4 == place // 4]}
STYLES_OF["train"] = [style for style in STYLES if style not in STYLES_OF["test"]]
NAMES = {"train": (GOODS, PEOPLE), "test": (CITIES,)}
SHADES = [colour for name, colours in COLOURS.items() if name not in ("white", "black") for colour in colours]


def _spots(count: int, start: int, end: int) -> list[float]:
    return [start + (place + 0.5) * (end - start) / count for place in range(count)]


def _axes(pen: ImageDraw.ImageDraw, style: tuple, font: Font, fill) -> None:
    kind, grid, box = style
    for value in range(0, MOST + 1, 2):
        if kind == "lying":
            x = LEFT + 14 + (RIGHT - LEFT - 14) * value / MOST
            pen.line((x, TOP if grid else BOTTOM - 3, x, BOTTOM), fill=(190, 190, 190) if grid else fill)
            write(pen, (x - 3, BOTTOM + 4), str(value), font, fill)
        else:
            y = BOTTOM - (BOTTOM - TOP) * value / MOST
            pen.line((LEFT, y, RIGHT if grid else LEFT + 3, y), fill=(190, 190, 190) if grid else fill)
            write(pen, (LEFT - 8 - 6 * len(str(value)), y - 4), str(value), font, fill)
    pen.line((LEFT + 14 * (kind == "lying"), BOTTOM, RIGHT, BOTTOM), fill=fill)
    if box:
        pen.rectangle((LEFT + 14 * (kind == "lying"), TOP, RIGHT, BOTTOM), outline=fill)


def draw_chart(
    random: Random, split: str, style: tuple, names: Sequence[str], values: Sequence[int]
) -> Image.Image:
    """Bars, lying bars or a line for values from 0 to `MOST`, their names along the axis."""
    picture = Image.new("RGB", SIZE, (255, 255, random.randint(235, 255)))
    pen, fill = ImageDraw.Draw(picture), (30, 30, 30)
    small, font = assets.any_font(random, split, 9), assets.any_font(random, split, 11)
    _axes(pen, style, small, fill)
    shades = (
        random.sample(SHADES, len(values)) if random.random() < 0.5 else [random.choice(SHADES)] * len(values)
    )
    along = _spots(len(values), TOP, BOTTOM) if style[0] == "lying" else _spots(len(values), LEFT, RIGHT)
    ends = []
    for place, (name, value, spot) in enumerate(zip(names, values, along, strict=True)):
        if style[0] == "lying":
            start = LEFT + 14
            end = start + (RIGHT - start) * value / MOST
            pen.rectangle((start, spot - 8, end, spot + 8), fill=shades[place])
            write(pen, (3, spot - 5), name[:6], font, fill)
            continue
        height = BOTTOM - (BOTTOM - TOP) * value / MOST
        ends.append((spot, height))
        if style[0] == "bars":
            pen.rectangle((spot - 11, height, spot + 11, BOTTOM), fill=shades[place])
        write(pen, (spot - font.getlength(name) / 2, BOTTOM + 6 + 10 * (place % 2)), name, font, fill)
    if style[0] == "line":
        pen.line(ends, fill=shades[0], width=2)
        for x, y in ends:
            pen.ellipse((x - 3, y - 3, x + 3, y + 3), fill=shades[0])
    return picture


def chart(random: Random, split: str) -> Example:
    if random.random() < 0.25:
        return _pie(random, split)
    count = random.randint(3, 5)
    names = random.sample([name for name in random.choice(NAMES[split]) if len(name) <= 6], count)
    values = random.sample(range(1, MOST + 1), count)
    picture = draw_chart(random, split, random.choice(STYLES_OF[split]), names, values)
    form = random.choice(
        ("What is the value of {}?", "Which has the largest value?", "Which has the smallest value?")
    )
    place = random.randrange(count)
    if "largest" in form:
        answer = names[values.index(max(values))]
    elif "smallest" in form:
        answer = names[values.index(min(values))]
    else:
        answer = str(values[place])
    return Example(form, f"<image>{form.format(names[place])}", answer, (picture,))


def _pie(random: Random, split: str) -> Example:
    """Which of three parts is the largest, by colour."""
    colours = random.sample([name for name in COLOURS if name not in ("white", "black")], 3)
    shares = random.choice(((0.55, 0.3, 0.15), (0.5, 0.35, 0.15), (0.6, 0.25, 0.15)))
    picture = Image.new("RGB", (128, 128), (255, 255, random.randint(235, 255)))
    pen, turn, radius = ImageDraw.Draw(picture), random.uniform(0, 360), random.randint(40, 60)
    parts = list(zip(colours, shares, strict=True))
    random.shuffle(parts)
    for colour, share in parts:
        fill = random.choice(COLOURS[colour])
        pen.pieslice(
            (64 - radius, 64 - radius, 64 + radius, 64 + radius), turn, turn + 360 * share, fill=fill
        )
        turn += 360 * share
    form = random.choice(("Which colour has the largest part?", "Which colour has the smallest part?"))
    return Example(form, f"<image>{form}", colours[0 if "largest" in form else 2], (picture,))


def table(random: Random, split: str) -> Example:
    """A cell of a table of three or four rows and two or three columns of numbers."""
    rows = random.sample(random.choice(NAMES[split]), random.randint(3, 4))
    columns = random.sample(("price", "time", "size", "total", "age"), random.randint(2, 3))
    cells = [[str(random.randint(1, 99)) for _ in columns] for _ in rows]
    picture = Image.new("RGB", (192, 128), (random.randint(240, 255),) * 3)
    pen, fill = ImageDraw.Draw(picture), (random.randint(0, 60),) * 3
    font = assets.any_font(random, split, random.randint(11, 12))
    # Lines between rows or all around, shaded heads or not: the test's tables have both.
    lines, shaded = (1, 1) if split == "test" else random.choice(((0, 0), (0, 1), (1, 0)))
    wide, high, left = 120 / len(columns), random.randint(20, 24), 8
    if shaded:
        pen.rectangle((left - 4, 4, 188, 4 + high), fill=(215, 220, 230))
    for number, texts in enumerate([["", *columns], *([r, *c] for r, c in zip(rows, cells, strict=True))]):
        y = 4 + high * number
        for place, text in enumerate(texts):
            x = left + (60 + wide * (place - 1) if place else 0)
            write(pen, (x, y + 6), text, font, fill)
        if lines:
            pen.line((left - 4, math.floor(y), 188, math.floor(y)), fill=fill)
    row, column = random.randrange(len(rows)), random.randrange(len(columns))
    form = random.choice(("What is the {} of {}?", "Read the table: {} of {}."))
    question = form.format(columns[column], rows[row])
    return Example(form, f"<image>{question}", cells[row][column], (picture,))


SKILLS = (
    Skill("chart", "exact", chart, "fonts, names, combinations of kind, grid and frame"),
    Skill("table", "exact", table, "fonts, names of rows, the style with lines and shaded heads"),
)
