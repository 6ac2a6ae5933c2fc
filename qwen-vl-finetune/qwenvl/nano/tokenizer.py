"""Tokenizers with Qwen's special tokens: a small byte-level BPE trained here, and the published vocabulary.

No token id is written down anywhere: every id is asked of the tokenizer.
"""

import json
from importlib.resources import files
from itertools import chain
from pathlib import Path
from typing import Any, cast

from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, trainers
from transformers import Qwen2Tokenizer
from transformers.models.qwen3_5 import Qwen3_5Tokenizer

FAMILY_TEMPLATE = {
    "qwen2_vl": "qwen2_vl.jinja",
    "qwen2_5_vl": "qwen2_vl.jinja",
    "qwen3_vl": "qwen3_vl.jinja",
    "qwen3_vl_moe": "qwen3_vl.jinja",
    "qwen3_5": "qwen3_vl.jinja",
    "qwen3_5_moe": "qwen3_vl.jinja",
}

# In the order of the published vocabulary; those in PLAIN are ordinary text that decoding keeps.
SPECIAL = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>",
    "<|box_start|>", "<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>",
    "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>",
)  # fmt: skip
PLAIN = (
    "<tool_call>", "</tool_call>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>",
    "<|repo_name|>", "<|file_sep|>", "<tool_response>", "</tool_response>", "<think>", "</think>",
)  # fmt: skip

NANO_VOCABULARY = 2048

# What answers are framed by: each run of signs becomes one token, numbers stay digits.
FRAMES = (
    '{"bbox_2d": [1, 2, 3, 4], "label": "a"}', '[{"bbox_2d": [1, 2, 3, 4], "label": "a"}, {"bbox_2d": [1',
    '"label": "a"}]', '{"point_2d": [1, 2], "label": "a"}', '{"bbox_3d": [-1.2, 3.4, -0.1], "label": "a"}',
    '\n{"name": "mobile_use", "arguments": {"action": "click", "coordinate": [1, 2]}}\n',
    '{"name": "computer_use", "arguments": {"action": "left_click", "coordinate": [1, 2]}}',
    '{"name": "image_zoom_in_tool", "arguments": {"bbox_2d": [1, 2, 3, 4], "label": "a", "img_idx": 0}}',
    '{"shop": "A", "date": "1-2-3", "total": "1.2"}', '{"name": "A", "city": "B", "number": "1"}',
    '{"start": 1.2, "end": 3.4}', '<html><body>\n<h1 data-bbox="1 2 3 4">A</h1>\n<p data-bbox="1 2">A</p>',
    '<table data-bbox="1 2 3 4"><tr><td>A</td><td>1</td></tr><tr></table>\n<img data-bbox="1 2 3 4"></img>',
    '</body></html>', "<!-- Title (1, 2, 3, 4) -->\n# A", "<!-- Table (1, 2) -->\n| A | 1 |\n| B | 2 |",
    "<!-- Text (1, 2) -->", "<!-- Image (1, 2) -->\n![]()", '<svg viewBox="0 0 100 100">\n</svg>',
    '<rect x="1" y="2" width="3" height="4" fill="a"/>', '<circle cx="1" cy="2" r="3" fill="a"/>',
    '<polygon points="1,2 3,4 5,6" fill="a"/>',
)  # fmt: skip


def chat_template(family: str) -> str:
    """The Jinja chat template of a family: the format its published checkpoints were trained on."""
    return (files("qwenvl.nano") / "templates" / FAMILY_TEMPLATE[family]).read_text(encoding="utf-8")


def nano_tokenizer(family: str) -> Qwen2Tokenizer | Qwen3_5Tokenizer:
    """A byte-level BPE of at most `NANO_VOCABULARY` tokens, special ones included.

    Trained on the word list beside this file and on `FRAMES`, so that it is the same on every machine; any
    other text still encodes, byte by byte.
    """
    words = (files("qwenvl.nano") / "words.txt").read_text(encoding="utf-8").split()
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=NANO_VOCABULARY - len(SPECIAL) - len(PLAIN),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    # A word stands inside a sentence far more often than at its start.
    forms = (form for word in words for form in (f" {word}",) * 4 + (word, word.capitalize()))
    bpe.train_from_iterator(chain(forms, FRAMES * 8), trainer)
    return _family_tokenizer(json.loads(bpe.to_str())["model"], family)


def qwen_tokenizer(family: str, folder: str | Path) -> Qwen2Tokenizer | Qwen3_5Tokenizer:
    """The published vocabulary (151,669 tokens) from a folder that holds Qwen's `tokenizer.json`."""
    path = Path(folder) / "tokenizer.json"
    if not path.is_file():
        raise FileNotFoundError(f"no tokenizer.json in {folder}: unpack Qwen's published tokenizer there")
    return _family_tokenizer(json.loads(path.read_text(encoding="utf-8"))["model"], family)


def _family_tokenizer(bpe: dict, family: str) -> Qwen2Tokenizer | Qwen3_5Tokenizer:
    merges = [tuple(merge.split(" ")) if isinstance(merge, str) else tuple(merge) for merge in bpe["merges"]]
    options: dict[str, Any] = dict(vocab=bpe["vocab"], merges=merges, unk_token=None)
    # Built with <|endoftext|> alone at first: the rest then gets its ids in the published order.
    kind = Qwen3_5Tokenizer if family.startswith("qwen3_5") else Qwen2Tokenizer
    tokenizer = kind(**options, model_max_length=4096)
    marked = [AddedToken(token, special=token in SPECIAL, normalized=False) for token in SPECIAL + PLAIN]
    tokenizer.add_tokens(cast(list, marked))
    tokenizer.eos_token = "<|im_end|>"
    tokenizer.chat_template = chat_template(family)
    return tokenizer
