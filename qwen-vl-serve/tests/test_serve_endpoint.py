"""`make serve` as users meet it: the real vLLM on this machine, asked through the official client."""

import base64
import json
import re
import time
import urllib.request
from pathlib import Path

import openai
import pytest

from qwen_vl_serve.endpoint_messages import media_url
from qwen_vl_serve.launch import running_server

NANO = Path(__file__).resolve().parents[2] / "models/qwen3-vl-nano"


@pytest.fixture(scope="module")
def served():
    with running_server(NANO, "--tools") as url:
        yield url


@pytest.fixture(scope="module")
def client(served):
    with openai.OpenAI(base_url=served, api_key="none", max_retries=0) as client:
        yield client


def data_url(path, mime):
    return f"data:{mime};base64,{base64.b64encode(Path(path).read_bytes()).decode()}"


def contents(pictures, clip):
    """name -> content of one user turn, as an OpenAI user writes it."""
    images = [{"type": "image_url", "image_url": {"url": data_url(path, "image/png")}} for path in pictures]
    video = {"type": "video_url", "video_url": {"url": data_url(clip, "video/mp4")}}
    faster = {"type": "video_url", "video_url": {"url": data_url(clip, "video/mp4") + "#fps=4"}}
    frames = media_url("video", pictures[:1] * 4, {"sample_fps": 2.0, "raw_fps": 8.0})
    ask = {"type": "text", "text": "What do you see?"}
    return {
        "text": "What is a circle?",
        "picture": [images[0], ask],
        "pictures": [*images, ask],
        "video": [video, ask],
        "video at 4 fps": [faster, ask],
        "frames": [{"type": "video_url", "video_url": {"url": frames}}, ask],
    }


def test_every_kind_of_question_streaming_and_not_with_usage(client, pictures, clip):
    prompts = {}
    for name, content in contents(pictures, clip).items():
        request = {"model": "qwen3-vl-nano", "messages": [{"role": "user", "content": content}]}
        request |= {"temperature": 0, "max_tokens": 16}
        whole = client.chat.completions.create(**request)
        chunks = list(
            client.chat.completions.create(**request, stream=True, stream_options={"include_usage": True})
        )
        text = "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices)
        assert whole.choices[0].message.content == text != ""
        assert whole.usage.prompt_tokens == chunks[-1].usage.prompt_tokens > 0
        assert 0 < whole.usage.completion_tokens == chunks[-1].usage.completion_tokens <= 16
        prompts[name] = whole.usage.prompt_tokens
    assert prompts["text"] < prompts["picture"] < prompts["pictures"]
    assert prompts["video"] < prompts["video at 4 fps"]  # a request says its own frames per second


def test_an_answer_is_held_to_a_schema(client):
    schema = {"type": "object", "properties": {"round": {"type": "boolean"}}, "required": ["round"]}
    wanted = {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema, "strict": True}}
    messages = [{"role": "user", "content": "Is a circle round?"}]
    answer = client.chat.completions.create(
        model="qwen3-vl-nano", messages=messages, response_format=wanted, max_tokens=60, temperature=0
    )
    assert json.loads(answer.choices[0].message.content) in ({"round": True}, {"round": False})


@pytest.mark.parametrize(
    ("url", "told"),
    [
        ("http://127.0.0.1:9/x.png", "schemes"),
        ("https://127.0.0.1:9/x.png", "not public"),
        ("https://169.254.169.254/latest/meta-data", "not public"),
        ("file:///etc/passwd", "schemes"),
        ("data:image/png;base64,AAAA", "image"),
        ("data:image/png;base64,AAAA#speed=3", "no option"),
    ],
)
def test_a_picture_from_a_forbidden_place_is_refused_by_name(client, url, told):
    item = {"type": "image_url", "image_url": {"url": url}}
    with pytest.raises(openai.APIStatusError, match=told) as caught:
        client.chat.completions.create(
            model="qwen3-vl-nano", messages=[{"role": "user", "content": [item]}], max_tokens=1
        )
    assert 400 <= caught.value.status_code < 500


def running(served):
    with urllib.request.urlopen(served.removesuffix("/v1") + "/metrics", timeout=10) as answer:
        text = answer.read().decode()
    found = re.findall(r"^vllm:num_requests_(?:running|waiting)\{[^}]*\} (\S+)$", text, re.M)
    assert len(found) >= 2
    return sum(float(number) for number in found)


def test_a_request_that_is_given_up_frees_its_slot(client, served):
    """4,000 tokens take a minute; the slot is free much sooner."""
    stream = client.chat.completions.create(
        model="qwen3-vl-nano", messages=[{"role": "user", "content": "Go on."}], max_tokens=4000,
        stream=True, extra_body={"ignore_eos": True},
    )  # fmt: skip
    next(iter(stream))
    assert running(served) == 1
    stream.close()
    began = time.monotonic()
    while running(served) > 0:
        assert time.monotonic() - began < 10, "the request still runs"
        time.sleep(0.1)
