"""Streaming: an order without end that depends on the seed alone, each row for one process, once a pass."""

import gzip
import json
import os
import pickle
import random
import shutil
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader, Dataset
from transformers import AutoConfig, AutoProcessor, HfArgumentParser

import qwenvl.train
from qwenvl.data.data_processor import make_supervised_data_module
from qwenvl.data.sources import _row_groups
from qwenvl.data.streaming import EndlessRows, RowStream
from qwenvl.train.argument import DataArguments, ModelArguments, TrainingArguments
from qwenvl.train.train_qwen import train

SCRIPT = Path(qwenvl.train.__path__[0]) / "train_qwen.py"
ROWS = 24
STEPS = 6
BATCH = 2  # of each of two processes


def row(name: str, number: int) -> dict:
    turns = [{"role": "user", "content": f"<image>{name} {number}?"}]
    turns.append({"role": "assistant", "content": "this " * (1 + number % 5)})
    return {"images": [f"{name}{number}.png"], "messages": turns}


def write_lines(path: Path, rows: list[dict]) -> Path:
    text = "".join(json.dumps(each) + "\n" for each in rows)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory, pictures) -> Path:
    """Data sets `lines` (JSONL, gzipped) and `table` (parquet), mixed 2 to 1, a picture for each row."""
    folder = tmp_path_factory.mktemp("streams")
    sets = {name: [row(name, number) for number in range(ROWS)] for name in ("lines", "table")}
    for name in sets:
        for number in range(ROWS):
            shutil.copy(pictures / f"{'abc'[number % 3]}.png", folder / f"{name}{number}.png")
    write_lines(folder / "lines.jsonl.gz", sets["lines"])
    pq.write_table(pa.Table.from_pylist(sets["table"]), folder / "table.parquet", row_group_size=5)
    (folder / "data.toml").write_text(
        '[lines]\nannotation_path = "lines.jsonl.gz"\nweight = 2\n'
        '[table]\nannotation_path = "table.parquet"\nweight = 1\n'
    )
    return folder


@pytest.fixture(scope="module")
def load(checkpoints):
    """The streamed data set of a TOML file's data sets."""
    folder = checkpoints["qwen3_vl"]
    processor, config = AutoProcessor.from_pretrained(folder), AutoConfig.from_pretrained(folder)

    def load(toml: Path, use: str, *, seed=3, **options):
        return make_supervised_data_module(
            processor,
            DataArguments(dataset_use=use, dataset_config=str(toml), streaming=True, **options),
            model_config=config,
            model_max_length=512,
            seed=seed,
        )["train_dataset"]

    return load


@pytest.fixture
def make(tmp_path, load):
    """The streamed data set of JSONL files of so many rows, which are numbers."""

    def make(use: str, counts: dict[str, int], more: str = "", **options):
        text = ""
        for name, count in counts.items():
            (tmp_path / f"{name}.jsonl").write_text("".join(f"{number}\n" for number in range(count)))
            text += f'[{name}]\nannotation_path = "{name}.jsonl"\n{more}\n'
        (tmp_path / "data.toml").write_text(text)
        return load(tmp_path / "data.toml", use, **options)

    return make


def taken(dataset, places) -> list[tuple[str, object]]:
    """The name and the row at each place."""
    found = [dataset.endless.at(place) for place in places]
    return [(stream.name, stream.row(index)) for stream, index in found]


# ---- the public command


def command(checkpoint: Path, folder: Path, output: Path, *more: str) -> list[tuple[float, float]]:
    """Train in two processes; the loss and gradient norm of every step."""
    flags = ["--model_name_or_path", checkpoint, "--dataset_config", folder / "data.toml"]
    flags += ["--output_dir", output, "--data_flatten", "True", "--max_steps", STEPS]
    flags += ["--tune_mm_llm", "True", "--tune_mm_vision", "True", "--learning_rate", "1e-3", "--seed", 3]
    flags += ["--per_device_train_batch_size", BATCH, "--min_pixels", 3136, "--max_pixels", 6400]
    flags += ["--logging_steps", 1, "--report_to", "none", "--disable_tqdm", "True", *more]
    launcher = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node=2",
        str(SCRIPT),
    ]
    done = subprocess.run(
        launcher + [str(flag) for flag in flags],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    history = json.loads((output / "trainer_state.json").read_text())["log_history"]
    return [(line["loss"], line["grad_norm"]) for line in history if "loss" in line]


STREAMED = ["--dataset_use", "lines,table", "--streaming", "True", "--streaming_buffer", "9"]
STREAMED += ["--dataloader_num_workers", "2", "--save_strategy", "steps", "--save_steps", "3"]


@pytest.fixture(scope="module")
def order(folder, load) -> list[tuple[str, dict]]:
    """The rows of a run: two sets mixed, shuffled in windows that end within steps."""
    dataset = load(folder / "data.toml", "lines,table", streaming_buffer=9, data_flatten=True)
    return taken(dataset, range(STEPS * BATCH * 2))


@pytest.fixture(scope="module")
def streamed(folder, checkpoints, tmp_path_factory):
    """The output folder and the loss curve of a streamed run."""
    output = tmp_path_factory.mktemp("streamed") / "out"
    return output, command(checkpoints["qwen3_vl"], folder, output, *STREAMED)


def test_processes_and_workers_take_the_steps_of_the_same_rows_read_whole(
    folder, streamed, order, checkpoints, tmp_path
):
    """The rows at the places of the order, written down in a file and trained on without streaming."""
    names = [each["images"][0] for _, each in order]
    assert len(set(names)) == len(names), "the set is too small for this test"
    assert names != sorted(names)
    assert {name for name, _ in order} == {"lines", "table"}
    write_lines(tmp_path / "rows.jsonl", [each for _, each in order])
    (tmp_path / "data.toml").write_text(f'[rows]\nannotation_path = "rows.jsonl"\ndata_path = "{folder}"\n')
    plain = command(
        checkpoints["qwen3_vl"], tmp_path, tmp_path / "out", "--dataset_use", "rows",
        "--train_sampling_strategy", "sequential", "--save_strategy", "no",
    )  # fmt: skip
    _, curve = streamed
    assert len(curve) == STEPS
    assert curve == plain
    assert len(set(curve)) == STEPS


def test_a_resumed_run_ends_with_the_same_weights_and_decodes_nothing_again(
    folder, streamed, order, checkpoints, tmp_path
):
    output, curve = streamed
    again = tmp_path / "data"
    shutil.copytree(folder, again)
    for _, each in order[: 3 * BATCH * 2]:
        (again / each["images"][0]).unlink()
    shutil.copytree(output / "checkpoint-3", tmp_path / "out/checkpoint-3")
    assert command(checkpoints["qwen3_vl"], again, tmp_path / "out", *STREAMED) == curve
    weights = [path / "model.safetensors" for path in (output, tmp_path / "out")]
    assert weights[0].read_bytes() == weights[1].read_bytes()


# ---- the order


def test_each_pass_gives_each_row_once_in_another_order(make):
    dataset = make("a", {"a": 40}, streaming_buffer=20)
    passes = [[number for _, number in taken(dataset, range(40 * n, 40 * n + 40))] for n in range(3)]
    for each in passes:
        assert sorted(each) == list(range(40))
        assert max(each[:20]) < 20, "a window's rows stand in the next one"
    assert passes[0] != passes[1] != passes[2]
    again = make("a", {"a": 40}, streaming_buffer=20)
    assert [number for _, number in taken(again, range(40))] == passes[0]
    other = make("a", {"a": 40}, streaming_buffer=20, seed=4)
    assert [number for _, number in taken(other, range(40))] != passes[0]


def test_a_buffer_of_one_keeps_the_order_of_the_files(make):
    dataset = make("a,b", {"a": 3, "b": 2}, streaming_buffer=1)
    once = [("a", 0), ("a", 1), ("a", 2), ("b", 0), ("b", 1)]
    assert taken(dataset, range(2500)) == 500 * once
    mixed = make("a,b", {"a": 3, "b": 2}, "weight = 1", streaming_buffer=1)
    numbers = [number for name, number in taken(mixed, range(2000)) if name == "b"]
    assert numbers[:1000:2] == len(numbers[:1000:2]) * [0]
    assert numbers[1:1000:2] == len(numbers[1:1000:2]) * [1]


def test_weights_set_the_shares_of_data_sets(tmp_path, make, load):
    make("a,b", {"a": 7, "b": 500})
    toml = tmp_path / "data.toml"
    toml.write_text(
        '[a]\nannotation_path = "a.jsonl"\nweight = 3\n[b]\nannotation_path = "b.jsonl"\nweight = 1\n'
    )
    rows = taken(load(toml, "a,b", streaming_buffer=100), range(4000))
    shares = Counter(name for name, _ in rows)
    assert abs(shares["a"] - 3000) < 4 * (4000 * 3 / 16) ** 0.5
    numbers = Counter(number for name, number in rows if name == "a")
    assert max(numbers.values()) - min(numbers.values()) <= 1


def test_a_share_is_that_of_each_hundred_rows(make):
    rows = taken(make("a%50", {"a": 200}, streaming_buffer=1), range(200))
    numbers = [number for _, number in rows]
    assert numbers[:100] == numbers[100:] == sorted(set(numbers))
    assert sum(number < 100 for number in set(numbers)) == 50
    other = taken(make("a%50", {"a": 200}, streaming_buffer=1, seed=4), range(100))
    assert [number for _, number in other] != numbers[:100]
    thrice = Counter(
        number for _, number in taken(make("a%225", {"a": 100}, streaming_buffer=75), range(225))
    )
    assert sorted(thrice.values()) == 75 * [2] + 25 * [3]
    with pytest.raises(ValueError, match="data set a%1 takes none of its rows; raise the share"):
        taken(make("a%1", {"a": 1}, seed=0), [0])


@dataclass
class Counted:
    """So many rows, each its own number."""

    count: int
    path: Path = Path("numbers")

    def __len__(self) -> int:
        return self.count

    def where(self, index: int) -> str:
        return f"row {index}"

    def row(self, index: int) -> int:
        return index


def stream(name: str, count: int, rate: float = 1.0) -> RowStream:
    return RowStream(name, Counted(count), "", rate, False, 3)


def one_pass(name: str, count: int, percent: int) -> list[int]:
    """The rows of a pass, by going over all of them."""
    whole, part = divmod(percent, 100)
    rows, drawn = [], set()
    for number in range(count):
        if number % 100 == 0:
            drawn = set(random.Random(f"3/{name}/{number}").sample(range(100), part))
        rows += [number] * (whole + (number % 100 in drawn))
    return rows


@settings(deadline=None)
@given(st.integers(1, 350), st.integers(1, 320))
def test_a_share_is_found_by_place_as_by_going_over_all_rows(count, percent):
    expected = one_pass("a", count, percent)
    found = stream("a", count, percent / 100)
    assert [found.pick(place) for place in range(len(found))] == expected


SETS = st.lists(st.tuples(st.integers(1, 40), st.floats(0.01, 100)), min_size=1, max_size=5)


@settings(deadline=None)
@given(SETS, st.booleans(), st.integers(1, 30))
def test_each_set_has_its_part_of_any_rows_and_gives_its_own_in_order(sets, weighted, buffer):
    """The windows of a shuffled order hold the rows of the order without, which goes through each set again
    and again."""
    streams = [stream(f"{number}", count) for number, (count, _) in enumerate(sets)]
    weights = [weight for _, weight in sets] if weighted else None
    plain = EndlessRows(streams, weights, buffer=1, seed=3)
    found = [(int(held.name), row) for held, row in map(plain.at, range(300))]
    if not weighted:
        once = [(number, row) for number, (count, _) in enumerate(sets) for row in range(count)]
        assert found == (once * 300)[:300]
    for number, (count, weight) in enumerate(sets if weighted else []):
        rows = [row for which, row in found if which == number]
        assert rows == [at % count for at in range(len(rows))]
        share, taken = weight / sum(weight for _, weight in sets), np.array([n == number for n, _ in found])
        assert np.abs(taken.cumsum() - share * np.arange(1, 301)).max() < len(sets)
    shuffled = EndlessRows(streams, weights, buffer=buffer, seed=3)
    order = [(int(held.name), row) for held, row in map(shuffled.at, range(300))]
    for at in range(0, 300 - buffer + 1, buffer):
        assert sorted(order[at : at + buffer]) == sorted(found[at : at + buffer])


def test_of_a_billion_rows_any_is_found_without_going_over_those_before():
    """The processes of a step together take a window of the file, each row once."""
    endless = EndlessRows([stream("a", 10**9), stream("b", 10**6, 0.5)], [3, 1], buffer=1024, seed=3)
    first = 10**9 // 1024 * 1024
    found = [endless.at(first + process) for process in range(1024)]
    counts = Counter(held.name for held, _ in found)
    assert counts == {"a": 768, "b": 256}
    rows = sorted(row for held, row in found if held.name == "a")
    assert rows == list(range(first * 3 // 4, first * 3 // 4 + 768))
    assert len({row for held, row in found if held.name == "b"}) == 256
    assert endless.at(10**15) == EndlessRows(endless.streams, [3, 1], buffer=1024, seed=3).at(10**15)


def test_any_way_of_asking_finds_the_same_rows(folder, load):
    """Leaving places out, going back, from a pickled copy, in forked workers after a first read."""
    options = dict(streaming_buffer=9, data_flatten=True)
    expected = list(taken(load(folder / "data.toml", "lines,table", **options), range(60)))
    dataset = load(folder / "data.toml", "lines,table", **options)
    assert taken(dataset, range(5, 60, 7)) == expected[5::7]
    assert taken(dataset, [59, 3, 3, 40]) == [expected[index] for index in (59, 3, 3, 40)]
    assert taken(pickle.loads(pickle.dumps(dataset)), [17]) == [expected[17]]
    first = [dataset[place]["input_ids"] for place in range(20)]
    workers = DataLoader(dataset, batch_size=None, sampler=range(20), num_workers=2)
    for mine, theirs in zip(first, workers, strict=True):
        assert torch.equal(mine, theirs["input_ids"])


class Numbers(Dataset):
    """The rows themselves, each a number."""

    def __init__(self, dataset):
        self.dataset = dataset

    def __getitem__(self, place: int) -> int:
        return taken(self.dataset, [place])[0][1]


def test_workers_forked_amid_a_file_do_not_move_in_it_together(make):
    dataset = make("a", {"a": 200_000}, streaming_buffer=1)
    places = range(72_000, 200_000, 4_000)
    assert taken(dataset, [70_000]) == [("a", 70_000)]
    workers = DataLoader(Numbers(dataset), batch_size=None, sampler=places, num_workers=2)
    assert list(workers) == list(places)
    assert taken(dataset, [71_000]) == [("a", 71_000)]


def test_rows_passed_over_are_neither_parsed_nor_fetched(tmp_path, make, folder, load, monkeypatch):
    lines = ["not JSON"] * 3000 + ["7"] * 1000
    make("a", {"a": 1})
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    assert taken(load(tmp_path / "data.toml", "a"), [3001]) == [("a", 7)]
    read, real = [], pq.ParquetFile.read_row_group

    def counted(file, group, **options):
        read.append(group)
        return real(file, group, **options)

    monkeypatch.setattr(pq.ParquetFile, "read_row_group", counted)
    (tmp_path / "table.toml").write_text(f'[table]\nannotation_path = "{folder}/table.parquet"\n')
    dataset = load(tmp_path / "table.toml", "table", streaming_buffer=5)
    _row_groups.cache_clear()
    assert [name for name, _ in taken(dataset, range(15, 20))] == ["table"] * 5
    assert read == [3], "one window, one row group"
    dataset = load(tmp_path / "table.toml", "table", streaming_buffer=ROWS)
    read.clear()
    _row_groups.cache_clear()
    assert len(taken(dataset, range(ROWS))) == ROWS
    assert len(read) <= 5, "a row group is read once, however its rows are shuffled"


# ---- faults


def test_bad_rows_are_found_when_they_are_read(folder, load, tmp_path, caplog):
    rows = [row("lines", 0), row("gone", 1), row("lines", 2), [row("lines", 3)], "no row"]
    write_lines(tmp_path / "bad.jsonl", rows)
    toml = tmp_path / "data.toml"
    toml.write_text(f'[bad]\nannotation_path = "bad.jsonl"\ndata_path = "{folder}"\n')
    dataset = load(toml, "bad", streaming_buffer=1, data_flatten=False)
    good = dataset[0]
    with pytest.raises(ValueError, match=r"bad.jsonl: line 2 \(counted from 1\): .*gone1.png"):
        dataset[1]
    with pytest.raises(ValueError, match=r"bad.jsonl: line 4 .*: a packed list of samples; pass"):
        dataset[3]
    packed = load(toml, "bad", streaming_buffer=1)
    assert len(packed[3]["segment_lengths"]) == 1
    skipping = load(toml, "bad", streaming_buffer=1, bad_samples="skip", data_flatten=False)
    assert torch.equal(skipping[1]["input_ids"], skipping[2]["input_ids"])
    assert torch.equal(skipping[3]["input_ids"], good["input_ids"])
    assert skipping.skipped == 3
    assert "bad.jsonl: line 5 (counted from 1): " in caplog.text


def test_what_cannot_be_streamed_is_refused(tmp_path, make, load, checkpoints, monkeypatch):
    def refused(text: str, match: str, error=ValueError):
        (tmp_path / "data.toml").write_text(f"[a]\nannotation_path = {text}\n")
        with pytest.raises(error, match=match):
            load(tmp_path / "data.toml", "a")

    (tmp_path / "a.json").write_text("[1]")
    refused('"a.json"', "a.json: --streaming reads no JSON list; write a row per line")
    (tmp_path / "none.jsonl").write_text("\n\n")
    refused('"none.jsonl"', "none.jsonl has no rows")
    refused('"gone.jsonl"', "gone.jsonl: No such file or directory; correct annotation_path")
    with pytest.raises(ValueError, match=r"--data_packing True measures all rows .* stream packs written by"):
        DataArguments(streaming=True, data_packing=True)
    with pytest.raises(ValueError, match="--streaming_buffer 0: give a number of rows, 1 or more"):
        DataArguments(streaming_buffer=0)
    parser = HfArgumentParser((ModelArguments, DataArguments, TrainingArguments))
    flags = ["--streaming", "True", "--output_dir", str(tmp_path / "out"), "--report_to", "none"]
    with pytest.raises(ValueError, match="--streaming True reads rows without end; give --max_steps"):
        train(*parser.parse_args_into_dataclasses(flags))


def test_a_saved_dataset_is_streamed(tmp_path, folder, load):
    datasets = pytest.importorskip(
        "datasets", reason="the extra `datasets` is needed; `make setup` installs it"
    )
    rows = [row("table", number) for number in range(ROWS)]
    datasets.Dataset.from_list(rows).save_to_disk(tmp_path / "saved")
    (tmp_path / "data.toml").write_text(f'[a]\nannotation_path = "saved"\ndata_path = "{folder}"\n')
    dataset = load(tmp_path / "data.toml", "a", streaming_buffer=12)
    found = [each["images"][0] for _, each in taken(dataset, range(ROWS))]
    assert sorted(found) == sorted(each["images"][0] for each in rows)
    assert "pixel_values" in dataset[ROWS]
