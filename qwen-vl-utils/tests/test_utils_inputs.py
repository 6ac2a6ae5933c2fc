"""`processor_inputs` equals the model library's own path on the same resized media, bit for bit."""

import copy
import logging
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torchvision.transforms.v2 import functional
from transformers import (
    PreTrainedTokenizerFast,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessor,
    Qwen2VLProcessor,
    Qwen3VLProcessor,
)
from transformers.models.qwen2_vl.video_processing_qwen2_vl import Qwen2VLVideoProcessor
from transformers.models.qwen3_vl.video_processing_qwen3_vl import Qwen3VLVideoProcessor

from qwen_vl_utils import MediaError, PixelCache, fetch_image, processor_inputs, scale_pixels, vision_process
from qwen_vl_utils.inputs import _processor_frame_bounds
from qwen_vl_utils.loading import load_video
from qwen_vl_utils.patches import PatchLayout

SPECIAL = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>",
    "<|image_pad|>", "<|video_pad|>",
)  # fmt: skip

TEMPLATE = """{%- for message in messages -%}
<|im_start|>{{ message.role }}
{% if message.content is string %}{{ message.content }}{% else %}{% for item in message.content -%}
{%- if item.type == 'image' or 'image' in item -%}
{% if add_vision_id %}Picture: {% endif %}<|vision_start|><|image_pad|><|vision_end|>
{%- elif item.type == 'video' or 'video' in item -%}<|vision_start|><|video_pad|><|vision_end|>
{%- else %}{{ item.text }}{% endif %}{% endfor %}{% endif %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


def build_tokenizer():
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<|endoftext|>", eos_token="<|im_end|>"
    )


def build_processor(family):
    tokenizer = build_tokenizer()
    size = {"shortest_edge": 56 * 56, "longest_edge": 280 * 280}
    if family == "qwen3_vl":
        half = [0.5, 0.5, 0.5]
        return Qwen3VLProcessor(
            image_processor=Qwen2VLImageProcessor(patch_size=16, size=size, image_mean=half, image_std=half),
            tokenizer=tokenizer,
            video_processor=Qwen3VLVideoProcessor(size={"shortest_edge": 4096, "longest_edge": 64 * 64 * 40}),
            chat_template=TEMPLATE,
        )
    kind = {"qwen2_vl": Qwen2VLProcessor, "qwen2_5_vl": Qwen2_5_VLProcessor}[family]
    return kind(
        image_processor=Qwen2VLImageProcessor(size=size),
        tokenizer=tokenizer,
        video_processor=Qwen2VLVideoProcessor(size={"shortest_edge": 56 * 56, "longest_edge": 112 * 112}),
        chat_template=TEMPLATE,
    )


@pytest.fixture(scope="module", params=["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def processor(request):
    return build_processor(request.param)


def noise(width, height, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def user(*items, answer=None):
    content = [{"type": "text", "text": item} if isinstance(item, str) else item for item in items]
    messages = [{"role": "user", "content": content}]
    return messages if answer is None else [*messages, {"role": "assistant", "content": answer}]


def image(*size, seed=0, **more):
    return {"type": "image", "image": noise(*size, seed=seed), **more}


def video(frames=4, seed=0, size=(60, 60), **more):
    return {"type": "video", "video": [noise(*size, seed=seed + i) for i in range(frames)], **more}


def plain(processor, conversations, images, videos, **kwargs):
    """The library's path: its template rendering, image and video processors, placeholder expansion."""
    texts = [
        processor.apply_chat_template(
            [{**m, "content": [bare(item) for item in m["content"]]} if isinstance(m["content"], list) else m
             for m in conversation],
            tokenize=False,
            add_generation_prompt=kwargs["add_generation_prompt"],
        )
        for conversation in conversations
    ]  # fmt: skip
    options = {"padding": kwargs.get("padding", False)}
    media = {}
    if images:
        media["images"] = images
        options["images_kwargs"] = {"do_resize": False}
    if videos:
        media["videos"] = [clip.frames for clip in videos]
        options["videos_kwargs"] = {
            "do_resize": False,
            "do_sample_frames": False,
            "cap_pixels_per_frame": True,
            "video_metadata": [clip.metadata for clip in videos],
        }
    tensors = "pt" if kwargs.get("padding") or len(texts) == 1 else None
    return processor(text=texts, **media, **options, return_tensors=tensors)


def bare(item):
    return {"type": item["type"]} if item["type"] in ("image", "video") else item


def own_media(processor, conversations):
    """The resized pictures and videos that `processor_inputs` is expected to use."""
    size = processor.image_processor.size
    images, videos = [], []
    for item in vision_process.extract_vision_info(conversations):
        if item["type"] == "image":
            limits = {"min_pixels": size["shortest_edge"], "max_pixels": size["longest_edge"], **item}
            width, height = fetch_image(limits, processor.image_processor.patch_size).size
            images.append(
                functional.resize(
                    functional.pil_to_tensor(item["image"]),
                    [height, width],
                    functional.InterpolationMode.BICUBIC,
                    antialias=True,
                )
            )
        else:
            patch_size = processor.video_processor.patch_size
            limits = lambda _, frames: _processor_frame_bounds(processor.video_processor, frames)  # noqa: E731
            videos.append(load_video(item, vision_process.rules(patch_size * 2, (0, 0), limits)))
    return images, videos


def assert_same(ours, theirs):
    assert set(ours) == set(theirs)
    for key in theirs:
        if isinstance(theirs[key], torch.Tensor):
            assert ours[key].dtype == theirs[key].dtype, key
            assert torch.equal(ours[key], theirs[key]), key
        else:
            assert list(ours[key]) == list(theirs[key]), key


CASES = {
    "text": [user("hello", answer="hi")],
    "picture": [user(image(64, 64), "what is it?", answer="red")],
    "pictures": [user(image(90, 130), "and", image(300, 40, seed=1), image(300, 41, seed=2), answer="two")],
    "video": [user(video(), "what happens?")],
    "mixed": [user(video(6), image(64, 64), "and", video(3, seed=9, size=(80, 40)), image(70, 90), "?")],
    "named bounds": [user(image(300, 300, max_pixels=100 * 100, min_pixels=80 * 80), "?")],
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("prompt", [False, True])
def test_one_conversation_equals_the_librarys_path(processor, case, prompt):
    conversations = CASES[case]
    ours = processor_inputs(processor, conversations, add_generation_prompt=prompt)
    images, videos = own_media(processor, conversations)
    assert_same(ours, plain(processor, conversations, images, videos, add_generation_prompt=prompt))


@pytest.mark.parametrize("padding", [False, True])
def test_a_batch_equals_the_librarys_path(processor, padding):
    conversations = [case[0] for case in CASES.values()]
    ours = processor_inputs(processor, conversations, add_generation_prompt=True, padding=padding)
    images, videos = own_media(processor, conversations)
    theirs = plain(processor, conversations, images, videos, add_generation_prompt=True, padding=padding)
    if not padding:
        assert isinstance(ours["input_ids"], list) and isinstance(ours["mm_token_type_ids"][1], list)
        theirs["image_grid_thw"] = torch.as_tensor(theirs["image_grid_thw"])
        if "second_per_grid_ts" in theirs:
            theirs["second_per_grid_ts"] = torch.tensor(theirs["second_per_grid_ts"])
    assert_same(ours, theirs)


@pytest.mark.parametrize("seed", range(8))
def test_pictures_equal_what_the_library_makes_of_them_by_itself(processor, seed):
    """The library opens, resizes and cuts, nothing prepared: what vLLM and a plain script compute."""
    random = np.random.default_rng(seed)
    width, height = (int(side) for side in random.integers(60, 700, 2))
    smooth = Image.fromarray(random.integers(0, 256, (9, 7, 3), dtype=np.uint8)).resize((width, height))
    message = user({"type": "image", "image": smooth}, "and", image(width, height, seed=seed))
    ours = processor_inputs(processor, [message], add_generation_prompt=True)
    theirs = processor.apply_chat_template(
        [message], tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True,
        processor_kwargs={"return_mm_token_type_ids": True},
    )  # fmt: skip
    assert_same(ours, theirs)


def test_pixels_scaled_later_are_those_scaled_at_once(processor):
    [conversation] = CASES["mixed"]
    at_once = processor_inputs(processor, [conversation], add_generation_prompt=True)
    later = processor_inputs(processor, [conversation], add_generation_prompt=True, scaled=False)
    for name in ("pixel_values", "pixel_values_videos"):
        assert later[name].dtype == torch.uint8 and later[name].shape == at_once[name].shape
    assert_same(scale_pixels(later, processor), at_once)


def test_a_cache_keeps_pictures_resized_in_two_ways_apart(processor, tmp_path):
    """`fetch_image` resizes by Pillow, `processor_inputs` as the model library: no file serves both."""
    noise(500, 400).save(tmp_path / "noise.png")
    size = {"resized_height": 168, "resized_width": 224}
    item = {"type": "image", "image": str(tmp_path / "noise.png"), **size}
    patch = processor.image_processor.patch_size
    cache = PixelCache(tmp_path / "cache")
    for _ in range(2):  # made, then read
        fetched = fetch_image(item, patch, cache=cache)
        assert fetched.tobytes() == fetch_image(item, patch).tobytes()
        cached = processor_inputs(processor, [user(item)], add_generation_prompt=True, cache=cache)
        plain_inputs = processor_inputs(processor, [user(item)], add_generation_prompt=True)
        assert_same(cached, plain_inputs)
    assert len(list((tmp_path / "cache").glob("??/*.npz"))) == 2


def test_padding_on_the_left(processor):
    conversations = [user("a"), user(image(64, 64), "a long question")]
    ours = processor_inputs(
        processor, conversations, add_generation_prompt=True, padding=True, padding_side="left"
    )
    single = processor_inputs(processor, conversations[:1], add_generation_prompt=True)
    length = single["input_ids"].shape[1]
    assert torch.equal(ours["input_ids"][0, -length:], single["input_ids"][0])
    assert ours["attention_mask"][0].sum() == length and not ours["attention_mask"][0, 0]
    assert not ours["mm_token_type_ids"][0].any()


def test_a_picture_counts_as_many_tokens_as_merged_patches(processor):
    ours = processor_inputs(processor, [user(image(100, 100), "?")], add_generation_prompt=True)
    tokens = (ours["input_ids"] == processor.image_token_id).sum()
    assert tokens == (ours["mm_token_type_ids"] == 1).sum() == ours["image_grid_thw"].prod() // 4
    assert ours["pixel_values"].shape[0] == ours["image_grid_thw"].prod()


def test_sizes_follow_the_processors_configuration(processor):
    """The 9000 pixels of 90 x 100 are inside the bounds, 20 x 20 is raised to them, 1000 x 1000 lowered."""
    unit = processor.image_processor.patch_size * 2
    for side, low, high in [(100, 80 * 80, 120 * 120), (20, 56 * 56, 70 * 70), (1000, 200 * 200, 280 * 280)]:
        grid = processor_inputs(processor, [user(image(side, side), "?")], add_generation_prompt=True)
        pixels = grid["image_grid_thw"].prod().item() * (unit // 2) ** 2
        assert low <= pixels <= high, (side, pixels)


def test_video_bounds_are_the_processors_and_an_items_own_win(processor):
    def frame_pixels(**more):
        ours = processor_inputs(
            processor, [user(video(8, size=(400, 400), **more), "?")], add_generation_prompt=True
        )
        return ours["video_grid_thw"][0, 1:].prod().item() * processor.video_processor.patch_size**2

    size = processor.video_processor.size
    whole = type(processor.video_processor).__name__ == "Qwen3VLVideoProcessor"
    most = size["longest_edge"] / 8 if whole else size["longest_edge"]
    assert most / 2 < frame_pixels() <= most
    assert frame_pixels(max_pixels=64 * 64) <= 64 * 64
    assert 200 * 200 <= frame_pixels(min_pixels=200 * 200, max_pixels=300 * 300) <= 300 * 300


@pytest.mark.parametrize("frames", [4, 8, 40, 200])
@pytest.mark.parametrize("options", [{}, {"max_video_tokens": 9}, {"cap_pixels_per_frame": False}], ids=str)
@pytest.mark.parametrize("kind", [Qwen2VLVideoProcessor, Qwen3VLVideoProcessor])
def test_video_bounds_equal_the_librarys_resize(kind, options, frames):
    """The library computes sizes by a code of its own; compared where it keeps its bounds."""
    if kind is Qwen2VLVideoProcessor and "max_video_tokens" in options:
        options = {"max_video_tokens": 200}  # of the whole video there, of a frame for Qwen3-VL
    size = {"shortest_edge": 4096, "longest_edge": 112 * 112 * (1 if kind is Qwen2VLVideoProcessor else 40)}
    video_processor = kind(size=size, **options)
    low, high = _processor_frame_bounds(video_processor, frames)
    factor = video_processor.patch_size * 2
    compared = 0
    for height, width in [(60, 60), (90, 300), (480, 640), (100, 150)]:
        ours = vision_process.sizes.fit(height, width, factor, low, high, 200)
        resized = video_processor.resize(
            torch.zeros(1, frames, 3, height, width, dtype=torch.uint8),
            video_processor.size,
            video_processor.resample,
            factor=factor,
            temporal_factor=2,
            cap_pixels_per_frame=options.get("cap_pixels_per_frame", True),
        )
        theirs = tuple(resized.shape[-2:])
        assert low <= ours[0] * ours[1] <= high
        if low <= theirs[0] * theirs[1] <= high:
            assert theirs == ours, (height, width)
            compared += 1
    assert compared or frames == 200  # so many frames leave the library no size in its own bounds


def test_true_times_of_a_video_reach_the_prompt():
    processor = build_processor("qwen3_vl")
    clip = video(6, sample_fps=0.5, raw_fps=30.0)
    text = processor.tokenizer.decode(
        processor_inputs(processor, [user(clip, "?")], add_generation_prompt=True)["input_ids"][0]
    )
    marks = [piece.split(" seconds>")[0] for piece in text.split("<")[1:] if " seconds>" in piece]
    assert marks == ["1.0", "5.0", "9.0"]  # mean of 0 and 2, of 4 and 6, of 8 and 10


def test_seconds_per_grid_come_from_the_frames_taken():
    processor = build_processor("qwen2_5_vl")
    ours = processor_inputs(
        processor, [user(video(4, sample_fps=0.5), video(4), "?")], add_generation_prompt=True
    )
    assert ours["second_per_grid_ts"].tolist() == [4.0, 1.0]


def test_template_arguments_and_table_rows(processor):
    row = [{"role": "user", "content": [
        {"type": "image", "image": noise(64, 64), "text": None, "video": None},
        {"type": "text", "text": "what?", "image": None, "video": None},
    ]}]  # fmt: skip
    before = copy.deepcopy(row)
    ours = processor_inputs(processor, [row], add_generation_prompt=False, add_vision_id=True)
    text = processor.tokenizer.decode(ours["input_ids"][0])
    assert "Picture: <|vision_start|><|image_pad|>" in text and text.count("what?") == 1
    assert len(ours["image_grid_thw"]) == 1
    assert row[0]["content"][1] == before[0]["content"][1] and set(row[0]["content"][0]) == {
        "type", "image", "text", "video",
    }  # fmt: skip


def test_a_placeholder_in_a_text_is_refused(processor):
    for text in ("see <|image_pad|>", "see <|video_pad|>"):
        with pytest.raises(ValueError, match="conversation 1: the rendered text has"):
            processor_inputs(
                processor, [user("a"), user(image(64, 64), text)], add_generation_prompt=True, padding=True
            )


def test_a_single_conversation_must_stand_in_a_list(processor):
    for wrong in (user("hello"), []):
        with pytest.raises(ValueError, match="list of conversations"):
            processor_inputs(processor, wrong, add_generation_prompt=True)


def test_a_missing_picture_is_named(processor):
    with pytest.raises(MediaError, match=r"/no/such\.png does not exist"):
        processor_inputs(
            processor, [user({"type": "image", "image": "/no/such.png"}, "?")], add_generation_prompt=True
        )


def test_an_unknown_video_processor_is_refused():
    class Other(Qwen2VLVideoProcessor):
        pass

    with pytest.raises(ValueError, match="unknown video processor Other"):
        _processor_frame_bounds(Other(), 4)


# --- patches


@pytest.mark.parametrize("patch", [14, 16])
@pytest.mark.parametrize("merge", [1, 2, 4])
@pytest.mark.parametrize("temporal", [1, 2, 3])
def test_picture_patches_equal_the_librarys(patch, merge, temporal):
    theirs = Qwen2VLImageProcessor(patch_size=patch, merge_size=merge, temporal_patch_size=temporal)
    factor = patch * merge
    picture = noise(3 * factor, 2 * factor)
    expected = theirs([picture], do_resize=False, return_tensors="pt")
    patches, grid = PatchLayout.of(theirs).image(np.asarray(picture))
    assert torch.equal(torch.from_numpy(patches), expected["pixel_values"])
    assert [list(grid)] == expected["image_grid_thw"].tolist()


@pytest.mark.parametrize("kind", [Qwen2VLVideoProcessor, Qwen3VLVideoProcessor])
@pytest.mark.parametrize("frames", [1, 4, 5])
def test_video_patches_equal_the_librarys(kind, frames):
    theirs = kind(cap_pixels_per_frame=True)
    factor = theirs.patch_size * theirs.merge_size
    clip = torch.randint(
        0,
        256,
        (frames, 3, 2 * factor, 3 * factor),
        dtype=torch.uint8,
        generator=torch.Generator().manual_seed(0),
    )
    expected = theirs([clip], do_resize=False, do_sample_frames=False, return_tensors="pt")
    patches, grid = PatchLayout.of(theirs).video(clip.numpy())
    assert torch.equal(torch.from_numpy(patches), expected["pixel_values_videos"])
    assert [list(grid)] == expected["video_grid_thw"].tolist()


def test_a_processor_that_does_not_normalise_is_refused():
    with pytest.raises(ValueError, match="do_normalize=False"):
        PatchLayout.of(Qwen2VLImageProcessor(do_normalize=False))


# --- the package


def test_import_loads_no_heavy_package():
    code = (
        "import sys, qwen_vl_utils; from qwen_vl_utils import sizes;"
        "heavy = ('torch', 'numpy', 'av', 'torchcodec', 'transformers', 'requests');"
        "print([name for name in heavy if name in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


def test_nothing_is_logged_on_the_way(processor, caplog):
    with caplog.at_level(logging.WARNING):
        processor_inputs(processor, CASES["mixed"], add_generation_prompt=True)
    assert not caplog.records


def test_the_readmes_example_prints_what_it_says(capsys):
    readme = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    example = readme.split("```python\n")[1].split("```")[0]
    exec(compile(example, "README.md", "exec"), {})
    printed = capsys.readouterr().out.splitlines()
    said = [line.split("# ", 1)[1] for line in example.splitlines() if "  # " in line]
    assert len(printed) == len(said) == 4
    assert all(told.startswith(line) for line, told in zip(printed, said, strict=True))
