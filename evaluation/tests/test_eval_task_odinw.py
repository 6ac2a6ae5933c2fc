"""ODinW-13: what is asked, how an answer's boxes are read, and the figures that come of them."""

import json
import random
import runpy
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen_vl_utils import smart_resize
from qwenvl_eval.samples.odinw import write
from qwenvl_eval.scoring import Outcome, Verdict
from qwenvl_eval.scoring.detection import ODINW_LIMITS, coco_stats
from qwenvl_eval.task import Judged, task_class
from qwenvl_eval.tasks.odinw import SETS, Odinw, boxes, official

CONFIG = Path(__file__).resolve().parents[1] / "ODinW-13" / "odinw13_config.py"
NAMES = [one.name for one in SETS]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write(tmp_path_factory.mktemp("odinw"))


@pytest.fixture(scope="module")
def samples(data):
    return list(Odinw().open(data))


def target(truth=(), height=200, width=400, resized=None):
    return {
        "dataset": "pothole",
        "image_id": 1,
        "height": height,
        "width": width,
        "resized": resized,
        "categories": ["cat", "dog"],
        "truth": [{"label": label, "bbox": list(box)} for label, *box in truth],
    }


CAT = ("cat", 40, 20, 80, 40)  # of 400 x 200: 100..300, 100..300 of 1000
CAT_SAID = {"bbox_2d": [100, 100, 300, 300], "label": "cat"}


def perfect(sample):
    """The answer that names each truth, in 0 to 1000."""
    height, width = sample.target["height"], sample.target["width"]
    said = []
    for one in sample.target["truth"]:
        x, y, w, h = one["bbox"]
        corners = [x / width, y / height, (x + w) / width, (y + h) / height]
        said.append({"bbox_2d": [1000 * value for value in corners], "label": one["label"].upper()})
    return f"```json\n{json.dumps(said)}\n```"


def judged(samples, answers, replicate=0):
    return [
        Judged(s.id, replicate, s.target, s.cluster, s.groups, False, boxes(answer, s.target))
        for s, answer in zip(samples, answers, strict=True)
    ]


def figures(rows):
    return {metric.name: metric for metric in Odinw().metrics("boxes", rows)}


def test_each_picture_of_the_13_sets_is_asked_once_with_its_categories(data, samples):
    dataset = Odinw().open(data)
    assert len(dataset) == len(samples) == 26
    assert [path.relative_to(data).as_posix() for path in dataset.files] == [one.ann_file for one in SETS]
    assert len({sample.id for sample in samples}) == len({sample.cluster for sample in samples}) == 26
    assert {sample.groups["dataset"] for sample in samples} == set(NAMES)
    for sample in samples:
        (message,) = sample.messages
        image, text = message["content"]
        assert Path(image["image"]).is_file()
        assert image["min_pixels"] == 768 * 32 * 32 and image["max_pixels"] == 12800 * 32 * 32
        assert all(
            name in text["text"] for name in ("red square", "blue circle", "Green-Triangle", "bbox_2d")
        )
        json.dumps(sample.target)
    assert [sample.id for sample in dataset] == [sample.id for sample in samples]


def test_the_original_config_file_shows_the_one_table(data):
    config = runpy.run_path(str(CONFIG))
    assert config["dataset_prefixes"] == NAMES and len(set(NAMES)) == 13
    for one in config["datasets"]:
        content = json.loads((data / one["ann_file"]).read_text())
        assert all((data / one["img_prefix"] / image["file_name"]).is_file() for image in content["images"])


def test_some_of_the_sets_may_be_named(data):
    dataset = Odinw(datasets="pothole, Aquarium").open(data)
    assert [sample.groups["dataset"] for sample in dataset] == ["Aquarium"] * 2 + ["pothole"] * 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"datasets": "potholes"}, "no set is called 'potholes'; there are AerialMaritimeDrone"),
        ({"coordinates": "absolut"}, "coordinates='absolut'; give one of relative1000, absolute"),
        ({"coordinates": "absolute", "max_pixels": 0}, "max_pixels=0 with absolute coordinates"),
    ],
)
def test_options_that_cannot_be_are_told(options, message):
    with pytest.raises(ValueError, match=message):
        Odinw(**options)


def test_the_boxes_of_the_sample_are_where_the_colours_are(samples):
    from PIL import Image

    for sample in samples:
        image = Image.open(sample.messages[0]["content"][0]["image"]).convert("RGB")
        assert image.size == (sample.target["width"], sample.target["height"])
        for one in sample.target["truth"]:
            x, y, w, h = map(int, one["bbox"])
            ink = image.crop((x, y, x + w, y + h)).point(lambda v: 255 - v).getbbox()
            assert ink == (0, 0, w, h), "the box is not the shape's own"


def test_the_sample_is_the_same_every_time_and_never_overwrites(data, tmp_path):
    write(tmp_path)
    first = {path.relative_to(data): path.read_bytes() for path in sorted(data.rglob("*")) if path.is_file()}
    second = {path.relative_to(tmp_path): path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert first == second
    write(tmp_path)
    (tmp_path / SETS[0].ann_file).write_text("{}")
    with pytest.raises(ValueError, match="not this sample"):
        write(tmp_path)


def test_the_task_is_found_by_its_name():
    assert task_class("odinw") is Odinw


# reading an answer


def test_relative_coordinates_become_pixels_of_the_original():
    verdict = boxes(json.dumps([CAT_SAID]), target([CAT]))
    assert verdict.outcome is Outcome.RIGHT
    assert json.loads(verdict.extracted) == [{"label": "cat", "bbox": [40, 20, 80, 40]}]


def test_absolute_coordinates_are_of_the_resized_picture_whatever_the_answer_looks_like(data):
    task = Odinw(datasets="pothole", coordinates="absolute", min_pixels=56 * 56, max_pixels=100 * 28 * 28)
    sample = next(iter(task.open(data)))
    height, width = sample.target["height"], sample.target["width"]
    rows, columns = smart_resize(height, width, 28, min_pixels=56 * 56, max_pixels=100 * 28 * 28)
    assert sample.target["resized"] == [rows, columns] != [height, width]
    said = []
    for one in sample.target["truth"]:
        x, y, w, h = one["bbox"]
        sides = x / width * columns, y / height * rows, (x + w) / width * columns, (y + h) / height * rows
        said.append({"bbox_2d": sides, "label": one["label"]})
    assert boxes(json.dumps(said), sample.target).outcome is Outcome.RIGHT
    assert boxes(json.dumps(said), {**sample.target, "resized": None}).outcome is Outcome.WRONG


@pytest.mark.parametrize(
    "answer",
    [
        "I see no cat and no dog.",
        "",
        "<think>[]",
        "<think>nothing, so []</think>There is none.",
        "{}",
    ],
)
def test_without_a_list_an_answer_is_unparsed(answer):
    for truth in ([], [CAT]):
        assert boxes(answer, target(truth)) == Verdict(Outcome.UNPARSED)


@pytest.mark.parametrize("answer", ["[]", "```json\n[ ]\n```", "<think>[1]</think>None: []"])
def test_an_empty_list_is_an_answer(answer):
    assert boxes(answer, target()) == Verdict(Outcome.RIGHT, "[]")
    assert boxes(answer, target([CAT])) == Verdict(Outcome.WRONG, "[]")


@pytest.mark.parametrize(
    "bad",
    [
        '{"bbox_2d": [1, 2, 3], "label": "dog"}',
        '{"bbox_2d": [1, 2, 3, "x"], "label": "dog"}',
        '{"bbox_2d": null, "label": "dog"}',
        '{"bbox_2d": [1, 2, 3, 1e300], "label": "dog"}',
        '{"bbox_2d": [1, 2, 3, 9e999], "label": "dog"}',
        '{"bbox_2d": [0, 0, 900, 900]}',
        '{"bbox_2d": [0, 0, 900, 900], "label": "cow"}',
    ],
)
def test_one_bad_item_never_takes_the_others_with_it(bad):
    good = json.dumps(CAT_SAID)
    for answer in (f"[{good}, {bad}]", f"[{bad}, {good}]"):
        verdict = boxes(answer, target([CAT]))
        assert verdict.outcome is Outcome.WRONG
        found = json.loads(verdict.extracted)
        assert {"label": "cat", "bbox": [40, 20, 80, 40]} in found
        assert all(one["label"] != "dog" for one in found)
    assert boxes(f"[{bad}]", target()).outcome is Outcome.WRONG


def test_of_a_list_that_was_cut_off_the_whole_items_count():
    verdict = boxes(f'```json\n[{json.dumps(CAT_SAID)}, {{"bbox_2d": [5, 5, 1', target([CAT]))
    assert json.loads(verdict.extracted) == [{"label": "cat", "bbox": [40, 20, 80, 40]}]


@pytest.mark.parametrize(
    "said",
    [
        [CAT_SAID, CAT_SAID],
        [{**CAT_SAID, "label": "dog"}],
        [{**CAT_SAID, "bbox_2d": [200, 100, 400, 300]}],
    ],
)
def test_left_over_wrong_label_or_too_far_is_wrong(said):
    assert boxes(json.dumps(said), target([CAT])).outcome is Outcome.WRONG


GOOD, FAR = json.dumps(CAT_SAID), '{"bbox_2d": [900, 900, 990, 990], "label": "dog"}'


@pytest.mark.parametrize(
    ("answer", "found"),
    [
        (f"[{GOOD}]", ["cat"]),
        (f"```json\n[{GOOD}, {FAR}]\n```", ["cat", "dog"]),
        (f"<think>[{FAR}]</think>\n[{GOOD},]", ["cat"]),
        (f"({GOOD.replace(chr(34), chr(39))}, {FAR})", ["cat", "dog"]),
        ('[{"bbox_2d": [1, 2, 3], "label": "dog"}, ' + GOOD + "]", ["cat"]),
        ('[{"bbox_2d": [1, 2, 3, 4], "label": "cow"}, ' + GOOD + "]", ["cat"]),
        ('[{"label": "dog"}, ' + GOOD.replace("cat", "Cat") + "]", ["Cat"]),
        ("[]", []),
        ('[{"bbox_2d": [1, 2, 3, 4]}, ' + GOOD + "]", None),
        ('[{"bbox_2d": null, "label": "dog"}, ' + GOOD + "]", None),
        (f"[{GOOD}, " + '{"bbox_2d": [5, 5, 1', None),
        (f"Here: [{GOOD}]", None),
        (GOOD, None),
        (f"[{GOOD}, null]".replace("null", "None"), None),
        ('[{"bbox_2d": [1, 2, 3, 4], "label": true}]', None),
        ('[{"bbox_2d": [1, 2, 3, "4"], "label": "dog"}]', None),
        ('[{"bbox_2d": [1, 2, 3, 1e999], "label": "dog"}]', None),
        ('[{"bbox_2d": __import__("os").getpid(), "label": "dog"}]', None),
        ("[" * 100_000, None),
        ("-" * 100_000 + "1", None),
    ],
)
def test_the_official_reading_takes_all_or_nothing(answer, found):
    verdict = official(answer, target([CAT]))
    if found is None:
        assert verdict == Verdict(Outcome.UNPARSED)
    else:
        assert [one["label"] for one in json.loads(verdict.extracted)] == found
        assert verdict.right == ([label.lower() for label in found] == ["cat"])


def test_a_strange_escape_is_read_without_a_warning(recwarn):
    answer = r'[{"bbox_2d": [100, 100, 300, 300], "label": "cat", "note": "\d"}]'
    assert official(answer, target([CAT])).right
    assert not recwarn.list


def test_the_official_reading_leaves_corners_in_the_wrong_order():
    swapped = json.dumps([{"bbox_2d": [300, 100, 100, 300], "label": "cat"}])
    assert boxes(swapped, target([CAT])).right
    verdict = official(swapped, target([CAT]))
    assert (
        json.loads(verdict.extracted) == [{"label": "cat", "bbox": [120, 20, -80, 40]}] and not verdict.right
    )


def test_clean_answers_are_the_same_to_both_readings(samples):
    for sample in samples:
        for resized in (None, [1000, 1000]):
            where = {**sample.target, "resized": resized}
            one, other = (scorer(perfect(sample), where) for scorer in (boxes, official))
            assert one.right and other.right
            for mine, theirs in zip(json.loads(one.extracted), json.loads(other.extracted), strict=True):
                assert mine["bbox"] == pytest.approx(theirs["bbox"])


@pytest.mark.parametrize("scorer", [boxes, official])
@settings(max_examples=150, deadline=None)
@given(
    answer=st.text(max_size=80) | st.text(alphabet='[]{}":, bbox_2dlabel0123456789.eE-</think>', max_size=200)
)
def test_no_answer_is_too_strange(scorer, answer):
    verdict = scorer(answer, target([CAT]))
    assert verdict.outcome in (Outcome.WRONG, Outcome.UNPARSED, Outcome.RIGHT)
    assert (verdict.extracted == "") == (verdict.outcome is Outcome.UNPARSED)
    if verdict.extracted:
        json.loads(verdict.extracted)


# the figures


def test_answers_that_are_the_truth_score_1_and_a_row_that_failed_does_not(samples):
    rows = judged(samples, map(perfect, samples))
    assert all(row.verdict.right for row in rows)
    found = figures(rows)
    assert next(iter(found)) == "mAP" and found["mAP"].value == 1 and found["mAP"].note == "mean of 13 sets"
    assert found["mAP"].parts == dict.fromkeys(NAMES, 1)
    failed = [Judged(**{**vars(rows[0]), "verdict": Verdict(Outcome.FAILED)}), *rows[1:]]
    parts = figures(failed)["mAP"].parts
    assert parts[NAMES[0]] < 1 and all(parts[name] == 1 for name in NAMES[1:])


def test_no_detections_at_all_is_0_and_no_error(samples):
    found = figures(judged(samples, ["[]"] * len(samples)))
    assert found["mAP"].value == found["mAP_50"].value == found["mAP, best list order"].value == 0


def noisy(sample, generator):
    """Some truth moved, some missing, some invented."""
    said = json.loads(perfect(sample).strip("`json\n"))
    for one in said:
        one["bbox_2d"] = [value + generator.gauss(0, 12) for value in one["bbox_2d"]]
        one["label"] = one["label"] if generator.random() < 0.8 else "Blue Circle"
    said = [one for one in said if generator.random() < 0.9]
    for _ in range(generator.randrange(3)):
        x, y = generator.random() * 800, generator.random() * 800
        label = generator.choice(["red square", "blue circle", "elephant"])
        said.append({"bbox_2d": [x, y, x + 150, y + 150], "label": label})
    generator.shuffle(said)
    return json.dumps(said)


def test_the_figures_are_cocos_on_the_annotation_files(data, samples):
    """Straight from the files: COCO's ids, corners, and the mean of rounded APs."""
    generator = random.Random(4)
    answers = [noisy(sample, generator) for sample in samples]
    found = figures(judged(samples, answers))
    expected, unknown = {}, 0
    for one in SETS:
        content = json.loads((data / one.ann_file).read_text())
        ids = {category["name"].lower(): category["id"] for category in content["categories"]}
        detections = []
        for image, answer in zip(content["images"], answers[2 * len(expected) :], strict=False):
            for item in json.loads(answer):
                x1, y1, x2, y2 = (
                    value / 1000 * image[side]
                    for value, side in zip(item["bbox_2d"], ["width", "height"] * 2, strict=True)
                )
                if item["label"].lower() not in ids:
                    unknown += 1
                    continue
                box = [min(x1, x2), min(y1, y2), abs(x2 - x1), abs(y2 - y1)]
                category = ids[item["label"].lower()]
                detections.append({"image_id": image["id"], "category_id": category, "bbox": box, "score": 1})
        expected[one.name] = coco_stats(content, detections, ODINW_LIMITS)
    assert found["mAP"].parts == {name: round(stats.ap, 3) for name, stats in expected.items()}
    assert found["mAP"].value == pytest.approx(sum(found["mAP"].parts.values()) / 13)
    assert found["mAP_75"].parts == {name: round(stats.ap75, 3) for name, stats in expected.items()}
    assert found["boxes with an unknown label"].value == unknown > 0
    assert "'elephant'" in found["boxes with an unknown label"].note
    worst, best = found["mAP, worst list order"], found["mAP, best list order"]
    assert worst.value < best.value and worst.value <= found["mAP"].value <= best.value
    assert figures(judged(samples, answers)) == found, "the spread is not repeatable"


def test_missing_sets_are_named_and_replicates_averaged(samples):
    first = [sample for sample in samples if sample.groups["dataset"] in ("pothole", "Raccoon")]
    rows = judged(first, map(perfect, first)) + judged(first, ["[]"] * 4, replicate=1)
    metric = figures(rows)["mAP"]
    assert metric.value == 0.5 and metric.parts == {"pothole": 0.5, "Raccoon": 0.5}
    assert metric.note.startswith("mean of 2 of 13 sets; missing: AerialMaritimeDrone, ")
    assert "pothole" not in metric.note and "VehiclesOpenImages" in metric.note


def test_a_set_without_truth_enters_no_mean(samples):
    first = [sample for sample in samples if sample.groups["dataset"] in ("pothole", "Raccoon")]
    rows = judged(first, map(perfect, first))
    rows = [
        Judged(**{**vars(row), "target": {**row.target, "truth": []}}) if "pothole" in row.id else row
        for row in rows
    ]
    metric = figures(rows)["mAP"]
    assert metric.parts == {"Raccoon": 1} and metric.value == 1 and "pothole" in metric.note


def test_nothing_judged_gives_no_figures():
    assert Odinw().metrics("boxes", []) == []


# bad data


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda content: content["images"][0].pop("height"), "not a COCO annotation file: KeyError"),
        (lambda content: content["annotations"][0].update(category_id=99), "not a COCO annotation file"),
        (lambda content: content["annotations"][0].update(image_id=99), "not a COCO annotation file"),
        (lambda content: content["annotations"][0].update(bbox=[1, 2, 3]), "not a COCO annotation file"),
        (lambda content: content["images"].append(content["images"][1]), "3 pictures but 2 ids"),
        (lambda content: content["images"][1].update(file_name="gone.png"), "gone.png: no such file"),
        (lambda content: content.pop("images"), "not a COCO annotation file: KeyError"),
    ],
)
def test_data_that_is_not_the_benchmarks_is_told_with_the_files_name(tmp_path, change, message):
    write(tmp_path)
    path = tmp_path / SETS[8].ann_file
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=f"pothole.*{message}"):
        Odinw().open(tmp_path)


def test_sets_that_are_not_there_are_told(tmp_path):
    write(tmp_path)
    for one in SETS[2:4]:
        (tmp_path / one.ann_file).unlink()
    with pytest.raises(ValueError, match=r"CottontailRabbits.*2 of 13 sets are not there.*--datasets"):
        Odinw().open(tmp_path)
