"""Sizes, counts, items and pictures are those of the release 0.0.14, on thousands of random inputs.

Each function has a table of the cases in which ours differs on purpose; every other case must be equal, and
every entry of a table must be met.
"""

import base64
import io
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from qwen_vl_utils import extract_vision_info, fetch_image, smart_resize, vision_process
from qwen_vl_utils.vision_process import (
    calculate_video_frame_range,
    ceil_by_factor,
    floor_by_factor,
    round_by_factor,
    smart_nframes,
    to_rgb,
)

thorough = settings(
    max_examples=2000,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)
Case = SimpleNamespace


def maybe(strategy):
    """A value, or None for an argument or key that is left out."""
    return st.none() | strategy


def given_only(**values):
    """The values that are not None, as keys of an item."""
    return {key: value for key, value in values.items() if value is not None}


# --- arithmetic

NUMBERS = st.integers(-(10**6), 10**6) | st.floats(-1e6, 1e6)


@pytest.mark.parametrize("function", [round_by_factor, ceil_by_factor, floor_by_factor])
def test_rounding_is_that_of_the_release(compare, function):
    comparison = compare([])

    @thorough
    @given(NUMBERS, st.integers(1, 100))
    def agrees(number, factor):
        comparison.check(None, function, number, factor)

    agrees()


# --- smart_resize


def bounds(case):
    low = 4 * case.factor**2 if case.min_pixels is None else case.min_pixels
    high = 16384 * case.factor**2 if case.max_pixels is None else case.max_pixels
    return low, high


def fits(size, case, low, high):
    height, width = size
    whole = height % case.factor == width % case.factor == 0
    return whole and min(height, width) > 0 and low <= height * width <= high


def a_size_exists(case, low, high):
    return max(1, math.ceil(low / case.factor**2)) <= math.floor(high / case.factor**2)


def too_long(case):
    return max(case.height, case.width) / min(case.height, case.width) > 200


def assert_value_error(case, theirs, ours):
    assert ours.error and "ValueError" in ours.error.split(), ours


def assert_size_in(case, ours, low, high):
    """A size inside the bounds; where none exists, or for a ratio that nobody takes, a ValueError."""
    if a_size_exists(case, low, high) and not too_long(case):
        assert ours.error is None and fits(ours.value, case, low, high), (ours, low, high)
    else:
        assert_value_error(case, None, ours)


def default_gave_way(case, theirs, ours):
    if case.max_pixels is None:
        assert_size_in(case, ours, case.min_pixels, 2 * case.min_pixels)
    else:
        assert_size_in(case, ours, case.max_pixels / 2, case.max_pixels)


def sizes_table(difference):
    return [
        difference(
            "a side that is not positive",
            "0.0.14 divides by zero or invents a size; no such picture exists",
            lambda case, theirs: min(case.height, case.width) <= 0,
            assert_value_error,
        ),
        difference(
            "a maximum of 0 pixels",
            "0.0.14 divides by it",
            lambda case, theirs: theirs.error == "ZeroDivisionError" and case.max_pixels == 0,
            assert_value_error,
        ),
        difference(
            "contradicting bounds",
            "an assertion is no error message for a caller's input",
            lambda case, theirs: (
                theirs.error == "AssertionError" and None not in (case.min_pixels, case.max_pixels)
            ),
            assert_value_error,
        ),
        difference(
            "a bound beyond the default of the other",
            "who lowers the maximum below the default minimum wants small pictures, not an AssertionError",
            lambda case, theirs: theirs.error == "AssertionError",
            default_gave_way,
        ),
        difference(
            "0 or outside of the bounds",
            "0.0.14 scales one side to 0, or leaves the bounds by rounding each side",
            lambda case, theirs: theirs.error is None and not fits(theirs.value, case, *bounds(case)),
            lambda case, theirs, ours: assert_size_in(case, ours, *bounds(case)),
        ),
    ]


SIDES = st.integers(1, 200) | st.integers(1, 6000) | st.integers(-1, 1) | st.integers(1, 10**6)
FACTORS = st.sampled_from([14, 16, 28, 32]) | st.integers(1, 64)


@st.composite
def size_cases(draw):
    factor = draw(FACTORS)
    tokens = st.integers(1, 64) | st.integers(1, 20000)
    pixels = st.integers(0, 64 * factor**2) | tokens.map(lambda n: n * factor**2) | st.floats(1.0, 1e7)
    return Case(
        height=draw(SIDES),
        width=draw(SIDES),
        factor=factor,
        min_pixels=draw(maybe(pixels)),
        max_pixels=draw(maybe(pixels)),
    )


def test_smart_resize_is_that_of_the_release(compare, difference):
    comparison = compare(sizes_table(difference))

    @thorough
    @given(size_cases())
    def agrees(case):
        comparison.check(case, smart_resize, **vars(case))

    agrees()
    comparison.assert_no_difference_is_dead()


# --- how many frames, and which


def has_none(case, theirs):
    return theirs.error == "TypeError" and None in case.ele.values()


def without_none(function, comparison):
    """Ours gives for an empty column of a table what it, and so 0.0.14, gives where there is no such key."""

    def holds(case, theirs, ours):
        filled = given_only(**case.ele)
        assert ours == comparison().ours(function, filled, *case.rest)
        comparison().check(Case(ele=filled, rest=case.rest), function, filled, *case.rest)

    return holds


RATES = st.sampled_from([1, 2, 10, 23.976, 24, 25.0, 29.97, 30, 59.94, 60]) | st.floats(0.1, 240)
COUNTS = st.integers(1, 300) | st.integers(1, 10**5)


def test_smart_nframes_is_that_of_the_release(compare, difference):
    comparison = compare(
        [
            difference(
                "both fps and nframes",
                "an assertion is no error message for a caller's input",
                lambda case, theirs: theirs.error == "AssertionError",
                lambda case, theirs, ours: (
                    # `nframes: None` beside fps is an empty column of a table
                    assert_value_error(case, theirs, ours)
                    if None not in (case.ele["fps"], case.ele["nframes"])
                    else comparison.check(
                        Case(ele=given_only(**case.ele), rest=case.rest),
                        smart_nframes,
                        given_only(**case.ele),
                        *case.rest,
                    )
                ),
            ),
            difference(
                "a key that holds None",
                "rows of a table have all columns; 0.0.14 computes with None",
                has_none,
                without_none(smart_nframes, lambda: comparison),
            ),
        ]
    )
    number = st.integers(-2, 40) | st.integers(0, 1000) | st.floats(0, 100)
    item = st.fixed_dictionaries(
        {},
        optional={
            "fps": maybe(RATES | number),
            "nframes": maybe(number),
            "min_frames": maybe(number),
            "max_frames": maybe(number),
        },
    )

    @thorough
    @given(item, COUNTS, RATES)
    def agrees(ele, total, fps):
        comparison.check(Case(ele=ele, rest=(total, fps)), smart_nframes, ele, total, fps)

    agrees()
    comparison.assert_no_difference_is_dead()


def test_frame_ranges_are_those_of_the_release(compare):
    comparison = compare([])
    second = maybe(st.floats(-5, 400) | st.floats(0, 10) | st.integers(0, 60))

    @thorough
    @given(
        st.fixed_dictionaries({}, optional={"video_start": second, "video_end": second}),
        st.integers(-1, 400) | COUNTS,
        RATES | st.sampled_from([0, -1.0]),
    )
    def agrees(ele, total, fps):
        comparison.check(None, calculate_video_frame_range, ele, total, fps)

    agrees()


# --- items of messages

KINDS = ("image", "image_url", "video", "video_url")


def release_takes(ele):
    """0.0.14's rule for one content item; a string is searched for the word."""
    words = ("image", "image_url", "video")
    return any(word in ele for word in words) or (isinstance(ele, dict) and ele.get("type") in words)


def ours_takes(ele):
    """0.0.14's rule with what we mend: strings and empty columns are no media, `video_url` is one."""
    if not isinstance(ele, dict):
        return False
    if ele.get("type") in KINDS:
        return True
    present = [ele[key] for key in KINDS if key in ele]
    return any(value is not None for value in present) or (bool(present) and ele.get("type") is None)


def content_of(conversations):
    batch = [conversations] if conversations and isinstance(conversations[0], dict) else conversations
    return [message.get("content") for conversation in batch for message in conversation]


def items_of(conversations):
    return [ele for content in content_of(conversations) if isinstance(content, list) for ele in content]


def mended(case, theirs, ours):
    contents = [content for content in content_of(case) if isinstance(content, (list, tuple))]
    assert ours.value == [ele for content in contents for ele in content if ours_takes(ele)]


def items_table(difference):
    return [
        difference(
            "no conversation at all",
            "an empty batch has no media",
            lambda case, theirs: theirs.error == "IndexError" and not case,
            lambda case, theirs, ours: mended(case, theirs, ours),
        ),
        difference(
            "a message without content",
            "tool calls have none",
            lambda case, theirs: (
                theirs.error == "KeyError" and any(content is None for content in content_of(case))
            ),
            mended,
        ),
        difference(
            "an item that is a string",
            "0.0.14 fails, or takes a text with the word image in it for a picture",
            lambda case, theirs: any(isinstance(ele, str) for ele in items_of(case)),
            mended,
        ),
        difference(
            "content in a tuple",
            "0.0.14 drops its media without a word",
            lambda case, theirs: any(
                isinstance(content, tuple) and any(map(ours_takes, content)) for content in content_of(case)
            ),
            mended,
        ),
        difference(
            "video_url",
            "0.0.14 drops it without a word",
            lambda case, theirs: any(ours_takes(ele) and not release_takes(ele) for ele in items_of(case)),
            mended,
        ),
        difference(
            "a text with an empty picture column",
            "tables fill the columns that a row does not use with None",
            lambda case, theirs: any(release_takes(ele) and not ours_takes(ele) for ele in items_of(case)),
            mended,
        ),
    ]


@st.composite
def conversations(draw):
    source = st.sampled_from(["a.png", "b.mp4", "http://c/d", None]) | st.lists(st.just("f.png"), max_size=2)
    item = st.fixed_dictionaries(
        {},
        optional={
            "type": st.sampled_from(["text", "image", "image_url", "video", "video_url", "tool", None]),
            "text": st.sampled_from(["hello", "an image", ""]),
            **{key: source for key in ("image", "image_url", "video")},
        },
    )
    rare = st.fixed_dictionaries({"video_url": source}) | st.sampled_from(["text", "an image"])
    items = st.lists(st.one_of(*[item] * 12, rare), max_size=4)
    content = st.one_of(*[items] * 12, st.just("a text with an image"), items.map(tuple))
    message = st.fixed_dictionaries({"role": st.just("user"), "content": content})
    bare = st.just({"role": "assistant"})
    conversation = st.lists(st.one_of(*[message] * 30, bare), max_size=3)
    return draw(conversation | st.lists(conversation, min_size=1, max_size=3))


def test_extracted_items_are_those_of_the_release(compare, difference):
    comparison = compare(items_table(difference))

    @thorough
    @given(conversations())
    def agrees(case):
        comparison.check(case, extract_vision_info, case)

    agrees()
    comparison.assert_no_difference_is_dead()


# --- pictures in RGB

MODES = (
    "1", "L", "P", "RGB", "RGBA", "LA", "La", "PA", "CMYK", "YCbCr", "HSV", "LAB", "I", "F", "I;16", "RGBX",
    "RGBa",
)  # fmt: skip
FORMATS = {  # what each format can hold
    "png": ("1", "L", "LA", "P", "RGB", "RGBA", "I;16"),
    "jpeg": ("L", "RGB", "CMYK"),
    "bmp": ("1", "L", "P", "RGB"),
    "gif": ("1", "L", "P", "RGB"),
    "tiff": ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I", "F", "I;16", "LAB"),
    "webp": ("L", "RGB", "RGBA"),
}
ORIENTED = ("png", "jpeg", "webp")  # TIFF has a test of its own: Pillow turns it when it loads
ORIENTATION = 0x0112


def picture(mode, width, height, seed):
    """Noise in blocks, so that resizing has edges and flat parts; every tenth seed stays in 8 bits."""
    rng = np.random.default_rng(seed)
    if mode in ("I", "F", "I;16"):
        top = 256 if seed % 10 == 0 else 60000
        values = rng.integers(0, top, (height, width))
        return Image.fromarray(values.astype({"I": "int32", "F": "float32", "I;16": "uint16"}[mode]))
    values = rng.integers(0, 256, ((height + 3) // 4, (width + 3) // 4, 4), dtype=np.uint8)
    rgba = Image.fromarray(values.repeat(4, 0).repeat(4, 1)[:height, :width])
    if mode in ("La", "RGBa"):
        return rgba.convert({"La": "LA", "RGBa": "RGBA"}[mode]).convert(mode)
    if mode == "PA":
        return rgba.convert("LA").convert("PA")
    if mode in ("RGBA", "LA"):
        return rgba.convert(mode)
    rgb = rgba.convert("RGB")
    return rgb.convert("L").convert(mode) if mode == "1" else convert_from_rgb(rgb, mode)


def convert_from_rgb(rgb, mode):
    if mode == "LAB":  # Pillow converts to it with a colour profile only; any bytes will do
        return Image.frombytes("LAB", rgb.size, rgb.tobytes())
    return rgb.convert(mode)


@st.composite
def pictures(draw, modes=MODES):
    mode = draw(st.sampled_from(modes))
    side = st.integers(1, 40) | st.integers(1, 120)
    image = picture(mode, draw(side), draw(side), draw(st.integers(0, 10**6)))
    if mode == "P" and draw(st.booleans()):
        image.info["transparency"] = draw(st.integers(0, 255))
    return image


def alpha(image):
    """The lowest opacity in `image`, 255 where nothing shines through."""
    if image.mode == "La":
        image = image.convert("LA")
    return image.convert("RGBA").getchannel("A").getextrema()[0] if image.has_transparency_data else 255


def shines_through(image):
    return image.mode != "RGBA" and alpha(image) < 255


def deep(image):
    if image.mode.startswith("I;16"):
        return True
    return image.mode == "I" and not 0 <= image.getextrema()[0] <= image.getextrema()[1] <= 255


def on_white(image):
    """[h, w, 3]: the definition, in floating point."""
    if image.mode in ("La", "RGBa"):
        image = image.convert({"La": "LA", "RGBa": "RGBA"}[image.mode])
    rgba = np.asarray(image.convert("RGBA")).astype(float)
    opacity = rgba[..., 3:] / 255
    return rgba[..., :3] * opacity + 255 * (1 - opacity)


def scaled(image):
    grey = np.asarray(image).astype(float) * 255 / 65535
    return np.repeat(grey[..., None], 3, axis=2)


def assert_close_to(expected):
    def holds(image, theirs, ours):
        kind, mode, pixels = ours.value
        assert (kind, mode) == ("image", "RGB")
        assert np.abs(pixels - expected(image)).max() <= 1

    return holds


def colours_table(difference):
    return [
        difference(
            "transparency outside of RGBA",
            "0.0.14 turns it black, or cannot convert the mode; RGBA is on white there too",
            lambda image, theirs: shines_through(image) or image.mode == "La",
            assert_close_to(on_white),
        ),
        difference(
            "16-bit greys",
            "0.0.14 clips all above 255 to white",
            lambda image, theirs: deep(image),
            assert_close_to(scaled),
        ),
    ]


def test_colours_are_those_of_the_release(compare, difference):
    comparison = compare(colours_table(difference))

    @thorough
    @given(pictures())
    def agrees(image):
        comparison.check(image, to_rgb, image)

    agrees()
    comparison.assert_no_difference_is_dead()


# --- fetch_image


def saved(image, form, orientation, transparent):
    """The bytes of a file."""
    more = {}
    if orientation is not None:
        exif = Image.Exif()
        exif[ORIENTATION] = orientation
        more["exif"] = exif
    if transparent is not None and image.mode == "P" and form in ("png", "gif"):
        more["transparency"] = transparent
    if form == "webp":
        more["lossless"] = True
    with io.BytesIO() as file:
        image.save(file, form, **more)
        return file.getvalue()


@st.composite
def image_cases(draw):
    """`opened`: the picture as Pillow opens it; `forms`: how it is handed over."""
    form = draw(st.sampled_from(["PIL", *FORMATS]))
    if form == "PIL":
        opened = draw(pictures())
        data, source = None, "PIL"
    else:
        image = draw(pictures(FORMATS[form]))
        turn = draw(maybe(st.integers(1, 9))) if form in ORIENTED else None
        data = saved(image, form, turn, image.info.get("transparency"))
        opened = Image.open(io.BytesIO(data))
        source = draw(st.sampled_from([*["path", "file", "data"] * 6, *NEW_FORMS]))
    pixels = st.integers(1, 400 * 28 * 28) | st.integers(1, 20000)
    side = st.integers(1, 300)
    more = given_only(min_pixels=draw(maybe(st.integers(1, 100 * 28 * 28))), max_pixels=draw(maybe(pixels)))
    if draw(st.integers(0, 3)) == 0:
        more |= {"resized_height": draw(side), "resized_width": draw(side)}
    if draw(st.integers(0, 20)) == 0:
        more["min_pixels"] = None
    if draw(st.integers(0, 20)) == 0:
        more |= {"resized_height": None, "resized_width": None}
    patch = draw(st.sampled_from([14, 16]))
    return Case(form=form, opened=opened, data=data, source=source, more=more, patch=patch)


NEW_FORMS = ("pathlib", "bytes", "escaped", "mapping", "other key")


def hand_over(case, folder):
    """The item; files are written anew for every case."""
    if case.source == "PIL":
        return {"image": case.opened, **case.more}
    path = folder / f"a case.{case.form}"
    if case.source != "data":
        path.write_bytes(case.data)
    encoded = base64.b64encode(case.data).decode()
    source = {
        "path": {"image": str(path)},
        "file": {"image": f"file://{path}"},
        "data": {"image": f"data:image/{case.form};base64,{encoded}"},
        "pathlib": {"image": path},
        "bytes": {"image": case.data},
        "escaped": {"image": path.as_uri()},
        "mapping": {"type": "image_url", "image_url": {"url": str(path)}},
        "other key": {"image": None, "image_url": str(path)},
    }[case.source]
    return {**source, **case.more}


def oriented(image):
    return image.getexif().get(ORIENTATION, 1) in range(2, 9)


def size_case(case):
    """The question to `smart_resize` in this case, as `test_smart_resize_...` asks it."""
    factor = 2 * case.patch
    more = given_only(**case.more)
    if "resized_height" in more:
        return Case(height=more["resized_height"], width=more["resized_width"], factor=factor,
                    min_pixels=None, max_pixels=None)  # fmt: skip
    width, height = case.opened.size
    return Case(height=height, width=width, factor=factor,
                min_pixels=more.get("min_pixels"), max_pixels=more.get("max_pixels"))  # fmt: skip


def simple(case):
    """The same pixels as an upright picture in RGB, and no empty columns."""
    opened = to_rgb(ImageOps.exif_transpose(case.opened))
    more = given_only(**case.more)
    return Case(form="PIL", opened=opened, data=None, source="PIL", more=more, patch=case.patch)


def same_as_simple(comparison):
    """Ours is what ours, and so 0.0.14, makes of the simple picture. (`to_rgb` has its own test above.)"""

    def holds(case, theirs, ours):
        easy = simple(case)
        ele = hand_over(easy, Path())
        again = comparison().ours(fetch_image, ele, case.patch)
        assert (ours.error is None) == (again.error is None), (ours, again)
        if ours.error is None:
            comparison().assert_same(ours.value, again.value)
        comparison().check(easy, fetch_image, ele, case.patch)

    return holds


def sized_on_purpose(reference, difference):
    """Where `smart_resize` differs on purpose: the picture has the size that ours gives."""
    table = sizes_table(difference)

    def entry(case):
        question = size_case(case)
        theirs = reference.call("smart_resize", **vars(question))
        return any(row.applies(question, theirs) for row in table)

    def holds(case, theirs, ours):
        question = size_case(case)
        try:
            height, width = smart_resize(**vars(question))
        except ValueError:
            assert_value_error(case, theirs, ours)
            return
        assert np.array_equal(ours.value[2], np.asarray(to_rgb(case.opened).resize((width, height))))

    return entry, holds


def images_table(reference, difference, comparison):
    on_purpose, has_our_size = sized_on_purpose(reference, difference)
    simple_one = same_as_simple(comparison)
    return [
        difference(
            "a form of source that 0.0.14 does not take",
            "paths, bytes, escaped URLs, OpenAI's items, rows with an empty column",
            lambda case, theirs: case.source in NEW_FORMS and theirs.error is not None,
            simple_one,
        ),
        difference(
            "a key that holds None",
            "rows of a table have all columns; 0.0.14 computes with None",
            lambda case, theirs: theirs.error == "TypeError" and None in case.more.values(),
            simple_one,
        ),
        difference(
            "EXIF orientation",
            "0.0.14 shows photographs lying on their side",
            lambda case, theirs: oriented(case.opened),
            simple_one,
        ),
        difference(
            "transparency outside of RGBA",
            "as for to_rgb",
            lambda case, theirs: shines_through(case.opened) or case.opened.mode == "La",
            simple_one,
        ),
        difference("16-bit greys", "as for to_rgb", lambda case, theirs: deep(case.opened), simple_one),
        difference(
            "sizes in which smart_resize differs",
            "its own table says which and why",
            lambda case, theirs: on_purpose(case),
            has_our_size,
        ),
    ]


def test_pictures_are_those_of_the_release(compare, reference, difference, tmp_path):
    comparison = compare(images_table(reference, difference, lambda: comparison))

    @thorough
    @given(image_cases())
    def agrees(case):
        comparison.check(case, fetch_image, hand_over(case, tmp_path), case.patch)

    agrees()
    comparison.assert_no_difference_is_dead()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_turned_tiff_is_upright_from_a_path_too(tmp_path, orientation):
    """Pillow maps an uncompressed file into memory by its name, with the sides of the turned picture."""
    values = np.arange(5 * 9, dtype=np.uint8).reshape(5, 9) * 5
    path = tmp_path / "turned.tiff"
    path.write_bytes(saved(Image.fromarray(values), "tiff", orientation, None))
    turned = {
        1: values, 2: values[:, ::-1], 3: values[::-1, ::-1], 4: values[::-1], 5: values.T,
        6: np.rot90(values, -1), 7: values[::-1, ::-1].T, 8: np.rot90(values),
    }[orientation]  # fmt: skip
    expected = np.asarray(fetch_image({"image": Image.fromarray(np.ascontiguousarray(turned))}))
    for source in (path.read_bytes(), str(path), path.as_uri()):
        assert np.array_equal(np.asarray(fetch_image({"image": source})), expected)


@pytest.mark.parametrize("content", [None, b"", b"not a picture"])
def test_what_is_no_picture_is_an_error_in_both(reference, compare, difference, tmp_path, content):
    """A missing file is FileNotFoundError in both; what Pillow can't open is our ImageError."""
    path = tmp_path / "broken.png"
    if content is not None:
        path.write_bytes(content)
    table = [
        difference(
            "not a picture",
            "the error names the file, whatever the decoder raised",
            lambda case, theirs: theirs.error == "UnidentifiedImageError",
            lambda case, theirs, ours: assert_image_error(ours, path),
        )
    ]
    compare(table).check(None, fetch_image, {"image": str(path)})


def assert_image_error(ours, path):
    assert "ImageError" in ours.error.split() and str(path) in ours.text


# --- what other packages read


CONSTANTS = (
    "MAX_RATIO", "SPATIAL_MERGE_SIZE", "IMAGE_MIN_TOKEN_NUM", "IMAGE_MAX_TOKEN_NUM", "VIDEO_MIN_TOKEN_NUM",
    "VIDEO_MAX_TOKEN_NUM", "FPS", "FRAME_FACTOR", "FPS_MIN_FRAMES", "FPS_MAX_FRAMES",
    "MAX_NUM_WORKERS_FETCH_VIDEO", "MODEL_SEQ_LEN",
)  # fmt: skip


def test_the_constants_and_names_are_those_of_the_release(reference):
    for name in CONSTANTS:
        assert getattr(vision_process, name) == reference.call("__getattribute__", name).value
    theirs = {name for name in reference.call("__dir__").value if not name.startswith("_")}
    modules_and_typing = {
        "base64", "copy", "logging", "math", "os", "sys", "time", "warnings", "requests", "torch",
        "torchvision", "version", "np", "io", "transforms", "Image", "BytesIO", "lru_cache",
        "ThreadPoolExecutor", "InterpolationMode", "Optional", "Union", "Tuple", "List", "Any", "Dict",
    }  # fmt: skip
    missing = [name for name in sorted(theirs - modules_and_typing) if not hasattr(vision_process, name)]
    assert not missing
