"""What fuzz_media.py feeds: small valid pictures and videos, and the ways in which they are broken.

    make_seeds --> picture/NAME.EXT, video/NAME.EXT --mutate--> bytes that are nearly right

Random damage alone hardly passes a decoder's first checks. So half of the mutations know the containers: they
walk the parts of a file (PNG chunks, JPEG segments, RIFF chunks, MP4 atoms, EBML elements, TIFF entries),
change a part's size or a word in it, drop, repeat or exchange parts, and put absurd numbers where the width
and height stand. PNG's checksums are then made right again.
"""

import io
import random
import struct
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import av
import numpy as np
from PIL import Image

WIDTH, HEIGHT = 62, 46  # rare numbers: where they stand in a file, they are likely the size
WORDS = {
    1: (0, 1, 2, 0x7F, 0x80, 0xFE, 0xFF),
    2: (0, 1, 2, 0xFF, 0x100, 0x4000, 0x7FFF, 0x8000, 0xFFFE, 0xFFFF),
    4: (0, 1, 2, 0xFFFF, 0x10000, 0x4000, 100_000, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFE, 0xFFFFFFFF),
}
ADAM7 = ((0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1))
"""First row and column of each pass, and its steps."""
LARGEST = 2**20
"""Bytes of an input; repeating blocks must not make them ever larger."""


# ---- seeds


def photo(mode: str = "RGB", step: int = 0) -> Image.Image:
    """A smooth picture with some noise; `step` moves it."""
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    grain = np.random.default_rng(step).integers(0, 24, (HEIGHT, WIDTH))
    planes = [(x * 3 + step * 7 + grain) % 256, (y * 5 + grain) % 256, (x * y // 11 + step) % 256]
    image = Image.fromarray(np.stack(planes, axis=-1).astype(np.uint8))
    if mode in ("RGBA", "LA"):
        image.putalpha(Image.fromarray((x * 4 % 256).astype(np.uint8)))
    if mode == "I;16":
        return Image.fromarray((x * 1000 + y).astype(np.uint16))
    return image.convert(mode)


def saved(image: Image.Image, kind: str, **options: object) -> bytes:
    target = io.BytesIO()
    image.save(target, kind, **options)
    return target.getvalue()


def png_chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def handmade_png(depth: int, interlaced: bool) -> bytes:
    """An RGB picture with 8 or 16 bits, plain or Adam7: what Pillow reads and can't write."""
    pixels = np.asarray(photo()).astype(np.uint16) * (257 if depth == 16 else 1)
    pixels = pixels.astype(">u2" if depth == 16 else np.uint8)
    passes = ADAM7 if interlaced else ((0, 0, 1, 1),)
    rows = [b"\0" + row.tobytes() for y, x, dy, dx in passes for row in pixels[y::dy, x::dx]]
    header = struct.pack(">IIBBBBB", WIDTH, HEIGHT, depth, 2, 0, 0, int(interlaced))
    chunks = png_chunk(b"IHDR", header) + png_chunk(b"IDAT", zlib.compress(b"".join(rows)))
    return b"\x89PNG\r\n\x1a\n" + chunks + png_chunk(b"IEND", b"")


def picture_seeds() -> Iterator[tuple[str, bytes]]:
    exif = Image.Exif()
    exif[0x0112] = 6
    exif[0x010E] = "a description"
    steps = [photo(step=step) for step in range(4)]
    several = {"save_all": True, "append_images": steps[1:], "duration": 40}
    yield "jpeg-baseline.jpg", saved(photo(), "JPEG")
    yield "jpeg-restart.jpg", saved(photo(), "JPEG", restart_marker_blocks=2)
    yield "jpeg-progressive.jpg", saved(photo(), "JPEG", progressive=True)
    yield "jpeg-grey.jpg", saved(photo("L"), "JPEG")
    yield "jpeg-cmyk.jpg", saved(photo("CMYK"), "JPEG")
    yield "jpeg-exif.jpg", saved(photo(), "JPEG", exif=exif)
    for mode in ("RGB", "RGBA", "LA", "L", "P", "1", "I;16"):
        yield f"png-{mode.replace(';', '')}.png", saved(photo(mode), "PNG")
    yield "png-palette-transparent.png", saved(photo("P"), "PNG", transparency=3)
    yield "png-exif.png", saved(photo(), "PNG", exif=exif)
    yield "png-animated.png", saved(steps[0], "PNG", **several)
    yield "png-interlaced.png", handmade_png(8, True)
    yield "png-16-bit.png", handmade_png(16, False)
    yield "webp-lossy.webp", saved(photo(), "WEBP")
    yield "webp-alpha.webp", saved(photo("RGBA"), "WEBP", exif=exif)
    yield "webp-lossless.webp", saved(photo("RGBA"), "WEBP", lossless=True)
    yield "webp-animated.webp", saved(steps[0], "WEBP", **several)
    yield "gif-still.gif", saved(photo("P"), "GIF", transparency=5)
    yield "gif-animated.gif", saved(steps[0], "GIF", **several)
    yield "bmp.bmp", saved(photo(), "BMP")
    yield "tiff-raw.tiff", saved(photo(), "TIFF")
    yield "tiff-lzw.tiff", saved(photo(), "TIFF", compression="tiff_lzw")
    yield "tiff-jpeg.tiff", saved(photo(), "TIFF", compression="jpeg")
    Image.init()
    for kind in ("AVIF", "DDS", "ICO", "IM", "JPEG2000", "MPO", "PCX", "PPM", "QOI", "SGI", "TGA"):
        if kind in Image.SAVE and kind in Image.OPEN:
            yield f"rare-{kind.lower()}.bin", saved(photo(), kind)


def clip(path: Path, container_format: str, codec: str, options: dict[str, str], **muxer: str) -> None:
    """12 frames, 10 a second."""
    muxer["fflags"] = "+bitexact"  # Matroska numbers its files at random otherwise
    with av.open(str(path), "w", format=container_format, options=muxer) as container:
        stream = container.add_stream(codec, rate=10, options=options)
        stream.width, stream.height = WIDTH, HEIGHT
        stream.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
        for step in range(12):
            container.mux(stream.encode(av.VideoFrame.from_image(photo(step=step))))
        container.mux(stream.encode())


def video_seeds(folder: Path) -> None:
    h264 = {"bf": "2", "g": "8", "threads": "1"}
    clip(folder / "mp4.mp4", "mp4", "libx264", h264)
    clip(folder / "mp4-first-moov.mp4", "mp4", "libx264", h264, movflags="+faststart")
    clip(folder / "mp4-fragments.mp4", "mp4", "libx264", h264, movflags="+frag_keyframe+empty_moov")
    clip(folder / "mkv.mkv", "matroska", "libx264", h264)
    clip(folder / "webm-vp8.webm", "webm", "libvpx", {"threads": "1"})
    clip(folder / "webm-vp9.webm", "webm", "libvpx-vp9", {"threads": "1"})
    clip(folder / "avi-mpeg4.avi", "avi", "mpeg4", {"bf": "2"})
    clip(folder / "avi-mjpeg.avi", "avi", "mjpeg", {})
    clip(folder / "rare-ts.ts", "mpegts", "libx264", h264)
    clip(folder / "rare-mov-mpeg4.mov", "mov", "mpeg4", {})
    clip(folder / "rare-flv.flv", "flv", "flv", {})


def make_seeds(folder: Path) -> None:
    """The seeds as files in `folder`/picture and `folder`/video."""
    for kind in ("picture", "video"):
        (folder / kind).mkdir()
    for name, content in picture_seeds():
        (folder / "picture" / name).write_bytes(content)
    video_seeds(folder / "video")


# ---- the parts of a file


class Part(NamedTuple):
    """A piece of a container: all of it is start:end, its content body:end, its size stands at size_at."""

    start: int
    body: int
    end: int
    size_at: int
    size_bytes: int  # 0 where it has no size of its own
    big_endian: bool


def png_parts(data: bytes) -> Iterator[Part]:
    at = 8
    while at + 12 <= len(data):
        end = at + 12 + int.from_bytes(data[at : at + 4], "big")
        if end > len(data):
            return
        yield Part(at, at + 8, end, at, 4, True)
        at = end


def jpeg_parts(data: bytes) -> Iterator[Part]:
    at = 2
    while at + 4 <= len(data) and data[at] == 0xFF:
        end = at + 2 + int.from_bytes(data[at + 2 : at + 4], "big")
        if data[at + 1] == 0xDA:  # compressed data follow until a marker that is neither stuffing nor RST
            while end + 1 < len(data) and (data[end] != 0xFF or data[end + 1] in (0, *range(0xD0, 0xD8))):
                end += 1
        yield Part(at, at + 4, min(end, len(data)), at + 2, 2, True)
        at = end


def riff_parts(data: bytes, at: int = 12, stop: int | None = None) -> Iterator[Part]:
    stop = len(data) if stop is None else stop
    while at + 8 <= stop:
        size = int.from_bytes(data[at + 4 : at + 8], "little")
        end = min(at + 8 + size + size % 2, stop)
        yield Part(at, at + 8, end, at + 4, 4, False)
        if data[at : at + 4] == b"LIST":
            yield from riff_parts(data, at + 12, end)
        at = end


ATOMS = {
    b"moov", b"trak", b"mdia", b"minf", b"stbl", b"edts", b"dinf", b"udta", b"mvex", b"moof", b"traf"
}  # fmt: skip


def atom_parts(data: bytes, at: int = 0, stop: int | None = None) -> Iterator[Part]:
    stop = len(data) if stop is None else stop
    while at + 8 <= stop:
        size, kind = int.from_bytes(data[at : at + 4], "big"), data[at + 4 : at + 8]
        if size < 8:
            return
        end = min(at + size, stop)
        yield Part(at, at + 8, end, at, 4, True)
        if kind in ATOMS:
            yield from atom_parts(data, at + 8, end)
        elif kind == b"stsd":  # a count, then atoms that describe the codec
            yield from atom_parts(data, at + 16, end)
        at = end


ELEMENTS = {
    0x1A45DFA3, 0x18538067, 0x1549A966, 0x1654AE6B, 0xAE, 0xE0, 0x1F43B675, 0xA0, 0x1C53BB6B, 0x114D9B74, 0xBB
}  # fmt: skip
"""EBML elements that hold elements: header, segment, info, tracks, video, cluster, blocks, cues, seek."""


def ebml_parts(data: bytes, at: int = 0, stop: int | None = None) -> Iterator[Part]:
    stop = len(data) if stop is None else stop
    while at + 2 <= stop and data[at]:
        size_at = at + 9 - data[at].bit_length()
        if size_at >= stop or not data[size_at]:
            return
        size_bytes = 9 - data[size_at].bit_length()
        body = size_at + size_bytes
        size = int.from_bytes(data[size_at:body], "big") & ((1 << 7 * size_bytes) - 1)
        end = min(body + size, stop)
        yield Part(at, min(body, end), end, size_at, size_bytes, True)
        if int.from_bytes(data[at:size_at], "big") in ELEMENTS:
            yield from ebml_parts(data, body, end)
        at = end


def tiff_parts(data: bytes) -> Iterator[Part]:
    at = int.from_bytes(data[4:8], "little")
    for entry in range(at + 2, at + 2 + 12 * int.from_bytes(data[at : at + 2], "little"), 12):
        if entry + 12 <= len(data):
            yield Part(entry, entry, entry + 12, entry + 4, 4, False)


def header_part(data: bytes) -> Iterator[Part]:
    """Files without parts: their first bytes."""
    yield Part(0, 0, min(64, len(data)), 0, 0, False)


WALKERS: dict[str, Callable[[bytes], Iterator[Part]]] = {
    "png": png_parts, "jpeg": jpeg_parts, "webp": riff_parts, "avi": riff_parts, "mp4": atom_parts,
    "rare-mov": atom_parts, "rare-avif": atom_parts, "rare-jpeg2000": atom_parts, "mkv": ebml_parts,
    "webm": ebml_parts, "tiff": tiff_parts,
}  # fmt: skip


def parts_of(data: bytes, name: str) -> list[Part]:
    kind = name.split("/")[1]
    for prefix, walk in WALKERS.items():
        if kind.startswith(prefix):
            return list(walk(data)) or list(header_part(data))
    return list(header_part(data))


# ---- mutations: (rng, data, a second file, name) -> data

Mutation = Callable[[random.Random, bytes, bytes, str], bytes]


def replaced(data: bytes, at: int, value: bytes) -> bytes:
    return data[:at] + value + data[at + len(value) :]


def span(rng: random.Random, data: bytes) -> tuple[int, int]:
    """A piece of the file, mostly short."""
    start = rng.randrange(len(data) + 1)
    return start, min(len(data), start + int(2 ** rng.uniform(0, 10)))


def word(rng: random.Random, size: int, old: int) -> int:
    """An interesting number of `size` bytes: a limit, a neighbour of the old one, or any."""
    most = 256**size - 1
    choice = rng.random()
    if choice < 0.6:
        return rng.choice(WORDS[min(4, 2 ** (size.bit_length() - 1))]) & most
    if choice < 0.8:
        return (old + rng.choice((-16, -2, -1, 1, 2, 16, 255))) & most
    return rng.randrange(most + 1)


def put_word(rng: random.Random, data: bytes, at: int, size: int, big_endian: bool) -> bytes:
    order = "big" if big_endian else "little"
    old = int.from_bytes(data[at : at + size], order)
    return replaced(data, at, word(rng, size, old).to_bytes(size, order))[: len(data)]


def flip_bits(rng: random.Random, data: bytes, other: bytes, name: str) -> bytes:
    result = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 8, 32))):
        at = rng.randrange(len(result))
        result[at] ^= 1 << rng.randrange(8)
    return bytes(result)


def random_bytes(rng: random.Random, data: bytes, other: bytes, name: str) -> bytes:
    start, end = span(rng, data)
    return data[:start] + rng.randbytes(end - start) + data[end:]


def any_word(rng: random.Random, data: bytes, other: bytes, name: str) -> bytes:
    # Headers decide more than pixels do.
    near = len(data) if rng.random() < 0.5 else min(len(data), 256)
    return put_word(rng, data, rng.randrange(near), rng.choice((1, 2, 4)), rng.random() < 0.5)


def delete_block(rng: random.Random, data: bytes, other: bytes, name: str) -> bytes:
    start, end = span(rng, data)
    return data[:start] + data[end:]


def repeat_block(rng: random.Random, data: bytes, other: bytes, name: str) -> bytes:
    start, end = span(rng, data)
    return data[:end] + data[start:end] * rng.choice((1, 1, 2, 30)) + data[end:]


def insert_block(rng: random.Random, data: bytes, other: bytes, name: str) -> bytes:
    start, end = span(rng, data)
    count = end - start
    block = rng.choice((bytes(count), b"\xff" * count, rng.randbytes(count)))
    return data[:start] + block + data[start:]


def truncate(rng: random.Random, data: bytes, other: bytes, name: str) -> bytes:
    return data[: rng.randrange(len(data))]


def splice(rng: random.Random, data: bytes, other: bytes, name: str) -> bytes:
    return data[: rng.randrange(len(data))] + other[rng.randrange(len(other)) :]


def change_size(rng: random.Random, data: bytes, other: bytes, name: str) -> bytes:
    """Absurd numbers where the width or the height stands."""
    forms = [
        (value.to_bytes(size, order), size, order == "big")
        for value in (WIDTH, HEIGHT, WIDTH - 1, HEIGHT - 1)
        for size in (1, 2, 4)
        for order in ("big", "little")
    ]
    places = []
    for form, size, big_endian in forms:
        at = data.find(form)
        while 0 <= at < 2048:
            places.append((at, size, big_endian))
            at = data.find(form, at + 1)
    if not places:
        return any_word(rng, data, other, name)
    size = rng.choice(sorted({size for _, size, _ in places}))  # single bytes are found everywhere
    return put_word(rng, data, *rng.choice([place for place in places if place[1] == size]))


def part_size(rng: random.Random, data: bytes, other: bytes, name: str) -> bytes:
    part = rng.choice(parts_of(data, name))
    if not part.size_bytes:
        return any_word(rng, data, other, name)
    return put_word(rng, data, part.size_at, part.size_bytes, part.big_endian)


def part_word(rng: random.Random, data: bytes, other: bytes, name: str) -> bytes:
    part = rng.choice(parts_of(data, name))
    if part.end <= part.body:
        return data
    at = rng.randrange(part.body, min(part.end, part.body + 96))
    return put_word(rng, data, at, min(rng.choice((1, 2, 4)), part.end - at), part.big_endian)


def part_name(rng: random.Random, data: bytes, other: bytes, name: str) -> bytes:
    """One part under another's name."""
    parts = parts_of(data, name)
    one, another = rng.choice(parts), rng.choice(parts)
    return replaced(data, one.start, data[another.start : another.body])


def part_delete(rng: random.Random, data: bytes, other: bytes, name: str) -> bytes:
    part = rng.choice(parts_of(data, name))
    return data[: part.start] + data[part.end :]


def part_repeat(rng: random.Random, data: bytes, other: bytes, name: str) -> bytes:
    part = rng.choice(parts_of(data, name))
    return data[: part.end] + data[part.start : part.end] * rng.choice((1, 1, 3, 40)) + data[part.end :]


def part_exchange(rng: random.Random, data: bytes, other: bytes, name: str) -> bytes:
    one, another = sorted((rng.choice(parts_of(data, name)), rng.choice(parts_of(data, name))))
    if one.end > another.start:
        return data
    middle = data[one.end : another.start]
    return (
        data[: one.start] + data[another.start : another.end] + middle + data[one.start : one.end]
        + data[another.end :]
    )  # fmt: skip


MUTATIONS: tuple[Mutation, ...] = (
    flip_bits, random_bytes, any_word, delete_block, repeat_block, insert_block, truncate, splice,
    change_size, change_size, part_size, part_word, part_word, part_name, part_delete, part_repeat,
    part_exchange,
)  # fmt: skip


def with_checksums(data: bytes) -> bytes:
    """A PNG whose chunks all have the right checksum."""
    for part in png_parts(data):
        kind_and_body = data[part.start + 4 : part.end - 4]
        data = replaced(data, part.end - 4, struct.pack(">I", zlib.crc32(kind_and_body)))
    return data


def mutate(rng: random.Random, data: bytes, other: bytes, name: str) -> bytes:
    """`data` broken in one to eight ways; never empty, at most LARGEST bytes."""
    for _ in range(rng.choice((1, 1, 1, 2, 2, 3, 5, 8))):
        data = (rng.choice(MUTATIONS)(rng, data, other, name) or b"\0")[:LARGEST]
    if name.endswith(".png") and rng.random() < 0.8:
        data = with_checksums(data)
    return data
