"""Stretch a checkpoint's context with YaRN and check what came of it.

    python qwen-vl-finetune/tools/extend_context.py \\
        --model_name_or_path SRC --output_dir OUT --target_length N

config.json of SRC -> rope_parameters for N tokens -> OUT: that config.json, all else copied -> checked

By default every token gets a position of its own: factor = N / original length.  Pictures and videos use up
fewer positions than tokens, so that for them a smaller `--factor` reaches as far: 2 to 3 for a million tokens
of a model made for 256K.  A factor acts on short inputs too: take no more than you need.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, PreTrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

MODEL_TYPES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "qwen3_5", "qwen3_5_moe")


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Stretch a checkpoint's context with YaRN.")
    parser.add_argument(
        "--model_name_or_path", type=Path, required=True, help="Checkpoint folder; stays as it is."
    )
    parser.add_argument("--output_dir", type=Path, required=True, help="New folder for the stretched one.")
    parser.add_argument("--target_length", type=int, required=True, help="Tokens that it shall read.")
    parser.add_argument("--factor", type=float, help="YaRN's factor; default target / original length.")
    options = parser.parse_args(argv)
    try:
        said = extend(options.model_name_or_path, options.output_dir, options.target_length, options.factor)
    except ValueError as error:
        sys.exit(f"extend_context: {error}")
    print("\n".join(said))


def extend(source: Path, target: Path, length: int, factor: float | None = None) -> list[str]:
    """Write the stretched checkpoint into the new folder `target`; returns what to tell the user.

    Raises ValueError for what is no Qwen-VL checkpoint, stretched already, or not longer than it was.
    """
    config = _load(source)
    text = config.text_config
    rope = stretched(source, text, length, factor)
    if target.exists() and any(target.iterdir()):
        raise ValueError(f"--output_dir {target} is not empty; name a new folder")
    # Copied, not linked: what is written over a link later would change the weights of the source, too.
    shutil.copytree(source, target, ignore=_not_of_a_model, dirs_exist_ok=True)
    before = dict(text.rope_parameters)
    text.rope_parameters = rope
    text.max_position_embeddings = length
    config.save_pretrained(target)
    check(target, before, rope, length)
    override = {"text_config": {"rope_parameters": rope, "max_position_embeddings": length}}
    reached = round(rope["factor"] * rope["original_max_position_embeddings"])
    return [
        f"{target}: {rope['original_max_position_embeddings']} -> {length} tokens by YaRN, factor "
        f"{rope['factor']:g} (positions up to {reached})",
        f"vLLM stretches {source} itself with --hf-overrides '{json.dumps(override)}'",
    ]


def stretched(source: Path, text: PreTrainedConfig, length: int, factor: float | None) -> dict[str, Any]:
    """The `rope_parameters` of `text` with YaRN; mrope_section, rope_theta and the like are kept."""
    now, original = dict(text.rope_parameters), text.max_position_embeddings
    if now["rope_type"] != "default":
        raise ValueError(
            f"{source}: rope_type is {now['rope_type']!r} already; start from the checkpoint before it"
        )
    if length <= original:
        raise ValueError(f"--target_length {length}: {source} reads {original} tokens as it is")
    factor = float(length / original if factor is None else factor)
    if not 1 < factor <= length / original:
        raise ValueError(
            f"--factor {factor:g}: above 1, and at most {length / original:g}, which gives each of the "
            f"{length} tokens a position"
        )
    return now | {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original}


def check(folder: Path, before: dict[str, Any], rope: dict[str, Any], length: int) -> None:
    """The folder as transformers loads it: settings kept, frequencies those of YaRN.

    A frequency that turns more than 32 times within the original length, by which near tokens are told apart,
    is untouched; one that turns less than once is divided by the factor; those between lie between.
    Raises ValueError for what does not hold.
    """
    text = _load(folder).text_config
    wrong = {key: text.rope_parameters.get(key) for key in rope if text.rope_parameters.get(key) != rope[key]}
    if wrong or text.max_position_embeddings != length:
        raise ValueError(f"{folder}/config.json reads as {wrong} and {text.max_position_embeddings} tokens")
    found, scale = ROPE_INIT_FUNCTIONS["yarn"](text, torch.device("cpu"))
    dim = 2 * len(found)
    plain = before["rope_theta"] ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    share = found.double() / plain
    turns = plain * rope["original_max_position_embeddings"] / (2 * math.pi)
    holds = {
        "fast frequencies are untouched": torch.allclose(share[turns > 32], torch.tensor(1.0).double()),
        "slow ones are divided by the factor": torch.allclose(
            share[turns < 1] * rope["factor"], torch.tensor(1.0).double()
        ),
        "those between lie between": bool((share.diff() <= 1e-6).all()),
        "attention is scaled as YaRN says": math.isclose(scale, 0.1 * math.log(rope["factor"]) + 1),
        "mrope_section covers the frequencies": sum(rope["mrope_section"]) == len(found),
    }
    if failed := [name for name, true in holds.items() if not true]:
        raise ValueError(f"{folder}: does not hold: {'; '.join(failed)}")


def _load(folder: Path) -> PreTrainedConfig:
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} holds no config.json; name the folder of a checkpoint")
    config = AutoConfig.from_pretrained(folder)
    if config.model_type not in MODEL_TYPES:
        raise ValueError(
            f"{folder}/config.json: model_type {config.model_type!r} is not one of {', '.join(MODEL_TYPES)}"
        )
    return config


def _not_of_a_model(folder: str, names: list[str]) -> list[str]:
    """Checkpoints of a run that lie beside its final weights stay behind."""
    return [name for name in names if name.startswith("checkpoint-")]


if __name__ == "__main__":
    main()
