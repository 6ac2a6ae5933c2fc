"""The way of a sample from an annotation file to a batch.

    --dataset_use a%50,b
      -> data_list                {"annotation_path", "data_path", "sampling_rate"} ...
      -> sources                  rows as bytes; every row and file checked once, before training
      -> SupervisedDataset[i]     a row (or a packed list of n samples), parsed when asked for
           messages               [{"role", "content"}, ...]
           processor_inputs       input_ids [1, L], pixel_values [patches, channels * 2 * patch * patch],
                                  image_grid_thw [images, 3], pixel_values_videos, video_grid_thw [videos, 3]
           labels                 [L], -100 outside answers
           rope2d                 position_ids [3, L]
           packing                segment_lengths [n]; one item
      -> collator                 padded [B, S] or flattened [1, T]

Nothing decoded is kept: a picture is opened when its row is asked for and lives as long as the batch.
"""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils.data import Dataset

from qwen_vl_utils import processor_inputs
from qwenvl.data import data_list
from qwenvl.data.collators import FlattenedCollator, PaddedCollator
from qwenvl.data.labels import TurnMarks, answer_labels, turn_marks
from qwenvl.data.messages import Sample, read_sample, refused_text, to_messages
from qwenvl.data.packing import MEDIA, join
from qwenvl.data.rope2d import RopeIndex
from qwenvl.data.sources import (
    Annotations,
    check_annotations,
    open_annotations,
    sample_rows,
    sample_where,
    samples_of,
)

if TYPE_CHECKING:
    from qwenvl.train.argument import DataArguments

logger = logging.getLogger(__name__)

SHOWN_REASONS = 10
MOST_SKIPS_IN_A_ROW = 100


@dataclass(frozen=True)
class Encoder:
    """One sample to tensors: everything about a run that this needs, and nothing of the data.

    video_options: fps, min_frames and max_frames of every video; limits of pixels are the processor's own.
    """

    processor: Any
    marks: TurnMarks
    refused: re.Pattern[str]
    rope: RopeIndex
    video_options: dict
    model_max_length: int

    def __call__(self, row: object, data_path: str) -> dict[str, torch.Tensor]:
        """A sample of the conversation format -> input_ids, labels [L], position_ids [3, L],
        segment_lengths [1], and pixels and grids where it has media.

        Raises ValueError for a row that breaks the rules of `read_sample`, media that cannot be read, and a
        sample longer than `model_max_length`.
        """
        sample = read_sample(row, data_path, self.refused)
        messages = to_messages(sample, video_options=self.video_options)
        inputs = processor_inputs(self.processor, [messages], add_generation_prompt=False)
        input_ids = inputs["input_ids"]
        length = input_ids.shape[1]
        if length > self.model_max_length:
            raise ValueError(
                f"{length} tokens ({_parts(sample)}) exceed --model_max_length {self.model_max_length}; "
                "raise it, lower --max_pixels or --video_max_pixels, or shorten the row"
            )
        answers = sum(role == "assistant" for role, _ in sample.turns)
        positions = self.rope(
            input_ids,
            inputs.get("image_grid_thw"),
            inputs.get("video_grid_thw"),
            inputs.get("second_per_grid_ts"),
        )
        return {
            "input_ids": input_ids[0],
            "labels": answer_labels(input_ids[0], self.marks, self.processor.tokenizer, answers=answers),
            "position_ids": positions[:, 0],
            "segment_lengths": torch.tensor([length]),
            **{key: inputs[key] for key in MEDIA if key in inputs},
        }


def _parts(sample: Sample) -> str:
    return f"{len(sample.images)} pictures, {len(sample.videos)} videos, {len(sample.turns)} turns"


@dataclass(frozen=True, eq=False)
class Source:
    """A data set in use: its annotations, and the rows of them that are trained on (int64, in file order)."""

    annotations: Annotations
    data_path: str
    rows: np.ndarray


class SupervisedDataset(Dataset):
    """All data sets of a run, one after another; an item is a row's tensors, made when asked for.

    With bad_samples="fail" a row that cannot be loaded is a ValueError naming file and row. With "skip" the
    next row that can be loaded stands in for it, so that every rank keeps its number of batches; each skip is
    logged with its reason and counted in `skipped` (per loader worker).
    """

    def __init__(self, sources: list[Source], encode: Encoder, *, bad_samples: str):
        if bad_samples not in ("fail", "skip"):
            raise ValueError(f"--bad_samples {bad_samples!r}: choose fail or skip")
        self.sources = sources
        self.encode = encode
        self.bad_samples = bad_samples
        self.skipped = 0
        self._ends = np.cumsum([len(source.rows) for source in sources])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        if not 0 <= index < len(self):
            raise IndexError(f"item {index} of {len(self)}")
        for step in range(MOST_SKIPS_IN_A_ROW):
            try:
                return self._load((index + step) % len(self))
            except ValueError as error:
                if self.bad_samples == "fail":
                    raise
                self.skipped += 1
                logger.warning(
                    "skipped (%d in this process), the next row stands in: %s", self.skipped, error
                )
        raise ValueError(
            f"{MOST_SKIPS_IN_A_ROW} rows in a row could not be loaded; see the reasons logged above"
        )

    def _load(self, index: int) -> dict[str, torch.Tensor]:
        number = int(np.searchsorted(self._ends, index, side="right"))
        source = self.sources[number]
        position = index - int(self._ends[number] - len(source.rows))
        row_index = int(source.rows[position])
        row = source.annotations.row(row_index)
        items = []
        for member, fields in enumerate(samples_of(row)):
            try:
                items.append(self.encode(fields, source.data_path))
            except (ValueError, OSError) as error:
                where = sample_where(source.annotations.where(row_index), row, member)
                raise ValueError(f"{where}: {error}") from error
        return join(items)


def _open_source(entry: dict, refused: re.Pattern[str], data_args: DataArguments, seed: int) -> Source:
    """Open and check a data set, then take its share of rows."""
    annotations = open_annotations(entry["annotation_path"])
    packed = data_args.data_packing or data_args.data_flatten
    bad = check_annotations(annotations, entry["data_path"], refused=refused, packed=packed)
    if bad and data_args.bad_samples == "fail":
        more = f" ({len(bad) - 1} more of {len(annotations)} rows are bad too)" if len(bad) > 1 else ""
        raise ValueError(bad[0].reason + more)
    for problem in bad[:SHOWN_REASONS]:
        logger.warning("skipped: %s", problem.reason)
    if bad:
        logger.warning("%s: skipped %d of %d rows", annotations.path, len(bad), len(annotations))
    good = np.setdiff1d(np.arange(len(annotations)), [problem.row for problem in bad])
    if not len(good):
        raise ValueError(
            f"annotation file {annotations.path}: every row is bad; see the reasons logged above"
        )
    rows = sample_rows(good, entry["sampling_rate"], seed=seed, name=entry["dataset_name"])
    logger.info("%s: %d of %d rows", entry["dataset_name"], len(rows), len(annotations))
    return Source(annotations, entry["data_path"], rows)


def make_supervised_data_module(
    processor, data_args: DataArguments, *, model_config, model_max_length: int, seed: int
) -> dict:
    """The data side of a Trainer: `{"train_dataset", "eval_dataset", "data_collator"}`.

    processor: with the run's limits of pixels; model_config: the checkpoint's, for positions;
    model_max_length: in tokens, media included; seed: of the draw of `name%N`. Raises ValueError, naming file
    and row, for what the check of the annotation files finds.
    """
    entries = data_list(data_args.dataset_use.split(","), data_args.dataset_config)
    if not entries:
        raise ValueError("--dataset_use names no data set; give names of the registry, comma separated")
    encode = make_encoder(processor, data_args, model_config=model_config, model_max_length=model_max_length)
    sources = [_open_source(entry, encode.refused, data_args, seed) for entry in entries]
    if data_args.data_flatten or data_args.data_packing:
        collator = FlattenedCollator()
    else:
        collator = PaddedCollator(processor.tokenizer.pad_token_id)
    dataset = SupervisedDataset(sources, encode, bad_samples=data_args.bad_samples)
    return {"train_dataset": dataset, "eval_dataset": None, "data_collator": collator}


def make_encoder(processor, data_args: DataArguments, *, model_config, model_max_length: int) -> Encoder:
    """The encoder of a run. Raises ValueError where processor and model do not belong together."""
    rope = RopeIndex.from_config(model_config)
    for medium in ("image", "video"):
        theirs, ours = getattr(processor, f"{medium}_token_id"), getattr(rope, f"{medium}_token_id")
        if theirs != ours:
            raise ValueError(
                f"{medium}_token_id is {ours} in config.json but {theirs} in the processor; "
                "use the processor of the same checkpoint"
            )
    special = [token.content for token in processor.tokenizer.added_tokens_decoder.values() if token.special]
    video_options = {
        "fps": data_args.video_fps,
        "min_frames": data_args.video_min_frames,
        "max_frames": data_args.video_max_frames,
    }
    return Encoder(
        processor, turn_marks(processor), refused_text(special), rope, video_options, model_max_length
    )
