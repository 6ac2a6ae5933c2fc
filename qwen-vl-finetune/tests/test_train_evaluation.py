"""Evaluation while training: exact losses, the answers of the model itself, the best checkpoint, no traces.

The checkpoint is models/qwen3-vl-nano, which has learnt such pictures and answers.  The launch over two
processes is the public one; the others call what the command calls.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModelForImageTextToText, AutoProcessor, HfArgumentParser

import qwenvl.train
from qwen_vl_utils import processor_inputs, scale_pixels
from qwenvl.data.collators import PaddedCollator
from qwenvl.data.data_processor import make_supervised_data_module
from qwenvl.train.argument import DataArguments, ModelArguments, TrainingArguments
from qwenvl.train.model_loading import load_config, load_processor
from qwenvl.train.train_qwen import train

PACKAGE = Path(qwenvl.train.__path__[0]).parents[1]
NANO = PACKAGE.parent / "models" / "qwen3-vl-nano"
OPTIONS = "<image>Which shape?\nA. triangle\nB. heart\nAnswer with the letter."
BOX = '[{"bbox_2d": [100, 200, 300, 400], "label": "cross"}]'


def row(question: str, answer: str, **media) -> dict:
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return {"conversations": turns} | media


@pytest.fixture(scope="module")
def data(tmp_path_factory, pictures, clip) -> Path:
    """`train`; `plain`, 7 rows of every kind; `forms`, 3 rows: a choice, a box, one with turns behind it."""
    folder = tmp_path_factory.mktemp("evaluated")
    scenes = PACKAGE / "demo" / "images"
    rows = {"train": json.loads((PACKAGE / "demo" / "single_images.json").read_text())[:12]}
    for each in rows["train"]:
        each["image"] = str(PACKAGE / "demo" / each["image"])
    rows["plain"] = [
        row("<image>\nDescribe the picture.", "purple star, blue star", image=f"{scenes}/scene-02.png"),
        row("Say hello.", "hello"),
        row("<image>\nName the green shape.", "triangle", image=f"{scenes}/scene-12.png"),
        row("<video>What happens?", "a red square moves to the right", video=str(clip)),
        row("<image><image>How many pictures?", "two", images=["a.png", "b.png"]),
        row("Count: one, two,", "three, four, five, six, seven"),
        row("<image>Which part?", "top left", image="c.png"),
    ]
    rows["plain"][1]["conversations"][1]["weight"] = 0.5
    later = row("<image>Where?", "left", image="a.png")
    later["conversations"] += [{"from": "human", "value": "Sure?"}, {"from": "gpt", "value": "yes"}]
    rows["forms"] = [row(OPTIONS, "B", image="a.png"), row("<image>Where is it?", BOX, image="b.png"), later]
    tables = []
    for name, members in rows.items():
        (folder / f"{name}.json").write_text(json.dumps(members))
        tables.append(f'[{name}]\nannotation_path = "{name}.json"\ndata_path = "{pictures}"\n')
    (folder / "data.toml").write_text("".join(tables))
    return folder / "data.toml"


def flags(data: Path, output: Path, **more) -> dict:
    return dict(
        model_name_or_path=str(NANO), output_dir=str(output), dataset_config=str(data), dataset_use="train",
        data_flatten=True, tune_mm_llm=True, tune_mm_mlp=True, tune_mm_vision=True, min_pixels=3136,
        max_pixels=16384, video_min_pixels=3136, video_max_pixels=12544, video_max_frames=4,
        per_device_train_batch_size=2, per_device_eval_batch_size=2, max_steps=4, learning_rate=1e-2,
        logging_steps=1, save_strategy="no", report_to="none", disable_tqdm=True, model_max_length=512,
    ) | more  # fmt: skip


EVALUATED = dict(
    eval_dataset_use="plain,forms", eval_strategy="steps", eval_steps=2, eval_generate=3,
    eval_max_new_tokens=12, eval_on_start=True,
)  # fmt: skip


def start(**values):
    parser = HfArgumentParser((ModelArguments, DataArguments, TrainingArguments))
    return train(*parser.parse_dict(values))


def command(processes: int, **values) -> subprocess.CompletedProcess:
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    words.append(str(PACKAGE / "qwenvl" / "train" / "train_qwen.py"))
    words += [word for name, value in values.items() for word in (f"--{name}", str(value))]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(words, env=environment, capture_output=True, text=True, timeout=300)


def history(output: Path) -> dict[int, dict]:
    """Step -> what its evaluation found."""
    lines = json.loads((output / "trainer_state.json").read_text())["log_history"]
    return {line["step"]: line for line in lines if "eval_loss" in line}


def samples(output: Path, step: int) -> list[dict]:
    return [json.loads(line) for line in (output / "eval-samples" / f"step-{step}.jsonl").open()]


@pytest.fixture(scope="module")
def tuned(data, tmp_path_factory) -> Path:
    """One process, flattened, adapters with dropout; every step makes it worse than the first evaluation."""
    output = tmp_path_factory.mktemp("tuned")
    start(**flags(data, output, **EVALUATED, **LORA, save_strategy="steps", save_steps=2, save_total_limit=2,
                  load_best_model_at_end=True, gradient_checkpointing=True))  # fmt: skip
    return output


LORA = dict(lora_enable=True, lora_r=4, lora_alpha=8, lora_dropout=0.3)


@pytest.fixture(scope="module")
def two(data, tmp_path_factory) -> tuple[Path, str]:
    """Two processes, padded, by the command; and what it printed."""
    output = tmp_path_factory.mktemp("two")
    done = command(2, **flags(data, output, **EVALUATED, data_flatten=False, max_steps=1))
    assert done.returncode == 0, done.stderr[-4000:]
    return output, done.stderr


def reference_losses(data: Path, name: str) -> tuple[float, float]:
    """The sum of a set's token losses and what its tokens count, row by row, through the plain model."""
    parser = HfArgumentParser((ModelArguments, DataArguments, TrainingArguments))
    model_args, data_args, args = parser.parse_dict(flags(data, data.parent / "none", dataset_use=name))
    processor = load_processor(model_args, data_args, args)
    config = load_config(model_args, args)
    rows = make_supervised_data_module(
        processor, data_args, model_config=config, model_max_length=512, seed=0
    )["train_dataset"]
    model = AutoModelForImageTextToText.from_pretrained(NANO, dtype=torch.float32).eval()
    total = tokens = 0.0
    for item in rows:
        batch = scale_pixels(PaddedCollator(0)([item]), processor)
        labels, weights = batch.pop("labels")[0, 1:], batch.pop("loss_weights", None)
        with torch.no_grad():
            logits = model(**batch).logits[0, :-1]
        losses = cross_entropy(logits, labels, ignore_index=-100, reduction="none")
        counts = (labels != -100).float() if weights is None else weights[0, 1:]
        total += (losses.double() * counts).sum().item()
        tokens += counts.sum().item()
    return total, tokens


def test_losses_are_exact_padded_or_flattened_in_one_process_or_two(tuned, two, data):
    expected = {name: reference_losses(data, name) for name in ("plain", "forms")}
    total, tokens = (sum(each) for each in zip(*expected.values(), strict=True))
    for output in (tuned, two[0]):
        found = history(output)[0]
        for name, (loss, count) in expected.items():
            assert found[f"eval_{name}/loss"] == pytest.approx(loss / count, abs=1e-5)
        assert found["eval_loss"] == pytest.approx(total / tokens, abs=1e-5)


def test_evaluation_happens_when_asked_and_after_the_last_step(tuned, two):
    assert [*history(tuned)] == [0, 2, 4]
    assert [*history(two[0])] == [0, 1]
    assert "evaluation at step 1: plain/loss" in two[1]


def test_answers_are_those_of_the_saved_model_whatever_the_processes(two, tuned, data):
    """Batched and padded against one by one; with the processor that is saved."""
    output = two[0]
    model = AutoModelForImageTextToText.from_pretrained(output, dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(output)
    found = samples(output, 1)
    assert [(each["dataset"], each["row"].split(": ")[1]) for each in found] == [
        *(("plain", f"row {index} (counted from 0)") for index in (0, 2, 4)),
        *(("forms", f"row {index} (counted from 0)") for index in range(3)),
    ]
    for each in found:
        inputs = processor_inputs(processor, [each["prompt"]], add_generation_prompt=True)
        ids = model.generate(**inputs, max_new_tokens=12, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        text = processor.tokenizer.decode(ids).partition("<|im_end|>")[0].strip()
        assert each["output"] == text
    before = [(each["prompt"], each["output"]) for each in samples(output, 0)]
    assert before == [(each["prompt"], each["output"]) for each in samples(tuned, 0)]
    assert found[5]["prompt"][-1]["content"] == "Sure?" and found[5]["reference"] == "yes"


def test_each_form_has_its_metric_and_the_log_its_mean(tuned):
    found = samples(tuned, 0)
    assert [sorted(each["verdicts"]) for each in found[3:]] == [
        ["choice", "edit", "exact"],
        ["edit", "exact", "iou"],
        ["edit", "exact"],
    ]
    logged = history(tuned)[0]
    for name in ("plain", "forms"):
        for metric in ("exact", "edit"):
            scores = [each["verdicts"][metric]["score"] for each in found if each["dataset"] == name]
            assert logged[f"eval_{name}/{metric}"] == pytest.approx(sum(scores) / 3)
    assert logged["eval_forms/choice"] == found[3]["verdicts"]["choice"]["score"]
    assert logged["eval_forms/iou"] == found[4]["verdicts"]["iou"]["score"]
    assert logged["eval_plain/exact"] > 0  # The checkpoint knows a triangle.


def test_the_page_shows_pictures_and_text_as_text(tuned):
    page = (tuned / "eval-samples" / "step-4.html").read_text()
    contents = [turn["content"] for each in samples(tuned, 4) for turn in each["prompt"]]
    items = [item for content in contents if isinstance(content, list) for item in content]
    media = [item for item in items if item["type"] != "text"]
    assert page.count('<img src="data:image/jpeg;base64,') == len(media) > 3
    assert page.count("<article") == 6
    assert "&lt;image&gt;" in page and "<script" not in page


def test_training_does_not_notice_an_evaluation(tuned, data, tmp_path):
    """Adapters with dropout, under gradient checkpointing: the same bytes after the last step."""
    start(**flags(data, tmp_path, **LORA, save_strategy="steps", save_steps=2, gradient_checkpointing=True))
    for step in (2, 4):
        file = Path(f"checkpoint-{step}/adapter_model.safetensors")
        assert (tmp_path / file).read_bytes() == (tuned / file).read_bytes(), step


def test_the_best_checkpoint_is_kept_and_saved(tuned):
    losses = {step: found["eval_loss"] for step, found in history(tuned).items() if step}
    best = min(losses, key=lambda step: losses[step])
    assert best == 2  # Else the last one would do.
    state = json.loads((tuned / "trainer_state.json").read_text())
    assert state["best_metric"] == losses[2]
    assert Path(state["best_model_checkpoint"]).name == "checkpoint-2"
    saved = tuned / "adapter" / "adapter_model.safetensors"
    assert saved.read_bytes() == (tuned / "checkpoint-2" / "adapter_model.safetensors").read_bytes()
