"""Pictures drawn again as code, and small things looked at through a tool that zooms in."""

import json
from dataclasses import dataclass
from random import Random

from PIL import Image, ImageDraw

from qwenvl.nano.skills import canvas
from qwenvl.nano.skills.assets import any_font
from qwenvl.nano.skills.base import Example, Skill, relative
from qwenvl.nano.skills.text import words, write

SIDE = 128  # pixels of a drawing whose view box is 100 wide
RGB = {
    "red": (255, 0, 0), "green": (0, 128, 0), "blue": (0, 0, 255), "orange": (255, 165, 0),
    "purple": (128, 0, 128), "black": (0, 0, 0), "teal": (0, 128, 128), "brown": (165, 42, 42),
}  # fmt: skip
TAGS = ("rect", "circle", "polygon")
UNSEEN = frozenset((tag, fill) for row, tag in enumerate(TAGS) for fill in tuple(RGB)[row::4])


@dataclass(frozen=True)
class Part:
    """A shape of a drawing; numbers in units of the view box."""

    tag: str
    fill: str
    box: tuple[int, int, int, int]

    def code(self) -> str:
        x1, y1, x2, y2 = self.box
        if self.tag == "rect":
            place = f'x="{x1}" y="{y1}" width="{x2 - x1}" height="{y2 - y1}"'
        elif self.tag == "circle":
            place = f'cx="{(x1 + x2) // 2}" cy="{(y1 + y2) // 2}" r="{(x2 - x1) // 2}"'
        else:
            place = f'points="{(x1 + x2) // 2},{y1} {x2},{y2} {x1},{y2}"'
        return f'<{self.tag} {place} fill="{self.fill}"/>'

    def draw(self, pen: ImageDraw.ImageDraw, scale: float) -> None:
        x1, y1, x2, y2 = (scale * value for value in self.box)
        if self.tag == "rect":
            pen.rectangle((x1, y1, x2, y2), fill=RGB[self.fill])
        elif self.tag == "circle":
            pen.ellipse((x1, y1, x2, y2), fill=RGB[self.fill])
        else:
            pen.polygon(((x1 + x2) / 2, y1, x2, y2, x1, y2), fill=RGB[self.fill])


def _parts(random: Random, split: str) -> list[Part]:
    """One to three shapes apart from each other; in the test each is of a pair that training never draws."""
    parts: list[Part] = []
    wanted = random.randint(1, 3)
    while len(parts) < wanted:
        tag, fill = random.choice(TAGS), random.choice(tuple(RGB))
        half = (random.randint(7, 18), random.randint(7, 18))
        wide, high = (half[0], half[0]) if tag == "circle" else half
        x, y = random.randint(0, 100 - 2 * wide), random.randint(0, 100 - 2 * high)
        box = (x, y, x + 2 * wide, y + 2 * high)
        if ((tag, fill) in UNSEEN) == (split == "test") and not any(
            canvas.touch(box, p.box, 4) for p in parts
        ):
            parts.append(Part(tag, fill, box))
    return sorted(parts, key=lambda part: (part.box[1], part.box[0]))


def drawing(random: Random, split: str) -> Example:
    parts = _parts(random, split)
    picture = Image.new("RGB", (2 * SIDE, 2 * SIDE), "white")
    for part in parts:
        part.draw(ImageDraw.Draw(picture), 2 * SIDE / 100)
    form = random.choice(("Draw this as SVG.", "Give SVG code for the picture."))
    lines = ['<svg viewBox="0 0 100 100">', *(part.code() for part in parts), "</svg>"]
    return Example(form, f"<image>{form}", "\n".join(lines), (picture.reduce(2),))


def zoom(random: Random, split: str) -> Example:
    """A sign too small to read: the call that enlarges it. Reading what comes back is the skill ``word``."""
    size = (224, 224)
    picture = canvas.ground(random, size)
    item = canvas.any_item(random, split, unseen=True)
    text = random.choice(words())
    font = any_font(random, split, 9)
    wide, high = round(font.getlength(text)) + 8, 16
    x, y = random.randint(10, size[0] - wide - 10), random.randint(10, size[1] - high - 10)
    sign = (x, y, x + wide, y + high)
    pen = ImageDraw.Draw(picture)
    pen.rectangle(sign, fill=item.rgb, outline=(20, 20, 20))
    write(pen, (x + 4, y + 4), text, font, (255, 255, 255) if sum(item.rgb) < 380 else (0, 0, 0))
    box = relative(sign, size)
    region = relative((x - 8, y - 8, x + wide + 8, y + high + 8), size)
    form = random.choice(("What is written on the small {} sign? Zoom in first.", "Zoom in on the {} sign."))
    arguments = {"bbox_2d": region, "label": f"{item.colour} sign", "img_idx": 0}
    call = json.dumps({"name": "image_zoom_in_tool", "arguments": arguments})
    target = {"box": box, "most": 3 * (region[2] - region[0]) * (region[3] - region[1]) / 1e6}
    return Example(
        form,
        f"<image>{form.format(item.colour)}",
        f"<tool_call>\n{call}\n</tool_call>",
        (picture,),
        target=target,
    )


SKILLS = (
    Skill("drawing", "drawing", drawing, "shapes in fills that training never draws them in"),
    Skill("zoom", "zoom", zoom, "fonts"),
)
