"""Written things: words, lines, receipts and forms, documents, long documents."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib.resources import files
from random import Random

from PIL import Image, ImageDraw, ImageFont

from qwenvl.nano.skills import assets, canvas
from qwenvl.nano.skills.base import Example, Skill, relative

Font = ImageFont.FreeTypeFont


@lru_cache(maxsize=1)
def words() -> tuple[str, ...]:
    """The words of the nano vocabulary, three letters or more."""
    listed = (files("qwenvl.nano") / "words.txt").read_text(encoding="utf-8").split()
    return tuple(dict.fromkeys(word for word in listed if len(word) > 2))


def cased(random: Random, text: str) -> str:
    return random.choice((text, text, text.capitalize(), text.upper()))


@lru_cache(maxsize=200_000)
def advance(font: Font, character: str) -> float:
    """How far a character moves the pen, in pixels."""
    return font.getlength(character)


def fitting(random: Random, split: str, text: str, width: int, sizes: tuple[int, int]) -> Font:
    """A font in which the text is at most ``width`` pixels wide, ``sizes`` from, to where that is so."""
    size = random.randint(*sizes)
    while True:
        font = assets.any_font(random, split, size)
        if sum(advance(font, character) for character in text) <= width:
            return font
        size = max(7, size - 2)


def write(pen: ImageDraw.ImageDraw, xy: tuple[float, float], text: str, font: Font, fill) -> canvas.Box:
    """Write the text with the upper left of its ink at ``xy``; the box of the ink in pixels."""
    left, top, right, bottom = font.getbbox(text)
    pen.text((xy[0] - left, xy[1] - top), text, font=font, fill=fill)
    x, y = round(xy[0]), round(xy[1])
    return x, y, x + round(right - left), y + round(bottom - top)


def word(random: Random, split: str) -> Example:
    text = cased(random, random.choice(words()))
    picture = canvas.ground(random, (128, 64))
    font = fitting(random, split, text, 120, (16, 34))
    left, top, right, bottom = font.getbbox(text)
    spot = random.randint(2, max(2, 126 - round(right - left))), random.randint(2, 62 - round(bottom - top))
    write(ImageDraw.Draw(picture), spot, text, font, canvas.ink(random, picture))
    form = random.choice(("Read the word.", "What is written here?", "Which word do you see?"))
    return Example(form, f"<image>{form}", text, (picture,))


def line(random: Random, split: str) -> Example:
    """Two or three lines of words and numbers."""
    picture = canvas.ground(random, (160, 96))
    pen, fill = ImageDraw.Draw(picture), canvas.ink(random, picture)
    rows = []
    for _ in range(random.randint(1, 3)):
        number = str(random.randint(0, 9999))
        parts = [random.choice((*random.sample(words(), 3), number)) for _ in range(random.randint(2, 3))]
        rows.append(" ".join(parts))
    font = fitting(random, split, max(rows, key=len), 146, (12, 18))
    y, step = random.randint(3, 8), font.size + random.randint(6, 10)
    for place, row in enumerate(rows):
        write(pen, (random.randint(4, 8), y + place * step), row, font, fill)
    form = random.choice(("Read all lines.", "Read the text in the picture."))
    return Example(form, f"<image>{form}", "\n".join(rows), (picture,))


SHOPS = ("Green Market", "Blue Star", "Corner Shop", "River Books", "Sun Bakery", "Moon Cafe", "City Store",
         "Red Apple", "North Foods", "Gold Ring", "Little Garden", "Open Kitchen")  # fmt: skip
GOODS = ("bread", "milk", "tea", "apple", "cake", "book", "pen", "paper", "cup", "banana", "soap", "fish")
PEOPLE = ("Anna", "Ben", "Clara", "David", "Emma", "Felix", "Grace", "Henry", "Iris", "Jack", "Karl", "Lucy")
CITIES = ("Paris", "London", "Berlin", "Rome", "Oslo", "Madrid", "Vienna", "Lisbon", "Dublin", "Prague")


@dataclass(frozen=True)
class Layout:
    """How a receipt or form is laid out: where the head stands, dates' form, the word before a total, what
    divides, whether labels stand over their values.
    """

    centred: bool
    date: str
    total: str
    rule: str
    date_last: bool
    stacked: bool = False


LAYOUTS = {
    "train": (
        Layout(True, "{y}-{m:02}-{d:02}", "Total", "-", False),
        Layout(False, "{y}-{m:02}-{d:02}", "TOTAL", "", False),
        Layout(True, "{y}/{m:02}/{d:02}", "Sum", "=", True),
        Layout(False, "{y}-{m:02}-{d:02}", "Total", "=", True),
        Layout(True, "{y}.{m:02}.{d:02}", "To pay", "", False, stacked=True),
        Layout(False, "{y}/{m:02}/{d:02}", "TOTAL", "-", True, stacked=True),
    ),
    "test": (
        Layout(True, "{y}-{m:02}-{d:02}", "Sum", "", True, stacked=True),
        Layout(False, "{y}.{m:02}.{d:02}", "Total", "=", False),
        Layout(True, "{y}/{m:02}/{d:02}", "To pay", "-", True),
    ),
}


def _day(random: Random) -> dict[str, int]:
    return {"y": random.randint(2020, 2029), "m": random.randint(1, 12), "d": random.randint(1, 28)}


def _page(
    random: Random, size: tuple[int, int]
) -> tuple[Image.Image, ImageDraw.ImageDraw, tuple[int, int, int]]:
    shade = random.randint(235, 255)
    picture = Image.new("RGB", size, (shade, shade, random.randint(225, shade)))
    ink = random.randint(0, 60)
    return picture, ImageDraw.Draw(picture), (ink, ink, ink)


def _row(pen, y: float, width: int, left: str, right: str, font: Font, fill) -> None:
    write(pen, (8, y), left, font, fill)
    if right:
        write(pen, (width - 8 - font.getlength(right), y), right, font, fill)


def receipt(random: Random, split: str) -> Example:
    layout, shop, day = random.choice(LAYOUTS[split]), random.choice(SHOPS), _day(random)
    goods = [(name, random.randint(20, 999)) for name in random.sample(GOODS, random.randint(1, 4))]
    total = f"{sum(price for _, price in goods) / 100:.2f}"
    lines = [(name, f"{price / 100:.2f}") for name, price in goods]
    when = ("Date", layout.date.format(**day))
    body = [*lines, ("", layout.rule), (layout.total, total)]
    picture = _slip(random, split, layout, shop, [*body, when] if layout.date_last else [when, *body])
    form = random.choice(("Give shop, date and total as JSON.", "Read the receipt: shop, date, total."))
    iso = "{y}-{m:02}-{d:02}".format(**day)
    answer = json.dumps({"shop": shop, "date": iso, "total": total})
    return Example(form, f"<image>{form}", answer, (picture,))


def filled_form(random: Random, split: str) -> Example:
    """A form with a name, a city and a number."""
    layout = random.choice(LAYOUTS[split])
    values = {
        "name": f"{random.choice(PEOPLE)} {random.choice(PEOPLE)}son",
        "city": random.choice(CITIES),
        "number": str(random.randint(100, 9999)),
    }
    rows = [(key.capitalize(), value) for key, value in values.items()]
    random.shuffle(rows)
    picture = _slip(random, split, layout, random.choice(("Form", "Member card", "Order", "Visitor")), rows)
    form = random.choice(("Give name, city and number as JSON.", "Read the form: name, city, number."))
    return Example(form, f"<image>{form}", json.dumps(values), (picture,))


def _slip(
    random: Random, split: str, layout: Layout, head: str, rows: Sequence[tuple[str, str]]
) -> Image.Image:
    """Head and rows on paper of 160 x 192 pixels; a row without a left side is a rule of its sign."""
    width = 160
    picture, pen, fill = _page(random, (width, 192))
    font = fitting(random, split, "Date 2028-08-28 00", width - 8, (11, 13))
    large = fitting(random, split, head, width - 16, (14, 18))
    x = (width - large.getlength(head)) / 2 if layout.centred else 8
    write(pen, (x, random.randint(5, 9)), head, large, fill)
    y, step = 34.0, min(font.size + 7, 150 / (len(rows) * (1.6 if layout.stacked else 1) + 0.5))
    for left, right in rows:
        if not left:
            for across in range(8, width - 8, 1 if right == "=" else 4) if right else ():
                pen.line((across, y + 4, across + 1, y + 4), fill=fill)
            y += step * 0.7
        elif layout.stacked and left[0].isupper():
            write(pen, (8, y), left, font, fill)
            write(pen, (20, y + step * 0.85), right, font, fill)
            y += step * 1.9
        else:
            _row(pen, y, width, left, right, font, fill)
            y += step
    return picture


def _lines_of(random: Random, number: int, least: int = 2, most: int = 3) -> list[str]:
    return [" ".join(random.sample(words(), random.randint(least, most))).capitalize() for _ in range(number)]


PAGES = {"train": ("head text text", "head text table", "head table", "text image", "head image text"),
         "test": ("head image table", "text table", "image text text")}  # fmt: skip


def _document(random: Random, split: str) -> tuple[Image.Image, list[tuple[str, list[int], list[list[str]]]]]:
    """A page of 192 x 192 pixels and its parts: kind, box, rows of texts."""
    size = (192, 192)
    picture, pen, fill = _page(random, size)
    parts = []
    y = random.randint(6, 12)
    plain = fitting(random, split, "n" * 17, 180, (11, 13))
    for kind in random.choice(PAGES[split]).split():
        x = random.randint(8, 16)
        if kind == "image":
            one = canvas.sprite(random, canvas.any_item(random, split), 20)
            picture.paste(one, (x, y), one)
            box, rows = (x, y, x + one.width, y + one.height), []
        elif kind == "table":
            rows = [[random.choice(words()), str(random.randint(1, 99))] for _ in range(2)]
            box = _table(pen, (x, y), rows, plain, fill)
        else:
            text = _lines_of(random, 1)[0]
            font = fitting(random, split, text, 170, (16, 20)) if kind == "head" else plain
            while font.getlength(text) > 176:
                text = text.rsplit(" ", 1)[0]
            box, rows = write(pen, (x, y), text, font, fill), [[text]]
        parts.append((kind, relative(box, size), rows))
        y = box[3] + random.randint(8, 14)
    return picture, parts


def _table(pen, xy: tuple[int, int], rows: list[list[str]], font: Font, fill) -> canvas.Box:
    high, wide = (
        round(font.size) + 8,
        [round(max(font.getlength(row[c]) for row in rows)) + 10 for c in range(2)],
    )
    x, y = xy
    box = (x, y, x + sum(wide) + 1, y + high * len(rows) + 1)
    for place, row in enumerate(rows):
        for column, text in enumerate(row):
            left, top = x + sum(wide[:column]), y + place * high
            pen.rectangle((left, top, left + wide[column], top + high), outline=fill)
            write(pen, (left + 5, top + 4), text, font, fill)
    return box


TAGS = {"head": "h1", "text": "p", "table": "table", "image": "img"}
NAMES = {"head": "Title", "text": "Text", "table": "Table", "image": "Image"}


def document_html(random: Random, split: str) -> Example:
    picture, parts = _document(random, split)
    lines = []
    for kind, box, rows in parts:
        cells = "".join(f"<tr>{''.join(f'<td>{text}</td>' for text in row)}</tr>" for row in rows)
        inner = cells if kind == "table" else "".join(text for row in rows for text in row)
        lines.append(f'<{TAGS[kind]} data-bbox="{" ".join(map(str, box))}">{inner}</{TAGS[kind]}>')
    form = random.choice(("qwenvl html", "Give the page as QwenVL HTML."))
    return Example(form, f"<image>{form}", "\n".join(["<html><body>", *lines, "</body></html>"]), (picture,))


def document_markdown(random: Random, split: str) -> Example:
    picture, parts = _document(random, split)
    blocks = []
    for kind, box, rows in parts:
        inner = {
            "table": "\n".join(f"| {' | '.join(row)} |" for row in rows), "image": "![]()",
            "head": f"# {rows[0][0]}" if rows else "", "text": rows[0][0] if rows else "",
        }[kind]  # fmt: skip
        blocks.append(f"<!-- {NAMES[kind]} ({', '.join(map(str, box))}) -->\n{inner}")
    form = random.choice(("qwenvl markdown", "Give the page as QwenVL Markdown."))
    return Example(form, f"<image>{form}", "\n\n".join(blocks), (picture,))


def long_document(random: Random, split: str) -> Example:
    """Which of four to six pages says a word; page numbers are not printed."""
    number = random.randint(4, 6)
    heads = random.sample(words(), number)
    font = assets.any_font(random, split, 12)
    pictures = []
    for head in heads:
        picture, pen, fill = _page(random, (128, 96))
        write(
            pen,
            (random.randint(6, 20), 8),
            head.capitalize(),
            fitting(random, split, head, 110, (16, 20)),
            fill,
        )
        for place in range(3):
            text = " ".join(random.sample(words(), 2))
            write(pen, (8, 38 + 18 * place), text, font, fill)
        pictures.append(picture)
    wanted = random.randrange(number)
    form = random.choice(("On which page is the title {}?", "Find the page with the title {}."))
    question = "<image>" * number + form.format(heads[wanted].capitalize())
    return Example(form, question, str(wanted + 1), tuple(pictures))


SKILLS = (
    Skill("word", "exact", word, "fonts; the words are known"),
    Skill("line", "edit", line, "fonts; the words are known, their order is new"),
    Skill("receipt", "fields", receipt, "fonts, layouts"),
    Skill("form", "fields", filled_form, "fonts, layouts"),
    Skill("document_html", "document", document_html, "fonts, orders of a page's parts"),
    Skill("document_markdown", "document", document_markdown, "fonts, orders of a page's parts"),
    Skill("long_document", "exact", long_document, "fonts"),
)
