"""easy-VQA (Zhou 2019): questions about pictures of one coloured shape, as the quickstart writes them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from qwen_vl_serve import Sampling
from qwenvl_eval.tasks.conversations import Conversations


@dataclass(frozen=True)
class EasyVqa(Conversations):
    """The test questions that `make quickstart` writes, in the training format."""

    title: ClassVar[str] = "easy-VQA"
    presets: ClassVar[Mapping[str, Sampling]] = {"greedy": Sampling(temperature=0, max_new_tokens=16)}
