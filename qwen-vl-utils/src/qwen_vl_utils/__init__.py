"""Pictures and videos for Qwen vision-language models: fetched, resized, sampled, turned into model inputs.

The names of qwen-vl-utils 0.0.14, and `processor_inputs`, which goes from messages to model inputs in one
call.
"""

from .errors import ImageError, MediaError, MediaNotFound, VideoError
from .inputs import processor_inputs
from .videos import VideoMetadata
from .vision_process import (
    extract_vision_info,
    fetch_image,
    fetch_video,
    process_vision_info,
    smart_resize,
)

__all__ = [
    "ImageError",
    "MediaError",
    "MediaNotFound",
    "VideoError",
    "VideoMetadata",
    "extract_vision_info",
    "fetch_image",
    "fetch_video",
    "process_vision_info",
    "processor_inputs",
    "smart_resize",
]
