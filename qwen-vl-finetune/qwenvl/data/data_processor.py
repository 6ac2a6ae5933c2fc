"""The way of a sample from an annotation file to a batch.

    --dataset_use a%50,b
      -> data_list                {"annotation_path", "data_path", "sampling_rate"} ...
      -> sources                  rows as bytes; every row and file checked once, before training
      -> SupervisedDataset[i]     a row (or a packed list of n samples), parsed when asked for
           messages               Sample: [{"role", "content"}, ...], weights of the answers, tools
           budget                 the sample, shortened where --too_long says so
           processor_inputs       input_ids [1, L], pixel_values uint8 [patches, 3 * 2 * patch * patch],
                                  image_grid_thw [images, 3], pixel_values_videos, video_grid_thw [videos, 3]
           labels                 [L], -100 outside answers; loss_weights [L] where answers count differently
           rope2d                 position_ids [3, L]
           packing                segment_lengths [n]; one item
      -> PackedDataset[i]         with --data_packing True, rows joined to packs under two budgets
      or StreamedDataset[i]       with --streaming True: rows in an order without end, read as they come
      -> collator                 padded [B, S] or flattened [1, T]
    pairs of answers, train_dpo.py: each row a packed list of two, flattened [1, T], chosen before rejected
    --eval_dataset_use c,d%20  the same, a SupervisedDataset for each name; never packed

Nothing decoded is kept: a picture is opened when its row is asked for and lives as long as the batch.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils.data import Dataset

from qwen_vl_utils import PromptSize, measure_inputs, processor_inputs
from qwenvl.data import data_list
from qwenvl.data.budget import DROPPING, Fitted, TooLong, fit, refusal
from qwenvl.data.collators import FlattenedCollator, PaddedCollator
from qwenvl.data.labels import TurnMarks, answer_labels, turn_marks
from qwenvl.data.messages import Sample, read_sample, refused_text
from qwenvl.data.packed import all_packed, pack_rows, usable_rows
from qwenvl.data.packing import MEDIA, join
from qwenvl.data.rope2d import RopeIndex
from qwenvl.data.sources import (
    Annotations,
    Pairs,
    check_annotations,
    mix_rows,
    open_annotations,
    sample_rows,
    sample_where,
    samples_of,
)
from qwenvl.data.streaming import EndlessRows, RowStream, open_rows

if TYPE_CHECKING:
    from qwenvl.train.argument import DataArguments

logger = logging.getLogger(__name__)

SHOWN_REASONS = 10
MOST_SKIPS_IN_A_ROW = 100


@dataclass(frozen=True)
class Encoder:
    """One sample to tensors: everything about a run that this needs, and nothing of the data.

    video_options: fps, min_frames and max_frames of every video; limits of pixels are the processor's own.
    too_long: one of `budget.POLICIES`.
    """

    processor: Any
    marks: TurnMarks
    refused: re.Pattern[str]
    rope: RopeIndex
    video_options: dict
    model_max_length: int
    too_long: str = "fail"

    def __call__(self, row: object, data_path: str) -> dict[str, torch.Tensor]:
        """A sample of the conversation format -> input_ids, labels [L], position_ids [3, L],
        segment_lengths [1], loss_weights [L] where turns count differently, and pixels and grids where it has
        media.

        Raises ValueError for a row that breaks the rules of `read_sample`, media that cannot be read, and a
        sample longer than `model_max_length` that is not shortened.
        """
        dropping = self.too_long in DROPPING
        sample = self.fitted(row, data_path).sample if dropping else self.read(row, data_path)
        inputs = processor_inputs(
            self.processor, [sample.messages], add_generation_prompt=False, tools=sample.tools, scaled=False
        )
        input_ids = inputs["input_ids"]
        length = input_ids.shape[1]
        if length > self.model_max_length:
            raise refusal(sample, length, self.model_max_length, self.too_long)
        positions = self.rope(
            input_ids,
            inputs.get("image_grid_thw"),
            inputs.get("video_grid_thw"),
            inputs.get("second_per_grid_ts"),
        )
        labels, weights = answer_labels(input_ids[0], self.marks, self.processor.tokenizer, sample.weights)
        return {
            "input_ids": input_ids[0],
            "labels": labels,
            "position_ids": positions[:, 0],
            "segment_lengths": torch.tensor([length]),
            **({} if weights is None else {"loss_weights": weights}),
            **{key: inputs[key] for key in MEDIA if key in inputs},
        }

    def read(self, row: object, data_path: str) -> Sample:
        """The sample of a row, whole."""
        return read_sample(row, data_path, self.refused, self.video_options)

    def fitted(self, row: object, data_path: str) -> Fitted:
        """The sample that `__call__` encodes, with its size, from headers alone; its errors too, but for
        those of broken pixels.
        """
        return fit(self.read(row, data_path), self.model_max_length, self.too_long, self.measure)

    def measure(self, sample: Sample) -> PromptSize:
        """Tokens and patches of what `__call__` makes of a sample, from headers alone."""
        return measure_inputs(
            sample.messages, self.processor, add_generation_prompt=False, tools=sample.tools
        )


@dataclass(frozen=True, eq=False)
class Source:
    """A data set in use: its annotations, and the rows of them that are trained on (int64, in file order)."""

    name: str
    annotations: Annotations
    data_path: str
    rows: np.ndarray


class SupervisedDataset(Dataset):
    """All data sets of a run, one after another; an item is a row's tensors, made when asked for, with
    `dataset` int64 [n], the place in `names` of the data set that each of its samples comes from.

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
        self.names = list(dict.fromkeys(source.name for source in sources))
        self._ends = np.cumsum([len(source.rows) for source in sources])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        self.check_index(index)
        for step in range(MOST_SKIPS_IN_A_ROW):
            try:
                return self.load(self.stand_in(index, step))
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

    def check_index(self, index: int) -> None:
        """Raises IndexError past the end, which ends an iteration over the items."""
        if not 0 <= index < len(self):
            raise IndexError(f"item {index} of {len(self)}")

    def stand_in(self, index: int, step: int) -> int:
        """The item that stands in for `index` after `step` bad ones."""
        return (index + step) % len(self)

    def row(self, index: int) -> tuple[Source, int]:
        """Where an item comes from: the data set, and the row in its annotations."""
        number = int(np.searchsorted(self._ends, index, side="right"))
        source = self.sources[number]
        return source, int(source.rows[index - int(self._ends[number] - len(source.rows))])

    def load(self, index: int) -> dict[str, torch.Tensor]:
        """An item, itself or not at all. Raises ValueError with file and row."""
        item = join(self._each(index, self.encode))
        number = self.names.index(self.row(index)[0].name)
        return item | {"dataset": torch.full_like(item["segment_lengths"], number)}

    def fitted(self, index: int) -> list[Fitted]:
        """Each of an item's samples with its size, from headers alone. Errors as `load`."""
        return self._each(index, self.encode.fitted)

    def only(self, items: np.ndarray) -> SupervisedDataset:
        """The data sets with these items alone, ascending indices."""
        kept = np.isin(np.arange(len(self)), items)
        parts = np.split(kept, self._ends[:-1])
        sources = [
            replace(source, rows=source.rows[part]) for source, part in zip(self.sources, parts, strict=True)
        ]
        return SupervisedDataset(sources, self.encode, bad_samples=self.bad_samples)

    def _each(self, index: int, make: Callable[[object, str], Any]) -> list[Any]:
        source, row_index = self.row(index)
        row = source.annotations.row(row_index)
        made = []
        for member, fields in enumerate(samples_of(row)):
            try:
                made.append(make(fields, source.data_path))
            except (ValueError, OSError) as error:
                where = sample_where(source.annotations.where(row_index), row, member)
                kind = TooLong if isinstance(error, TooLong) else ValueError
                raise kind(f"{where}: {error}") from error
        return made


class StreamedDataset(SupervisedDataset):
    """The rows of `endless`: item i is the row at place i, and there is no last one.

    Rows are checked when they are read; the next one stands in for a bad one.
    """

    def __init__(self, endless: EndlessRows, encode: Encoder, *, bad_samples: str):
        super().__init__([], encode, bad_samples=bad_samples)
        self.endless = endless
        self.names = list(dict.fromkeys(stream.name for stream in endless.streams))

    def __len__(self) -> int:
        raise TypeError("streamed rows have no end")

    def check_index(self, index: int) -> None:
        """Every item from 0 on is there."""
        if index < 0:
            raise IndexError(f"item {index} of streamed rows")

    def stand_in(self, index: int, step: int) -> int:
        return index + step

    def row(self, index: int) -> tuple[Source, int]:
        stream, row = self.endless.at(index)
        return Source(stream.name, stream, stream.data_path, np.zeros(0, np.int64)), row


def _stream(entries: list[dict], encode: Encoder, data_args: DataArguments, seed: int) -> StreamedDataset:
    """All data sets as one order of rows."""
    streams = [
        RowStream(
            entry["dataset_name"],
            open_rows(
                entry["annotation_path"],
                entry.get("split"),
                window=round(data_args.streaming_buffer / min(entry["sampling_rate"], 1)),
            ),
            entry["data_path"],
            entry["sampling_rate"],
            data_args.flattened(),
            seed,
        )
        for entry in entries
    ]
    weights = [entry["weight"] for entry in entries] if "weight" in entries[0] else None
    endless = EndlessRows(streams, weights, buffer=data_args.streaming_buffer, seed=seed)
    return StreamedDataset(endless, encode, bad_samples=data_args.bad_samples)


def _open_source(
    entry: dict, refused: re.Pattern[str], data_args: DataArguments, seed: int, pairs: bool
) -> Source:
    """Open and check a data set, then take its share of rows."""
    annotations = open_annotations(entry["annotation_path"], entry.get("split"))
    if pairs:
        annotations = Pairs(annotations)
    packed = data_args.flattened()
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
    return Source(entry["dataset_name"], annotations, entry["data_path"], rows)


def _eval_sets(
    data_args: DataArguments, encode: Encoder, seed: int, pairs: bool
) -> dict[str, SupervisedDataset] | None:
    """The data sets of --eval_dataset_use by name, every row measured; None without the flag."""
    flag, sets = "--eval_dataset_use", {}
    for asked in data_args.eval_dataset_use.split(","):
        for entry in data_list([asked], data_args.dataset_config, flag=flag):
            name = entry["dataset_name"]
            if name in sets or entry["sampling_rate"] > 1:
                raise ValueError(f"{flag} {asked}: {name} would count twice; name it once, at most %100")
            source = _open_source(entry, encode.refused, data_args, seed, pairs)
            rows = SupervisedDataset([source], encode, bad_samples=data_args.bad_samples)
            # Measured now, so that an evaluation after hours does not stop at a row too long.
            sets[name] = rows.only(usable_rows(rows, f"evaluation set {name}"))
    return sets or None


def make_supervised_data_module(
    processor,
    data_args: DataArguments,
    *,
    model_config,
    model_max_length: int,
    seed: int,
    pairs: bool = False,
) -> dict:
    """The data side of a Trainer: `{"train_dataset", "eval_dataset", "data_collator"}`.

    processor: with the run's limits of pixels; model_config: the checkpoint's, for positions;
    model_max_length: in tokens, media included; seed: of the draw of `name%N`; pairs: rows have two answers,
    for --data_flatten alone. Raises ValueError, naming file and row, for what the check of the annotation
    files finds; streamed rows are checked when they are read.
    """
    entries = data_list(data_args.dataset_use.split(","), data_args.dataset_config)
    if not entries:
        raise ValueError("--dataset_use names no data set; give names of the registry, comma separated")
    encode = make_encoder(processor, data_args, model_config=model_config, model_max_length=model_max_length)
    if data_args.flattened():
        collator = FlattenedCollator()
    else:
        collator = PaddedCollator(processor.tokenizer.pad_token_id)
    eval_sets = _eval_sets(data_args, encode, seed, pairs)
    if data_args.streaming:
        dataset = _stream(entries, encode, data_args, seed)
        return {"train_dataset": dataset, "eval_dataset": eval_sets, "data_collator": collator}
    sources = [_open_source(entry, encode.refused, data_args, seed, pairs) for entry in entries]
    if "weight" in entries[0]:
        names, weights = zip(*((entry["dataset_name"], entry["weight"]) for entry in entries), strict=True)
        mixed = mix_rows([source.rows for source in sources], list(weights), seed=seed, names=list(names))
        sources = [replace(source, rows=rows) for source, rows in zip(sources, mixed, strict=True)]
    dataset = SupervisedDataset(sources, encode, bad_samples=data_args.bad_samples)
    if data_args.data_packing and not all_packed(dataset):
        dataset = pack_rows(dataset, model_config, patch_budget=data_args.pack_max_patches, seed=seed)
    elif data_args.too_long != "fail":
        dataset = dataset.only(usable_rows(dataset, "training"))
    return {"train_dataset": dataset, "eval_dataset": eval_sets, "data_collator": collator}


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
        processor, turn_marks(processor), refused_text(special), rope, video_options, model_max_length,
        data_args.too_long,
    )  # fmt: skip
