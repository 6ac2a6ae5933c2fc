"""The wheel, installed into an empty environment with its declared dependencies alone, works."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

PROGRAM = """
import io, json, sys
import av, numpy as np
from PIL import Image
from transformers import AutoProcessor
import qwen_vl_utils
from qwen_vl_utils import count_tokens, process_vision_info, processor_inputs
from qwen_vl_utils.grounding import parse_boxes

clip = io.BytesIO()
with av.open(clip, "w", format="mp4") as container:
    stream = container.add_stream("mpeg4", rate=10)
    stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
    for level in range(12):
        frame = av.VideoFrame.from_ndarray(np.full((64, 96, 3), 20 * level, np.uint8), format="rgb24")
        container.mux(stream.encode(frame))
    container.mux(stream.encode())
messages = [{"role": "user", "content": [
    {"type": "image", "image": Image.new("RGB", (200, 100), "red")},
    {"type": "video", "video": clip.getvalue()},
    {"type": "text", "text": "What is this?"},
]}]
images, videos = process_vision_info(messages, image_patch_size=16)
processor = AutoProcessor.from_pretrained(sys.argv[1])
inputs = processor_inputs(processor, [messages], add_generation_prompt=True)
print(json.dumps({
    "file": qwen_vl_utils.__file__,
    "image": images[0].size,
    "video": list(videos[0].shape),
    "tokens": [inputs["input_ids"].shape[1], count_tokens(messages, processor)],
    "boxes": len(parse_boxes('[{"bbox_2d": [1, 2, 3, 4], "label": "cat"}]').items),
}))
"""


def run(*command, **options):
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=280, **options)
    assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return done.stdout


def test_the_wheel_works_in_an_empty_environment(tmp_path):
    uv = shutil.which("uv", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    if uv is None:
        pytest.fail("uv is missing: make setup puts it into .venv where there is none")
    wheels = tmp_path / "wheels"
    run(sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", wheels, cwd=ROOT / "qwen-vl-utils")
    (wheel,) = wheels.glob("*.whl")
    python = tmp_path / "environment/bin/python"
    run(uv, "venv", "--quiet", "--python", sys.executable, python.parents[1])
    run(uv, "pip", "install", "--quiet", "--python", python, "--constraints", ROOT / "constraints.txt", wheel)
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "FORCE_"))}
    answer = json.loads(
        run(python, "-c", PROGRAM, ROOT / "models/qwen3-vl-nano", cwd=tmp_path, env=clean).splitlines()[-1]
    )
    assert Path(answer.pop("file")).is_relative_to(tmp_path)
    tokens = answer.pop("tokens")
    assert tokens[0] == tokens[1] > 20
    assert answer == {"image": [192, 96], "video": [4, 3, 320, 448], "boxes": 1}
