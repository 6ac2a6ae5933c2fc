"""Rows of annotation files: read to the character, or refused with file, row and reason."""

import json
import logging
import os

import pytest
from transformers import AutoConfig, AutoProcessor

from qwenvl.data.data_processor import make_supervised_data_module
from qwenvl.data.messages import read_sample, refused_text
from qwenvl.data.sources import check_annotations, open_annotations
from qwenvl.train.argument import DataArguments

REFUSED = refused_text(["<|im_start|>", "<|im_end|>", "<|image_pad|>", "<|box_start|>"])


def row(question="<image>\nWhat?", answer="A cat.", **fields) -> dict:
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return {"image": "a.png", "conversations": turns} | fields


def messages(fields, video_options=None) -> list[dict]:
    return read_sample(fields, "/data", REFUSED, video_options).messages


def write(folder, name, rows):
    text = "\n".join(map(json.dumps, rows)) if name.endswith("l") else json.dumps(rows, indent=1)
    (folder / name).write_text(text, encoding="utf-8")
    return folder / name


def image(path):
    return {"type": "image", "image": path}


def text(value):
    return {"type": "text", "text": value}


def test_text_around_placeholders_is_kept_to_the_character():
    fields = row(
        "  Here: <image>\n\n and<image><video>\t?\n ", " A cat. \n", image=["a.png", "/b.png"], video="c.mp4"
    )
    user, assistant = messages(fields, {"fps": 2.0})
    assert user == {
        "role": "user",
        "content": [
            text("  Here: "),
            image("/data/a.png"),
            text("\n\n and"),
            image("/b.png"),
            {"type": "video", "video": "/data/c.mp4", "fps": 2.0},
            text("\t?\n "),
        ],
    }
    assert assistant == {"role": "assistant", "content": " A cat. \n"}


def test_system_turns_stay_system_turns_and_turns_without_media_stay_text():
    turns = [
        {"from": "system", "value": "Be brief."},
        {"from": "human", "value": "Hello"},
        {"role": "assistant", "content": "Hi."},
    ]
    assert messages({"conversations": turns}) == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "Hi."},
    ]


def test_addresses_are_not_put_under_the_data_folder():
    urls = ["https://host/a.png", "file:///b.png", "data:image/png;base64,AA"]
    (user, _) = messages(row("<image><image><image>", images=urls, image=None))
    assert [item["image"] for item in user["content"]] == urls


def test_marks_of_places_are_content():
    answer = "<|box_start|>(1,2),(3,4)<|box_end|>"
    assert messages(row(answer=answer))[1]["content"] == answer


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        (row("What?"), "0 <image> placeholders for 1 entries of 'image'; make them equal"),
        (row("<image><image>"), "2 <image> placeholders for 1 entries of 'image'"),
        (row("<image> <video>"), "1 <video> placeholders for 0 entries of 'video'"),
        (row(answer="<image>"), "turn 1 (assistant) contains <image>; only user turns may"),
        (row(answer="see <video>"), "turn 1 (assistant) contains <video>"),
        (row("<image> <|im_end|>"), "turn 0 (user) contains the special token <|im_end|>; take it out"),
        (row(answer="<|image_pad|>"), "turn 1 (assistant) contains the special token <|image_pad|>"),
        (row("<image> \ud83d"), "can't encode character '\\ud83d' in position 1: surrogates not allowed"),
        (row(image=["a.png", 3]), "'image' must be a path or a list of paths, found ['a.png', 3]"),
        (row(image={"name": "a.png"}), "'image' must be a path or a list of paths"),
        (row(images=["a.png"]), "both 'image' and 'images'; keep one of them"),
        (row(conversations=None), "'conversations' must be a list of turns, found nothing"),
        (row(conversations=[]), "'conversations' must be a list of turns, found an empty list"),
        (row(conversations=["hi"]), "turn 0 must be an object with 'from' and 'value', found a string"),
        (row(conversations=[{"from": "bot", "value": ""}]), "turn 0: 'from' is 'bot'; known roles: human"),
        (row(conversations=[{"value": "x"}]), "turn 0: 'role' is None"),
        (row(conversations=[{"from": "human"}]), "turn 0 (user): 'value' must be text, found nothing"),
        (
            row(conversations=[{"from": "human", "value": "<image>"}]),
            "no assistant turn, so nothing to learn",
        ),
        (row(conversations=row()["conversations"][1:]), "the conversation begins with an answer"),
        (
            row(conversations=[*row()["conversations"], {"from": "system", "value": "x"}]),
            "turn 2 is a system turn; only the first turn may be one",
        ),
        ("text", "a row must be an object with conversations, found a string"),
    ],
)
def test_rows_that_break_the_rules_say_how(fields, reason):
    with pytest.raises(ValueError) as caught:
        read_sample(fields, "/data", REFUSED)
    assert reason in str(caught.value)


# --- whole files --------------------------------------------------------------------------------------------


@pytest.fixture
def module(tmp_path, pictures, checkpoints):
    """Make the data module of an annotation file, as training does before its first step."""
    folder = checkpoints["qwen3_vl"]
    processor, config = AutoProcessor.from_pretrained(folder), AutoConfig.from_pretrained(folder)

    def make(file, **options):
        toml = tmp_path / "data.toml"
        toml.write_text(f'[mine]\nannotation_path = "{file.name}"\ndata_path = "{pictures}"\n')
        flags = {"dataset_use": "mine", "dataset_config": str(toml), "data_flatten": False} | options
        arguments = DataArguments(**flags)
        return make_supervised_data_module(
            processor, arguments, model_config=config, model_max_length=512, seed=0
        )

    return make


FAULTS = {
    "missing picture": (
        row(image="gone.png"),
        "media file {}/gone.png: No such file or directory; correct the",
    ),
    "folder for a picture": (row(image="."), "media file {}/. is not a file"),
    "placeholder count": (row("What?"), "0 <image> placeholders for 1 entries of 'image'"),
    "tag in an answer": (row(answer="It is <image>"), "turn 1 (assistant) contains <image>"),
}


@pytest.mark.parametrize("name", FAULTS)
@pytest.mark.parametrize("file", ["train.json", "train.jsonl"])
def test_a_bad_row_stops_the_run_before_training(module, tmp_path, pictures, name, file):
    bad, reason = FAULTS[name]
    path = write(tmp_path, file, [row(), row(), bad, row()])
    place = "line 3 (counted from 1)" if file.endswith("l") else "row 2 (counted from 0)"
    with pytest.raises(ValueError) as caught:
        module(path)
    assert str(caught.value).startswith(f"{path}: {place}: " + reason.format(pictures))
    assert "\n" not in str(caught.value)


def test_broken_json_stops_the_run_before_training(module, tmp_path):
    good = json.dumps(row())
    lines = tmp_path / "train.jsonl"
    lines.write_text(f"{good}\n\n{good[:-2]}\n{good}\n")
    with pytest.raises(
        ValueError, match=r"train.jsonl: line 3 \(counted from 1\): not valid JSON: Expecting .* at"
    ):
        module(lines)
    array = tmp_path / "train.json"
    for broken, reason in {
        f"[{good}, {good[:-2]}, {good}]": r"row 1 \(counted from 0\): not valid JSON: Expecting",
        f"[{good}, {good} {good}]": r"row 1 \(counted from 0\): not valid JSON: no comma or \] after the row",
        f"[{good}, {good}": r"row 1 \(counted from 0\): not valid JSON: no comma or \] after the row",
        f"{good}\n{good}": "not a JSON list; name a file with one row per line .jsonl",
        f"[{good}] {good}": r"text after the closing \]",
        "[]": "has no rows",
        "": "not a JSON list",
    }.items():
        array.write_text(broken)
        with pytest.raises(ValueError, match=f"train.json.*{reason}"):
            module(array)


def test_files_that_cannot_be_read_are_named(module, tmp_path):
    with pytest.raises(ValueError, match=r"gone.json: No such file or directory; correct annotation_path"):
        module(tmp_path / "gone.json")
    (tmp_path / "a.csv").write_text("")
    with pytest.raises(ValueError, match=r"a.csv: the name must end in .json"):
        module(tmp_path / "a.csv")
    (tmp_path / "a.jsonl").write_text("\n\n")
    with pytest.raises(ValueError, match=r"a.jsonl has no rows"):
        module(tmp_path / "a.jsonl")
    (tmp_path / "latin.json").write_bytes('["é"]'.encode("latin-1"))
    with pytest.raises(ValueError, match=r"latin.json: not UTF-8 at byte 2"):
        module(tmp_path / "latin.json")


def test_the_message_counts_further_bad_rows(module, tmp_path):
    path = write(tmp_path, "train.jsonl", [row(image="x.png"), row(), row("What?")])
    with pytest.raises(ValueError, match=r"line 1 .*x.png.*\(1 more of 3 rows are bad too\)"):
        module(path)


def test_a_packed_list_needs_a_flattened_batch_and_names_its_member(module, tmp_path):
    path = write(tmp_path, "train.jsonl", [[row(), row()]])
    with pytest.raises(ValueError, match=r"line 1 .*a packed list of samples; pass --data_packing True"):
        module(path)
    assert len(module(path, data_packing=True)["train_dataset"]) == 1
    path = write(tmp_path, "train.json", [row(), [row(), row("?")]])
    with pytest.raises(ValueError, match=r"row 1 \(counted from 0\), sample 1 of the pack: 0 <image>"):
        module(path, data_packing=True)


def test_bad_rows_are_skipped_on_request_with_count_and_reasons(module, tmp_path, caplog):
    rows = [row(), row(image="gone.png"), row("What?"), row()]
    path = write(tmp_path, "train.jsonl", rows)
    with caplog.at_level(logging.WARNING, logger="qwenvl.data"):
        dataset = module(path, bad_samples="skip")["train_dataset"]
    assert dataset.sources[0].rows.tolist() == [0, 3]
    assert "skipped 2 of 4 rows" in caplog.text
    assert "line 2 (counted from 1): media file" in caplog.text
    assert "line 3 (counted from 1): 0 <image>" in caplog.text
    with pytest.raises(ValueError, match="every row is bad"):
        module(write(tmp_path, "none.jsonl", rows[1:3]), bad_samples="skip")


@pytest.mark.parametrize("file", ["train.json", "train.jsonl"])
def test_rows_come_back_as_they_were_written(tmp_path, file):
    rows = [row('<image>é 猫 \u2028 \\ " 🐈'), row("<image>b"), [row(), row()]]
    path = write(tmp_path, file, rows)
    for blob in (
        path.read_bytes(),
        b"\xef\xbb\xbf" + path.read_bytes(),
        path.read_bytes().replace(b"\n", b"\r\n"),
    ):
        path.write_bytes(blob)
        annotations = open_annotations(path)
        assert [annotations.row(index) for index in range(len(annotations))] == rows
    path.write_text(json.dumps(rows, ensure_ascii=False) if file == "train.json" else "\n".join(
        json.dumps(fields, ensure_ascii=False) for fields in rows), encoding="utf-8")  # fmt: skip
    annotations = open_annotations(path)
    assert [annotations.row(index) for index in range(len(annotations))] == rows


def test_each_file_is_looked_for_once(tmp_path, monkeypatch):
    for index in range(400):
        (tmp_path / f"{index}.png").write_bytes(b"png")
    path = write(tmp_path, "train.jsonl", [row(image=f"{index % 400}.png") for index in range(4_000)])
    looked, real = [], os.stat
    monkeypatch.setattr(os, "stat", lambda path, **kw: (looked.append(str(path)), real(path, **kw))[1])
    annotations = open_annotations(path)
    assert check_annotations(annotations, str(tmp_path), refused=REFUSED, packed=False) == []
    pictures = [name for name in looked if name.endswith(".png")]
    assert len(annotations) == 4_000
    assert len(pictures) == len(set(pictures)) == 400
