"""TSV files as OpenCompass publishes them: what a row becomes and what a bad one is told."""

import base64
import csv
import io
import json
import sys
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from qwenvl_eval.data import (
    Table,
    dataset_of,
    interleave,
    locate_tsv,
    mentioned,
    question_text,
    text_list,
)
from qwenvl_eval.samples import write_sample
from qwenvl_eval.task import Sample, task_class

NANO = Path(__file__).resolve().parents[2] / "models" / "qwen3-vl-nano"
COLUMNS = ["index", "question", "A", "B", "answer", "image"]


def picture(kind="PNG", colour="red", size=(40, 30)):
    file = io.BytesIO()
    Image.new("RGB", size, colour).save(file, kind)
    return base64.b64encode(file.getvalue()).decode()


def write(path, rows, columns=COLUMNS):
    """As pandas writes it: minimal quoting, nothing for a missing value."""
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, columns, delimiter="\t", lineterminator="\n", restval="")
        writer.writeheader()
        writer.writerows(rows)
    return path


def row(index, **cells):
    return {
        "index": index,
        "question": "What?",
        "A": "one",
        "B": "two",
        "answer": "A",
        "image": picture(),
    } | cells


def sample_of(table):
    def make(row):
        content = interleave(row.need("question"), table.pictures(row))
        return Sample(row.need("index"), [{"role": "user", "content": content}], {}, row.need("index"))

    return make


def urls(sample):
    return [item["image"] for item in sample.messages[0]["content"] if item["type"] == "image"]


def test_cells_come_back_as_they_were_written(tmp_path):
    odd = "A \"quoted\"\tquestion\nover\r\nlines \u2028 with 'all'"
    path = write(tmp_path / "t.tsv", [row(7, question=odd), row(3), row(9, A="nan", B="", answer="None")])
    table = Table(path, COLUMNS)
    first, second, third = table
    assert (first.number, first.text("question")) == (1, odd)
    assert second.options() == {"A": "one", "B": "two"}
    assert (third.options(), third.text("answer")) == ({}, "None")
    assert [each.text("index") for each in table] == ["7", "3", "9"]
    assert len(table) == 3


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(*[st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"))] * 2),
        min_size=1,
        max_size=6,
    )
)
def test_any_text_survives_and_rows_can_be_taken_in_any_order(tmp_path_factory, texts):
    path = tmp_path_factory.mktemp("tsv") / "t.tsv"
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, delimiter="\t", lineterminator="\n", quoting=csv.QUOTE_ALL)
        writer.writerows([["index", "a", "b"], *([i, *pair] for i, pair in enumerate(texts))])
    table = Table(path, ["index"], keep=lambda row: int(row.text("index")) % 2 == 0)
    assert [(each.cells["a"], each.cells["b"]) for each in table] == texts[::2]


def test_byte_order_mark_and_blank_lines_are_no_rows(tmp_path):
    path = write(tmp_path / "t.tsv", [row(1), row(2)])
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n\r\n"))
    assert [each.text("index") for each in Table(path, COLUMNS)] == ["1", "2"]


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP"])
def test_a_picture_goes_on_byte_for_byte_under_its_own_kind(tmp_path, kind):
    text = picture(kind)
    table = Table(write(tmp_path / "t.tsv", [row(1, image=text)]), COLUMNS)
    (one,) = table
    assert table.pictures(one) == [f"data:image/{kind.lower()};base64,{text}"]


@pytest.mark.parametrize("listed", [str, json.dumps])
def test_a_list_of_pictures_and_the_index_of_another_row(tmp_path, listed):
    red, blue = picture(), picture("JPEG", "blue")
    rows = [row(1, image="5"), row(5, image=listed([red, blue])), row(6, image="5"), row(8, image=blue)]
    table = Table(write(tmp_path / "t.tsv", rows), COLUMNS)
    expected = [f"data:image/png;base64,{red}", f"data:image/jpeg;base64,{blue}"]
    assert [table.pictures(each) for each in table] == [expected, expected, expected, expected[1:]]


def test_a_reference_reaches_rows_that_are_not_kept(tmp_path):
    rows = [row(1, answer="B"), row(2, image="1")]
    table = Table(write(tmp_path / "t.tsv", rows), COLUMNS, keep=lambda each: each.text("answer") == "A")
    (one,) = table
    assert one.text("index") == "2"
    assert table.pictures(one) == [f"data:image/png;base64,{picture()}"]


def test_pictures_in_files_count_for_the_checksum(tmp_path):
    columns = ["index", "question", "image_path"]
    Image.new("RGB", (40, 30)).save(tmp_path / "a.png")
    Image.new("RGB", (40, 30), "red").save(tmp_path / "b.png")
    rows = [
        {"index": 1, "question": "What?", "image_path": "a.png"},
        {"index": 2, "question": "What?", "image_path": "['a.png', 'b.png']"},
    ]
    path = write(tmp_path / "t.tsv", rows, columns)
    table = Table(path, columns)
    data = dataset_of(table, sample_of(table))
    assert [urls(sample) for sample in data] == [
        [str(tmp_path / "a.png")],
        [str(tmp_path / "a.png"), str(tmp_path / "b.png")],
    ]
    assert data.files == (path, tmp_path / "a.png", tmp_path / "b.png")
    before = data.checksum()
    Image.new("RGB", (40, 30), "blue").save(tmp_path / "b.png")
    assert data.checksum() != before
    (tmp_path / "b.png").unlink()
    with pytest.raises(ValueError, match=r"t\.tsv: row 2, column 'image_path': .*b\.png: no such file; put"):
        dataset_of(table, sample_of(table))


@pytest.mark.parametrize(
    ("cells", "told"),
    [
        ({"image": "x" * 100}, r"row 2, column 'image': no picture, which is one of png, jpeg"),
        ({"image": "*" * 100}, r"row 2, column 'image': no base64"),
        ({"image": picture()[:-3]}, r"row 2, column 'image': no base64"),
        ({"image": "é" * 100}, r"row 2, column 'image': no base64"),
        ({"image": str([picture(), "A" * 80])}, r"row 2, column 'image': no picture"),
        ({"image": base64.b64encode(b"\xff\xd8\xff" + b"0" * 80).decode()}, r"a jpeg that cannot be read"),
        ({"image": "[]"}, r"row 2, column 'image': the list of pictures is empty"),
        ({"image": ""}, r"row 2, column 'image': is empty"),
        ({"image": "12"}, r"row 2, column 'image': '12' is neither base64 .* nor the index of a row"),
        ({"image": "2"}, r"row 2, column 'image': refers to row 2, which holds no picture itself"),
        ({"question": " nan "}, r"row 2, column 'question': is empty"),
        ({"index": "1"}, r"row 2, column 'index': is '1' as in row 1"),
    ],
)
def test_a_bad_cell_is_named_before_any_question_is_asked(tmp_path, cells, told):
    path = write(tmp_path / "t.tsv", [row(1), row(2) | cells])
    with pytest.raises(ValueError, match=r"t\.tsv: .*" + told):
        table = Table(path, COLUMNS)
        dataset_of(table, sample_of(table))


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"", r"no column 'index', 'question'.*found ;"),
        (b"index\tquestion\n", r"no column 'A', 'B', 'answer', 'image'; found index, question; give"),
        (b"\t".join(c.encode() for c in COLUMNS) + b"\n1\tWhat?\n", r"row 1 has 2 cells under 6 columns"),
        (b"\t".join(c.encode() for c in COLUMNS) + b'\n1\t"What?\n', r"row 1 cannot be read: unexpected end"),
        (b"\t".join(c.encode() for c in COLUMNS) + b"\n1\t\xff\n", r"row 1 cannot be read: .*utf-8"),
    ],
)
def test_a_file_that_is_no_such_table_is_named(tmp_path, content, told):
    (tmp_path / "t.tsv").write_bytes(content)
    with pytest.raises(ValueError, match=r"t\.tsv: " + told):
        Table(tmp_path / "t.tsv", COLUMNS)


def test_no_rows_and_ids_that_stand_twice_are_errors(tmp_path):
    table = Table(write(tmp_path / "t.tsv", []), COLUMNS)
    with pytest.raises(ValueError, match=r"t\.tsv: no questions"):
        dataset_of(table, sample_of(table))
    twice = Table(write(tmp_path / "u.tsv", [row(1), row(2)]), COLUMNS)
    with pytest.raises(ValueError, match=r"u\.tsv: two rows have the id 'x'"):
        dataset_of(twice, lambda each: Sample("x", [], {}, "x"))


def test_the_first_rows_only_and_the_same_order_every_time(tmp_path):
    table = Table(write(tmp_path / "t.tsv", [row(i) for i in (5, 3, 9, 1)]), COLUMNS)
    data = dataset_of(table, sample_of(table), limit=2)
    assert len(data) == 2
    assert [sample.id for sample in data] == [sample.id for sample in data] == ["5", "3"]
    everything = dataset_of(table, sample_of(table))
    assert [sample.id for sample in everything] == ["5", "3", "9", "1"]


def test_memory_does_not_grow_with_the_file(tmp_path):
    image = picture("BMP", size=(200, 120))  # 96 kB of base64
    peaks = []
    for count in (10, 160):
        path = write(tmp_path / f"{count}.tsv", (row(i, image=image) for i in range(count)))
        tracemalloc.start()
        table = Table(path, COLUMNS)
        data = dataset_of(table, sample_of(table))
        assert sum(len(urls(sample)) for sample in data) == count
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert path.stat().st_size > 15e6
    assert peaks[1] < peaks[0] + 300_000  # the rows together are 15 MB


def test_where_a_file_is_looked_for(tmp_path):
    path = write(tmp_path / "NAME.tsv", [row(1)])
    other = write(tmp_path / "other.tsv", [row(1)])
    assert locate_tsv(tmp_path, "NAME") == path
    assert locate_tsv(other, "NAME") == other
    with pytest.raises(
        ValueError, match=r"GONE\.tsv: no such file; download GONE\.tsv as .* give its folder"
    ):
        locate_tsv(tmp_path, "GONE")


def test_the_hub_is_asked_for_its_names_only(tmp_path, monkeypatch):
    asked = []

    class Hub:
        @staticmethod
        def hf_hub_download(repository, name, repo_type):
            asked.append((repository, name, repo_type))
            if repository.endswith("nothing"):
                raise FileNotFoundError("404 Client Error\nfor that name")
            return str(tmp_path / "fetched.tsv")

    monkeypatch.setitem(sys.modules, "huggingface_hub", Hub)
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "a" / "b"
    folder.mkdir(parents=True)
    for local in (Path("a/b"), folder, Path("gone"), Path("/gone/away"), Path("../gone"), Path("a/b/c")):
        with pytest.raises(ValueError, match="no such file; download"):
            locate_tsv(local, "NAME")
    assert asked == []
    assert locate_tsv(Path("some/thing"), "NAME") == tmp_path / "fetched.tsv"
    with pytest.raises(ValueError, match=r"some/nothing: no such folder here, .*404 Client Error\); give"):
        locate_tsv(Path("some/nothing"), "NAME")
    assert [name for name, *_ in asked] == ["some/thing", "some/nothing"]


@settings(max_examples=200)
@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]))))
def test_a_list_of_texts_is_read_from_python_and_from_json(texts):
    assert text_list(str(texts)) == texts
    assert text_list(json.dumps(texts)) == texts
    assert text_list(f" {json.dumps(texts, ensure_ascii=False)}\n") == texts


@pytest.mark.parametrize(
    "text",
    [
        "", "[", "abc", "[1, 2]", "[['a']]", "['a' 'b']", "['a', b]", "['a'] + ['b']", "('a',)",
        "[__import__('os')]", "['a", "['\\ud83d']", "[" * 100_000, "['" + "a" * 1_000_000, "['a'," * 100_000,
    ],
)  # fmt: skip
def test_what_is_no_list_of_texts_is_none_and_never_run(text):
    assert text_list(text) is None


@settings(max_examples=200)
@given(
    st.lists(st.sampled_from(["a ", "<image 1>", "<image2>", "<image 3>", "<image 12>", "<image 0>", "\n"])),
    st.integers(0, 3),
)
def test_every_picture_is_placed_once_and_no_word_is_lost(pieces, count):
    text = "".join(pieces)
    pictures = [f"data:{number}" for number in range(1, count + 1)]
    content = interleave(text, pictures, min_pixels=0, max_pixels=99)
    images = [item for item in content if item["type"] == "image"]
    assert sorted(item["image"] for item in images) == pictures
    assert all(set(item) == {"type", "image", "max_pixels"} for item in images)
    names = {f"data:{n}": f"<image{'' if n == 2 else ' '}{n}>" for n in (1, 2, 3)}
    first = [name for name in pictures if names[name] not in text]
    assert [item["image"] for item in content[: len(first)]] == first
    rest = content[len(first) :]
    assert "".join(item["text"] if item["type"] == "text" else names[item["image"]] for item in rest) == text
    assert mentioned(text) == max((int(p.strip("<image> ")) for p in pieces if "<" in p), default=0)


def test_the_question_s_lines():
    assert question_text("Why?", {"A": "x", "B": "y"}, "Answer.", "Look.") == (
        "Hint: Look.\nQuestion: Why?\nOptions:\nA. x\nB. y\nAnswer."
    )
    assert question_text("Why?", {}, "Answer.") == "Question: Why?\nAnswer."


@pytest.fixture(scope="module")
def processor():
    from transformers import AutoProcessor

    return AutoProcessor.from_pretrained(NANO)


@pytest.mark.parametrize("task", ["mmmu", "mathvision", "realworldqa"])
def test_the_nano_model_s_processor_takes_every_question_of_a_sample(tmp_path, processor, task):
    from qwen_vl_utils import count_tokens, extract_vision_info, load_media

    write_sample(task, tmp_path)
    for sample in task_class(task)().open(tmp_path):
        loaded = load_media(processor, extract_vision_info(sample.messages))
        assert [(each.width, each.height) for each in loaded] == [(128, 128)] * len(urls(sample))
        assert count_tokens(sample.messages, processor) > 16 * len(loaded) > 0


@pytest.mark.parametrize("task", ["mmmu", "mathvision", "realworldqa"])
def test_a_sample_is_the_same_every_time(tmp_path, task):
    first, again = (write_sample(task, tmp_path / name) for name in "ab")
    assert first.read_bytes() == again.read_bytes()
    kind = task_class(task)
    data, other = kind().open(first), kind().open(again.parent)
    assert list(data) == list(data) == list(other)
    assert (len(data), data.checksum(), data.files) == (len(list(data)), other.checksum(), (first,))
