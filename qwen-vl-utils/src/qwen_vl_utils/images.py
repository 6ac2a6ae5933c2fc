"""Pictures: any source to an upright RGB `PIL.Image`, on white where it was transparent."""

import io
import struct
import zlib
from typing import Any

from PIL import Image, ImageOps

from .errors import ImageError
from .media import describe, locate

ORIENTATION = 0x0112
"""The EXIF tag that says how the camera was held; 1 is upright."""

# What Pillow's decoders raise for broken files.
DECODE_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)


def open_image(source: Any) -> Image.Image:
    """The picture behind `source` (PIL.Image, path, `file://`, http(s), data URL, bytes) in RGB, upright.

    Raises ImageError (bytes that are no picture), MediaNotFound, MediaError.
    """
    if isinstance(source, Image.Image):
        return to_rgb(upright(source))
    located = locate(source)
    try:
        with Image.open(io.BytesIO(located) if isinstance(located, bytes) else located) as image:
            return to_rgb(upright(image))
    except DECODE_ERRORS as error:
        raise ImageError(f"{describe(source)}: not a readable picture: {error}") from error


def upright(image: Image.Image) -> Image.Image:
    """`image` turned as its EXIF orientation says; the same object where there is nothing to turn."""
    if image.getexif().get(ORIENTATION, 1) == 1:
        return image
    return ImageOps.exif_transpose(image)


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
