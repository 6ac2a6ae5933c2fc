"""How models/qwen3-vl-nano was made, from random weights, in one resumable command:

    .venv/bin/python -m qwenvl.nano.recipe output/nano

    random weights  -> sight     the tower alone, throw-away heads name shape and colour under every token
                    -> language  torchrun train_qwen.py on generated conversations, the tower frozen at first
                    -> FOLDER/checkpoint
                    -> measured on scenes it never saw, skill by skill

Stopped and started again it goes on from the last saved state of the unfinished stage.  Two cores take about
an hour and a half.
"""

import argparse
import shutil
import subprocess
import sys
from pathlib import Path

import qwenvl.train
from qwenvl.nano.architecture import write_checkpoint
from qwenvl.nano.corpus import write_corpus, write_skill_tests
from qwenvl.nano.sight import teach_sight

FAMILY = "qwen3_vl"
SIGHT_SCENES = 150_000
LANGUAGE_SCENES = 60_000
FIRST_SEED = 50_000_000  # apart from the scenes of the sight stage
PROCESSES = 2

LANGUAGE_FLAGS = (
    "--dataset_use scenes --tune_mm_llm True --tune_mm_mlp True --tune_mm_vision True --data_flatten True "
    "--min_pixels 16384 --max_pixels 262144 --per_device_train_batch_size 16 --num_train_epochs 1 "
    "--learning_rate 1.5e-3 --mm_projector_lr 5e-4 --vision_tower_lr 5e-4 --weight_decay 0.05 "
    "--adam_beta2 0.98 --lr_scheduler_type cosine --warmup_steps 100 --logging_steps 25 --save_steps 200 "
    "--save_total_limit 1 --dataloader_num_workers 1 --report_to none"
).split()

CHECKPOINT_FILES = (
    "config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
    "chat_template.jinja", "processor_config.json",
)  # fmt: skip


def teach_language(start: Path, corpus: Path, output: Path) -> Path:
    """Train the language model and the mergers on the conversations of `corpus`, by the public command."""
    annotations = write_corpus(corpus, scenes=LANGUAGE_SCENES, first_seed=FIRST_SEED)
    registry = corpus / "datasets.toml"
    registry.write_text(
        f'[scenes]\nannotation_path = "{annotations.name}"\ndata_path = "."\n', encoding="utf-8"
    )
    script = Path(qwenvl.train.__path__[0]) / "train_qwen.py"
    torchrun = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc_per_node={PROCESSES}",
    ]
    folders = [
        "--model_name_or_path",
        str(start),
        "--dataset_config",
        str(registry),
        "--output_dir",
        str(output),
    ]
    subprocess.run([*torchrun, str(script), *folders, *LANGUAGE_FLAGS], check=True)
    return output


def measure(checkpoint: Path, folder: Path) -> None:
    """Print the accuracy of each skill on held-out scenes; predictions stay in `folder`."""
    for questions in write_skill_tests(folder):
        print(f"\n{questions.stem}", flush=True)
        files = [
            "--data-dir",
            str(questions),
            "--output-file",
            str(questions.with_suffix(".predictions.jsonl")),
        ]
        command = [
            sys.executable,
            "-m",
            "qwenvl_eval.cli",
            "run",
            "conversations",
            "--model-path",
            str(checkpoint),
            *files,
        ]
        subprocess.run(command, check=True)


def make_nano(folder: Path) -> Path:
    """Run every stage that is not finished yet; returns the folder of the trained checkpoint."""
    start, sight, language = folder / "start", folder / "sight", folder / "language"
    if not (start / "model.safetensors").is_file():
        write_checkpoint(FAMILY, start)
    if not (sight / "model.safetensors").is_file():
        teach_sight(start, sight, scenes=SIGHT_SCENES)
    if not (language / "model.safetensors").is_file():
        teach_language(sight, folder / "corpus", language)
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
    folder = parser.parse_args().folder
    measure(make_nano(folder), folder / "skills")


if __name__ == "__main__":
    main()
