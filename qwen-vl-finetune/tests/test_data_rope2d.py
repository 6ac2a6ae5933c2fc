"""Positions are what the model library computes when it answers, for every family, medium and geometry."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForImageTextToText

from qwenvl.data.rope2d import STRATEGIES, RopeIndex, get_rope_index_25
from qwenvl.nano import FAMILIES, published_model, qwen_tokenizer

PUBLISHED = {"qwen2_vl": "7B", "qwen2_5_vl": "7B", "qwen3_vl": "8B", "qwen3_vl_moe": "30B-A3B"}

# text lengths and media (kind, grid in patches) in the order of a conversation
CASES = {
    "text": [7],
    "image": [5, ("image", (1, 6, 10)), 8],
    "several images": [3, ("image", (1, 4, 4)), 2, ("image", (1, 10, 2)), ("image", (1, 2, 8)), 6],
    "video": [4, ("video", (6, 6, 8)), 9],
    "long video, small frames": [4, ("video", (20, 6, 10)), 3],
    "several videos": [1, ("video", (3, 4, 8)), 5, ("video", (2, 8, 4)), 2],
    "mixed": [2, ("video", (3, 4, 4)), 1, ("image", (1, 6, 4)), 7, ("video", (1, 8, 2)), 4],
    "media last": [2, ("image", (1, 4, 6))],
}


@pytest.fixture(scope="module")
def models():
    return {}


@pytest.fixture(params=[("nano", name) for name in FAMILIES] + [("published", name) for name in PUBLISHED])
def model(request, models, checkpoints):
    """A model on the meta device: positions need no weights."""
    key = size, family = request.param
    if key not in models and size == "nano":
        with torch.device("meta"):
            models[key] = AutoModelForImageTextToText.from_config(
                AutoConfig.from_pretrained(checkpoints[family])
            )
    if key not in models:
        if "vocabulary" not in models:
            models["vocabulary"] = qwen_tokenizer(family, request.getfixturevalue("qwen_vocabulary"))
        models[key] = published_model(family, PUBLISHED[family], models["vocabulary"], device="meta")
    return models[key]


def conversation(model, parts) -> dict:
    """Token ids of one sample as the family's processor lays them out, grids, seconds per grid row."""
    config = model.config
    text, start, end = 11, config.vision_start_token_id, config.vision_end_token_id
    ids, grids = [], {"image": [], "video": []}
    for part in parts:
        if isinstance(part, int):
            ids += [text] * part
            continue
        kind, (time, height, width) = part
        token = config.image_token_id if kind == "image" else config.video_token_id
        # Qwen3-VL writes a timestamp before each grid row of a video, the older two one run of tokens.
        rows = time if kind == "video" and config.model_type.startswith("qwen3") else 1
        for _ in range(rows):
            ids += [text] * (3 if rows > 1 else 0) + [start]
            ids += [token] * (time // rows * (height // 2) * (width // 2)) + [end]
        grids[kind].append((time, height, width))
    return {
        "input_ids": ids,
        "image_grid_thw": grids["image"],
        "video_grid_thw": grids["video"],
        # Odd rates, so that rounding down to a whole position matters.
        "second_per_grid_ts": [1 / (1.3 + index) for index in range(len(grids["video"]))],
    }


def batch(model, samples, *, side="right") -> dict:
    """Samples padded to one rectangle."""
    length = max(len(sample["input_ids"]) for sample in samples)
    rows, masks = [], []
    for sample in samples:
        ids, missing = sample["input_ids"], length - len(sample["input_ids"])
        before, after = (missing, 0) if side == "left" else (0, missing)
        rows.append([7] * before + ids + [7] * after)
        masks.append([0] * before + [1] * len(ids) + [0] * after)
    tensors = {"input_ids": torch.tensor(rows), "attention_mask": torch.tensor(masks)}
    for key in ("image_grid_thw", "video_grid_thw", "second_per_grid_ts"):
        values = [value for sample in samples for value in sample[key]]
        tensors[key] = torch.tensor(values) if values else None
    return tensors


def expected(model, inputs) -> tuple[torch.Tensor, torch.Tensor]:
    ids, config = inputs["input_ids"], model.config
    types = (ids == config.image_token_id).int() + 2 * (ids == config.video_token_id).int()
    return model.model.get_rope_index(mm_token_type_ids=types, **inputs)


def ours(model, inputs) -> tuple[torch.Tensor, torch.Tensor]:
    rope = RopeIndex.from_config(model.config)
    return STRATEGIES[rope.model_type](
        rope.spatial_merge_size, **inputs, image_token_id=rope.image_token_id,
        video_token_id=rope.video_token_id, tokens_per_second=rope.tokens_per_second,
    )  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_positions_equal_the_model_librarys(model, name):
    inputs = batch(model, [conversation(model, CASES[name])])
    for found, wanted in zip(ours(model, inputs), expected(model, inputs), strict=True):
        assert torch.equal(found, wanted)
    del inputs["attention_mask"]
    assert torch.equal(RopeIndex.from_config(model.config)(**inputs), expected(model, inputs)[0])


@pytest.mark.parametrize("side", ["left", "right"])
def test_positions_of_padded_batches_equal_the_model_librarys(model, side):
    inputs = batch(model, [conversation(model, parts) for parts in CASES.values()], side=side)
    for found, wanted in zip(ours(model, inputs), expected(model, inputs), strict=True):
        assert torch.equal(found, wanted)


def test_positions_equal_the_model_librarys_on_random_conversations(model):
    random = torch.Generator().manual_seed(3)

    def draw(low, high):
        return int(torch.randint(low, high, (), generator=random))

    samples = []
    for _ in range(60):
        parts = [draw(1, 9)]
        for _ in range(draw(0, 4)):
            time = draw(1, 30)
            size = (2 * draw(1, 7), 2 * draw(1, 7))
            parts += [("video", (time, *size)) if draw(0, 2) else ("image", (1, *size)), draw(0, 9)]
        samples.append(conversation(model, parts))
    inputs = batch(model, samples)
    for found, wanted in zip(ours(model, inputs), expected(model, inputs), strict=True):
        assert torch.equal(found, wanted)


def test_what_the_families_make_of_a_video(family, checkpoints):
    """Worked by hand: grid [3, 4, 4] after 2 tokens, 1 second a row, 2 tokens of time a second."""
    config = AutoConfig.from_pretrained(checkpoints[family])
    rope = RopeIndex.from_config(config)
    video, start, end = config.video_token_id, config.vision_start_token_id, config.vision_end_token_id
    grids = torch.tensor([[3, 4, 4]])
    if family.startswith("qwen3"):
        ids = [5, 5] + ([5, start] + [video] * 4 + [end]) * 3 + [5]
        last, times = 2 + 3 * (2 + 2 + 1), [4, 4 + 5, 4 + 10]
    else:
        ids = [5, start] + [video] * 12 + [end, 5]
        last, times = 2 + 2 + 1, [2, 3, 4] if family == "qwen2_vl" else [2, 4, 6]
    found = rope(torch.tensor([ids]), None, grids, torch.tensor([1.0]))
    assert found[:, 0, -1].tolist() == [last] * 3
    of_video = found[:, 0, torch.tensor(ids) == video]
    assert of_video[0].tolist() == [time for time in times for _ in range(4)]
    assert (of_video[1, :4] - of_video[1, 0]).tolist() == [0, 0, 1, 1]
    assert (of_video[2, :4] - of_video[2, 0]).tolist() == [0, 1, 0, 1]


def test_grids_that_do_not_fit_the_placeholders_are_errors(model):
    rope = RopeIndex.from_config(model.config)
    inputs = batch(model, [conversation(model, CASES["image"])])
    del inputs["attention_mask"]
    with pytest.raises(ValueError, match="15 placeholder tokens at 6 do not fit"):
        rope(**inputs | {"image_grid_thw": torch.tensor([[1, 4, 4]])})
    with pytest.raises(ValueError, match="1 image grids without placeholder"):
        rope(**inputs | {"image_grid_thw": torch.tensor([[1, 6, 10], [1, 4, 4]])})
    with pytest.raises(ValueError, match="do not fit their grid, None"):
        rope(**inputs | {"image_grid_thw": None})


def test_a_video_of_qwen2_5_vl_needs_its_seconds():
    ids = torch.tensor([[1, 9, 9, 1]])
    with pytest.raises(ValueError, match="second_per_grid_ts, found None"):
        get_rope_index_25(2, ids, None, torch.tensor([[2, 2, 2]]), image_token_id=8, video_token_id=9)


def test_an_unknown_model_type_is_refused():
    with pytest.raises(ValueError, match="no positions for model_type 'qwen3'; known: qwen2_vl"):
        RopeIndex.from_config(AutoConfig.for_model("qwen3"))
