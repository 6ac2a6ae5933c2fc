"""How many tokens a prompt takes: told from headers, and kept to a budget."""

import io
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import AutoProcessor

from qwen_vl_utils import (
    MediaError,
    MediaPolicy,
    MediaRefused,
    count_tokens,
    fetch_image,
    process_vision_info,
    processor_inputs,
    readers,
)

NANO = Path(__file__).resolve().parents[2] / "models/qwen3-vl-nano"
READERS = [name for name in ("torchcodec", "decord", "pyav") if readers.installed(name)]


@pytest.fixture(scope="module")
def processor():
    return AutoProcessor.from_pretrained(NANO)


@pytest.fixture(scope="module", params=["patch 14", "patch 16"])
def any_processor(request):
    """The nano model's, and one of Qwen2.5-VL's kind with its vocabulary."""
    qwen3 = AutoProcessor.from_pretrained(NANO)
    if request.param == "patch 16":
        return qwen3
    from transformers import Qwen2_5_VLProcessor, Qwen2VLImageProcessor
    from transformers.models.qwen2_vl.video_processing_qwen2_vl import Qwen2VLVideoProcessor

    size = {"shortest_edge": 56 * 56, "longest_edge": 280 * 280}
    return Qwen2_5_VLProcessor(
        image_processor=Qwen2VLImageProcessor(size=size),
        video_processor=Qwen2VLVideoProcessor(size=size),
        tokenizer=qwen3.tokenizer,
        chat_template=qwen3.chat_template,
    )


def user(*items):
    content = [{"type": "text", "text": item} if isinstance(item, str) else item for item in items]
    return [{"role": "user", "content": content}]


def encoded(size, orientation=1, format="JPEG"):
    image = Image.effect_noise(size, 60).convert("RGB")
    exif = Image.Exif()
    exif[0x0112] = orientation
    stream = io.BytesIO()
    image.save(stream, format, exif=exif)
    return stream.getvalue()


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """30 frames at a variable rate."""
    path = tmp_path_factory.mktemp("clips") / "clip.mkv"
    times = [*range(0, 2000, 100), *range(2000, 12000, 1000)]
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=10)
        stream.width, stream.height, stream.pix_fmt = 98, 64, "yuv420p"
        stream.codec_context.time_base = Fraction(1, 1000)
        for index, time in enumerate(times):
            pixels = np.full((64, 98, 3), 10 + 5 * index, np.uint8)
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts, frame.time_base = time, Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return str(path)


def counted(processor, conversation, **kwargs):
    inputs = processor_inputs(processor, [conversation], add_generation_prompt=True, **kwargs)
    return inputs["input_ids"].shape[1]


@given(
    sizes=st.lists(st.tuples(st.integers(10, 400), st.integers(10, 400)), max_size=3),
    orientation=st.integers(1, 8),
    format=st.sampled_from(["JPEG", "PNG", "WEBP"]),
    frames=st.integers(1, 5),
    total=st.none() | st.integers(60, 400),
)
@settings(max_examples=60, deadline=None)
def test_the_count_is_that_of_the_prompt(any_processor, sizes, orientation, format, frames, total):
    pictures = [{"type": "image", "image": encoded(size, orientation, format)} for size in sizes]
    video = {"type": "video", "video": [encoded((90, 70), orientation)] * frames, "sample_fps": 1.7}
    conversation = user("Look:", *pictures, video, "what do you see?")
    assert count_tokens(conversation, any_processor, total_tokens=total) == counted(
        any_processor, conversation, total_tokens=total
    )


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("item", [{}, {"fps": 1}, {"nframes": 6, "video_start": 1, "video_end": 3}], ids=str)
def test_the_count_of_a_video_file(any_processor, clip, reader, item, monkeypatch):
    """Its marks of time are text: other times would be another number of tokens."""
    monkeypatch.setenv("FORCE_QWENVL_VIDEO_READER", reader)
    conversation = user({"type": "video", "video": clip, **item}, "what happens?")
    assert count_tokens(conversation, any_processor) == counted(any_processor, conversation)
    limited = counted(any_processor, conversation, total_tokens=40)
    assert count_tokens(conversation, any_processor, total_tokens=40) == limited


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
def test_no_pixel_is_decoded(processor, format):
    """A file cut off behind its header still tells its size."""
    whole = encoded((300, 200), 6, format)
    cut = whole[: len(whole) // 2] if format != "WEBP" else whole
    if format != "WEBP":  # WebP keeps its EXIF behind the pixels
        with pytest.raises(MediaError):
            fetch_image({"image": cut})
    text = "what is it?"
    assert count_tokens(user({"type": "image", "image": cut}, text), processor) == counted(
        processor, user({"type": "image", "image": whole}, text)
    )


def test_arguments_reach_the_template(processor):
    conversation = user({"type": "image", "image": encoded((64, 64))}, "what?")
    plain = count_tokens(conversation, processor)
    assert count_tokens(conversation, processor, add_generation_prompt=False) < plain
    assert count_tokens(conversation, processor, add_vision_id=True) > plain


# --- total_tokens


def tokens(images, videos, factor):
    each = [image.width * image.height // factor**2 for image in images or []]
    for video in videos or []:
        each.append(len(video) // 2 * video.shape[2] * video.shape[3] // factor**2)
    return each


def test_all_media_of_a_prompt_share_one_budget(clip):
    small, large = encoded((64, 64)), encoded((1200, 900))
    content = [
        {"type": "image", "image": small},
        {"type": "image", "image": large},
        {"type": "video", "video": clip},
        {"type": "image", "image": large},
    ]
    free = tokens(*process_vision_info(user(*content), image_patch_size=16), 32)
    images, videos = process_vision_info(user(*content), image_patch_size=16, total_tokens=500)
    kept = tokens(images, videos, 32)
    assert sum(free) > 500 >= sum(kept)
    assert kept[0] == free[0] == 4
    # the others' share is 165 each; the small clip is no longer enlarged
    assert kept[1] == kept[2] and 130 < kept[1] <= 165 and kept[3] <= 165 < free[3]
    assert process_vision_info(user(*content), image_patch_size=16, total_tokens=10**6)[0][1].size == (
        fetch_image(content[1], 16).size
    )


def test_a_picture_within_a_budget_is_resized_once():
    large = encoded((900, 700))
    images, _ = process_vision_info(
        user({"type": "image", "image": large}), image_patch_size=16, total_tokens=100
    )
    with Image.open(io.BytesIO(large)) as image:
        assert images[0].tobytes() == image.resize(images[0].size).tobytes()


def test_sizes_that_are_named_are_kept():
    fixed = {"type": "image", "image": encoded((64, 64)), "resized_height": 320, "resized_width": 320}
    free = {"type": "image", "image": encoded((900, 900))}
    images, _ = process_vision_info(user(fixed, free), image_patch_size=16, total_tokens=150)
    assert images[0].size == (320, 320) and tokens(images, None, 32)[1] <= 50
    with pytest.raises(ValueError, match="total_tokens=90 can't hold the media of this prompt"):
        process_vision_info(user(fixed, free), image_patch_size=16, total_tokens=90)


def test_the_number_of_media_is_the_policys():
    picture = {"type": "image", "image": encoded((64, 64))}
    with pytest.raises(MediaRefused, match="max_media"):
        process_vision_info(user(picture, picture), policy=MediaPolicy(max_media=1))


def test_the_first_medium_that_fails_is_named(tmp_path):
    good = {"type": "image", "image": encoded((64, 64))}
    missing = [{"type": "image", "image": str(tmp_path / f"{name}.png")} for name in ("a", "b")]
    with pytest.raises(MediaError, match=r"a\.png does not exist"):
        process_vision_info(user(good, *missing, good))


def test_frames_are_float_or_uint8(clip):
    floats, bytes_ = (
        process_vision_info(user({"type": "video", "video": clip}), dtype=dtype)[1][0]
        for dtype in (None, torch.uint8)
    )
    assert floats.dtype == torch.float32 and bytes_.dtype == torch.uint8
    assert torch.equal(floats, bytes_.float())
    with pytest.raises(ValueError, match=r"dtype=torch\.int64"):
        process_vision_info(user({"type": "video", "video": clip}), dtype=torch.int64)
