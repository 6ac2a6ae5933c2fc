"""Videos: the right frames at their true times, from every reader, whatever the frame rate.

Frame i of a test clip is a flat grey of level 10 + 5 i, so a decoded frame tells its own index.
"""

import base64
import copy
import logging
import pickle
from fractions import Fraction

import av
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision.transforms import functional

from qwen_vl_utils import (
    MediaError,
    MediaNotFound,
    VideoError,
    VideoMetadata,
    fetch_image,
    fetch_video,
    process_vision_info,
    readers,
    vision_process,
)
from qwen_vl_utils.resize import FrameResizer

READERS = [name for name in ("torchcodec", "decord", "pyav") if readers.installed(name)]


def write_clip(path, times, *, clock=1000, size=(96, 64), options=None):
    """A clip whose frame i is shown at `times[i]` / `clock` seconds."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=10, options=options or {"crf": "1"})
        stream.width, stream.height = size
        stream.pix_fmt = "yuv420p"
        stream.codec_context.time_base = Fraction(1, clock)
        for index, time in enumerate(times):
            pixels = np.full((size[1], size[0], 3), 10 + 5 * index, np.uint8)
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts, frame.time_base = time, Fraction(1, clock)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def shown(frames):
    """The index that each frame [n, 3, h, w] tells."""
    return [round((level - 10) / 5) for level in frames.float().mean(dim=(1, 2, 3)).tolist()]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("clips")


@pytest.fixture(scope="module")
def steady(folder):
    """40 frames, 10 a second, with B-frames."""
    return write_clip(folder / "steady.mp4", range(40), clock=10)


@pytest.fixture(scope="module")
def varying(folder):
    """30 frames: 2 seconds at 10 a second, then 10 seconds at 1 a second."""
    return write_clip(folder / "varying.mkv", [*range(0, 2000, 100), *range(2000, 12000, 1000)])


@pytest.fixture(params=READERS)
def reader(request, monkeypatch):
    monkeypatch.setenv("FORCE_QWENVL_VIDEO_READER", request.param)
    return request.param


def test_frames_are_spread_over_the_clip(steady, reader):
    (video, metadata), rate = fetch_video(
        {"video": str(steady)}, return_video_sample_fps=True, return_video_metadata=True
    )
    expected = [0, 6, 11, 17, 22, 28, 33, 39]
    assert (
        video.dtype == torch.float32 and video.shape[:2] == (8, 3) and 0 <= video.min() <= video.max() <= 255
    )
    assert shown(video) == list(metadata.frames_indices) == metadata["frames_indices"] == expected
    assert dict(metadata) == {
        "fps": pytest.approx(10), "frames_indices": expected, "total_num_frames": 40, "video_backend": reader,
    }  # fmt: skip
    assert metadata.timestamps == pytest.approx([index / 10 for index in expected])
    assert rate == metadata.sample_fps == pytest.approx(8 / 40 * 10)


def test_readers_deliver_the_same_frames(steady, monkeypatch):
    results = []
    for name in READERS:
        monkeypatch.setenv("FORCE_QWENVL_VIDEO_READER", name)
        results.append(fetch_video({"video": str(steady), "nframes": 10}))
    for other in results[1:]:
        assert (results[0] - other).abs().max() <= 1


def test_a_clip_keeps_its_place_in_the_file(steady, reader):
    """0.0.14 gave the clip's own length beside indices of the whole file."""
    ele = {"video": str(steady), "video_start": 1.05, "video_end": 2.95, "fps": 5}
    video, metadata = fetch_video(ele, return_video_metadata=True)
    assert metadata.total_num_frames == 40 and metadata.clip == (1.05, 2.95)
    assert shown(video) == list(metadata.frames_indices)
    assert metadata.frames_indices[0] == 11 and metadata.frames_indices[-1] == 29
    assert metadata.timestamps[0] == pytest.approx(1.1) and metadata.timestamps[-1] == pytest.approx(2.9)
    assert metadata.sample_fps == pytest.approx(len(video) / 19 * 10)


def test_times_at_a_variable_rate_are_the_true_ones(varying, reader):
    video, metadata = fetch_video({"video": str(varying), "nframes": 30}, return_video_metadata=True)
    true = [*(i / 10 for i in range(20)), *(2.0 + i for i in range(10))]
    assert shown(video) == list(metadata.frames_indices) == list(range(30))
    assert metadata.timestamps == pytest.approx(true, abs=2e-3)
    # what processors compute from the items
    assert [index / metadata["fps"] for index in metadata["frames_indices"]] == pytest.approx(true, abs=2e-3)


def test_times_count_from_the_first_frame(folder, reader):
    late = write_clip(folder / "late.mkv", range(50, 60), clock=10)
    _, metadata = fetch_video({"video": str(late)}, return_video_metadata=True)
    assert metadata.timestamps[0] == 0 and metadata.timestamps[-1] == pytest.approx(0.9)


def test_a_clip_of_one_frame_is_shown_twice(folder, reader):
    single = write_clip(folder / "single.mp4", [0])
    video, metadata = fetch_video({"video": str(single)}, return_video_metadata=True)
    assert shown(video) == [0, 0] and metadata.timestamps == (0, 0) and metadata.total_num_frames == 1


def test_odd_sizes_and_sparse_frames_of_a_long_clip(folder, reader):
    """Few frames far apart, so that readers seek."""
    clip = write_clip(folder / "long.mp4", range(48), clock=10, size=(98, 66), options={"g": "8", "crf": "1"})
    video, metadata = fetch_video({"video": str(clip), "nframes": 4}, return_video_metadata=True)
    assert shown(video) == list(metadata.frames_indices) == [0, 16, 31, 47]


@pytest.mark.parametrize("form", ["path", "pathlib", "bytes", "file", "data", "video_url"])
def test_every_form_of_source(steady, form):
    data = steady.read_bytes()
    ele = {
        "path": {"video": str(steady)},
        "pathlib": {"video": steady},
        "bytes": {"video": data},
        "file": {"video": steady.as_uri()},
        "data": {"video": "data:video/mp4;base64," + base64.b64encode(data).decode()},
        "video_url": {"type": "video_url", "video_url": {"url": str(steady)}},
    }[form]
    _, videos = process_vision_info([{"role": "user", "content": [{**ele, "nframes": 4}]}])
    assert shown(videos[0]) == [0, 13, 26, 39]


def test_the_keyword_arguments_for_processors(steady):
    messages = [{"role": "user", "content": [{"type": "video", "video": str(steady), "nframes": 4}]}]
    images, videos, kwargs = process_vision_info(messages, return_video_kwargs=True)
    assert images is None and kwargs == {"do_sample_frames": False, "fps": [pytest.approx(1.0)]}
    _, videos, kwargs = process_vision_info(messages, return_video_kwargs=True, return_video_metadata=True)
    assert kwargs == {"do_sample_frames": False}
    assert isinstance(videos[0][0], torch.Tensor) and isinstance(videos[0][1], VideoMetadata)


# --- sizes


def test_frame_budgets(steady, monkeypatch):
    unit = 28 * 28

    def pixels(**ele):
        height, width = fetch_video({"video": str(steady), "nframes": 4, **ele}).shape[-2:]
        return height * width

    assert pixels() >= 128 * unit  # VIDEO_MIN_TOKEN_NUM
    assert pixels(min_pixels=20 * unit, max_pixels=24 * unit) <= 24 * unit
    assert pixels(max_pixels=24 * unit) <= 24 * unit  # 0.0.14 stopped with an AssertionError
    assert pixels(min_pixels=500 * unit, total_pixels=4 * 100 * unit) <= 525 * unit
    assert pixels(min_pixels=2 * unit, total_pixels=4 * unit) <= 2.1 * unit
    assert fetch_video({"video": str(steady), "resized_height": 100, "resized_width": 60}).shape[-2:] == (
        112,
        56,
    )
    monkeypatch.setattr(vision_process, "VIDEO_MIN_TOKEN_NUM", 4)
    assert pixels() == 3 * 2 * unit  # 96 x 64 rounds to 84 x 56


def test_a_maximum_can_only_lower(steady, caplog):
    vision_process._announced.clear()
    ele = {
        "video": str(steady),
        "nframes": 4,
        "min_pixels": 784,
        "total_pixels": 784 * 12,
        "max_pixels": 784 * 50,
    }
    for _ in range(2):
        assert fetch_video(ele).shape[-2:] == (56, 84)
    assert [record.message for record in caplog.records if record.levelno == logging.WARNING] == [
        "The given max_pixels[39200] exceeds limit[4704.0]."
    ]


@given(
    # torch's kernel takes a picture that is one pixel wide for another memory layout, and gets it wrong
    size=st.tuples(st.integers(1, 120), st.integers(2, 120)),
    target=st.tuples(st.integers(1, 120), st.integers(2, 120)),
    dtype=st.sampled_from([torch.uint8, torch.float32]),
    contrast=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
@settings(max_examples=200, deadline=None)
def test_resizing_equals_a_floating_point_reference(size, target, dtype, contrast, seed):
    """Also where noise of black and white makes the two passes overshoot, which 8-bit kernels clip."""
    noise = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
    pixels = np.where(noise > 127, 255, 0).astype(np.uint8) if contrast else noise
    reference = functional.resize(
        torch.from_numpy(pixels).permute(2, 0, 1),
        list(target),
        interpolation=functional.InterpolationMode.BICUBIC,
        antialias=True,
    )
    out = torch.empty((3, *target), dtype=dtype)
    FrameResizer(size, target).into(pixels, out)
    difference = (out.float() - reference.float()).abs()
    assert difference.max() <= 1  # a tie of rounding
    assert difference.mean() <= 0.02


# --- lists of frames


def frames_of(*sizes):
    return [Image.new("RGB", size, (10 + 5 * i,) * 3) for i, size in enumerate(sizes)]


def test_frame_list_is_resized_once():
    """0.0.14 rounded to 64 first, so 361 rows became 384: #1833, #1931, #1960, #2110."""
    video = fetch_video({"video": frames_of(*[(641, 361)] * 4)}, image_patch_size=16)
    assert video.shape == (4, 3, 352, 640)


def test_frame_list_pixels_are_those_of_the_same_picture():
    rng = np.random.default_rng(1)
    frame = Image.fromarray(rng.integers(0, 256, (361, 641, 3), dtype=np.uint8))
    video = fetch_video({"video": [frame, frame]}, image_patch_size=16)
    image = np.asarray(fetch_image({"image": frame}, image_patch_size=16)).transpose(2, 0, 1)
    assert np.array_equal(video[1].numpy(), image.astype(np.float32))


def test_frame_list_is_padded_to_an_even_number(tmp_path):
    frames = frames_of(*[(60, 60)] * 3)
    frames[1].save(tmp_path / "1.png")
    video, metadata = fetch_video(
        {"video": [frames[0], str(tmp_path / "1.png"), {"url": (tmp_path / "1.png").as_uri()}]},
        return_video_metadata=True,
    )
    assert shown(video) == [0, 1, 1, 1]
    assert dict(metadata) == {
        "fps": 2.0, "frames_indices": [0, 1, 2, 3], "total_num_frames": 4, "video_backend": "frame_list",
    }  # fmt: skip


def test_frame_list_times_at_another_raw_rate():
    """0.0.14 numbered the frames 0, 1, 2 at the raw rate: #1992, #1795."""
    ele = {"video": frames_of(*[(60, 60)] * 4), "sample_fps": 2.0, "raw_fps": 30.0}
    (_, metadata), rate = fetch_video(ele, return_video_metadata=True, return_video_sample_fps=True)
    assert rate == 2.0 and metadata["fps"] == 30.0
    assert metadata["frames_indices"] == [0, 15, 30, 45] and metadata["total_num_frames"] == 60
    assert metadata.timestamps == (0.0, 0.5, 1.0, 1.5)


def test_frame_list_times_between_raw_frames():
    ele = {"video": frames_of(*[(60, 60)] * 4), "sample_fps": 4.0, "raw_fps": 10.0}
    _, metadata = fetch_video(ele, return_video_metadata=True)
    assert metadata.frames_indices == (0, 2, 5, 8)
    assert [index / metadata["fps"] for index in metadata["frames_indices"]] == pytest.approx(
        [0, 0.25, 0.5, 0.75]
    )


def test_frames_of_mixed_sizes_take_the_first_ones_size():
    assert (
        fetch_video({"video": frames_of((112, 56), (200, 300))}).shape
        == fetch_video({"video": frames_of((112, 56), (112, 56))}).shape
    )


def test_an_empty_frame_list_is_an_error():
    with pytest.raises(VideoError, match="list of frames of a video is empty"):
        fetch_video({"video": []})


# --- readers


def test_a_forced_reader_never_falls_back(steady, monkeypatch):
    used = []

    def broken(ele):
        raise VideoError("cannot")

    monkeypatch.setitem(vision_process.VIDEO_READER_BACKENDS, "torchcodec", broken)
    monkeypatch.setitem(vision_process.VIDEO_READER_BACKENDS, "pyav", lambda ele: used.append(ele))
    monkeypatch.setenv("FORCE_QWENVL_VIDEO_READER", "torchcodec")
    with pytest.raises(VideoError, match=r"steady\.mp4: no reader can decode it: cannot"):
        fetch_video({"video": str(steady)})
    assert not used


def test_a_fallback_is_announced(steady, monkeypatch, caplog):
    def broken(ele):
        raise VideoError("torchcodec: no such codec")

    monkeypatch.setattr(readers, "installed", lambda name: name in ("torchcodec", "pyav"))
    monkeypatch.setitem(vision_process.VIDEO_READER_BACKENDS, "torchcodec", broken)
    _, metadata = fetch_video({"video": str(steady)}, return_video_metadata=True)
    assert metadata.video_backend == "pyav"
    (warning,) = [record.message for record in caplog.records if record.levelno == logging.WARNING]
    assert "steady.mp4 can't be read with torchcodec" in warning and "no such codec" in warning


def test_the_reader_is_announced_once(monkeypatch, caplog):
    monkeypatch.setattr(vision_process, "FORCE_QWENVL_VIDEO_READER", "pyav", raising=False)
    vision_process.get_video_reader_backend.cache_clear()
    with caplog.at_level(logging.INFO):
        assert [vision_process.get_video_reader_backend() for _ in range(3)] == ["pyav"] * 3
    assert [record.message for record in caplog.records] == ["qwen-vl-utils using pyav to read video."]


def test_an_unknown_reader_is_an_error(monkeypatch):
    monkeypatch.setenv("FORCE_QWENVL_VIDEO_READER", "mplayer")
    with pytest.raises(ValueError, match="'mplayer' is no video reader; the readers are"):
        vision_process.get_video_reader_backend()


def test_torchvisions_reader_says_that_it_is_gone(steady, monkeypatch):
    monkeypatch.setenv("FORCE_QWENVL_VIDEO_READER", "torchvision")
    with pytest.raises(VideoError, match="has no video reader any more"):
        fetch_video({"video": str(steady)})


def test_a_reader_of_the_callers_own(steady, monkeypatch):
    """Others replace entries of VIDEO_READER_BACKENDS."""

    def mine(ele):
        return torch.zeros(4, 3, 60, 60, dtype=torch.uint8), dict(
            fps=5.0, frames_indices=torch.tensor([0, 2, 4, 6]), total_num_frames=8, video_backend="mine"
        ), 2.5  # fmt: skip

    monkeypatch.setitem(vision_process.VIDEO_READER_BACKENDS, "pyav", mine)
    monkeypatch.setenv("FORCE_QWENVL_VIDEO_READER", "pyav")
    _, metadata = fetch_video({"video": str(steady)}, return_video_metadata=True)
    assert metadata.timestamps == (0, 0.4, 0.8, 1.2) and metadata.sample_fps == 2.5
    assert metadata["total_num_frames"] == metadata.total_num_frames == 8
    assert metadata["video_backend"] == "mine" and metadata["frames_indices"] == [0, 2, 4, 6]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "a playlist or script, or an unknown container"),
        (b"not a video at all", "a playlist or script, or an unknown container"),
        (b"\0\0\0\x18ftypmp42\0\0\0\0mp42isom", "no reader can decode it"),
    ],
)
def test_a_file_that_is_no_video_is_named(tmp_path, reader, content, message):
    path = tmp_path / "broken.mp4"
    path.write_bytes(content)
    with pytest.raises(VideoError, match=rf"broken\.mp4: {message}"):
        fetch_video({"video": str(path)})


def test_a_missing_video_is_named(tmp_path, reader):
    with pytest.raises(MediaNotFound, match=r"broken\.mp4 does not exist"):
        fetch_video({"video": str(tmp_path / "broken.mp4")})


def test_sampling_that_cannot_be_names_the_file(steady, reader):
    with pytest.raises(MediaError, match=r"steady\.mp4: nframes should be in \[2, 40\], got 100"):
        fetch_video({"video": str(steady), "nframes": 100})
    with pytest.raises(MediaError, match=r"steady\.mp4: video_start=3 and video_end=1 leave no two frames"):
        fetch_video({"video": str(steady), "video_start": 3, "video_end": 1})


# --- metadata


def test_metadata_is_frozen_and_travels(steady):
    _, metadata = fetch_video({"video": str(steady)}, return_video_metadata=True)
    with pytest.raises(AttributeError):
        metadata.fps = 3
    for other in (pickle.loads(pickle.dumps(metadata)), copy.deepcopy(metadata)):
        assert other == metadata and isinstance(other, VideoMetadata)
        assert other.timestamps == metadata.timestamps and other.clip == metadata.clip


def test_metadata_is_what_the_model_library_takes(varying):
    from transformers.video_utils import make_batched_metadata

    video, metadata = fetch_video({"video": str(varying), "nframes": 30}, return_video_metadata=True)
    (theirs,) = make_batched_metadata([video], [metadata])
    assert theirs.timestamps == pytest.approx(metadata.timestamps, abs=2e-3)


def test_a_frame_that_cannot_be_decoded_is_an_error_not_its_neighbour(steady, monkeypatch):
    from qwen_vl_utils.readers import pyav

    true_scan = pyav._scan

    def scan(container, stream):
        index = true_scan(container, stream)
        return index._replace(pts=[*index.pts[:5], index.pts[5] + 1, *index.pts[6:]])

    monkeypatch.setattr(pyav, "_scan", scan)
    with (
        pyav.opened(str(steady), 1, 10**6) as video,
        pytest.raises(VideoError, match="no frame can be decoded for time"),
    ):
        list(video.frames([4, 5]))
