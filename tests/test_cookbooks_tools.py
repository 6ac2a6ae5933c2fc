"""The cookbooks' zoom, search and locked-down code: right pixels, right texts, and nothing gets out."""

import io
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from qwen_vl_serve import Reply, ToolCall
from utils.looking import SMALLEST_SIDE, Corpus, think, zoom
from utils.multimodal_coding import code_of, run_program, screenshot_of
from utils.multimodal_coding.locked_down import SCRIPT
from utils.screen import ScreenError

TEXTS = {
    "Harbour": "The harbour of Norby has three cranes. The red crane lifts forty tons.",
    "Library": "The library opens at nine. Books may be kept for four weeks.",
    "Museum": "The museum shows ships and a crane's old engine. It opens at ten, on Sundays at nine.",
    "Market": "Fish is sold on the market on Fridays.",
}


def reply(*calls: ToolCall, text: str = "") -> Reply:
    return Reply(text, "tool_calls" if calls else "stop", 1, 1, tool_calls=calls)


def zoom_call(**arguments) -> ToolCall:
    return ToolCall("image_zoom_in_tool", json.dumps(arguments))


# ---- zoom


def numbered(width: int, height: int) -> Image.Image:
    """Every pixel says where it is."""
    rows, columns = np.mgrid[:height, :width]
    return Image.fromarray(np.stack([columns, rows, 0 * rows], axis=-1).astype(np.uint8))


@given(st.integers(4, 256), st.integers(4, 256), st.data())
def test_a_zoom_shows_every_pixel_that_its_box_touches(width, height, data):
    x1, x2 = sorted(data.draw(st.lists(st.integers(0, 1000), min_size=2, max_size=2, unique=True)))
    y1, y2 = sorted(data.draw(st.lists(st.integers(0, 1000), min_size=2, max_size=2, unique=True)))
    left, top, right, bottom = (
        x1 * width // 1000,
        y1 * height // 1000,
        -(-x2 * width // 1000),
        -(-y2 * height // 1000),
    )
    shown = zoom([numbered(width, height)], {"bbox_2d": [x1, y1, x2, y2], "label": ""})
    assert max(shown.size) == max(SMALLEST_SIDE, right - left, bottom - top)
    back = np.asarray(shown.resize((right - left, bottom - top), Image.Resampling.BOX)).astype(int)
    # A bicubic enlargement keeps the pixels' means to a few grey levels.
    assert np.abs(back - np.asarray(numbered(width, height))[top:bottom, left:right]).max() <= 12


def test_a_zoom_into_a_zoom_and_wrong_calls():
    pictures = [numbered(100, 100), numbered(50, 50)]
    whole = {"bbox_2d": [0, 0, 1000, 1000], "label": ""}
    assert zoom(pictures, {**whole, "img_idx": 1}).size == (256, 256)
    for arguments, said in [
        ({**whole, "img_idx": 2}, "img_idx=2 is no picture; there are 0 to 1"),
        ({**whole, "img_idx": True}, "img_idx=True"),
        ({"bbox_2d": [0, 0, 1000, 1001]}, "bbox_2d=.* each from 0 to 1000"),
        ({"bbox_2d": [10, 0, 10, 5]}, "has no area"),
        ({}, "bbox_2d=None"),
    ]:
        with pytest.raises(ValueError, match=said):
            zoom(pictures, arguments)


# ---- search


@pytest.mark.parametrize(
    ("query", "title"),
    [
        ("how much does the red crane lift", "Harbour"),
        ("when does the library open", "Library"),
        ("FISH!", "Market"),
        ("sundays museum", "Museum"),
    ],
)
def test_a_search_finds_the_right_text(query, title):
    found = Corpus(TEXTS).search(query)
    assert found[0].title == title and found[0].text == TEXTS[title]
    assert [one.score for one in found] == sorted((one.score for one in found), reverse=True)


def test_a_search_without_a_hit_is_empty():
    assert Corpus(TEXTS).search("quantum") == []
    assert len(Corpus(TEXTS).search("the at", most=2)) == 2
    with pytest.raises(ValueError, match="nothing to search"):
        Corpus({})


# ---- thinking

SEARCH_FISH = ToolCall("search", '{"query": "fish"}')


def test_a_scripted_model_zooms_searches_and_answers():
    picture, asked = numbered(200, 100), []
    script = iter([
        reply(zoom_call(bbox_2d=[500, 0, 1000, 1000], label="right half")),
        reply(zoom_call(bbox_2d=[0, 0, 500, 500], label="of that", img_idx=1), SEARCH_FISH),
        reply(text="Fridays"),
    ])  # fmt: skip

    def ask(messages):
        asked.append([*messages])
        return next(script)

    done = think("When?", picture, ask, Corpus(TEXTS))
    assert (done.answer, done.answered, len(done.looks)) == ("Fridays", True, 3)
    first, second, third = (look.result for look in done.looks)
    assert np.asarray(first)[0, 0, 0] == pytest.approx(100, abs=1)  # the left edge of the right half
    assert np.asarray(second)[-1, -1, 0] == pytest.approx(150, abs=2)
    assert "Market\nFish is sold" in third
    assert [message["role"] for message in asked[-1]] == ["user", "assistant", "user", "assistant", "user"]


def test_thinking_ends_by_its_rounds_and_tells_what_was_wrong():
    wrong = [
        ToolCall("search", "{}"),
        ToolCall("search", "[]"),
        ToolCall("shell", "{}"),
        zoom_call(),
        ToolCall("search", "{"),
    ]
    done = think("?", numbered(9, 9), lambda _: reply(*wrong), Corpus(TEXTS), max_rounds=2)
    assert (done.answered, len(done.looks)) == (False, 10)
    assert all(str(look.result).startswith("error: ") for look in done.looks)


# ---- pages


def test_a_page_is_shown_as_a_browser_shows_it():
    page = "<body style='margin:0'><script>document.body.style.background='rgb(10,20,30)'</script></body>"
    picture = screenshot_of(page, width=50, height=40)
    assert picture.size == (50, 40) and picture.getcolors() == [(2000, (10, 20, 30))]
    svg = '<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"><rect width="9" height="9"/></svg>'
    assert screenshot_of(f"<body style='margin:0'>{svg}", width=20, height=9).getpixel((4, 4)) == (0, 0, 0)


def test_a_page_that_never_ends_is_stopped():
    with pytest.raises(ScreenError):
        screenshot_of("<script>while (true) {}</script>", patience=3)
    with pytest.raises(ScreenError):
        screenshot_of(
            "<script>let all = []; while (true) all.push(new Array(1e6).fill(1))</script>", patience=20
        )


def test_code_is_taken_out_of_an_answer():
    answer = (
        "Here:\n```html\n<p>short</p>\n```\nor\n```html\n<p>the longer one</p>\n```\n```python\nprint()\n```"
    )
    assert code_of(answer, "html") == "<p>the longer one</p>"
    assert code_of("```python\nprint(1)", "python") == "print(1)"
    assert code_of(" <p>bare</p> ", "html") == "<p>bare</p>"


# ---- programs


def test_a_program_draws_and_prints():
    code = "import matplotlib.pyplot as plt\nplt.figure(figsize=(2, 1))\nplt.plot([1, 3, 2])\n"
    done = run_program(code + "plt.savefig('chart.png', dpi=50)\nprint('drawn')")
    assert done.ended_well and done.stdout == "drawn\n"
    assert Image.open(io.BytesIO(done.files["chart.png"])).size == (100, 50)


HOSTILE = {
    "reads the users": ("print(open('/etc/passwd').read())", "FileNotFoundError"),
    "reads the repository": (f"print(open({str(Path(__file__))!r}).read())", "FileNotFoundError"),
    "reads a parent's environment": ("print(open('/proc/1/environ').read())", "FileNotFoundError"),
    "opens a socket": (
        "import socket, sys\nsocket.create_connection(('127.0.0.1', PORT), 3)",
        "Network is unreachable",
    ),
    "sends a datagram": (
        "import socket\nsocket.socket(type=socket.SOCK_DGRAM).sendto(b'x', ('127.0.0.1', PORT))",
        "Network is unreachable",
    ),
    "writes to the system": ("open('/usr/lib/mine', 'w')", "Read-only file system"),
    "writes to Python": ("import json\nopen(json.__file__, 'a')", "Read-only file system"),
    "writes elsewhere": (f"open({str(Path(__file__).parent / 'mine')!r}, 'w')", "FileNotFoundError"),
    "takes memory": ("x = []\nwhile True: x.append(bytearray(1 << 20))", "MemoryError"),
    "fills the disk": ("with open('big', 'wb') as f:\n  while True: f.write(bytes(1 << 20))", "OSError"),
    "forks": ("import os\nos.fork()", "PermissionError"),
    "starts a shell": ("import subprocess\nsubprocess.run(['/bin/sh', '-c', 'id'])", "PermissionError"),
    "mounts": (
        "import ctypes\nlibc = ctypes.CDLL(None, use_errno=True)\nlibc.unshare(0x10020000)\n"
        "assert libc.mount(b'none', b'/usr', b'tmpfs', 0, None) == 0",
        "AssertionError",
    ),
    "remounts": (
        "import ctypes\nassert ctypes.CDLL(None).mount(b'', b'/usr', b'', 4128, None) == 0",
        "AssertionError",
    ),
    "leaves the root": (
        "import os\nos.mkdir('x')\nos.chroot('x')",
        "PermissionError",
    ),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_a_hostile_program_is_stopped(what):
    code, said = HOSTILE[what]
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.2)
        done = run_program(code.replace("PORT", str(server.getsockname()[1])), memory=1 << 29)
        with pytest.raises(TimeoutError):
            server.accept()
    assert not done.ended_well and "root:" not in done.stdout
    assert said in done.stderr
    assert not (Path(__file__).parent / "mine").exists()


@pytest.mark.parametrize("code", ["while True: pass", "import time\ntime.sleep(1000)"], ids=["busy", "idle"])
def test_a_program_without_end_is_stopped(code):
    done = run_program(code, seconds=1)
    assert done.status is None and not done.ended_well


def test_threads_and_files_are_fine():
    code = "import os, threading\nos.makedirs('a/b')\nopen('a/b/c.txt', 'w').write('hi')\n"
    done = run_program(
        code + "os.symlink('/etc/passwd', 'link')\nthreading.Thread(target=print, args=['thread']).start()"
    )
    assert done.ended_well and done.files == {"a/b/c.txt": b"hi"} and done.stdout == "thread\n"


def test_the_filter_alone_stops_every_way_to_start_a_process():
    """Without the rest of the lock: fork, vfork, clone and clone3 by their numbers."""
    numbers = {"x86_64": (56, 57, 58, 435, 272, 308), "aarch64": (220, 435, 97, 268)}[os.uname().machine]
    probe = "import ctypes\nlibc = ctypes.CDLL(None, use_errno=True)\n"
    probe += f"print([libc.syscall(n, 17, 0, 0, 0, 0) for n in {numbers}])"
    program = SCRIPT.with_name("no_processes.py")
    code = f"import sys\nsys.path.insert(0, {str(program.parent)!r})\nimport ctypes, no_processes\n"
    code += "assert ctypes.CDLL(None).prctl(38, 1, 0, 0, 0) == 0\nno_processes.give_up_processes()\n" + probe
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == str([-1] * len(numbers)), done.stderr


def test_a_system_without_namespaces_runs_nothing(monkeypatch, tmp_path):
    fake = tmp_path / "unshare"
    fake.write_text("#!/bin/sh\necho 'unshare failed: Operation not permitted' >&2\nexit 1\n")
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    with pytest.raises(OSError, match=r"was not run, .*Operation not permitted.*sysctl"):
        run_program("print(1)")
