"""train_dpo.py: its log-probabilities, loss and steps against plain transformers, one answer at a time."""

import json
import math
import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoProcessor, HfArgumentParser
from transformers.image_utils import SizeDict

import qwenvl.train
from qwenvl.data.collators import FlattenedCollator
from qwenvl.data.data_processor import make_supervised_data_module
from qwenvl.data.messages import split_pair
from qwenvl.nano import FAMILIES
from qwenvl.nano.tokenizer import NANO_VOCABULARY
from qwenvl.train import linear_cross_entropy
from qwenvl.train.argument import DataArguments, ModelArguments, TrainingArguments
from qwenvl.train.model_loading import load_config, load_processor
from qwenvl.train.preference import PreferenceTrainer
from qwenvl.train.train_qwen import build_trainer, train

PACKAGE = Path(qwenvl.train.__path__[0]).parents[1]
SCRIPT = PACKAGE / "qwenvl" / "train" / "train_dpo.py"
NANO = PACKAGE.parent / "models" / "qwen3-vl-nano"
DEMO = PACKAGE / "demo"
SIDE = 224  # A multiple of every family's unit, so that no picture is resized.
FULL = dict(tune_mm_llm=True, tune_mm_mlp=True, tune_mm_vision=True)
LORA = dict(lora_enable=True, lora_r=4, lora_components="language", tune_mm_mlp=True, tune_mm_vision=True)


def human(text: str) -> dict:
    return {"from": "human", "value": text}


def pair(question: str, chosen: object, rejected: object, *before: dict, **media) -> dict:
    return {"conversations": [*before, human(question)], "chosen": chosen, "rejected": rejected, **media}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """A TOML file: `mixed`, eight pairs, half of them without a picture; `texts`, four."""
    folder = tmp_path_factory.mktemp("pairs")
    random = np.random.default_rng(0)
    for name in "abc":
        noise = Image.fromarray(random.integers(0, 256, (7, 7, 3), dtype=np.uint8))
        noise.resize((SIDE, SIDE), Image.Resampling.BICUBIC).save(folder / f"{name}.png")
    said = [human("<image>What is it?"), {"from": "gpt", "value": "a cat"}]
    picture = {"type": "image", "image": "b.png"}
    mixed = [
        pair("<image>What?", "a red star", "no", image="a.png"),
        pair("Say a word.", "word", "I would rather not say one"),
        pair("And its colour?", "black", "it is blue, maybe", *said, image="b.png"),
        pair("Count.", "one, two, three", "one"),
        {
            "messages": [{"role": "user", "content": [picture, {"type": "text", "text": "And now?"}]}],
            "chosen": {"role": "assistant", "content": "left"},
            "rejected": {"from": "gpt", "value": "right or left"},
        },
        pair("Hello?", "hello", "yes"),
        pair("<image>or<image>?", "the first", "the second of the two", image=["c.png", "a.png"]),
        pair("Bye.", "bye", "hello " * 9),
    ]
    texts = [pair(f"Question {n}?", "yes " * n, "no") for n in range(1, 5)]
    table = ""
    for name, rows in {"mixed": mixed, "texts": texts}.items():
        (folder / f"{name}.json").write_text(json.dumps(rows))
        table += f'[{name}]\nannotation_path = "{name}.json"\ndata_path = "."\n'
    (folder / "data.toml").write_text(table)
    return folder / "data.toml"


def flags(checkpoint: Path, data: Path, output: Path, **more) -> dict:
    return dict(
        model_name_or_path=str(checkpoint), dataset_config=str(data), dataset_use="mixed",
        output_dir=str(output), per_device_train_batch_size=4, min_pixels=3136, max_pixels=65536,
        learning_rate=1e-3, logging_steps=1, save_strategy="no", report_to="none", disable_tqdm=True,
    ) | more  # fmt: skip


def parse(**values):
    return HfArgumentParser(PreferenceTrainer.arguments).parse_dict(values)


def start(**values) -> list[dict]:
    """Train; the lines of the log."""
    return lines(train(*parse(**values), PreferenceTrainer).state.log_history)


def lines(history: list[dict]) -> list[dict]:
    return [line for line in history if "loss" in line]


def command(processes: int, **values) -> list[dict]:
    """Train by the public command; the lines of the log."""
    words = [sys.executable]
    if processes > 1:
        words += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    words += [str(SCRIPT), *(word for name, value in values.items() for word in (f"--{name}", str(value)))]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads((Path(values["output_dir"]) / "trainer_state.json").read_text())["log_history"]


# ---- plain transformers, without a line of ours


def plain_messages(row: dict, answer: str | None, folder: Path) -> list[dict]:
    """A row as transformers' chat template takes it; without the answer where it is None."""
    images = row.get("image", [])
    paths = iter([images] if isinstance(images, str) else images)
    turns = []
    for turn in row.get("conversations") or row["messages"]:
        role = {"human": "user", "gpt": "assistant"}.get(turn.get("from"), turn.get("role"))
        content = turn.get("value") or turn["content"]
        if isinstance(content, str):
            parts = content.replace("<image>", "\0<image>\0").split("\0")
            content = [{"type": "text", "text": part} for part in parts if part]
            content = [
                {"type": "image", "image": next(paths)} if part["text"] == "<image>" else part
                for part in content
            ]
        content = [
            part | {"image": Image.open(folder / part["image"])} if part["type"] == "image" else part
            for part in content
        ]
        turns.append({"role": role, "content": content})
    if answer is not None:
        text = row[answer]
        text = text if isinstance(text, str) else text.get("content") or text["value"]
        turns.append({"role": "assistant", "content": [{"type": "text", "text": text}]})
    return turns


def plain_log_probabilities(model, checkpoint: Path, rows: list[dict], folder: Path) -> torch.Tensor:
    """[N, 2]: one forward pass an answer, no padding, torch's own attention."""
    processor = AutoProcessor.from_pretrained(checkpoint)
    processor.image_processor.size = SizeDict(shortest_edge=3136, longest_edge=65536)
    end = processor.tokenizer.convert_tokens_to_ids("<|im_end|>")
    model.eval()
    found = []
    for row in rows:
        for answer in ("chosen", "rejected"):
            options = dict(tokenize=True, return_dict=True, return_tensors="pt")
            whole = processor.apply_chat_template(plain_messages(row, answer, folder), **options)
            asked = processor.apply_chat_template(
                plain_messages(row, None, folder), add_generation_prompt=True, **options
            )
            ids, begin = whole["input_ids"][0], asked["input_ids"].shape[1]
            assert ids[:begin].tolist() == asked["input_ids"][0].tolist()
            last = int((ids == end).nonzero()[-1])
            with torch.no_grad():
                logits = model(**whole, use_cache=False).logits[0].double()
            steps = logits[begin - 1 : last].log_softmax(-1)
            found.append(steps.gather(1, ids[begin : last + 1, None]).sum())
    return torch.stack(found).view(-1, 2)


# ---- the loss

CASES = [(family, FULL) for family in FAMILIES]
CASES += [("qwen3_vl", LORA), ("qwen3_vl_moe", LORA | dict(lora_components="language,experts"))]


@pytest.mark.parametrize(("family", "tuned"), CASES)
def test_answers_and_losses_are_those_of_plain_transformers(
    family, tuned, checkpoints, data, tmp_path, monkeypatch
):
    """Full tuning and adapters, a model that has moved from its reference, all rows as one batch, logits in
    pieces of seven.
    """
    monkeypatch.setattr(linear_cross_entropy, "PIECE_BYTES", 4 * NANO_VOCABULARY * 7)
    base = checkpoints[family]
    trainer = build_trainer(*parse(**flags(base, data, tmp_path, beta=0.3, **tuned)), PreferenceTrainer)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in trainer.model.named_parameters():
        if parameter.requires_grad and parameter.ndim > 1 and "visual" not in name:
            parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    rows = json.loads((data.parent / "mixed.json").read_text())
    items = trainer.train_dataset
    batch = FlattenedCollator()([items[n] for n in range(len(items))])
    found = trainer.pair_losses(trainer.model, trainer._prepare_inputs(batch))

    plain = AutoModelForImageTextToText.from_pretrained(base, dtype=torch.float32)
    reference = plain_log_probabilities(plain, base, rows, data.parent)
    moved = trainer.model if tuned is FULL else trainer.model.merge_and_unload()
    plain.load_state_dict(moved.state_dict())
    model = plain_log_probabilities(plain, base, rows, data.parent)
    margins = 0.3 * ((model - reference)[:, 0] - (model - reference)[:, 1])
    assert margins.abs().min() > 1e-3
    assert torch.allclose(found.model.double(), model, rtol=2e-6, atol=1e-5)
    # A margin is beta times four such numbers, each with that error.
    off = 4 * 0.3 * (1e-5 + 2e-6 * float(model.abs().max()))
    assert torch.allclose(found.margins.double(), margins, rtol=0, atol=off)
    expected = torch.tensor([math.log1p(math.exp(-margin)) for margin in margins.tolist()])
    assert torch.allclose(found.losses, expected, rtol=0, atol=off)


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("tuned", [FULL, LORA | dict(lora_dropout=0.5)], ids=["full", "adapters"])
def test_the_first_loss_is_log_2(tuned, bf16, checkpoints, data, tmp_path):
    """Dropout sits in the adapters, which begin at zero."""
    (line,) = start(**flags(checkpoints["qwen3_vl"], data, tmp_path, max_steps=1, bf16=bf16, **tuned))
    assert line["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert line["reward_margin"] == line["reward_accuracy"] == 0
    assert line["logp_chosen"] < 0 and line["logp_rejected"] < 0


@pytest.mark.parametrize("tuned", [FULL, LORA], ids=["full", "adapters"])
def test_the_reference_stays_free_of_dropout(tuned, checkpoints, data, tmp_path):
    """Of a checkpoint that has some, while the model is trained with it."""
    folder = shutil.copytree(checkpoints["qwen3_vl"], tmp_path / "dropping")
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["attention_dropout"] = 0.5
    (folder / "config.json").write_text(json.dumps(config))
    trainer = build_trainer(*parse(**flags(folder, data, tmp_path, **tuned)), PreferenceTrainer)
    trainer.model.train()
    batch = FlattenedCollator()([trainer.train_dataset[0]])
    first, second = (trainer.pair_losses(trainer.model, batch) for _ in range(2))
    assert trainer.model.training and not torch.equal(first.model, second.model)
    expected = [each.model[0].diff() + each.margins / trainer.beta for each in (first, second)]
    assert torch.allclose(*expected, atol=1e-4)  # Rejected - chosen, by the reference.


SPREAD = {"accumulated": (FULL, 1, 4), "processes": (LORA, 2, 1)}


@pytest.mark.parametrize("spread", SPREAD)
def test_accumulation_and_processes_take_the_steps_of_one_batch(spread, checkpoints, data, tmp_path):
    """Some of a process's batches are text alone, and the vision tower is trained: nothing hangs."""
    tuned, *sizes = SPREAD[spread]
    curves = {}
    for name, (batch, accumulation) in {"batch": (4, 1), spread: sizes}.items():
        values = flags(checkpoints["qwen3_vl"], data, tmp_path / name, num_train_epochs=3, **tuned)
        values |= dict(per_device_train_batch_size=batch, gradient_accumulation_steps=accumulation)
        found = lines(command(2, **values)) if name == "processes" else start(**values)
        keys = ("loss", "grad_norm", *PreferenceTrainer.logged)
        curves[name] = torch.tensor([[float(line[key]) for key in keys] for line in found])
    assert len(curves["batch"]) == 6
    assert curves["batch"][-1, 0] < 0.6 < curves["batch"][0, 0]
    print((curves[spread] - curves["batch"]).abs().max(0))  # Shown by `pytest -s`.
    assert torch.allclose(curves[spread], curves["batch"], rtol=2e-4, atol=2e-5)


def test_a_run_goes_on_from_its_checkpoint(checkpoints, data, tmp_path):
    """Bit for bit, so against the same reference as before."""
    values = flags(checkpoints["qwen3_vl"], data, tmp_path / "whole", max_steps=4, **FULL)
    values |= dict(save_strategy="steps", save_steps=2)
    whole = start(**values)
    shutil.copytree(tmp_path / "whole" / "checkpoint-2", tmp_path / "again" / "checkpoint-2")
    again = start(**values | dict(output_dir=str(tmp_path / "again")))
    keys = ("loss", "grad_norm", *PreferenceTrainer.logged)
    assert [[line[key] for key in keys] for line in again] == [[line[key] for key in keys] for line in whole]
    ended, resumed = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "again"))
    assert all(torch.equal(tensor, resumed[name]) for name, tensor in ended.items())
    started = load_file(checkpoints["qwen3_vl"] / "model.safetensors")
    assert not all(torch.equal(tensor, ended[name]) for name, tensor in started.items())


def test_each_data_set_and_the_experts_have_their_part_of_the_log(checkpoints, data, tmp_path):
    """A mixture of experts in full: the balancing loss comes on top.  A step takes all twelve pairs."""
    values = flags(checkpoints["qwen3_vl_moe"], data, tmp_path, dataset_use="mixed,texts", **FULL)
    values |= dict(per_device_train_batch_size=12, max_steps=2, router_aux_loss_coef=0.5)
    values |= dict(eval_dataset_use="mixed,texts", eval_strategy="steps", eval_steps=1)
    history = train(*parse(**values), PreferenceTrainer).state.log_history
    first, second = lines(history)
    # Of the weights after the first step.
    evaluated = next(line for line in history if "eval_loss" in line)
    for line in (first, second):
        preference = (8 * line["loss/mixed"] + 4 * line["loss/texts"]) / 12
        assert line["loss"] == pytest.approx(preference + 0.5 * line["router_balance_loss"], abs=1e-4)
    assert first["loss/mixed"] == pytest.approx(math.log(2), abs=1e-6)
    assert second["loss/mixed"] != pytest.approx(second["loss/texts"], abs=1e-3)
    for name in ("mixed", "texts"):
        assert second[f"loss/{name}"] == pytest.approx(evaluated[f"eval_{name}/loss"], abs=1e-5)
    assert second["reward_margin"] == pytest.approx(
        (8 * evaluated["eval_mixed/margin"] + 4 * evaluated["eval_texts/margin"]) / 12, abs=1e-5
    )


def test_the_public_command_prefers_what_is_chosen(tmp_path):
    """On demo/: the margin rises, and what the merged checkpoint thinks is what the evaluation said."""
    history = command(1, **flags(
        NANO, DEMO / "datasets.toml", tmp_path, dataset_use="preferences", eval_dataset_use="preferences",
        eval_on_start=True, max_steps=8, lora_enable=True, lora_r=8,
    ))  # fmt: skip
    first, last = (line for line in history if "eval_loss" in line)
    assert first["eval_loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert first["eval_preferences/accuracy"] == 0
    assert last["eval_preferences/accuracy"] == 1 and last["eval_loss"] < 0.55
    rows = json.loads((DEMO / "preferences.json").read_text())
    moved, reference = (
        plain_log_probabilities(
            AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32), folder, rows, DEMO
        )
        for folder in (tmp_path, NANO)
    )
    margins = 0.1 * ((moved - reference)[:, 0] - (moved - reference)[:, 1])
    assert last["eval_preferences/margin"] == pytest.approx(margins.mean().item(), abs=1e-4)
    assert margins.min() > 0


# ---- the data


def module(data: Path, tmp_path: Path, *, pairs: bool = True, **more) -> dict:
    model_args, data_args, args = parse(**flags(NANO, data, tmp_path, **more))
    processor = load_processor(model_args, data_args, args)
    return make_supervised_data_module(
        processor, data_args, model_config=load_config(model_args, args),
        model_max_length=args.model_max_length, seed=0, pairs=pairs,
    )  # fmt: skip


def test_the_last_turn_alone_carries_loss(data, tmp_path):
    rows = module(data, tmp_path)["train_dataset"]
    item = rows[2]
    assert "loss_weights" not in item
    tokenizer = rows.encode.processor.tokenizer
    parts = item["labels"].split(item["segment_lengths"].tolist())
    carried = [tokenizer.decode(part[part != -100]) for part in parts]
    assert carried == ["black<|im_end|>", "it is blue, maybe<|im_end|>"]
    texts = [tokenizer.decode(part) for part in item["input_ids"].split(item["segment_lengths"].tolist())]
    assert all("a cat<|im_end|>" in text for text in texts)


def test_a_pair_too_long_is_left_out_whole(data, tmp_path):
    rows = module(data, tmp_path, dataset_use="texts", model_max_length=20, too_long="skip")["train_dataset"]
    assert 0 < len(rows) < 4
    assert all(len(item["segment_lengths"]) == 2 for item in rows)
    reason = r"texts.json: row \d \(counted from 0\), 'chosen': \d+ tokens"
    with pytest.raises(ValueError, match=reason):
        module(data, tmp_path, dataset_use="texts", model_max_length=20)["train_dataset"][3]


QUESTION = {"conversations": [human("Hi.")]}
SPEAKS = {"role": "assistant", "content": "a"}
BAD = {
    "no rejected answer": (QUESTION | {"chosen": "a"}, "'rejected' must be text .* train_qwen.py"),
    "a list": (QUESTION | {"chosen": ["a"], "rejected": "b"}, "'chosen' must be text .* found a list"),
    "the same": (pair("Hi.", SPEAKS, "a"), "are the same"),
    "a question": (pair("Hi.", {"role": "user", "content": "a"}, "b"), "found the role 'user'"),
    "a weight": (pair("Hi.", SPEAKS | {"weight": 0.5}, "b"), "'chosen' has a weight"),
    "an answer before": (
        {"conversations": [human("Hi."), {"from": "gpt", "value": "c"}], "chosen": "a", "rejected": "b"},
        "ends with an answer",
    ),
    "a picture in an answer": (pair("Hi.", "a", "<image>"), r"turn 1 \(assistant\) contains <image>"),
    "a pack": ([QUESTION], "must be an object with 'chosen' and 'rejected'"),
    "a special token": (pair("Hi.", "a<|im_end|>", "b"), "the special token"),
}


@pytest.mark.parametrize("fault", BAD)
def test_rows_that_are_no_pairs_are_refused(fault, data, tmp_path):
    row, reason = BAD[fault]
    (tmp_path / "rows.jsonl").write_text(json.dumps(pair("Hi.", "a", "b")) + "\n" + json.dumps(row) + "\n")
    (tmp_path / "data.toml").write_text('[rows]\nannotation_path = "rows.jsonl"\n')
    with pytest.raises(ValueError, match=rf"rows.jsonl: line 2 \(counted from 1\).*{reason}"):
        module(tmp_path / "data.toml", tmp_path, dataset_use="rows")
    assert (
        len(module(tmp_path / "data.toml", tmp_path, dataset_use="rows", bad_samples="skip")["train_dataset"])
        == 1
    )


def test_a_pair_is_no_row_of_train_qwen(data, tmp_path):
    with pytest.raises(ValueError, match=r"mixed.json: row 0 .*train_dpo.py"):
        module(data, tmp_path, pairs=False)
    # A table's empty columns are no answers.
    assert split_pair(pair("Hi.", "a", "b"))[0].keys() == {"conversations"}


ZERO3 = str(PACKAGE / "scripts" / "zero3.json")
REFUSED = {
    "beta": dict(beta=0.0),
    "data_packing": dict(data_packing=True),
    "data_flatten": dict(data_flatten=False),
    "streaming": dict(streaming=True, max_steps=1),
    "too_long": dict(too_long="drop_turns"),
    "ZeRO-3": dict(deepspeed=ZERO3),
    "FSDP": dict(fsdp=True, lora_enable=True),
}


@pytest.mark.parametrize("flag", REFUSED)
def test_what_cannot_be_exact_is_refused(flag, data, tmp_path):
    if flag == "ZeRO-3":
        pytest.importorskip("deepspeed")
    with pytest.raises(ValueError, match=flag):
        parse(**flags(NANO, data, tmp_path, **REFUSED[flag]))


def test_the_doctor_examines_pairs(data, tmp_path, capsys):
    rows = [json.loads((data.parent / "mixed.json").read_text())[n] for n in (0, 1, 1)]
    (tmp_path / "rows.json").write_text(json.dumps([*rows, pair("Hi.", "a", "a")]))
    (tmp_path / "data.toml").write_text(
        f'[rows]\nannotation_path = "rows.json"\ndata_path = "{data.parent}"\n'
    )
    values = flags(NANO, tmp_path / "data.toml", tmp_path, dataset_use="rows", per_device_train_batch_size=1)
    tool = runpy.run_path(str(PACKAGE / "tools" / "check_image.py"))
    doctor = tool["DoctorArguments"](str(tmp_path / "report"), str(tmp_path / "fixed"), pairs=True, workers=0)
    kinds = (ModelArguments, DataArguments, TrainingArguments)
    assert tool["run"](doctor, *HfArgumentParser(kinds).parse_dict(values)) == 1
    assert "row 3 (counted from 0): 'chosen' and 'rejected' are the same" in capsys.readouterr().out
    assert json.loads((tmp_path / "report" / "report.json").read_text())["forecast"]["steps_an_epoch"] == 3
    fixed = [json.loads(line) for line in (tmp_path / "fixed" / "rows.jsonl").read_text().splitlines()]
    assert fixed == rows[:2]
