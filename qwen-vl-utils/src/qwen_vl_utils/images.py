"""Pictures: any source to an upright RGB `PIL.Image`, on white where it was transparent.

source --locate--> file or bytes --opened--> header, checked --> pixels --upright, to_rgb--> RGB
"""

import io
import logging
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, Any

from PIL import Image, ImageOps, PngImagePlugin, UnidentifiedImageError

from . import media
from .errors import ImageError, MediaError, MediaRefused
from .policy import PERMISSIVE, Deadline, MediaPolicy

ORIENTATION = 0x0112
"""The EXIF tag that says how the camera was held; 1 is upright."""
SIDEWAYS = (5, 6, 7, 8)
"""Orientations that swap height and width."""
STEPS = frozenset({"APNG", "GIF", "PNG", "WEBP"})
"""Formats whose further pictures are an animation (an MPO's are previews, a TIFF's are pages)."""

# What Pillow's decoders raise for broken files.
DECODE_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    EOFError,
    IndexError,
    KeyError,
    OverflowError,
    NotImplementedError,
    MemoryError,
    AssertionError,  # a palette that is missing
    RuntimeError,  # of the AVIF plugin
    struct.error,
    zlib.error,
)

logger = logging.getLogger(__name__)


def open_image(
    source: Any,
    policy: MediaPolicy = PERMISSIVE,
    deadline: Deadline | None = None,
    name: str | None = None,
) -> Image.Image:
    """The picture behind `source` in RGB, upright.

    `source` is a PIL.Image, a path, a `file://`, http(s) or data URL, bytes, a file object, or an array
    (`array_image`); errors call it `name`. Raises ImageError (bytes that are no picture), MediaNotFound,
    MediaRefused, MediaTimeout, MediaError.
    """
    with opened(source, policy, deadline, name) as image:
        image = upright(image)
        if image.mode == "RGB" and not image.has_transparency_data:
            image.load()
            return image  # to_rgb would copy it
        return to_rgb(image)


def image_size(
    source: Any,
    policy: MediaPolicy = PERMISSIVE,
    deadline: Deadline | None = None,
    name: str | None = None,
) -> tuple[int, int]:
    """(height, width) of the upright picture behind `source`, from its header; as `open_image` otherwise."""
    with opened(source, policy, deadline, name) as image:
        width, height = image.size
        return (width, height) if _orientation(image) in SIDEWAYS else (height, width)


@contextmanager
def opened(
    source: Any, policy: MediaPolicy, deadline: Deadline | None, name: str | None
) -> Iterator[Image.Image]:
    """The picture as Pillow opens it, header read, allowed by `policy`, pixels not decoded yet.

    Everything that Pillow can't read, here or in the body of the `with`, is an ImageError.
    """
    name = name or media.describe(source)
    if isinstance(source, Image.Image):
        policy.check_size(*source.size, name)
        yield source
        return
    if is_array(source):
        yield array_image(source, policy)
        return
    located = media.locate(source, policy, deadline)
    try:
        # By its name Pillow would map a TIFF into memory, and get one that is turned wrong.
        stream = io.BytesIO(located) if isinstance(located, bytes) else located.open("rb")
        # An MPO is opened as the JPEG that it begins with.
        formats = policy.formats and [name for name in policy.formats if name != "MPO"]
        with stream, Image.open(stream, formats=formats) as image:
            policy.check_format(image.format, name)
            policy.check_size(*image.size, name)
            if image.format in STEPS and getattr(image, "is_animated", False):
                logger.warning(
                    "%s is animated; only its first frame is used (pass it as a video for all)", name
                )
            yield image
    except UnidentifiedImageError as error:
        known = (
            "that Pillow knows" if policy.formats is None else f"of the policy: {', '.join(policy.formats)}"
        )
        raise ImageError(
            f"{name}: not a readable picture: its bytes are in none of the formats {known}"
        ) from error
    except MediaError:
        raise
    except Image.DecompressionBombError as error:
        raise MediaRefused(f"{name}: more pixels than Pillow opens: {error}") from error
    except DECODE_ERRORS as error:
        raise ImageError(f"{name}: not a readable picture: {str(error) or type(error).__name__}") from error


def upright(image: Image.Image) -> Image.Image:
    """`image` turned as its EXIF orientation says; the same object where there is nothing to turn."""
    if image.getexif().get(ORIENTATION, 1) == 1:
        return image
    return ImageOps.exif_transpose(image)


def _orientation(image: Image.Image) -> int:
    # Pillow would decode a PNG to find an orientation behind its pixels, where hardly any has one.
    if isinstance(image, PngImagePlugin.PngImageFile) and "exif" not in image.info:
        assert image.fp is not None
        if not _has_chunk(image.fp, (b"eXIf", b"tEXt", b"zTXt", b"iTXt")):
            return 1
    return image.getexif().get(ORIENTATION, 1)


def _has_chunk(file: IO[bytes], kinds: tuple[bytes, ...]) -> bool:
    """Whether a PNG has a chunk of one of the kinds, from the lengths of its chunks."""
    position = file.tell()
    try:
        file.seek(8)
        while len(head := file.read(8)) == 8:
            length, kind = struct.unpack("!I4s", head)
            if kind in kinds:
                return True
            file.seek(length + 4, io.SEEK_CUR)
        return False
    finally:
        file.seek(position)


def to_rgb(image: Image.Image) -> Image.Image:
    """`image` in RGB: transparency on white, 16 bits scaled to 8, everything else converted."""
    if image.mode.startswith("I;16") or image.mode == "I":
        return _from_16_bit(image)
    if image.has_transparency_data:
        image = (image.convert("LA") if image.mode == "La" else image).convert("RGBA")
        white = Image.new("RGB", image.size, (255, 255, 255))
        white.paste(image, mask=image.getchannel("A"))
        return white
    return image.convert("RGB")


def _from_16_bit(image: Image.Image) -> Image.Image:
    import numpy as np

    values = np.asarray(image).astype(np.int64)
    if image.mode == "I" and values.size and values.min() >= 0 and values.max() <= 255:
        return image.convert("RGB")  # 8-bit values in a 32-bit picture
    scaled = (np.clip(values, 0, 65535) * 255 + 32767) // 65535
    return Image.fromarray(scaled.astype(np.uint8)).convert("RGB")


def is_picture(source: Any) -> bool:
    """Whether `source` is pixels already: a PIL.Image or an array."""
    return isinstance(source, Image.Image) or is_array(source)


def is_array(source: Any) -> bool:
    """Whether `source` is an array of numpy, torch or the like."""
    return hasattr(source, "shape") and hasattr(source, "dtype")


def array_image(array: Any, policy: MediaPolicy = PERMISSIVE) -> Image.Image:
    """The picture in a numpy or torch array.

    Axes: [h, w] or [h, w, 1 | 3 | 4], or channels first; where both would do, numpy's are last and torch's
    first.
    Values: uint8 in 0..255, uint16 in 0..65535 (scaled), bool, or floating point in 0..1.
    Raises ImageError for everything else.
    """
    import numpy as np

    torch_like = not isinstance(array, np.ndarray)
    values = array.detach().cpu() if hasattr(array, "detach") else array
    values = np.asarray(values.float() if str(values.dtype) == "torch.bfloat16" else values)
    name, channels = media.describe(array), (1, 3, 4)
    if values.ndim == 2:
        values = values[:, :, None]
    first, last = (values.ndim == 3 and values.shape[axis] in channels for axis in (0, 2))
    if (not first and not last) or 0 in values.shape:
        raise ImageError(f"{name}: a picture has the axes [h, w], [h, w, 1 | 3 | 4] or [1 | 3 | 4, h, w]")
    if first and (torch_like or not last):
        values = values.transpose(1, 2, 0)
    policy.check_size(values.shape[1], values.shape[0], name)
    levels = _levels(values, name)
    return Image.fromarray(levels[:, :, 0] if levels.shape[2] == 1 else levels)


def _levels(values: Any, name: str) -> Any:
    """An array's values as uint8 levels, contiguous."""
    import numpy as np

    kind = values.dtype
    if kind == np.uint16:
        values = (values.astype(np.uint32) * 255 + 32767) // 65535
    elif kind == np.bool_:
        values = values * 255
    elif np.issubdtype(kind, np.floating):
        low, high = values.min(), values.max()
        if not (low >= 0 and high <= 1):
            raise ImageError(
                f"{name}: floating point pixels must lie in 0..1, found {low:g} to {high:g}; divide them by "
                "255, or convert them to uint8"
            )
        values = np.rint(values * 255)
    elif kind != np.uint8:
        raise ImageError(f"{name}: pixels of the type {kind}; convert them to uint8")
    return np.ascontiguousarray(values, np.uint8)
