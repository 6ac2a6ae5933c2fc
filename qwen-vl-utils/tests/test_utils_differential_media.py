"""Videos and whole messages come out as from the release 0.0.14, on thousands of random requests.

Shapes, indices and rates are equal; pixels are within one grey level, because ours may resize with other
arithmetic. Each table names the cases in which ours differs on purpose, and every entry must be met.
"""

import functools
import os
from fractions import Fraction
from types import SimpleNamespace

import av
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from qwen_vl_utils import VideoError, fetch_video, process_vision_info, readers, smart_resize, vision_process

thorough = settings(
    max_examples=2000,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)
Case = SimpleNamespace
READERS = ("torchcodec", "decord")
GREY_LEVELS = 1
"""How far a pixel may lie from 0.0.14's."""

X264 = {"preset": "ultrafast", "crf": "20"}
B_FRAMES = {"preset": "veryfast", "crf": "20", "bf": "3"}
CLIPS = {  # name -> (codec, pixel format, width, height, frames a second, frames, options)
    "one.mp4": ("libx264", "yuv420p", 64, 48, "25", 1, X264),
    "two.mp4": ("libx264", "yuv420p", 64, 48, "1", 2, X264),
    "three.mkv": ("libx264", "yuv420p", 48, 64, "30", 3, X264),
    "ntsc.mp4": ("libx264", "yuv420p", 64, 48, "30000/1001", 60, B_FRAMES),
    "film.mkv": ("libx264", "yuv420p", 64, 48, "24000/1001", 48, B_FRAMES),
    "long.mp4": ("libx264", "yuv420p", 32, 32, "60", 200, X264),
    "slow.avi": ("mpeg4", "yuv420p", 63, 47, "1", 20, {}),
    "odd.mkv": ("libx264", "yuv444p", 65, 49, "10", 33, X264),
    "wide.mp4": ("libx264", "yuv420p", 256, 16, "25/2", 25, X264),
    "tall.avi": ("mjpeg", "yuvj420p", 16, 120, "15", 31, {}),
    "groups.mp4": ("libx264", "yuv420p", 64, 48, "5", 41, {**B_FRAMES, "g": "8"}),
    "fast.avi": ("mpeg4", "yuv420p", 64, 48, "50", 100, {}),
}
TOO_NARROW = ("three.mkv", "tall.avi")
"""Of a width that decord pads and then cannot copy; it has a test of its own."""


@functools.cache
def smooth(width, height, seed, low=0, high=256):
    """[height, width, 3]: blurred noise."""
    coarse = np.random.default_rng(seed).integers(low, high, (6, 6, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BILINEAR))


def write_clip(path, codec, pixels, width, height, rate, frames, options):
    """A scene that moves, so that no two frames are alike."""
    scene = smooth(width * 2, height * 2, frames)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=Fraction(rate), options=options)
        stream.width, stream.height, stream.pix_fmt = width, height, pixels
        for index in range(frames):
            y, x = (index * 3) % height, (index * 5) % width
            shown = np.ascontiguousarray(scene[y : y + height, x : x + width])
            container.mux(stream.encode(av.VideoFrame.from_ndarray(shown, format="rgb24")))
        container.mux(stream.encode())


@pytest.fixture(scope="session")
def clips(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clips")
    for name, form in CLIPS.items():
        write_clip(folder / name, *form)
    return folder


@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
    """A second thread costs more than such a clip."""
    monkeypatch.setenv("TORCHCODEC_NUM_THREADS", "1")
    monkeypatch.setattr(vision_process.logger, "disabled", True)  # a warning for each absurd maximum


def given_only(**values):
    return {key: value for key, value in values.items() if value is not None}


def maybe(strategy):
    return st.none() | strategy


# --- requests


def one_of_many(draw, chance):
    return draw(st.integers(0, chance - 1)) == 0


@st.composite
def sampling(draw, frames, rate, few):
    """fps, nframes and their bounds, mostly such that 0.0.14 can serve them."""
    if few:
        return draw(
            st.fixed_dictionaries({"nframes": st.integers(1, 5)})
            | st.fixed_dictionaries({"fps": st.floats(0.1, 2), "max_frames": st.integers(2, 6)})
        )
    kind = draw(st.sampled_from(["nothing", "fps", "fps", "nframes", "bounds", "both"]))
    ele = {}
    if kind in ("fps", "both"):
        ele["fps"] = draw(st.sampled_from([0.5, 1, 2.0, 4]) | st.floats(0.1, 30))
    if kind == "nframes" or (kind == "both" and one_of_many(draw, 4)):
        ele["nframes"] = draw(st.integers(1, max(2, min(frames + 1, 40))))
    if kind in ("fps", "bounds"):
        ele |= given_only(
            min_frames=draw(maybe(st.integers(1, 12))), max_frames=draw(maybe(st.integers(1, 40)))
        )
    return ele


@st.composite
def frame_sizes(draw, patch):
    """Bounds and sizes; `{}` leaves 0.0.14's defaults, which make these tiny clips large."""
    unit = (2 * patch) ** 2
    kind = draw(st.sampled_from(["default", *["bounds", "given"] * 8]))
    if kind == "default":
        return {}
    if kind == "given":
        side = st.integers(1, 150)
        return {"resized_height": draw(side), "resized_width": draw(side)}
    low = draw(st.integers(1, 12 * unit))
    ele = {"min_pixels": low}
    if draw(st.booleans()):
        ele["max_pixels"] = draw(st.integers(low + 2 * unit, 30 * unit))
    elif one_of_many(draw, 4):
        ele["max_pixels"] = draw(st.integers(1, 12 * unit))
    if draw(st.booleans()):
        ele["total_pixels"] = draw(st.integers(unit, 400 * unit))
    if one_of_many(draw, 12):
        del ele["min_pixels"]
    return ele


@st.composite
def video_cases(draw, names=tuple(CLIPS)):
    patch = draw(st.sampled_from([14, 16]))
    name = draw(st.sampled_from(names))
    _, _, width, height, rate, frames, _ = CLIPS[name]
    ele = draw(frame_sizes(patch))
    large = "resized_height" not in ele and "min_pixels" not in ele
    ele |= draw(sampling(frames, float(Fraction(rate)), large))
    seconds = frames / float(Fraction(rate))
    if draw(st.integers(0, 2)) == 0:
        moment = st.floats(-0.5, seconds + 1) | st.integers(0, int(seconds) + 1)
        early = st.floats(0, seconds / 3)
        ele |= given_only(video_start=draw(maybe(early | moment)), video_end=draw(maybe(moment)))
    if one_of_many(draw, 25):
        ele["fps" if "nframes" not in ele else "nframes"] = None
    reader = draw(st.sampled_from([reader for reader in READERS if readers.installed(reader)]))
    if name in TOO_NARROW:
        reader = "torchcodec"
    form = draw(st.sampled_from([*["path", "path", "file"] * 6, "pathlib", "video_url"]))
    return Case(
        kind="file", name=name, ele=ele, patch=patch, reader=reader, form=form, frames=frames,
        size=(height, width),
    )  # fmt: skip


def hand_over(case, folder):
    path = folder / case.name
    source = {
        "path": {"video": str(path)},
        "file": {"video": f"file://{path}"},
        "pathlib": {"video": path},
        "video_url": {"video_url": {"url": str(path)}},
    }[case.form]
    return {"type": "video", **source, **case.ele}


# --- comparing


def assert_frames_match(ours, theirs):
    assert ours[:2] == theirs[:2] == ("tensor", "torch.float32")
    assert ours[2].shape == theirs[2].shape
    assert np.abs(ours[2].astype(np.int16) - theirs[2]).max(initial=0) <= GREY_LEVELS


def assert_videos_match(ours, theirs):
    """((frames, metadata), frames taken per second)."""
    assert_frames_match(ours[0][0], theirs[0][0])
    assert ours[0][1] == theirs[0][1]
    assert ours[1] == theirs[1]


def assert_value_error(case, theirs, ours):
    assert ours.error and "ValueError" in ours.error.split(), ours


def hidden(theirs, *texts):
    """Whether 0.0.14's reader failed with one of `texts`: its fallback to torchvision shows another error."""
    return theirs.error == "AttributeError" and any(
        text in warning for text in texts for warning in theirs.warnings
    )


def release_bounds(case, frames):
    """0.0.14's (min, max) for a frame of a video of `frames` frames."""
    factor = 2 * case.patch
    low = case.ele.get("min_pixels", 128 * factor**2)
    total = case.ele.get("total_pixels", 128000 * factor**2 * 0.9)
    high = max(min(768 * factor**2, total / frames * 2), int(low * 1.05))
    return low, min(case.ele.get("max_pixels", high), high)


def explicit(case):
    return "resized_height" in case.ele and "resized_width" in case.ele


def question(case, size, frames):
    """The arguments of `smart_resize` for frames of `size` in 0.0.14."""
    factor = 2 * case.patch
    if explicit(case):
        return dict(height=case.ele["resized_height"], width=case.ele["resized_width"], factor=factor)
    low, high = release_bounds(case, frames)
    return dict(height=size[0], width=size[1], factor=factor, min_pixels=low, max_pixels=high)


def leaves_bounds(case, theirs):
    """0.0.14's frames are larger or smaller than its own bounds say."""
    if theirs.error is not None or explicit(case):
        return False
    frames, _, height, width = theirs.value[0][0][2].shape
    low, high = release_bounds(case, frames)
    return not low <= height * width <= high


def assert_in_bounds(case, theirs, ours):
    """Ours is inside the bounds wherever a size is; a maximum that nobody named gives way."""
    frames = theirs.value[0][0][2].shape[0]
    low, high = release_bounds(case, frames)
    unit = (2 * case.patch) ** 2
    least = -(-low // unit) * unit
    if least > high and case.ele.get("max_pixels") is not None:
        assert_value_error(case, theirs, ours)
        return
    assert ours.error is None
    height, width = ours.value[0][0][2].shape[2:]
    assert low <= height * width <= max(high, least) and height % (2 * case.patch) == 0
    assert_same_frames_chosen(ours, theirs)


def assert_same_frames_chosen(ours, theirs):
    assert ours.value[0][1]["frames_indices"] == theirs.value[0][1]["frames_indices"]
    assert ours.value[1] == theirs.value[1]


def scaled_to_nothing(case, theirs):
    """0.0.14 rounded a side down to 0, and torch refuses."""
    return theirs.error in ("RuntimeError", "ValueError") and "greater than 0" in theirs.text


def contradiction(case, theirs):
    return theirs.error == "AssertionError" and "max_pixels of image" in theirs.text


def assert_small_or_refused(case, theirs, ours):
    """A maximum under the minimum: refused where both were named, else obeyed."""
    unit, most = (2 * case.patch) ** 2, case.ele["max_pixels"]
    named = case.ele.get("min_pixels")
    if most < unit or (named is not None and named > most) or case.size_is_refused:
        assert_value_error(case, theirs, ours)
        return
    assert ours.error is None, ours
    height, width = ours.value[0][0][2].shape[2:]
    assert height * width <= most


def clip_of_file(case):
    return case.ele.get("video_start") is not None or case.ele.get("video_end") is not None


def counts_the_file(case, theirs, ours):
    """`total_num_frames` is that of the file that the indices point into; all else is equal."""
    (frames, metadata), rate = theirs.value
    assert metadata["total_num_frames"] < case.frames
    assert_videos_match(ours.value, ((frames, {**metadata, "total_num_frames": case.frames}), rate))


def shown_twice(case, theirs, ours):
    assert ours.error is None and ours.value[0][0][2].shape[0] == 2
    assert ours.value[0][1]["frames_indices"] == [0, 0] and ours.value[0][1]["total_num_frames"] == 1


NAMED = {
    "both fps and nframes": ("Only accept either",),
    "a count that the video does not have": ("nframes should in interval",),
    "a range without two frames": ("Invalid time range",),
}


def with_plain_item(comparison, folder):
    """As 0.0.14 serves the same file under its path, without empty columns."""

    def holds(case, theirs, ours):
        values = {**vars(case), "form": "path", "ele": given_only(**case.ele)}
        easy = Case(**values)
        again = comparison().ours(fetch_video, hand_over(easy, folder), case.patch, True, True)
        assert (again.error is None) == (ours.error is None), (again, ours)
        if ours.error is None:
            assert_videos_match(ours.value, again.value)
        run(comparison(), easy, folder)

    return holds


def videos_table(difference, comparison, folder):
    plain_item = with_plain_item(comparison, folder)
    return [
        difference(
            "a form of source that 0.0.14 does not take",
            "paths and OpenAI's items",
            lambda case, theirs: (
                case.form in ("pathlib", "video_url") and theirs.error in ("AssertionError", "KeyError")
            ),
            plain_item,
        ),
        difference(
            "a key that holds None",
            "rows of a table have all columns; 0.0.14 computes with None",
            lambda case, theirs: theirs.error == "AttributeError" and None in case.ele.values(),
            plain_item,
        ),
        difference(
            "a video of one frame",
            "the model takes frames in pairs; 0.0.14 refuses",
            lambda case, theirs: theirs.error == "AttributeError" and case.frames == 1,
            lambda case, theirs, ours: (
                assert_value_error(case, theirs, ours) if ours.error else shown_twice(case, theirs, ours)
            ),
        ),
        *[
            difference(
                name,
                "0.0.14 falls back on torchvision's reader, which is gone, and shows only that",
                lambda case, theirs, texts=texts: hidden(theirs, *texts),
                assert_value_error,
            )
            for name, texts in NAMED.items()
        ],
        difference(
            "a maximum under the minimum",
            "an AssertionError in 0.0.14; who lowers only the maximum wants small frames",
            contradiction,
            assert_small_or_refused,
        ),
        difference(
            "frames of size 0",
            "0.0.14 rounds a side down to 0",
            scaled_to_nothing,
            lambda case, theirs, ours: assert_nothing_was_zero(case, ours),
        ),
        difference(
            "frames outside of the bounds",
            "0.0.14 leaves the bounds by rounding each side",
            leaves_bounds,
            assert_in_bounds,
        ),
        difference(
            "a part of a video",
            "0.0.14 counts the part's frames beside indices of the whole file",
            lambda case, theirs: (
                theirs.error is None
                and clip_of_file(case)
                and theirs.value[0][1]["total_num_frames"] < case.frames
            ),
            counts_the_file,
        ),
    ]


def assert_nothing_was_zero(case, ours):
    assert ours.error is None or "ValueError" in ours.error.split()
    if ours.error is None:
        assert min(ours.value[0][0][2].shape) > 0


def run(comparison, case, folder):
    case.size_is_refused = max(case.size) / min(case.size) > 200
    os.environ["FORCE_QWENVL_VIDEO_READER"] = case.reader
    comparison.check(
        case, fetch_video, hand_over(case, folder), case.patch, True, True,
        reader=case.reader, equal=assert_videos_match,
    )  # fmt: skip


@pytest.mark.timeout(900)  # thousands of requests, on a machine that may be busy
def test_videos_are_those_of_the_release(compare, difference, clips, monkeypatch):
    monkeypatch.setenv("FORCE_QWENVL_VIDEO_READER", "torchcodec")  # put back when the test ends
    comparison = compare(videos_table(difference, lambda: comparison, clips))

    @thorough
    @given(video_cases())
    def agrees(case):
        run(comparison, case, clips)

    agrees()
    comparison.assert_no_difference_is_dead()


@pytest.mark.skipif(not readers.installed("decord"), reason="decord is not installed")
@pytest.mark.parametrize("name", TOO_NARROW)
def test_a_width_that_decord_pads(reference, clips, monkeypatch, name):
    """0.0.14 fails; ours reads it, or says that decord cannot: no padding, and no process that died."""
    ele = {"video": str(clips / name), "nframes": 2, "resized_height": 56, "resized_width": 56}
    theirs = reference.call("fetch_video", ele, reader="decord")
    assert hidden(theirs, "DECORDArrayCopyFromTo")
    expected = reference.call("fetch_video", ele, reader="torchcodec").value
    monkeypatch.setenv("FORCE_QWENVL_VIDEO_READER", "decord")
    try:
        video = fetch_video(ele)
    except VideoError as error:
        assert "decord" in str(error) and "died" not in str(error)
    else:
        assert np.abs(video.numpy() - expected[2]).max() <= GREY_LEVELS


# --- lists of frames


@st.composite
def frame_lists(draw):
    """Smooth pictures away from black and white: there Pillow and torch resize alike."""
    patch = draw(st.sampled_from([14, 16]))
    unit, count = 4 * patch, draw(st.integers(1, 5))
    side = st.integers(1, 3).map(lambda n: n * unit) | st.integers(20, 200)
    sizes = [(draw(side), draw(side))] * count
    if one_of_many(draw, 15):
        sizes = [(draw(side), draw(side)) for _ in range(count)]
    frames = [
        Image.fromarray(smooth(width, height, index, 60, 200)) for index, (height, width) in enumerate(sizes)
    ]
    ele = draw(frame_sizes(patch))
    if one_of_many(draw, 2) and "resized_height" not in ele:
        ele = {
            "min_pixels": draw(st.integers(1, 4 * unit**2)),
            "max_pixels": draw(st.integers(4, 30)) * unit**2,
        }
    rates = st.sampled_from([0.5, 1.0, 2.0, 3, 29.97])
    ele |= given_only(sample_fps=draw(maybe(rates)), raw_fps=draw(maybe(rates)))
    if one_of_many(draw, 40):
        frames, sizes = [], []
    return Case(kind="list", frames=len(frames), sizes=sizes, pictures=frames, ele=ele, patch=patch,
                size_is_refused=False)  # fmt: skip


def first_resize(case, reference):
    """Whether 0.0.14's first resize, to multiples of twice the factor, leaves the frames alone."""
    factor = 4 * case.patch
    for height, width in set(case.sizes):
        arguments = question(case, (height, width), 2) | {"factor": factor}
        if not explicit(case):
            # as for a picture: a frame's own bounds, and else those of one picture
            bounds = {key: case.ele[key] for key in ("min_pixels", "max_pixels") if key in case.ele}
            arguments = {"height": height, "width": width, "factor": factor, **bounds}
        outcome = reference.call("smart_resize", **arguments)
        if outcome.error or outcome.value != (height, width):
            return True
    return len(set(case.sizes)) > 1


def release_refuses(case):
    return case.ele.get("max_pixels", np.inf) < case.ele.get("min_pixels", 0)


def resized_once(case, theirs, ours):
    """One resize from the first frame's size to the size that the video's bounds ask for."""
    count = case.frames + case.frames % 2
    try:
        size = smart_resize(**question(case, case.sizes[0], count))
    except ValueError:
        # `smart_resize` names no bound that gives way for a video; the frames' own test above looks at that
        if ours.error is None:
            low, high = release_bounds(case, count)
            height, width = ours.value[0][0][2].shape[2:]
            assert height * width <= max(high, low + (2 * case.patch) ** 2)
        return
    assert ours.error is None, ours
    frames = ours.value[0][0][2]
    assert frames.shape == (count, 3, *size)
    for index in range(count):
        picture = case.pictures[min(index, case.frames - 1)].resize(size[::-1], Image.Resampling.BICUBIC)
        distance = np.abs(np.asarray(picture).transpose(2, 0, 1).astype(np.int16) - frames[index])
        assert distance.max() <= GREY_LEVELS
    assert_list_metadata(case, ours)


def assert_list_metadata(case, ours):
    count = case.frames + case.frames % 2
    sample = case.ele.get("sample_fps", 2.0)
    raw = case.ele.get("raw_fps", sample)
    (_, metadata), rate = ours.value
    assert rate == sample and metadata["fps"] == raw and metadata["video_backend"] == "frame_list"
    assert metadata["total_num_frames"] == round(count / sample * raw)
    seconds = [index / raw for index in metadata["frames_indices"]]
    assert seconds == pytest.approx([index / sample for index in range(count)], abs=2e-3)


def assert_lists_match(ours, theirs):
    """0.0.14's metadata has no `video_backend` here, and its total is not rounded."""
    (frames, metadata), rate = theirs
    total = round(metadata["total_num_frames"])
    named = {**metadata, "total_num_frames": total, "video_backend": "frame_list"}
    assert_videos_match(ours, ((frames, named), rate))


def lists_table(difference, reference):
    return [
        difference(
            "contradicting bounds",
            "an assertion is no error message for a caller's input",
            lambda case, theirs: theirs.error == "AssertionError" and release_refuses(case),
            assert_value_error,
        ),
        difference(
            "a maximum under the default minimum",
            "an AssertionError in 0.0.14; who lowers only the maximum wants small frames",
            lambda case, theirs: contradiction(case, theirs) and "min_pixels" not in case.ele,
            assert_small_or_refused,
        ),
        difference(
            "frames that 0.0.14 resizes twice",
            "first to multiples of twice the factor: 361 rows became 384 instead of 352",
            lambda case, theirs: bool(case.frames) and first_resize(case, reference),
            resized_once,
        ),
        difference(
            "frames outside of the bounds",
            "0.0.14 leaves the bounds by rounding each side",
            lambda case, theirs: scaled_to_nothing(case, theirs) or leaves_bounds(case, theirs),
            lambda case, theirs, ours: (
                assert_nothing_was_zero(case, ours)
                if theirs.error
                else assert_list_in_bounds(case, theirs, ours)
            ),
        ),
        difference(
            "a list of frames at another rate than its source",
            "0.0.14 numbers the frames 0, 1, 2 at the rate of the source",
            lambda case, theirs: (
                theirs.error is None and theirs.value[0][1]["fps"] != case.ele.get("sample_fps", 2.0)
            ),
            lambda case, theirs, ours: (
                assert_frames_match(ours.value[0][0], theirs.value[0][0]), assert_list_metadata(case, ours),
            ),
        ),
    ]  # fmt: skip


def assert_list_in_bounds(case, theirs, ours):
    low, high = release_bounds(case, case.frames + case.frames % 2)
    unit = (2 * case.patch) ** 2
    least = -(-low // unit) * unit
    if least > high and case.ele.get("max_pixels") is not None:
        assert_value_error(case, theirs, ours)
        return
    height, width = ours.value[0][0][2].shape[2:]
    assert low <= height * width <= max(high, least)


@pytest.mark.timeout(900)  # thousands of requests, on a machine that may be busy
def test_lists_of_frames_are_those_of_the_release(compare, reference, difference):
    comparison = compare(lists_table(difference, reference))

    @thorough
    @given(frame_lists())
    def agrees(case):
        ele = {"type": "video", "video": case.pictures, **case.ele}
        comparison.check(case, fetch_video, ele, case.patch, True, True, equal=assert_lists_match)

    agrees()
    comparison.assert_no_difference_is_dead()


# --- whole messages


# Of some length but quickly read, and of a width that decord can copy.
WHOLE_CLIPS = [
    name for name, (_, _, width, _, _, frames, _) in CLIPS.items() if 20 < frames <= 60 and width % 32 == 0
]


@st.composite
def message_items(draw):
    """Items whose sizes are given, so that what is compared is how messages are taken apart."""
    side = st.sampled_from([20, 57, 61, 84, 112])
    sized = {"resized_height": draw(side), "resized_width": draw(side)}
    kind = draw(st.sampled_from([*["text", "image", "image", "video", "list"] * 3, "new"]))
    if kind == "text":
        return {"type": "text", "text": "an image and a video"}
    if kind == "image":
        image = Image.fromarray(smooth(draw(side), draw(side), draw(st.integers(0, 3))))
        return {"type": "image", draw(st.sampled_from(["image", "image_url"])): image, **sized}
    if kind == "list":
        # of the very size that is asked for: 0.0.14 resizes other lists twice
        height, width = draw(st.sampled_from([(112, 112), (224, 112)]))
        frames = [Image.fromarray(smooth(width, height, index)) for index in range(draw(st.integers(1, 4)))]
        return {"type": "video", "video": frames, "resized_height": height, "resized_width": width}
    name = draw(st.sampled_from(WHOLE_CLIPS))
    key = "video" if kind == "video" else "video_url"
    ele = {"type": "video", key: name, **sized, "nframes": draw(st.integers(1, 2)) * 2}
    if one_of_many(draw, 4):
        ele["video_start"] = 0.1
    return ele


@st.composite
def message_cases(draw):
    contents = st.lists(message_items(), max_size=2) | st.just("a text")
    message = st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant"]), "content": contents})
    conversation = st.lists(message, min_size=1, max_size=2)
    return Case(
        conversations=draw(conversation | st.lists(conversation, min_size=1, max_size=2)),
        return_video_kwargs=draw(st.booleans()),
        return_video_metadata=draw(st.booleans()),
        reader=draw(st.sampled_from([reader for reader in READERS if readers.installed(reader)])),
    )


def items_of(conversations):
    batch = [conversations] if isinstance(conversations[0], dict) else conversations
    messages = [message for conversation in batch for message in conversation]
    return [ele for message in messages if isinstance(message["content"], list) for ele in message["content"]]


def with_paths(conversations, folder):
    """Names of clips become paths."""
    if isinstance(conversations, list):
        return [with_paths(item, folder) for item in conversations]
    if not isinstance(conversations, dict):
        return conversations
    return {
        key: str(folder / value) if key in ("video", "video_url") and isinstance(value, str)
        else with_paths(value, folder) if key == "content" else value
        for key, value in conversations.items()
    }  # fmt: skip


def assert_messages_match(case, ours, theirs):
    assert len(ours) == len(theirs) == 2 + case.return_video_kwargs
    assert (ours[0] is None) == (theirs[0] is None) and (ours[1] is None) == (theirs[1] is None)
    for one, other in zip(ours[0] or [], theirs[0] or [], strict=True):
        assert one[:2] == other[:2] and np.array_equal(one[2], other[2])
    videos = [ele for ele in items_of(case.conversations) if "video" in ele]
    for ele, one, other in zip(videos, ours[1] or [], theirs[1] or [], strict=True):
        if not case.return_video_metadata:
            assert_frames_match(one, other)
            continue
        assert_frames_match(one[0], other[0])
        expected = other[1]
        if isinstance(ele["video"], list):
            expected = {**expected, "video_backend": "frame_list"}
        elif "video_start" in ele:
            expected = {**expected, "total_num_frames": CLIPS[ele["video"]][5]}
        assert one[1] == expected
    assert ours[2:] == theirs[2:]


def renamed(conversations):
    """`video_url` as 0.0.14 knows it: `video`."""
    if isinstance(conversations, list):
        return [renamed(item) for item in conversations]
    if not isinstance(conversations, dict):
        return conversations
    return {
        "video" if key == "video_url" else key: renamed(value) if key == "content" else value
        for key, value in conversations.items()
    }


def messages_table(difference, compare_again):
    return [
        difference(
            "video_url",
            "0.0.14 stops at such an item",
            lambda case, theirs: (
                theirs.error == "ValueError"
                and any("video_url" in ele for ele in items_of(case.conversations))
            ),
            lambda case, theirs, ours: compare_again(
                Case(**{**vars(case), "conversations": renamed(case.conversations)}), ours
            ),
        ),
    ]


@pytest.mark.timeout(900)  # thousands of requests, on a machine that may be busy
def test_messages_are_those_of_the_release(compare, difference, clips, monkeypatch):
    """What ours does in other words for a part of a video and a list is in the tables above."""
    monkeypatch.setenv("FORCE_QWENVL_VIDEO_READER", "torchcodec")  # put back when the test ends

    def check(case, earlier=None):
        os.environ["FORCE_QWENVL_VIDEO_READER"] = case.reader

        def equal(ours, theirs):
            assert_messages_match(case, ours, theirs)
            if earlier is not None:
                assert_messages_match(case, earlier.value, theirs)

        comparison.check(
            case, process_vision_info, with_paths(case.conversations, clips), case.return_video_kwargs,
            case.return_video_metadata, reader=case.reader, equal=equal,
        )  # fmt: skip

    comparison = compare(messages_table(difference, check))

    @thorough
    @given(message_cases())
    def agrees(case):
        check(case)

    agrees()
    comparison.assert_no_difference_is_dead()
