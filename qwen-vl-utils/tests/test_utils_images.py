"""Pictures from every form of source come out the same, upright, and on white where transparent."""

import base64
import io
import pickle
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import numpy as np
import pytest
import torch
from PIL import Image

from qwen_vl_utils import (
    ImageError,
    MediaError,
    MediaNotFound,
    extract_vision_info,
    fetch_image,
    fetch_video,
    process_vision_info,
)
from qwen_vl_utils.images import open_image
from qwen_vl_utils.vision_process import to_rgb


@pytest.fixture
def picture(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (90, 130, 3), dtype=np.uint8)
    path = tmp_path / "a b.png"
    Image.fromarray(pixels).save(path)
    return path


@pytest.fixture
def server(picture):
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            found = self.path == "/a.png"
            self.send_response(200 if found else 404)
            self.end_headers()
            if found:
                self.wfile.write(picture.read_bytes())

        def log_message(self, *_):
            pass

    httpd = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=httpd.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{httpd.server_port}"
    httpd.shutdown()
    thread.join()
    httpd.server_close()


def test_every_form_of_source_gives_the_same_picture(picture, server):
    encoded = base64.b64encode(picture.read_bytes()).decode()
    sources = [
        Image.open(picture),
        str(picture),
        picture,
        picture.read_bytes(),
        bytearray(picture.read_bytes()),
        io.BytesIO(picture.read_bytes()),
        f"file://{picture}",
        picture.as_uri(),  # file:///.../a%20b.png
        f"file://localhost{picture}",
        f"data:image/png;base64,{encoded}",
        f"data:image/png;base64,{encoded.replace('+', '%2B')}",
        f"{server}/a.png",
        {"bytes": picture.read_bytes(), "path": None},
    ]
    items = [{"image": source} for source in sources]
    items += [{"image_url": str(picture)}, {"type": "image_url", "image_url": {"url": f"{server}/a.png"}}]
    expected = Image.open(picture).resize((140, 84), Image.Resampling.BICUBIC)
    for item in items:
        image = fetch_image(item)
        assert image.mode == "RGB" and image.size == expected.size
        assert image.tobytes() == expected.tobytes(), item


def test_a_file_url_with_a_literal_percent_sign_still_opens(tmp_path):
    path = tmp_path / "100%20.png"
    Image.new("RGB", (28, 28), (1, 2, 3)).save(path)
    assert fetch_image({"image": f"file://{path}"}).getpixel((0, 0)) == (1, 2, 3)


@pytest.mark.parametrize(
    ("item", "expected"),
    [
        ({}, (140, 84)),
        ({"min_pixels": 200 * 200}, (252, 168)),
        ({"max_pixels": 60 * 60}, (56, 56)),
        ({"resized_height": 30, "resized_width": 300}, (308, 28)),
    ],
)
def test_the_sizes_an_item_asks_for(picture, item, expected):
    assert fetch_image({"image": picture, **item}).size == expected


def test_sides_are_multiples_of_the_patch_size_times_two(picture):
    assert fetch_image({"image": picture}, image_patch_size=16).size == (128, 96)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(tmp_path, orientation):
    """One corner is marked; the tag says where that corner belongs."""
    upright = Image.new("RGB", (56, 84), (0, 0, 0))
    upright.paste((255, 0, 0), (0, 0, 28, 28))
    undo = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    stored = upright if orientation == 1 else upright.transpose(undo[orientation])
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(tmp_path / "turned.png", exif=exif)
    for source in (tmp_path / "turned.png", Image.open(tmp_path / "turned.png")):
        assert fetch_image({"image": source}).tobytes() == upright.tobytes()


def transparent(mode: str) -> Image.Image:
    """Left half opaque mid-grey, right half fully transparent black."""
    image = Image.new("RGBA", (56, 56), (0, 0, 0, 0))
    image.paste((100, 100, 100, 255), (0, 0, 28, 56))
    if mode == "P":
        palette = Image.new("P", (56, 56), 0)
        palette.putpalette([0, 0, 0, 100, 100, 100])
        palette.paste(1, (0, 0, 28, 56))
        palette.info["transparency"] = 0
        return palette
    return image.convert(mode)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "PA", "RGBa", "La"])
def test_transparency_is_white(mode, tmp_path):
    """0.0.14 painted the transparent part of P and LA black."""
    image = transparent(mode) if mode != "La" else transparent("LA").convert("La")
    rgb = to_rgb(image)
    assert rgb.getpixel((10, 10)) == (100, 100, 100)
    assert rgb.getpixel((45, 10)) == (255, 255, 255)
    if mode in ("RGBA", "LA", "P"):
        image.save(tmp_path / "t.png")
        assert fetch_image({"image": tmp_path / "t.png"}).getpixel((45, 10)) == (255, 255, 255)


def test_16_bit_pictures_keep_their_greys(tmp_path):
    """0.0.14 clipped everything above 255 to white."""
    ramp = np.tile(np.linspace(0, 65535, 56).astype(np.uint16), (56, 1))
    Image.fromarray(ramp).save(tmp_path / "ramp.png")
    grey = np.asarray(fetch_image({"image": tmp_path / "ramp.png"}))
    assert np.abs(grey[0, :, 0].astype(int) - np.linspace(0, 255, 56)).max() <= 1
    assert np.array_equal(grey[..., 0], grey[..., 2])
    eight = Image.fromarray(np.full((28, 28), 77, np.int32))
    assert to_rgb(eight).getpixel((0, 0)) == (77, 77, 77)


@pytest.mark.parametrize("mode", ["1", "L", "CMYK", "YCbCr"])
def test_other_modes_are_converted(mode):
    image = Image.new("RGB", (28, 28), (255, 255, 255)).convert(mode)
    assert to_rgb(image).getpixel((3, 3)) == (255, 255, 255)


def test_the_callers_picture_is_left_alone(picture):
    image = Image.open(picture).convert("RGBA")
    before = image.tobytes()
    assert fetch_image({"image": image}) is not image
    assert image.mode == "RGBA" and image.tobytes() == before


@pytest.mark.parametrize(
    ("source", "kind", "message"),
    [
        ("/no/such/file.png", MediaNotFound, "/no/such/file.png does not exist"),
        ("/tmp", MediaNotFound, "/tmp is not a file"),
        (b"not a picture", ImageError, "<13 bytes>: not a readable picture"),
        ("data:image/png;base64,AAAA", ImageError, "data:image/png;base64,AAAA.* not a readable picture"),
        ("data:image/png;base64,A", MediaError, "broken base64"),
        ("data:image/png;base64", MediaError, "needs a comma"),
        (17, MediaError, "unrecognised source of type int"),
        ({"id": 3}, MediaError, r"a mapping with the keys \['id'\]"),
        (None, MediaError, "has no picture or video"),
    ],
)
def test_what_cannot_be_had_is_one_clear_error(source, kind, message):
    with pytest.raises(kind, match=message):
        fetch_image({"type": "image", "image": source})


def test_a_missing_file_is_a_file_not_found_error_too():
    with pytest.raises(FileNotFoundError):
        fetch_image({"image": "/no/such/file.png"})


def test_a_truncated_file_is_named(picture, tmp_path):
    (tmp_path / "cut.png").write_bytes(picture.read_bytes()[:2000])
    with pytest.raises(ImageError, match=r"cut\.png: not a readable picture"):
        fetch_image({"image": tmp_path / "cut.png"})


def test_a_server_error_is_named(server):
    with pytest.raises(MediaError, match=r"/b\.png: 404"):
        fetch_image({"image": f"{server}/b.png"})


def test_a_size_that_cannot_be_names_the_file(tmp_path):
    """One picture of ratio 227 ended a training run without saying which."""
    Image.new("RGB", (2270, 10)).save(tmp_path / "line.png")
    with pytest.raises(
        MediaError, match=r"line\.png: absolute aspect ratio must be smaller than 200, got 227"
    ):
        fetch_image({"image": tmp_path / "line.png"})


def test_items_are_found_in_order_in_a_conversation_and_in_a_batch():
    a, b, c = (
        {"type": "image", "image": "a"},
        {"video": "b"},
        {"type": "image_url", "image_url": {"url": "c"}},
    )
    table = {"type": "text", "text": "hello", "image": None, "video": None}
    first = [
        {"role": "system", "content": "hi"},
        {"role": "user", "content": [a, {"type": "text", "text": "x"}, table, b]},
        {"role": "assistant", "content": None},
    ]
    second = [{"role": "user", "content": [c, {"type": "video_url", "video_url": {"url": "d"}}]}]
    assert extract_vision_info(first) == [a, b]
    assert [item.get("type") for item in extract_vision_info([first, second])] == [
        "image", None, "image_url", "video_url",
    ]  # fmt: skip
    assert extract_vision_info([]) == []


def test_process_vision_info_without_media():
    messages = [{"role": "user", "content": "hi"}]
    assert process_vision_info(messages) == (None, None)
    assert process_vision_info(messages, return_video_kwargs=True) == (
        None, None, {"do_sample_frames": False, "fps": []},
    )  # fmt: skip


def test_process_vision_info_takes_pictures_of_a_batch(picture):
    conversation = [{"role": "user", "content": [{"type": "image", "image": picture}]}]
    images, videos = process_vision_info([conversation, conversation], image_patch_size=16)
    assert videos is None and [image.size for image in images] == [(128, 96)] * 2


def test_an_empty_item_is_an_error_not_a_dropped_picture():
    with pytest.raises(MediaError, match="an item of type 'image' has no picture or video"):
        process_vision_info([{"role": "user", "content": [{"type": "image", "image": None}]}])


def test_errors_travel_between_processes():
    error = pickle.loads(pickle.dumps(ImageError("a.png: broken")))
    assert isinstance(error, ImageError) and str(error) == "a.png: broken"
    assert isinstance(pickle.loads(pickle.dumps(MediaNotFound("x does not exist"))), MediaNotFound)


def test_a_picture_from_a_stream_of_a_jpeg(tmp_path):
    stream = io.BytesIO()
    Image.new("CMYK", (28, 28), (0, 0, 0, 0)).save(stream, "JPEG")
    assert fetch_image({"image": stream.getvalue()}).getpixel((5, 5)) == (255, 255, 255)


# --- arrays, and formats with more than one picture


def levels(height=40, width=60):
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.mark.parametrize(
    "form",
    [
        lambda a: a,
        lambda a: a.transpose(2, 0, 1),
        lambda a: torch.from_numpy(a),
        lambda a: torch.from_numpy(a).permute(2, 0, 1),
        lambda a: torch.from_numpy(a).float() / 255,
        lambda a: (a / 255.0).astype(np.float64),
        lambda a: a.astype(np.uint16) * 257,
    ],
    ids=["numpy", "numpy, channels first", "torch", "torch, channels first", "0..1", "float64", "16 bits"],
)
def test_every_array_gives_the_same_picture(form):
    array = levels()
    expected = fetch_image({"image": Image.fromarray(array)})
    assert fetch_image({"image": form(array)}).tobytes() == expected.tobytes()


def test_arrays_of_one_and_four_channels():
    grey, alpha = levels()[:, :, 0], np.dstack([levels(), np.zeros((40, 60), np.uint8)])
    assert fetch_image({"image": grey}).tobytes() == fetch_image({"image": grey[:, :, None]}).tobytes()
    assert fetch_image({"image": grey > 127}).getextrema() == ((0, 255),) * 3
    assert fetch_image({"image": alpha}).getextrema() == ((255, 255),) * 3


def test_an_array_of_three_by_three_by_three_is_read_by_its_librarys_custom():
    array = np.arange(27, dtype=np.uint8).reshape(3, 3, 3)
    assert open_image(array).getpixel((1, 0)) == (3, 4, 5)
    assert open_image(torch.from_numpy(array)).getpixel((1, 0)) == (1, 10, 19)


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((5, 5, 2), np.uint8), "a picture has the axes"),
        (np.zeros((2, 5, 5, 3), np.uint8), "a picture has the axes"),
        (np.zeros((0, 5, 3), np.uint8), "a picture has the axes"),
        (np.zeros((5, 5, 3), np.int64), "pixels of the type int64; convert them to uint8"),
        (np.full((5, 5, 3), 255.0), r"must lie in 0\.\.1, found 255 to 255; divide them by 255"),
        (np.full((5, 5, 3), np.nan), r"must lie in 0\.\.1"),
    ],
)
def test_arrays_that_are_no_picture(array, message):
    with pytest.raises(ImageError, match=message):
        fetch_image({"image": array})


def test_a_video_of_arrays():
    frames = np.stack([levels() for _ in range(4)])
    expected = fetch_video({"video": [Image.fromarray(frame) for frame in frames]})
    for video in (frames, torch.from_numpy(frames).permute(0, 3, 1, 2), list(frames)):
        assert torch.equal(fetch_video({"video": video}), expected)
    with pytest.raises(MediaError, match="an array of frames has four axes"):
        fetch_video({"video": frames[0]})


@pytest.mark.parametrize("format", ["GIF", "PNG", "WEBP"])
def test_the_first_frame_of_an_animation_is_taken_and_said_so(tmp_path, format, caplog):
    path = tmp_path / f"moving.{format.lower()}"
    frames = [Image.new("RGB", (56, 56), colour) for colour in ("red", "blue")]
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=100, lossless=True)
    assert fetch_image({"image": str(path)}).getpixel((20, 20)) == pytest.approx((255, 0, 0), abs=2)
    assert "moving" in caplog.text and "only its first frame is used" in caplog.text


def test_cmyk_is_converted_as_pillow_does(tmp_path):
    path = tmp_path / "print.jpg"
    Image.effect_noise((56, 56), 60).convert("CMYK").save(path)
    with Image.open(path) as image:
        assert fetch_image({"image": str(path)}).tobytes() == image.convert("RGB").resize((56, 56)).tobytes()


def test_the_examples_of_openai():
    array = levels(56, 56)
    stream = io.BytesIO()
    Image.fromarray(array).save(stream, "PNG")
    url = "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode()
    item = {"type": "image_url", "image_url": {"url": url, "detail": "high"}}
    images, _ = process_vision_info([{"role": "user", "content": [item]}])
    assert np.array_equal(np.asarray(images[0]), array)


@pytest.mark.parametrize(
    ("detail", "more", "most"),
    [
        (None, {"max_pixels": 1000 * 1000}, 1000 * 1000),
        ("auto", {}, 2016 * 1988),
        ("high", {}, 2016 * 1988),
        ("low", {}, 512 * 512),
        ("low", {"max_pixels": 700 * 700}, 700 * 700),
    ],
)
def test_low_detail_is_a_small_picture(detail, more, most):
    source = {"url": Image.new("RGB", (2000, 2000)), "detail": detail}
    width, height = fetch_image({"image_url": source, **more}).size
    assert most * 0.9 < width * height <= most


def test_an_unknown_detail_is_an_error():
    source = {"url": Image.new("RGB", (60, 60)), "detail": "lo"}
    with pytest.raises(MediaError, match="detail='lo' is unknown"):
        fetch_image({"image_url": source})
