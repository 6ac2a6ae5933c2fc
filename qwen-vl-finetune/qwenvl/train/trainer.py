"""The Hugging Face Trainer, with the loss, the parameter groups and the checkpoints of this repository.

    batch (padded or flattened) -> hidden states -> lm_head where the next token carries loss
      -> sum of cross-entropies / loss tokens of the whole optimiser step, all micro-batches and ranks

so batch 8, accumulation 8 and eight ranks with one sample each take the same step.

With --max_minutes the schedule's place is the larger of the share of steps done and the share of time used,
so the learning rate has run its whole course whichever ends first.
"""

from __future__ import annotations

import dataclasses
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch.nn.functional import cross_entropy
from torch.optim.lr_scheduler import LambdaLR
from transformers import PreTrainedModel, ProcessorMixin, Trainer

from qwenvl.train import expert_layout
from qwenvl.train.argument import DataArguments, ModelArguments, TrainingArguments
from qwenvl.train.attention import Segments
from qwenvl.train.callbacks import Clock
from qwenvl.train.parameters import component_table, parameter_groups

ARGUMENTS_FILE = "training_arguments.json"


@dataclass
class Throughput:
    """Samples and tokens trained on since `start`, over all ranks."""

    samples: int = 0
    tokens: int = 0
    start: float = dataclasses.field(default_factory=time.perf_counter)

    def per_second(self) -> dict[str, float]:
        """samples_per_second and tokens_per_second since `start`."""
        seconds = max(time.perf_counter() - self.start, 1e-9)
        return {
            "samples_per_second": round(self.samples / seconds, 2),
            "tokens_per_second": round(self.tokens / seconds, 1),
        }


def count_loss_tokens(labels: torch.Tensor) -> torch.Tensor:
    """Tokens of labels [B, S] that a previous position predicts and that carry loss."""
    return (labels[:, 1:] != -100).sum()


def token_losses(model: torch.nn.Module, inputs: dict[str, Any]) -> tuple[torch.Tensor, Any]:
    """The cross-entropies of a batch, one a token (0 where it carries no loss), and the model's outputs.

    inputs: a padded or flattened batch with labels [B, S].  Logits are computed only for the columns in which
    some row's next token carries loss.
    """
    labels = inputs["labels"]
    columns = (labels[:, 1:] != -100).any(dim=0).nonzero()[:, 0]
    outputs = model(**model_inputs(inputs), logits_to_keep=columns, use_cache=False)
    logits = outputs.logits.flatten(0, 1).float()
    targets = labels[:, columns + 1].flatten()
    return cross_entropy(logits, targets, ignore_index=-100, reduction="none"), outputs


def model_inputs(batch: dict[str, Any]) -> dict[str, Any]:
    """A collated batch as the model's forward takes it: no labels, `cu_seq_lens_*` as `segments`."""
    renamed = ("labels", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")
    inputs = {name: value for name, value in batch.items() if name not in renamed}
    if "cu_seq_lens_q" in batch:
        inputs["segments"] = Segments(batch["cu_seq_lens_q"], int(batch["max_length_q"]))
    return inputs


class QwenVLTrainer(Trainer):
    """Trainer of a Qwen-VL model.

    processor: saved with every checkpoint; stored_dtype: what the weights are finally saved as.
    """

    args: TrainingArguments

    def __init__(
        self,
        *,
        model: PreTrainedModel,
        processor: ProcessorMixin,
        stored_dtype: torch.dtype,
        model_args: ModelArguments,
        data_args: DataArguments,
        args: TrainingArguments,
        **kwargs,
    ) -> None:
        use_cache = model.config.to_dict().get("use_cache")
        self.clock = Clock(args.max_minutes)
        super().__init__(model=model, args=args, **kwargs)
        self.add_callback(self.clock)
        # The base class writes its own setting into the configuration that is saved for inference.
        if use_cache is None:
            delattr(model.config, "use_cache")
        else:
            model.config.use_cache = use_cache
        # The loss is already that of the whole optimiser step; without this the base class divides it again.
        self.model_accepts_loss_kwargs = True
        self.processor = processor
        self.stored_dtype = stored_dtype
        self.model_args = model_args
        self.data_args = data_args
        self.components = component_table(model_args, args)
        self.throughput = Throughput()
        self._visual = next(part for name, part in model.named_modules() if name.endswith("model.visual"))

    def create_optimizer(self, model=None) -> torch.optim.Optimizer:
        """One parameter group per component and kind of decay."""
        if self.optimizer is None:
            trained = self.model if model is None else model
            kind, options = self.get_optimizer_cls_and_kwargs(self.args, trained)
            self.optimizer = kind(parameter_groups(trained, self.components), **options)
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None):
        """The schedule that the flags name, hurried on by the clock where --max_minutes is given."""
        scheduler = super().create_scheduler(num_training_steps, optimizer)
        if self.args.max_minutes is not None:
            if not isinstance(scheduler, LambdaLR):
                kind = self.args.lr_scheduler_type
                raise ValueError(f"--lr_scheduler_type {kind} cannot follow --max_minutes, linear can")
            scheduler.lr_lambdas = [
                lambda step, factor=factor: factor(self._scheduled_step(step, num_training_steps))
                for factor in scheduler.lr_lambdas
            ]
        return scheduler

    def _scheduled_step(self, step: int, steps: int) -> int:
        """The place in a schedule of `steps` that the step count or the clock has reached."""
        assert self.clock.limit is not None
        return max(step, int(steps * min(self.clock.agreed / self.clock.limit, 1.0)))

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """The micro-batches of one optimiser step, and its loss tokens over all of them and all ranks."""
        batches = []
        for _ in range(num_batches):
            batch = next(epoch_iterator, None)
            if batch is None:
                break
            batches.append(batch)
        counts = torch.zeros(4, dtype=torch.int64, device=device)
        if self.is_world_process_zero():
            counts[3] = int(1000 * self.clock.seconds)
        for batch in batches:
            padded = "attention_mask" in batch
            counts[0] += count_loss_tokens(batch["labels"])
            counts[1] += len(batch["labels"]) if padded else len(batch["cu_seq_lens_q"]) - 1
            counts[2] += batch["attention_mask"].sum() if padded else batch["labels"].numel()
        total = self.accelerator.reduce(counts, reduction="sum")
        assert isinstance(total, torch.Tensor)
        loss_tokens, samples, tokens, clock = total.tolist()
        self.throughput.samples += samples
        self.throughput.tokens += tokens
        self.clock.agreed = clock / 1000
        return batches, loss_tokens

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The batch's share of the optimiser step's loss, scaled so that the mean over ranks is the whole."""
        losses, outputs = token_losses(model, inputs)
        total = losses.sum()
        if self._visual_trained() and "pixel_values" not in inputs and "pixel_values_videos" not in inputs:
            total = total + 0.0 * self._see_nothing()
        if num_items_in_batch is None:  # Evaluation: the batch's own mean.
            loss = total / count_loss_tokens(inputs["labels"]).clamp(min=1)
        else:
            loss = total * (self.accelerator.num_processes / max(int(num_items_in_batch), 1))
        return (loss, outputs) if return_outputs else loss

    def _visual_trained(self) -> bool:
        return self.model.training and any(p.requires_grad for p in self._visual.parameters())

    def _see_nothing(self) -> torch.Tensor:
        """The vision tower on one black picture.

        A batch of text alone reaches no vision parameter; without this, ranks would wait for gradients that
        never come.  DeepStack mergers take part too.
        """
        config = self._visual.config
        side = config.spatial_merge_size
        grid = torch.tensor([[1, side, side]], device=self.args.device)
        width = config.in_channels * config.temporal_patch_size * config.patch_size**2
        pixels = torch.zeros(side * side, width, device=self.args.device, dtype=self._visual.dtype)
        seen = self._visual(pixels, grid_thw=grid, return_dict=True)
        features = [seen.pooler_output, *seen.get("deepstack_features", ())]
        return torch.stack([feature.sum() for feature in features]).sum()

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds samples and tokens per second to each line of the training log."""
        if "loss" in logs:
            logs.update(self.throughput.per_second())
            self.throughput = Throughput()
        super().log(logs, start_time)

    def save_final(self) -> None:
        """The trained model into output_dir, in the dtype it came in, LoRA adapters merged, as vLLM loads it.

        The adapters themselves go to output_dir/adapter.  Intermediate checkpoints keep the training's dtype.
        """
        if self.args.lora_enable:
            self.save_model(f"{self.args.output_dir}/adapter")
            self.model = cast(Any, self.model).merge_and_unload()
        if not self.is_deepspeed_enabled and not self.is_fsdp_enabled:
            self.model.to(self.stored_dtype)
        self.save_model()
        if self.args.should_save:
            expert_layout.publish(str(self.args.output_dir))
        self.save_state()

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Everything that answering needs: weights, configuration, processor; and the arguments used."""
        super().save_model(output_dir, _internal_call)
        if self.args.should_save:
            folder = Path(output_dir or str(self.args.output_dir))
            self.processor.save_pretrained(folder)
            used = {
                "model": dataclasses.asdict(self.model_args),
                "data": dataclasses.asdict(self.data_args),
                "training": self.args.to_dict(),
            }
            (folder / ARGUMENTS_FILE).write_text(json.dumps(used, indent=2, default=str) + "\n")
