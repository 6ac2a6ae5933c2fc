"""Messages to model inputs: the one way that training and answering share.

conversations --chat template--> text with one placeholder a medium
              --open, resize---> pixels --patches--> pixel_values, grids
text + grids  --placeholders repeated, tokenizer---> input_ids, attention_mask, mm_token_type_ids

Of pictures the result is bit for bit that of the model library's `processor.apply_chat_template(messages,
tokenize=True)`, which resizes by torch; of frames that of `processor(..., do_resize=False)` on what
`fetch_video` gives.
"""

import math
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from . import media, vision_process
from .cache import PixelCache
from .loading import ImageSize, Rules, load, measure, resized, within_budget
from .patches import PatchLayout
from .policy import PERMISSIVE, MediaPolicy
from .resize import BY_TORCH
from .videos import Video, VideoMetadata, VideoSize

if TYPE_CHECKING:
    from PIL import Image
    from transformers import BatchFeature

Conversation = Sequence[Mapping[str, Any]]


class _Pixels(NamedTuple):
    """What all pictures, or all videos, of a batch become."""

    patches: list[np.ndarray]
    grids: list[tuple[int, int, int]]


def processor_inputs(
    processor: Any,
    conversations: Sequence[Conversation],
    *,
    add_generation_prompt: bool,
    padding: bool = False,
    padding_side: str = "right",
    tools: list[Any] | None = None,
    total_tokens: int | None = None,
    policy: MediaPolicy = PERMISSIVE,
    cache: PixelCache | None = None,
    scaled: bool = True,
    **template_kwargs: Any,
) -> "BatchFeature":
    """Model inputs of a batch of conversations.

    A conversation is a list of messages `{"role", "content"}`, content a string or a list of items
    `{"type": "text", "text"}`, `{"type": "image", "image", min_pixels?, max_pixels?, ...}`,
    `{"type": "video", "video", fps?, ...}` with the keys of `fetch_image` and `fetch_video`. Sizes are
    multiples of the processor's patch and merge size; bounds that an item does not name are those of the
    processor's configuration. With `total_tokens` the media of each conversation share that many tokens,
    fairly. `policy` says what may be fetched, `cache` keeps the pixels of files. Without `scaled` the pixel
    values are uint8, for `scale_pixels` later: a quarter of the bytes to collate and to send to a device.
    `template_kwargs` reach the chat template (`add_vision_id`, `enable_thinking`, ...).

    Returns a BatchFeature: `input_ids`, `attention_mask`, `mm_token_type_ids` [B, L] (tensors with `padding`
    or for one conversation, else lists of lists); with pictures `pixel_values` [patches, 3 * T * p * p]
    float32 and `image_grid_thw` [pictures, 3]; with videos `pixel_values_videos`, `video_grid_thw`, and for
    models that place frames in time by a rate `second_per_grid_ts` [videos].

    Raises MediaError for a medium that can't be used, ValueError for texts that contain a placeholder
    themselves.
    """
    from transformers import BatchFeature

    _check(conversations)
    loaded, kinds = [], []
    for conversation in conversations:
        items = vision_process.extract_vision_info(conversation)
        kinds.append([media.vision_source(item)[0] for item in items])
        loaded += load(items, _rules(processor), policy, total_tokens=total_tokens, cache=cache)
    clips = [medium for medium in loaded if isinstance(medium, Video)]
    pictures = [medium for medium in loaded if not isinstance(medium, Video)]
    images = _images(processor, pictures, scaled)
    videos = _videos(processor, clips, scaled)
    texts = _texts(processor, conversations, add_generation_prompt, tools, template_kwargs)
    expanded = _expand(
        processor,
        texts,
        kinds,
        _image_expansions(processor, images.grids),
        _video_expansions(processor, videos.grids, [clip.metadata for clip in clips]),
    )

    data = _tokens(processor, expanded, padding, padding_side)
    data.update(_tensors("pixel_values", "image_grid_thw", images))
    data.update(_tensors("pixel_values_videos", "video_grid_thw", videos))
    data.update(_seconds_per_grid(processor, clips))
    return BatchFeature(data)


def scale_pixels(inputs: Mapping[str, Any], processor: Any) -> dict[str, Any]:
    """`inputs`, or a batch of several, made without `scaled`: pixel values float32 as with it, bit for bit.

    They are scaled on the device they are on.
    """
    result = dict(inputs)
    for name, kind in (("pixel_values", "image_processor"), ("pixel_values_videos", "video_processor")):
        if name in result:
            result[name] = PatchLayout.of(getattr(processor, kind)).scale(result[name])
    return result


def load_media(
    processor: Any,
    items: Sequence[Mapping[str, Any]],
    *,
    total_tokens: int | None = None,
    policy: MediaPolicy = PERMISSIVE,
    cache: PixelCache | None = None,
) -> "list[Image.Image | Video]":
    """Pictures and videos at the sizes that `processor_inputs` gives them, frames uint8 [n, 3, h, w].

    For engines that make the patches themselves and are told not to resize. Arguments and errors are those of
    `processor_inputs`.
    """
    from PIL import Image

    loaded = load(items, _rules(processor), policy, total_tokens=total_tokens, cache=cache)
    return [medium if isinstance(medium, Video) else Image.fromarray(medium) for medium in loaded]


def prompt_and_media(
    processor: Any,
    conversation: Conversation,
    *,
    add_generation_prompt: bool,
    tools: list[Any] | None = None,
    total_tokens: int | None = None,
    policy: MediaPolicy = PERMISSIVE,
    cache: PixelCache | None = None,
    **template_kwargs: Any,
) -> "tuple[str, list[Image.Image], list[Video]]":
    """(rendered text, pictures, videos) of one conversation, for such an engine: vLLM makes of it the
    `input_ids` and pixels of `processor_inputs`. Arguments and errors are those of `processor_inputs`.
    """
    _check([conversation])
    [text] = _texts(processor, [conversation], add_generation_prompt, tools, template_kwargs)
    items = vision_process.extract_vision_info(conversation)
    loaded = load_media(processor, items, total_tokens=total_tokens, policy=policy, cache=cache)
    clips = [medium for medium in loaded if isinstance(medium, Video)]
    return text, [medium for medium in loaded if not isinstance(medium, Video)], clips


def measure_media(
    conversation: Conversation,
    processor: Any,
    *,
    total_tokens: int | None = None,
    policy: MediaPolicy = PERMISSIVE,
) -> list[ImageSize | VideoSize]:
    """What `processor_inputs` makes of each picture and video of one conversation, in order, from headers
    alone.

    `height` and `width` [pixels] that the model sees, `natural` (height, width) of the source; of a video
    also `frames` and `metadata` with the indices and times of the frames that are taken. Errors as
    `processor_inputs`.
    """
    _check([conversation])
    items = vision_process.extract_vision_info(conversation)
    rules = _rules(processor)
    measured = measure(items, rules, policy)
    if total_tokens is None:
        return measured
    items = within_budget(items, measured, rules, total_tokens)
    return [resized(item, size, rules) for item, size in zip(items, measured, strict=True)]


class PromptSize(NamedTuple):
    """How large a conversation becomes: `tokens` of `input_ids`; `patches`, rows of all its pixel values."""

    tokens: int
    patches: int


def count_tokens(conversation: Conversation, processor: Any, **options: Any) -> int:
    """The length of `input_ids` that `processor_inputs` gives for one conversation, from headers alone.

    `options` and errors are those of `measure_inputs`.
    """
    return measure_inputs(conversation, processor, **options).tokens


def measure_inputs(
    conversation: Conversation,
    processor: Any,
    *,
    add_generation_prompt: bool = True,
    tools: list[Any] | None = None,
    total_tokens: int | None = None,
    policy: MediaPolicy = PERMISSIVE,
    **template_kwargs: Any,
) -> PromptSize:
    """The size of what `processor_inputs` gives for one conversation, from headers alone.

    No picture and no frame is decoded (PyAV decodes one frame, to see which way it is turned). Arguments and
    errors are those of `processor_inputs`.
    """
    measured = measure_media(conversation, processor, total_tokens=total_tokens, policy=policy)
    items = vision_process.extract_vision_info(conversation)
    clips = [size for size in measured if isinstance(size, VideoSize)]
    step = processor.video_processor.temporal_patch_size if clips else 1
    images = [_grid(processor.image_processor, 1, size) for size in measured if isinstance(size, ImageSize)]
    videos = [_grid(processor.video_processor, -(-size.frames // step), size) for size in clips]
    [text] = _expand(
        processor,
        _texts(processor, [conversation], add_generation_prompt, tools, template_kwargs),
        [[media.vision_source(item)[0] for item in items]],
        _image_expansions(processor, images),
        _video_expansions(processor, videos, [size.metadata for size in clips]),
    )
    tokens = len(_ids(processor, text))
    return PromptSize(tokens, sum(math.prod(grid) for grid in (*images, *videos)))


def _grid(patching: Any, steps: int, size: ImageSize | VideoSize) -> tuple[int, int, int]:
    return steps, size.height // patching.patch_size, size.width // patching.patch_size


def _rules(processor: Any) -> Rules:
    """Sizes as the processor's configuration bounds them."""
    size, factor = processor.image_processor.size, PatchLayout.of(processor.image_processor).factor

    def frame_limits(item: Mapping[str, Any], frames: int) -> tuple[float, float]:
        low, high = _processor_frame_bounds(processor.video_processor, frames)
        if all(item.get(key) is None for key in ("min_pixels", "max_pixels", "total_pixels")):
            return low, high
        return vision_process.item_frame_bounds(item, frames, factor, low, high)

    return vision_process.rules(factor, (size["shortest_edge"], size["longest_edge"]), frame_limits, BY_TORCH)


def _check(conversations: Sequence[Any]) -> None:
    if not conversations or isinstance(conversations[0], Mapping):
        raise ValueError(
            "conversations must be a list of conversations, each a list of messages; for a single one "
            "pass [messages]"
        )


def _without_pixels(conversation: Conversation) -> list[dict[str, Any]]:
    """The messages with bare picture and video items, as chat templates expect them."""
    messages = []
    for message in conversation:
        content = message.get("content")
        if isinstance(content, (list, tuple)):
            message = {**message, "content": [_template_item(item) for item in content]}
        messages.append(message)
    return messages


def _template_item(item: Mapping[str, Any]) -> dict[str, Any]:
    if vision_process.is_vision_item(item):
        return {"type": media.vision_source(item)[0]}
    # Templates ask whether a key is there; a table's empty `image` column would be taken for a picture.
    return {key: value for key, value in item.items() if value is not None}


def _texts(
    processor: Any,
    conversations: Sequence[Conversation],
    add_generation_prompt: bool,
    tools: list[Any] | None,
    template_kwargs: dict[str, Any],
) -> list[str]:
    """The chat template's text of each conversation, one placeholder a medium."""
    return [
        processor.apply_chat_template(
            _without_pixels(conversation),
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            tools=tools,
            **template_kwargs,
        )
        for conversation in conversations
    ]


def _images(processor: Any, images: Sequence[np.ndarray], scaled: bool) -> _Pixels:
    pixels = _Pixels([], [])
    for image in images:
        patches, grid = PatchLayout.of(processor.image_processor).image(image, scaled=scaled)
        pixels.patches.append(patches)
        pixels.grids.append(grid)
    return pixels


def _image_expansions(processor: Any, grids: list[tuple[int, int, int]]) -> list[str]:
    """The text that takes the place of each picture's placeholder."""
    if not grids:
        return []
    merged = processor.image_processor.merge_size**2
    return [processor.image_token * (math.prod(grid) // merged) for grid in grids]


def _processor_frame_bounds(video_processor: Any, frames: int) -> tuple[float, float]:
    """(min, max) pixels of a frame from a video processor's configuration.

    Its `size` bounds one frame for Qwen2-VL and Qwen2.5-VL and the whole video for Qwen3-VL. Frames are
    capped as the library does with `cap_pixels_per_frame`, which is the default here unless it is switched
    off.
    """
    low, high = video_processor.size["shortest_edge"], video_processor.size["longest_edge"]
    factor = video_processor.patch_size * video_processor.merge_size
    tokens, unit = video_processor.max_video_tokens, factor * factor
    name = type(video_processor).__name__
    if name == "Qwen2VLVideoProcessor":
        share = int(tokens * unit * 0.9) * video_processor.temporal_patch_size // frames
        least, most, uncapped = low, min(high, max(share, int(low * 1.05))), high
    elif name == "Qwen3VLVideoProcessor":
        share = min(tokens * unit, high // frames)
        least, most, uncapped = low / frames, max(share, int(low * 1.05)), high / frames
    else:
        raise ValueError(
            f"unknown video processor {name}; known are Qwen2VLVideoProcessor and Qwen3VLVideoProcessor"
        )
    if video_processor.cap_pixels_per_frame is False:
        most = uncapped
    return least, vision_process.sizes.room(least, most, factor)


def _videos(processor: Any, clips: Sequence[Video], scaled: bool) -> _Pixels:
    pixels = _Pixels([], [])
    for clip in clips:
        patches, grid = PatchLayout.of(processor.video_processor).video(clip.frames.numpy(), scaled=scaled)
        pixels.patches.append(patches)
        pixels.grids.append(grid)
    return pixels


def _seconds_per_grid(processor: Any, clips: Sequence[Video]) -> dict[str, Any]:
    """`second_per_grid_ts`, for the models that place frames in time by a rate."""
    if not clips or "second_per_grid_ts" not in processor.model_input_names:
        return {}
    import torch

    step = processor.video_processor.temporal_patch_size
    return {"second_per_grid_ts": torch.tensor([step / clip.metadata.sample_fps for clip in clips])}


def _video_expansions(
    processor: Any, grids: list[tuple[int, int, int]], metadata: Sequence[VideoMetadata]
) -> list[str]:
    """The text that takes the place of each video's placeholder, with its times where the model has them."""
    if not grids:
        return []
    import torch
    from transformers.video_utils import VideoMetadata as LibraryMetadata

    inputs = {
        "video_grid_thw": torch.tensor(grids),
        "video_metadata": [LibraryMetadata(**each) for each in metadata],
    }
    return [processor.replace_video_token(inputs, video_idx=index) for index in range(len(grids))]


def _expand(
    processor: Any, texts: list[str], kinds: list[list[str]], images: list[str], videos: list[str]
) -> list[str]:
    """The texts with every placeholder replaced by its medium's tokens."""
    expansions = {"image": iter(images), "video": iter(videos)}
    tokens = {"image": processor.image_token, "video": processor.video_token}
    expanded = []
    for row, (text, present) in enumerate(zip(texts, kinds, strict=True)):
        for kind, token in tokens.items():
            if (found := text.count(token)) != present.count(kind):
                raise ValueError(
                    f"conversation {row}: the rendered text has {found} {token} for {present.count(kind)} "
                    f"{kind} items; a message text must not contain the placeholder itself"
                )
        pieces, rest = [], text
        for kind in present:
            before, rest = rest.split(tokens[kind], 1)
            pieces += [before, next(expansions[kind])]
        expanded.append("".join([*pieces, rest]))
    return expanded


def _ids(processor: Any, text: str) -> list[int]:
    """The token ids of an expanded text: a run of one placeholder is encoded once and repeated, since
    encoding thousands of them takes longer than all the rest of a long prompt.
    """
    placeholders = "|".join(map(re.escape, (processor.image_token, processor.video_token)))
    lengths: list[int] = []

    def once(run: re.Match[str]) -> str:
        lengths.append(len(run[0]) // len(run[1]))
        return run[1]

    short = re.sub(rf"({placeholders})\1*", once, text)
    repeated, runs = (processor.image_token_id, processor.video_token_id), iter(lengths)
    ids = []
    for token in processor.tokenizer(short)["input_ids"]:
        ids += [token] * next(runs) if token in repeated else [token]
    return ids


def _tokens(processor: Any, texts: list[str], padding: bool, padding_side: str) -> dict[str, Any]:
    ids = [_ids(processor, text) for text in texts]
    encoded = {"input_ids": ids, "attention_mask": [[1] * len(row) for row in ids]}
    if padding:
        encoded = processor.tokenizer.pad(encoded, padding_side=padding_side)
    data = {key: encoded[key] for key in ("input_ids", "attention_mask")}
    if padding or len(texts) == 1:
        import torch

        ids = torch.tensor(data["input_ids"])
        types = (ids == processor.image_token_id).long() + 2 * (ids == processor.video_token_id).long()
        return {
            "input_ids": ids,
            "attention_mask": torch.tensor(data["attention_mask"]),
            "mm_token_type_ids": types,
        }
    codes = {processor.image_token_id: 1, processor.video_token_id: 2}
    data["mm_token_type_ids"] = [[codes.get(token, 0) for token in row] for row in data["input_ids"]]
    return data


def _tensors(values: str, grids: str, pixels: _Pixels) -> dict[str, Any]:
    if not pixels.patches:
        return {}
    import torch

    patches = pixels.patches[0] if len(pixels.patches) == 1 else np.concatenate(pixels.patches)
    return {values: torch.from_numpy(patches), grids: torch.tensor(pixels.grids)}
