"""Command line of `train_qwen.py`: names of the original, plus every Hugging Face flag.

Defaults are the original's, but for those that only make training faster (`speed`).

`train_dpo.py` has the same, and what `preference` adds.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import cast

import torch
import transformers
from accelerate.utils import parse_flag_from_env

from qwenvl.data.budget import POLICIES
from qwenvl.train import speed


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

    dataset_use: str = field(
        default="", metadata={"help": "Data set names, comma separated; name%%50: half."}
    )
    dataset_config: str | None = field(
        default=None, metadata={"help": "TOML file that adds data sets: [name] annotation_path, data_path."}
    )
    eval_dataset_use: str = field(
        default="",
        metadata={"help": "Data sets to evaluate on, named as in --dataset_use: after the last step, and as "
                          "--eval_strategy says."},
    )  # fmt: skip
    data_flatten: bool = field(
        default=True,
        metadata={"help": "Lay a batch's samples end to end in one row; False: pad them to one length."},
    )
    data_packing: bool = field(
        default=False,
        metadata={"help": "Join samples to packs of up to --model_max_length tokens; rows of the annotation "
                          "file that are lists of samples stay the packs they are."},
    )  # fmt: skip
    pack_max_patches: int | None = field(
        default=None, metadata={"help": "Most vision patches of a pack; default: no limit."}
    )
    streaming: bool = field(
        default=False,
        metadata={
            "help": "Read rows as they come, unchecked before, in an order without end; needs --max_steps."
        },
    )
    streaming_buffer: int = field(
        default=1000,
        metadata={"help": "Streamed rows that are shuffled together; 1: the order of the files."},
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
    too_long: str = field(
        default="fail",
        metadata={"help": "A sample above --model_max_length stops the run, is left out, or loses its last "
                          "turns, or its last pictures and videos, until it fits.",
                  "choices": list(POLICIES)},
    )  # fmt: skip

    def flattened(self) -> bool:
        """Whether a batch is one row without padding."""
        return self.data_flatten or self.data_packing

    def __post_init__(self) -> None:
        if self.streaming and self.too_long != "fail":
            raise ValueError(
                f"--too_long {self.too_long} measures all rows before the first step, --streaming True reads "
                "them as they come; shorten the rows beforehand, or leave out --streaming"
            )
        if self.pack_max_patches is not None and (self.pack_max_patches < 1 or not self.data_packing):
            raise ValueError(
                f"--pack_max_patches {self.pack_max_patches}: give a number above 0, with --data_packing True"
            )
        if self.streaming and self.data_packing:
            raise ValueError(
                "--data_packing True measures all rows before the first step, --streaming True reads them as "
                "they come; leave it out, and stream packs written by tools/pack_data.py (.jsonl)"
            )
        if self.streaming_buffer < 1:
            raise ValueError(f"--streaming_buffer {self.streaming_buffer}: give a number of rows, 1 or more")


@dataclass
class TrainingArguments(transformers.TrainingArguments):
    """Hugging Face's TrainingArguments with the original's additions and defaults."""

    cache_dir: str | None = field(default=None, metadata={"help": "Where hub downloads are kept."})
    bf16: bool = field(
        default=cast(bool, None),
        metadata={"help": "Compute in bf16, weights stay fp32; default: where the device has bf16."},
    )
    dataloader_num_workers: int = field(
        default=cast(int, None),
        metadata={"help": "Processes that prepare batches, of each training process; default: up to "
                          f"{speed.MOST_WORKERS} beside a GPU, none on a CPU."},
    )  # fmt: skip
    muon: bool = field(
        default=False,
        metadata={"help": "The weight matrices of layers by Muon, all else by AdamW, at the same rates."},
    )
    model_max_length: int = field(
        default=512, metadata={"help": "Longest sample in tokens, media included; longer ones: --too_long."}
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
    lora_components: str | None = field(
        default=None,
        metadata={"help": "What gets adapters: some of language,merger,vision,experts; default: what the "
                          "--tune_mm_* flags name, else language. What else they name is trained in full."},
    )  # fmt: skip
    lora_dora: bool = field(default=False, metadata={"help": "DoRA: adapters with a magnitude of their own."})
    lora_quantize: str | None = field(
        default=None,
        metadata={"help": "QLoRA: load the language model's linear layers in 4bit or 8bit (CUDA).",
                  "choices": ["4bit", "8bit"]},
    )  # fmt: skip
    router_aux_loss_coef: float | None = field(
        default=None,
        metadata={"help": "Weight of the loss that balances a MoE's experts; default: the checkpoint's own "
                          "where the routers are trained, else 0. In the logged loss, not in eval_loss."},
    )  # fmt: skip
    warmup_ratio: float = field(
        default=0.0, metadata={"help": "Share of the steps for the warm-up; --warmup_steps wins."}
    )
    max_minutes: float | None = field(
        default=None,
        metadata={"help": "Stop and save after this many minutes of training, time before a resume included. "
                          "The learning-rate schedule ends with whichever comes first, last step or limit."},
    )  # fmt: skip
    peak_tflops: float | None = field(
        default=None,
        metadata={"help": "What a device does at most in the training's dtype, in 10^12 operations a "
                          "second (H100 SXM, dense bf16: 989); the log then has the share used (mfu)."},
    )  # fmt: skip
    eval_generate: int = field(
        default=0,
        metadata={"help": "Samples of each evaluation set that are answered and scored, spread over it."},
    )
    eval_max_new_tokens: int = field(
        default=128, metadata={"help": "Longest answer of --eval_generate, in tokens."}
    )
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
        if self.peak_tflops is not None and self.peak_tflops <= 0:
            raise ValueError(f"--peak_tflops {self.peak_tflops}: give a positive number")
        if not self.lora_enable and (self.lora_components or self.lora_dora or self.lora_quantize):
            raise ValueError("--lora_components, --lora_dora and --lora_quantize need --lora_enable True")
        if self.muon and (self.deepspeed or self.splits_weights()):
            raise ValueError("--muon True needs whole matrices; leave out --deepspeed and --fsdp, or --muon")
        if self.model_max_length < 1:
            raise ValueError(f"--model_max_length {self.model_max_length}: give a positive number of tokens")
        if self.eval_generate < 0 or self.eval_max_new_tokens < 1:
            raise ValueError(
                f"--eval_generate {self.eval_generate} --eval_max_new_tokens {self.eval_max_new_tokens}: "
                "give a number of samples, 0 or more, and of tokens, 1 or more"
            )
        if not torch.accelerator.is_available():
            self.use_cpu = True
        accelerator = None if self.use_cpu else torch.accelerator.current_accelerator()
        device = accelerator.type if accelerator else "cpu"
        if self.bf16 is None:
            self.bf16 = not self.fp16 and speed.choose_bf16(device)
        if self.dataloader_num_workers is None:
            self.dataloader_num_workers = speed.choose_workers(device)
        super().__post_init__()

    def splits_weights(self) -> bool:
        """Whether ZeRO-3 or FSDP is asked to split the weights over processes."""
        zero3 = bool(self.deepspeed) and self.hf_deepspeed_config.is_zero3()
        return zero3 or bool(self.fsdp) or parse_flag_from_env("ACCELERATE_USE_FSDP")
