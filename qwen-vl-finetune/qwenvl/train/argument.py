"""Command line of `train_qwen.py`: names and defaults of the original, plus every Hugging Face flag."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import transformers


@dataclass
class ModelArguments:
    """Which checkpoint is trained, and which of its components."""

    model_name_or_path: str = field(
        default="Qwen/Qwen2.5-VL-3B-Instruct", metadata={"help": "Checkpoint folder to start from."}
    )
    tune_mm_llm: bool = field(default=False, metadata={"help": "Train the language model and lm_head."})
    tune_mm_mlp: bool = field(
        default=False, metadata={"help": "Train the merger (vision to language), DeepStack mergers included."}
    )
    tune_mm_vision: bool = field(default=False, metadata={"help": "Train the vision encoder."})


@dataclass
class DataArguments:
    """Which data, how it is batched, and how large pictures and videos become.

    Pixel limits are pixels of the resized picture (`height * width`); for videos they mean what the
    model's own video processor means by them. They are written into the saved processor.
    """

    dataset_use: str = field(default="", metadata={"help": "Data set names, comma separated; name%50: half."})
    dataset_config: str | None = field(
        default=None, metadata={"help": "TOML file that adds data sets: [name] annotation_path, data_path."}
    )
    data_flatten: bool = field(
        default=False, metadata={"help": "Lay a batch's samples end to end in one row, without padding."}
    )
    data_packing: bool = field(
        default=False, metadata={"help": "Rows of the annotation file are lists of samples."}
    )
    base_interval: int = field(default=2, metadata={"help": "Accepted for old commands; has no effect."})
    max_pixels: int = field(default=28 * 28 * 576, metadata={"help": "Largest picture, in pixels."})
    min_pixels: int = field(default=28 * 28 * 16, metadata={"help": "Smallest picture, in pixels."})
    video_max_frames: int = field(default=8, metadata={"help": "Most frames taken from a video."})
    video_min_frames: int = field(default=4, metadata={"help": "Fewest frames taken from a video."})
    video_max_pixels: int = field(default=1024 * 28 * 28, metadata={"help": "Largest video, in pixels."})
    video_min_pixels: int = field(default=256 * 28 * 28, metadata={"help": "Smallest video, in pixels."})
    video_fps: float = field(default=2.0, metadata={"help": "Frames per second taken from a video."})
    bad_samples: str = field(
        default="fail",
        metadata={"help": "A sample that cannot be loaded stops the run, or is skipped and counted.",
                  "choices": ["fail", "skip"]},
    )  # fmt: skip


@dataclass
class TrainingArguments(transformers.TrainingArguments):
    """Hugging Face's TrainingArguments with the original's additions and defaults."""

    cache_dir: str | None = field(default=None, metadata={"help": "Where hub downloads are kept."})
    optim: str = field(default="adamw_torch", metadata={"help": "Optimiser, by Hugging Face's name."})
    model_max_length: int = field(
        default=512, metadata={"help": "Longest sample in tokens, media included. Longer ones are refused."}
    )
    mm_projector_lr: float | None = field(
        default=None, metadata={"help": "Learning rate of the merger; default --learning_rate."}
    )
    vision_tower_lr: float | None = field(
        default=None, metadata={"help": "Learning rate of the vision encoder; default --learning_rate."}
    )
    lora_enable: bool = field(default=False, metadata={"help": "Train low-rank adapters, not the weights."})
    lora_r: int = field(default=64, metadata={"help": "Rank of the adapters."})
    lora_alpha: int = field(default=128, metadata={"help": "Scale of the adapters (alpha / r)."})
    lora_dropout: float = field(default=0.0, metadata={"help": "Dropout before the adapters."})
    warmup_ratio: float = field(
        default=0.0, metadata={"help": "Share of the steps for the warm-up; --warmup_steps wins."}
    )
    max_minutes: float | None = field(
        default=None,
        metadata={"help": "Stop and save after this many minutes of training, time before a resume included. "
                          "The learning-rate schedule ends with whichever comes first, last step or limit."},
    )  # fmt: skip
    remove_unused_columns: bool = field(
        default=False, metadata={"help": "Drop batch entries the model does not name. Must stay False."}
    )
    ddp_find_unused_parameters: bool | None = field(
        default=False,
        metadata={"help": "Every trained parameter takes part in every step here, so DDP need not search."},
    )

    def __post_init__(self) -> None:
        if not 0 <= self.warmup_ratio < 1:
            raise ValueError(f"--warmup_ratio {self.warmup_ratio}: give a share of the steps, 0 <= ratio < 1")
        if self.warmup_ratio and not self.warmup_steps:
            # Hugging Face reads a --warmup_steps below 1 as a share of the steps.
            self.warmup_steps = self.warmup_ratio
        if self.remove_unused_columns:
            raise ValueError("--remove_unused_columns True would drop position ids; leave it False")
        if self.max_minutes is not None and self.max_minutes <= 0:
            raise ValueError(f"--max_minutes {self.max_minutes}: give a positive number of minutes")
        if self.model_max_length < 1:
            raise ValueError(f"--model_max_length {self.model_max_length}: give a positive number of tokens")
        if not torch.accelerator.is_available():
            self.use_cpu = True
        super().__post_init__()
