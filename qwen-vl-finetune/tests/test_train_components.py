"""Which weights a training changes, how fast, and what stays bit for bit as it was."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, HfArgumentParser

from qwenvl.nano import FAMILIES, nano_model, write_checkpoint
from qwenvl.train.adapters import add_adapters
from qwenvl.train.argument import DataArguments, ModelArguments, TrainingArguments
from qwenvl.train.model_loading import PatchProjection
from qwenvl.train.parameters import (
    component_of,
    component_table,
    parameter_groups,
    set_model,
    undecayed_parameters,
)
from qwenvl.train.train_qwen import train

FLAGS = {"vision": "tune_mm_vision", "merger": "tune_mm_mlp", "language": "tune_mm_llm"}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory, pictures) -> Path:
    folder = tmp_path_factory.mktemp("data")
    rows = []
    for index in range(4):
        turns = [
            {"from": "human", "value": f"<image>Which, {index}?"},
            {"from": "gpt", "value": "this"},
        ]
        rows.append({"image": "abc"[index % 3] + ".png", "conversations": turns})
    (folder / "rows.json").write_text(json.dumps(rows))
    (folder / "data.toml").write_text(f'[rows]\nannotation_path = "rows.json"\ndata_path = "{pictures}"\n')
    return folder / "data.toml"


@pytest.fixture(scope="module")
def untied(tmp_path_factory) -> dict[str, Path]:
    """Checkpoints whose lm_head has weights of its own."""
    root = tmp_path_factory.mktemp("untied")
    return {family: write_checkpoint(family, root / family, tied=False) for family in FAMILIES}


def parse(**flags) -> tuple[ModelArguments, DataArguments, TrainingArguments]:
    parser = HfArgumentParser((ModelArguments, DataArguments, TrainingArguments))
    defaults = dict(
        dataset_use="rows", data_flatten=True, min_pixels=3136, max_pixels=6400, max_steps=2, seed=0,
        per_device_train_batch_size=2, learning_rate=1e-3, save_strategy="no",
        disable_tqdm=True, logging_steps=1,
    )  # fmt: skip
    return parser.parse_dict(defaults | flags)


def changed(before: Path, after: Path) -> dict[str, set[bool]]:
    """Component -> whether its tensors differ between two checkpoint folders, bit for bit."""
    stored = [load_file(folder / "model.safetensors") for folder in (before, after)]
    layouts = [{name: tensor.dtype for name, tensor in tensors.items()} for tensors in stored]
    assert layouts[0] == layouts[1]
    load = AutoModelForImageTextToText.from_pretrained
    old, new = load(before).state_dict(), load(after).state_dict()
    result: dict[str, set[bool]] = {name: set() for name in FLAGS}
    for name, tensor in old.items():
        component = "merger" if "merger" in name else "vision" if "visual" in name else "language"
        result[component].add(not torch.equal(tensor, new[name]))
    return result


@pytest.mark.parametrize("component", FLAGS)
def test_only_the_named_component_changes(family, component, untied, dataset, tmp_path):
    """Every other weight is bit-identical after training, an untied lm_head included."""
    flags = {FLAGS[component]: True, "weight_decay": 0.1}
    folder = untied[family]
    paths = dict(model_name_or_path=str(folder), dataset_config=str(dataset), output_dir=str(tmp_path))
    train(*parse(**paths, **flags))
    difference = changed(folder, tmp_path)
    for name in FLAGS:
        if name != component:
            assert difference[name] == {False}, name
    assert True in difference[component]
    names = load_file(tmp_path / "model.safetensors").keys()
    assert "lm_head.weight" in names
    if component == "merger" and family.startswith("qwen3_vl"):
        assert difference["merger"] == {True}  # The DeepStack mergers too.
        assert any("deepstack_merger_list" in name for name in names)


@pytest.mark.parametrize("tied", [True, False])
def test_each_component_has_its_learning_rate_and_decay(family, tied):
    model = nano_model(family, tied=tied)
    model_args, _, training_args = parse(
        tune_mm_llm=True, tune_mm_mlp=True, tune_mm_vision=True,
        learning_rate=1e-3, mm_projector_lr=2e-3, vision_tower_lr=3e-3, weight_decay=0.1,
    )  # fmt: skip
    set_model(model_args, model)
    groups = parameter_groups(model, component_table(model_args, training_args))
    names = {parameter: name for name, parameter in model.named_parameters()}
    assert sum(len(group["params"]) for group in groups) == len(names)
    seen = {names[p]: (group["lr"], group["weight_decay"]) for group in groups for p in group["params"]}
    assert len(seen) == len(names)
    rates = {"vision": 3e-3, "merger": 2e-3, "language": 1e-3}
    for name, parameter in model.named_parameters():
        # Biases and norms are the vectors of these models.
        assert seen[name] == (rates[component_of(name)], 0.1 if parameter.ndim > 1 else 0.0), name
    assert seen["model.language_model.embed_tokens.weight"] == (1e-3, 0.1)
    assert ("lm_head.weight" in seen) is not tied


def test_the_merger_is_the_merger_with_deepstack():
    assert component_of("model.visual.deepstack_merger_list.0.norm.weight") == "merger"
    assert component_of("model.visual.merger.ln_q.weight") == "merger"
    assert component_of("model.visual.blocks.0.attn.qkv.weight") == "vision"
    assert component_of("base_model.model.lm_head.weight") == "language"
    with pytest.raises(ValueError, match="audio"):
        component_of("model.audio.weight")


def test_a_vision_rate_alone_is_enough():
    """It does not wait for --mm_projector_lr, and absent rates are --learning_rate; 0 is a rate."""
    model_args, _, training_args = parse(tune_mm_vision=True, vision_tower_lr=0.0, learning_rate=1e-4)
    table = component_table(model_args, training_args)
    assert [table[name].learning_rate for name in FLAGS] == [0.0, 1e-4, 1e-4]
    assert [table[name].trainable for name in FLAGS] == [True, False, False]


def test_norms_and_biases_are_all_the_vectors(family):
    model = nano_model(family)
    vectors = {name for name, parameter in model.named_parameters() if parameter.ndim == 1}
    assert undecayed_parameters(model) == vectors


def test_nothing_to_train_is_said(checkpoints):
    model_args, _, _ = parse()
    with pytest.raises(ValueError, match="--tune_mm_llm"):
        set_model(model_args, nano_model("qwen3_vl"))


def test_the_patch_embedding_is_the_same_function(family):
    model = nano_model(family)
    convolution = model.model.visual.patch_embed.proj
    if convolution.bias is not None:
        torch.nn.init.normal_(convolution.bias, generator=torch.Generator().manual_seed(0))
    patches = torch.randn(6, *convolution.weight.shape[1:], generator=torch.Generator().manual_seed(1))
    got = PatchProjection(convolution)(patches)
    assert torch.allclose(got, convolution(patches).flatten(1), atol=1e-5)


@pytest.mark.parametrize("component", FLAGS)
def test_adapters_reach_the_named_component(family, component):
    flags = {"lora_enable": True, "lora_r": 2, "vision_tower_lr": 7e-3, FLAGS[component]: True}
    model_args, _, training_args = parse(**flags)
    model = add_adapters(model_args, training_args, nano_model(family))
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {component_of(name) for name in trained} == {component}
    assert all("lora_" in name and "lm_head" not in name for name in trained)
    groups = parameter_groups(model, component_table(model_args, training_args))
    assert {group["lr"] for group in groups} == {7e-3 if component == "vision" else 1e-3}


def test_bf16_weights_come_back_as_bf16(checkpoints, dataset, tmp_path):
    """Trained with an fp32 copy under --bf16, saved as they came; frozen ones bit for bit."""
    folder = tmp_path / "bf16"
    shutil.copytree(checkpoints["qwen3_vl"], folder)
    AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.bfloat16).save_pretrained(folder)
    losses = {}
    for bf16 in (True, False):
        paths = dict(
            model_name_or_path=str(folder), dataset_config=str(dataset), output_dir=str(tmp_path / str(bf16))
        )
        trainer = train(*parse(**paths, bf16=bf16, tune_mm_llm=True, max_steps=4))
        losses[bf16] = [line["loss"] for line in trainer.state.log_history if "loss" in line]
        difference = changed(folder, tmp_path / str(bf16))
        assert difference["vision"] == difference["merger"] == {False}
        assert True in difference["language"]
    assert losses[True] == pytest.approx(losses[False], rel=2e-2)
    assert losses[True] != losses[False]


def test_lora_is_saved_merged_and_apart(checkpoints, dataset, tmp_path):
    """The output folder is an ordinary checkpoint; frozen components are in it bit for bit."""
    folder = checkpoints["qwen3_vl"]
    trainer = train(
        *parse(
            model_name_or_path=str(folder), dataset_config=str(dataset), output_dir=str(tmp_path),
            lora_enable=True, lora_r=4, lora_alpha=8, learning_rate=1e-2, max_steps=4,
        )
    )  # fmt: skip
    difference = changed(folder, tmp_path)
    assert difference["vision"] == difference["merger"] == {False}
    assert True in difference["language"]
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    assert losses[-1] < losses[0]
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (4, 8)

    from peft import PeftModel

    ids = torch.arange(20)[None]
    merged = AutoModelForImageTextToText.from_pretrained(tmp_path)
    base = AutoModelForImageTextToText.from_pretrained(folder)
    adapted = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    assert torch.allclose(merged(input_ids=ids).logits, adapted(input_ids=ids).logits, atol=1e-4)
