"""Questions for `qwenvl-eval run nanobench`, written as files: 200 a skill.

    .venv/bin/python -m qwenvl.nano.bench output/nanobench

The same bytes for the same versions of Pillow, PyAV and the fonts.
"""

import argparse
import io
import json
from collections import defaultdict
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
from PIL import Image
from tqdm import tqdm

from qwenvl.nano.skills import FPS, SKILLS, Example, Skill
from qwenvl_eval.scoring.blind import best_constant
from qwenvl_eval.scoring.skills import METRICS

QUESTIONS = 200  # of each skill
CHOSEN_FROM = 600  # training examples from which the constant answers of a skill are chosen
GREY = (128, 128, 128)


def video_bytes(frames: Sequence[Image.Image]) -> bytes:
    """The frames as H.264 in MP4 at `FPS`, the same bytes for the same frames."""
    file = io.BytesIO()
    with av.open(file, "w", format="mp4", options={"fflags": "+bitexact"}) as container:
        stream = container.add_stream("libx264", rate=FPS)
        stream.width, stream.height = frames[0].size
        stream.pix_fmt, stream.time_base = "yuv420p", Fraction(1, FPS)
        stream.codec_context.thread_count = 1
        # Presets that look ahead give other bytes now and then.
        stream.options = {"flags": "+bitexact", "preset": "ultrafast", "crf": "12"}
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_image(frame)))
        container.mux(stream.encode())
    return file.getvalue()


def save_media(
    folder: Path, name: str, pictures: Sequence[Image.Image], frames: Sequence[Image.Image]
) -> list[str]:
    """Write pictures, or one video, below ``folder``; their paths in it."""
    if frames:
        (folder / f"{name}.mp4").write_bytes(video_bytes(frames))
        return [f"{name}.mp4"]
    paths = [f"{name}-{place}.png" for place in range(len(pictures))]
    for path, picture in zip(paths, pictures, strict=True):
        picture.save(folder / path, compress_level=1)
    return paths


def _grey(folder: Path, example: Example) -> list[str]:
    """Grey media of the example's sizes, written once each."""
    if example.frames:
        size, count = example.frames[0].size, len(example.frames)
        name = f"grey/{size[0]}x{size[1]}x{count}"
        if not (folder / f"{name}.mp4").is_file():
            save_media(folder, name, (), [Image.new("RGB", size, GREY)] * count)
        return [f"{name}.mp4"]
    paths = [f"grey/{one.width}x{one.height}.png" for one in example.pictures]
    for path, one in zip(paths, example.pictures, strict=True):
        if not (folder / path).is_file():
            Image.new("RGB", one.size, GREY).save(folder / path)
    return paths


def write_row(
    folder: Path,
    name: str,
    pictures: Sequence[Image.Image],
    frames: Sequence[Image.Image],
    turns: Sequence[tuple[str, str]],
) -> dict:
    """Write the media below ``folder`` under ``name``; the row in the training format."""
    media = save_media(folder, name, pictures, frames)
    said = [pair for question, answer in turns for pair in (("human", question), ("gpt", answer))]
    conversation = [{"from": speaker, "value": text} for speaker, text in said]
    return {"video" if frames else "image": media, "conversations": conversation}


def _target(example: Example) -> dict:
    return {"answer": example.answer, **example.target}


def constants(skill: Skill, examples: int = CHOSEN_FROM) -> dict[str, str]:
    """For each form of a skill's prompts the training answer that is best given always."""
    targets: defaultdict[str, list[dict]] = defaultdict(list)
    for seed in range(examples):
        example = skill.example("train", seed)
        targets[example.form].append(_target(example))
    return {form: best_constant(found, METRICS[skill.metric]) for form, found in targets.items()}


def write_skill(name: str, folder: Path, questions: int, examples: int = CHOSEN_FROM) -> Path:
    """Write the test questions of one skill, its media beside them; a finished file is left as it is.

    Raises ValueError for a form of the test that none of the training examples has.
    """
    skill, path = SKILLS[name], folder / f"{name}.jsonl"
    if path.is_file():
        return path
    (folder / name).mkdir(parents=True, exist_ok=True)
    (folder / "grey").mkdir(exist_ok=True)
    answers, lines = constants(skill, examples), []
    for seed in range(questions):
        example = skill.example("test", seed)
        if example.form not in answers:
            raise ValueError(f"{name}: no training example asks {example.form!r}; take more than {examples}")
        row = {"id": f"{name}/{seed}", "skill": name, "form": example.form, "metric": skill.metric}
        turns = [(example.question, example.answer)]
        row |= write_row(folder, f"{name}/{seed}", example.pictures, example.frames, turns)
        row |= {"target": _target(example), "constant": answers[example.form], "grey": _grey(folder, example)}
        lines.append(json.dumps(row) + "\n")
    finish(path, lines)
    return path


def write_bench(folder: str | Path, *, questions: int = QUESTIONS) -> list[Path]:
    """Write every skill's file that is not there yet."""
    folder = Path(folder)
    return [write_skill(name, folder, questions) for name in tqdm(SKILLS, desc="skills")]


def finish(path: Path, lines: list[str]) -> None:
    """Nobody meets half a file."""
    unfinished = path.with_suffix(".unfinished")
    unfinished.write_text("".join(lines), encoding="utf-8")
    unfinished.rename(path)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="what is written there already stays")
    parser.add_argument(
        "--questions", type=int, default=QUESTIONS, help=f"of each skill (default: {QUESTIONS})"
    )
    arguments = parser.parse_args()
    write_bench(arguments.folder, questions=arguments.questions)


if __name__ == "__main__":
    main()
