"""tools/extend_context.py: a stretched checkpoint holds YaRN's numbers, answers, trains; vLLM's flag."""

import json
import math
import subprocess
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

ROOT = Path(__file__).resolve().parents[2]
TOOL = ROOT / "qwen-vl-finetune/tools/extend_context.py"
NANO = ROOT / "models/qwen3-vl-nano"


@pytest.fixture(scope="module")
def tool():
    spec = spec_from_file_location("extend_context", TOOL)
    assert spec is not None and spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def long_nano(tmp_path_factory) -> tuple[Path, str]:
    """The trained nano for three times its 4096 tokens, by the public command; and what it printed."""
    folder = tmp_path_factory.mktemp("context") / "long"
    command = [sys.executable, TOOL, "--model_name_or_path", NANO, "--output_dir", folder]
    done = subprocess.run(
        [*map(str, command), "--target_length", "12288"], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return folder, done.stdout


def test_frequencies_are_those_of_the_formula(family, tool, checkpoints, tmp_path):
    tool.extend(checkpoints[family], tmp_path, 12288)
    model = AutoModelForImageTextToText.from_pretrained(tmp_path)
    before = AutoConfig.from_pretrained(checkpoints[family]).text_config.rope_parameters
    text = model.config.text_config
    assert text.max_position_embeddings == 12288
    for key in before.keys() - {"rope_type"}:
        assert text.rope_parameters[key] == before[key], key
    rotary = model.model.language_model.rotary_emb
    dim = 2 * len(rotary.inv_freq)
    # YaRN (arXiv 2309.00071), written out: a ramp between pairs that turn 32 times and once in 4096.
    low, high = (
        dim * math.log(4096 / (t * 2 * math.pi)) / (2 * math.log(before["rope_theta"])) for t in (32, 1)
    )
    low, high = max(math.floor(low), 0), min(math.ceil(high), dim - 1)
    for pair, frequency in enumerate(rotary.inv_freq.tolist()):
        plain = before["rope_theta"] ** (-2 * pair / dim)
        ramp = min(max((pair - low) / (high - low), 0), 1)
        assert frequency == pytest.approx(plain * (1 - ramp) + plain / 3 * ramp, rel=1e-5)
    assert rotary.attention_scaling == pytest.approx(0.1 * math.log(3) + 1)


def test_all_but_the_configuration_is_copied(long_nano):
    folder, _ = long_nano
    assert {path.name for path in folder.iterdir()} == {path.name for path in NANO.iterdir()}
    for path in NANO.iterdir():
        same = (folder / path.name).read_bytes() == path.read_bytes()
        assert same == (path.name != "config.json"), path.name


def test_short_text_is_read_nearly_as_before_and_long_text_at_all(long_nano):
    folder, _ = long_nano
    tokenizer = AutoProcessor.from_pretrained(folder).tokenizer
    plain, stretched = (AutoModelForImageTextToText.from_pretrained(path).eval() for path in (NANO, folder))
    ids = tokenizer("<|im_start|>user\nHow many objects are here?<|im_end|>\n", return_tensors="pt")[
        "input_ids"
    ]
    with torch.no_grad():
        before, after = (model(input_ids=ids).logits.log_softmax(-1) for model in (plain, stretched))
        far = stretched(input_ids=ids.repeat(1, 5000 // ids.shape[1]), logits_to_keep=1).logits
    assert 0 < (before.exp() * (before - after)).sum(-1).mean() < 0.1  # nats; nearly, not exactly
    assert torch.isfinite(far).all()
    answer = cast(Any, stretched).generate(input_ids=ids, max_new_tokens=3, min_new_tokens=3)
    assert answer.shape[1] == ids.shape[1] + 3


def test_vllm_gets_the_same_from_the_flag_that_is_printed(long_nano):
    folder, said = long_nano
    override = json.loads(said.split("--hf-overrides '")[1].split("'")[0])["text_config"]
    written = json.loads((folder / "config.json").read_text())["text_config"]
    assert override.items() <= written.items()
    served = subprocess.run(
        [Path(sys.executable).with_name("qwenvl-serve"), str(NANO), "--dry-run", "--long-context", "3"],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert served.returncode == 0, served.stderr
    launched = json.loads(served.stdout.split("--hf-overrides '")[1].split("'")[0])["text_config"]
    assert launched["max_position_embeddings"] == override["max_position_embeddings"]
    assert launched["rope_parameters"].items() <= override["rope_parameters"].items()


def test_it_trains(long_nano, tmp_path):
    folder, _ = long_nano
    demo = ROOT / "qwen-vl-finetune/demo/datasets.toml"
    command = [sys.executable, ROOT / "qwen-vl-finetune/qwenvl/train/train_qwen.py"]
    command += ["--model_name_or_path", folder, "--dataset_config", demo, "--dataset_use", "single_images"]
    command += ["--output_dir", tmp_path, "--tune_mm_llm", "True", "--max_steps", "2", "--report_to", "none"]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    trained, given = (AutoConfig.from_pretrained(path).text_config for path in (tmp_path, folder))
    assert trained.rope_parameters == given.rope_parameters
    assert trained.max_position_embeddings == 12288


def test_a_million_tokens_by_a_smaller_factor_from_the_published_form(tool, tmp_path):
    """config.json as published for transformers 4: `rope_scaling`, rope_theta beside it, 256K tokens."""
    source = tmp_path / "published"
    source.mkdir()
    config = json.loads((NANO / "config.json").read_text())
    text = config["text_config"]
    rope = text.pop("rope_parameters")
    text |= {"rope_theta": rope.pop("rope_theta"), "max_position_embeddings": 262144, "rope_scaling": rope}
    (source / "config.json").write_text(json.dumps(config))
    said = tool.extend(source, tmp_path / "long", 1_000_000, 3.0)
    assert "262144 -> 1000000 tokens by YaRN, factor 3 (positions up to 786432)" in said[0]
    text = AutoConfig.from_pretrained(tmp_path / "long").text_config
    assert text.rope_parameters["rope_theta"] == 5_000_000
    assert text.rope_parameters["mrope_section"] == [12, 10, 10]
    assert text.max_position_embeddings == 1_000_000


@pytest.mark.parametrize(
    ("length", "factor", "told"),
    [
        (4096, None, "reads 4096 tokens as it is"),
        (8192, 3.0, "at most 2"),
        (8192, 1.0, "above 1"),
    ],
)
def test_refusals(length, factor, told, tool, tmp_path):
    with pytest.raises(ValueError, match=told):
        tool.extend(NANO, tmp_path / "out", length, factor)
    assert not (tmp_path / "out").exists()


def test_neither_stretched_twice_nor_written_over(long_nano, tool, tmp_path):
    with pytest.raises(ValueError, match="'yarn' already"):
        tool.extend(long_nano[0], tmp_path / "out", 50_000)
    with pytest.raises(ValueError, match="is not empty"):
        tool.extend(NANO, long_nano[0], 12288)
    with pytest.raises(ValueError, match=r"no config\.json"):
        tool.extend(tmp_path, tmp_path / "out", 12288)


def test_a_wrong_frequency_is_noticed(long_nano, tool, monkeypatch):
    folder, _ = long_nano
    rope = json.loads((folder / "config.json").read_text())["text_config"]["rope_parameters"]
    tool.check(folder, rope, rope, 12288)
    plain = tool.ROPE_INIT_FUNCTIONS["yarn"]
    broken = {"yarn": lambda text, device: (plain(text, device)[0] / 3, plain(text, device)[1])}
    monkeypatch.setattr(tool, "ROPE_INIT_FUNCTIONS", broken)
    with pytest.raises(ValueError, match="fast frequencies are untouched"):
        tool.check(folder, rope, rope, 12288)
