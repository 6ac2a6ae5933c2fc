"""Video-MME: rows of the parquet file, subtitles at the frames, the official overall."""

import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen_vl_utils import fetch_video
from qwenvl_eval.samples.videomme import COLOURS, VIDEOS, write
from qwenvl_eval.scoring import Outcome, Verdict, videomme
from qwenvl_eval.task import Judged, task_class
from qwenvl_eval.tasks.videomme import Videomme, cues, subtitles

PARQUET = Path("videomme") / "test-00000-of-00001.parquet"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write(tmp_path_factory.mktemp("videomme"))


def changed(folder, change):
    """The sample in ``folder`` with its rows changed."""
    write(folder)
    rows = pyarrow.parquet.read_table(folder / PARQUET).to_pylist()
    change(rows)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / PARQUET)
    return folder


def text_of(sample):
    return sample.messages[-1]["content"][1]["text"]


def test_each_row_is_a_question_about_its_video(data):
    dataset = Videomme().open(data)
    found = list(dataset)
    assert len(dataset) == len(found) == 6 and [s.id for s in dataset] == [s.id for s in found]
    assert dataset.files == (data / PARQUET,)
    rows = pyarrow.parquet.read_table(data / PARQUET).to_pylist()
    for row, sample in zip(rows, found, strict=True):
        assert (sample.id, sample.cluster) == (row["question_id"], row["videoID"])
        names = ("duration", "domain", "sub_category", "task_type")
        assert sample.groups == {name: row[name] for name in names}
        video, text = sample.messages[0]["content"]
        assert video["video"] == str(data / "data" / f"{row['videoID']}.mp4")
        assert (video["fps"], video["min_frames"], video["max_frames"]) == (2.0, 4, 512)
        pixels = [video[name] // 1024 for name in ("min_pixels", "max_pixels", "total_pixels")]
        assert pixels == [128, 512, 24576]
        assert text["text"].endswith("\n".join([row["question"], *row["options"], "The best answer is:"]))
        assert sample.target["answer"] == row["answer"]
        letters = [f"{letter}. {option}" for letter, option in sample.target["options"].items()]
        assert letters == row["options"]
        json.dumps(sample.target)
    assert {name for group in Videomme.tables for name in group} == set(names)


def test_answers_of_the_sample_are_right(data):
    """The first colour of each video, seen in its first frame, is the answer to its first question."""
    for sample in list(Videomme(min_pixels=0, max_pixels=0, total_pixels=0).open(data))[::2]:
        frames = fetch_video(sample.messages[0]["content"][0], image_patch_size=16)
        height, width = frames.shape[-2:]
        seen = frames[0, :, height // 2, width // 3].tolist()
        nearest = min(COLOURS, key=lambda n: sum((a - b) ** 2 for a, b in zip(COLOURS[n], seen, strict=True)))
        assert sample.target["options"][sample.target["answer"]] == f"{nearest.capitalize()}."


def test_the_sample_is_the_same_every_time_and_never_overwrites(data, tmp_path):
    write(tmp_path)
    first = {path.relative_to(data): path.read_bytes() for path in data.rglob("*") if path.is_file()}
    second = {path.relative_to(tmp_path): path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert first == second and len(first) == 6
    (tmp_path / PARQUET).write_bytes(b"")
    with pytest.raises(ValueError, match="not this sample"):
        write(tmp_path)


def test_the_task_is_found_by_its_name():
    assert task_class("videomme") is Videomme


@pytest.mark.parametrize("where", [".", "videomme", "file"])
def test_the_parquet_file_may_lie_in_three_places(data, tmp_path, where):
    write(tmp_path)
    if where == ".":
        (tmp_path / PARQUET).rename(tmp_path / "test.parquet")
    (tmp_path / "data").rename(tmp_path / "videos")
    found = list(Videomme().open(tmp_path / PARQUET if where == "file" else tmp_path))
    assert [sample.target for sample in found] == [sample.target for sample in Videomme().open(data)]
    assert found[0].messages[0]["content"][0]["video"].startswith(str(tmp_path / "videos"))


@pytest.mark.parametrize(
    ("options", "ids"),
    [
        ({"duration": "medium"}, ["002-1", "002-2"]),
        ({"max_samples": 3}, ["001-1", "001-2", "002-1"]),
        ({"duration": "long", "max_samples": 1}, ["003-1"]),
    ],
)
def test_less_may_be_asked(data, options, ids):
    dataset = Videomme(**options).open(data)
    assert [sample.id for sample in dataset] == ids and len(dataset) == len(ids)


def test_limits_that_are_0_are_left_to_the_checkpoint(data):
    task = Videomme(fps=0, min_frames=0, max_frames=0, min_pixels=0, max_pixels=0, total_pixels=0)
    for sample in task.open(data):
        assert set(sample.messages[0]["content"][0]) == {"type", "video"}


def test_the_system_prompt_comes_first_and_belongs_to_the_data(data, tmp_path):
    path = tmp_path / "system.txt"
    path.write_text("Think first.")
    dataset = Videomme(sys_prompt=str(path)).open(data)
    assert all(s.messages[0] == {"role": "system", "content": "Think first."} for s in dataset)
    before = dataset.checksum()
    path.write_text("Think twice.")
    assert dataset.checksum() != before
    with pytest.raises(ValueError, match=r"sys_prompt .*gone\.txt: no such file"):
        Videomme(sys_prompt=str(tmp_path / "gone.txt")).open(data)


# subtitles


def test_subtitles_stand_before_the_question_where_the_video_has_some(data):
    texts = [text_of(sample) for sample in Videomme(use_subtitle=True).open(data)]
    assert all("Now the square is red. Now the square is blue.\n" in text for text in texts[:2])
    assert all("Now the square is green. Now the square is red.\n" in text for text in texts[2:4])
    assert texts[4:] == [text_of(sample) for sample in Videomme().open(data)][4:]
    assert not any("Now the square" in text_of(sample) for sample in Videomme().open(data))


def test_only_what_is_said_at_a_frame_that_is_taken_counts(data, tmp_path):
    """Held against the frames that fetch_video takes: a cue around one counts, one between two does not."""
    item = {"video": str(data / "data" / f"{VIDEOS[2][0]}.mp4"), "fps": 2, "min_frames": 4, "max_frames": 4}
    _, metadata = fetch_video(item, image_patch_size=16, return_video_metadata=True)
    times = metadata.timestamps
    assert len(times) == 4 and times[1] - times[0] > 0.2
    path = tmp_path / "a.srt"
    blocks = []
    for number, time in enumerate(times):
        blocks.append(
            srt(time - 0.01, time + 0.01, f"at {number}") if number else srt(0, 0.05, "from the start")
        )
        blocks.append(srt(time + 0.02, time + 0.1, f"after {number}"))
    path.write_text("\n".join(blocks))
    assert subtitles(path, {"type": "video", **item}) == "at 1 at 2 at 3", "a cue starts before its frame"


def srt(start, end, text):
    def clock(t):
        return f"00:00:{int(t):02},{round(t % 1 * 1000):03}"

    return f"1\n{clock(start)} --> {clock(end)}\n{text}\n"


def test_an_srt_file_is_read_with_its_quirks(tmp_path):
    path = tmp_path / "a.srt"
    path.write_bytes(
        "\ufeff1\r\n00:00:01,500 --> 00:00:02,000\r\n<i>Hello,</i>\r\n{\\an8}you 3 < 5\r\n\r\n"
        "2\r\n01:02:03.25 --> 01:02:04,5 X1:0\r\n  \r\n\r\n"
        "3\r\n01:02:03,250 --> 01:02:04,500\r\nlast".encode()
    )
    assert cues(path) == [(1.5, 2.0, "Hello, you 3 < 5"), (3723.25, 3724.5, "last")]


def test_a_file_that_is_no_srt_is_told(tmp_path):
    path = tmp_path / "a.srt"
    path.write_text("<html>not found</html>")
    with pytest.raises(ValueError, match=r"a\.srt: no subtitles in it"):
        cues(path)
    path.write_bytes(b"\xff\xfe1\x00")
    with pytest.raises(ValueError, match=r"a\.srt: not UTF-8"):
        cues(path)
    path.write_text("")
    assert cues(path) == []


words = st.text("ab é,.<", min_size=1, max_size=12).filter(str.strip)


@settings(max_examples=100, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(0, 10**7), st.integers(0, 9999), st.lists(words, min_size=1, max_size=3)),
        max_size=6,
    )
)
def test_any_srt_file_comes_back(tmp_path_factory, entries):
    def clock(t):
        return f"{t // 3600000:02}:{t // 60000 % 60:02}:{t // 1000 % 60:02},{t % 1000:03}"

    path = tmp_path_factory.mktemp("srt") / "a.srt"
    blocks = [
        f"{n}\n{clock(start)} --> {clock(start + length)}\n" + "\n".join(lines) + "\n"
        for n, (start, length, lines) in enumerate(entries, 1)
    ]
    path.write_text("\n".join(blocks), encoding="utf-8")
    expected = [
        (start / 1000, (start + length) / 1000, " ".join(" ".join(lines).split()))
        for start, length, lines in entries
    ]
    found = cues(path) if entries else []
    assert [text for *_, text in found] == [text for *_, text in expected]
    assert [t for cue in found for t in cue[:2]] == pytest.approx([t for cue in expected for t in cue[:2]])


def test_a_video_that_cannot_be_read_has_no_subtitles_and_stops_nothing(data, tmp_path):
    write(tmp_path)
    (tmp_path / "data" / f"{VIDEOS[0][0]}.mp4").write_bytes(b"no video")
    texts = [text_of(sample) for sample in Videomme(use_subtitle=True, max_samples=3).open(tmp_path)]
    assert ["Now the square" in text for text in texts] == [False, False, True]


# the figures


def rows(answers, duration="short", video="v"):
    target = {"answer": "C", "options": dict.fromkeys("ABCD", "x")}
    groups = {"duration": duration}
    return [
        Judged(str(n), 0, target, f"{video}{n // 3}", groups, False, videomme.official(answer, target))
        for n, answer in enumerate(answers)
    ]


def test_the_official_overall_leaves_out_answers_without_a_letter():
    judged = rows(["C", "", "I do not know", "A"]) + rows(["C", "C", "no"], "long", "w")
    judged.append(Judged("f", 0, {}, "w9", {"duration": "long"}, False, Verdict(Outcome.FAILED)))
    judged.append(Judged("t", 0, {}, "w9", {"duration": "long"}, True, Verdict(Outcome.TRUNCATED, "B")))
    (metric,) = Videomme().metrics("official", judged)
    assert (metric.name, metric.value) == ("overall", 3 / 5)
    assert metric.parts == {"short": 1 / 2, "long": 2 / 3}
    assert metric.note == (
        "4 of 9 answers without a letter are left out; "
        "300 videos of each duration are published, here are 2 short, 0 medium, 2 long"
    )
    assert Videomme().metrics("strict", judged) == []
    assert Videomme().metrics("official", rows(["", "-"])) == []


def test_a_whole_run_is_not_noted_as_a_part():
    judged = [row for name in ("short", "medium", "long") for row in rows(["C"] * 900, name, name)]
    (metric,) = Videomme().metrics("official", judged)
    assert metric.note == "0 of 2700 answers without a letter are left out"
    assert metric.parts == {"short": 1, "medium": 1, "long": 1}


def test_a_letter_is_scored_by_both_protocols(data):
    for sample in Videomme().open(data):
        for scorer in Videomme.protocols.values():
            assert scorer(sample.target["answer"], sample.target).right
            wrong = next(letter for letter in "ABCD" if letter != sample.target["answer"])
            assert scorer(f"The best answer is: {wrong}", sample.target) == Verdict(Outcome.WRONG, wrong)


# bad data


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda rows: rows[1].update(question_id="001-1"), r"row 1 .*second question_id '001-1'"),
        (lambda rows: rows[4].update(duration="hour"), r"row 4 .*duration is 'hour'"),
        (lambda rows: rows[4].update(answer="E"), r"row 4 .*answer is 'E'; it must be one of A, B, C, D"),
        (lambda rows: rows[4].update(answer=None), r"row 4 .*answer is None"),
        (lambda rows: rows[2].update(options=["A. x", "C. y"]), r"row 2 .*options are"),
        (lambda rows: rows[2].update(options=["A. x", "A. y"]), r"row 2 .*options are"),
        (lambda rows: rows[2].update(options=None), r"row 2 .*options are None"),
        (lambda rows: [row.pop("domain") for row in rows], r"no column domain"),
        (
            lambda rows: [row.update(videoID="gone") for row in rows[3:]],
            r"data/gone\.mp4: .*\(1 videos are not there",
        ),
    ],
)
def test_rows_that_are_not_the_benchmarks_are_told(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        Videomme().open(changed(tmp_path, change))


def test_every_missing_video_is_counted_but_only_of_what_is_asked(tmp_path):
    write(tmp_path)
    for id, *_ in VIDEOS[:2]:
        (tmp_path / "data" / f"{id}.mp4").unlink()
    with pytest.raises(ValueError, match=rf"{VIDEOS[0][0]}\.mp4: .*2 videos are not there"):
        Videomme().open(tmp_path)
    assert len(Videomme(duration="long").open(tmp_path)) == 2


def test_data_that_is_not_there_is_told(tmp_path):
    with pytest.raises(ValueError, match=r"no \.parquet there"):
        Videomme().open(tmp_path)
    (tmp_path / "a.parquet").write_bytes(b"no parquet file at all")
    with pytest.raises(ValueError, match=r"a\.parquet: not a parquet file"):
        Videomme().open(tmp_path)
    (tmp_path / "a.parquet").unlink()
    write(tmp_path)
    for path in (tmp_path / "subtitle").iterdir():
        path.unlink()
    (tmp_path / "subtitle").rmdir()
    assert len(Videomme().open(tmp_path)) == 6
    with pytest.raises(ValueError, match="subtitle: no such folder"):
        Videomme(use_subtitle=True).open(tmp_path)


def test_only_known_durations(data):
    with pytest.raises(ValueError, match="duration='all'; give one of short, medium, long, sum"):
        Videomme(duration="all")
    changed_rows = pyarrow.parquet.read_table(data / PARQUET).to_pylist()
    assert {row["duration"] for row in changed_rows} == {"short", "medium", "long"}


def test_rows_are_read_in_batches(tmp_path, monkeypatch):
    """A thousand rows of ten kilobytes: never more than one batch is in memory."""

    def grow(found):
        found[:] = [{**found[0], "question_id": str(n), "url": "x" * 10000 + str(n)} for n in range(1000)]

    changed(tmp_path, grow)
    sizes = []
    whole = pyarrow.parquet.ParquetFile.iter_batches

    def watched(self, *arguments, **options):
        for batch in whole(self, *arguments, **options):
            sizes.append(batch.num_rows)
            yield batch

    monkeypatch.setattr(pyarrow.parquet.ParquetFile, "iter_batches", watched)
    assert len(Videomme().open(tmp_path)) == 1000
    assert sum(sizes) == 1000 and max(sizes) <= 256
