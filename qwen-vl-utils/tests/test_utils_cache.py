"""The pixel cache: the same pixels without decoding, made anew when content, size or frames differ."""

import io
import os
import subprocess
import sys
from fractions import Fraction

import av
import numpy as np
import pytest
import torch
from PIL import Image

from qwen_vl_utils import MediaError, PixelCache, fetch_image, fetch_video, loading, process_vision_info
from qwen_vl_utils.readers import processes


@pytest.fixture
def cache(tmp_path):
    return PixelCache(tmp_path / "cache")


@pytest.fixture(scope="module")
def picture():
    image = Image.effect_noise((90, 70), 60).convert("RGB")
    exif = Image.Exif()
    exif[0x0112] = 6
    stream = io.BytesIO()
    image.save(stream, "JPEG", exif=exif)
    return stream.getvalue()


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    path = tmp_path_factory.mktemp("clips") / "clip.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=10)
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
        for index in range(20):
            pixels = np.full((64, 96, 3), 10 + 5 * index, np.uint8)
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts, frame.time_base = index, Fraction(1, 10)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def stored(cache):
    return sorted(cache.folder.glob("??/*.npz"))


def forbid_decoding(monkeypatch):
    def refuse(*arguments, **more):
        raise AssertionError("decoded again")

    monkeypatch.setattr(loading, "open_image", refuse)
    monkeypatch.setattr(processes.Session, "frames", refuse)


def test_a_picture_is_decoded_once(picture, cache, tmp_path, monkeypatch):
    plain = fetch_image({"image": picture})
    first = fetch_image({"image": picture}, cache=cache)
    path = tmp_path / "elsewhere.jpg"
    path.write_bytes(picture)
    forbid_decoding(monkeypatch)
    for source in (picture, str(path)):
        again = fetch_image({"image": source}, cache=cache)
        assert again.size == plain.size and again.tobytes() == first.tobytes() == plain.tobytes()
    assert len(stored(cache)) == 1


def test_a_video_is_decoded_once(clip, cache, monkeypatch):
    ele = {"video": str(clip), "nframes": 6}
    plain, metadata = fetch_video(ele, return_video_metadata=True)
    first, _ = fetch_video(ele, return_video_metadata=True, cache=cache)
    forbid_decoding(monkeypatch)
    again, same = fetch_video(ele, return_video_metadata=True, cache=cache)
    assert torch.equal(again, plain) and torch.equal(first, plain) and again.dtype == torch.float32
    assert same == metadata and same.timestamps == metadata.timestamps
    assert fetch_video(ele, dtype=torch.uint8, cache=cache).dtype == torch.uint8


def test_other_content_sizes_and_frames_are_other_pixels(picture, clip, cache, tmp_path):
    path = tmp_path / "changing.png"
    for colour in ("red", "blue"):
        Image.new("RGB", (56, 56), colour).save(path)
        assert fetch_image({"image": str(path)}, cache=cache).getpixel((0, 0)) == (
            (255, 0, 0) if colour == "red" else (0, 0, 255)
        )
    assert (
        fetch_image({"image": picture}, 16, cache=cache).size
        != fetch_image({"image": picture}, cache=cache).size
    )
    for ele in ({"nframes": 4}, {"nframes": 4, "video_start": 1}, {"nframes": 4, "max_pixels": 4 * 28 * 28}):
        ele = {"video": str(clip), **ele}
        assert torch.equal(fetch_video(ele, cache=cache), fetch_video(ele))
    assert len(stored(cache)) == 7


def test_a_damaged_file_is_made_anew(picture, cache, caplog):
    plain = fetch_image({"image": picture}, cache=cache)
    (path,) = stored(cache)
    whole = path.read_bytes()
    for broken in (b"", whole[:100], whole[: len(whole) // 2]):
        path.write_bytes(broken)
        caplog.clear()
        assert fetch_image({"image": picture}, cache=cache).tobytes() == plain.tobytes()
        assert "is damaged" in caplog.text
        assert len(path.read_bytes()) == len(whole)


def test_the_folder_keeps_to_its_size(tmp_path, monkeypatch):
    monkeypatch.setattr("qwen_vl_utils.cache.ROOM_EACH", 1)
    one = 56 * 56 * 3
    cache = PixelCache(tmp_path / "cache", max_bytes=5 * one + 5000)
    for level in range(12):
        path = tmp_path / f"{level}.png"
        Image.new("L", (56, 56), level).save(path)
        fetch_image({"image": str(path)}, cache=cache)
        for number, file in enumerate(stored(cache)):
            assert file.stat().st_size < one + 1000, number
    assert 3 <= len(stored(cache)) <= 6
    with pytest.raises(ValueError, match="max_bytes=0"):
        PixelCache(tmp_path, max_bytes=0)


def test_what_was_used_last_stays(tmp_path, monkeypatch):
    monkeypatch.setattr("qwen_vl_utils.cache.ROOM_EACH", 1)
    cache = PixelCache(tmp_path / "cache", max_bytes=3 * (56 * 56 * 3 + 600))

    def fetch(level):
        path = tmp_path / f"{level}.png"
        Image.new("L", (56, 56), level).save(path)
        fetch_image({"image": str(path)}, cache=cache)
        return set(stored(cache))

    (kept,) = fetch(0)
    for age, level in enumerate(range(1, 8)):
        fetch(0)
        for file in stored(cache):
            if file != kept:
                os.utime(file, (age, age))
        fetch(level)
        assert kept in stored(cache)


def test_processes_share_a_folder(picture, cache, tmp_path):
    path = tmp_path / "picture.jpg"
    path.write_bytes(picture)
    code = (
        "import sys; from qwen_vl_utils import PixelCache, fetch_image;"
        "print(hash(fetch_image({'image': sys.argv[1]}, cache=PixelCache(sys.argv[2])).tobytes()))"
    )
    command = [sys.executable, "-c", code, str(path), str(cache.folder)]
    environment = {**os.environ, "PYTHONHASHSEED": "0"}
    running = [
        subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) for _ in range(4)
    ]
    assert len({process.communicate(timeout=120)[0] for process in running}) == 1
    assert all(process.returncode == 0 for process in running)
    assert [path.suffix for path in cache.folder.glob("??/*")] == [".npz"]


def test_errors_name_the_source_and_leave_nothing(cache, tmp_path):
    path = tmp_path / "broken.png"
    path.write_bytes(b"\x89PNG\r\n\x1a\n not really")
    with pytest.raises(MediaError, match=r"broken\.png: not a readable picture"):
        process_vision_info(
            [{"role": "user", "content": [{"type": "image", "image": str(path)}]}], cache=cache
        )
    assert not stored(cache)
