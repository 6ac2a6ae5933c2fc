"""Pictures and frames to their size, bicubic.

A picture is resized by Pillow, as 0.0.14 did, or as the model library's processors do: by torch's 8-bit
kernel, which is several times faster and at most a few grey levels apart (`Resampling`).

Frames, with antialiasing, to within rounding what 0.0.14 did, several times faster:

    uint8 [h, w, 3] --> float [h, w * 3] --rows--> [H, w * 3] --turned--> [w, 3 * H]
    [w, 3 * H] --rows--> [W, 3 * H] --rounded, turned--> uint8 [3, H, W]

Both passes combine rows: a row of the result is a weighted sum of a few rows, what `embedding_bag` computes
with the processor's widest instructions. torch's own float kernel is slow along the width, and its 8-bit
kernel clips between the passes, which is off by up to 10 grey levels at sharp edges.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

from PIL import Image

if TYPE_CHECKING:
    import numpy as np
    import torch


@dataclass(frozen=True)
class Resampling:
    """A way to resize pictures."""

    name: str
    """In the cache, whose pixels are of one way only."""
    resize: Callable[[Image.Image, int, int], Any]
    """(RGB picture, height, width) -> the picture at that size."""
    restore: "Callable[[np.ndarray], Any]"
    """uint8 [height, width, 3] of the cache -> what `resize` returned."""


def _resize_by_torch(image: Image.Image, height: int, width: int) -> "np.ndarray":
    import numpy as np
    import torch

    pixels = np.array(image)
    if image.size == (width, height):
        return pixels
    # Seen with channels first, of which the kernel knows that they lie last in memory.
    channels_first = torch.from_numpy(pixels).permute(2, 0, 1)[None]
    resized = torch.nn.functional.interpolate(
        channels_first, size=(height, width), mode="bicubic", antialias=True
    )
    return resized[0].permute(1, 2, 0).numpy()


BY_PILLOW = Resampling("pillow", lambda image, height, width: image.resize((width, height)), Image.fromarray)
"""`PIL.Image` to `PIL.Image`, what `fetch_image` gives."""
BY_TORCH = Resampling("torch", _resize_by_torch, lambda pixels: pixels)
"""`PIL.Image` to uint8 [height, width, 3], bit for bit what the model library makes of it."""


class _Taps(NamedTuple):
    """Rows of a result as weighted sums: `indices[offsets[i]:offsets[i + 1]]` weigh `weights[...]`."""

    indices: "torch.Tensor"
    offsets: "torch.Tensor"
    weights: "torch.Tensor"


@lru_cache(maxsize=64)
def _taps(length: int, target: int) -> _Taps:
    """The weights of a resize from `length` to `target`, read off torch's own kernel."""
    import torch

    matrix = torch.nn.functional.interpolate(
        torch.eye(length)[None, None], size=(target, length), mode="bicubic", antialias=True
    )[0, 0]
    used = matrix.ne(0)
    ends = used.sum(1).cumsum(0)
    offsets = torch.cat([ends.new_zeros(1), ends[:-1]])
    return _Taps(used.nonzero()[:, 1].int(), offsets.int(), matrix[used])


class FrameResizer:
    """Resizes frames of one size to another, each with the same few buffers.

    `size` and `target` are (height, width) in pixels.
    """

    def __init__(self, size: tuple[int, int], target: tuple[int, int]):
        import torch

        (self._height, self._width), (self._rows, self._columns) = size, target
        self.unchanged = size == target
        if not self.unchanged:
            self._vertical = _taps(self._height, self._rows)
            self._horizontal = _taps(self._width, self._columns)
            self._floats = torch.empty(self._height, self._width * 3)
            self._turned = torch.empty(self._width * 3, self._rows)

    def into(self, frame: "np.ndarray", out: "torch.Tensor") -> None:
        """`frame` uint8 [height, width, 3] into `out` [3, rows, columns], uint8 or float32 in 0..255."""
        import torch

        pixels = torch.from_numpy(frame)
        if self.unchanged:
            out.copy_(pixels.permute(2, 0, 1))
            return
        self._floats.copy_(pixels.view(self._height, -1))
        self._turned.copy_(_combine(self._floats, self._vertical).t())
        resized = _combine(self._turned.view(self._width, -1), self._horizontal)
        rounded = resized.clamp_(0, 255).round_().to(out.dtype)
        out.view(-1, self._columns).copy_(rounded.t())


def _combine(rows: "torch.Tensor", taps: _Taps) -> "torch.Tensor":
    import torch

    return torch.nn.functional.embedding_bag(
        taps.indices, rows, taps.offsets, mode="sum", per_sample_weights=taps.weights
    )
