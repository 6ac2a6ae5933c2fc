"""A MoE's balancing loss and the statistics of its routers, against plain loops; and its training.

The runs are two processes on the demo pictures: plain, ZeRO-2 and ZeRO-3 take the same steps and write the
same published layout.  That vLLM answers from a tuned MoE: qwen-vl-serve/tests/test_serve_parity.py.
"""

import importlib.util
import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForImageTextToText

import qwenvl.train
from qwenvl.nano import nano_model, write_checkpoint
from qwenvl.train import experts
from qwenvl.train.argument import TrainingArguments
from qwenvl.train.expert_layout import publish
from qwenvl.train.experts import ExpertBalance, balance_coefficient, find_routers

PACKAGE = Path(qwenvl.train.__path__[0]).parents[1]
LENGTHS = (5, 9, 3)
TOKENS = sum(LENGTHS)


def arguments(**more) -> TrainingArguments:
    return TrainingArguments(output_dir="unused", report_to="none", **more)


def reference(layers: list[torch.Tensor], top_k: int) -> float:
    """The balancing loss of [tokens, experts] logits without padding, token by token."""
    losses = []
    for logits in layers:
        tokens, experts = logits.shape
        share, probability = [0.0] * experts, [0.0] * experts
        for row in logits.tolist():
            exponents = [math.exp(x - max(row)) for x in row]
            for expert in sorted(range(experts), key=lambda e: -row[e])[:top_k]:
                share[expert] += 1 / tokens
            for expert in range(experts):
                probability[expert] += exponents[expert] / sum(exponents) / tokens
        losses.append(experts * sum(s * p for s, p in zip(share, probability, strict=True)))
    return sum(losses) / len(losses)


class Products(TorchDispatchMode):
    """The dtypes of the weights that grouped matrix products are computed of."""

    def __init__(self) -> None:
        super().__init__()
        self.dtypes: set[torch.dtype] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if "grouped_mm" in str(func):
            self.dtypes.add(args[1].dtype)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("family", ["qwen3_vl_moe", "qwen3_5_moe"])
def test_experts_compute_in_autocasts_dtype(family):
    """As all other layers do; without autocast as ever, and gradients always have the weights' dtype."""
    model = nano_model(family, seed=5).float()
    layer = model.model.language_model.layers[-1].mlp.experts
    random = torch.Generator().manual_seed(0)
    hidden = torch.randn(40, model.config.text_config.hidden_size, generator=random)
    chosen = torch.rand(40, layer.num_experts, generator=random).argsort(-1)[:, :2]

    def output_and_gradient() -> tuple[torch.Tensor, torch.Tensor]:
        model.zero_grad()
        output = layer(hidden, chosen, torch.full((40, 2), 0.5))
        output.square().sum().backward()
        return output.detach(), layer.down_proj.grad.clone()

    expected = output_and_gradient()
    experts.follow_autocast(model)
    for found, right in zip(output_and_gradient(), expected, strict=True):
        assert torch.equal(found, right)
    with torch.autocast("cpu", torch.bfloat16), Products() as products:
        rounded = output_and_gradient()
    assert products.dtypes == {torch.bfloat16}
    for found, right in zip(rounded, expected, strict=True):
        assert found.dtype == torch.float32
        assert 0 < (found - right).norm() < 0.02 * right.norm()


@pytest.fixture(scope="module")
def moe():
    model = nano_model("qwen3_vl_moe", seed=5).float().train()
    for router in find_routers(model):
        torch.nn.init.normal_(router.weight, std=0.3)  # far from even
    return model


@pytest.fixture(scope="module")
def texts() -> list[torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    return [torch.randint(10, 200, (length,), generator=draw) for length in LENGTHS]


def padded(texts) -> dict:
    ids = torch.nn.utils.rnn.pad_sequence(texts, batch_first=True, padding_value=7)
    mask = torch.arange(ids.shape[1]) < torch.tensor([len(text) for text in texts])[:, None]
    return {"input_ids": ids, "attention_mask": mask.long()}


def flattened(texts) -> dict:
    """The texts in one row; the model library keeps them apart where row 0 of the positions starts anew."""
    places = torch.cat([torch.arange(len(text)) for text in texts])
    return {
        "input_ids": torch.cat(texts)[None],
        "position_ids": places.expand(4, 1, -1),
    }


def run(model, balance, batch, tokens=TOKENS, reduce=lambda part: part):
    with balance.recording():
        model(**batch, use_cache=False)
    return balance.loss(batch, tokens, reduce)


def router_gradients(model, loss) -> list[torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return [router.weight.grad.clone() for router in find_routers(model)]


def test_padded_and_flattened_batches_have_the_loss_of_plain_loops_over_their_tokens(moe, texts):
    balance = ExpertBalance(moe)
    recorded = []
    for text in texts:  # Alone, no sample has padding or neighbours.
        with balance.recording():
            moe(input_ids=text[None], use_cache=False)
        recorded.append([logits.detach() for logits in balance._logits])
    together = [torch.cat(layer) for layer in zip(*recorded, strict=True)]
    expected = reference(together, balance.top_k)
    assert expected > 1.05 * balance.top_k  # else an even load would pass too
    one = run(moe, balance, padded(texts))
    gradients = router_gradients(moe, one)
    other = run(moe, balance, flattened(texts))
    assert one.item() == pytest.approx(expected, rel=1e-5)
    assert other.item() == pytest.approx(expected, rel=1e-5)
    for left, right in zip(gradients, router_gradients(moe, other), strict=True):
        assert left.norm() > 0 and (left - right).norm() <= 1e-4 * left.norm()
    with_padding = dict(padded(texts), attention_mask=torch.ones(3, max(LENGTHS), dtype=torch.long))
    assert abs(run(moe, balance, with_padding, 3 * max(LENGTHS)).item() - expected) > 1e-3


def test_the_parts_of_two_ranks_add_up_to_one_rank_with_both(moe, texts):
    whole = router_gradients(moe, run(moe, ExpertBalance(moe), padded(texts)))
    loads, parts = [], []
    for own in (texts[:1], texts[1:]):  # What each rank would give to the sum over ranks.
        run(moe, ExpertBalance(moe), padded(own), reduce=lambda part: loads.append(part) or part)
    for own in (texts[:1], texts[1:]):
        part = run(moe, ExpertBalance(moe), padded(own), reduce=lambda part: loads[0] + loads[1])
        parts.append(router_gradients(moe, part))
    for both, first, second in zip(whole, *parts, strict=True):
        assert (both - first - second).norm() <= 1e-4 * both.norm()


def test_gradient_checkpointing_changes_nothing(moe, texts):
    plain = router_gradients(moe, run(moe, ExpertBalance(moe), padded(texts)))
    moe.gradient_checkpointing_enable({"use_reentrant": False})
    balance = ExpertBalance(moe)
    again = router_gradients(moe, run(moe, balance, padded(texts)))
    moe.gradient_checkpointing_disable()
    assert balance._logits == []  # The second forward pass is not recorded.
    for left, right in zip(plain, again, strict=True):
        assert (left - right).norm() <= 1e-5 * left.norm()


def test_statistics_count_the_tokens_since_the_last_call(moe):
    balance = ExpertBalance(moe)
    # Two layers, four experts, two tokens, two experts a token: even, then the same two experts for both.
    even = torch.tensor([[9.0, 8, 0, 0], [0, 0, 9, 8]])
    piled = torch.tensor([[9.0, 8, 0, 0], [8, 9, 0, 0]])
    added = torch.tensor([[0.0, 0, 0, 9]])  # A token behind the batch, for something to be seen: not counted.
    balance._logits = [torch.cat([even, added]), torch.cat([piled, added])]
    batch = {"input_ids": torch.zeros(1, 2)}
    expected = reference([even, piled], 2)
    assert balance.loss(batch, 2, lambda part: part).item() == pytest.approx(expected, rel=1e-5)
    assert balance.statistics() == {
        "router_balance_loss": pytest.approx(expected, abs=1e-4),
        "router_busiest": 2.0,
        "router_entropy": pytest.approx(0.75),
        "router_unused": 2,
    }
    assert balance.statistics() == {}


def test_the_coefficient_is_the_checkpoints_where_routers_are_trained(moe):
    named = moe.config.text_config.router_aux_loss_coef
    assert named > 0 and balance_coefficient(moe, arguments()) == named
    assert balance_coefficient(moe, arguments(router_aux_loss_coef=0.0)) == 0
    assert balance_coefficient(moe, arguments(router_aux_loss_coef=0.02)) == 0.02
    moe.requires_grad_(False)
    assert balance_coefficient(moe, arguments()) == 0
    with pytest.raises(ValueError, match=r"--router_aux_loss_coef 0\.02: the routers are frozen"):
        balance_coefficient(moe, arguments(router_aux_loss_coef=0.02))
    moe.requires_grad_(True)
    with pytest.raises(ValueError, match=r"--router_aux_loss_coef -1: give 0 or more"):
        balance_coefficient(moe, arguments(router_aux_loss_coef=-1))
    reentrant = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}}
    with pytest.raises(ValueError, match="use_reentrant"):
        balance_coefficient(moe, arguments(**reentrant))
    with pytest.raises(ValueError, match="qwen3_vl has no experts"):
        balance_coefficient(nano_model("qwen3_vl"), arguments(router_aux_loss_coef=0.02))


def train(output: Path, checkpoint: Path, *more: str) -> list[dict]:
    """Lines of the log of three steps of two processes, every component trained."""
    flags = ["--model_name_or_path", checkpoint, "--dataset_config", PACKAGE / "demo" / "datasets.toml"]
    flags += ["--dataset_use", "single_images", "--output_dir", output, "--router_aux_loss_coef", "0.5"]
    flags += ["--tune_mm_llm", "True", "--tune_mm_mlp", "True", "--tune_mm_vision", "True"]
    flags += ["--per_device_train_batch_size", "3", "--max_steps", "3", "--learning_rate", "1e-3"]
    flags += ["--logging_steps", "1", "--report_to", "none", "--save_strategy", "no", *more]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command += [str(PACKAGE / "qwenvl" / "train" / "train_qwen.py"), *map(str, flags)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-4000:]
    history = json.loads((output / "trainer_state.json").read_text())["log_history"]
    return [line for line in history if "loss" in line]


@pytest.fixture(scope="module")
def sharded(tmp_path_factory) -> Path:
    """A MoE in several files of the published layout, as the large ones are."""
    folder = write_checkpoint("qwen3_vl_moe", tmp_path_factory.mktemp("sharded") / "moe")
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="8MB")
    publish(folder)
    assert len(list(folder.glob("*.safetensors"))) > 2
    return folder


@pytest.fixture(scope="module")
def plain(sharded, tmp_path_factory) -> tuple[list[dict], Path]:
    folder = tmp_path_factory.mktemp("plain_moe")
    return train(folder, sharded, "--data_flatten", "True"), folder


def test_training_logs_the_routers_and_the_saved_folder_loads(plain):
    lines, folder = plain
    for line in lines:
        assert line["router_balance_loss"] >= 1.9 and line["router_busiest"] >= 1
        assert 0 < line["router_entropy"] <= 1 and line["router_unused"] >= 0
    assert lines[-1]["loss"] < lines[0]["loss"]
    text = json.loads((folder / "config.json").read_text())["text_config"]
    published = (text["num_local_experts"], text["hidden_size"], 2 * text["moe_intermediate_size"])
    with safe_open(folder / "model.safetensors", "pt") as file:
        names = [name for name in file.keys() if name.endswith("gate_up_proj")]  # noqa: SIM118
        assert len(names) == text["num_hidden_layers"]
        assert all(tuple(file.get_slice(name).get_shape()) == published for name in names)


@pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None or shutil.which("c++") is None,
    reason="the extra `deepspeed` and a C++ compiler are needed; CI installs both: uv pip install -e "
    "'qwen-vl-finetune[deepspeed]'",
)
@pytest.mark.timeout(600)  # DeepSpeed compiles its first operator for a minute.
@pytest.mark.parametrize("stage", ["zero2", "zero3"])
def test_zero_tunes_all_of_a_moe_with_the_steps_of_plain_processes(stage, plain, sharded, tmp_path):
    lines, folder = plain
    settings = PACKAGE / "scripts" / f"{stage}.json"
    split = train(tmp_path, sharded, "--data_flatten", "True", "--deepspeed", str(settings))
    for one, other in zip(lines, split, strict=True):
        assert other["loss"] == pytest.approx(one["loss"], rel=1e-4)
        assert other["router_balance_loss"] == pytest.approx(one["router_balance_loss"], rel=1e-3)
    weights, saved = load_file(folder / "model.safetensors"), load_file(tmp_path / "model.safetensors")
    assert set(weights) <= set(saved) <= {*weights, "lm_head.weight"}
    for name, weight in weights.items():
        assert saved[name].shape == weight.shape, name
        assert (saved[name] - weight).norm() <= 1e-3 * weight.norm() + 1e-6, name
    models = [
        AutoModelForImageTextToText.from_pretrained(path, dtype=torch.float32) for path in (folder, tmp_path)
    ]
    ids = torch.arange(20, 40)[None]
    with torch.no_grad():
        expected, answered = (model(input_ids=ids).logits for model in models)
    assert torch.allclose(expected, answered, atol=1e-3)
