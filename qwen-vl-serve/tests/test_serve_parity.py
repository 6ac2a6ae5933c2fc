"""One conversation, three ways to answer: transformers, vLLM offline and vLLM served give the same prompt ids
and the same tokens (fp32, greedy, 48 tokens), on checkpoints that this repository trained and saved."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import av
import pytest

from qwen_vl_serve import Finished, Reply, Sampling, open_backend
from qwen_vl_serve.launch import running_server

ROOT = Path(__file__).resolve().parents[2]
NANO = ROOT / "models/qwen3-vl-nano"
DEMO = ROOT / "qwen-vl-finetune/demo"
WORKER = Path(__file__).parent / "vllm_replies.py"
VLLM = ROOT / ".venv-vllm/bin/python"
SAMPLING = Sampling(temperature=0, max_new_tokens=48)
SCHEMA = {"type": "object", "properties": {"round": {"type": "boolean"}}, "required": ["round"]}
QUIET = {**os.environ, "HF_HUB_OFFLINE": "1", "VLLM_LOGGING_LEVEL": "WARNING"}


@dataclass(frozen=True)
class Trained:
    """A checkpoint, and perhaps an adapter over it."""

    checkpoint: Path
    adapter: Path | None = None


def train(base: Path, output: Path, *flags: str) -> Path:
    """A few steps of the public command at a rate that changes the answers."""
    command = [sys.executable, str(ROOT / "qwen-vl-finetune/qwenvl/train/train_qwen.py")]
    command += ["--model_name_or_path", str(base), "--output_dir", str(output)]
    command += ["--dataset_config", str(DEMO / "datasets.toml"), "--dataset_use", "single_images%50"]
    command += "--tune_mm_llm True --tune_mm_mlp True --tune_mm_vision True --data_flatten True".split()
    command += "--per_device_train_batch_size 2 --max_steps 3 --learning_rate 1e-4 --report_to none".split()
    command += ["--save_strategy", "no", "--disable_tqdm", "True", *flags]
    subprocess.run(command, check=True, capture_output=True, timeout=250, env=QUIET)
    return output


@pytest.fixture(scope="module", params=["nano and adapter", "dense", "moe"])
def trained(request, lively, tmp_path_factory) -> Trained:
    folder = tmp_path_factory.mktemp("trained")
    if request.param == "nano and adapter":
        lora = "--lora_enable True --lora_r 4 --learning_rate 5e-3".split()
        lora += "--tune_mm_vision False --tune_mm_mlp False".split()
        return Trained(NANO, train(NANO, folder / "lora", *lora) / "adapter")
    family = {"dense": "qwen3_vl", "moe": "qwen3_vl_moe"}[request.param]
    return Trained(train(lively(family), folder / family))


@pytest.fixture(scope="module")
def batch(pictures, clip, tmp_path_factory) -> list[list[dict]]:
    """Text, one picture, several, a video, a list of frames, all together; with options of items too."""
    frames = tmp_path_factory.mktemp("frames")
    with av.open(clip) as container:
        for index, frame in enumerate(container.decode(video=0)):
            frame.to_image().save(frames / f"{index}.png")
    frame_list = [str(frames / f"{index}.png") for index in range(6)]
    square, wide, small = [{"type": "image", "image": path} for path in pictures]
    video = {"type": "video", "video": clip}
    turns = [
        ["What is a circle?"],
        [square, "What do you see?"],
        [small, wide, square, "Compare these."],
        [video, "Where does it go?"],
        [{"type": "video", "video": frame_list, "sample_fps": 1.5, "raw_fps": 6.0}, "And when?"],
        [wide, "then", video, "then", {"type": "video", "video": frame_list[:4]}, small, "What changed?"],
        [{**square, "max_pixels": 96 * 96}, {**video, "nframes": 4, "video_start": 0.5}, "Small?"],
    ]
    batch = [[{"role": "user", "content": [_item(item) for item in content]}] for content in turns]
    answered = {"role": "assistant", "content": "Yes."}
    return [*batch, [{"role": "system", "content": "Be brief."}, *batch[1], answered, *batch[0]]]


def _item(item):
    return {"type": "text", "text": item} if isinstance(item, str) else item


@pytest.fixture(scope="module")
def expected(trained, batch) -> dict[str, list[Reply]]:
    """What transformers answers, one conversation at a time."""
    adapters = {"base": None, **({"adapter": trained.adapter} if trained.adapter else {})}
    replies = {}
    for name, adapter in adapters.items():
        backend = open_backend(trained.checkpoint, device="cpu", adapter=adapter)
        replies[name] = [backend.generate([messages], SAMPLING)[0] for messages in batch]
    return replies


@pytest.fixture(scope="module")
def offline(trained, batch, tmp_path_factory) -> dict:
    if not VLLM.exists():
        pytest.fail(".venv-vllm is missing: bash .ci/setup-vllm makes it")
    folder = tmp_path_factory.mktemp("offline")
    task = {"checkpoint": str(trained.checkpoint), "adapter": trained.adapter and str(trained.adapter)}
    task |= {"batch": batch, "max_new_tokens": SAMPLING.max_new_tokens, "json_schema": SCHEMA}
    (folder / "task.json").write_text(json.dumps(task))
    command = [str(VLLM), str(WORKER), str(folder / "task.json"), str(folder / "replies.json")]
    with (folder / "log").open("w") as log:
        done = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, timeout=280, env=QUIET)
    assert done.returncode == 0, (folder / "log").read_text()[-4000:]
    return json.loads((folder / "replies.json").read_text())


def reply(fields: dict) -> Reply:
    tuples = {name: tuple(fields[name]) for name in ("tool_calls", "token_ids", "prompt_token_ids")}
    return Reply(**{**fields, **tuples})


def test_the_reference_is_worth_comparing_with(expected):
    """Different prompts give different prompt ids; answers are long or end by themselves; adapters matter."""
    assert len({reply.prompt_token_ids for reply in expected["base"]}) == len(expected["base"])
    assert all(reply.finish_reason == "stop" or reply.completion_tokens == 48 for reply in expected["base"])
    if "adapter" in expected:
        assert expected["adapter"] != expected["base"]
    else:
        assert sum(reply.completion_tokens for reply in expected["base"]) > 100


def test_vllm_offline_answers_as_transformers(offline, expected):
    for name, replies in expected.items():
        assert [reply(fields) for fields in offline[name]["generated"]] == replies
        assert [reply(fields) for fields in offline[name]["streamed"]] == replies
        for pieces, whole in zip(offline[name]["pieces"], replies, strict=True):
            assert "".join(pieces) == whole.text
            assert len(pieces) > 1 or whole.completion_tokens < 4  # it streams


def test_vllm_offline_holds_an_answer_to_a_schema_and_frees_a_closed_stream(offline):
    for fields in offline["constrained"]:
        assert json.loads(fields["text"]) in ({"round": True}, {"round": False})
    assert offline["unfinished"] == 0


def whole_characters(reply: Reply) -> Reply:
    """Of a character that the limit on tokens cut through the server keeps the beginning to itself, where the
    others show U+FFFD.
    """
    cut = reply.finish_reason == "length"
    return replace(reply, text=reply.text.rstrip("\ufffd")) if cut else reply


def test_vllm_served_answers_as_transformers(trained, batch, expected):
    flags = ["--enable-lora", "--lora-modules", f"tuned={trained.adapter}"] if trained.adapter else []
    with running_server(trained.checkpoint, "--served-model-name", "base", *flags) as url:
        for name, replies in expected.items():
            served = {"base": "base", "adapter": "tuned"}[name]
            backend = open_backend(url, name=served, token_ids=True)
            whole_replies = [whole_characters(one) for one in replies]
            assert [whole_characters(one) for one in backend.generate(batch, SAMPLING)] == whole_replies
            for messages, whole in zip(batch, whole_replies, strict=True):
                *pieces, last = backend.stream(messages, SAMPLING)
                assert isinstance(last, Finished)
                assert whole_characters(last.reply) == whole
                assert "".join(piece.text for piece in pieces) == last.reply.text
            backend.close()
