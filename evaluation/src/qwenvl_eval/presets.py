"""How the numbers published for Qwen3-VL were sampled.

Source: the model cards, "generation hyperparameters" for vision; the token limit of INSTRUCT is that of the
published evaluation scripts, where the cards say 16,384.
"""

from __future__ import annotations

from qwen_vl_serve import Sampling

INSTRUCT = Sampling(
    temperature=0.7,
    top_p=0.8,
    top_k=20,
    repetition_penalty=1.0,
    presence_penalty=1.5,
    max_new_tokens=32768,
)

THINK = Sampling(
    temperature=1.0,
    top_p=0.95,
    top_k=20,
    repetition_penalty=1.0,
    presence_penalty=0.0,
    max_new_tokens=40960,
)
