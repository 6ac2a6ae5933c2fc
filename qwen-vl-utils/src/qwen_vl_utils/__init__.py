"""Pictures and videos for Qwen vision-language models: fetched, resized, sampled, made into model inputs.

The names of qwen-vl-utils 0.0.14; `processor_inputs`, from messages to model inputs in one call;
`count_tokens`, how many tokens that will be; `prompt_and_media`, the same for engines that make the patches
themselves; `MediaPolicy`, what may be fetched.
"""

from typing import TYPE_CHECKING, Any

from .cache import PixelCache
from .errors import ImageError, MediaError, MediaNotFound, MediaRefused, MediaTimeout, VideoError
from .policy import PERMISSIVE, MediaPolicy
from .videos import VideoMetadata
from .vision_process import (
    extract_vision_info,
    fetch_image,
    fetch_video,
    process_vision_info,
    smart_resize,
)

if TYPE_CHECKING:
    from .inputs import (
        PromptSize,
        count_tokens,
        load_media,
        measure_inputs,
        measure_media,
        processor_inputs,
        prompt_and_media,
        scale_pixels,
    )

__all__ = [
    "PERMISSIVE",
    "ImageError",
    "MediaError",
    "MediaNotFound",
    "MediaPolicy",
    "MediaRefused",
    "MediaTimeout",
    "PixelCache",
    "PromptSize",
    "VideoError",
    "VideoMetadata",
    "count_tokens",
    "extract_vision_info",
    "fetch_image",
    "fetch_video",
    "load_media",
    "measure_inputs",
    "measure_media",
    "process_vision_info",
    "processor_inputs",
    "prompt_and_media",
    "scale_pixels",
    "smart_resize",
]


_INPUTS = {
    "PromptSize", "count_tokens", "load_media", "measure_inputs", "measure_media", "processor_inputs",
    "prompt_and_media", "scale_pixels",
}  # fmt: skip


def __getattr__(name: str) -> Any:
    # numpy takes longer to import than all the rest, and `smart_resize` needs none of it
    if name in _INPUTS:
        from . import inputs

        return getattr(inputs, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
