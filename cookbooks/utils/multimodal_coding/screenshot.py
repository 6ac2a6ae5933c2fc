"""Pages and drawings that a model wrote, as pictures."""

import re
import tempfile
from pathlib import Path

from PIL import Image

from ..screen import Screen

_BLOCK = re.compile(r"```(\w*)[^\n]*\n(.*?)(?:```|\Z)", re.DOTALL)


def code_of(answer: str, language: str) -> str:
    """The longest block of `language` in an answer, else the answer itself, as models write either."""
    blocks = [code for name, code in _BLOCK.findall(answer) if name.lower() == language]
    return max(blocks, key=len).strip() if blocks else answer.strip()


def screenshot_of(markup: str, *, width: int = 640, height: int = 400, patience: float = 10) -> Image.Image:
    """What a browser shows of HTML or SVG, RGB of this size. Scripts run; nothing is loaded from anywhere.

    A page that is not there after `patience` seconds is a ScreenError.
    """
    with tempfile.TemporaryDirectory(prefix="page-") as folder:
        page = Path(folder) / "page.html"
        page.write_text(markup, encoding="utf-8")
        with Screen(page, width=width, height=height, patience=patience) as screen:
            return screen.screenshot()
