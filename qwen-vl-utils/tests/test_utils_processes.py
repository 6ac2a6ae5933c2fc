"""Decoder processes: a hung or crashed decoder costs one video and nothing else."""

import os
import signal
import subprocess
import sys
import time
from fractions import Fraction

import av
import numpy as np
import pytest
import torch

from qwen_vl_utils import MediaPolicy, MediaTimeout, VideoError, fetch_video, process_vision_info
from qwen_vl_utils.readers import processes


def write_clip(path, frames, level=10):
    """A clip whose frame i is a flat grey of `level` + 5 i."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=10, options={"crf": "1"})
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
        for index in range(frames):
            pixels = np.full((64, 96, 3), level + 5 * index, np.uint8)
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts, frame.time_base = index, Fraction(1, 10)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return str(path)


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return write_clip(tmp_path_factory.mktemp("clips") / "clip.mp4", 20)


@pytest.fixture(autouse=True)
def forced_reader(monkeypatch):
    """No second reader after the first."""
    monkeypatch.setenv("FORCE_QWENVL_VIDEO_READER", "pyav")


def idle_pids():
    return [process.pid for process in processes._idle]


def is_running(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def signalled(monkeypatch, number, after=0):
    """Every decoder process gets a signal once it has answered `after` times; gives the list of their ids."""
    receive, hit, answers = processes.DecoderProcess.receive, [], []

    def receive_after_signal(self, deadline, name):
        answers.append(self.pid)
        if len(answers) > after and self.pid not in hit:
            hit.append(self.pid)
            os.kill(self.pid, number)
        return receive(self, deadline, name)

    monkeypatch.setattr(processes.DecoderProcess, "receive", receive_after_signal)
    return hit


@pytest.mark.parametrize("field", ["stall_seconds", "total_seconds"])
def test_a_hung_decoder_is_killed_and_the_next_video_is_read(clip, monkeypatch, field):
    processes.shut_down()
    fetch_video({"video": clip})
    with monkeypatch.context() as patch:
        stopped = signalled(patch, signal.SIGSTOP, after=2)
        with pytest.raises(MediaTimeout, match=rf"clip\.mp4: .*{field}"):
            fetch_video({"video": clip}, policy=MediaPolicy(**{field: 0.5}))
    assert stopped and not is_running(stopped[0]) and not idle_pids()
    assert fetch_video({"video": clip}).shape[0] == 4


@pytest.mark.parametrize("after", [0, 3])
def test_a_crash_is_an_error_that_names_the_signal(clip, monkeypatch, after):
    processes.shut_down()
    with monkeypatch.context() as patch:
        signalled(patch, signal.SIGSEGV, after=after)
        with pytest.raises(VideoError, match=r"clip\.mp4: .*the decoder process died \(SIGSEGV\)"):
            fetch_video({"video": clip})
    assert len(idle_pids()) == 0
    assert fetch_video({"video": clip}).shape[0] == 4


def test_a_readers_error_does_not_cost_its_process(clip, tmp_path):
    fetch_video({"video": clip})
    before = sorted(idle_pids())
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(b"\0\0\0\x18ftypmp42\0\0\0\0mp42isom")
    for ele in ({"video": str(broken)}, {"video": clip, "nframes": 1000}):
        with pytest.raises(ValueError):
            fetch_video(ele)
        assert sorted(idle_pids()) == before
    assert fetch_video({"video": clip}).shape[0] == 4 and sorted(idle_pids()) == before


def test_a_process_is_replaced_after_so_many_videos(clip, monkeypatch):
    processes.shut_down()
    monkeypatch.setattr(processes, "VIDEOS_EACH", 2)
    seen = set()
    for _ in range(4):
        fetch_video({"video": clip})
        seen.update(idle_pids())
    assert len(seen) == 2 and not idle_pids()


def test_videos_of_a_prompt_come_in_order(tmp_path):
    clips = [write_clip(tmp_path / f"{i}.mp4", 8, level=10 + 20 * i) for i in range(6)]
    content = [{"type": "video", "video": clip, "nframes": 4} for clip in clips]
    _, videos = process_vision_info([{"role": "user", "content": content}], dtype=torch.uint8)
    for clip, video in zip(clips, videos, strict=True):
        assert torch.equal(video, fetch_video({"video": clip, "nframes": 4}, dtype=torch.uint8))
    assert len({int(video[0].float().mean()) for video in videos}) == 6


class Clips(torch.utils.data.Dataset):
    def __init__(self, path):
        self.path = path

    def __len__(self):
        return 6

    def __getitem__(self, index):
        return fetch_video({"video": self.path, "nframes": 4}, dtype=torch.uint8), processes._idle[0].pid


@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_workers_of_a_data_loader_have_decoder_processes_of_their_own(clip, context):
    """Forked workers must not talk over the connection of their parent."""
    expected = fetch_video({"video": clip, "nframes": 4}, dtype=torch.uint8)
    own = idle_pids()
    loader = torch.utils.data.DataLoader(
        Clips(clip), batch_size=None, num_workers=2, multiprocessing_context=context
    )
    pids = set()
    for frames, pid in loader:
        assert torch.equal(frames, expected)
        pids.add(int(pid))
    assert len(pids) == 2 and not pids & set(own)
    assert torch.equal(fetch_video({"video": clip, "nframes": 4}, dtype=torch.uint8), expected)
    assert idle_pids() == own


def test_decoder_processes_end_with_their_parent(clip):
    code = (
        "import os, signal, sys; from qwen_vl_utils import fetch_video; from qwen_vl_utils.readers import"
        " processes; fetch_video({'video': sys.argv[1]}); print(processes._idle[0].pid, flush=True);"
        " os.kill(os.getpid(), signal.SIGKILL)"
    )
    done = subprocess.run([sys.executable, "-c", code, clip], capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    pid, waited = int(done.stdout), 0
    while is_running(pid) and waited < 200:
        time.sleep(0.1)
        waited += 1
    assert not is_running(pid)


def test_nothing_is_left_when_a_program_ends(clip):
    code = "import sys; from qwen_vl_utils import fetch_video; fetch_video({'video': sys.argv[1]})"
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code, clip], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0 and not done.stderr, done.stderr
