"""A back end over a nano model with random weights so large that every prompt gets another answer."""

from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image

from qwen_vl_serve.backends.transformers import TransformersBackend
from qwenvl.nano import FAMILIES, write_checkpoint
from qwenvl.train.expert_layout import publish


@pytest.fixture(scope="session")
def lively(tmp_path_factory):
    """Family -> checkpoint folder, written when first asked for."""
    folders: dict[str, Path] = {}

    def checkpoint(family: str) -> Path:
        if family not in folders:
            folder = write_checkpoint(family, tmp_path_factory.mktemp("lively") / family)
            backend = TransformersBackend.load(folder, device="cpu")
            generator = torch.Generator().manual_seed(0)
            for parameter in backend.model.parameters():
                if parameter.ndim > 1:
                    parameter.data.normal_(0, 1.5 / parameter.shape[-1] ** 0.5, generator=generator)
            backend.model.save_pretrained(folder)
            publish(folder)
            folders[family] = folder
        return folders[family]

    return checkpoint


# With random weights a qwen3_5 gives some prompts the same answer.
@pytest.fixture(scope="session", params=[name for name in FAMILIES if name != "qwen3_5"])
def any_backend(request, lively) -> TransformersBackend:
    return TransformersBackend.load(lively(request.param), device="cpu")


@pytest.fixture(scope="session")
def backend(lively) -> TransformersBackend:
    return TransformersBackend.load(lively("qwen3_vl"), device="cpu")


@pytest.fixture(scope="session")
def pictures(tmp_path_factory) -> list[str]:
    """Three pictures of 224x224, 320x160 and 64x64 pixels, full of structure."""
    folder = tmp_path_factory.mktemp("pictures")
    random = np.random.default_rng(0)
    paths = []
    for name, size in {"square": (224, 224), "wide": (320, 160), "small": (64, 64)}.items():
        coarse = Image.fromarray(random.integers(0, 256, (8, 8, 3), dtype=np.uint8))
        path = folder / f"{name}.png"
        coarse.resize(size, Image.Resampling.BICUBIC).save(path)
        paths.append(str(path))
    return paths


@pytest.fixture(scope="session")
def clip(tmp_path_factory) -> str:
    """Eight frames of 128x96 at 4 frames a second."""
    path = tmp_path_factory.mktemp("clips") / "clip.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=4)
        stream.width, stream.height, stream.pix_fmt = 128, 96, "yuv420p"
        for index in range(8):
            frame = np.full((96, 128, 3), 30, np.uint8)
            frame[20:60, 10 * index : 10 * index + 30] = (220, 40, 20 * index)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    return str(path)
