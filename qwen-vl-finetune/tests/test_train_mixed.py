"""Text, pictures and videos in any mixture over the processes: no hang, and the steps of one process.

The launch is the public one; one process with the whole batch is the reference.  Every component is trained
and activations are recomputed in the backward pass, which doubles the order in which modules have to agree.
"""

import importlib.util
import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import qwenvl.train
from qwenvl.data.collators import FlattenedCollator, PaddedCollator
from qwenvl.data.data_processor import make_supervised_data_module
from qwenvl.train.argument import DataArguments, ModelArguments, TrainingArguments
from qwenvl.train.modality import complete
from qwenvl.train.model_loading import load_config, load_model, load_processor
from qwenvl.train.trainer import token_losses

PACKAGE = Path(qwenvl.train.__path__[0]).parents[1]
STEPS = 100
deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None or shutil.which("c++") is None,
    reason="the extra `deepspeed` and a C++ compiler are needed; CI installs both: uv pip install -e "
    "'qwen-vl-finetune[deepspeed]'",
)


@pytest.fixture(scope="module")
def data(tmp_path_factory, pictures, clip) -> Path:
    """Four samples a step, two a process: text, one or two pictures, a video or both, by chance."""
    folder = tmp_path_factory.mktemp("mixed")
    chance = random.Random(0)
    rows = []
    for index in range(4 * STEPS):
        media = chance.choice(["", "", "<image>", "<image><image>", "<video>", "<image><video>"])
        answer = " ".join(chance.choices(["red", "blue", "two", "left"], k=1 + index % 4))
        row: dict = {
            "conversations": [
                {"from": "human", "value": f"{media}Question {index}?"},
                {"from": "gpt", "value": answer},
            ]
        }
        if "<image>" in media:
            row["image"] = [chance.choice("abc") + ".png" for _ in range(media.count("<image>"))]
        if "<video>" in media:
            row["video"] = str(clip)
        rows.append(row)
    (folder / "rows.json").write_text(json.dumps(rows))
    (folder / "data.toml").write_text(f'[mixed]\nannotation_path = "rows.json"\ndata_path = "{pictures}"\n')
    return folder / "data.toml"


def flags(checkpoint: Path, data: Path, output: Path) -> list[str]:
    values = ["--model_name_or_path", checkpoint, "--dataset_config", data, "--dataset_use", "mixed"]
    values += ["--output_dir", output, "--data_flatten", "True", "--gradient_checkpointing", "True"]
    values += ["--tune_mm_llm", "True", "--tune_mm_mlp", "True", "--tune_mm_vision", "True"]
    values += ["--min_pixels", 3136, "--max_pixels", 12544, "--video_min_pixels", 3136]
    values += ["--video_max_pixels", 12544, "--video_max_frames", 4, "--max_steps", STEPS]
    values += ["--learning_rate", "1e-4", "--warmup_steps", 10, "--logging_steps", 1]
    values += ["--report_to", "none", "--save_strategy", "no", "--disable_tqdm", "True"]
    return [str(value) for value in values]


def train(processes: int, *values: str) -> list[float]:
    """The loss of every step."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += [f"--nproc_per_node={processes}", str(PACKAGE / "qwenvl" / "train" / "train_qwen.py"), *values]
    command += ["--per_device_train_batch_size", str(4 // processes)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=560)
    assert done.returncode == 0, done.stderr[-4000:]
    output = Path(values[values.index("--output_dir") + 1])
    history = json.loads((output / "trainer_state.json").read_text())["log_history"]
    return [line["loss"] for line in history if "loss" in line]


@pytest.fixture(scope="module")
def alone(checkpoints, data, tmp_path_factory) -> list[float]:
    return train(1, *flags(checkpoints["qwen3_vl"], data, tmp_path_factory.mktemp("alone")))


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    "settings", [None, pytest.param("zero2", marks=deepspeed), pytest.param("zero3", marks=deepspeed)]
)
def test_any_mixture_over_two_processes_takes_the_steps_of_one(settings, alone, checkpoints, data, tmp_path):
    values = flags(checkpoints["qwen3_vl"], data, tmp_path)
    if settings is not None:
        values += ["--deepspeed", str(PACKAGE / "scripts" / f"{settings}.json")]
    losses = train(2, *values)
    assert len(losses) == len(alone) == STEPS
    apart = (torch.tensor(losses) - torch.tensor(alone)).abs()
    print(  # Shown by `pytest -s`.
        f"{settings}: {apart[:20].max():.1e} in 20 steps, {apart.max():.1e} in all"
    )
    assert apart[:20].max() <= 1e-5
    assert apart.max() <= 1e-3


@pytest.mark.parametrize("flatten", [True, False])
def test_what_is_added_changes_neither_loss_nor_gradients(family, flatten, checkpoints, data, tmp_path):
    """And reaches every vision parameter, of text alone too."""
    model_args = ModelArguments(model_name_or_path=str(checkpoints[family]))
    data_args = DataArguments(dataset_use="mixed", dataset_config=str(data), data_flatten=flatten)
    args = TrainingArguments(output_dir=str(tmp_path), report_to="none")
    config = load_config(model_args, args)
    processor = load_processor(model_args, data_args, args)
    rows = make_supervised_data_module(
        processor, data_args, model_config=config, model_max_length=4096, seed=0
    )["train_dataset"]
    texts = [
        row
        for row in (rows[i] for i in range(12))
        if "pixel_values" not in row and "pixel_values_videos" not in row
    ]
    assert len(texts) >= 2
    collate = FlattenedCollator() if flatten else PaddedCollator(processor.tokenizer.pad_token_id)
    batch = collate(texts[:3])
    model = load_model(config, model_args, data_args, args)
    losses = {}
    gradients = {}
    for name, inputs in {
        "plain": batch,
        "one": complete(batch, config, each=False),
        "both": complete(batch, config, each=True),
    }.items():
        model.zero_grad()
        total = token_losses(model, inputs)[0].sum()
        total.backward()
        losses[name] = total.item()
        gradients[name] = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    visual = {n for n, _ in model.named_parameters() if ".visual." in n}
    for name in ("one", "both"):
        assert losses[name] == pytest.approx(losses["plain"], rel=1e-6)
        assert visual <= set(gradients[name])
        for parameter, gradient in gradients[name].items():
            expected = gradients["plain"].get(parameter, torch.zeros(()))
            assert torch.allclose(gradient, expected, rtol=1e-4, atol=1e-6), parameter
