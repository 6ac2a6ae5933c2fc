"""The Qwen-VL families at nano size, and random weights at the geometry of a published size.

Every model is the model library's own class; a written folder loads with `AutoModelForImageTextToText` and
`AutoProcessor`.  Geometry of published sizes: their config.json files.
"""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForImageTextToText, GenerationConfig, PreTrainedConfig
from transformers.models.qwen2_5_vl import Qwen2_5_VLProcessor
from transformers.models.qwen2_vl import Qwen2VLImageProcessor, Qwen2VLProcessor, Qwen2VLVideoProcessor
from transformers.models.qwen3_vl import Qwen3VLProcessor, Qwen3VLVideoProcessor

from qwenvl.nano.tokenizer import nano_tokenizer
from qwenvl.train import expert_layout

FAMILIES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "qwen3_5", "qwen3_5_moe")

# (pictures' mean, standard deviation): CLIP's for the older families, 0.5 for Qwen3-VL.
CLIP = ([0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711])
HALF = ([0.5, 0.5, 0.5], [0.5, 0.5, 0.5])

NANO_TEXT = dict(
    hidden_size=256, intermediate_size=512, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
    max_position_embeddings=4096, rms_norm_eps=1e-6,
)  # fmt: skip
NANO_EXPERTS = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=192)
# Three layers of linear attention, one of full attention.
NANO_LINEAR = dict(
    linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=32, linear_value_head_dim=32
)
NANO_VISION = {
    "qwen2_vl": dict(depth=4, embed_dim=128, hidden_size=256, num_heads=4, mlp_ratio=4, patch_size=14),
    "qwen2_5_vl": dict(
        depth=4, hidden_size=128, intermediate_size=384, num_heads=4, out_hidden_size=256, patch_size=14,
        window_size=112, fullatt_block_indexes=[1, 3], tokens_per_second=2,
    ),
    "qwen3_vl": dict(
        depth=4, hidden_size=128, intermediate_size=512, num_heads=4, out_hidden_size=256, patch_size=16,
        num_position_embeddings=256, deepstack_visual_indexes=[1, 2],
    ),
}  # fmt: skip
NANO_VISION["qwen3_vl_moe"] = NANO_VISION["qwen3_vl"]
NANO_VISION["qwen3_5"] = NANO_VISION["qwen3_5_moe"] = {
    name: value for name, value in NANO_VISION["qwen3_vl"].items() if name != "deepstack_visual_indexes"
}


def _qwen3_text(hidden: int, intermediate: int, layers: int, heads: int, kv_heads: int, **more) -> dict:
    return dict(
        hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=kv_heads, head_dim=128,
        max_position_embeddings=262144, rms_norm_eps=1e-6, vocab_size=151936, **more,
    )  # fmt: skip


def _qwen2_text(hidden: int, intermediate: int, layers: int, heads: int, kv_heads: int, **more) -> dict:
    return dict(
        hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=kv_heads, rms_norm_eps=1e-6, **more,
    )  # fmt: skip


def _qwen3_vision(out: int, *, large: bool) -> dict:
    if large:
        tower = dict(depth=27, hidden_size=1152, intermediate_size=4304, deepstack_visual_indexes=[8, 16, 24])
    else:
        tower = dict(depth=24, hidden_size=1024, intermediate_size=4096, deepstack_visual_indexes=[5, 11, 17])
    return dict(tower, num_heads=16, out_hidden_size=out, patch_size=16, num_position_embeddings=2304)


_EXPERTS_30B = dict(num_experts=128, num_experts_per_tok=8, moe_intermediate_size=768, decoder_sparse_step=1)
_TOWER_2_5 = dict(
    depth=32, hidden_size=1280, intermediate_size=3420, num_heads=16, patch_size=14, window_size=112,
    fullatt_block_indexes=[7, 15, 23, 31], tokens_per_second=2,
)  # fmt: skip

# (family, size) -> (text config, vision config, lm_head tied to the embedding)
PUBLISHED: dict[tuple[str, str], tuple[dict, dict, bool]] = {
    ("qwen2_vl", "2B"): (
        _qwen2_text(1536, 8960, 28, 12, 2, vocab_size=151936, max_position_embeddings=32768),
        dict(depth=32, embed_dim=1280, hidden_size=1536, num_heads=16, mlp_ratio=4, patch_size=14),
        True,
    ),
    ("qwen2_vl", "7B"): (
        _qwen2_text(3584, 18944, 28, 28, 4, vocab_size=152064, max_position_embeddings=32768),
        dict(depth=32, embed_dim=1280, hidden_size=3584, num_heads=16, mlp_ratio=4, patch_size=14),
        False,
    ),
    ("qwen2_5_vl", "3B"): (
        _qwen2_text(2048, 11008, 36, 16, 2, vocab_size=151936, max_position_embeddings=128000),
        dict(_TOWER_2_5, out_hidden_size=2048),
        True,
    ),
    ("qwen2_5_vl", "7B"): (
        _qwen2_text(3584, 18944, 28, 28, 4, vocab_size=152064, max_position_embeddings=128000),
        dict(_TOWER_2_5, out_hidden_size=3584),
        False,
    ),
    ("qwen3_vl", "2B"): (_qwen3_text(2048, 6144, 28, 16, 8), _qwen3_vision(2048, large=False), True),
    ("qwen3_vl", "4B"): (_qwen3_text(2560, 9728, 36, 32, 8), _qwen3_vision(2560, large=False), True),
    ("qwen3_vl", "8B"): (_qwen3_text(4096, 12288, 36, 32, 8), _qwen3_vision(4096, large=True), False),
    ("qwen3_vl", "32B"): (_qwen3_text(5120, 25600, 64, 64, 8), _qwen3_vision(5120, large=True), False),
    ("qwen3_vl_moe", "30B-A3B"): (
        _qwen3_text(2048, 6144, 48, 32, 4, **_EXPERTS_30B),
        _qwen3_vision(2048, large=True),
        False,
    ),
    ("qwen3_vl_moe", "235B-A22B"): (
        _qwen3_text(4096, 12288, 94, 64, 4, **_EXPERTS_30B | dict(moe_intermediate_size=1536)),
        _qwen3_vision(4096, large=True),
        False,
    ),
}


def _known(family: str) -> str:
    if family not in FAMILIES:
        raise ValueError(f"unknown family {family!r}: choose one of {', '.join(FAMILIES)}")
    return family


def _token_ids(tokenizer) -> dict[str, int]:
    names = ("image_pad", "video_pad", "vision_start", "vision_end")
    keys = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    ids = tokenizer.convert_tokens_to_ids([f"<|{name}|>" for name in names])
    return dict(zip(keys, ids, strict=True))


def _build_config(family: str, text: dict, vision: dict, *, tied: bool, tokenizer) -> PreTrainedConfig:
    head_dim = text.get("head_dim", text["hidden_size"] // text["num_attention_heads"])
    if family.startswith("qwen3_5"):
        # A quarter of the head turns, half of it for time, height, width as 11 : 11 : 10, interleaved.
        half = head_dim // 8
        section = [-(-half // 3), -(-(half - 1) // 3), half // 3]
        rope = dict(
            rope_type="default", rope_theta=10_000_000.0, mrope_section=section, mrope_interleaved=True,
            partial_rotary_factor=0.25,
        )  # fmt: skip
        text = dict(text, head_dim=head_dim)
    elif family.startswith("qwen3"):
        # 24 : 20 : 20 of the half head for time, height, width, interleaved.
        section = [head_dim // 2 - 2 * (head_dim * 5 // 32), head_dim * 5 // 32, head_dim * 5 // 32]
        rope = dict(
            rope_type="default", rope_theta=5_000_000.0, mrope_section=section, mrope_interleaved=True
        )
        text = dict(text, head_dim=head_dim)
    else:
        section = [head_dim // 8, head_dim * 3 // 16, head_dim * 3 // 16]
        rope = dict(rope_type="default", rope_theta=1_000_000.0, mrope_section=section)
    ends = dict(bos_token_id=None, eos_token_id=tokenizer.eos_token_id, pad_token_id=None)
    return AutoConfig.for_model(
        family,
        text_config=dict(text, rope_parameters=rope, tie_word_embeddings=tied, **ends),
        vision_config=dict(vision),
        tie_word_embeddings=tied,
        **_token_ids(tokenizer),
    )


def nano_config(family: str, tokenizer, *, tied: bool = True) -> PreTrainedConfig:
    """A family at nano size (about 5 M parameters), its token ids those of `tokenizer`."""
    text = dict(NANO_TEXT, vocab_size=len(tokenizer))
    if _known(family).startswith("qwen3_5"):
        text |= NANO_LINEAR
    if family == "qwen3_vl_moe":
        text |= dict(NANO_EXPERTS, decoder_sparse_step=1)
    if family == "qwen3_5_moe":
        del text["intermediate_size"]  # No layer is dense.
        text |= dict(NANO_EXPERTS, shared_expert_intermediate_size=192)
    return _build_config(family, text, NANO_VISION[family], tied=tied, tokenizer=tokenizer)


def published_config(family: str, size: str, tokenizer) -> PreTrainedConfig:
    """The configuration of a published size ("2B", "4B", "8B", "30B-A3B", ...).

    Raises ValueError for a size that the family was not published in.
    """
    if (family, size) not in PUBLISHED:
        known = ", ".join(f"{f} {s}" for f, s in PUBLISHED)
        raise ValueError(f"no published geometry for {family!r} {size!r}; known: {known}")
    text, vision, tied = PUBLISHED[family, size]
    return _build_config(family, text, vision, tied=tied, tokenizer=tokenizer)


def random_model(config: PreTrainedConfig, *, device: str, dtype: torch.dtype, seed: int):
    """A model of a configuration with random weights, the same for the same seed, made on the device."""
    with torch.random.fork_rng(), torch.device(device):
        torch.manual_seed(seed)
        return AutoModelForImageTextToText.from_config(config, dtype=dtype)


def nano_model(family: str, *, seed: int = 0, tied: bool = True):
    """A randomly initialised nano model in fp32 on the CPU."""
    config = nano_config(family, nano_tokenizer(family), tied=tied)
    return random_model(config, device="cpu", dtype=torch.float32, seed=seed)


def published_model(
    family: str,
    size: str,
    tokenizer,
    *,
    device: str = "meta",
    dtype: torch.dtype = torch.bfloat16,
    seed: int = 0,
):
    """Random weights at a published geometry, built in memory on `device`; "meta" allocates nothing."""
    return random_model(published_config(family, size, tokenizer), device=device, dtype=dtype, seed=seed)


def build_processor(family: str, tokenizer):
    """The family's own processor.

    Pixel limits suit a nano model: a picture becomes 16 to 256 tokens, a video (all frames) 8 to 512.
    """
    patch = NANO_VISION[_known(family)]["patch_size"]
    unit = (2 * patch) ** 2
    mean, std = HALF if family.startswith("qwen3") else CLIP
    shared: dict[str, Any] = dict(
        patch_size=patch, temporal_patch_size=2, merge_size=2, image_mean=mean, image_std=std
    )
    image = Qwen2VLImageProcessor(size={"shortest_edge": 16 * unit, "longest_edge": 256 * unit}, **shared)
    video_class = Qwen3VLVideoProcessor if family.startswith("qwen3") else Qwen2VLVideoProcessor
    # The video size counts pixels of all frames together.
    video = video_class(size={"shortest_edge": 16 * unit, "longest_edge": 1024 * unit}, **shared)
    processor_class = {"qwen2_vl": Qwen2VLProcessor, "qwen2_5_vl": Qwen2_5_VLProcessor}.get(
        family, Qwen3VLProcessor
    )
    return processor_class(
        image_processor=image,
        tokenizer=tokenizer,
        video_processor=video,
        chat_template=tokenizer.chat_template,
    )


def write_checkpoint(family: str, folder: str | Path, *, seed: int = 0, tied: bool = True) -> Path:
    """Write a complete checkpoint with random weights: model, processor, template, generation settings."""
    folder = Path(folder)
    tokenizer = nano_tokenizer(_known(family))
    model = nano_model(family, seed=seed, tied=tied)
    model.generation_config = GenerationConfig(
        do_sample=False,
        max_new_tokens=256,
        eos_token_id=tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"]),
        pad_token_id=tokenizer.pad_token_id,
    )
    model.save_pretrained(folder)
    expert_layout.publish(folder)
    build_processor(family, tokenizer).save_pretrained(folder)
    return folder
