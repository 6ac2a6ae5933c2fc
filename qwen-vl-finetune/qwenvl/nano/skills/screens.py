"""Screens of a phone and of a computer: where to click, as a tool call."""

import json
from random import Random

from PIL import Image, ImageDraw

from qwenvl.nano.skills import assets, canvas, text
from qwenvl.nano.skills.base import Example, Skill, relative
from qwenvl.nano.skills.shapes import COLOURS, near

LABELS = (
    "Save Cancel Open Send Delete Back Next Search Help Home Play Stop Login Copy Paste Share Edit Close New "
    "Print Undo Reply Call Pay Buy Add Start Pause Mail Music Photos Maps Clock Files News Games"
).split()
LAYOUTS = {"train": ("list", "grid", "dialog", "column", "scattered"), "test": ("toolbar", "form")}
DEVICES = {
    "mobile_use": ((128, 224), "click", "Tap {} on the phone.", "On this phone, tap {}."),
    "computer_use": (
        (224, 160), "left_click", "Click {} on the screen.", "On this computer, click {}.",
        'Click on the "{}" button.', 'Click on the link "{}".',
    ),
}  # fmt: skip


def _places(random: Random, layout: str, size: tuple[int, int], top: int) -> list[canvas.Box]:
    """Boxes of the elements in pixels, by layout, below ``top``."""
    width, height = size
    gap = random.randint(4, 8)
    if layout in ("list", "column"):
        high = random.randint(20, 26)
        left, right = (6, width - 6) if layout == "list" else (width // 4, 3 * width // 4 + 10)
        number = min(random.randint(3, 6), (height - top - 4) // (high + gap))
        return [(left, top + (high + gap) * i, right, top + (high + gap) * i + high) for i in range(number)]
    if layout == "grid":
        columns, rows = max(2, width // 64), random.randint(2, 3)
        wide, high = (width - gap) // columns - gap, (height - top - gap) // rows - gap
        spots = [
            (gap + (wide + gap) * c, top + (high + gap) * r) for r in range(rows) for c in range(columns)
        ]
        return [(x, y, x + wide, y + high) for x, y in spots]
    if layout == "dialog":
        x, y = random.randint(6, 14), random.randint(height // 2, height - 40)
        wide = (width - 2 * x - gap) // 2
        return [(x + (wide + gap) * i, y, x + (wide + gap) * i + wide, y + 24) for i in range(2)]
    if layout == "scattered":
        boxes: list[canvas.Box] = []
        for _ in range(40):
            wide, high = random.randint(52, 80), random.randint(16, 26)
            x, y = random.randint(2, width - wide - 2), random.randint(top, height - high - 2)
            box = (x, y, x + wide, y + high)
            if len(boxes) < 6 and not any(canvas.touch(box, other, 3) for other in boxes):
                boxes.append(box)
        return boxes
    if layout == "toolbar":
        number, y = max(2, width // 56), random.choice((top, height - 30))
        wide = (width - gap) // number - gap
        bar = [(gap + (wide + gap) * i, y, gap + (wide + gap) * i + wide, y + 24) for i in range(number)]
        return [*bar, (width // 2 - 30, height // 2 - 10, width // 2 + 30, height // 2 + 14)]
    high = random.randint(18, 24)
    rows = [
        (width // 2 - 4, top + (high + gap) * i, width - 6, top + (high + gap) * i + high) for i in range(4)
    ]
    return [*rows, (8, height - 34, width // 2 - 8, height - 10)]


def draw_screen(
    random: Random, split: str, layout: str, size: tuple[int, int], bar: int = 16
) -> tuple[Image.Image, list[tuple[str, canvas.Box]]]:
    """A screen with a title bar, so high; its elements' labels and boxes in pixels."""
    dark = layout != "scattered" and random.random() < 0.35
    paper, ink = ((35, 37, 42), (235, 235, 235)) if dark else ((246, 246, 248), (25, 25, 25))
    accent = random.choice(COLOURS[random.choice(("blue", "green", "purple", "teal", "orange", "gray"))])
    picture = Image.new("RGB", size, paper)
    pen = ImageDraw.Draw(picture)
    pen.rectangle((0, 0, size[0], bar), fill=accent)
    font = assets.any_font(random, split, random.randint(11, 13))
    boxes = _places(random, layout, size, bar + 8)
    known = LABELS
    if layout == "scattered" and random.random() < 0.7:
        known = [word for word in text.words() if len(word) < 8]
    labels = [text.cased(random, label) for label in random.sample(known, len(boxes))]
    plain = layout in ("list", "scattered") and random.random() < 0.5
    raised = near(random, (90, 95, 105) if dark else (222, 225, 232), 8)
    for label, box in zip(labels, boxes, strict=True):
        if plain:
            pen.line((box[0], box[3], box[2], box[3]), fill=raised if layout == "list" else ink)
        else:
            pen.rounded_rectangle((*box[:2], box[2] - 1, box[3] - 1), random.choice((0, 4, 4)), fill=raised)
        left, top, right, bottom = font.getbbox(label)
        wide, high = right - left, bottom - top
        x = box[0] + 5 if plain else (box[0] + box[2] - wide) / 2
        text.write(pen, (x, (box[1] + box[3] - high) / 2), label, font, ink)
    return picture, list(zip(labels, boxes, strict=True))


def call_for(device: str, box: canvas.Box, size: tuple[int, int]) -> str:
    """The tool call that clicks the middle of a box in pixels."""
    place = relative(((box[0] + box[2]) / 2, (box[1] + box[3]) / 2), size)
    arguments = {"action": DEVICES[device][1], "coordinate": place}
    return f"<tool_call>\n{json.dumps({'name': device, 'arguments': arguments})}\n</tool_call>"


def click(random: Random, split: str) -> Example:
    device = random.choice(tuple(DEVICES))
    size, _, *forms = DEVICES[device]
    picture, elements = draw_screen(random, split, random.choice(LAYOUTS[split]), size)
    label, box = random.choice(elements)
    form = random.choice(forms)
    return Example(
        form, f"<image>{form.format(label)}", call_for(device, box, size), (picture,),
        target={"box": relative(box, size)},
    )  # fmt: skip


SKILLS = (Skill("gui", "click", click, "fonts, layouts"),)
