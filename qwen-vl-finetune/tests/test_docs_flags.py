"""docs/: each flag of ours that a page names exists, the original's commands parse, export's claims hold."""

import re
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from transformers import AutoModelForImageTextToText, AutoProcessor

from qwenvl.train.argument import DataArguments, ModelArguments, TrainingArguments

DOCS = Path(__file__).resolve().parents[1] / "docs"
FLAG = re.compile(r"--\w+")

# The original's own flags, and those of Hugging Face that its scripts pass, with the scripts' kind of values.
ORIGINAL = """
    --model_name_or_path X --tune_mm_llm True --tune_mm_mlp True --tune_mm_vision False --dataset_use a%50,b
    --data_flatten True --data_packing False --base_interval 2 --max_pixels 451584 --min_pixels 12544
    --video_max_frames 8 --video_min_frames 4 --video_max_pixels 1304576 --video_min_pixels 200704
    --video_fps 2 --cache_dir C --optim adamw_torch --model_max_length 8192
    --mm_projector_lr 1e-5 --vision_tower_lr 1e-6 --lora_enable True --lora_r 8 --lora_alpha 16
    --lora_dropout 0.0
""".split()
SCRIPTS = """
    --num_train_epochs 0.5 --per_device_train_batch_size 4 --per_device_eval_batch_size 8
    --gradient_accumulation_steps 4 --eval_strategy no --save_strategy steps --save_steps 1000
    --save_total_limit 1 --learning_rate 1e-5 --weight_decay 0 --warmup_ratio 0.03 --max_grad_norm 1
    --lr_scheduler_type cosine --logging_steps 1 --gradient_checkpointing True --dataloader_num_workers 4
    --run_name r --report_to none
""".split()


def parser() -> transformers.HfArgumentParser:
    return transformers.HfArgumentParser(cast(Any, (ModelArguments, DataArguments, TrainingArguments)))


def cells(page: str) -> list[list[str]]:
    lines = (DOCS / page).read_text(encoding="utf-8").splitlines()
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if line.startswith("| ")]


def test_every_flag_of_ours_exists():
    ours = {flag for row in cells("coming-from.md") for flag in FLAG.findall(row[1])}
    assert len(ours) > 25
    assert not ours - parser()._option_string_actions.keys()
    assert not set(FLAG.findall("--lora_enable --no_such")) <= parser()._option_string_actions.keys()


def test_the_originals_commands_parse(tmp_path):
    command = [*ORIGINAL, *SCRIPTS, "--output_dir", str(tmp_path)]
    model, data, training = parser().parse_args_into_dataclasses(command)
    values = vars(model) | vars(data) | vars(training)
    for flag, given in zip(ORIGINAL[::2], ORIGINAL[1::2], strict=True):
        assert values[flag[2:]] == type(values[flag[2:]])(given if given != "False" else ""), flag


def test_the_page_names_each_flag_of_the_original():
    rows = cells("coming-from.md")
    end = next(number for number, row in enumerate(rows) if row[0] == "ms-swift")
    named = {flag for row in rows[:end] for flag in FLAG.findall(row[0])}
    assert named == set(ORIGINAL[::2])


def test_the_python_of_the_pages_is_python():
    blocks = re.findall(r"^```python\n(.*?)^```", (DOCS / "export.md").read_text(), re.MULTILINE | re.DOTALL)
    assert blocks
    for block in blocks:
        compile(block, "export.md", "exec")


def test_fp8_takes_the_language_model_alone_and_misses_the_experts(family, checkpoints):
    page = (DOCS / "export.md").read_text()
    [ignore] = re.findall(r"ignore=\[(.*?)\]", page)
    patterns = re.findall(r"re:([^\"]+)\"", ignore)
    assert len(patterns) == 2
    model = AutoModelForImageTextToText.from_pretrained(checkpoints[family])
    assert AutoProcessor.from_pretrained(checkpoints[family]).chat_template
    linear = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    taken = [name for name in linear if not any(re.match(pattern, name) for pattern in patterns)]
    assert {name.split(".")[1] for name in taken} == {"language_model"}
    assert not [name for name in taken if ".experts." in name]
    assert any(".mlp." in name for name in taken) == (family != "qwen3_vl_moe")
