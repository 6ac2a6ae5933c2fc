"""A saved Qwen3-VL-MoE as Qwen publishes it and vLLM loads it.

    python -m qwenvl.train.expert_layout FOLDER     mend a checkpoint that the model library saved

             published and vLLM        model library, in memory and as it saves
gate_up_proj [E, hidden, 2 * inner]    [E, 2 * inner, hidden]
down_proj    [E, inner, hidden]        [E, hidden, inner]

The library loads both, telling them apart by their shape, but it saves only its own (`Transpose` with
`check_dims` in transformers' conversion_mapping.py, read in 5.19).  It always normalises the weights of the
chosen experts and leaves `norm_topk_prob` out of config.json; vLLM does not start without it.

A Qwen3.5-MoE needs nothing: the library saves its experts as it found them, fused [E, 2 * inner, hidden] or
one by one, and vLLM loads both (read in its `RoutedExperts`, 0.32).
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

EXPERTS = ("experts.gate_up_proj", "experts.down_proj")


def publish(folder: str | Path) -> int:
    """Rewrite the folder's weights and configuration in the published form; returns how many tensors turned.

    A file is replaced as a whole or not at all. Raises ValueError where hidden_size and
    moe_intermediate_size do not tell the layouts apart, or a tensor has neither shape.
    """
    folder = Path(folder)
    config = json.loads((folder / "config.json").read_text())
    if config["model_type"] != "qwen3_vl_moe":
        return 0
    text = config["text_config"]
    hidden, inner = text["hidden_size"], text["moe_intermediate_size"]
    if hidden in (inner, 2 * inner):
        raise ValueError(
            f"{folder}/config.json: with hidden_size={hidden} and moe_intermediate_size={inner} the shapes "
            "of the experts do not tell which layout they are in; the model library can't load them either"
        )
    shapes = {EXPERTS[0]: (hidden, 2 * inner), EXPERTS[1]: (inner, hidden)}
    turned = sum(_publish_file(path, shapes) for path in sorted(folder.glob("*.safetensors")))
    if "norm_topk_prob" not in text:
        text["norm_topk_prob"] = True
        (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    return turned


def _publish_file(path: Path, shapes: dict[str, tuple[int, int]]) -> int:
    tensors: dict[str, torch.Tensor] = {}
    turned = 0
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
        names = list(file.keys())
        if not any(name.endswith(EXPERTS) for name in names):
            return 0
        for name in names:
            tensors[name] = file.get_tensor(name)
            wanted = next((shape for end, shape in shapes.items() if name.endswith(end)), None)
            if wanted is None or tuple(tensors[name].shape[1:]) == wanted:
                continue
            if tuple(tensors[name].shape[1:]) != wanted[::-1]:
                shape = tuple(tensors[name].shape)
                raise ValueError(f"{path}: {name} has the shape {shape}; wanted is (experts, {wanted})")
            tensors[name] = tensors[name].transpose(1, 2).contiguous()
            turned += 1
    if turned:
        beside = path.with_suffix(".rewriting")
        save_file(tensors, beside, metadata)
        os.replace(beside, path)
    return turned


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m qwenvl.train.expert_layout FOLDER")
    print(f"{sys.argv[1]}: {publish(sys.argv[1])} tensors turned")
