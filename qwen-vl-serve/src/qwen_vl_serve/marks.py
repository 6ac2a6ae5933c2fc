"""What an answer says about places and times, drawn on the picture or video that was asked about.

answer + picture --parse_places--> boxes, points, cuboids --to_original--> drawn picture, rows of pixels
answer + video   --parse_spans---> frames over a line of time, rows of seconds
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from PIL import Image, ImageOps

from qwen_vl_utils import MediaPolicy, fetch_video, measure_media
from qwen_vl_utils.grounding import (
    Box,
    Box3D,
    Coordinates,
    Span,
    coordinates_of,
    draw_places,
    draw_spans,
    parse_html,
    parse_places,
    parse_spans,
    to_original,
)

Cells = tuple[str, ...]
FRAMES = 8
FRAME_PIXELS = 160 * 120


@dataclass(frozen=True)
class Marks:
    """``picture``: the places on it, or frames over a line of time; ``rows`` of a table under ``header``."""

    picture: Image.Image
    header: Cells
    rows: list[Cells] = field(default_factory=list)


@dataclass(frozen=True)
class Marker:
    """Draws the answers of one checkpoint. ``processor``: what measures pictures as the model sees them."""

    processor: Any
    coordinates: Coordinates
    policy: MediaPolicy

    @classmethod
    def of(cls, processor: Any, config: Mapping[str, Any], policy: MediaPolicy) -> Marker:
        """Of a checkpoint's processor and config.json. Raises ValueError for an unknown ``model_type``."""
        return cls(processor, coordinates_of(config["model_type"]), policy)

    def mark(self, answer: str, item: Mapping[str, Any]) -> Marks | None:
        """The places that ``answer`` names, on the picture or video of ``item``; None where it names none.

        item: ``{"type": "image", "image": path, ...}`` or a video's. Raises MediaError for a file that can't
        be read.
        """
        if item["type"] == "video":
            spans = parse_spans(answer).items
            rows = [(span.label, f"{span.start:g}", f"{span.end:g}") for span in spans]
            return Marks(self._timeline(item, spans), ("what", "from [s]", "to [s]"), rows) if rows else None
        places: list[Any] = [*parse_places(answer).items]
        places += [element.box for element in parse_html(answer).items]
        if not places:
            return None
        [size] = measure_media([{"role": "user", "content": [item]}], self.processor, policy=self.policy)
        rows = []
        for number, place in enumerate(places):
            if isinstance(place, Box3D):
                rows.append((place.label, f"{place.x:g}, {place.y:g}, {place.z:g} m before the camera"))
                continue
            places[number] = self._on_picture(place, size)
            rows.append((place.label, ", ".join(f"{value:.0f}" for value in _numbers(places[number]))))
        with Image.open(self.policy.check_path(item["image"], item["image"])) as opened:
            upright = ImageOps.exif_transpose(opened).convert("RGB")
        return Marks(draw_places(upright, places), ("what", "where [pixels]"), rows)

    def _timeline(self, item: Mapping[str, Any], spans: Iterable[Span]) -> Image.Image:
        """The spans on frames spread over the whole video."""
        asked = {"video": item["video"], "nframes": FRAMES, "max_pixels": FRAME_PIXELS}
        pixels, about = fetch_video(asked, return_video_metadata=True, dtype=torch.uint8, policy=self.policy)
        frames = [Image.fromarray(frame.permute(1, 2, 0).numpy()) for frame in pixels]
        duration = about["total_num_frames"] / about["fps"]
        return draw_spans(frames, about.timestamps, spans, duration=duration)

    def _on_picture(self, place: Any, size: Any) -> Any:
        height, width = size.natural
        return to_original(
            place, coordinates=self.coordinates, height=height, width=width,
            resized=(size.height, size.width), clip=True,
        )  # fmt: skip


def _numbers(place: Any) -> tuple[float, ...]:
    return place.xyxy if isinstance(place, Box) else place.xy
