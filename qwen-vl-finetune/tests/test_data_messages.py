"""Rows of both formats: the same messages, the same loss, and options of an item that reach its pixels."""

import json

import pytest
import torch
from PIL import Image
from transformers import AutoConfig, AutoProcessor

from qwenvl.data.data_processor import make_supervised_data_module
from qwenvl.data.labels import IGNORE_INDEX
from qwenvl.data.messages import Sample, read_sample, refused_text
from qwenvl.train.argument import DataArguments

REFUSED = refused_text(["<|im_start|>", "<|im_end|>", "<|image_pad|>"])
TOOLS = [{"type": "function", "function": {"name": "zoom", "parameters": {"type": "object"}}}]
CALL = {"type": "function", "function": {"name": "zoom", "arguments": {"by": 2}}}


def read(row: object) -> Sample:
    return read_sample(row, "/data", REFUSED)


def user(*items) -> dict:
    return {"role": "user", "content": list(items)}


def text(value: str) -> dict:
    return {"type": "text", "text": value}


def answer(value: object = "A cat.", **fields) -> dict:
    return {"role": "assistant", "content": value, **fields}


IMAGE = {"type": "image", "image": "a.png"}
VIDEO = {"type": "video", "video": "clip.mp4"}
TWICE = {
    "image": "a.png",
    "video": "clip.mp4",
    "conversations": [
        {"from": "system", "value": "Be brief."},
        {"from": "human", "value": "<image>\nand <video> ?"},
        {"from": "gpt", "value": "A cat."},
    ],
}
SYSTEM = {"role": "system", "content": "Be brief."}
EQUAL = {
    "items with their sources": [user(IMAGE, text("\nand "), VIDEO, text(" ?")), answer()],
    "addresses as OpenAI writes them": [
        user({"type": "image_url", "image_url": {"url": "a.png", "detail": "low"}}, text("\nand "),
             {"type": "video_url", "video_url": {"url": "clip.mp4"}}, text(" ?")),
        answer(),
    ],
    "empty columns of a table": [
        user({"type": "image", "image": "a.png", "text": None, "video": None},
             {"type": "text", "text": "\nand ", "image": None}, VIDEO, text(" ?")),
        answer(tool_calls=None, reasoning_content=None, weight=None),
    ],
    "answers as items": [user(IMAGE, text("\nand "), VIDEO, text(" ?")), answer([text("A "), text("cat.")])],
}  # fmt: skip


@pytest.mark.parametrize("name", EQUAL)
def test_both_formats_give_the_same_sample(name):
    assert read({"messages": [SYSTEM, *EQUAL[name]]}) == read(TWICE)


def test_sources_in_the_rows_columns_follow_the_order_of_the_items():
    bare = [SYSTEM, user({"type": "image"}, text("\nand "), {"type": "video"}, text(" ?")), answer()]
    row = {"messages": bare, "images": [{"bytes": None, "path": "a.png"}], "videos": ["clip.mp4"]}
    assert read(row) == read(TWICE)
    embedded = read(
        {"messages": bare, "images": [{"bytes": b"png", "path": "a.png"}], "videos": ["clip.mp4"]}
    )
    assert next(embedded.media())["image"] == b"png"
    assert list(embedded.files()) == ["/data/clip.mp4"]


def test_tools_calls_and_thoughts_are_read_from_objects_and_from_text():
    as_text = {"function": {"name": "zoom", "arguments": '{"by": 2}'}, "id": "1"}
    for tools, call in ((TOOLS, CALL), (json.dumps(TOOLS), as_text), (TOOLS, CALL["function"])):
        sample = read(
            {
                "tools": tools,
                "messages": [
                    {"role": "user", "content": "Closer."},
                    {"role": "assistant", "content": None, "tool_calls": [call], "weight": 0},
                    {"role": "tool", "content": "done"},
                    answer("Here.", reasoning_content="It is larger now."),
                ],
            }
        )
        assert sample.tools == TOOLS
        assert sample.weights == (0.0, 1.0)
        assert sample.messages[1] == {"role": "assistant", "content": "", "tool_calls": [CALL]}
        assert sample.messages[2] == {"role": "tool", "content": "done"}
        assert sample.messages[3]["reasoning_content"] == "It is larger now."


def turns(*items, **fields) -> dict:
    return {"messages": [user(*items), answer(**fields)]}


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({**TWICE, **turns(IMAGE)}, "both 'conversations' and 'messages'; keep one of them"),
        (turns("text"), "turn 0 (user): an item of 'content' must be an object, found a string"),
        (turns({"type": "audio"}), "turn 0 (user): an item of type 'audio'; known: text, image, video"),
        (turns({"type": "text"}), "turn 0 (user): a text item needs 'text', found nothing"),
        (turns({"type": "image"}), "1 <image> placeholders for 0 entries of 'image'"),
        (turns({**IMAGE, "fps": 2}), "image item has the option 'fps'; known: max_pixels, min_pixels"),
        (turns({**VIDEO, "fps": "2"}), "video item: 'fps' must be a number, found '2'"),
        (turns({**VIDEO, "video_start": 2, "video_end": 1}), "video_end 1 is not after video_start 2"),
        (turns(text("<|im_end|>")), "turn 0 (user) contains the special token <|im_end|>"),
        (turns(reasoning_content="<|im_end|>"), "turn 1 (assistant) contains the special token <|im_end|>"),
        (turns(reasoning_content=3), "turn 1 (assistant): 'reasoning_content' must be text, found 3"),
        (turns(weight=-1), "turn 1 (assistant): 'weight' must be 0 or more, found -1"),
        (turns(weight="1"), "turn 1 (assistant): 'weight' must be 0 or more, found '1'"),
        (turns(tool_calls=[{"id": "1"}]), "turn 1 (assistant): a tool call must be"),
        (turns(tool_calls=[{"name": "zoom", "arguments": "{"}]), "zoom: its arguments are no JSON"),
        ({**turns(IMAGE), "tools": {}}, "'tools' must be a list of function schemas, found an object"),
        ({**turns(IMAGE), "tools": "["}, "'tools' is text that is no JSON"),
        ({**turns(IMAGE), "tools": ["<|im_end|>"]}, "'tools' contains the special token <|im_end|>"),
        ({"messages": [{**user(IMAGE), "weight": 1}, answer()]}, "turn 0 (user) has a weight"),
        ({"messages": [{**user(), "tool_calls": [CALL]}, answer()]}, "turn 0 (user) has tool_calls"),
        ({"messages": [user(), {"role": "assistant", "content": [IMAGE]}]}, "(assistant) contains <image>"),
    ],
)  # fmt: skip
def test_messages_that_break_the_rules_say_how(row, reason):
    with pytest.raises(ValueError) as caught:
        read(row)
    assert reason in str(caught.value)


# --- to the loss and the pixels -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def media(pictures, clip):
    """One folder with the pictures, the clip and four frames of one size."""
    if not (pictures / "clip.mp4").exists():
        (pictures / "clip.mp4").symlink_to(clip)
    for number in range(4):
        Image.new("RGB", (96, 64), (60 * number, 0, 0)).save(pictures / f"frame{number}.png")
    return pictures


@pytest.fixture(scope="module")
def processor(checkpoints):
    return AutoProcessor.from_pretrained(checkpoints["qwen3_vl"])


@pytest.fixture
def load(tmp_path, media, checkpoints, processor):
    """The tensors that training makes of rows."""

    def load(*rows) -> list[dict[str, torch.Tensor]]:
        (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
        (tmp_path / "data.toml").write_text(
            f'[mine]\nannotation_path = "rows.jsonl"\ndata_path = "{media}"\n'
        )
        dataset = make_supervised_data_module(
            processor,
            DataArguments(dataset_use="mine", dataset_config=str(tmp_path / "data.toml")),
            model_config=AutoConfig.from_pretrained(checkpoints["qwen3_vl"]),
            model_max_length=4096,
            seed=0,
        )["train_dataset"]
        return [dataset[index] for index in range(len(dataset))]

    return load


def test_the_two_formats_train_alike(load):
    first, second = load(TWICE, {"messages": [SYSTEM, *EQUAL["items with their sources"]]})
    assert first.keys() == second.keys()
    for key, value in first.items():
        assert torch.equal(value, second[key]), key


def test_the_weight_of_each_answer_reaches_exactly_its_tokens(load, processor):
    ask = {"role": "user", "content": "Again?"}
    texts, weights = ("One.", "Two, two.", "Three."), (0.5, 0, 2)
    row = {"messages": []}
    for spoken, weight in zip(texts, weights, strict=True):
        row["messages"] += [ask, answer(spoken, weight=weight)]
    (sample,) = load(row)
    expected: list[float] = []
    spelled = []
    for spoken, weight in zip(texts, weights, strict=True):
        before = "<|im_start|>user\nAgain?<|im_end|>\n<|im_start|>assistant\n"
        for part, counts in ((before, 0.0), (f"{spoken}<|im_end|>", float(weight)), ("\n", 0.0)):
            ids = processor.tokenizer(part, add_special_tokens=False)["input_ids"]
            spelled += ids
            expected += [counts] * len(ids)
    assert sample["input_ids"].tolist() == spelled
    assert sample["loss_weights"].tolist() == expected
    assert ((sample["labels"] != IGNORE_INDEX) == (torch.tensor(expected) > 0)).all()


def test_calls_and_thoughts_carry_loss_and_tools_and_their_results_do_not(load, processor):
    row = {
        "tools": TOOLS,
        "messages": [
            {"role": "user", "content": "Closer."},
            answer("", tool_calls=[CALL]),
            {"role": "tool", "content": "done"},
            answer("Here.", reasoning_content="Larger now."),
        ],
    }
    (sample,) = load(row)
    spoken = processor.tokenizer.decode(sample["input_ids"])
    called = '<tool_call>\n{"name": "zoom", "arguments": {"by": 2}}\n</tool_call><|im_end|>'
    said = "<think>\nLarger now.\n</think>\n\nHere.<|im_end|>"
    learned = sample["input_ids"][sample["labels"] != IGNORE_INDEX]
    assert processor.tokenizer.decode(learned) == called + said
    assert '"name": "zoom", "parameters"' in spoken
    assert "done" in spoken


def frames(sample) -> int:
    return int(sample["video_grid_thw"][:, 0].sum())


def test_clip_rate_and_frames_of_an_item_reach_the_pixels(load):
    # The clip has twelve frames at 8 frames a second; a patch holds two of them.
    listed = {"type": "video", "video": [f"frame{number}.png" for number in range(4)]}
    options = {
        4: {**VIDEO, "nframes": 8},
        2: {**VIDEO, "nframes": 4},
        6: {**VIDEO, "fps": 8, "max_frames": 12},
        3: {**VIDEO, "fps": 8, "video_start": 0.5, "video_end": 1.2},
    }
    for sample, number in zip(load(*(turns(item) for item in options.values())), options, strict=True):
        assert frames(sample) == number
    assert frames(load(turns(listed))[0]) == 2


def test_pixel_limits_of_an_item_reach_its_grid(load, processor):
    side = processor.image_processor.patch_size * processor.image_processor.merge_size
    small = {**IMAGE, "image": "b.png", "max_pixels": 2 * side * 2 * side}
    exact = {**IMAGE, "resized_height": 2 * side, "resized_width": 3 * side}
    both = load(turns(small, {**IMAGE, "image": "b.png"}, exact))[0]["image_grid_thw"]
    merge = processor.image_processor.merge_size
    assert both[0].tolist() == [1, 2 * merge, 2 * merge]
    assert both[1, 1:].prod() > both[0, 1:].prod(), "the limit of one item is not that of the next"
    assert both[2].tolist() == [1, 2 * merge, 3 * merge]
