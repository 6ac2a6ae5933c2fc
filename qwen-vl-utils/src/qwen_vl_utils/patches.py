"""Pixels as the vision towers of Qwen-VL want them: cut into patches, rescaled, normalised.

picture uint8 [h, w, 3]     -> float32 [h/p * w/p, 3 * T * p * p], grid (1, h/p, w/p)
video   uint8 [n, 3, h, w]  -> float32 [n/T * h/p * w/p, 3 * T * p * p], grid (n/T, h/p, w/p)

Patches of one merge block (m x m) stand next to each other, blocks in reading order; a picture is repeated
over the T frames of a temporal patch. Equal to the model library's image and video processors, bit for bit.

With `scaled=False` the patches stay uint8, a quarter of the bytes, for `scale` later, on any device.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class PatchLayout:
    """How one image or video processor cuts and scales."""

    patch: int
    temporal: int
    merge: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    rescale: float

    @classmethod
    def of(cls, processor: Any) -> "PatchLayout":
        """The layout of an image or video processor of the model library.

        Raises ValueError for one that does not rescale and normalise.
        """
        if not (processor.do_rescale and processor.do_normalize):
            raise ValueError(
                f"{type(processor).__name__} has do_rescale={processor.do_rescale} and do_normalize="
                f"{processor.do_normalize}; Qwen-VL's vision towers need both, set them in its configuration"
            )
        return cls(
            patch=processor.patch_size,
            temporal=processor.temporal_patch_size,
            merge=processor.merge_size,
            mean=tuple(processor.image_mean),
            std=tuple(processor.image_std),
            rescale=processor.rescale_factor,
        )

    @property
    def factor(self) -> int:
        """What the sides of a picture are multiples of [pixels]."""
        return self.patch * self.merge

    @cached_property
    def scaling(self) -> tuple[np.ndarray, np.ndarray]:
        """Mean and standard deviation in grey levels, float32, shaped for [..., 3, T, p, p]."""
        levels = np.float32(1.0 / self.rescale)
        shape = (-1, 1, 1, 1)
        return (
            (np.asarray(self.mean, np.float32) * levels).reshape(shape),
            (np.asarray(self.std, np.float32) * levels).reshape(shape),
        )

    def image(self, pixels: np.ndarray, *, scaled: bool = True) -> tuple[np.ndarray, tuple[int, int, int]]:
        """uint8 [h, w, 3] -> (patches, grid)."""
        cut, grid = self._cut(pixels.transpose(2, 0, 1)[None], 1)
        cut = self._scale(cut) if scaled else cut
        patches = np.repeat(cut, self.temporal, axis=2)
        return patches.reshape(len(patches), -1), grid

    def video(self, frames: np.ndarray, *, scaled: bool = True) -> tuple[np.ndarray, tuple[int, int, int]]:
        """uint8 [n, 3, h, w] -> (patches, grid); the last frame is repeated to fill a temporal patch."""
        if missing := -len(frames) % self.temporal:
            frames = np.concatenate([frames, np.repeat(frames[-1:], missing, axis=0)])
        cut, grid = self._cut(frames, self.temporal)
        cut = self._scale(cut) if scaled else cut
        return cut.reshape(len(cut), -1), grid

    def _cut(self, frames: np.ndarray, temporal: int) -> tuple[np.ndarray, tuple[int, int, int]]:
        """uint8 [n, 3, h, w] -> patches [n/t * h/p * w/p, 3, t, p, p], grid."""
        count, channels, height, width = frames.shape
        p, m, steps = self.patch, self.merge, count // temporal
        rows, columns = height // p, width // p
        # A patch's row of pixels is one item, so that numpy moves it in one piece.
        items = np.ascontiguousarray(frames).view(f"V{p}")
        blocks = items.reshape(steps, temporal, channels, rows // m, m, p, columns // m, m)
        cut = np.ascontiguousarray(blocks.transpose(0, 3, 6, 4, 7, 2, 1, 5)).view(np.uint8)
        return cut.reshape(-1, channels, temporal, p, p), (steps, rows, columns)

    def scale(self, patches: "torch.Tensor") -> "torch.Tensor":
        """uint8 [n, 3 * T * p * p] -> float32, on the same device, equal to scaled patches bit for bit."""
        import torch

        mean, std = (torch.from_numpy(each).to(patches.device) for each in self.scaling)
        scaled = patches.float()
        scaled.view(len(patches), len(mean), self.temporal, self.patch, self.patch).sub_(mean).div_(std)
        return scaled

    def _scale(self, blocks: np.ndarray) -> np.ndarray:
        mean, std = self.scaling
        scaled = np.subtract(blocks, mean)
        scaled /= std
        return scaled
