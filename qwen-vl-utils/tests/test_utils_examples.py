"""The examples in the release's own README give the same with ours: pictures, videos, and model inputs.

They are copied from the METADATA of 0.0.14 (below "Usage"), with real files in the place of `/path/to/your`.
"""

import base64
import functools
import http.server
import re
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoProcessor

from qwen_vl_utils import process_vision_info

NANO = Path(__file__).resolve().parents[2] / "models/qwen3-vl-nano"
READER = "torchcodec"


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, format, *args):
        pass


@pytest.fixture(scope="module")
def server(real_media):
    """The address of the folder with real pictures."""
    handler = functools.partial(Quiet, directory=str(real_media / "pictures"))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        thread = threading.Thread(target=running.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{running.server_address[1]}"
        running.shutdown()
        thread.join()


@pytest.fixture(scope="module")
def places(real_media, server, tmp_path_factory):
    """What stands in the README -> what is there."""
    pictures, frames = real_media / "pictures", tmp_path_factory.mktemp("frames")
    # Frames of a size that 0.0.14 leaves alone the first time: it resizes other lists twice.
    for index, name in enumerate(["china.jpg", "flower.jpg", "rocket.jpg"], start=1):
        with Image.open(pictures / name) as image:
            image.convert("RGB").resize((448, 336)).save(frames / f"{index}.jpg", quality=95)
    return {
        "file:///path/to/your/image.jpg": f"file://{pictures / 'china.jpg'}",
        "http://path/to/your/image.jpg": f"{server}/flower.jpg",
        "data:image;base64,/9j/...": "data:image;base64,"
        + base64.b64encode((pictures / "rocket.jpg").read_bytes()).decode(),
        "file:///path/to/video1.mp4": f"file://{real_media / 'videos/bikes.mp4'}",
        **{f"file:///path/to/extracted_frame{i}.jpg": f"file://{frames / f'{i}.jpg'}" for i in (1, 2, 3)},
    }


@pytest.fixture(scope="module")
def examples(release, real_media, places):
    """model's heading -> the `messages` of its example."""
    (metadata,) = release.glob("qwen_vl_utils-*.dist-info/METADATA")
    text = metadata.read_text()
    with Image.open(real_media / "pictures/coffee.png") as image:
        pil_image = image.convert("RGB")
    found = {}
    for heading, code in re.findall(r"### (\S+)\n\n```python\n(.*?)```", text, flags=re.DOTALL):
        literal = re.search(r"^messages = (\[.*?^\])", code, flags=re.DOTALL | re.MULTILINE).group(1)
        for name, place in places.items():
            literal = literal.replace(name, place)
        assert "path/to" not in literal and "..." not in literal
        found[heading] = eval(literal, {"pil_image": pil_image})
    assert list(found) == ["Qwen2VL", "Qwen2.5VL", "Qwen3VL"] and all(
        len(each) == 8 for each in found.values()
    )
    return found


@pytest.fixture(autouse=True)
def reader(monkeypatch):
    monkeypatch.setenv("FORCE_QWENVL_VIDEO_READER", READER)


ARGUMENTS = {
    "Qwen2VL": {},
    "Qwen2.5VL": {"return_video_kwargs": True},
    "Qwen3VL": {"image_patch_size": 16, "return_video_kwargs": True, "return_video_metadata": True},
}


def assert_pixels(ours, theirs):
    assert ours[:2] == theirs[:2] and ours[2].shape == theirs[2].shape
    levels = 0 if ours[0] == "image" else 1
    assert np.abs(ours[2].astype(np.int16) - theirs[2]).max() <= levels


def assert_results(ours, theirs):
    assert len(ours) == len(theirs)
    for one, other in zip(ours[0] or [], theirs[0] or [], strict=True):
        assert_pixels(one, other)
    for one, other in zip(ours[1] or [], theirs[1] or [], strict=True):
        if isinstance(other[0], str):
            assert_pixels(one, other)
            continue
        assert_pixels(one[0], other[0])
        assert one[1] == {"video_backend": "frame_list", **other[1]}
    assert ours[2:] == theirs[2:]


@pytest.mark.parametrize("heading", ARGUMENTS)
def test_each_example_and_their_batch(reference, server_module, examples, heading):
    """The README passes all of them as one batch; people pass one of them."""
    conversations, arguments = examples[heading], ARGUMENTS[heading]
    for messages in [*conversations, conversations]:
        theirs = reference.call("process_vision_info", messages, reader=READER, **arguments)
        assert theirs.error is None, theirs
        assert_results(server_module.plain(process_vision_info(messages, **arguments)), theirs.value)


def test_several_pictures_and_a_video_in_one_conversation(reference, server_module, places, real_media):
    image, url = places["file:///path/to/your/image.jpg"], places["http://path/to/your/image.jpg"]
    video = {"type": "video", "video": str(real_media / "videos/carphone_pristine.mp4"), "max_pixels": 151200}
    conversation = [
        {"role": "system", "content": "You look closely."},
        {
            "role": "user",
            "content": [
                {"type": "image", "image": image, "min_pixels": 50176, "max_pixels": 50176 * 2},
                {"type": "text", "text": "and"},
                {"type": "image", "image": url},
                {**video, "fps": 1.0},
                {"type": "text", "text": "What do they share?"},
            ],
        },
        {"role": "assistant", "content": [{"type": "text", "text": "Colours."}]},
        {"role": "user", "content": [{"type": "image_url", "image_url": url}, {**video, "nframes": 6}]},
    ]
    for arguments in ARGUMENTS.values():
        theirs = reference.call("process_vision_info", conversation, reader=READER, **arguments)
        assert theirs.error is None, theirs
        ours = process_vision_info(conversation, **arguments)
        assert len(ours[0]) == 3 and len(ours[1]) == 2
        assert_results(server_module.plain(ours), theirs.value)


def as_the_readme_goes_on(processor, messages, images, videos, video_kwargs):
    """From the Qwen3VL example, the model left out."""
    text = processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    if videos is not None:
        videos, video_metadatas = zip(*videos, strict=True)
        videos, video_metadatas = list(videos), list(video_metadatas)
    else:
        video_metadatas = None
    return processor(
        text=text,
        images=images,
        videos=videos,
        video_metadata=video_metadatas,
        return_tensors="pt",
        do_resize=False,
        **video_kwargs,
    )


def as_objects(value):
    """The release's results out of their plain form."""
    images, videos, video_kwargs = value
    if images is not None:
        images = [Image.fromarray(array) for _, _, array in images]
    if videos is not None:
        videos = [(torch.from_numpy(frames[2]).float(), metadata) for frames, metadata in videos]
    return images, videos, video_kwargs


def test_the_model_inputs_of_the_examples(reference, examples):
    """Token ids, grids and the times written between frames are equal, pixels within one grey level."""
    processor = AutoProcessor.from_pretrained(NANO)
    arguments = ARGUMENTS["Qwen3VL"]
    for messages in examples["Qwen3VL"]:
        theirs = reference.call("process_vision_info", messages, reader=READER, **arguments)
        expected = as_the_readme_goes_on(processor, messages, *as_objects(theirs.value))
        ours = as_the_readme_goes_on(processor, messages, *process_vision_info(messages, **arguments))
        assert set(ours) == set(expected)
        for key, value in expected.items():
            # one grey level of 255, normalised with a standard deviation of 0.5
            tolerance = 2.01 / 255 if key == "pixel_values_videos" else 0
            assert ours[key].shape == value.shape
            assert (ours[key].float() - value.float()).abs().max() <= tolerance, key
