"""Small pictures for pages that carry them inside."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping
from typing import Any

import torch
from PIL import Image

from qwen_vl_utils import fetch_image, fetch_video

SIDE = 256
"""Thumbnails have at most the pixels of a square with this side."""


def thumbnail(item: Mapping[str, Any]) -> str:
    """A picture, or a frame from the middle of a video, as a data URL. item: of a message."""
    if item["type"] == "image":
        picture = fetch_image({"image": item["image"], "max_pixels": SIDE * SIDE}, image_patch_size=1)
    else:
        asked = {name: item[name] for name in ("video", "video_start", "video_end") if name in item}
        limits = {"min_frames": 2, "max_frames": 4, "max_pixels": SIDE * SIDE}
        frames = fetch_video(asked | limits, 1, dtype=torch.uint8)
        picture = Image.fromarray(frames[len(frames) // 2].permute(1, 2, 0).numpy())
    held = io.BytesIO()
    picture.convert("RGB").save(held, "JPEG", quality=80)
    return f"data:image/jpeg;base64,{base64.b64encode(held.getvalue()).decode()}"
