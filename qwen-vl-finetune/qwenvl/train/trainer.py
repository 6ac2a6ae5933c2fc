"""The Hugging Face Trainer, with the loss, the parameter groups and the checkpoints of this repository.

    batch (padded or flattened) --to the device, pixels scaled there--> model inputs
      -> hidden states -> lm_head where the next token carries loss, logits in pieces
      -> sum of cross-entropies / loss tokens of the whole optimiser step, all micro-batches and ranks

so batch 8, accumulation 8 and eight ranks with one sample each take the same step.

With --max_minutes the schedule's place is the larger of the share of steps done and the share of time used,
so the learning rate has run its whole course whichever ends first.
"""

from __future__ import annotations

import dataclasses
import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors import SafetensorError
from torch.optim.lr_scheduler import LambdaLR
from transformers import PreTrainedModel, ProcessorMixin, Trainer
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled, unset_hf_deepspeed_config

from qwen_vl_utils import scale_pixels
from qwenvl.data.data_processor import StreamedDataset
from qwenvl.data.packed import PackedDataset, PackSampler
from qwenvl.train import adapters, checkpoints, evaluation, expert_layout, modality
from qwenvl.train.argument import DataArguments, ModelArguments, TrainingArguments
from qwenvl.train.attention import Segments
from qwenvl.train.callbacks import Clock
from qwenvl.train.experts import ExpertBalance, balance_coefficient, find_routers
from qwenvl.train.linear_cross_entropy import losses_for_logits
from qwenvl.train.metering import Meter, TokenLosses, Work, count_loss_tokens
from qwenvl.train.muon import MuonAndAdamW
from qwenvl.train.parameters import component_table, parameter_groups

ARGUMENTS_FILE = "training_arguments.json"


def token_losses(model: torch.nn.Module, inputs: dict[str, Any]) -> TokenLosses:
    """The cross-entropies of a batch, times `loss_weights` where there are some.

    inputs: a padded or flattened batch with labels [B, S].  Logits are computed only for the columns in which
    some row's next token carries loss, and never all of them are in memory (see `linear_cross_entropy`).
    """
    labels = inputs["labels"]
    columns = (labels[:, 1:] != -100).any(dim=0).nonzero()[:, 0]
    with losses_for_logits(model, labels[:, columns + 1]):
        outputs = model(**model_inputs(inputs), logits_to_keep=columns, use_cache=False)
    losses = outputs.logits
    if "loss_weights" in inputs:
        losses = losses * inputs["loss_weights"][:, columns + 1]
    return TokenLosses(losses, columns, outputs)


def model_inputs(batch: dict[str, Any]) -> dict[str, Any]:
    """A collated batch as the model's forward takes it: without what the loss needs, `cu_seq_lens_*` as
    `segments`.
    """
    ours = ("labels", "loss_weights", "dataset")
    renamed = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")
    inputs = {name: value for name, value in batch.items() if name not in ours + renamed}
    if "cu_seq_lens_q" in batch:
        inputs["segments"] = Segments(batch["cu_seq_lens_q"], int(batch["max_length_q"]))
    return inputs


class QwenVLTrainer(Trainer):
    """Trainer of a Qwen-VL model.

    processor: saved with every checkpoint; stored_dtype: what the weights are finally saved as.
    """

    program: ClassVar[str] = "train_qwen"
    arguments: ClassVar[tuple[type, ...]] = (ModelArguments, DataArguments, TrainingArguments)
    pairs: ClassVar[bool] = False  # Whether rows have two answers.
    measured: ClassVar[tuple[str, ...]] = ("loss",)  # Of an evaluation set, the loss first.

    args: TrainingArguments
    model: Any  # The base class allows for none; here there always is one.
    model_wrapped: Any

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
        # Older checkpoints go when the newest is whole, later than the base class would let them go.
        self.save_total_limit, args.save_total_limit = args.save_total_limit, None
        super().__init__(model=model, args=args, **kwargs)
        self.add_callback(self.clock)
        if self.eval_dataset:
            self.add_callback(evaluation.EvaluateAtEnd())
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
        packed = isinstance(self.train_dataset, PackedDataset)
        self.meter = Meter(
            model,
            model.config,
            getattr(self.train_dataset, "names", []),
            pack_tokens=args.train_batch_size * args.model_max_length if packed else None,
            pack_patches=args.train_batch_size * (data_args.pack_max_patches or 0) if packed else None,
            peak=args.peak_tflops,
        )
        self.add_callback(self.meter)
        self.balance_coefficient = balance_coefficient(model, args)
        self.experts = ExpertBalance(model) if find_routers(model) else None
        self._step_tokens = 0.0
        self.vl_config = model.config
        self._visual = next(part for name, part in model.named_modules() if name.endswith("model.visual"))

    def create_optimizer(self, model=None) -> torch.optim.Optimizer:
        """One parameter group per component and kind of decay."""
        if self.optimizer is None:
            trained = self.model if model is None else model
            kind, options = self.get_optimizer_cls_and_kwargs(self.args, trained)
            if self.args.muon:
                kind, options = MuonAndAdamW, {name: options[name] for name in ("betas", "eps")}
            self.optimizer = kind(parameter_groups(trained, self.components, muon=self.args.muon), **options)
        return self.optimizer

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        """Packs in an order in which the processes' packs of one step cost alike, streamed rows one after
        another to the last step; other data as ever.
        """
        data = self.train_dataset if train_dataset is None else train_dataset
        if isinstance(data, StreamedDataset):
            return range(self.args.max_steps * self.args.gradient_accumulation_steps * self._together())
        if not isinstance(data, PackedDataset):
            return super()._get_train_sampler(train_dataset)
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        return PackSampler(data.costs, self._together(), seed, lambda: int(self.state.epoch or 0))

    def _together(self) -> int:
        """Items of one micro-batch over all processes."""
        return self.args.world_size * self.args.train_batch_size

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

    def get_batch_samples(self, epoch_iterator, num_batches, device) -> tuple[list[Any], Any]:
        """The micro-batches of one optimiser step, and its `items` over all of them and all ranks."""
        batches = []
        for _ in range(num_batches):
            with self.meter.waiting():
                batch = next(epoch_iterator, None)
            if batch is None:
                break
            batches.append(batch)
        counts = torch.zeros(1 + len(Work._fields), dtype=torch.float64, device=device)
        if self.is_world_process_zero():
            counts[0] = self.clock.seconds
        for batch in batches:
            counts[1:] += self.meter.work(batch)
        total: Any = self.over_processes(counts).tolist()
        self.clock.agreed, work = total[0], Work(*total[1:])
        self.meter.add(work, len(batches))
        self._step_tokens = work.tokens
        return batches, self.items(work)

    def items(self, work: Work) -> float:
        """What the loss is a mean over."""
        return work.loss_tokens

    def _prepare_inputs(self, inputs: Any) -> Any:
        """A collated batch on its device, pixels scaled to float32."""
        return scale_pixels(super()._prepare_inputs(inputs), self.processor)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The batch's share of the optimiser step's loss, scaled so that the mean over ranks is the whole."""
        seen = inputs
        if self.split_weights() or self._visual_trained():
            seen = modality.complete(inputs, self.vl_config, each=self.split_weights())
        total, outputs = self.objective(model, seen)
        if num_items_in_batch is None:  # Not from the training loop: the batch's own mean.
            loss = total / (self.items(Work(*self.meter.work(inputs).tolist())) or 1)
        else:  # The base class hands on what get_batch_samples counted.
            loss = total * (self.accelerator.num_processes / (num_items_in_batch or 1))
            if self.experts:
                balance = self.experts.loss(inputs, self._step_tokens, self.over_processes)
                loss = loss + balance * (self.balance_coefficient * self.accelerator.num_processes)
        return (loss, outputs) if return_outputs else loss

    def objective(self, model: torch.nn.Module, inputs: dict[str, Any]) -> tuple[torch.Tensor, Any]:
        """The sum of a training batch's losses over its `items`, and the model's outputs."""
        found = self.trained_losses(model, inputs)
        self.meter.add_losses(inputs, found)
        return found.losses.sum(), found.outputs

    def trained_losses(self, model: torch.nn.Module, inputs: dict[str, Any]) -> TokenLosses:
        """The token losses by the model that is trained, whose experts are watched."""
        with self.experts.recording() if self.experts else nullcontext():
            return token_losses(model, inputs)

    def over_processes(self, part: torch.Tensor) -> torch.Tensor:
        """The sum of a tensor over all processes."""
        total = self.accelerator.reduce(part, reduction="sum")
        assert isinstance(total, torch.Tensor)
        return total

    def eval_sums(self, batch: dict[str, Any]) -> torch.Tensor:
        """The `items` of an evaluation batch, and the sums over them of what is `measured`, float64.

        No process waits for another, except where weights are split over them: there all must come here
        equally often.
        """
        inputs = seen = self._prepare_inputs(batch)
        if self.split_weights():
            seen = modality.complete(inputs, self.vl_config, each=True)
        with self.compute_loss_context_manager():
            return self.measure(self.model_wrapped if self.split_weights() else self.model, seen)

    def measure(self, model: torch.nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
        """`eval_sums` of a batch on the device in which every process runs the same modules."""
        losses = token_losses(model, inputs).losses
        return torch.stack([count_loss_tokens(inputs).double(), losses.double().sum()])

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval") -> dict[str, float]:
        """The exact losses of all evaluation sets, and answers; see `evaluation`."""
        sets: Any = eval_dataset or self.eval_dataset
        with self.meter.paused():
            metrics = evaluation.run(self, sets)
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _visual_trained(self) -> bool:
        return self.model.training and any(p.requires_grad for p in self._visual.parameters())

    def split_weights(self) -> bool:
        """Whether each module's weights are gathered from all processes when it runs."""
        return self.is_fsdp_enabled or is_deepspeed_zero3_enabled()

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the numbers of `metering`, and of the experts, to each line of the training log."""
        if "loss" in logs:
            logs.update(self.meter.report(self.accelerator))
            if self.experts:
                logs.update(self.experts.statistics())
        super().log(logs, start_time)

    def _save_checkpoint(self, model, trial) -> None:
        """A checkpoint, whole when all processes have written; then the oldest beyond --save_total_limit go.

        Raises ValueError where it cannot be written, as on a full disk; what was saved before stays whole.
        """
        folder = Path(str(self.args.output_dir)) / f"checkpoint-{self.state.global_step}"
        try:
            with self.meter.paused():
                if self.args.should_save:
                    checkpoints.unseal(folder)
                super()._save_checkpoint(model, trial)
                self.accelerator.wait_for_everyone()
                if self.args.should_save:
                    checkpoints.seal(folder)
        except (OSError, RuntimeError, SafetensorError) as error:
            raise ValueError(
                f"{folder} could not be saved: {error}. Checkpoints before it are whole: mend that (on a "
                "full disk make room) and start the same command again"
            ) from error
        if self.args.should_save:
            best = self.state.best_model_checkpoint
            checkpoints.rotate(folder.parent, self.state.global_step, self.save_total_limit, best)

    def save_final(self) -> None:
        """The trained model into output_dir, in the dtype it came in, LoRA adapters merged, as vLLM loads it.

        The adapters themselves go to output_dir/adapter.  Intermediate checkpoints keep the training's dtype.
        """
        output_dir = str(self.args.output_dir)
        if self.args.lora_enable:
            self.save_model(f"{output_dir}/adapter")
            if self.args.should_save:
                base = self.model_args.model_name_or_path
                unset_hf_deepspeed_config()  # Under ZeRO-3 the base would be split while it loads.
                adapters.merge(f"{output_dir}/adapter", output_dir, base, self.args.cache_dir)
                self._save_beside(Path(output_dir))
            self.save_state()
            return
        if not self.is_deepspeed_enabled and not self.is_fsdp_enabled:
            self.model.to(self.stored_dtype)
        self.save_model()
        if self.args.should_save:
            expert_layout.publish(output_dir)
        self.save_state()

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Everything that answering needs: weights, configuration, processor; and the arguments used."""
        super().save_model(output_dir, _internal_call)
        if self.args.should_save:
            folder = Path(output_dir or str(self.args.output_dir))
            self._save_beside(folder)
            if self.args.lora_enable:
                path = self.model_args.model_name_or_path
                adapters.write_base(folder, path, adapters.fingerprint(path, self.args.cache_dir))

    def _save_beside(self, folder: Path) -> None:
        """The processor and the arguments used."""
        self.processor.save_pretrained(folder)
        used = {
            "model": dataclasses.asdict(self.model_args),
            "data": dataclasses.asdict(self.data_args),
            "training": self.args.to_dict() | {"save_total_limit": self.save_total_limit},
        }
        (folder / ARGUMENTS_FILE).write_text(json.dumps(used, indent=2, default=str) + "\n")
