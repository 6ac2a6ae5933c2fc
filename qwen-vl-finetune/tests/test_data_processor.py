"""From an annotation file to batches: ids, labels, positions, borders and pixels of every family."""

import gc
import json
import logging
import pickle
from itertools import pairwise

import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

from qwenvl.data.collators import FlattenedCollator, PaddedCollator
from qwenvl.data.data_processor import make_encoder, make_supervised_data_module
from qwenvl.data.labels import IGNORE_INDEX
from qwenvl.data.packing import MEDIA
from qwenvl.train.argument import DataArguments

END = "<|im_end|>"


def conversation(*texts, **media) -> dict:
    who = ("human", "gpt")
    turns = [{"from": who[index % 2], "value": text} for index, text in enumerate(texts)]
    return {"conversations": turns, **media}


TEXT = conversation("Say yes.", "Yes.")
IMAGE = conversation("<image>\nWhat?", "A cat.", "Sure?", "Quite sure.", image="a.png")
SEVERAL = conversation(
    "Compare <image> and <image>", "Alike.", "And <image>?", "No.", image=["a.png", "b.png", "c.png"]
)
VIDEO = conversation("<video>\nWhat moves?", "A box.", video="clip.mp4")
MIXED = conversation("<video><image>", "Both.", video=["clip.mp4"], image=["b.png"])
SYSTEM = {
    "conversations": [{"from": "system", "value": "Be brief."}, *IMAGE["conversations"]],
    "image": "c.png",
}
ROWS = [TEXT, IMAGE, SEVERAL, VIDEO, MIXED, SYSTEM]


@pytest.fixture
def media(pictures, clip):
    """One folder with the pictures and the clip."""
    if not (pictures / "clip.mp4").exists():
        (pictures / "clip.mp4").symlink_to(clip)
    return pictures


@pytest.fixture
def make(tmp_path, media, checkpoints):
    """Make the data module of rows for a family's nano checkpoint."""

    def make(rows, family="qwen3_vl", *, model_max_length=4096, name="train.json", **options):
        folder = checkpoints[family]
        text = "\n".join(map(json.dumps, rows)) if name.endswith("l") else json.dumps(rows)
        (tmp_path / name).write_text(text)
        toml = tmp_path / "data.toml"
        toml.write_text(f'[mine]\nannotation_path = "{name}"\ndata_path = "{media}"\n')
        options = {"dataset_use": "mine", "dataset_config": str(toml), "data_flatten": False} | options
        return make_supervised_data_module(
            AutoProcessor.from_pretrained(folder),
            DataArguments(**options),
            model_config=AutoConfig.from_pretrained(folder),
            model_max_length=model_max_length,
            seed=0,
        )

    return make


def decoded(dataset, tensor) -> str:
    return dataset.encode.processor.tokenizer.decode(tensor)


def test_items_hold_what_the_family_needs(make, family, checkpoints):
    module = make(ROWS, family)
    dataset, config = module["train_dataset"], AutoConfig.from_pretrained(checkpoints[family])
    assert module["eval_dataset"] is None
    assert len(dataset) == len(ROWS)
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config)
    for row, item in zip(ROWS, dataset, strict=True):
        length = len(item["input_ids"])
        assert item["segment_lengths"].tolist() == [length]
        # Answers and their ends, and nothing else, carry loss.
        learned = item["labels"] != IGNORE_INDEX
        assert torch.equal(item["labels"][learned], item["input_ids"][learned])
        answers = [turn["value"] for turn in row["conversations"] if turn["from"] == "gpt"]
        assert decoded(dataset, item["labels"][learned]) == "".join(text + END for text in answers)
        # One placeholder token per merged patch, one grid per medium, pixels for every patch.
        for kind, pixels, field in (
            ("image", "pixel_values", "image_grid_thw"), ("video", "pixel_values_videos", "video_grid_thw"),
        ):  # fmt: skip
            named = row.get(kind, [])
            count = 1 if isinstance(named, str) else len(named)
            assert (field in item) == (pixels in item) == (count > 0)
            if count:
                patches = item[field].prod(dim=1).sum()
                assert len(item[field]) == count
                assert len(item[pixels]) == patches
                assert (item["input_ids"] == getattr(config, f"{kind}_token_id")).sum() == patches // 4
        # Positions are those that answering computes from the same inputs.
        ids = item["input_ids"][None]
        types = (ids == config.image_token_id).int() + 2 * (ids == config.video_token_id).int()
        grids = {key: item.get(key) for key in ("image_grid_thw", "video_grid_thw")}
        if family == "qwen2_5_vl" and "video_grid_thw" in item:
            # 12 frames at 8 a second, 4 of them sampled: a grid row of 2 frames lasts 0.75 s.
            assert item["video_grid_thw"][0, 0] == 2
            grids["second_per_grid_ts"] = torch.tensor([0.75])
        wanted, _ = model.model.get_rope_index(ids, types, **grids)
        assert torch.equal(item["position_ids"], wanted[:, 0])
        assert item["position_ids"].shape == (3, length)


def test_the_ids_are_those_of_the_rendered_template(make, family):
    """The text before and after a placeholder arrives as written, a system turn as a system turn."""
    dataset = make(ROWS, family)["train_dataset"]
    rendered = decoded(dataset, dataset[5]["input_ids"]).replace("<|image_pad|>", "")
    assert rendered == (
        "<|im_start|>system\nBe brief.<|im_end|>\n"
        "<|im_start|>user\n<|vision_start|><|vision_end|>\nWhat?<|im_end|>\n"
        "<|im_start|>assistant\nA cat.<|im_end|>\n"
        "<|im_start|>user\nSure?<|im_end|>\n"
        "<|im_start|>assistant\nQuite sure.<|im_end|>\n"
    )
    rendered = decoded(dataset, dataset[2]["input_ids"]).replace("<|image_pad|>", "")
    vision = "<|vision_start|><|vision_end|>"
    assert f"user\nCompare {vision} and {vision}<|im_end|>" in rendered
    assert f"user\nAnd {vision}?<|im_end|>" in rendered


def test_padded_batches(make):
    module = make(ROWS)
    items = list(module["train_dataset"])
    assert isinstance(module["data_collator"], PaddedCollator)
    batch = module["data_collator"](items)
    longest = max(len(item["input_ids"]) for item in items)
    assert batch["input_ids"].shape == batch["labels"].shape == batch["attention_mask"].shape
    assert batch["input_ids"].shape == (len(items), longest)
    assert batch["position_ids"].shape == (3, len(items), longest)
    pad = module["train_dataset"].encode.processor.tokenizer.pad_token_id
    for row, item in enumerate(items):
        length = len(item["input_ids"])
        assert batch["attention_mask"][row].tolist() == [1] * length + [0] * (longest - length)
        assert torch.equal(batch["input_ids"][row, :length], item["input_ids"])
        assert torch.equal(batch["labels"][row, :length], item["labels"])
        assert torch.equal(batch["position_ids"][:, row, :length], item["position_ids"])
        assert (batch["input_ids"][row, length:] == pad).all()
        assert (batch["labels"][row, length:] == IGNORE_INDEX).all()
    for key in MEDIA:
        assert torch.equal(batch[key], torch.cat([item[key] for item in items if key in item]))
    assert "pixel_values" not in module["data_collator"](items[:1])
    assert "segment_lengths" not in batch


def check_flattened(batch, samples):
    """A flattened batch is its samples, end to end, each with its own borders and positions."""
    lengths = [len(sample["input_ids"]) for sample in samples]
    assert "attention_mask" not in batch
    assert batch["input_ids"].shape == batch["labels"].shape == (1, sum(lengths))
    assert batch["position_ids"].shape == (4, 1, sum(lengths))
    borders = batch["cu_seq_lens_q"].tolist()
    assert [after - before for before, after in pairwise(borders)] == lengths
    assert borders[0] == 0
    assert torch.equal(batch["cu_seq_lens_q"], batch["cu_seq_lens_k"])
    assert batch["cu_seq_lens_q"].dtype == torch.int32
    assert batch["max_length_q"] == batch["max_length_k"] == max(lengths)
    assert type(batch["max_length_q"]) is int
    for (start, end), sample in zip(pairwise(borders), samples, strict=True):
        assert torch.equal(batch["input_ids"][0, start:end], sample["input_ids"])
        assert batch["labels"][0, start] == IGNORE_INDEX
        assert torch.equal(batch["labels"][0, start + 1 : end], sample["labels"][1:])
        assert torch.equal(batch["position_ids"][0, 0, start:end], torch.arange(end - start))
        assert torch.equal(batch["position_ids"][1:, 0, start:end], sample["position_ids"])
    for key in MEDIA:
        parts = [sample[key] for sample in samples if key in sample]
        assert (key in batch) == bool(parts)
        if parts:
            assert torch.equal(batch[key], torch.cat(parts))


def test_flattened_batches(make, family):
    module = make(ROWS, family, data_flatten=True)
    items = list(module["train_dataset"])
    assert isinstance(module["data_collator"], FlattenedCollator)
    check_flattened(module["data_collator"](items), items)
    check_flattened(module["data_collator"](items[:1]), items[:1])


def test_packed_lists_are_several_segments(make, family):
    samples = list(make(ROWS, family)["train_dataset"])
    module = make([ROWS[:3], ROWS[3], ROWS[4:]], family, data_packing=True)
    dataset = module["train_dataset"]
    assert [item["segment_lengths"].numel() for item in dataset] == [3, 1, 2]
    check_flattened(module["data_collator"](list(dataset)), samples)
    check_flattened(module["data_collator"]([dataset[0]]), samples[:3])


def test_the_first_label_of_a_segment_never_carries_loss():
    """Even where a sample's own first token would: it follows another sample."""
    item = {
        "input_ids": torch.tensor([4, 5]),
        "labels": torch.tensor([4, 5]),
        "position_ids": torch.arange(2).expand(3, 2),
        "segment_lengths": torch.tensor([2]),
    }
    batch = FlattenedCollator()([item, item])
    assert batch["labels"].tolist() == [[IGNORE_INDEX, 5, IGNORE_INDEX, 5]]
    assert item["labels"].tolist() == [4, 5]


def test_loader_workers_give_the_same_batches_and_nothing_decoded_is_kept(make):
    module = make(ROWS, data_flatten=True)
    dataset = module["train_dataset"]
    before = len(pickle.dumps(dataset))
    here = [module["data_collator"]([dataset[index], dataset[index + 1]]) for index in (0, 2, 4)]
    loader = DataLoader(dataset, batch_size=2, num_workers=1, collate_fn=module["data_collator"])
    for one, other in zip(here, loader, strict=True):
        assert one.keys() == other.keys()
        assert all(torch.equal(torch.as_tensor(one[key]), torch.as_tensor(other[key])) for key in one)
    travelled = pickle.loads(pickle.dumps(dataset))  # What workers that are spawned, not forked, receive.
    assert all(torch.equal(travelled[4][key], dataset[4][key]) for key in dataset[4])
    assert len(pickle.dumps(dataset)) == before, "the data set grew by what it loaded"
    gc.collect()
    # By type: isinstance asks every object for its class, which sets off lazy imports.
    pictures = [thing for thing in gc.get_objects() if issubclass(type(thing), Image.Image)]
    assert not [picture for picture in pictures if picture.size == (96, 64)]


def test_a_share_of_a_data_set(make):
    rows = [conversation(f"Number {index}?", f"{index}.") for index in range(40)]
    drawn = [make(rows, dataset_use=name)["train_dataset"] for name in ("mine%25", "mine%25", "mine,mine%50")]
    assert [len(dataset) for dataset in drawn] == [10, 10, 60]
    assert all(torch.equal(drawn[0][index]["input_ids"], drawn[1][index]["input_ids"]) for index in range(10))
    answers = [decoded(drawn[2], item["labels"][item["labels"] >= 0]) for item in drawn[2]]
    assert answers[:40] == [f"{index}.{END}" for index in range(40)]
    assert set(answers[40:]) < set(answers[:40])


def test_a_sample_that_is_too_long_is_refused_with_its_length_and_the_flag(make):
    longest = len(make([TEXT, IMAGE])["train_dataset"][1]["input_ids"])
    make([TEXT, IMAGE], model_max_length=longest)["train_dataset"][1]
    dataset = make([TEXT, IMAGE], model_max_length=longest - 1)["train_dataset"]
    dataset[0]
    message = (
        rf"train.json: row 1 \(counted from 0\): {longest} tokens \(1 pictures, 0 videos, 4 turns\) "
        rf"exceed --model_max_length {longest - 1}; raise it"
    )
    with pytest.raises(ValueError, match=message):
        dataset[1]


def test_a_picture_that_cannot_be_decoded_names_its_row(make, media, caplog):
    (media / "broken.png").write_bytes((media / "a.png").read_bytes()[:200])
    rows = [TEXT, conversation("<image>", "A cat.", image="broken.png"), SYSTEM]
    dataset = make(rows, name="train.jsonl")["train_dataset"]
    with pytest.raises(ValueError, match=r"train.jsonl: line 2 \(counted from 1\): .*broken.png"):
        dataset[1]
    packed = make([[TEXT, *rows[1:]]], data_packing=True)["train_dataset"]
    with pytest.raises(ValueError, match=r"row 0 \(counted from 0\), sample 1 of the pack: .*broken.png"):
        packed[0]
    skipping = make(rows, name="train.jsonl", bad_samples="skip")["train_dataset"]
    with caplog.at_level(logging.WARNING, logger="qwenvl.data"):
        stand_in = skipping[1]
    assert torch.equal(stand_in["input_ids"], skipping[2]["input_ids"])
    assert skipping.skipped == 1
    assert "skipped (1 in this process), the next row stands in:" in caplog.text
    assert "line 2 (counted from 1)" in caplog.text


def test_a_processor_of_another_checkpoint_is_refused(make, checkpoints):
    processor = AutoProcessor.from_pretrained(checkpoints["qwen3_vl"])
    config = AutoConfig.from_pretrained(checkpoints["qwen3_vl"])
    config.image_token_id += 1
    with pytest.raises(ValueError, match=r"image_token_id is \d+ in config.json but \d+ in the processor"):
        make_encoder(processor, DataArguments(), model_config=config, model_max_length=9)
    with pytest.raises(ValueError, match="--dataset_use names no data set"):
        make([TEXT], dataset_use=" ,")
