"""Average precision: COCO's own records, a plain re-implementation, and what ODinW adds."""

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwenvl_eval.scoring.detection import (
    COCO_LIMITS,
    ODINW_LIMITS,
    LabelledBox,
    Picture,
    all_matched,
    coco_dicts,
    coco_stats,
    iou,
    mean_ap,
    order_spread,
)

RECORDS = Path(__file__).resolve().parents[3] / "shared" / "eval-records"
recorded = pytest.mark.skipif(not RECORDS.is_dir(), reason=f"no recorded judgements at {RECORDS}")


@pytest.fixture(scope="module")
def coco100():
    return [json.loads((RECORDS / f"coco-{name}100.json").read_text()) for name in ("gt", "dt")]


def plain_ap(truth, found, limit, thresholds):
    """AP by the book; None without truth. A box is (picture, category, box, crowd or score)."""
    values = []
    for category in sorted({one[1] for one in truth}):
        count = sum(1 for one in truth if one[1] == category and not one[3])
        if not count:
            continue
        for threshold in thresholds:
            ranked = []
            for picture in sorted({one[0] for one in truth + found}):
                here = [one for one in truth if one[:2] == (picture, category)]
                boxes = [one for one in found if one[:2] == (picture, category)]
                boxes = sorted(boxes, key=lambda one: -one[3])[:limit]
                ranked += plain_match(here, boxes, threshold)
            ranked.sort(key=lambda one: -one[0])
            values += plain_curve([hit for _, hit in ranked if hit is not None], count)
    return sum(values) / len(values) if values else None


def plain_match(truth, boxes, threshold):
    """(score, right or None for a box on a crowd) for each box, the best free truth first."""
    free = [one for one in truth if not one[3]]
    crowds = [one for one in truth if one[3]]
    result = []
    for _, _, box, score in boxes:
        overlaps = [plain_iou(box, one[2]) for one in free]
        best = max(overlaps, default=0)
        if free and best >= min(threshold, 1 - 1e-10):
            free.pop(len(overlaps) - 1 - overlaps[::-1].index(best))
            result.append((score, True))
        else:
            on_crowd = any(plain_iou(box, one[2], crowd=True) >= threshold for one in crowds)
            result.append((score, None if on_crowd else False))
    return result


def plain_iou(one, other, crowd=False):
    left, top = max(one[0], other[0]), max(one[1], other[1])
    right, bottom = min(one[0] + one[2], other[0] + other[2]), min(one[1] + one[3], other[1] + other[3])
    common = (right - left) * (bottom - top) if right > left and bottom > top else 0
    area = one[2] * one[3]
    return common / (area if crowd else area + other[2] * other[3] - common)


def plain_curve(hits, count):
    """The precision at recall 0, .01, ... 1 as floats: the best at that recall or any higher one."""
    points, right = [], 0
    for total, hit in enumerate(hits, 1):
        right += hit
        points.append((right / count, right / total))
    return [max((p for r, p in points if r >= step * 0.01), default=0) for step in range(101)]


THRESHOLDS = [0.5 + 0.05 * step for step in range(10)]


def run(truth, found, limits=COCO_LIMITS):
    names = sorted({one[1] for one in truth + found})
    pictures = sorted({one[0] for one in truth + found})
    ground_truth = {
        "images": [{"id": picture} for picture in pictures],
        "categories": [{"id": name, "name": f"c{name}"} for name in names],
        "annotations": [
            {
                "id": n,
                "image_id": p,
                "category_id": c,
                "bbox": list(b),
                "area": b[2] * b[3],
                "iscrowd": int(w),
            }
            for n, (p, c, b, w) in enumerate(truth)
        ],
    }
    detections = [{"image_id": p, "category_id": c, "bbox": list(b), "score": s} for p, c, b, s in found]
    return ground_truth, detections, limits


numbers = st.integers(0, 12)
boxes = st.tuples(numbers, numbers, st.integers(1, 9), st.integers(1, 9))
truths = st.lists(
    st.tuples(st.integers(0, 2), st.integers(1, 2), boxes, st.sampled_from([False, False, True])), max_size=8
)
founds = st.lists(
    st.tuples(st.integers(0, 2), st.integers(1, 2), boxes, st.sampled_from([0.25, 0.5, 1.0])), max_size=10
)


@recorded
def test_cocos_own_records_give_cocos_own_figures(coco100):
    stats = coco_stats(*coco100)
    found = [stats.ap, stats.ap50, stats.ap75, stats.small, stats.medium, stats.large]
    assert [round(value, 3) for value in found] == [0.505, 0.697, 0.573, 0.586, 0.519, 0.501]


@recorded
def test_cocos_records_agree_with_the_plain_implementation(coco100):
    ground_truth, detections = coco100
    truth = [(a["image_id"], a["category_id"], a["bbox"], a["iscrowd"]) for a in ground_truth["annotations"]]
    found = [(d["image_id"], d["category_id"], d["bbox"], d["score"]) for d in detections]
    assert any(crowd for *_, crowd in truth)
    assert coco_stats(*coco100).ap50 == pytest.approx(plain_ap(truth, found, 100, [0.5]), abs=1e-9)


@recorded
def test_with_equal_scores_the_list_order_moves_ap_between_511_and_516(coco100):
    ground_truth, detections = coco100
    equal = [{**one, "score": 1.0} for one in detections]
    values = order_spread(ground_truth, equal)
    assert values[0] == pytest.approx(coco_stats(ground_truth, equal, ODINW_LIMITS).ap, abs=1e-12)
    assert 0.511 < min(values) < values[0] < max(values) < 0.5165
    assert values == order_spread(ground_truth, equal)
    assert values[1:] != order_spread(ground_truth, equal, seed=1)[1:]


@recorded
def test_with_scores_that_differ_the_list_order_moves_nothing(coco100):
    ground_truth, detections = coco100
    ranked = [{**one, "score": 1 - place / len(detections)} for place, one in enumerate(detections)]
    assert len(set(order_spread(ground_truth, ranked, orders=3))) == 1


@settings(max_examples=120, deadline=None)
@given(truths, founds)
def test_ap_is_that_of_the_plain_implementation(truth, found):
    assert_close(coco_stats(*run(truth, found)).ap, plain_ap(truth, found, 100, THRESHOLDS))
    assert_close(coco_stats(*run(truth, found)).ap50, plain_ap(truth, found, 100, [0.5]))
    assert_close(coco_stats(*run(truth, found)).ap75, plain_ap(truth, found, 100, [0.75]))


def assert_close(one, other):
    if other is None:
        assert one is None
    else:
        assert one == pytest.approx(other, abs=1e-9)


def test_a_box_that_is_truth_number_0_counts_as_found():
    truth = [(1, 1, (0, 0, 4, 4), False)]
    assert coco_stats(*run(truth, [(1, 1, (0, 0, 4, 4), 1.0)])).ap == 1


def test_ap_looks_at_100_boxes_and_ap50_at_a_thousand():
    truth = [(1, 1, (0, 0, 4, 4), False), (1, 1, (50, 50, 4, 4), False)]
    wrong = [(1, 1, (20, 20, 4, 4), 1.0)] * 99
    found = [(1, 1, (0, 0, 4, 4), 1.0), *wrong, (1, 1, (50, 50, 4, 4), 1.0)]
    stats = coco_stats(*run(truth, found, ODINW_LIMITS))
    assert stats.ap == pytest.approx(plain_ap(truth, found, 100, THRESHOLDS))
    assert stats.ap50 == pytest.approx(plain_ap(truth, found, 1000, THRESHOLDS))
    assert stats.ap < stats.ap50


def test_without_detections_ap_is_0_and_without_truth_there_is_none():
    truth = [(1, 1, (0, 0, 40, 40), False)]
    assert coco_stats(*run(truth, [])).ap == 0
    assert coco_stats(*run(truth, [])).small is None
    assert coco_stats(*run([], [(1, 1, (0, 0, 4, 4), 1.0)])).ap is None
    assert order_spread(*run(truth, []), orders=2) == [0, 0, 0]


def test_a_category_without_truth_enters_no_average():
    one = coco_dicts(
        [Picture(1, [LabelledBox("cat", (0, 0, 9, 9))], [LabelledBox("cat", (0, 0, 9, 9))])], ["cat", "dog"]
    )
    assert coco_stats(one.ground_truth, one.detections).ap == 1


def test_categories_go_by_name_and_unknown_ones_are_counted():
    truth = [LabelledBox("Cat", (0, 0, 9, 9)), LabelledBox("dog", (20, 0, 9, 9))]
    found = [
        LabelledBox("DOG ", (20, 0, 9, 9)),
        LabelledBox("cow", (0, 0, 9, 9)),
        LabelledBox("cat", (0, 0, 9, 9)),
    ]
    for categories in (["Cat", "dog"], ["dog", "cat", "Dog"]):
        given_names = coco_dicts([Picture(7, truth, found)], categories)
        assert coco_stats(given_names.ground_truth, given_names.detections, ODINW_LIMITS).ap == 1
        assert given_names.unknown == {"cow": 1}


def test_the_mean_rounds_each_set_first_and_leaves_out_what_has_no_truth():
    assert mean_ap([0.0004, 0.0004, None, 0.0016]) == pytest.approx(0.002 / 3)
    assert mean_ap([None]) is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_id": 5}, "detection 0: image_id=5 is none of the images"),
        ({"category_id": 5}, "detection 0: category_id=5 is none of the categories"),
    ],
)
def test_detections_of_something_else_are_told(change, message):
    ground_truth, detections, _ = run([(1, 1, (0, 0, 4, 4), False)], [(1, 1, (0, 0, 4, 4), 1.0)])
    with pytest.raises(ValueError, match=message):
        coco_stats(ground_truth, [{**detections[0], **change}])


@pytest.mark.parametrize("limits", [(1, 10), (100, 1)])
def test_limits_need_100_and_must_rise(limits):
    with pytest.raises(ValueError, match="max_detections"):
        coco_stats(*run([(1, 1, (0, 0, 4, 4), False)], [], limits))


def test_a_picture_twice_and_truth_of_no_category_are_told():
    picture = Picture(3, [LabelledBox("cat", (0, 0, 9, 9))], [])
    with pytest.raises(ValueError, match="picture 3 stands more than once"):
        coco_dicts([picture, picture], ["cat"])
    with pytest.raises(ValueError, match="picture 3 has truth of 'cat'"):
        coco_dicts([picture], ["dog"])


labelled = st.builds(LabelledBox, st.sampled_from("ab"), boxes)


@settings(max_examples=150, deadline=None)
@given(st.lists(labelled, max_size=6), st.randoms(use_true_random=False))
def test_boxes_that_are_the_truth_match_in_any_order_and_no_box_may_be_left_over(truth, generator):
    found = generator.sample(truth, len(truth))
    assert all_matched(truth, found)
    assert not all_matched(truth, [*found, LabelledBox("a", (0, 0, 1, 1))])
    if found:
        assert not all_matched(truth, found[1:])
        assert not all_matched(truth, [LabelledBox("c", found[0].box), *found[1:]])


def test_matching_looks_further_than_the_first_that_fits():
    """The first truth fits both boxes, the second only the first box."""
    truth = [LabelledBox("a", (0, 0, 10, 10)), LabelledBox("a", (3, 0, 10, 10))]
    found = [LabelledBox("a", (1, 0, 10, 10)), LabelledBox("a", (-3, 0, 10, 10))]
    assert iou(truth[0].box, found[0].box) > 0.5 and iou(truth[0].box, found[1].box) > 0.5
    assert iou(truth[1].box, found[0].box) > 0.5 > iou(truth[1].box, found[1].box)
    assert all_matched(truth, found) and all_matched(truth[::-1], found[::-1])


def test_crowds_may_be_left_unfound():
    truth = [LabelledBox("a", (0, 0, 9, 9)), LabelledBox("a", (0, 0, 90, 90), crowd=True)]
    assert all_matched(truth, truth[:1])


def test_iou_of_known_boxes():
    assert iou((0, 0, 2, 2), (1, 1, 2, 2)) == pytest.approx(1 / 7)
    assert iou((0, 0, 2, 2), (2, 0, 2, 2)) == 0
    assert iou((0, 0, 0, 0), (0, 0, 0, 0)) == 0


def test_nothing_is_printed_and_nothing_heavy_is_imported():
    program = (
        "import sys; import qwenvl_eval.scoring.detection as d;"
        "assert not {'numpy', 'faster_coco_eval', 'torch'} & set(sys.modules);"
        "c = d.coco_dicts([d.Picture(1, [d.LabelledBox('a', (0, 0, 9, 9))], [])], ['a']);"
        "d.coco_stats(c.ground_truth, c.detections); d.order_spread(c.ground_truth, c.detections, orders=1)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == done.stderr == ""


def test_random_orders_never_leave_the_range_of_all_orders():
    """Three boxes of one picture, all six orders by hand."""
    truth = [(1, 1, (0, 0, 10, 10), False), (1, 1, (40, 0, 10, 10), False)]
    found = [(1, 1, (0, 0, 10, 10), 1.0), (1, 1, (20, 0, 10, 10), 1.0), (1, 1, (40, 0, 10, 10), 1.0)]
    generator = random.Random(3)
    every = {round(plain_ap(truth, generator.sample(found, 3), 100, THRESHOLDS), 9) for _ in range(60)}
    values = {round(value, 9) for value in order_spread(*run(truth, found, ODINW_LIMITS), orders=40)}
    assert len(every) == 3 and values == every
