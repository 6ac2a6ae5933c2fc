"""The index of a JSONL file: every row by its number, found again, built by all processes, read alone."""

import gzip
import multiprocessing
import os
import pickle
import subprocess
import sys
import tempfile
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwenvl.data import lines
from qwenvl.data.lines import find_rows


def write(path: Path, rows, end: str = "\n") -> Path:
    path.write_text("".join(f"{row}{end}" for row in rows))
    return path


def everything(path: Path) -> list[tuple[str, object]]:
    rows = find_rows(path)
    return [(rows.where(index).removeprefix(f"{path}: "), rows.row(index)) for index in range(len(rows))]


def enumerated(data: bytes) -> list[tuple[str, object]]:
    """What `everything` gives of rows that are numbers, by going over the lines."""
    data = data.removeprefix(b"\xef\xbb\xbf")
    return [
        (f"line {number} (counted from 1)", int(line))
        for number, line in enumerate(data.split(b"\n"), 1)
        if line.strip()
    ]


LINES = st.lists(
    st.sampled_from([b"7", b"12345678", b" 31", b"4 \r", b"", b"", b" ", b"\r", b" \t  \v\f   "])
)


@settings(deadline=None)
@given(LINES, st.booleans(), st.booleans(), st.integers(1, 9), st.integers(1, 5))
def test_every_row_is_found_under_its_line(many, bom, newline, chunk, processes):
    """Blank lines, a byte order mark and no final newline; shares and chunks that end anywhere."""
    data = b"\xef\xbb\xbf" * bom + b"\n".join([*many, b"99"]) + b"\n" * newline
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(lines, "CHUNK", chunk)
        path = Path(folder, "a.jsonl")
        path.write_bytes(data)
        assert everything(path) == enumerated(data)
        shares, found = [len(data) * at // processes for at in range(processes + 1)], []
        with open(f"{folder}/starts", "wb") as out:
            for first, last in pairwise(shares):
                before = sum(rows for rows, _ in found)
                rows, blanks = lines._scan(path, first, last, out)
                found.append((rows, (blanks + before).tolist()))
        (index,) = Path(folder).glob(".a.jsonl.rows")
        starts, blanks = Path(folder, "starts").read_bytes(), [each for _, blanks in found for each in blanks]
        end = lines.HEADER * 8 + len(starts)
        assert index.read_bytes()[lines.HEADER * 8 : end] == starts
        assert index.read_bytes()[end + 8 :] == b"".join(each.to_bytes(8, "little") for each in blanks)


def test_an_index_is_found_again_until_the_file_changes(tmp_path, monkeypatch):
    path = write(tmp_path / "a.jsonl", range(1000))
    assert [row for _, row in everything(path)] == list(range(1000))
    assert sorted(os.listdir(tmp_path)) == [".a.jsonl.rows", "a.jsonl"], "nothing else is left behind"
    with monkeypatch.context() as patch:
        patch.setattr(os, "preadv", None)
        assert len(find_rows(path)) == 1000
    stamp = path.stat().st_mtime_ns
    write(path, range(1000, 2000, 2), "   \n")
    assert [row for _, row in everything(path)] == list(range(1000, 2000, 2))
    size = path.stat().st_size
    write(path, [10**7 - 1] * (size // 8))
    os.utime(path, ns=(stamp, stamp + 1))
    assert path.stat().st_size == size
    assert [row for _, row in everything(path)] == [10**7 - 1] * (size // 8), "of the same size, but newer"
    (tmp_path / ".a.jsonl.rows").write_bytes(b"torn")
    assert len(find_rows(path)) == size // 8


def test_only_the_rows_asked_for_are_read(tmp_path, monkeypatch):
    path = write(tmp_path / "a.jsonl", [f'"{"x" * number}"' for number in range(3000)])
    rows, read, real = find_rows(path), [], os.pread
    monkeypatch.setattr(os, "pread", lambda *given: read.append(given[1:]) or real(*given))
    assert [len(rows.row(index)) for index in (2999, 0, 70)] == [2999, 0, 70]
    assert [size for size, _ in read] == [3002, 3, 73]


def test_a_copy_in_another_process_reads_the_same_rows(tmp_path):
    rows = find_rows(write(tmp_path / "a.jsonl", range(500_000)))
    assert rows.row(400_000) == 400_000
    sent = pickle.dumps(rows)
    assert len(sent) < 1000, "the index is not sent along"
    assert pickle.loads(sent).row(7) == 7


def test_a_file_that_changes_under_its_index_is_refused(tmp_path):
    path = write(tmp_path / "a.jsonl", range(100))
    rows = find_rows(path)
    write(path, [10**5] * 100)
    with pytest.raises(ValueError, match=r"a.jsonl: line 51 .*: the file is not as it was when its rows"):
        rows.row(50)
    write(path, range(5))
    with pytest.raises(ValueError, match="start again"):
        rows.row(99)


def test_a_packed_file_is_unpacked_once(tmp_path, monkeypatch):
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(b"1\n\n2\nno JSON"))
    rows = find_rows(path)
    assert (rows.row(0), rows.row(1)) == (1, 2)
    with pytest.raises(ValueError, match=r"a.jsonl.gz: line 4 \(counted from 1\): not valid JSON"):
        rows.row(2)
    with monkeypatch.context() as patch:
        patch.setattr(gzip.GzipFile, "read", None)
        patch.setattr(gzip.GzipFile, "readinto", None)
        assert len(find_rows(path)) == 3
    path.write_bytes(gzip.compress(b"3\n"))
    assert everything(path) == [("line 1 (counted from 1)", 3)]
    path.write_bytes(gzip.compress(b"3\n" * 1000)[:-12])
    with pytest.raises(ValueError, match=r"a.jsonl.gz: .*; correct annotation_path"):
        find_rows(path)
    assert [name for name in os.listdir(tmp_path) if name.endswith("part")] == []


# ---- several processes

TOGETHER = """
import os, sys
from pathlib import Path
import torch.distributed as distributed
from qwenvl.data.lines import find_rows

rank, meeting, folder, path = int(sys.argv[1]), *sys.argv[2:]
os.chdir(folder)
distributed.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2)
read, real = [], os.preadv
def counted(descriptor, buffers, at):
    read.append((at, sum(map(len, buffers))))
    return real(descriptor, buffers, at)
os.preadv = counted
rows = find_rows(Path(path))
find_rows(Path(path))
print(len(rows), rows.row(len(rows) - 1), *read, sep="|")
distributed.destroy_process_group()
"""


def two(meeting: Path, folders: list[Path], path: str) -> list[list[str]]:
    """What two processes, each in its folder, find of a file: rows, the last one, the spans scanned."""
    command = [sys.executable, "-c", TOGETHER]
    started = [
        subprocess.Popen([*command, str(rank), str(meeting), str(folder), path], stdout=-1, text=True)
        for rank, folder in enumerate(folders)
    ]
    said = [process.communicate(timeout=200)[0].strip().split("|") for process in started]
    assert [process.returncode for process in started] == [0, 0]
    return said


def test_two_processes_build_what_one_does_each_from_its_share(tmp_path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        write(tmp_path / folder / "a.jsonl", ["", *range(30_000), " ", *range(70_000)])
    size = (tmp_path / "a/a.jsonl").stat().st_size
    said = two(tmp_path / "meeting", [tmp_path] * 2, "a/a.jsonl")
    assert [each[:2] for each in said] == [["100000", "69999"]] * 2
    assert [each[2:] for each in said] == [[f"(0, {size // 2})"], [f"({size // 2}, {size - size // 2})"]]
    together = (tmp_path / "a/.a.jsonl.rows").read_bytes()
    assert sorted(os.listdir(tmp_path / "a")) == [".a.jsonl.rows", "a.jsonl"]
    (tmp_path / "a/.a.jsonl.rows").unlink()
    find_rows(tmp_path / "a/a.jsonl")
    assert (tmp_path / "a/.a.jsonl.rows").read_bytes() == together

    said = two(tmp_path / "again", [tmp_path / "a", tmp_path / "b"], "a.jsonl")
    assert [each[:2] for each in said] == [["100000", "69999"]] * 2
    assert [each[2:] for each in said] == [[f"(0, {size})"]] * 2, "each has a disk of its own"
    theirs = (tmp_path / "b/.a.jsonl.rows").read_bytes()
    assert theirs[: 8 * 2] == together[: 8 * 2] and theirs[8 * 3 :] == together[8 * 3 :], "all but the mtime"


def test_of_a_folder_that_may_not_be_written_in_the_index_lies_in_the_cache(monkeypatch):
    """In a process of a user who is not root, whom nothing stops."""
    with tempfile.TemporaryDirectory() as folder:
        place, cache = Path(folder, "data"), Path(folder, "cache")
        place.mkdir()
        path = write(place / "a.jsonl", range(10))
        cache.mkdir()
        for each, mode in ((folder, 0o755), (path, 0o444), (place, 0o555), (cache, 0o777)):
            os.chmod(each, mode)
        monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
        context = multiprocessing.get_context("fork")
        answers = context.SimpleQueue()
        process = context.Process(target=ask_as_another, args=(path, answers))
        process.start()
        process.join(60)
        assert process.exitcode == 0 and answers.get() == [9, 9]
        assert os.listdir(place) == ["a.jsonl"]
        (index,) = (cache / "qwenvl").iterdir()
        assert index.name.endswith(".a.jsonl.rows")
        os.chmod(place, 0o755)


def ask_as_another(path: Path, answers) -> None:
    if os.geteuid() == 0:
        os.setuid(65534)
    answers.put([find_rows(path).row(9) for _ in range(2)])
