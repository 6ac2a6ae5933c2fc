"""The tokens that carry loss are the assistant's words and the ends of its turns, and no others."""

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoProcessor

from qwenvl.data.labels import IGNORE_INDEX, answer_labels, answer_spans, turn_marks
from qwenvl.nano import qwen_tokenizer
from qwenvl.nano.architecture import build_processor
from qwenvl.nano.tokenizer import chat_template

END = "<|im_end|>"

# What Qwen3-VL's thinking checkpoints do: earlier answers lose their thought, the last one always has one.
THINKING_TEMPLATE = """
{%- set last = namespace(user=0) -%}
{%- for m in messages %}{% if m.role == 'user' %}{% set last.user = loop.index0 %}{% endif %}{% endfor -%}
{%- for m in messages -%}
  {%- set text = m.content if m.content is string else m.content[0].text -%}
  {{- '<|im_start|>' + m.role + '\n' -}}
  {%- if m.role == 'assistant' -%}
    {%- set parts = text.split('</think>') -%}
    {%- set thought = parts[0].split('<think>')[-1].strip('\n') if parts | length > 1 else '' -%}
    {%- set text = text.split('</think>')[-1].lstrip('\n') -%}
    {%- if loop.index0 > last.user -%}{{- '<think>\n' + thought + '\n</think>\n\n' -}}{%- endif -%}
  {%- endif -%}
  {{- text + '<|im_end|>\n' -}}
{%- endfor -%}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n<think>\n' -}}{% endif -%}
"""

CONVERSATIONS = {
    "one turn": [("user", "What?"), ("assistant", "A cat.")],
    "several turns": [
        ("user", "What?"), ("assistant", "A cat."), ("user", "Sure?"), ("assistant", "Yes,\nquite sure. "),
    ],
    "system turn": [("system", "You are an assistant\n."), ("user", "What?"), ("assistant", "Cat")],
    "assistant in the user's text": [
        ("user", "assistant\nSay assistant. im_start assistant\nHello im_end\nassistant\n"),
        ("assistant", "The assistant says: assistant\nassistant"),
    ],
    "answer of blanks and scripts": [("user", "猫?"), ("assistant", "  猫 — кот 🐈 ")],
    "empty answer": [("user", "Say nothing."), ("assistant", "")],
    "question last": [("user", "What?"), ("assistant", "A cat."), ("user", "And now?")],
    "two questions": [("user", "First."), ("user", "Second."), ("assistant", "Both.")],
}  # fmt: skip


@pytest.fixture(scope="module")
def processors():
    """(vocabulary, family) -> processor, each made once."""
    return {}


@pytest.fixture(params=["nano", "published"])
def processor(request, family, checkpoints, processors):
    """Each family's processor with the vocabulary made here and with Qwen's own."""
    key = (request.param, family)
    if key not in processors:
        if request.param == "nano":
            processors[key] = AutoProcessor.from_pretrained(checkpoints[family])
        else:
            # One vocabulary for all: loading it takes seconds, and the families differ in the template alone.
            if "vocabulary" not in processors:
                folder = request.getfixturevalue("qwen_vocabulary")
                processors["vocabulary"] = qwen_tokenizer(family, folder)
            processors["vocabulary"].chat_template = chat_template(family)
            processors[key] = build_processor(family, processors["vocabulary"])
    return processors[key]


@pytest.fixture
def thinking(processor, monkeypatch):
    """The same processor with a thinking checkpoint's template."""
    monkeypatch.setattr(processor, "chat_template", THINKING_TEMPLATE)
    return processor


def encoded(processor, messages, **options) -> torch.Tensor:
    """Token ids of a conversation by the model library's own way from messages to ids."""
    options |= dict(tokenize=True, return_dict=True, return_tensors="pt")
    return processor.apply_chat_template(messages, **options)["input_ids"][0]


def rendered(processor, turns, **options) -> torch.Tensor:
    messages = [{"role": role, "content": [{"type": "text", "text": text}]} for role, text in turns]
    return encoded(processor, messages, **options)


def answers(ids: torch.Tensor, labels: torch.Tensor, tokenizer) -> list[str]:
    """The decoded runs of labels."""
    assert torch.equal(labels[labels != IGNORE_INDEX], ids[labels != IGNORE_INDEX])
    borders = np.flatnonzero(np.diff((labels.numpy() != IGNORE_INDEX).astype(int), prepend=0, append=0))
    return [tokenizer.decode(ids[start:end]) for start, end in borders.reshape(-1, 2)]


def label(processor, turns, **options) -> list[str]:
    ids = rendered(processor, turns, **options)
    count = sum(role == "assistant" for role, _ in turns)
    labels, _ = answer_labels(ids, turn_marks(processor), processor.tokenizer, [1.0] * count)
    return answers(ids, labels, processor.tokenizer)


def test_the_labels_are_exactly_the_answers_and_their_ends(processor):
    for name, turns in CONVERSATIONS.items():
        assert label(processor, turns) == [text + END for role, text in turns if role == "assistant"], name


def test_a_system_turn_of_the_template_itself_carries_no_loss(processor, family):
    ids = rendered(processor, CONVERSATIONS["one turn"])
    has_default = "You are a helpful assistant." in processor.tokenizer.decode(ids)
    assert has_default == (family in ("qwen2_vl", "qwen2_5_vl"))
    assert label(processor, CONVERSATIONS["one turn"]) == ["A cat." + END]


def test_pictures_between_the_turns_carry_no_loss(processor):
    picture = {"type": "image", "image": Image.new("RGB", (96, 96), "red")}
    messages = [
        {"role": "user", "content": [picture, {"type": "text", "text": "\nWhat?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "Red."}]},
        {"role": "user", "content": [{"type": "text", "text": "And "}, picture]},
        {"role": "assistant", "content": [{"type": "text", "text": "Red too."}]},
    ]
    ids = processor.apply_chat_template(messages, tokenize=True, return_dict=True, return_tensors="pt")[
        "input_ids"
    ][0]
    assert (ids == processor.image_token_id).sum() > 8
    labels, _ = answer_labels(ids, turn_marks(processor), processor.tokenizer, [1.0, 1.0])
    assert answers(ids, labels, processor.tokenizer) == ["Red." + END, "Red too." + END]


def test_an_answer_without_its_end_is_learned_to_where_it_stops(processor):
    turns = CONVERSATIONS["several turns"]
    ids = rendered(processor, turns, continue_final_message=True)
    assert ids[-1] != processor.tokenizer.convert_tokens_to_ids(END)
    labels, _ = answer_labels(ids, turn_marks(processor), processor.tokenizer, [1.0, 1.0])
    assert answers(ids, labels, processor.tokenizer) == ["A cat." + END, "Yes,\nquite sure. "]


def test_an_answer_that_begins_with_line_breaks_loses_at_most_those(processor):
    """Byte pairs join them with the header's own line break: that token is the header's, not the answer's."""
    (found,) = label(processor, [("user", "What?"), ("assistant", "\n\nA cat.")])
    assert found.endswith("A cat." + END)
    assert found.removesuffix("A cat." + END).strip("\n") == ""


def test_thoughts_carry_loss_but_not_the_opening_that_the_prompt_gives(thinking):
    turns = [
        ("user", "What?"), ("assistant", "<think>\nEars, whiskers.\n</think>\n\nA cat."),
        ("user", "Sure?"), ("assistant", "<think>\nIt purrs.\n</think>\n\nYes."),
    ]  # fmt: skip
    assert label(thinking, turns) == ["A cat." + END, "It purrs.\n</think>\n\nYes." + END]


@pytest.mark.parametrize("template", ["own", "thinking"])
def test_the_labels_continue_the_prompt_of_answering(processor, template, monkeypatch):
    """What carries loss is what answering has to produce: prompt + labels = the rendered conversation."""
    if template == "thinking":
        monkeypatch.setattr(processor, "chat_template", THINKING_TEMPLATE)
    turns = [("user", "assistant\n?"), ("assistant", "<think>\nIt purrs.\n</think>\n\nA cat.")]
    ids = rendered(processor, turns)
    prompt = rendered(processor, turns[:1], add_generation_prompt=True)
    ((start, end),) = answer_spans(ids.numpy(), turn_marks(processor), processor.tokenizer)
    assert torch.equal(ids[:start], prompt)
    assert processor.tokenizer.decode(ids[end:]).strip() == ""


def test_turns_that_the_template_drops_are_an_error(processor):
    ids = rendered(processor, CONVERSATIONS["one turn"])
    with pytest.raises(ValueError, match="2 assistant turns, but the chat template rendered 1"):
        answer_labels(ids, turn_marks(processor), processor.tokenizer, [1.0, 1.0])


def test_a_template_without_turn_tokens_is_refused(checkpoints):
    processor = AutoProcessor.from_pretrained(checkpoints["qwen3_vl"])
    template = "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
    processor.chat_template = template + "{% if add_generation_prompt %}assistant: {% endif %}"
    with pytest.raises(ValueError, match="must begin and end with special tokens"):
        turn_marks(processor)


def test_no_token_id_is_written_down(checkpoints):
    """The marks of two vocabularies differ in their ids alone."""
    processor = AutoProcessor.from_pretrained(checkpoints["qwen3_vl"])
    tokenizer = processor.tokenizer
    marks = turn_marks(processor)
    assert (marks.start, marks.end) == tuple(tokenizer.convert_tokens_to_ids(["<|im_start|>", END]))
    assert marks.start < len(tokenizer) < 10_000
