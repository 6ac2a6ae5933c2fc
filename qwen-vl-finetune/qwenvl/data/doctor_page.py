"""The data doctor's report as one page: findings by kind, lengths, and what of some samples carries loss.

Checkup, forecast, Preview ... -> render -> one HTML file, pictures inside, no script
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import groupby, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jinja2 import Environment, StrictUndefined

from qwenvl.data.data_processor import Encoder
from qwenvl.data.doctor import Checkup, count_kinds
from qwenvl.data.sources import Annotations, samples_of
from qwenvl.data.thumbnails import thumbnail

BARS = 24
SHOWN = 50
PICTURES = 4


@dataclass(frozen=True)
class Preview:
    """A sample as training sees it.

    pieces: (text, the weight of its loss; 0 for none). pictures: data URLs.
    """

    where: str
    pieces: list[tuple[str, float]]
    pictures: list[str]


def preview(annotations: Annotations, data_path: str, row: int, encode: Encoder) -> Preview:
    """Of a row's first sample."""
    fields = samples_of(annotations.row(row))[0]
    item, sample = encode(fields, data_path), encode.fitted(fields, data_path).sample
    weights = item.get("loss_weights", torch.ones(len(item["labels"])))
    carried = (weights * (item["labels"] != -100)).tolist()
    tokenizer = encode.processor.tokenizer
    media = {encode.processor.image_token_id: "image", encode.processor.video_token_id: "video"}
    pieces: list[tuple[str, float]] = []
    pairs = zip(item["input_ids"].tolist(), carried, strict=True)
    for (medium, weight), run in groupby(pairs, key=lambda pair: (media.get(pair[0]), pair[1])):
        ids = [token for token, _ in run]
        text = f"[{medium}: {len(ids)} tokens]" if medium else tokenizer.decode(ids)
        pieces.append((text, weight))
    return Preview(
        annotations.where(row), pieces, [thumbnail(item) for item in islice(sample.media(), PICTURES)]
    )


def render(checkup: Checkup, forecast: Mapping[str, Any], previews: list[Preview]) -> str:
    """The page; everything that a data set holds is escaped."""
    groups = [
        (level, kind, count, [one.text for one in checkup.findings if (one.level, one.kind) == (level, kind)])
        for level, kind, count in count_kinds(checkup.findings)
    ]
    lengths = checkup.lengths()
    counts, edges = np.histogram(lengths, bins=BARS) if len(lengths) else (np.zeros(1), np.zeros(2))
    highest = max(counts.max(), 1)
    bars = [
        (100 * count / highest, int(count), round(edges[place]), round(edges[place + 1]))
        for place, count in enumerate(counts)
    ]
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    source = Path(__file__).with_name("doctor_page.html.jinja").read_text(encoding="utf-8")
    return environment.from_string(source).render(
        rows=checkup.rows, errors=len(checkup.errors), groups=groups, bars=bars, forecast=forecast,
        previews=previews, shown=SHOWN,
    )  # fmt: skip
