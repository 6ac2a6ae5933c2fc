"""Pictograms and fonts, from packages that `make assets` fetches into output/assets.

Pictograms: Fluent Emoji Flat (MIT), drawn once a process by resvg. Fonts: Fontsource's files (OFL, one UFL).
"""

import io
import json
from functools import lru_cache
from pathlib import Path
from random import Random

from PIL import Image, ImageFont

PACKAGES = Path(__file__).resolve().parents[4] / "output/assets/node_modules"

FONTS = {
    "train": (
        "arvo", "bitter", "cabin", "comic-neue", "courier-prime", "fira-sans", "ibm-plex-mono", "inter",
        "josefin-sans", "lato", "lora", "merriweather", "montserrat", "noto-sans", "noto-serif", "open-sans",
        "oswald", "playfair-display", "pt-serif", "quicksand", "raleway", "roboto", "rubik", "zilla-slab",
    ),
    "test": (
        "crimson-text", "karla", "nunito", "source-serif-4", "space-mono", "ubuntu", "vollkorn", "work-sans",
    ),
}  # fmt: skip

# Those that look like little else and have a name of one or two common words.
NAMED = (
    "airplane alarm-clock ambulance anchor ant avocado axe backpack balloon banana basketball bat bear bed "
    "bee bell bicycle bird book bread broccoli broom bus butterfly cactus camel camera candle candy carrot "
    "castle cat chair cheese cherries chestnut chicken church coconut comet compass cookie corn cow crab "
    "croissant crown cucumber deer dog dolphin door doughnut dragon dress drum duck eagle egg elephant "
    "fire fish flamingo flute frog garlic ghost giraffe glasses gloves goat grapes guitar hamburger hammer "
    "hedgehog helicopter hospital hot-dog house ice-cream jeans kangaroo key kite koala ladder lemon lion "
    "lizard lobster lollipop luggage magnet mango melon microphone microscope mirror mobile-phone monkey "
    "mosquito motorcycle mountain mouse mushroom necktie octopus olive onion owl pancakes panda parrot peach "
    "peacock peanuts pear pencil penguin pie pig pineapple pizza pretzel printer puzzle-piece rabbit radio "
    "rainbow rat receipt robot rocket rose sailboat sandwich saxophone scissors scorpion screwdriver seal "
    "shark shield shrimp skateboard skull sloth snail snake snowflake snowman soap socks spider spoon "
    "squid stethoscope strawberry sunflower sushi swan taxi teapot telephone telescope television tennis "
    "tent thermometer tiger toilet tomato toothbrush tornado tractor train trophy trumpet tulip turtle "
    "umbrella unicorn violin volcano waffle watch watermelon whale window worm wrench zebra"
).split()
DRAWN_AS = {"bee": "honeybee", "book": "open-book", "corn": "ear-of-corn", "cheese": "cheese-wedge"}

# Unicode's emoji categories. Of a kind's pictograms that have no name above each third is kept from training.
KINDS = {
    "animal": "Animals & Nature", "food": "Food & Drink", "object": "Objects",
    "face": "Smileys & Emotion", "travel": "Travel & Places", "sport or game": "Activities",
}  # fmt: skip


def name_of(pictogram: str) -> str:
    """The name in words."""
    return pictogram.replace("-", " ")


def _package(name: str) -> Path:
    path = PACKAGES / name
    if not path.is_dir():
        raise ValueError(f"{path}: the package is not there; fetch pictograms and fonts with `make assets`")
    return path


@lru_cache(maxsize=1)
def _icons() -> dict[str, dict]:
    path = _package("@iconify-json/fluent-emoji-flat") / "icons.json"
    return json.loads(path.read_text(encoding="utf-8"))["icons"]


@lru_cache(maxsize=1)
def kinds() -> dict[str, dict[str, tuple[str, ...]]]:
    """split -> kind -> pictograms; no pictogram is in both splits."""
    path = _package("@iconify-json/fluent-emoji-flat") / "metadata.json"
    categories = json.loads(path.read_text(encoding="utf-8"))["categories"]
    found: dict[str, dict[str, tuple[str, ...]]] = {"train": {}, "test": {}}
    for kind, category in KINDS.items():
        names = sorted(name for name in categories[category] if name in _icons())
        known = {DRAWN_AS.get(name, name) for name in NAMED}
        kept = [name for name in names if name not in known][::3]
        found["test"][kind] = tuple(kept)
        found["train"][kind] = tuple(name for name in names if name not in kept)
    return found


@lru_cache(maxsize=2048)
def pictogram(name: str) -> Image.Image:
    """A pictogram as RGBA, 96 x 96 pixels. Raises ValueError for a name that the package has not."""
    import resvg_py

    name = DRAWN_AS.get(name, name)
    if name not in _icons():
        raise ValueError(f"no pictogram is called {name!r} in Fluent Emoji Flat")
    body = _icons()[name]["body"]
    svg = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 32 32">{body}</svg>'
    drawn = resvg_py.svg_to_bytes(svg_string=svg, width=96, height=96)
    return Image.open(io.BytesIO(bytes(drawn))).convert("RGBA")


@lru_cache(maxsize=4096)
def font(name: str, size: int, weight: int = 400) -> ImageFont.FreeTypeFont:
    """A font of `FONTS` at so many pixels."""
    path = _package(f"@fontsource/{name}") / "files" / f"{name}-latin-{weight}-normal.woff"
    return ImageFont.truetype(str(path), size, layout_engine=ImageFont.Layout.BASIC)


def any_font(random: Random, split: str, size: int) -> ImageFont.FreeTypeFont:
    """A font of the split, now and then bold."""
    return font(random.choice(FONTS[split]), size, 700 if random.random() < 0.25 else 400)
