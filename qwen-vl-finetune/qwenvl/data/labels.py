"""Which tokens carry loss: what the assistant said, and the token that ends its turn.

The chat template itself is asked, once, how an assistant's turn begins and ends; spans are then found
among the token ids of each rendered conversation. Data texts hold no special token (`read_sample` refuses
them), so a turn's first token can only have come from the template, whatever words a user writes.

    <|im_start|>user\\n...<|im_end|>\\n<|im_start|>assistant\\nA cat.<|im_end|>\\n
    -100 ........................................... -100    A  cat .  <|im_end|>  -100
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile

import numpy as np
import torch

IGNORE_INDEX = -100

_QUESTION, _ANSWER = "QUESTIONPROBE", "ANSWERPROBE"


@dataclass(frozen=True)
class TurnMarks:
    """How a template writes an assistant's turn, in tokens of the vocabulary.

    openings: spellings (tokens joined as the vocabulary writes them) of what comes before the answer, longest
    first: the generation prompt, which a thinking model's template ends with an opened thought, and the plain
    header. start, end: ids of the first token of an opening and of the token that ends a turn.
    """

    openings: tuple[str, ...]
    start: int
    end: int


def turn_marks(processor) -> TurnMarks:
    """Learn the marks from a processor's chat template and tokenizer.

    Raises ValueError where the template's assistant turns do not begin and end with special tokens.
    """
    tokenizer = processor.tokenizer

    def render(*roles: str, **options) -> str:
        texts = {"user": _QUESTION, "assistant": _ANSWER}
        turns = [{"role": role, "content": texts[role]} for role in roles]
        return processor.apply_chat_template(turns, tokenize=False, **options)

    asked = render("user")
    prompt = render("user", add_generation_prompt=True).removeprefix(asked)
    # An earlier answer: thinking models' templates write the last one with its thought, earlier ones without.
    earlier = render("user", "assistant", "user")
    before, _, after = earlier.partition(_ANSWER)
    closing = asked.rpartition(_QUESTION)[2]
    plain = before.rpartition(_QUESTION)[2].removeprefix(closing)
    header = "".join(
        a for a, b in takewhile(lambda pair: pair[0] == pair[1], zip(prompt, plain, strict=False))
    )
    begins = tokenizer(header, add_special_tokens=False)["input_ids"][:1]
    ends = tokenizer(after, add_special_tokens=False)["input_ids"][:1]
    special = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    if not begins or not ends or not special.issuperset(begins + ends):
        raise ValueError(
            f"the chat template writes an assistant turn as {header!r} ... {after[:20]!r}: "
            "it must begin and end with special tokens of the tokenizer, or labels cannot be found"
        )
    openings = {_spell(tokenizer, text) for text in (header, prompt)}
    return TurnMarks(tuple(sorted(openings, key=len, reverse=True)), begins[0], ends[0])


def _spell(tokenizer, text: str) -> str:
    return "".join(tokenizer.convert_ids_to_tokens(tokenizer(text, add_special_tokens=False)["input_ids"]))


def answer_spans(ids: np.ndarray, marks: TurnMarks, tokenizer) -> list[tuple[int, int]]:
    """Start and end (exclusive) of every answer in ids [L], its end-of-turn token included.

    An answer whose turn is not ended reaches to the end of ids. A token that joins the header's line break
    with a line break the answer begins with is the header's: it carries no loss.
    """
    spans = []
    ends = np.flatnonzero(ids == marks.end)
    for start in np.flatnonzero(ids == marks.start).tolist():
        begins = (_content(ids, start, opening, tokenizer) for opening in marks.openings)
        content = next((at for at in begins if at is not None), None)
        if content is not None:
            later = ends[np.searchsorted(ends, content) :]
            spans.append((content, int(later[0]) + 1 if len(later) else len(ids)))
    return spans


def _content(ids: np.ndarray, start: int, opening: str, tokenizer) -> int | None:
    """Where the text after `opening` begins, if the turn that begins at `start` opens so."""
    spelled = ""
    for at in range(start, len(ids)):
        spelled += tokenizer.convert_ids_to_tokens(int(ids[at]))
        if spelled.startswith(opening):
            return at + 1
        if not opening.startswith(spelled):
            return None
    return None


def answer_labels(
    input_ids: torch.Tensor, marks: TurnMarks, tokenizer, weights: Sequence[float]
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Labels int64 [L] of one conversation: the ids in its answers, IGNORE_INDEX elsewhere; and float32 [L],
    what each token's loss counts, or None where all answers count 1 or nothing.

    weights: one an assistant turn; an answer of weight 0 carries no loss. Raises ValueError where the
    rendered text has another number of assistant turns.
    """
    ids = input_ids.numpy()
    spans = answer_spans(ids, marks, tokenizer)
    if len(spans) != len(weights):
        raise ValueError(
            f"{len(weights)} assistant turns, but the chat template rendered {len(spans)}: "
            "it leaves out or joins turns; change the order of the turns or the template"
        )
    labels = np.full_like(ids, IGNORE_INDEX)
    counts = np.zeros(len(ids), np.float32)
    for (start, end), weight in zip(spans, weights, strict=True):
        if weight:
            labels[start:end] = ids[start:end]
            counts[start:end] = weight
    plain = {0.0, 1.0}.issuperset(weights)
    return torch.from_numpy(labels), None if plain else torch.from_numpy(counts)
