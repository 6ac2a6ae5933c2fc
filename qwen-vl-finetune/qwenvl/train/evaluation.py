"""Evaluation while training: exact losses, and greedy answers with what they are worth.

    --eval_dataset_use a,b -> {"a": SupervisedDataset, "b": ...}
      -> loss      each process a share of the rows, in batches as training has them
                   -> token losses and loss tokens, summed over all processes -> eval_a/loss, eval_loss
      -> answers   with --eval_generate N: N rows spread over each set, the prompt up to the last answer
                   -> generate, scored by qwenvl_eval.scoring -> eval_a/exact, /edit, /choice, /iou
                   -> output_dir/eval-samples/step-S.jsonl and step-S.html

TensorBoard and W&B show eval_a/loss as eval/a/loss.  Training does not notice: random states, the mode of the
modules and the attention are what they were.
"""

from __future__ import annotations

import copy
import logging
import random
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from accelerate.utils import gather_object
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm
from transformers import GenerationConfig, TrainerCallback
from transformers.trainer_utils import IntervalStrategy

from qwen_vl_utils import processor_inputs
from qwenvl.data.data_processor import SupervisedDataset
from qwenvl.data.sources import sample_where, samples_of
from qwenvl.train import attention
from qwenvl.train.argument import TrainingArguments
from qwenvl.train.eval_page import Answer, Judged, write_samples
from qwenvl_eval.scoring import Outcome
from qwenvl_eval.scoring.targets import METRICS, targets_of
from qwenvl_eval.scoring.text import edit_similarity

if TYPE_CHECKING:
    from qwenvl.train.trainer import QwenVLTrainer

logger = logging.getLogger(__name__)

EvalSets = Mapping[str, SupervisedDataset]
FOLDER = "eval-samples"
USED = ("exact", "edit", "choice", "iou")

# What a process runs whose rows are used up, where modules need all processes: a token without loss.
_BLANK = {
    "input_ids": torch.zeros(1, dtype=torch.int64),
    "labels": torch.full((1,), -100),
    "position_ids": torch.zeros(3, 1, dtype=torch.int64),
    "segment_lengths": torch.ones(1, dtype=torch.int64),
}


def check(args: TrainingArguments, sets: EvalSets | None, measured: Sequence[str]) -> None:
    """Raises ValueError where the flags ask for an evaluation that cannot be. measured: of each set."""
    if not sets:
        strategy = IntervalStrategy(args.eval_strategy).value
        asked = {
            "eval_strategy": "" if strategy == "no" else strategy,
            "eval_generate": args.eval_generate,
            "load_best_model_at_end": args.load_best_model_at_end,
        }
        for flag, value in asked.items():
            if value:
                raise ValueError(f"--{flag} {value}: there is nothing to evaluate; give --eval_dataset_use")
        return
    if args.eval_generate and args.splits_weights():
        raise ValueError(
            f"--eval_generate {args.eval_generate}: under ZeRO-3 and FSDP each module's weights are gathered "
            "from all processes, and answers of different lengths would not run the same modules; use "
            "scripts/zero2.json, or --eval_generate 0, which leaves the losses"
        )
    best = args.metric_for_best_model
    if best is not None and (best := "eval_" + best.removeprefix("eval_")) not in (
        known := _keys(args, sets, measured)
    ):
        raise ValueError(f"--metric_for_best_model {best}: there are {', '.join(known)}")


def _keys(args: TrainingArguments, sets: EvalSets, measured: Sequence[str]) -> list[str]:
    """The names of all that an evaluation finds."""
    keys = ["eval_loss"] + [f"eval_{name}/{number}" for name in sets for number in measured]
    for question in _all_questions(sets, args.eval_generate):
        keys += [f"eval_{question.dataset}/{metric}" for metric in question.targets]
    return list(dict.fromkeys(keys))


class EvaluateAtEnd(TrainerCallback):
    """One evaluation after the last step, whichever that is, of a run that has evaluation sets."""

    def on_step_end(self, args, state, control, **kwargs) -> None:
        if control.should_training_stop and args.eval_strategy != IntervalStrategy.EPOCH:
            control.should_evaluate = True


def run(trainer: QwenVLTrainer, sets: EvalSets) -> dict[str, float]:
    """Evaluate all sets; the metrics by name, the same on every process."""
    begin, args = time.perf_counter(), trainer.args
    metrics: dict[str, float] = {}
    overall = torch.zeros(1 + len(trainer.measured), dtype=torch.float64)
    with _undisturbed(trainer.model_wrapped, args.device):
        for name, rows in sets.items():
            sums = _sum_losses(trainer, name, rows)
            means = _means(sums)
            metrics |= {f"eval_{name}/{n}": mean for n, mean in zip(trainer.measured, means, strict=True)}
            overall += sums
        metrics["eval_loss"] = _means(overall)[0]
        answers = _answer_all(trainer, _all_questions(sets, args.eval_generate))
    metrics |= _average(answers)
    if answers and args.should_save:
        write_samples(Path(str(args.output_dir)) / FOLDER, trainer.state.global_step, answers)
    shown = ", ".join(f"{name.removeprefix('eval_')} {value:.4f}" for name, value in metrics.items())
    logger.info("evaluation at step %d: %s", trainer.state.global_step, shown)
    return metrics | {"eval_runtime": round(time.perf_counter() - begin, 2)}


@contextmanager
def _undisturbed(model: torch.nn.Module, device: torch.device) -> Iterator[None]:
    """Evaluation mode and no gradients within the block; mode and random states put back after it."""
    training, python, numpy = model.training, random.getstate(), np.random.get_state()
    devices = [] if device.type == "cpu" else [device]
    kind = "cuda" if device.type == "cpu" else device.type  # Of no device: the CPU's state is always kept.
    with torch.random.fork_rng(devices, device_type=kind), torch.no_grad():
        model.eval()
        try:
            yield
        finally:
            model.train(training)
            random.setstate(python)
            np.random.set_state(numpy)


# ---- loss


class _Rows(Dataset):
    """Items by index, None for one that cannot be loaded where --bad_samples skip leaves it out."""

    def __init__(self, rows: SupervisedDataset) -> None:
        self.rows = rows

    def __getitem__(self, index: int) -> dict[str, torch.Tensor] | None:
        try:
            return self.rows.load(index)
        except ValueError as error:
            if self.rows.bad_samples == "fail":
                raise
            logger.warning("left out of the evaluation: %s", error)
            return None


@dataclass(frozen=True)
class _Collate:
    """The run's collator; where nothing is left of a batch, a token without loss."""

    collate: Callable[[list[Any]], dict[str, Any]]

    def __call__(self, items: list[Any]) -> dict[str, Any]:
        return self.collate([item for item in items if item is not None] or [_BLANK])


def _sum_losses(trainer: QwenVLTrainer, name: str, rows: SupervisedDataset) -> torch.Tensor:
    """What `eval_sums` gives of a set's batches, summed over all of them and all processes, no row twice."""
    args = trainer.args
    mine = list(range(args.process_index, len(rows), args.world_size))
    size = args.per_device_eval_batch_size
    batches = [mine[at : at + size] for at in range(0, len(mine), size)]
    if trainer.split_weights():
        most = -(-len(rows) // args.world_size)
        batches += [[]] * (-(-most // size) - len(batches))
    loader = DataLoader(
        _Rows(rows), batch_sampler=batches, collate_fn=_Collate(trainer.data_collator),
        num_workers=args.dataloader_num_workers, pin_memory=args.device.type == "cuda",
    )  # fmt: skip
    sums = torch.zeros(1 + len(trainer.measured), dtype=torch.float64, device=args.device)
    for batch in _shown(loader, f"evaluating {name}", args):
        sums += trainer.eval_sums(batch)
    return trainer.over_processes(sums).cpu()


def _shown(iterable: Any, what: str, args: TrainingArguments) -> tqdm:
    """A bar, which the first process draws; in a log file a line every half minute."""
    interval = 0.1 if sys.stderr.isatty() else 30
    hidden = args.disable_tqdm or args.process_index != 0
    return tqdm(iterable, what, leave=False, mininterval=interval, disable=hidden, dynamic_ncols=True)


def _means(sums: torch.Tensor) -> list[float]:
    count, *totals = sums.tolist()
    return [total / count if count else float("nan") for total in totals]


# ---- answers


@dataclass(frozen=True)
class Question:
    """The last answer of a row, and what is said before it. targets: metric -> what its scorer wants."""

    dataset: str
    row: str
    prompt: list[dict[str, Any]]
    tools: list[Any] | None
    reference: str
    targets: dict[str, dict[str, Any]]


def _all_questions(sets: EvalSets, count: int) -> list[Question]:
    return [question for name, rows in sets.items() for question in questions_of(name, rows, count)]


def questions_of(name: str, rows: SupervisedDataset, count: int) -> Iterator[Question]:
    """The questions of `count` rows spread evenly over a set, of all where it has fewer.

    Of a packed list the first sample; a row whose last answer is a tool call alone is passed over.
    """
    count = min(count, len(rows))
    for number in range(count):
        source, index = rows.row(number * len(rows) // count)
        row = source.annotations.row(index)
        where = sample_where(source.annotations.where(index), row, 0)
        try:
            sample = rows.encode.read(samples_of(row)[0], source.data_path)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error
        roles = [message["role"] for message in sample.messages]
        last = len(roles) - 1 - roles[::-1].index("assistant")
        reference = _without_thought(sample.messages[last]["content"], opened=False)
        if reference:
            targets = targets_of(_text(sample.messages[last - 1]), reference, USED)
            yield Question(name, where, sample.messages[:last], sample.tools, reference, targets)


def _text(message: dict[str, Any]) -> str:
    content = message["content"]
    return content if isinstance(content, str) else "".join(item.get("text", "") for item in content)


def _without_thought(text: str, *, opened: bool) -> str:
    """What comes after the thought; "" where an opened one does not end."""
    _, end, after = text.rpartition("</think>")
    if not end and (opened or text.lstrip().startswith("<think>")):
        return ""
    return after.strip()


def _answer_all(trainer: QwenVLTrainer, questions: Sequence[Question]) -> list[Answer]:
    """The answers to all questions, each asked by one of the processes, in order, on every process."""
    args = trainer.args
    mine = list(enumerate(questions))[args.process_index :: args.world_size]
    answers: list[tuple[int, Answer]] = []
    bar = _shown(None, "answering", args)
    bar.total = len(mine)
    # One call has one list of tools.
    for _, alike in groupby(mine, key=lambda numbered: numbered[1].tools):
        group, size = list(alike), args.per_device_eval_batch_size
        for at in range(0, len(group), size):
            numbers, asked = zip(*group[at : at + size], strict=True)
            answers += zip(numbers, _answer(trainer, asked), strict=True)
            bar.update(len(asked))
    bar.close()
    together = gather_object(answers) if questions else []
    return [answer for _, answer in sorted(together, key=lambda numbered: numbered[0])]


def _answer(trainer: QwenVLTrainer, questions: Sequence[Question]) -> list[Answer]:
    """Ask a batch of questions."""
    processor: Any = trainer.processor
    inputs = processor_inputs(
        processor, [question.prompt for question in questions], add_generation_prompt=True,
        padding=True, padding_side="left", tools=questions[0].tools,
    ).to(trainer.args.device)  # fmt: skip
    config = _greedy(trainer)
    length = inputs["input_ids"].shape[1]
    with attention.suspended(trainer.vl_config):
        output = trainer.model.generate(**inputs, generation_config=config, use_cache=True)
    found = []
    for question, prompt, ids in zip(
        questions, inputs["input_ids"], output[:, length:].tolist(), strict=True
    ):
        end = next((place for place, token in enumerate(ids) if token in config.eos_token_id), None)
        opening = processor.tokenizer.decode(prompt[-4:])
        opened = "<think>" in opening and "</think>" not in opening
        text = _without_thought(processor.tokenizer.decode(ids[:end]), opened=opened)
        verdicts = {name: _judge(name, text, question, end is None) for name in question.targets}
        found.append(
            Answer(
                question.dataset,
                question.row,
                question.prompt,
                question.reference,
                text,
                end is None,
                verdicts,
            )
        )
    return found


def _greedy(trainer: QwenVLTrainer) -> GenerationConfig:
    """The checkpoint's own settings, without chance."""
    config = copy.deepcopy(trainer.model.generation_config)
    config.do_sample = False
    config.temperature = config.top_p = config.top_k = config.min_p = config.max_length = None
    config.max_new_tokens = trainer.args.eval_max_new_tokens
    tokenizer: Any = trainer.processor.tokenizer  # pyright: ignore[reportAttributeAccessIssue]
    ends = tokenizer.eos_token_id if config.eos_token_id is None else config.eos_token_id
    config.eos_token_id = ends if isinstance(ends, list) else [ends]
    if config.pad_token_id is None:
        config.pad_token_id = tokenizer.pad_token_id
    return config


def _judge(metric: str, text: str, question: Question, truncated: bool) -> Judged:
    verdict = METRICS[metric](text, question.targets[metric])
    outcome = Outcome.TRUNCATED if truncated and not verdict.right else verdict.outcome
    if metric == "edit":
        return Judged(outcome, edit_similarity(text, question.reference))
    if metric == "iou":  # The verdict's text begins with the overlap.
        return Judged(outcome, float(verdict.extracted.split()[0]) if verdict.extracted else 0.0)
    return Judged(outcome, float(verdict.right))


def _average(answers: Sequence[Answer]) -> dict[str, float]:
    """The mean score of each set under each metric, over the questions that have the form it needs."""
    scores: dict[str, list[float]] = {}
    for answer in answers:
        for name, judged in answer.verdicts.items():
            scores.setdefault(f"eval_{answer.dataset}/{name}", []).append(judged.score)
    return {name: sum(values) / len(values) for name, values in scores.items()}
