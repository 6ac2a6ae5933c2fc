"""MiniWoB's tasks: small pages, each with an instruction and a reward that the page itself gives.

The pages come with the package `miniwob` (MIT); nothing else of it is used.
"""

from dataclasses import dataclass
from difflib import get_close_matches
from importlib.util import find_spec
from pathlib import Path

from .screen import Screen

WIDTH, HEIGHT = 160, 210
"""Of the part of a page that belongs to the task; the reward is shown beside it, out of sight."""

WINDOW = (500, 320)
"""What the pages were made for: dialogs are placed by the window's size."""


@dataclass(frozen=True)
class Outcome:
    """What the page says: over or not, the reward from -1 to 1 without its discount for time, and why."""

    done: bool
    reward: float
    reason: str | None

    @property
    def solved(self) -> bool:
        return self.done and self.reward > 0


def pages() -> Path:
    """The folder of MiniWoB's pages; ModuleNotFoundError says how to get them."""
    found = find_spec("miniwob")
    if found is None or found.origin is None:
        raise ModuleNotFoundError("MiniWoB's pages are missing: make setup", name="miniwob")
    return Path(found.origin).parent / "html"


def task_names() -> list[str]:
    """All tasks, sorted."""
    return sorted(page.stem for page in (pages() / "miniwob").glob("*.html"))


class MiniWob(Screen):
    """One episode: `task` with a `seed`, which decides what the page asks for, open for `seconds`."""

    def __init__(self, task: str, *, seed: int = 0, seconds: float = 300, scale: float = 2) -> None:
        if task not in task_names():
            near = ", ".join(get_close_matches(task, task_names())) or "those of task_names()"
            raise ValueError(f"task={task!r} is none of MiniWoB's; near it: {near}")
        page = pages() / "miniwob" / f"{task}.html"
        super().__init__(page, width=WIDTH, height=HEIGHT, scale=scale, folder=pages(), window=WINDOW)
        self.evaluate(
            f"core.EPISODE_MAX_TIME = {1000 * seconds}, Math.seedrandom('{seed}'), core.startEpisodeReal()"
        )

    @property
    def instruction(self) -> str:
        """What the page asks for."""
        return self.evaluate("core.getUtterance()")

    def outcome(self) -> Outcome:
        return Outcome(*self.evaluate("[WOB_DONE_GLOBAL, WOB_RAW_REWARD_GLOBAL, WOB_REWARD_REASON]"))

    def done(self) -> bool:
        return self.outcome().done
