"""vLLM's flags as a user writes them, and a profile's values put in where the user said nothing.

tokens --read_flags--> Flag...        --a-b V, --a_b V, --a=V, --a.key V, --no-a, -tp V
profile, flags --combine--> tokens    the user's word stands; of mappings, each key for itself

Which flags there are is vLLM's business: what is not known here is handed on as it was written.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

ALIASES = {"-tp": "tensor-parallel-size", "-ep": "enable-expert-parallel"}
"""vLLM's short names of flags that a profile may set."""


@dataclass(frozen=True)
class Flag:
    """One flag of the user's and what followed it."""

    name: str
    """In vLLM's spelling, without the dashes and "no-" in front; "" where no flag began."""
    path: tuple[str, ...]
    """("image",) of --limit-mm-per-prompt.image"""
    values: tuple[str, ...]
    tokens: tuple[str, ...]
    """As they were written."""


def read_flags(tokens: Sequence[str]) -> list[Flag]:
    """The flags in ``tokens``, each with the values up to the next one."""
    groups: list[list[str]] = []
    for token in tokens:
        begins = token.startswith("-") and not re.match(r"-\.?\d|-$", token)
        if begins or not groups:
            groups.append([])
        groups[-1].append(token)
    return [_flag(group) for group in groups]


def _flag(tokens: Sequence[str]) -> Flag:
    first, *rest = tokens
    if not first.startswith("-"):
        return Flag("", (), tuple(tokens), tuple(tokens))
    key, equals, value = first.partition("=")
    key, *path = key.split(".")
    name = ALIASES.get(key) or key.lstrip("-").replace("_", "-").removeprefix("no-")
    return Flag(name, tuple(path), ((value,) if equals else ()) + tuple(rest), tuple(tokens))


def given(flags: Sequence[Flag], name: str) -> tuple[str, ...] | None:
    """The values of the flag's last appearance (() for a switch); None where it does not appear."""
    found = [flag.values for flag in flags if flag.name == name and not flag.path]
    return found[-1] if found else None


def combine(
    profile: Mapping[str, Any], flags: Sequence[Flag], configured: Mapping[str, Any] | None = None
) -> tuple[str, ...]:
    """The arguments for vLLM: what the profile says and the user does not, then what the user wrote.

    ``profile``: name -> True for a switch, a mapping for a flag that takes JSON, else the value.
    ``configured``: what stands in the user's --config file, names in vLLM's spelling.
    """
    configured = configured or {}
    arguments: list[str] = []
    replaced: set[str] = set()
    for name, value in profile.items():
        mine = [flag for flag in flags if flag.name == name]
        if isinstance(value, Mapping):
            inner = configured.get(name)
            merged = merge(value, inner) if isinstance(inner, Mapping) else value
            tokens, replaces = _mapping(name, merged, mine)
            arguments += tokens
            replaced |= {name} if replaces else set()
        elif not mine and name not in configured:
            arguments += [f"--{name}"] if value is True else [f"--{name}", str(value)]
    for flag in flags:
        if flag.name not in replaced:
            arguments += flag.tokens
    return tuple(arguments)


def _mapping(name: str, value: Mapping[str, Any], mine: Sequence[Flag]) -> tuple[list[str], bool]:
    """The tokens of a JSON flag, and whether they stand for the user's own as well.

    In vLLM dotted keys push aside a JSON value of the same flag: beside dotted ones these are dotted too.
    """
    paths = [flag.path for flag in mine if flag.path]
    if paths:
        tokens = []
        for path, leaf in _leaves(value):
            if not any(path[: len(other)] == other or other[: len(path)] == path for other in paths):
                tokens += [f"--{name}.{'.'.join(path)}", json.dumps(leaf)]
        return tokens, False
    if not mine:
        return [f"--{name}", json.dumps(value)], False
    try:
        told = json.loads(mine[-1].values[-1]) if mine[-1].values else None
    except ValueError:
        told = None
    if not isinstance(told, Mapping):
        return [], False  # no JSON object: vLLM says so better
    return [f"--{name}", json.dumps(merge(value, told))], True


def _leaves(value: Mapping[str, Any], path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    for key, inner in value.items():
        if isinstance(inner, Mapping):
            yield from _leaves(inner, (*path, key))
        else:
            yield (*path, key), inner


def merge(under: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Both mappings; where both say something, ``over`` does, inside of inner mappings too."""
    result = dict(under)
    for key, value in over.items():
        inner = result.get(key)
        if isinstance(inner, Mapping) and isinstance(value, Mapping):
            value = merge(inner, value)
        result[key] = value
    return result
