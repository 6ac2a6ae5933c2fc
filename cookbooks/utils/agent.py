"""An agent: observe, act, check, until the page, the model or a limit ends it.

screenshot + task + what was done --ask--> reply --read_action--> Action --screen.act--> page --done?--> again

Each step is one question with one picture; earlier steps are told in words, so that a prompt hardly grows. A
call that can't be read or carried out costs a step, and the model is told why.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from PIL import Image

from qwen_vl_serve import Message, Reply

from .agent_function_call import Action, ScreenTool, tool_calls_of
from .screen import Screen, ScreenError

Ask = Callable[[Sequence[Message]], Reply]
Ending = Literal["page", "terminate", "answer", "steps", "time", "crash"]


@dataclass(frozen=True)
class Step:
    """What was seen and said, and the action that was carried out, or why there was none."""

    screenshot: Image.Image
    reply: Reply
    action: Action | None
    error: str = ""

    def __str__(self) -> str:
        return self.error or str(self.action)


@dataclass(frozen=True)
class Run:
    """How a task went: what ended it ("page" where the page said so), and the model's own words for it."""

    steps: tuple[Step, ...]
    ending: Ending
    seconds: float
    status: str = ""
    answer: str = ""
    crash: str = ""


def run_agent(
    task: str, screen: Screen, ask: Ask, tool: ScreenTool, *, max_steps: int = 10, max_seconds: float = 120
) -> Run:
    """Let a model work at `task`. A reply that comes after `max_seconds` is not acted upon.

    `ask` answers messages, with `tool.schema` offered to it. What a model does wrong ends in the steps, never
    in an exception; whether the task is done, the page knows (`MiniWob.outcome`).
    """
    if max_steps < 1 or max_seconds <= 0:
        raise ValueError(f"max_steps={max_steps} must be 1 or more, max_seconds={max_seconds} positive")
    started = time.monotonic()
    steps: list[Step] = []
    ending: Ending = "steps"
    crash = ""
    while len(steps) < max_steps and ending == "steps":
        try:
            ending = _step(task, screen, ask, tool, steps, started + max_seconds)
        except ScreenError as error:
            ending, crash = "crash", str(error)
    last = steps[-1].action if steps else None
    return Run(
        tuple(steps),
        ending,
        time.monotonic() - started,
        status=last.status if last else "",
        answer=last.text if last and ending == "answer" else "",
        crash=crash,
    )


def _step(
    task: str, screen: Screen, ask: Ask, tool: ScreenTool, steps: list[Step], deadline: float
) -> Ending:
    """One step, added to `steps`: how the run ends with it, "steps" for not yet."""
    picture = screen.screenshot()
    reply = ask(messages_for(task, steps, picture))
    if time.monotonic() > deadline:
        steps.append(Step(picture, reply, None, "came after the time was over"))
        return "time"
    try:
        action = _action(reply, tool)
    except ValueError as error:
        steps.append(Step(picture, reply, None, f"error: {error}"))
        return "steps"
    steps.append(Step(picture, reply, action))
    try:
        screen.act(action)
    except ValueError as error:
        steps[-1] = Step(picture, reply, None, f"error: {error}")
        return "steps"
    if action.name in ("terminate", "answer"):
        return "answer" if action.name == "answer" else "terminate"
    return "page" if screen.done() else "steps"


def _action(reply: Reply, tool: ScreenTool) -> Action:
    calls = tool_calls_of(reply)
    if len(calls) != 1:
        raise ValueError(f"the reply calls {len(calls)} tools; call {tool.name} once a step")
    return tool.read_action(calls[0])


def messages_for(task: str, steps: Sequence[Step], picture: Image.Image) -> list[Message]:
    """The question of one step: the task, what was done so far, and the screen as it is."""
    done = "".join(f"\nStep {number}: {step}" for number, step in enumerate(steps, 1))
    text = f"{task}\nDone so far:{done}" if done else task
    return [
        {"role": "user", "content": [{"type": "image", "image": picture}, {"type": "text", "text": text}]}
    ]
