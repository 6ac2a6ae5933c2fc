"""qwenvl-ask: the command itself, from its arguments to the printed answer."""

import subprocess
import sys
from pathlib import Path

import pytest

from qwen_vl_serve import Sampling
from qwen_vl_serve.ask import build_messages, main

GREEDY = ["--temperature", "0", "--max-new-tokens", "6", "--device", "cpu"]


def expected(backend, **more):
    messages = build_messages("What?", **more)
    return backend.generate([messages], Sampling(temperature=0, max_new_tokens=6))[0].text


def test_the_installed_command_prints_the_answer(lively, backend, pictures):
    command = [str(Path(sys.executable).parent / "qwenvl-ask"), str(lively("qwen3_vl"))]
    command += ["--image", pictures[0], *GREEDY, "What?"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=170)
    assert done.stdout == expected(backend, images=[pictures[0]]) + "\n"
    assert "[cut after 6 tokens" in done.stderr


def test_text_pictures_and_videos_reach_the_model(lively, backend, pictures, clip, capsys):
    cases = [
        ([], {}),
        (["--image", pictures[1], "--image", pictures[2]], {"images": pictures[1:]}),
        (["--video", clip, "--system", "Be kind."], {"videos": [clip], "system": "Be kind."}),
    ]
    answers = []
    for flags, more in cases:
        assert main([str(lively("qwen3_vl")), *flags, *GREEDY, "What?"]) == 0
        answers.append(capsys.readouterr().out)
        assert answers[-1] == expected(backend, **more) + "\n"
    assert len(set(answers)) == 3


def test_messages_hold_system_pictures_videos_and_question_in_this_order():
    assert build_messages("Q", images=["a", "b"], videos=["c"], system="S") == [
        {"role": "system", "content": "S"},
        {
            "role": "user",
            "content": [
                {"type": "image", "image": "a"},
                {"type": "image", "image": "b"},
                {"type": "video", "video": "c"},
                {"type": "text", "text": "Q"},
            ],
        },
    ]


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--temperature", "-1"], "Sampling.temperature is -1"),
        (["--image", "nowhere.png"], "nowhere.png"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(lively, capsys, flags, told):
    assert main([str(lively("qwen3_vl")), *flags, "What?"]) == 1
    output = capsys.readouterr()
    assert output.out == ""
    error = output.err.splitlines()[-1]
    assert error.startswith("qwenvl-ask: ")
    assert told in error
    assert "Traceback" not in output.err
