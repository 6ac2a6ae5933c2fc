"""--too_long: what becomes of samples above --model_max_length, and that each policy says what it did."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import HfArgumentParser

from qwen_vl_utils import PromptSize
from qwenvl.data.budget import POLICIES, TooLong, fit
from qwenvl.data.data_processor import make_supervised_data_module
from qwenvl.data.messages import Sample
from qwenvl.train import train_qwen as module
from qwenvl.train.argument import DataArguments, ModelArguments, TrainingArguments
from qwenvl.train.model_loading import load_config, load_processor

SCRIPT = Path(module.__file__)
PACKER = SCRIPT.parents[2] / "tools" / "pack_data.py"
MEDIUM = 50


def tokens(sample: Sample) -> PromptSize:
    """A word a token, a medium fifty."""
    count = 0
    for message in sample.messages:
        content = message["content"]
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        count += 2 + sum(MEDIUM if part["type"] != "text" else len(part["text"].split()) for part in parts)
    return PromptSize(count, 0)


@st.composite
def samples(draw) -> Sample:
    messages = [{"role": "system", "content": "be brief"}] if draw(st.booleans()) else []
    weights = []
    for number in range(draw(st.integers(1, 6))):
        media = draw(st.lists(st.sampled_from(["image", "video"]), max_size=3))
        content = [{"type": kind, kind: f"{number}-{place}"} for place, kind in enumerate(media)]
        words = draw(st.integers(0 if media else 1, 40))
        content += [{"type": "text", "text": "word " * words}] if words else []
        messages.append({"role": "user", "content": content})
        if draw(st.booleans()):
            messages.append({"role": "assistant", "content": "", "tool_calls": [{"name": "look"}]})
            messages.append({"role": "tool", "content": "seen " * draw(st.integers(1, 9))})
            weights.append(draw(st.sampled_from([0.0, 1.0])))
        messages.append({"role": "assistant", "content": "answer " * draw(st.integers(1, 40))})
        weights.append(draw(st.sampled_from([0.0, 0.5, 1.0])))
    return Sample(messages, tuple([*weights[:-1], 1.0]))


@settings(max_examples=300)
@given(samples(), st.integers(5, 400), st.sampled_from(POLICIES))
def test_what_is_left_fits_and_is_a_sample(sample, limit, policy):
    whole = tokens(sample).tokens <= limit
    try:
        fitted = fit(sample, limit, policy, tokens)
    except TooLong as error:
        assert not whole
        assert str(tokens(sample).tokens) in str(error)
        return
    left = fitted.sample
    assert fitted.size == tokens(left) and fitted.size.tokens <= limit
    assert (left == sample) == whole
    if not whole:
        assert policy in ("drop_turns", "drop_media")
    assert fit(left, limit, policy, tokens).sample == left
    assert left.messages[-1]["role"] == "assistant"
    assert len(left.weights) == sum(message["role"] == "assistant" for message in left.messages)
    assert any(left.weights) and left.weights == sample.weights[: len(left.weights)]
    assert fitted.turns == len(sample.messages) - len(left.messages)
    if policy == "drop_turns":
        assert left.messages == sample.messages[: len(left.messages)]
    stay = [item for item in sample.media()][: len(list(left.media()))]
    assert list(left.media()) == stay
    assert all(message["content"] for message in left.messages if message["role"] == "user")


@settings(max_examples=300)
@given(samples(), st.integers(5, 400))
def test_no_more_goes_than_must(sample, limit):
    """One turn back, or one medium back, and it would not fit."""
    try:
        fitted = fit(sample, limit, "drop_turns", tokens)
    except TooLong:
        return
    if fitted.turns:
        ends = [n for n, message in enumerate(sample.messages, 1) if message["role"] == "assistant"]
        following = next(end for end in ends if end > len(fitted.sample.messages))
        longer = Sample(sample.messages[:following], sample.weights)
        assert tokens(longer).tokens > limit


@pytest.mark.parametrize("words", ["", "\n", "What?"])
def test_no_question_is_left_without_a_word(words):
    content = [{"type": "image", "image": "a"}] + ([{"type": "text", "text": words}] if words else [])
    sample = Sample([{"role": "user", "content": content}, {"role": "assistant", "content": "x"}], (1.0,))
    if words.strip():
        assert fit(sample, 20, "drop_media", tokens).media == 1
        return
    with pytest.raises(TooLong, match="drop_media finds nothing"):
        fit(sample, 20, "drop_media", tokens)


def test_few_measurements_find_what_fits():
    turns = [{"role": role, "content": "word"} for _ in range(2000) for role in ("user", "assistant")]
    measured = []

    def measure(sample: Sample) -> PromptSize:
        measured.append(len(sample.messages))
        return tokens(sample)

    assert fit(Sample(turns, (1.0,) * 2000), 3000, "drop_turns", measure).size.tokens == 3000
    assert len(measured) < 15


# ---- by the commands


@pytest.fixture(scope="module")
def data(tmp_path_factory, pictures) -> Path:
    """Row 0 fits; 1 is long by its turns, 2 by its pictures, 3 by one answer alone."""
    folder = tmp_path_factory.mktemp("long")

    def row(*turns: tuple[str, str], **media) -> dict:
        said = []
        for question, answer in turns:
            said += [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
        return {"conversations": said, **media}

    rows = [
        row(("<image>What?", "a star"), image="a.png"),
        row(("<image>What?", "a star"), *[("And now?", "red star " * 10)] * 6, image="a.png"),
        row(("<image><image><image>What?", "three stars"), image=["b.png", "b.png", "b.png"]),
        row(("What?", "red star " * 100)),
    ]
    (folder / "rows.json").write_text(json.dumps(rows))
    table = f'[rows]\nannotation_path = "rows.json"\ndata_path = "{pictures}"\n'
    (folder / "data.toml").write_text(table)
    return folder / "data.toml"


def flags(data: Path, checkpoint: Path, output: Path, **more) -> dict:
    return dict(
        model_name_or_path=str(checkpoint), output_dir=str(output), dataset_config=str(data),
        dataset_use="rows",        model_max_length=60, min_pixels=3136, max_pixels=16384,
    ) | more  # fmt: skip


def load(data, checkpoint, output, **more):
    parser = HfArgumentParser((ModelArguments, DataArguments, TrainingArguments))
    model_args, data_args, args = parser.parse_dict(flags(data, checkpoint, output, **more))
    return make_supervised_data_module(
        load_processor(model_args, data_args, args), data_args,
        model_config=load_config(model_args, args), model_max_length=args.model_max_length, seed=0,
    )["train_dataset"]  # fmt: skip


@pytest.mark.parametrize("packing", [False, True])
def test_each_policy_counts_what_it_did(data, checkpoints, tmp_path, caplog, packing):
    caplog.set_level("INFO", logger="qwenvl")
    seen = {}
    for policy in ("skip", "drop_turns", "drop_media"):
        caplog.clear()
        rows = load(
            data, checkpoints["qwen3_vl"], tmp_path, too_long=policy, data_packing=packing, bad_samples="skip"
        )
        lengths = [length for item in rows for length in item["segment_lengths"].tolist()]
        assert all(length <= 60 for length in lengths)
        lines = [line for line in caplog.messages if "gone:" in line or "left out" in line]
        seen[policy] = (len(lengths), [line.partition(": ")[2] for line in lines])
    assert seen["skip"] == (1, ["left out 3 rows above --model_max_length"])
    count, [line] = seen["drop_turns"]
    assert (
        count == 2
        and line.startswith("shortened 1 samples")
        and line.endswith(" turns, 0 pictures and videos")
    )
    count, [line] = seen["drop_media"]
    assert count == 2 and line.startswith("shortened 1 samples") and "gone: 0 turns" in line


def test_without_the_flag_a_long_row_stops_the_run(data, checkpoints, tmp_path):
    rows = load(data, checkpoints["qwen3_vl"], tmp_path)
    with pytest.raises(ValueError, match=r"row 1 .*exceed --model_max_length 60; raise it"):
        rows[1]
    with pytest.raises(ValueError, match="--too_long drop_turns finds nothing that makes it fit"):
        load(data, checkpoints["qwen3_vl"], tmp_path, too_long="drop_turns")


def run(script: Path, values: dict) -> subprocess.CompletedProcess[str]:
    words = [word for name, value in values.items() for word in (f"--{name}", str(value))]
    return subprocess.run([sys.executable, str(script), *words], capture_output=True, text=True, timeout=200)


def test_the_command_trains_on_shortened_samples_and_says_so(data, checkpoints, tmp_path):
    values = flags(data, checkpoints["qwen3_vl"], tmp_path, too_long="drop_turns", bad_samples="skip")
    done = run(SCRIPT, values | {"max_steps": 1, "report_to": "none", "tune_mm_llm": True})
    assert done.returncode == 0, done.stderr[-3000:]
    assert "training: shortened 1 samples to --model_max_length; gone:" in done.stderr


def test_where_a_policy_cannot_hold_it_is_refused(data, checkpoints, tmp_path):
    streamed = run(SCRIPT, flags(data, checkpoints["qwen3_vl"], tmp_path, too_long="skip", streaming=True))
    assert streamed.returncode != 0 and "leave out --streaming" in streamed.stderr
    values = flags(data, checkpoints["qwen3_vl"], tmp_path, too_long="drop_media")
    packed = run(PACKER, values | {"output": tmp_path / "packs.json"})
    assert packed.returncode != 0 and "packs hold rows as they are" in packed.stderr
