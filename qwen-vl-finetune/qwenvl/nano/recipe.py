"""How models/qwen3-vl-nano was made, from random weights, in one resumable command:

    make assets
    .venv/bin/python -m qwenvl.nano.recipe output/nano

    random weights  -> sight     the tower alone, throw-away heads say what is under each patch
                    -> corpus    conversations about drawn pictures, all skills mixed
                    -> language  train_qwen.py on them, everything trained
                    -> FOLDER/checkpoint
                    -> measured by nanobench, skill by skill

Stopped and started again it goes on from the last saved state of the unfinished stage.  Sight took 30 minutes
on two CPU cores, the corpus 4; `--minutes` bounds the last stage.
"""

import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path

import torch

from qwenvl.nano.architecture import write_checkpoint
from qwenvl.nano.bench import write_bench
from qwenvl.nano.corpus import write_corpus

FAMILY = "qwen3_vl"
SIGHT_STEPS = 4000
ROWS = 200_000
PROCESSES = torch.cuda.device_count() or min(2, os.cpu_count() or 1)

SIGHT_FLAGS = (
    "--per_device_train_batch_size 64 --per_device_eval_batch_size 64 --learning_rate 2e-3 "
    "--lr_scheduler_type cosine --warmup_steps 100 --weight_decay 0.05 --adam_beta2 0.98 --logging_steps 25 "
    "--eval_strategy steps --eval_steps 200 --save_steps 200 --save_total_limit 1 --report_to none "
    "--label_names thing --ignore_data_skip True"
).split()
LANGUAGE_FLAGS = (
    "--dataset_use corpus --tune_mm_llm True --tune_mm_mlp True --tune_mm_vision True "
    "--min_pixels 8192 --max_pixels 262144 --video_min_pixels 16384 --video_max_pixels 1048576 "
    "--per_device_train_batch_size 32 --num_train_epochs 1 --model_max_length 1024 --muon True "
    "--learning_rate 3e-3 --mm_projector_lr 2e-3 --vision_tower_lr 2e-3 --weight_decay 0.05 "
    "--adam_beta2 0.98 --lr_scheduler_type cosine --warmup_steps 100 --logging_steps 25 --save_steps 200 "
    "--save_total_limit 1 --dataloader_num_workers 1 --report_to none"
).split()

CHECKPOINT_FILES = (
    "config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
    "chat_template.jinja", "processor_config.json",
)  # fmt: skip


def _torchrun(module: str, *flags: object) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={PROCESSES}"]
    subprocess.run([*command, "-m", module, *map(str, flags)], check=True)


def teach_sight(start: Path, output: Path) -> None:
    """Teach the tower of the checkpoint `start`; `output` is a whole checkpoint."""
    folders = ["--checkpoint", start, "--taught", output, "--output_dir", output.with_name("sight-states")]
    length = ["--max_steps", SIGHT_STEPS, "--use_cpu", not torch.cuda.is_available()]
    _torchrun("qwenvl.nano.sight", *folders, *length, *SIGHT_FLAGS)


def teach_language(start: Path, corpus: Path, output: Path, minutes: float) -> None:
    """Train all of the model on the conversations of `corpus`, by the public command, so long at most."""
    annotations = write_corpus(corpus, rows=ROWS)
    registry = corpus / "datasets.toml"
    registry.write_text(
        f'[corpus]\nannotation_path = "{annotations.name}"\ndata_path = "."\n', encoding="utf-8"
    )
    folders = ["--model_name_or_path", start, "--dataset_config", registry, "--output_dir", output]
    _torchrun("qwenvl.train.train_qwen", *folders, *LANGUAGE_FLAGS, "--max_minutes", minutes)


def measure(checkpoint: Path, folder: Path) -> None:
    """Print nanobench's table; predictions stay in `folder`."""
    write_bench(folder)
    flags = ["--model-path", checkpoint, "--data-dir", folder, "--output-file", folder / "predictions.jsonl"]
    command = [sys.executable, "-m", "qwenvl_eval.cli", "run", "nanobench", *map(str, flags)]
    subprocess.run(command, check=True)


def make_nano(folder: Path, minutes: float = 120) -> Path:
    """Run every stage that is not finished yet, the last for `minutes` at most; the checkpoint's folder."""
    start, sight, language = folder / "start", folder / "sight", folder / "language"
    if not (start / "model.safetensors").is_file():
        write_checkpoint(FAMILY, start)
    if not (sight / "model.safetensors").is_file():
        teach_sight(start, sight)
    if not (language / "model.safetensors").is_file():
        teach_language(sight, folder / "corpus", language, minutes)
    checkpoint = folder / "checkpoint"
    checkpoint.mkdir(exist_ok=True)
    for name in CHECKPOINT_FILES:
        shutil.copy(language / name, checkpoint / name)
    return checkpoint


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="where stages and their states are kept")
    parser.add_argument(
        "--minutes",
        type=float,
        default=120,
        help="longest last stage, its learning rate run down (default: 120)",
    )
    arguments = parser.parse_args()
    measure(make_nano(arguments.folder, arguments.minutes), arguments.folder / "nanobench")


if __name__ == "__main__":
    main()
