"""The numbers of the training log: arithmetic as PyTorch's own counter has it, losses as an evaluation has
them, times by a clock that is set by hand; and a run by the public command, read back from TensorBoard.
"""

import json
import os
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.flop_counter import FlopCounterMode

import qwenvl.train
from qwenvl.data.flops import MultiplyAdds
from qwenvl.nano import nano_model
from qwenvl.train import metering
from qwenvl.train.metering import Meter, Work, passes
from qwenvl.train.parameters import component_of

PACKAGE = Path(qwenvl.train.__path__[0]).parents[1]
NANO = PACKAGE.parent / "models" / "qwen3-vl-nano"
# Time, height and width in patches: several windows of Qwen2.5-VL with a rest on either side, and a video.
IMAGE, VIDEO = (1, 10, 22), (2, 8, 4)


def one_sample(config) -> dict[str, torch.Tensor]:
    """A batch of one sample with a picture and a video, [1, S]; the last nine tokens carry loss."""
    vision, random = config.vision_config, torch.Generator().manual_seed(0)
    width = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    ids, batch = [5, 6], {}
    for kind, grid in ("image", IMAGE), ("video", VIDEO):
        tokens = grid[0] * grid[1] * grid[2] // vision.spatial_merge_size**2
        ids += [getattr(config, f"{kind}_token_id")] * tokens + [7]
        batch[f"{kind}_grid_thw"] = torch.tensor([grid])
        pixels = torch.randn(grid[0] * grid[1] * grid[2], width, generator=random)
        batch["pixel_values" if kind == "image" else "pixel_values_videos"] = pixels
    ids = torch.tensor([ids + list(range(20, 40))])
    labels = torch.full_like(ids, -100)
    labels[0, -9:] = ids[0, -9:]
    positions = torch.arange(ids.shape[1]).expand(3, 1, -1)
    return batch | {"input_ids": ids, "labels": labels, "attention_mask": torch.ones_like(ids),
                    "position_ids": positions}  # fmt: skip


def count(model, batch, *, backward: bool = False) -> FlopCounterMode:
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    with FlopCounterMode(display=False) as counter, nullcontext() if backward else torch.no_grad():
        logits = model(**inputs, logits_to_keep=torch.arange(-10, -1), use_cache=False).logits
        if backward:
            logits.sum().backward()
    return counter


def eager(family: str):
    """A nano model whose every multiplication the counter sees."""
    model = nano_model(family)
    model.set_attn_implementation("eager")
    if family.endswith("_moe"):
        model.set_experts_implementation("eager")
    return model


def meter_of(model, names=("a",), **more) -> Meter:
    options = dict(pack_tokens=None, pack_patches=None, peak=None)
    return Meter(model, model.config, list(names), **options | more)


def test_the_arithmetic_is_what_the_counter_counts(family):
    """All but causal attention, of which eager code computes the half above the diagonal too."""
    model = eager(family)
    batch = one_sample(model.config)
    counts = count(model, batch).get_flop_counts()
    by_name = {name: sum(each.values()) for name, each in counts.items()}
    total = by_name["Global"]
    kind = type(model).__name__
    visual = by_name[f"{kind}.model.visual"]
    cost = MultiplyAdds.of(model.config)
    length = batch["input_ids"].shape[1]
    towers = [cost.vision(batch[f"{medium}_grid_thw"]) for medium in ("image", "video")]
    assert 2 * sum(float(tower + merger) for tower, merger in towers) == pytest.approx(visual, rel=1e-9)
    language = 2 * float(cost.language(torch.tensor([length]), torch.tensor(9)))
    half = 2 * cost.square * length**2
    assert language + half + 2 * in_chunks(model.config, length) == pytest.approx(total - visual, rel=1e-9)


def in_chunks(config, length: int) -> int:
    """Multiply-adds that the library's linear attention spends beyond the recurrence, in all layers.

    It fills up chunks of 64, multiplies keys, queries and values within each, and convolves beyond the end.
    """
    text = config.text_config.to_dict()
    layers = text.get("layer_types", ()).count("linear_attention")
    if not layers:
        return 0
    heads, key, value = (
        text["linear_num_value_heads"],
        text["linear_key_head_dim"],
        text["linear_value_head_dim"],
    )
    filled = -(-length // 64) * 64
    within = filled * heads * 64 * (2 * key + value) + (filled - length) * heads * 3 * key * value
    taps = text["linear_conv_kernel_dim"]
    channels = 2 * text["linear_num_key_heads"] * key + heads * value
    return layers * (within + (taps - 1) * taps * channels)


@pytest.mark.parametrize(
    "trained", ["vision merger language", "language", "merger", "vision", "merger language"]
)
def test_passes_are_those_of_the_backward(trained):
    model = eager("qwen3_vl")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(component_of(name) in trained.split())
    batch = one_sample(model.config)
    found = count(model, batch, backward=True).get_total_flops()
    work = Work(*meter_of(model).work(batch).tolist())
    cost, length = MultiplyAdds.of(model.config), batch["input_ids"].shape[1]
    upper = 2 * passes(model)["language"] * cost.square * length**2  # above the diagonal
    # The first layer of what is trained has no need of its input's gradient.
    assert work.vision + work.language + upper == pytest.approx(found, rel=0.04)


def test_adapters_need_the_way_back_but_no_gradient_of_the_weights():
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=4, target_modules=r".*language_model.*\.(q_proj|v_proj)")
    model = get_peft_model(nano_model("qwen3_vl"), config)
    assert passes(model) == {"vision": 1, "merger": 1, "language": 2}


class Clock:
    """Set by hand."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        patch.setattr(metering, "time", SimpleNamespace(perf_counter=lambda: self.now))


def test_times_and_rates(monkeypatch):
    clock = Clock(monkeypatch)
    meter = meter_of(nano_model("qwen3_vl"), peak=2.0, pack_tokens=100, pack_patches=400)
    with meter.waiting():
        clock.now += 2
    clock.now += 6
    with meter.paused():  # an evaluation
        clock.now += 1000
    meter.add(Work(10, 4, 150, 0, 600, 8e12, 4e12), batches=2)
    numbers = meter.report(Accelerator(cpu=True))
    memory = numbers.pop("memory_gib")
    assert 0.05 < memory < 100
    assert numbers == {
        "samples_per_second": 0.5, "tokens_per_second": 18.8, "fill": 0.75, "patch_fill": 0.75,
        "tflops_vision": 1.0, "tflops_language": 0.5, "mfu": 0.75, "mfu_vision": 0.5, "mfu_language": 0.25,
        "data_wait": 0.25,
    }  # fmt: skip
    clock.now += 5  # Nothing of the line before is left.
    after = meter.report(Accelerator(cpu=True))
    assert after["tokens_per_second"] == after["data_wait"] == after["mfu"] == 0


# ---- by the command


@pytest.fixture(scope="module")
def data(tmp_path_factory, pictures, clip) -> Path:
    """`shapes`, 8 rows with a picture; `mixed`, 8 rows: text, pictures, a video, answers of other weight."""
    folder = tmp_path_factory.mktemp("metered")
    shapes = json.loads((PACKAGE / "demo" / "single_images.json").read_text())[:8]
    for each in shapes:
        each["image"] = str(PACKAGE / "demo" / each["image"])
    mixed = []
    for number in range(8):
        media = [("", {}), ("<image>", {"image": "a.png"}), ("<video>", {"video": str(clip)})][number % 3]
        turns = [{"from": "human", "value": f"{media[0]}Which?"}, {"from": "gpt", "value": "blue " * number}]
        turns += [{"from": "human", "value": "Sure?"}, {"from": "gpt", "value": "yes", "weight": 0.25}]
        turns[1]["value"] = turns[1]["value"].strip() or "none"
        mixed.append({"conversations": turns, **media[1]})
    table = ""
    for name, rows in {"shapes": shapes, "mixed": mixed}.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(each) + "\n" for each in rows))
        table += f'[{name}]\nannotation_path = "{name}.jsonl"\ndata_path = "{pictures}"\n'
    (folder / "data.toml").write_text(table)
    return folder / "data.toml"


def run(processes: int, data: Path, output: Path, **more) -> list[dict]:
    """One epoch at learning rate 0 with one line of the log, then an evaluation; the log."""
    values = dict(
        model_name_or_path=NANO, output_dir=output, dataset_config=data, dataset_use="shapes,mixed",
        eval_dataset_use="shapes,mixed", tune_mm_llm=True, learning_rate=0, num_train_epochs=1,
        min_pixels=3136, max_pixels=16384, video_min_pixels=3136, video_max_pixels=12544, video_max_frames=4,
        per_device_train_batch_size=2, model_max_length=512, logging_strategy="epoch", save_strategy="no",
        report_to="none", disable_tqdm=True,
    ) | more  # fmt: skip
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    words.append(str(PACKAGE / "qwenvl" / "train" / "train_qwen.py"))
    words += [str(word) for name, value in values.items() for word in (f"--{name}", value)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads((output / "trainer_state.json").read_text())["log_history"]


def check_losses(log: list[dict]) -> dict:
    """At rate 0 a data set's loss over an epoch is what the evaluation finds. Returns the training's line."""
    [line] = [line for line in log if "loss" in line]
    [found] = [line for line in log if "eval_loss" in line]
    for name in "shapes", "mixed":
        assert line[f"loss/{name}"] == pytest.approx(found[f"eval_{name}/loss"], abs=1e-5)
    assert found["eval_shapes/loss"] != pytest.approx(found["eval_mixed/loss"], abs=0.1)
    return line


def test_a_padded_run_on_two_processes_logs_it_all_to_tensorboard(data, tmp_path):
    log = run(2, data, tmp_path, data_flatten=False, report_to="tensorboard", peak_tflops=0.5)
    line = check_losses(log)
    events = EventAccumulator(str(next(tmp_path.rglob("events.out.*")).parent))
    events.Reload()
    names = "samples_per_second tokens_per_second fill tflops_vision tflops_language mfu mfu_vision "
    names += "mfu_language data_wait memory_gib loss loss/shapes loss/mixed"
    for name in names.split():
        [point] = events.Scalars(f"train/{name}")
        assert point.value == pytest.approx(line[name], rel=1e-5), name
    assert 0.3 < line["fill"] < 1
    assert line["mfu"] == pytest.approx(line["mfu_vision"] + line["mfu_language"], rel=1e-3)
    assert 0 < line["data_wait"] < 1
    rates = line["tflops_vision"] + line["tflops_language"]
    assert rates / 0.5 == pytest.approx(line["mfu"], rel=1e-3)


def test_a_packed_run_knows_its_data_sets_and_how_full_its_packs_are(data, tmp_path):
    log = run(1, data, tmp_path, data_packing=True, pack_max_patches=900, per_device_train_batch_size=1)
    line = check_losses(log)
    assert max(line["fill"], line["patch_fill"]) > 0.6
    assert "mfu" not in line


def test_a_streamed_run_knows_its_data_sets(data, tmp_path):
    steps = dict(max_steps=8, logging_strategy="steps", logging_steps=8)
    line = check_losses(
        run(1, data, tmp_path, data_flatten=True, streaming=True, streaming_buffer=1, **steps)
    )
    assert "fill" not in line and "patch_fill" not in line
