"""The two tools by which Qwen models use a screen, and what a model calls them with.

reply --tool_calls_of--> ToolCall --read_action--> Action, coordinates 0 to 1000 --screen.act--> pixels

Names, fields and actions are those of Qwen3-VL's own cookbooks, which its checkpoints were trained with;
`ComputerUse.schema` goes to a back end as `tools=[...]`. An `Action` keeps the model's coordinates: only the
screen that carries it out makes pixels of them.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qwen_vl_serve import Reply, Tool, ToolCall
from qwen_vl_utils.grounding import RELATIVE, parse_tool_calls

LONGEST_WAIT = 30
"""Seconds that one action may wait or press."""


@dataclass(frozen=True, kw_only=True)
class Action:
    """One action, checked. Coordinates are (x, y), 0 to 1000 of the screen; what an action lacks is empty."""

    name: str
    coordinate: tuple[float, float] | None = None
    coordinate2: tuple[float, float] | None = None
    keys: tuple[str, ...] = ()
    text: str = ""
    pixels: float = 0
    time: float = 0
    button: str = ""
    status: str = ""

    def __str__(self) -> str:
        given = {
            name: value
            for name, value in vars(self).items()
            if name != "name" and value not in (None, "", (), 0)
        }
        return f"{self.name}({', '.join(f'{name}={value!r}' for name, value in given.items())})"


@dataclass(frozen=True)
class ScreenTool:
    """A tool: for each action the fields it must have, and those it may have."""

    name: str
    description: str
    actions: Mapping[str, tuple[str, Sequence[str], Sequence[str]]]

    @property
    def schema(self) -> Tool:
        """The tool as OpenAI's format and Qwen's template write it."""
        used = {field for _, must, may in self.actions.values() for field in (*must, *may)}
        meaning = "\n".join(f"* `{name}`: {text}" for name, (text, _, _) in self.actions.items())
        action = {"type": "string", "enum": list(self.actions), "description": f"What to do:\n{meaning}"}
        fields = {name: schema for name, schema in FIELDS.items() if name in used}
        function = {
            "name": self.name,
            "description": self.description,
            "parameters": {
                "type": "object",
                "properties": {"action": action, **fields},
                "required": ["action"],
            },
        }
        return {"type": "function", "function": function}

    def read_action(self, call: ToolCall) -> Action:
        """The action that a model called for; ValueError names the field, the value and the remedy."""
        if call.name != self.name:
            raise ValueError(f"name={call.name!r} is no tool that was offered; call {self.name!r}")
        try:
            arguments = json.loads(call.arguments)
        except ValueError as error:
            raise ValueError(f"{self.name}: arguments={call.arguments!r} is no JSON: {error}") from error
        if not isinstance(arguments, dict):
            raise ValueError(f"{self.name}: arguments={arguments!r} must be an object with the field action")
        name = arguments.get("action")
        if not isinstance(name, str) or name not in self.actions:
            raise ValueError(f"{self.name}: action={name!r} must be one of {', '.join(self.actions)}")
        _, must, may = self.actions[name]
        missing = [field for field in must if arguments.get(field) is None]
        if missing:
            raise ValueError(f"{self.name}: {missing[0]} is missing; {name} needs {', '.join(must)}")
        given = {field: arguments[field] for field in (*must, *may) if arguments.get(field) is not None}
        return Action(
            name=name,
            **{field: READ[field](f"{self.name}: {field}", value) for field, value in given.items()},
        )


def tool_calls_of(reply: Reply) -> list[ToolCall]:
    """The tools that a reply calls: those the back end has read, else `<tool_call>` blocks in its text."""
    if reply.tool_calls:
        return list(reply.tool_calls)
    found = parse_tool_calls(reply.text).items
    return [ToolCall(call.name, json.dumps(call.arguments, ensure_ascii=False)) for call in found]


def _coordinate(field: str, value: Any) -> tuple[float, float]:
    if isinstance(value, list) and len(value) == 2 and all(_is_number(one) for one in value):
        x, y = value
        if 0 <= x <= RELATIVE and 0 <= y <= RELATIVE:
            return x, y
    raise ValueError(f"{field}={value!r} must be [x, y], both from 0 to {RELATIVE} of the screen")


def _number(field: str, value: Any) -> float:
    if not _is_number(value):
        raise ValueError(f"{field}={value!r} must be a finite number")
    return value


def _seconds(field: str, value: Any) -> float:
    if not (_is_number(value) and 0 <= value <= LONGEST_WAIT):
        raise ValueError(f"{field}={value!r} must be seconds from 0 to {LONGEST_WAIT}")
    return value


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _text(field: str, value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{field}={value!r} must be text")
    return value


def _keys(field: str, value: Any) -> tuple[str, ...]:
    if not (isinstance(value, list) and value and all(isinstance(key, str) for key in value)):
        raise ValueError(f'{field}={value!r} must be a list of keys such as ["ctrl", "a"]')
    return tuple(value)


def _one_of(*choices: str) -> Any:
    def read(field: str, value: Any) -> str:
        if value not in choices:
            raise ValueError(f"{field}={value!r} must be one of {', '.join(choices)}")
        return value

    return read


BUTTONS = ("Back", "Home", "Menu", "Enter")
STATUSES = ("success", "failure")
READ = {
    "coordinate": _coordinate,
    "coordinate2": _coordinate,
    "keys": _keys,
    "text": _text,
    "pixels": _number,
    "time": _seconds,
    "button": _one_of(*BUTTONS),
    "status": _one_of(*STATUSES),
}
_POINT = {"type": "array", "items": {"type": "number"}, "minItems": 2, "maxItems": 2}
FIELDS: dict[str, dict[str, Any]] = {
    "keys": {
        "type": "array",
        "items": {"type": "string"},
        "description": "Keys, held together: pressed in order.",
    },
    "text": {"type": "string", "description": "What is typed, or answered."},
    "coordinate": {**_POINT, "description": "(x, y): from the left and top edge, 0 to 1000 of the screen."},
    "coordinate2": {**_POINT, "description": "(x, y) where a swipe ends, 0 to 1000 of the screen."},
    "pixels": {"type": "number", "description": "How far to scroll: up or right when positive."},
    "time": {"type": "number", "description": f"Seconds, at most {LONGEST_WAIT}."},
    "button": {"type": "string", "enum": list(BUTTONS), "description": "A button of the phone."},
    "status": {"type": "string", "enum": list(STATUSES), "description": "How the task ended."},
}

_ENDS: dict[str, tuple[str, Sequence[str], Sequence[str]]] = {
    "wait": ("Wait for `time` seconds.", ["time"], []),
    "terminate": ("The task is over: report its `status`.", ["status"], []),
    "answer": ("Answer the question with `text`.", ["text"], []),
}
ComputerUse = ScreenTool(
    "computer_use",
    "Use a computer by mouse and keyboard, seeing screenshots.\n"
    "* There is no terminal: everything is done on the screen that is shown.\n"
    "* Programs take time: where nothing has changed yet, wait and look again.\n"
    "* The screen is 1000x1000, whatever its pixels. Aim at the middle of what you click.",
    {
        "key": ("Press `keys` together, in order, and let them go.", ["keys"], []),
        "type": ("Type `text` where the focus is.", ["text"], []),
        "mouse_move": ("Move the pointer to `coordinate`.", ["coordinate"], []),
        "left_click": ("Click the left button at `coordinate`.", ["coordinate"], []),
        "left_click_drag": ("Drag from where the pointer is to `coordinate`.", ["coordinate"], []),
        "right_click": ("Click the right button at `coordinate`.", ["coordinate"], []),
        "middle_click": ("Click the middle button at `coordinate`.", ["coordinate"], []),
        "double_click": ("Click twice at `coordinate`.", ["coordinate"], []),
        "triple_click": ("Click three times at `coordinate`.", ["coordinate"], []),
        "scroll": ("Turn the wheel by `pixels`: up when positive.", ["pixels"], ["coordinate"]),
        "hscroll": ("Scroll sideways by `pixels`: right when positive.", ["pixels"], ["coordinate"]),
        **_ENDS,
    },
)
MobileUse = ScreenTool(
    "mobile_use",
    "Use a phone by touch, seeing screenshots.\n"
    "* Apps take time: where nothing has changed yet, wait and look again.\n"
    "* The screen is 1000x1000, whatever its pixels. Aim at the middle of what you touch.",
    {
        "click": ("Tap at `coordinate`.", ["coordinate"], []),
        "long_press": ("Press at `coordinate` for `time` seconds.", ["coordinate", "time"], []),
        "swipe": ("Swipe from `coordinate` to `coordinate2`.", ["coordinate", "coordinate2"], []),
        "type": ("Type `text` where the focus is.", ["text"], []),
        "system_button": ("Press the phone's `button`.", ["button"], []),
        **_ENDS,
    },
)
