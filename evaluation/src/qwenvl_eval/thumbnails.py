"""Small pictures of what a sample shows, and the boxes that are drawn on them."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from qwenvl_eval.media import hash_media
from qwenvl_eval.task import Dataset

if TYPE_CHECKING:
    from PIL import Image

SIDE = 384
"""Longest side of a thumbnail, in pixels."""

QUALITY = 82
FARTHEST = 1e6
"""No picture reaches there [pixels]; neither do NaN and numbers too long for a float."""


@dataclass(frozen=True)
class Picture:
    """``source``: a data URL, "" where there is no picture. ``note``: what it is, or why it is not there.

    ``height`` and ``width`` are the original's, in pixels; boxes are drawn on a picture of ``whole`` only.
    """

    source: str
    note: str
    height: int = 0
    width: int = 0
    whole: bool = False


@dataclass(frozen=True)
class Place:
    """A box, in pixels of the original picture."""

    label: str
    x: float
    y: float
    width: float
    height: float


def pictures_of(
    dataset: Dataset, prompts: Mapping[int, Sequence[Mapping[str, Any]]]
) -> dict[int, tuple[Picture, ...]]:
    """Thumbnails of the samples with these indices; the data is walked once, up to the last of them.

    ``prompts``: what was asked, by index. Where a sample's media are not the ones that were asked about, a
    note says so in place of the pictures.
    """
    from qwen_vl_utils import extract_vision_info

    found: dict[int, tuple[Picture, ...]] = {}
    for index, sample in enumerate(dataset):
        if len(found) == len(prompts):
            break
        if index not in prompts:
            continue
        media = extract_vision_info(sample.messages)
        if _plain(hash_media(sample.messages)) != _plain(prompts[index]):
            found[index] = (Picture("", "what the data gives now is not what was asked"),)
        else:
            found[index] = tuple(picture for item in media for picture in _pictures(item))
    return found


def places_in(value: Any) -> tuple[Place, ...]:
    """The boxes of ``[{"label": ..., "bbox": [x, y, width, height]}, ...]``, a list or its JSON; none where
    it is anything else.
    """
    if isinstance(value, str):
        if not value.startswith("["):
            return ()
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            return ()
    if not isinstance(value, list):
        return ()
    return tuple(
        Place(str(item.get("label", "")), *map(float, item["bbox"])) for item in value if _has_box(item)
    )


def _has_box(item: Any) -> bool:
    box = item.get("bbox") if isinstance(item, Mapping) else None
    if not isinstance(box, list) or len(box) != 4:
        return False
    return all(type(value) in (int, float) and abs(value) < FARTHEST for value in box)


def _pictures(item: Mapping[str, Any]) -> list[Picture]:
    from qwen_vl_utils import MediaError
    from qwen_vl_utils.media import vision_source

    try:
        kind, source = vision_source(item)
        if kind == "image":
            return [_picture(source)]
        if isinstance(source, list | tuple):
            places = sorted({0, len(source) // 2})
            return [_picture(source[place], f"frame {place} of {len(source)}") for place in places]
        return _frames(item, source)
    except MediaError as error:
        return [Picture("", str(error))]


def _picture(source: Any, note: str = "") -> Picture:
    from qwen_vl_utils import fetch_image
    from qwen_vl_utils.images import image_size

    height, width = image_size(source)
    small = fetch_image({"image": source, "max_pixels": SIDE * SIDE}, image_patch_size=1)
    return Picture(_data_url(small), note or f"{width} × {height}", height, width, whole=not note)


def _frames(item: Mapping[str, Any], source: Any) -> list[Picture]:
    """The first frame and one from the middle."""
    import torch
    from PIL import Image

    from qwen_vl_utils import fetch_video

    asked = {name: item[name] for name in ("video_start", "video_end") if item.get(name) is not None}
    asked |= {"video": source, "min_frames": 2, "max_frames": 4, "max_pixels": SIDE * SIDE}
    frames, metadata = fetch_video(asked, 1, return_video_metadata=True, dtype=torch.uint8)
    pictures = []
    for place in (0, len(frames) // 2):
        small = Image.fromarray(frames[place].permute(1, 2, 0).numpy())
        pictures.append(Picture(_data_url(small), f"video at {metadata.timestamps[place]:.1f} s"))
    return pictures


def _data_url(image: Image.Image) -> str:
    image.thumbnail((SIDE, SIDE))
    held = io.BytesIO()
    image.save(held, "JPEG", quality=QUALITY)
    return f"data:image/jpeg;base64,{base64.b64encode(held.getvalue()).decode()}"


def _plain(value: Any) -> str:
    """As it looks after a way through a file."""
    return json.dumps(value, sort_keys=True, ensure_ascii=False)
