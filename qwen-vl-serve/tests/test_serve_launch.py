"""qwenvl-serve --dry-run: the command for each machine and wish, and vLLM's own parser takes every one."""

import json
import os
import shlex
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from qwen_vl_serve.launch import running_server
from qwen_vl_serve.profiles import PROFILES
from qwen_vl_serve.ready import NotReady
from qwenvl.nano import nano_model

ROOT = Path(__file__).resolve().parents[2]
NANO = str(ROOT / "models/qwen3-vl-nano")
VLLM_PYTHON = ROOT / ".venv-vllm/bin/python"
# The README of Qwen3-VL gave this to older vLLM.
OLD_YARN = {"rope_type": "yarn", "factor": 3.0, "original_max_position_embeddings": 262144}
OLD_YARN |= {"mrope_section": [24, 20, 20], "mrope_interleaved": True}
WISHES = {
    **{profile: ["--profile", profile] for profile in PROFILES if profile != "moe-fp8"},
    "long context": ["--long-context"],
    "old yarn": ["--rope-scaling", json.dumps(OLD_YARN)],
    "images only": ["--images-only"],
    "frames": ["--client-frames", "--stock-media"],
    "thinking and tools": ["--reasoning", "--tools"],
    "user's": ["--limit-mm-per-prompt.image", "4", "--max-model-len=1024", "--port", "9000"],
}


@pytest.fixture
def gpus(tmp_path, monkeypatch):
    """Puts so many H100s into this machine, as far as nvidia-smi tells."""

    def put(count):
        lines = "".join(f"{i}, GPU-{i}, NVIDIA H100 80GB HBM3, 81559, 9.0\\n" for i in range(count))
        tool = tmp_path / "nvidia-smi"
        tool.write_text(f"#!/bin/sh\nprintf '{lines}'\n")
        tool.chmod(tool.stat().st_mode | stat.S_IXUSR)
        monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)

    return put


def dry(*arguments, model=NANO):
    """(environment, command, what is said on stderr) of the public command."""
    command = [str(Path(sys.executable).parent / "qwenvl-serve"), model, "--dry-run", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    words = shlex.split(done.stdout.replace("\\\n", " "))
    first = next(place for place, word in enumerate(words) if word.endswith("vllm"))
    return dict(word.split("=", 1) for word in words[:first]), words[first:], done.stderr


def after(command, flag):
    return command[command.index(flag) + 1]


def test_a_machine_without_a_gpu():
    environment, command, said = dry()
    assert command[1:3] == ["serve", NANO]
    assert (after(command, "--dtype"), after(command, "--host")) == ("float32", "127.0.0.1")
    assert environment["VLLM_CPU_KVCACHE_SPACE"] == "1"
    assert environment["VLLM_MEDIA_CONNECTOR"] == "qwen_vl_utils"
    assert json.loads(environment["QWENVL_MEDIA"]) == {"checkpoint": NANO, "policy": {}}
    assert json.loads(after(command, "--mm-processor-kwargs")) == {"do_resize": False}
    assert "profile cpu" in said


def test_one_gpu_and_many(gpus):
    gpus(1)
    environment, command, said = dry()
    assert "profile gpu " in said and "--tensor-parallel-size" not in command
    assert "VLLM_CPU_KVCACHE_SPACE" not in environment
    gpus(4)
    _, command, said = dry()
    assert "profile gpus" in said
    assert after(command, "--tensor-parallel-size") in ("2", "4")
    assert after(command, "--mm-encoder-tp-mode") == "data"


def test_the_published_command():
    _, command, _ = dry("--profile", "published")
    assert after(command, "--tensor-parallel-size") == "8"
    assert after(command, "--mm-encoder-tp-mode") == "data"
    assert {"--enable-expert-parallel", "--async-scheduling"} <= set(command)
    assert (after(command, "--host"), after(command, "--port")) == ("0.0.0.0", "22002")


def test_old_rope_scaling_is_translated_and_said():
    _, command, said = dry("--rope-scaling", json.dumps(OLD_YARN))
    text = json.loads(after(command, "--hf-overrides"))["text_config"]
    assert OLD_YARN.items() <= text["rope_parameters"].items()
    assert "--rope-scaling is gone from vLLM" in said


def test_the_users_flags_win_and_leave_the_rest_alone():
    _, command, _ = dry("--limit-mm-per-prompt.image", "4", "--port=9000", "--", "--dtype", "bfloat16")
    assert after(command, "--limit-mm-per-prompt.image") == "4"
    assert after(command, "--limit-mm-per-prompt.video") == "64"
    assert "--port=9000" in command and "--port" not in command
    assert after(command, "--dtype") == "bfloat16" and "float32" not in command


def test_vllms_own_parser_takes_every_command(gpus, lively):
    if not VLLM_PYTHON.exists():
        pytest.fail(".venv-vllm is missing: bash .ci/setup-vllm makes it")
    commands = [dry(*arguments)[1][2:] for arguments in WISHES.values()]
    gpus(8)
    commands.append(dry("--profile", "moe-fp8", model=str(lively("qwen3_vl_moe")))[1][2:])
    code = (
        "import json, sys\n"
        "from vllm.entrypoints.launchers.cli_args import make_arg_parser\n"
        "from vllm.utils.argparse_utils import FlexibleArgumentParser\n"
        "parser = make_arg_parser(FlexibleArgumentParser())\n"
        "for command in json.load(sys.stdin):\n"
        "    print(command, parser.parse_args(command), sep='\\n')\n"
    )
    done = subprocess.run(
        [str(VLLM_PYTHON), "-c", code],
        input=json.dumps(commands),
        capture_output=True,
        text=True,
        timeout=250,
    )
    assert done.returncode == 0, done.stdout[-500:] + done.stderr[-2000:]
    assert len(done.stdout.splitlines()) >= 2 * len(commands)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["nowhere"], "nowhere"),
        ([NANO, "--profile", "huge"], "huge"),
        ([NANO, "--media-policy", '{"max_frames": 0}'], "--media-policy: max_frames"),
        (["--tools-typo", NANO], "before the model"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(arguments, told):
    command = [str(Path(sys.executable).parent / "qwenvl-serve"), *arguments, "--dry-run"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode != 0
    assert told in done.stderr and "Traceback" not in done.stderr


def test_experts_in_the_model_librarys_layout_are_refused_with_the_remedy(tmp_path):
    nano_model("qwen3_vl_moe").save_pretrained(tmp_path)
    command = [str(Path(sys.executable).parent / "qwenvl-serve"), str(tmp_path), "--dry-run"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert f"python -m qwenvl.train.expert_layout {tmp_path}" in done.stderr


def test_an_adapter_that_vllm_would_serve_in_part_is_refused(tmp_path):
    (tmp_path / "adapter_config.json").write_text('{"r": 4}')
    name = "base_model.model.model.visual.merger.linear_fc1.lora_A.weight"
    save_file({name: torch.zeros(4, 8)}, tmp_path / "adapter_model.safetensors")
    command = [str(Path(sys.executable).parent / "qwenvl-serve"), NANO, "--dry-run"]
    command += ["--enable-lora", "--lora-modules", f"mine={tmp_path}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and "it changes the vision part" in done.stderr
    save_file(
        {name.replace("visual", "language_model"): torch.zeros(4, 8)}, tmp_path / "adapter_model.safetensors"
    )
    assert f"mine={tmp_path}" in dry(*command[3:])[1]


def test_a_server_that_ends_before_it_is_ready_says_why():
    with pytest.raises(NotReady, match="no-such-flag"), running_server(NANO, "--no-such-flag"):
        pass
