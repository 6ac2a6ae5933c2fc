"""Ask a back end every question that has no prediction yet, longest prompts first.

samples -> those not in the store -> by size (pixels, then text) -> batches -> backend.generate -> store
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from PIL import Image
from tqdm import tqdm

from qwen_vl_serve import Backend, Reply, Sampling
from qwenvl_eval.scoring import exact_match
from qwenvl_eval.store import Prediction, Run, Store
from qwenvl_eval.task import Sample


def describe_run(checkpoint: str, annotations: Path, samples: Sequence[Sample], max_new_tokens: int) -> Run:
    """What identifies a run: the bytes of the weights and of the questions, how many, and how they are asked.

    For a model hub's name, whose files are not at hand, the name stands for the weights.
    """
    folder = Path(checkpoint)
    files = sorted(folder.glob("*.safetensors")) if folder.is_dir() else []
    weights = hashlib.sha256(b"" if files else checkpoint.encode())
    for path in [folder / "config.json", *files] if files else []:
        weights.update(_sha256(path).encode())
    return Run(
        model_path=checkpoint,
        weights=weights.hexdigest(),
        annotations=str(annotations),
        annotations_sha256=_sha256(annotations),
        samples=len(samples),
        max_new_tokens=max_new_tokens,
    )


def run_task(
    backend: Backend, samples: Sequence[Sample], store: Store, *, max_new_tokens: int, batch_size: int = 64
) -> None:
    """Answer greedily what ``store`` does not hold yet, with a progress bar; every batch is kept at once."""
    sampling = Sampling(temperature=0, max_new_tokens=max_new_tokens)
    waiting = [sample for sample in samples if sample.row not in store.done]
    waiting.sort(key=_size, reverse=True)
    right = 0
    done = len(samples) - len(waiting)
    with tqdm(total=len(samples), initial=done, unit=" questions", dynamic_ncols=True) as bar:
        for start in range(0, len(waiting), batch_size):
            batch = waiting[start : start + batch_size]
            began = time.perf_counter()
            replies = backend.generate([sample.messages for sample in batch], sampling)
            seconds = (time.perf_counter() - began) / len(batch)
            predictions = [_prediction(*pair, seconds) for pair in zip(batch, replies, strict=True)]
            store.add(predictions)
            right += sum(exact_match(p.answer, p.target) for p in predictions)
            bar.set_postfix_str(f"{100 * right / (start + len(batch)):.1f} % right", refresh=False)
            bar.update(len(batch))


def _prediction(sample: Sample, reply: Reply, seconds: float) -> Prediction:
    return Prediction(
        row=sample.row,
        media=list(sample.media),
        question=sample.question,
        target=sample.target,
        answer=reply.text,
        finish_reason=reply.finish_reason,
        prompt_tokens=reply.prompt_tokens,
        completion_tokens=reply.completion_tokens,
        seconds=seconds,
    )


def _size(sample: Sample) -> tuple[int, int, int]:
    """Orders prompts by their number of tokens, well enough that a batch needs little padding."""
    videos = pixels = characters = 0
    for message in sample.messages:
        content = message["content"]
        for item in [{"type": "text", "text": content}] if isinstance(content, str) else content:
            match item["type"]:
                case "text":
                    characters += len(item["text"])
                case "image":
                    pixels += _pixels(item["image"])
                case "video":
                    videos += 1
    return videos, pixels, characters


@cache
def _pixels(path: str) -> int:
    if "://" in path or path.startswith("data:"):
        return 0
    with Image.open(path) as picture:
        return picture.width * picture.height


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
