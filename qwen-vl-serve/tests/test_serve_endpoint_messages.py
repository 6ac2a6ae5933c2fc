"""Messages on their way to an endpoint and back to items: nothing is lost, odd options are refused."""

import base64
import io

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from qwen_vl_serve.endpoint_messages import REAL, WHOLE, endpoint_messages, item_of, media_url
from qwen_vl_utils import MediaError, MediaNotFound, MediaPolicy, MediaRefused, fetch_image, fetch_video

numbers = st.dictionaries(st.sampled_from(WHOLE), st.integers(1, 10**9)) | st.dictionaries(
    st.sampled_from(REAL), st.floats(0, 1e6)
)


@given(numbers)
def test_options_travel_in_the_fragment(options):
    source = "data:video/mp4;base64,AAAA"
    assert item_of("video", media_url("video", source, options)) == {
        "type": "video",
        "video": source,
        **options,
    }


def test_files_travel_as_they_are_and_pictures_in_memory_without_loss(pictures, clip):
    for path, kind, mime in [(pictures[0], "image", "image/png"), (clip, "video", "video/mp4")]:
        head, _, body = media_url(kind, path).partition(",")
        assert head == f"data:{mime};base64"
        with open(path, "rb") as file:
            assert base64.b64decode(body) == file.read()
    pixels = np.random.default_rng(0).integers(0, 256, (40, 30, 3), dtype=np.uint8)
    body = media_url("image", Image.fromarray(pixels)).partition(",")[2]
    with Image.open(io.BytesIO(base64.b64decode(body))) as received:
        assert np.array_equal(np.asarray(received), pixels)


def test_what_is_received_has_the_pixels_of_what_was_sent(pictures, clip):
    sent = [
        {"type": "image", "image": pictures[1], "max_pixels": 100 * 100},
        {"type": "video", "video": clip, "fps": 3.0, "video_start": 0.5, "max_pixels": 80 * 80},
        {"type": "video", "video": pictures[:1] * 4, "sample_fps": 2.0, "raw_fps": 8.0},
    ]
    [message] = endpoint_messages([{"role": "user", "content": [*sent, {"type": "text", "text": "?"}]}])
    *media, text = message["content"]
    assert text == {"type": "text", "text": "?"}
    image = item_of("image", media[0]["image_url"]["url"])
    assert np.array_equal(np.asarray(fetch_image(image)), np.asarray(fetch_image(sent[0])))
    for before, part in zip(sent[1:], media[1:], strict=True):
        after = item_of("video", part["video_url"]["url"])
        frames, metadata = fetch_video(before, return_video_metadata=True)
        received, told = fetch_video(after, return_video_metadata=True)
        assert np.array_equal(frames, received)
        assert (metadata.timestamps, metadata.fps) == (told.timestamps, told.fps)


def test_an_address_is_for_the_server_to_fetch_unless_an_option_has_to_go_with_it():
    item = {"type": "image_url", "image_url": {"url": "https://example.com/cat.png"}}
    assert endpoint_messages([{"role": "user", "content": [item]}])[0]["content"] == [item]
    refused = MediaPolicy.strict(domains=[])
    with pytest.raises(MediaRefused):  # it would be fetched here, under the caller's policy
        endpoint_messages([{"role": "user", "content": [{**item, "max_pixels": 9000}]}], refused)


def test_the_detail_of_an_openai_item_arrives(pictures):
    item = {"type": "image_url", "image_url": {"url": pictures[0], "detail": "low"}}
    [message] = endpoint_messages([{"role": "user", "content": [item]}])
    assert item_of("image", message["content"][0]["image_url"]["url"])["detail"] == "low"


@pytest.mark.parametrize(
    ("fragment", "told"),
    [
        ("speed=2", "'speed', which is no option"),
        ("fps=fast", "fps='fast'"),
        ("nframes=1.5", "nframes='1.5'"),
    ],
)
def test_what_is_no_option_is_refused_by_name(fragment, told):
    with pytest.raises(MediaError, match=told):
        item_of("video", f"data:video/mp4;base64,AAAA#{fragment}")


def test_a_missing_file_is_named():
    with pytest.raises(MediaNotFound, match=r"nowhere\.png"):
        endpoint_messages([{"role": "user", "content": [{"type": "image", "image": "nowhere.png"}]}])
