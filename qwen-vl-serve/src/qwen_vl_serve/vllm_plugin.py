"""Inside the vLLM server: pictures and videos are fetched and prepared by qwen_vl_utils, as in training.

``qwenvl-serve`` sets ``VLLM_MEDIA_CONNECTOR=qwen_vl_utils`` and describes in ``QWENVL_MEDIA`` what to do:

    {"checkpoint": "models/qwen3-vl-nano", "policy": {"max_frames": 256}}

``policy`` holds arguments of `MediaPolicy.strict`; vLLM's own ``--allowed-media-domains`` and
``--allowed-local-media-path`` are its ``domains`` and ``folders``. The entry point of this module is found by
vLLM in every environment where this package is installed; without that variable nothing changes.
"""

from __future__ import annotations

import asyncio
import json
import os
from functools import lru_cache
from typing import Any

NAME = "qwen_vl_utils"
SETTINGS = "QWENVL_MEDIA"


def register() -> None:
    """vLLM's entry point: make the connector known under its name."""
    from vllm.multimodal.media.connector import (  # pyright: ignore[reportMissingImports]
        MEDIA_CONNECTOR_REGISTRY,
        MediaConnector,
    )

    @MEDIA_CONNECTOR_REGISTRY.register(NAME)
    class QwenMediaConnector(MediaConnector):
        """vLLM's connector, with the pixels of qwen_vl_utils."""

        def __init__(
            self,
            media_io_kwargs: Any = None,
            *,
            allowed_local_media_path: str = "",
            allowed_media_domains: list[str] | None = None,
            **more: Any,
        ) -> None:
            super().__init__(
                media_io_kwargs,
                allowed_local_media_path=allowed_local_media_path,
                allowed_media_domains=allowed_media_domains,
                **more,
            )
            self._media = (allowed_local_media_path or "", tuple(allowed_media_domains or ()))

        def fetch_image(self, image_url: str, *, image_mode: str | None = "RGB") -> Any:
            return load("image", image_url, *self._media)

        async def fetch_image_async(self, image_url: str, *, image_mode: str | None = "RGB") -> Any:
            return await asyncio.to_thread(load, "image", image_url, *self._media)

        def fetch_video(self, video_url: str, **_: Any) -> Any:
            return load("video", video_url, *self._media)

        async def fetch_video_async(self, video_url: str, **_: Any) -> Any:
            return await asyncio.to_thread(load, "video", video_url, *self._media)


def load(kind: str, url: str, folder: str, domains: tuple[str, ...]) -> Any:
    """A picture, or (frames uint8 [n, 3, h, w], metadata), at the size the model takes."""
    from qwen_vl_serve.endpoint_messages import item_of
    from qwen_vl_utils import load_media
    from qwen_vl_utils.videos import Video

    processor, policy = _settings(os.environ[SETTINGS], folder, domains)
    [medium] = load_media(processor, [item_of(kind, url)], policy=policy)
    if not isinstance(medium, Video):
        return medium
    return medium.frames, {**medium.metadata, "do_sample_frames": False}


@lru_cache
def _settings(text: str, folder: str, domains: tuple[str, ...]) -> tuple[Any, Any]:
    from transformers import AutoProcessor

    from qwen_vl_utils import MediaPolicy

    settings = json.loads(text)
    policy = MediaPolicy.strict(
        domains=domains or None, folders=[folder] if folder else (), **settings.get("policy", {})
    )
    return AutoProcessor.from_pretrained(settings["checkpoint"]), policy
