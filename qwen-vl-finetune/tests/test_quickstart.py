"""The quickstart by its real command, in little: a random base, seconds of training, a few test questions."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import easy_vqa
import pytest

from qwen_vl_serve import GREEDY, open_backend
from qwenvl_eval.tasks.easyvqa import EasyVqa

pytestmark = pytest.mark.timeout(900)
DEMO = Path(__file__).resolve().parents[1] / "demo"


def command(folder, model, *more):
    # Seconds in place of minutes: nothing good can come of it, but everything must happen.
    flags = ["--output-dir", str(folder), "--model", str(model), "--minutes", "0.1", "--test-questions", "40"]
    return [sys.executable, str(DEMO / "quickstart.py"), *flags, *more]


@pytest.fixture(scope="module", autouse=True)
def as_users_start_it():
    """In bf16 where the machine has it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
        yield


def run(*args):
    return subprocess.run(command(*args), capture_output=True, text=True, timeout=500)


def wait_for(condition, process):
    deadline = time.monotonic() + 300
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.1)


def processes_of(folder):
    """Ids of living processes that have the folder in their command line."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                arguments = (entry / "cmdline").read_bytes().decode(errors="replace")
                dead = (entry / "stat").read_text().rpartition(")")[2].split()[0] == "Z"
            except OSError:
                continue
            if str(folder) in arguments and not dead:
                found.append(int(entry.name))
    return found


@pytest.fixture(scope="module")
def finished(tmp_path_factory, checkpoints):
    """A run that was killed in the middle of its training and started again; what it printed."""
    folder = tmp_path_factory.mktemp("quickstart") / "out"
    model = checkpoints["qwen3_vl"]
    with subprocess.Popen(command(folder, model), stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as first:
        wait_for((folder / "checkpoint").exists, first)
        os.kill(first.pid, signal.SIGKILL)
        before = first.communicate()[0].decode()
    assert (folder / ".base-done").exists() and not (folder / ".train-done").exists()
    answered = (folder / "base.jsonl").stat().st_mtime_ns
    again = run(folder, model)
    assert again.returncode == 0, again.stdout + again.stderr
    assert (folder / "base.jsonl").stat().st_mtime_ns == answered  # measured once, not twice
    return folder, model, before, again.stdout


def test_killed_and_started_again_it_ends_with_all_it_promises(finished):
    folder, _, before, after = finished
    assert all(f"[{stage}/4]" in before for stage in (1, 2, 3))
    assert "[1/4]" not in after and "[2/4]" not in after and "[3/4]" in after
    tuned = [json.loads(line) for line in (folder / "tuned.jsonl").read_text().splitlines()[1:]]
    right = sum(row["answer"].strip().lower() == row["target"]["answer"] for row in tuned)
    (line,) = re.findall(r"^fine-tuned accuracy: (\d+\.\d) %$", after, re.MULTILINE)
    assert float(line) == pytest.approx(100 * right / len(tuned), abs=0.05)
    for name in ("without looking", "base", "fine-tuned"):
        assert re.search(rf"^{name} +\d+\.\d % +\d+\.\d to \d+\.\d %", after, re.MULTILINE), name
    assert after.count("(right: ") == 6  # asked aloud
    assert f"{folder / 'checkpoint'} --image " in after
    assert not list((folder / "checkpoint").glob("checkpoint-*"))


def test_the_test_questions_are_whole_pictures_of_easy_vqas_own_test_split(finished):
    folder, *_ = finished
    rows = [json.loads(line) for line in (folder / "data" / "test.jsonl").read_text().splitlines()]
    asked = Counter()
    for row in rows:
        question, answer = (turn["value"] for turn in row["conversations"])
        asked[int(Path(row["image"]).stem), question.removeprefix("<image>\n"), answer] += 1
    pictures = {picture for picture, _, _ in asked}
    split = easy_vqa.get_test_questions()
    whole = Counter((p, q, a) for q, a, p in zip(*split, strict=True) if p in pictures)
    assert asked == whole
    assert 40 <= len(rows) < 40 + 20
    theirs = easy_vqa.get_test_image_paths()
    for picture in pictures:
        copied = folder / "data" / "images" / "test" / f"{picture}.png"
        assert copied.read_bytes() == Path(theirs[picture]).read_bytes()


def test_training_rows_hold_every_training_question_of_the_split(finished):
    folder, *_ = finished
    taught = Counter()
    for line in (folder / "data" / "train.jsonl").read_text().splitlines():
        row = json.loads(line)
        texts = [turn["value"].removeprefix("<image>\n") for turn in row["conversations"]]
        picture = int(re.match(r"images/train/(\d+)", row["image"])[1])
        taught.update(zip([picture] * len(texts), texts[::2], texts[1::2], strict=False))
        assert row["conversations"][0]["value"].startswith("<image>\n")
    questions, answers, pictures = easy_vqa.get_train_questions()
    expected = Counter(zip(pictures, questions, answers, strict=True))
    views = {taught[key] / count for key, count in expected.items()}
    assert taught.keys() == expected.keys() and len(views) == 1


def test_without_looking_is_what_the_training_split_alone_can_tell(finished):
    folder, _, _, after = finished
    counts = {}
    for question, answer in zip(*easy_vqa.get_train_questions()[:2], strict=True):
        counts.setdefault(question, Counter())[answer] += 1
    rows = [json.loads(line) for line in (folder / "tuned.jsonl").read_text().splitlines()[1:]]
    targets = [row["target"] for row in rows]
    right = sum(counts[t["question"]].most_common(1)[0][0] == t["answer"] for t in targets)
    assert re.search(rf"^without looking +{100 * right / len(rows):.1f} %", after, re.MULTILINE)


def test_the_checkpoint_answers_elsewhere_as_it_did_when_measured(finished, tmp_path):
    folder, *_ = finished
    moved = tmp_path / "moved"
    subprocess.run(["cp", "-r", folder / "checkpoint", moved], check=True)
    samples = list(EasyVqa(limit=4).open(folder / "data" / "test.jsonl"))
    replies = open_backend(moved, device="cpu").generate([s.messages for s in samples], GREEDY)
    rows = {row["id"]: row for row in map(json.loads, (folder / "tuned.jsonl").read_text().splitlines()[1:])}
    for sample, reply in zip(samples, replies, strict=True):
        kept = rows[sample.id]
        assert reply.text.startswith(kept["answer"])
        assert (reply.text == kept["answer"]) == (kept["finish_reason"] == "stop")


def test_the_report_needs_no_other_file(finished):
    page = (finished[0] / "report.html").read_text()
    assert page.count("<svg") == 2 and "<polyline" in page
    sources = re.findall(r'(?:src|href)="([^"]*)"', page)
    assert len(sources) >= 24 and all(source.startswith("data:image/png;base64,") for source in sources)
    assert "http" not in page
    assert page.count("✓") + page.count("✗") == page.count("<figure>")


def test_a_finished_run_prints_its_table_again_at_once(finished):
    folder, model, _, after = finished
    report = (folder / "report.html").stat().st_mtime_ns
    again = run(folder, model)
    assert again.returncode == 0, again.stderr
    assert "holds a finished run" in again.stdout
    table = after[after.index("without looking ") : after.index("\nAsking it:")]
    assert table in again.stdout
    assert "(right: " not in again.stdout and "[3/4]" not in again.stdout
    assert (folder / "report.html").stat().st_mtime_ns == report


def test_other_settings_are_refused(finished):
    folder, model, *_ = finished
    refused = run(folder, model, "--minutes", "7")
    assert refused.returncode == 1
    assert (
        "holds a run with another minutes (0.1 there, 7.0 here); choose another --output-dir"
        in refused.stderr
    )


def test_a_missing_base_is_named(tmp_path):
    failed = run(tmp_path / "out", tmp_path / "nowhere")
    assert failed.returncode == 1
    assert re.fullmatch(r"quickstart: --model .*nowhere: no checkpoint there .*\n", failed.stderr)


def heed_interrupts() -> None:
    """A shell's background job, which these tests may be, starts with SIGINT ignored and passes that on."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.mark.parametrize("deadly", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_whatever_ends_it_ends_its_commands_too(tmp_path, checkpoints, deadly):
    folder = tmp_path / "out"
    # All test questions: left alone, the command that measures the base would work for a minute.
    everything = command(folder, checkpoints["qwen3_vl"], "--test-questions", "9000")
    printed = tmp_path / "printed.txt"
    with (
        printed.open("w") as file,
        subprocess.Popen(everything, stdout=file, stderr=file, preexec_fn=heed_interrupts) as process,
    ):
        wait_for(lambda: len(processes_of(folder)) > 1, process)
        process.send_signal(deadly)
        process.wait(20)
        if deadly != signal.SIGKILL:
            assert process.returncode == 130
            assert "stopped; the same command goes on where it was" in printed.read_text()
    deadline = time.monotonic() + 10
    while processes_of(folder):
        assert time.monotonic() < deadline, "its commands live on"
        time.sleep(0.1)
