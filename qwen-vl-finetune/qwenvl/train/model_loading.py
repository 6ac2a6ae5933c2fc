"""A checkpoint folder becomes a model and a processor ready for training.

config.json -> model_type -> model class;  processor <- --min_pixels, --max_pixels, --video_*
"""

from __future__ import annotations

import logging
import os
from typing import Any

import torch
from accelerate import ParallelismConfig
from torch import nn
from torch.nn.functional import linear
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    AutoProcessor,
    PreTrainedConfig,
    PreTrainedModel,
    ProcessorMixin,
)
from transformers.image_utils import SizeDict

from qwenvl.train import adapters, attention, experts
from qwenvl.train.argument import DataArguments, ModelArguments, TrainingArguments

logger = logging.getLogger(__name__)

MODEL_TYPES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "qwen3_5", "qwen3_5_moe")


def load_config(model_args: ModelArguments, training_args: TrainingArguments) -> PreTrainedConfig:
    """The checkpoint's configuration.

    Raises ValueError for a model_type that is no Qwen-VL family, for samples split over processes, and for
    Qwen3.5 under ZeRO-3.
    """
    _refuse_split_samples(training_args)
    path = model_args.model_name_or_path
    config = AutoConfig.from_pretrained(path, cache_dir=training_args.cache_dir)
    if config.model_type not in MODEL_TYPES:
        raise ValueError(
            f"{path}: model_type {config.model_type!r} in config.json is not one of {', '.join(MODEL_TYPES)}"
        )
    zero3 = training_args.deepspeed and training_args.hf_deepspeed_config.is_zero3()
    if zero3 and config.model_type.startswith("qwen3_5"):
        raise ValueError(
            f"--deepspeed {training_args.deepspeed}: ZeRO-3 gathers weights as modules run, and the linear "
            f"attention of {config.model_type} runs otherwise in each process; use scripts/zero2.json"
        )
    return config


def _refuse_split_samples(training_args: TrainingArguments) -> None:
    """Accelerate's and DeepSpeed's sequence parallelism cannot work here, nor can tensor parallelism.

    DeepSpeed cuts every tensor of a batch along its second dimension, that of one patch's pixels too;
    accelerate cuts tokens and leaves pictures whole.  Either way placeholders and features no longer fit.
    """
    asked = training_args.parallelism_config
    if asked is None and os.environ.get("ACCELERATE_USE_PARALLELISM_CONFIG", "false").lower() == "true":
        asked = ParallelismConfig()  # Reads the rest of the environment, as accelerate will.
    for name in ("sp_size", "cp_size", "tp_size") if asked else ():
        size = getattr(asked, name)
        if size > 1:
            raise ValueError(
                f"{name}={size} in accelerate's parallelism configuration: a sample with pictures can't be "
                "split over processes; drop it, and for long videos use --gradient_checkpointing True with "
                "scripts/zero3.json, a smaller --video_max_pixels or fewer --video_max_frames"
            )


def stored_dtype(config: PreTrainedConfig) -> torch.dtype:
    """The dtype that a checkpoint's config.json names; fp32 where it names none."""
    return config.dtype if isinstance(config.dtype, torch.dtype) else torch.float32


def load_model(
    config: PreTrainedConfig,
    model_args: ModelArguments,
    data_args: DataArguments,
    training_args: TrainingArguments,
) -> PreTrainedModel:
    """The model that `model_type` in the checkpoint's config.json names, in the dtype of training.

    Flattened batches get attention within segments, unless config.json names an `_attn_implementation`.
    """
    path = model_args.model_name_or_path
    if training_args.deepspeed and torch.distributed.is_initialized():
        import deepspeed  # pyright: ignore[reportMissingImports]

        # ZeRO-3 splits the weights while they load, which takes its own view of the processes.
        deepspeed.init_distributed(dist_backend=torch.distributed.get_backend())
    named = config._attn_implementation  # None where config.json does not name one.
    model = AutoModelForImageTextToText.from_pretrained(
        path,
        config=config,
        dtype=_weight_dtype(training_args),
        cache_dir=training_args.cache_dir,
        **_quantised(config, training_args),
    )
    patches = model.model.visual.patch_embed
    patches.proj = PatchProjection(patches.proj)
    experts.follow_autocast(model)
    if data_args.flattened():
        attention.separate(model)
        if named is None:
            attention.enable(model)
    logger.info("%s: %s, attention %s", path, type(model).__name__, model.config._attn_implementation)
    return model


class PatchProjection(nn.Module):
    """The vision tower's patch embedding as the matrix product that it is.

    Its Conv3d has a kernel as large as its input, which some back ends are slow at: 8 times on a CPU, a sixth
    of a nano model's training step.  Weight and bias are the convolution's own, under the same names.
    """

    def __init__(self, convolution: nn.Conv3d) -> None:
        super().__init__()
        self.weight = convolution.weight
        self.bias = convolution.bias

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        """patches [n, channels, frames, height, width] -> [n, hidden]."""
        return linear(patches.flatten(1), self.weight.flatten(1), self.bias)


def _quantised(config: PreTrainedConfig, training_args: TrainingArguments) -> dict[str, Any]:
    """What --lora_quantize adds to loading: the configuration, and the process's own device."""
    quantised = adapters.quantisation(training_args, config)
    if quantised is None:
        return {}
    return {"quantization_config": quantised, "device_map": {"": training_args.device}}


def _weight_dtype(training_args: TrainingArguments) -> torch.dtype:
    """fp32 weights, which --bf16 computes with in bf16; DeepSpeed keeps the fp32 copy itself."""
    if training_args.deepspeed and training_args.bf16:
        return torch.bfloat16
    return torch.float32


def load_processor(
    model_args: ModelArguments, data_args: DataArguments, training_args: TrainingArguments
) -> ProcessorMixin:
    """The checkpoint's processor with the pixel and frame limits of the command line.

    It is saved with the model, so that answering preprocesses as training did.
    """
    path = model_args.model_name_or_path
    processor = AutoProcessor.from_pretrained(path, cache_dir=training_args.cache_dir)
    limits = {
        "pixels": (data_args.min_pixels, data_args.max_pixels),
        "video_pixels": (data_args.video_min_pixels, data_args.video_max_pixels),
        "video_frames": (data_args.video_min_frames, data_args.video_max_frames),
    }
    for name, (least, most) in limits.items():
        if not 0 < least <= most:
            raise ValueError(f"limits of {name}: 0 < minimum <= maximum does not hold for {least} and {most}")
    processor.image_processor.size = _size(*limits["pixels"])
    video = processor.video_processor
    video.size = _size(*limits["video_pixels"])
    video.min_frames, video.max_frames = limits["video_frames"]
    video.fps = data_args.video_fps
    return processor


def _size(least: int, most: int) -> SizeDict:
    return SizeDict(shortest_edge=least, longest_edge=most)
