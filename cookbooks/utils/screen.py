"""A page in headless Chromium: looked at and acted on as a person would, and cut off from everything else.

Action, 0 to 1000 --act, the one place that makes pixels--> mouse, keys, touch --> page --> screenshot

The browser has a profile of its own, gone when it closes. It opens files of the page's folder and nothing
else: requests and web sockets are refused, names don't resolve, and whatever passes by that meets a proxy
that is not there. Playwright lives in a thread of its own, because a notebook's thread has an event loop.
"""

import io
import os
import shutil
import time
import uuid
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal, Self, TypeVar

import playwright.sync_api as playwright
import psutil
from PIL import Image
from playwright.sync_api import FloatRect, Route, sync_playwright

from qwen_vl_utils.grounding import to_pixels

from .agent_function_call import Action

ALONE = (
    "--host-resolver-rules=MAP * ~NOTFOUND",
    "--proxy-server=http://127.0.0.1:1",
    "--proxy-bypass-list=<-loopback>",
    "--force-webrtc-ip-handling-policy=disable_non_proxied_udp",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-quic",
    "--no-first-run",
    "--js-flags=--max-old-space-size=256",
)
KEYS = {
    "ctrl": "Control", "control": "Control", "alt": "Alt", "shift": "Shift", "cmd": "Meta", "win": "Meta",
    "meta": "Meta", "super": "Meta", "enter": "Enter", "return": "Enter", "esc": "Escape", "escape": "Escape",
    "tab": "Tab", "space": " ", "backspace": "Backspace", "delete": "Delete", "del": "Delete", "home": "Home",
    "end": "End", "insert": "Insert", "up": "ArrowUp", "down": "ArrowDown", "left": "ArrowLeft",
    "right": "ArrowRight", "pageup": "PageUp", "pagedown": "PageDown", "capslock": "CapsLock",
    **{f"f{number}": f"F{number}" for number in range(1, 13)},
}  # fmt: skip
"""What models call keys, without blanks and underscores, and what the browser calls them."""

CLICKS: dict[str, tuple[Literal["left", "middle", "right"], int]] = {
    "left_click": ("left", 1),
    "middle_click": ("middle", 1),
    "right_click": ("right", 1),
    "double_click": ("left", 2),
    "triple_click": ("left", 3),
}
SWIPE_MOVES = 8

Result = TypeVar("Result")


class ScreenError(RuntimeError):
    """The page hung or crashed; the browser is closed."""


class Screen:
    """A page on a screen of `width` x `height` of its own pixels; a screenshot has `scale` times as many.

    `page`: an HTML file; files of its `folder` (the one it lies in) may be loaded, nothing else. `touch`: a
    phone's screen. `window`: (width, height) of the browser's window where the screen is only its upper left
    part. A page that crashes, or does nothing for `patience` seconds, is a ScreenError.
    """

    def __init__(
        self,
        page: Path,
        *,
        width: int,
        height: int,
        scale: float = 1,
        touch: bool = False,
        folder: Path | None = None,
        window: tuple[int, int] | None = None,
        patience: float = 20,
    ) -> None:
        self.width, self.height, self.touch = width, height, touch
        self._home = page.resolve(strict=True).as_uri()
        self._allowed = (folder or page.parent).resolve(strict=True).as_uri() + "/"
        self._pointer = (width // 2, height // 2)
        self._mark = f"--screen-{uuid.uuid4().hex}"
        self._closed, self._patience = False, patience
        self._thread = ThreadPoolExecutor(1, "browser")
        self._do(self._open, scale, window or (width, height))

    def screenshot(self) -> Image.Image:
        """What is on the screen now: RGB, `scale` times the screen's size."""
        part: FloatRect = {"x": 0, "y": 0, "width": self.width, "height": self.height}
        return Image.open(io.BytesIO(self._do(lambda: self._page.screenshot(clip=part)))).convert("RGB")

    def act(self, action: Action) -> None:
        """Carry out an action; ValueError for a key nobody knows. `terminate` and `answer` change nothing."""
        if action.name in ("terminate", "answer"):
            return
        if action.name == "wait":
            time.sleep(action.time)
            return
        self._do(self._act, action, extra=action.time)

    def evaluate(self, script: str) -> Any:
        """The value of a JavaScript expression in the page: what tests and checks ask it."""
        return self._do(lambda: self._page.evaluate(script))

    def done(self) -> bool:
        """Whether the page itself says that it is over; a plain page never does."""
        return False

    def close(self) -> None:
        """Close the browser; its profile goes with it."""
        if not self._closed:
            self._do(self._close)
            self._closed = True
            self._thread.shutdown()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _do(self, work: Callable[..., Result], *arguments: Any, extra: float = 0) -> Result:
        """Run in the browser's thread, which is freed by killing the browser where it takes too long."""
        if self._closed:
            raise ScreenError("the browser is closed; open another Screen")
        future = self._thread.submit(work, *arguments)
        try:
            return future.result(self._patience + extra)
        except TimeoutError as error:
            self._kill()
            raise ScreenError(
                f"the page did nothing for {self._patience + extra:g} s; the browser was killed"
            ) from error
        except playwright.Error as error:
            self._kill()
            raise ScreenError(f"the browser failed and was closed: {error.message}") from error

    def _open(self, scale: float, window: tuple[int, int]) -> None:
        program = shutil.which("chromium") or shutil.which("google-chrome")
        if program is None:
            raise FileNotFoundError("no chromium on PATH; on Debian: sudo apt-get install chromium")
        self._playwright = sync_playwright().start()
        self._browser = self._playwright.chromium.launch(
            executable_path=program, args=[*ALONE, self._mark], chromium_sandbox=os.geteuid() != 0
        )
        self._context = self._browser.new_context(
            viewport={"width": window[0], "height": window[1]},
            device_scale_factor=scale,
            has_touch=self.touch,
            is_mobile=self.touch,
            service_workers="block",
            accept_downloads=False,
        )
        self._context.set_default_timeout(1000 * self._patience)
        self._context.route("**/*", self._guard)
        self._context.route_web_socket("**/*", lambda socket: socket.close())
        self._page = self._context.new_page()
        self._page.goto(self._home)
        self._touches = self._context.new_cdp_session(self._page)

    def _guard(self, route: Route) -> None:
        inside = route.request.url.startswith((self._allowed, "data:", "blob:"))
        route.continue_() if inside else route.abort()

    def _kill(self) -> None:
        """End the browser's processes, found by the mark on their command lines."""
        self._closed = True
        for process in psutil.Process().children(recursive=True):
            with suppress(psutil.NoSuchProcess):
                if self._mark in process.cmdline():
                    process.kill()
        self._thread.submit(self._playwright.stop)
        self._thread.shutdown()

    def _close(self) -> None:
        self._browser.close()
        self._playwright.stop()

    def _pixels(self, coordinate: tuple[float, float] | None) -> tuple[int, int]:
        """The pixel of the page that 0 to 1000 means; 1000 is the far edge, whose last pixel is inside."""
        assert coordinate is not None
        x, y = to_pixels(coordinate, height=self.height, width=self.width)
        return min(int(x), self.width - 1), min(int(y), self.height - 1)

    def _act(self, action: Action) -> None:
        page, name = self._page, action.name
        if name == "key":
            self._press(action.keys)
        elif name == "type":
            page.keyboard.type(action.text)
        elif name == "system_button":
            self._system_button(action.button)
        elif name == "click":
            page.touchscreen.tap(*self._pixels(action.coordinate))
        elif name == "long_press":
            self._touch([self._pixels(action.coordinate)], action.time)
        elif name == "swipe":
            (x, y), (x2, y2) = self._pixels(action.coordinate), self._pixels(action.coordinate2)
            self._touch(
                [
                    (x + (x2 - x) * i // SWIPE_MOVES, y + (y2 - y) * i // SWIPE_MOVES)
                    for i in range(SWIPE_MOVES + 1)
                ]
            )
        else:
            self._use_mouse(action)

    def _use_mouse(self, action: Action) -> None:
        mouse, name = self._page.mouse, action.name
        if name == "left_click_drag":
            mouse.move(*self._pointer)
            mouse.down()
        if action.coordinate:
            self._pointer = self._pixels(action.coordinate)
        mouse.move(*self._pointer, steps=SWIPE_MOVES if name == "left_click_drag" else 1)
        if name == "left_click_drag":
            mouse.up()
        elif name == "scroll":
            mouse.wheel(0, -action.pixels)
        elif name == "hscroll":
            mouse.wheel(action.pixels, 0)
        elif name in CLICKS:
            button, count = CLICKS[name]
            mouse.click(*self._pointer, button=button, click_count=count)

    def _press(self, keys: Sequence[str]) -> None:
        names = [_key(key) for key in keys]
        for name in names:
            self._page.keyboard.down(name)
        for name in reversed(names):
            self._page.keyboard.up(name)

    def _system_button(self, button: str) -> None:
        if button == "Back":
            self._page.go_back()
        elif button == "Home":
            self._page.goto(self._home)
        else:
            self._page.keyboard.press({"Menu": "ContextMenu", "Enter": "Enter"}[button])

    def _touch(self, path: Sequence[tuple[int, int]], seconds: float = 0) -> None:
        """A finger down at the path's start, `seconds` still, along the path, and up."""
        for number, (x, y) in enumerate(path):
            kind = "touchMove" if number else "touchStart"
            self._touches.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": [{"x": x, "y": y}]})
            if number == 0:
                time.sleep(seconds)
        self._touches.send("Input.dispatchTouchEvent", {"type": "touchEnd", "touchPoints": []})


def _key(name: str) -> str:
    if len(name) == 1:
        return name
    plain = name.lower().replace("_", "").replace(" ", "")
    if plain not in KEYS:
        raise ValueError(f"keys: {name!r} is no key; give one character or one of {', '.join(KEYS)}")
    return KEYS[plain]
