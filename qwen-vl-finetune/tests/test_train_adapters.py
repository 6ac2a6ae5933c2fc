"""LoRA and DoRA adapters: where they sit, what is saved, and that merging changes no answer."""

import json
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoProcessor, HfArgumentParser

from qwenvl.nano import nano_model, write_checkpoint
from qwenvl.train import adapters
from qwenvl.train.argument import DataArguments, ModelArguments, TrainingArguments
from qwenvl.train.attention import suspended
from qwenvl.train.parameters import component_table, parameter_groups
from qwenvl.train.train_qwen import train

ROOT = Path(__file__).resolve().parents[2]
TOOL = ROOT / "qwen-vl-finetune/tools/merge_adapter.py"

# family -> flags; together: each component adapted, in full and frozen, LoRA and DoRA, dropout.
CASES = {
    "qwen2_vl": {"lora_dora": True, "lora_components": "language,vision", "tune_mm_mlp": True},
    "qwen2_5_vl": {"lora_components": "language", "tune_mm_mlp": True, "tune_mm_vision": True},
    "qwen3_vl": {"lora_dora": True, "lora_components": "language,merger", "lora_dropout": 0.1},
    "qwen3_vl_moe": {"lora_components": "language,merger,vision,experts"},
    "qwen3_5": {"lora_components": "language,vision", "tune_mm_mlp": True, "data_flatten": True},
    "qwen3_5_moe": {"lora_components": "language,experts", "data_flatten": True},
}
ADAPTED = {name: set(case["lora_components"].split(",")) for name, case in CASES.items()}
IN_FULL = {"qwen2_vl": {"merger"}, "qwen2_5_vl": {"merger", "vision"}, "qwen3_5": {"merger"}}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory, pictures) -> Path:
    folder = tmp_path_factory.mktemp("data")
    turns = [{"from": "human", "value": "<image>Which?"}, {"from": "gpt", "value": "this one"}]
    rows = [{"image": f"{name}.png", "conversations": turns} for name in "abca"]
    (folder / "rows.json").write_text(json.dumps(rows))
    (folder / "data.toml").write_text(f'[rows]\nannotation_path = "rows.json"\ndata_path = "{pictures}"\n')
    return folder / "data.toml"


def parse(**flags) -> tuple[ModelArguments, DataArguments, TrainingArguments]:
    parser = HfArgumentParser((ModelArguments, DataArguments, TrainingArguments))
    defaults = dict(
        dataset_use="rows", min_pixels=3136, max_pixels=6400, max_steps=4, seed=0,
        per_device_train_batch_size=2, learning_rate=1e-2, save_steps=2, disable_tqdm=True,
        lora_enable=True, lora_r=4, lora_alpha=8, gradient_checkpointing=True,
    )  # fmt: skip
    return parser.parse_dict(defaults | flags)


@pytest.fixture(scope="module")
def trained(tmp_path_factory, checkpoints, dataset):
    """family -> (output folder, trainer), trained when first asked for."""
    runs = {}

    def of(family: str):
        if family not in runs:
            folder = tmp_path_factory.mktemp(family)
            paths = dict(
                model_name_or_path=str(checkpoints[family]),
                dataset_config=str(dataset),
                output_dir=str(folder),
            )
            runs[family] = folder, train(*parse(**paths, **CASES[family]))
        return runs[family]

    return of


@pytest.fixture(scope="module")
def logits(pictures):
    """The logits of a model for a picture and a question, as the processor of a folder prepares them."""

    def of(model: torch.nn.Module, folder: Path) -> torch.Tensor:
        processor = AutoProcessor.from_pretrained(folder)
        content = [{"type": "image"}, {"type": "text", "text": "Which?"}]
        text = processor.apply_chat_template([{"role": "user", "content": content}])
        batch = processor(text=[text], images=[Image.open(pictures / "b.png")], return_tensors="pt")
        with torch.no_grad():
            return model.eval()(**batch).logits

    return of


def part_of(name: str) -> str:
    if "visual" in name:
        return "merger" if "merger" in name else "vision"
    return "experts" if ".mlp.experts." in name else "language"


def test_merged_equals_unmerged(family, trained, checkpoints, logits):
    """The trained model, base + saved adapter and the merged checkpoint answer alike, and unlike the base."""
    folder, trainer = trained(family)
    load = AutoModelForImageTextToText.from_pretrained
    merged = logits(load(folder), folder)
    reloaded = PeftModel.from_pretrained(load(checkpoints[family]), folder / "adapter")
    with suspended(trainer.vl_config):
        trained_logits = logits(trainer.model, folder / "adapter")
    assert torch.allclose(merged, trained_logits, atol=1e-5, rtol=0)
    assert torch.allclose(merged, logits(reloaded, folder / "adapter"), atol=1e-5, rtol=0)
    assert (merged - logits(load(checkpoints[family]), folder)).abs().max() > 1e-2


def test_only_what_is_named_changes(family, trained, checkpoints):
    """Frozen components come back bit for bit, in the stored layout and dtype; the processor's files too."""
    folder, _ = trained(family)
    before, after = (load_file(path / "model.safetensors") for path in (checkpoints[family], folder))
    assert {n: (t.dtype, t.shape) for n, t in before.items()} == {
        n: (t.dtype, t.shape) for n, t in after.items()
    }
    changed = {part_of(name) for name, tensor in before.items() if not torch.equal(tensor, after[name])}
    assert changed == ADAPTED[family] | IN_FULL.get(family, set())
    processor = {"preprocessor_config.json", "processor_config.json", "tokenizer.json"}
    for place in (folder, folder / "adapter"):
        present = {path.name for path in place.iterdir()}
        assert processor & present and "tokenizer.json" in present
        assert AutoProcessor.from_pretrained(place).image_processor.size["longest_edge"] == 6400


def test_the_tool_merges_a_checkpoint(family, trained, checkpoints, tmp_path):
    """Merged by the command, the last checkpoint is what the training wrote; the base may have moved."""
    folder, _ = trained(family)
    shutil.copytree(checkpoints[family], tmp_path / "moved")
    if family == "qwen3_vl_moe":
        flags = ["--adapter", folder / "checkpoint-4", "--model_name_or_path", tmp_path / "moved"]
        command = [sys.executable, TOOL, *flags, "--output_dir", tmp_path / "merged"]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    else:  # A process of its own takes 10 s to start.
        adapters.merge(folder / "checkpoint-4", tmp_path / "merged", str(tmp_path / "moved"))
    ours, theirs = (load_file(path / "model.safetensors") for path in (tmp_path / "merged", folder))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
    AutoProcessor.from_pretrained(tmp_path / "merged")


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe"])
def test_a_run_goes_on_from_its_checkpoint(family, trained, dataset, checkpoints, tmp_path):
    """Weights in full, adapters on experts, magnitudes and dropout are resumed bit for bit."""
    folder, _ = trained(family)
    shutil.copytree(folder / "checkpoint-2", tmp_path / "checkpoint-2")
    paths = dict(
        model_name_or_path=str(checkpoints[family]), dataset_config=str(dataset), output_dir=str(tmp_path)
    )
    train(*parse(**paths, **CASES[family]))
    whole, resumed = (load_file(path / "adapter/adapter_model.safetensors") for path in (folder, tmp_path))
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(tensor, resumed[name]) for name, tensor in whole.items())


def test_bf16_comes_back_as_bf16(dataset, tmp_path):
    """Merged in fp32, rounded once."""
    base = write_checkpoint("qwen3_vl", tmp_path / "base")
    AutoModelForImageTextToText.from_pretrained(base, dtype=torch.bfloat16).save_pretrained(base)
    output = tmp_path / "out"
    train(*parse(model_name_or_path=str(base), dataset_config=str(dataset), output_dir=str(output)))
    tensors = load_file(output / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    name = "model.language_model.layers.0.self_attn.q_proj"
    deltas = load_file(output / "adapter/adapter_model.safetensors")
    a, b = (deltas[f"base_model.model.{name}.lora_{part}.weight"] for part in "AB")
    old = load_file(base / "model.safetensors")[f"{name}.weight"].float()
    assert torch.equal(tensors[f"{name}.weight"], (old + (b @ a) * 2).bfloat16())


def test_another_base_is_refused(trained, tmp_path, monkeypatch):
    """Neither other weights of the same shapes nor a folder without an adapter pass."""
    folder, _ = trained("qwen3_vl")
    other = write_checkpoint("qwen3_vl", tmp_path / "other")
    model = AutoModelForImageTextToText.from_pretrained(other)
    model.model.language_model.norm.weight.data[0] += 0.5
    model.save_pretrained(other)
    flags = [
        "--adapter",
        folder / "adapter",
        "--model_name_or_path",
        other,
        "--output_dir",
        tmp_path / "merged",
    ]
    monkeypatch.setattr(sys, "argv", [str(TOOL), *map(str, flags)])
    with pytest.raises(SystemExit, match=r"^merge_adapter: .*other holds other weights"):
        runpy.run_path(str(TOOL), run_name="__main__")
    assert not (tmp_path / "merged").exists()
    with pytest.raises(ValueError, match="no adapter_config"):
        adapters.merge(other, tmp_path / "merged")
    shutil.copytree(folder / "adapter", tmp_path / "foreign")
    (tmp_path / "foreign/base.json").unlink()
    with pytest.raises(ValueError, match="is missing, which says"):
        adapters.merge(tmp_path / "foreign", tmp_path / "merged")


def test_rates_and_decay_of_adapters(family):
    """Components keep their learning rates; the magnitudes of DoRA do not decay."""
    flags = {"mm_projector_lr": 2e-3, "vision_tower_lr": 3e-3, "weight_decay": 0.1, "learning_rate": 1e-3}
    model_args, _, training_args = parse(lora_dora=True, lora_components="language,merger,vision", **flags)
    model = adapters.add_adapters(model_args, training_args, nano_model(family))
    groups = parameter_groups(model, component_table(model_args, training_args))
    names = {parameter: name for name, parameter in model.named_parameters()}
    rates = {"vision": 3e-3, "merger": 2e-3, "language": 1e-3}
    seen = set()
    for group in groups:
        for parameter in group["params"]:
            name = names[parameter]
            seen.add(part_of(name))
            assert group["lr"] == rates[part_of(name)], name
            assert (group["weight_decay"] == 0) is ("magnitude" in name), name
    assert seen == set(rates)


def test_where_adapters_sit_by_default():
    """What the flags name, else the language model; a component beside --lora_components is in full."""
    for flags, adapted in [
        ({}, {"language"}),
        ({"tune_mm_vision": True}, {"vision"}),
        ({"tune_mm_llm": True, "tune_mm_mlp": True}, {"language", "merger"}),
        ({"tune_mm_mlp": True, "lora_components": "language, vision"}, {"language", "vision"}),
    ]:
        model_args, _, training_args = parse(**flags)
        assert adapters.adapted_components(model_args, training_args) == adapted
    model_args, _, training_args = parse(lora_dropout=0.0)
    config = adapters.lora_config(model_args, training_args, nano_model("qwen3_vl"))
    assert config.lora_dropout == 0.0 and config.modules_to_save is None


@pytest.mark.parametrize(
    "family, flags, said",
    [
        ("qwen3_vl", {"lora_components": "language,audio"}, "'audio' is none of"),
        ("qwen3_vl", {"lora_components": "vision", "tune_mm_llm": True}, "leaves the language model out"),
        ("qwen3_vl", {"lora_components": "experts"}, "has no experts"),
        ("qwen3_vl_moe", {"lora_components": "experts", "lora_dora": True}, "neither --lora_dora"),
        ("qwen3_vl_moe", {"lora_components": "experts", "lora_dropout": 0.1}, "nor --lora_dropout"),
    ],
)
def test_what_cannot_be_adapted_is_refused(family, flags, said):
    model_args, _, training_args = parse(**flags)
    with pytest.raises(ValueError, match=said):
        adapters.add_adapters(model_args, training_args, nano_model(family))


def test_flags_without_lora_are_refused():
    with pytest.raises(ValueError, match="need --lora_enable True"):
        parse(lora_enable=False, lora_dora=True)


def test_quantised_training():
    """Its configuration, and who is turned away.  The training itself needs CUDA and is not tested here."""
    four = adapters.quantisation_config("4bit", torch.bfloat16)
    assert (four.load_in_4bit, four.bnb_4bit_quant_type, four.bnb_4bit_use_double_quant) == (
        True,
        "nf4",
        True,
    )
    assert four.bnb_4bit_compute_dtype == torch.bfloat16
    eight = adapters.quantisation_config("8bit", torch.float32)
    assert (eight.load_in_8bit, eight.load_in_4bit) == (True, False)
    assert four.llm_int8_skip_modules == eight.llm_int8_skip_modules == ["visual", "lm_head"]
    _, _, training_args = parse(lora_quantize="4bit")
    with pytest.raises(ValueError, match="experts of qwen3_vl_moe are fused"):
        adapters.quantisation(training_args, nano_model("qwen3_vl_moe").config)
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="needs a CUDA device"):
            adapters.quantisation(training_args, nano_model("qwen3_vl").config)


def test_what_vllm_cannot_take_is_said():
    """Adapters of the language model alone are served as they are: test_serve_parity.py does it."""
    for flags, objections in [
        ({}, 0),
        ({"lora_dora": True}, 1),
        ({"lora_components": "language", "tune_mm_mlp": True}, 1),
        ({"lora_components": "language,vision"}, 1),
        ({"lora_components": "experts"}, 1),
    ]:
        model_args, _, training_args = parse(**flags)
        config = adapters.lora_config(model_args, training_args, nano_model("qwen3_vl_moe"))
        assert len(adapters.vllm_objections(config)) == objections, flags
