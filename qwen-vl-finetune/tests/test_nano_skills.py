"""The skills: repeatable, true to their pictures, and with nothing in the test that training shows."""

import json
import re
from random import Random

import numpy as np
import pytest
from PIL import Image

from qwen_vl_utils.grounding import parse_boxes, parse_boxes_3d, parse_html, parse_markdown, parse_tool_calls
from qwenvl.nano.bench import video_bytes, write_skill
from qwenvl.nano.skills import SKILLS, assets, canvas, charts, code, screens, solids, text, things
from qwenvl.nano.skills.shapes import SHAPES
from qwenvl_eval.scoring.skills import METRICS

EACH = 12


@pytest.fixture
def white(monkeypatch):
    """Scenes on plain white, without white things: what is not white was drawn."""
    monkeypatch.setattr(canvas, "ground", lambda random, size, away_from=(): Image.new("RGB", size, "white"))
    monkeypatch.setattr(canvas, "PLAIN_COLOURS", tuple(c for c in canvas.PLAIN_COLOURS if c != "white"))


def islands(picture) -> list[tuple[int, int, int, int]]:
    """Outer boxes of connected regions that are clearly not white, by flood fill."""
    left = np.asarray(picture.convert("RGB")).astype(int).min(axis=2) < 200
    boxes = []
    while left.any():
        todo = [tuple(np.argwhere(left)[0])]
        found = []
        while todo:
            y, x = todo.pop()
            if 0 <= y < left.shape[0] and 0 <= x < left.shape[1] and left[y, x]:
                left[y, x] = False
                found.append((x, y))
                todo += [(y + a, x + b) for a in (-1, 0, 1) for b in (-1, 0, 1)]
        if len(found) > 8:
            xs, ys = zip(*found, strict=True)
            boxes.append((min(xs), min(ys), max(xs) + 1, max(ys) + 1))
    return boxes


@pytest.mark.parametrize("name", SKILLS)
def test_the_same_seed_gives_the_same_bytes_and_its_own_answer_scores_one(name):
    skill = SKILLS[name]
    for split in ("train", "test"):
        for seed in range(EACH):
            one, other = skill.example(split, seed), skill.example(split, seed)
            assert (one.form, one.question, one.answer, one.target) == (
                other.form, other.question, other.answer, other.target,
            )  # fmt: skip
            for a, b in zip(one.pictures + one.frames, other.pictures + other.frames, strict=True):
                assert a.tobytes() == b.tobytes()
            assert not one.frames or video_bytes(one.frames) == video_bytes(other.frames)
            target = {"answer": one.answer, **one.target}
            assert METRICS[skill.metric](one.answer, target) == 1
            assert METRICS[skill.metric]("nothing of the kind", target) < 1
            assert one.question.count("<image>") == len(one.pictures)
            assert one.question.count("<video>") == bool(one.frames) and len(one.frames) % 2 == 0


def test_an_unknown_split_is_refused():
    with pytest.raises(ValueError, match="'dev'"):
        SKILLS["count"].example("dev", 0)


def test_no_font_and_no_layout_is_in_both_splits():
    for halves in (
        assets.FONTS,
        text.LAYOUTS,
        text.PAGES,
        screens.LAYOUTS,
        charts.STYLES_OF,
        solids.COLOURS_OF,
    ):
        assert halves["test"] and not set(halves["train"]) & set(halves["test"])


def test_training_writes_with_its_own_fonts_only(monkeypatch):
    used = {"train": set(), "test": set()}
    original = assets.font
    for split, seen in used.items():
        monkeypatch.setattr(
            assets, "font", lambda name, *more, seen=seen: (seen.add(name), original(name, *more))[1]
        )
        for name in ("word", "line", "receipt", "form", "long_document", "gui", "chart", "table", "zoom"):
            for seed in range(10):
                SKILLS[name].example(split, seed)
    assert len(used["test"]) > 4 and not used["train"] & used["test"]


def test_no_pictogram_of_a_kind_and_no_name_to_find_is_in_both_splits():
    kinds = assets.kinds()
    shown = {split: {name for names in kinds[split].values() for name in names} for split in kinds}
    assert not shown["train"] & shown["test"]
    assert not shown["test"] & ({assets.DRAWN_AS.get(name, name) for name in assets.NAMED})
    assert min(map(len, kinds["test"].values())) >= 10
    assert not set(things.FOUND["train"]) & set(things.FOUND["test"])
    assert not set(things.COUNTED["train"]) & set(things.COUNTED["test"])


def test_training_never_draws_a_pair_of_shape_and_colour_that_the_test_asks_for(monkeypatch):
    drawn = {"train": set(), "test": set()}
    original = canvas.sprite
    for split, seen in drawn.items():
        monkeypatch.setattr(
            canvas,
            "sprite",
            lambda random, item, radius, seen=seen: (
                seen.add((item.shape, item.colour)), original(random, item, radius)
            )[1],
        )  # fmt: skip
        for name in (
            "colour",
            "shape",
            "attributes",
            "count",
            "spatial",
            "detection",
            "compare",
            "direction",
        ):
            for seed in range(30):
                SKILLS[name].example(split, seed)
    assert not drawn["train"] & canvas.UNSEEN and len(drawn["test"] & canvas.UNSEEN) > 10
    assert {shape for shape, _ in canvas.UNSEEN} == set(SHAPES)
    fills = {split: set() for split in drawn}
    for split, seen in fills.items():
        for seed in range(40):
            seen.update((part.tag, part.fill) for part in code._parts(Random(seed), split))
    assert not fills["train"] & fills["test"]


@pytest.mark.parametrize("split", ["train", "test"])
def test_counts_are_the_islands_that_can_be_seen(white, split):
    seen = 0
    for seed in range(60):
        example = things.count(Random(seed), split)
        if "thing" not in example.form and "everything" not in example.form:
            continue
        if not re.search("[6-9]", example.answer):  # small pictograms come apart
            continue
        seen += 1
        assert len(islands(example.pictures[0])) >= int(example.answer)
    assert seen > 3


@pytest.mark.parametrize("split", ["train", "test"])
def test_boxes_are_those_of_the_drawn_pixels(white, split):
    for seed in range(30):
        example = things.detection(Random(seed), split)
        found = [[round(1000 * value / 128) for value in box] for box in islands(example.pictures[0])]
        for box in example.target["boxes"]:
            nearest = min(found, key=lambda other: max(abs(a - b) for a, b in zip(box, other, strict=True)))
            assert max(abs(a - b) for a, b in zip(box, nearest, strict=True)) <= 20  # 2.5 pixels of soft edge


def test_what_moves_moves_that_way(white):
    from qwenvl.nano.skills import video

    for seed in range(30):
        example = video.direction(Random(seed), "test")
        if example.answer not in video.WAYS:
            continue
        first, last = (np.asarray(frame).astype(int) for frame in (example.frames[0], example.frames[-1]))
        before, after = ((one != other).any(axis=2) & (one.min(axis=2) < 235)
                         for one, other in ((first, last), (last, first)))  # fmt: skip
        y, x = np.argwhere(after).mean(axis=0) - np.argwhere(before).mean(axis=0)
        way = video.WAYS[example.answer]
        assert x * way[0] + y * way[1] > 3, (seed, example.answer)


def test_a_click_lies_in_the_element_and_elements_do_not_touch():
    for split in ("train", "test"):
        for seed in range(40):
            random = Random(seed)
            size = random.choice([device[0] for device in screens.DEVICES.values()])
            picture, elements = screens.draw_screen(
                random, split, random.choice(screens.LAYOUTS[split]), size
            )
            for place, (_, box) in enumerate(elements):
                assert 0 <= box[0] < box[2] <= picture.width and 16 <= box[1] < box[3] <= picture.height
                assert not any(canvas.touch(box, other) for _, other in elements[:place])
            (call,) = parse_tool_calls(SKILLS["gui"].example(split, seed).answer).items
            box = SKILLS["gui"].example(split, seed).target["box"]
            x, y = call.arguments["coordinate"]
            assert box[0] < x < box[2] and box[1] < y < box[3]


def test_receipts_add_up_and_stay_on_the_paper():
    for split in ("train", "test"):
        for seed in range(30):
            example = SKILLS["receipt"].example(split, seed)
            answer = json.loads(example.answer)
            assert re.fullmatch(r"\d{4}-\d\d-\d\d", answer["date"]) and float(answer["total"]) > 0
            edge = np.asarray(example.pictures[0].convert("L"))[-2:]
            assert edge.min() > 150, (split, seed)  # nothing is cut off at the foot


def test_a_drawings_code_drawn_by_another_renderer_is_the_picture():
    import io

    import resvg_py

    for seed in range(15):
        example = SKILLS["drawing"].example("test", seed)
        svg = example.answer.replace("<svg", '<svg xmlns="http://www.w3.org/2000/svg"')
        drawn = resvg_py.svg_to_bytes(svg_string=svg, width=128, height=128, background="#ffffff")
        other = np.asarray(Image.open(io.BytesIO(bytes(drawn))).convert("RGB")).astype(int)
        assert np.abs(other - np.asarray(example.pictures[0]).astype(int)).mean() < 3


def test_answers_are_read_by_the_parsers_of_the_published_formats():
    for seed in range(EACH):
        answers = {name: SKILLS[name].example("test", seed).answer for name in SKILLS}
        for parse, name in (
            (parse_boxes, "grounding"), (parse_boxes, "detection"), (parse_boxes_3d, "solid"),
            (parse_html, "document_html"), (parse_markdown, "document_markdown"), (parse_tool_calls, "zoom"),
        ):  # fmt: skip
            parsed = parse(answers[name])
            assert parsed.items and parsed.clean, (name, answers[name])


def test_bench_files_are_the_same_each_time_and_finished_ones_stay(tmp_path):
    files = [write_skill("when", tmp_path / name, 3, examples=40) for name in "ab"]
    assert files[0].read_bytes() == files[1].read_bytes()
    row = json.loads(files[0].read_text().splitlines()[0])
    for path in (*row["video"], *row["grey"]):
        assert (tmp_path / "a" / path).read_bytes() == (tmp_path / "b" / path).read_bytes()
    before = files[0].stat().st_mtime_ns
    assert write_skill("when", tmp_path / "a", 3).stat().st_mtime_ns == before
