"""What was mended and left out while one answer was read; turned into a `Parsed` at the end."""

import math
import reprlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from .loose_json import number
from .places import Box, Parsed

Item = TypeVar("Item")


@dataclass(slots=True)
class Report:
    truncated: bool = False
    repairs: set[str] = field(default_factory=set)
    dropped: list[str] = field(default_factory=list)

    def drop(self, name: str, value: Any, why: str) -> None:
        self.dropped.append(f"{name} {reprlib.repr(value)} {why}")

    def result(self, found: Iterable[tuple[int, Item]]) -> Parsed[Item]:
        """`found` holds (position in the text, item)."""
        items = tuple(item for _, item in sorted(found, key=lambda one: one[0]))
        return Parsed(
            items=items,
            truncated=self.truncated,
            repairs=tuple(sorted(self.repairs)),
            dropped=tuple(self.dropped),
        )

    def numbers(self, name: str, values: Any, count: int) -> list[float] | None:
        """`count` finite numbers, or None and a line in `dropped`."""
        if not isinstance(values, list) or len(values) != count:
            self.drop(name, values, f"is not {count} numbers")
            return None
        numbers: list[float] = []
        for value in values:
            if isinstance(value, str):
                self.repairs.add("number as text")
                value = number(value.strip())
            if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
                self.drop(name, values, "holds something that is no finite number")
                return None
            numbers.append(value)
        return numbers

    def box(self, numbers: list[float], label: str, extra: Mapping[str, Any] | None = None) -> Box:
        """Four numbers as a Box; corners in the wrong order are swapped."""
        x1, y1, x2, y2 = numbers
        if x1 > x2 or y1 > y2:
            self.repairs.add("swapped corners")
        return Box(
            x1=min(x1, x2), y1=min(y1, y2), x2=max(x1, x2), y2=max(y1, y2), label=label, extra=extra or {}
        )
