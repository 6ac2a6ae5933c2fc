"""The experts of a saved MoE: published layout on disk, the same weights in memory."""

import json
import subprocess
import sys

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForImageTextToText

from qwenvl.nano import nano_model
from qwenvl.train.expert_layout import publish


def shapes(folder):
    with safe_open(folder / "model.safetensors", "pt") as file:
        return {
            name.rsplit(".", 1)[-1]: tuple(file.get_slice(name).get_shape())
            for name in file.keys()  # noqa: SIM118
            if ".experts." in name
        }


def test_a_saved_moe_is_turned_once_and_loads_as_before(tmp_path):
    model = nano_model("qwen3_vl_moe", seed=3)
    model.save_pretrained(tmp_path)
    text = model.config.text_config
    experts, hidden, inner = text.num_experts, text.hidden_size, text.moe_intermediate_size
    assert shapes(tmp_path)["gate_up_proj"] == (experts, 2 * inner, hidden)  # else `publish` has become idle
    assert publish(tmp_path) == 2 * text.num_hidden_layers
    published = {"gate_up_proj": (experts, hidden, 2 * inner), "down_proj": (experts, inner, hidden)}
    assert shapes(tmp_path) == published
    assert json.loads((tmp_path / "config.json").read_text())["text_config"]["norm_topk_prob"] is True
    command = [sys.executable, "-m", "qwenvl.train.expert_layout", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.endswith(": 0 tensors turned\n") and shapes(tmp_path) == published

    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path, dtype=torch.float32)
    for name, parameter in model.named_parameters():
        assert torch.equal(loaded.get_parameter(name), parameter), name


def test_what_can_not_be_told_apart_is_refused_and_left_alone(tmp_path):
    nano_model("qwen3_vl_moe").save_pretrained(tmp_path)
    before = (tmp_path / "model.safetensors").read_bytes()
    config = json.loads((tmp_path / "config.json").read_text())
    config["text_config"]["moe_intermediate_size"] = config["text_config"]["hidden_size"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"config\.json: with hidden_size="):
        publish(tmp_path)
    config["text_config"]["moe_intermediate_size"] = 100
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"model\.safetensors: .*experts.* has the shape"):
        publish(tmp_path)
    assert (tmp_path / "model.safetensors").read_bytes() == before


def test_a_dense_checkpoint_is_left_alone(tmp_path):
    nano_model("qwen3_vl").save_pretrained(tmp_path)
    before = (tmp_path / "model.safetensors").read_bytes()
    assert publish(tmp_path) == 0
    assert (tmp_path / "model.safetensors").read_bytes() == before
