"""LoRA adapters that vLLM can serve over their base."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors import safe_open

RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM 0.32 takes as --max-lora-rank (1 apart)."""


def served_rank(adapter: Path) -> int:
    """The --max-lora-rank for an adapter's folder.

    Raises ValueError for an adapter that vLLM would serve in part only: it leaves out what an adapter does to
    the vision tower and its mergers, without a word, and stops with an error where
    --enable-tower-connector-lora asks for it (vLLM 0.32 on the CPU).
    """
    config = json.loads((adapter / "adapter_config.json").read_text())
    with safe_open(adapter / "adapter_model.safetensors", "pt") as file:
        seeing = next((name for name in file.keys() if ".visual." in name), None)  # noqa: SIM118
    if seeing is not None:
        raise ValueError(
            f"{adapter}/adapter_model.safetensors: it changes the vision part ({seeing}), which vLLM would "
            "leave out; serve the folder above it, which holds the merged model, or train with "
            "--tune_mm_vision False --tune_mm_mlp False"
        )
    rank = next((rank for rank in RANKS if rank >= config["r"]), None)
    if rank is None:
        raise ValueError(
            f"{adapter}/adapter_config.json: r={config['r']}, but vLLM takes {RANKS[-1]} at most"
        )
    return rank
