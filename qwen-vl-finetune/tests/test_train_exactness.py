"""Packing, padding, accumulation and processes change how a step is computed, never what it computes."""

import json
import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForImageTextToText, HfArgumentParser

from qwenvl.data.collators import FlattenedCollator, PaddedCollator
from qwenvl.data.data_processor import make_supervised_data_module
from qwenvl.nano import FAMILIES, nano_model
from qwenvl.nano.architecture import nano_config, random_model
from qwenvl.nano.tokenizer import nano_tokenizer
from qwenvl.train import attention, linear_cross_entropy
from qwenvl.train.argument import DataArguments, ModelArguments, TrainingArguments
from qwenvl.train.attention import Segments, segment_attention
from qwenvl.train.model_loading import load_config, load_model, load_processor
from qwenvl.train.train_qwen import train
from qwenvl.train.trainer import count_loss_tokens, token_losses

ROOT = Path(attention.__file__).parents[3]
SMALL = ["--min_pixels", "3136", "--max_pixels", "12544", "--video_min_pixels", "3136"]
SMALL += ["--video_max_pixels", "25088", "--report_to", "none"]


def turn(question: str, answer: str) -> list[dict]:
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory, pictures, clip) -> Path:
    """A TOML file with two data sets: `mixed`, every kind of sample once; `many`, 24 pictures and texts."""
    folder = tmp_path_factory.mktemp("data")
    mixed = [
        {"image": "a.png", "conversations": turn("<image>What is it?", "A cat.")},
        {"conversations": turn("Say a word.", "Word") + turn("And a longer one?", "Longer, and longer.")},
        {"image": ["c.png", "a.png"], "conversations": turn("<image>or<image>?", "The first of the two.")},
        {"video": str(clip), "conversations": turn("<video>What moves?", "A red block, to the right.")},
        {
            "image": "b.png",
            "video": str(clip),
            "conversations": turn("<image><video>Does it fit?", "No") + turn("Why?", "It is not in there."),
        },
    ]
    many = []
    for index in range(24):
        row: dict = {"conversations": turn(f"Question {index}?", "yes " * (1 + index % 5))}
        if index % 3 == 0:  # Few pictures, so that some ranks get batches of text alone.
            row["conversations"][0]["value"] += "<image>"
            row["image"] = "abc"[index % 9 // 3] + ".png"
        many.append(row)
    table = ""
    for name, rows in {"mixed": mixed, "many": many}.items():
        (folder / f"{name}.json").write_text(json.dumps(rows))
        table += f'[{name}]\nannotation_path = "{name}.json"\ndata_path = "{pictures}"\n'
    (folder / "data.toml").write_text(table)
    return folder / "data.toml"


def parse(*flags: str) -> tuple[ModelArguments, DataArguments, TrainingArguments]:
    parser = HfArgumentParser((ModelArguments, DataArguments, TrainingArguments))
    return parser.parse_args_into_dataclasses([*map(str, flags), *SMALL])


def loss_and_gradients(model, batches) -> tuple[float, dict[str, torch.Tensor]]:
    """Of several batches as one step: mean loss a token and its gradients."""
    model.zero_grad()
    tokens = sum(int(count_loss_tokens(batch)) for batch in batches)
    loss = sum(token_losses(model, batch)[0].double().sum() for batch in batches) / tokens
    loss.backward()
    return loss.item(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def difference(gradients: dict, expected: dict) -> float:
    """The norm of the difference over the norm, over all parameters."""
    assert gradients.keys() == expected.keys()
    norm = torch.stack([g.norm() for g in expected.values()]).norm()
    return float(torch.stack([(gradients[n] - expected[n]).norm() for n in expected]).norm() / norm)


CASES = [(family, None) for family in FAMILIES] + [("qwen2_5_vl", "eager"), ("qwen3_vl", "eager")]
CASES += [("qwen3_5", "eager")]


@pytest.mark.parametrize(("family", "named"), CASES)
def test_packed_and_padded_batches_equal_separate_samples(family, named, checkpoints, dataset, tmp_path):
    """Pictures, text, video, several turns; `named` is an _attn_implementation in config.json."""
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    for file in checkpoints[family].iterdir():
        (folder / file.name).symlink_to(file)
    if named:
        config = json.loads((folder / "config.json").read_text()) | {"_attn_implementation": named}
        (folder / "config.json").unlink()
        (folder / "config.json").write_text(json.dumps(config))
    arguments = parse(
        "--model_name_or_path", folder, "--dataset_use", "mixed", "--dataset_config", dataset,
        "--output_dir", tmp_path, "--model_max_length", 4096, "--data_flatten", "False",
    )  # fmt: skip
    model_args, data_args, training_args = arguments
    config = load_config(model_args, training_args)
    processor = load_processor(model_args, data_args, training_args)
    module = make_supervised_data_module(
        processor, data_args, model_config=config, model_max_length=4096, seed=0
    )
    items = [module["train_dataset"][index] for index in range(len(module["train_dataset"]))]
    pad = PaddedCollator(processor.tokenizer.pad_token_id)

    plain = load_model(config, *arguments)
    assert plain.config._attn_implementation == (named or "sdpa")
    # Plain modelling code, one sample at a time, the whole logits, the library's own attention.
    expected = loss_and_gradients(plain, [pad([item]) for item in items])
    padded = loss_and_gradients(plain, [pad(items)])

    data_args.data_flatten = True
    model = load_model(load_config(model_args, training_args), *arguments)
    assert model.config._attn_implementation == (named or attention.NAME)
    packed = loss_and_gradients(model, [FlattenedCollator()(items)])
    for loss, gradients in (padded, packed):
        assert abs(loss - expected[0]) <= 1e-6
        assert difference(gradients, expected[1]) <= 2e-6


def test_the_loss_is_that_of_the_model_library(checkpoints):
    """Cross-entropy where the next token carries loss, from logits of those columns alone."""
    folder = checkpoints["qwen3_vl"]
    model = AutoModelForImageTextToText.from_pretrained(folder)
    ids = torch.arange(24).reshape(2, 12)
    labels = torch.where(torch.rand(2, 12, generator=torch.Generator().manual_seed(0)) < 0.3, ids, -100)
    labels[:, 0] = ids[:, 0]  # A first token is predicted by none.
    batch = {"input_ids": ids, "labels": labels, "attention_mask": torch.ones_like(ids)}
    losses, columns, _ = token_losses(model, batch)
    expected = model(input_ids=ids, labels=labels).loss
    assert len(columns) < 11
    assert torch.allclose(losses.sum() / count_loss_tokens(batch), expected, rtol=1e-6, atol=0)


def texts(tokens: int, seed: int) -> list[dict[str, torch.Tensor]]:
    """Three items of text, each half as long as the one before; a third of their tokens are without loss."""
    random = torch.Generator().manual_seed(seed)
    items = []
    for length in (tokens, tokens // 2, tokens // 4):
        ids = torch.randint(0, 1000, (length,), generator=random)
        carried = torch.rand(length, generator=random) < 2 / 3
        items.append({
            "input_ids": ids, "labels": ids.where(carried, torch.tensor(-100)),
            "position_ids": torch.arange(length).expand(3, -1), "segment_lengths": torch.tensor([length]),
            "loss_weights": torch.rand(length, generator=random),
        })  # fmt: skip
    return items


def rows_a_piece(patch: pytest.MonkeyPatch, model: torch.nn.Module, rows: int) -> None:
    patch.setattr(linear_cross_entropy, "PIECE_BYTES", 4 * model.config.text_config.vocab_size * rows)


def losses_and_gradients(model, batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Token losses, and the gradients of a sum in which each counts otherwise, as preferences have it."""
    model.zero_grad()
    losses = token_losses(model, batch).losses
    losses.backward(torch.randn(losses.shape, generator=torch.Generator().manual_seed(2)))
    return losses.detach(), {n: p.grad.float() for n, p in model.named_parameters() if p.grad is not None}


def check_pieces(model, batch, *, autocast: bool = False, exact: bool = True) -> dict[str, torch.Tensor]:
    """Pieces of 5 rows against all rows at once; returns the gradients."""
    with pytest.MonkeyPatch.context() as patch, torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        losses, gradients = losses_and_gradients(model, batch)
        rows_a_piece(patch, model, 5)
        pieces, found = losses_and_gradients(model, batch)
        with torch.no_grad():
            assert torch.equal(token_losses(model, batch).losses, pieces)
    assert losses.dtype == pieces.dtype == torch.float32 and losses.shape == pieces.shape
    assert torch.allclose(pieces, losses, rtol=1e-6 if exact else 2e-3, atol=1e-6)
    assert difference(found, gradients) <= (1e-6 if exact else 1e-2)
    return found


@pytest.mark.parametrize("collate", [PaddedCollator(0), FlattenedCollator()], ids=["padded", "flattened"])
def test_pieces_give_what_all_rows_give_at_once(family, collate):
    model = nano_model(family)
    if isinstance(collate, FlattenedCollator):
        attention.separate(model)
        attention.enable(model)
    batch = collate(texts(24, seed=0))
    check_pieces(model, batch)
    check_pieces(model, batch, autocast=True, exact=False)


HEADS = ["tied", "untied", "frozen", "adapted", "saved"]


def model_with_head(kind: str, **changes: int) -> torch.nn.Module:
    """A Qwen3-VL whose lm_head is what `kind` says; `changes` in the text model's configuration."""
    config = nano_config("qwen3_vl", nano_tokenizer("qwen3_vl"), tied=kind == "tied")
    config.text_config.update(changes)
    model = random_model(config, device="cpu", dtype=torch.float32, seed=0)
    if kind in ("adapted", "saved"):
        whole = {"modules_to_save": ["lm_head"]} if kind == "saved" else {}
        layers = ["q_proj"] if whole else ["q_proj", "lm_head"]
        adapters = LoraConfig(r=2, init_lora_weights=False, target_modules=layers, **whole)
        return get_peft_model(model, adapters)
    if kind != "tied":
        model.get_input_embeddings().requires_grad_(False)
        model.lm_head.requires_grad_(kind != "frozen")
    return model


@pytest.mark.parametrize("kind", HEADS)
def test_any_head_computes_in_pieces(kind):
    model = model_with_head(kind)
    batch = PaddedCollator(0)(texts(24, seed=1))
    for _ in range(2):
        found = check_pieces(model, batch)
        assert any("lm_head" in name for name in found) is (kind in ("untied", "adapted", "saved"))
    check_pieces(model, batch, autocast=True, exact=False)
    check_pieces(model.bfloat16(), batch, exact=False)


class Memory(TorchDispatchMode):
    """The most bytes that tensors made within the block took together, and the largest of them."""

    def __init__(self) -> None:
        super().__init__()
        self.living: dict[StorageWeakRef, int] = {}
        self.peak = self.largest = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **kwargs or {})
        given = (each for each in tree_leaves((args, kwargs)) if torch.is_tensor(each))
        before = {tensor.untyped_storage()._cdata for tensor in given}
        for tensor in filter(torch.is_tensor, tree_leaves(result)):
            storage = tensor.untyped_storage()
            if storage._cdata not in before:
                self.living[StorageWeakRef(storage)] = storage.nbytes()
                self.largest = max(self.largest, storage.nbytes())
        self.living = {storage: size for storage, size in self.living.items() if not storage.expired()}
        self.peak = max(self.peak, sum(self.living.values()))
        return result


@pytest.mark.parametrize("kind", HEADS)
def test_memory_has_room_for_a_piece_of_logits_alone(kind, monkeypatch):
    """Of Qwen's vocabulary: a piece's logits, their softmax and little else, and gradients as large as the
    weight, of which a plain head has one. The tied embedding adds its own and their sum; other heads keep a
    piece's logits longer, and one that is trained another gradient while pieces' are added up.
    """
    vocabulary, width, rows = 151_936, 64, 20
    model = model_with_head(kind, vocab_size=vocabulary, hidden_size=width, num_hidden_layers=1)
    rows_a_piece(monkeypatch, model, rows)
    batch = PaddedCollator(0)(texts(400, seed=0)[:1])
    assert count_loss_tokens(batch) > 100
    weight, piece = 4 * vocabulary * width, 4 * vocabulary * rows
    with Memory() as memory:
        token_losses(model, batch).losses.sum().backward()
    room = {"tied": (3, 3), "untied": (1, 3), "frozen": (0, 3), "adapted": (0, 4), "saved": (2, 4)}
    gradients, pieces = room[kind]
    assert memory.largest == max(piece, weight * (gradients > 0))
    assert memory.peak <= gradients * weight + pieces * piece


@pytest.mark.parametrize("lengths", [[5, 5, 5], [7, 1, 6, 40, 7, 2], [9], [3, 0, 4]], ids=str)
@pytest.mark.parametrize("causal", [True, False])
def test_segments_attend_to_themselves_alone(lengths, causal):
    generator = torch.Generator().manual_seed(sum(lengths))
    total = sum(lengths)
    query, key, value = (torch.randn(heads, total, 8, generator=generator) for heads in (4, 2, 2))
    ends = torch.tensor([0, *lengths]).cumsum(0).int()
    got = segment_attention(query, key, value, Segments(ends, max(lengths)), causal=causal, scale=0.3)
    key, value = (tensor.repeat_interleave(2, dim=0) for tensor in (key, value))
    expected = []
    for start, end in pairwise(ends):
        scores = query[:, start:end] @ key[:, start:end].mT * 0.3
        if causal:
            scores = scores + torch.full_like(scores, -torch.inf).triu(1)
        expected.append(scores.softmax(-1) @ value[:, start:end])
    assert torch.allclose(got, torch.cat(expected, 1).transpose(0, 1), atol=1e-6)


def test_segments_are_demanded():
    module = torch.nn.Module()
    module.is_causal = True
    rows = [torch.zeros(2, 4, 3, 8)] * 3
    with pytest.raises(ValueError, match="segments"):
        attention._interface(module, *rows, None)


@pytest.mark.skipif(
    not torch.cuda.is_available(), reason="variable-length kernels need a CUDA device, none here"
)
@pytest.mark.parametrize("causal", [True, False])
def test_cuda_kernels_equal_the_exact_path(causal):
    generator = torch.Generator("cuda").manual_seed(0)
    lengths = [70, 3, 129, 64]
    ends = torch.tensor([0, *lengths], device="cuda").cumsum(0).int()
    segments = Segments(ends, max(lengths))
    rows = [torch.randn(h, sum(lengths), 64, device="cuda", generator=generator) for h in (8, 2, 2)]
    half = [row.bfloat16().requires_grad_() for row in rows]
    full = [row.detach().float().requires_grad_() for row in half]
    got = segment_attention(*half, segments, causal=causal)
    expected = segment_attention(*full, segments, causal=causal)
    assert torch.allclose(got.float(), expected, atol=2e-2)
    got.float().square().sum().backward()
    expected.square().sum().backward()
    for a, b in zip(half, full, strict=True):
        assert (a.grad.float() - b.grad).norm() / b.grad.norm() < 2e-2


def test_batch_accumulation_and_processes_take_the_same_steps(checkpoints, dataset, tmp_path, in_pieces):
    """Batch 8, accumulation 8, two processes with 4 each and logits in pieces: the same losses and gradient
    norms.
    """
    common = [
        "--model_name_or_path", checkpoints["qwen3_vl"], "--dataset_use", "many", "--dataset_config", dataset,
        "--tune_mm_llm", "True", "--tune_mm_mlp", "True", "--tune_mm_vision", "True",
        "--learning_rate", "1e-3",
        "--num_train_epochs", "2", "--logging_steps", "1", "--save_strategy", "no", "--disable_tqdm", "True",
        "--weight_decay", "0.1", "--warmup_ratio", "0.2",
    ]  # fmt: skip
    sizes = {
        "batch": ["--per_device_train_batch_size", "8"],
        "accumulated": ["--per_device_train_batch_size", "1", "--gradient_accumulation_steps", "8"],
        "processes": ["--per_device_train_batch_size", "4"],
        "padded": ["--per_device_train_batch_size", "8", "--data_flatten", "False"],
    }
    curves = {}
    for name, size in sizes.items():
        flags = [*map(str, common), *size, "--output_dir", str(tmp_path / name)]
        if name == "processes":
            torchrun(2, in_pieces, flags, cwd=ROOT)
        else:
            train(*parse(*flags))
        history = json.loads((tmp_path / name / "trainer_state.json").read_text())["log_history"]
        curves[name] = [(line["loss"], line["grad_norm"]) for line in history if "loss" in line]
        assert len(curves[name]) == 6
    assert curves["batch"][0][0] > 1.1 * curves["batch"][-1][0]
    for name, curve in curves.items():
        assert torch.allclose(torch.tensor(curve), torch.tensor(curves["batch"]), rtol=2e-5, atol=0), name


def torchrun(processes: int, script: Path, flags: list[str], cwd: Path) -> str:
    """A training script as users start it; returns what it printed."""
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={processes}"]
    command += ["--master_port=0", "--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0"]
    command += [str(script), *flags, *SMALL]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    return done.stderr
