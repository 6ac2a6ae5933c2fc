"""Pictures in a notebook."""

from collections.abc import Sequence

import matplotlib.pyplot as plt
from PIL import Image


def show(
    pictures: Sequence[Image.Image], titles: Sequence[str] = (), *, columns: int = 4, size: float = 3
) -> None:
    """Pictures in rows of `columns`, each `size` inches wide, with what is said under each."""
    rows = -(-len(pictures) // columns)
    columns = min(columns, len(pictures))
    figure, axes = plt.subplots(rows, columns, figsize=(size * columns, (size + 0.4) * rows), squeeze=False)
    for number, axis in enumerate(axes.flat):
        axis.axis("off")
        if number < len(pictures):
            axis.imshow(pictures[number], interpolation="nearest")
            axis.set_title(titles[number] if titles else "", fontsize=9, wrap=True)
    figure.tight_layout()
    plt.show()
