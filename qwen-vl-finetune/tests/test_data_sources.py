"""Parquet files and datasets of Hugging Face: the rows that JSON gives, little of them read; mixtures."""

import gzip
import json
import pickle
import sys
from collections import Counter

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader
from transformers import AutoConfig, AutoProcessor

from qwenvl.data.data_processor import make_supervised_data_module
from qwenvl.data.sources import KEPT_ROW_GROUPS, mix_rows, open_annotations
from qwenvl.train.argument import DataArguments


def row(number: int, image: object = "a.png") -> dict:
    ask = [
        {"type": "image", "text": None},
        {"type": "text", "text": f"Number {number}?"},
    ]
    said = [{"type": "text", "text": f"{number}."}]
    return {
        "images": [image],
        "messages": [{"role": "user", "content": ask}, {"role": "assistant", "content": said}],
    }


def write(path, rows, row_group_size=3):
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=row_group_size)
    return path


@pytest.fixture
def load(tmp_path, pictures, checkpoints):
    """The training data set of one annotation file in `tmp_path`."""
    folder = checkpoints["qwen3_vl"]

    def load(name, data_path=pictures, split=""):
        toml = tmp_path / "data.toml"
        more = f'split = "{split}"\n' if split else ""
        toml.write_text(f'[mine]\nannotation_path = "{name}"\ndata_path = "{data_path}"\n{more}')
        return make_supervised_data_module(
            AutoProcessor.from_pretrained(folder),
            DataArguments(dataset_use="mine", dataset_config=str(toml)),
            model_config=AutoConfig.from_pretrained(folder),
            model_max_length=512,
            seed=0,
        )["train_dataset"]

    return load


def assert_alike(one, other):
    assert len(one) == len(other)
    for mine, theirs in zip(one, other, strict=True):
        assert mine.keys() == theirs.keys()
        for key, value in mine.items():
            assert torch.equal(value, theirs[key]), key


def test_rows_of_parquet_train_as_those_of_json(load, tmp_path, pictures):
    rows = [row(number, "ab"[number % 2] + ".png") for number in range(8)]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    inside = [
        row(number, {"bytes": (pictures / f"{'ab'[number % 2]}.png").read_bytes(), "path": "gone.png"})
        for number in range(8)
    ]
    write(tmp_path / "paths.parquet", rows)
    write(tmp_path / "inside.parquet", inside)
    expected = list(load("rows.json"))
    assert_alike(list(load("paths.parquet")), expected)
    dataset = load("inside.parquet", "/gone")
    assert_alike(list(dataset), expected)
    workers = DataLoader(dataset, batch_size=None, num_workers=2)
    assert_alike(list(workers), expected)


def test_any_row_is_found_and_row_groups_are_read_when_needed(tmp_path, monkeypatch):
    rows = [{"number": number} for number in range(20)]
    annotations = pickle.loads(pickle.dumps(open_annotations(write(tmp_path / "a.parquet", rows))))
    read, real = [], pq.ParquetFile.read_row_group

    def counted(file, group, **options):
        read.append(group)
        return real(file, group, **options)

    monkeypatch.setattr(pq.ParquetFile, "read_row_group", counted)
    assert len(annotations) == 20
    assert annotations.row(7) == {"number": 7}
    assert read == [2]
    assert [annotations.row(index) for index in range(20)] == rows
    assert sorted(read) == list(range(7)), "a row group in use is read once"
    assert KEPT_ROW_GROUPS < 7


def test_faults_of_parquet_files_name_file_and_row(load, tmp_path):
    path = write(tmp_path / "rows.parquet", [row(0), row(1), row(2), row(3, "gone.png")])
    with pytest.raises(ValueError) as caught:
        load("rows.parquet")
    assert str(caught.value).startswith(f"{path}: row 3 (counted from 0): media file ")
    with pytest.raises(ValueError, match=r"gone.parquet: No such file or directory; correct annotation_path"):
        load("gone.parquet")
    (tmp_path / "text.parquet").write_text("text")
    with pytest.raises(ValueError, match=r"annotation file .*text.parquet: not a parquet file: "):
        load("text.parquet")
    pq.write_table(pa.table({"messages": pa.array([], pa.string())}), tmp_path / "none.parquet")
    with pytest.raises(ValueError, match=r"none.parquet has no rows"):
        load("none.parquet")


@pytest.fixture
def dataset(pictures, tmp_path, monkeypatch):
    """`datasets`, its cache under tmp_path, and a Dataset of 8 rows with pictures inside."""
    datasets = pytest.importorskip(
        "datasets", reason="the extra `datasets` is needed; `make setup` installs it"
    )
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    rows = [row(number, Image.open(pictures / f"{'ab'[number % 2]}.png")) for number in range(8)]
    return datasets, datasets.Dataset.from_list(rows)


def test_datasets_of_hugging_face_train_as_json_does(load, tmp_path, dataset):
    """Saved to disk, with splits, and a folder of parquet files: pictures stay as they are in the table."""
    datasets, saved = dataset
    rows = [row(number, "ab"[number % 2] + ".png") for number in range(8)]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    expected = list(load("rows.json"))
    saved.save_to_disk(tmp_path / "saved")
    splits = {"train": saved, "test": saved.select([5, 1])}
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "splits")
    saved.to_parquet(tmp_path / "files/train.parquet")
    for name, split in (("saved", ""), ("splits", "train"), ("files", "")):
        found = load(name, "/gone", split=split)
        assert_alike(list(found), expected)
    assert_alike(list(load("splits", split="test")), [expected[5], expected[1]])
    workers = DataLoader(load("saved"), batch_size=None, num_workers=2)
    assert_alike(list(workers), expected)
    with pytest.raises(ValueError, match=r"splits has the splits 'train', 'test'; add split = NAME"):
        load("splits")
    with pytest.raises(ValueError, match=r"splits: split 'dev' is not there; it has 'train', 'test'"):
        load("splits", split="dev")
    with pytest.raises(ValueError, match=r"saved: split = 'dev', but it has no splits; take it out"):
        load("saved", split="dev")
    with pytest.raises(ValueError, match=r"rows.json: split = 'dev': only a folder or hub: id has splits"):
        load("rows.json", split="dev")


def test_content_of_mixed_kinds_is_read_as_it_was_written(tmp_path, dataset):
    datasets, _ = dataset
    mixed = [
        row(0)["messages"],
        [{"role": "user", "content": "Say x."}, {"role": "assistant", "content": "x"}],
    ]
    rows = datasets.Dataset.from_list([{"messages": each} for each in mixed], on_mixed_types="use_json")
    rows.save_to_disk(tmp_path / "mixed")
    rows.to_parquet(tmp_path / "mixed.parquet")
    for name in ("mixed", "mixed.parquet"):
        annotations = open_annotations(tmp_path / name)
        assert [annotations.row(index)["messages"] for index in range(2)] == mixed


def test_an_id_of_the_hub_is_read_from_the_cache_and_its_revision_logged(
    load, tmp_path, dataset, monkeypatch, caplog
):
    datasets, saved = dataset
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match=r"^hub:me/pets: .*[Oo]ffline.*; go online .* or name a folder"):
        load("hub:me/pets")
    # What a download leaves behind: the cache of a folder, under the name of the hub.
    saved.to_parquet(tmp_path / "pets/train.parquet")
    datasets.load_dataset(str(tmp_path / "pets"))
    (tmp_path / "cache/pets").rename(tmp_path / "cache/me___pets")
    with caplog.at_level("INFO", logger="qwenvl"):
        rows = load("hub:me/pets@train", "/gone")
    assert len(rows) == 8
    (revision,) = (tmp_path / "cache/me___pets/default/0.0.0").glob("[0-9a-f]*[0-9a-f]")
    assert f"hub:me/pets@train: revision {revision.name}" in caplog.text
    assert_alike(list(rows), list(load("pets", "/gone")))
    with pytest.raises(ValueError, match=r"hub:pets: the form is hub:OWNER/NAME"):
        load("hub:pets")
    with pytest.raises(ValueError, match=r"hub:me/pets@train: both @train and split = 'dev'"):
        load("hub:me/pets@train", split="dev")


def test_without_the_package_the_error_says_what_to_install(load, tmp_path, monkeypatch):
    for name in ("datasets", "datasets.exceptions"):
        monkeypatch.setitem(sys.modules, name, None)
    (tmp_path / "folder").mkdir()
    with pytest.raises(ModuleNotFoundError, match=r"uv pip install -e 'qwen-vl-finetune\[datasets\]'"):
        load("folder")


def test_a_packed_text_file_is_read_as_the_plain_one(load, tmp_path):
    text = "\n".join(json.dumps(row(number)) for number in range(3))
    (tmp_path / "rows.jsonl").write_text(text)
    (tmp_path / "rows.jsonl.gz").write_bytes(gzip.compress(text.encode()))
    assert_alike(list(load("rows.jsonl.gz")), list(load("rows.jsonl")))
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(text.encode())[:-20])
    with pytest.raises(ValueError, match=r"annotation file .*cut.jsonl.gz: .*end"):
        load("cut.jsonl.gz")


def test_weights_set_the_shares_of_data_sets(tmp_path, pictures, checkpoints):
    (tmp_path / "few.json").write_text(json.dumps([row(number) for number in range(2)]))
    (tmp_path / "many.json").write_text(json.dumps([row(number) for number in range(10)]))

    def module(few, many):
        (tmp_path / "data.toml").write_text(
            f'[few]\nannotation_path = "few.json"\ndata_path = "{pictures}"\n{few}\n'
            f'[many]\nannotation_path = "many.json"\ndata_path = "{pictures}"\n{many}\n'
        )
        folder = checkpoints["qwen3_vl"]
        return make_supervised_data_module(
            AutoProcessor.from_pretrained(folder),
            DataArguments(dataset_use="few,many", dataset_config=str(tmp_path / "data.toml")),
            model_config=AutoConfig.from_pretrained(folder),
            model_max_length=512,
            seed=3,
        )["train_dataset"]

    dataset = module("weight = 3", "weight = 1.5")
    few, many = (source.rows.tolist() for source in dataset.sources)
    assert (len(few), len(many), len(dataset)) == (8, 4, 12)
    assert Counter(few) == {0: 4, 1: 4}
    assert len(set(many)) == 4
    assert [source.rows.tolist() for source in module("weight = 2", "weight = 1").sources] == [few, many]
    assert [len(source.rows) for source in module("", "").sources] == [2, 10]
    with pytest.raises(ValueError, match="data set 'many' has no weight, but others in --dataset_use have"):
        module("weight = 3", "")
    for wrong in ("0", "-1", "true", '"3"', "inf"):
        with pytest.raises(ValueError, match=r"data set 'few': weight = .*: give a number above 0"):
            module(f"weight = {wrong}", "weight = 1")


def test_shares_are_exact_to_a_row_and_a_set_is_never_lost():
    sets = [np.arange(7), np.arange(100, 110), np.arange(200, 203)]
    names = ["a", "b", "c"]
    counts = [len(rows) for rows in mix_rows(sets, [1, 1, 1], seed=0, names=names)]
    assert counts == [7, 7, 6], "20 rows in thirds"
    repeated = Counter(mix_rows(sets, [1, 1, 2], seed=0, names=names)[2].tolist())
    assert sum(repeated.values()) == 10
    assert set(repeated.values()) == {3, 4}, "whole passes, then a draw without repetition"
    with pytest.raises(ValueError, match="data set 'c' gets none of 20 rows by its weight"):
        mix_rows(sets, [100, 100, 0.1], seed=0, names=names)
