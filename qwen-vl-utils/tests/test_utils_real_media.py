"""Real pictures and clips: every reader gives the frames that are in the file, upright, at their true times.

The truth comes from the command lines of FFmpeg: `ffprobe` lists the time of each frame that is shown, and
`ffmpeg` decodes them one after another, without ever seeking.
"""

import functools
import json
import logging
import re
import subprocess

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import InterpolationMode, functional
from transformers import AutoProcessor

from qwen_vl_utils import VideoError, fetch_image, fetch_video, processor_inputs, readers
from qwen_vl_utils.vision_process import to_rgb

NANO = "models/qwen3-vl-nano"
READERS = [name for name in ("torchcodec", "decord", "pyav") if readers.installed(name)]

REAL = [
    "videos/bikes.mp4", "videos/bigbuckbunny.mp4", "videos/carphone_pristine.mp4",
    "videos/carphone_distorted.mp4", "videos/vtest.avi", "videos/tree.avi", "videos/Megamind.avi",
    "videos/cityCC0.mpg",
]  # fmt: skip
ODD = [
    "vfr.mp4", "vfr.mkv", "b_frames.mp4", "odd_size.mkv", "odd_size.avi", "one_frame.mp4", "no_audio.mp4",
    "with_audio.mp4", "4k.mp4", "h264_10bit.mp4", "hevc_10bit.mp4", "vp9_10bit.webm", "interlaced.mpg",
    "late.mkv", "late.ts", "edit_list.mp4", "rotated_90.mp4", "rotated_180.mp4", "rotated_270.mp4",
    "truncated.mkv",
]  # fmt: skip
CLIPS = [*REAL, *(f"odd/{name}" for name in ODD)]

# Here FFmpeg's scaler takes other paths in its several builds: it dithers 10 bits down to 8, and for a width
# that is no multiple of 8 it has no fast way for the colours.
CONVERTED_DIFFERENTLY = {
    "odd/h264_10bit.mp4", "odd/hevc_10bit.mp4", "odd/vp9_10bit.webm", "odd/odd_size.avi",
}  # fmt: skip
SECONDS = 1e-3

# What a decoder can't do is refused by its reader, never given wrong; the default goes on to the next reader.
REFUSED = {
    # torchcodec loses the last frames of program and transport streams
    ("torchcodec", "videos/cityCC0.mpg"): "no more frames left",
    ("torchcodec", "odd/interlaced.mpg"): "no more frames left",
    ("torchcodec", "odd/late.ts"): "no more frames left",
    # decord gives other frames of these than those asked for
    ("decord", "videos/cityCC0.mpg"): "MPEG streams",
    ("decord", "odd/interlaced.mpg"): "MPEG streams",
    ("decord", "odd/late.ts"): "MPEG streams",
    # B-frames in AVI, which has no times of its own
    ("torchcodec", "videos/Megamind.avi"): "AVI with B-frames",
    ("decord", "videos/Megamind.avi"): "AVI with B-frames",
    # frames that an edit list cuts away
    ("decord", "odd/edit_list.mp4"): "it counts 102 frames, the file has 99",
}


@pytest.fixture(params=READERS)
def reader(request, monkeypatch):
    monkeypatch.setenv("FORCE_QWENVL_VIDEO_READER", request.param)
    return request.param


# --- the truth


@functools.cache
def true_times(path):
    """Seconds of each frame that is shown, in the order of showing; the first is at 0."""
    what = [
        "-select_streams",
        "v:0",
        "-show_frames",
        "-show_entries",
        "frame=pts_time,best_effort_timestamp_time",
    ]
    command = ["ffprobe", "-v", "quiet", *what, "-of", "json", str(path)]
    frames = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)["frames"]
    times = []
    for frame in frames:
        # AVI names few times; the best effort fills in what lies between, but not after the last.
        time = frame.get("pts_time") or frame.get("best_effort_timestamp_time")
        times.append(float(time) if time else 2 * times[-1] - times[-2])
    return tuple(time - times[0] for time in times)


@functools.cache
def true_frames(path, indices, height, width):
    """uint8 [n, 3, height, width]: the frames at `indices` as `ffmpeg` decodes, turns and converts them."""
    wanted = "+".join(f"eq(n\\,{index})" for index in sorted(set(indices)))
    command = [
        "ffmpeg", "-nostdin", "-v", "quiet", "-i", str(path), "-map", "0:v:0", "-vf", f"select='{wanted}'",
        "-fps_mode", "passthrough", "-f", "image2pipe", "-c:v", "ppm", "-pix_fmt", "rgb24", "-",
    ]  # fmt: skip
    stream = subprocess.run(command, capture_output=True, check=False).stdout
    pictures, position = [], 0
    while position < len(stream):
        header = re.match(rb"P6\n(\d+) (\d+)\n255\n", stream[position : position + 40])
        columns, rows = int(header[1]), int(header[2])
        position += header.end()
        data = np.frombuffer(stream, np.uint8, rows * columns * 3, position)
        pictures.append(data.reshape(rows, columns, 3).transpose(2, 0, 1))
        position += rows * columns * 3
    frames = torch.from_numpy(np.stack(pictures))
    resized = functional.resize(frames, [height, width], InterpolationMode.BICUBIC, antialias=True)
    order = sorted(set(indices))
    return resized[[order.index(index) for index in indices]]


def spread(first, last, count):
    return torch.linspace(first, last, count).round().long().tolist()


def distance(one, other):
    return (one.float() - other.float()).abs()


# --- each reader by itself


def check_against_the_file(path, times):
    """Eight frames spread over a clip are those that the command lines show, at their times."""
    count = min(8, len(times) // 2 * 2)
    ele = {"video": str(path), "max_pixels": 200 * 784}
    if count:
        ele["nframes"] = count
    video, metadata = fetch_video(ele, return_video_metadata=True)
    assert metadata.total_num_frames == len(times)
    assert list(metadata.frames_indices) == (spread(0, len(times) - 1, count) if count else [0, 0])
    assert metadata.timestamps == pytest.approx([times[i] for i in metadata.frames_indices], abs=SECONDS)
    # what processors, vLLM and everybody else compute from the four items
    seconds = [index / metadata["fps"] for index in metadata["frames_indices"]]
    assert seconds == pytest.approx(metadata.timestamps, abs=2 * SECONDS)
    truth = true_frames(path, metadata.frames_indices, *video.shape[-2:])
    assert video.shape == truth.shape
    # The command line interpolates colours differently from the libraries; another frame is far further away.
    assert distance(video, truth).mean(dim=(1, 2, 3)).max() <= 1.5


@pytest.mark.parametrize("name", CLIPS)
def test_frames_and_times_are_those_in_the_file(real_media, reader, name):
    path = real_media / name
    if reason := REFUSED.get((reader, name)):
        with pytest.raises(VideoError, match=f"{path.name}: .*{reason}"):
            fetch_video({"video": str(path), "nframes": 8, "max_pixels": 200 * 784})
        return
    check_against_the_file(path, true_times(path))


@pytest.mark.parametrize("name", sorted({name for _, name in REFUSED}))
def test_the_default_reads_what_single_readers_refuse(real_media, name, monkeypatch, caplog):
    monkeypatch.delenv("FORCE_QWENVL_VIDEO_READER", raising=False)
    caplog.set_level(logging.DEBUG, "qwen_vl_utils.reading")
    check_against_the_file(real_media / name, true_times(real_media / name))
    assert ("trying the next reader" in caplog.text) == (("torchcodec", name) in REFUSED)


@pytest.mark.parametrize("name", CLIPS)
def test_readers_agree(real_media, monkeypatch, name):
    """The same request gives the same frames, whichever reader is installed."""
    ele = {"video": str(real_media / name), "max_pixels": 200 * 784}
    results = {}
    for each in READERS:
        if (each, name) in REFUSED:
            continue
        monkeypatch.setenv("FORCE_QWENVL_VIDEO_READER", each)
        results[each] = fetch_video(ele, return_video_metadata=True, return_video_sample_fps=True)
    (video, metadata), rate = results.pop(next(iter(results)))
    for each, ((other, more), other_rate) in results.items():
        assert more.frames_indices == metadata.frames_indices, each
        assert more.timestamps == pytest.approx(metadata.timestamps, abs=SECONDS), each
        assert more.total_num_frames == metadata.total_num_frames, each
        # A rate that the file names stands, as in 0.0.14, unless its frames' times contradict it.
        assert (more.fps, other_rate) == pytest.approx((metadata.fps, rate), rel=0.02), each
        assert other.shape == video.shape, each
        far, mean = (20, 0.5) if name in CONVERTED_DIFFERENTLY else (2, 0.02)
        assert distance(video, other).max() <= far and distance(video, other).mean() <= mean, each


@pytest.mark.parametrize("name", ["odd/rotated_90.mp4", "odd/rotated_270.mp4"])
def test_a_turned_video_stands_upright(real_media, reader, name):
    height, width = fetch_video({"video": str(real_media / name), "nframes": 2}).shape[-2:]
    assert height > width


@pytest.mark.parametrize("name", ["videos/bikes.mp4", "odd/late.mkv", "odd/b_frames.mp4"])
def test_a_part_of_a_video(real_media, reader, name):
    path = real_media / name
    times = true_times(path)
    ele = {"video": str(path), "video_start": 1.01, "video_end": 3.0, "nframes": 6, "max_pixels": 200 * 784}
    video, metadata = fetch_video(ele, return_video_metadata=True)
    assert list(metadata.frames_indices) == spread(26, 75, 6)
    assert metadata.timestamps == pytest.approx([times[i] for i in metadata.frames_indices], abs=SECONDS)
    truth = true_frames(path, metadata.frames_indices, *video.shape[-2:])
    assert distance(video, truth).mean(dim=(1, 2, 3)).max() <= 1.5


@pytest.mark.parametrize("name", ["odd/truncated.mp4", "odd/truncated.mkv"])
def test_a_download_that_broke_off(real_media, reader, name):
    """Either the frames that are there or one error that names the file; nothing else, and never a guess."""
    path = real_media / name
    times = true_times(path)
    try:
        video, metadata = fetch_video(
            {"video": str(path), "max_pixels": 200 * 784}, return_video_metadata=True
        )
    except VideoError as error:
        assert name.rpartition("/")[2] in str(error)
        return
    assert metadata.total_num_frames == len(times)
    truth = true_frames(path, metadata.frames_indices, *video.shape[-2:])
    assert distance(video, truth).mean(dim=(1, 2, 3)).max() <= 1.5


@pytest.mark.parametrize("name", ["odd/truncated.mp4", "odd/truncated.mkv"])
def test_readers_agree_on_what_broke_off(real_media, monkeypatch, name):
    outcomes = set()
    for each in READERS:
        monkeypatch.setenv("FORCE_QWENVL_VIDEO_READER", each)
        try:
            _, metadata = fetch_video({"video": str(real_media / name)}, return_video_metadata=True)
            outcomes.add(metadata.frames_indices)
        except VideoError:
            outcomes.add("VideoError")
    assert len(outcomes) == 1


# --- the times that the model reads


def marks(processor, ele):
    """The seconds written between a video's frames."""
    messages = [{"role": "user", "content": [{"type": "video", **ele}, {"type": "text", "text": "When?"}]}]
    inputs = processor_inputs(processor, [messages], add_generation_prompt=True)
    text = processor.tokenizer.decode(inputs["input_ids"][0])
    return [float(second) for second in re.findall(r"<(\d+\.\d) seconds>", text)]


@pytest.fixture(scope="module")
def processor(request):
    return AutoProcessor.from_pretrained(request.config.rootpath / NANO)


@pytest.mark.parametrize(
    ("name", "more", "first", "last"),
    [
        ("odd/vfr.mp4", {}, 0, 56),
        ("odd/vfr.mkv", {}, 0, 56),
        ("videos/bikes.mp4", {"video_start": 2.0, "video_end": 6.0}, 50, 150),
        ("odd/late.mkv", {"video_start": 1.0, "video_end": 3.0}, 25, 75),
    ],
)
def test_marks_are_the_mean_times_of_each_pair(real_media, reader, processor, name, more, first, last):
    times = true_times(real_media / name)
    shown = [times[index] for index in spread(first, last, 8)]
    pairs = [(one + other) / 2 for one, other in zip(shown[::2], shown[1::2], strict=True)]
    written = marks(processor, {"video": str(real_media / name), "nframes": 8, **more})
    # written with one digit, from indices that are within a millisecond or two of the truth
    assert written == pytest.approx(pairs, abs=0.05 + 2 * SECONDS)


# --- pictures


def test_real_pictures_are_those_of_the_release(reference, server_module, real_media):
    """But for transparency outside of RGBA and 16-bit greys, which the differential tests describe."""
    compared = 0
    for path in sorted((real_media / "pictures").iterdir()):
        if path.name == "multipage_rgb.tif":  # a form of TIFF that Pillow does not read
            continue
        with Image.open(path) as image:
            mended = (image.has_transparency_data and image.mode != "RGBA") or image.mode.startswith("I")
            upright = image.getexif().get(0x0112, 1) == 1
            flat = to_rgb(image)
        for patch in (14, 16):
            ele = {"image": str(path), "max_pixels": 600 * (2 * patch) ** 2}
            ours = server_module.plain(fetch_image(ele, patch))
            if mended or not upright:
                ele = {**ele, "image": flat}
            theirs = reference.call("fetch_image", ele, patch)
            assert theirs.error is None and np.array_equal(ours[2], theirs.value[2]), path.name
            compared += 1
    assert compared >= 70
