"""Reading annotation files: what a row becomes, and what every bad row is told."""

import json

import pytest
from PIL import Image

from qwenvl_eval.tasks.conversations import Conversations, question_answer_pairs


def load_samples(path, **options):
    return list(Conversations(**options).open(path))


@pytest.fixture
def folder(tmp_path):
    for name in ("a.png", "b.png"):
        Image.new("RGB", (32, 32)).save(tmp_path / name)
    (tmp_path / "clip.mp4").write_bytes(b"not decoded here")
    return tmp_path


def write(folder, rows, name="rows.jsonl"):
    path = folder / name
    text = json.dumps(rows) if name.endswith(".json") else "".join(json.dumps(row) + "\n" for row in rows)
    path.write_text(text)
    return path


def row(question="<image>What?", answer="a cat", **more):
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return {"image": "a.png", "conversations": turns} | more


@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl"])
def test_the_last_answer_is_the_target_and_the_rest_the_prompt(folder, name):
    first = row("<image>\n How many?", "two")
    system = [{"from": "system", "value": "Be short."}]
    more = [{"from": "human", "value": "Sure?"}, {"from": "gpt", "value": "yes"}]
    first["conversations"] = system + first["conversations"] + more
    (sample,) = load_samples(write(folder, [first], name))
    assert (sample.id, sample.cluster) == ("0", "a.png")
    assert sample.target == {"type": "open", "question": "Sure?", "answer": "yes"}
    image = {"type": "image", "image": str(folder / "a.png")}
    assert sample.messages == [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": [image, {"type": "text", "text": "\n How many?"}]},
        {"role": "assistant", "content": "two"},
        {"role": "user", "content": "Sure?"},
    ]


def test_messages_keys_and_plural_media_are_read_too(folder):
    turns = [{"role": "user", "content": "<image>What?"}, {"role": "assistant", "content": "a cat"}]
    path = write(folder, [{"images": ["a.png"], "conversations": turns}, row()])
    first, second = load_samples(path)
    assert (first.messages, first.target, first.cluster) == (second.messages, second.target, second.cluster)


def test_media_stand_where_the_text_puts_them(folder):
    mixed = row("<image>, <video> and <image>", image=["b.png", "a.png"], video="clip.mp4")
    (sample,) = load_samples(write(folder, [mixed]))
    kinds = [next(iter(set(item) - {"type"})) for item in sample.messages[0]["content"]]
    assert kinds == ["image", "text", "video", "text", "image"]
    assert [item.get("image") for item in sample.messages[0]["content"]][::4] == [
        str(folder / "b.png"),
        str(folder / "a.png"),
    ]
    assert sample.cluster == "b.png a.png clip.mp4"
    assert sample.target["question"] == ",  and"


def test_limit_takes_the_first_rows_and_looks_no_further(folder):
    path = write(folder, [row(answer="one"), row(answer="two"), row(image="missing.png")])
    assert [sample.target["answer"] for sample in load_samples(path, limit=2)] == ["one", "two"]


def test_ids_groups_and_limits_of_pixels_reach_the_sample(folder):
    path = write(folder, [row(id="x-7", group="cats")])
    (sample,) = load_samples(path, min_pixels=1024, max_pixels=4096)
    assert (sample.id, sample.groups) == ("x-7", {"group": "cats"})
    assert sample.messages[0]["content"][0] == {
        "type": "image", "image": str(folder / "a.png"), "min_pixels": 1024, "max_pixels": 4096,
    }  # fmt: skip


def test_media_may_lie_elsewhere(folder, tmp_path_factory):
    other = tmp_path_factory.mktemp("rows")
    (sample,) = load_samples(write(other, [row()]), media_dir=str(folder))
    assert sample.messages[0]["content"][0]["image"] == str(folder / "a.png")


@pytest.mark.parametrize(
    ("bad", "told"),
    [
        (row(image="missing.png"), r"missing\.png.*no such file"),
        (row("no picture in the text"), "have no <image>"),
        (row("<image> and <image>"), "more <image> in the text"),
        (row("<video>"), "more <video> in the text"),
        (row(image=3), '"image" must be a path or a list'),
        ({"image": "a.png"}, '"conversations" must be a list of turns'),
        ([1, 2], '"conversations" must be a list of turns'),
        (row() | {"conversations": [{"from": "robot", "value": "hello"}]}, "one of human, user, gpt"),
        (row() | {"conversations": [{"from": [], "value": "hello"}]}, "one of human, user, gpt"),
        (row() | {"conversations": [{"from": "gpt", "value": "alone"}]}, "a question .* and the answer"),
        (row() | {"conversations": row()["conversations"][:1]}, "a question .* and the answer"),
        (row(answer="<image>"), r"turn 1 \(gpt\) contains <image>"),
        (row(images=["a.png"]), 'both "image" and "images"'),
    ],
)
def test_a_bad_row_is_named_with_its_file_and_reason(folder, bad, told):
    path = write(folder, [row(), bad])
    path.write_text(path.read_text().replace("\n", "\n\n", 1))  # a blank line counts as a line
    with pytest.raises(ValueError, match=rf"rows\.jsonl: line 3 \(counted from 1\): .*{told}"):
        load_samples(path)


def test_broken_json_names_file_and_row(folder):
    path = write(folder, [row()])
    path.write_text(path.read_text() + '{"image": ')
    with pytest.raises(ValueError, match=r"rows\.jsonl: line 2 .*not valid JSON"):
        load_samples(path)
    list_path = write(folder, [row(), row(image="gone.png")], "list.json")
    with pytest.raises(ValueError, match=r"list\.json: row 1 \(counted from 0\): .*gone\.png"):
        load_samples(list_path)
    with pytest.raises(ValueError, match=r"rows\.csv: the name must end in \.json"):
        load_samples(folder / "rows.csv")
    (folder / "dict.json").write_text("{}")
    with pytest.raises(ValueError, match=r"dict\.json: a JSON list of rows is expected, found dict"):
        load_samples(folder / "dict.json")
    (folder / "none.jsonl").write_text("\n")
    with pytest.raises(ValueError, match=r"none\.jsonl: no rows"):
        load_samples(folder / "none.jsonl")


def test_a_line_of_jsonl_ends_at_the_line_feed_only(folder):
    path = folder / "odd.jsonl"
    path.write_text(json.dumps(row(answer="one\u2028two\x85"), ensure_ascii=False) + "\r\n", encoding="utf-8")
    assert load_samples(path)[0].target["answer"] == "one\u2028two\x85"


def test_every_turn_of_a_conversation_is_a_pair_for_the_baseline(folder):
    turns = row()["conversations"] + [
        {"from": "human", "value": " Where? "},
        {"from": "gpt", "value": "here"},
    ]
    path = write(folder, [row(conversations=turns), row("<image>Who?", "me")])
    assert list(question_answer_pairs(path)) == [("What?", "a cat"), ("Where?", "here"), ("Who?", "me")]


def test_a_metric_makes_its_own_targets(folder):
    lettered = row("<image>\nWhich?\nA. a cat\n(B) a dog", "B. a dog")
    (sample,) = load_samples(write(folder, [lettered]), metric="choice")
    assert sample.target == {
        "type": "multiple-choice", "answer": "B", "options": {"A": "a cat", "B": "a dog"},
        "question": "Which?\nA. a cat\n(B) a dog",
    }  # fmt: skip
    (sample,) = load_samples(write(folder, [row(answer='{"bbox": [1, 2, 3.5, 4]}')]), metric="iou")
    assert sample.target["boxes"] == [[1, 2, 3.5, 4]]


@pytest.mark.parametrize(
    ("metric", "answer", "right", "wrong"),
    [
        ("exact", "a cat", "A cat.", "a cats"),
        ("choice", "B", "The answer is B.", "A"),
        ("anls", "a long answer", "a long anwser", "something else"),
        ("edit", "Cat", "Cat", "cat"),
        ("iou", "[0, 0, 10, 10]", "[1, 0, 10, 10]", "[8, 8, 20, 20]"),
    ],
)
def test_each_metric_judges_what_it_is_for(folder, metric, answer, right, wrong):
    task = Conversations(metric=metric)
    (sample,) = task.open(write(folder, [row("<image>?\nA. a cat\nB. a dog", answer)]))
    (scorer,) = task.scorers.values()
    assert scorer(right, sample.target).right and not scorer(wrong, sample.target).right


def test_a_row_that_a_metric_cannot_use_is_named(folder):
    with pytest.raises(ValueError, match="metric is 'loud'; there are exact, choice"):
        Conversations(metric="loud")
    for metric, told in (("choice", "needs lines such as 'A. a cat'"), ("iou", "needs a box")):
        with pytest.raises(ValueError, match=rf"rows\.jsonl: line 1 .*--metric {metric}: .*{told}"):
            load_samples(write(folder, [row()]), metric=metric)
