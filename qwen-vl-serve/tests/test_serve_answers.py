"""From generated text to an answer: cut anywhere, it comes out the same."""

import json
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwen_vl_serve import ReasoningDelta, TextDelta, ToolCall
from qwen_vl_serve.answers import AnswerParser, opens_thinking

CALL = '<tool_call>\n{"name": "click", "arguments": {"at": [3, 5]}}\n</tool_call>'
# generated text, prompt ended in <think>, tools offered -> reasoning, text, calls
CASES = [
    ("Hello.", False, False, "", "Hello.", []),
    ("  indented", False, True, "", "  indented", []),
    ("<think>\nWell.\n</think>\n\nYes.", False, False, "Well.\n", "Yes.", []),
    ("\nWell <b>.\n</think>\n\nYes.", True, False, "Well <b>.\n", "Yes.", []),
    ("cut while thinking </thi", True, False, "cut while thinking </thi", "", []),
    ("no thought: </think> is text", False, False, "", "no thought: </think> is text", []),
    (f"I click.\n{CALL}", False, True, "", "I click.\n", [ToolCall("click", '{"at": [3, 5]}')]),
    (CALL, False, False, "", CALL, []),  # no tools were offered
    (CALL + CALL, False, True, "", "", [ToolCall("click", '{"at": [3, 5]}')] * 2),
    ("<tool_call>{broken</tool_call>!", False, True, "", "<tool_call>{broken</tool_call>!", []),
    ("<tool_call>never closed", False, True, "", "<tool_call>never closed", []),
    ("a < b <tool", False, True, "", "a < b <tool", []),
    (f"</think>{CALL}", True, True, "", "", [ToolCall("click", '{"at": [3, 5]}')]),
    ("", False, True, "", "", []),
]


def read(pieces, thinking, tools):
    parser = AnswerParser(thinking=thinking, tools=tools)
    events = [event for piece in pieces for event in parser.add(piece)]
    events += parser.add("", last=True)
    assert all(event.text for event in events)
    reasoning = "".join(event.text for event in events if isinstance(event, ReasoningDelta))
    text = "".join(event.text for event in events if isinstance(event, TextDelta))
    reply = parser.reply([1, 2], [3], ended=True)
    assert (reply.reasoning, reply.text) == (reasoning, text)
    assert reply.finish_reason == ("tool_calls" if reply.tool_calls else "stop")
    return reasoning, text, list(reply.tool_calls)


@pytest.mark.parametrize("case", CASES, ids=range(len(CASES)))
def test_every_way_of_cutting_gives_the_same_answer(case):
    generated, thinking, tools, *expected = case
    assert list(read([generated], thinking, tools)) == expected
    assert list(read(generated, thinking, tools)) == expected
    dice = random.Random(0)
    for _ in range(200):
        cuts = sorted(dice.choices(range(len(generated) + 1), k=dice.randint(0, 6)))
        pieces = [generated[a:b] for a, b in zip([0, *cuts], [*cuts, len(generated)], strict=True)]
        assert list(read(pieces, thinking, tools)) == expected


marks = st.sampled_from(["<think>", "</think>", "<tool_call>", "</tool_call>", '{"name": "f"}', "\n"])


@given(st.lists(marks | st.text(max_size=4), max_size=8), st.booleans(), st.booleans(), st.data())
def test_random_text_cut_anywhere(parts, thinking, tools, data):
    generated = "".join(parts)
    whole = read([generated], thinking, tools)
    assert read(generated, thinking, tools) == whole
    if not thinking and "<think>" not in generated and not tools:
        assert whole == ("", generated, [])


def test_arguments_are_the_json_text_that_openai_clients_expect():
    call = read([CALL], False, True)[2][0]
    assert json.loads(call.arguments) == {"at": [3, 5]}


def test_a_prompt_says_whether_the_model_begins_by_thinking():
    assert opens_thinking("<|im_start|>assistant\n<think>\n")
    assert not opens_thinking("<|im_start|>assistant\n<think>\n\n</think>\n\n")
    assert not opens_thinking("<|im_start|>assistant\n")
