"""Simple solids before a camera: their boxes in space."""

import json
import math
from random import Random

from PIL import Image, ImageDraw

from qwen_vl_utils.grounding import Box3D, Camera, corners
from qwenvl.nano.skills.base import Example, Skill
from qwenvl.nano.skills.shapes import COLOURS, near

SIZE = (128, 128)
CAMERA = Camera.from_field_of_view(height=SIZE[1], width=SIZE[0], degrees=60)
FLOOR = 1.0  # metres below the camera
# Each face by its corners, whose index bits 4, 2 and 1 say which side of x, y and z.
FACES = ((0, 1, 3, 2), (4, 5, 7, 6), (0, 1, 5, 4), (2, 3, 7, 6), (0, 2, 6, 4), (1, 3, 7, 5))
COLOURS_OF = {
    "test": ("purple", "teal", "pink"),
    "train": ("red", "green", "blue", "yellow", "orange", "brown"),
}
KINDS = {"box": (0.7, 1.4), "pillar": (0.4, 0.7), "plate": (1.1, 1.8)}


def _solid(random: Random, colour: str, kind: str, x: float) -> Box3D:
    low, high = KINDS[kind]
    sides = [random.uniform(low, high) for _ in range(3)]
    if kind == "pillar":
        sides[1] = random.uniform(1.3, 1.9)
    elif kind == "plate":
        sides[1] = random.uniform(0.15, 0.3)
    z = random.uniform(4.0, 7.0)
    turn = random.uniform(-0.25, 0.25)
    values = [round(value, 1) for value in (x * z / 4, FLOOR - sides[1] / 2, z, *sides)] + [
        0.0,
        round(turn, 1),
        0.0,
    ]
    return Box3D(
        **dict(
            zip(("x", "y", "z", "x_size", "y_size", "z_size", "roll", "pitch", "yaw"), values, strict=True)
        ),
        label=f"{colour} {kind}",
    )


def draw_solid(picture: Image.Image, box: Box3D, shade: tuple[int, int, int]) -> None:
    """Six faces, the farthest first, each lit by the side it looks to."""
    points = corners(box)

    def far(face) -> float:
        middle = [sum(points[index][axis] for index in face) / 4 for axis in range(3)]
        return math.hypot(*middle)

    pen = ImageDraw.Draw(picture)
    for face in sorted(FACES, key=far, reverse=True):
        light = {0: 0.75, 1: 0.6, 2: 1.0, 3: 0.4, 4: 0.85, 5: 0.5}[FACES.index(face)]
        fill = tuple(round(value * light) for value in shade)
        pen.polygon([CAMERA.project(points[index]) for index in face], fill=fill, outline=(30, 30, 30))


def solid(random: Random, split: str) -> Example:
    """One or two solids; the box of one."""
    names = random.sample(COLOURS_OF[split], random.randint(1, 2))
    boxes = [
        _solid(random, colour, random.choice(tuple(KINDS)), random.uniform(-1.4, -0.7) + 2 * place)
        for place, colour in enumerate(names)
    ]
    sky, floor = near(random, (200, 215, 235), 20), near(random, (150, 145, 135), 25)
    picture = Image.new("RGB", SIZE, sky)
    ImageDraw.Draw(picture).rectangle((0, SIZE[1] // 2, *SIZE), fill=floor)
    for box in sorted(boxes, key=lambda one: -one.z):
        draw_solid(picture, box, random.choice(COLOURS[box.label.split()[0]]))
    box = random.choice(boxes)
    numbers = [box.x, box.y, box.z, box.x_size, box.y_size, box.z_size, box.roll, box.pitch, box.yaw]
    form = random.choice(("Find the {} in 3D.", "Give the 3D box of the {} as JSON."))
    answer = json.dumps({"bbox_3d": numbers, "label": box.label})
    return Example(form, f"<image>{form.format(box.label)}", answer, (picture,), target={"cuboid": numbers})


SKILLS = (Skill("solid", "cuboid", solid, "colours of solids"),)
