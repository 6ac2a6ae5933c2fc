"""Small Qwen-VL models made here: architecture, tokenizer, templates, recipe."""

from qwenvl.nano.architecture import (
    FAMILIES,
    PUBLISHED,
    nano_config,
    nano_model,
    published_config,
    published_model,
    write_checkpoint,
)
from qwenvl.nano.tokenizer import nano_tokenizer, qwen_tokenizer

__all__ = [
    "FAMILIES",
    "PUBLISHED",
    "nano_config",
    "nano_model",
    "nano_tokenizer",
    "published_config",
    "published_model",
    "qwen_tokenizer",
    "write_checkpoint",
]
