"""Is a file a video in itself? Its first bytes say so, before FFmpeg sees it.

    first bytes --check_container--> nothing, or VideoError

FFmpeg also reads playlists, manifests and scripts, which name other files and hosts, and opens those. So only
binary containers, which hold their pictures themselves, get through.
"""

import re

from .errors import VideoError

HEAD_BYTES = 4096
"""How much of a file `check_container` wants to see."""

BOXES = (
    b"ftyp",
    b"moov",
    b"mdat",
    b"wide",
    b"free",
    b"skip",
    b"pnot",
    b"styp",
    b"moof",
    b"sidx",
    b"uuid",
    b"jP  ",
)
"""First boxes of QuickTime, MP4 and their fragments; four bytes of length come before."""

MAGIC = (
    b"\x1a\x45\xdf\xa3",  # Matroska, WebM
    b"OggS",
    b"FLV\x01",
    b"\x00\x00\x01\xba",  # MPEG program stream
    b"\x00\x00\x01\xb3",  # MPEG-1 and -2 video
    b"\x00\x00\x01\xb0",  # MPEG-4 part 2 video
    b"\x12\x00\x0a",  # AV1 without a container
    b"\x30\x26\xb2\x75\x8e\x66\xcf\x11\xa6\xd9\x00\xaa\x00\x62\xce\x6c",  # ASF, WMV
    b"\xb7\xd8\x00\x20\x37\x49\xda\x11\xa6\x4e\x00\x07\xe9\x5e\xad\x8d",  # WTV
    b"GIF87a",
    b"GIF89a",
    b"\x89PNG\r\n\x1a\n",  # APNG
    b"\xff\xd8\xff",  # JPEG, motion JPEG
    b"DKIF",  # IVF
    b"YUV4MPEG2 ",
    b"nut/multimedia container\x00",
    b"\x06\x0e\x2b\x34\x02\x05\x01\x01\x0d\x01\x02\x01\x01\x02",  # MXF
    b"\x00\x00\x00\x00\x01\xbc",  # GXF
    b"\x1f\x07\x00",  # DV
    b".RMF\x00",  # RealMedia
)
RIFF = {b"RIFF": (b"AVI ", b"AVIX", b"AMV ", b"WEBP"), b"RIFX": (b"AVI ",), b"ON2 ": (b"ON2f",)}
"""Families by their first four bytes, and the kinds in bytes 8 to 12 that are videos."""
# A start code and the first byte of a unit, whose highest bit is 0.
ANNEX_B = re.compile(rb"\x00?\x00\x00\x01[\x00-\x7f]")
PACKETS = ((188, 0), (192, 4), (204, 0))
"""Transport streams: (length of a packet, where its sync byte stands)."""
SYNC = 0x47

MAY_LACK_ZEROS = (b"YUV4MPEG2 ", b"GIF87a", b"GIF89a")
"""Formats whose first 4 KiB may hold no zero byte; FFmpeg is always sure of them."""
TEXT_MARKS = (b"#extm3u", b"ffconcat", b"<mpd", b"c=in ip", b"<smoothstreamingmedia", b"<compositionplaylist")


def check_container(head: bytes, name: str) -> None:
    """Raise VideoError unless `head`, the first HEAD_BYTES of a file or all of it, begins a video container.

    Playlists, manifests and scripts are refused, also behind a byte order mark, blanks or an ID3 tag (which
    FFmpeg skips), and hidden behind the first bytes of a container.
    """
    if not _known(head) or _also_text(head):
        raise VideoError(
            f"{name}: a playlist or script, or an unknown container (it begins with {head[:16]!r}); send the "
            "video itself, for instance as MP4 or WebM"
        )


def _known(head: bytes) -> bool:
    return (
        head.startswith(MAGIC)
        or head[4:8] in BOXES
        or head[8:12] in RIFF.get(head[:4], ())
        or ANNEX_B.match(head) is not None
        or any(_is_transport_stream(head, length, first) for length, first in PACKETS)
    )


def _is_transport_stream(head: bytes, length: int, first: int) -> bool:
    marks = head[first::length]
    return len(marks) > 2 and marks == bytes([SYNC]) * len(marks)


def _also_text(head: bytes) -> bool:
    """Whether a reader of text might take `head` for its own.

    FFmpeg asks all its readers, and those of text search for their words up to the first zero byte; that of
    a manifest may then be surer than that of the container whose first bytes were put before it.
    """
    text, zero, _ = head.partition(b"\0")
    if not zero and not head.startswith(MAY_LACK_ZEROS):
        return True
    return any(mark in text.lower() for mark in TEXT_MARKS)
