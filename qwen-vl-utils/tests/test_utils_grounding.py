"""Places are read from clean, careless, cut off and hostile answers, converted both ways, and drawn."""

import json
import math
import pickle
import subprocess
import sys
import time
from dataclasses import FrozenInstanceError, replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageColor

from qwen_vl_utils import fetch_image, grounding
from qwen_vl_utils.grounding import (
    Box,
    Box3D,
    Camera,
    Point,
    Span,
    ToolCall,
    clipped,
    coordinates_of,
    corners,
    draw_places,
    draw_spans,
    from_resized,
    loose_json,
    parse_boxes,
    parse_boxes_3d,
    parse_html,
    parse_markdown,
    parse_places,
    parse_points,
    parse_spans,
    parse_tool_calls,
    projected_edges,
    rescale,
    resized_size,
    rounded,
    to_original,
    to_pixels,
    to_relative,
    to_resized,
)
from qwen_vl_utils.grounding.draw import EDGES, NEAR, PALETTE
from qwen_vl_utils.grounding.places import BOX_3D_NUMBERS

PARSERS = [
    parse_boxes, parse_points, parse_boxes_3d, parse_places, parse_spans, parse_html, parse_markdown,
    parse_tool_calls,
]  # fmt: skip

NUMBERS = st.integers(-2000, 2000) | st.floats(-1e4, 1e4, allow_nan=False)
LABELS = st.text(max_size=12) | st.sampled_from(
    ['[a] {b}, "c": d', "it's", "\\", '"', "猫,: ]}", "a\nb", "// no", "# no", "```", "😀", "\x00", "/* */"]
)


@st.composite
def rows(draw):
    """One answer as JSON values, and the boxes that it names."""
    items, boxes = [], []
    for _ in range(draw(st.integers(0, 4))):
        x1, x2 = sorted(draw(st.lists(NUMBERS, min_size=2, max_size=2)))
        y1, y2 = sorted(draw(st.lists(NUMBERS, min_size=2, max_size=2)))
        label = draw(LABELS)
        extra = draw(st.dictionaries(st.sampled_from(["score", "id", "note"]), LABELS | NUMBERS | st.none()))
        items.append({"bbox_2d": [x1, y1, x2, y2], "label": label, **extra})
        boxes.append(Box(x1=x1, y1=y1, x2=x2, y2=y2, label=label, extra=extra))
    return items, boxes


PROSE = st.sampled_from(
    [
        "",
        "Sure! It's here:\n",
        "In [the picture] {left} I see [0, 5) of 5% ",
        "f(x) = {x}: ",
        "at [: {,} ",
        "\n",
    ]
)


def careless(value, draw):
    """JSON with a trailing comma and a comment wherever the draw says so, after the last value too."""

    def tail():
        return draw(st.sampled_from(["", ",", ", ", " // so [it} is\n", '\n# or "not\n', '/* {" */']))

    if isinstance(value, dict):
        inner = ", ".join(f"{json.dumps(key)}: {careless(one, draw)}" for key, one in value.items())
        return "{" + inner + (tail() if value else "") + "}"
    if isinstance(value, list):
        return "[" + ", ".join(careless(one, draw) for one in value) + (tail() if value else "") + "]"
    return json.dumps(value)


RENDERINGS = {
    "json": lambda items, draw: json.dumps(items),
    "unicode": lambda items, draw: json.dumps(items, ensure_ascii=False, indent=draw(st.integers(0, 4))),
    "fence": lambda items, draw: f"```json\n{json.dumps(items)}\n```\nThat is [all}} I see {{,}}.",
    "python": lambda items, draw: repr(items),
    "tuple": lambda items, draw: repr(tuple(items)) if items else "[]",
    "careless": careless,
    "lines": lambda items, draw: "\n".join(map(json.dumps, items)),
    "wrapped": lambda items, draw: json.dumps({"objects": {"found": [[one] for one in items]}}),
    "no outer end": lambda items, draw: json.dumps(items)[:-1],
    "text": lambda items, draw: json.dumps(
        [{**one, "bbox_2d": [str(number) for number in one["bbox_2d"]]} for one in items]
    ),
}


@settings(max_examples=200, deadline=None, derandomize=True)
@given(rows(), st.sampled_from(sorted(RENDERINGS)), PROSE, st.data())
def test_every_rendering_of_a_list_gives_the_same_boxes(row, name, prose, data):
    items, boxes = row
    parsed = parse_boxes(prose + RENDERINGS[name](items, data.draw))
    assert parsed.items == tuple(boxes)
    assert [one.extra for one in parsed.items] == [one.extra for one in boxes]
    assert not parsed.dropped
    assert parsed.truncated == (name == "no outer end")
    if name in ("json", "unicode", "fence", "lines", "wrapped"):
        assert not parsed.repairs
    if name == "python" and items:
        assert "single quotes" in parsed.repairs


JSON_VALUES = st.recursive(
    LABELS | st.none() | st.booleans() | st.integers(-(10**15), 10**15) | st.floats(allow_nan=False,
                                                                                   allow_infinity=False),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(LABELS, inner, max_size=4),
    max_leaves=12,
)  # fmt: skip


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.dictionaries(LABELS, JSON_VALUES, max_size=4), st.sampled_from([None, 1]), st.booleans())
def test_valid_json_is_read_as_what_it_is(value, indent, ascii_only):
    loose = loose_json.read(json.dumps(value, indent=indent, ensure_ascii=ascii_only))
    whole = [one for one in loose.found if one.depth == 0]
    assert [one.value for one in whole] == [value]
    assert not loose.truncated and not loose.repairs


@settings(max_examples=30, deadline=None, derandomize=True)
@given(rows(), st.sampled_from([None, 2]), st.booleans(), st.booleans())
def test_a_cut_at_any_place_keeps_exactly_the_items_closed_before_it(row, indent, python, fenced):
    items, boxes = row
    pieces = [repr(one) if python else json.dumps(one, indent=indent) for one in items]
    text, ends = "```json\n[" if fenced else "[", []
    first = len(text)
    for piece in pieces:
        text += (", " if ends else "") + piece
        ends.append(len(text))
    text += "]"
    for cut in range(first, len(text)):
        parsed = parse_boxes(text[:cut])
        whole = tuple(box for box, end in zip(boxes, ends, strict=True) if end <= cut)
        assert parsed.items == whole, text[:cut]
        assert parsed.truncated, text[:cut]
    assert not parse_boxes(text).truncated


HTML = (
    '<html><body>\n<h1 data-bbox="10 20 30 40">Title &amp; more</h1>\n<div class="chart" data-bbox="1 2 3 4">'
    '<img data-bbox="1 2 3 4" alt="bars"/></div>\n<table data-bbox="5 6 7 8"><tr><td>a</td><td>b<br>c</td>'
    "</tr></table>\n<p data-bbox='9 9 20 20'>x &lt; <b>y</b>z</p></body></html>"
)


def test_html_gives_tag_box_own_text_and_source():
    parsed = parse_html(HTML)
    assert parsed.clean
    found = [(one.tag, one.box.label, one.box.xyxy, one.text) for one in parsed.items]
    assert found == [
        ("h1", "h1", (10, 20, 30, 40), "Title & more"),
        ("div", "chart", (1, 2, 3, 4), ""),
        ("img", "img", (1, 2, 3, 4), "bars"),
        ("table", "table", (5, 6, 7, 8), "a b c"),
        ("p", "p", (9, 9, 20, 20), "x < yz"),
    ]
    table = parsed.items[3]
    assert HTML[table.start : table.end].startswith("<table") and HTML[: table.end].endswith("</table>")


def test_html_cut_at_any_place_keeps_exactly_the_elements_closed_before_it():
    whole = parse_html(HTML).items
    for cut in range(len("<html>"), len(HTML)):
        parsed = parse_html(HTML[:cut])
        assert parsed.items == tuple(one for one in whole if one.end <= cut), HTML[:cut]
        assert parsed.truncated, HTML[:cut]
    assert parse_html('<p data-bbox="1 2 3 4">x</p><p data-b').truncated
    assert not parse_html('<p data-bbox="1 2 3 4">x</p> where a < b').truncated


def test_html_that_is_not_nested_well_is_mended():
    parsed = parse_html(
        '<body><div data-bbox="1 1 9 9"><p data-bbox="1 2 3 4">one</i></div><p data-bbox="1 2">x</body>'
    )
    assert [(one.tag, one.text) for one in parsed.items] == [("div", ""), ("p", "one")]
    assert parsed.repairs == ("missing end tag", "stray end tag")
    assert parsed.dropped == ("data-bbox [1, 2] is not 4 numbers",)
    assert parse_html(f'<p data-bbox="1 2 3 4">&#{"9" * 5000}; &#65;</p>').items[0].text.endswith("; A")


def test_markdown_gives_the_block_behind_each_comment():
    text = (
        "# Title\n\n<!-- Table (1, 2, 3, 4) -->\n\\begin{tabular}{cc}\na & b\n\nc & d\n\\end{tabular}\n\n"
        "<!-- Image (40, 30, 20, 10) -->\n![](a.png)\n\ntext\n<!-- Image (5,6,7,8) -->\nno picture\n"
        "<!-- Table (1, 2, 3) --><!-- a comment -->\n<!-- Table (1, 1, 2, 2) -->\n\\begin{tabular} cut"
    )
    parsed = parse_markdown(text)
    assert [(one.tag, one.box.xyxy, one.text) for one in parsed.items] == [
        ("table", (1, 2, 3, 4), "\\begin{tabular}{cc}\na & b\n\nc & d\n\\end{tabular}"),
        ("image", (20, 10, 40, 30), "![](a.png)"),
        ("image", (5, 6, 7, 8), ""),
    ]
    assert parsed.truncated and parsed.repairs == ("swapped corners",) and len(parsed.dropped) == 2
    assert parse_markdown(text[: text.index("<!-- Image (40")] + "<!-- Image (4").truncated
    table = "<!-- Table (1, 2, 3, 4) -->\n\\begin{tabular} a"
    parsed = parse_markdown(f"{table}\n{table} \\end{{tabular}}")
    assert len(parsed.items) == len(parsed.dropped) == 1 and not parsed.truncated


@pytest.mark.parametrize(
    ("text", "labels", "repair"),
    [
        ("[{'bbox_2d': (1, 2, 3, 4), 'label': 'dog's tail'}]", ["dog's tail"], "unescaped quote"),
        ('[{"bbox_2d": [1, 2, 3, 4], "label": "the "big", red"}]', ['the "big", red'], "unescaped quote"),
        ("[{bbox_2d: [1, 2, 3, 4], label: traffic light}]", ["traffic light"], "unquoted text"),
        ('{"bbox_2d": [1 2 3 4] "label": "a"}', ["a"], "missing comma"),
        ('{"bbox_2d": [1, 2, 3, 4}', [""], "missing bracket"),
        ('[{"bbox_2d": [1, 2, 3, 4], "label": "a"]', ["a"], "missing bracket"),
        ('[{"bbox_2d": [1,2,3,4], "label": "a", {"bbox_2d": [1,2,3,4]}]', ["a", ""], "missing bracket"),
        ('{{"bbox_2d": [1, 2, 3, 4], "label": "a"}}', ["a"], "stray text"),
        ('[{"bbox_2d": [1, 2, 3, 4], "label": "a",},]', ["a"], "trailing comma"),
        ('[{"bbox_2d": [1, 2, 3, 4],, "label": "a"}]', ["a"], "stray comma"),
        ('[{"bbox_2d": [1, 2, 3, 4], label "a"}]', ["a"], "missing colon"),
        ('[{"bbox_2d": [1, 2, 3, 4], "label"}]', [""], "key without value"),
        ('[{"bbox_2d"：[1，2，3，4]，"label"："猫"}]', ["猫"], "full-width punctuation"),
        (r'[{"bbox_2d": [1, 2, 3, 4], "label": "\d"}]', ["\\d"], "unknown escape"),
        ('[{"bbox_2d": [1, 2, 3, 4], "label": null, "text": "a"}]', ["a"], None),
        ('[{"bbox_2d": [1, 2, 3, 4], "label": None}]', [""], "python literal"),
        ('[{"bbox_2d": "1, 2, 3, 4", "label": "a"}]', ["a"], "number as text"),
        ('[{"bbox_2d": [3, 4, 1, 2], "label": "a"}]', ["a"], "swapped corners"),
        (r'{"bbox_2d": [1, 2, 3, 4], "label": "\ud83d\ude00\ud83d"}', ["😀�"], None),
        ('{"label": "a", "bbox_2d": [[1, 2, 3, 4], [1, 2, 3, 4]]}', ["a", "a"], None),
        ('<|object_ref_start|>a<|object_ref_end|><|box_start|>(1,2),(3,4)<|box_end|>', ["a"], None),
        ("<ref>a</ref><box>(1,2),(3,4)</box><box>1 2 3 4</box> or <box>1 2 3 4</box>", ["a", "a", ""], None),
    ],
)  # fmt: skip
def test_what_models_write_is_mended_and_counted(text, labels, repair):
    parsed = parse_boxes(text)
    assert [one.label for one in parsed.items] == labels
    assert {one.xyxy for one in parsed.items} == {(1, 2, 3, 4)}
    assert not parsed.truncated and not parsed.dropped
    assert (repair in parsed.repairs) if repair else parsed.clean


@pytest.mark.parametrize(
    "numbers",
    ["[1,2,3]", "[1,2,3,4,5]", "[1,2,NaN,4]", "[1,2,1e999,4]", "[1,2,-Infinity,4]", "[1,2,true,4]",
     "[1,2,null,4]", "7", "{}", '"left"', "[]"],
)  # fmt: skip
def test_a_bad_item_is_reported_and_costs_no_other(numbers):
    good = '{"bbox_2d": [1, 2, 3, 4]}'
    parsed = parse_boxes(f'[{good}, {{"bbox_2d": {numbers}, "label": "bad"}}, {good}]')
    assert len(parsed.items) == 2 and len(parsed.dropped) == 1 and not parsed.clean
    assert parsed.dropped[0].startswith("bbox_2d ")


def test_no_detections_is_an_empty_result():
    for text in ("", "[]", "```json\n[]\n```", "There is no cat.", '{"objects": []}'):
        assert parse_boxes(text).clean and parse_boxes(text).items == ()


def test_thinking_and_tool_calls_are_no_answer():
    box = '{"bbox_2d": [1, 2, 3, 4], "label": "%s"}'
    call = f'<tool_call>{{"name": "zoom", "arguments": {box % "call"}}}</tool_call>'
    parsed = parse_boxes(f"maybe {box % 'thought'} </think> {call} {box % 'answer'}")
    assert [one.label for one in parsed.items] == ["answer"]
    assert parse_boxes(f"<think> {box % 'thought'}").truncated
    assert parse_boxes(f"<think> {box % 'thought'}").items == ()


def test_bare_lists_count_only_when_asked_for():
    text = 'I see [10, 20, 30, 40], [[1, 2, 3, 4]] and {"size": [5, 6, 7, 8]}, at [50, 60].'
    assert parse_boxes(text).items == ()
    assert [one.xyxy for one in parse_boxes(text, bare=True).items] == [(10, 20, 30, 40), (1, 2, 3, 4)]
    assert [one.xy for one in parse_points(text, bare=True).items] == [(50, 60)]


def test_points_come_from_json_xml_and_tokens():
    text = (
        '[{"point_2d": ["10", 20.5], "label": "a"}] <points x1="1" y1="2" x2="3" y2="4" alt="b">b</points> '
        "<point x='5' y='6'>c</point><|point_start|>(7,8)<|point_end|><points x1=\"1\"></points>"
        "<points x1='1' y1='2"
    )
    parsed = parse_points(text)
    assert [(one.xy, one.label) for one in parsed.items] == [
        ((10, 20.5), "a"), ((1, 2), "b"), ((3, 4), "b"), ((5, 6), "c"), ((7, 8), ""),
    ]  # fmt: skip
    assert parsed.dropped == ("points [1] is not 2 numbers",)


def test_old_tokens_that_were_cut_off_are_left_out():
    text = "<|object_ref_start|>a<|object_ref_end|><|box_start|>(1,2),(3,4)<|box_end|><|box_start|>(5,6),(7"
    parsed = parse_boxes(text)
    assert [one.xyxy for one in parsed.items] == [(1, 2, 3, 4)] and parsed.truncated


def test_cuboids_keep_their_nine_numbers_and_angles_in_units_of_pi():
    good, bad = "[1,2,3,4,5,6,0.5,-0.25,1]", "[1,2,3,-4,5,6,0,0,0]"
    parsed = parse_boxes_3d(f'[{{"bbox_3d": {good}, "label": "car"}}, {{"bbox_3d": {bad}}}]')
    (box,) = parsed.items
    assert (box.x, box.y, box.z, box.x_size, box.y_size, box.z_size) == (1, 2, 3, 4, 5, 6)
    assert box.degrees == (90, -45, 180) and box.radians == (math.pi / 2, -math.pi / 4, math.pi)
    assert len(parsed.dropped) == 1


def test_spans_are_seconds():
    parsed = parse_spans(
        '[{"start": "00:01.50", "end": "01:02", "description": "a"}, {"start_time": 3, "end_time": "2.5 s"},'
        '{"start": "1:01:02", "end": "1:01:03,5"}, {"start": "soon", "end": 1}, {"start": 0, "end": -1},'
        '{"start": 1}]'
    )
    assert parsed.items == (
        Span(start=1.5, end=62, label="a"), Span(start=2.5, end=3), Span(start=3662, end=3663.5),
    )  # fmt: skip
    assert parsed.repairs == ("swapped ends",) and len(parsed.dropped) == 2
    assert parse_spans("{start: 00:10.5, end: 00:12}").items == (Span(start=10.5, end=12),)


def test_tool_calls_have_names_and_arguments():
    text = (
        '<tool_call>\n{"name": "zoom", "arguments": {"bbox_2d": [1, 2, 3, 4], "n": {"a": "}"}}}\n</tool_call>'
        '<tool_call>{"name": "say", "arguments": "{\\"text\\": \\"hi\\"}"}</tool_call>'
        "<tool_call>none</tool_call>"
        '<tool_call>{"name": 3}</tool_call><tool_call>{"name": "last"}<tool_call>'
    )
    parsed = parse_tool_calls(text)
    assert parsed.items == (
        ToolCall(name="zoom", arguments={"bbox_2d": [1, 2, 3, 4], "n": {"a": "}"}}),
        ToolCall(name="say", arguments={"text": "hi"}),
        ToolCall(name="last"),
    )
    assert parsed.repairs == ("missing end tag",) and len(parsed.dropped) == 2 and not parsed.truncated
    assert parse_tool_calls('<tool_call>{"name": "zoom", "argu').truncated


def test_places_of_all_kinds_come_in_their_order():
    text = '{"bbox_3d":[1,1,1,1,1,1,0,0,0]} <box>(1,2),(3,4)</box> {"point_2d":[1,2],"bbox_2d":[1,2,3,4]}'
    assert [type(one) for one in parse_places(text).items] == [Box3D, Box, Box, Point]


HOSTILE = [
    "{", "[", "(", "[{", '[{"a":', '{"a":[', '{"a":{"a":', '"', "'", '["', '["a" ', '[" " ', "{]", "[}",
    "{'a'b:c ", "{a:b c ", "{a:b\n", "[/*", "[#", "[//", "[\\", '["\\', "[1 ", "[1,", "[,", "[-", "[{}", "a",
    '{"bbox_2d":[[', "\n", " ", '{"bbox_2d":"1', "[[1,2,3,4],", "```", "[```", "<", "<p ", "<p a", "<p a=",
    "<p a='", '<p data-bbox="1 2 3 4">', "<!--", "<!-- (", "<!-- T (1,2,3,4) -->", "<p>", "</p>", "<b></i>",
    "&#9", "<!-- T (1,2,3,4) -->\\begin{a}", "<tool_call>", "<tool_call>{", "<think>", "</think>",
    "<|box_start|>",
    "<|box_end|>", "<ref>a</ref>", "<box>1 2 3 4</box> ", '<tool_call>{"name":"',
    "<points x1='1' y1='2'>", "<points x1='1' y1='2'></", '{"start":"1:', "{start:1:",
]  # fmt: skip


def seconds(parse, text):
    """Processor time, so that other work on the machine does not count."""
    times = []
    for _ in range(2):
        start = time.process_time()
        parse(text)
        times.append(time.process_time() - start)
    return min(times)


WRAPPED = [
    ("<p ", "a", ">"), ("<p ", "a=' ", ">"), ("<p data-bbox='", "1 ", "'>"), ("<points ", "x1='1' ", ">"),
    ('{"bbox_2d":[1,2,3,', "1", "]}"), ('{"bbox_2d":[1,2,3,0.', "1", "]}"), ('{"a":', "b ", "}"),
    ('{"start":"', "1", ':1","end":2}'), ('{"bbox_2d":[', "[1,2,3,4],", "]}"),
]  # fmt: skip


@pytest.mark.parametrize(("before", "unit", "after"), [("", unit, "") for unit in HOSTILE] + WRAPPED)
def test_work_grows_with_the_length_and_nothing_recurses(before, unit, after):
    """Sixteen times the text: 16 times the work where it is linear, 256 times where it is quadratic."""
    for parse in (parse_places, parse_spans, parse_html, parse_markdown, parse_tool_calls):
        little = seconds(parse, before + unit * (800 // len(unit)) + after)
        much = seconds(parse, before + unit * (12800 // len(unit)) + after)
        assert much < 70 * little + 0.01, f"{parse.__name__}: {little:.4f} s, then {much:.4f} s"


@pytest.mark.parametrize(
    ("unit", "parse"),
    [("{", parse_boxes), ("[", parse_boxes), ('"', parse_boxes), ('["a\\"', parse_boxes), ("<p>", parse_html),
     ("<p a='", parse_html), ("<!-- (", parse_markdown), ("<points x='1' y='2'>", parse_points)],
)  # fmt: skip
def test_a_megabyte_of_nothing_is_read_to_its_end(unit, parse):
    parsed = parse(unit * (10**6 // len(unit)))
    assert parsed.items == () or parse is parse_points


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.lists(st.sampled_from(HOSTILE) | st.text(max_size=5), max_size=40).map("".join))
def test_any_text_is_read_without_an_error_and_forwards_only(text):
    for parse in PARSERS:
        parsed = parse(text)
        assert isinstance(parsed.truncated, bool)
    reader = loose_json._Reader(text)
    before, steps = -1, 0
    while reader.advance():
        assert reader.position > before
        before, steps = reader.position, steps + 1
    assert steps <= len(text)


def test_long_strings_and_numbers_are_taken_or_dropped():
    label = "x" * 10**6
    assert parse_boxes(json.dumps({"bbox_2d": [1, 2, 3, 4], "label": label})).items[0].label == label
    for number in ("9" * 5000, "1" * 300 + ".5", "0." + "1" * 5000):
        parsed = parse_boxes(f'[{{"bbox_2d": [1, 2, {number}, 4]}}, {{"bbox_2d": [1, 2, 3, 4]}}]')
        assert (1, 2, 3, 4) in [one.xyxy for one in parsed.items]


def test_what_is_nested_too_deep_is_given_up_and_the_rest_read():
    parsed = parse_boxes("[" * 100 + ' {"bbox_2d": [1, 2, 3, 4]} ' + "]" * 100 + '{"bbox_2d": [5, 6, 7, 8]}')
    assert [one.xyxy for one in parsed.items] == [(1, 2, 3, 4), (5, 6, 7, 8)]
    assert "nested too deep" in parsed.repairs


def test_nothing_is_evaluated():
    assert parse_boxes('[{"bbox_2d": [1, 2, 3, __import__("os").getpid()]}]').items == ()


def test_results_are_frozen_compare_and_travel_between_processes():
    parsed = parse_boxes('[{"bbox_2d": [1, 2, 3, 4], "label": "a", "score": [1]}]')
    assert pickle.loads(pickle.dumps(parsed)) == parsed
    assert len({parsed.items[0], replace(parsed.items[0])}) == 1
    with pytest.raises(FrozenInstanceError):
        parsed.items[0].x1 = 5


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Box(x1=3, y1=0, x2=1, y2=1), r"Box.x1=3 is above x2=1; swap"),
        (lambda: Box(x1=math.nan, y1=0, x2=1, y2=1), r"Box.x1=nan must be a finite number"),
        (lambda: Point(x="1", y=0), r"Point.x='1' must be a finite number"),
        (lambda: Span(start=2, end=1), r"Span.start=2 is above end=1"),
        (lambda: cuboid(x_size=-1), r"Box3D.x_size=-1 must not be negative"),
        (lambda: Camera(fx=0, fy=1, cx=0, cy=0), r"Camera.fx=0"),
        (lambda: Camera.from_field_of_view(height=1, width=1, degrees=180), r"degrees=180 must lie between"),
        (lambda: Camera(fx=1, fy=1, cx=0, cy=0).project((0, 0, 0)), "behind the camera"),
        (lambda: to_pixels((1, 2, 3), height=1, width=1), r"place=\(1, 2, 3\) must be a Box"),
        (lambda: to_pixels("12", height=1, width=1), r"place='12'"),
        (lambda: to_pixels((1, 2), height=0, width=1), r"to_size=\(0, 1\) must be a positive"),
        (lambda: coordinates_of("llava"), r"model_type='llava' has no known coordinates"),
        (lambda: to_original((1, 2), coordinates="resized", height=1, width=1), r"needs resized="),
        (lambda: to_original((1, 2), coordinates="absolute", height=1, width=1), r"coordinates='absolute'"),
        (lambda: draw_places(canvas(), [(1, 2, 3, 4)]), r"place=\(1, 2, 3, 4\) must be a Box"),
        (lambda: draw_places(canvas(), [], palette=()), r"at least one colour"),
    ],
)  # fmt: skip
def test_errors_name_the_field_the_value_and_the_remedy(make, message):
    with pytest.raises(ValueError, match=message):
        make()


SIDES = st.integers(1, 5000)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.lists(st.floats(-5000, 5000), min_size=4, max_size=4), SIDES, SIDES, SIDES, SIDES)
def test_conversions_go_there_and_back(numbers, height, width, rows, columns):
    x1, x2, y1, y2 = *sorted(numbers[:2]), *sorted(numbers[2:])
    box = Box(x1=x1, y1=y1, x2=x2, y2=y2, label="a", extra={"score": 1})
    size, other = (height, width), (rows, columns)
    back = [
        to_relative(to_pixels(box, height=height, width=width), height=height, width=width),
        rescale(rescale(box, from_size=size, to_size=other), from_size=other, to_size=size),
    ]
    for one in back:
        assert one.xyxy == pytest.approx(box.xyxy, abs=1e-6)
        assert (one.label, one.extra) == ("a", {"score": 1})
    assert to_pixels(box.xyxy, height=height, width=width) == to_pixels(box, height=height, width=width).xyxy
    inside = clipped(box, height=height, width=width)
    assert 0 <= inside.x1 <= inside.x2 <= width and 0 <= inside.y1 <= inside.y2 <= height


def test_relative_is_a_share_of_1000_of_its_own_side():
    assert to_pixels((0, 0, 1000, 1000), height=480, width=640) == (0, 0, 640, 480)
    assert to_pixels(Point(x=500, y=250), height=480, width=640).xy == (320, 120)
    assert to_relative([64, 48], height=480, width=640) == (100, 100)
    assert to_pixels((-5, 500, 1005, 1000), height=10, width=20, clip=True) == (0, 5, 20, 10)
    assert rounded(Box(x1=0.4, y1=0.6, x2=1.5, y2=2.5)).xyxy == (0, 1, 2, 2)


def test_each_family_has_its_declared_coordinates():
    speaks = {name: coordinates_of(name) for name in ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe")}
    assert speaks == {"qwen2_vl": "relative", "qwen2_5_vl": "resized", "qwen3_vl": "relative",
                      "qwen3_vl_moe": "relative"}  # fmt: skip
    size = {"height": 1000, "width": 2000}
    assert to_original((100, 100), coordinates="relative", **size) == (200, 100)
    assert to_original((100, 100), coordinates="resized", resized=(500, 500), **size) == (400, 200)


BOUNDS = [
    {},
    {"max_pixels": 64 * 32 * 32},
    {"min_pixels": 300 * 32 * 32},
    {"resized_height": 130, "resized_width": 70},
]


@pytest.mark.parametrize("bounds", BOUNDS)
@pytest.mark.parametrize("patch", [14, 16])
def test_a_training_row_is_rescaled_by_the_resize_that_happens(bounds, patch):
    for height, width in ((361, 641), (50, 900), (1, 1), (700, 33)):
        picture = fetch_image({"image": Image.new("RGB", (width, height)), **bounds}, image_patch_size=patch)
        size = {"height": height, "width": width, "image_patch_size": patch, "item": bounds}
        assert resized_size(**size) == (picture.height, picture.width)
        whole = to_resized((0, 0, width, height), **size)
        assert whole == pytest.approx((0, 0, picture.width, picture.height))
        assert from_resized(whole, **size) == pytest.approx((0, 0, width, height))


GREY = (120, 130, 140)
RED = ImageColor.getrgb(PALETTE[0])


def canvas(width=200, height=100):
    return Image.new("RGB", (width, height), GREY)


def test_a_box_is_drawn_on_its_edge_and_nowhere_else():
    picture = canvas()
    before = picture.tobytes()
    drawn = draw_places(picture, [Box(x1=20, y1=30, x2=90, y2=80)])
    assert picture.tobytes() == before and drawn.size == picture.size and drawn.mode == "RGB"
    pixels = np.asarray(drawn)
    edge = np.zeros(pixels.shape[:2], bool)
    edge[30:80, 20:90] = True
    edge[31:79, 21:89] = False  # the line of a picture this small is one pixel wide
    assert (pixels[edge] == RED).all() and (pixels[~edge] == GREY).all()


def test_a_box_as_large_as_the_picture_is_seen_on_all_sides_and_one_outside_not_at_all():
    pixels = np.asarray(draw_places(canvas(), [Box(x1=0, y1=0, x2=200, y2=100)]))
    assert all((side == RED).all() for side in (pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]))
    for box in (Box(x1=300, y1=0, x2=400, y2=50, label="a"), Box(x1=-1e300, y1=-1e300, x2=1e300, y2=1e300)):
        assert (np.asarray(draw_places(canvas(), [box])) == GREY).all()


def test_lines_grow_with_the_picture():
    pixels = np.asarray(draw_places(canvas(2000, 1000), [Box(x1=100, y1=100, x2=900, y2=900)]))
    assert (pixels[500] == RED).all(1).sum() == 2 * 6


@pytest.mark.parametrize("corner", [(0, 0), (199, 0), (0, 99), (199, 99), (100, 50)])
def test_a_label_stays_within_the_picture(corner):
    x, y = corner
    box = Box(x1=x, y1=y, x2=x + 1, y2=y + 1)
    large = canvas(400, 300)  # with the same line and letters
    reference = np.asarray(draw_places(large, [Box(x1=300, y1=150, x2=301, y2=151, label="wjg")]))
    whole = (reference != GREY).any(2).sum()
    pixels = np.asarray(draw_places(canvas(), [replace(box, label="wjg")]))
    assert (pixels == RED).all(2).sum() > 60
    drawn = (pixels != GREY).any(2).sum()
    assert drawn == pytest.approx(whole, rel=0.05), "part of the label is cut off"


@pytest.mark.parametrize("label", ["猫 😀", "مرحبا", "a\nb\tc", "\ud83d", "\x00\x7f", "", " ", "w" * 5000])
@pytest.mark.parametrize("size", [(1, 1), (7, 300), (200, 100)])
def test_any_label_is_drawn_on_any_picture(label, size):
    box = Box(x1=0, y1=0, x2=size[0], y2=size[1], label=label)
    assert draw_places(Image.new("RGB", size), [box, Point(x=0, y=0, label=label)]).size == size


def test_a_label_too_long_is_shortened_to_the_picture():
    pixels = np.asarray(draw_places(canvas(), [Box(x1=50, y1=50, x2=51, y2=51, label="w" * 500)]))
    filled = (pixels == RED).all(2).any(0)
    assert 150 < filled.sum() <= 200


def test_places_with_one_label_share_a_colour():
    boxes = [Box(x1=10 * n, y1=50, x2=10 * n + 5, y2=60, label=label) for n, label in enumerate("aba")]
    pixels = np.asarray(draw_places(canvas(), boxes))
    colours = [tuple(pixels[59, 10 * n]) for n in range(3)]
    assert colours == [RED, ImageColor.getrgb(PALETTE[1]), RED]


def test_a_point_is_a_dot():
    pixels = np.asarray(draw_places(canvas(), [Point(x=60, y=40)]))
    assert tuple(pixels[40, 60]) == RED
    dot = np.argwhere((pixels != GREY).any(2))
    assert dot.mean(0) == pytest.approx((40, 60), abs=0.6) and np.ptp(dot, axis=0).max() < 12


def test_transparent_and_grey_pictures_are_drawn_on_too():
    for mode in ("L", "RGBA", "P", "1", "I;16"):
        picture = Image.new(mode, (50, 50))
        before = picture.tobytes()
        drawn = draw_places(picture, [Box(x1=5, y1=5, x2=45, y2=45)])
        assert drawn.mode == "RGB" and drawn.getpixel((5, 20)) == RED and picture.tobytes() == before


def rotation(axis, angle):
    """By Rodrigues' formula, which shares nothing with three turns in a row."""
    x, y, z = axis
    cross = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
    return np.eye(3) + math.sin(angle) * cross + (1 - math.cos(angle)) * cross @ cross


ANGLES = st.floats(-2, 2)
METRES = st.floats(-3, 3)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(METRES, METRES, st.floats(6, 20), st.tuples(*[st.floats(0, 3)] * 3), ANGLES, ANGLES, ANGLES)
def test_cuboids_are_projected_as_matrices_say(x, y, z, sizes, roll, pitch, yaw):
    box = Box3D(**dict(zip(BOX_3D_NUMBERS, (x, y, z, *sizes, roll, pitch, yaw), strict=True)))
    camera = Camera(fx=500, fy=450, cx=320, cy=240)
    about_x, about_y = rotation((1, 0, 0), roll * math.pi), rotation((0, 1, 0), pitch * math.pi)
    turn = rotation((0, 0, 1), yaw * math.pi) @ about_y @ about_x
    signs = np.array([[i >> 2 & 1, i >> 1 & 1, i & 1] for i in range(8)]) - 0.5
    points = signs * sizes @ turn.T + (x, y, z)
    assert np.allclose(corners(box), points, atol=1e-9)
    homogeneous = points @ np.array([[500, 0, 320], [0, 450, 240], [0, 0, 1]]).T
    pixels = homogeneous[:, :2] / homogeneous[:, 2:]
    expected = [(pixels[a], pixels[b]) for a, b in EDGES]
    assert np.allclose(projected_edges(box, camera), expected, atol=1e-6)


def cuboid(**changes):
    numbers = {"x": 0, "y": 0, "z": 5, "x_size": 2, "y_size": 1, "z_size": 1, "roll": 0, "pitch": 0, "yaw": 0}
    return Box3D(**{**numbers, **changes})


def test_half_a_unit_is_ninety_degrees():
    """Known defect: angles in units of pi taken for degrees, or degrees for radians."""
    extents = np.ptp(np.array(corners(cuboid(yaw=0.5))), axis=0)
    assert extents == pytest.approx((1, 2, 1))
    assert np.ptp(np.array(corners(cuboid(pitch=0.5))), axis=0) == pytest.approx((1, 1, 2))
    assert np.ptp(np.array(corners(cuboid(roll=0.5, z_size=3))), axis=0) == pytest.approx((2, 3, 1))


def test_a_cuboid_has_twelve_edges_of_its_three_lengths():
    points = np.array(corners(cuboid(z_size=3, roll=0.2, yaw=0.3)))
    lengths = sorted(np.linalg.norm(points[a] - points[b]) for a, b in EDGES)
    assert lengths == pytest.approx([1] * 4 + [2] * 4 + [3] * 4)


def test_edges_are_cut_before_the_camera():
    camera = Camera.from_field_of_view(height=100, width=200)
    assert projected_edges(cuboid(z=-5), camera) == ()
    half = cuboid(z=0, z_size=4)  # the camera is inside: four edges behind, four before, four cut
    segments = projected_edges(half, camera)
    assert len(segments) == 8
    ahead = {camera.project(point) for point in corners(half) if point[2] > 0}
    cut = [pixel for segment in segments for pixel in segment if pixel not in ahead]
    sides = [camera.project((x, y, NEAR)) for x in (1, -1) for y in (0.5, -0.5)]
    assert sorted(cut) == [pytest.approx(side) for side in sorted(sides)]


def test_a_cuboid_is_drawn_through_its_corners_even_around_the_camera():
    picture = canvas(400, 300)
    camera = Camera.from_field_of_view(height=300, width=400)
    pixels = np.asarray(draw_places(picture, [cuboid()]))
    for x, y in (camera.project(point) for point in corners(cuboid())):
        around = pixels[round(y) - 2 : round(y) + 3, round(x) - 2 : round(x) + 3]
        assert (around == RED).all(2).any()
    assert tuple(pixels[150, 5]) == GREY
    hard = [{"z": 0, "z_size": 4}, {"z": 1e-9}, {"x": 1e308, "z_size": 1e308, "roll": 1e308}, {"z": -3}]
    for box in (cuboid(**numbers) for numbers in hard):
        draw_places(picture, [replace(box, label="near")])
    assert (np.asarray(draw_places(picture, [cuboid(z=-3)])) == GREY).all()


def test_a_field_of_view_spans_the_picture():
    camera = Camera.from_field_of_view(height=100, width=200, degrees=90)
    assert camera.project((1, 0, 1)) == pytest.approx((200, 50)) and camera.fx == camera.fy
    both = Camera.from_field_of_view(height=100, width=200, degrees=60, vertical=60)
    assert both.project((0, math.tan(math.pi / 6), 1)) == pytest.approx((100, 100))


def test_parsing_and_conversion_need_neither_torch_nor_numpy_nor_pillow():
    script = f"""
import sys, types
for name in ("torch", "numpy", "PIL", "torchvision"):
    sys.modules[name] = None
package = types.ModuleType("qwen_vl_utils")
package.__path__ = [{str(Path(grounding.__file__).parent.parent)!r}]
sys.modules["qwen_vl_utils"] = package
from qwen_vl_utils import grounding
(box,) = grounding.parse_boxes('[{{"bbox_2d": [0, 0, 500, 1000]}}]').items
assert grounding.to_pixels(box, height=10, width=20).xyxy == (0, 0, 10, 10)
"""
    subprocess.run([sys.executable, "-c", script], check=True)


def test_everything_public_is_exported():
    assert sorted(grounding.__all__) == sorted(set(grounding.__all__))
    assert all(hasattr(grounding, name) for name in grounding.__all__)


FRAMES = [Image.new("RGB", (40, 30), (shade, shade, shade)) for shade in (60, 90, 120, 150)]


def test_spans_are_bars_on_a_line_of_time_and_frame_the_frames_within():
    spans = [
        Span(start=1, end=2, label="a"),
        Span(start=2.5, end=4, label="b"),
        Span(start=0, end=0.5, label="a"),
    ]
    pixels = np.asarray(draw_spans(FRAMES, [0, 1, 2, 3], spans, duration=4))
    colours = [ImageColor.getrgb(PALETTE[number]) for number in (0, 1, 0)]
    assert pixels.shape[1] == 160 and pixels.shape[0] > 30
    for number, (span, colour) in enumerate(zip(spans, colours, strict=True)):
        row = pixels[30 + 16 * (number + 1) + 13]  # Below the letters.
        bar = np.flatnonzero((row == colour).all(1))
        assert bar[0] == pytest.approx(span.start * 40, abs=1.5)
        assert bar[-1] == pytest.approx(span.end * 40, abs=1.5)
    framed = [tuple(pixels[0, 40 * place + 20]) for place in range(4)]
    assert framed == [colours[0], colours[0], colours[0], colours[1]]
    assert (pixels[15, 20:160:40] == [[shade] * 3 for shade in (60, 90, 120, 150)]).all()


def test_a_span_outside_the_video_is_drawn_at_its_edge():
    drawn = draw_spans(FRAMES, [0, 1, 2, 3], [Span(start=50, end=90, label="late")], duration=4)
    assert drawn.size[0] == 160 and (np.asarray(drawn)[-3] == RED).all(1).any()


@pytest.mark.parametrize(
    ("frames", "seconds", "duration", "words"),
    [([], [], 4, "0 frames"), (FRAMES, [0], 4, "4 frames with 1"), (FRAMES, [0, 1, 2, 3], 0, "duration=0")],
)
def test_what_is_no_video_is_refused(frames, seconds, duration, words):
    with pytest.raises(ValueError, match=words):
        draw_spans(frames, seconds, [], duration=duration)
