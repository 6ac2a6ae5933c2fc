"""Exact match after a stated normalisation."""

from __future__ import annotations

import unicodedata


def normalise(text: str) -> str:
    """Bring an answer to the form in which two answers are compared.

    In this order: Unicode NFKC, case folded, every run of white space becomes one space, white space at both
    ends and full stops at the end go. Nothing else: "a cat" is not "cat", "2" is not "two".
    """
    folded = unicodedata.normalize("NFKC", text).casefold()
    return " ".join(unicodedata.normalize("NFKC", folded).split()).rstrip(". ")


def exact_match(answer: str, target: str) -> bool:
    """Whether answer and target are the same once normalised."""
    return normalise(answer) == normalise(target)
