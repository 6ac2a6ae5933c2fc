"""`qwenvl-eval report` on predictions made here: the page has what it should, and model text stays text."""

import base64
import io
import json
import random
import re
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image, ImageDraw

from qwen_vl_serve import Sampling
from qwenvl_eval.cli import main
from qwenvl_eval.media import hash_media
from qwenvl_eval.page import choose
from qwenvl_eval.provenance import describe_run
from qwenvl_eval.scoring import Outcome
from qwenvl_eval.store import Prediction, Predictions, Store
from qwenvl_eval.task import Dataset, Sample, task_class
from qwenvl_eval.thumbnails import SIDE, pictures_of, places_in

HOSTILE = "</script><script>window.broken=1</script><img src=x onerror='window.broken=2'>\"'&amp;{{7*7171}}"
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")

TASK = '''
import json
from dataclasses import dataclass
from qwenvl_eval.scoring import Outcome, Verdict
from qwenvl_eval.scoring.text import exact
from qwenvl_eval.task import Metric
from qwenvl_eval.tasks.conversations import Conversations

def contains(answer, target):
    """Generous, and guessing where there is nothing."""
    if not answer:
        return Verdict(Outcome.UNPARSED, chance=0.25)
    return Verdict(Outcome.RIGHT if target["answer"] in answer else Outcome.WRONG, answer)

@dataclass(frozen=True)
class Shapes(Conversations):
    title = "Shapes"
    protocols = {"exact": exact, "contains": contains}

    def metrics(self, protocol, judged):
        return [Metric("longest", float(len(judged)), "a note", {"part one": 0.25})]
'''


def picture(number: int) -> Image.Image:
    image = Image.new("RGB", (800, 500), "#f4f1ea")
    colour = ("#2d6a9f", "#c65b45", "#2f8f6b")[number % 3]
    ImageDraw.Draw(image).ellipse((200 + number * 20, 100, 500 + number * 20, 400), fill=colour)
    return image


def make_run(folder: Path, count: int = 12, *, answers=None, task: str | None = None, **fields):
    """Rows, pictures and predictions; ``answers[i]``: fields of prediction i."""
    (folder / "shapes.py").write_text(TASK)
    task = task or str(folder / "shapes.py")
    rows = []
    for number in range(count):
        picture(number).save(folder / f"{number}.png")
        value = f"<image>\nWhich colour has circle {number}?"
        turns = [{"from": "human", "value": value}, {"from": "gpt", "value": f"colour {number}"}]
        group = "even" if number % 2 == 0 else "odd"
        rows.append({"image": f"{number}.png", "id": f"q{number}", "group": group, "conversations": turns})
        rows[-1] |= fields
    data = folder / "rows.json"
    data.write_text(json.dumps(rows))
    return write_predictions(folder / "p.jsonl", task, data, answers or {})


def write_predictions(path: Path, task: str, data: Path, answers) -> Path:
    made = task_class(task)()
    dataset = made.open(data)
    run = describe_run(
        task, made, data, dataset, "models/some-model", Sampling(temperature=0, max_new_tokens=64)
    )
    with Store(path, replace(run, engine="transformers")) as store:
        for index, sample in enumerate(dataset):
            given = {"answer": sample.target["answer"]} | answers.get(index, {})
            store.add([prediction(sample, index, **given)])
    return path


def prediction(sample, index, **given):
    fields = {"answer": "", "reasoning": "", "finish_reason": "stop", "error": "", "replicate": 0}
    fields |= {"prompt_tokens": 40, "completion_tokens": 3, "seconds": 0.5, "media": []}
    fields |= {"target": sample.target, "cluster": sample.cluster, "groups": sample.groups}
    return Prediction(
        id=sample.id, index=index, key=f"{index:064x}", prompt=hash_media(sample.messages), **(fields | given)
    )


FILTERS = """
const form = document.getElementById("filters"), seen = [];
const set = (change) => {
  for (const name of ["outcome", "group", "words"]) form.elements[name].value = "";
  form.elements.disagree.checked = false;
  change(form.elements);
  form.dispatchEvent(new Event("input"));
  seen.push([...document.querySelectorAll(".card")].filter(c => c.checkVisibility()).map(c => c.id));
};
"""

ANSWERS = {
    1: {"answer": "It is colour 1, I think.", "reasoning": "The circle is red.\nSo it is colour 1."},
    2: {"answer": "green"},
    3: {"answer": ""},
    4: {"answer": "colo", "finish_reason": "length"},
    5: {"finish_reason": "failed", "error": "the server was gone", "answer": ""},
    6: {"finish_reason": "refused", "error": "too many pixels", "answer": ""},
}


class Page(HTMLParser):
    """What the page is made of: tags with attributes, and all text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data

    def all(self, tag, **having):
        return [a for t, a in self.tags if t == tag and all(a.get(k) == v for k, v in having.items())]


def report(path: Path, *more: str) -> tuple[Page, str]:
    assert main(["report", str(path), *more]) == 0
    html = path.with_suffix(".html").read_text(encoding="utf-8")
    return Page(html), html


def rendered(path: Path, folder: Path, script: str = "") -> str:
    """The page's tree after the browser has run it and ``script``."""
    if CHROMIUM is None:
        pytest.skip("no chromium here: the page is tested as text only")
    html = path.read_text(encoding="utf-8")
    shown = folder / "shown.html"
    if script:  # the page's policy would not run it
        html = re.sub(r"<meta http-equiv[^>]*>", "", html) + f"<script>{script}</script>"
    shown.write_text(html, encoding="utf-8")
    command = [
        CHROMIUM,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        f"--user-data-dir={folder / 'profile'}",
    ]
    command += ["--virtual-time-budget=3000", "--dump-dom", shown.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_three_files_beside_the_predictions_which_stay_as_they_are(tmp_path, capsys):
    path = make_run(tmp_path, answers=ANSWERS)
    before = path.read_bytes()
    page, html = report(path)
    told = capsys.readouterr()
    assert told.out.splitlines() == [str(path.with_suffix(s)) for s in (".json", ".md", ".html")]
    assert told.err == ""
    assert path.read_bytes() == before
    found = json.loads(path.with_suffix(".json").read_text())["protocols"]["exact"]["accuracy"]
    assert (found["right"], found["total"]) == (6, 12)
    assert path.with_suffix(".md").read_text().startswith("# Shapes: models/some-model")
    for told in ("50.0", "1 failed", "1 refused", "1 truncated", "the server was gone", "part one", "a note"):
        assert told in page.text, told
    assert len(page.all("article")) == 12
    assert "left out" not in page.text and "Without pictures" not in page.text
    again = report(path)[1]
    assert again == html


def test_nothing_is_loaded_from_anywhere(tmp_path):
    page, html = report(make_run(tmp_path, answers=ANSWERS))
    sources = [value for _, a in page.tags for name, value in a.items() if name in ("src", "href", "action")]
    assert sources and all(value.startswith(("data:image/jpeg;base64,", "#")) for value in sources)
    assert not page.all("link") and not page.all("iframe")
    assert not re.search(r"https?://|url\(|@import", html)
    (policy,) = page.all("meta", **{"http-equiv": "Content-Security-Policy"})
    assert "default-src 'none'" in policy["content"]


def test_pictures_are_small_jpegs_of_the_right_sample(tmp_path):
    page, _ = report(make_run(tmp_path))
    pictures = page.all("img")
    assert len(pictures) == 12
    for number, shown in enumerate(pictures):
        image = Image.open(io.BytesIO(base64.b64decode(shown["src"].partition(",")[2])))
        assert image.format == "JPEG" and max(image.size) == SIDE
        wanted = picture(number).resize(image.size)
        point = (image.width * (350 + number * 20) // 800, image.height // 2)
        difference = [abs(a - b) for a, b in zip(image.getpixel(point), wanted.getpixel(point), strict=True)]
        assert max(difference) < 12, number


def test_an_answer_is_shown_with_all_that_belongs_to_it(tmp_path):
    page, html = report(make_run(tmp_path, answers=ANSWERS))
    (start,) = (m.start() for m in re.finditer('<article class="card" id="s1-0"', html))
    card = Page(html[start : html.index("</article>", start)])
    for told in (
        "q1",
        "odd",
        "Which colour has circle 1?",
        "[image]",
        "It is colour 1, I think.",
        "So it is",
    ):
        assert told in card.text, told
    assert "40 tokens in, 3 out" in card.text
    (article,) = card.all("article")
    assert (article["data-outcome"], article["data-agreed"]) == ("wrong", "no")
    verdicts = re.findall(r"<td>(exact|contains)</td><td><span class=\"key (\w+)\"", html[start:])
    assert verdicts[:2] == [("exact", "wrong"), ("contains", "right")]
    assert page.all("a", href="#s1-0"), "the table of flips leads to the sample"
    outcomes = [a["data-outcome"] for a in page.all("article")]
    errors = [o for o in outcomes if o not in ("right", "wrong")]
    assert errors == ["unparsed", "truncated", "failed", "refused"] == outcomes[:4]


def hostile_run(folder: Path) -> Path:
    answers = {n: {"answer": HOSTILE + "colour", "reasoning": HOSTILE} for n in range(3)}
    answers[0] |= {"finish_reason": "failed", "error": HOSTILE}
    path = make_run(folder, 3, answers=answers, group=HOSTILE)
    lines = path.read_text(encoding="utf-8").splitlines()
    changed = [json.loads(line) for line in lines]
    for row in changed[1:]:
        row["prompt"][0]["content"][1]["text"] = HOSTILE
        row["target"] = {"answer": HOSTILE, HOSTILE: [HOSTILE]}
        row["id"] = HOSTILE + str(row["index"])
    changed[0]["run"]["model"] = HOSTILE
    path.write_text("".join(json.dumps(row) + "\n" for row in changed), encoding="utf-8")
    return path


def test_what_a_model_wrote_is_text(tmp_path):
    page, html = report(hostile_run(tmp_path))
    assert len(page.all("script")) == 1
    assert all("onerror" not in attributes for _, attributes in page.tags)
    assert {attributes.get("src", "data:")[:5] for _, attributes in page.tags} == {"data:"}
    assert page.text.count(HOSTILE) >= 10
    assert "50197" not in re.sub(r"base64,[^\"]*", "", html)  # no template of theirs is filled in
    (option,) = (a for a in page.all("optgroup"))
    assert option["label"] == "group"


def test_what_a_model_wrote_does_not_run_in_a_browser(tmp_path):
    path = hostile_run(tmp_path)
    report(path)
    shown = rendered(
        path.with_suffix(".html"), tmp_path, "document.title = 'broken is ' + String(window.broken);"
    )
    assert "<title>broken is undefined</title>" in shown
    assert Page(shown).text.count(HOSTILE) >= 10


def test_the_filters_work_in_a_browser_and_without_scripts_everything_is_there(tmp_path):
    path = make_run(tmp_path, answers=ANSWERS)
    page, _ = report(path)
    html = path.with_suffix(".html")
    assert all("hidden" not in a for a in page.all("article"))
    assert "hidden" in page.all("form")[0]

    shown = Page(rendered(html, tmp_path))  # with the page's own policy in force
    assert "hidden" not in shown.all("form")[0] and "12 shown" in shown.text

    odd = next(a["value"] for a in page.all("option") if a["value"].isdigit() and a["value"] != "0")
    expected = {
        "outcome.value = 'wrong'": ["s1-0", "s2-0"],
        "disagree.checked = true": ["s1-0"],
        "words.value = ' GREEN '": ["s2-0"],
        f"group.value = '{odd}'": [f"s{n}-0" for n in (3, 5, 1, 7, 9, 11)],
        "words.value = 'no such words'": [],
    }
    changes = "".join(f"set(e => {{ e.{change}; }});" for change in expected)
    shown = rendered(html, tmp_path, FILTERS + changes + "document.title = JSON.stringify(seen);")
    (seen,) = re.findall("<title>(.*)</title>", shown)
    assert json.loads(seen) == list(expected.values())


def test_left_out_samples_are_owned_up_to(tmp_path):
    path = make_run(tmp_path, answers=ANSWERS)
    page, _ = report(path, "--samples", "6")
    assert "6 of 12 answers are shown and 6 left out" in page.text
    outcomes = [a["data-outcome"] for a in page.all("article")]
    assert len(outcomes) == 6 and {"right", "wrong"} == set(outcomes[3:])
    assert set(outcomes[:3]) < {"unparsed", "failed", "refused", "truncated"}


@pytest.mark.parametrize("seed", range(30))
def test_what_is_chosen(seed):
    draw = random.Random(seed)
    outcomes = draw.choices(list(Outcome), weights=[draw.random() for _ in Outcome], k=draw.randrange(1, 300))
    limit = draw.randrange(1, 320)
    shown = choose(outcomes, limit)
    assert shown == choose(outcomes, limit)
    assert len(shown) == len(set(shown)) == min(limit, len(outcomes))
    kinds = [outcomes[place] if outcomes[place] in ("right", "wrong") else "error" for place in shown]
    errors = kinds.count("error")
    assert kinds[:errors] == ["error"] * errors
    there = sum(o not in ("right", "wrong") for o in outcomes)
    assert errors == min(there, max(limit // 2, limit - (len(outcomes) - there)))
    wrong, right = kinds.count("wrong"), kinds.count("right")
    fewer = "wrong" if wrong < right else "right"
    assert abs(wrong - right) <= 1 or min(wrong, right) == outcomes.count(fewer)


def test_without_the_data_the_page_says_so(tmp_path, capsys):
    path = make_run(tmp_path, answers=ANSWERS)
    data = tmp_path / "rows.json"
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    for file in [data, *tmp_path.glob("*.png")]:
        shutil.copy(file, moved / file.name)
    data.write_text(data.read_text() + " ")
    page, _ = report(path)
    assert not page.all("img") and "is not the data of this run" in page.text
    assert "without pictures" in capsys.readouterr().err
    data.unlink()
    page, _ = report(path)
    assert not page.all("img") and "say where the data is with --data-dir" in page.text
    assert len(page.all("article")) == 12
    page, _ = report(path, "--data-dir", str(moved / "rows.json"))
    assert len(page.all("img")) == 12 and "Without pictures" not in page.text


def test_a_picture_that_has_changed_or_gone_is_not_shown(tmp_path):
    path = make_run(tmp_path, 3)
    Image.new("RGB", (800, 500), "red").save(tmp_path / "1.png")
    page, _ = report(path)
    assert len(page.all("img")) == 2
    assert "what the data gives now is not what was asked" in page.text


def test_no_report_overwrites_the_predictions(tmp_path, capsys):
    path = make_run(tmp_path, 3).rename(tmp_path / "p.json")
    before = path.read_bytes()
    assert main(["report", str(path)]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "the report would overwrite it; give its name the ending .jsonl" in line
    assert path.read_bytes() == before
    (tmp_path / "link.jsonl").symlink_to(path)
    (tmp_path / "link.json").symlink_to(path)
    assert main(["report", str(tmp_path / "link.jsonl")]) == 1
    assert path.read_bytes() == before


def test_errors_are_one_line(tmp_path, capsys):
    path = make_run(tmp_path, 3)
    lines = path.read_text().splitlines(keepends=True)
    (tmp_path / "partial.jsonl").write_text("".join(lines[:-1]))
    cases = [("partial.jsonl", "2 of 3 predictions"), ("nowhere.jsonl", "No such file")]
    for name, told in cases:
        assert main(["report", str(tmp_path / name)]) == 1
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("qwenvl-eval: ") and told in line
        assert not (tmp_path / name).with_suffix(".html").exists()
    with pytest.raises(SystemExit):
        main(["report", str(path), "--samples", "0"])
    assert "give a whole number from 1 up" in capsys.readouterr().err


def test_a_long_answer_loses_its_middle_and_says_how_much(tmp_path):
    answers = {0: {"answer": "begin" + "x" * 50_000 + "end"}}
    page, html = report(make_run(tmp_path, 1, answers=answers))
    assert "30,008 characters are left out here" in page.text
    assert "begin" in page.text and "xend" in page.text
    assert len(re.sub(r"base64,[^\"]*", "", html)) < 90_000


def test_replicates_are_told_apart(tmp_path):
    path = make_run(tmp_path, 2)
    run, rows = Predictions(path).run, list(Predictions(path))
    twice = tmp_path / "twice.jsonl"
    with Store(twice, replace(run, replicates=2)) as store:
        store.add(rows)
        store.add([replace(p, replicate=1, answer="no", key=f"{9 + p.index:064x}") for p in rows])
    page, _ = report(twice)
    assert [a["id"] for a in page.all("article")] == ["s0-0", "s0-1", "s1-0", "s1-1"]
    assert "replicate 1" in page.text and "standard deviation" in page.text


def test_boxes_are_drawn_where_they_are(tmp_path):
    task = tmp_path / "boxes.py"
    task.write_text(TASK.replace('"exact": exact, ', ""))
    found = [
        {"label": "a <b> circle", "bbox": [200, 100, 300, 300]},
        {"label": "broken", "bbox": [1, 2, None, 4]},
    ]
    path = make_run(tmp_path, 1, task=str(task), answers={0: {"answer": json.dumps(found)}})
    row = path.read_text().replace(
        '"target": {', '"target": {"truth": [{"label": "c", "bbox": [1, 2, 3, 4]}], '
    )
    path.write_text(row)
    page, _ = report(path)
    (solid,), (dashed,) = page.all("rect", **{"class": "found"}), page.all("rect", **{"class": "wanted"})
    assert [solid[k] for k in ("x", "y", "width", "height")] == ["200.0", "100.0", "300.0", "300.0"]
    assert dashed["x"] == "1.0"
    assert page.all("svg")[0]["viewbox"] == "0 0 800 500"
    assert "a <b> circle" in page.text and "1 found (solid), 1 wanted (dashed)" in page.text


@pytest.mark.parametrize(
    "value",
    ["", "[", "x", None, 3, "{}", "[1]", '[{"bbox": [1, 2, 3]}]', "[" * 100_000, '[{"bbox": [NaN, 1, 1, 1]}]',
     '[{"bbox": [1e999, 1, 1, 1]}]', f'[{{"bbox": [1{"0" * 400}, 1, 1, 1]}}]', '[{"bbox": [true, 1, 1, 1]}]'],
)  # fmt: skip
def test_what_is_no_list_of_boxes_draws_nothing(value):
    assert places_in(value) == ()


def test_a_video_is_shown_by_two_frames(tmp_path):
    import av
    import numpy as np

    with av.open(str(tmp_path / "clip.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=10)
        stream.width = stream.height = 64
        stream.pix_fmt = "yuv420p"
        for value in (250,) * 10 + (5,) * 10:
            frame = av.VideoFrame.from_ndarray(np.full((64, 64, 3), value, np.uint8), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    turns = [{"from": "human", "value": "<video>What?"}, {"from": "gpt", "value": "dark"}]
    (tmp_path / "rows.json").write_text(json.dumps([{"video": "clip.mp4", "conversations": turns}]))
    path = write_predictions(tmp_path / "p.jsonl", "conversations", tmp_path / "rows.json", {})
    page, _ = report(path)
    pictures = [Image.open(io.BytesIO(base64.b64decode(a["src"].partition(",")[2]))) for a in page.all("img")]
    values = [image.getpixel((30, 30))[0] for image in pictures]
    assert len(values) == 2 and values[0] > 240 and values[1] < 15
    assert "video at 0.0 s" in page.text


CROSSED = TASK.replace('{"exact": exact, "contains": contains}', '{"contains": contains}').replace(
    "    def metrics",
    """
    tables = (("group", "third"), ("group",))

    def open(self, data):
        from dataclasses import replace
        from qwenvl_eval.task import Dataset
        plain = super().open(data)
        def walk():
            for number, sample in enumerate(plain):
                third = f"third {number * 3 // len(plain)}"
                yield replace(sample, groups={**sample.groups, "third": third}, cluster=third)
        return Dataset(plain.files, len(plain), walk)

    def metrics""",
)


def test_two_groups_make_a_table_with_columns_and_guesses_a_bracket(tmp_path):
    (tmp_path / "crossed.py").write_text(CROSSED)
    answers = {n: {"answer": ""} for n in range(3)} | {3: {"answer": "no"}}
    page, html = report(make_run(tmp_path, answers=answers, task=str(tmp_path / "crossed.py")))
    assert "with all of these drawn right it would be 91.7 %, 72.9 % is to be expected" in page.text
    assert "about 3 pictures or videos" in page.text
    (table,) = re.findall(r"By group and third</h2>.*?</table>", html, re.S)
    cells = [re.sub(r"\s+", " ", re.sub("<[^>]+>", " ", row)).split() for row in table.split("<tr>")[1:]]
    assert cells[0] == "group third 0 third 1 third 2".split()
    assert cells[1] == "even 0.0 % of 2 100.0 % of 2 100.0 % of 2".split()
    assert cells[2] == "odd 0.0 % of 2 100.0 % of 2 100.0 % of 2".split()


def test_a_picture_that_never_could_be_read_is_told_with_the_reason(tmp_path):
    path = make_run(tmp_path, 2)
    (tmp_path / "1.png").write_bytes(b"no picture at all")
    path.unlink()
    write_predictions(path, str(tmp_path / "shapes.py"), tmp_path / "rows.json", {})
    page, html = report(path)
    assert len(page.all("img")) == 1
    (note,) = re.findall(r"<figcaption>(.*1\.png.*)</figcaption>", html)
    assert "picture" in note


def test_of_a_list_of_frames_two_are_shown(tmp_path):
    frames = []
    for number in range(6):
        frames.append(tmp_path / f"frame{number}.png")
        Image.new("RGB", (64, 64), (number * 40,) * 3).save(frames[-1])
    item = {"type": "video", "video": [str(frame) for frame in frames]}
    sample = Sample("q", [{"role": "user", "content": [item]}], {"answer": "x"}, "c")
    found = pictures_of(Dataset((), 1, lambda: iter([sample])), {0: hash_media(sample.messages)})
    assert [picture.note for picture in found[0]] == ["frame 0 of 6", "frame 3 of 6"]
    colours = [Image.open(io.BytesIO(base64.b64decode(p.source.partition(",")[2]))) for p in found[0]]
    assert [round(image.getpixel((9, 9))[0] / 40) for image in colours] == [0, 3]
