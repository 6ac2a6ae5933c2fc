"""Nano checkpoints: the library's own classes, the families' templates, published geometry, vocabulary."""

import json
import re
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor
from transformers.utils.chat_template_utils import render_jinja_template

import qwenvl
from qwenvl.nano import (
    nano_model,
    nano_tokenizer,
    published_config,
    published_model,
    qwen_tokenizer,
)
from qwenvl.nano.tokenizer import PLAIN, SPECIAL, chat_template

QUESTION = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is this?"}]}
SYSTEM_TURN = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
PROMPT = (
    "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>What is this?<|im_end|>\n"
    "<|im_start|>assistant\n"
)


def render(family: str, messages: list[dict], **context) -> str:
    return render_jinja_template([messages], chat_template=chat_template(family), **context)[0][0]


def test_a_written_checkpoint_loads_as_its_family_and_answers(family, checkpoints):
    model = AutoModelForImageTextToText.from_pretrained(checkpoints[family])
    processor = AutoProcessor.from_pretrained(checkpoints[family])
    assert model.config.model_type == family
    inputs = processor.apply_chat_template(
        [[{"role": "user", "content": "Which shape do you see?"}]],
        add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
    )  # fmt: skip
    generated = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    assert inputs["input_ids"].shape[1] < generated.shape[1] <= inputs["input_ids"].shape[1] + 4


def test_the_same_seed_gives_the_same_weights_and_another_seed_others():
    weights = [nano_model("qwen3_vl", seed=seed).lm_head.weight for seed in (0, 0, 1)]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


def test_an_untied_head_has_its_own_weights():
    model = nano_model("qwen3_vl", tied=False)
    assert model.lm_head.weight.data_ptr() != model.get_input_embeddings().weight.data_ptr()
    tied = nano_model("qwen3_vl")
    assert tied.lm_head.weight.data_ptr() == tied.get_input_embeddings().weight.data_ptr()


def test_prompts_render_as_published(family):
    default = SYSTEM_TURN if family.startswith("qwen2") else ""
    assert render(family, [QUESTION], add_generation_prompt=True) == default + PROMPT


def test_a_system_turn_replaces_the_default_one(family):
    rendered = render(
        family, [{"role": "system", "content": "Be brief."}, QUESTION], add_generation_prompt=True
    )
    assert rendered == "<|im_start|>system\nBe brief.<|im_end|>\n" + PROMPT


def test_vision_ids_count_over_the_whole_conversation(family):
    messages = [
        {"role": "user", "content": [{"type": "image"}, {"type": "image"}, {"type": "video"}]},
        {"role": "assistant", "content": "yes"},
        {"role": "user", "content": [{"type": "image"}, {"type": "video"}]},
    ]
    rendered = render(family, messages, add_vision_id=True)
    assert re.findall(r"(?:Picture|Video) \d: <\|vision_start\|><\|(\w+)_pad", rendered) == [
        "image", "image", "video", "image", "video",
    ]  # fmt: skip
    assert re.findall(r"(Picture|Video) (\d)", rendered) == [
        ("Picture", "1"), ("Picture", "2"), ("Video", "1"), ("Picture", "3"), ("Video", "2"),
    ]  # fmt: skip
    assert "Picture" not in render(family, messages)


WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {"type": "object", "properties": {"place": {"type": "string"}}},
    },
}
TOOL_CONVERSATION = [
    {"role": "system", "content": "Use tools."},
    {"role": "user", "content": "Weather in Oslo and Rome?"},
    {
        "role": "assistant",
        "content": "I look.",
        "tool_calls": [
            {"type": "function", "function": {"name": "weather", "arguments": {"place": "Oslo"}}},
            {"type": "function", "function": {"name": "weather", "arguments": '{"place": "Rome"}'}},
        ],
    },
    {"role": "tool", "content": "rain"},
    {"role": "tool", "content": "sun"},
]


@pytest.mark.parametrize("cut", [2, 3, 4, 5])
@pytest.mark.parametrize("tools", [None, [WEATHER], [WEATHER, WEATHER]])
def test_tools_render_as_in_the_published_qwen3_template(cut, tools, qwen_vocabulary):
    published = json.loads((qwen_vocabulary / "tokenizer_config.json").read_text())["chat_template"]
    messages = TOOL_CONVERSATION[:cut]
    expected = render_jinja_template(
        [messages], chat_template=published, tools=tools, add_generation_prompt=True
    )[0][0]
    # The text-only template always opens a last answer with a thinking block; the vision template does not.
    expected = expected.replace("<think>\n\n</think>\n\n", "")
    assert render("qwen3_vl", messages, tools=tools, add_generation_prompt=True) == expected


def test_thinking_is_shown_for_the_last_question_only(qwen_vocabulary):
    published = json.loads((qwen_vocabulary / "tokenizer_config.json").read_text())["chat_template"]
    messages = [
        {"role": "user", "content": "One?"},
        {"role": "assistant", "content": "1", "reasoning_content": "first thoughts"},
        {"role": "user", "content": "Two?"},
        {"role": "assistant", "content": "2", "reasoning_content": "second thoughts"},
    ]
    rendered = render("qwen3_vl", messages)
    assert rendered == render_jinja_template([messages], chat_template=published)[0][0]
    assert "second thoughts" in rendered and "first thoughts" not in rendered
    assert render("qwen3_vl", messages[:1], add_generation_prompt=True, enable_thinking=True).endswith(
        "<|im_start|>assistant\n<think>\n"
    )


def test_special_tokens_are_single_and_skipped_when_decoding(family):
    tokenizer = nano_tokenizer(family)
    ids = tokenizer.convert_tokens_to_ids(list(SPECIAL + PLAIN))
    assert len(set(ids)) == len(SPECIAL) + len(PLAIN) and len(tokenizer) <= 2048
    text = "Größe 12 是 <|im_end|>\n<think>x</think> 🙂"
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True) == text.replace(
        "<|im_end|>", ""
    )


def test_the_published_vocabulary_keeps_its_ids(qwen_vocabulary):
    tokenizer = qwen_tokenizer("qwen3_vl", qwen_vocabulary)
    published = json.loads((qwen_vocabulary / "tokenizer_config.json").read_text())["added_tokens_decoder"]
    assert len(tokenizer) == 151669
    for number, token in published.items():
        assert tokenizer.convert_tokens_to_ids(token["content"]) == int(number)
    assert tokenizer.decode(tokenizer("Two cats, 猫\n\n 42!").input_ids) == "Two cats, 猫\n\n 42!"


# Parameters in billions as the model cards and safetensors indexes give them.
BILLIONS = {
    ("qwen2_vl", "2B"): 2.209, ("qwen2_vl", "7B"): 8.291,
    ("qwen2_5_vl", "3B"): 3.755, ("qwen2_5_vl", "7B"): 8.292,
    ("qwen3_vl", "2B"): 2.128, ("qwen3_vl", "4B"): 4.438, ("qwen3_vl", "8B"): 8.767,
    ("qwen3_vl_moe", "30B-A3B"): 31.071,
}  # fmt: skip


@pytest.mark.parametrize(("family", "size"), BILLIONS)
def test_published_geometry_has_the_published_number_of_parameters(family, size, qwen_vocabulary):
    model = published_model(family, size, qwen_tokenizer(family, qwen_vocabulary))
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    count = sum(parameter.numel() for parameter in model.parameters())
    assert count / 1e9 == pytest.approx(BILLIONS[family, size], abs=6e-4)


def test_an_unknown_size_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match=r"'qwen3_vl' '5B'; known: .*qwen3_vl 4B"):
        published_config("qwen3_vl", "5B", nano_tokenizer("qwen3_vl"))


def test_config_ids_are_the_tokenizers(qwen_vocabulary):
    sizes = {"qwen2_vl": "2B", "qwen2_5_vl": "3B", "qwen3_vl": "2B", "qwen3_vl_moe": "30B-A3B"}
    for family, size in sizes.items():
        tokenizer = qwen_tokenizer(family, qwen_vocabulary)
        config = published_config(family, size, tokenizer)
        assert config.image_token_id == tokenizer.convert_tokens_to_ids("<|image_pad|>") == 151655
        assert config.vision_end_token_id == tokenizer.convert_tokens_to_ids("<|vision_end|>")


def test_no_code_hard_codes_a_token_id():
    root = Path(qwenvl.__file__).resolve().parents[2]
    packages = [
        root / part
        for part in ("qwen-vl-finetune/qwenvl", "qwen-vl-utils/src", "qwen-vl-serve/src", "evaluation/src")
    ]
    sources = [path for package in packages for path in package.rglob("*.py")]
    assert len(sources) > 10
    offenders = [
        str(path) for path in sources if re.search(r"\b15(1[67]\d\d|1936|1669|2064)\b", path.read_text())
    ]
    # The geometry table names vocabulary sizes, which are not ids.
    assert [path for path in offenders if not path.endswith("nano/architecture.py")] == []
