"""Six questions on three tiny videos of coloured shapes, with subtitles of two, in the files of Video-MME."""

from __future__ import annotations

import io
from fractions import Fraction
from pathlib import Path
from typing import Any

SIZE = 64
RATE = 8
"""Height and width [pixels] and frames per second of a video."""

COLOURS = {"red": (220, 30, 30), "green": (30, 180, 30), "blue": (30, 30, 220), "yellow": (230, 220, 40)}

VIDEOS = (
    ("aB3_shapes-1", "short", "Knowledge", "Geography", ("red", "blue")),
    ("Qx9-shapes_2", "medium", "Sports Competition", "Football", ("green", "red")),
    ("_z0shapes--3", "long", "Life Record", "Handicraft", ("blue", "yellow", "green")),
)
"""videoID, duration, domain, sub_category, the colours that the square has, half a second each."""


def write(folder: Path) -> Path:
    """``videomme/*.parquet``, ``data/*.mp4`` and ``subtitle/*.srt`` in ``folder``, which is the data to give.

    The same call writes the same bytes. Raises ValueError where another file lies in a file's place.
    """
    rows = []
    for number, (id, duration, domain, sub_category, colours) in enumerate(VIDEOS, 1):
        _put(folder / "data" / f"{id}.mp4", _video(colours))
        if duration != "long":
            _put(folder / "subtitle" / f"{id}.srt", _subtitles(colours).encode())
        known = {
            "video_id": f"{number:03}",
            "duration": duration,
            "domain": domain,
            "sub_category": sub_category,
            "url": f"https://www.youtube.com/watch?v={id}",
            "videoID": id,
        }
        rows += [{**known, **question} for question in _questions(f"{number:03}", colours)]
    _put(folder / "videomme" / "test-00000-of-00001.parquet", _parquet(rows))
    return folder


def _questions(number: str, colours: tuple[str, ...]) -> list[dict[str, Any]]:
    names = list(COLOURS)
    return [
        {
            "question_id": f"{number}-1",
            "task_type": "Attribute Perception",
            "question": "What colour has the square at first?",
            "options": _options(names),
            "answer": "ABCD"[names.index(colours[0])],
        },
        {
            "question_id": f"{number}-2",
            "task_type": "Counting Problem",
            "question": "How many colours does the square have in all?",
            "options": _options(["4", "3", "2", "1"]),
            "answer": "ABCD"[4 - len(colours)],
        },
    ]


def _options(texts: list[str]) -> list[str]:
    return [f"{letter}. {text.capitalize()}." for letter, text in zip("ABCD", texts, strict=True)]


def _subtitles(colours: tuple[str, ...]) -> str:
    cues = []
    for number, colour in enumerate(colours, 1):
        start, end = 500 * (number - 1), 500 * number
        times = " --> ".join(f"00:00:{time // 1000:02},{time % 1000:03}" for time in (start, end))
        cues.append(f"{number}\n{times}\nNow the square is {colour}.\n")
    return "\n".join(cues)


def _video(colours: tuple[str, ...]) -> bytes:
    """A square on white that keeps each colour for half a second."""
    import av
    from PIL import Image, ImageDraw

    file = io.BytesIO()
    with av.open(file, "w", format="mp4", options={"fflags": "+bitexact"}) as container:
        stream = container.add_stream("libx264", rate=RATE)
        stream.width = stream.height = SIZE
        stream.pix_fmt = "yuv420p"
        stream.time_base = Fraction(1, RATE)
        stream.thread_count = 1
        # Other presets look ahead, and x264 then reads memory that nobody wrote: now and then other bytes.
        stream.options = {"flags": "+bitexact", "preset": "ultrafast", "crf": "18"}
        for place in range(len(colours) * RATE // 2):
            canvas = Image.new("RGB", (SIZE, SIZE), "white")
            left = 8 + place
            shade = COLOURS[colours[place // (RATE // 2)]]
            ImageDraw.Draw(canvas).rectangle((left, 16, left + 31, 47), fill=shade)
            container.mux(stream.encode(av.VideoFrame.from_image(canvas)))
        container.mux(stream.encode())
    return file.getvalue()


def _parquet(rows: list[dict[str, Any]]) -> bytes:
    import pyarrow
    import pyarrow.parquet

    file = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    return file.getvalue()


def _put(path: Path, content: bytes) -> None:
    if path.exists() and path.read_bytes() != content:
        raise ValueError(f"{path} is there already and is not this sample; choose another folder")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
