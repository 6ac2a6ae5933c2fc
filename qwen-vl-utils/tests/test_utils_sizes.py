"""Sizes and counts: the bounds are kept, and where 0.0.14 was right its numbers stand."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen_vl_utils import sizes, smart_resize, vision_process

FACTORS = st.sampled_from([28, 32])
SIDES = st.integers(1, 8000)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(SIDES, SIDES, FACTORS, st.integers(0, 10**6), st.integers(1, 4 * 10**6))
def test_smart_resize_is_positive_and_in_bounds_whenever_a_size_exists(height, width, factor, low, high):
    unit = factor * factor
    exists = max(1, math.ceil(low / unit)) <= high // unit
    possible = max(height, width) <= 200 * min(height, width) and low <= high
    if not (exists and possible):
        with pytest.raises(ValueError):
            smart_resize(height, width, factor, low, high)
        return
    rows, columns = smart_resize(height, width, factor, low, high)
    assert rows > 0 and columns > 0 and rows % factor == 0 and columns % factor == 0
    assert low <= rows * columns <= high


@settings(max_examples=300, deadline=None, derandomize=True)
@given(SIDES, SIDES, st.integers(1, 60), st.integers(0, 6))
def test_tight_bounds_give_the_closest_aspect_ratio_of_all_sizes(height, width, low, room):
    """Against every size there is; the rounding of the ordinary way may be in bounds and less close."""
    if max(height, width) > 200 * min(height, width):
        return
    high = low + room
    every = [(a, b) for a in range(1, high + 1) for b in range(1, high // a + 1) if low <= a * b <= high]

    def distance(size):
        return abs(math.log(size[1] / size[0]) - math.log(width / height))

    rows, columns = sizes._closest(height, width, 1, low, high)
    assert (rows, columns) in every
    assert distance((rows, columns)) <= min(map(distance, every)) + 1e-9


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ((224, 224, 28), (224, 224)),
        ((100, 150, 28), (112, 140)),
        ((70, 98, 28), (56, 112)),  # halves go to the even multiple: 2.5 -> 2, 3.5 -> 4
        ((1080, 1920, 28, 3136, 1003520), (728, 1316)),
        ((20, 20, 32), (64, 64)),
    ],
)
def test_sizes_that_0_0_14_gives(arguments, expected):
    assert smart_resize(*arguments) == expected


def test_a_thin_picture_under_a_low_maximum_keeps_one_unit():
    """0.0.14 answered (0, 560): #2121."""
    assert smart_resize(31, 639, 28, max_pixels=20 * 28 * 28) == (28, 560)


def test_tight_bounds_are_kept():
    """0.0.14 answered 252 x 252 with a maximum of 251 x 251."""
    rows, columns = smart_resize(100, 100, 28, 250 * 250, 251 * 251)
    assert 250 * 250 <= rows * columns <= 251 * 251


def test_no_size_in_the_bounds_is_an_error_that_says_so():
    with pytest.raises(ValueError, match="no size in multiples of 28 has between min_pixels=800"):
        smart_resize(100, 100, 28, 800, 900)


@pytest.mark.parametrize(("height", "width"), [(0, 10), (10, -1)])
def test_sides_must_be_positive(height, width):
    with pytest.raises(ValueError, match="must be positive"):
        smart_resize(height, width, 28)


def test_a_maximum_below_the_default_minimum_lowers_the_minimum():
    """0.0.14 stopped with an AssertionError."""
    rows, columns = smart_resize(500, 500, 28, max_pixels=3000)
    assert 1500 <= rows * columns <= 3000


def test_a_long_videos_narrow_share_still_has_a_size():
    """1.05 times a minimum of 6.4 units is 6.7; the maximum that nobody named becomes 7."""
    low, high = vision_process.item_frame_bounds({"min_pixels": 5000, "total_pixels": 5000}, 700, 28, 784)
    assert (low, high) == (5000, 7 * 784)
    assert sizes.room(5000, 7 * 784 + 5, 28) == 7 * 784 + 5
    with pytest.raises(ValueError, match="no size in multiples of 28"):
        smart_resize(60, 60, 28, 5000, 5250)


def test_contradicting_bounds_are_an_error():
    with pytest.raises(ValueError, match="min_pixels=5000 is greater than max_pixels=4000"):
        smart_resize(100, 100, 28, 5000, 4000)


def test_constants_are_read_when_a_function_runs(monkeypatch):
    before = smart_resize(4000, 4000, 28)
    monkeypatch.setattr(vision_process, "IMAGE_MAX_TOKEN_NUM", 100)
    assert smart_resize(4000, 4000, 28) == (280, 280) != before
    monkeypatch.setattr(vision_process, "MAX_RATIO", 3)
    with pytest.raises(ValueError, match="smaller than 3"):
        smart_resize(100, 400, 28)


def test_pixel_constants_of_old_releases_work_when_they_are_set(monkeypatch):
    assert vision_process.MAX_PIXELS == 16384 * 28 * 28
    assert smart_resize(9000, 9000, 32) == (4096, 4096)  # the token number, at patch size 16
    monkeypatch.setattr(vision_process, "MAX_PIXELS", 280 * 280)
    assert smart_resize(9000, 9000, 28) == (280, 280)


def test_model_length_comes_from_the_environment_until_it_is_set(monkeypatch):
    assert vision_process.MODEL_SEQ_LEN == 128000
    monkeypatch.setenv("MODEL_SEQ_LEN", "1e3")
    assert vision_process.MODEL_SEQ_LEN == 1000
    few = vision_process.item_frame_bounds({}, 100, 28, 784)
    monkeypatch.setattr(vision_process, "MODEL_SEQ_LEN", 10000, raising=False)
    more = vision_process.item_frame_bounds({}, 100, 28, 784)
    assert few[1] == pytest.approx(1000 * 784 * 0.9 / 100 * 2)
    assert more[1] == pytest.approx(10 * few[1])


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    st.integers(2, 5000),
    st.floats(1, 120),
    st.one_of(st.none(), st.floats(0.1, 60)),
    st.one_of(st.none(), st.integers(1, 64)),
    st.one_of(st.none(), st.integers(2, 64)),
)
def test_smart_nframes_is_even_and_within_the_video(total, source_fps, fps, low, high):
    ele = {"fps": fps, "min_frames": low, "max_frames": high}
    count = vision_process.smart_nframes(ele, total, source_fps)
    assert count % 2 == 0 and 2 <= count <= total
    if high is not None:
        assert count <= high


@pytest.mark.parametrize(
    ("ele", "total", "source_fps", "expected"),
    [
        ({}, 250, 25.0, 20),
        ({"fps": 1}, 132, 25.0, 4),  # 5.28 -> 4 or more, even
        ({"fps": 1}, 250, 25.0, 10),
        ({"nframes": 7}, 100, 25.0, 8),
        ({"nframes": 5}, 100, 25.0, 4),  # banker's rounding of 2.5
        ({"max_frames": 7}, 1000, 25.0, 6),
        ({"min_frames": 9, "fps": 0.1}, 1000, 25.0, 10),
        ({}, 3, 25.0, 2),
        ({"fps": 30}, 100000, 25.0, 768),
    ],
)
def test_frame_counts_that_0_0_14_gives(ele, total, source_fps, expected):
    assert vision_process.smart_nframes(ele, total, source_fps) == expected


@pytest.mark.parametrize(
    ("ele", "message"),
    [
        ({"nframes": 40}, r"nframes should be in \[2, 30\], got 40"),
        ({"nframes": 0}, r"\[2, 30\], got 0"),
        ({"nframes": 8, "fps": 2}, "only one of fps and nframes"),
    ],
)
def test_frame_counts_that_cannot_be(ele, message):
    with pytest.raises(ValueError, match=message):
        vision_process.smart_nframes(ele, 30, 10.0)


def test_frame_range_rounds_inward_and_clamps():
    frames = vision_process.calculate_video_frame_range
    assert frames({}, 100, 10.0) == (0, 99, 100)
    assert frames({"video_start": 1.01, "video_end": 2.99}, 100, 10.0) == (11, 29, 19)
    assert frames({"video_start": -5, "video_end": 1000}, 100, 10.0) == (0, 99, 100)
    with pytest.raises(ValueError, match="leave no two frames"):
        frames({"video_start": 5.0, "video_end": 5.0}, 100, 10.0)
    with pytest.raises(ValueError, match="video_fps"):
        frames({}, 100, 0)
    with pytest.raises(ValueError, match="total_frames"):
        frames({}, 0, 10.0)


# --- one budget for all media


@given(
    total=st.integers(0, 3000),
    media=st.lists(st.tuples(st.integers(1, 400), st.integers(1, 400)), min_size=1, max_size=8),
)
@settings(max_examples=500)
def test_a_budget_is_shared_fairly(total, media):
    wanted, least = [want for want, _ in media], [need for _, need in media]
    needs = [min(want, need) for want, need in media]
    if sum(needs) > total:
        with pytest.raises(
            ValueError, match=f"total_tokens={total} can't hold the media .* need {sum(needs)}"
        ):
            sizes.share(total, wanted, least)
        return
    shares = sizes.share(total, wanted, least)
    assert sum(shares) <= total
    assert all(need <= got <= want for need, got, want in zip(needs, shares, wanted, strict=True))
    if sum(wanted) <= total:
        assert shares == wanted
        return
    assert total - sum(shares) < len(media)  # hardly anything is left over
    # nobody who got less than it wanted envies one who got more than it needs
    short = min(got for got, want in zip(shares, wanted, strict=True) if got < want)
    assert all(got <= max(short, need) for got, need in zip(shares, needs, strict=True))


def test_small_media_keep_what_they_need():
    assert sizes.share(100, [10, 20, 500, 500], [1, 1, 1, 1]) == [10, 20, 35, 35]
    assert sizes.share(100, [10, 20, 500, 500], [1, 1, 50, 1]) == [10, 20, 50, 20]
    assert sizes.share(1000, [10, 20], [1, 1]) == [10, 20]
