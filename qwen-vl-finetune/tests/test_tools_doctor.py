"""tools/check_image.py: every planted fault is found, no sound row is accused, and training agrees."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import sync_playwright
from transformers import HfArgumentParser

import qwenvl.train
from qwenvl.data.data_processor import make_supervised_data_module
from qwenvl.train.argument import DataArguments, ModelArguments, TrainingArguments
from qwenvl.train.model_loading import load_config, load_processor

PACKAGE = Path(qwenvl.train.__path__[0]).parents[1]
NANO = PACKAGE.parent / "models" / "qwen3-vl-nano"
DOCTOR = PACKAGE / "tools" / "check_image.py"
LENGTH = 300
CHROMIUM = ["--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]
BOX = '[{"bbox_2d": %s, "label": "cross"}]'


def row(question="<image>What?", answer="a star", **more) -> dict:
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return {"image": "a.png", "conversations": turns} | more


def turns(*said: tuple[str, object], **more) -> dict:
    return {"conversations": [{"from": who, "value": text} for who, text in said], **more}


def call(arguments: str) -> dict:
    function = {"name": "look", "arguments": arguments}
    answer = {"role": "assistant", "content": "", "tool_calls": [{"function": function}]}
    return {"messages": [{"role": "user", "content": "Look."}, answer]}


def weighted(weight: object, place: int = 1) -> dict:
    fields = row(f"<image>Weigh {weight}?")
    fields["conversations"][place]["weight"] = weight
    return fields


def video(**options) -> dict:
    return turns(
        ("human", "<video>What happens?"), ("gpt", "nothing"), video={"video": "clip.mp4", **options}
    )


ERRORS = {
    "a missing file": row(image="nowhere.png"),
    "an empty file": row(image="empty.png"),
    "a picture cut short": row(image="cut.png"),
    "a photograph cut short": row(image="cut.jpg"),
    "text that is called a picture": row(image="text.jpg"),
    "a folder": row(image="folder"),
    "a picture too long for any grid": row(image="thread.png"),
    "a video cut short": turns(("human", "<video>?"), ("gpt", "x"), video="cut.mp4"),
    "an empty video": turns(("human", "<video>?"), ("gpt", "x"), video="empty.mp4"),
    "a clip that ends before it begins": video(video_start=2, video_end=1),
    "an unknown option": video(speed=2),
    "a text for a number": video(fps="two"),
    "a placeholder too many": row("<image><image>What?"),
    "a medium too many": row("What?"),
    "a placeholder in an answer": row(answer="<image> a star"),
    "two columns of pictures": row(images=["a.png"]),
    "an unknown role": turns(("robot", "Hi."), ("gpt", "x")),
    "no answer": turns(("human", "Hi.")),
    "an answer first": turns(("gpt", "x"), ("human", "Hi."), ("gpt", "y")),
    "a system turn in the middle": turns(("human", "Hi."), ("system", "Be brief."), ("gpt", "x")),
    "a number for a text": turns(("human", 3), ("gpt", "x")),
    "no conversation": {"image": "a.png"},
    "two conversations": row(messages=[{"role": "user", "content": "Hi."}]),
    "an end token in a question": row("<image>What?<|im_end|>"),
    "a media token in an answer": row(answer="<|image_pad|>"),
    "too long": row(answer="red star " * LENGTH),
    "a weight of a question": weighted(1, place=0),
    "a weight below zero": weighted(-1),
    "a call whose arguments are no JSON": call("{at"),
    "a row that is a number": 5,
    "a row that is no JSON": '{"conversations": [',
}
WARNINGS = {
    "an empty answer": row("<image>Say nothing.", " "),
    "an empty question": turns(("human", " "), ("gpt", "a star")),
    "the same row again": row("<image>Sound 0?", "a star 0"),
    "two answers to one question": row("<image>Sound 1?", "a cross"),
    "a box outside its picture": row("<image>Where 1?", BOX % [0, 0, 1200, 400]),
    "a box without area": row("<image>Where 2?", BOX % [10, 10, 10, 400]),
    "a tiny picture": row("<image>How small?", image="tiny.png"),
    "a very long picture": row("<image>How long?", image="long.png"),
    "nothing to learn": weighted(0),
}


@pytest.fixture(scope="module")
def planted(tmp_path_factory, pictures, clip) -> tuple[Path, dict[int, str]]:
    """The TOML file of `bad`, where a sound row follows each fault, and row -> fault."""
    folder = tmp_path_factory.mktemp("planted")
    shutil.copy(pictures / "a.png", folder)
    shutil.copy(clip, folder / "clip.mp4")
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(folder / "whole.jpg")
    for name, source in (("cut.png", "a.png"), ("cut.jpg", "whole.jpg"), ("cut.mp4", "clip.mp4")):
        (folder / name).write_bytes((folder / source).read_bytes()[:600])
    for name in ("empty.png", "empty.mp4"):
        (folder / name).write_bytes(b"")
    (folder / "text.jpg").write_text("not a picture")
    (folder / "folder").mkdir()
    for name, size in (("thread.png", (2000, 2)), ("tiny.png", (8, 40)), ("long.png", (1000, 40))):
        Image.new("RGB", size, "red").save(folder / name)
    lines, faults = [], {}
    sound = (row(f"<image>Sound {number}?", f"a star {number}") for number in range(100))
    for fault, fields in (ERRORS | WARNINGS).items():
        lines.append(json.dumps(next(sound)))
        faults[len(lines)] = fault
        lines.append(fields if isinstance(fields, str) else json.dumps(fields))
    lines.append(json.dumps(next(sound)))
    (folder / "bad.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "data.toml").write_text('[bad]\nannotation_path = "bad.jsonl"\ndata_path = "."\n')
    return folder / "data.toml", faults


def flags(data: Path, **more) -> dict:
    return {
        "model_name_or_path": str(NANO), "dataset_config": str(data), "dataset_use": "bad",
        "model_max_length": LENGTH, "max_pixels": 16384, "min_pixels": 3136,
        "video_min_pixels": 3136, "video_max_pixels": 16384,
        "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "num_train_epochs": 1,
    } | more  # fmt: skip


def run(script: Path, **values) -> subprocess.CompletedProcess[str]:
    words = [word for name, value in values.items() for word in (f"--{name}", str(value))]
    return subprocess.run([sys.executable, str(script), *words], capture_output=True, text=True, timeout=280)


@pytest.fixture(scope="module")
def examined(planted, tmp_path_factory) -> tuple[subprocess.CompletedProcess, Path]:
    """The doctor on `bad`, with --fix; and the folder with `report` and `fixed`."""
    folder = tmp_path_factory.mktemp("doctor")
    return run(DOCTOR, **flags(planted[0], report=folder / "report", fix=folder / "fixed")), folder


def report(folder: Path) -> dict:
    return json.loads((folder / "report.json").read_text())


def test_every_planted_fault_is_found_and_no_sound_row_accused(planted, examined):
    done, folder = examined
    assert done.returncode == 1, done.stderr[-3000:]
    found = report(folder / "report")["findings"]
    assert {finding["row"] for finding in found} == planted[1].keys()
    for finding in found:
        fault = planted[1][finding["row"]]
        assert finding["level"] == ("error" if fault in ERRORS else "warning"), finding
        assert f"bad.jsonl: line {finding['row'] + 1} (counted from 1)" in finding["text"]
        if fault in WARNINGS:
            assert finding["kind"] == fault
    assert len(ERRORS) >= 30 and f"{2 * len(planted[1]) + 1} rows" in done.stdout


def test_what_the_doctor_passes_the_trainer_accepts_and_the_other_way(planted, examined):
    parser = HfArgumentParser((ModelArguments, DataArguments, TrainingArguments))
    model_args, data_args, args = parser.parse_dict(
        flags(planted[0], bad_samples="skip", output_dir=str(planted[0].parent / "out"))
    )
    rows = make_supervised_data_module(
        load_processor(model_args, data_args, args), data_args,
        model_config=load_config(model_args, args), model_max_length=LENGTH, seed=0,
    )["train_dataset"]  # fmt: skip
    accepted = set()
    for index in range(len(rows)):
        try:
            rows.load(index)
        except ValueError:
            continue
        accepted.add(rows.row(index)[1])
    found = report(examined[1] / "report")["findings"]
    errors = {finding["row"] for finding in found if finding["level"] == "error"}
    assert accepted == set(range(2 * len(planted[1]) + 1)) - errors


def test_the_cleaned_set_trains_in_the_steps_that_were_foretold(planted, examined, tmp_path):
    fixed = examined[1] / "fixed" / "datasets.toml"
    again = run(DOCTOR, **flags(fixed, report=tmp_path / "report"))
    assert again.returncode == 0, again.stdout + again.stderr[-3000:]
    assert DUPLICATE not in again.stdout
    done = run(
        PACKAGE / "qwenvl" / "train" / "train_qwen.py",
        **flags(fixed, output_dir=tmp_path / "out", report_to="none", tune_mm_mlp=True, save_strategy="no"),
    )
    assert done.returncode == 0, done.stderr[-3000:]
    state = json.loads((tmp_path / "out" / "trainer_state.json").read_text())
    assert state["global_step"] == report(tmp_path / "report")["forecast"]["steps"]


DUPLICATE = "the same row again"


def test_the_page_opens_and_shows_what_carries_loss(examined):
    with sync_playwright() as playwright:
        program = shutil.which("chromium") or shutil.which("google-chrome")
        browser = playwright.chromium.launch(executable_path=program, args=CHROMIUM)
        page = browser.new_page()
        page.goto((examined[1] / "report" / "report.html").as_uri())
        counts = report(examined[1] / "report")["counts"]
        assert page.locator("details").count() == len(counts)
        assert page.locator("details.error").first.inner_text().startswith("error: ")
        marked = page.locator("article mark").all_inner_texts()
        assert marked and all("<|im_end|>" in text for text in marked)
        assert page.locator("article img").first.evaluate("image => image.naturalWidth") > 0
        browser.close()


def test_the_demo_passes_and_lengths_are_those_of_the_run(tmp_path):
    done = run(
        DOCTOR,
        **flags(
            PACKAGE / "demo" / "datasets.toml",
            dataset_use="single_images",
            report=tmp_path,
            data_packing=True,
        ),
    )
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    found = report(tmp_path)
    assert not found["findings"] and found["forecast"]["packs"] > 1 and found["rows_per_second"] > 0


def test_a_set_without_a_sound_row_does_not_lend_its_name_to_the_next(planted, tmp_path):
    folder = planted[0].parent
    (tmp_path / "none.jsonl").write_text(json.dumps(ERRORS["no answer"]) + "\n")
    (tmp_path / "two.jsonl").write_text("".join(json.dumps(row(f"<image>{n}?")) + "\n" for n in range(2)))
    (tmp_path / "data.toml").write_text(
        '[none]\nannotation_path = "none.jsonl"\n'
        f'[two]\nannotation_path = "two.jsonl"\ndata_path = "{folder}"\n'
    )
    done = run(DOCTOR, **flags(tmp_path / "data.toml", dataset_use="none,two", report=tmp_path / "report"))
    assert done.returncode == 1, done.stderr[-3000:]
    forecast = report(tmp_path / "report")["forecast"]
    assert forecast["rows"] == 2 and forecast["tokens"] > forecast["media_tokens"] > 0


def test_flags_that_do_not_hold_end_with_2(planted, tmp_path):
    (tmp_path / "there").mkdir()
    done = run(DOCTOR, **flags(planted[0], fix=tmp_path / "there", report=tmp_path / "report"))
    assert done.returncode == 2 and "name a new folder" in done.stderr
